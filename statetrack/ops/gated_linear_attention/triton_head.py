"""Gated linear attention with one decay per head: the products of a chunk's decays, and the gradients of its inputs.

With L_ij (i >= j) the product of the decays after row j up to row i, the scores are P = (q k^T) L. `gather_head` has S
at the start and dS at the end of every chunk and needs no order: with dP = scale dO v^T,

    dq = scale start dO S^T + (dP L) k,   dk = end v dS^T + (dP L)^T q

q and k may serve many value heads: one program takes several of them; `pairs_head` makes q k^T once for them, and sums
dP L over them before it meets q and k. The gradient to a decay is the definition's, <dS_t, S_{t-1}>. With
X_ij = dP_ij q_i.k_j, y_i = scale q_i S dO_i, z_j = k_j dS v_j and c = <S, dS>,

    a_t d a_t = sum_{i >= t > j} X_ij L_ij + sum_{i >= t} start_i y_i + sum_{j < t} end_j z_j + total c

where nothing is subtracted, so that the quotient is right for any decay whose products do not underflow. In a chunk
with a decay below TINY (a reset, say) a head's gradients are made without a quotient:

    d a_t = sum_{i >= t} L_it (sum_{j < t} X_ij L_{t-1,j} + start_{t-1} y_i)
            + end_t (sum_{j < t} L_{t-1,j} z_j + start_{t-1} c)

Letters as in triton_walk.py; R value heads per program, BH heads side by side.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.gated_linear_attention.triton_walk import END, FACTORS, HIGH, LOW, SIGN, START, factor, fetch
from statetrack.ops.triton_common import chunk_of, dot, dot_add, operand, span

CUT = tl.constexpr(-256.0)  # stands for log2(0): 2 to it is 0, and sums of it and others lose little
TINY = tl.constexpr(2.0**-40)


@triton.jit
def prepare_head(
    decay, G, starts, slots, T, c_lo, n_chunks, HV,
    C: tl.constexpr, BH: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Write one chunk's running log2|decay| (two terms), sign, start and end, for BH heads."""
    slot = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    s, c = chunk_of(slot, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, C)
    at = decay + token * HV + (i[:, None] * HV + h[None, :])
    real = (h < HV)[None, :]
    a = tl.load(at, mask=(i < tokens)[:, None] & real, other=1.0).to(tl.float64)
    after = tl.load(at + HV, mask=(i + 1 < tokens)[:, None] & real, other=1.0).to(tl.float64)
    size = tl.abs(a)
    g = tl.cumsum(tl.where(size == 0.0, CUT, tl.log2(tl.where(size == 0.0, 1.0, size))), 0)
    hi = g.to(tl.float32)
    out = G + ((slot.to(tl.int64) * HV + h) * (FACTORS * C))[None, :] + i[:, None]
    tl.store(out + HIGH * C, hi, mask=real)
    tl.store(out + LOW * C, (g - hi.to(tl.float64)).to(tl.float32), mask=real)
    tl.store(out + SIGN * C, tl.cumprod(tl.where(a < 0.0, -1.0, 1.0), 0), mask=real)
    tl.store(out + START * C, tl.cumprod(a, 0).to(tl.float32), mask=real)
    tl.store(out + END * C, tl.cumprod(after, 0, reverse=True).to(tl.float32), mask=real)


@triton.jit
def signed_power(between, sign, from_sign):
    """Return 2^between, at most 1, with the product of two signs."""
    power = tl.exp2(tl.minimum(between, 0.0)).to(tl.int32, bitcast=True)
    signs = sign.to(tl.int32, bitcast=True) ^ from_sign.to(tl.int32, bitcast=True)
    return (power ^ signs).to(tl.float32, bitcast=True)


@triton.jit
def decays(G, slot, C: tl.constexpr, EXACT: tl.constexpr):
    """Return L_ij [C C] of one chunk and head; above the diagonal it is of size at most 1."""
    i = tl.arange(0, C)
    hi = factor(G, slot, HIGH, i, C)
    sign = factor(G, slot, SIGN, i, C)
    between = hi[:, None] - hi[None, :]
    if EXACT:
        lo = factor(G, slot, LOW, i, C)
        between += lo[:, None] - lo[None, :]
    return signed_power(between, sign[:, None], sign[None, :])


@triton.jit
def scores_of(q, k, tile, rows, K, C: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, EXACT: tl.constexpr):
    """Return q_i.k_j [C C] where i >= j, else 0."""
    i = tl.arange(0, C)
    scores = tl.zeros((C, C), tl.float32)
    for block in tl.static_range(NK):
        d = block * BK + tl.arange(0, BK)
        alive = rows[:, None] & (d < K)[None, :]
        qt = operand(tl.load(q + tile[:, None] + d[None, :], mask=alive, other=0.0), EXACT)
        kt = operand(tl.load(k + tile[:, None] + d[None, :], mask=alive, other=0.0), EXACT)
        scores = dot_add(qt, tl.trans(kt), scores, EXACT)
    return tl.where(i[:, None] >= i[None, :], scores, 0.0)


@triton.jit
def part_of(starts, slots, T, c_lo, n_chunks, HK, parts, C: tl.constexpr, VARLEN: tl.constexpr):
    """Return the program's chunk, key head and part of its value heads; its first token, and how many it has."""
    here = tl.program_id(0) // (HK * parts)
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    return here, tl.program_id(0) // parts % HK, tl.program_id(0) % parts, token, tokens


@triton.jit
def scores_head(
    q, k, G, P, starts, slots, T, c_lo, n_chunks, HK, HV, K, R, parts,
    C: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write one chunk's scores P for R of the value heads that share a key head."""
    here, hk, part, token, tokens = part_of(starts, slots, T, c_lo, n_chunks, HK, parts, C, VARLEN)
    i = tl.arange(0, C)
    scores = scores_of(q, k, (token * HK + hk) * K + i * (HK * K), i < tokens, K, C, BK, NK, EXACT)
    for r in tl.range(R):
        slot = here.to(tl.int64) * HV + hk * (HV // HK) + part * R + r
        at = slot * C * C + (i[:, None] * C + i[None, :])
        tl.store(P + at, (scores * decays(G, slot, C, EXACT)).to(P.dtype.element_ty))


@triton.jit
def pairs_head(
    q, k, v, d_out, G, shared, crossing, starts, slots,
    T, c_lo, n_chunks, scale, HK, HV, K, V, R, parts,
    C: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    VARLEN: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write one chunk's dP L, summed over R of the value heads that share a key head, and each head's sums of X L."""
    here, hk, part, token, tokens = part_of(starts, slots, T, c_lo, n_chunks, HK, parts, C, VARLEN)
    i = tl.arange(0, C)
    rows = i < tokens
    low: tl.constexpr = shared.dtype.element_ty
    scores = scores_of(q, k, (token * HK + hk) * K + i * (HK * K), rows, K, C, BK, NK, EXACT) * scale
    see = i[:, None] >= i[None, :]
    later = tl.where(i[:, None] <= i[None, :], 1.0, 0.0).to(low)  # [t i]
    total = tl.zeros((C, C), tl.float32)
    for r in tl.range(0, R, num_stages=STAGES):
        h = hk * (HV // HK) + part * R + r
        slot = here.to(tl.int64) * HV + h
        dP = tl.zeros((C, C), tl.float32)
        for iv in tl.static_range(NV):
            e = iv * BV + tl.arange(0, BV)
            at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
            vt = operand(fetch(v + at, rows[:, None], (e < V)[None, :], FULL), EXACT)
            do = operand(fetch(d_out + at, rows[:, None], (e < V)[None, :], FULL), EXACT)
            dP = dot_add(do, tl.trans(vt), dP, EXACT)
        dP *= decays(G, slot, C, EXACT)
        total += dP
        crossed = dot(later, (dP * scores).to(low), EXACT)  # [t j], the sum over i >= t
        tl.store(crossing + slot * C + i, tl.sum(tl.where(i[:, None] > i[None, :], crossed, 0.0), 1))
    at = tl.program_id(0).to(tl.int64) * C * C + (i[:, None] * C + i[None, :])
    tl.store(shared + at, (tl.where(see, total, 0.0) * scale).to(low))


@triton.jit
def gather_head(
    q, k, v, d_out, G, states, d_states, shared, dq, dk, edges, starts, slots,
    T, c_lo, n_chunks, scale, HK, HV, K, V, R, parts, part_stride, edge_stride,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    VARLEN: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write BK channels of one chunk's dq and dk, summed over R heads of a key head, and their part of y, z, c."""
    here, hk, part, token, tokens = part_of(starts, slots, T, c_lo, n_chunks, HK, parts, C, VARLEN)
    i = tl.arange(0, C)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    rows = i < tokens
    in_k = d < K
    alive = rows[:, None] & in_k[None, :]
    STATE_FULL: tl.constexpr = 2 if FULL > 0 else 0
    tile = (token * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
    qt = operand(tl.load(q + tile, mask=alive, other=0.0), EXACT)
    kt = operand(tl.load(k + tile, mask=alive, other=0.0), EXACT)
    pairs = tl.load(shared + tl.program_id(0).to(tl.int64) * C * C + (i[:, None] * C + i[None, :]))
    d_q = dot(pairs, kt, EXACT)
    d_k = dot(tl.trans(pairs), qt, EXACT)
    edges += tl.program_id(1).to(tl.int64) * edge_stride
    for r in tl.range(0, R, num_stages=STAGES):
        h = hk * (HV // HK) + part * R + r
        slot = here.to(tl.int64) * HV + h
        read = tl.zeros((C, BK), tl.float32)
        written = tl.zeros((C, BK), tl.float32)
        carried = 0.0
        for iv in tl.static_range(NV):
            e = iv * BV + tl.arange(0, BV)
            at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
            block = slot * K * V + (e[:, None] * K + d[None, :])
            vt = operand(fetch(v + at, rows[:, None], (e < V)[None, :], FULL), EXACT)
            do = operand(fetch(d_out + at, rows[:, None], (e < V)[None, :], FULL), EXACT)
            S = fetch(states + block, (e < V)[:, None], in_k[None, :], STATE_FULL)
            D = fetch(d_states + block, (e < V)[:, None], in_k[None, :], STATE_FULL)
            read = dot_add(do, S, read, EXACT)
            written = dot_add(vt, D, written, EXACT)
            carried += tl.sum(S.to(tl.float32) * D.to(tl.float32))
        read *= scale
        d_q += read * factor(G, slot, START, i, C)[:, None]
        d_k += written * factor(G, slot, END, i, C)[:, None]
        edge = edges + slot * 3 * C
        tl.store(edge + i, tl.sum(read * qt.to(tl.float32), 1))
        tl.store(edge + C + i, tl.sum(written * kt.to(tl.float32), 1))
        tl.store(edge + 2 * C, carried)
    tile += part.to(tl.int64) * part_stride
    tl.store(dq + tile, d_q.to(dq.dtype.element_ty), mask=alive)
    tl.store(dk + tile, d_k.to(dk.dtype.element_ty), mask=alive)


@triton.jit
def _edge(edges, at, edge_stride, mask, NE: tl.constexpr):
    """Return what the programs of `gather_head` left at one place, summed over their blocks of channels."""
    out = tl.load(edges + at, mask=mask, other=0.0)
    for block in tl.static_range(1, NE):
        out += tl.load(edges + at + block * edge_stride, mask=mask, other=0.0)
    return out


@triton.jit
def _by_definition(
    q, k, v, d_out, G, edges, slot, token, rows, h, hk, scale, HK, HV, K, V, edge_stride,
    C: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, NE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Return the gradient to one chunk's decays of one head, without a quotient."""
    i = tl.arange(0, C)
    see = i[:, None] >= i[None, :]
    dP = tl.zeros((C, C), tl.float32)
    for iv in tl.static_range(NV):
        e = iv * BV + tl.arange(0, BV)
        some = rows[:, None] & (e < V)[None, :]
        at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
        vt = operand(tl.load(v + at, mask=some, other=0.0), EXACT)
        do = operand(tl.load(d_out + at, mask=some, other=0.0), EXACT)
        dP = dot_add(do, tl.trans(vt), dP, EXACT)
    X = scores_of(q, k, (token * HK + hk) * K + i * (HK * K), rows, K, C, BK, NK, EXACT) * (dP * scale)
    X = X.to(tl.float32 if EXACT else tl.bfloat16)
    back = tl.maximum(i - 1, 0)
    hi = tl.where(i > 0, factor(G, slot, HIGH, back, C), 0.0)
    lo = tl.where(i > 0, factor(G, slot, LOW, back, C), 0.0)
    sign = tl.where(i > 0, factor(G, slot, SIGN, back, C), 1.0)
    start = tl.where(i > 0, factor(G, slot, START, back, C), 1.0)
    between = hi[:, None] - factor(G, slot, HIGH, i, C)[None, :] + (lo[:, None] - factor(G, slot, LOW, i, C)[None, :])
    L = signed_power(between, sign[:, None], factor(G, slot, SIGN, i, C)[None, :])
    L = tl.where(i[:, None] > i[None, :], L, 0.0)  # L_{t-1,j}
    every = i >= 0
    y = _edge(edges, slot * 3 * C + i, edge_stride, every, NE)
    z = _edge(edges, slot * 3 * C + C + i, edge_stride, every, NE)
    c = _edge(edges, slot * 3 * C + 2 * C + i * 0, edge_stride, every, NE)
    M = dot(X, tl.trans(L.to(X.dtype)), EXACT) + y[:, None] * start[None, :]
    d_a = tl.sum(tl.where(see, M * decays(G, slot, C, True), 0.0), 0)
    return d_a + factor(G, slot, END, i, C) * (tl.sum(L * z[None, :], 1) + start * c)


@triton.jit
def decay_head(
    q, k, v, d_out, decay, G, edges, crossing, d_decay, starts, slots,
    T, c_lo, n_chunks, scale, HK, HV, K, V, edge_stride,
    C: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, NE: tl.constexpr,
    BH: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the gradient to one chunk's decays of BH heads."""
    here = tl.program_id(0)
    heads = tl.arange(0, BH)
    h = tl.program_id(1) * BH + heads
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, C)
    rows = i < tokens
    real = (h < HV)[None, :] & (i >= 0)[:, None]
    place = token * HV + (i[:, None] * HV + h[None, :])
    a = tl.load(decay + place, mask=rows[:, None] & real, other=1.0).to(tl.float32)
    slot = (here.to(tl.int64) * HV + h)[None, :]
    factors = G + slot * FACTORS * C + i[:, None]
    edge = slot * 3 * C + i[:, None]
    begun = real & (i > 0)[:, None]  # row i gets what row i - 1 has
    reads = tl.load(factors + START * C, mask=real, other=0.0) * _edge(edges, edge, edge_stride, real, NE)
    writes = tl.load(factors + END * C - 1, mask=begun, other=0.0) * _edge(edges, edge + C - 1, edge_stride, begun, NE)
    total = tl.load(factors + START * C + C - 1 - i[:, None], mask=real, other=0.0)
    across = total * _edge(edges, edge + 2 * C - i[:, None], edge_stride, real, NE)
    across += tl.load(crossing + slot * C + i[:, None], mask=real, other=0.0)
    across += tl.cumsum(reads, 0, reverse=True) + tl.cumsum(writes, 0)
    tiny = tl.max(tl.where(tl.abs(a) < TINY, 1, 0), 0)
    whole = (tiny == 0)[None, :]
    tl.store(d_decay + place, across / tl.where(whole, a, 1.0), mask=rows[:, None] & real & whole)
    if tl.max(tiny, 0) > 0:
        for n in tl.range(BH):
            if tl.max(tl.where(heads == n, tiny, 0), 0) > 0:
                one = tl.program_id(1) * BH + n
                d_a = _by_definition(
                    q, k, v, d_out, G, edges, here.to(tl.int64) * HV + one, token, rows, one, one // (HV // HK), scale,
                    HK, HV, K, V, edge_stride, C, BK, NK, BV, NV, NE, EXACT,
                )  # fmt: skip
                tl.store(d_decay + (token + i) * HV + one, d_a, mask=rows)
