"""Causal softmax attention with rotary positions: the baseline whose state grows with the sequence.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s,   q and k rotated by their position

References: Vaswani et al. (arXiv 1706.03762); Su et al., RoFormer (2104.09864).

Letters: B batch, T tokens, P tokens in the cache, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.common import head_width, projection, rotate


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Settings of an `Attention` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of a head; default dim / heads"""
    rotary_base: float = 10_000.0
    """longest rotary wavelength, in tokens over 2 pi"""

    def build(self) -> Attention:
        """Return the mixer."""
        return Attention(self)


class AttentionState(NamedTuple):
    """Keys (rotated) and values of the tokens seen so far."""

    k: Float[Tensor, "B H P K"]
    v: Float[Tensor, "B H P K"]


class Attention(nn.Module):
    """Mix tokens by causal softmax attention."""

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        self.head_dim = head_width(config.dim, config.heads, config.head_dim)
        if self.head_dim % 2:
            raise UsageError(f"rotary positions need an even head width, got {self.head_dim}")
        inner = config.heads * self.head_dim
        self.q_proj = projection(config.dim, inner)
        self.k_proj = projection(config.dim, inner)
        self.v_proj = projection(config.dim, inner)
        self.o_proj = projection(inner, config.dim)

    def init_state(self, batch: int) -> AttentionState:
        """Return the state before the first token: an empty cache."""
        empty = self.q_proj.weight.new_zeros(batch, self.config.heads, 0, self.head_dim)
        return AttentionState(empty, empty)

    def op_inputs(self, x: Float[Tensor, "B T D"], past: int = 0) -> dict[str, Tensor]:
        """Return the queries, keys and values [B H T K] of x, rotated as the tokens after `past` earlier ones."""
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.config.heads, self.head_dim)) for y in projected)
        position = torch.arange(past, past + x.shape[1], device=x.device)
        q, k = (rotate(y, position, self.config.rotary_base) for y in (q, k))
        return {name: y.transpose(1, 2) for name, y in (("q", q), ("k", k), ("v", v))}

    def forward(
        self, x: Float[Tensor, "B T D"], state: AttentionState | None = None
    ) -> tuple[Float[Tensor, "B T D"], AttentionState]:
        """Mix x after the cached tokens; return the outputs and the longer cache."""
        state = self.init_state(x.shape[0]) if state is None else state
        past, tokens = state.k.shape[2], x.shape[1]
        inputs = self.op_inputs(x, past)
        k = torch.cat([state.k.to(inputs["k"].dtype), inputs["k"]], dim=2)
        v = torch.cat([state.v.to(inputs["v"].dtype), inputs["v"]], dim=2)
        mask = None
        if past and tokens > 1:
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        o = F.scaled_dot_product_attention(inputs["q"], k, v, attn_mask=mask, is_causal=past == 0)
        return self.o_proj(o.transpose(1, 2).flatten(2)), AttentionState(k, v)
