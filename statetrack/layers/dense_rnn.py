"""DenseRNN: a full transition matrix per token, the yardstick for what structured ones can do.

    S <- A(x_t) S,   A(x) = reshape(W x) + A_0,   S_0 = I;   output W_o vec(S) / max(1, |S|)

It is the "full matrix" baseline of Grazzi et al. (arXiv 2411.12537), section 5.2 and appendix E.2: M = 32, no input to
the state, the state projected to the unit ball before a linear decoder. On token embeddings W x is the paper's free
matrix per token. Nothing bounds the norm of A, so eigenvalues have no range. The state is kept as its direction and the
logarithm of its norm: the same function, but nothing overflows.

Letters: B batch, T tokens, D channels, M rows and columns of the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from statetrack.layers.common import check_positive, precise, projection, zero_memory
from statetrack.layers.packing import Packing, count_sequences, one_by_one


@dataclass(frozen=True, kw_only=True)
class DenseRNNConfig:
    """Settings of a `DenseRNN` mixer."""

    dim: int
    """width of the hidden stream"""
    state_size: int = 32
    """rows and columns of the state"""

    def build(self) -> DenseRNN:
        """Return the mixer."""
        return DenseRNN(self)


class DenseRNNState(NamedTuple):
    """The state divided by its norm, and the norm's logarithm."""

    direction: Float[Tensor, "B M M"]
    log_norm: Float[Tensor, "B"]


class DenseRNN(nn.Module):
    """Mix tokens by products of unstructured matrices."""

    undecayed = ("offset",)

    def __init__(self, config: DenseRNNConfig):
        super().__init__()
        check_positive(dim=config.dim, state_size=config.state_size)
        self.config, M = config, config.state_size
        self.transition = nn.Linear(config.dim, M * M, bias=False)
        nn.init.normal_(self.transition.weight, std=(config.dim * M) ** -0.5)  # A - A_0: a random matrix of norm near 2
        self.offset = nn.Parameter(torch.eye(M))
        self.o_proj = projection(M * M, config.dim)

    def init_state(self, batch: int) -> DenseRNNState:
        """Return the state before the first token: the identity."""
        M = self.config.state_size
        direction = zero_memory(self.offset, batch, M, M) + torch.eye(M, device=self.offset.device) * M**-0.5
        return DenseRNNState(direction, direction.new_full((batch,), 0.5 * math.log(M)))

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """Return the transitions A [B T M M]."""
        M = self.config.state_size
        return {"A": precise(self.transition(x)).unflatten(-1, (M, M)) + self.offset}

    def forward(
        self, x: Float[Tensor, "B T D"], state: DenseRNNState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], DenseRNNState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        state = self.init_state(count_sequences(x, packing)) if state is None else state
        if packing is not None:
            return one_by_one(self, x, state, packing)
        if x.shape[1] == 0:
            return x, state
        (S, log_norm), out = state, []
        for A in self.op_inputs(x)["A"].unbind(1):
            S = A.to(S.dtype) @ S
            norm = S.square().sum((1, 2)).sqrt().clamp(min=torch.finfo(S.dtype).tiny)
            S, log_norm = S / norm[:, None, None], log_norm + norm.log()
            out.append(S * log_norm.clamp(max=0).exp()[:, None, None])
        return self.o_proj(torch.stack(out, dim=1).flatten(2).to(x.dtype)), DenseRNNState(S, log_norm)
