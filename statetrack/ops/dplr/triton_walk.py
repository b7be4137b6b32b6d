"""Diagonal plus low rank: the kernels that carry the state, over the chunks, back over them, and for a single token.

`walk` holds S^T [V K] in float32. With the Rows, Squares and total of `triton_chunk`,

    u = X (A_ak v + a S),   o = scale (q S + A_qk v + A_qb u),   S <- total S + k^T v + b^T u

and `walk_back` its adjoint, z being the gradient to what a's reads see:

    du = scale A_qb^T dO + b dS,   z = X^T du,   dv = scale A_qk^T dO + A_ak^T z + k dS
    dS <- total dS + scale q^T dO + a^T z

What ends in the state takes two bf16 terms, or float32 products.

Letters: T tokens, C tokens per chunk, H value heads, K key dim, V value dim. A `slot` numbers the (sequence, chunk)
pairs of a workspace.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from statetrack.ops.triton_common import dot, dot_add, dot_both, operand, span, split, stretch


@triton.jit
def terms(p, low, mask, EXACT: tl.constexpr):
    """Load a tile's two terms, the low one `low` elements further, or one term twice."""
    hi = tl.load(p, mask=mask, other=0.0)
    lo = hi
    if not EXACT:
        lo = tl.load(p + low, mask=mask, other=0.0)
    return hi, lo


@triton.jit
def add_both(x_hi, x_lo, y_hi, y_lo, acc, EXACT: tl.constexpr):
    """Return acc + (x_hi + x_lo) (y_hi + y_lo), the sum in float32."""
    return acc + dot_both(x_hi, x_lo, y_hi, y_lo, 2, EXACT)


@triton.jit
def add_second(x, y_hi, y_lo, acc, EXACT: tl.constexpr):
    """Return acc + x (y_hi + y_lo) for an x of one term."""
    if not EXACT:
        acc = acc + tl.dot(x, y_hi, tl.dot(x, y_lo))
    else:
        acc = acc + dot(x, y_hi, EXACT)
    return acc


@triton.jit
def walk(
    v, Rows, Squares, total, initial, o, final, states, u, starts, bases,
    T, c_lo, c_hi, scale, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
    OUTPUT: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks [c_lo, c_hi) of one sequence and head (all, if packed), for BV columns of the state.

    OUTPUT writes o; otherwise the state before each chunk and u are written.
    """
    sh = tl.program_id(0)
    s = sh // HV
    h = sh % HV
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k = (d < K)[None, :]
    in_v = (e < V)[:, None]
    inside = in_v & in_k
    turned = d[None, :] * V + e[:, None]  # of a [K V] state
    token, _ = span(s, 0, starts, T, C, VARLEN)
    length, base, stop = stretch(s, starts, bases, T, c_lo, c_hi, C, VARLEN)
    low: tl.constexpr = Rows.dtype.element_ty
    if initial is None:
        S = tl.zeros((BV, BK), tl.float32)
    else:
        S = tl.load(initial + sh.to(tl.int64) * K * V + turned, mask=inside, other=0.0)
    for c in range(c_lo, stop):
        slot = (base + c) * HV + h
        alive = (i < length - c * C)[None, :] & in_v
        at = ((token + c * C) * HV + h) * V + ((i * (HV * V))[None, :] + e[:, None])
        rows = Rows + slot * ((4 if EXACT else 7) * C * K) + (i[:, None] * K + d[None, :])
        squares = Squares + slot * ((4 if EXACT else 6) * C * C) + (i[:, None] * C + i[None, :])
        everywhere = (i >= 0)[:, None] & (i >= 0)[None, :]
        vt = operand(tl.load(v + at, mask=alive, other=0.0), EXACT)
        s_hi, s_lo = split(S, EXACT)
        hi, lo = terms(rows + C * K, 3 * C * K, in_k, EXACT)
        R = dot_both(s_hi, s_lo, tl.trans(hi), tl.trans(lo), 2, EXACT)
        hi, lo = terms(squares + 2 * C * C, 2 * C * C, everywhere, EXACT)
        R = add_second(vt, tl.trans(hi), tl.trans(lo), R, EXACT)
        r_hi, r_lo = split(R, EXACT)
        hi, lo = terms(squares + 3 * C * C, 2 * C * C, everywhere, EXACT)
        u_hi, u_lo = split(dot_both(r_hi, r_lo, tl.trans(hi), tl.trans(lo), 2, EXACT), EXACT)
        if OUTPUT:
            out = dot(s_hi, tl.trans(tl.load(rows, mask=in_k, other=0.0)), EXACT)
            out = dot_add(vt, tl.trans(tl.load(squares)), out, EXACT)
            out = dot_add(u_hi, tl.trans(tl.load(squares + C * C)), out, EXACT)
            tl.store(o + at, (out * scale).to(o.dtype.element_ty), mask=alive)
        else:
            tl.store(states + slot * K * V + (e[:, None] * K + d[None, :]), S.to(low), mask=inside)
            tl.store(u + at, u_hi, mask=alive)
        S *= tl.load(total + slot * K + d, mask=d < K, other=0.0)[None, :]
        hi, lo = terms(rows + 2 * C * K, 3 * C * K, in_k, EXACT)
        S = add_second(vt, hi, lo, S, EXACT)
        hi, lo = terms(rows + 3 * C * K, 3 * C * K, in_k, EXACT)
        S = add_both(u_hi, u_lo, hi, lo, S, EXACT)
    if final is not None:
        tl.store(final + sh.to(tl.int64) * K * V + turned, S, mask=inside)


@triton.jit
def walk_back(
    d_out, Rows, Squares, total, d_final, d_state, d_states, z, dv, starts, bases,
    T, c_lo, c_hi, scale, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Walk back from chunk c_hi - 1 to c_lo of one sequence and head, for BV columns of the state's gradient.

    Written are dv, z, and the gradient to the state after each chunk.
    """
    sh = tl.program_id(0)
    s = sh // HV
    h = sh % HV
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k = (d < K)[None, :]
    in_v = (e < V)[:, None]
    inside = in_v & in_k
    turned = d[None, :] * V + e[:, None]
    token, _ = span(s, 0, starts, T, C, VARLEN)
    length, base, stop = stretch(s, starts, bases, T, c_lo, c_hi, C, VARLEN)
    low: tl.constexpr = Rows.dtype.element_ty
    if d_final is None:
        D = tl.zeros((BV, BK), tl.float32)
    else:
        D = tl.load(d_final + sh.to(tl.int64) * K * V + turned, mask=inside, other=0.0)
    for back in range(0, stop - c_lo):
        c = stop - 1 - back
        slot = (base + c) * HV + h
        alive = (i < length - c * C)[None, :] & in_v
        at = ((token + c * C) * HV + h) * V + ((i * (HV * V))[None, :] + e[:, None])
        rows = Rows + slot * ((4 if EXACT else 7) * C * K) + (i[:, None] * K + d[None, :])
        squares = Squares + slot * ((4 if EXACT else 6) * C * C) + (i[:, None] * C + i[None, :])
        everywhere = (i >= 0)[:, None] & (i >= 0)[None, :]
        do = operand(tl.load(d_out + at, mask=alive, other=0.0), EXACT)
        d_hi, d_lo = split(D, EXACT)
        tl.store(d_states + slot * K * V + (e[:, None] * K + d[None, :]), D.to(low), mask=inside)
        hi, lo = terms(rows + 3 * C * K, 3 * C * K, in_k, EXACT)
        du = dot(do, tl.load(squares + C * C), EXACT) * scale
        du = add_both(d_hi, d_lo, tl.trans(hi), tl.trans(lo), du, EXACT)
        du_hi, du_lo = split(du, EXACT)
        hi, lo = terms(squares + 3 * C * C, 2 * C * C, everywhere, EXACT)
        zt = dot_both(du_hi, du_lo, hi, lo, 2, EXACT)
        z_hi, z_lo = split(zt, EXACT)
        tl.store(z + at, z_hi, mask=alive)
        out = dot(do, tl.load(squares), EXACT) * scale
        out = dot_add(z_hi, tl.load(squares + 2 * C * C), out, EXACT)
        out = dot_add(d_hi, tl.trans(tl.load(rows + 2 * C * K, mask=in_k, other=0.0)), out, EXACT)
        tl.store(dv + at, out.to(dv.dtype.element_ty), mask=alive)
        D *= tl.load(total + slot * K + d, mask=d < K, other=0.0)[None, :]
        D += dot(do, tl.load(rows, mask=in_k, other=0.0), EXACT) * scale
        hi, lo = terms(rows + C * K, 3 * C * K, in_k, EXACT)
        D = add_both(z_hi, z_lo, hi, lo, D, EXACT)
    tl.store(d_state + sh.to(tl.int64) * K * V + turned, D, mask=inside)


@triton.jit
def step(
    q, k, v, a, b, log_decay, state, o, final, scale, HK, HV, K, V,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Advance BV columns of one sequence's and head's state by one token, reading and writing it once."""
    bh = tl.program_id(0)
    shared = (bh // HV) * HK + (bh % HV) // (HV // HK)
    d = tl.arange(0, BK)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k = d < K
    in_v = e < V
    tile = bh.to(tl.int64) * K * V + d[:, None] * V + e[None, :]
    inside = in_k[:, None] & in_v[None, :]
    S = tl.load(state + tile, mask=inside, other=0.0)
    a_t = tl.load(a + bh * K + d, mask=in_k, other=0.0).to(tl.float32)
    bt = tl.load(b + bh * K + d, mask=in_k, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(log_decay + bh * K + d, mask=in_k, other=0.0).to(tl.float32))
    kt = tl.load(k + shared * K + d, mask=in_k, other=0.0).to(tl.float32)
    qt = tl.load(q + shared * K + d, mask=in_k, other=0.0).to(tl.float32)
    vt = tl.load(v + bh * V + e, mask=in_v, other=0.0).to(tl.float32)
    read = tl.sum(a_t[:, None] * S, 0)
    S = S * decay[:, None] + bt[:, None] * read[None, :] + kt[:, None] * vt[None, :]
    out = tl.sum(qt[:, None] * S, 0) * scale
    tl.store(o + bh * V + e, out.to(o.dtype.element_ty), mask=in_v)
    tl.store(final + tile, S, mask=inside)
