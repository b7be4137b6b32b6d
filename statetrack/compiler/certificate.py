"""The certificate: why a compiled automaton is right on every word, of any length, in a given arithmetic.

*Symbolic*: the network's discrete states (the 0/1 vector of every head, what the layers know) are searched together
with the automaton's, from the start, over all letters: in every pair that can occur both say the same. *Numeric*: every
operation of every head maps every vector that it may meet to the next one, compared bit by bit, in the arithmetic and
kernel in question. The vectors being exact after a token, they are exact after any number of them.

For registers, which hold more vectors than can be tried, every factor is tried on all values of the coordinates it
touches, the others all 0 and all 1: an untouched coordinate meets only products with zero.

A kernel that runs many tokens in parallel multiplies in another order. *Dyadic*: where every key's entries are dyadic
fractions and its squared length is a power of two, all numbers in a chunk are multiples of 1/16 below 2^12 (see
docs/theory.md), so that no float32 sum rounds, whatever its order. Random words are run in parallel as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from statetrack.compiler.assembly import Stage, readings
from statetrack.compiler.network import StageLayer, Style
from statetrack.compiler.operations import Head, Merge, Operation, Swap

if TYPE_CHECKING:
    from statetrack.compiler.compiled import CompiledAutomaton

MOST_PAIRS = 2_000_000
WORDS, LENGTH = 4, 2048


@dataclass(frozen=True)
class Certificate:
    """What was checked, and whether all of it held."""

    passed: bool
    dtype: str
    backend: str
    pairs: int
    """pairs (network's state, automaton's state) that can occur, all in agreement unless `disagreements`"""
    disagreements: int
    transitions: int
    """operations on vectors, compared bit by bit"""
    inexact: int
    keys: int
    """different keys"""
    rounded: int
    """keys that are not dyadic, so that sums in another order may round"""
    tokens: int
    """random letters run in parallel"""
    wrong: int
    complete: bool
    """whether the pairs were searched to the end"""

    def __str__(self) -> str:
        """Return the certificate as text."""
        searched = "" if self.complete else f" (stopped at {MOST_PAIRS}: not a proof)"
        verdict = "EXACT AT EVERY LENGTH" if self.passed else "NOT EXACT"
        return "\n".join(
            [
                f"{verdict} in {self.dtype}, backend {self.backend}",
                f"  network x automaton: {self.pairs} reachable pairs, {self.disagreements} disagree{searched}",
                f"  operation x vector:  {self.transitions} transitions compared bit by bit, {self.inexact} differ",
                f"  dyadic:              {self.keys} different keys, {self.rounded} not",
                f"  in parallel:         {self.tokens} random letters, {self.wrong} states wrong",
            ]
        )


def certify(compiled: CompiledAutomaton, dtype: torch.dtype, backend: str, device: str) -> Certificate:
    """Check a compiled automaton in one arithmetic."""
    pairs, disagreements, complete = search_pairs(compiled)
    network = compiled.copy_in(dtype, device)
    transitions = inexact = keys = rounded = 0
    for layer, stage in zip(network.layers, compiled.stages, strict=True):
        assert isinstance(layer, StageLayer)
        different = torch.unique(layer.keys.double().flatten(0, -2).cpu(), dim=0)
        keys, rounded = keys + len(different), rounded + int((~dyadic(different)).sum())
        compared, differ = compare_bits(layer, stage, compiled.style, backend)
        transitions, inexact = transitions + compared, inexact + differ
    words = random_words(compiled)
    got = network.states(torch.from_numpy(words).to(device), backend=backend).cpu().numpy()
    wrong = int((got != compiled.automaton.run(words)).sum())
    return Certificate(
        passed=not (disagreements or inexact or rounded or wrong) and complete,
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        pairs=pairs,
        disagreements=disagreements,
        transitions=transitions,
        inexact=inexact,
        keys=keys,
        rounded=rounded,
        tokens=words.size,
        wrong=wrong,
        complete=complete,
    )


# --- symbolic ---------------------------------------------------------------------------------------------------------

Vectors = tuple[tuple[tuple[frozenset[int], ...], ...], ...]  # of every stage, head and column
Symbolic = tuple[tuple[int, ...], tuple[int, ...], Vectors]  # window, known below each stage, vectors


def search_pairs(compiled: CompiledAutomaton) -> tuple[int, int, bool]:
    """Return how many (network, automaton) pairs can occur, in how many they disagree, and whether all were seen."""
    merged, stages = compiled.merged, compiled.stages
    table, emits = merged.table.tolist(), merged.emits.tolist()
    first = compiled.window_stage.start if compiled.window_stage else 0
    below = (first, *(stage.start for stage in stages[:-1]))[: len(stages)]
    vectors = tuple(tuple(head.start for head in stage.heads) for stage in stages)
    start: tuple[Symbolic, int] = (((-1,) * compiled.window, below, vectors), merged.start)
    seen, todo, disagreements = {start}, deque([start]), 0
    while todo:
        symbolic, q = todo.popleft()
        for x in range(merged.alphabet):
            after, code = step(compiled, symbolic, x)
            r = table[q][x]
            said = int(compiled.states_table[code])
            disagreements += emits[said] != emits[r] or said != r
            pair = after, r
            if pair in seen or (code == len(compiled.states_table) - 1 and stays_dead(stages[-1], after[2][-1])):
                continue
            if len(seen) >= MOST_PAIRS:
                return len(seen), disagreements, False
            seen.add(pair)
            todo.append(pair)
    return len(seen), disagreements, True


def step(compiled: CompiledAutomaton, symbolic: Symbolic, x: int) -> tuple[Symbolic, int]:
    """Return the network's discrete state after a letter, and what it then knows."""
    window, below, vectors = symbolic
    known = 0
    if compiled.window_stage:
        window = (*window, x)[1:]
        for table, letter in zip(compiled.window_stage.decoder, reversed(window), strict=True):
            known = int(table[known, letter + 1])
    moved, knew = [], []
    for stage, before, heads in zip(compiled.stages, below, vectors, strict=True):
        columns = tuple(_apply(stage, head, before, x, ones) for head, ones in zip(stage.heads, heads, strict=True))
        knew.append(known)
        known = _decode(stage, known, columns)
        moved.append(columns)
    return (window, tuple(knew), tuple(moved)), known


def _apply(stage: Stage, head: Head, before: int, x: int, columns: tuple) -> tuple[frozenset[int], ...]:
    event = head.letters[before][x]
    if stage.asymmetric:
        return tuple(_apply_factors(stage.asymmetric[event], ones) for ones in columns)
    return tuple(head.operations[event].apply(ones) for ones in columns)


def _apply_factors(factors: list[Swap | Merge], ones: frozenset[int]) -> frozenset[int]:
    for factor in factors:
        q, r = factor.q in ones, factor.r in ones
        kept = ones - {factor.q, factor.r}
        if isinstance(factor, Merge):
            ones = kept | ({factor.r} if q or r else set())
        else:
            ones = kept | ({factor.r} if q else set()) | ({factor.q} if r else set())
    return ones


def _decode(stage: Stage, code: int, heads: tuple[tuple[frozenset[int], ...], ...]) -> int:
    most = max(len(columns) for columns in heads)
    tables = iter(stage.decoder)
    for head, columns in zip(stage.heads, heads, strict=True):
        by_column = [readings(head, ones) for ones in columns]
        for group in range(len(by_column[0])):
            for column in range(most):
                value = by_column[column][group] if column < len(by_column) else 0
                code = int(next(tables)[code, value])
    return code


def stays_dead(last: Stage, heads: tuple[tuple[frozenset[int], ...], ...]) -> bool:
    """Whether no operation changes these vectors of the last stage, and whatever is known below, they say dead."""
    if last.asymmetric:
        return False
    for head, columns in zip(last.heads, heads, strict=True):
        if any(op.apply(ones) != ones for op in head.operations for ones in columns):
            return False
    dead = last.decoder[-1].max()
    return all(_decode(last, code, heads) == dead for code in range(len(last.decoder[0])))


# --- numeric ----------------------------------------------------------------------------------------------------------


def compare_bits(layer: StageLayer, stage: Stage, style: Style, backend: str) -> tuple[int, int]:
    """Return how many (operation, vector) pairs of a stage were run, and how many gave another bit."""
    compared = differ = 0
    row = 0
    for head in stage.heads:
        copies = 1 if stage.asymmetric else style.copies(head)
        vectors = list(_vectors(head))
        events = range(len(stage.asymmetric) or len(head.operations))
        want = [[_after(stage, head, e, ones) for ones in vectors] for e in events]
        size, K = layer.query.shape
        memory = layer.query.new_zeros(len(events), size, K, len(vectors), dtype=torch.float32)
        target = torch.zeros_like(memory)
        for e in events:
            for i, (ones, after) in enumerate(zip(vectors, want[e], strict=True)):
                _set(memory[e, row, :, i], ones, copies)
                _set(target[e, row, :, i], after, copies)
        got = run_operations(layer, len(events), row, memory, backend)
        unequal = (got[:, row] != target[:, row]).any(1)
        compared, differ = compared + unequal.numel(), differ + int(unequal.sum())
        row += len(readings(head, ()))
    return compared, differ


def _vectors(head: Head) -> Iterator[frozenset[int]]:
    """Yield the vectors that a head may hold; for a register, enough of them (see the file's head)."""
    yield frozenset()
    yield from (frozenset([i]) for i in range(head.width))
    if not head.register:
        return
    everything = frozenset(range(head.width))
    touched = {pair for op in head.operations for pair in op.swaps} | {
        (i,) for op in head.operations for i in op.clears
    }
    for coordinates in sorted(touched):
        for bits in product((False, True), repeat=len(coordinates)):
            ones = frozenset(i for i, bit in zip(coordinates, bits, strict=True) if bit)
            yield ones
            yield ones | (everything - set(coordinates))


def _after(stage: Stage, head: Head, event: int, ones: frozenset[int]) -> frozenset[int]:
    if stage.asymmetric:
        return _apply_factors(stage.asymmetric[event], ones)
    operation: Operation = head.operations[event]
    return operation.apply(ones)


def _set(vector: Tensor, ones: frozenset[int], copies: int) -> None:
    for i in ones:
        vector[copies * i : copies * (i + 1)] = 1


def dyadic(keys: Tensor) -> Tensor:
    """Return which keys have entries that are multiples of 1/8 below 8 and a power of two (or 0) as squared length."""
    squared = keys.square().sum(-1)
    short = ((keys * 8).round() == keys * 8).all(-1) & (keys.abs() < 8).all(-1)
    return short & ((torch.frexp(squared).mantissa == 0.5) | (squared == 0))


def run_operations(layer: StageLayer, events: int, row: int, memory: Tensor, backend: str) -> Tensor:
    """Run every operation of one row as one token on its batch of vectors; return the new memory."""
    one = torch.zeros(events, 1, layer.query.shape[0], dtype=torch.long, device=memory.device)
    one[:, 0, row] = torch.arange(events, device=memory.device)
    if layer.asymmetric:
        one[:] = torch.arange(events, device=memory.device)[:, None, None]
    return layer.scan(one, memory, backend)[1]


def random_words(compiled: CompiledAutomaton) -> np.ndarray:
    """Draw words that stay alive as long as they can."""
    automaton, rng = compiled.automaton, np.random.default_rng(0)
    sink = compiled.sink
    live = [[x for x, r in enumerate(row) if r != sink] or list(range(len(row))) for row in automaton.table.tolist()]
    words = np.empty((WORDS, LENGTH), dtype=np.int64)
    for word in words:
        q = automaton.start
        for t, (choice, astray) in enumerate(rng.random((LENGTH, 2)).tolist()):
            letters = live[q] if astray < 0.999 else range(automaton.alphabet)
            word[t] = letters[int(choice * len(letters))]
            q = int(automaton.table[q, word[t]])
    return words
