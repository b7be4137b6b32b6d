"""LSTM: the non-linear recurrence that tracks state but runs token by token (torch's implementation).

References: Hochreiter and Schmidhuber, Long Short-Term Memory (1997).

Letters: B batch, T tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from statetrack.layers.common import check_positive, projection
from statetrack.layers.packing import Packing, count_sequences, one_by_one


@dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """Settings of an `LSTM` mixer."""

    dim: int
    """width of the hidden stream and of the cell"""

    def build(self) -> LSTM:
        """Return the mixer."""
        return LSTM(self)


class LSTMState(NamedTuple):
    """Output and cell after the last token."""

    h: Float[Tensor, "B D"]
    c: Float[Tensor, "B D"]


class LSTM(nn.Module):
    """Mix tokens by an LSTM."""

    def __init__(self, config: LSTMConfig):
        super().__init__()
        check_positive(dim=config.dim)
        self.config = config
        self.cell = nn.LSTM(config.dim, config.dim, batch_first=True)
        self.o_proj = projection(config.dim, config.dim)

    def init_state(self, batch: int) -> LSTMState:
        """Return the state before the first token: zeros."""
        zeros = self.o_proj.weight.new_zeros(batch, self.config.dim)
        return LSTMState(zeros, zeros)

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """Return what the cell gets: x itself."""
        return {"input": x}

    def forward(
        self, x: Float[Tensor, "B T D"], state: LSTMState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], LSTMState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        state = self.init_state(count_sequences(x, packing)) if state is None else state
        if packing is not None:
            return one_by_one(self, x, state, packing)
        if x.shape[1] == 0:
            return x, state
        y, (h, c) = self.cell(x, (state.h.unsqueeze(0).contiguous(), state.c.unsqueeze(0).contiguous()))
        return self.o_proj(y), LSTMState(h.squeeze(0), c.squeeze(0))
