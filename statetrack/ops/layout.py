"""How tokens are cut into chunks: the one place that knows about batches, packing, padding and heads.

Letters: S sequences, C tokens per chunk, N factors per token, H heads, D channels, R rows (chunks in a block).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Return `function` such that torch.compile calls it as it is.

    Traced through (torch 2.13), an autograd.Function that works in place gives wrong gradients. torch._dynamo takes
    more than a second to import, so it is not imported for those who never compile.
    """
    disabled: list[Any] = []

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


def untraced_if_packed(function: F) -> F:
    """Return `function` such that torch.compile calls it as it is where it is given cu_seqlens.

    Traced, the sequences' lengths would be constants of the program, which was compiled again for every packing.
    """
    as_it_is = untraced(function)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (function if kwargs.get("cu_seqlens") is None else as_it_is)(*args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Block:
    """Consecutive chunks of some sequences, small enough to stay in cache.

    Rows are ordered by step, then by sequence: at step i the first active[i] of `sequences` still have a chunk.
    """

    sequences: slice
    active: tuple[int, ...]
    chunk: int  # C
    tokens: Tensor | None  # [R C] positions in the flattened batch, where it is no window
    padding: Tensor | None  # [R C] True where a row is longer than its sequence
    window: tuple[slice, slice] | None  # (sequences, tokens) of the batch where the block is just that
    batch: int  # sequences in all

    def gather(self, x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the rows of x [tokens N H D] as [R H C*N D] (in `out` where given), zero where there is no token."""
        N, H, D = x.shape[1:]
        if out is None:
            out = torch.empty(self.rows, H, self.chunk * N, D, dtype=dtype, device=x.device)
        places = out.unflatten(2, (self.chunk, N))
        if self.tokens is None:
            self._rows(places).copy_(self._view(x))
        else:
            rows = x.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)
            if self.padding is not None:
                rows[self.padding] = 0
            places.copy_(rows.permute(0, 3, 1, 2, 4))
        return out

    def scatter(self, out: Tensor, rows: Tensor) -> None:
        """Write rows [R H C*N D] to their places in out [tokens N H D]."""
        rows = rows.unflatten(2, (self.chunk, -1))
        if self.tokens is None:
            self._view(out).copy_(self._rows(rows))
            return
        rows = rows.permute(0, 2, 3, 1, 4)
        if self.padding is None:
            out.index_copy_(0, self.tokens.flatten(), rows.to(out.dtype).flatten(0, 1))
        else:
            out.index_copy_(0, self.tokens[~self.padding], rows[~self.padding].to(out.dtype))

    @property
    def rows(self) -> int:
        """R, the number of chunks."""
        return sum(self.active)

    def _view(self, x: Tensor) -> Tensor:
        """Return the window of x [tokens N H D] as [steps S C N H D]."""
        sequences, tokens = self.window or (slice(0), slice(0))
        part = x.unflatten(0, (self.batch, -1))[sequences, tokens]
        return part.unflatten(1, (len(self.active), -1)).transpose(0, 1)

    def _rows(self, rows: Tensor) -> Tensor:
        """Return rows [R H C N D] as [steps S C N H D]."""
        return rows.unflatten(0, (len(self.active), -1)).permute(0, 1, 3, 4, 2, 5)

    def split(self, *tensors: Tensor | None) -> list[tuple[Any, ...]]:
        """Return, step by step, the parts [alive*H ...] of tensors [R H ...]; None stays None."""
        parts = []
        for x in tensors:
            if x is None:
                parts.append([None] * len(self.active))
            else:
                parts.append(x.flatten(0, 1).split([alive * x.shape[1] for alive in self.active]))
        return list(zip(*parts, strict=True))

    def steps(self) -> list[tuple[slice, int]]:
        """Return, step by step, its rows and how many sequences are alive: consecutive chunks of those."""
        ends = list(accumulate(self.active))
        return [(slice(end - alive, end), alive) for end, alive in zip(ends, self.active, strict=True)]


@dataclass(frozen=True)
class Chunks:
    """Sequences cut into chunks of C tokens, in blocks of at most `rows` chunks where that is possible.

    Sequences are sorted by their number of chunks, so that those alive at any step are a prefix: packed sequences of
    different lengths then run side by side without padding to the longest.
    """

    lengths: list[int]
    chunk: int
    rows: int
    device: torch.device

    @property
    def order(self) -> list[int]:
        """The sequences, longest first."""
        return sorted(range(len(self.lengths)), key=lambda s: -self.lengths[s])

    def blocks(self) -> Iterator[Block]:
        """Yield every block, in an order in which a sequence's chunks come first to last."""
        order = self.order
        starts = torch.tensor([0, *self.lengths]).cumsum(0)[order]
        lengths = torch.tensor(self.lengths)[order]
        counts = -(-lengths // self.chunk)
        for first in range(0, len(order), self.rows):
            group = slice(first, min(first + self.rows, len(order)))
            yield from self._blocks_of(group, starts[group], lengths[group], counts[group])

    def _blocks_of(self, group: slice, starts: Tensor, lengths: Tensor, counts: Tensor) -> Iterator[Block]:
        within = torch.arange(self.chunk)
        step, steps = 0, int(counts.max())
        whole = int(counts[0]) * self.chunk  # tokens of a sequence, if all are equal and need no padding
        alike = all(length == whole for length in self.lengths)
        while step < steps:
            n = min(steps - step, max(1, self.rows // int((counts > step).sum())))
            if alike:
                window = group, slice(step * self.chunk, (step + n) * self.chunk)
                active = (group.stop - group.start,) * n
                yield Block(group, active, self.chunk, None, None, window, len(self.lengths))
                step += n
                continue
            active = (counts > torch.arange(step, step + n)[:, None]).sum(1)
            first = active.cumsum(0) - active  # row at which each step begins
            sequence = torch.arange(int(active.sum())) - first.repeat_interleave(active)
            position = torch.arange(step, step + n).repeat_interleave(active)[:, None] * self.chunk + within
            padding = position >= lengths[sequence][:, None]
            tokens = torch.where(padding, 0, starts[sequence][:, None] + position)
            yield Block(
                sequences=group,
                active=tuple(active.tolist()),
                chunk=self.chunk,
                tokens=tokens.to(self.device),
                padding=padding.to(self.device) if padding.any() else None,
                window=None,
                batch=len(self.lengths),
            )
            step += n


@lru_cache(maxsize=16)
def chunk_tables(lengths: tuple[int, ...], C: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the packed sequences' offsets, their (sequence, chunk) pairs, and each one's first pair."""
    starts, pairs, bases = [0], [], []
    for s, length in enumerate(lengths):
        starts.append(starts[-1] + length)
        bases.append(len(pairs))
        pairs += [(s, c) for c in range(-(-length // C))]
    pairs = torch.tensor(pairs, dtype=torch.int32).view(-1, 2)
    offsets, bases = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, bases))
    return offsets, pairs.to(device), bases
