"""The delta rule's backward kernels: the walk back over chunks, then each chunk's gradients in parallel.

`walk_back` carries dS^T [V K] in float32 (two-term splits in the products, as in the forward: the adjoint of a
reflection is a reflection, and decays no faster) and writes Z, the gradient to R:

    dU = scale P^T dO + D_Cj k dS,   Z = X^T dU,   dS <- D_C0 dS + scale (D_i0 q)^T dO - (w p D_i0 k)^T Z

`gather` has S at the start and dS at the end of every chunk and needs no order:

    dv = w n Z,   H = w p Z,   dP = scale dO U^T,   dL = -H U^T,   F = R / w = n v - p D_i0 k S - p (L D) U
    dq = scale D_i0 dO S^T + (dP D) k
    dk = D_Cj U dS^T - D_i0 H S^T + (dP D)^T q + (dL D) k + (dL D)^T k + 2 p^2 k d|k p|^2
    dw = Z.F,   dn = w Z.v,   d beta = dw / |k p|^2,   d|k p|^2 = dn / 2n - w d beta

The gradient to the running log decay g_i is what row i reads minus what is read of row i's writing; the chunk's end
reads everything. Letters as in triton_forward.py.
"""

import triton
import triton.language as tl

from statetrack.ops.delta_rule.triton_forward import dot, dot_both, dot_split, operand, span, split


@triton.jit
def walk_back(
    q, k, d_out, X_hi, X_lo, scales, G, d_state, d_final, z, d_saved, starts, bases,
    T, c_lo, c_hi, scale, HK, HV, K, V,
    N: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr,
    TERMS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk back from chunk c_hi - 1 to c_lo of one sequence and head, for BV columns of the state's gradient."""
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
    if VARLEN:
        total = tl.load(starts + s + 1) - tl.load(starts + s)
        base = tl.load(bases + s).to(tl.int64)
        last = tl.cdiv(total, C)
    else:
        total = T
        base = s.to(tl.int64) * (c_hi - c_lo) - c_lo
        last = c_hi
    tile = (sh.to(tl.int64) * K + d[None, :]) * V + e[:, None]
    # every adjoint is held divided by `scale`, so that dO enters the products as stored
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
        w = tl.load(scales + slot * 192 + i)
        p = tl.load(scales + slot * 192 + 128 + i)

        s_hi, s_lo = split(DT, EXACT)
        keep = d_saved + slot * K * V + (e[:, None] * K + d[None, :])
        if EXACT:
            kept = DT * scale
        else:
            kept = (DT * scale).to(tl.bfloat16)
        if EVEN:
            tl.store(keep, kept)
        else:
            tl.store(keep, kept, mask=in_v[:, None] & in_k[None, :])
        P = dot(qt, tl.trans(kt), EXACT)
        UT = dot_split(s_hi, s_lo, tl.trans(kt), TERMS, EXACT)
        read = w * p
        if GATE:
            g = tl.load(G + slot * 64 + i)
            g_last = tl.load(G + slot * 64 + 63)
            gq = tl.load(G + slot * 64 + tl.minimum(iq * N, 63))
            P *= tl.exp(tl.where(see, gq[:, None] - g[None, :], 0.0).to(tl.float32))
            UT *= tl.exp((g_last - g).to(tl.float32))[None, :]
            read *= tl.exp(g.to(tl.float32))
        P = tl.where(see, P, 0.0)
        if EXACT:
            UT += dot(dot_o, P, EXACT)
        else:
            UT = tl.dot(dot_o, P.to(tl.bfloat16), UT)
        u_hi, u_lo = split(UT, EXACT)
        ZT = dot_both(u_hi, u_lo, x_hi, x_lo, TERMS, EXACT)
        if EVEN:
            tl.store(zp, (ZT * scale).to(z.dtype.element_ty))
        else:
            tl.store(zp, (ZT * scale).to(z.dtype.element_ty), mask=rows[None, :] & in_v[:, None])
        h_hi, h_lo = split(-ZT * read[None, :], EXACT)
        if GATE:
            DT *= tl.exp(g_last.to(tl.float32))
            dot_o = (dot_o.to(tl.float32) * tl.exp(gq.to(tl.float32))[None, :]).to(dot_o.dtype)
        if EXACT:
            DT += tl.dot(h_hi, kt, input_precision="tf32x3") + dot(dot_o, qt, EXACT)
        else:
            DT = tl.dot(dot_o, qt, DT)
            DT = tl.dot(h_hi, kt, DT)
            if TERMS == 2:
                DT = tl.dot(h_lo, kt, DT)
    tl.store(d_state + tile, DT * scale, mask=in_v[:, None] & in_k[None, :])


@triton.jit
def gather(
    q, k, v, log_decay, d_out, X_hi, scales, G, saved, d_saved, z, dq, dk, d_beta, d_decay, starts, slots,
    T, c_lo, n_chunks, n_all, scale, HK, HV, K, V,
    N: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk's inputs; dv replaces Z."""
    here = tl.program_id(0)
    h = tl.program_id(1)
    if VARLEN:
        s = tl.load(slots + 2 * here)
        c = tl.load(slots + 2 * here + 1)
        there = here
    else:
        s = here // n_chunks
        c = c_lo + here % n_chunks
        there = s * n_all + c
    token, tokens = span(s, c, starts, T, C, VARLEN)
    hk = h // (HV // HK)
    i = tl.arange(0, 64)
    iq = tl.arange(0, BQ)
    d = tl.arange(0, BK)
    in_k = d < K
    rows = i < tokens * N
    asked = iq < tokens
    row = token * N + i
    ask = token + iq
    see = i[None, :] // N <= iq[:, None]
    before = i[:, None] > i[None, :]
    kp = (i * (HK * K))[:, None] + d[None, :]
    qp = (iq * (HK * K))[:, None] + d[None, :]
    k += (token * N * HK + hk) * K
    q += (token * HK + hk) * K
    kt = operand(tl.load(k + kp, mask=rows[:, None] & in_k[None, :], other=0.0), EXACT)
    qt = operand(tl.load(q + qp, mask=asked[:, None] & in_k[None, :], other=0.0), EXACT)
    low = kt.dtype  # what the products take
    slot = here.to(tl.int64) * HV + h
    w = tl.load(scales + slot * 192 + i)
    n = tl.load(scales + slot * 192 + 64 + i)
    p = tl.load(scales + slot * 192 + 128 + i)
    X = tl.load(X_hi + slot * 4096 + (i[:, None] * 64 + i[None, :]))
    L = tl.where(before, dot(kt, tl.trans(kt), EXACT), 0.0)
    if GATE:
        g = tl.load(G + slot * 64 + i)
        gq = tl.load(G + slot * 64 + tl.minimum(iq * N, 63))
        g_last = tl.load(G + slot * 64 + 63)
        between = tl.exp(tl.where(before, g[:, None] - g[None, :], 0.0).to(tl.float32))
        between_q = tl.exp(tl.where(see, gq[:, None] - g[None, :], 0.0).to(tl.float32))
        start = tl.exp(g.to(tl.float32))
        start_q = tl.exp(gq.to(tl.float32))
        end = tl.exp((g_last - g).to(tl.float32))
        L *= between
    ql = tl.zeros((BQ, BK), tl.float32)
    kl = tl.zeros((64, BK), tl.float32)
    dP = tl.zeros((BQ, 64), tl.float32)
    dL = tl.zeros((64, 64), tl.float32)
    dw = tl.zeros((64,), tl.float32)
    dn = tl.zeros((64,), tl.float32)
    left = tl.zeros((64,), tl.float32)
    carried = 0.0
    saved += (there.to(tl.int64) * HV + h) * K * V
    d_saved += slot * K * V
    v += (token * N * HV + h) * V
    z += (token * N * HV + h) * V
    d_out += (token * HV + h) * V
    for iv in range(0, tl.cdiv(V, BV)):
        e = iv * BV + tl.arange(0, BV)
        in_v = e < V
        block = e[:, None] * K + d[None, :]
        inside = in_v[:, None] & in_k[None, :]
        S = tl.load(saved + block, mask=inside, other=0.0)
        D = tl.load(d_saved + block, mask=inside, other=0.0)
        vp = (i * (HV * V))[:, None] + e[None, :]
        alive = rows[:, None] & in_v[None, :]
        vt = tl.load(v + vp, mask=alive, other=0.0).to(tl.float32)
        zt = tl.load(z + vp, mask=alive, other=0.0).to(tl.float32)
        op = (iq * (HV * V))[:, None] + e[None, :]
        do = operand(tl.load(d_out + op, mask=asked[:, None] & in_v[None, :], other=0.0), EXACT)
        read = dot(kt, tl.trans(S), EXACT) * p[:, None]
        H = zt * (w * p)[:, None]
        Hs = H
        if GATE:
            read *= start[:, None]
            Hs = H * start[:, None]
            carried += tl.sum(tl.sum(S.to(tl.float32) * D.to(tl.float32), 1), 0)
            left += tl.sum(zt * read, 1) * w
        F = vt * n[:, None] - read
        U = dot(X, (F * w[:, None]).to(low), EXACT)
        Ue = U
        if GATE:
            Ue = U * end[:, None]
        u = U.to(low)
        F -= dot(L.to(low), u, EXACT) * p[:, None]
        dw += tl.sum(zt * F, 1)
        dn += tl.sum(zt * vt, 1) * w
        tl.store(z + vp, (zt * (w * n)[:, None]).to(z.dtype.element_ty), mask=alive)
        hl = H.to(low)
        dP += dot(do, tl.trans(u), EXACT)
        dL -= dot(hl, tl.trans(u), EXACT)
        ql += dot(do, S, EXACT)
        kl += dot(Ue.to(low), D, EXACT) - dot(Hs.to(low), S, EXACT)
    dP = tl.where(see, dP * scale, 0.0)
    dL = tl.where(before, dL, 0.0)
    ql *= scale
    if GATE:
        ql *= start_q[:, None]
        right = tl.sum(kt.to(tl.float32) * kl, 1) + left
        dP *= between_q
        seen = dP * dot(qt, tl.trans(kt), EXACT)
        solved = dL * L
        dL *= between
        micro = tl.sum(solved, 1) - tl.sum(solved, 0) - tl.sum(seen, 0) - left - right
        dg = tl.sum(ql * qt.to(tl.float32), 1) + tl.sum(seen, 1)
        dg += tl.sum(tl.where(i[None, :] // N == iq[:, None], micro[None, :], 0.0), 1)
        at_end = tl.sum(right, 0) + carried * tl.exp(g_last.to(tl.float32))
        dg = tl.cumsum(dg, 0, reverse=True) + at_end
        decay = log_decay + ask * HV + h
        alive_g = asked & (tl.load(decay, mask=asked, other=0.0).to(tl.float32) > -104.0)
        tl.store(d_decay + ask * HV + h, tl.where(alive_g, dg, 0.0), mask=asked)
    dp = dP.to(low)
    ql += dot(dp, kt, EXACT)
    kl += dot(tl.trans(dp), qt, EXACT)
    dl = (dL + tl.trans(dL)).to(low)
    kl += dot(dl, kt, EXACT)
    db = dw / (n * n)
    d_squared = dn / (2.0 * n) - db * w
    kl += (2.0 * kt.to(tl.float32) * (p * d_squared)[:, None]) * p[:, None]
    dk += (token * N * HV + h) * K
    dq += (token * HV + h) * K
    out_k = (i * (HV * K))[:, None] + d[None, :]
    out_q = (iq * (HV * K))[:, None] + d[None, :]
    tl.store(dk + out_k, kl.to(dk.dtype.element_ty), mask=rows[:, None] & in_k[None, :])
    tl.store(dq + out_q, ql.to(dq.dtype.element_ty), mask=asked[:, None] & in_k[None, :])
    tl.store(d_beta + row * HV + h, db, mask=rows)
