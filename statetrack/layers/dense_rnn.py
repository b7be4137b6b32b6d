"""DenseRNN: a full transition matrix per token, the yardstick for what structured ones can do.

    S <- A(x_t) S,   A(x) = reshape(W x) + A_0,   S_0 = I;   output W_o vec(S) / max(1, |S|)

It is the "full matrix" baseline of Grazzi et al. (arXiv 2411.12537), section 5.2 and appendix E.2: M = 32, no input to
the state, the state projected to the unit ball before a linear decoder. On token embeddings W x is the paper's free
matrix per token. Nothing bounds the norm of A, so eigenvalues have no range, and after some length the state fades or
overflows: that is the paper's finding too.

Letters: B batch, T tokens, D channels, M rows and columns of the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from statetrack.layers.common import MemoryState, check_positive, no_weight_decay, precise, projection, zero_memory


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


class DenseRNN(nn.Module):
    """Mix tokens by products of unstructured matrices."""

    def __init__(self, config: DenseRNNConfig):
        super().__init__()
        check_positive(dim=config.dim, state_size=config.state_size)
        self.config, M = config, config.state_size
        self.transition = nn.Linear(config.dim, M * M, bias=False)
        nn.init.normal_(self.transition.weight, std=(config.dim * M) ** -0.5)  # A - A_0: a random matrix of norm near 2
        self.offset = no_weight_decay(nn.Parameter(torch.eye(M)))
        self.o_proj = projection(M * M, config.dim)

    def init_state(self, batch: int) -> MemoryState:
        """Return the state before the first token: the identity."""
        M = self.config.state_size
        eye = torch.eye(M, device=self.offset.device)
        return MemoryState(zero_memory(self.offset, batch, 1, M, M) + eye)

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """Return the transitions A [B T M M]."""
        M = self.config.state_size
        return {"A": precise(self.transition(x)).unflatten(-1, (M, M)) + self.offset}

    def forward(
        self, x: Float[Tensor, "B T D"], state: MemoryState | None = None
    ) -> tuple[Float[Tensor, "B T D"], MemoryState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x, state
        S, out = state.memory[:, 0], []
        for A in self.op_inputs(x)["A"].unbind(1):
            S = A.to(S.dtype) @ S
            out.append(S)
        seen = torch.stack(out, dim=1).flatten(2)
        seen = seen / seen.norm(dim=-1, keepdim=True).clamp(min=1)
        return self.o_proj(seen.to(x.dtype)), MemoryState(S[:, None])
