"""The delta rule's backward kernels for a decay per key channel: the walk back, then each chunk's gradients.

`walk_back_keys` carries dS^T [V K] in float32 and writes Z (names as in triton_key_forward.py, X for I + diag(w) L):

    dU = scale P^T dO + out dS,   Z = X^T dU,   dS <- total dS + scale query^T dO - in^T (w Z)

`gather_keys` has F, S at the start and dS at the end of every chunk and needs no order:

    U = w F,   dv = w n Z,   dP = scale dO U^T,   dL = -w Z U^T,   dw = Z.F,   dn = w Z.v
    d in = -w Z S^T,   d out = U dS^T,   d query = scale dO S^T,   d total = sum_V S dS

and takes dP and dL to keys and queries with the scales of the forward, block of rows by block. Each use of row i as the
later one of a pair carries e^g_i, as the earlier one e^-g_i, and the chunk's end reads everything: that is the gradient
to the running log decay, channel by channel.

Letters as in triton_key_forward.py.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.delta_rule.triton_key_forward import (
    blocks,
    last_row,
    left_scale,
    pair_decay,
    reference,
    right_scale,
    row_of,
    running,
    terms_of,
)
from statetrack.ops.triton_common import chunk_of, dot, dot_add, dot_both, operand, span, split, stretch


@triton.jit
def walk_back_keys(
    d_out, Rows, Squares, scales, total, d_state, d_final, z, d_saved, starts, bases,
    T, c_lo, c_hi, scale, HV, K, V,
    N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr,
    TERMS: tl.constexpr, TWO: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk back from chunk c_hi - 1 to c_lo of one sequence and head, for BV columns of the state's gradient."""
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    sh = tl.program_id(1)
    s = sh // HV
    h = sh % HV
    i = tl.arange(0, 64)
    d = tl.arange(0, BK)
    in_v = (e < V)[:, None]
    inside = in_v & (d < K)[None, :]
    token, _ = span(s, 0, starts, T, C, VARLEN)
    length, base, stop = stretch(s, starts, bases, T, c_lo, c_hi, C, VARLEN)
    tile = (sh.to(tl.int64) * K + d[None, :]) * V + e[:, None]
    rp = i[:, None] * BK + d[None, :]
    xp = i[:, None] * 64 + i[None, :]
    # every adjoint is held divided by `scale`, so that dO enters the products as stored
    if d_final is None:
        DT = tl.zeros((BV, BK), tl.float32)
    else:
        DT = tl.load(d_final + tile, mask=inside, other=0.0) / scale
    for back in tl.range(0, stop - c_lo, num_stages=STAGES):
        c = stop - 1 - back
        slot = (base + c) * HV + h
        first = token + c * C
        alive = i < tl.minimum(length - c * C, C) * N
        asks = alive & (i % N == N - 1)
        rows = Rows + slot * ((5 if TWO else 3) * 64 * BK) + rp
        squares = Squares + slot * ((3 if TWO else 2) * 4096) + xp
        op = (first * HV + h) * V + ((i // N * (HV * V))[None, :] + e[:, None])
        dot_o = operand(tl.load(d_out + op, mask=asks[None, :] & in_v, other=0.0), EXACT)
        w = tl.load(scales + slot * 256 + i)

        s_hi, s_lo = split(DT, EXACT)
        keep = d_saved + slot * K * V + (e[:, None] * K + d[None, :])
        tl.store(keep, (DT * scale).to(d_saved.dtype.element_ty), mask=inside)
        out_hi, out_lo = terms_of(rows + 64 * BK, 3 * 64 * BK, TWO)
        UT = dot_both(s_hi, s_lo, tl.trans(out_hi), tl.trans(out_lo), TERMS, EXACT)
        UT = dot_add(dot_o, tl.load(squares + 4096), UT, EXACT)
        x_hi, x_lo = terms_of(squares, 2 * 4096, TWO)
        u_hi, u_lo = split(UT, EXACT)
        ZT = dot_both(u_hi, u_lo, x_hi, x_lo, TERMS, EXACT)
        zp = (first * N * HV + h) * V + ((i * (HV * V))[None, :] + e[:, None])
        tl.store(z + zp, (ZT * scale).to(z.dtype.element_ty), mask=alive[None, :] & in_v)
        h_hi, h_lo = split(-ZT * w[None, :], EXACT)
        DT *= tl.load(total + slot * BK + d)[None, :]
        DT = dot_add(dot_o, tl.load(rows + 2 * 64 * BK), DT, EXACT)
        in_hi, in_lo = terms_of(rows, 3 * 64 * BK, TWO)
        DT = dot_add(h_hi, in_hi, DT, EXACT)
        if TWO:
            DT = tl.dot(h_lo, in_hi, DT)
            DT = tl.dot(h_hi, in_lo, DT)
    tl.store(d_state + tile, DT * scale, mask=inside)


@triton.jit
def gather_keys(
    q, k, v, log_decay, d_out, scales, saved, F, d_saved, z, dq, dk, d_beta, d_decay, starts, slots,
    T, c_lo, n_chunks, n_all, scale, HK, HV, K, V, g_token, g_head, g_key,
    N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr,
    EXACT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk's inputs; dv replaces Z."""
    here = tl.program_id(0) // HV
    h = tl.program_id(0) % HV
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    there = here
    if not VARLEN:
        there = s * n_all + c
    token, tokens = span(s, c, starts, T, C, VARLEN)
    hk = h // (HV // HK)
    i = tl.arange(0, 64)
    block = i // 16
    alive = i < tokens * N
    asks = alive & (i % N == N - 1)
    opens = alive & (i % N == 0)
    slot = here.to(tl.int64) * HV + h
    saved += (there.to(tl.int64) * HV + h) * K * V
    d_saved += slot * K * V
    v += (token * N * HV + h) * V
    z += (token * N * HV + h) * V
    F += (token * N * HV + h) * V
    d_out += (token * HV + h) * V
    vp = (i * (HV * V))[:, None]
    op = (i // N * (HV * V))[:, None]
    w = tl.load(scales + slot * 256 + i)
    n = tl.load(scales + slot * 256 + 64 + i)
    p = tl.load(scales + slot * 256 + 128 + i)
    low = saved.dtype.element_ty  # what the products take

    # between the chunk's own rows: dP, dL, dw, dn
    dP = tl.zeros((64, 64), tl.float32)
    dL = tl.zeros((64, 64), tl.float32)
    dw = tl.zeros((64,), tl.float32)
    dn = tl.zeros((64,), tl.float32)
    for column in tl.range(0, V, BV):
        e = column + tl.arange(0, BV)[None, :]
        there_v = alive[:, None] & (e < V)
        vt = tl.load(v + vp + e, mask=there_v, other=0.0).to(tl.float32)
        zt = tl.load(z + vp + e, mask=there_v, other=0.0).to(tl.float32)
        f = tl.load(F + vp + e, mask=there_v, other=0.0).to(tl.float32)
        do = operand(tl.load(d_out + op + e, mask=asks[:, None] & (e < V), other=0.0), EXACT)
        dw += tl.sum(zt * f, 1)
        dn += tl.sum(zt * vt, 1) * w
        u = tl.trans((f * w[:, None]).to(low))
        dP = dot_add(do, u, dP, EXACT)
        dL = dot_add((zt * -w[:, None]).to(low), u, dL, EXACT)
    dP = tl.where(i[:, None] >= i[None, :], dP * scale, 0.0)
    dL = tl.where(i[:, None] > i[None, :], dL, 0.0)
    db = dw / (n * n)
    tl.store(d_beta + (token * N + i) * HV + h, db, mask=alive)
    d_squared = dn / (2.0 * n) - db * w

    for lowest in tl.range(0, BK, BS):
        d = lowest + tl.arange(0, BS)
        in_k = (d < K)[None, :]
        at_start = tl.zeros((64, BS), tl.float32)  # d in
        at_end = tl.zeros((64, BS), tl.float32)  # d out
        asked = tl.zeros((64, BS), tl.float32)  # d query
        carried = tl.zeros((BS,), tl.float32)  # d total
        for column in tl.range(0, V, BV):
            e = column + tl.arange(0, BV)
            inside = (e < V)[:, None] & in_k
            there_v = alive[:, None] & (e < V)[None, :]
            S = tl.load(saved + e[:, None] * K + d[None, :], mask=inside, other=0.0)
            D = tl.load(d_saved + e[:, None] * K + d[None, :], mask=inside, other=0.0)
            zt = tl.load(z + vp + e[None, :], mask=there_v, other=0.0).to(tl.float32)
            f = tl.load(F + vp + e[None, :], mask=there_v, other=0.0).to(tl.float32)
            do = operand(tl.load(d_out + op + e[None, :], mask=asks[:, None] & (e < V)[None, :], other=0.0), EXACT)
            carried += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
            at_start = dot_add((zt * -w[:, None]).to(low), S, at_start, EXACT)
            at_end = dot_add((f * w[:, None]).to(low), D, at_end, EXACT)
            asked = dot_add(do, S, asked, EXACT)

        kp = k + ((token * N + i) * HK + hk)[:, None] * K + d[None, :]
        qp = q + ((token + i // N) * HK + hk)[:, None] * K + d[None, :]
        gp = log_decay + ((token + i // N) * g_token + h * g_head)[:, None] + d[None, :] * g_key
        kt = tl.load(kp, mask=alive[:, None] & in_k, other=0.0).to(tl.float32) * p[:, None]
        qt = tl.load(qp, mask=asks[:, None] & in_k, other=0.0).to(tl.float32)
        hi, lo = running(gp, opens[:, None] & in_k)
        ref, mild = reference(hi, LIMIT, BS)
        scale_left = left_scale(hi, lo, ref, BS)
        k_left = (kt * scale_left).to(low)
        q_left = (qt * scale_left).to(low)
        as_later = tl.zeros((64, BS), tl.float32)
        as_earlier = tl.zeros((64, BS), tl.float32)
        as_query = tl.zeros((64, BS), tl.float32)
        for b in tl.range(4):
            scale_right = right_scale(hi, lo, ref, mild, b)
            k_right = (kt * scale_right).to(low)
            dl = tl.where((block == b)[:, None], dL, 0.0).to(low)
            dp = tl.where((block == b)[:, None], dP, 0.0).to(low)
            as_later = dot_add(dl, k_right, as_later, EXACT)
            as_query = dot_add(dp, k_right, as_query, EXACT)
            back = dot_add(tl.trans(dp), q_left, dot(tl.trans(dl), k_left, EXACT), EXACT)
            as_earlier += back * scale_right
        as_later *= scale_left
        as_query *= scale_left
        if tl.min(tl.min(tl.min(mild, 2), 1), 0) == 0.0:
            k3 = blocks(kt, BS)
            q3 = blocks(qt, BS)
            for c in tl.range(16):
                decay = pair_decay(blocks(hi, BS), blocks(lo, BS), mild, c)
                chosen = i[None, :] == (block * 16 + c)[:, None]
                dl3 = tl.reshape(tl.sum(tl.where(chosen, dL, 0.0), 1), (4, 16))[:, :, None]
                dp3 = tl.reshape(tl.sum(tl.where(chosen, dP, 0.0), 1), (4, 16))[:, :, None]
                as_later += tl.reshape(dl3 * decay * row_of(k3, c), (64, BS))
                as_query += tl.reshape(dp3 * decay * row_of(k3, c), (64, BS))
                gathered = tl.sum((dl3 * k3 + dp3 * q3) * decay, 1)[:, None, :]
                as_earlier += tl.reshape(tl.where(tl.arange(0, 16)[None, :, None] == c, gathered, 0.0), (64, BS))

        last_hi = last_row(hi)
        last_lo = last_row(lo)
        start = tl.exp(hi + lo)
        as_later += at_start * start
        as_query += asked * (scale * start)
        at_end *= tl.exp((last_hi[None, :] - hi) + (last_lo[None, :] - lo))
        as_earlier += at_end
        dg = tl.cumsum(kt * (as_later - as_earlier) + qt * as_query, 0, reverse=True)
        dg += (tl.sum(kt * at_end, 0) + tl.exp(last_hi + last_lo) * carried)[None, :]
        g_out = d_decay + (((token + i // N) * HV + h) * K)[:, None] + d[None, :]
        finite = tl.load(gp, mask=opens[:, None] & in_k, other=0.0).to(tl.float32) > -104.0
        tl.store(g_out, tl.where(finite, dg, 0.0), mask=opens[:, None] & in_k)
        dkt = (as_later + as_earlier + 2.0 * kt * d_squared[:, None]) * p[:, None]
        k_out = dk + ((token * N + i) * HV + h)[:, None] * K + d[None, :]
        tl.store(k_out, dkt.to(dk.dtype.element_ty), mask=alive[:, None] & in_k)
        q_out = dq + ((token + i // N) * HV + h)[:, None] * K + d[None, :]
        tl.store(q_out, as_query.to(dq.dtype.element_ty), mask=asks[:, None] & in_k)

    tl.debug_barrier()  # Z has been read by all
    for column in tl.range(0, V, BV):
        e = column + tl.arange(0, BV)[None, :]
        there_v = alive[:, None] & (e < V)
        zt = tl.load(z + vp + e, mask=there_v, other=0.0).to(tl.float32)
        tl.store(z + vp + e, (zt * (w * n)[:, None]).to(z.dtype.element_ty), mask=there_v)
