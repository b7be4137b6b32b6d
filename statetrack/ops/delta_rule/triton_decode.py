"""The delta rule for a single token: one kernel that reads and writes the state once.

    S <- exp(log_decay) S;   for j = 1..N:  S <- S + w_j k_j (|k_j| v_j - k_j^T S)^T,   w = beta / |k|^2
    o = scale S^T q

Letters: B batch, N factors, H value heads, K key dim, V value dim.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.delta_rule.triton_forward import power


@triton.jit
def step(
    q, k, v, beta, log_decay, state, o, final, scale, HK, HV, K, V,
    N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, PER_KEY: tl.constexpr,
):  # fmt: skip
    """Advance BV columns of one sequence's and head's state by one token; final may be state."""
    iv = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // HV
    h = bh % HV
    hk = h // (HV // HK)
    d = tl.arange(0, BK)
    e = iv * BV + tl.arange(0, BV)
    in_k = d < K
    in_v = e < V
    tile = bh.to(tl.int64) * K * V + d[:, None] * V + e[None, :]
    inside = in_k[:, None] & in_v[None, :]
    S = tl.load(state + tile, mask=inside, other=0.0)
    if PER_KEY:
        S *= tl.exp(tl.load(log_decay + bh * K + d, mask=in_k, other=0.0).to(tl.float32))[:, None]
    elif GATE:
        S *= tl.exp(tl.load(log_decay + bh).to(tl.float32))
    for j in tl.static_range(N):
        kj = tl.load(k + ((b * N + j) * HK + hk) * K + d, mask=in_k, other=0.0).to(tl.float32)
        vj = tl.load(v + ((b * N + j) * HV + h) * V + e, mask=in_v, other=0.0).to(tl.float32)
        kj *= power(tl.max(tl.abs(kj), 0))
        wide = kj.to(tl.float64)
        squared = tl.sum(wide * wide, 0)
        squared = tl.where(squared == 0.0, 1.0, squared)
        both = tl.load(beta + (b * N + j) * HV + h).to(tl.float64) / squared
        w = both.to(tl.float32)
        w_lo = (both - w.to(tl.float64)).to(tl.float32)  # it would add up: the same whenever a key recurs
        left = tl.sqrt(squared.to(tl.float32)) * vj - tl.sum(kj[:, None] * S, 0)
        S += kj[:, None] * (w * left + w_lo * left)[None, :]
    qt = tl.load(q + (b * HK + hk) * K + d, mask=in_k, other=0.0).to(tl.float32)
    out = tl.sum(qt[:, None] * S, 0) * scale
    tl.store(o + bh * V + e, out.to(o.dtype.element_ty), mask=in_v)
    tl.store(final + tile, S, mask=inside)
