"""Progress on long work: live bars on a terminal, a plain line now and then where the output goes to a file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 10  # per piece of work, where there is no terminal


class Bars:
    """Named pieces of work side by side; use as a context manager."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, markup=False)
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._ids: dict[str, TaskID] = {}
        self._printed: dict[str, int] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Bars:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, soft_wrap=True)

    def update(self, name: str, done: int | float, total: int | float | None, note: str = "") -> None:
        """Say how far a piece of work is; total is None where nobody knows, and then only a terminal shows it."""
        amount = f"{done:.0f}" if total is None else f"{done:.0f}/{total:.0f}"
        share = 0 if total is None else int(LINES * done / total)
        if name not in self._ids:
            self._ids[name] = self._live.add_task(name, total=total, note=note, amount=amount)
            self._printed[name] = share
        self._live.update(self._ids[name], completed=done, total=total, note=note, amount=amount)
        if not self.console.is_terminal and share > self._printed[name]:
            self._printed[name] = share
            seconds = time.monotonic() - self._began
            said = f"{name}: {amount} {note}".rstrip()
            self.console.print(f"{said}, after {seconds:.0f} s", soft_wrap=True)
