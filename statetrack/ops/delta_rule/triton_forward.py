"""The delta rule's forward kernels: what each chunk needs beside its inputs, then the walk over chunks.

`prepare` (parallel over chunks) computes, for the M = C N rows of a chunk, with p the power of two that brings a key's
largest entry near 1, n = |p k| and w = beta / n^2,

    L_ij = p_i p_j k_i.k_j D_ij (j < i; D_ij the decay from row j to row i),   X = (I + L diag(w))^-1

`walk` holds S^T [V K] in float32 and feeds the tensor cores two-term splits of it, of R and of U, chunk after chunk:

    R = (n / p) v - D_i0 k S,   F = X p R,   U = p w F
    o_i = D_i0 q_i S + sum_j D_ij (q_i.k_j) U_j,   S <- D_C0 S + (D_Cj k)^T U

Everything is computed transposed (V rows), so that S, R and U go from one product's accumulator into the next product's
left operand without leaving registers. Keys enter the products as stored, and `prepare` writes X p. For the backward it
writes the other form, p (I + diag(w) L)^-1, and `walk` saves S at the chunks' starts and F. On Hopper GPUs with bf16
tensors the kernels of triton_hopper_walk.py walk instead.

Letters: B batch, T tokens, C tokens per chunk, N factors per token, M rows of a chunk (64, the last ones empty when N
does not divide 64), H value heads, K key dim, V value dim. A `slot` numbers the (sequence, chunk) pairs of a workspace.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.triton_common import (
    chunk_of,
    dot,
    dot_add,
    dot_both,
    dot_split,
    operand,
    span,
    split,
    stretch,
    unit_lower_inverse,
)

ROWS = 64  # M
CUT = tl.constexpr(-1048576.0)  # stands for a log_decay of -inf: exp of it is 0, and float64 sums of it stay exact


@triton.jit
def decay_between(hi, lo, from_hi, from_lo, wanted):
    """Return exp of the difference of two running log decays, each given as two terms, where wanted (else 1)."""
    return tl.exp(tl.where(wanted, (hi - from_hi) + (lo - from_lo), 0.0))


@triton.jit
def power(largest):
    """Return the power of two that brings a float32 near 1 (1 for 0)."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    p = ((253 - tl.minimum(tl.maximum(exponent, 1), 252)) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest == 0.0, 1.0, p)


@triton.jit
def key_scales(k):
    """Return p and |k p|^2 (1 for a zero key) in float64 of every row of a float32 tile."""
    p = power(tl.max(tl.abs(k), 1))
    scaled = (k * p[:, None]).to(tl.float64)
    squared = tl.sum(scaled * scaled, 1)
    return p, tl.where(squared == 0.0, 1.0, squared)


@triton.jit
def prepare(
    k, beta, log_decay, X_hi, X_lo, scales, G, starts, slots,
    T, c_lo, n_chunks, HK, HV, K,
    N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr, BACKWARD: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Write one chunk's X (as two terms), p w, n / p, p times the rest of w, p, and the log decay (as two terms)."""
    slot = tl.program_id(0) // HV  # heads vary fastest: their rows are neighbours in memory
    h = tl.program_id(0) % HV
    s, c = chunk_of(slot, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, 64)
    d = tl.arange(0, BK)
    alive = i < tokens * N
    row = token * N + i
    kp = k + ((row * HK + h // (HV // HK)) * K)[:, None] + d[None, :]
    kt = operand(tl.load(kp, mask=alive[:, None] & (d < K)[None, :], other=0.0), EXACT)
    p, squared = key_scales(kt.to(tl.float32))
    both = tl.load(beta + row * HV + h, mask=alive, other=0.0).to(tl.float64) / squared
    w = both.to(tl.float32)
    if EXACT:  # an error of w k.k recurs with its keys, and adds up
        A = tl.dot(kt, tl.trans(kt), input_precision="ieee")
    else:
        A = tl.dot(kt, tl.trans(kt))
    if BACKWARD:
        A *= (w * p)[:, None] * p[None, :]
    else:
        A *= p[:, None] * (w * p)[None, :]
    out = (slot.to(tl.int64) * HV + h) * 64
    if GATE:
        first = alive & (i % N == 0)
        g = tl.load(log_decay + (token + i // N) * HV + h, mask=first, other=0.0).to(tl.float64)
        g = tl.cumsum(tl.maximum(g, CUT), 0)
        g_hi = g.to(tl.float32)
        g_lo = (g - g_hi.to(tl.float64)).to(tl.float32)
        tl.store(G + out * 2 + i, g_hi)
        tl.store(G + out * 2 + 64 + i, g_lo)
        A *= decay_between(g_hi[:, None], g_lo[:, None], g_hi[None, :], g_lo[None, :], i[:, None] > i[None, :])
    A = tl.where(i[:, None] > i[None, :], A, 0.0)
    X = unit_lower_inverse(A, EXACT)
    if BACKWARD:
        X *= p[:, None]
    else:
        X *= p[None, :]
    hi, lo = split(X, EXACT)
    tile = out * 64 + i[:, None] * 64 + i[None, :]
    tl.store(X_hi + tile, hi)
    if TERMS == 2 and not EXACT:
        tl.store(X_lo + tile, lo)
    tl.store(scales + out * 4 + i, w * p)
    tl.store(scales + out * 4 + 64 + i, tl.sqrt(squared.to(tl.float32)) / p)
    tl.store(scales + out * 4 + 128 + i, (both - w.to(tl.float64)).to(tl.float32) * p)
    tl.store(scales + out * 4 + 192 + i, p)


@triton.jit
def walk(
    q, k, v, X_hi, X_lo, scales, G, initial, o, final, saved, F, starts, bases,
    T, scale, HK, HV, K, V,
    N: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
    VALUES: tl.constexpr, OUTPUT: tl.constexpr, TERMS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks of one sequence and head, for BV columns of the state.

    Without VALUES it applies the transition alone; without OUTPUT it leaves only the final state. No initial state is
    zero, without VALUES the identity.
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
    see = i[:, None] // N <= iq[None, :]  # [M BQ]
    token, _ = span(s, 0, starts, T, C, VARLEN)
    total, base, chunks = stretch(s, starts, bases, T, 0, tl.cdiv(T, C), C, VARLEN)
    tile = (sh.to(tl.int64) * K + d[None, :]) * V + e[:, None]  # [BV BK] of a [K V] state
    if initial is not None:
        ST = tl.load(initial + tile, mask=in_v[:, None] & in_k[None, :], other=0.0)
    elif VALUES:
        ST = tl.zeros((BV, BK), tl.float32)
    else:
        ST = tl.where(e[:, None] == d[None, :], 1.0, 0.0)
    k += (token * N * HK + hk) * K
    v += (token * N * HV + h) * V + iv * BV
    q += (token * HK + hk) * K
    o += (token * HV + h) * V + iv * BV
    F += (token * N * HV + h) * V + iv * BV
    er = tl.arange(0, BV)
    for c in tl.range(0, chunks, num_stages=STAGES):
        slot = (base + c) * HV + h
        kp = k + (i * (HK * K))[:, None] + d[None, :]
        vp = v + (i * (HV * V))[None, :] + er[:, None]
        qp = q + (iq * (HK * K))[:, None] + d[None, :]
        op = o + (iq * (HV * V))[None, :] + er[:, None]
        if EVEN:
            kt = operand(tl.load(kp), EXACT)
            if VALUES:
                vt = tl.load(vp)
            if OUTPUT:
                qt = operand(tl.load(qp), EXACT)
        else:
            left = total - c * C
            rows = i < tl.minimum(left, C) * N
            kt = operand(tl.load(kp, mask=rows[:, None] & in_k[None, :], other=0.0), EXACT)
            if VALUES:
                vt = tl.load(vp, mask=rows[None, :] & in_v[:, None], other=0.0)
            if OUTPUT:
                asked = iq < tl.minimum(left, C)
                qt = operand(tl.load(qp, mask=asked[:, None] & in_k[None, :], other=0.0), EXACT)
        xp = i[:, None] * 64 + i[None, :]
        x_hi = tl.load(X_hi + slot * 4096 + xp)
        if TERMS == 2 and not EXACT:
            x_lo = tl.load(X_lo + slot * 4096 + xp)
        else:
            x_lo = x_hi
        w = tl.load(scales + slot * 256 + i)
        n = tl.load(scales + slot * 256 + 64 + i)

        s_hi, s_lo = split(ST, EXACT)
        if SAVE:
            keep = saved + slot * K * V + (e[:, None] * K + d[None, :])
            if EVEN:
                tl.store(keep, s_hi)
            else:
                tl.store(keep, s_hi, mask=in_v[:, None] & in_k[None, :])
        RT = dot_split(s_hi, s_lo, tl.trans(kt), TERMS, EXACT)
        if GATE:
            g_hi = tl.load(G + slot * 128 + i)
            g_lo = tl.load(G + slot * 128 + 64 + i)
            last_hi = tl.load(G + slot * 128 + 63)
            last_lo = tl.load(G + slot * 128 + 127)
            RT *= tl.exp(g_hi)[None, :]
        if VALUES:
            RT = vt.to(tl.float32) * n[None, :] - RT
        else:
            RT = -RT
        r_hi, r_lo = split(RT, EXACT)
        UT = dot_both(r_hi, r_lo, tl.trans(x_hi), tl.trans(x_lo), TERMS, EXACT)
        if SAVE:
            fp = F + (i * (HV * V))[None, :] + er[:, None]
            if EVEN:
                tl.store(fp, UT.to(F.dtype.element_ty))
            else:
                tl.store(fp, UT.to(F.dtype.element_ty), mask=rows[None, :] & in_v[:, None])
        if TERMS == 2:  # the rounding of w is the same whenever a key recurs, so it would add up
            UT = UT * w[None, :] + UT * tl.load(scales + slot * 256 + 128 + i)[None, :]
        else:
            UT *= w[None, :]
        u_hi, u_lo = split(UT, EXACT)
        if OUTPUT:
            OT = dot(s_hi, tl.trans(qt), EXACT)
            PT = dot(kt, tl.trans(qt), EXACT)
            if GATE:
                at = tl.minimum(iq * N, 63)
                q_hi = tl.load(G + slot * 128 + at)
                q_lo = tl.load(G + slot * 128 + 64 + at)
                OT *= tl.exp(q_hi)[None, :]
                PT *= decay_between(q_hi[None, :], q_lo[None, :], g_hi[:, None], g_lo[:, None], see)
            PT = tl.where(see, PT, 0.0)
            OT = dot_add(u_hi, PT.to(u_hi.dtype), OT, EXACT)
            OT = (OT * scale).to(o.dtype.element_ty)
            if EVEN:
                tl.store(op, OT)
            else:
                tl.store(op, OT, mask=asked[None, :] & in_v[:, None])
        if GATE:
            u_hi, u_lo = split(UT * decay_between(last_hi, last_lo, g_hi, g_lo, i >= 0)[None, :], EXACT)
            ST *= tl.exp(last_hi)
        ST = dot_add(u_hi, kt, ST, EXACT)
        if TERMS == 2 and not EXACT:
            ST = tl.dot(u_lo, kt, ST)
        k += C * N * HK * K
        v += C * N * HV * V
        q += C * HK * K
        o += C * HV * V
        F += C * N * HV * V
    tl.store(final + tile, ST, mask=in_v[:, None] & in_k[None, :])
