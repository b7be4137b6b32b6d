"""Decays of 0, of 1e-30 and of either sign in one chunk: exact, and with the gradient of the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops import gated_linear_attention
from statetrack.ops.products import HeadProducts, KeyProducts, between

from .cases import CPU, EDGES, attention_inputs

both_decays = pytest.mark.parametrize("decay", ["head", "key"])


def by_definition(x: dict[str, Tensor], d_o: Tensor, d_final: Tensor) -> Tensor:
    """Return <dS_t, S_{t-1}> per head and key channel, by a loop forward and one backward."""
    a = x["decay"] if x["decay"].ndim == 4 else x["decay"].unsqueeze(-1)
    states = [x["initial_state"]]
    for t in range(a.shape[1]):
        states.append(a[:, t, ..., None] * states[-1] + x["k"][:, t, ..., None] * x["v"][:, t, :, None])
    dS, grads = d_final, []
    for t in reversed(range(a.shape[1])):
        dS = dS + x["k"].shape[-1] ** -0.5 * x["q"][:, t, ..., None] * d_o[:, t, :, None]
        grads.append((dS * states[t]).sum(-1))
        dS = a[:, t, ..., None] * dS
    return torch.stack(grads[::-1], dim=1)


@both_decays
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["reference", *CPU])
def test_gradient_to_a_decay_is_that_of_the_definition(decay: str, dtype, backend: str, generator):
    x = attention_inputs(decay=decay, hard=True)(generator, 2, 150)
    d_o, d_final = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    want = by_definition(x, d_o, d_final)
    want = want if decay == "key" else want.sum(-1)
    leaf = x["decay"].to(dtype).requires_grad_()
    rest = {n: t.to(dtype) for n, t in x.items() if n != "decay"}
    got = torch.autograd.grad(
        gated_linear_attention(**rest, decay=leaf, backend=backend), leaf, (d_o.to(dtype), d_final.to(dtype))
    )[0]
    for edge in EDGES:  # each alone, so that none hides behind the others
        here = x["decay"] == edge
        assert here.sum() > 50 and want[here].abs().min() > 0
        torch.testing.assert_close(got[here].double(), want[here], rtol=0, atol=8e-6 if dtype.itemsize == 4 else 1e-12)


@both_decays
@pytest.mark.parametrize("backend", ["reference", *CPU])
def test_a_decay_of_zero_is_a_reset_to_the_last_bit(decay: str, backend: str, generator):
    x = attention_inputs(decay=decay)(generator, 1, 130)
    x["decay"][:, 77] = 0
    other = {**x, "v": x["v"].clone()}
    other["v"][:, :77] = 1e30
    o, state = gated_linear_attention(**x, backend=backend)
    changed, changed_state = gated_linear_attention(**other, backend=backend)
    assert torch.equal(o[:, 77:], changed[:, 77:]) and torch.equal(state, changed_state)


@both_decays
@pytest.mark.parametrize("backend", ["reference", *CPU])
def test_parity_of_a_million_signs_is_exact(decay: str, backend: str):
    """Decays of 1 and -1 count parity without rounding, at any length and in float32."""
    tokens = 10_000 if backend == "reference" else 1_000_000
    sign = 1 - 2.0 * torch.randint(0, 2, (1, tokens, 1), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(1, tokens, 1, 2)
    a = sign if decay == "head" else sign[..., None].expand(-1, -1, -1, 2)
    start = torch.tensor([[[[3.0], [0.1]]]])
    read = zeros.clone()
    read[..., 0] = 1
    o, _ = gated_linear_attention(read, zeros, zeros[..., :1], a, scale=1.0, initial_state=start, backend=backend)
    assert torch.equal(o[0, :, 0, 0], 3 * sign[0, :, 0].cumprod(0))


def test_products_of_decays_are_those_of_a_loop(generator):
    decay = attention_inputs(decay="key", hard=True)(generator, 2, 16)["decay"].transpose(1, 2)  # [R H C K]
    L = between(decay)
    for i in range(17):
        for j in range(17):
            want = decay[:, :, j:i].prod(2) if j <= i else torch.zeros_like(decay[:, :, 0])
            torch.testing.assert_close(L[:, :, i, j], want, rtol=1e-14, atol=0)
    for products, E in ((KeyProducts(decay), 5), (HeadProducts(decay[..., :1]), 1)):
        torch.testing.assert_close(products.start, L[:, :, 1:, 0, :E], rtol=1e-14, atol=0)
        torch.testing.assert_close(products.end, L[:, :, -1, 1:, :E], rtol=1e-14, atol=0)
        torch.testing.assert_close(products.total.squeeze(-1), L[:, :, -1, 0, :E], rtol=1e-14, atol=0)


BAD = {
    "k has shape": {"k": torch.zeros(2, 3, 1, 5)},
    "v has shape": {"v": torch.zeros(2, 4, 2, 4)},
    "decay has shape": {"decay": torch.zeros(2, 3, 1)},
    "must be a multiple": {"v": torch.zeros(2, 3, 3, 4), "decay": torch.zeros(2, 3, 3)},
    "initial_state has shape": {"initial_state": torch.zeros(2, 2, 4, 5)},
    "must share one dtype": {"k": torch.zeros(2, 3, 2, 5, dtype=torch.float64)},
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_error(message: str, generator):
    x = {n: t.float() for n, t in attention_inputs()(generator, 2, 3).items()}
    with pytest.raises(UsageError, match=message):
        gated_linear_attention(**{**x, **BAD[message]})
