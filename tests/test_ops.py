"""The contract of every op on every backend: the float64 reference is right, all else is measured against it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops import delta_rule, dplr, gated_linear_attention, selective_scan

from .cases import CPU, OPS, OpCase, attention_inputs, delta_inputs, dplr_inputs, scan_inputs

EXACT = 1e-10
every_op = pytest.mark.parametrize("case", OPS, ids=lambda c: c.name)
every_backend = pytest.mark.parametrize(
    "case, backend", [(c, b) for c in OPS for b in CPU], ids=lambda x: getattr(x, "name", x)
)


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest error over the largest wanted value (over 1 where all are 0); NaN where anything is NaN."""
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if want.numel() == 0:
        return 0.0
    scale = want.double().abs().max()
    return ((got.double() - want.double()).abs().max() / torch.where(scale == 0, 1.0, scale)).item()


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: Callable[[str], float]) -> None:
    """Fail unless every entry is within its bound; NaN fails."""
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        e = error(tensor, want[name])
        assert e <= bound(name), f"{name}: error {e:.2e} > {bound(name):.2e}"


def run_with_grads(case: OpCase, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Return outputs and all gradients of a fixed random functional of output and state."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    o, state = case.run(leaves, **options)
    g = torch.Generator().manual_seed(1)
    losses = [(y.double() * torch.randn(y.shape, generator=g, dtype=torch.float64)).sum() for y in (o, state)]
    grads = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()), allow_unused=True)
    zero = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves.values(), grads, strict=True)]
    return {"o": o.detach(), "state": state.detach()} | {f"d {n}": grad for n, grad in zip(leaves, zero, strict=True)}


def part(case: OpCase, tensors: dict[str, Tensor], span: slice) -> dict[str, Tensor]:
    """Return the arguments for some of the tokens, without an initial state."""
    return {n: t[:, span] if n in case.per_token else t for n, t in tensors.items() if n != "initial_state"}


@every_backend
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 150])
def test_float64_equals_reference(case: OpCase, backend: str, tokens: int, generator):
    tensors = case.make(generator, 2, tokens)
    want = run_with_grads(case, tensors, backend="reference")
    assert_close(run_with_grads(case, tensors, backend=backend), want, lambda _: EXACT)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_is_as_good_as_the_reference_in_it(case: OpCase, backend: str, dtype, generator):
    tensors = {n: t.to(dtype) for n, t in case.make(generator, 2, 150).items()}
    tensors["initial_state"] = tensors["initial_state"].float()
    want = run_with_grads(case, {n: t.double() for n, t in tensors.items()}, backend="reference")
    own = run_with_grads(case, tensors, backend="reference")
    got = run_with_grads(case, tensors, backend=backend)
    for name in got:
        assert got[name].dtype == own[name].dtype, name
    eps = {n: torch.finfo(t.dtype).eps for n, t in own.items()}
    assert_close(got, want, lambda name: 4 * (error(own[name], want[name]) + 4 * eps[name]))


@every_backend
@settings(max_examples=12)
@given(data=st.data())
def test_split_anywhere_and_carry_the_state(case: OpCase, backend: str, data):
    tokens = data.draw(st.integers(1, 140))
    cut = data.draw(st.integers(0, tokens))
    tensors = case.make(torch.Generator().manual_seed(data.draw(st.integers(0, 99))), 2, tokens)
    want_o, want_state = case.run(tensors, backend=backend)
    o1, middle = case.run(
        {**part(case, tensors, slice(cut)), "initial_state": tensors["initial_state"]}, backend=backend
    )
    o2, state = case.run({**part(case, tensors, slice(cut, None)), "initial_state": middle}, backend=backend)
    got = {"o": torch.cat([o1, o2], dim=1), "state": state}
    assert_close(got, {"o": want_o, "state": want_state}, lambda _: EXACT)


@every_backend
@settings(max_examples=12)
@given(data=st.data())
def test_packed_sequences_equal_separate_ones(case: OpCase, backend: str, data):
    lengths = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=6))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tensors = case.make(g, 1, sum(lengths))
    tensors["initial_state"] = case.make(g, len(lengths), 1)["initial_state"]
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    got = run_with_grads(case, tensors, backend=backend, cu_seqlens=offsets)
    assert_close(got, run_with_grads(case, tensors, backend="reference", cu_seqlens=offsets), lambda _: EXACT)
    pieces = [
        case.run(
            {**part(case, tensors, slice(a, b)), "initial_state": tensors["initial_state"][i : i + 1]}, backend=backend
        )
        for i, (a, b) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
    ]
    want = {"o": torch.cat([o for o, _ in pieces], 1), "state": torch.cat([s for _, s in pieces])}
    assert_close({n: got[n] for n in want}, want, lambda _: EXACT)


@every_backend
def test_token_by_token_equals_sequence(case: OpCase, backend: str, generator):
    tensors = case.make(generator, 2, 20)
    want_o, want_state = case.run(tensors, backend=backend)
    state, outs = tensors["initial_state"], []
    for t in range(20):
        o, state = case.run({**part(case, tensors, slice(t, t + 1)), "initial_state": state}, backend="auto")
        outs.append(o)
    assert_close({"o": torch.cat(outs, 1), "state": state}, {"o": want_o, "state": want_state}, lambda _: EXACT)


@every_backend
@pytest.mark.parametrize("position", [0, 66, 149])
def test_causal(case: OpCase, backend: str, position: int, generator):
    tensors, other = case.make(generator, 1, 150), case.make(generator, 1, 150)
    changed = {
        n: torch.cat([t[:, :position], other[n][:, position:]], 1) if n in case.per_token else t
        for n, t in tensors.items()
    }
    before, _ = case.run(tensors, backend=backend)
    after, _ = case.run(changed, backend=backend)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position:], after[:, position:])


@every_backend
def test_gradient_of_the_state_carried_between_calls(case: OpCase, backend: str, generator):
    tensors = case.make(generator, 2, 90)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    _, middle = case.run({**part(case, leaves, slice(40)), "initial_state": leaves["initial_state"]}, backend=backend)
    o, state = case.run({**part(case, leaves, slice(40, None)), "initial_state": middle}, backend=backend)
    whole = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    want_o, want_state = case.run(whole, backend=backend)
    got = torch.autograd.grad(o.square().sum() + state.sum(), list(leaves.values()))
    want = torch.autograd.grad(want_o[:, 40:].square().sum() + want_state.sum(), list(whole.values()))
    assert_close(dict(zip(leaves, got, strict=True)), dict(zip(leaves, want, strict=True)), lambda _: EXACT)


@every_backend
def test_non_contiguous_inputs(case: OpCase, backend: str, generator):
    tensors = case.make(generator, 2, 70)
    strided = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in tensors.items()}
    got = run_with_grads(case, strided, backend=backend)
    assert_close(got, run_with_grads(case, tensors, backend=backend), lambda _: EXACT)


@every_op
def test_reference_passes_gradcheck(case: OpCase, generator):
    tensors = {n: t.requires_grad_() for n, t in case.make(generator, 1, 3).items()}
    if any(not t.isfinite().all() or (n == "k" and (t == 0).any()) for n, t in tensors.items()):
        pytest.skip("finite differences do not exist at -inf and at zero keys")
    names = list(tensors)

    def run(*xs: Tensor) -> tuple[Tensor, Tensor]:
        return case.run(dict(zip(names, xs, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(run, list(tensors.values()))


@pytest.mark.parametrize("fault", ["scaled", "nan", "missing", "shifted"])
def test_the_harness_rejects_a_planted_fault(fault: str, generator):
    case = OPS[2]
    tensors = case.make(generator, 2, 70)
    want = run_with_grads(case, tensors, backend="reference")
    got = {n: t.clone() for n, t in run_with_grads(case, tensors, backend="chunk").items()}
    if fault == "scaled":
        got["d beta"] *= 1 + 1e-8
    elif fault == "nan":
        got["o"].view(-1)[17] = torch.nan
    elif fault == "missing":
        got["d log_decay"].zero_()
    else:
        got["o"] = got["o"].roll(1, dims=1)
    with pytest.raises(AssertionError):
        assert_close(got, want, lambda _: EXACT)


def test_resets_are_exact_forward_and_backward(generator):
    """What lies before a reset has no influence, to the last bit, and the reset itself no gradient."""
    x = delta_inputs(decay="head")(generator, 1, 130)
    x["log_decay"] = torch.where(x["log_decay"].isinf(), -1.0, x["log_decay"])
    x["log_decay"][:, 77] = -torch.inf
    other = {n: t.clone() for n, t in x.items()}
    other["v"][:, :77] = 1e30
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    for backend in ("reference", *CPU):
        o, state = delta_rule(**leaves, backend=backend)
        changed, _ = delta_rule(**other, backend=backend)
        assert torch.equal(o[:, 77:], changed[:, 77:])
        grad_v, grad_decay = torch.autograd.grad(o[:, 77:].sum() + state.sum(), [leaves["v"], leaves["log_decay"]])
        assert not grad_v[:, :77].any() and grad_v[:, 77:].any()
        assert not grad_decay[:, 77].any() and not grad_decay.isnan().any()


@pytest.mark.parametrize("backend", CPU)
def test_strong_decays_lose_no_accuracy_afterwards(backend: str, generator):
    """A decay of e^-100 must not blur the differences of the decays after it (running sums in float32 would)."""
    x = {n: t.float() for n, t in delta_inputs(decay="head")(generator, 1, 64).items()}
    x["log_decay"] = torch.full_like(x["log_decay"], -1e-3)
    x["log_decay"][:, 5] = -100.0
    want, _ = delta_rule(**{n: t.double() for n, t in x.items()}, backend="reference")
    got, _ = delta_rule(**x, backend=backend)
    assert error(got[:, 5:], want[:, 5:]) <= 2e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e25])
@pytest.mark.parametrize("backend", ["reference", *CPU])
def test_keys_of_any_length_give_the_same_result(scale: float, backend: str, generator):
    x = {n: t.float() for n, t in delta_inputs()(generator, 1, 70).items()}
    want, _ = delta_rule(**x, backend=backend)
    got, _ = delta_rule(**{**x, "k": x["k"] * scale}, backend=backend)
    assert error(got, want) <= 1e-5


def test_backends_that_do_not_exist_are_refused(generator):
    x = delta_inputs()(generator, 1, 3)
    with pytest.raises(UsageError, match="backend='fast' is unknown; accepted: auto"):
        delta_rule(**x, backend="fast")


BAD_DELTA = {
    "k has shape": {"k": torch.zeros(2, 4, 1, 2, 5)},
    "v has shape": {"v": torch.zeros(2, 3, 2, 2, 4)},
    "beta has shape": {"beta": torch.zeros(2, 3, 2)},
    "log_decay has shape": {"log_decay": torch.zeros(2, 3, 1)},
    "initial_state has shape": {"initial_state": torch.zeros(2, 2, 4, 5)},
    "dtype torch.int64": {"beta": torch.zeros(2, 3, 1, 2, dtype=torch.int64)},
    "must share one dtype": {"k": torch.zeros(2, 3, 1, 2, 5, dtype=torch.float64)},
    "batch must be 1": {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)},
    "on meta but": {"k": torch.zeros(2, 3, 1, 2, 5, device="meta")},
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("message", BAD_DELTA)
def test_bad_input_to_delta_rule_is_one_clear_error(message: str, generator):
    x = {n: t.float() for n, t in delta_inputs()(generator, 2, 3).items()}
    with pytest.raises(UsageError, match=message):
        delta_rule(**{**x, **BAD_DELTA[message]})


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [0]])
@pytest.mark.parametrize(
    "op, make",
    [
        (delta_rule, delta_inputs()),
        (selective_scan, scan_inputs()),
        (gated_linear_attention, attention_inputs()),
        (dplr, dplr_inputs()),
    ],
)
def test_cu_seqlens_that_do_not_cover_the_tokens(op, make, offsets, generator):
    x = make(generator, 1, 3)
    x.pop("initial_state")
    with pytest.raises(UsageError, match="cu_seqlens must"):
        op(**x, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
