"""The delta rule's forward kernels for a decay per key channel: what each chunk needs, then the walk over chunks.

With g_i [K] the running log decay of row i, p the power of two that brings a key's largest entry near 1, n = |p k| and
w = beta / n^2, `prepare_keys` (parallel over chunks) computes

    L_ij = sum_d p k_id p k_jd e^(g_id - g_jd) (j < i),   P_ij = sum_d q_id p k_jd e^(g_id - g_jd) (j <= i)
    X = (I + L diag(w))^-1,   `in` = p k e^g,   `out` = p k e^(g_C - g),   `query` = q e^g,   `total` = e^g_C

and `walk_keys` needs nothing else beside the values:

    F = X (n v - in S),   U = w F,   o = query S + P U,   S <- total S + out^T U

Rows are taken in blocks of 16. Both sides of a product are scaled relative to one point per block and channel, so that
the exponents between blocks are at most 0: the block's middle, if the channel decays there by no more than e^-LIMIT;
else the block's first row, and the block's own pairs are summed one by one (`row_of`). A query is kept with its token's
last row, so that rows and queries share everything. For the backward, `prepare_keys` inverts I + diag(w) L instead.

Letters: B batch, T tokens, C tokens per chunk, N factors per token, H value heads, K key dim, V value dim. A chunk has
64 rows, C N of them in use. `BS` is the number of key channels in hand. A `slot` numbers the (sequence, chunk) pairs of
a workspace. In a workspace `Rows` [slots H 3|5 64 BK] holds in, out, query and the low terms of in and out, `Squares`
[slots H 2|3 64 64] holds X, P and the low term of X.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.delta_rule.triton_forward import CUT, power
from statetrack.ops.triton_common import chunk_of, dot, dot_add, dot_both, span, split, stretch, unit_lower_inverse


@triton.jit
def running(at, mask):
    """Return the running sum over the rows of a tile of log decays, as two terms."""
    g = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    g = tl.cumsum(tl.maximum(g, CUT), 0)
    hi = g.to(tl.float32)
    return hi, (g - hi.to(tl.float64)).to(tl.float32)


@triton.jit
def last_row(x):
    """Return the last row of a [64 BS] tile."""
    return tl.sum(tl.where(tl.arange(0, 64)[:, None] == 63, x, 0.0), 0)


@triton.jit
def blocks(x, BS: tl.constexpr):
    """Return a [64 BS] tile as [4 16 BS]."""
    return tl.reshape(x, (4, 16, BS))


@triton.jit
def row_of(x, c):
    """Return row c of every block of a [4 16 BS] tile, [4 1 BS]."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :, None] == c, x, 0.0), 1)[:, None, :]


@triton.jit
def reference(g, LIMIT: tl.constexpr, BS: tl.constexpr):
    """Return each block's point of reference [4 1 BS], and 1 where the block's own rows may be scaled to it, else 0."""
    g = blocks(g, BS)
    first = row_of(g, 0)
    last = row_of(g, 15)
    mild = first - last < LIMIT
    return tl.where(mild, 0.5 * (first + last), first), tl.where(mild, 1.0, 0.0)


@triton.jit
def left_scale(hi, lo, ref, BS: tl.constexpr):
    """Return what scales every row as the later one of a pair."""
    own = tl.reshape(tl.broadcast_to(ref, (4, 16, BS)), (64, BS))
    return tl.exp((hi - own) + lo)


@triton.jit
def right_scale(hi, lo, ref, mild, b):
    """Return what scales every row as the earlier one of a pair whose later row is in block b; 0 if there is none."""
    at = tl.arange(0, 4)[:, None, None] == b
    here = tl.sum(tl.sum(tl.where(at, ref, 0.0), 0), 0)
    own = tl.sum(tl.sum(tl.where(at, mild, 0.0), 0), 0)
    block = tl.arange(0, 64)[:, None] // 16
    wanted = (block < b) | ((block == b) & (own > 0.0)[None, :])
    return tl.where(wanted, tl.exp(tl.where(wanted, (here[None, :] - hi) - lo, 0.0)), 0.0)


@triton.jit
def pair_decay(hi, lo, mild, c):
    """Return the decay from row c of every block to the block's rows [4 16 BS]; 0 before it and where mild."""
    wanted = (tl.arange(0, 16)[None, :, None] >= c) & (mild == 0.0)
    between = (hi - row_of(hi, c)) + (lo - row_of(lo, c))
    return tl.where(wanted, tl.exp(tl.where(wanted, between, 0.0)), 0.0)


@triton.jit
def terms_of(at, low, TWO: tl.constexpr):
    """Load a tile's two terms, the low one `low` elements further, or one term twice."""
    hi = tl.load(at)
    if TWO:
        lo = tl.load(at + low)
    else:
        lo = hi
    return hi, lo


@triton.jit
def _scores(left, right, TERMS: tl.constexpr, EXACT: tl.constexpr):
    """Return left right^T for float32 tiles, in one or two terms."""
    l_hi, l_lo = split(left, EXACT)
    r_hi, r_lo = split(right, EXACT)
    return dot_both(l_hi, l_lo, tl.trans(r_hi), tl.trans(r_lo), TERMS, EXACT)


@triton.jit
def prepare_keys(
    q, k, beta, log_decay, Rows, Squares, scales, total, starts, slots,
    T, c_lo, n_chunks, HK, HV, K, g_token, g_head, g_key,
    N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, VARLEN: tl.constexpr,
    TERMS: tl.constexpr, TWO: tl.constexpr, EXACT: tl.constexpr, LIMIT: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Write one chunk's Rows, Squares and total, and its w, n, p and the rest of w."""
    slot = tl.program_id(0) // HV  # heads vary fastest: their rows are neighbours in memory
    h = tl.program_id(0) % HV
    s, c = chunk_of(slot, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    hk = h // (HV // HK)
    i = tl.arange(0, 64)
    alive = i < tokens * N
    asks = alive & (i % N == N - 1)
    opens = alive & (i % N == 0)
    row = token * N + i
    kp = k + ((row * HK + hk) * K)[:, None]
    qp = q + (((token + i // N) * HK + hk) * K)[:, None]
    gp = log_decay + ((token + i // N) * g_token + h * g_head)[:, None]
    out = slot.to(tl.int64) * HV + h
    Rows += out * ((5 if TWO else 3) * 64 * BK) + i[:, None] * BK
    Squares += out * ((3 if TWO else 2) * 4096) + (i[:, None] * 64 + i[None, :])

    largest = tl.zeros((64,), tl.float32)
    squared = tl.zeros((64,), tl.float64)
    for lowest in tl.range(0, BK, BS):
        d = lowest + tl.arange(0, BS)
        kt = tl.load(kp + d[None, :], mask=alive[:, None] & (d < K)[None, :], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(kt), 1))
        wide = kt.to(tl.float64)
        squared += tl.sum(wide * wide, 1)
    p = power(largest)
    squared = tl.where(largest == 0.0, 1.0, squared * p.to(tl.float64) * p.to(tl.float64))
    both = tl.load(beta + row * HV + h, mask=alive, other=0.0).to(tl.float64) / squared
    w = both.to(tl.float32)

    A = tl.zeros((64, 64), tl.float32)
    P = tl.zeros((64, 64), tl.float32)
    block = i // 16
    for lowest in tl.range(0, BK, BS):
        d = lowest + tl.arange(0, BS)
        in_k = (d < K)[None, :]
        kt = tl.load(kp + d[None, :], mask=alive[:, None] & in_k, other=0.0).to(tl.float32) * p[:, None]
        qt = tl.load(qp + d[None, :], mask=asks[:, None] & in_k, other=0.0).to(tl.float32)
        hi, lo = running(gp + d[None, :] * g_key, opens[:, None] & in_k)
        ref, mild = reference(hi, LIMIT, BS)
        scale = left_scale(hi, lo, ref, BS)
        for b in tl.range(4):
            right = kt * right_scale(hi, lo, ref, mild, b)
            A = tl.where((block == b)[:, None], A + _scores(kt * scale, right, TERMS, EXACT), A)
            P = tl.where((block == b)[:, None], P + _scores(qt * scale, right, 1, EXACT), P)
        if tl.min(tl.min(tl.min(mild, 2), 1), 0) == 0.0:
            k3 = blocks(kt, BS)
            q3 = blocks(qt, BS)
            for c in tl.range(16):
                read = row_of(k3, c) * pair_decay(blocks(hi, BS), blocks(lo, BS), mild, c)
                here = i[None, :] == (block * 16 + c)[:, None]
                A += tl.where(here, tl.reshape(tl.sum(k3 * read, 2), (64,))[:, None], 0.0)
                P += tl.where(here, tl.reshape(tl.sum(q3 * read, 2), (64,))[:, None], 0.0)
        last_hi = last_row(hi)
        last_lo = last_row(lo)
        start = tl.exp(hi + lo)
        rows = Rows + d[None, :]
        in_hi, in_lo = split(kt * start, EXACT)
        out_hi, out_lo = split(kt * tl.exp((last_hi[None, :] - hi) + (last_lo[None, :] - lo)), EXACT)
        tl.store(rows, in_hi)
        tl.store(rows + 64 * BK, out_hi)
        tl.store(rows + 2 * 64 * BK, (qt * start).to(Rows.dtype.element_ty))
        if TWO:
            tl.store(rows + 3 * 64 * BK, in_lo)
            tl.store(rows + 4 * 64 * BK, out_lo)
        tl.store(total + out * BK + d, tl.exp(last_hi + last_lo))
    A *= w[:, None] if BACKWARD else w[None, :]
    X = unit_lower_inverse(tl.where(i[:, None] > i[None, :], A, 0.0), EXACT)
    x_hi, x_lo = split(X, EXACT)
    tl.store(Squares, x_hi)
    tl.store(Squares + 4096, tl.where(i[:, None] >= i[None, :], P, 0.0).to(Squares.dtype.element_ty))
    if TWO:
        tl.store(Squares + 2 * 4096, x_lo)
    tl.store(scales + out * 256 + i, w)
    tl.store(scales + out * 256 + 64 + i, tl.sqrt(squared.to(tl.float32)))
    tl.store(scales + out * 256 + 128 + i, p)
    tl.store(scales + out * 256 + 192 + i, (both - w.to(tl.float64)).to(tl.float32))


@triton.jit
def walk_keys(
    v, Rows, Squares, scales, total, initial, o, final, saved, F, starts, bases,
    T, c_lo, c_hi, n_all, scale, HV, K, V,
    N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VARLEN: tl.constexpr, SAVE: tl.constexpr,
    TERMS: tl.constexpr, TWO: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk from chunk c_lo to c_hi - 1 of one sequence and head, for BV columns of the state; final may be initial."""
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
    kept = base
    if not VARLEN:
        kept = s.to(tl.int64) * n_all
    tile = (sh.to(tl.int64) * K + d[None, :]) * V + e[:, None]
    if initial is None:
        ST = tl.zeros((BV, BK), tl.float32)
    else:
        ST = tl.load(initial + tile, mask=inside, other=0.0)
    rp = i[:, None] * BK + d[None, :]
    xp = i[:, None] * 64 + i[None, :]
    for c in tl.range(c_lo, stop, num_stages=STAGES):
        slot = (base + c) * HV + h
        first = token + c * C
        alive = i < tl.minimum(length - c * C, C) * N
        vp = (first * N * HV + h) * V + ((i * (HV * V))[None, :] + e[:, None])
        rows = Rows + slot * ((5 if TWO else 3) * 64 * BK) + rp
        squares = Squares + slot * ((3 if TWO else 2) * 4096) + xp
        w = tl.load(scales + slot * 256 + i)
        n = tl.load(scales + slot * 256 + 64 + i)
        s_hi, s_lo = split(ST, EXACT)
        if SAVE:
            tl.store(saved + ((kept + c) * HV + h) * K * V + (e[:, None] * K + d[None, :]), s_hi, mask=inside)
        in_hi, in_lo = terms_of(rows, 3 * 64 * BK, TWO)
        RT = dot_both(s_hi, s_lo, tl.trans(in_hi), tl.trans(in_lo), TERMS, EXACT)
        RT = tl.load(v + vp, mask=alive[None, :] & in_v, other=0.0).to(tl.float32) * n[None, :] - RT
        r_hi, r_lo = split(RT, EXACT)
        x_hi, x_lo = terms_of(squares, 2 * 4096, TWO)
        UT = dot_both(r_hi, r_lo, tl.trans(x_hi), tl.trans(x_lo), TERMS, EXACT)
        if SAVE:
            tl.store(F + vp, UT.to(F.dtype.element_ty), mask=alive[None, :] & in_v)
        if TERMS == 2:  # the rounding of w is the same whenever a key recurs, so it would add up
            UT = UT * w[None, :] + UT * tl.load(scales + slot * 256 + 192 + i)[None, :]
        else:
            UT *= w[None, :]
        u_hi, u_lo = split(UT, EXACT)
        OT = dot(s_hi, tl.trans(tl.load(rows + 2 * 64 * BK)), EXACT)
        OT = dot_add(u_hi, tl.trans(tl.load(squares + 4096)), OT, EXACT)
        op = (first * HV + h) * V + ((i // N * (HV * V))[None, :] + e[:, None])
        asks = alive & (i % N == N - 1)
        tl.store(o + op, (OT * scale).to(o.dtype.element_ty), mask=asks[None, :] & in_v)
        out_hi, out_lo = terms_of(rows + 64 * BK, 3 * 64 * BK, TWO)
        ST = dot_add(u_hi, out_hi, ST * tl.load(total + slot * BK + d)[None, :], EXACT)
        if TWO:
            ST = tl.dot(u_lo, out_hi, ST)
            ST = tl.dot(u_hi, out_lo, ST)
    tl.store(final + tile, ST, mask=inside)
