"""From a plan to stages: heads with their operations, and the tables that decode what they read.

A stage is one recurrent layer. Its heads' readings, together with what the layers below know, give what is known with
this layer; the table is looked up one reading at a time (a chain of two-input tables), so that it stays small. State
-1 of every table, the last row, stands for what cannot be: the word is dead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from statetrack.automata import Automaton
from statetrack.compiler.cascade import LOST, Knowledge, Layer, Register
from statetrack.compiler.operations import (
    Head,
    Merge,
    Style,
    Swap,
    block_head,
    latch_head,
    map_factors,
    register_head,
    register_reading,
)
from statetrack.compiler.search import Plan

READING = 256  # a reading stays below it: exact in bfloat16


@dataclass
class Stage:
    """One recurrent layer: heads side by side, and the chain of tables that decodes their readings.

    decoder[i][code, reading] is the next code; the first code is what the layers below know, the last what is known
    with this layer. asymmetric, for a layer of the dplr structure: the factors of every letter, on its only head.
    """

    kind: str
    heads: list[Head]
    decoder: list[Int[np.ndarray, "_ _"]]
    start: int
    """what is known before the first letter"""
    asymmetric: list[list[Swap | Merge]] = field(default_factory=list)

    def factors(self, style: Style = Style()) -> int:  # noqa: B008
        """Return the most factors that a token needs, at least 1."""
        if self.asymmetric:
            return max(1, *(len(factors) for factors in self.asymmetric))
        return max(1, *(len(style.factors(head, op)) for head in self.heads for op in head.operations))

    @property
    def width(self) -> int:
        """The number of coordinates."""
        return sum(head.width for head in self.heads)


def groups(head: Head) -> list[list[int]]:
    """Split a head's weights so that no reading reaches READING: one list of `width` weights per reading."""
    if head.register:
        spans = [(i, min(i + 8, head.width)) for i in range(0, head.width, 8)]
        return [[1 << (i - a) if a <= i < b else 0 for i in range(head.width)] for a, b in spans]
    step = READING - 1
    spans = [(i, min(i + step, head.width)) for i in range(0, head.width, step)]
    return [[i - a + 1 if a <= i < b else 0 for i in range(head.width)] for a, b in spans]


def rows_of(stage: Stage) -> list[tuple[Head, list[int]]]:
    """Return the rows of a stage: every head once per reading, with that reading's weights."""
    return [(head, weights) for head in stage.heads for weights in groups(head)]


def reading(weights: list[int], ones: Iterable[int]) -> int:
    """Return what is read with these weights where these coordinates are 1."""
    return sum(weights[i] for i in ones)


def readings(head: Head, ones: Iterable[int]) -> tuple[int, ...]:
    """Return what the head's readings are when these coordinates are 1."""
    ones = tuple(ones)
    return tuple(reading(weights, ones) for weights in groups(head))


def assemble(plan: Plan) -> tuple[list[Stage], Int[np.ndarray, "codes"], Stage | None]:
    """Return the stages of a plan, the automaton's state for every final code, and the window's decoder (or None)."""
    letters = plan.seen.letters
    stages = [
        _stage(plan, layer, below, above)
        for layer, below, above in zip(plan.layers, plan.known, plan.known[1:], strict=False)
    ]
    last = plan.known[-1]
    if plan.latch:
        decoder = chain({(c, (0,)): c for c in range(last.size)}, last.size, [2], last.size)
        stages.append(Stage("latch", [latch_head(plan.seen, last)], decoder, last.start))
    sink = 0 if plan.seen.sink is None else plan.seen.sink
    states = [next(iter(possible), sink) for possible in last.possible]
    window = None
    if plan.window is not None:
        register = plan.window.blocks[0]
        assert isinstance(register, Register)
        rows = {(0, _padded(label, register.length)): d for (_, (label,)), d in plan.window.table.items()}
        decoder = chain(rows, 1, [letters + 1] * register.length, plan.known[0].size)
        window = Stage("window", [], decoder, plan.known[0].start)
    return stages, np.array([*states, sink], dtype=np.int64), window


def _padded(label: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Return a window's letters, newest first, from 1; 0 where there was none yet."""
    return tuple([x + 1 for x in reversed(label)] + [0] * (length - len(label)))


def _stage(plan: Plan, layer: Layer, below: Knowledge, above: Knowledge) -> Stage:
    heads, coordinates = [], []
    for i, block in enumerate(layer.blocks):
        if isinstance(block, Register):
            heads.append(register_head(block.length, plan.seen.letters, below.size))
            coordinates.append(None)
        else:
            head, places = block_head(plan.seen, below, above, layer, i)
            heads.append(head)
            coordinates.append(places)
    rows = {}
    for (c, labels), d in layer.table.items():
        found: list[int] = []
        for head, places, label in zip(heads, coordinates, labels, strict=True):
            if places is None:
                code = register_reading(label, plan.seen.letters)
                found += readings(head, (i for i in range(head.width) if code >> i & 1))
            else:
                found += readings(head, () if label == LOST else (places[c][label],))
        rows[c, tuple(found)] = d
    sizes = [sum(weights) + 1 if head.register else max(weights) + 1 for head in heads for weights in groups(head)]
    return Stage(layer.kind, heads, chain(rows, below.size, sizes, above.size), above.start)


def chain(
    rows: dict[tuple[int, tuple[int, ...]], int], codes: int, sizes: list[int], final: int
) -> list[Int[np.ndarray, "_ _"]]:
    """Return tables that look up (code, readings) one reading at a time; what is not among `rows` gives the last code.

    codes: how many there are at the beginning, final: at the end, both without the code for what cannot be.
    """
    level = {(c, values): c for c, values in rows}
    tables = []
    for i, size in enumerate(sizes):
        last = i + 1 == len(sizes)
        number: dict[tuple[int, int], int] = {}
        entries = {}
        for key, code in level.items():
            step = code, key[1][i]
            entries[step] = rows[key] if last else number.setdefault(step, len(number))
            level[key] = entries[step]
        missing = final if last else len(number)
        table = np.full((codes + 1, size), missing, dtype=np.int64)
        for (code, reading), after in entries.items():
            table[code, reading] = after
        tables.append(table)
        codes = missing
    return tables


def assemble_map(automaton: Automaton) -> Stage:
    """Return the one stage of the dplr structure: a one-hot state, moved by swaps and merges."""
    letters = [map_factors(automaton.table[:, x].tolist()) for x in range(automaton.alphabet)]
    head = Head(automaton.states, (frozenset([automaton.start]),), [list(range(automaton.alphabet))] * 2)
    sizes = [max(weights) + 1 for weights in groups(head)]
    rows = {(0, readings(head, [q])): q for q in range(automaton.states)}
    decoder = chain(rows, 1, sizes, automaton.states)
    return Stage("map", [head], decoder, automaton.start, letters)
