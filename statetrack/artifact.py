"""The directory that `statetrack compile` leaves behind: all of it is there, or none.

compiled.safetensors   the network: weights, automaton, how it was made (`CompiledAutomaton.load`)
report.txt             the report, and the certificates
automaton.json         the automaton, as `Automaton.from_json` reads it
automaton.png, .svg    its states; layers.png, .svg: the network; trajectory.png, .svg: what it holds along a word
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from statetrack.compiler import CompiledAutomaton
from statetrack.errors import UsageError

NETWORK, REPORT, AUTOMATON = "compiled.safetensors", "report.txt", "automaton.json"
PICTURES = tuple(f"{name}.{kind}" for name in ("automaton", "layers", "trajectory") for kind in ("png", "svg"))
OURS = (REPORT, AUTOMATON, *PICTURES, NETWORK)
"""What --force replaces; other files are left alone."""


def check_free(path: Path, force: bool) -> None:
    """Raise UsageError where something would be overwritten."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; choose another directory")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{path} cannot be made: {above} is no directory that may be written to")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / NETWORK).exists():
        raise UsageError(f"{path} is not empty and holds no compiled automaton; choose another directory")
    if not force:
        raise UsageError(f"{path} holds a compiled automaton; --force replaces it")


def write(path: Path, compiled: CompiledAutomaton, report: str, force: bool = False) -> list[str]:
    """Write the directory; return what could not be drawn, and why.

    Everything is made in a directory beside it, which then takes its place: whatever happens, the old network or the
    new one is there, with its own report and pictures.
    """
    check_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as new:
        compiled.save(new / NETWORK)
        (new / REPORT).write_text(report + "\n", encoding="utf-8")
        compiled.automaton.to_json(new / AUTOMATON)
        missing = _draw(new, compiled)
        if path.exists() and any(path.iterdir()):
            _exchange(new, path)
        else:
            os.replace(new, path)
    return missing


def _exchange(new: Path, path: Path) -> None:
    """Put a directory in the place of another, and what is not ours back into it."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    for other in old.iterdir():
        if other.name not in OURS:
            os.replace(other, path / other.name)
    shutil.rmtree(old)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _draw(path: Path, compiled: CompiledAutomaton) -> list[str]:
    from statetrack.compiler.pictures import draw_automaton, draw_layers, draw_trajectory, example_word

    word = example_word(compiled.automaton)
    missing = []
    for name, draw in (
        ("automaton", lambda p: draw_automaton(compiled.automaton, p)),
        ("layers", lambda p: draw_layers(compiled, p)),
        ("trajectory", lambda p: draw_trajectory(compiled, word, p)),
    ):
        try:
            draw(path / name)
        except UsageError as error:
            missing.append(f"no picture of the {name}: {error}")
    return missing


def read(path: Path) -> CompiledAutomaton:
    """Return the network in a directory."""
    if not (path / NETWORK).exists():
        raise UsageError(f"{path / NETWORK} does not exist; first: statetrack compile SPEC --out {path}")
    return CompiledAutomaton.load(path / NETWORK)
