"""Mamba-2: a scalar decay per head, a state of M x P, and queries and keys that heads share.

    S <- a_t S + dt_t B_t u_t^T;   y_t = S^T C_t + D u_t;   output W_o rmsnorm(y_t * silu(z_t))
    u, B, C = silu(conv(W x_t)),   dt_t = softplus(w^T x_t + b),   a_t = lo + (hi - lo) exp(-exp(A) dt_t)

(lo, hi) = (0, 1) is Mamba-2 as published: Dao and Gu (arXiv 2405.21060), section 7; (-1, 1) is the rule of Grazzi et
al. (2411.12537), eq. 2, who left Mamba-2 alone because its kernels multiply decays as logarithms.

Letters: B batch, T tokens, D channels, H heads, M state size (the op's K), P head width (its V), G groups, W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.common import (
    RMSNorm,
    ShortConvolution,
    check_eigenvalues,
    check_positive,
    eigenvalue_range,
    head_width,
    learned_low,
    precise,
    spread_logits,
    time_step_bias,
    zero_memory,
)
from statetrack.layers.packing import Packing, offsets
from statetrack.ops import gated_linear_attention


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Settings of a `Mamba2` mixer."""

    dim: int
    """width of the hidden stream"""
    state_size: int = 128
    """states per inner channel, M"""
    expand: int = 2
    """inner channels per hidden channel"""
    heads: int = 4
    head_dim: int | None = None
    """inner channels per head; default expand * dim / heads"""
    groups: int = 1
    """groups of heads that share B and C; the output is normalised in each of them"""
    conv_size: int = 4
    """window of the short convolution; 0 for none"""
    dt_range: tuple[float, float] = (1e-3, 0.1)
    """time steps at initialisation, log-uniform between these"""
    gate_std: float | None = None
    """standard deviation of dt's logits at the start; default the published initialisation, near 0.6"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the transition's eigenvalues"""
    learned_low: bool = False
    """learn the range's lower end per head: it starts at 0 and cannot pass eigenvalues[0]"""
    norm_eps: float = 1e-6
    backend: str = "auto"

    def build(self) -> Mamba2:
        """Return the mixer."""
        return Mamba2(self)


class Mamba2State(NamedTuple):
    """What a `Mamba2` carries from token to token."""

    conv: Float[Tensor, "B W_minus_1 D"] | None
    memory: Float[Tensor, "B H M P"]


class Mamba2(nn.Module):
    """Mix tokens by a selective scalar decay per head."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        check_positive(dim=config.dim, state_size=config.state_size, expand=config.expand, groups=config.groups)
        if config.conv_size < 0:
            raise UsageError(f"conv_size must be 0 (none) or a window of at least 1, got {config.conv_size}")
        if len(config.dt_range) != 2 or not 0 < config.dt_range[0] <= config.dt_range[1]:
            raise UsageError(f"dt_range must be (lo, hi) with 0 < lo <= hi, got {tuple(config.dt_range)}")
        if config.heads % config.groups:
            raise UsageError(f"heads={config.heads} does not divide by groups={config.groups}")
        self.config, H = config, config.heads
        self.head_dim = head_width(config.expand * config.dim, H, config.head_dim)
        self.inner, shared = H * self.head_dim, config.groups * config.state_size
        self.sizes = [self.inner, shared, shared]  # u, B, C
        self.in_proj = nn.Linear(config.dim, 2 * self.inner + 2 * shared + H, bias=False)
        spread_logits(config.gate_std, self.in_proj.weight[-H:])
        self.conv = ShortConvolution(sum(self.sizes), config.conv_size, bias=True) if config.conv_size else None
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log_())
        self.dt_bias = nn.Parameter(time_step_bias(H, *config.dt_range))
        self.D = nn.Parameter(torch.ones(H))
        self.low = learned_low(config.learned_low, H)
        self.norm = RMSNorm(self.inner, eps=config.norm_eps)
        self.out_proj = nn.Linear(self.inner, config.dim, bias=False)

    def init_state(self, batch: int) -> Mamba2State:
        """Return the state before the first token: zeros."""
        conv = None if self.conv is None else self.conv.init_state(batch)
        memory = zero_memory(self.A_log, batch, self.config.heads, self.config.state_size, self.head_dim)
        return Mamba2State(conv, memory)

    def op_inputs(self, x: Float[Tensor, "B T _"]) -> dict[str, Any]:
        """Return the arguments that `gated_linear_attention` gets for x as a whole sequence."""
        return self._op_inputs(x, None, None)[0]

    def forward(
        self, x: Float[Tensor, "B T _"], state: Mamba2State | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T _"], Mamba2State]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        conv, memory = (None, None) if state is None else state
        inputs, u, z, conv = self._op_inputs(x, conv, packing)
        y, memory = gated_linear_attention(
            **inputs, initial_state=memory, cu_seqlens=offsets(packing), backend=self.config.backend
        )
        y = (y + self.D[:, None] * u).flatten(2)
        return self.out_proj(self._normalised(y * F.silu(z))), Mamba2State(conv, memory)

    def _normalised(self, y: Float[Tensor, "B T I"]) -> Float[Tensor, "B T I"]:
        """Normalise every group's channels by themselves, as the published code does."""
        groups = y.unflatten(-1, (self.config.groups, -1))
        return F.rms_norm(groups, groups.shape[-1:], eps=self.config.norm_eps).flatten(2) * self.norm.weight

    def _op_inputs(
        self, x: Tensor, conv: Tensor | None, packing: Packing | None
    ) -> tuple[dict[str, Any], Tensor, Tensor, Tensor | None]:
        lo, hi = eigenvalue_range(self.config.eigenvalues, self.low)
        z, uBC, dt = self.in_proj(x).split([self.inner, sum(self.sizes), self.config.heads], dim=-1)
        uBC, conv = (F.silu(uBC), None) if self.conv is None else self.conv(uBC, conv, packing)
        u, B, C = uBC.split(self.sizes, dim=-1)
        u = u.unflatten(-1, (self.config.heads, self.head_dim))
        dt = F.softplus(precise(dt) + self.dt_bias)
        inputs = {
            "q": C.unflatten(-1, (self.config.groups, self.config.state_size)),
            "k": B.unflatten(-1, (self.config.groups, self.config.state_size)),
            "v": (u * dt[..., None]).to(u.dtype),
            "decay": lo + (hi - lo) * torch.exp(-dt * self.A_log.exp()),
            "scale": 1.0,
        }
        return inputs, u, z, conv
