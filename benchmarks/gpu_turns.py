"""Time implementations on one GPU, taking turns: what the scripts named *_gpu.py share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tables import Rows
from torch import Tensor

ROUNDS, REPEATS = 5, 4


@dataclass
class Contender:
    """One implementation on one shape."""

    call: Callable[[], tuple]  # returns (o, state)
    leaves: Sequence[Tensor]  # what gets gradients
    settings: Callable[[], AbstractContextManager] = nullcontext  # in force during its calls
    error: Callable[[], float] | None = None


def device_ms(fn: Callable[[], None]) -> float:
    """Return the time of REPEATS calls on the device, divided by REPEATS."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPEATS


def take_turns(contenders: dict[str, Contender], d_out: Tensor) -> Rows:
    """Return a row for each: first call, peak memory, error, median times of forward and of forward and backward."""
    calls, rows = {}, {}
    for name, c in contenders.items():

        def forward(c=c):
            with torch.no_grad():
                c.call()

        def both(c=c):
            for t in c.leaves:
                t.grad = None
            c.call()[0].backward(d_out)

        torch.cuda.synchronize()
        began = time.perf_counter()
        with c.settings():
            try:
                both()
                torch.cuda.synchronize()
                rows[name] = {"first s": time.perf_counter() - began}
                forward()
                error = {} if c.error is None else {"error": c.error()}
            except Exception as problem:  # an implementation that fails is a row, not the end of the run
                rows[name] = {"error": f"{type(problem).__name__}: {problem}"[:80]}
                continue
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            torch.cuda.synchronize()
        rows[name] |= {"peak MiB": (torch.cuda.max_memory_allocated() - before) / 2**20} | error
        calls[name] = forward, both
    times = {name: ([], []) for name in calls}
    for _ in range(ROUNDS):
        for name, pair in calls.items():
            with contenders[name].settings():
                for kept, fn in zip(times[name], pair, strict=True):
                    fn()
                    kept.append(device_ms(fn))
    for name, (f, b) in times.items():
        rows[name] |= {"forward ms": median(f), "forward+backward ms": median(b)}
    return [{"implementation": name} | row for name, row in rows.items()]


def report(texts: Iterable[str], out: Path | None) -> None:
    """Print the card and every text as it comes; keep them in `out` too, written anew each time."""
    import triton

    parts = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n"]
    print(parts[0])
    for text in texts:
        torch.cuda.empty_cache()
        print(text, flush=True)
        parts.append(text)
        if out:
            out.write_text("\n".join(parts))
