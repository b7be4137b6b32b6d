"""Pieces of work side by side, each in a process of its own, with one display of how far they are."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from statetrack.errors import UsageError
from statetrack.progress import Bars
from statetrack.train import Interrupted

Tell = Callable[[int, int, str], None]
"""what a piece of work calls with its steps done, their number and a note"""

Work = Callable[[Any, Tell], Any]
"""a function of a module, called with one job and `Tell` in a process of its own; its result travels back"""


def side_by_side(
    jobs: Mapping[str, Any],
    work: Work,
    workers: int,
    bars: Bars,
    threads: int | None = 1,
    until: float = math.inf,
) -> Iterator[tuple[str, Any]]:
    """Run work(job, tell) for every named job, `workers` at a time; yield (name, result) as they end.

    threads: of torch in each process; None leaves torch's own choice. until: the value of time.monotonic() after which
    no job is begun any more. All are stopped if one fails (UsageError, with its name), if the user interrupts, or if
    the caller stops iterating.
    """
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs)
    running: dict[str, tuple[Any, Connection]] = {}
    try:
        while running or (waiting and time.monotonic() < until):
            while waiting and len(running) < workers and time.monotonic() < until:
                name = waiting.pop(0)
                reader, writer = context.Pipe(duplex=False)  # of its own: whoever is stopped holds up no other
                process = context.Process(target=_process, args=(work, jobs[name], threads, writer), daemon=True)
                with _interrupts_held():
                    process.start()
                writer.close()
                running[name] = process, reader
            ready = set(wait([reader for _, reader in running.values()]))
            for name, (process, reader) in list(running.items()):
                if reader not in ready:
                    continue
                kind, data = _receive(name, process, reader)
                if kind == "progress":
                    bars.update(name, *data)
                elif kind == "done":
                    del running[name]
                    process.join()
                    yield name, data
                else:
                    raise UsageError(f"{name}: {data}")
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _receive(name: str, process: Any, reader: Connection) -> tuple[str, Any]:
    """Return a process's next message; raise UsageError if it ended without one."""
    try:
        return reader.recv()
    except EOFError:
        process.join()
        raise UsageError(f"{name}: its process ended with exit code {process.exitcode}") from None


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts: it inherits this, so that the terminal's Ctrl-C reaches us alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _process(work: Work, job: Any, threads: int | None, messages: Connection) -> None:
    """Do one job; runs in a process of its own."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def tell(done: int, total: int, note: str) -> None:
        if parent is not None and not parent.is_alive():  # killed: nobody is left to stop us
            sys.exit(1)
        messages.send(("progress", (done, total, note)))

    try:
        messages.send(("done", work(job, tell)))
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except (UsageError, OSError) as error:
        messages.send(("failed", str(error)))
