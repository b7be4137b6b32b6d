"""The tracking contract: after many reflections the state is still the state (design: docs/numerics.md).

Keys from 8 random directions, eigenvalue -1 everywhere (beta = 2), no decay, one write at t = 0.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.ops import delta_rule

from .cases import CPU

BOUNDS = {
    (4096, torch.bfloat16): 1e-3,
    (65_536, torch.bfloat16): 4e-3,
    (4096, torch.float32): 3e-4,
    (65_536, torch.float32): 2e-3,
}


def reflections(tokens: int, dtype: torch.dtype, heads: int = 2, width: int = 64) -> dict[str, Any]:
    """Draw the contract's arguments; keys are what `dtype` holds, normalised before they are rounded to it."""
    g = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(8, heads, width, generator=g), dim=-1).to(dtype)
    k = directions[torch.randint(0, 8, (1, tokens, 1), generator=g)]
    v = torch.zeros(1, tokens, 1, heads, width, dtype=dtype)
    v[:, 0] = torch.randn(1, 1, heads, width, generator=g).to(dtype)
    q = F.normalize(torch.randn(1, tokens, heads, width, generator=g), dim=-1).to(dtype)
    return {"q": q, "k": k, "v": v, "beta": torch.full((1, tokens, 1, heads), 2.0)}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("tokens, dtype", BOUNDS, ids=str)
def test_state_after_many_reflections(tokens: int, dtype: torch.dtype, backend: str):
    x = reflections(tokens, dtype)
    exact = {n: t.double() for n, t in x.items()}
    _, want = delta_rule(**exact, backend=backend)
    if tokens == 4096:
        _, by_definition = delta_rule(**exact, backend="reference")
        assert relative(want, by_definition) < 1e-10
    _, got = delta_rule(**x, backend=backend)
    assert relative(got, want) <= BOUNDS[tokens, dtype]
    norms = got.norm(dim=(-2, -1)) / want.norm(dim=(-2, -1))
    assert ((norms - 1).abs() <= BOUNDS[tokens, dtype]).all(), "a reflection keeps the state's norm"


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integer_keys_permute_the_state_bit_exactly(dtype: torch.dtype, backend: str):
    """Keys e_i - e_j with beta = 2 swap coordinates: an integer state is right to the last bit after 65,536 swaps."""
    tokens, n = 65_536, 5
    g = torch.Generator().manual_seed(0)
    i = torch.randint(0, n, (tokens,), generator=g)
    j = (i + torch.randint(1, n, (tokens,), generator=g)) % n
    k = F.one_hot(i, n) - F.one_hot(j, n)
    where = list(range(n))
    for a, b in zip(i.tolist(), j.tolist(), strict=True):
        where[a], where[b] = where[b], where[a]
    zeros = torch.zeros(1, tokens, 1, 1, n, dtype=dtype)
    start = torch.randint(-9, 10, (1, 1, n, 3), generator=g).float()
    _, state = delta_rule(
        zeros[:, :, 0], k.to(dtype).view(1, tokens, 1, 1, n), zeros[..., :3], torch.full((1, tokens, 1, 1), 2.0),
        initial_state=start, backend=backend,
    )  # fmt: skip
    assert torch.equal(state[0, 0], start[0, 0, where])


@pytest.mark.parametrize("backend", CPU)
def test_norm_of_the_state_never_grows_within_the_range(backend: str):
    """Products of factors with eigenvalues in [-1, 1] are contractions (Grazzi et al., Proposition 1.1)."""
    g = torch.Generator().manual_seed(0)
    beta = 2 * torch.rand(1, 4096, 2, 1, generator=g)
    k = torch.randn(1, 4096, 2, 1, 8, generator=g)
    zeros = torch.zeros(1, 4096, 2, 1, 8)
    state = torch.randn(1, 1, 8, 8, generator=g)
    _, after = delta_rule(zeros[:, :, 0], k, zeros, beta, initial_state=state, backend=backend)
    assert torch.linalg.matrix_norm(after, 2) <= torch.linalg.matrix_norm(state, 2) * (1 + 1e-5)
