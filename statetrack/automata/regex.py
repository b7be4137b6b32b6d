r"""Regular expressions to minimal automata: `regex(r"\d+(\.\d+)?")` accepts what `re.fullmatch` accepts.

The passes, in order:
    parse      Python's own parser, so the syntax is exactly that of `re`
    _Network   the parsed pattern as a network: states that read a letter, and free moves between them (Thompson 1968)
    _positions the same without free moves: which reading can follow which (Glushkov 1961)
    regex      subsets of positions as states of the automaton (Rabin and Scott 1959), then `Automaton.minimise`

Anchors are exact wherever they stand. `^` is a free move that is open only before the first letter. `$` and `\Z` are
free moves into a promise about the rest of the text, kept by every later reading: nothing is left, or one newline is.

Legend: L letters, Q states, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from statetrack.automata.automaton import Automaton
from statetrack.automata.exploration import explore
from statetrack.automata.pattern import UNBOUNDED, Spelling, check_flags, parse, readings
from statetrack.errors import UsageError

MAX_READINGS = 10_000  # letters of a pattern whose counted repetitions are written out
MAX_STEPS = 3_000_000  # visits of free moves and of positions: a few seconds

SEARCH = "what they match depends on the order of the search"
REFUSED = {
    "GROUPREF": r"back-references (\1, (?P=name)) describe languages that are not regular",
    "GROUPREF_EXISTS": "conditional groups (?(1)...) depend on what a group has captured, which is not regular",
    "ASSERT 1": "look-ahead (?=...) is not supported",
    "ASSERT_NOT 1": "negative look-ahead (?!...) is not supported",
    "ASSERT -1": "look-behind (?<=...) is not supported",
    "ASSERT_NOT -1": "negative look-behind (?<!...) is not supported",
    "FAILURE": "negative look-ahead (?!...) is not supported",
    "ATOMIC_GROUP": f"atomic groups (?>...) are not supported: {SEARCH}",
    "POSSESSIVE_REPEAT": f"possessive quantifiers (*+, ++, ?+, {{m,n}}+) are not supported: {SEARCH}",
    "AT_BOUNDARY": r"word boundaries (\b) are not supported",
    "AT_NON_BOUNDARY": r"word boundaries (\B) are not supported",
}


def regex(pattern: str, *, alphabet: str | Sequence[str] = "bytes", flags: str = "") -> Automaton:
    r"""Return the minimal automaton that accepts a text if and only if `re.fullmatch(pattern, text)` does.

    alphabet: "bytes" (256 unnamed letters; the pattern is a bytes pattern, `.` any byte but a newline), or the letters,
    as one string ("01") or as a list of names; a name longer than one character is written <name> in the pattern, and
    `.`, `\W` and negated classes range over the letters only. flags: of "i", "s", "x", also inline: (?i), (?s:...).

    Classes such as \w and flag i are ASCII, as with `re.ASCII`. Raises UsageError for a syntax error (with its place),
    for a character that is no letter, also in a range, for what is not regular or not supported, and for patterns that
    grow too large.
    """
    if not isinstance(pattern, str):
        raise UsageError(f"the regex must be a string, got {type(pattern).__name__}; a byte is written as \\xff")
    spelling = Spelling.of(alphabet)
    text = spelling.read(pattern)
    tree, flag_bits = parse(text, flags, spelling)
    try:
        count = readings(tree)
        if count > MAX_READINGS:
            raise UsageError(
                f"the regex {pattern!r:.80} has {count:,} letters once its counted repetitions are written out; "
                f"accepted: at most {MAX_READINGS:,}"
            )
        network = _Network(spelling)
        start = network.sequence(tree, network.final, flag_bits)
    except RecursionError:
        raise UsageError(f"the regex {pattern!r:.80} is nested too deeply") from None
    work = _Work(pattern)
    positions = _positions(network, start, work)
    symbols, class_of = _letter_classes(positions, spelling)
    small = _determinise(positions, symbols, work).minimise()
    return Automaton(small.table[:, class_of], small.start, small.accepting, letters=spelling.names)


@dataclass
class _Work:
    """What has been spent on a pattern, so that one that explodes is refused within seconds."""

    pattern: str
    steps: int = 0

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise UsageError(f"the regex {self.pattern!r:.80} can be read in too many ways; simplify its repetitions")


# --- the network -----------------------------------------------------------------------------------------------------


@dataclass
class _Network:
    """States that read one letter of a set and go on, or move on freely; built backwards, from what comes after."""

    spelling: Spelling
    free: list[list[tuple[int, str]]] = field(default_factory=lambda: [[]])  # (target, anchor or "")
    reads: dict[int, tuple[bytes, int]] = field(default_factory=dict)  # state to (its letters, target)
    final: int = 0

    def sequence(self, tree: Any, after: int, flags: int) -> int:
        """Add the items one after the other, the last leading to `after`; return where to enter."""
        for op, value in reversed(list(tree)):
            after = self.item(op.name, value, after, flags)
        return after

    def item(self, op: str, value: Any, after: int, flags: int) -> int:
        """Add one item that leads to `after`; return where to enter."""
        match op:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                state = self.moves()
                self.reads[state] = (self.spelling.matches(op, value, flags).tobytes(), after)
                return state
            case "BRANCH":
                return self.moves(*(self.sequence(items, after, flags) for items in value[1]))
            case "SUBPATTERN":
                _, added, removed, items = value
                return self.sequence(items, after, (flags | check_flags(added)) & ~removed)
            case "MAX_REPEAT" | "MIN_REPEAT":  # greedy or lazy: the same language
                low, high, items = value
                return self.repeat(low, high, items, after, flags)
            case "AT" if value.name not in REFUSED:
                return self.moves(after, anchor=value.name)
        name = value.name if op == "AT" else f"{op} {value[0]}" if op in ("ASSERT", "ASSERT_NOT") else op
        raise UsageError(f"regex: {REFUSED[name]}")

    def repeat(self, low: int, high: int, items: Any, after: int, flags: int) -> int:
        """Add low..high copies of the items, or a loop where there is no upper bound."""
        if high == UNBOUNDED:
            loop = self.moves(after)
            entry = self.sequence(items, loop, flags)
            self.free[loop].append((entry, ""))
            after, low = (entry, low - 1) if low else (loop, 0)
        else:
            done = after
            for _ in range(high - low):  # x{0,2} is (x(x)?)?, so that every copy can leave at once
                after = self.moves(self.sequence(items, after, flags), done)
        for _ in range(low):
            after = self.sequence(items, after, flags)
        return after

    def moves(self, *targets: int, anchor: str = "") -> int:
        """Add a state with free moves to `targets`."""
        self.free.append([(target, anchor) for target in targets])
        return len(self.free) - 1


# --- positions -------------------------------------------------------------------------------------------------------

ANYTHING, NEWLINE, NOTHING = 0, 1, 2  # what is promised to be left of the text: anything, exactly a newline, nothing
START, FINAL = 0, 1  # the positions before the first letter and after the last


@dataclass
class _Positions:
    """Sets of positions are bit masks. Position p reads one of letters[p]; a position of follow[p] reads the next."""

    letters: list[bytes]
    follow: list[int]


def _positions(network: _Network, start: int, work: _Work) -> _Positions:
    """Number what can be read, a reading under a promise apart, in the order in which a text meets it."""
    number: dict[tuple[int, int], int] = {}  # (reading state, promise)
    positions = _Positions([b"", b""], [0, 0])
    newline = network.spelling.codes == ord("\n")
    seen: dict[tuple[int, int], int] = {}

    def next_positions(state: int, promise: int, at_start: bool) -> int:
        """Return what can be read next, and add it where it is new."""
        mask, reachable = 0, _free_moves(network.free, state, promise, at_start)
        work.spend(len(reachable))
        for reached, left in reachable:
            if reached == network.final and left != NEWLINE:
                mask |= 1 << FINAL
            if reached in network.reads and left != NOTHING:
                if (reached, left) not in number:
                    number[reached, left] = len(positions.letters)
                    letters = np.frombuffer(network.reads[reached][0], dtype=bool)
                    positions.letters.append((letters & newline if left == NEWLINE else letters).tobytes())
                mask |= 1 << number[reached, left]
        return mask

    positions.follow[START] = next_positions(start, ANYTHING, at_start=True)
    while len(number) > len(positions.follow) - 2:
        for state, promise in list(number)[len(positions.follow) - 2 :]:
            after = (network.reads[state][1], NOTHING if promise == NEWLINE else ANYTHING)
            if after not in seen:
                seen[after] = next_positions(*after, at_start=False)
            positions.follow.append(seen[after])
    return positions


def _free_moves(free: list[list[tuple[int, str]]], state: int, promise: int, at_start: bool) -> set[tuple[int, int]]:
    """Return every (state, promise) that free moves reach."""
    stack, seen = [(state, promise)], {(state, promise)}
    while stack:
        state, promise = stack.pop()
        for target, anchor in free[state]:
            if anchor.startswith("AT_BEGINNING"):
                left = [promise] if at_start else []
            elif anchor == "AT_END_STRING":  # \Z
                left = [NOTHING] if promise != NEWLINE else []
            elif anchor == "AT_END":  # $: at the end, or before a newline that ends the text
                left = [NEWLINE, NOTHING] if promise == ANYTHING else [promise]
            else:
                left = [promise]
            fresh = [(target, promised) for promised in left if (target, promised) not in seen]
            seen.update(fresh)
            stack.extend(fresh)
    return seen


def _letter_classes(positions: _Positions, spelling: Spelling) -> tuple[list[int], Int[np.ndarray, "L"]]:
    """Return the positions that read each class of letters (letters no position tells apart), and every letter's class.

    Classes are in the order of their first letters.
    """
    kinds = sorted({*positions.letters[2:], bytes(np.ones(len(spelling.codes), dtype=bool))})
    rows = np.frombuffer(b"".join(kinds), dtype=bool).reshape(len(kinds), len(spelling.codes))
    _, first, class_of = np.unique(rows, axis=1, return_index=True, return_inverse=True)
    order = np.argsort(first)
    readers = dict.fromkeys(kinds, 0)
    for position, letters in enumerate(positions.letters[2:], start=2):
        readers[letters] |= 1 << position
    symbols = [
        sum(readers[kind] for kind, reads in zip(kinds, rows[:, letter], strict=True) if reads)
        for letter in first[order]
    ]
    return symbols, np.argsort(order)[class_of.ravel()]


def _determinise(positions: _Positions, symbols: list[int], work: _Work) -> Automaton:
    """Make every reachable set of positions just read a state; a letter leads to the followers that read it."""

    def successors(subset: int) -> list[int]:
        work.spend(subset.bit_count())
        followers = 0
        for position in _bits(subset):
            followers |= positions.follow[position]
        return [followers & readers for readers in symbols]

    subsets, table = explore(1 << START, successors, f"the automaton of the regex {work.pattern!r:.80}")
    ends = sum(1 << position for position, follow in enumerate(positions.follow) if follow >> FINAL & 1)
    return Automaton(table, accepting=frozenset(q for q, subset in enumerate(subsets) if subset & ends))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
