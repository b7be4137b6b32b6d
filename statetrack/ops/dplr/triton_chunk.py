"""Diagonal plus low rank: what a chunk needs, and the gradients of its inputs, by a tree over the chunk.

Reads are q_t, after the token's decay and writes, and a_t, before them; writes are k_t v_t^T and b_t u_t^T. With m what
the decays between a token and the middle of a node leave of a read in its right or a write in its left half
(`triton_tree`), every score is a sum over the nodes, q . L k = m_q . m_k, of pairs that part there. q_t . k_t and
q_t . b_t have no decay between them. What ends in the state is kept in two terms: a, k, b, their scores, the inverse.

Down the tree, with R the gradients to what the right half's reads see of the past, W what the future sees of the left
half's writes, Z the gradients to the scores, and per channel c = <S_a, dS_b>:

    left half:    W_k <- f W_k + Z_qk^T m_q + Z_ak^T m_a, W_b likewise,   c <- f c + sum of m R over the right half
    right half:   R_q <- f R_q + Z_qk m_k + Z_qb m_b, R_a likewise,       c <- f c + sum of m W over the left half

and at the leaves, where S_a is S_{t-1}, d decay_t = c + q_t R_q, dq_t = decay_t R_q + .., da_t = R_a, dk_t = W_k + ..

Letters: T tokens, C tokens per chunk, H value heads, K key dim, V value dim. A `slot` numbers the (sequence, chunk)
pairs of a workspace. A workspace has Rows [slots H 7 C K] (q to the chunk's start, a to its start, k and b to its end,
the low terms of a, k, b; 4 of them where the products take float32) and Squares [slots H 6 C C] (qk, qb, ak, the
inverse, the low terms of the last two; 4).
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from statetrack.ops.triton_common import chunk_of, dot, dot_add, dot_both, operand, span, split, unit_lower_inverse
from statetrack.ops.triton_tree import LEVELS, sibling, sibling_sum, toward_middle


@triton.jit
def decays(log_decay, at, mask):
    """Load logarithms and return the decays, 1 where there is no token."""
    return tl.exp(tl.load(log_decay + at, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def put_terms(p, x, low, mask, EXACT: tl.constexpr):
    """Store a tile, and its low term `low` elements further."""
    hi, lo = split(x, EXACT)
    tl.store(p, hi, mask=mask)
    if not EXACT:
        tl.store(p + low, lo, mask=mask)


@triton.jit
def exact_scores(m, n, EXACT: tl.constexpr):
    """Return m n^T for float32 tiles of which nothing is rounded to bf16."""
    m_hi, m_lo = split(m, EXACT)
    n_hi, n_lo = split(n, EXACT)
    return dot_both(m_hi, m_lo, tl.trans(n_hi), tl.trans(n_lo), 2, EXACT)


@triton.jit
def prepare(
    q, k, a, b, log_decay, Rows, Squares, total, starts, slots, T, c_lo, n_chunks, HK, HV, K,
    C: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write one chunk's Rows, Squares, and the product of all its decays."""
    here = tl.program_id(0) // HV  # heads vary fastest: their rows are neighbours in memory
    h = tl.program_id(0) % HV
    slot = here.to(tl.int64) * HV + h
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, C)
    low: tl.constexpr = Rows.dtype.element_ty
    apart = i[:, None] ^ i[None, :]
    qk = tl.zeros((C, C), tl.float32)
    qb = tl.zeros((C, C), tl.float32)
    ak = tl.zeros((C, C), tl.float32)
    ab = tl.zeros((C, C), tl.float32)
    for block in tl.static_range(NK):
        d = block * BK + tl.arange(0, BK)
        inside = (i >= 0)[:, None] & (d < K)[None, :]
        alive = (i < tokens)[:, None] & (d < K)[None, :]
        at = (token * HK + h // (HV // HK)) * K + ((i * (HK * K))[:, None] + d[None, :])
        qt = tl.load(q + at, mask=alive, other=0.0).to(tl.float32)
        kt = tl.load(k + at, mask=alive, other=0.0).to(tl.float32)
        at = (token * HV + h) * K + ((i * (HV * K))[:, None] + d[None, :])
        a_t = tl.load(a + at, mask=alive, other=0.0).to(tl.float32)
        bt = tl.load(b + at, mask=alive, other=0.0).to(tl.float32)
        before = decays(log_decay, at, alive)  # of a read by q
        early = tl.full((C, BK), 1.0, tl.float32)  # of a read by a
        after = tl.full((C, BK), 1.0, tl.float32)
        whole = before
        own = i[:, None] == i[None, :]
        qk += tl.where(own, tl.sum(qt * kt, 1)[:, None], 0.0)
        qb += tl.where(own, tl.sum(qt * bt, 1)[:, None], 0.0)
        for level in tl.static_range(LEVELS):
            right = ((i >> level) & 1 == 1)[:, None]
            here_pairs = (apart >> level == 1) & (i[:, None] > i[None, :])
            m_q = tl.where(right, qt * before, 0.0).to(low)
            m_a = tl.where(right, a_t * early, 0.0)
            m_k = tl.where(right, 0.0, kt * after)
            m_b = tl.where(right, 0.0, bt * after)
            qk += tl.where(here_pairs, dot(m_q, tl.trans(m_k.to(low)), EXACT), 0.0)
            qb += tl.where(here_pairs, dot(m_q, tl.trans(m_b.to(low)), EXACT), 0.0)
            ak += tl.where(here_pairs, exact_scores(m_a, m_k, EXACT), 0.0)
            ab += tl.where(here_pairs, exact_scores(m_a, m_b, EXACT), 0.0)
            f = sibling(whole, 1 << level)
            before = tl.where(right, before * f, before)
            early = tl.where(right, early * f, early)
            after = tl.where(right, after, after * f)
            whole *= f
        rows = Rows + slot * ((4 if EXACT else 7) * C * K) + (i[:, None] * K + d[None, :])
        tl.store(rows, (qt * before).to(low), mask=inside)
        put_terms(rows + C * K, a_t * early, 3 * C * K, inside, EXACT)
        put_terms(rows + 2 * C * K, kt * after, 3 * C * K, inside, EXACT)
        put_terms(rows + 3 * C * K, bt * after, 3 * C * K, inside, EXACT)
        tl.store(total + slot * K + (i[:, None] * 0 + d[None, :]), whole, mask=inside & (i == 0)[:, None])
    squares = Squares + slot * ((4 if EXACT else 6) * C * C) + (i[:, None] * C + i[None, :])
    everywhere = apart >= 0
    tl.store(squares, qk.to(low))
    tl.store(squares + C * C, qb.to(low))
    put_terms(squares + 2 * C * C, ak, 2 * C * C, everywhere, EXACT)
    put_terms(squares + 3 * C * C, unit_lower_inverse(-ab, EXACT), 2 * C * C, everywhere, EXACT)


@triton.jit
def meet(
    v, u, d_out, z, Z, starts, slots, T, c_lo, n_chunks, scale, HV, V,
    C: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the gradients to one chunk's scores, Z [slots H 4 C C]: of qk, qb, ak, ab. z is that to a's reads."""
    here = tl.program_id(0) // HV
    h = tl.program_id(0) % HV
    slot = here.to(tl.int64) * HV + h
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, C)
    qk = tl.zeros((C, C), tl.float32)
    qb = tl.zeros((C, C), tl.float32)
    ak = tl.zeros((C, C), tl.float32)
    ab = tl.zeros((C, C), tl.float32)
    for iv in tl.static_range(NV):
        e = iv * BV + tl.arange(0, BV)
        some = (i < tokens)[:, None] & (e < V)[None, :]
        at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
        vt = tl.trans(operand(tl.load(v + at, mask=some, other=0.0), EXACT))
        ut = tl.trans(operand(tl.load(u + at, mask=some, other=0.0), EXACT))
        do = operand(tl.load(d_out + at, mask=some, other=0.0), EXACT)
        zt = operand(tl.load(z + at, mask=some, other=0.0), EXACT)
        qk = dot_add(do, vt, qk, EXACT)
        qb = dot_add(do, ut, qb, EXACT)
        ak = dot_add(zt, vt, ak, EXACT)
        ab = dot_add(zt, ut, ab, EXACT)
    Z += slot * (4 * C * C) + (i[:, None] * C + i[None, :])
    seen = i[:, None] >= i[None, :]
    earlier = i[:, None] > i[None, :]
    tl.store(Z, tl.where(seen, qk * scale, 0.0).to(Z.dtype.element_ty))
    tl.store(Z + C * C, tl.where(seen, qb * scale, 0.0).to(Z.dtype.element_ty))
    tl.store(Z + 2 * C * C, tl.where(earlier, ak, 0.0).to(Z.dtype.element_ty))
    tl.store(Z + 3 * C * C, tl.where(earlier, ab, 0.0).to(Z.dtype.element_ty))


@triton.jit
def diagonal(Z, i, C: tl.constexpr):
    """Load the diagonal of one [C C] tile."""
    return tl.load(Z + i * C + i).to(tl.float32)


@triton.jit
def crossing(Z, m, level: tl.constexpr, TRANSPOSED: tl.constexpr, EXACT: tl.constexpr):
    """Return Z m, or Z^T m, over the pairs that part at this level."""
    C: tl.constexpr = m.shape[0]
    i = tl.arange(0, C)
    row = i[:, None]
    column = i[None, :]
    if TRANSPOSED:
        z = tl.load(Z + column * C + row)
        here = ((row ^ column) >> level == 1) & (column > row)
    else:
        z = tl.load(Z + row * C + column)
        here = ((row ^ column) >> level == 1) & (row > column)
    return dot(tl.where(here, z, 0.0).to(z.dtype), m.to(z.dtype), EXACT)


@triton.jit
def descend(
    Z, qt, kt, a_t, bt, e, early, f, R_q, R_a, W_k, W_b, carried,
    level: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Pass R, W and c (carried) from the nodes of one level to their halves."""
    C: tl.constexpr = qt.shape[0]
    right = ((tl.arange(0, C) >> level) & 1 == 1)[:, None]
    m_q = tl.where(right, qt * e, 0.0)
    m_a = tl.where(right, a_t * early, 0.0)
    m_k = tl.where(right, 0.0, kt * e)
    m_b = tl.where(right, 0.0, bt * e)
    met = tl.where(right, m_q * R_q + m_a * R_a, m_k * W_k + m_b * W_b)
    carried = f * carried + sibling_sum(met, 1 << level)
    to_q = crossing(Z, m_k, level, False, EXACT) + crossing(Z + C * C, m_b, level, False, EXACT)
    to_a = crossing(Z + 2 * C * C, m_k, level, False, EXACT) + crossing(Z + 3 * C * C, m_b, level, False, EXACT)
    to_k = crossing(Z, m_q, level, True, EXACT) + crossing(Z + 2 * C * C, m_a, level, True, EXACT)
    to_b = crossing(Z + C * C, m_q, level, True, EXACT) + crossing(Z + 3 * C * C, m_a, level, True, EXACT)
    R_q = tl.where(right, f * R_q + to_q, R_q)
    R_a = tl.where(right, f * R_a + to_a, R_a)
    W_k = tl.where(right, W_k, f * W_k + to_k)
    W_b = tl.where(right, W_b, f * W_b + to_b)
    return R_q, R_a, W_k, W_b, carried


@triton.jit
def gather(
    q, k, v, a, b, log_decay, u, d_out, z, Z, states, d_states, dq, dk, da, db, d_log, starts, slots,
    T, c_lo, n_chunks, scale, HK, HV, K, V, part_stride,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk's q, k, a, b and log decay for BK channels; dq and dk per value head."""
    here = tl.program_id(0) // HV
    h = tl.program_id(0) % HV
    slot = here.to(tl.int64) * HV + h
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, C)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    in_k = d < K
    rows = i < tokens
    R_q = tl.zeros((C, BK), tl.float32)
    R_a = tl.zeros((C, BK), tl.float32)
    W_k = tl.zeros((C, BK), tl.float32)
    W_b = tl.zeros((C, BK), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    for iv in tl.static_range(NV):
        e = iv * BV + tl.arange(0, BV)
        some = rows[:, None] & (e < V)[None, :]
        inside = (e < V)[:, None] & in_k[None, :]
        at = slot * K * V + (e[:, None] * K + d[None, :])
        S = tl.load(states + at, mask=inside, other=0.0)
        D = tl.load(d_states + at, mask=inside, other=0.0)
        at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
        R_q = dot_add(operand(tl.load(d_out + at, mask=some, other=0.0), EXACT), S, R_q, EXACT)
        R_a = dot_add(operand(tl.load(z + at, mask=some, other=0.0), EXACT), S, R_a, EXACT)
        W_k = dot_add(operand(tl.load(v + at, mask=some, other=0.0), EXACT), D, W_k, EXACT)
        W_b = dot_add(operand(tl.load(u + at, mask=some, other=0.0), EXACT), D, W_b, EXACT)
        total += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
    R_q *= scale
    alive = rows[:, None] & in_k[None, :]
    shared = (token * HK + h // (HV // HK)) * K + ((i * (HK * K))[:, None] + d[None, :])
    at = (token * HV + h) * K + ((i * (HV * K))[:, None] + d[None, :])
    qt = tl.load(q + shared, mask=alive, other=0.0).to(tl.float32)
    kt = tl.load(k + shared, mask=alive, other=0.0).to(tl.float32)
    a_t = tl.load(a + at, mask=alive, other=0.0).to(tl.float32)
    bt = tl.load(b + at, mask=alive, other=0.0).to(tl.float32)
    decay = decays(log_decay, at, alive)
    f1 = sibling(decay, 1)
    whole = decay * f1
    f2 = sibling(whole, 2)
    whole *= f2
    f4 = sibling(whole, 4)
    whole *= f4
    f8 = sibling(whole, 8)
    whole *= f8
    f16 = sibling(whole, 16)
    whole *= f16
    f32 = sibling(whole, 32)
    one = tl.full((C, BK), 1.0, tl.float32)
    carried = total[None, :] + tl.zeros((C, BK), tl.float32)
    Z += slot * (4 * C * C)
    for up in tl.static_range(LEVELS):
        f = f32
        if up == 1:
            f = f16
        if up == 2:
            f = f8
        if up == 3:
            f = f4
        if up == 4:
            f = f2
        if up == 5:
            f = f1
        near = toward_middle(decay, f1, f2, f4, f8, f16, 5 - up)
        early = toward_middle(one, f1, f2, f4, f8, f16, 5 - up)
        R_q, R_a, W_k, W_b, carried = descend(
            Z, qt, kt, a_t, bt, near, early, f, R_q, R_a, W_k, W_b, carried, 5 - up, EXACT
        )
    qk = diagonal(Z, i, C)[:, None]
    qb = diagonal(Z + C * C, i, C)[:, None]
    tl.store(d_log + at, (carried + qt * R_q) * decay, mask=alive)
    tl.store(da + at, R_a.to(da.dtype.element_ty), mask=alive)
    tl.store(db + at, (W_b + qb * qt).to(db.dtype.element_ty), mask=alive)
    shared += (h % (HV // HK)).to(tl.int64) * part_stride
    tl.store(dq + shared, (R_q * decay + qk * kt + qb * bt).to(dq.dtype.element_ty), mask=alive)
    tl.store(dk + shared, (W_k + qk * qt).to(dk.dtype.element_ty), mask=alive)
