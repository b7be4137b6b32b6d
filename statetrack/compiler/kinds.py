"""The kinds of layer that a cascade is built from; each takes what is known so far and returns a `Layer`.

peel      the state itself; where states merge they may be lost, and what may be lost is known
inj       the same as a last layer without resets: its zero vector says that the word is dead
EM, TR    tiles: sets of states. EM remembers the image of the last event that was not the identity; TR carries tiles
          along while their images stay disjoint, and resets to the image where they do not (as in a holonomy cascade)
zei       Zeiger's split: the label is a state that the automaton is not in; always makes progress
suf<k>    the last k letters
cut       several small blocks side by side, found by closing a set of states under preimages (see cuts.py)
all<k>    all of these side by side, and the last k letters; pruned afterwards
"""

from __future__ import annotations

from statetrack.compiler.cascade import (
    LOST,
    NO_LIMIT,
    NOTHING,
    Block,
    Knowledge,
    Layer,
    Limit,
    Map,
    Register,
    Reset,
    TooLarge,
    View,
)

_Move = tuple[int, int, dict[int, int], frozenset[int], bool]  # letter, next c, image, its values, if the identity


def peel(seen: View, known: Knowledge, resets: bool = True, limit: Limit = NO_LIMIT) -> Layer | None:
    """Remember the state itself; without resets, give None where an event merges live states. Raises TooLarge."""
    lossy = _possibly_lost(seen, known, resets, limit)
    labels = [
        sorted(states - lossy[c]) if len(lossy[c]) == 1 else sorted(states) for c, states in enumerate(known.possible)
    ]
    events: dict[tuple[int, int], Map | Reset] = {}
    kept_at = [set(some) for some in labels]
    for i, (c, x, d, image, targets) in enumerate(known.events(seen)):
        if i % 256 == 0:
            limit.check()
        if not resets and len(targets) < len(image):
            return None
        kept = kept_at[d]
        if not image:
            events[c, x] = NOTHING
        elif resets and len(targets) == 1:
            (target,) = targets
            source = next(iter(image))
            if len(image) == 1 and source not in lossy[c]:  # surely tracked: a map is cheaper than a reset
                events[c, x] = Map({source: target} if target in kept else {})
            else:
                events[c, x] = Reset(target if target in kept else LOST)
        else:
            events[c, x] = Map(_survivors(image, labels[c], kept))
    start = seen.start if seen.start in labels[known.start] else LOST
    return Layer("peel" if resets else "inj", [Block(labels, events, start)])


def _possibly_lost(seen: View, known: Knowledge, resets: bool, limit: Limit) -> list[set[int]]:
    """Return the states that, at each state of the knowledge, the layer may have lost: the least fixed point."""
    lossy: list[set[int]] = [set() for _ in range(known.size)]
    maps: list[list[tuple[int, dict[int, int]]]] = [[] for _ in range(known.size)]
    for c, _, d, image, targets in known.events(seen, limit):
        if not image or (resets and len(targets) == 1):
            continue
        maps[c].append((d, image))
        if len(targets) < len(image):
            lossy[d] |= _merged(image)
    todo = [(c, set(states)) for c, states in enumerate(lossy) if states]
    while todo:
        limit.check()
        c, lost = todo.pop()
        for d, image in maps[c]:
            carried = {image[q] for q in lost if q in image} - lossy[d]
            if carried:
                lossy[d] |= carried
                todo.append((d, carried))
    return lossy


def _merged(image: dict[int, int]) -> set[int]:
    """Return the states that several states go to."""
    once: set[int] = set()
    return {r for r in image.values() if r in once or once.add(r)}


def _survivors(image: dict[int, int], labels: list[int], kept: set[int]) -> dict[int, int]:
    """Choose, of the labels that go to one state, the one that carries on: itself if it stays."""
    to: dict[int, int] = {}
    used: set[int] = set()
    fixed = [q for q in labels if image.get(q) == q]
    for q in [*fixed, *labels]:
        r = image.get(q)
        if r is not None and r not in used and r in kept:
            to[q] = r
            used.add(r)
    return to


def tiles(
    seen: View, known: Knowledge, carry: bool, cap: int = 200, total: int = 2500, limit: Limit = NO_LIMIT
) -> Layer:
    """Remember a set of states that holds the automaton's: the image of the last event (EM), or carried along (TR)."""
    out: list[list[_Move]] = [[] for _ in range(known.size)]
    for c, x, d, image, whole in known.events(seen, limit):
        if image:
            out[c].append((x, d, image, whole, all(q == r for q, r in image.items())))
    forced: set[tuple[int, int]] = set()  # events that must reset: carrying would merge two tiles
    for _ in range(25):
        limit.check()
        found, clashes = _grow_tiles(seen, known, out, carry, forced, cap, total)
        if not clashes:
            return _tile_layer(seen, known, out, found, carry, forced)
        forced |= clashes
    raise TooLarge


def _moved_tile(tile: frozenset[int], event: _Move, carried: bool, identity_only: bool) -> frozenset[int]:
    """Return a tile after an event (empty if it dies)."""
    _, _, image, whole, identity = event
    if identity_only:
        return tile if identity else whole
    return frozenset([image[q] for q in tile if q in image]) if carried and len(whole) > 1 else whole


def _grow_tiles(seen, known, out, carry, forced, cap, total):
    """Return the tiles that occur at every state of the knowledge, and the events that merge two of them."""
    first = frozenset([seen.start])
    found: list[dict[frozenset[int], None]] = [{} for _ in range(known.size)]
    found[known.start][first] = None
    todo, count = [(known.start, first)], 1
    clashes: set[tuple[int, int]] = set()
    origin: dict[tuple[int, int], dict[frozenset[int], frozenset[int]]] = {}
    while todo:
        c, tile = todo.pop()
        for event in out[c]:
            x, d, _, whole, _ = event
            carried = carry and (c, x) not in forced and (c, x) not in clashes and len(whole) > 1
            moved = _moved_tile(tile, event, carried, not carry)
            if not moved:
                continue
            if carried and origin.setdefault((c, x), {}).setdefault(moved, tile) != tile:
                clashes.add((c, x))
                moved = whole
            if moved not in found[d]:
                found[d][moved] = None
                todo.append((d, moved))
                count += 1
                if count > total or len(found[d]) > cap:
                    raise TooLarge
    return found, clashes


def _tile_layer(seen, known, out, found, carry, forced) -> Layer:
    names: dict[frozenset[int], int] = {}

    def name(tile: frozenset[int]) -> int:
        return names.setdefault(tile, len(names))

    labels = [[name(t) for t in sorted(tiles, key=lambda t: (len(t), sorted(t)))] for tiles in found]
    events: dict[tuple[int, int], Map | Reset] = {(c, x): NOTHING for c, x, *_ in known.events(seen)}
    for c, row in enumerate(out):
        for event in row:
            x, _, _, whole, identity = event
            if not carry and identity:
                events[c, x] = Map({name(t): name(t) for t in found[c]})
            elif carry and (c, x) not in forced and len(whole) > 1:
                moved = ((t, _moved_tile(t, event, True, False)) for t in found[c])
                events[c, x] = Map({name(t): name(m) for t, m in moved if m})
            else:
                events[c, x] = Reset(name(whole))
    return Layer("TR" if carry else "EM", [Block(labels, events, name(frozenset([seen.start])))])


def zeiger(seen: View, known: Knowledge, limit: Limit = NO_LIMIT) -> Layer:
    """Remember a state that the automaton is not in, so that one fewer is possible (Zeiger; Ginzburg 1968, ch. 3)."""
    events: dict[tuple[int, int], Map | Reset] = {}
    for c, x, d, image, values in known.events(seen, limit):
        missed = known.possible[d] - values
        if not image:
            events[c, x] = NOTHING
        elif missed:
            events[c, x] = Reset(min(missed))
        else:
            merged = _merged(image)
            events[c, x] = Map({q: r for q, r in image.items() if r not in merged})
    others = sorted(known.possible[known.start] - {seen.start})
    labels = [sorted(states) for states in known.possible]
    return Layer("zei", [Block(labels, events, others[0] if others else LOST)])


def suffix(length: int) -> Layer:
    """Remember the last letters."""
    return Layer(f"suf{length}", [Register(length)])


def can_end(seen: View, known: Knowledge, limit: Limit = NO_LIMIT) -> bool:
    """Whether a last layer may be a partial injection whose zero vector means death: no event merges live states."""
    return all(len(values) == len(image) for _, _, _, image, values in known.events(seen, limit))
