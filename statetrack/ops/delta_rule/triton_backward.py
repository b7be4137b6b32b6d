"""The delta rule's backward kernels: the walk back over chunks, then each chunk's gradients in parallel.

`walk_back` carries dS^T [V K] in float32 (two-term splits in the products, as in the forward: the adjoint of a
reflection is a reflection, and decays no faster) and writes Z, the gradient to R:

    dU = scale P^T dO + D_Cj k dS,   Z = X^T dU,   dS <- D_C0 dS + scale (D_i0 q)^T dO - (w p D_i0 k)^T Z

`gather` has F, S at the start and dS at the end of every chunk and needs no order:

    U = p w F,   dv = w n Z,   H = w p Z,   dP = scale dO U^T,   dL = -H U^T
    dq = scale D_i0 dO S^T + (dP D) k
    dk = D_Cj U dS^T - D_i0 H S^T + (dP D)^T q + (dL D) k + (dL D)^T k + 2 p^2 k d|k p|^2
    dw = Z.F,   dn = w Z.v,   d beta = dw / |k p|^2,   d|k p|^2 = dn / 2n - w d beta

The gradient to the running log decay g_i is what row i reads minus what is read of row i's writing; the chunk's end
reads everything. Letters as in triton_forward.py.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.delta_rule.triton_forward import decay_between
from statetrack.ops.triton_common import chunk_of, dot, dot_add, dot_both, dot_split, operand, span, split, stretch


@triton.jit
def walk_back(
    q, k, d_out, X_hi, X_lo, scales, G, d_state, d_final, z, d_saved, starts, bases,
    T, c_lo, c_hi, scale, HK, HV, K, V,
    N: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr, OUTPUT: tl.constexpr,
    TERMS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk back from chunk c_hi - 1 to c_lo of one sequence and head, for BV columns of the state's gradient.

    Without OUTPUT it leaves only the gradient to the state before chunk c_lo.
    """
    iv = tl.program_id(0)
    sh = tl.program_id(1)
    s = sh // HV
    h = sh % HV
    hk = h // (HV // HK)
    i = tl.arange(0, 64)
    iq = tl.arange(0, BQ)
    d = tl.arange(0, BK)
    e = iv * BV + tl.arange(0, BV)
    in_k = d < K
    in_v = e < V
    see = i[None, :] // N <= iq[:, None]  # [BQ M]
    token, _ = span(s, 0, starts, T, C, VARLEN)
    total, base, last = stretch(s, starts, bases, T, c_lo, c_hi, C, VARLEN)
    tile = (sh.to(tl.int64) * K + d[None, :]) * V + e[:, None]
    # every adjoint is held divided by `scale`, so that dO enters the products as stored
    if d_final is None:
        DT = tl.zeros((BV, BK), tl.float32)
    else:
        DT = tl.load(d_final + tile, mask=in_v[:, None] & in_k[None, :], other=0.0) / scale
    for back in tl.range(0, last - c_lo, num_stages=STAGES):
        c = last - 1 - back
        slot = (base + c) * HV + h
        first = token + c * C
        kp = k + (first * N * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
        qp = q + (first * HK + hk) * K + ((iq * (HK * K))[:, None] + d[None, :])
        dop = d_out + (first * HV + h) * V + ((iq * (HV * V))[None, :] + e[:, None])
        zp = z + (first * N * HV + h) * V + ((i * (HV * V))[None, :] + e[:, None])
        if EVEN:
            kt = operand(tl.load(kp), EXACT)
            qt = operand(tl.load(qp), EXACT)
            dot_o = operand(tl.load(dop), EXACT)
        else:
            left = total - c * C
            rows = i < tl.minimum(left, C) * N
            asked = iq < tl.minimum(left, C)
            kt = operand(tl.load(kp, mask=rows[:, None] & in_k[None, :], other=0.0), EXACT)
            qt = operand(tl.load(qp, mask=asked[:, None] & in_k[None, :], other=0.0), EXACT)
            dot_o = operand(tl.load(dop, mask=asked[None, :] & in_v[:, None], other=0.0), EXACT)
        xp = i[:, None] * 64 + i[None, :]
        x_hi = tl.load(X_hi + slot * 4096 + xp)
        if TERMS == 2 and not EXACT:
            x_lo = tl.load(X_lo + slot * 4096 + xp)
        else:
            x_lo = x_hi
        read = tl.load(scales + slot * 256 + i)

        s_hi, s_lo = split(DT, EXACT)
        if OUTPUT:
            keep = d_saved + slot * K * V + (e[:, None] * K + d[None, :])
            if EVEN:
                tl.store(keep, (DT * scale).to(d_saved.dtype.element_ty))
            else:
                tl.store(keep, (DT * scale).to(d_saved.dtype.element_ty), mask=in_v[:, None] & in_k[None, :])
        P = dot(qt, tl.trans(kt), EXACT)
        UT = dot_split(s_hi, s_lo, tl.trans(kt), TERMS, EXACT)
        if GATE:
            at = tl.minimum(iq * N, 63)
            g_hi = tl.load(G + slot * 128 + i)
            g_lo = tl.load(G + slot * 128 + 64 + i)
            q_hi = tl.load(G + slot * 128 + at)
            q_lo = tl.load(G + slot * 128 + 64 + at)
            last_hi = tl.load(G + slot * 128 + 63)
            last_lo = tl.load(G + slot * 128 + 127)
            P *= decay_between(q_hi[:, None], q_lo[:, None], g_hi[None, :], g_lo[None, :], see)
            UT *= decay_between(last_hi, last_lo, g_hi, g_lo, i >= 0)[None, :]
            read *= tl.exp(g_hi)
        P = tl.where(see, P, 0.0)
        UT = dot_add(dot_o, P.to(dot_o.dtype), UT, EXACT)
        u_hi, u_lo = split(UT, EXACT)
        ZT = dot_both(u_hi, u_lo, x_hi, x_lo, TERMS, EXACT)
        if OUTPUT:
            if EVEN:
                tl.store(zp, (ZT * scale).to(z.dtype.element_ty))
            else:
                tl.store(zp, (ZT * scale).to(z.dtype.element_ty), mask=rows[None, :] & in_v[:, None])
        h_hi, h_lo = split(-ZT * read[None, :], EXACT)
        if GATE:
            DT *= tl.exp(last_hi)
            dot_o = (dot_o.to(tl.float32) * tl.exp(q_hi)[None, :]).to(dot_o.dtype)
        DT = dot_add(dot_o, qt, DT, EXACT)
        DT = dot_add(h_hi, kt, DT, EXACT)
        if TERMS == 2 and not EXACT:
            DT = tl.dot(h_lo, kt, DT)
    tl.store(d_state + tile, DT * scale, mask=in_v[:, None] & in_k[None, :])


@triton.jit
def gather(
    q, k, v, log_decay, d_out, scales, G, saved, F, d_saved, z, dq, dk, d_beta, d_decay, starts, slots,
    T, c_lo, n_chunks, n_all, scale, HK, HV, K, V,
    N: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
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
    iq = tl.arange(0, BQ)
    d = tl.arange(0, BK)
    in_k = d < K
    rows = i < tokens * N
    asked = iq < tokens
    see = i[None, :] // N <= iq[:, None]
    before = i[:, None] > i[None, :]
    kp = k + (token * N * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
    qp = q + (token * HK + hk) * K + ((iq * (HK * K))[:, None] + d[None, :])
    slot = here.to(tl.int64) * HV + h
    saved += (there.to(tl.int64) * HV + h) * K * V
    d_saved += slot * K * V
    v += (token * N * HV + h) * V
    z += (token * N * HV + h) * V
    F += (token * N * HV + h) * V
    d_out += (token * HV + h) * V
    p = tl.load(scales + slot * 256 + 192 + i)
    w = tl.load(scales + slot * 256 + i) / p
    n = tl.load(scales + slot * 256 + 64 + i) * p
    if GATE:
        at = tl.minimum(iq * N, 63)
        g_hi = tl.load(G + slot * 128 + i)
        g_lo = tl.load(G + slot * 128 + 64 + i)
        q_hi = tl.load(G + slot * 128 + at)
        q_lo = tl.load(G + slot * 128 + 64 + at)
        last_hi = tl.load(G + slot * 128 + 63)
        last_lo = tl.load(G + slot * 128 + 127)
        start = tl.exp(g_hi)
        end = decay_between(last_hi, last_lo, g_hi, g_lo, i >= 0)
    low = saved.dtype.element_ty  # what the products take

    # between the chunk's own rows: dP, dL, dw, dn
    dP = tl.zeros((BQ, 64), tl.float32)
    dL = tl.zeros((64, 64), tl.float32)
    dw = tl.zeros((64,), tl.float32)
    dn = tl.zeros((64,), tl.float32)
    for iv in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
        e = iv * BV + tl.arange(0, BV)
        vp = (i * (HV * V))[:, None] + e[None, :]
        op = (iq * (HV * V))[:, None] + e[None, :]
        if EVEN:
            vt = tl.load(v + vp)
            zt = tl.load(z + vp).to(tl.float32)
            U = tl.load(F + vp).to(tl.float32)
            do = operand(tl.load(d_out + op), EXACT)
        else:
            in_v = e < V
            alive = rows[:, None] & in_v[None, :]
            vt = tl.load(v + vp, mask=alive, other=0.0)
            zt = tl.load(z + vp, mask=alive, other=0.0).to(tl.float32)
            U = tl.load(F + vp, mask=alive, other=0.0).to(tl.float32)
            do = operand(tl.load(d_out + op, mask=asked[:, None] & in_v[None, :], other=0.0), EXACT)
        dw += tl.sum(zt * U, 1)
        dn += tl.sum(zt * vt.to(tl.float32), 1)
        u = (U * (w * p)[:, None]).to(low)
        dP = dot_add(do, tl.trans(u), dP, EXACT)
        dL = dot_add((zt * (-w * p)[:, None]).to(low), tl.trans(u), dL, EXACT)
    dP = tl.where(see, dP * scale, 0.0)
    dL = tl.where(before, dL, 0.0)
    kt = operand(tl.load(kp, mask=rows[:, None] & in_k[None, :], other=0.0), EXACT)
    qt = operand(tl.load(qp, mask=asked[:, None] & in_k[None, :], other=0.0), EXACT)
    if GATE:
        dP *= decay_between(q_hi[:, None], q_lo[:, None], g_hi[None, :], g_lo[None, :], see)
        dL *= decay_between(g_hi[:, None], g_lo[:, None], g_hi[None, :], g_lo[None, :], before)
        seen = dP * dot(qt, tl.trans(kt), EXACT)
        solved = dL * dot(kt, tl.trans(kt), EXACT)
        micro = tl.sum(solved, 1) - tl.sum(solved, 0) - tl.sum(seen, 0)
        dg = tl.sum(seen, 1)
    dp = dP.to(low)
    dl = (dL + tl.trans(dL)).to(low)

    # dq
    acc = tl.zeros((BQ, BK), tl.float32)
    for iv in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
        e = iv * BV + tl.arange(0, BV)
        block = e[:, None] * K + d[None, :]
        op = (iq * (HV * V))[:, None] + e[None, :]
        if EVEN:
            S = tl.load(saved + block)
            do = operand(tl.load(d_out + op), EXACT)
        else:
            in_v = e < V
            S = tl.load(saved + block, mask=in_v[:, None] & in_k[None, :], other=0.0)
            do = operand(tl.load(d_out + op, mask=asked[:, None] & in_v[None, :], other=0.0), EXACT)
        acc = dot_add(do, S, acc, EXACT)
    acc *= scale
    if GATE:
        acc *= tl.exp(q_hi)[:, None]
        dg += tl.sum(acc * qt.to(tl.float32), 1)
    acc = dot_add(dp, kt, acc, EXACT)
    dq += (token * HV + h) * K
    qo = (iq * (HV * K))[:, None] + d[None, :]
    tl.store(dq + qo, acc.to(dq.dtype.element_ty), mask=asked[:, None] & in_k[None, :])

    # dk, and dv in place of Z
    kl = tl.zeros((64, BK), tl.float32)
    left = tl.zeros((64,), tl.float32)
    carried = tl.zeros((BK,), tl.float32)
    for iv in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
        e = iv * BV + tl.arange(0, BV)
        block = e[:, None] * K + d[None, :]
        vp = (i * (HV * V))[:, None] + e[None, :]
        if EVEN:
            S = tl.load(saved + block)
            D = tl.load(d_saved + block)
            zt = tl.load(z + vp).to(tl.float32)
            U = tl.load(F + vp).to(tl.float32)
        else:
            in_v = e < V
            inside = in_v[:, None] & in_k[None, :]
            alive = rows[:, None] & in_v[None, :]
            S = tl.load(saved + block, mask=inside, other=0.0)
            D = tl.load(d_saved + block, mask=inside, other=0.0)
            zt = tl.load(z + vp, mask=alive, other=0.0).to(tl.float32)
            U = tl.load(F + vp, mask=alive, other=0.0).to(tl.float32)
        written = w * p
        read = -w * p
        if GATE:
            written *= end
            read *= start
            carried += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
        kl = dot_add((U * written[:, None]).to(low), D, kl, EXACT)
        H = (zt * read[:, None]).to(low)
        if GATE:
            back = dot(H, S, EXACT)
            left -= tl.sum(back * kt.to(tl.float32), 1)
            kl += back
        else:
            kl = dot_add(H, S, kl, EXACT)
        dv = (zt * (w * n)[:, None]).to(z.dtype.element_ty)
        if EVEN:
            tl.store(z + vp, dv)
        else:
            tl.store(z + vp, dv, mask=alive)
    if GATE:
        right = tl.sum(kt.to(tl.float32) * kl, 1) + left
        micro -= left + right
        dg += tl.sum(tl.where(i[None, :] // N == iq[:, None], micro[None, :], 0.0), 1)
        at_end = tl.sum(right, 0) + tl.sum(carried, 0) * tl.exp(last_hi)
        dg = tl.cumsum(dg, 0, reverse=True) + at_end
        gp = (token + iq) * HV + h
        alive_g = asked & (tl.load(log_decay + gp, mask=asked, other=0.0).to(tl.float32) > -104.0)
        tl.store(d_decay + gp, tl.where(alive_g, dg, 0.0), mask=asked)
    kl = dot_add(tl.trans(dp), qt, kl, EXACT)
    kl = dot_add(dl, kt, kl, EXACT)
    db = dw / (n * n)
    d_squared = dn * w / (2.0 * n) - db * w
    kl += (2.0 * kt.to(tl.float32) * (p * d_squared)[:, None]) * p[:, None]
    dk += (token * N * HV + h) * K
    ko = (i * (HV * K))[:, None] + d[None, :]
    tl.store(dk + ko, kl.to(dk.dtype.element_ty), mask=rows[:, None] & in_k[None, :])
    tl.store(d_beta + (token * N + i) * HV + h, db, mask=rows)
