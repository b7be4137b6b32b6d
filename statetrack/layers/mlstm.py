"""mLSTM: a matrix memory with an exponential input gate, read through a normaliser.

    S <- a_t S + i_t k_t v_t^T;   n <- |a_t| n + i_t k_t;   h_t = S^T q_t / max(|n . q_t|, 1),   q scaled by 1 / sqrt(K)
    a_t = lo + (hi - lo) sigmoid(c(w_f^T x_t + b_f)),   i_t = exp(c(w_i^T x_t + b_i)),   c(x) = 15 tanh(x / 15)
    output W_o (layernorm(h_t) * sigmoid(W_g x_t))

(lo, hi) = (0, 1) is mLSTM as published: Beck et al. (arXiv 2405.04517), eq. 19 to 27, in the form of xLSTM 7B
(2503.14427) with soft-capped gates and without convolution. The cap makes i at most e^15, so the running maximum that
the paper subtracts is not needed in float32; the ratio is the same.

Why |a|: Grazzi et al. (2411.12537) left mLSTM at [0, 1] because with a signed gate the normaliser, a sum of the weights
of what is remembered, could vanish while the memory does not. With |a| it sums their magnitudes: with w_j = i_j q.k_j
of one sign |h| is at most the largest |v|, whatever the signs of the gates, and where a >= 0 nothing changes.

Letters: B batch, T tokens, D channels, H heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from statetrack.errors import UsageError
from statetrack.layers.common import (
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
class MLSTMConfig:
    """Settings of an `MLSTM` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of a head's values; default dim / heads"""
    key_dim: int | None = None
    """width of a head's keys; default half of its values'"""
    gate_cap: float = 15.0
    """bound of the gates' logits"""
    gate_std: float | None = None
    """standard deviation of the forget gate's logits at the start; default torch's, near 0.6"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the forget gate, the transition's eigenvalue"""
    learned_low: bool = False
    """learn the range's lower end per head: it starts at 0 and cannot pass eigenvalues[0]"""
    norm_eps: float = 1e-6
    backend: str = "auto"

    def build(self) -> MLSTM:
        """Return the mixer."""
        return MLSTM(self)


class MLSTMState(NamedTuple):
    """What an `MLSTM` carries from token to token."""

    memory: Float[Tensor, "B H K V"]
    normaliser: Float[Tensor, "B H K 1"]


class MLSTM(nn.Module):
    """Mix tokens by an mLSTM."""

    def __init__(self, config: MLSTMConfig):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        if not 0 < config.gate_cap <= 40:
            raise UsageError(f"gate_cap must be in (0, 40], so that e^cap is a float32, got {config.gate_cap}")
        self.config = config
        H, self.head_dim = config.heads, head_width(config.dim, config.heads, config.head_dim)
        self.key_dim = max(1, self.head_dim // 2) if config.key_dim is None else config.key_dim
        check_positive(key_dim=self.key_dim)
        self.q_proj = projection(config.dim, H * self.key_dim)
        self.k_proj = projection(config.dim, H * self.key_dim)
        self.v_proj = projection(config.dim, H * self.head_dim)
        self.gates = nn.Linear(config.dim, 2 * H)  # input, forget
        spread_logits(config.gate_std, self.gates.weight[H:])
        with torch.no_grad():
            self.gates.bias[:H] = 0
            self.gates.bias[H:] = torch.linspace(3, 6, H)
        self.low = learned_low(config.learned_low, H)
        self.output_gate = projection(config.dim, H * self.head_dim)
        self.norm = nn.LayerNorm(self.head_dim, eps=config.norm_eps, bias=False)
        self.o_proj = projection(H * self.head_dim, config.dim)

    def init_state(self, batch: int) -> MLSTMState:
        """Return the state before the first token: zeros."""
        memory = zero_memory(self.q_proj.weight, batch, self.config.heads, self.key_dim, self.head_dim)
        return MLSTMState(memory, memory.new_zeros(*memory.shape[:3], 1))

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Any]:
        """Return the arguments that `gated_linear_attention` gets for x."""
        (lo, hi), cap = eigenvalue_range(self.config.eigenvalues, self.low), self.config.gate_cap
        H = self.config.heads
        write, keep = (cap * torch.tanh(precise(self.gates(x)) / cap)).chunk(2, dim=-1)
        k = self.k_proj(x).unflatten(-1, (H, self.key_dim))
        return {
            "q": self.q_proj(x).unflatten(-1, (H, self.key_dim)),
            "k": (k * write.exp()[..., None]).to(k.dtype),
            "v": self.v_proj(x).unflatten(-1, (H, self.head_dim)),
            "decay": lo + (hi - lo) * keep.sigmoid(),
        }

    def forward(
        self, x: Float[Tensor, "B T D"], state: MLSTMState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], MLSTMState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        h, state = self.cell(self.op_inputs(x), state, packing)
        return self.o_proj(self.norm(h).flatten(2) * self.output_gate(x).sigmoid()), state

    def cell(
        self, inputs: dict[str, Any], state: MLSTMState | None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T H V"], MLSTMState]:
        """Return the normalised reads h and the new state."""
        memory, normaliser = (None, None) if state is None else state
        how = {"cu_seqlens": offsets(packing), "backend": self.config.backend}
        h, memory = gated_linear_attention(**inputs, initial_state=memory, **how)
        weights = {**inputs, "v": torch.ones_like(inputs["v"][..., :1]), "decay": inputs["decay"].abs()}
        n, normaliser = gated_linear_attention(**weights, initial_state=normaliser, **how)
        return h / n.abs().clamp(min=1), MLSTMState(memory, normaliser)
