"""How tokens are cut into chunks: the one place that knows about batches, packing, padding and heads.

Letters: S sequences, C tokens per chunk, N factors per token, H heads, D channels, R rows (chunks in a block).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Consecutive chunks of some sequences, small enough to stay in cache.

    Rows are ordered by step, then by sequence: at step i the first active[i] of `sequences` still have a chunk.
    """

    sequences: slice
    active: tuple[int, ...]
    tokens: Tensor  # [R C] positions in the flattened batch
    padding: Tensor | None  # [R C] True where a row is longer than its sequence

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of x [tokens N H D] as [R H C*N D], zero where there is no token."""
        rows = x.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)
        if self.padding is not None:
            rows[self.padding] = 0
        R, C, N, H, D = rows.shape
        out = torch.empty(R, H, C, N, D, dtype=dtype, device=x.device)
        return out.copy_(rows.permute(0, 3, 1, 2, 4)).view(R, H, C * N, D)

    def scatter(self, out: Tensor, rows: Tensor) -> None:
        """Write rows [R H C*N D] to their places in out [tokens N H D]."""
        R, C = self.tokens.shape
        rows = rows.unflatten(2, (C, -1)).permute(0, 2, 3, 1, 4)
        if self.padding is None:
            out.index_copy_(0, self.tokens.flatten(), rows.to(out.dtype).reshape(R * C, *rows.shape[2:]))
        else:
            out.index_copy_(0, self.tokens[~self.padding], rows[~self.padding].to(out.dtype))

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of every step."""
        return rows.split(self.active)


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
        starts = torch.tensor([0, *self.lengths]).cumsum(0)[torch.tensor(order)]
        lengths = torch.tensor([self.lengths[s] for s in order])
        counts = -(-lengths // self.chunk)
        for first in range(0, len(order), self.rows):
            group = slice(first, min(first + self.rows, len(order)))
            yield from self._blocks_of(group, starts[group], lengths[group], counts[group])

    def _blocks_of(self, group: slice, starts: Tensor, lengths: Tensor, counts: Tensor) -> Iterator[Block]:
        within = torch.arange(self.chunk)
        step, steps = 0, int(counts.max())
        while step < steps:
            active = int((counts > step).sum())
            n = min(steps - step, max(1, self.rows // active))
            rows = [torch.arange(int((counts > s).sum())) for s in range(step, step + n)]
            first = torch.cat(
                [torch.full_like(r, s * self.chunk) for s, r in zip(range(step, step + n), rows, strict=True)]
            )
            sequence = torch.cat(rows)
            position = first[:, None] + within
            padding = position >= lengths[sequence][:, None]
            tokens = torch.where(padding, 0, starts[sequence][:, None] + position)
            active_at = tuple(len(r) for r in rows)
            yield Block(group, active_at, tokens.to(self.device), padding.to(self.device) if padding.any() else None)
            step += n
