"""RWKV-7 (Goose): a decay per key channel and a rank-one correction along a learned key.

    S <- (diag(w_t) - (e_t * kh_t) kh_t^T) S + k_t v_t^T;   o_t = S^T r_t + (r_t . (u * k_t)) v_t
    e_t = (1 - hi) + (hi - lo w_t) s_t,   s_t = sigmoid(A_2 A_1 x_t + b)
    w_t = exp(-e^-0.5 sigmoid(W_2 tanh(W_1 x_t) + c)),   kh_t = normalised(xi * W_k x_t)
    k_t = W_k x_t * (1 + (s_t - 1) * alpha);   output W_o (layernorm(o_t) * g_t)

where every projection reads its own fixed mix x_t + (x_{t-1} - x_t) * m of neighbouring tokens, and g_t = G_2
sigmoid(G_1 x_t). (lo, hi) = (0, 1) is RWKV-7 as published, e = s: Peng et al. (arXiv 2503.14456), section 4.1, without
the value residual between layers. Where w is one number the eigenvalue along kh is w - e: from w down to w - 1 as
published, from w down to exactly -1 with lo = -1. The plain choice e = 2 s would lead to w - 2, below -1, where the
state explodes. Where w differs by channel the norm of products can exceed 1 in any range (Siems et al., 2502.10297,
Theorem 8).

Letters: B batch, T tokens, D channels, H heads, K = V head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers.common import (
    LowRank,
    check_eigenvalues,
    eigenvalue_range,
    head_width,
    learned_low,
    precise,
    projection,
    spread_logits,
    zero_memory,
)
from statetrack.layers.packing import Packing, count_sequences, last_input, offsets, shifted
from statetrack.layers.rwkv6 import RWKV6State as RWKV7State
from statetrack.ops import dplr


@dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """Settings of an `RWKV7` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of keys and values; default dim / heads"""
    gate_rank: int = 32
    """rank of the projections of the decay, the rate s and the output gate"""
    gate_std: float | None = None
    """standard deviation of the rate's logits at the start; default near 0.3"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the correction's eigenvalue"""
    learned_low: bool = False
    """learn the range's lower end per head: it starts at 0 and cannot pass eigenvalues[0]"""
    norm_eps: float = 1e-6
    backend: str = "auto"

    def build(self) -> RWKV7:
        """Return the mixer."""
        return RWKV7(self)


class RWKV7(nn.Module):
    """Mix tokens by RWKV-7's time mixing."""

    undecayed = ("mix", "bonus")

    def __init__(self, config: RWKV7Config):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        self.config = config
        self.head_dim = head_width(config.dim, config.heads, config.head_dim)
        inner, rank = config.heads * self.head_dim, config.gate_rank
        self.mix = nn.Parameter(torch.linspace(0, 1, config.dim).repeat(6, 1))
        self.r_proj, self.k_proj, self.v_proj = (projection(config.dim, inner) for _ in range(3))
        self.low = learned_low(config.learned_low, config.heads)
        self.decay_proj = LowRank(config.dim, rank, inner, tanh=True)
        self.rate_proj = LowRank(config.dim, rank, inner)
        spread_logits(config.gate_std, self.rate_proj.down.weight, self.rate_proj.up.weight)
        with torch.no_grad():
            self.decay_proj.up.bias.copy_(torch.linspace(-6, 0, self.head_dim).repeat(config.heads))
        self.gate_down, self.gate_up = projection(config.dim, rank), nn.Linear(rank, inner, bias=False)
        self.key_scale = nn.Parameter(torch.full((inner,), 0.7))
        self.key_rate = nn.Parameter(torch.ones(inner))
        self.bonus = nn.Parameter(torch.full((config.heads, self.head_dim), -0.04))
        self.norm = nn.LayerNorm(self.head_dim, eps=config.norm_eps)
        self.o_proj = projection(inner, config.dim)

    def init_state(self, batch: int) -> RWKV7State:
        """Return the state before the first token: zeros."""
        weight, H, K = self.r_proj.weight, self.config.heads, self.head_dim
        return RWKV7State(weight.new_zeros(batch, self.config.dim), zero_memory(weight, batch, H, K, K))

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Any]:
        """Return the arguments that `dplr` gets for x as a whole sequence."""
        return self._op_inputs(x, None, None)[0]

    def forward(
        self, x: Float[Tensor, "B T D"], state: RWKV7State | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], RWKV7State]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        if x.shape[1] == 0:
            return x, self.init_state(count_sequences(x, packing)) if state is None else state
        last, memory = (None, None) if state is None else state
        inputs, gate = self._op_inputs(x, last, packing)
        o, memory = dplr(
            **inputs, scale=1.0, initial_state=memory, cu_seqlens=offsets(packing), backend=self.config.backend
        )
        present = (inputs["q"] * self.bonus * inputs["k"]).sum(-1, keepdim=True) * inputs["v"]
        return self.o_proj((self.norm(o) + present).flatten(2) * gate), RWKV7State(last_input(x, last, packing), memory)

    def _op_inputs(self, x: Tensor, last: Tensor | None, packing: Packing | None) -> tuple[dict[str, Any], Tensor]:
        low = None if self.low is None else self.low.repeat_interleave(self.head_dim)
        (lo, hi), heads = eigenvalue_range(self.config.eigenvalues, low), (self.config.heads, self.head_dim)
        r, w, k, v, a, g = (x + (shifted(x, last, packing) - x) * self.mix[:, None, None]).unbind(0)
        log_decay = -math.exp(-0.5) * precise(self.decay_proj(w)).sigmoid()
        s = precise(self.rate_proj(a)).sigmoid()
        k = self.k_proj(k)
        key = F.normalize(precise(k * self.key_scale).unflatten(-1, heads), dim=-1)
        correction = (1 - hi) + (hi - lo * log_decay.exp()) * s
        inputs = {
            "q": self.r_proj(r).unflatten(-1, heads),
            "k": (k * (1 + (s - 1) * self.key_rate)).to(k.dtype).unflatten(-1, heads),
            "v": self.v_proj(v).unflatten(-1, heads),
            "a": key,
            "b": -correction.unflatten(-1, heads) * key,
            "log_decay": log_decay.unflatten(-1, heads),
        }
        return inputs, self.gate_up(self.gate_down(g).sigmoid())
