"""The compiled network with sets in place of tensors: what it does if its arithmetic is exact, searched to the end.

A `Walk` steps through the network's own tables (letters, decoders, window), with every row's operation applied to the
set of coordinates that are 1. All that it meets is numbered and remembered, so that a step is a few look-ups.

Letters: x letters (merged), r rows of a stage (one per head and reading).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from statetrack.automata import Automaton
from statetrack.compiler.assembly import Stage, reading, rows_of
from statetrack.compiler.cascade import sink_of
from statetrack.compiler.network import Network, StageLayer
from statetrack.compiler.operations import Merge, Swap

if TYPE_CHECKING:
    from statetrack.compiler.compiled import CompiledAutomaton

MOST_PAIRS = 2_000_000

Columns = tuple[frozenset[int], ...]  # of one row
Place = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # window, known below each stage, vectors' numbers


def apply_factors(factors: list[Swap | Merge], ones: frozenset[int]) -> frozenset[int]:
    """Return the coordinates that are 1 after asymmetric factors."""
    for factor in factors:
        q, r = factor.q in ones, factor.r in ones
        kept = ones - {factor.q, factor.r}
        if isinstance(factor, Merge):
            ones = kept | ({factor.r} if q or r else set())
        else:
            ones = kept | ({factor.r} if q else set()) | ({factor.q} if r else set())
    return ones


class StageWalk:
    """One stage: `move` its vectors by an event, and what they and the layers below `tell`."""

    def __init__(self, stage: Stage, layer: StageLayer):
        self.stage, self.rows = stage, rows_of(stage)
        self.letters: list[list[list[int]]] = layer.letters.tolist()
        self.decoder: list[list[list[int]]] = [table.tolist() for table in layer.tables()]
        self.columns = max(len(head.start) for head, _ in self.rows)
        self.vectors: list[tuple[Columns, ...]] = []
        self._number: dict[tuple[Columns, ...], int] = {}
        self._moved: dict[tuple[int, int, int], int] = {}
        self._told: dict[tuple[int, int], int] = {}
        self.start = self.number(tuple(head.start for head, _ in self.rows))

    def number(self, vectors: tuple[Columns, ...]) -> int:
        """Return the number of these vectors, a new one if they are new."""
        if vectors not in self._number:
            self._number[vectors] = len(self.vectors)
            self.vectors.append(vectors)
        return self._number[vectors]

    def apply(self, r: int, event: int, ones: frozenset[int]) -> frozenset[int]:
        """Return a vector of row r after an operation."""
        if self.stage.asymmetric:
            return apply_factors(self.stage.asymmetric[event], ones)
        return self.rows[r][0].operations[event].apply(ones)

    def move(self, v: int, before: int, x: int) -> int:
        """Return the vectors after a letter, where the layers below knew `before`."""
        found = self._moved.get((v, before, x))
        if found is None:
            events = [letters[before][x] for letters in self.letters]
            moved = [tuple(self.apply(r, events[r], one) for one in ones) for r, ones in enumerate(self.vectors[v])]
            found = self._moved[v, before, x] = self.number(tuple(moved))
        return found

    def tell(self, v: int, known: int) -> int:
        """Return what is known with this stage, where the layers below know `known`."""
        found = self._told.get((v, known))
        if found is None:
            read = []
            for (_, weights), columns in zip(self.rows, self.vectors[v], strict=True):
                read += [reading(weights, ones) for ones in columns] + [0] * (self.columns - len(columns))
            found = known
            for table, value in zip(self.decoder, read, strict=True):
                found = table[found][value]
            self._told[v, known] = found
        return found

    def stays(self, v: int, code: int) -> bool:
        """Whether no operation changes these vectors and, whatever is known below, they tell `code`."""
        if self.stage.asymmetric:
            return False
        for (head, _), columns in zip(self.rows, self.vectors[v], strict=True):
            if any(op.apply(ones) != ones for op in head.operations for ones in columns):
                return False
        return all(self.tell(v, known) == code for known in range(len(self.decoder[0])))


class Walk:
    """All stages: from place to place, letter by letter."""

    def __init__(self, stages: list[Stage], network: Network):
        self.stages = []
        for stage, layer in zip(stages, network.layers, strict=True):
            assert isinstance(layer, StageLayer)
            self.stages.append(StageWalk(stage, layer))
        self.window: list[list[list[int]]] = [table.tolist() for table in network.window_tables()]
        below, code = [], network.first
        for walk in self.stages:
            below.append(code)
            code = walk.tell(walk.start, code)
        self.start: Place = ((-1,) * len(self.window), tuple(below), tuple(walk.start for walk in self.stages))
        self.told = code
        """what is known before the first letter"""

    def step(self, place: Place, x: int) -> tuple[Place, int]:
        """Return the place after a letter, and what is then known."""
        window, below, vectors = place
        known = 0
        if self.window:
            window = (*window, x)[1:]
            for table, letter in zip(self.window, reversed(window), strict=True):
                known = table[known][letter + 1]
        moved, knew = [], []
        for walk, before, v in zip(self.stages, below, vectors, strict=True):
            knew.append(known)
            moved.append(walk.move(v, before, x))
            known = walk.tell(moved[-1], known)
        return (window, tuple(knew), tuple(moved)), known


class Search(NamedTuple):
    """The symbolic half of a certificate: what a network does if its arithmetic is exact."""

    pairs: int
    """pairs (network's place, automaton's state) that can occur"""
    disagreements: int
    """between them, or of the network's tables and the automaton's"""
    complete: bool
    """whether the pairs were searched to the end"""
    argument: str = ""
    """what stands in place of the search, where the network has too many states for one"""

    def __str__(self) -> str:
        """Return it as one line."""
        if self.argument:
            return f"{self.argument}; {self.disagreements} table entries differ"
        stopped = "" if self.complete else f" (stopped at {MOST_PAIRS}: not a proof)"
        return f"network x automaton: {self.pairs} reachable pairs, {self.disagreements} disagree{stopped}"


def search_pairs(compiled: CompiledAutomaton) -> Search:
    """Search the pairs (network's place, automaton's state) that can occur.

    A place from which nothing changes any more, with the automaton in a state that is never left, is not entered.
    """
    merged, classes = compiled.automaton.merge_letters()
    disagreements = int((compiled.classes.cpu().numpy() != classes).sum())
    disagreements += int((compiled.emits.cpu().numpy() != merged.emits).sum())
    table, states = merged.table.tolist(), compiled.states_of.tolist()
    walk = Walk(compiled.stages, compiled)
    disagreements += states[walk.told] != merged.start
    stuck = [all(r == q for r in row) for q, row in enumerate(table)]
    last = walk.stages[-1] if walk.stages else None
    start = walk.start, merged.start
    seen, todo = {start}, deque([start])
    while todo:
        place, q = todo.popleft()
        for x, r in enumerate(table[q]):
            pair, code = _pair(walk, place, x, r)
            disagreements += states[code] != r
            if pair in seen or (stuck[r] and last and code == len(states) - 1 and last.stays(pair[0][2][-1], code)):
                continue
            if len(seen) >= MOST_PAIRS:
                return Search(len(seen), disagreements, complete=False)
            seen.add(pair)
            todo.append(pair)
    return Search(len(seen), disagreements, complete=True)


def _pair(walk: Walk, place: Place, x: int, r: int) -> tuple[tuple[Place, int], int]:
    after, code = walk.step(place, x)
    return (after, r), code


def random_words(automaton: Automaton, words: int, length: int, seed: int = 0) -> np.ndarray:
    """Draw words [words length] that stay alive as long as they can, nearly always."""
    rng, table, sink = np.random.default_rng(seed), automaton.table.tolist(), sink_of(automaton)
    live = [[x for x, r in enumerate(row) if r != sink] or range(automaton.alphabet) for row in table]
    drawn = np.empty((words, length), dtype=np.int64)
    for row in drawn:
        q, word = automaton.start, []
        for choice, astray in rng.random((length, 2)).tolist():
            letters = live[q] if astray < 0.999 else range(automaton.alphabet)
            word.append(letters[int(choice * len(letters))])
            q = table[q][word[-1]]
        row[:] = word
    return drawn
