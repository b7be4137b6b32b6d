"""RetNet: retention, a fixed decay per head and a fixed rotation of the keys.

    S <- a_h R(theta) S + k_t v_t^T;   o_t = S^T q_t / sqrt(K);   output W_o (norm(o_t) * silu(W_g x_t))
    a_h = lo + (hi - lo) s_h,   s_h = 1 - 2^-(f + h) for head h = 0, 1, ..;   R rotates pairs of channels by theta

(lo, hi) = (0, 1) and f = 5 is RetNet as published: Sun et al. (arXiv 2307.08621), eq. 5 to 8. Its transition does not
see the token, so no range makes it follow more than a count of positions: parity stays out of reach in any.

The keys of a call are rotated by their position in it, and the state, at its end, back to where the next call begins:
rotations are relative, so no position is carried and the state keeps its size.

Letters: B batch, T tokens, D channels, H heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.common import (
    MemoryState,
    RMSNorm,
    check_eigenvalues,
    check_positive,
    head_width,
    precise,
    projection,
    rotate,
    zero_memory,
)
from statetrack.layers.packing import Packing, offsets
from statetrack.ops import gated_linear_attention


@dataclass(frozen=True, kw_only=True)
class RetNetConfig:
    """Settings of a `RetNet` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of a head's keys; default dim / heads"""
    expand: int = 2
    """width of a head's values over that of its keys"""
    first_exponent: float = 5.0
    """f: the first head's s is 1 - 2^-f, each further head forgets half as fast"""
    rotary_base: float = 10_000.0
    """longest rotary wavelength, in tokens over 2 pi"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the decays"""
    norm_eps: float = 1e-6
    backend: str = "auto"

    def build(self) -> RetNet:
        """Return the mixer."""
        return RetNet(self)


class RetNet(nn.Module):
    """Mix tokens by retention."""

    def __init__(self, config: RetNetConfig):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        check_positive(expand=config.expand)
        if not config.first_exponent >= 0:
            raise UsageError(f"first_exponent must be at least 0, got {config.first_exponent}")
        self.config = config
        H, self.head_dim = config.heads, head_width(config.dim, config.heads, config.head_dim)
        if self.head_dim % 2:
            raise UsageError(f"rotary positions need an even head width, got {self.head_dim}")
        self.value_dim = config.expand * self.head_dim
        self.q_proj = projection(config.dim, H * self.head_dim)
        self.k_proj = projection(config.dim, H * self.head_dim)
        self.v_proj = projection(config.dim, H * self.value_dim)
        self.output_gate = projection(config.dim, H * self.value_dim)
        self.norm = RMSNorm(self.value_dim, eps=config.norm_eps)
        self.o_proj = projection(H * self.value_dim, config.dim)

    def init_state(self, batch: int) -> MemoryState:
        """Return the state before the first token: zeros."""
        return MemoryState(zero_memory(self.q_proj.weight, batch, self.config.heads, self.head_dim, self.value_dim))

    def op_inputs(self, x: Float[Tensor, "B T D"], packing: Packing | None = None) -> dict[str, Any]:
        """Return the arguments that `gated_linear_attention` gets for x as whole sequences."""
        (lo, hi), H = self.config.eigenvalues, self.config.heads
        s = 1 - torch.exp2(-self.config.first_exponent - torch.arange(H, dtype=torch.float64, device=x.device))
        position = 1 + (torch.arange(x.shape[1], device=x.device) if packing is None else packing.position)
        q, k = (proj(x).unflatten(-1, (H, self.head_dim)) for proj in (self.q_proj, self.k_proj))
        decay = (lo + (hi - lo) * s).to(precise(x).dtype)
        return {
            "q": rotate(q, position, self.config.rotary_base),
            "k": rotate(k, position, self.config.rotary_base),
            "v": self.v_proj(x).unflatten(-1, (H, self.value_dim)),
            "decay": decay.expand(*x.shape[:2], H),
        }

    def forward(
        self, x: Float[Tensor, "B T D"], state: MemoryState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], MemoryState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        o, memory = gated_linear_attention(
            **self.op_inputs(x, packing),
            initial_state=None if state is None else state.memory,
            cu_seqlens=offsets(packing),
            backend=self.config.backend,
        )
        tokens = torch.full((1,), x.shape[1], device=x.device) if packing is None else packing.lengths
        memory = rotate(memory.transpose(2, 3).flatten(1, 2)[None], -tokens, self.config.rotary_base)
        memory = memory.view(-1, self.config.heads, self.value_dim, self.head_dim).transpose(2, 3)
        return self.o_proj(self.norm(o).flatten(2) * F.silu(self.output_gate(x))), MemoryState(memory)
