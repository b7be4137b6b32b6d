"""sLSTM: the non-linear recurrence of xLSTM, token by token, with exponential input gates and memory mixing in a head.

    c <- f_t c + i_t tanh(z_t);   n <- f_t n + i_t;   h_t = sigmoid(o_t) * c / n
    z, i, f, o = W x_t + R h_{t-1} + b,   i_t = exp(i),   f_t = sigmoid(f),   R block-diagonal in heads

A baseline: its state need not be linear to be followed, so it has no range of eigenvalues. c and n are kept divided by
e^m, m the largest exponent so far. References: Beck et al., xLSTM (arXiv 2405.04517), eq. 8 to 18.

Letters: B batch, T tokens, D channels, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers.common import head_width, precise, projection, zero_memory
from statetrack.layers.packing import Packing, count_sequences, one_by_one


@dataclass(frozen=True, kw_only=True)
class SLSTMConfig:
    """Settings of an `SLSTM` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of a head; default dim / heads"""
    norm_eps: float = 1e-6

    def build(self) -> SLSTM:
        """Return the mixer."""
        return SLSTM(self)


class SLSTMState(NamedTuple):
    """Output, cell, normaliser and the logarithm of their common scale after the last token."""

    h: Float[Tensor, "B H K"]
    c: Float[Tensor, "B H K"]
    n: Float[Tensor, "B H K"]
    m: Float[Tensor, "B H K"]


class SLSTM(nn.Module):
    """Mix tokens by an sLSTM."""

    undecayed = ("recurrent",)

    def __init__(self, config: SLSTMConfig):
        super().__init__()
        self.config = config
        H, self.head_dim = config.heads, head_width(config.dim, config.heads, config.head_dim)
        self.in_proj = nn.Linear(config.dim, 4 * H * self.head_dim)  # z, i, f, o
        std = self.head_dim**-0.5
        self.recurrent = nn.Parameter(std * torch.randn(H, self.head_dim, 4 * self.head_dim))
        with torch.no_grad():
            self.in_proj.bias.view(4, -1)[2] = torch.linspace(3, 6, H * self.head_dim)
        self.norm = nn.LayerNorm(self.head_dim, eps=config.norm_eps, bias=False)
        self.o_proj = projection(H * self.head_dim, config.dim)

    def init_state(self, batch: int) -> SLSTMState:
        """Return the state before the first token: nothing seen, so the scale is e^-inf."""
        zeros = zero_memory(self.recurrent, batch, self.config.heads, self.head_dim)
        return SLSTMState(zeros, zeros, zeros, torch.full_like(zeros, -torch.inf))

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
        """Return what x adds to the gates, [B T 4 H K]."""
        return {"gates": precise(self.in_proj(x)).unflatten(-1, (4, self.config.heads, self.head_dim))}

    def forward(
        self, x: Float[Tensor, "B T D"], state: SLSTMState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], SLSTMState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        state = self.init_state(count_sequences(x, packing)) if state is None else state
        if packing is not None:
            return one_by_one(self, x, state, packing)
        h, c, n, m = state
        if x.shape[1] == 0:
            return x, SLSTMState(h, c, n, m)
        gates, recurrent, out = self.op_inputs(x)["gates"], precise(self.recurrent), []
        for t in range(x.shape[1]):
            mixed = torch.einsum("bhk,hkj->bhj", h, recurrent).unflatten(-1, (4, -1)).transpose(1, 2)
            z, i, f, o = (gates[:, t] + mixed).unbind(1)
            keep = F.logsigmoid(f) + m
            m = torch.maximum(keep, i)
            keep, write = torch.exp(keep - m), torch.exp(i - m)
            c, n = keep * c + write * z.tanh(), keep * n + write
            h = o.sigmoid() * c / n
            out.append(h)
        y = self.norm(torch.stack(out, dim=1).to(x.dtype)).flatten(2)
        return self.o_proj(y), SLSTMState(h, c, n, m)
