"""A long sequence with few beside it is cut into segments that run side by side.

What a head's operations do to its vector over a segment is an affine map, u -> A u + c, and so is every reading on the
way. So each segment is run from all unit vectors and zero at once, as columns of one memory; what it gives for its true
start is a sum of what it gives for these (docs/theory.md, "Many segments at a time").

Letters: B batch, T tokens, P segments, R rows (one per head and reading), K key dim, W coordinates of the widest head,
V value dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

FEW, ROWS, SEGMENT, WIDEST = 16, 4096, 64, 40
"""So many sequences are cut into segments, so many of these side by side; the shortest; the widest head"""

Scan = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From operations [B T ...] and the memory before them [B R K V] to readings [B T R V] and the memory after them."""


class Units(nn.Module):
    """The unit vectors of every row, every coordinate with its copies, and last zero; not saved."""

    vectors: Float[Tensor, "R K W_plus_1"]
    places: Int[Tensor, "R W"]

    def __init__(self, key_dim: int, rows: list[tuple[int, int]]):
        """rows: the coordinates of each, and how often the memory has each coordinate."""
        super().__init__()
        widest = max(width for width, _ in rows)
        vectors, places = torch.zeros(len(rows), key_dim, widest + 1), torch.zeros(len(rows), widest, dtype=torch.long)
        for r, (width, n) in enumerate(rows):
            vectors[r, : n * width, :width] = torch.eye(width).repeat_interleave(n, dim=0)
            places[r, :width] = n * torch.arange(width)
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("places", places, persistent=False)

    @property
    def number(self) -> int:
        """How many vectors a segment is run from."""
        return self.vectors.shape[-1]

    def scan_segments(
        self, scan: Scan, events: Int[Tensor, "B T *rest"], memory: Float[Tensor, "B R K V"]
    ) -> tuple[Float[Tensor, "B T R V"], Float[Tensor, "B R K V"]]:
        """Return what `scan` does, having cut long sequences into segments."""
        (B, T), K = events.shape[:2], memory.shape[2]
        P = min(ROWS // B, T // SEGMENT) if B <= FEW and K <= WIDEST else 1
        if P <= 1:
            return scan(events, memory)
        length, units = T // P, self.vectors.float().expand(B * P, *self.vectors.shape).contiguous()
        o, ends = scan(events[:, : P * length].reshape(B * P, length, *events.shape[2:]), units)
        o, ends = o.float(), ends.float().unflatten(0, (B, P))
        starts, last = follow_segments(self._coordinates(ends), self._coordinates(memory.float()))
        read = o[..., -1:] + torch.einsum("nlrw,nrwv->nlrv", o[..., :-1] - o[..., -1:], starts.flatten(0, 1))
        read, memory = read.reshape(B, P * length, *read.shape[2:]), self.vectors[..., :-1].float() @ last
        if P * length == T:
            return read, memory
        rest, memory = scan(events[:, P * length :], memory)
        return torch.cat([read, rest], dim=1), memory

    def _coordinates(self, memory: Float[Tensor, "*batch R K V"]) -> Float[Tensor, "*batch R W V"]:
        """Return a memory in terms of the unit vectors: the first of each coordinate's copies."""
        index = self.places[..., None].expand(*memory.shape[:-2], -1, memory.shape[-1])
        return memory.gather(-2, index)


def follow_segments(
    ends: Float[Tensor, "B P R W W_plus_1"], memory: Float[Tensor, "B R W V"]
) -> tuple[Float[Tensor, "B P R W V"], Float[Tensor, "B R W V"]]:
    """Return the memory before every segment, and after the last.

    ends: where each segment takes the unit vectors and, last, zero. Maps are composed by doubling.
    """
    linear, constant = ends[..., :-1] - ends[..., -1:], ends[..., -1:]
    step, P = 1, ends.shape[1]
    while step < P:
        after, before = linear[:, step:], slice(None, -step)
        constant = torch.cat([constant[:, :step], after @ constant[:, before] + constant[:, step:]], dim=1)
        linear = torch.cat([linear[:, :step], after @ linear[:, before]], dim=1)
        step *= 2
    reached = linear @ memory[:, None] + constant
    return torch.cat([memory[:, None], reached[:, :-1]], dim=1), reached[:, -1]
