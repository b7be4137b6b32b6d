"""Operators: called as they are in eager PyTorch, through the dispatcher where something else looks on."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from statetrack.ops.triton_operator import operator


class Seen(TorchDispatchMode):
    """Keep the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@operator("statetrack_tests::scaled_square")
def scaled_square(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x * x * scale, x + 0


@scaled_square.register_fake
def _(x, _):
    return torch.empty_like(x), torch.empty_like(x)


def _save(ctx, inputs, output):
    x, ctx.scale = inputs
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@operator("statetrack_tests::scaled_square_backward")
def times(d_out: torch.Tensor, x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    return d_out * scale * (x + kept)


@times.register_fake
def _(d_out, *_):
    return torch.empty_like(d_out)


def _backward(ctx, d_out, _):
    return times(d_out, *ctx.saved_tensors, ctx.scale), None


scaled_square.register_autograd(_backward, setup_context=_save)


def gradient(f, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(x, 0.5)[0].sum(), x)
    return grad


def test_the_dispatcher_sees_it_only_where_something_looks_on(monkeypatch):
    x = torch.randn(5)
    with Seen() as seen:
        inside = gradient(scaled_square, x)
    assert "statetrack_tests.scaled_square.default" in seen.names
    monkeypatch.setattr(scaled_square, "registered", None)  # not needed now
    assert torch.equal(gradient(scaled_square, x), inside) and torch.equal(inside, x)
    with torch.no_grad():
        assert torch.equal(scaled_square(x, 2.0)[0], 2 * x * x)


def test_no_gradient_is_kept_without_need():
    x = torch.randn(5, requires_grad=True)
    assert scaled_square(x, 1.0)[0].grad_fn is not None
    assert scaled_square(x.detach(), 1.0)[0].grad_fn is None
    with torch.no_grad():
        assert scaled_square(x, 1.0)[0].grad_fn is None


def test_other_tensors_and_transforms_go_through_the_dispatcher():
    class Mine(torch.Tensor):
        pass

    x = torch.randn(5)
    assert type(scaled_square(x.as_subclass(Mine), 1.0)[0]) is Mine
    assert torch.equal(scaled_square(torch.nn.Parameter(x), 1.0)[0], x * x)
    with pytest.raises(RuntimeError, match="setup_context"):  # what PyTorch says of every such operator
        torch.func.grad(lambda y: scaled_square(y, 0.5)[0].sum())(x)


def test_checkpoint():
    x = torch.randn(5)
    again = gradient(lambda *args: checkpoint(scaled_square, *args, use_reentrant=False), x)
    assert torch.equal(again, gradient(scaled_square, x))


def test_a_second_derivative_is_an_error_and_not_wrong():
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled_square(x, 0.5)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_compiled_whole():
    """The compiler sees one operator, and its gradient is right."""
    x = torch.randn(5)
    compiled = torch.compile(scaled_square, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled, x), gradient(scaled_square, x))


def test_registered_rightly():
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(scaled_square.registered, (torch.randn(5, requires_grad=True), 0.5), test_utils=utils)
