"""The delta rule's forward kernels: what each chunk needs beside its inputs, then the walk over chunks.

`prepare` (parallel over chunks) computes, for the M = C N rows of a chunk and with w, n, p from the keys k p,

    X = p (I + stril(w_i p_i p_j k_i.k_j D_ij))^-1,   D_ij = decay from row j to row i

`walk` holds S^T [V K] in float32 and feeds the tensor cores two-term splits of it, of R and of U, chunk after chunk:

    R = w (n v - p D_i0 k S),   U = X R,   o_i = D_i0 q_i S + sum_j D_ij (q_i.k_j) U_j,   S <- D_C0 S + (D_Cj k)^T U

Everything is computed transposed (V rows), so that S, R and U go from one product's accumulator into the next product's
left operand without leaving registers. Keys enter the products as stored; p, a power of two, is folded into X and R.

Letters: B batch, T tokens, C tokens per chunk, N factors per token, M rows of a chunk (64, the last ones empty when N
does not divide 64), H value heads, K key dim, V value dim. A `slot` numbers the (sequence, chunk) pairs of a workspace.
"""

import triton
import triton.language as tl

ROWS = 64  # M
CUT = tl.constexpr(-1048576.0)  # stands for a log_decay of -inf: exp of it is 0, and float64 sums of it stay exact


@triton.jit
def split(x, EXACT: tl.constexpr):
    """Return x as two bf16 terms, or twice itself where the products take float32."""
    if EXACT:
        hi = x
        lo = x
    else:
        hi = x.to(tl.bfloat16)
        lo = (x - hi.to(tl.float32)).to(tl.bfloat16)
    return hi, lo


@triton.jit
def dot(a, b, EXACT: tl.constexpr):
    """Return a b for operands of one term."""
    if EXACT:
        out = tl.dot(a, b, input_precision="tf32x3")
    else:
        out = tl.dot(a, b)
    return out


@triton.jit
def dot_split(hi, lo, b, TERMS: tl.constexpr, EXACT: tl.constexpr):
    """Return (hi + lo) b."""
    out = dot(hi, b, EXACT)
    if TERMS == 2 and not EXACT:
        out = tl.dot(lo, b, out)
    return out


@triton.jit
def dot_both(hi, lo, b_hi, b_lo, TERMS: tl.constexpr, EXACT: tl.constexpr):
    """Return (hi + lo) (b_hi + b_lo), without the product of the low terms."""
    out = dot(hi, b_hi, EXACT)
    if TERMS == 2 and not EXACT:
        out = tl.dot(lo, b_hi, out)
        out = tl.dot(hi, b_lo, out)
    return out


@triton.jit
def operand(x, EXACT: tl.constexpr):
    """Return a stored tile in the type that the products take; exact."""
    if EXACT:
        out = x.to(tl.float32)
    else:
        out = x
    return out


@triton.jit
def span(s, c, starts, T, C: tl.constexpr, VARLEN: tl.constexpr):
    """Return chunk c of sequence s: its first token and its number of tokens."""
    if VARLEN:
        first = tl.load(starts + s).to(tl.int64)
        total = tl.load(starts + s + 1) - first
    else:
        first = s.to(tl.int64) * T
        total = tl.full((), T, tl.int64)
    return first + c * C, tl.minimum(total - c * C, C).to(tl.int32)


@triton.jit
def _power(largest):
    """Return the power of two that brings a float32 near 1 (1 for 0)."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    p = ((253 - tl.minimum(tl.maximum(exponent, 1), 252)) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest == 0.0, 1.0, p)


@triton.jit
def key_scales(k):
    """Return p, |k p|^2 (1 for a zero key) of every row of a float32 tile."""
    p = _power(tl.max(tl.abs(k), 1))
    scaled = k * p[:, None]
    squared = tl.sum(scaled * scaled, 1)
    return p, tl.where(squared == 0.0, 1.0, squared)


@triton.jit
def _mul3(a, b, EXACT: tl.constexpr):
    """Return a b for float32 tiles, to about 2^-17 (bf16 mode) or 2^-22."""
    a_hi, a_lo = split(a, EXACT)
    b_hi, b_lo = split(b, EXACT)
    return dot_both(a_hi, a_lo, b_hi, b_lo, 2, EXACT)


@triton.jit
def _unit_lower_inverse(A, EXACT: tl.constexpr):
    """Return (I + A)^-1 for a strictly lower triangular [64 64] tile: substitution in 16-row blocks, then in pairs."""
    i = tl.arange(0, 64)
    r = tl.arange(0, 16)
    block = tl.arange(0, 4)
    same = block[:, None, None, None] == block[None, None, :, None]
    small = tl.sum(tl.where(same, tl.reshape(A, (4, 16, 4, 16)), 0.0), 2)  # [4 16 16]
    inv = tl.where(r[None, :, None] == r[None, None, :], 1.0, 0.0) + tl.zeros_like(small)
    for c in tl.static_range(15):
        column = tl.sum(tl.where(r[None, None, :] == c, small, 0.0), 2)
        row = tl.sum(tl.where(r[None, :, None] == c, inv, 0.0), 1)
        inv -= column[:, :, None] * row[:, None, :]
    X = tl.reshape(tl.where(same, inv[:, :, None, :], 0.0), (64, 64))
    pair = (i[:, None] // 32 == i[None, :] // 32) & (i[:, None] // 16 != i[None, :] // 16)
    X -= _mul3(X, _mul3(tl.where(pair, A, 0.0), X, EXACT), EXACT)
    rest = i[:, None] // 32 != i[None, :] // 32
    return X - _mul3(X, _mul3(tl.where(rest, A, 0.0), X, EXACT), EXACT)


@triton.jit
def prepare(
    k, beta, log_decay, X_hi, X_lo, scales, G, starts, slots,
    T, c_lo, n_chunks, HK, HV, K,
    N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write one chunk's X (as two terms), w, n, p and running log decay (float64)."""
    slot = tl.program_id(0)
    h = tl.program_id(1)
    if VARLEN:
        s = tl.load(slots + 2 * slot)
        c = tl.load(slots + 2 * slot + 1)
    else:
        s = slot // n_chunks
        c = c_lo + slot % n_chunks
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, 64)
    d = tl.arange(0, BK)
    alive = i < tokens * N
    row = token * N + i
    kp = k + ((row * HK + h // (HV // HK)) * K)[:, None] + d[None, :]
    kt = operand(tl.load(kp, mask=alive[:, None] & (d < K)[None, :], other=0.0), EXACT)
    p, squared = key_scales(kt.to(tl.float32))
    w = tl.load(beta + row * HV + h, mask=alive, other=0.0).to(tl.float32) / squared
    A = dot(kt, tl.trans(kt), EXACT) * (w * p)[:, None] * p[None, :]
    out = (slot.to(tl.int64) * HV + h) * 64
    if GATE:
        first = alive & (i % N == 0)
        g = tl.load(log_decay + (token + i // N) * HV + h, mask=first, other=0.0).to(tl.float64)
        g = tl.cumsum(tl.maximum(g, CUT), 0)
        tl.store(G + out + i, g)
        gap = tl.where(i[:, None] > i[None, :], g[:, None] - g[None, :], 0.0)
        A *= tl.exp(gap.to(tl.float32))
    A = tl.where(i[:, None] > i[None, :], A, 0.0)
    X = _unit_lower_inverse(A, EXACT) * p[:, None]
    hi, lo = split(X, EXACT)
    tile = out * 64 + i[:, None] * 64 + i[None, :]
    tl.store(X_hi + tile, hi)
    if not EXACT:
        tl.store(X_lo + tile, lo)
    tl.store(scales + out * 3 + i, w)
    tl.store(scales + out * 3 + 64 + i, tl.sqrt(squared))
    tl.store(scales + out * 3 + 128 + i, p)


@triton.jit
def walk(
    q, k, v, X_hi, X_lo, scales, G, initial, o, final, saved, starts, bases,
    T, scale, HK, HV, K, V,
    N: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, VARLEN: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
    OUTPUT: tl.constexpr, TERMS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks of one sequence and head, for BV columns of the state."""
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
    if VARLEN:
        total = tl.load(starts + s + 1) - tl.load(starts + s)
        base = tl.load(bases + s).to(tl.int64)
    else:
        total = T
        base = s.to(tl.int64) * tl.cdiv(T, C)
    chunks = tl.cdiv(total, C)
    tile = (sh.to(tl.int64) * K + d[None, :]) * V + e[:, None]  # [BV BK] of a [K V] state
    ST = tl.load(initial + tile, mask=in_v[:, None] & in_k[None, :], other=0.0)
    k += (token * N * HK + hk) * K
    v += (token * N * HV + h) * V + iv * BV
    q += (token * HK + hk) * K
    o += (token * HV + h) * V + iv * BV
    er = tl.arange(0, BV)
    for c in tl.range(0, chunks, num_stages=STAGES):
        slot = (base + c) * HV + h
        kp = k + (i * (HK * K))[:, None] + d[None, :]
        vp = v + (i * (HV * V))[None, :] + er[:, None]
        qp = q + (iq * (HK * K))[:, None] + d[None, :]
        op = o + (iq * (HV * V))[None, :] + er[:, None]
        if EVEN:
            kt = operand(tl.load(kp), EXACT)
            vt = tl.load(vp)
            if OUTPUT:
                qt = operand(tl.load(qp), EXACT)
        else:
            left = total - c * C
            rows = i < tl.minimum(left, C) * N
            kt = operand(tl.load(kp, mask=rows[:, None] & in_k[None, :], other=0.0), EXACT)
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
        w = tl.load(scales + slot * 192 + i)
        n = tl.load(scales + slot * 192 + 64 + i)
        p = tl.load(scales + slot * 192 + 128 + i)

        s_hi, s_lo = split(ST, EXACT)
        if SAVE:
            keep = saved + slot * K * V + (e[:, None] * K + d[None, :])
            if EVEN:
                tl.store(keep, s_hi)
            else:
                tl.store(keep, s_hi, mask=in_v[:, None] & in_k[None, :])
        RT = dot_split(s_hi, s_lo, tl.trans(kt), TERMS, EXACT)
        if GATE:
            g = tl.load(G + slot * 64 + i)
            g_last = tl.load(G + slot * 64 + 63)
            RT = vt.to(tl.float32) * (w * n)[None, :] - RT * (w * p * tl.exp(g.to(tl.float32)))[None, :]
        else:
            RT = vt.to(tl.float32) * (w * n)[None, :] - RT * (w * p)[None, :]
        r_hi, r_lo = split(RT, EXACT)
        UT = dot_both(r_hi, r_lo, tl.trans(x_hi), tl.trans(x_lo), TERMS, EXACT)
        u_hi, u_lo = split(UT, EXACT)
        if OUTPUT:
            OT = dot(s_hi, tl.trans(qt), EXACT)
            PT = dot(kt, tl.trans(qt), EXACT)
            if GATE:
                gq = tl.load(G + slot * 64 + tl.minimum(iq * N, 63))
                OT *= tl.exp(gq.to(tl.float32))[None, :]
                PT *= tl.exp(tl.where(see, gq[None, :] - g[:, None], 0.0).to(tl.float32))
            PT = tl.where(see, PT, 0.0)
            if EXACT:
                OT += dot(u_hi, PT, EXACT)
            else:
                OT = tl.dot(u_hi, PT.to(tl.bfloat16), OT)
            OT = (OT * scale).to(o.dtype.element_ty)
            if EVEN:
                tl.store(op, OT)
            else:
                tl.store(op, OT, mask=asked[None, :] & in_v[:, None])
        if GATE:
            u_hi, u_lo = split(UT * tl.exp((g_last - g).to(tl.float32))[None, :], EXACT)
            ST *= tl.exp(g_last.to(tl.float32))
        if EXACT:
            ST += tl.dot(u_hi, kt, input_precision="tf32x3")
        else:
            ST = tl.dot(u_hi, kt, ST)
            if TERMS == 2:
                ST = tl.dot(u_lo, kt, ST)
        k += C * N * HK * K
        v += C * N * HV * V
        q += C * HK * K
        o += C * HV * V
    tl.store(final + tile, ST, mask=in_v[:, None] & in_k[None, :])
