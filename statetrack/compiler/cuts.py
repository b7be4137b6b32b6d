"""The `cut` layer: small blocks side by side, each a family of disjoint sets of states closed under preimages.

A block's label says which set of its family the state lies in (none: LOST). The family has to be such that every event
acts on the labels as a partial injection or as a reset. It is found from a seed, one set at one state of the knowledge:
preimages under all events must be in the family, overlapping sets are joined, and so on until nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from statetrack.compiler.cascade import LOST, NO_LIMIT, Block, Knowledge, Layer, Limit, Map, Reset, View

Family = list[list[frozenset[int]]]  # disjoint sets, for every state of the knowledge
Key = tuple[int, int]  # an event: knowledge, letter
Images = dict[Key, dict[int, int]]

MOST_SEEDS, MOST_STEPS, MOST_PAIRS = 400, 4000, 60_000


def cut(seen: View, known: Knowledge, limit: Limit = NO_LIMIT) -> Layer | None:
    """Return blocks that together tell apart as much as all found; None if there are none. Raises TooLarge."""
    images = {(c, x): image for c, x, _, image, _ in known.events(seen, limit) if image}
    families = _families(known, images, limit)
    if not families:
        return None
    chosen = _cover(known, families, limit)
    return Layer("cut", [_block(seen.start, known, images, families[i]) for i in chosen]) if chosen else None


def _families(known: Knowledge, images: Images, limit: Limit) -> list[Family]:
    into: list[list[Key]] = [[] for _ in range(known.size)]
    for c, x in images:
        d = known.moves[c][x]
        assert d is not None
        into[d].append((c, x))
    seeds: dict[tuple[int, frozenset[int]], None] = {}
    for c, states in enumerate(known.possible):
        if len(states) > 1:
            seeds |= dict.fromkeys((c, frozenset([q])) for q in states)
    for (c, x), image in images.items():
        d, values = known.moves[c][x], frozenset(image.values())
        if d is not None and 1 < len(values) < len(known.possible[d]):
            seeds[d, values] = None
    found: dict[tuple, Family] = {}
    for c, states in list(seeds)[:MOST_SEEDS]:
        if limit.passed:
            break
        family = _close(known, images, into, c, states, limit)
        if family is None or _trivial(known, family) or not _acts(known, images, family):
            continue
        key = tuple(tuple(sorted(tuple(sorted(states)) for states in sets)) for sets in family)
        found.setdefault(key, family)
    return list(found.values())


def _close(
    known: Knowledge, images: Images, into: list[list[Key]], c0: int, seed: frozenset[int], limit: Limit
) -> Family | None:
    """Return the smallest family that holds the seed at c0; None if it takes too long."""
    family: Family = [[] for _ in range(known.size)]
    _add(family, c0, seed)
    todo = [c0]
    for _ in range(MOST_STEPS):
        if not todo:
            return family
        d = todo.pop()
        for c, x in into[d]:
            if limit.passed:
                return None
            image = images[c, x]
            for states in list(family[d]):
                before = frozenset(q for q, r in image.items() if r in states)
                if before and len(before) < len(image) and _add(family, c, before):
                    todo.append(c)
        todo += _forward(known, images, family, d)
    return None


def _forward(known: Knowledge, images: Images, family: Family, c: int) -> Iterator[int]:
    """Join sets that one set at c meets after an event, wherever it is not inside one of them; yield where."""
    for x, after in enumerate(known.moves[c]):
        image = images.get((c, x))
        if not image or after is None:
            continue
        for states in list(family[c]):
            moved = {image[q] for q in states if q in image}
            touched = [other for other in family[after] if other & moved]
            inside = len(touched) == 1 and moved <= touched[0]
            if touched and not inside and _add(family, after, moved.union(*touched)):
                yield after


def _add(family: Family, c: int, states: Iterable[int]) -> bool:
    """Put the states into one set at c, joining what overlaps; say whether that changed anything."""
    joined, apart = set(states), []
    for other in family[c]:
        if other & joined:
            joined |= other
        else:
            apart.append(other)
    if frozenset(joined) in family[c]:
        return False
    family[c] = [*apart, frozenset(joined)]
    return True


def _trivial(known: Knowledge, family: Family) -> bool:
    """Whether the family tells nothing: at each state of the knowledge no set, or one that holds all."""
    return all(not sets or (len(sets) == 1 and len(sets[0]) == len(known.possible[c])) for c, sets in enumerate(family))


def _label(q: int, sets: list[frozenset[int]]) -> int:
    return next((i for i, states in enumerate(sets) if q in states), LOST)


def _action(image: dict[int, int], before: list[frozenset[int]], after: list[frozenset[int]]) -> Map | Reset | None:
    """Return what an event does to the labels; None if that is neither a partial injection nor a reset."""
    targets = {_label(r, after) for r in image.values()}
    if len(targets) == 1:
        return Reset(targets.pop())
    to: dict[int, int] = {}
    for q, r in image.items():
        label, target = _label(q, before), _label(r, after)
        if to.setdefault(label, target) != target:
            return None
    if to.get(LOST, LOST) != LOST:
        return None
    kept = [target for target in to.values() if target != LOST]
    if len(set(kept)) < len(kept):
        return None
    return Map({label: target for label, target in to.items() if LOST not in (label, target)})


def _acts(known: Knowledge, images: Images, family: Family) -> bool:
    for (c, x), image in images.items():
        d = known.moves[c][x]
        if d is not None and _action(image, family[c], family[d]) is None:
            return False
    return True


def _block(start: int, known: Knowledge, images: Images, family: Family) -> Block:
    events: dict[tuple[int, int], Map | Reset] = {}
    for c, row in enumerate(known.moves):
        for x, d in enumerate(row):
            if d is None:
                continue
            action = _action(images[c, x], family[c], family[d]) if (c, x) in images else Map({})
            assert action is not None
            events[c, x] = action
    labels = [list(range(len(sets))) for sets in family]
    return Block(labels, events, _label(start, family[known.start]))


def _cover(known: Knowledge, families: list[Family], limit: Limit) -> list[int]:
    """Choose few families that separate all pairs of possible states that any of them separates."""
    pairs = [(c, p, q) for c, states in enumerate(known.possible) for p in states for q in states if p < q]
    separated = []
    for family in families:
        limit.check()
        labels = [{q: _label(q, family[c]) for q in states} for c, states in enumerate(known.possible)]
        separated.append({i for i, (c, p, q) in enumerate(pairs[:MOST_PAIRS]) if labels[c][p] != labels[c][q]})
    size = [max(len(sets) for sets in family) for family in families]
    chosen: list[int] = []
    left = set().union(*separated)
    while left:
        best = max(range(len(families)), key=lambda i: len(separated[i] & left) / (1 + 0.2 * size[i]))
        if not separated[best] & left:
            break
        chosen.append(best)
        left -= separated[best]
    for i in list(chosen):
        others = set().union(*(separated[j] for j in chosen if j != i))
        if separated[i] <= others:
            chosen.remove(i)
    return chosen
