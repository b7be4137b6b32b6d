"""Word problems of groups, and any automaton, as tasks (Grazzi et al., arXiv 2411.12537, section 5.2 and appendix E.2).

Letters are drawn uniformly; the target after every token is the automaton's output, for a group the product so far.

With `tokens_per_letter` = k every letter is followed by k - 1 special tokens that change nothing, and the answer is due
k - 1 tokens later: inputs `x1 $ $ $ x2 $ $ $`, targets `0 0 0 y1 y1 y1 y1 y2` for k = 4.

Vocabulary: the letters, then the special token (k > 1), then BOS. BOS is on by default: the theory has the layer start
from a learnt state, and a first token that is always the same gives that to a layer that starts from zero; the paper
says it is used throughout. Its own position is not supervised, so position t of an accuracy curve is the t-th token. A
length counts tokens without BOS (T = hi + 1). Shorter sequences are padded with letter 0, which is never supervised.

Legend: B batch, T input tokens, t tokens of one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Int

from statetrack.automata import Automaton, parse_group
from statetrack.errors import UsageError
from statetrack.tasks.base import RegularTask, Supervision, check_flag, check_positive, draw_integers


@final
class AutomatonTask(RegularTask):
    """Follow an automaton on uniformly drawn letters."""

    def __init__(
        self,
        name: str,
        automaton: Automaton,
        supervision: Supervision = "every",
        bos: bool = True,
        tokens_per_letter: int = 1,
    ) -> None:
        if supervision not in ("last", "every"):
            raise UsageError(f"supervision={supervision!r} is unknown; accepted: last, every")
        check_flag("bos", bos)
        check_positive("tokens_per_letter", tokens_per_letter)
        answers = len(np.unique(automaton.emits))
        if answers < 2:
            raise UsageError(f"{name}: the automaton says the same in every state; a task needs two answers")
        self.name, self.supervision, self.bos, self.delay = name, supervision, bos, tokens_per_letter - 1
        self.num_outputs, self.chance = automaton.num_outputs, 1 / answers
        self.letters = automaton.alphabet
        idle = ("$",) * (tokens_per_letter > 1) + ("[BOS]",) * bos
        self.automaton = automaton.with_idle_letters(*idle)
        self.vocab_size = self.automaton.alphabet
        names = automaton.letters or tuple(str(letter) for letter in range(self.letters))
        self.symbols = names + idle

    def tokens(self, length: int | Sequence[int]) -> int:
        """Return hi, and one more with BOS."""
        return self.length_range(length)[1] + self.bos

    def draw_ends(self, generator: torch.Generator, batch: int, lo: int, hi: int) -> Int[np.ndarray, "B"]:
        """Lengths uniform in lo..hi, and BOS."""
        return draw_integers(generator, lo, hi, batch) + self.bos

    def draw_tokens(
        self, generator: torch.Generator, position: Int[np.ndarray, "t 1"], ends: Int[np.ndarray, "B"]
    ) -> Int[np.ndarray, "t B"]:
        """Draw uniform letters; put BOS at position 0 and the special token where it belongs."""
        drawn = draw_integers(generator, 0, self.letters - 1, len(position), len(ends))
        place = position[:, 0] - self.bos
        drawn[place % (self.delay + 1) != 0] = self.letters
        drawn[place < 0] = self.vocab_size - 1
        return np.where(position < ends, drawn, 0)


def group_task(
    group: str,
    max_moved: int | None = None,
    tokens_per_letter: int = 1,
    *,
    name: str | None = None,
    supervision: Supervision = "every",
    bos: bool = True,
) -> AutomatonTask:
    """Return the word problem of the group called `group`; max_moved: letters are the elements moving so many points.

    S5 with max_moved=2 has 11 letters (the identity and 10 swaps), with 3 it has 31; the outputs are all 120 elements.
    """
    elements = parse_group(group)
    letters = range(elements.order) if max_moved is None else np.flatnonzero(elements.moved <= max_moved).tolist()
    if len(letters) < 2:
        raise UsageError(f"group {group!r} has no element but the identity that moves at most {max_moved} points")
    automaton = Automaton.from_group(elements, letters)
    return AutomatonTask(name or f"group:{group}", automaton, supervision, bos, tokens_per_letter)


def automaton_task(path: str | Path, *, supervision: Supervision = "every", bos: bool = True) -> AutomatonTask:
    """Return the task of the automaton in a JSON file (`Automaton.from_json`)."""
    return AutomatonTask(f"automaton:{path}", Automaton.from_json(path), supervision, bos)
