"""The tasks, by name: `get_task("parity")`, `get_task("S5_swaps", bos=False)`, `get_task("automaton:table.json")`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from statetrack.errors import UsageError
from statetrack.tasks.base import IGNORE, RegularTask, Task
from statetrack.tasks.chomsky import ModularArithmetic, ModularArithmeticBrackets, Parity
from statetrack.tasks.metrics import accuracy, correct, position_accuracy, scaled_accuracy, sequence_accuracy
from statetrack.tasks.word_problems import AutomatonTask, automaton_task, group_task

__all__ = [
    "IGNORE",
    "TASKS",
    "AutomatonTask",
    "RegularTask",
    "Task",
    "accuracy",
    "correct",
    "get_task",
    "position_accuracy",
    "scaled_accuracy",
    "sequence_accuracy",
]

TASKS = {
    "parity": "is the number of ones even? (one answer, at the end)",
    "modular_arithmetic": "sums, differences and products of digits mod 5 (one answer, at the end)",
    "modular_arithmetic_brackets": "the same, bracketed (option mult, on by default)",
    "modular_arithmetic_brackets_no_mult": "bracketed sums and differences only",
    "S3": "product of random elements of the group, after every token; 6 elements",
    "S4": "24 elements",
    "A5": "60 elements",
    "S5": "120 elements",
    "Z60": "60 elements, commutative",
    "S5_swaps": "S5, letters are the identity and the 10 swaps",
    "S5_up_to_3": "S5, letters move at most 3 points (31 letters)",
    "S5_4_tokens": "S5, each letter followed by 3 special tokens",
    "Z60_2_tokens": "Z60, each letter followed by a special token",
    "group:NAME": "any group: Z<n>, S<n>, A<n>, D<n>, products such as 'group:Z2 x S3'; same suffixes",
    "automaton:FILE": "any automaton, a JSON file with table, start and accepting or output",
}
"""What can be asked for, one line each. The suffixes _swaps, _up_to_<m> and _<k>_tokens go with every group."""

_GROUP = re.compile(
    r"(?:group:(?P<spelled>.+?)|(?P<plain>[ZSAD]\d+))"
    r"(?:_(?P<swaps>swaps)|_up_to_(?P<moved>\d+))?"
    r"(?:_(?P<tokens>\d+)_tokens)?"
)


def get_task(name: str, **options: Any) -> Task:
    """Return the task called `name` (see TASKS).

    Options: mult for modular_arithmetic_brackets; supervision ("every" or "last") and bos for groups and automata.
    Raises UsageError for an unknown name or option.
    """
    build, accepted = _find(name)
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        known = ", ".join(accepted) or "none"
        raise UsageError(f"task {name!r} has no option {', '.join(unknown)}; its options: {known}")
    return build(**options)


def _find(name: str) -> tuple[Callable[..., Task], tuple[str, ...]]:
    """Return what builds the task, and the options that it takes."""
    fixed: dict[str, tuple[Callable[..., Task], tuple[str, ...]]] = {
        "parity": (Parity, ()),
        "modular_arithmetic": (ModularArithmetic, ()),
        "modular_arithmetic_brackets": (ModularArithmeticBrackets, ("mult",)),
        "modular_arithmetic_brackets_no_mult": (partial(ModularArithmeticBrackets, mult=False), ()),
    }
    if name in fixed:
        return fixed[name]
    if name.startswith("automaton:"):
        return partial(automaton_task, name.removeprefix("automaton:")), ("supervision", "bos")
    if match := _GROUP.fullmatch(name):
        group = match["spelled"] or match["plain"]
        moved = 2 if match["swaps"] else int(match["moved"]) if match["moved"] else None
        build = partial(group_task, group, moved, int(match["tokens"] or 1), name=name)
        return build, ("supervision", "bos")
    close = difflib.get_close_matches(name, TASKS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UsageError(f"task {name!r} is unknown{hint}; accepted: {', '.join(TASKS)}")
