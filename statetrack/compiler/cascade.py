"""Cascades: what every recurrent layer remembers, so that all of them together know an automaton's state.

A layer sees the letter and what the layers below it knew before the letter; on such an *event* it either moves its
labels by a partial injection (labels without an image are lost) or resets all of them to one label. These are the two
things that a product of projections and reflections can do to a one-hot vector, and nothing else is needed (see
docs/theory.md; the permutation-reset automata of Maler and Pnueli's form of Krohn-Rhodes theory are a special case).

*Knowledge* is an automaton again: its states are what the layers so far can tell apart, each with the automaton's
states that are still possible. A cascade is complete when only one is.

Letters: q states of the automaton, c states of the knowledge, x letters, y labels of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from statetrack.automata import Automaton

LOST = -1  # the label of the zero vector: it stays lost until a reset


class TooLarge(Exception):
    """A layer or the knowledge it gives outgrew its cap."""


@dataclass(frozen=True)
class View:
    """An automaton as cascades see it: moves[q][x] is None where nothing can be accepted any more."""

    moves: list[list[int | None]]
    start: int
    sink: int | None
    """the state that was taken out, if any"""

    @property
    def letters(self) -> int:
        """The number of letters."""
        return len(self.moves[0])

    def image(self, states: Iterable[int], letter: int) -> dict[int, int]:
        """Return where each of `states` goes, those that do not die."""
        found = {}
        for q in states:
            r = self.moves[q][letter]
            if r is not None:
                found[q] = r
        return found

    @property
    def reachable(self) -> frozenset[int]:
        """The states that some word reaches."""
        seen, todo = {self.start}, [self.start]
        while todo:
            for r in self.moves[todo.pop()]:
                if r is not None and r not in seen:
                    seen.add(r)
                    todo.append(r)
        return frozenset(seen)

    @property
    def dies(self) -> bool:
        """Whether some word leads nowhere."""
        return any(r is None for q in self.reachable for r in self.moves[q])


def sink_of(automaton: Automaton) -> int | None:
    """Return a state that says 0 and is never left, if there is one."""
    for q, row in enumerate(automaton.table.tolist()):
        if automaton.emits[q] == 0 and set(row) == {q}:
            return q
    return None


def view(automaton: Automaton, without_sink: bool) -> View:
    """Return the automaton, its sink taken out or kept as a state like any other."""
    sink = sink_of(automaton) if without_sink else None
    moves: list[list[int | None]] = [
        [None if r == sink or q == sink else r for r in row] for q, row in enumerate(automaton.table.tolist())
    ]
    return View(moves, automaton.start, sink)


@dataclass(frozen=True)
class Knowledge:
    """What layers know: an automaton, and for each of its states the automaton's states that are still possible."""

    moves: list[list[int | None]]
    start: int
    possible: list[frozenset[int]]

    @property
    def size(self) -> int:
        """The number of states."""
        return len(self.moves)

    @property
    def width(self) -> int:
        """How many states are still possible, at worst."""
        return max(len(states) for states in self.possible)

    @property
    def fingerprint(self) -> tuple[tuple[int, ...], ...]:
        """Equal for knowledge that tells the same sets of states apart."""
        return tuple(sorted(tuple(sorted(states)) for states in self.possible))


def nothing_known(seen: View) -> Knowledge:
    """Return the knowledge below the first layer."""
    return Knowledge([[0] * seen.letters], 0, [seen.reachable])


class Map(NamedTuple):
    """Labels go where `to` says, injectively; the others are lost."""

    to: dict[int, int]


class Reset(NamedTuple):
    """Every label, and what was lost, becomes this one (LOST: the zero vector)."""

    label: int


@dataclass(frozen=True)
class Block:
    """One head of a layer: what it does on every event, and the labels it may have at every state of the knowledge."""

    labels: list[list[int]]
    events: dict[tuple[int, int], Map | Reset]
    start: int

    @property
    def size(self) -> int:
        """The most labels it needs at once."""
        return max(len(labels) for labels in self.labels)

    def step(self, c: int, x: int, y: int) -> int:
        """Return the label after event (c, x)."""
        event = self.events[c, x]
        return event.label if isinstance(event, Reset) else event.to.get(y, LOST)


@dataclass(frozen=True)
class Register:
    """A head that remembers the last `length` letters, in binary: its label is the tuple of them."""

    length: int
    start: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """A rough width, for comparing plans before they have weights."""
        return 4 * self.length

    def step(self, c: int, x: int, y: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        """Return the label after event (c, x)."""
        return (*y, x)[-self.length :]


@dataclass
class Layer:
    """Blocks side by side, and what they and the knowledge below tell together: table[c, labels] -> c of the next."""

    kind: str
    blocks: list[Block | Register]
    table: dict[tuple[int, tuple], int] = field(default_factory=dict)

    @property
    def start(self) -> tuple:
        """The labels before the first letter."""
        return tuple(block.start for block in self.blocks)

    def step(self, c: int, x: int, labels: tuple) -> tuple:
        """Return the labels after event (c, x)."""
        return tuple(block.step(c, x, y) for block, y in zip(self.blocks, labels, strict=True))


def extend(seen: View, known: Knowledge, layer: Layer, cap: int = 20_000) -> Knowledge:
    """Return what is known with `layer` on top, minimised, and fill the layer's table."""
    start = (known.start, layer.start)
    number, nodes = {start: 0}, [start]
    possible: list[set[int]] = [{seen.start}]
    moves: dict[tuple[int, int], int] = {}
    todo, met = [(0, seen.start)], {(0, seen.start)}
    while todo:
        i, q = todo.pop()
        c, labels = nodes[i]
        for x, r in enumerate(seen.moves[q]):
            if r is None:
                continue
            j = moves.get((i, x))
            if j is None:
                below = known.moves[c][x]
                assert below is not None, "the knowledge below follows every live word"
                node = (below, layer.step(c, x, labels))
                j = number.get(node)
                if j is None:
                    j = number[node] = len(nodes)
                    nodes.append(node)
                    possible.append(set())
                    if len(nodes) > cap:
                        raise TooLarge
                moves[i, x] = j
            if (j, r) not in met:
                met.add((j, r))
                possible[j].add(r)
                todo.append((j, r))
    table = [[moves.get((i, x)) for x in range(seen.letters)] for i in range(len(nodes))]
    classes, count = _bisimilar(table, [frozenset(states) for states in possible])
    merged_moves: list[list[int | None]] = [[] for _ in range(count)]
    merged_possible: list[frozenset[int]] = [frozenset()] * count
    for i, row in enumerate(table):
        merged_moves[classes[i]] = [None if j is None else classes[j] for j in row]
        merged_possible[classes[i]] = frozenset(possible[i])
    layer.table = dict(zip(nodes, classes, strict=True))
    return Knowledge(merged_moves, classes[0], merged_possible)


def _bisimilar(table: list[list[int | None]], possible: list[frozenset[int]]) -> tuple[list[int], int]:
    """Number the classes of states with the same possible states, now and after every word."""
    names: dict[frozenset[int], int] = {}
    label = [names.setdefault(states, len(names)) for states in possible]
    count = len(names)
    while True:
        signatures: dict[tuple[int, ...], int] = {}
        refined = []
        for i, row in enumerate(table):
            signature = (label[i], *(-1 if j is None else label[j] for j in row))
            refined.append(signatures.setdefault(signature, len(signatures)))
        label = refined
        if len(signatures) == count:
            return label, count
        count = len(signatures)
