"""Documents packed into rows of one length, with no padding and no leak from one to another.

A row is T consecutive tokens of a shard. The documents in it, the first and last of which may be cut, are given by
offsets (`cu_seqlens`, FlashAttention's convention): for the model each begins with an empty state, and none predicts
the first token of the next.

Letters: R rows, T tokens per row, S documents in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from statetrack.errors import UsageError
from statetrack.lm.corpus import Shard

IGNORED = -100


class Rows:
    """The rows of a split's files, as a map-style dataset."""

    def __init__(self, shards: Sequence[Shard], length: int):
        if length < 2:
            raise UsageError(f"rows must have at least 2 tokens, got {length}")
        self.length = length
        self.shards = [s for s in shards if len(s.tokens) >= length]
        self._first = np.cumsum([0, *(len(s.tokens) // length for s in self.shards)])
        if not len(self):
            raise UsageError(f"{sum(len(s.tokens) for s in shards)} tokens are not enough for one row of {length}")

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return a row's tokens [T], and the offsets [0, ..., T] of the documents in it."""
        i = int(np.searchsorted(self._first, index, side="right")) - 1
        shard, start = self.shards[i], (index - int(self._first[i])) * self.length
        end = start + self.length
        low, high = np.searchsorted(shard.ends, [start, end], side="right")
        inside = shard.ends[low:high]
        offsets = np.unique(np.concatenate([[0], inside - start, [self.length]]))
        return {"tokens": shard.tokens[start:end], "offsets": offsets}


class Order:
    """The rows in the order in which a run reads them: every epoch a new permutation, decided by the seed alone.

    `count` rows in all, however many epochs that takes; row i of the order can be asked for at once, so a run that is
    resumed, or spread over processes, reads the same rows.
    """

    def __init__(self, rows: Rows, count: int, seed: int):
        self.rows, self.count, self.seed = rows, count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return the row at this place of the order."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        epoch, place = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self.rows[int(self._order[place])]


def pack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Return rows as one batch of packed documents: input_ids and labels [1 R*T], cu_seqlens [S + 1], int32.

    The first token of every document is no label.
    """
    tokens = torch.from_numpy(np.concatenate([row["tokens"] for row in rows]).astype(np.int64))
    before = np.cumsum([0, *(len(row["tokens"]) for row in rows)])
    offsets = np.concatenate([[0], *(row["offsets"][1:] + start for row, start in zip(rows, before, strict=False))])
    cu_seqlens = torch.from_numpy(offsets.astype(np.int32))
    labels = tokens.index_fill(0, cu_seqlens[:-1].long(), IGNORED)
    return {"input_ids": tokens[None], "labels": labels[None], "cu_seqlens": cu_seqlens}


def join(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Return rows as a batch [R T] in which a row's documents follow one another: the state runs on between them."""
    tokens = torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}
