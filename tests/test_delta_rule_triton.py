"""The GPU kernels of the delta rule against the float64 reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from torch.nn.functional import logsigmoid, normalize
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from statetrack.errors import UsageError
from statetrack.ops import delta_rule
from statetrack.ops.delta_rule import triton_key_decay as key_kernels
from statetrack.ops.delta_rule import triton_plan as plans
from statetrack.ops.delta_rule.triton import delta_rule_step_

from .alone import run_alone

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(autouse=True, scope="module")
def bf16_products():
    """Let the interpreter multiply bf16 tiles: it keeps them as 16-bit integers and would multiply those."""
    if GPU:
        yield
        return
    plain = interpreter.InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widen(a), widen(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


def draw(B=1, T=70, N=1, heads=(1, 1), K=16, V=16, dtype=F32, gate="", lengths=None, unit=True) -> dict[str, Any]:
    """Draw the arguments of `delta_rule`, with heads = (key heads, value heads); lengths: packed sequences."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    Hk, H = heads
    q, k, v = normal(B, T, Hk, K), normal(B, T, N, Hk, K), normal(B, T, N, H, V)
    if unit:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    per_key = (K,) if gate.startswith("key") else ()
    beta, log_decay = 2 * normal(B, T, N, H).sigmoid(), logsigmoid(normal(B, T, H, *per_key) + 2)
    if gate.startswith("key strong"):
        log_decay *= (3 * normal(B, T, H, K)).exp()
    if gate.endswith("resets"):
        if per_key:
            log_decay[normal(B, T, H, K) > 1.2] = -torch.inf
        log_decay[:, ::5] = -torch.inf
        k[:, 1::7] = 0
        beta[:, 2::3] = 0
    x = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "beta": beta}
    x["initial_state"] = normal(len(lengths or [0] * B), H, K, V) / 2
    if gate:
        x["log_decay"] = log_decay
    if lengths:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return {name: t.to(DEVICE) for name, t in x.items()}


def with_grads(x, f: Callable = delta_rule, **options) -> dict[str, Any]:
    """Return output, state and the gradients of a fixed functional of both."""
    leaves = {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in x.items()}
    o, state = f(**leaves, scale=0.3, **options)
    g = torch.Generator().manual_seed(1)
    d_out, d_state = (torch.randn(y.shape, generator=g).to(y) for y in (o, state))
    torch.autograd.backward([o, state], [d_out, d_state])
    return {"o": o, "state": state} | {n: t.grad for n, t in leaves.items() if t.requires_grad}


def error(got, expected) -> float:
    """Return the relative error in norm."""
    difference = got.detach().cpu().double() - expected.detach().double()
    return (difference.norm() / expected.double().norm().clamp_min(1e-30)).item()


def check(x, f: Callable = delta_rule, bf16_state=1e-4):
    """Compare output, state and all gradients with the float64 reference, by the contract's bound.

    bf16_state: what bf16 inputs may cost the state, whose products take two bf16 terms.
    """
    got = with_grads(x, f, backend="triton")
    cpu = {n: t.cpu() for n, t in x.items()}
    exact, single = (
        with_grads({n: t.to(d) if t.is_floating_point() else t for n, t in cpu.items()}, f, backend="reference")
        for d in (torch.float64, F32)
    )
    for name, value in got.items():
        own = torch.finfo(value.dtype if name == "state" else x["v"].dtype).eps
        bound = 4 * own + 4 * (error(single[name], exact[name]) + 4 * torch.finfo(F32).eps)
        if name == "state":
            bound = max(bound, bf16_state if x["v"].dtype == BF16 else 0.0)
        assert error(value, exact[name]) <= bound, f"{name}: {error(value, exact[name]):.1e} > {bound:.1e}"


SMALL = {
    "float32": {},
    "bfloat16": {"dtype": BF16, "K": 32},
    "float16": {"dtype": F16},
    "gate": {"gate": "decay", "K": 24, "V": 20, "heads": (2, 2)},
    "resets, zero keys, beta 0": {"gate": "resets", "dtype": BF16},
    "resets in float32": {"gate": "resets", "T": 130},
    "shared heads": {"heads": (2, 4), "B": 2, "T": 20},
    "2 factors": {"N": 2, "dtype": BF16, "T": 64},
    "3 factors": {"N": 3, "gate": "decay", "T": 45},
    "8 factors": {"N": 8, "T": 20},
    "packed": {"lengths": [70, 0, 1, 66], "T": 137, "gate": "decay"},
    "packed factors": {"lengths": [33, 7], "T": 40, "N": 2, "dtype": BF16},
    "one token": {"T": 1, "N": 2},
    "key decay": {"gate": "key decay", "T": 140},
    "key decay, bfloat16": {"gate": "key decay", "dtype": BF16, "K": 40},
    "key decay, float16, 2 factors": {"gate": "key decay", "dtype": F16, "N": 2},
    "key decay, 3 factors, shared heads": {"gate": "key decay", "N": 3, "T": 45, "heads": (2, 4), "K": 24, "V": 20},
    "key decay, 8 factors": {"gate": "key resets", "N": 8, "T": 20, "B": 2},
    "key decay, packed": {"gate": "key decay", "lengths": [70, 0, 1, 66], "T": 137},
    "key decay, packed factors": {"gate": "key strong", "lengths": [33, 7], "T": 40, "N": 2, "dtype": BF16},
    "key decay, one token": {"gate": "key decay", "T": 1, "N": 2},
    "strong key decay": {"gate": "key strong", "K": 32},
    "strong key decay, bfloat16": {"gate": "key strong", "dtype": BF16, "K": 32},
    "key resets": {"gate": "key strong resets"},
    "key resets, bfloat16": {"gate": "key strong resets", "dtype": BF16},
    "wide float32 keys": {"K": 130, "heads": (1, 2)},
    "wide float32 keys, gate": {"K": 130, "gate": "resets", "N": 2, "T": 34},
    "keys of any length": {"unit": False, "T": 40},
}


@pytest.mark.parametrize("name", SMALL)
def test_small(name):
    check(draw(**SMALL[name]))


@pytest.mark.parametrize("gate", ["", "decay", "key decay"])
@pytest.mark.parametrize("K", [32, 128])
def test_one_term_is_as_exact_as_bf16_products_are(gate, K):
    x = draw(T=150, dtype=BF16, gate=gate, K=K, V=64, heads=(1, 2))
    one, two = (with_grads(x, backend="triton", precision=p) for p in ("fast", "tracking"))
    for name, value in two.items():
        assert 0 <= error(one[name], value.cpu()) <= 0.03, name
    assert error(one["state"], two["state"].cpu()) > 1e-4


def test_a_key_decay_scaled_out_of_range_is_seen(monkeypatch):
    """Scale rows whose decays do not allow it, which overflows: the comparison must fail."""
    monkeypatch.setattr(key_kernels, "LIMIT", {True: 1e9, False: 1e9})
    with pytest.raises(AssertionError):
        check(draw(**SMALL["key resets"]))


@pytest.mark.parametrize("channels", [(), (16,)])
def test_ranges_equal_one_walk(channels, monkeypatch):
    """With a decay per key channel the chunks are taken range by range; also a decay that all channels share."""
    monkeypatch.setattr(key_kernels, "MIN_RANGE", 1)
    x = draw(B=2, T=300, dtype=BF16)
    decay = logsigmoid(torch.randn(2, 300, 1, *channels, generator=torch.Generator().manual_seed(2)) + 2)
    x["log_decay"] = decay.to(DEVICE).view(2, 300, 1, -1).expand(2, 300, 1, 16)
    check(x)


@gpu_only
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
@pytest.mark.parametrize("K, V", [(16, 16), (32, 64), (64, 64), (64, 128), (100, 70), (128, 64), (128, 128)])
@pytest.mark.parametrize("gate", ["", "decay", "key decay", "key strong resets"])
def test_every_width(K, V, dtype, gate):
    check(draw(B=2, T=192, heads=(2, 2), K=K, V=V, dtype=dtype, gate=gate))
    check(draw(B=1, T=150, heads=(1, 2), K=K, V=V, dtype=dtype, gate=gate, lengths=[100, 0, 50]))


@gpu_only
@pytest.mark.parametrize("K, V", [(128, 256), (256, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
@pytest.mark.parametrize("gate", ["", "decay", "key decay", "key strong resets"])
def test_wide(K, V, dtype, gate):
    check(draw(B=1, T=128, heads=(2, 2), K=K, V=V, dtype=dtype, gate=gate))


@gpu_only
@pytest.mark.parametrize("N", range(2, 9))
@pytest.mark.parametrize("gate", ["", "decay", "key decay"])
def test_every_number_of_factors(N, gate):
    check(draw(B=2, T=96, N=N, heads=(2, 2), K=128, V=128, dtype=BF16, gate=gate))
    check(draw(B=1, T=50, N=N, heads=(1, 2), K=64, V=64, dtype=BF16, gate=gate))


@pytest.mark.parametrize("N, dtype, gate", [(1, F32, "decay"), (2, BF16, "resets")])
def test_segments_equal_one_walk(N, dtype, gate, monkeypatch):
    monkeypatch.setattr(plans, "MIN_SEGMENT", 1)
    assert plans.segments(1, 512 // N, 64 // N) == 8
    check(draw(T=512 // N, N=N, K=16, V=32, dtype=dtype, gate=gate))


def test_segments_are_chosen_only_where_the_gpu_would_idle():
    assert plans.segments(128, 32768, 64) == 1
    assert plans.segments(16, 32768, 64) == 8
    assert plans.segments(16, 32768 + 1, 64) == 1
    assert plans.segments(16, 2048, 64) == 1


@pytest.mark.parametrize("B, gate", [(1, ""), (3, "decay"), (2, "key decay"), (2, "key strong resets")])
def test_step(B, gate):
    x = draw(B=B, T=1, N=3, heads=(2, 4), K=24, V=40, gate=gate)
    exact = delta_rule(**{n: t.cpu().double() for n, t in x.items()}, scale=0.3, backend="reference")
    before = x["initial_state"].clone()
    with torch.no_grad():
        o, state = delta_rule(**x, scale=0.3, backend="triton")
        assert torch.equal(x["initial_state"], before)
        in_place = delta_rule_step_(
            x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"), x["initial_state"], 0.3
        )  # fmt: skip
    for got, want in zip((o, state, in_place, x["initial_state"]), 2 * exact, strict=True):
        assert error(got, want) < 1e-6


def test_step_refuses_a_state_it_cannot_update_in_place():
    x = draw(T=1)
    state = x["initial_state"].double()
    with pytest.raises(UsageError, match="contiguous float32"):
        delta_rule_step_(x["q"], x["k"], x["v"], x["beta"], None, state, 0.3)


@pytest.mark.parametrize("gate", ["decay", "key strong resets"])
def test_deterministic(gate):
    x = draw(T=100, gate=gate, dtype=BF16)
    first, second = with_grads(x, backend="triton"), with_grads(x, backend="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("decay", [None, torch.zeros(1, 300, 1, 16)], ids=["none", "per key channel"])
def test_exact_with_integer_keys(decay):
    """Swaps of 16 items written as e_i - e_j, beta = 2: the state is a permutation, bit for bit, at any length."""
    T, K = 300, 16
    g = torch.Generator().manual_seed(0)
    pairs = torch.stack([torch.randperm(K, generator=g)[:2] for _ in range(T)])
    k = torch.zeros(1, T, 1, 1, K)
    rows = torch.arange(T)
    k[0, rows, 0, 0, pairs[:, 0]], k[0, rows, 0, 0, pairs[:, 1]] = 1.0, -1.0
    expected = torch.eye(K)
    for i, j in pairs.tolist():
        expected[[i, j]] = expected[[j, i]]
    zeros = torch.zeros(1, T, 1, 1, K)
    q, k, v = (t.to(DEVICE, BF16) for t in (torch.zeros(1, T, 1, K), k, zeros))
    beta, state = torch.full((1, T, 1, 1), 2.0, device=DEVICE), torch.eye(K, device=DEVICE)[None, None]
    decay = None if decay is None else decay.to(DEVICE)
    _, final = delta_rule(q, k, v, beta, decay, initial_state=state, backend="triton")
    assert torch.equal(final[0, 0].cpu(), expected)


@pytest.mark.parametrize(
    "change, words",
    [({"dtype": torch.float64}, "float64"), ({"K": 264}, "K = 264"), ({"N": 9}, "factors per token, got 9")],
)
def test_refusals(change, words):
    with pytest.raises(UsageError, match=words):
        delta_rule(**draw(T=2, **change), backend="triton")


def test_unknown_precision():
    with pytest.raises(UsageError, match="quick"):
        delta_rule(**draw(T=2), backend="triton", precision="quick")


@gpu_only
@pytest.mark.parametrize("dtype, bounds", [(BF16, {4096: 1e-3, 65536: 5e-3})])
def test_tracking(dtype, bounds, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from delta_rule_gpu import tracking

    row = tracking(list(bounds), False, dtype)[0]
    assert all(row[f"T={n}"] <= bound for n, bound in bounds.items()), row


@gpu_only
def test_auto_is_triton_on_a_gpu():
    x = draw(T=100, dtype=BF16)
    assert all(torch.equal(a, b) for a, b in zip(delta_rule(**x), delta_rule(**x, backend="triton"), strict=True))


@pytest.mark.parametrize("packed", [[], [33, 7]])
def test_key_decay_is_registered_with_torch(packed):
    """What torch.compile reasons with (shapes, types, gradients) is what the kernels do."""
    x = draw(T=40, heads=(1, 2), N=2, dtype=BF16, gate="key decay", lengths=packed)
    names = ("q", "k", "v", "beta", "log_decay", "initial_state")
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = *(x[name].requires_grad_() for name in names), 0.3, packed, 2, True
    torch.library.opcheck(key_kernels._forward.registered, args, test_utils=utils)


@gpu_only
@pytest.mark.parametrize("gate", ["decay", "key decay"])
def test_compile_graph_checkpoint(gate):
    run_alone("tests.test_delta_rule_triton", gate)


def compile_graph_checkpoint(gate: str) -> None:
    x = draw(B=2, T=128, heads=(2, 2), K=64, V=64, dtype=BF16, gate=gate)
    plain = with_grads(x)
    again = with_grads(x, partial(checkpoint, delta_rule, use_reentrant=False))
    compiled = with_grads(x, torch.compile(delta_rule, fullgraph=True))
    for other in (again, compiled):
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            o, state = delta_rule(**x, scale=0.3)
        graph.replay()
    assert torch.equal(o, plain["o"]) and torch.equal(state, plain["state"])


if __name__ == "__main__":
    compile_graph_checkpoint(sys.argv[1])
