"""From labels to coordinates, and from what an event does to factors of a product.

A head holds a vector u in {0, 1}^d. An `Operation` permutes its coordinates along cycles, then clears some of them, and
may write a 1 into a cleared one. As a product of generalised Householder factors I - beta kh kh^T (docs/theory.md):

    (a b)     k = e_a - e_b, beta = 2      a cycle of length n is n - 1 of them, and no fewer do
    clear a   k = e_a, beta = 1, v = 0     v = 1 also writes

A reset of all coordinates is free where there is a gate (log_decay = -inf). With asymmetric factors I + b a^T, a map of
n states to themselves takes n - #components of them: swaps, and merges b = e_r - e_q, a = e_q.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from statetrack.compiler.cascade import LOST, Block, Knowledge, Layer, Map, Reset, View

UNITS = {"integer": 1.0, "unit": 0.5, "normalised": 0.5**0.5}
"""the kinds of keys: the entries of a swap's key"""


@dataclass(frozen=True)
class Operation:
    """What an event does to a head: cycles a -> b -> .. -> a, then coordinates cleared, of which some get a 1."""

    cycles: tuple[tuple[int, ...], ...] = ()
    clears: tuple[int, ...] = ()
    writes: frozenset[int] = frozenset()

    def apply(self, ones: Iterable[int]) -> frozenset[int]:
        """Return the coordinates that are 1 afterwards."""
        moves = {a: b for cycle in self.cycles for a, b in zip(cycle, (*cycle[1:], cycle[0]), strict=True)}
        return frozenset({moves.get(i, i) for i in ones} - set(self.clears) | self.writes)

    @property
    def swaps(self) -> list[tuple[int, int]]:
        """Transpositions which, applied in order, take every cycle's coordinates one step on."""
        return [(cycle[i], cycle[i + 1]) for cycle in self.cycles for i in range(len(cycle) - 2, -1, -1)]


IDENTITY = Operation()


@dataclass
class Head:
    """Vectors of `width` coordinates, its operations (the first is the identity), and how it is read.

    start has the coordinates that are 1 at first, for each of its columns: vectors that all operations act on alike.

    letters[c][x] is the operation on letter x where the layers below knew c before it; c = len(letters) - 1 stands for
    what cannot be, after the word is dead. A head that is a register is read as a binary number, any other as the
    number, from 1, of its only coordinate that is 1 (0 where there is none).
    """

    width: int
    start: tuple[frozenset[int], ...]
    letters: list[list[int]]
    operations: list[Operation] = field(default_factory=lambda: [IDENTITY])
    register: bool = False
    _numbers: dict[Operation, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def number(self, operation: Operation) -> int:
        """Return the operation's number, a new one if it is new."""
        for known in self.operations[len(self._numbers) :]:
            self._numbers[known] = len(self._numbers)
        found = self._numbers.setdefault(operation, len(self.operations))
        if found == len(self.operations):
            self.operations.append(operation)
        return found


@dataclass(frozen=True)
class Style:
    """How operations become factors."""

    gated: bool = False
    """a full reset is a decay of 0"""
    keys: str = "integer"
    """integer: e_a - e_b; unit: two coordinates each, (1/2, 1/2, -1/2, -1/2), so that keys have length 1 exactly;
    normalised: (e_a - e_b) / sqrt(2), what a kernel that normalises makes of it, not exact"""

    def copies(self, head: Head) -> int:
        """Return how many coordinates stand for one: 2 where a key of length 1 needs them."""
        return 2 if self.keys == "unit" and any(op.cycles for op in head.operations) else 1

    def factors(self, head: Head, operation: Operation) -> list[tuple[dict[int, float], float, float]]:
        """Return an operation's factors, in order: key entries, value, beta."""
        n = self.copies(head)
        unit = UNITS[self.keys]
        out = []
        for a, b in operation.swaps:
            key = {n * a + i: unit for i in range(n)} | {n * b + i: -unit for i in range(n)}
            out.append((key, 0.0, 2.0))
        reset = self.gated and len(operation.clears) == head.width
        for a in operation.clears:
            if not reset or a in operation.writes:
                out += [({n * a + i: 1.0}, float(a in operation.writes), 1.0) for i in range(n)]
        return out

    def resets(self, head: Head, operation: Operation) -> bool:
        """Whether the operation uses the gate."""
        return self.gated and len(operation.clears) == head.width > 0


def close_cycles(moves: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
    """Close a partial injection into cycles, a path's end going to its beginning; fixed points are left out."""
    moves = {a: b for a, b in moves.items() if a != b}
    cycles, seen = [], set()
    for a in [*sorted(set(moves) - set(moves.values())), *sorted(moves)]:  # paths first
        if a in seen:
            continue
        cycle = [a]
        while (b := moves.get(cycle[-1])) is not None and b != a:
            cycle.append(b)
        seen |= set(cycle)
        cycles.append(tuple(cycle))
    return tuple(sorted(cycles))


def block_head(seen: View, known: Knowledge, above: Knowledge, layer: Layer, i: int) -> tuple[Head, list[dict]]:
    """Return block i of a layer as a head, and the coordinate of every label at every state of the knowledge below."""
    block = layer.blocks[i]
    assert isinstance(block, Block)
    coordinates = _coordinates(known, block)
    start = frozenset() if block.start == LOST else frozenset([coordinates[known.start][block.start]])
    head = Head(block.size, (start,), [])
    alive = _alive(known, above, layer, i)
    everything = tuple(range(head.width))
    for c, row in enumerate(known.moves):
        numbers = []
        for x, d in enumerate(row):
            event = block.events.get((c, x))
            if d is None or event is None:
                operation = Operation(clears=everything) if layer.kind == "inj" else IDENTITY
            elif isinstance(event, Reset):
                used = set(coordinates[c].values())
                written = frozenset() if event.label == LOST else frozenset([coordinates[d][event.label]])
                operation = Operation(clears=tuple(sorted(used | written)), writes=written)
            else:
                doomed = [
                    coordinates[c][label]
                    for label in block.labels[c]
                    if label not in event.to and (layer.kind == "inj" or _survives(seen, alive[c].get(label, ()), x))
                ]
                operation = _map(event, coordinates[c], coordinates[d], block.labels[c], doomed)
            numbers.append(head.number(operation))
        head.letters.append(numbers)
    head.letters.append([0] * seen.letters)
    return head, coordinates


def _map(event: Map, before: dict[int, int], after: dict[int, int], labels: list[int], doomed: list[int]) -> Operation:
    """Return the operation that moves labels to their new coordinates and clears what is lost."""
    cycles = close_cycles({before[label]: after[event.to[label]] for label in labels if label in event.to})
    moved = Operation(cycles)
    return Operation(cycles, tuple(sorted(moved.apply(doomed))))


def _coordinates(known: Knowledge, block: Block) -> list[dict[int, int]]:
    """Give every label a coordinate at every state of the knowledge, so that most events move nothing."""
    found: list[dict[int, int] | None] = [None] * known.size
    found[known.start] = {label: i for i, label in enumerate(block.labels[known.start])}
    queue = deque([known.start])
    while queue:
        c = queue.popleft()
        here = found[c] or {}
        for x, d in enumerate(known.moves[c]):
            if d is None or found[d] is not None:
                continue
            there: dict[int, int] = {}
            event = block.events[c, x]
            for label, target in event.to.items() if isinstance(event, Map) else ():
                if label in here and target in block.labels[d] and target not in there:
                    there[target] = here[label]
            free = iter(sorted(set(range(block.size)) - set(there.values())))
            for label in block.labels[d]:
                if label not in there:
                    there[label] = next(free)
            found[d] = there
            queue.append(d)
    return [{label: i for i, label in enumerate(block.labels[c])} if m is None else m for c, m in enumerate(found)]


def _alive(known: Knowledge, above: Knowledge, layer: Layer, i: int) -> list[dict[int, set[int]]]:
    """Return the automaton's states that are possible at every knowledge and label of block i."""
    found: list[dict[int, set[int]]] = [{} for _ in range(known.size)]
    for (c, labels), d in layer.table.items():
        found[c].setdefault(labels[i], set()).update(above.possible[d])
    return found


def _survives(seen: View, states: Iterable[int], x: int) -> bool:
    return any(seen.moves[q][x] is not None for q in states)


def register_head(length: int, letters: int, known: int) -> Head:
    """Return the head that holds the last letters in binary: the newest in the first bits, 0 for none yet."""
    bits = max(1, letters.bit_length())
    head = Head(bits * length, (frozenset(),), [], register=True)
    cycles = close_cycles({j * bits + b: (j + 1) * bits + b for j in range(length - 1) for b in range(bits)})
    numbers = [
        head.number(Operation(cycles, tuple(range(bits)), frozenset(b for b in range(bits) if (x + 1) >> b & 1)))
        for x in range(letters)
    ]
    head.letters = [numbers] * known + [[0] * letters]
    return head


def register_reading(label: tuple[int, ...], letters: int) -> int:
    """Return what a register reads when it holds these letters."""
    bits = max(1, letters.bit_length())
    return sum((x + 1) << (j * bits) for j, x in enumerate(reversed(label)))


def latch_head(seen: View, known: Knowledge) -> Head:
    """Return the head of one bit that is set when the word dies, and stays."""
    head = Head(1, (frozenset(),), [])
    dead = head.number(Operation(clears=(0,), writes=frozenset([0])))
    for states in known.possible:
        head.letters.append([0 if _survives(seen, states, x) else dead for x in range(seen.letters)])
    head.letters.append([0] * seen.letters)
    return head


# --- asymmetric factors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swap:
    """Exchange coordinates q and r."""

    q: int
    r: int


@dataclass(frozen=True)
class Merge:
    """Add coordinate q to r and clear it."""

    q: int
    r: int


def map_factors(to: list[int]) -> list[Swap | Merge]:
    """Return swaps and merges whose product, applied in order, is a map of coordinates: n - #components of them."""
    to, out = list(to), []
    while True:
        sources: list[list[int]] = [[] for _ in to]
        for q, r in enumerate(to):
            sources[r].append(q)
        leaf = next((q for q in range(len(to)) if not sources[q]), None)
        if leaf is None:
            break
        target = to[leaf]
        other = next((q for q in sources[target] if q != leaf), None)
        if other is not None:
            out.append(Merge(leaf, other))
            to[leaf] = leaf
        else:
            out.append(Swap(leaf, target))
            to[leaf], to[target] = to[target], target
    for cycle in close_cycles(dict(enumerate(to))):
        out += [Swap(cycle[i], cycle[i + 1]) for i in range(len(cycle) - 2, -1, -1)]
    return out
