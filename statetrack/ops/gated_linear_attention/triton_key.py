"""Gated linear attention with one decay per key channel: what a chunk needs, and the gradients of its inputs.

Every pair of tokens i > j parts at one level of a binary tree over the chunk: there is a node of 2h tokens with j in
its left and i in its right half. With m_t what the decays between t and the node's middle leave of q_t (right) or k_t
(left),

    q_i . L_ij k_j = m_i . m_j

so one level is one product of m [C K] with itself, masked to the pairs that part there. The products of decays come
from multiplication alone, from the leaves up: a prefix and a suffix within the node, and f_t, the product over the
sibling. No logarithm, no quotient: nothing overflows, a decay of 0 or 1e-30 needs no special case, a sign is a sign.

The gradients go down the same tree. A node [a, b) has R_t = S_a dO_t (what reads see of the past), W_t = dS_b v_t (what
the future sees of writes) and per channel c = <S_a, dS_b>. With Z the gradient to the scores, both ways, of the pairs
that part here, and x_t = m_t R_t (right) or m_t W_t (left):

    left half:    W <- f W + Z m,   c <- f c + sum of x over the right half
    right half:   R <- f R + Z m,   c <- f c + sum of x over the left half

At the leaves S_a is S_{t-1} and dS_b lacks only token t's own read:

    d a_t = c + q_t R_t,   dq_t = a_t R_t + dP_tt k_t,   dk_t = W_t + dP_tt q_t

Letters as in triton_walk.py; h tokens in a half.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.triton_common import chunk_of, dot, dot_add, operand, span, split
from statetrack.ops.triton_tree import LEVELS, sibling, sibling_sum, toward_middle


@triton.jit
def prepare_key(
    q, k, decay, q_start, k_hi, k_lo, total, P, starts, slots, T, c_lo, n_chunks, HK, HV, K,
    C: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write one chunk's start q, end k (two terms), the product of all its decays, and its scores P."""
    here = tl.program_id(0) // HV  # heads vary fastest: their rows are neighbours in memory
    h = tl.program_id(0) % HV
    slot = here.to(tl.int64) * HV + h
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    hk = h // (HV // HK)
    i = tl.arange(0, C)
    apart = i[:, None] ^ i[None, :]
    scores = tl.zeros((C, C), tl.float32)
    for block in tl.static_range(NK):
        d = block * BK + tl.arange(0, BK)
        alive = (i < tokens)[:, None] & (d < K)[None, :]
        at = (token * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
        qt = tl.load(q + at, mask=alive, other=0.0).to(tl.float32)
        kt = tl.load(k + at, mask=alive, other=0.0).to(tl.float32)
        at = (token * HV + h) * K + ((i * (HV * K))[:, None] + d[None, :])
        before = tl.load(decay + at, mask=alive, other=1.0).to(tl.float32)
        whole = before
        after = tl.full((C, BK), 1.0, tl.float32)
        own = tl.sum(qt * kt, 1)
        scores += tl.where(apart == 0, own[:, None], 0.0)
        for level in tl.static_range(LEVELS):
            right = ((i >> level) & 1 == 1)[:, None]
            m = tl.where(right, qt * before, kt * after).to(k_hi.dtype.element_ty)
            scores += tl.where(apart >> level == 1, dot(m, tl.trans(m), EXACT), 0.0)
            f = sibling(whole, 1 << level)
            before = tl.where(right, before * f, before)
            after = tl.where(right, after, after * f)
            whole *= f
        inside = (i >= 0)[:, None] & (d < K)[None, :]
        at = slot * C * K + (i[:, None] * K + d[None, :])
        tl.store(q_start + at, (qt * before).to(q_start.dtype.element_ty), mask=inside)
        hi, lo = split(kt * after, EXACT)
        tl.store(k_hi + at, hi, mask=inside)
        if not EXACT:
            tl.store(k_lo + at, lo, mask=inside)
        tl.store(total + slot * K + (i[:, None] * 0 + d[None, :]), whole, mask=inside & (i == 0)[:, None])
    scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
    tl.store(P + slot * C * C + (i[:, None] * C + i[None, :]), scores.to(P.dtype.element_ty))


@triton.jit
def _descend(qt, kt, e, f, dP, seen, wanted, carried, low, level: tl.constexpr, EXACT: tl.constexpr):
    """Pass R (seen), W (wanted) and c (carried) from the nodes of one level to their halves."""
    i = tl.arange(0, qt.shape[0])
    right = ((i >> level) & 1 == 1)[:, None]
    apart = i[:, None] ^ i[None, :]
    m = tl.where(right, qt, kt) * e
    here = tl.where(right, seen, wanted)
    crossing = dot(tl.where(apart >> level == 1, dP, 0.0).to(low), m.to(low), EXACT)
    carried = f * carried + sibling_sum(m * here, 1 << level)
    here = f * here + crossing
    return tl.where(right, here, seen), tl.where(right, wanted, here), carried


@triton.jit
def gather_key(
    q, k, v, decay, d_out, states, d_states, dq, dk, d_decay, starts, slots,
    T, c_lo, n_chunks, scale, HK, HV, K, V, part_stride,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk's q, k and decay for BK channels; dq and dk per value head of a key head."""
    here = tl.program_id(0) // HV
    h = tl.program_id(0) % HV
    slot = here.to(tl.int64) * HV + h
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    hk = h // (HV // HK)
    i = tl.arange(0, C)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    in_k = d < K
    rows = i < tokens
    low: tl.constexpr = states.dtype.element_ty
    dP = tl.zeros((C, C), tl.float32)
    seen = tl.zeros((C, BK), tl.float32)
    wanted = tl.zeros((C, BK), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    for iv in tl.static_range(NV):
        e = iv * BV + tl.arange(0, BV)
        some = rows[:, None] & (e < V)[None, :]
        at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
        vt = operand(tl.load(v + at, mask=some, other=0.0), EXACT)
        do = operand(tl.load(d_out + at, mask=some, other=0.0), EXACT)
        inside = (e < V)[:, None] & in_k[None, :]
        at = slot * K * V + (e[:, None] * K + d[None, :])
        S = tl.load(states + at, mask=inside, other=0.0)
        D = tl.load(d_states + at, mask=inside, other=0.0)
        dP = dot_add(do, tl.trans(vt), dP, EXACT)
        seen = dot_add(do, S, seen, EXACT)
        wanted = dot_add(vt, D, wanted, EXACT)
        total += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
    seen *= scale
    dP *= scale
    own = tl.sum(tl.where(i[:, None] == i[None, :], dP, 0.0), 1)
    dP = tl.where(i[:, None] > i[None, :], dP, 0.0)
    dP += tl.trans(dP)
    alive = rows[:, None] & in_k[None, :]
    shared = (token * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
    qt = tl.load(q + shared, mask=alive, other=0.0).to(tl.float32)
    kt = tl.load(k + shared, mask=alive, other=0.0).to(tl.float32)
    at = (token * HV + h) * K + ((i * (HV * K))[:, None] + d[None, :])
    a = tl.load(decay + at, mask=alive, other=1.0).to(tl.float32)
    f1 = sibling(a, 1)
    whole = a * f1
    f2 = sibling(whole, 2)
    whole *= f2
    f4 = sibling(whole, 4)
    whole *= f4
    f8 = sibling(whole, 8)
    whole *= f8
    f16 = sibling(whole, 16)
    whole *= f16
    f32 = sibling(whole, 32)
    carried = total[None, :] + tl.zeros((C, BK), tl.float32)
    m = toward_middle(a, f1, f2, f4, f8, f16, 5)
    seen, wanted, carried = _descend(qt, kt, m, f32, dP, seen, wanted, carried, low, 5, EXACT)
    m = toward_middle(a, f1, f2, f4, f8, f16, 4)
    seen, wanted, carried = _descend(qt, kt, m, f16, dP, seen, wanted, carried, low, 4, EXACT)
    m = toward_middle(a, f1, f2, f4, f8, f16, 3)
    seen, wanted, carried = _descend(qt, kt, m, f8, dP, seen, wanted, carried, low, 3, EXACT)
    m = toward_middle(a, f1, f2, f4, f8, f16, 2)
    seen, wanted, carried = _descend(qt, kt, m, f4, dP, seen, wanted, carried, low, 2, EXACT)
    m = toward_middle(a, f1, f2, f4, f8, f16, 1)
    seen, wanted, carried = _descend(qt, kt, m, f2, dP, seen, wanted, carried, low, 1, EXACT)
    m = toward_middle(a, f1, f2, f4, f8, f16, 0)
    seen, wanted, carried = _descend(qt, kt, m, f1, dP, seen, wanted, carried, low, 0, EXACT)
    d_q = seen * a + own[:, None] * kt
    d_k = wanted + own[:, None] * qt
    tl.store(d_decay + at, carried + qt * seen, mask=alive)
    shared += (h % (HV // HK)).to(tl.int64) * part_stride
    tl.store(dq + shared, d_q.to(dq.dtype.element_ty), mask=alive)
    tl.store(dk + shared, d_k.to(dk.dtype.element_ty), mask=alive)
