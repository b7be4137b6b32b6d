"""Gated linear attention with one decay per head: the products of a chunk's decays, and the gradients of its inputs.

`gather_head` has S at the start and dS at the end of every chunk and needs no order. With L as in triton_walk.py,
P = q k^T, dP = scale dO v^T,

    dq = scale start dO S^T + (dP L) k,   dk = end v dS^T + (dP L)^T q,   dv = scale (P L)^T dO + end k dS

q and k may serve many value heads: one program takes several of them, makes q k^T once and sums dP L over them before
it meets k and q. The gradient to a decay is the definition's, <dS_t, S_{t-1}>: with row 0 the chunk's start,
X_ij = dP_ij q_i.k_j, y_i = scale q_i S dO_i, z_j = k_j dS v_j and c = <S, dS>,

    d a_t = sum_{i >= t} L_it (sum_{j < t} X_ij L_{t-1,j} + y_i L_{t-1,0}) + L_Ct (sum_{j < t} L_{t-1,j} z_j + L_{t-1,0} c)

a matrix product and sums, no quotient: right at a decay of 0 as anywhere. Letters as in triton_walk.py; R value heads
per program.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.delta_rule.triton_forward import dot, dot_add, operand, span
from statetrack.ops.gated_linear_attention.triton_walk import (
    END,
    FACTORS,
    HIGH,
    LOW,
    SIGN,
    START,
    factor,
    signed_power,
)

CUT = tl.constexpr(-4096.0)  # stands for log2(0): 2 to it is 0, and float64 sums of it and others stay exact


@triton.jit
def prepare_head(
    decay, G, starts, slots, T, c_lo, n_chunks, HV,
    C: tl.constexpr, BH: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Write one chunk's running log2|decay| (two terms), sign, start and end, for BH heads."""
    slot = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    if VARLEN:
        s = tl.load(slots + 2 * slot)
        c = tl.load(slots + 2 * slot + 1)
    else:
        s = slot // n_chunks
        c = c_lo + slot % n_chunks
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
    q, k, v, d_out, G, states, d_states, dq, dk, dv, d_decay, starts, slots,
    T, c_lo, n_chunks, scale, HK, HV, K, V, R, parts, part_stride,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    VARLEN: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk's inputs, for R of the value heads that share a key head; dq, dk are their sums."""
    here = tl.program_id(0) // (HK * parts)
    hk = tl.program_id(0) // parts % HK
    part = tl.program_id(0) % parts
    if VARLEN:
        s = tl.load(slots + 2 * here)
        c = tl.load(slots + 2 * here + 1)
    else:
        s = here // n_chunks
        c = c_lo + here % n_chunks
    token, tokens = span(s, c, starts, T, C, VARLEN)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    rows = i < tokens
    in_k = d < K
    alive = rows[:, None] & in_k[None, :]
    see = i[:, None] >= i[None, :]
    before = i[:, None] > i[None, :]
    tile = (token * HK + hk) * K + ((i * (HK * K))[:, None] + d[None, :])
    qt = operand(tl.load(q + tile, mask=alive, other=0.0), EXACT)
    kt = operand(tl.load(k + tile, mask=alive, other=0.0), EXACT)
    P = dot(qt, tl.trans(kt), EXACT)
    shared = tl.zeros((C, C), tl.float32)
    d_q = tl.zeros((C, BK), tl.float32)
    d_k = tl.zeros((C, BK), tl.float32)
    for r in tl.range(0, R, num_stages=STAGES):
        h = hk * (HV // HK) + part * R + r
        slot = here.to(tl.int64) * HV + h
        hi = factor(G, slot, HIGH, i, C)
        lo = factor(G, slot, LOW, i, C)
        sign = factor(G, slot, SIGN, i, C)
        start = factor(G, slot, START, i, C)
        end = factor(G, slot, END, i, C)
        L = signed_power(hi[:, None], lo[:, None], sign[:, None], hi[None, :], lo[None, :], sign[None, :], see)
        PL = tl.trans((P * L * scale).to(kt.dtype))
        dP = tl.zeros((C, C), tl.float32)
        read = tl.zeros((C, BK), tl.float32)
        z = tl.zeros((C,), tl.float32)
        carried = tl.zeros((BK,), tl.float32)
        for iv in tl.static_range(NV):
            e = iv * BV + tl.arange(0, BV)
            at = (token * HV + h) * V + ((i * (HV * V))[:, None] + e[None, :])
            block = slot * K * V + (e[:, None] * K + d[None, :])
            if EVEN:
                vt = operand(tl.load(v + at), EXACT)
                do = operand(tl.load(d_out + at), EXACT)
                S = tl.load(states + block)
                D = tl.load(d_states + block)
            else:
                some = rows[:, None] & (e < V)[None, :]
                inside = (e < V)[:, None] & in_k[None, :]
                vt = operand(tl.load(v + at, mask=some, other=0.0), EXACT)
                do = operand(tl.load(d_out + at, mask=some, other=0.0), EXACT)
                S = tl.load(states + block, mask=inside, other=0.0)
                D = tl.load(d_states + block, mask=inside, other=0.0)
            dP = dot_add(do, tl.trans(vt), dP, EXACT)
            W = dot(kt, tl.trans(D), EXACT)
            z += tl.sum(W * vt.to(tl.float32), 1)
            W = dot_add(PL, do, W * end[:, None], EXACT)
            if EVEN:
                tl.store(dv + at, W.to(dv.dtype.element_ty))
            else:
                tl.store(dv + at, W.to(dv.dtype.element_ty), mask=some)
            read = dot_add(do, S, read, EXACT)
            d_k = dot_add((vt.to(tl.float32) * end[:, None]).to(kt.dtype), D, d_k, EXACT)
            carried += tl.sum(S.to(tl.float32) * D.to(tl.float32), 0)
        read *= scale
        dP *= scale
        y = tl.sum(read * qt.to(tl.float32), 1)
        d_q += read * start[:, None]
        shared += dP * L
        back = tl.maximum(i - 1, 0)
        hi_p = tl.where(i > 0, factor(G, slot, HIGH, back, C), 0.0)
        lo_p = tl.where(i > 0, factor(G, slot, LOW, back, C), 0.0)
        sign_p = tl.where(i > 0, factor(G, slot, SIGN, back, C), 1.0)
        start_p = tl.where(i > 0, factor(G, slot, START, back, C), 1.0)
        L_p = signed_power(
            hi_p[:, None], lo_p[:, None], sign_p[:, None], hi[None, :], lo[None, :], sign[None, :], before
        )
        M = dot((dP * P).to(kt.dtype), tl.trans(L_p.to(kt.dtype)), EXACT)
        d_a = tl.sum((M + y[:, None] * start_p[None, :]) * L, 0)
        d_a += end * (tl.sum(L_p * z[None, :], 1) + start_p * tl.sum(carried, 0))
        tl.store(d_decay + (token + i) * HV + h, d_a, mask=rows)
    d_q = dot_add(shared.to(kt.dtype), kt, d_q, EXACT)
    d_k = dot_add(tl.trans(shared.to(kt.dtype)), qt, d_k, EXACT)
    tl.store(dq + part * part_stride + tile, d_q.to(dq.dtype.element_ty), mask=alive)
    tl.store(dk + part * part_stride + tile, d_k.to(dk.dtype.element_ty), mask=alive)
