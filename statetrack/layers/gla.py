"""GLA: gated linear attention, a decay of its own for every key channel.

    S <- diag(a_t) S + k_t v_t^T;   o_t = S^T q_t / sqrt(K);   output W_o (rmsnorm(o_t) * silu(W_r x_t + b_r))
    a_t = lo + (hi - lo) s_t,   s_t = sigmoid(W_2 W_1 x_t + b)^(1 / tau)

(lo, hi) = (0, 1) is GLA as published: Yang et al. (arXiv 2312.06635), eq. 3 and section 4.4, with tau = 16. Grazzi et
al. (2411.12537), Table 2, leave its signed form open; it is the general rule of their eq. 2.

tau = 16 keeps s near 1 and so every eigenvalue near hi. What is to flip the state needs s near 0: take tau = 1.

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
    LowRank,
    MemoryState,
    RMSNorm,
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
from statetrack.layers.packing import Packing, offsets
from statetrack.ops import gated_linear_attention


@dataclass(frozen=True, kw_only=True)
class GLAConfig:
    """Settings of a `GLA` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of a head's values; default dim / heads"""
    key_dim: int | None = None
    """width of a head's keys; default half of its values'"""
    gate_rank: int = 16
    """rank of the gate's projection"""
    temperature: float = 16.0
    """tau: the gate is the sigmoid's 1/tau-th power; large ones forget slowly and never flip"""
    gate_std: float | None = None
    """standard deviation of the gate's logits at the start; default the published initialisation, near 0.3"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the transition's eigenvalues"""
    learned_low: bool = False
    """learn the range's lower end per head: it starts at 0 and cannot pass eigenvalues[0]"""
    norm_eps: float = 1e-6
    backend: str = "auto"

    def build(self) -> GLA:
        """Return the mixer."""
        return GLA(self)


class GLA(nn.Module):
    """Mix tokens by gated linear attention."""

    def __init__(self, config: GLAConfig):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        if not config.temperature > 0:
            raise UsageError(f"temperature must be positive, got {config.temperature}")
        self.config = config
        H, self.head_dim = config.heads, head_width(config.dim, config.heads, config.head_dim)
        self.key_dim = max(1, self.head_dim // 2) if config.key_dim is None else config.key_dim
        check_positive(key_dim=self.key_dim)
        self.q_proj = projection(config.dim, H * self.key_dim)
        self.k_proj = projection(config.dim, H * self.key_dim)
        self.v_proj = projection(config.dim, H * self.head_dim)
        self.decay_proj = LowRank(config.dim, config.gate_rank, H * self.key_dim)
        spread_logits(config.gate_std, self.decay_proj.down.weight, self.decay_proj.up.weight)
        self.low = learned_low(config.learned_low, H)
        self.output_gate = nn.Linear(config.dim, H * self.head_dim)
        self.norm = RMSNorm(self.head_dim, eps=config.norm_eps)
        self.o_proj = projection(H * self.head_dim, config.dim)

    def init_state(self, batch: int) -> MemoryState:
        """Return the state before the first token: zeros."""
        return MemoryState(zero_memory(self.q_proj.weight, batch, self.config.heads, self.key_dim, self.head_dim))

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Any]:
        """Return the arguments that `gated_linear_attention` gets for x."""
        lo, hi = eigenvalue_range(self.config.eigenvalues, None if self.low is None else self.low[:, None])
        logits = precise(self.decay_proj(x)).unflatten(-1, (self.config.heads, self.key_dim))
        return {
            "q": self.q_proj(x).unflatten(-1, (self.config.heads, self.key_dim)),
            "k": self.k_proj(x).unflatten(-1, (self.config.heads, self.key_dim)),
            "v": self.v_proj(x).unflatten(-1, (self.config.heads, self.head_dim)),
            "decay": lo + (hi - lo) * torch.exp(F.logsigmoid(logits) / self.config.temperature),
        }

    def forward(
        self, x: Float[Tensor, "B T D"], state: MemoryState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], MemoryState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        o, memory = gated_linear_attention(
            **self.op_inputs(x),
            initial_state=None if state is None else state.memory,
            cu_seqlens=offsets(packing),
            backend=self.config.backend,
        )
        return self.o_proj(self.norm(o).flatten(2) * F.silu(self.output_gate(x))), MemoryState(memory)
