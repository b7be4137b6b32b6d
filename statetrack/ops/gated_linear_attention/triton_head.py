"""Gated linear attention with one decay per head: the products of a chunk's decays, and the gradients of its inputs.

`gather_head` has S at the start and dS at the end of every chunk and needs no order. With L as in triton_walk.py,
P = q k^T, dP = scale dO v^T,

    dq = scale start dO S^T + (dP L) k,   dk = end v dS^T + (dP L)^T q

q and k may serve many value heads: one program takes several of them, makes q k^T once and sums dP L over them before
it meets k and q. The gradient to a decay is the definition's, <dS_t, S_{t-1}>: with row 0 the chunk's start,
X_ij = dP_ij q_i.k_j, y_i = scale q_i S dO_i, z_j = k_j dS v_j and c = <S, dS>,

    d a_t = sum_{i >= t} L_it (sum_{j < t} X_ij L_{t-1,j} + y_i L_{t-1,0})
            + L_Ct (sum_{j < t} L_{t-1,j} z_j + L_{t-1,0} c)

a matrix product and sums, no quotient: right at a decay of 0 as anywhere. Letters as in triton_walk.py; R value heads
per program.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.gated_linear_attention.triton_walk import (
    END,
    FACTORS,
    HIGH,
    LOW,
    SIGN,
    START,
    decays,
    factor,
    fetch,
    signed_power,
)
from statetrack.ops.triton_common import chunk_of, dot, dot_add, operand, span

CUT = tl.constexpr(-4096.0)  # stands for log2(0): 2 to it is 0, and float64 sums of it and others stay exact


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
def gather_head(
    q, k, v, d_out, G, states, d_states, dq, dk, edges, starts, slots,
    T, c_lo, n_chunks, scale, HK, HV, K, V, R, parts, part_stride,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    VARLEN: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write one chunk's dq and dk, summed over R of the value heads that share a key head, and each head's y, z, c."""
    here = tl.program_id(0) // (HK * parts)
    hk = tl.program_id(0) // parts % HK
    part = tl.program_id(0) % parts
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    rows = i < tokens
    in_k = d < K
    alive = rows[:, None] & in_k[None, :]
    STATE_FULL: tl.constexpr = 2 if FULL > 0 else 0
    see = i[:, None] >= i[None, :]
    tile = (token * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
    qt = operand(tl.load(q + tile, mask=alive, other=0.0), EXACT)
    kt = operand(tl.load(k + tile, mask=alive, other=0.0), EXACT)
    shared = tl.zeros((C, C), tl.float32)
    d_q = tl.zeros((C, BK), tl.float32)
    d_k = tl.zeros((C, BK), tl.float32)
    for r in tl.range(0, R, num_stages=STAGES):
        h = hk * (HV // HK) + part * R + r
        slot = here.to(tl.int64) * HV + h
        dP = tl.zeros((C, C), tl.float32)
        y = tl.zeros((C,), tl.float32)
        z = tl.zeros((C,), tl.float32)
        carried = tl.zeros((BK,), tl.float32)
        for iv in tl.static_range(NV):
            e = iv * BV + tl.arange(0, BV)
            at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
            block = slot * K * V + (e[:, None] * K + d[None, :])
            vt = operand(fetch(v + at, rows[:, None], (e < V)[None, :], FULL), EXACT)
            do = operand(fetch(d_out + at, rows[:, None], (e < V)[None, :], FULL), EXACT)
            S = fetch(states + block, (e < V)[:, None], in_k[None, :], STATE_FULL)
            D = fetch(d_states + block, (e < V)[:, None], in_k[None, :], STATE_FULL)
            dP = dot_add(do, tl.trans(vt), dP, EXACT)
            y += tl.sum(dot(qt, tl.trans(S), EXACT) * do.to(tl.float32), 1)
            z += tl.sum(dot(kt, tl.trans(D), EXACT) * vt.to(tl.float32), 1)
            start = factor(G, slot, START, i, C) * scale
            end = factor(G, slot, END, i, C)
            d_q = dot_add((do.to(tl.float32) * start[:, None]).to(kt.dtype), S, d_q, EXACT)
            d_k = dot_add((vt.to(tl.float32) * end[:, None]).to(kt.dtype), D, d_k, EXACT)
            carried += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
        shared += dP * decays(G, slot, see, C) * scale
        at = slot * 3 * C + i
        tl.store(edges + at, y * scale)
        tl.store(edges + at + C, z)
        tl.store(edges + at + 2 * C, tl.sum(carried, 0) + tl.zeros((C,), tl.float32))
    d_q = dot_add(shared.to(kt.dtype), kt, d_q, EXACT)
    d_k = dot_add(tl.trans(shared.to(kt.dtype)), qt, d_k, EXACT)
    tile += part.to(tl.int64) * part_stride
    tl.store(dq + tile, d_q.to(dq.dtype.element_ty), mask=alive)
    tl.store(dk + tile, d_k.to(dk.dtype.element_ty), mask=alive)


@triton.jit
def decay_head(
    q, k, v, d_out, G, edges, d_decay, starts, slots,
    T, c_lo, n_chunks, scale, HK, HV, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Write the gradient to one chunk's decays of one head."""
    here = tl.program_id(0) // HV
    h = tl.program_id(0) % HV
    slot = here.to(tl.int64) * HV + h
    s, c = chunk_of(here, slots, c_lo, n_chunks, VARLEN)
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    rows = i < tokens
    alive = rows[:, None] & (d < K)[None, :]
    tile = (token * HK + h // (HV // HK)) * K + ((i * (HK * K))[:, None] + d[None, :])
    qt = operand(tl.load(q + tile, mask=alive, other=0.0), EXACT)
    kt = operand(tl.load(k + tile, mask=alive, other=0.0), EXACT)
    dP = tl.zeros((C, C), tl.float32)
    for iv in tl.static_range(NV):
        e = iv * BV + tl.arange(0, BV)
        some = rows[:, None] & (e < V)[None, :]
        at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
        vt = operand(tl.load(v + at, mask=some, other=0.0), EXACT)
        do = operand(tl.load(d_out + at, mask=some, other=0.0), EXACT)
        dP = dot_add(do, tl.trans(vt), dP, EXACT)
    X = (dot(qt, tl.trans(kt), EXACT) * (dP * scale)).to(kt.dtype)
    back = tl.maximum(i - 1, 0)
    hi = tl.where(i > 0, factor(G, slot, HIGH, back, C), 0.0)
    lo = tl.where(i > 0, factor(G, slot, LOW, back, C), 0.0)
    sign = tl.where(i > 0, factor(G, slot, SIGN, back, C), 1.0)
    start = tl.where(i > 0, factor(G, slot, START, back, C), 1.0)
    before = i[:, None] > i[None, :]
    L = signed_power(
        hi[:, None], lo[:, None], sign[:, None],
        factor(G, slot, HIGH, i, C)[None, :], factor(G, slot, LOW, i, C)[None, :], factor(G, slot, SIGN, i, C)[None, :],
        before,
    )  # fmt: skip
    edge = edges + slot * 3 * C + i
    later = tl.sum(L * tl.load(edge + C)[None, :], 1) + start * tl.load(edge + 2 * C)
    M = dot(X, tl.trans(L.to(kt.dtype)), EXACT) + tl.load(edge)[:, None] * start[None, :]
    d_a = tl.sum(M * decays(G, slot, i[:, None] >= i[None, :], C), 0) + factor(G, slot, END, i, C) * later
    tl.store(d_decay + (token + i) * HV + h, d_a, mask=rows)
