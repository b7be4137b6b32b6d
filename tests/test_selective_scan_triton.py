"""The GPU kernels of the selective scan against the float64 reference: interpreted without a GPU, else compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from statetrack.errors import UsageError
from statetrack.ops import selective_scan
from statetrack.ops.selective_scan import triton_plan as plans
from statetrack.ops.selective_scan.triton import selective_scan_step_

from . import test_delta_rule_triton as delta
from .alone import run_alone
from .cases import scan_inputs

DEVICE, error, gpu_only = delta.DEVICE, delta.error, delta.gpu_only
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RANGES = [(-1.0, 1.0), (0.0, 1.0)]
ALL = [*RANGES, (-0.5, 0.25)]
run: Any = partial(selective_scan, backend="triton")
every_size = pytest.mark.parametrize("size", range(len(plans.FORWARD)))


def draw(B=1, T=40, D=40, M=3, dtype=F32, skip=True, gate=True, lengths=None, full=False) -> dict[str, Any]:
    """Draw arguments; lengths: packed sequences; full: a channel and token count that needs no masks."""
    if full:
        T, D = 128, 64
    g = torch.Generator().manual_seed(0)
    x = scan_inputs(D, M, skip)(g, B, T)
    x["dt"] = x["dt"] / 4
    x["initial_state"] = torch.randn(len(lengths or [0] * B), D, M, generator=g)
    if gate:
        x["z"] = torch.randn(B, T, D, generator=g)
    low = ("u", "dt", "B", "C", "z")
    x = {name: t.to(DEVICE, dtype if name in low else F32) for name, t in x.items()}
    if lengths:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(DEVICE)
    return x


def with_grads(x, f=selective_scan, **options) -> dict[str, Any]:
    """Return y, state and the gradients of a fixed functional of both, the same one for every dtype."""
    leaves = {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in x.items()}
    y, state = f(**leaves, **options)
    g = torch.Generator().manual_seed(1)
    d_y, d_state = (torch.randn(out.shape, generator=g).bfloat16().to(out) for out in (y, state))
    torch.autograd.backward([y, state], [d_y, d_state])
    return {"y": y, "state": state} | {n: t.grad for n, t in leaves.items() if t.requires_grad}


def check(x, **options):
    """Compare y, state and all gradients with the float64 reference, by the contract's bound."""
    got = with_grads(x, backend="triton", **options)
    cpu = {n: t.cpu() for n, t in x.items()}
    exact, single = (
        with_grads({n: t.to(d) if t.is_floating_point() else t for n, t in cpu.items()}, backend="reference", **options)
        for d in (torch.float64, F32)
    )
    for name, value in got.items():
        own = torch.finfo(value.dtype).eps
        bound = 4 * own + 4 * (error(single[name], exact[name]) + 4 * torch.finfo(F32).eps)
        assert error(value, exact[name]) <= bound, f"{name}: {error(value, exact[name]):.1e} > {bound:.1e}"


@pytest.fixture
def forced(monkeypatch):
    """Return a function that makes the rule choose the schedules of one size."""

    def choose(size: int) -> None:
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(plans, name, getattr(plans, name)[size : size + 1])
        monkeypatch.setattr(plans, "FULL_GPU", 1)

    return choose


SMALL = {
    "float32": {},
    "bfloat16": {"dtype": BF16},
    "float16": {"dtype": F16},
    "no gate, no skip": {"gate": False, "skip": False},
    "batch": {"B": 3, "T": 17, "D": 5},
    "packed": {"lengths": [20, 0, 1, 34], "T": 55, "M": 2},
    "packed, bfloat16": {"lengths": [33, 7], "T": 40, "dtype": BF16},
    "one token": {"T": 1},
    "many states": {"M": 18, "T": 3, "D": 3},
    "full": {"full": True, "M": 1},
}


@pytest.mark.parametrize("name", SMALL)
@every_size
def test_small(name, size, forced):
    forced(size)
    check(draw(**SMALL[name]), eigenvalues=ALL[([*SMALL].index(name) + size) % 3])


@gpu_only
@pytest.mark.parametrize("eigenvalues", ALL)
@pytest.mark.parametrize("name", SMALL)
@every_size
def test_small_in_every_range(name, eigenvalues, size, forced):
    forced(size)
    check(draw(**SMALL[name]), eigenvalues=eigenvalues)


def test_no_token():
    x = draw(T=0)
    got = with_grads(x, backend="triton")
    assert got["y"].shape == x["u"].shape and torch.equal(got["state"], x["initial_state"])
    assert all(got[name].isfinite().all() for name in x)


@gpu_only
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
@pytest.mark.parametrize("D, M", [(64, 16), (100, 16), (256, 16), (64, 1), (64, 5), (32, 64), (30, 128)])
@every_size
def test_every_width(D, M, dtype, size, forced):
    forced(size)
    variants: Any = {"B": 2, "T": 512}, {"B": 2, "T": 300, "gate": False}, {"T": 300, "lengths": [100, 0, 1, 199]}
    for options in variants:
        check(draw(D=D, M=M, dtype=dtype, **options))


@gpu_only
@pytest.mark.parametrize("eigenvalues", RANGES)
@pytest.mark.parametrize("shape", [(8, 1024, 4096, 16), (1, 2048, 4096, 16), (1, 4096, 512, 16)], ids=str)
def test_real_shapes(shape, eigenvalues):
    """The rule's own choices, compared with the chunked backend in float64 on the same GPU."""
    B, T, D, M = shape
    x = draw(B, T, D, M, BF16)
    got = with_grads(x, backend="triton", eigenvalues=eigenvalues)
    want = with_grads({n: t.double() for n, t in x.items()}, backend="chunk", eigenvalues=eigenvalues)
    for name, value in got.items():
        assert error(value, want[name].cpu()) <= 4 * torch.finfo(value.dtype).eps + 2e-5, name


@pytest.mark.parametrize("eigenvalues", RANGES)
def test_segments_equal_one_walk(eigenvalues, monkeypatch):
    monkeypatch.setattr(plans, "MIN_SEGMENT", 128)
    x = draw(B=2, T=512, D=16, M=2)
    assert [plans.plan_of(x["u"], x["A"], [], 1.0, back).segments for back in (False, True)] == [4, 4]
    check(x, eigenvalues=eigenvalues)


def test_what_the_rule_chooses():
    def chosen(B, T, D):
        one, back = (plans.Plan((B, T, D), 16, (), True, torch.device("meta"), back=b) for b in (False, True))
        assert one.size == back.size
        return one.size, one.segments, back.segments

    assert chosen(8, 4096, 4096) == (0, 1, 1)
    assert chosen(2, 4096, 4096) == (0, 4, 2)
    assert chosen(1, 32768, 4096) == (0, 8, 4)
    assert chosen(1, 32768, 512) == (1, 16, 16)
    assert chosen(1, 32769, 512) == (1, 1, 1)


def test_every_backward_tile_is_a_multiple_of_the_forward_that_keeps_states():
    assert all(b.tile % f.TOK == 0 for f, b in zip(plans.FORWARD, plans.BACKWARD, strict=True))


@every_size
def test_signs_flip_without_rounding(size, forced):
    """dt A = 0 is an eigenvalue of exactly 1, dt A -> -inf one of exactly -1."""
    forced(size)
    T, D, M = 333, 3, 2
    odd = torch.randint(0, 2, (1, T, D), generator=torch.Generator().manual_seed(0)).to(DEVICE, F32)
    zeros = torch.zeros(1, T, M, device=DEVICE)
    start = torch.full((1, D, M), 1 + 2**-20, device=DEVICE)
    A = torch.full((D, M), -1e4, device=DEVICE)
    y, state = run(odd, odd, A, zeros, zeros + 1, initial_state=start)
    signs = (1 - 2 * odd).cumprod(1)
    assert torch.equal(state, signs[:, -1, :, None] * start)
    assert torch.equal(y, 2 * signs * start[0, 0, 0])


@settings(max_examples=4)
@given(data=st.data())
def test_split_anywhere_and_carry_the_state(data):
    tokens = data.draw(st.integers(1, 100))
    cut = data.draw(st.integers(0, tokens))
    x = draw(T=tokens, D=4, M=2)
    first = {n: t[:, :cut] if n in ("u", "dt", "B", "C", "z") else t for n, t in x.items()}
    last = {n: t[:, cut:] if n in ("u", "dt", "B", "C", "z") else t for n, t in x.items()}
    y1, middle = run(**first)
    y2, end = run(**last | {"initial_state": middle})
    reference: Any = partial(selective_scan, backend="reference")
    exact, single = (reference(**{n: t.cpu().to(d) for n, t in x.items()}) for d in (torch.float64, F32))
    for got, want, own in zip((torch.cat([y1, y2], 1), end), exact, single, strict=True):
        assert error(got, want) <= 4 * (error(own, want) + 4 * torch.finfo(F32).eps)


@every_size
def test_causal(size, forced):
    forced(size)
    x = draw(T=140, D=4, M=2)
    changed = {
        n: torch.cat([t[:, :66], 2 * t[:, 66:]], 1) if n in ("u", "dt", "B", "C", "z") else t for n, t in x.items()
    }
    before, after = run(**x)[0], run(**changed)[0]
    assert torch.equal(before[:, :66], after[:, :66]) and not torch.equal(before[:, 66:], after[:, 66:])


def test_a_sequence_full_of_nan_leaves_its_neighbours_alone():
    x = draw(T=60, D=3, lengths=[17, 21, 22])
    clean = with_grads(x, backend="triton")
    spoilt = {n: t.clone() for n, t in x.items()}
    for name in ("u", "dt", "B", "C", "z"):
        spoilt[name][:, 17:38] = torch.nan
    got = with_grads(spoilt, backend="triton")
    keep = [*range(17), *range(38, 60)]
    for name in ("y", "u", "dt", "B", "C", "z"):
        assert torch.equal(got[name][:, keep], clean[name][:, keep]), name
    assert torch.equal(got["state"][[0, 2]], clean["state"][[0, 2]])


def test_non_contiguous():
    x = draw(T=20)
    strided = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in x.items()}
    want, got = with_grads(x, backend="triton"), with_grads(strided, backend="triton")
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("eigenvalues", RANGES)
@pytest.mark.parametrize("B, gate", [(1, False), (3, True)])
def test_step(B, gate, eigenvalues):
    x = draw(B=B, T=1, D=70, M=5, gate=gate)
    wide: Any = {n: t.cpu().double() for n, t in x.items()}
    exact = selective_scan(**wide, eigenvalues=eigenvalues, backend="reference")
    before = x["initial_state"].clone()
    with torch.no_grad():
        y, state = run(**x, eigenvalues=eigenvalues)
        assert torch.equal(x["initial_state"], before)
        tensors: Any = [x.get(n) for n in ("u", "dt", "A", "B", "C", "D", "z", "initial_state")]
        in_place = selective_scan_step_(*tensors, *eigenvalues)
    for got, want in zip((y, state, in_place, x["initial_state"]), 2 * exact, strict=True):
        assert error(got, want) < 1e-6


def test_step_refuses_a_state_it_cannot_update_in_place():
    x = draw(T=1)
    tensors = [x[n] for n in ("u", "dt", "A", "B", "C", "D", "z")]
    with pytest.raises(UsageError, match="contiguous float32"):
        selective_scan_step_(*tensors, x["initial_state"].double(), -1.0, 1.0)


def test_deterministic():
    x = draw(T=70, dtype=BF16)
    first, second = with_grads(x, backend="triton"), with_grads(x, backend="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_float64_is_refused():
    with pytest.raises(UsageError, match="float64"):
        run(**draw(T=2, dtype=torch.float64))


@gpu_only
def test_auto_is_triton_on_a_gpu():
    x = draw(T=100, dtype=BF16)
    assert all(torch.equal(a, b) for a, b in zip(selective_scan(**x), run(**x), strict=True))


@gpu_only
def test_compile_graph_checkpoint():
    run_alone("tests.test_selective_scan_triton")


def compile_graph_checkpoint() -> None:
    x = draw(B=2, T=128, D=64, M=16, dtype=BF16)
    plain = with_grads(x)
    again = with_grads(x, f=partial(checkpoint, selective_scan, use_reentrant=False))
    compiled = with_grads(x, f=torch.compile(selective_scan, fullgraph=True))
    for other in (again, compiled):
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        want = selective_scan(**x)
        with torch.cuda.graph(graph):
            y, state = selective_scan(**x)
        graph.replay()
    assert torch.equal(y, want[0]) and torch.equal(state, want[1])


if __name__ == "__main__":
    compile_graph_checkpoint()
