"""Functions that torch.compile sees as one operator, called as they are where nothing but eager PyTorch looks on.

The dispatcher's way to a Python operator and its gradient takes longer than the launches of several kernels, on a slow
CPU longer than the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """A function of tensors, numbers and lists, registered as `name`; called on the device of its first tensor.

    It goes through the dispatcher while torch.compile or a dispatch mode traces, under a transform of torch.func, and
    for subclasses of Tensor.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: tuple[str, ...] = ()):
        self.function = _on_its_device(function)
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        self.registered = torch.library.custom_op(name, self.function, mutates_args=mutates, schema=schema)
        self.register_fake = self.registered.register_fake
        self.differentiable: Any = None

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Give the function a gradient, as `torch.library.CustomOpDef.register_autograd` does."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.differentiable = type(function.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        if torch.compiler.is_compiling() or _traced(args):
            return self.registered(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            # without a gradient of its own it has the dispatcher's, which raises an error
            return self.registered(*args) if self.differentiable is None else self.differentiable.apply(*args)
        return self.function(*args)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Return a decorator that makes a function an `Operator`."""
    return lambda function: Operator(name, function, mutates)


def _traced(args: tuple[Any, ...]) -> bool:
    """Return whether something is to see the operator, or its tensors are no plain ones."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(x, Tensor) and type(x) not in PLAIN for x in args)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function such that its kernels are launched on the device of its first argument."""

    @wraps(function)
    def run(*args: Any) -> Any:
        device = args[0].device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return run
