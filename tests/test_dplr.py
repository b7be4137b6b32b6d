"""Diagonal plus low rank: integer swaps and merges are exact at any length, resets are resets, bad input is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.ops import delta_rule, dplr

from .cases import CPU, delta_inputs, dplr_inputs

every_backend = pytest.mark.parametrize("backend", ("reference", *CPU))


def moves(tokens: int, states: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs (from, to) [T], and whether each swaps the two or merges the first into the second."""
    g = torch.Generator().manual_seed(seed)
    i = torch.randint(0, states, (tokens,), generator=g)
    j = (i + torch.randint(1, states, (tokens,), generator=g)) % states
    share = {"swaps": 1.0, "merges": 0.0, "both": 0.7}[kind]
    return i, j, torch.rand(tokens, generator=g) < share


@every_backend
@pytest.mark.parametrize("kind", ["swaps", "merges", "both"])
@pytest.mark.parametrize("states", [2, 5, 40])
def test_swaps_and_merges_of_a_one_hot_state_are_bit_exact(kind: str, states: int, backend: str):
    """I - (e_q - e_r) e_q^T and I - (e_q - e_r)(e_q - e_r)^T in float32, 10,000 tokens, read at every one."""
    i, j, swap = moves(10_000, states, kind)
    here, where = 0, []
    for q, r, both in zip(i.tolist(), j.tolist(), swap.tolist(), strict=True):
        here = r if here == q else q if both and here == r else here
        where.append(here)
    e_q, e_r = F.one_hot(i, states).float(), F.one_hot(j, states).float()
    a = torch.where(swap[:, None], e_q - e_r, e_q)[None, :, None]
    b = (e_r - e_q)[None, :, None]
    zeros = torch.zeros_like(a)
    label = torch.arange(states).float().expand_as(a)  # what the read-out gives is the number of the state
    start = torch.zeros(1, 1, states, 1)
    start[0, 0, 0] = 1
    o, state = dplr(label, zeros, zeros[..., :1], a, b, scale=1.0, initial_state=start, backend=backend)
    assert torch.equal(o[0, :, 0, 0], torch.tensor(where).float())
    assert torch.equal(state[0, 0, :, 0], F.one_hot(torch.tensor(here), states).float())


@every_backend
def test_the_map_of_all_states_is_bit_exact(backend: str):
    """All start states at once: the state is the 0/1 matrix of the map so far, integers read as they are."""
    i, j, swap = moves(10_000, 6, "swaps")
    swap[::2000] = False  # a few merges
    e_q, e_r = F.one_hot(i, 6).float(), F.one_hot(j, 6).float()
    a = torch.where(swap[:, None], e_q - e_r, e_q)
    want = torch.eye(6, dtype=torch.int64)
    for x, y in zip(a.long(), (e_r - e_q).long(), strict=True):
        want = want + torch.outer(y, x @ want)
    shaped = [x[None, :, None] for x in (torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a), a, e_r - e_q)]
    _, state = dplr(*shaped, initial_state=torch.eye(6)[None, None], backend=backend)
    assert torch.equal(state[0, 0], want.float())


def test_with_symmetric_corrections_it_is_the_delta_rule(generator):
    x = delta_inputs(decay="key")(generator, 2, 70)
    want, want_state = delta_rule(**x)
    key = F.normalize(x["k"][:, :, 0], dim=-1)
    beta, decay = x["beta"][:, :, 0, :, None], x["log_decay"].exp()
    got, state = dplr(
        x["q"], key, beta * x["v"][:, :, 0], decay * key, -beta * key, x["log_decay"], initial_state=x["initial_state"]
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-10)


@every_backend
def test_a_reset_of_every_channel_forgets_to_the_last_bit(backend: str, generator):
    x = dplr_inputs()(generator, 1, 60)
    x["log_decay"][:, 33], x["b"][:, 33] = -torch.inf, 0
    other = {**x, "v": x["v"].clone()}
    other["v"][:, :33] = 1e30
    leaf = x["log_decay"].requires_grad_()
    o, state = dplr(**{**x, "log_decay": leaf}, backend=backend)
    changed, _ = dplr(**other, backend=backend)
    assert torch.equal(o[:, 33:], changed[:, 33:])
    (grad,) = torch.autograd.grad(o[:, 33:].sum() + state.sum(), leaf)
    assert not grad[:, 33].any() and grad.isfinite().all() and grad[:, 34:].any()


BAD = {
    "k has shape": {"k": torch.zeros(2, 3, 1, 5)},
    "v has shape": {"v": torch.zeros(2, 4, 2, 4)},
    "a has shape": {"a": torch.zeros(2, 3, 2, 4)},
    "b has shape": {"b": torch.zeros(2, 3, 1, 5)},
    "log_decay has shape": {"log_decay": torch.zeros(2, 3, 2)},
    "must be a multiple": {"v": torch.zeros(2, 3, 3, 4)},
    "must share one dtype": {"k": torch.zeros(2, 3, 2, 5, dtype=torch.float64)},
    "'fast' is unknown": {"backend": "fast"},
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_error(message: str, generator):
    x = {n: t.float() for n, t in dplr_inputs()(generator, 2, 3).items()}
    with pytest.raises(UsageError, match=message):
        dplr(**{**x, **BAD[message]})
