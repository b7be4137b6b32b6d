"""Sequences of different lengths packed along T: where each begins, and what lies before its tokens.

Letters: S sequences, T tokens of them all, P earlier inputs that a state keeps, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from statetrack.ops.checks import sequence_lengths


@dataclass(frozen=True)
class Packing:
    """The tables of one packing, made once and read by every layer."""

    cu_seqlens: Int[Tensor, "S_plus_1"]
    """offsets [0, ..., T] on the CPU, where the ops read them without waiting for a GPU"""
    starts: Int[Tensor, "S"]
    lengths: Int[Tensor, "S"]
    position: Int[Tensor, "T"]
    """of every token in its sequence"""
    sequence: Int[Tensor, "T"]
    """the number of every token's sequence"""

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, "S_plus_1"], tokens: Tensor) -> Packing:
        """Return the tables of tokens [1 T ...]; raise UsageError where the offsets do not fit."""
        offsets = cu_seqlens.to("cpu")
        sequence_lengths(offsets, *tokens.shape[:2])
        edges = offsets.to(tokens.device, torch.long)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        sequence = torch.searchsorted(edges[1:], index, right=True)
        return cls(offsets, edges[:-1], edges.diff(), index - edges[sequence], sequence)

    def spans(self) -> list[tuple[int, int]]:
        """Return the first and the last plus one token of every sequence."""
        edges = self.cu_seqlens.tolist()
        return list(zip(edges[:-1], edges[1:], strict=True))

    def shift(
        self, x: Float[Tensor, "1 T D"], before: Float[Tensor, "S P D"] | None, by: int = 1
    ) -> Float[Tensor, "1 T D"]:
        """Return, for every token, the input `by` tokens earlier in its sequence; `before` (or zeros) precede it."""
        T = x.shape[1]
        y = torch.where((self.position >= by)[:, None], F.pad(x, (0, 0, by, 0))[:, :T], x.new_zeros(()))
        if before is None or T == 0:
            return y
        first = torch.arange(by, device=x.device)
        rows = torch.where((first < self.lengths[:, None])[..., None], before[:, before.shape[1] - by :], 0)
        places = (self.starts[:, None] + first).clamp(max=T - 1)
        return y.index_add(1, places.flatten(), rows.flatten(0, 1)[None].to(y.dtype))

    def tail(
        self, x: Float[Tensor, "1 T D"], before: Float[Tensor, "S P D"] | None, count: int
    ) -> Float[Tensor, "S P D"]:
        """Return the last `count` inputs of every sequence, counting `before` (or zeros)."""
        if before is None:
            before = x.new_zeros(len(self.starts), count, x.shape[-1])
        if x.shape[1] == 0:
            return before
        back = self.lengths[:, None] - count + torch.arange(count, device=x.device)  # negative: still in `before`
        new = x[0][(self.starts[:, None] + back).clamp(0, x.shape[1] - 1)]
        old = before.gather(1, (back + count).clamp(max=count - 1)[..., None].expand_as(before))
        return torch.where((back >= 0)[..., None], new, old.to(new.dtype))


def offsets(packing: Packing | None) -> Tensor | None:
    """Return the cu_seqlens that an op gets."""
    return None if packing is None else packing.cu_seqlens


def count_sequences(x: Tensor, packing: Packing | None) -> int:
    """Return how many sequences x [B T ...] holds."""
    return x.shape[0] if packing is None else len(packing.starts)


def shifted(
    x: Float[Tensor, "B T D"], last: Float[Tensor, "S D"] | None, packing: Packing | None = None
) -> Float[Tensor, "B T D"]:
    """Return every token's predecessor, that of a sequence's first being `last`, or zero."""
    if packing is not None:
        return packing.shift(x, None if last is None else last.unsqueeze(1))
    if x.shape[1] == 0:
        return x
    before = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.to(x.dtype).unsqueeze(1)
    return torch.cat([before, x[:, :-1]], dim=1)


def last_input(
    x: Float[Tensor, "B T D"], last: Float[Tensor, "S D"] | None, packing: Packing | None
) -> Float[Tensor, "S D"]:
    """Return every sequence's last token; `last` where it has none."""
    if packing is None:
        return x[:, -1]
    return packing.tail(x, None if last is None else last.unsqueeze(1), 1).squeeze(1)


def one_by_one(
    run: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Float[Tensor, "1 T D"], state: Any, packing: Packing
) -> tuple[Tensor, Any]:
    """Run a recurrence that has no packed form over the sequences in turn; `state` is a tuple of tensors [S ...]."""
    outputs, states = [], []
    for s, (start, end) in enumerate(packing.spans()):
        y, new = run(x[:, start:end], type(state)(*(part[s : s + 1] for part in state)))
        outputs.append(y)
        states.append(new)
    return torch.cat(outputs, dim=1), type(state)(*(torch.cat(parts) for parts in zip(*states, strict=True)))
