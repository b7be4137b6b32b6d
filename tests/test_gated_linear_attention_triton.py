"""The GPU kernels of gated linear attention against the float64 reference: interpreted without a GPU, else compiled."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from statetrack.errors import UsageError
from statetrack.ops import gated_linear_attention
from statetrack.ops.gated_linear_attention import triton_plan as plans
from statetrack.ops.gated_linear_attention.triton import gated_linear_attention_step_

from . import test_delta_rule_triton as delta
from .alone import run_alone
from .cases import EDGES, attention_inputs
from .test_signed_decay import by_definition

DEVICE, error, gpu_only = delta.DEVICE, delta.error, delta.gpu_only
bf16_products = delta.bf16_products
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
both_decays = pytest.mark.parametrize("decay", ["head", "key"])
run = partial(gated_linear_attention, backend="triton")
with_grads = partial(delta.with_grads, f=gated_linear_attention)
check = partial(delta.check, f=gated_linear_attention, bf16_state=2**-16)  # a write's two bf16 terms


def draw(B=1, T=70, heads=(1, 1), K=16, V=16, dtype=F32, decay="head", hard=False, lengths=None) -> dict[str, Any]:
    """Draw arguments with heads = (key heads, value heads), decays of both signs; lengths: packed sequences."""
    Hk, H = heads
    g = torch.Generator().manual_seed(0)
    x = attention_inputs(H, Hk, K, V, decay, hard)(g, B, T)
    x["initial_state"] = torch.randn(len(lengths or [0] * B), H, K, V, generator=g)
    x = {name: t.to(DEVICE, dtype if name in ("q", "k", "v") else F32) for name, t in x.items()}
    if lengths:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(DEVICE)
    return x


SMALL = {
    "float32": {},
    "bfloat16": {"dtype": BF16, "K": 32},
    "float16": {"dtype": F16},
    "zeros, 1e-30, signs": {"hard": True, "T": 130},
    "zeros, 1e-30, signs, bfloat16": {"hard": True, "T": 130, "dtype": BF16},
    "odd widths": {"K": 24, "V": 20, "heads": (2, 2), "T": 64},
    "wide": {"K": 70, "V": 70, "dtype": BF16},
    "shared heads": {"heads": (2, 8), "B": 2, "T": 20},
    "one shared head": {"heads": (1, 3), "T": 80, "dtype": BF16},
    "packed": {"lengths": [70, 0, 1, 66], "T": 137, "heads": (1, 2)},
    "packed shared heads": {"lengths": [33, 7], "T": 40, "heads": (1, 4), "dtype": BF16},
    "one token": {"T": 1},
}


@both_decays
@pytest.mark.parametrize("name", SMALL)
def test_small(name, decay):
    check(draw(**SMALL[name], decay=decay))


@both_decays
def test_no_token(decay):
    x = draw(T=0, decay=decay)
    got = with_grads(x, backend="triton")
    assert got["o"].shape == x["v"].shape and torch.equal(got["state"], x["initial_state"])
    assert got["initial_state"].shape == got["state"].shape and got["initial_state"].isfinite().all()


@gpu_only
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
@pytest.mark.parametrize(
    "K, V", [(16, 16), (32, 64), (64, 64), (64, 128), (100, 70), (128, 64), (128, 128), (128, 256)]
)
@both_decays
def test_every_width(K, V, dtype, decay):
    check(draw(B=2, T=192, heads=(2, 2), K=K, V=V, dtype=dtype, decay=decay))
    check(draw(B=1, T=150, heads=(1, 4), K=K, V=V, dtype=dtype, decay=decay, lengths=[100, 0, 50]))


@gpu_only
@pytest.mark.parametrize("K, V", [(256, 128), (256, 256), (200, 256)])
@both_decays
def test_wide(K, V, decay):
    check(draw(B=1, T=130, heads=(2, 2), K=K, V=V, dtype=BF16, decay=decay))


@gpu_only
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@both_decays
def test_hard_at_full_width(decay, dtype):
    check(draw(B=2, T=256, heads=(1, 4), K=128, V=64, dtype=dtype, decay=decay, hard=True))


@both_decays
@pytest.mark.parametrize("dtype, hard", [(F32, False), (BF16, False), (F32, True)], ids=str)
def test_segments_and_ranges_equal_one_walk(decay, dtype, hard, monkeypatch):
    monkeypatch.setattr(plans, "MIN_SEGMENT", 2)
    monkeypatch.setattr(plans, "MIN_RANGE", 1)
    monkeypatch.setattr(plans, "RANGE_BYTES", 1)
    assert plans.segments(1, 512) == 4
    check(draw(T=512, K=16, V=32, dtype=dtype, heads=(1, 2), decay=decay, hard=hard))


def test_segments_are_chosen_only_where_the_gpu_would_idle():
    assert plans.segments(512, 32768) == 1
    assert plans.segments(64, 32768) == 4
    assert plans.segments(64, 32768 + 1) == 1
    assert plans.segments(16, 2048) == 2


@both_decays
def test_gradient_to_a_decay_is_that_of_the_definition(decay):
    """Decays of 0, 1e-30, 1, -1, .. in the same chunk, each on its own, so that none hides behind the others."""
    x = draw(B=2, T=150, heads=(2, 2), K=5, V=4, decay=decay, hard=True)
    d_o, d_final = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    want = by_definition({n: t.double() for n, t in x.items()}, d_o.double(), d_final.double())
    want = want if decay == "key" else want.sum(-1)
    leaf = x["decay"].requires_grad_()
    got = torch.autograd.grad(run(**x), leaf, (d_o, d_final))[0]
    for edge in EDGES:
        here = x["decay"].detach() == torch.tensor(edge, dtype=F32)
        assert here.sum() > 50 and want[here].abs().min() > 0
        torch.testing.assert_close(got[here].double(), want[here], rtol=0, atol=8e-6)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("exponents", [(0, 16), (30, 38), (38, 42), (60, 130)], ids=str)
def test_small_decays(exponents, dtype):
    """Decays of 2^-n, n between two exponents: gradients by a quotient, without one, and some of both."""
    x = draw(T=80, heads=(1, 3), dtype=dtype)
    n = torch.rand(x["decay"].shape, generator=torch.Generator().manual_seed(1)) * (exponents[1] - exponents[0])
    small = torch.exp2(-(n + exponents[0])).to(DEVICE) * x["decay"].sign()
    x["decay"] = torch.where((torch.arange(80) % 3 == 0)[:, None].to(DEVICE), small, x["decay"])
    check(x)


@both_decays
def test_a_decay_of_zero_is_a_reset_to_the_last_bit(decay):
    x = draw(T=130, decay=decay)
    x["decay"][:, 77] = 0
    other = {**x, "v": x["v"].clone()}
    other["v"][:, :77] = 1e30
    (o, state), (changed, changed_state) = run(**x), run(**other)
    assert torch.equal(o[:, 77:], changed[:, 77:]) and torch.equal(state, changed_state)


@both_decays
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parity_is_exact(decay, dtype):
    """Decays of 1 and -1 count parity without rounding, also beside what rounding to bf16 would lose."""
    T, K = 4000, 16
    sign = 1 - 2.0 * torch.randint(0, 2, (1, T, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    zeros = torch.zeros(1, T, 1, K, dtype=dtype, device=DEVICE)
    a = sign if decay == "head" else sign[..., None].expand(-1, -1, -1, K).contiguous()
    start = torch.full((1, 1, K, K), 1 + 2**-20, device=DEVICE)
    o, state = run(zeros + 1, zeros, zeros, a, scale=1.0, initial_state=start)
    assert torch.equal(state, sign.prod() * start)
    assert torch.equal(o[0, :, 0, 0].float().sign(), sign[0, :, 0].cumprod(0))


@both_decays
@settings(max_examples=5)
@given(data=st.data())
def test_split_anywhere_and_carry_the_state(decay, data):
    tokens = data.draw(st.integers(1, 140))
    cut = data.draw(st.integers(0, tokens))
    x = draw(T=tokens, decay=decay, hard=data.draw(st.booleans()))
    first = {n: t[:, :cut] if t.ndim and n != "initial_state" else t for n, t in x.items()}
    last = {n: t[:, cut:] for n, t in x.items() if n != "initial_state"}
    o1, middle = run(**first)
    o2, end = run(**last, initial_state=middle)
    reference = partial(gated_linear_attention, backend="reference")
    exact, single = (reference(**{n: t.cpu().to(d) for n, t in x.items()}) for d in (torch.float64, F32))
    for got, want, own in zip((torch.cat([o1, o2], 1), end), exact, single, strict=True):
        assert error(got, want) <= 4 * (error(own, want) + 4 * torch.finfo(F32).eps)


@both_decays
def test_causal(decay):
    x, other = draw(T=140, decay=decay), draw(T=140, decay=decay, hard=True)
    changed = dict(x)
    for n in ("q", "k", "v", "decay"):
        changed[n] = torch.cat([x[n][:, :66], -other[n][:, 66:]], 1)
    before, after = run(**x)[0], run(**changed)[0]
    assert torch.equal(before[:, :66], after[:, :66]) and not torch.equal(before[:, 66:], after[:, 66:])


@both_decays
def test_non_contiguous(decay):
    x = draw(T=70, heads=(2, 2), decay=decay)
    strided = {n: t.mT.contiguous().mT for n, t in x.items()}
    want, got = with_grads(x, backend="triton"), with_grads(strided, backend="triton")
    assert all(torch.equal(want[name], got[name]) for name in want)


@both_decays
@pytest.mark.parametrize("B, hard", [(1, False), (3, True)])
def test_step(B, hard, decay):
    x = draw(B=B, T=1, heads=(2, 4), K=24, V=40, decay=decay, hard=hard)
    wide: Any = {n: t.cpu().double() for n, t in x.items()}
    exact = gated_linear_attention(**wide, scale=0.3, backend="reference")
    before = x["initial_state"].clone()
    with torch.no_grad():
        o, state = run(**x, scale=0.3)
        assert torch.equal(x["initial_state"], before)
        in_place = gated_linear_attention_step_(x["q"], x["k"], x["v"], x["decay"], x["initial_state"], 0.3)
    for got, want in zip((o, state, in_place, x["initial_state"]), 2 * exact, strict=True):
        assert error(got, want) < 1e-6


def test_step_refuses_a_state_it_cannot_update_in_place():
    x = draw(T=1)
    with pytest.raises(UsageError, match="contiguous float32"):
        gated_linear_attention_step_(x["q"], x["k"], x["v"], x["decay"], x["initial_state"].double(), 0.3)


@both_decays
def test_deterministic(decay):
    x = draw(T=100, heads=(1, 4), dtype=BF16, decay=decay)
    first, second = with_grads(x, backend="triton"), with_grads(x, backend="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "change, words", [({"dtype": torch.float64}, "float64"), ({"V": 264}, "V = 264"), ({"K": 136}, "K up to 128")]
)
def test_refusals(change, words):
    with pytest.raises(UsageError, match=words):
        run(**draw(T=2, **change))


@gpu_only
@both_decays
def test_auto_is_triton_on_a_gpu(decay):
    x = draw(T=100, dtype=BF16, decay=decay)
    assert all(torch.equal(a, b) for a, b in zip(gated_linear_attention(**x), run(**x), strict=True))


@gpu_only
@both_decays
def test_compile_graph_checkpoint(decay):
    run_alone("tests.test_gated_linear_attention_triton", decay)


def compile_graph_checkpoint(decay: str) -> None:
    x = draw(B=2, T=128, heads=(1, 4), K=64, V=64, dtype=BF16, decay=decay)
    plain = with_grads(x)
    again = with_grads(x, f=partial(checkpoint, gated_linear_attention, use_reentrant=False))
    compiled = with_grads(x, f=torch.compile(gated_linear_attention, fullgraph=True))
    for other in (again, compiled):
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            o, state = gated_linear_attention(**x, scale=0.3)
        graph.replay()
    assert torch.equal(o, plain["o"]) and torch.equal(state, plain["state"])


if __name__ == "__main__":
    compile_graph_checkpoint(sys.argv[1])
