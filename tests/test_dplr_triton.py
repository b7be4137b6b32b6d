"""The GPU kernels of diagonal plus low rank against the float64 reference: interpreted without a GPU, else compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from statetrack.errors import UsageError
from statetrack.ops import dplr
from statetrack.ops.dplr import triton as kernels
from statetrack.ops.dplr.triton import dplr_step_

from . import test_delta_rule_triton as delta
from .alone import run_alone
from .cases import DPLR, dplr_inputs

DEVICE, error, gpu_only = delta.DEVICE, delta.error, delta.gpu_only
bf16_products = delta.bf16_products
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
run: Any = partial(dplr, backend="triton")
with_grads = partial(delta.with_grads, f=dplr)
check = partial(delta.check, f=dplr)


def draw(B=1, T=70, heads=(1, 1), K=16, V=16, dtype=F32, hard=False, decay=True, lengths=None) -> dict[str, Any]:
    """Draw arguments with heads = (key heads, value heads); a, b and decays float32; lengths: packed sequences."""
    Hk, H = heads
    g = torch.Generator().manual_seed(0)
    x = dplr_inputs(H, Hk, K, V, decay, hard)(g, B, T)
    x["q"], x["k"] = x["q"] / K**0.5, x["k"] / K**0.5
    x["initial_state"] = torch.randn(len(lengths or [0] * B), H, K, V, generator=g)
    x = {name: t.to(DEVICE, dtype if name in ("q", "k", "v") else F32) for name, t in x.items()}
    if lengths:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(DEVICE)
    return x


SMALL = {
    "float32": {},
    "bfloat16": {"dtype": BF16, "K": 32},
    "float16": {"dtype": F16},
    "no decay": {"decay": False, "T": 100},
    "no decay, bfloat16": {"decay": False, "T": 100, "dtype": BF16},
    "swaps, merges, resets": {"hard": True, "T": 130},
    "swaps, merges, resets, bfloat16": {"hard": True, "T": 130, "dtype": BF16},
    "odd widths": {"K": 24, "V": 20, "heads": (2, 2), "T": 64},
    "wide": {"K": 70, "V": 70, "dtype": BF16},
    "shared heads": {"heads": (2, 4), "B": 2, "T": 20},
    "packed": {"lengths": [70, 0, 1, 66], "T": 137, "heads": (1, 2)},
    "packed, bfloat16": {"lengths": [33, 7], "T": 40, "heads": (1, 2), "dtype": BF16},
    "one token": {"T": 1},
}


@pytest.mark.parametrize("name", SMALL)
def test_small(name):
    check(draw(**SMALL[name]))


def test_no_token():
    x = draw(T=0)
    got = with_grads(x, backend="triton")
    assert got["o"].shape == x["v"].shape and torch.equal(got["state"], x["initial_state"])
    assert got["initial_state"].shape == got["state"].shape and got["initial_state"].isfinite().all()


@gpu_only
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
@pytest.mark.parametrize("K, V", [(16, 16), (32, 64), (64, 64), (64, 128), (100, 70), (128, 64), (128, 128)])
def test_every_width(K, V, dtype):
    check(draw(B=2, T=192, heads=(2, 2), K=K, V=V, dtype=dtype))
    check(draw(B=1, T=150, heads=(1, 4), K=K, V=V, dtype=dtype, lengths=[100, 0, 50]))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_ranges_equal_one_walk(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_RANGE", 1)
    monkeypatch.setattr(kernels, "RANGE_BYTES", 1)
    check(draw(T=200, dtype=dtype, heads=(1, 2)))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_maps_of_a_set_are_followed_to_the_last_bit(dtype):
    """Swaps and merges keep a one-hot state one-hot; each token also asks where it is."""
    T, K = 700, 16
    g = torch.Generator().manual_seed(0)
    x = dplr_inputs(1, 1, K, K, decay=False, hard=True)(g, 1, T)
    start = torch.eye(K)[None, None]
    x = {n: x[n].to(DEVICE, F32) for n in ("a", "b")}
    zeros = torch.zeros(1, T, 1, K, dtype=dtype, device=DEVICE)
    o, state = run(zeros + 1, zeros, zeros, **x, scale=1.0, initial_state=start.to(DEVICE))
    want = start[0, 0]
    for a, b in zip(x["a"][0, :, 0].cpu(), x["b"][0, :, 0].cpu(), strict=True):
        want = want + b[:, None] * (a @ want)
    assert torch.equal(state[0, 0].cpu(), want) and torch.equal(o[0, -1, 0].float().cpu(), want.sum(0))


def test_a_reset_forgets_to_the_last_bit():
    x = draw(T=130)
    x["log_decay"][:, 77], x["a"][:, 77] = -torch.inf, 0
    other = {**x, "v": x["v"].clone()}
    other["v"][:, :77] = 1e3
    (o, state), (changed, changed_state) = run(**x), run(**other)
    assert torch.equal(o[:, 77:], changed[:, 77:]) and torch.equal(state, changed_state)


@settings(max_examples=4)
@given(data=st.data())
def test_split_anywhere_and_carry_the_state(data):
    tokens = data.draw(st.integers(1, 140))
    cut = data.draw(st.integers(0, tokens))
    x = draw(T=tokens, hard=data.draw(st.booleans()))
    first = {n: t[:, :cut] if n in DPLR else t for n, t in x.items()}
    last = {n: t[:, cut:] if n in DPLR else t for n, t in x.items()}
    o1, middle = run(**first)
    o2, end = run(**last | {"initial_state": middle})
    reference: Any = partial(dplr, backend="reference")
    exact, single = (reference(**{n: t.cpu().to(d) for n, t in x.items()}) for d in (torch.float64, F32))
    for got, want, own in zip((torch.cat([o1, o2], 1), end), exact, single, strict=True):
        assert error(got, want) <= 4 * (error(own, want) + 4 * torch.finfo(F32).eps)


def test_causal():
    x, other = draw(T=140), draw(T=140, hard=True)
    changed = x | {n: torch.cat([x[n][:, :66], -other[n][:, 66:].abs()], 1) for n in DPLR}
    before, after = run(**x)[0], run(**changed)[0]
    assert torch.equal(before[:, :66], after[:, :66]) and not torch.equal(before[:, 66:], after[:, 66:])


def test_non_contiguous():
    x = draw(T=70, heads=(2, 2))
    strided = {n: t.mT.contiguous().mT for n, t in x.items()}
    want, got = with_grads(x, backend="triton"), with_grads(strided, backend="triton")
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("B, hard", [(1, False), (3, True)])
def test_step(B, hard):
    x = draw(B=B, T=1, heads=(2, 4), K=24, V=40, hard=hard)
    wide: Any = {n: t.cpu().double() for n, t in x.items()}
    exact = dplr(**wide, scale=0.3, backend="reference")
    before = x["initial_state"].clone()
    with torch.no_grad():
        o, state = run(**x, scale=0.3)
        assert torch.equal(x["initial_state"], before)
        in_place = dplr_step_(*(x[n] for n in DPLR), x["initial_state"], 0.3)
    for got, want in zip((o, state, in_place, x["initial_state"]), 2 * exact, strict=True):
        assert error(got, want) < 1e-6


def test_step_refuses_a_state_it_cannot_update_in_place():
    x = draw(T=1)
    with pytest.raises(UsageError, match="contiguous float32"):
        dplr_step_(*(x[n] for n in DPLR), x["initial_state"].double(), 0.3)


def test_deterministic():
    x = draw(T=100, heads=(1, 4), dtype=BF16)
    first, second = with_grads(x, backend="triton"), with_grads(x, backend="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "change, words", [({"dtype": torch.float64}, "float64"), ({"V": 264}, "V = 264"), ({"K": 136}, "K up to 128")]
)
def test_refusals(change, words):
    with pytest.raises(UsageError, match=words):
        run(**draw(T=2, **change))


@gpu_only
def test_auto_is_triton_on_a_gpu():
    x = draw(T=100, dtype=BF16)
    assert all(torch.equal(a, b) for a, b in zip(dplr(**x), run(**x), strict=True))


@gpu_only
def test_compile_graph_checkpoint():
    run_alone("tests.test_dplr_triton")


def compile_graph_checkpoint() -> None:
    x = draw(B=2, T=128, heads=(1, 4), K=64, V=64, dtype=BF16)
    plain = with_grads(x)
    again = with_grads(x, f=partial(checkpoint, dplr, use_reentrant=False))
    compiled = with_grads(x, f=torch.compile(dplr, fullgraph=True))
    for other in (again, compiled):
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            o, state = dplr(**x, scale=0.3)
        graph.replay()
    assert torch.equal(o, plain["o"]) and torch.equal(state, plain["state"])


if __name__ == "__main__":
    compile_graph_checkpoint()
