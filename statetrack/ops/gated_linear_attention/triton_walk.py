"""Gated linear attention's kernels that carry the state: over the chunks, back over them, and for a single token.

`walk` holds S^T [V K] in float32. With start_i, end_j and total the products of a chunk's decays up to and including
row i, after row j, and of all rows,

    o_i = scale (start_i q_i S + sum_{j <= i} P_ij v_j),   S <- total S + sum_j (end_j k_j)^T v_j

and `walk_back` its adjoint,

    dv_j = end_j k_j dS + scale sum_{i >= j} P_ij dO_i,   dS <- total dS + scale sum_i (start_i q_i)^T dO_i

What decays multiply is made before, P as a tile per chunk and head:

- one decay per head (KEY false): `prepare_head` leaves start and end, and what `scores_head` makes P from;
- one per key channel (KEY): `prepare_key` leaves start q, end k (two terms) and P.

The state is never an operand of its own update, so only what is written to it takes two bf16 terms; the sum is added to
the state in float32, rounded to nearest, for the tensor cores truncate.

Letters: B batch, T tokens, S sequences, C tokens per chunk, H value heads, K key dim, V value dim. A `slot` numbers the
(sequence, chunk) pairs of a workspace.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from statetrack.ops.triton_common import dot, dot_add, dot_split, operand, span, split, stretch

FACTORS = tl.constexpr(5)  # vectors [C] that `prepare_head` leaves per chunk and head
HIGH = tl.constexpr(0)  # of the running log2|decay|
LOW = tl.constexpr(1)
SIGN = tl.constexpr(2)
START = tl.constexpr(3)
END = tl.constexpr(4)


@triton.jit
def factor(G, slot, which: tl.constexpr, rows, C: tl.constexpr):
    """Load one of the vectors that `prepare_head` wrote, at some rows."""
    return tl.load(G + (slot * FACTORS + which) * C + rows)


@triton.jit
def fetch(p, rows, columns, FULL: tl.constexpr):
    """Load a tile, 0 outside: FULL of 2 says that all of it is there, 1 that all columns are."""
    if FULL == 2:
        x = tl.load(p)
    elif FULL == 1:
        x = tl.load(p, mask=rows, other=0.0)
    else:
        x = tl.load(p, mask=rows & columns, other=0.0)
    return x


@triton.jit
def put(p, x, rows, columns, FULL: tl.constexpr):
    """Store a tile in the type of its tensor; FULL as in `fetch`."""
    if FULL == 2:
        tl.store(p, x.to(p.dtype.element_ty))
    elif FULL == 1:
        tl.store(p, x.to(p.dtype.element_ty), mask=rows)
    else:
        tl.store(p, x.to(p.dtype.element_ty), mask=rows & columns)


@triton.jit
def walk(
    q, k, k_lo, v, G, P, initial, o, final, states, starts, bases,
    T, c_lo, c_hi, scale, HK, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KEY: tl.constexpr, VARLEN: tl.constexpr, FULL: tl.constexpr,
    STATES: tl.constexpr, OUTPUT: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks [c_lo, c_hi) of one sequence and head (all, if packed), for BV columns of the state.

    OUTPUT writes o, STATES the state before each chunk in the products' type. No initial state is zero; `final` may be
    the same tensor, or none.
    """
    sh = tl.program_id(0)
    iv = tl.program_id(1)
    s = sh // HV
    h = sh % HV
    hk = h // (HV // HK)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    e = iv * BV + tl.arange(0, BV)
    in_k = d < K
    in_v = e < V
    inside = in_v[:, None] & in_k[None, :]
    STATE_FULL: tl.constexpr = 2 if FULL > 0 else 0
    flat = e[:, None] * K + d[None, :]  # [BV BK] of a [V K] state
    turned = d[None, :] * V + e[:, None]  # of a [K V] state
    token, _ = span(s, 0, starts, T, C, VARLEN)
    total, base, last = stretch(s, starts, bases, T, c_lo, c_hi, C, VARLEN)
    if initial is None:
        S = tl.zeros((BV, BK), tl.float32)
    else:
        S = tl.load(initial + sh.to(tl.int64) * K * V + turned, mask=inside, other=0.0)
    for c in tl.range(c_lo, last, num_stages=STAGES):
        slot = (base + c) * HV + h
        first = token + c * C
        rows = i < total - c * C
        if KEY:
            tile = slot * C * K + (i[:, None] * K + d[None, :])
        else:
            tile = (first * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
        at = (first * HV + h) * V + ((i * (HV * V))[None, :] + e[:, None])
        vt = operand(fetch(v + at, rows[None, :], in_v[:, None], FULL), EXACT)
        kt = operand(fetch(k + tile, rows[:, None], in_k[None, :], FULL), EXACT)
        if OUTPUT:
            qt = operand(fetch(q + tile, rows[:, None], in_k[None, :], FULL), EXACT)
        if STATES:
            put(states + slot * K * V + flat, S, in_v[:, None], in_k[None, :], STATE_FULL)
        if OUTPUT:
            OT = dot(S.to(vt.dtype), tl.trans(qt), EXACT)
            if not KEY:
                OT *= factor(G, slot, START, i, C)[None, :]
            OT = dot_add(vt, tl.load(P + slot * C * C + (i[None, :] * C + i[:, None])), OT, EXACT)
            put(o + at, OT * scale, rows[None, :], in_v[:, None], FULL)
        if KEY:
            S *= tl.load(G + slot * K + d, mask=in_k, other=0.0)[None, :]
            if EXACT:
                S += dot(vt, kt, EXACT)
            else:
                kl = fetch(k_lo + tile, rows[:, None], in_k[None, :], FULL)
                S += tl.dot(vt, kt, tl.dot(vt, kl))
        else:
            u_hi, u_lo = split(vt.to(tl.float32) * factor(G, slot, END, i, C)[None, :], EXACT)
            S = S * tl.load(G + (slot * FACTORS + START) * C + C - 1) + dot_split(u_hi, u_lo, kt, 2, EXACT)
    if final is not None:
        tl.store(final + sh.to(tl.int64) * K * V + turned, S, mask=inside)


@triton.jit
def walk_back(
    q, k, d_out, G, P, d_final, d_state, d_states, dv, starts, bases,
    T, c_lo, c_hi, scale, HK, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KEY: tl.constexpr, VARLEN: tl.constexpr, FULL: tl.constexpr,
    OUTPUT: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk back from chunk c_hi - 1 to c_lo of one sequence and head, for BV columns of the state's gradient.

    OUTPUT writes dv, and the gradient to the state after each chunk in the products' type. No d_final is zero; d_state
    may be the same tensor.
    """
    sh = tl.program_id(0)
    iv = tl.program_id(1)
    s = sh // HV
    h = sh % HV
    hk = h // (HV // HK)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    e = iv * BV + tl.arange(0, BV)
    in_k = d < K
    in_v = e < V
    inside = in_v[:, None] & in_k[None, :]
    STATE_FULL: tl.constexpr = 2 if FULL > 0 else 0
    flat = e[:, None] * K + d[None, :]
    turned = d[None, :] * V + e[:, None]
    token, _ = span(s, 0, starts, T, C, VARLEN)
    total, base, last = stretch(s, starts, bases, T, c_lo, c_hi, C, VARLEN)
    if d_final is None:
        D = tl.zeros((BV, BK), tl.float32)
    else:
        D = tl.load(d_final + sh.to(tl.int64) * K * V + turned, mask=inside, other=0.0)
    for back in tl.range(0, last - c_lo, num_stages=STAGES):
        c = last - 1 - back
        slot = (base + c) * HV + h
        first = token + c * C
        rows = i < total - c * C
        if KEY:
            tile = slot * C * K + (i[:, None] * K + d[None, :])
        else:
            tile = (first * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
        at = (first * HV + h) * V + ((i * (HV * V))[None, :] + e[:, None])
        do = operand(fetch(d_out + at, rows[None, :], in_v[:, None], FULL), EXACT)
        qt = operand(fetch(q + tile, rows[:, None], in_k[None, :], FULL), EXACT)
        if OUTPUT:
            kt = operand(fetch(k + tile, rows[:, None], in_k[None, :], FULL), EXACT)
            put(d_states + slot * K * V + flat, D, in_v[:, None], in_k[None, :], STATE_FULL)
            W = dot(D.to(kt.dtype), tl.trans(kt), EXACT)
            if not KEY:
                W *= factor(G, slot, END, i, C)[None, :]
            W += dot(do, tl.load(P + slot * C * C + (i[:, None] * C + i[None, :])), EXACT) * scale
            put(dv + at, W, rows[None, :], in_v[:, None], FULL)
        if KEY:
            D *= tl.load(G + slot * K + d, mask=in_k, other=0.0)[None, :]
            D += dot(do, qt, EXACT) * scale
        else:
            D *= tl.load(G + (slot * FACTORS + START) * C + C - 1)
            do = (do.to(tl.float32) * (factor(G, slot, START, i, C) * scale)[None, :]).to(qt.dtype)
            D += dot(do, qt, EXACT)
    tl.store(d_state + sh.to(tl.int64) * K * V + turned, D, mask=inside)


@triton.jit
def end_of_segment(
    x, y, G, out, T, n_chunks, scale, HK, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FULL: tl.constexpr, BACK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write BV columns of what a segment adds to the state (x = v, y = k), or BACK to its gradient (x = dO, y = q).

    For one decay per head: sums from the end that counts, until the decays passed multiply to 0.
    """
    sh = tl.program_id(0)
    s = sh // HV
    h = sh % HV
    hk = h // (HV // HK)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    in_k = d < K
    in_v = e < V
    S = tl.zeros((BV, BK), tl.float32)
    passed = tl.full((), scale, tl.float32)
    n = tl.full((), 0, tl.int32)
    while (n < n_chunks) & (passed != 0.0):
        c = n if BACK else n_chunks - 1 - n
        slot = (s.to(tl.int64) * n_chunks + c) * HV + h
        first = s.to(tl.int64) * T + c * C
        tile = (first * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
        at = (first * HV + h) * V + ((i * (HV * V))[None, :] + e[:, None])
        xt = fetch(x + at, (i >= 0)[None, :], in_v[:, None], FULL).to(tl.float32)
        yt = operand(fetch(y + tile, (i >= 0)[:, None], in_k[None, :], FULL), EXACT)
        hi, lo = split(xt * (factor(G, slot, START if BACK else END, i, C) * passed)[None, :], EXACT)
        S += dot_split(hi, lo, yt, 1 if BACK else 2, EXACT)
        passed *= tl.load(G + (slot * FACTORS + START) * C + C - 1)
        n += 1
    turned = sh.to(tl.int64) * K * V + (d[None, :] * V + e[:, None])
    tl.store(out + turned, S, mask=in_v[:, None] & in_k[None, :])


@triton.jit
def step(
    q, k, v, decay, state, o, final, scale, HK, HV, K, V,
    BK: tl.constexpr, BV: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """Advance BV columns of one sequence's and head's state by one token, reading and writing it once."""
    bh = tl.program_id(0)
    iv = tl.program_id(1)
    at_k = (bh // HV) * HK + (bh % HV) // (HV // HK)
    d = tl.arange(0, BK)
    e = iv * BV + tl.arange(0, BV)
    in_k = d < K
    in_v = e < V
    tile = bh.to(tl.int64) * K * V + d[:, None] * V + e[None, :]
    inside = in_k[:, None] & in_v[None, :]
    S = tl.load(state + tile, mask=inside, other=0.0)
    if KEY:
        S *= tl.load(decay + bh * K + d, mask=in_k, other=0.0).to(tl.float32)[:, None]
    else:
        S *= tl.load(decay + bh).to(tl.float32)
    kt = tl.load(k + at_k * K + d, mask=in_k, other=0.0).to(tl.float32)
    vt = tl.load(v + bh * V + e, mask=in_v, other=0.0).to(tl.float32)
    qt = tl.load(q + at_k * K + d, mask=in_k, other=0.0).to(tl.float32)
    S += kt[:, None] * vt[None, :]
    out = tl.sum(qt[:, None] * S, 0) * scale
    tl.store(o + bh * V + e, out.to(o.dtype.element_ty), mask=in_v)
    tl.store(final + tile, S, mask=inside)
