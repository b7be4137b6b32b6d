"""Texts of any size through a compiled automaton: files are read in blocks, many lines run side by side.

Short lines are sorted by length and run together, a piece of their letters at a time, those that have ended leaving; a
line longer than a block, or a whole file, goes through one piece after the other with its state carried along. So the
memory needed does not depend on the file.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Int

from statetrack.automata import Automaton
from statetrack.compiler import CompiledAutomaton
from statetrack.compiler.network import StageState, State
from statetrack.errors import UsageError

BLOCK = 1 << 22  # bytes read at once, and letters of the longest line that is not carried from block to block
ROWS, PIECE = 2048, 1 << 16  # lines side by side, and their letters in one call: what a core's cache holds
LONG_PIECE = 1 << 20  # letters of one long text in one call, which cuts them into segments
END = -1  # of a line, among letters
UNKNOWN = -2


def read_letters(
    read: Callable[[int], bytes], name: str, automaton: Automaton, *, lines: bool, report: Callable[[int], None]
) -> Iterator[Int[np.ndarray, "T"]]:
    """Yield a file's letters block by block; a newline is END where the texts are lines.

    Over 256 unnamed letters a letter is a byte, else a character of UTF-8. read: returns up to so many bytes, none at
    the end. report: called with the number of bytes read. Raises UsageError, with the position, at what is no letter.
    """
    of_bytes = automaton.letters is None and automaton.alphabet == 256
    if not of_bytes and max(map(len, automaton.names)) > 1:
        raise UsageError(
            f"the letters of a file are bytes or characters, but this automaton's are {', '.join(automaton.names):.60}"
        )
    number = _numbers(automaton, of_bytes, lines)
    decoder, size, place = codecs.getincrementaldecoder("utf-8")(), 0, _Place(name)
    while data := read(BLOCK):
        size += len(data)
        if of_bytes:
            codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64)
        else:
            codes = _characters(decoder, data, size, name)
        letters = number[np.minimum(codes, len(number) - 1)]
        unknown = np.flatnonzero(letters == UNKNOWN)
        if len(unknown):
            raise UsageError(place.of(codes, int(unknown[0]), automaton, lines))
        place.passed(codes)
        yield letters
        report(size)
    if not of_bytes:
        _characters(decoder, b"", size, name)


def _numbers(automaton: Automaton, of_bytes: bool, lines: bool) -> Int[np.ndarray, "codes"]:
    """Return the letter of every byte or character up to the last that is one, and UNKNOWN for those beyond."""
    codes = range(256) if of_bytes else [ord(name) for name in automaton.names]
    number = np.full(max(*codes, 10) + 2, UNKNOWN, dtype=np.int64)
    number[list(codes)] = range(len(codes))
    if lines:
        number[10] = END
    return number


def _characters(decoder: codecs.IncrementalDecoder, data: bytes, size: int, name: str) -> Int[np.ndarray, "T"]:
    held = len(decoder.getstate()[0])
    try:
        text = decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        position = size - len(data) - held + error.start
        raise UsageError(f"{name}: byte {position} is not UTF-8, and the letters are characters") from None
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)


class _Place:
    """Where in a file a block begins."""

    def __init__(self, name: str):
        self.name, self.before, self.line, self.column = name, 0, 0, 0

    def passed(self, codes: np.ndarray) -> None:
        """Go on to the end of a block."""
        newlines = np.flatnonzero(codes == 10)
        self.before, self.line = self.before + len(codes), self.line + len(newlines)
        self.column = len(codes) - 1 - int(newlines[-1]) if len(newlines) else self.column + len(codes)

    def of(self, codes: np.ndarray, i: int, automaton: Automaton, lines: bool) -> str:
        """Say where codes[i] is, and that it is no letter."""
        position = self.before + i
        self.passed(codes[:i])
        hint = "; without --whole each line is a text" if codes[i] == 10 and not lines else ""
        return (
            f"{self.name}: line {self.line + 1}, column {self.column + 1} (character {position} of the file): "
            f"{chr(codes[i])!r} is no letter; the letters are {', '.join(automaton.names):.80}{hint}"
        )


# --- through the network ----------------------------------------------------------------------------------------------


def say_whole(compiled: CompiledAutomaton, blocks: Iterable[Int[np.ndarray, "T"]], backend: str = "auto") -> int:
    """Return what the automaton says after all blocks, which are one text."""
    carried = _Carried(compiled, backend)
    for block in blocks:
        carried.take(block)
    return carried.says


def say_lines(
    compiled: CompiledAutomaton, blocks: Iterable[Int[np.ndarray, "T"]], backend: str = "auto"
) -> Iterator[Int[np.ndarray, "L"]]:
    """Yield what the automaton says after each line, in their order, many lines at once.

    END ends a line; the last one may go without.
    """
    rest, carried = np.empty(0, dtype=np.int64), None
    for block in blocks:
        if carried is not None:
            ends = np.flatnonzero(block == END)[:1]
            carried.take(block[: ends[0]] if len(ends) else block)
            if not len(ends):
                continue
            yield np.array([carried.says])
            carried, block = None, block[ends[0] + 1 :]
        rest = np.concatenate([rest, block])
        ends = np.flatnonzero(rest == END)
        if len(ends):
            yield _side_by_side(compiled, rest, ends, backend)
            rest = rest[ends[-1] + 1 :]
        if len(rest) > BLOCK:
            carried = _Carried(compiled, backend)
            carried.take(rest)
            rest = rest[:0]
    if carried is not None:
        yield np.array([carried.says])
    elif len(rest):
        yield _side_by_side(compiled, rest, np.array([len(rest)]), backend)


class _Carried:
    """One text, taken in as it comes."""

    def __init__(self, compiled: CompiledAutomaton, backend: str):
        self.compiled, self.backend, self.state = compiled, backend, compiled.init_state(1)
        self.says = int(compiled.automaton.emits[compiled.automaton.start])

    def take(self, letters: Int[np.ndarray, "T"]) -> None:
        """Go on with these letters."""
        for start in range(0, len(letters), LONG_PIECE):
            x = torch.from_numpy(letters[None, start : start + LONG_PIECE]).to(self.compiled.classes.device)
            said, self.state = self.compiled(x, self.state, backend=self.backend)
            self.says = int(said[0, -1])


def _side_by_side(
    compiled: CompiledAutomaton, letters: Int[np.ndarray, "T"], ends: Int[np.ndarray, "L"], backend: str
) -> Int[np.ndarray, "L"]:
    """Return what the automaton says after each of the lines that end before `ends`."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    out = np.full(len(ends), compiled.automaton.emits[compiled.automaton.start])
    order = np.argsort(lengths, kind="stable")
    order = order[np.count_nonzero(lengths == 0) :]
    for i in range(0, len(order), ROWS):
        group = order[i : i + ROWS]
        out[group] = _say_group(compiled, letters, starts[group], lengths[group], backend)
    return out


def _say_group(
    compiled: CompiledAutomaton,
    letters: Int[np.ndarray, "T"],
    starts: Int[np.ndarray, "L"],
    lengths: Int[np.ndarray, "L"],
    backend: str,
) -> Int[np.ndarray, "L"]:
    """Run lines of growing lengths together, a piece of each at a time; return what the automaton says after each."""
    device, state = compiled.classes.device, compiled.init_state(len(starts))
    out, done, t = np.empty(len(starts), dtype=np.int64), 0, 0
    while done < len(starts):
        rows = len(starts) - done
        width = min(max(1, PIECE // rows), int(lengths[-1]) - t)
        places = starts[done:, None] + np.arange(t, t + width)
        x = np.maximum(letters[np.minimum(places, len(letters) - 1)], 0)  # beyond a line's end: anything
        said, state = compiled(torch.from_numpy(x).to(device), state, backend=backend)
        ended = int(np.searchsorted(lengths[done:], t + width, side="right"))
        last = torch.from_numpy(lengths[done : done + ended] - t - 1).to(device)
        out[done : done + ended] = said[torch.arange(ended, device=device), last].cpu().numpy()
        state, done, t = _without(state, ended), done + ended, t + width
    return out


def _without(state: State, rows: int) -> State:
    """Return the state of all sequences but the first ones."""
    stages = tuple(StageState(memory[rows:], below[rows:]) for memory, below in state.stages)
    return State(stages, state.window[rows:], state.known[rows:])
