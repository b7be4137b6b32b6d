"""DeltaProduct: DeltaNet with N generalised Householder factors per token, optionally gated.

    S <- alpha_t S;   S <- (I - beta_tj kh_tj kh_tj^T) S + beta_tj kh_tj v_tj^T, j = 1..N;   o_t = S^T q_t / sqrt(K)
    beta_tj = (1 - hi) + (hi - lo) sigmoid(w_j^T x_t),  so that the factor's eigenvalue 1 - beta lies in (lo, hi)
    q, k, v = silu(conv(W x)),  q and k of length 1;   alpha_t = exp(-exp(a) softplus(W x_t + b)) where gated

factors = 1 is DeltaNet, with gate=True Gated DeltaNet, with gate="key" Kimi Delta Attention; factors > 1 DeltaProduct,
with gate Gated DeltaProduct. References: Yang et al. (arXiv 2406.06484), Grazzi et al. eq. 2 and Table 2 (2411.12537),
Siems et al. section 4 (2502.10297), Yang et al. (2412.06464) and Kimi Team (2510.26692) for the gates.

Letters: B batch, T tokens, N factors, H heads, Hk heads of keys, K and V head widths, W window, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.common import (
    ForgetGate,
    RMSNorm,
    ShortConvolution,
    check_eigenvalues,
    check_positive,
    eigenvalue_range,
    head_width,
    learned_low,
    precise,
    projection,
    zero_memory,
)
from statetrack.layers.packing import Packing, offsets
from statetrack.ops import delta_rule


@dataclass(frozen=True, kw_only=True)
class DeltaProductConfig:
    """Settings of a `DeltaProduct` mixer."""

    dim: int
    """width of the hidden stream"""
    heads: int = 4
    head_dim: int | None = None
    """width of a head's queries and keys; default dim / heads"""
    value_dim: int | None = None
    """width of a head's values; default that of its keys"""
    key_heads: int | None = None
    """heads of queries and keys, each shared by heads / key_heads heads of values; default heads"""
    factors: int = 1
    """Householder factors per token"""
    gate: bool | Literal["key"] = False
    """forget gate: True for one per head (Gated DeltaNet), "key" for one per key channel (Kimi Delta Attention)"""
    conv_size: int = 4
    """window of the short convolution on q, k, v; 0 for none"""
    output_gate: bool = False
    """multiply the normalised output by silu(W x)"""
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """range of the data-dependent eigenvalue of a factor"""
    learned_low: bool = False
    """learn the range's lower end per head: it starts at 0 and cannot pass eigenvalues[0]"""
    beta_std: float | None = None
    """standard deviation of beta's logits at the start; default DeltaNet's, near 0.2 and so every eigenvalue near the
    middle of its range, where a small model may wait long before it begins to track; 2 spreads them over the range"""
    norm_eps: float = 1e-6
    backend: str = "auto"
    precision: str = "tracking"
    """of the Triton kernels: "fast" lets them round what they multiply to bfloat16, as other libraries do"""

    def build(self) -> DeltaProduct:
        """Return the mixer."""
        return DeltaProduct(self)


class DeltaProductState(NamedTuple):
    """What a `DeltaProduct` carries from token to token."""

    conv: Float[Tensor, "B W_minus_1 D"] | None
    memory: Float[Tensor, "B H K V"]


class DeltaProduct(nn.Module):
    """Mix tokens by products of generalised Householder matrices."""

    def __init__(self, config: DeltaProductConfig):
        super().__init__()
        check_eigenvalues(config.eigenvalues)
        check_positive(factors=config.factors)
        if config.conv_size < 0:
            raise UsageError(f"conv_size must be 0 (none) or a window of at least 1, got {config.conv_size}")
        self.config = config
        self.head_dim = head_width(config.dim, config.heads, config.head_dim)
        self.value_dim = self.head_dim if config.value_dim is None else config.value_dim
        self.key_heads = config.heads if config.key_heads is None else config.key_heads
        check_positive(value_dim=self.value_dim, key_heads=self.key_heads)
        if config.heads % self.key_heads:
            raise UsageError(f"heads={config.heads} does not divide by key_heads={self.key_heads}")
        keys, inner = self.key_heads * self.head_dim, config.heads * self.value_dim
        self.sizes = [keys, config.factors * keys, config.factors * inner]  # q, k, v
        self.q_proj, self.k_proj, self.v_proj = (projection(config.dim, size) for size in self.sizes)
        self.beta_proj = projection(config.dim, config.factors * config.heads)
        self.low = learned_low(config.learned_low, config.heads)
        if config.beta_std is not None:
            if not 0 < config.beta_std < math.inf:
                raise UsageError(f"beta_std must be positive and finite, got {config.beta_std}")
            nn.init.normal_(self.beta_proj.weight, std=config.beta_std * config.dim**-0.5)
        self.conv = ShortConvolution(sum(self.sizes), config.conv_size) if config.conv_size else None
        if config.gate not in (False, True, "key"):
            raise UsageError(f'gate must be False, True (per head) or "key" (per key channel), got {config.gate!r}')
        width = self.head_dim if config.gate == "key" else None
        self.gate = ForgetGate(config.dim, config.heads, width) if config.gate else None
        self.output_gate = projection(config.dim, inner) if config.output_gate else None
        self.norm = RMSNorm(self.value_dim, eps=config.norm_eps)
        self.o_proj = projection(inner, config.dim)

    def init_state(self, batch: int) -> DeltaProductState:
        """Return the state before the first token: zeros."""
        conv = None if self.conv is None else self.conv.init_state(batch)
        memory = zero_memory(self.q_proj.weight, batch, self.config.heads, self.head_dim, self.value_dim)
        return DeltaProductState(conv, memory)

    def op_inputs(self, x: Float[Tensor, "B T D"]) -> dict[str, Any]:
        """Return the arguments that `delta_rule` gets for x as a whole sequence."""
        return self._op_inputs(x, None, None)[0]

    def forward(
        self, x: Float[Tensor, "B T D"], state: DeltaProductState | None = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], DeltaProductState]:
        """Mix x after what `state` has seen; return the outputs and the new state."""
        conv, memory = (None, None) if state is None else state
        inputs, conv = self._op_inputs(x, conv, packing)
        inputs |= {"backend": self.config.backend, "precision": self.config.precision}
        o, memory = delta_rule(**inputs, initial_state=memory, cu_seqlens=offsets(packing))
        o = self.norm(o).flatten(2)
        if self.output_gate is not None:
            o = o * F.silu(self.output_gate(x))
        return self.o_proj(o), DeltaProductState(conv, memory)

    def _op_inputs(
        self, x: Tensor, conv: Tensor | None, packing: Packing | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        N, H, Hk, K = self.config.factors, self.config.heads, self.key_heads, self.head_dim
        lo, hi = eigenvalue_range(self.config.eigenvalues, self.low)
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv, conv = (F.silu(qkv), None) if self.conv is None else self.conv(qkv, conv, packing)
        q, k, v = qkv.split(self.sizes, dim=-1)
        beta = precise(self.beta_proj(x))
        inputs = {
            "q": F.normalize(q.unflatten(-1, (Hk, K)), dim=-1).to(k.dtype),  # autocast normalises in float32
            "k": k.unflatten(-1, (N, Hk, K)),
            "v": v.unflatten(-1, (N, H, self.value_dim)),
            "beta": (1 - hi) + (hi - lo) * beta.sigmoid().unflatten(-1, (N, H)),
        }
        if self.gate is not None:
            inputs["log_decay"] = self.gate(x)
        return inputs, conv
