"""What several mixers share: the check of the eigenvalue range, the short convolution, and initialisation.

Letters: B batch, T tokens, D channels, W window of the convolution.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError


def check_positive(**values: int) -> None:
    """Reject sizes below 1."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_eigenvalues(eigenvalues: tuple[float, float]) -> None:
    """Reject a range that is empty or leaves [-1, 1], where products of transitions could diverge."""
    if len(eigenvalues) != 2 or not -1 <= eigenvalues[0] < eigenvalues[1] <= 1:
        raise UsageError(f"eigenvalues must be (lo, hi) with -1 <= lo < hi <= 1, got {tuple(eigenvalues)}")


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


def no_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that a trainer must not decay although it is a matrix (norms and biases are not, anyway)."""
    parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def time_step_bias(count: int, shortest: float = 1e-3, longest: float = 0.1) -> Tensor:
    """Return biases whose softplus is log-uniform in [shortest, longest], as in Mamba (arXiv 2312.00752, 3.6)."""
    dt = torch.exp(torch.rand(count) * (math.log(longest) - math.log(shortest)) + math.log(shortest))
    return dt + torch.log(-torch.expm1(-dt))


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over the last W tokens, then SiLU.

    y_t = silu(sum_i weight_i * x_{t-W+1+i} + bias), with the last W - 1 inputs as state.
    """

    def __init__(self, channels: int, size: int, bias: bool = False):
        super().__init__()
        self.size = size
        self.weight = no_weight_decay(nn.Parameter(torch.empty(size, channels).uniform_(-1, 1) / math.sqrt(size)))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def init_state(self, batch: int) -> Float[Tensor, "B W_minus_1 D"]:
        """Return the state before the first token: zeros."""
        return self.weight.new_zeros(batch, self.size - 1, self.weight.shape[1])

    def forward(
        self, x: Float[Tensor, "B T D"], state: Float[Tensor, "B W_minus_1 D"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B W_minus_1 D"]]:
        """Convolve x after the inputs in `state`; return the outputs and the new state."""
        tokens = x.shape[1]
        window = torch.cat([state.to(x.dtype), x], dim=1)
        y = window[:, self.size - 1 :] * self.weight[-1]
        for i in range(self.size - 1):
            y = torch.addcmul(y, window[:, i : i + tokens], self.weight[i])
        if self.bias is not None:
            y = y + self.bias
        return F.silu(y), window[:, tokens:]
