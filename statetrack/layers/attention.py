"""Causal softmax attention with rotary positions: the baseline whose state grows with the sequence.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s,   q and k rotated by their position

References: Vaswani et al. (arXiv 1706.03762); Su et al., RoFormer (2104.09864).

Letters: B batch, T tokens, P tokens in the cache, H heads, Hk of keys and values, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.common import RMSNorm, check_positive, head_width, projection, rotate
from statetrack.layers.packing import Packing, count_sequences
from statetrack.layers.softmax import attend, attend_packed, causal_mask


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Settings of an `Attention` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of a head; default dim / heads"""
    kv_heads: int | None = None
    """heads of keys and values, each shared by heads / kv_heads heads of queries; default heads"""
    rotary_base: float | None = 10_000.0
    """longest rotary wavelength, in tokens over 2 pi; None for no positions"""
    qk_norm: float | None = None
    """epsilon of an RMSNorm over all queries and one over all keys (OLMo 2); default none"""

    def build(self) -> Attention:
        """Return the mixer."""
        return Attention(self)


class AttentionState(NamedTuple):
    """Keys (rotated) and values of the tokens seen so far, those of shorter sequences at the end of P."""

    k: Float[Tensor, "B Hk P K"]
    v: Float[Tensor, "B Hk P K"]
    lengths: Int[Tensor, "B"] | None = None
    """tokens seen by every sequence, where not all have seen P"""


class Attention(nn.Module):
    """Mix tokens by causal softmax attention."""

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        self.head_dim = head_width(config.dim, config.heads, config.head_dim)
        if self.head_dim % 2 and config.rotary_base is not None:
            raise UsageError(f"rotary positions need an even head width, got {self.head_dim}")
        self.kv_heads = config.heads if config.kv_heads is None else config.kv_heads
        check_positive(kv_heads=self.kv_heads)
        if config.heads % self.kv_heads:
            raise UsageError(f"heads={config.heads} does not divide by kv_heads={self.kv_heads}")
        inner, shared = config.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = projection(config.dim, inner)
        self.k_proj = projection(config.dim, shared)
        self.v_proj = projection(config.dim, shared)
        eps = config.qk_norm
        self.q_norm = nn.Identity() if eps is None else RMSNorm(inner, eps=eps)
        self.k_norm = nn.Identity() if eps is None else RMSNorm(shared, eps=eps)
        self.o_proj = projection(inner, config.dim)

    def init_state(self, batch: int) -> AttentionState:
        """Return the state before the first token: an empty cache."""
        empty = self.q_proj.weight.new_zeros(batch, self.kv_heads, 0, self.head_dim)
        return AttentionState(empty, empty)

    def op_inputs(self, x: Float[Tensor, "B T D"], position: Int[Tensor, "*B T"] | None = None) -> dict[str, Tensor]:
        """Return the queries [B H T K], keys and values of x, rotated by position (default 0, 1, ...)."""
        projected = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.config.rotary_base is not None:
            position = torch.arange(x.shape[1], device=x.device) if position is None else position
            q, k = (rotate(y, position, self.config.rotary_base) for y in (q, k))
        return {name: y.transpose(1, 2) for name, y in (("q", q), ("k", k), ("v", v))}

    def forward(
        self, x: Float[Tensor, "B T D"], state: AttentionState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], AttentionState]:
        """Mix x after the cached tokens; return the outputs and the longer cache."""
        state = self.init_state(count_sequences(x, packing)) if state is None else state
        if packing is not None:
            return self._packed(x, state, packing)
        past, tokens = state.k.shape[2], x.shape[1]
        position = torch.arange(past, past + tokens, device=x.device)
        if state.lengths is not None:
            position = position + (state.lengths - past)[:, None]
        inputs = self.op_inputs(x, position)
        k, v = (torch.cat([old.to(x.dtype), inputs[name]], dim=2) for name, old in (("k", state.k), ("v", state.v)))
        if state.lengths is None:
            return self._output(attend(inputs["q"], k, v)), AttentionState(k, v)
        real = torch.arange(past + tokens, device=x.device) >= (past - state.lengths)[:, None, None, None]
        mask = real & causal_mask(inputs["q"], k)
        o = F.scaled_dot_product_attention(inputs["q"], k, v, attn_mask=mask, enable_gqa=True)
        return self._output(o), AttentionState(k, v, state.lengths + tokens)

    def _packed(self, x: Tensor, state: AttentionState, packing: Packing) -> tuple[Tensor, AttentionState]:
        """Attend within every packed sequence and its part of the cache."""
        width, spans = state.k.shape[2], packing.spans()
        past = packing.lengths.new_full((len(spans),), width) if state.lengths is None else state.lengths
        inputs = self.op_inputs(x, packing.position + past[packing.sequence])
        if width == 0:
            return self._output(attend_packed(**inputs, packing=packing)), self._cache(inputs, packing)
        outputs, caches = [], []
        for s, ((start, end), seen) in enumerate(zip(spans, past.tolist(), strict=True)):
            q, k, v = (inputs[name][:, :, start:end] for name in ("q", "k", "v"))
            k = torch.cat([state.k[s : s + 1, :, width - seen :].to(k.dtype), k], dim=2)
            v = torch.cat([state.v[s : s + 1, :, width - seen :].to(v.dtype), v], dim=2)
            outputs.append(attend(q, k, v))
            caches.append((k, v))
        longest = max(k.shape[2] for k, _ in caches)
        padded = [[F.pad(y, (0, 0, longest - y.shape[2], 0)) for y in cache] for cache in caches]
        k, v = (torch.cat(part) for part in zip(*padded, strict=True))
        lengths = past + packing.lengths
        ragged = any(y.shape[2] < longest for y, _ in caches)
        return self._output(torch.cat(outputs, dim=2)), AttentionState(k, v, lengths if ragged else None)

    def _cache(self, inputs: dict[str, Tensor], packing: Packing) -> AttentionState:
        """Return the keys and values of every packed sequence, which nothing precedes."""
        lengths = packing.cu_seqlens.diff()
        longest, ragged = int(lengths.max()), bool((lengths < lengths.max()).any())
        flat = (inputs[name].transpose(1, 2).flatten(2) for name in ("k", "v"))
        k, v = (packing.tail(y, None, longest).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for y in flat)
        return AttentionState(k, v, packing.lengths if ragged else None)

    def _output(self, o: Tensor) -> Tensor:
        return self.o_proj(o.transpose(1, 2).flatten(2))
