"""Products of signed decays inside a chunk: exact at 0 and across changes of sign, and no quotient anywhere.

Position 0 is the state before a chunk's first token, position t the state after its token t, and L_ij = a_{j+1} .. a_i
(j <= i) what a write at j has become at i. L is built by multiplication alone, a row from the row above: nothing
overflows, a decay of 0 or 1e-30 needs no special case, and a sign is a sign. A write k_j v_j^T and a read q_i meet in
the score q_i . L_ij k_j. The gradient to a decay is that of its definition, S_t = a_t S_{t-1} + ..,

    dL/da_t = <dS_t, S_{t-1}> = sum_{i >= t > j} L_it (read_i, write_j) L_{t-1,j},

the sum over all pairs that the decay stands between, where the state at the chunk's start counts as a write at position
0 and the gradient to the state at its end as a read at position C.

Letters: R rows (chunks), H heads, G = R H, C tokens per chunk, K key dim, X reads and Y writes per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_BYTES = 1 << 20  # of one [G C C K] temporary


def key_chunk(width: int) -> int:
    """Return how many tokens a chunk should have with a decay per key channel: pairs cost C^2 K, states K V."""
    return min(16, max(4, width // 8))


def between(decay: Tensor) -> Tensor:
    """Return L [... C+1 C+1 E], zero above the diagonal, from the decays [... C E]."""
    C, E = decay.shape[-2:]
    L = decay.new_zeros(*decay.shape[:-2], C + 1, C + 1, E)
    L.diagonal(dim1=-3, dim2=-2).fill_(1)
    for i in range(1, C + 1):
        torch.mul(L[..., i - 1, :i, :], decay[..., i - 1 : i, :], out=L[..., i, :i, :])
    return L


class HeadProducts:
    """One decay per head and token, [R H C 1]: a score is a dot product times an entry of L [R H C+1 C+1]."""

    def __init__(self, decay: Tensor):
        self._L = between(decay).squeeze(-1)
        self.start = self._L[:, :, 1:, :1]  # [R H C 1] from the chunk's start to each read
        self.end = self._L[:, :, -1, 1:, None]  # [R H C 1] from each write to its end
        self.total = self._L[:, :, -1:, :1]  # [R H 1 1]

    def scores(self, reads: Tensor, writes: Tensor) -> Tensor:
        """Return the scores [R H C C] of reads and writes [R H C K], zero where the read comes before the write."""
        return (reads @ writes.mT).mul_(self._L[:, :, 1:, 1:])

    def backward(
        self, d_scores: Tensor, reads: Tensor, writes: Tensor, d_start: Tensor, d_end: Tensor, carried: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients to reads, writes and decays.

        d_start [R H C K] is the gradient to start * reads, d_end to end * writes, carried [R H K] the product of the
        state at the chunk's start and the gradient to the state at its end, summed over V.
        """
        L, C = self._L, reads.shape[2]
        pairs = L.new_zeros(L.shape)
        pairs[:, :, 1:, 1:] = d_scores * (reads @ writes.mT)
        pairs[:, :, 1:, 0] = (reads * d_start).sum(-1)
        pairs[:, :, C, 1:] += (writes * d_end).sum(-1)
        pairs[:, :, C, 0] += carried.sum(-1)
        d_decay = ((pairs @ L.mT)[..., :-1] * L[..., 1:]).sum(2).unsqueeze(-1)
        d_scores = d_scores * L[:, :, 1:, 1:]
        d_reads = torch.addcmul(d_scores @ writes, self.start, d_start)
        d_writes = torch.addcmul(d_scores.mT @ reads, self.end, d_end)
        return d_reads, d_writes, d_decay


class KeyProducts:
    """One decay per head, token and key channel, [R H C K]: L differs by channel, so its tiles are made piece by piece.

    A token may have several reads and writes: they are [R H C*X K] and [R H C*Y K], those of a token side by side.
    """

    def __init__(self, decay: Tensor):
        self._decay = decay
        self.start = decay.cumprod(2)
        after = torch.cat([decay[:, :, 1:], torch.ones_like(decay[:, :, :1])], dim=2)
        self.end = after.flip(2).cumprod(2).flip(2)
        self.total = self.start[:, :, -1:].mT  # [R H K 1]

    def scores(self, reads: Tensor, writes: Tensor) -> Tensor:
        """Return the scores [R H C*X C*Y], zero where the read comes before the write."""
        C = self._decay.shape[2]
        out = reads.new_empty(reads.shape[0] * reads.shape[1], reads.shape[2], writes.shape[2])
        reads, writes = self._tokens(reads), self._tokens(writes)
        for piece, L in self._pieces():
            tiles = _tiles(L[:, 1:, 1:], writes[piece])
            torch.matmul(reads[piece], tiles.flatten(2, 3).mT, out=out[piece].unflatten(1, (C, -1)))
        return out.unflatten(0, self._decay.shape[:2])

    def backward(
        self, d_scores: Tensor, reads: Tensor, writes: Tensor, d_start: Tensor, d_end: Tensor, carried: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients to reads, writes and decays; for the arguments see `HeadProducts.backward`."""
        C, K = self._decay.shape[2:]
        X, Y = reads.shape[2] // C, writes.shape[2] // C
        d_reads, d_writes, d_decay = torch.empty_like(reads), torch.empty_like(writes), torch.empty_like(self._decay)
        r, w, d = self._tokens(reads), self._tokens(writes), d_scores.flatten(0, 1)
        for piece, L in self._pieces():
            L_inner, dp = L[:, 1:, 1:], d[piece]
            tiles = _tiles(L_inner, w[piece]).flatten(2, 3)  # [g i j*Y K]
            self._tokens(d_reads)[piece] = dp.unflatten(1, (C, X)) @ tiles
            tiles = _tiles(L_inner.transpose(1, 2), r[piece]).flatten(2, 3)  # [g j i*X K]
            self._tokens(d_writes)[piece] = dp.mT.unflatten(1, (C, Y)) @ tiles
            before = L[:, :-1, 1:].transpose(1, 2).unsqueeze(2) * w[piece].unsqueeze(3)  # [g j Y t K]
            reached = (dp @ before.flatten(1, 2).flatten(2)).view(-1, C, X, C, K)  # [g i X t K]
            reached = reached.mul_(r[piece].unsqueeze(3)).sum(2)
            d_decay.flatten(0, 1)[piece] = reached.mul_(L_inner).sum(1)
        self._add_edges(d_decay, self._sum(reads * d_start), self._sum(writes * d_end), carried)
        d_reads.unflatten(2, (C, X)).addcmul_(self.start.unsqueeze(3), d_start.unflatten(2, (C, X)))
        d_writes.unflatten(2, (C, Y)).addcmul_(self.end.unsqueeze(3), d_end.unflatten(2, (C, Y)))
        return d_reads, d_writes, d_decay

    def _add_edges(self, d_decay: Tensor, reads: Tensor, writes: Tensor, seen: Tensor) -> None:
        """Add the pairs of a read with the state at the chunk's start, and of a write with the one at its end."""
        a, C = self._decay, self._decay.shape[2]
        for t in range(C):
            d_decay[:, :, t].addcmul_(self.end[:, :, t], seen)
            seen = torch.addcmul(writes[:, :, t], a[:, :, t], seen)
        later = torch.zeros_like(seen)
        for t in reversed(range(C)):
            later = later + reads[:, :, t]
            d_decay[:, :, t] += later * self.start[:, :, t - 1] if t else later
            later = later * a[:, :, t]

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (part of the G rows and heads, L [g C+1 C+1 K] of that part)."""
        decay = self._decay.flatten(0, 1)
        G, C, K = decay.shape
        size = max(1, TILE_BYTES // max(1, C * C * K * decay.element_size()))
        for g in range(0, G, size):
            piece = slice(g, g + size)
            yield piece, between(decay[piece])

    def _tokens(self, x: Tensor) -> Tensor:
        """Return [R H C*X K] as [G C X K]."""
        return x.flatten(0, 1).unflatten(1, (self._decay.shape[2], -1))

    def _sum(self, x: Tensor) -> Tensor:
        """Return the sum over a token's reads or writes [R H C*X K] as [R H C K]."""
        return x.unflatten(2, (self._decay.shape[2], -1)).sum(3)


def _tiles(L: Tensor, x: Tensor) -> Tensor:
    """Return L [g i j K] times x [g j Y K], as [g i j Y K]."""
    return L.unsqueeze(3) * x.unsqueeze(1)
