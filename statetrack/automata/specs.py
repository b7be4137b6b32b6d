"""What every command and function takes for an automaton: `automaton_of("group:S5")`, `automaton_of(r"\\d+")`, ..."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from statetrack.automata.automaton import Automaton
from statetrack.automata.groups import Group, as_group
from statetrack.automata.presentations import from_presentation
from statetrack.automata.regex import regex
from statetrack.automata.sources import automata_lib_kind, cycles, from_automata_lib, from_permutations, parse_cycles
from statetrack.automata.wrappers import contains, lines
from statetrack.errors import UsageError

if TYPE_CHECKING:
    from sympy.combinatorics import PermutationGroup

MAX_CYCLES = 12  # points
SPECS = {
    "REGEX": "a regular expression in Python's syntax, matched as by re.fullmatch",
    "regex:REGEX": "the same, whatever it begins with",
    "contains:SPEC": "texts with a factor in the language of SPEC",
    "lines:SPEC": "texts of lines, each ended by a newline and in the language of SPEC",
    "FILE.json": "a table written by Automaton.to_json (automaton:FILE where it has another name)",
    "group:NAME": "the word problem of a group: Z60, S5, A5, D7, 'S3 x Z2'; letters are the elements",
    "group:NAME_swaps": "letters are the elements that move at most 2 points (group:NAME_up_to_<m>: m points)",
    "permutations:CYCLES": "the word problem of the group generated, such as 'permutations:(0 1); (0 1 2 3 4)'",
    "presentation:PRESENTATION": "the same, such as 'presentation:x, y | x^4, x^2 y^-2, y^-1 x y x'",
}
"""What can be written as a string, one line each."""


def automaton_of(
    spec: str | Path | Automaton | Group | PermutationGroup | Any,
    *,
    alphabet: str | Sequence[str] = "bytes",
    flags: str = "",
) -> Automaton:
    """Return the minimal automaton of a string (see SPECS), a file, an Automaton, a Group, or an automata-lib object.

    alphabet, flags: those of `regex`, and for regular expressions only.
    """
    kind, rest = _split(spec) if isinstance(spec, str) else ("", "")
    if kind == "regex":
        return regex(rest, alphabet=alphabet, flags=flags)
    if kind in _WRAPPERS:
        return _WRAPPERS[kind](automaton_of(rest, alphabet=alphabet, flags=flags))
    if alphabet != "bytes" or flags:
        raise UsageError(f"alphabet and flags go with a regular expression, not with {spec!r:.60}")
    return (_OTHERS[kind](rest) if kind else _of_object(spec)).minimise()


def _split(spec: str) -> tuple[str, str]:
    """Return the kind of a string and what it is about."""
    kind, colon, rest = spec.partition(":")
    if colon and kind in ("regex", *_WRAPPERS, *_OTHERS):
        return kind, rest
    return ("automaton" if spec.endswith(".json") else "regex"), spec


def _of_object(spec: Any) -> Automaton:
    if isinstance(spec, Automaton):
        return spec
    if isinstance(spec, Path):
        return Automaton.from_json(spec)
    if automata_lib_kind(spec):
        return from_automata_lib(spec)
    if isinstance(spec, Group) or type(spec).__module__.startswith("sympy."):
        return _word_problem(as_group(spec))
    raise UsageError(
        "an automaton is given as a string such as 'a*b' or 'group:S5', a Path, an Automaton, a Group, a sympy "
        f"PermutationGroup, or a DFA or NFA of automata-lib; got {type(spec).__name__}"
    )


def _of_file(path: str) -> Automaton:
    if not path:
        raise UsageError("automaton: needs a file, such as automaton:table.json")
    if not Path(path).exists():
        raise UsageError(f"there is no file {path!r} (to have it read as a regular expression, write regex:{path})")
    return Automaton.from_json(path)


def _of_group(name: str) -> Automaton:
    match = re.fullmatch(r"(.+?)(?:_(swaps)|_up_to_(\d+))?", name.strip())
    if match is None:
        raise UsageError("group: needs a name, such as group:S5")
    return _word_problem(as_group(match[1]), 2 if match[2] else int(match[3]) if match[3] else None)


def _word_problem(group: Group, max_moved: int | None = None) -> Automaton:
    """Return its word problem, over the elements that move at most so many points.

    Letters are called by their cycles, or by their numbers where there are too many points for that.
    """
    letters = np.arange(group.order) if max_moved is None else np.flatnonzero(group.moved <= max_moved)
    automaton = Automaton.from_group(group, letters.tolist())
    rows = group.permutations[letters].tolist()
    names = [
        cycles(row) if len(row) <= MAX_CYCLES else str(element) for element, row in zip(letters, rows, strict=True)
    ]
    return Automaton(automaton.table, output=automaton.output, letters=tuple(names))


_WRAPPERS = {"contains": contains, "lines": lines}
_OTHERS: dict[str, Callable[[str], Automaton]] = {
    "automaton": _of_file,
    "group": _of_group,
    "permutations": lambda text: from_permutations(parse_cycles(text)),
    "presentation": from_presentation,
}
