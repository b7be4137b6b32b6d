"""Which numbers occur when a compiled network's factors are computed in chunks: what docs/theory.md proves, measured.

    python benchmarks/chunk_numbers.py

The 55 languages of tests/languages.py, compiled with timeout 0: with integer keys, with unit keys, and with a gate. For
every row of every layer, chunks of 32 factors of random operations follow each other from the row's beginning,
computed as "Many tokens at a time" has it, in float64. Printed: the factors looked at, the largest entry of X, the
largest number, the largest sum of absolute values (which bounds partial sums in every order), and how many numbers are
no multiple of 1/2 (entries of X), of 1/4 (all others), or, in a state after a chunk, neither 0 nor 1. 15 seconds on
one core.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from statetrack import compile
from statetrack.compiler.network import StageLayer
from tests.languages import LANGUAGES

CHUNK, CHUNKS = 32, 4
KINDS = (("householder", "integer"), ("householder", "unit"), ("gated", "integer"))


@dataclass
class Found:
    """What has been seen so far."""

    networks: int = 0
    factors: int = 0
    largest_x: float = 0
    largest: float = 0
    largest_sum: float = 0
    odd: int = 0

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply, and look at the numbers and at the sums of absolute values."""
        self.largest_sum = max(self.largest_sum, float((a.abs() @ b.abs()).max()))
        return self.number(a @ b)

    def number(self, x: Tensor, part: int = 4) -> Tensor:
        """Look at numbers that should be multiples of 1 / part."""
        self.largest = max(self.largest, float(x.abs().max()))
        self.odd += int((x * part != (x * part).round()).sum())
        return x


def follow(layer: StageLayer, row: int, found: Found, generator: torch.Generator) -> None:
    """Run chunks of random operations of one row."""
    operations = int(layer.letters[row].max()) + 1
    state, query = layer.first[row].double(), layer.query[row].double()[None]
    for _ in range(CHUNKS):
        events = torch.randint(operations, (CHUNK,), generator=generator)
        k, v, beta = (t[events, :, row].flatten(0, 1)[:CHUNK].double() for t in (layer.keys, layer.values, layer.beta))
        token = torch.arange(CHUNK) // layer.keys.shape[1]  # of each factor
        first = torch.arange(CHUNK) % layer.keys.shape[1] == 0
        gate = torch.where(first, layer.log_decay[events[token], row].double().exp(), 1)
        since = torch.stack(
            [torch.cat([gate[j + 1 :].new_zeros(j), gate.new_ones(1), gate[j + 1 :].cumprod(0)]) for j in range(CHUNK)],
            1,
        )
        w = beta / k.square().sum(-1)
        lower = found.product(k, k.T).tril(-1) * since * w
        x = inverse(lower, found)
        right = k.norm(dim=-1)[:, None] * v[:, None] - found.product(k, state) * gate.cumprod(0)[:, None]
        u = found.product(x, right)
        found.product(found.product(query, k.T) * since * w, u)
        found.product(query, state)
        state = gate.prod() * state + found.product((k * (since[-1] * w)[:, None]).T, u)
        found.odd += int(((state != 0) & (state != 1)).sum())
        found.factors += CHUNK


def inverse(lower: Tensor, found: Found) -> Tensor:
    """Return (I + lower)^-1, by halves."""
    n = len(lower)
    if n == 1:
        return torch.ones(1, 1).double()
    a, b = inverse(lower[: n // 2, : n // 2], found), inverse(lower[n // 2 :, n // 2 :], found)
    x = torch.zeros_like(lower)
    x[: n // 2, : n // 2], x[n // 2 :, n // 2 :] = a, b
    middle = lower[n // 2 :, : n // 2]
    found.largest_sum = max(found.largest_sum, float((b.abs() @ (middle.abs() @ a.abs())).max()))
    x[n // 2 :, : n // 2] = -found.product(b, found.product(middle, a))
    found.largest_x = max(found.largest_x, float(x.abs().max()))
    return found.number(x, 2)


def main() -> None:
    """Measure and print."""
    found, generator = Found(), torch.Generator().manual_seed(0)
    for make in LANGUAGES.values():
        automaton = make()
        for structure, keys in KINDS:
            network = compile(automaton, structure=structure, keys=keys, timeout=0)
            found.networks += 1
            for layer in network.layers:
                assert isinstance(layer, StageLayer)
                for row in range(len(layer.query)):
                    follow(layer, row, found, generator)
    print(
        f"{found.networks} networks, {found.factors} factors; X at most {found.largest_x:g}, others {found.largest:g},"
    )
    print(f"sums of absolute values {found.largest_sum:g}; {found.odd} numbers of another kind")


if __name__ == "__main__":
    main()
