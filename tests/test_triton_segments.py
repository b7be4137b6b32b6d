"""The states before the segments of a long sequence, against the recurrence in float64."""

from __future__ import annotations

import pytest
import torch

from statetrack.ops.triton_segments import compose_factors, compose_matrices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, COUNT, H = 2, 3, 2


def one_by_one(step, c, first, back):
    """Return every segment's initial state under S <- step(segment, S) + c."""
    states = [None] * c.shape[0]
    for b in range(B):
        state = torch.zeros_like(c[0]).double() if first is None else first[b].double()
        for n in reversed(range(COUNT)) if back else range(COUNT):
            states[b * COUNT + n] = state
            state = step(b * COUNT + n, state) + c[b * COUNT + n].double()
    return torch.stack(states)


def agree(got, want) -> bool:
    return bool(((got - want).abs() <= 1e-6 * want.abs().clamp_min(1)).all())


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("K, V", [(16, 16), (24, 40), (128, 64)])
def test_matrices(K, V, given, back):
    A = (torch.eye(K) + torch.randn(B * COUNT, H, K, K) / K).to(DEVICE)
    c = torch.randn(B * COUNT, H, K, V).to(DEVICE)
    first = torch.randn(B, H, K, V).to(DEVICE) if given else None
    want = one_by_one(lambda n, S: (A[n].mT if back else A[n]).double() @ S, c, first, back)
    assert agree(compose_matrices(A, c, first, COUNT, back), want)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", [(H,), (H, 24), (H, 24, 40)], ids=["per head", "per key channel", "per number"])
def test_factors(shape, given, back):
    totals = torch.randn(B * COUNT, *shape, dtype=torch.float64).to(DEVICE)
    c = torch.randn(B * COUNT, H, 24, 40).to(DEVICE)
    first = torch.randn(B, H, 24, 40).to(DEVICE) if given else None
    wide = totals.view(*totals.shape, *[1] * (4 - totals.ndim))
    want = one_by_one(lambda n, S: wide[n] * S, c, first, back)
    assert agree(compose_factors(totals, c, first, torch.empty_like(c), COUNT, back), want)
