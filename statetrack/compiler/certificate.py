"""The certificate: why a compiled automaton is right on every word, of any length, in a given arithmetic.

*Symbolic* (discrete.py): if the arithmetic is exact, the network is a finite automaton on 0/1 vectors. All pairs of
its states and the automaton's that can occur are searched: in each, both say the same.

*Numeric*: every operation of every head is run on the zero vector and on every unit vector, in the arithmetic and
kernel in question, and the memory and the reading compared bit by bit. Most heads hold no other vector. A register
does, but an operation is an affine map, which these vectors determine, as long as nothing is rounded:

*Factors*: every factor is one of few kinds, entry by entry: it exchanges two coordinates, clears or writes one, merges
one into another (`dplr`), or does nothing; with keys of length 1, on both copies of a coordinate alike. For these
docs/theory.md proves that all numbers in a chunk of up to 362 factors, sums included, are multiples of 1/64 below 2^18.
Those are float32 numbers: nothing is rounded, in whatever order a kernel sums, so that many tokens in parallel give the
same as one after the other. A token of more factors is proved for the reference alone, which takes one at a time.
Random words are run in parallel as well, which is a test of the kernel.

Vectors exact after a token are exact after any number of them: a proof for every length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from statetrack.compiler.assembly import Stage, reading, rows_of
from statetrack.compiler.discrete import Search, StageWalk, random_words
from statetrack.compiler.network import MapLayer, StageLayer
from statetrack.compiler.operations import Head, Style

if TYPE_CHECKING:
    from statetrack.compiler.compiled import CompiledAutomaton

MOST = 362  # factors of a chunk for which the proof holds: 2 M^2 < 2^18
WORDS, LONGEST, SHORTEST = 4, 2048, 128
WORK = 1 << 23  # numbers in the keys of the random words
COLUMNS = 128  # vectors side by side in one call of an op


class Comparison(NamedTuple):
    """The numeric half: single operations on vectors, bit by bit, and the factors that they are made of."""

    transitions: int
    """operations on vectors, compared bit by bit"""
    inexact: int
    factors: int
    """of all operations"""
    others: int
    """factors of none of the kinds that are exact in a chunk"""


@dataclass(frozen=True)
class Certificate:
    """What was checked, and whether all of it held."""

    dtype: str
    backend: str
    search: Search
    comparison: Comparison
    tokens: int
    """random letters run in parallel"""
    wrong: int
    beyond: int = 0
    """factors that a token takes and that a chunk holds at once, where these are too many for the proof"""

    @property
    def passed(self) -> bool:
        """Whether it is a proof."""
        return self.search.complete and not self.wrongs and not self.beyond

    @property
    def wrongs(self) -> int:
        """How much was found to be wrong."""
        return self.search.disagreements + self.comparison.inexact + self.comparison.others + self.wrong

    def __str__(self) -> str:
        """Return the certificate as text."""
        verdict = "EXACT AT EVERY LENGTH" if self.passed else "NOT EXACT" if self.wrongs else "NOT PROVED"
        large = f"; {self.beyond} in one token, proved for {MOST} at most (but by reference)" * (self.beyond > 0)
        transitions, inexact, factors, others = self.comparison
        return "\n".join(
            [
                f"{verdict} in {self.dtype}, backend {self.backend}",
                f"  {self.search}",
                f"  operation x vector:  {transitions} transitions compared bit by bit, {inexact} differ",
                f"  factors:             {factors} in all operations, {others} that a chunk may round{large}",
                f"  in parallel:         {self.tokens} random letters, {self.wrong} states wrong",
            ]
        )


def certify(compiled: CompiledAutomaton, dtype: torch.dtype, backend: str, device: str) -> Certificate:
    """Check a compiled automaton in one arithmetic: its own symbolic half, then its numbers, then random words."""
    search, network = compiled.search(), compiled.copy_in(dtype, device)
    comparison, (tokens, wrong) = network.compare(backend), run_random_words(network, backend)
    most = max(network.factors, default=0)
    one_by_one = backend == "reference" or network.blueprint.structure == "dplr"  # there a factor is a step of its own
    beyond = most if most > MOST and not one_by_one else 0
    return Certificate(str(dtype).removeprefix("torch."), backend, search, comparison, tokens, wrong, beyond)


def run_random_words(network: CompiledAutomaton, backend: str) -> tuple[int, int]:
    """Run random words in parallel, fewer the more numbers a token takes; return how many letters, how many wrong."""
    cost = sum(factors * width for factors, width in zip(network.factors, network.widths, strict=True))
    length = max(SHORTEST, min(LONGEST, WORK // (WORDS * max(1, cost))))
    words = random_words(network.automaton, WORDS, length)
    got = network.states(torch.from_numpy(words).to(network.classes.device), backend=backend).cpu().numpy()
    return words.size, int((got != network.automaton.run(words)).sum())


def compare_stages(network: CompiledAutomaton, backend: str) -> Comparison:
    """Compare the operations of all stages, and look at their factors."""
    found = []
    for layer, stage in zip(network.layers, network.stages, strict=True):
        assert isinstance(layer, StageLayer)
        found.append((*compare_bits(layer, stage, network.style, backend), *count_factors(layer, stage, network.style)))
    return Comparison(*map(sum, zip((0, 0, 0, 0), *found, strict=True)))


def count_factors(layer: StageLayer, stage: Stage, style: Style) -> tuple[int, int]:
    """Return how many factors a stage's operations have, and how many of them are of no kind that is exact."""
    if isinstance(layer, MapLayer):
        good = are_maps(layer.keys.float(), layer.b.float())
        return good.numel(), int((~good).sum())
    found = []
    for r, (head, _) in enumerate(rows_of(stage)):
        made = slice(len(head.operations))
        key, value, beta = (t[made, :, r].float() for t in (layer.keys, layer.values, layer.beta))
        found.append(are_moves(key, value, beta, style.copies(head)))
    good = torch.cat([one.flatten() for one in found])
    decays = layer.log_decay.float()
    return good.numel(), int((~good).sum()) + int(((decays != 0) & (decays != -torch.inf)).sum())


def are_moves(key: Tensor, value: Tensor, beta: Tensor, copies: int) -> Tensor:
    """Return which factors I - beta kh kh^T exchange two coordinates, clear or write one, or do nothing.

    An exchange has the same entry, 1 / copies or -1 / copies, at all copies of a coordinate; a clear has one entry.
    """
    pairs = key[..., : key.shape[-1] // copies * copies].unflatten(-1, (-1, copies))
    entries = pairs.sum(-1)
    alike = (pairs == pairs[..., :1]).flatten(-2).all(-1) & (key.abs().sum(-1) == 2)
    swap = alike & _unit(entries.clamp(min=0)) & _unit(-entries.clamp(max=0)) & (beta == 2) & (value == 0)
    clear = _unit(key) & (beta == 1) & ((value == 0) | (value == 1))
    return swap | clear | (beta == 0)


def are_maps(a: Tensor, b: Tensor) -> Tensor:
    """Return which factors I + b a^T exchange two coordinates, merge one into another, or do nothing."""
    swap = _unit(a.clamp(min=0)) & _unit(-a.clamp(max=0)) & (b == -a).all(-1)
    return swap | _unit(a) & _unit(a + b) | ((a == 0) & (b == 0)).all(-1)


def _unit(x: Tensor) -> Tensor:
    """Return which vectors are unit vectors."""
    return ((x == 0) | (x == 1)).all(-1) & (x.sum(-1) == 1)


def compare_bits(layer: StageLayer, stage: Stage, style: Style, backend: str) -> tuple[int, int]:
    """Return how many (operation, vector) pairs of a stage were run, and how many gave another bit anywhere."""
    walk = StageWalk(stage, layer)
    vectors = [list(_vectors(head)) for head, _ in walk.rows]
    tried = [len(some) for some in vectors]
    counts = [len(stage.asymmetric) or len(head.operations) for head, _ in walk.rows]
    E, R, K, V = max(counts), len(walk.rows), layer.query.shape[1], max(tried)
    memory, want, said = torch.zeros(E, R, V, K), torch.zeros(E, R, V, K), torch.zeros(E, R, V)
    for r, (head, weights) in enumerate(walk.rows):
        copies = 1 if stage.asymmetric else style.copies(head)
        vectors[r] += [frozenset()] * (V - tried[r])
        _fill(memory[:, r], [vectors[r]] * E, copies)
        after = [[walk.apply(r, e, ones) for ones in vectors[r]] for e in range(counts[r])]
        after += [after[0]] * (E - counts[r])
        _fill(want[:, r], after, copies)
        said[:, r] = torch.tensor([[reading(weights, ones) for ones in row] for row in after])
    device = layer.query.device
    events = torch.arange(E, device=device)[:, None].clamp(max=torch.tensor(counts, device=device) - 1)
    for r, count in enumerate(counts):
        events[count:, r] = 0  # as `after` has it
    differ = _first_differs(layer, walk, copies=[1 if stage.asymmetric else style.copies(h) for h, _ in walk.rows])
    for part in range(0, V, COLUMNS):
        some = slice(part, part + COLUMNS)
        o, got = layer.scan(events[:, None], memory[:, :, some].mT.contiguous().to(device), backend)
        unequal = (got.mT.cpu() != want[:, :, some]).any(-1) | (o[:, 0].cpu() != said[:, :, some])
        differ += int(unequal.sum())
    return sum(count * some for count, some in zip(counts, tried, strict=True)), differ


def _first_differs(layer: StageLayer, walk: StageWalk, copies: list[int]) -> int:
    """Return how many rows do not begin with the vectors that they should."""
    want = torch.zeros_like(layer.first, dtype=torch.float32, device="cpu").mT.contiguous()  # [R V K]
    for r, (head, _) in enumerate(walk.rows):
        _fill(want[r : r + 1], [list(head.start)], copies[r])
    return int((layer.first.float().cpu().mT != want).any(-1).any(-1).sum())


def _vectors(head: Head) -> Iterator[frozenset[int]]:
    """Yield the vectors that a head may hold; for a register, those that determine an affine map, and some more."""
    yield frozenset()
    yield from (frozenset([i]) for i in range(head.width))
    if not head.register:
        return
    everything = frozenset(range(head.width))
    touched = {pair for op in head.operations for pair in op.swaps}
    touched |= {(i,) for op in head.operations for i in op.clears}
    for coordinates in sorted(touched):
        for bits in product((False, True), repeat=len(coordinates)):
            yield everything - set(coordinates) | {i for i, bit in zip(coordinates, bits, strict=True) if bit}


def _fill(out: Tensor, vectors: list[list[frozenset[int]]], copies: int) -> None:
    """Set out [E V K] to vectors, every coordinate `copies` times."""
    places = [
        (e, v, copies * i + copy)
        for e, row in enumerate(vectors)
        for v, ones in enumerate(row)
        for i in ones
        for copy in range(copies)
    ]
    if places:
        out[tuple(torch.tensor(places).T)] = 1
