"""Bound launches choose the same compiled program as Triton does, with the same arguments.

In a process of its own with a driver that launches nothing and keeps what it was to launch: no GPU is needed.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

launched: list[tuple] = []  # (grid, program, arguments)
hooks: list = []  # around launches, as given to the launcher
loaded = count(1)


def test_the_same_programs_as_triton_chooses():
    root = Path(__file__).parent.parent
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), *sys.path])
    command = [sys.executable, "-m", "tests.test_triton_launch"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env)
    assert found.returncode == 0, found.stderr[-2000:]


@triton.jit
def kernel(x, y, n, scale, m, C: tl.constexpr, ADD: tl.constexpr):
    i = tl.arange(0, C)
    a = tl.load(x + i, mask=i < n, other=0.0) * scale
    if y is not None:
        a += tl.load(y + i * m)
    if ADD:
        a += 1
    tl.store(x + i, a)


class Driver:
    """What Triton asks of a driver, for one GPU of compute capability 9.0."""

    class launcher_cls:  # noqa: N801
        def __init__(self, *_):
            pass

        def __call__(self, *args):
            (x, y, z, _, function), arguments = args[:5], args[9:]
            launched.append(((x, y, z), function, arguments))
            hooks.append(args[7])

    utils = SimpleNamespace(
        load_binary=lambda *_: (0, next(loaded), 32, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 2**17, "multiprocessor_count": 132, "warpSize": 32},
    )

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


def main() -> None:
    from triton import knobs
    from triton.runtime import driver

    from statetrack.ops.triton_launch import bind

    driver.set_active(Driver())
    own = []  # launches in Triton's own way
    plain = type(kernel).run
    type(kernel).run = lambda *args, **kwargs: own.append(1) or plain(*args, **kwargs)
    memory = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    tensors = [(memory[d][at:], y) for d in memory for at in (0, 1, 8) for y in (None, memory[d])]
    cases = list(product(tensors, (1, 16, 17, 2**33), (0.5, 1.0), (1, 2, 32), (True, False)))
    for (x, y), n, scale, m, add in cases:
        launch = bind(kernel, C=16, ADD=add, num_warps=4)
        assert launch is bind(kernel, C=16, ADD=add, num_warps=4)
        for _ in range(2):
            launched.clear()
            own.clear()
            launch((3, 2), (x, y), (n, scale, m))
            aligned = x.data_ptr() % 16 == 0
        assert len(own) == (0 if aligned else 1)
        kernel[3, 2](x, y, n, scale, m, C=16, ADD=add, num_warps=4)
        (grid, program, arguments), (wanted_grid, wanted, wanted_arguments) = launched
        assert (grid, program) == (wanted_grid, wanted)
        same = zip(arguments, wanted_arguments, strict=True)
        assert all(a is b or (a == b and type(a) is type(b)) for a, b in same), (arguments, wanted_arguments)
    x = memory[torch.float32]
    launch = bind(kernel, C=16, ADD=True, num_warps=4)
    own.clear()
    kernel.add_pre_run_hook(lambda *_, **__: None)
    launch((1,), (x, None), (16, 0.5, 1))
    kernel.pre_run_hooks.clear()
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        launch((1,), (x, None), (16, 0.5, 1))
    assert len(own) == 2
    with knobs.runtime.scope():
        knobs.runtime.launch_enter_hook = print
        launch((3, 2), (x, None), (16, 0.5, 1))
    assert len(own) == 2 and hooks[-1] is print and hooks[-2] is not print


if __name__ == "__main__":
    main()
