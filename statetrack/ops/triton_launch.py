"""Launches of Triton kernels that are bound once, so that a call repeats as little of Triton's Python as it can.

`kernel[grid](...)` works out, at every launch, which compiled program its arguments need: a type for each, whether an
address or an integer is a multiple of 16, whether an integer is 1 (Triton makes a program for each such case), and all
compile-time choices. A `Launch` keeps what `kernel[grid](...)` returned, the compiled program, for the arguments that
decide it, and launches that one as Triton's documentation does: `program[grid](*arguments)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

KEPT = 1024  # programs of one Launch, and Launches; more are found again by Triton


class Launch:
    """A kernel and its compile-time choices; its other parameters are tensors first, then numbers.

    Triton's own way is taken by the interpreter, with an address that is no multiple of 16, and while somebody debugs
    or instruments kernels. Hooks around launches are called either way.
    """

    def __init__(self, kernel: Any, options: dict[str, Any]):
        self.kernel, self.options = kernel, options
        self.constants = tuple(options[name] for name in kernel.arg_names if name in options)
        self.programs: dict[tuple, Callable[..., None]] = {}

    def __call__(self, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        """Launch the kernel on the current device, which is the tensors', and its current stream."""
        addresses, types = 0, []
        for x in tensors:
            if x is None:
                types.append(None)
            else:
                addresses |= x.data_ptr()
                types.append(x.dtype)
        key = (grid, tensors[0].get_device(), tuple(types), numbers, tuple(map(type, numbers)))  # pyright: ignore[reportOptionalMemberAccess]
        program = self.programs.get(key)
        if program is None or addresses & 15 or _watched(self.kernel):
            found = self.kernel[grid](*tensors, *numbers, **self.options)
            if isinstance(found, CompiledKernel) and not addresses & 15 and not _watched(self.kernel):
                if len(self.programs) >= KEPT:
                    self.programs.clear()
                self.programs[key] = found[(*grid, 1, 1)[:3]]
            return
        program(*tensors, *numbers, *self.constants)


def _watched(kernel: Any) -> bool:
    """Return whether Triton must decide anew at every launch: debugging, instrumentation, hooks of the compiler."""
    return bool(
        knobs.runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(knobs.runtime, "add_stages_inspection_hook", None)  # since Triton 3.7
        or getattr(kernel, "pre_run_hooks", None)
    )


@lru_cache(maxsize=KEPT)
def bind(kernel: Any, **options: Any) -> Launch:
    """Return the Launch of a kernel with these compile-time choices, the same one for the same choices."""
    return Launch(kernel, options)
