"""Command lines run inside a test, and stopped in the middle."""

import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statetrack import cli


class Command:
    """Run command lines in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def __call__(self, line: str) -> tuple[int, str, str]:
        """Return the exit code, stdout, and stderr; a traceback fails the test by itself."""
        self.capsys.readouterr()
        try:
            cli.main(shlex.split(line))
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = self.capsys.readouterr()
        return int(code), out, err

    def refused(self, line: str) -> str:
        """Return the one line that says why; progress may stand before it."""
        code, out, err = self(line)
        assert (code, out) == (2, ""), err
        return the_line(err)


def the_line(err: str) -> str:
    *before, last = err.splitlines()
    assert last.startswith("statetrack: ") and not any("statetrack: " in line for line in before), err
    assert "Traceback" not in err and not err.endswith("\n\n")
    return last.removeprefix("statetrack: ")


def contents(path: Path) -> dict[str, bytes]:
    return {str(entry): entry.read_bytes() for entry in path.rglob("*") if entry.is_file() and entry.name != ".lock"}


def signals_after(calls: int, function: Callable[..., Any], signum: int) -> Callable[..., Any]:
    """Return the function, sending this thread a signal once, after so many calls."""

    def counted(*positional: Any, **named: Any) -> Any:
        nonlocal calls
        calls -= 1
        result = function(*positional, **named)
        if calls == 0:
            signal.raise_signal(signum)
        return result

    return counted
