"""What several mixers share: checks, initialisation, the state, gates, the short convolution, the shift by one token.

Letters: B batch, T tokens, H heads, K key width, V value width, D channels, W window of the convolution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.packing import Packing


def check_positive(**values: int) -> None:
    """Reject sizes below 1."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_eigenvalues(eigenvalues: tuple[float, float]) -> None:
    """Reject a range that is empty or leaves [-1, 1], where products of transitions could diverge."""
    if len(eigenvalues) != 2 or not -1 <= eigenvalues[0] < eigenvalues[1] <= 1:
        raise UsageError(f"eigenvalues must be (lo, hi) with -1 <= lo < hi <= 1, got {tuple(eigenvalues)}")


def learned_low(learned: bool, heads: int) -> nn.Parameter | None:
    """Return the parameter of a learned lower end, one number per head, or None where the end is fixed."""
    return nn.Parameter(torch.zeros(heads)) if learned else None


def eigenvalue_range(
    eigenvalues: tuple[float, float], low: Float[Tensor, "*H"] | None
) -> tuple[float | Float[Tensor, "*H"], float]:
    """Return (lo, hi); a learned lower end is lo tanh(low) per head: 0 at the start, and never beyond lo."""
    lo, hi = eigenvalues
    return (lo if low is None else lo * precise(low).tanh()), hi


def head_width(dim: int, heads: int, head_dim: int | None) -> int:
    """Return the width of a head: head_dim, or dim divided by heads."""
    check_positive(dim=dim, heads=heads)
    if head_dim is None and dim % heads:
        raise UsageError(f"dim={dim} does not divide by heads={heads}; choose a divisor or give head_dim")
    if head_dim is not None:
        check_positive(head_dim=head_dim)
    return dim // heads if head_dim is None else head_dim


def projection(dim_in: int, dim_out: int) -> nn.Linear:
    """Return a linear map without bias, Xavier-uniform with gain 2^-2.5 as in DeltaNet (arXiv 2406.06484)."""
    linear = nn.Linear(dim_in, dim_out, bias=False)
    nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
    return linear


def spread_logits(std: float | None, *weights: Tensor) -> None:
    """Draw the maps of a gate, applied one after the other, so that on inputs of unit size its logits have this spread.

    A published initialisation often leaves every gate near one value, hence every eigenvalue near one place of its
    range, where a small model may wait long before it begins to track. None leaves the weights as they are.
    """
    if std is None:
        return
    if not 0 < std < math.inf:
        raise UsageError(f"gate_std must be positive and finite, got {std}")
    for weight in weights:
        nn.init.normal_(weight, std=(std if weight is weights[-1] else 1) * weight.shape[1] ** -0.5)


def decayed_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that a trainer decays: matrices, but for those in `undecayed` of their module.

    The class says it, not the tensor: parameters are replaced when a file is read, weights are spread over processes
    or a model is copied.
    """
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim >= 2 and name not in getattr(module, "undecayed", ())
    ]


def time_step_bias(count: int, shortest: float = 1e-3, longest: float = 0.1) -> Tensor:
    """Return biases whose softplus is log-uniform in [shortest, longest], as in Mamba (arXiv 2312.00752, 3.6)."""
    dt = torch.exp(torch.rand(count) * (math.log(longest) - math.log(shortest)) + math.log(shortest))
    return dt + torch.log(-torch.expm1(-dt))


class MemoryState(NamedTuple):
    """What a mixer carries from token to token when that is a matrix per head and nothing else."""

    memory: Float[Tensor, "B H K V"]


def zero_memory(weight: Tensor, *shape: int) -> Tensor:
    """Return zeros in the dtype in which the ops keep their state: float64 for float64 weights, else float32."""
    return weight.new_zeros(*shape, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)


def precise(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is: gates of a state that is kept for long are not rounded to less."""
    return x if x.dtype == torch.float64 else x.float()


def rotate(x: Float[Tensor, "B T H K"], position: Tensor, base: float) -> Float[Tensor, "B T H K"]:
    """Rotate pairs of channels (i, i + K/2) by position [T] or [B T] * base^(-2i/K) (RoFormer, arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (position.double()[..., None] * rate).unsqueeze(-2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class LowRank(nn.Module):
    """W_up f(W_down x) + bias, with f = tanh or none: a projection with few parameters."""

    def __init__(self, dim_in: int, rank: int, dim_out: int, *, tanh: bool = False, bias: bool = True):
        super().__init__()
        check_positive(rank=rank)
        self.tanh = tanh
        self.down = nn.Linear(dim_in, rank, bias=False)
        self.up = nn.Linear(rank, dim_out, bias=bias)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D_out"]:
        """Project x."""
        x = self.down(x)
        return self.up(x.tanh() if self.tanh else x)


class ForgetGate(nn.Module):
    """log_decay_t = -exp(a) softplus(W x_t + b): one decay per head, or `width` per head with W of that rank.

    As in Gated DeltaNet (arXiv 2412.06464) and Kimi Delta Attention (2510.26692), both after Mamba-2 (2405.21060).
    """

    def __init__(self, dim: int, heads: int, width: int | None = None):
        super().__init__()
        self.heads, self.width = heads, width
        channels = heads * (width or 1)
        self.proj = projection(dim, heads) if width is None else LowRank(dim, width, channels, bias=False)
        self.rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log_())
        self.bias = nn.Parameter(time_step_bias(channels))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"] | Float[Tensor, "B T H K"]:
        """Return the logarithms of the decays."""
        step = F.softplus(precise(self.proj(x)) + self.bias)
        if self.width is None:
            return -self.rate.exp() * step
        return -self.rate.exp()[:, None] * step.unflatten(-1, (self.heads, self.width))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight in the type of x, in one kernel: under autocast torch's takes several."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over the last W tokens, then SiLU.

    y_t = silu(sum_i weight_i * x_{t-W+1+i} + bias), with the last W - 1 inputs as state. The sum is in the wider of the
    types of x and the weights, y in that of x: under autocast a recurrence then gets 16-bit inputs.
    """

    undecayed = ("weight",)

    def __init__(self, channels: int, size: int, bias: bool = False):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-1, 1) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def init_state(self, batch: int) -> Float[Tensor, "B W_minus_1 D"]:
        """Return the state before the first token: zeros."""
        return self.weight.new_zeros(batch, self.size - 1, self.weight.shape[1])

    def forward(
        self, x: Float[Tensor, "B T D"], state: Float[Tensor, "S W_minus_1 D"] | None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "S W_minus_1 D"]]:
        """Convolve x after the inputs in `state` (None: zeros); return the outputs and the new state."""
        tokens, before = x.shape[1], self.size - 1
        if packing is None:
            window = F.pad(x, (0, 0, before, 0)) if state is None else torch.cat([state.to(x.dtype), x], dim=1)
            inputs, tail = [window[:, i : i + tokens] for i in range(before)], window[:, tokens:]
        else:
            inputs = [packing.shift(x, state, by=before - i) for i in range(before)]
            tail = packing.tail(x, state, before)
        y = x * self.weight[-1]
        for i in range(before):
            y = torch.addcmul(y, inputs[i], self.weight[i])
        if self.bias is not None:
            y = y + self.bias
        return F.silu(y.to(x.dtype)), tail
