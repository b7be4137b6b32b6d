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

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from statetrack.automata import Automaton

LOST = -1  # the label of the zero vector: it stays lost until a reset
CHECK = 1 << 14  # transitions between two looks at the clock


class TooLarge(Exception):
    """A layer or the knowledge it gives outgrew its cap, or the time ran out while it was made."""


class Limit:
    """A moment at which work stops: so many seconds from now on this clock, or when the outer limit does."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic, outer: Limit | None = None):
        self.clock, self.end, self.outer = clock, clock() + seconds, outer

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.clock() > self.end or (self.outer is not None and self.outer.passed)

    def check(self) -> None:
        """Raise TooLarge if it is over."""
        if self.passed:
            raise TooLarge


NO_LIMIT = Limit(float("inf"))


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


class Event(NamedTuple):
    """A letter where the layers below know c."""

    c: int
    x: int
    after: int
    """what they know afterwards"""
    image: dict[int, int]
    """where each possible state goes, those that do not die"""
    values: frozenset[int]
    """the states that they go to"""


@dataclass(frozen=True)
class Knowledge:
    """What layers know: an automaton, and for each of its states the automaton's states that are still possible."""

    moves: list[list[int | None]]
    start: int
    possible: list[frozenset[int]]
    _events: list[Event] = field(default_factory=list, init=False, repr=False, compare=False)

    def events(self, seen: View, limit: Limit = NO_LIMIT) -> list[Event]:
        """Return the events that some word leads to; made once, all layers tried on this knowledge ask for them.

        Raises TooLarge.
        """
        if not self._events:
            made: list[Event] = []
            columns = list(zip(*seen.moves, strict=True))
            for c, (row, states) in enumerate(zip(self.moves, self.possible, strict=True)):
                limit.check()
                for x, d in enumerate(row):
                    if d is not None:
                        column = columns[x]
                        image = {q: r for q in states if (r := column[q]) is not None}
                        made.append(Event(c, x, d, image, frozenset(image.values())))
            self._events.extend(made)
        return self._events

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


NOTHING = Map({})


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


@dataclass(frozen=True)
class Register:
    """A head that remembers the last `length` letters, in binary: its label is the tuple of them."""

    length: int
    start: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """A rough width, for comparing plans before they have weights."""
        return 4 * self.length


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
        if len(labels) == 1 and isinstance(only := self.blocks[0], Block):  # as below, faster
            event = only.events[c, x]
            return (event.label if isinstance(event, Reset) else event.to.get(labels[0], LOST),)
        after = []
        for block, y in zip(self.blocks, labels, strict=True):
            if isinstance(block, Register):
                after.append((*y, x)[-block.length :])
            else:
                event = block.events[c, x]
                after.append(event.label if isinstance(event, Reset) else event.to.get(y, LOST))
        return tuple(after)


def extend(seen: View, known: Knowledge, layer: Layer, cap: int = 20_000, limit: Limit = NO_LIMIT) -> Knowledge:
    """Return what is known with `layer` on top, minimised, and fill the layer's table. Raises TooLarge."""
    states, letters = len(seen.moves), range(seen.letters)
    live = [[(x, r) for x, r in enumerate(row) if r is not None] for row in seen.moves]
    start = (known.start, layer.start)
    number, nodes, possible = {start: 0}, [start], [{seen.start}]
    rows: list[list[int | None]] = [[None for _ in letters]]
    todo, met = [(0, seen.start)], {seen.start}  # pairs of node i and state q; i * states + q
    work = 0
    while todo:
        i, q = todo.pop()
        row = rows[i]
        work += len(live[q])
        if work > CHECK:
            work = 0
            limit.check()
        for x, r in live[q]:
            j = row[x]
            if j is None:
                c, labels = nodes[i]
                below = known.moves[c][x]
                assert below is not None, "the knowledge below follows every live word"
                node = (below, layer.step(c, x, labels))
                j = row[x] = number.setdefault(node, len(nodes))
                if j == len(nodes):
                    nodes.append(node)
                    possible.append(set())
                    rows.append([None for _ in letters])
                    if j >= cap:
                        raise TooLarge
            if j * states + r not in met:
                met.add(j * states + r)
                possible[j].add(r)
                todo.append((j, r))
    sets = [frozenset(some) for some in possible]
    classes, count = _bisimilar(rows, sets, limit)
    merged_moves: list[list[int | None]] = [[] for _ in range(count)]
    merged_possible: list[frozenset[int]] = [frozenset()] * count
    for i, row in enumerate(rows):
        if not merged_moves[classes[i]]:
            merged_moves[classes[i]] = [None if j is None else classes[j] for j in row]
            merged_possible[classes[i]] = sets[i]
    layer.table = dict(zip(nodes, classes, strict=True))
    return Knowledge(merged_moves, classes[0], merged_possible)


def _bisimilar(table: list[list[int | None]], possible: list[frozenset[int]], limit: Limit) -> tuple[list[int], int]:
    """Number the classes of states with the same possible states, now and after every word."""
    names: dict[frozenset[int], int] = {}
    label = [*(names.setdefault(states, len(names)) for states in possible), -1]  # the last for None
    count, nowhere = len(names), len(table)
    after = [itemgetter(i, *(nowhere if j is None else j for j in row)) for i, row in enumerate(table)]
    while True:
        limit.check()
        signatures: dict[tuple[int, ...], int] = {}
        label = [*(signatures.setdefault(labels(label), len(signatures)) for labels in after), -1]
        if len(signatures) == count:
            return label[:-1], count
        count = len(signatures)
