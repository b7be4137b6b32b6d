"""RWKV-6 (Finch): gated linear attention that reads the state before the write, with a bonus for the present token.

    o_t = S^T r_t + (r_t . (u * k_t)) v_t;   S <- diag(a_t) S + k_t v_t^T;   output W_o (layernorm(o_t) * silu(g_t))
    a_t = lo + (hi - lo) s_t,   s_t = exp(-exp(d_t)),   d_t = W_2 tanh(W_1 w_t) + b
    r, k, v, g = W y_t and w = y_t for five mixes y_t = x_t + (x_{t-1} - x_t) * (m + M_2 tanh(M_1 z_t)) of neighbouring
    tokens, z_t = x_t + (x_{t-1} - x_t) * m_0

(lo, hi) = (0, 1) is RWKV-6 as published: Peng et al. (arXiv 2404.05892), section 4.2; the range is that of Grazzi et
al. (2411.12537), eq. 2.

Letters: B batch, T tokens, D channels, H heads, K = V head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers.common import (
    LowRank,
    check_eigenvalues,
    check_positive,
    eigenvalue_range,
    head_width,
    learned_low,
    precise,
    projection,
    spread_logits,
    zero_memory,
)
from statetrack.layers.packing import Packing, count_sequences, last_input, offsets, shifted
from statetrack.ops import gated_linear_attention


@dataclass(frozen=True, kw_only=True)
class RWKV6Config:
    """Settings of an `RWKV6` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of keys and values; default dim / heads"""
    mix_rank: int = 32
    """rank of what decides how much of the token before is mixed in"""
    gate_rank: int = 64
    """rank of the decay's projection"""
    gate_std: float | None = None
    """standard deviation of the decay's logits at the start; default near 0.2"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the transition's eigenvalues"""
    learned_low: bool = False
    """learn the range's lower end per head: it starts at 0 and cannot pass eigenvalues[0]"""
    norm_eps: float = 1e-6
    backend: str = "auto"

    def build(self) -> RWKV6:
        """Return the mixer."""
        return RWKV6(self)


class RWKV6State(NamedTuple):
    """What an `RWKV6` carries from token to token."""

    last: Float[Tensor, "B D"]
    memory: Float[Tensor, "B H K V"]


class RWKV6(nn.Module):
    """Mix tokens by RWKV-6's time mixing."""

    undecayed = ("mix", "bonus")

    def __init__(self, config: RWKV6Config):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        check_positive(mix_rank=config.mix_rank)
        self.config = config
        self.head_dim = head_width(config.dim, config.heads, config.head_dim)
        inner = config.heads * self.head_dim
        self.mix_first = nn.Parameter(torch.full((config.dim,), 0.5))
        self.mix = nn.Parameter(torch.linspace(0, 1, config.dim).repeat(5, 1))
        self.mix_down = nn.Linear(config.dim, 5 * config.mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(5, config.mix_rank, config.dim).uniform_(-0.01, 0.01))
        self.r_proj, self.k_proj, self.v_proj, self.g_proj = (projection(config.dim, inner) for _ in range(4))
        self.low = learned_low(config.learned_low, config.heads)
        self.decay_proj = LowRank(config.dim, config.gate_rank, inner, tanh=True)
        spread_logits(config.gate_std, self.decay_proj.down.weight, self.decay_proj.up.weight)
        with torch.no_grad():
            self.decay_proj.up.bias.copy_(torch.linspace(-6, -1, self.head_dim).repeat(config.heads))
        self.bonus = nn.Parameter(torch.linspace(0, 1, inner).view(config.heads, self.head_dim))
        self.norm = nn.LayerNorm(self.head_dim, eps=config.norm_eps)
        self.o_proj = projection(inner, config.dim)

    def init_state(self, batch: int) -> RWKV6State:
        """Return the state before the first token: zeros."""
        weight, H, K = self.r_proj.weight, self.config.heads, self.head_dim
        return RWKV6State(weight.new_zeros(batch, self.config.dim), zero_memory(weight, batch, H, K, K))

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Any]:
        """Return q = r, k, v and the decay of x as a whole sequence; see `forward` for how r is read."""
        return self._op_inputs(x, None, None)[0]

    def forward(
        self, x: Float[Tensor, "B T D"], state: RWKV6State | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], RWKV6State]:
        """Mix x after what `state` has seen; return the outputs and the new state.

        The op reads after the write, so token t gets the r of token t + 1, and the first r reads `state` itself.
        """
        if x.shape[1] == 0:
            return x, self.init_state(count_sequences(x, packing)) if state is None else state
        last, memory = (None, None) if state is None else state
        inputs, gate = self._op_inputs(x, last, packing)
        r, k, v = inputs["q"], inputs["k"], inputs["v"]
        inputs["q"] = torch.cat([r[:, 1:], torch.zeros_like(r[:, :1])], dim=1)
        start = None if memory is None else self._read_first(r, memory, packing)
        o, memory = gated_linear_attention(
            **inputs, scale=1.0, initial_state=memory, cu_seqlens=offsets(packing), backend=self.config.backend
        )
        o = shifted(o.flatten(2), start, packing).view_as(o) + (r * self.bonus * k).sum(-1, keepdim=True) * v
        return self.o_proj(self.norm(o).flatten(2) * F.silu(gate)), RWKV6State(last_input(x, last, packing), memory)

    def _read_first(self, r: Tensor, memory: Tensor, packing: Packing | None) -> Tensor:
        """Read the state before the call with every sequence's first r; return [S D]."""
        first = r[:, 0] if packing is None else r[0, packing.starts.clamp(max=r.shape[1] - 1)]
        return (first.unsqueeze(2).to(memory.dtype) @ memory).flatten(1)

    def _op_inputs(self, x: Tensor, last: Tensor | None, packing: Packing | None) -> tuple[dict[str, Any], Tensor]:
        lo, hi = eigenvalue_range(self.config.eigenvalues, None if self.low is None else self.low[:, None])
        heads = self.config.heads, self.head_dim
        delta = shifted(x, last, packing) - x
        mixed = self.mix_down(x + delta * self.mix_first).tanh().unflatten(-1, (5, -1))
        mixed = torch.einsum("btnr,nrd->nbtd", mixed, self.mix_up) + self.mix[:, None, None]
        r, k, v, g, w = (x + delta * mixed).unbind(0)
        s = torch.exp(-torch.exp(precise(self.decay_proj(w)))).unflatten(-1, heads)
        inputs = {
            "q": self.r_proj(r).unflatten(-1, heads),
            "k": self.k_proj(k).unflatten(-1, heads),
            "v": self.v_proj(v).unflatten(-1, heads),
            "decay": lo + (hi - lo) * s,
        }
        return inputs, self.g_proj(g)
