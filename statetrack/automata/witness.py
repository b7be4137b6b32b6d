"""What shows that a property fails: words that anyone can run through the automaton."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from statetrack.automata.automaton import Automaton
from statetrack.automata.monoid import Monoid, letter_names


@dataclass(frozen=True)
class Witness:
    """Words (as letters of the automaton), and states of the minimal automaton, with a sentence that explains them.

    A cycle: words = (prefix, word), and from states[0], where the prefix leads, the word runs through `states` and
    back. Two idempotents: words = (e, f), or (e, f, i) inside a local monoid, each doing twice what it does once. From
    states[0], e and f (if e f does what e does, and f e what f does; else e f e and f e) lead to states[1] and [2].
    """

    words: tuple[tuple[int, ...], ...]
    states: tuple[int, ...]
    text: str
    period: int | None = None

    def __str__(self) -> str:
        """Return the sentence."""
        return self.text


def spell(automaton: Automaton, word: Sequence[int], longest: int = 60) -> str:
    """Return a word as people write it: letters joined if all are single characters, else with spaces."""
    chosen = [letter_names(automaton)[x] for x in word]
    text = ("" if all(len(name) == 1 for name in chosen) else " ").join(chosen)
    return "the empty word" if not word else f"'{text if len(text) <= longest else text[: longest - 3] + '...'}'"


def access_words(automaton: Automaton) -> list[tuple[int, ...]]:
    """Return a shortest word that leads to each state (all are reachable)."""
    words: dict[int, tuple[int, ...]] = {automaton.start: ()}
    queue, table = deque([automaton.start]), automaton.table.tolist()
    while queue:
        q = queue.popleft()
        for letter, target in enumerate(table[q]):
            if target not in words:
                words[target] = (*words[q], letter)
                queue.append(target)
    return [words[q] for q in range(automaton.states)]


def cycle_witness(m: Monoid, element: int) -> Witness:
    """Show an element's period by the longest cycle of its word."""
    word, cycle = m.word(element), m.cycles(element)[0]
    period = m.period(element)
    words = access_words(m.automaton)
    first = min(range(len(cycle)), key=lambda i: len(words[cycle[i]]))
    cycle = cycle[first:] + cycle[:first]
    prefix = words[cycle[0]]
    shown = [str(q) for q in (*cycle, cycle[0])]
    path = " -> ".join(shown if len(shown) <= 9 else [*shown[:4], "...", *shown[-2:]])
    where = f" from {spell(m.automaton, prefix)}" if prefix else ""
    text = f"the word {spell(m.automaton, word)} has period {period}: repeated{where}, states {path}"
    return Witness((prefix, word), cycle, text, period)


def pair_witness(m: Monoid, elements: tuple[int, ...]) -> Witness:
    """Show two idempotents that differ although each undoes the other, or for which e f e is not f e."""
    e, f = (m.elements[x].astype(np.int64) for x in elements)
    same_image = bool((f[e] == e).all() and (e[f] == f).all())
    left, right = (e, f) if same_image else (e[f[e]], e[f])  # e f e: first e, then f, then e
    q = int(np.argmax(left != right))
    names = [spell(m.automaton, m.word(x)) for x in elements]
    prefix = access_words(m.automaton)[q]
    where = f"after {spell(m.automaton, prefix)}" if prefix else "at the start"
    law = "e f = e, f e = f" if same_image else "e e = e, f f = f"
    apart = "e and f" if same_image else "e f e and f e"
    states = (int(left[q]), int(right[q]))
    text = f"e = {names[0]}, f = {names[1]}: {law}, but {where}, {apart} lead to states {states[0]} and {states[1]}"
    return Witness(tuple(m.word(x) for x in elements), (q, *states), text)


def local_witness(m: Monoid, elements: tuple[int, ...]) -> Witness:
    """Show such a pair e, f inside the local monoid of an idempotent i."""
    found, identity = pair_witness(m, elements[:2]), m.word(elements[2], empty=False)
    text = f"{found.text}; both begin and end like i = {spell(m.automaton, identity)}, i i = i"
    return Witness((*found.words, identity), found.states, text)
