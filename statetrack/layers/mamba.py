"""Mamba: a selective diagonal recurrence, with the eigenvalues of its transition in any range within [-1, 1].

    h_t = (lo + (hi - lo) exp(dt_t A)) h_{t-1} + dt_t B_t u_t;   y_t = C_t h_t + D u_t;   output W_o (y_t * silu(z_t))
    u = silu(conv(W_u x)), z = W_z x, dt = softplus(W_dt W_r u + b), B = W_B u, C = W_C u, A = -exp(a)

(lo, hi) = (0, 1) is Mamba as published (Gu and Dao, arXiv 2312.00752); (-1, 1) is 2 exp(dt A) - 1 (Grazzi et al.,
Table 2, 2411.12537).

One initial scale differs from the published code: W_r, W_B and W_C start so that their outputs have about unit size.
With torch's default they start five times smaller, dt hardly depends on the token, and parity often stays on its
plateau (docs/LOG.md).

Letters: B batch, T tokens, D inner channels, M states per channel, W window of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.common import (
    ShortConvolution,
    check_eigenvalues,
    check_positive,
    time_step_bias,
    zero_memory,
)
from statetrack.layers.packing import Packing, offsets
from statetrack.ops import selective_scan


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Settings of a `Mamba` mixer."""

    dim: int
    """width of the hidden stream"""
    state_size: int = 16
    """states per channel"""
    expand: int = 2
    """inner channels per hidden channel"""
    rank: int | None = None
    """rank of the time step's projection; default dim / 16, rounded up"""
    conv_size: int = 4
    """window of the short convolution; 0 for none"""
    dt_range: tuple[float, float] = (1e-3, 0.1)
    """time steps at initialisation, log-uniform between these"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the transition's eigenvalues"""
    backend: str = "auto"

    def build(self) -> Mamba:
        """Return the mixer."""
        return Mamba(self)


class MambaState(NamedTuple):
    """What a `Mamba` carries from token to token."""

    conv: Float[Tensor, "B W_minus_1 D"] | None
    memory: Float[Tensor, "B D M"]


class Mamba(nn.Module):
    """Mix tokens by a selective diagonal recurrence."""

    undecayed = ("A_log",)

    def __init__(self, config: MambaConfig):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        check_positive(dim=config.dim, state_size=config.state_size, expand=config.expand)
        if config.conv_size < 0:
            raise UsageError(f"conv_size must be 0 (none) or a window of at least 1, got {config.conv_size}")
        if len(config.dt_range) != 2 or not 0 < config.dt_range[0] <= config.dt_range[1]:
            raise UsageError(f"dt_range must be (lo, hi) with 0 < lo <= hi, got {tuple(config.dt_range)}")
        self.config = config
        inner, M = config.expand * config.dim, config.state_size
        self.rank = math.ceil(config.dim / 16) if config.rank is None else config.rank
        check_positive(rank=self.rank)
        self.in_proj = nn.Linear(config.dim, 2 * inner, bias=False)
        self.conv = ShortConvolution(inner, config.conv_size, bias=True) if config.conv_size else None
        self.x_proj = nn.Linear(inner, self.rank + 2 * M, bias=False)
        nn.init.normal_(self.x_proj.weight, std=3 * inner**-0.5)  # silu leaves a third: dt's input, B, C near unit size
        self.dt_proj = nn.Linear(self.rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(time_step_bias(inner, *config.dt_range))
        self.A_log = nn.Parameter(torch.arange(1.0, M + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def init_state(self, batch: int) -> MambaState:
        """Return the state before the first token: zeros."""
        conv = None if self.conv is None else self.conv.init_state(batch)
        return MambaState(conv, zero_memory(self.A_log, batch, *self.A_log.shape))

    def op_inputs(self, x: Float[Tensor, "B T _"]) -> dict[str, Any]:
        """Return the tensors that `selective_scan` gets for x as a whole sequence."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        return self._op_inputs(u, None, None)[0] | {"z": z}

    def forward(
        self, x: Float[Tensor, "B T _"], state: MambaState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T _"], MambaState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        conv, memory = (None, None) if state is None else state
        u, z = self.in_proj(x).chunk(2, dim=-1)
        inputs, conv = self._op_inputs(u, conv, packing)
        y, memory = selective_scan(
            **inputs,
            z=z,
            eigenvalues=self.config.eigenvalues,
            initial_state=memory,
            cu_seqlens=offsets(packing),
            backend=self.config.backend,
        )
        return self.out_proj(y), MambaState(conv, memory)

    def _op_inputs(
        self, u: Tensor, conv: Tensor | None, packing: Packing | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        u, conv = (F.silu(u), None) if self.conv is None else self.conv(u, conv, packing)
        M = self.config.state_size
        rank, B, C = self.x_proj(u).split([self.rank, M, M], dim=-1)
        dt = F.softplus(self.dt_proj(rank))
        return {"u": u, "dt": dt, "A": -self.A_log.exp(), "B": B, "C": C, "D": self.D}, conv
