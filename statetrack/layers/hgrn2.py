"""HGRN2: a gated linear RNN with state expansion, whose input gate is what its forget gate leaves.

    S <- diag(a_t) S + (1 - s_t) v_t^T;   o_t = S^T q_t / sqrt(K);   output W_o rmsnorm(o_t)
    a_t = lo + (hi - lo) s_t,   s_t = b + (1 - b) sigmoid(W_f x_t),   q_t = silu(W_q x_t),   v_t = W_i x_t

(lo, hi) = (0, 1) is HGRN2 as published: Qin et al. (arXiv 2404.07904), section 3.2. What is written stays 1 - s in
every range, as in Grazzi et al. (2411.12537), Table 2, where only the transition changes. The paper learns the lower
bounds b of all layers together; here b is a setting of the layer.

Letters: B batch, T tokens, D channels, H heads, K key width = V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.common import (
    MemoryState,
    RMSNorm,
    check_eigenvalues,
    eigenvalue_range,
    head_width,
    learned_low,
    precise,
    projection,
    zero_memory,
)
from statetrack.layers.packing import Packing, offsets
from statetrack.ops import gated_linear_attention


@dataclass(frozen=True, kw_only=True)
class HGRN2Config:
    """Settings of an `HGRN2` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of keys and values, the paper's expansion; default dim / heads"""
    lower_bound: float = 0.0
    """b, the least that the forget gate s lets through; upper layers are given larger ones"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the transition's eigenvalues, reached with lower_bound 0"""
    learned_low: bool = False
    """learn the range's lower end per head: it starts at 0 and cannot pass eigenvalues[0]"""
    norm_eps: float = 1e-6
    backend: str = "auto"

    def build(self) -> HGRN2:
        """Return the mixer."""
        return HGRN2(self)


class HGRN2(nn.Module):
    """Mix tokens by a gated linear RNN with tied gates."""

    def __init__(self, config: HGRN2Config):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        if not 0 <= config.lower_bound < 1:
            raise UsageError(f"lower_bound must be in [0, 1), got {config.lower_bound}")
        self.config = config
        self.head_dim = head_width(config.dim, config.heads, config.head_dim)
        inner = config.heads * self.head_dim
        self.q_proj = projection(config.dim, inner)
        self.f_proj = projection(config.dim, inner)
        self.v_proj = projection(config.dim, inner)
        self.low = learned_low(config.learned_low, config.heads)
        self.norm = RMSNorm(inner, eps=config.norm_eps)
        self.o_proj = projection(inner, config.dim)

    def init_state(self, batch: int) -> MemoryState:
        """Return the state before the first token: zeros."""
        return MemoryState(zero_memory(self.q_proj.weight, batch, self.config.heads, self.head_dim, self.head_dim))

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Any]:
        """Return the arguments that `gated_linear_attention` gets for x."""
        lo, hi = eigenvalue_range(self.config.eigenvalues, None if self.low is None else self.low[:, None])
        b = self.config.lower_bound
        heads = (self.config.heads, self.head_dim)
        logits, v = precise(self.f_proj(x)).unflatten(-1, heads), self.v_proj(x).unflatten(-1, heads)
        return {
            "q": F.silu(self.q_proj(x)).unflatten(-1, heads),
            "k": ((1 - b) * (-logits).sigmoid()).to(v.dtype),  # 1 - s without cancellation
            "v": v,
            "decay": lo + (hi - lo) * (b + (1 - b) * logits.sigmoid()),
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
        return self.o_proj(self.norm(o.flatten(2))), MemoryState(memory)
