"""Decays inside a chunk: products of per-token decays between any two of its tokens, without overflow.

With g_t = sum of log_decay up to and including token t of the chunk, every factor used is exp(g_i - g_j) with j <= i,
the product of the decays after j up to i. A decay of exactly 0 (log_decay = -inf) is counted, not summed: a product
that crosses it is exactly 0, any other is unaffected by it.

Each class holds the keys and queries of some chunks and offers: `into`, both times the decay since the chunk's start
(they read its state); `out`, the keys times the decay to its end (they write its next state); `total`, the decay of
the whole chunk; `scores()`, the products of keys and queries with earlier keys times the decay between them.

Letters: R rows (chunks), H heads, C tokens per chunk, N factors per token, M = C N, K key dim; E = 1 (one decay per
head) or K (one per key channel).
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY_LOG = {torch.float32: -104.0, torch.float64: -746.0}  # exp of anything below is 0
SUB = 16  # tokens per sub-block of KeyDecay
MILD = 16.0  # e^16 times anything in use neither overflows nor, inverted, underflows


def decayed(kq: Tensor, k: Tensor, log_decay: Tensor | None) -> MildDecay | HeadDecay | KeyDecay:
    """Return the products of keys and queries kq [R H M+C K] with keys k [R H M K] under log_decay [R H C E]."""
    if log_decay is None:
        return MildDecay(kq, k, None, None)
    reset = log_decay < TINY_LOG[kq.dtype]
    g = log_decay.masked_fill(reset, 0).double().cumsum(2)  # so that differences keep float32 accuracy
    if not reset.any() and (g.numel() == 0 or g.abs().max() < MILD):
        return MildDecay(kq, k, g, reset)
    kind = HeadDecay if log_decay.shape[-1] == 1 else KeyDecay
    return kind(kq, k, g, reset)


class MildDecay:
    """No decay, or decays whose product over a chunk is at least e^-MILD: products between tokens are quotients.

    Both sides are scaled, so that a decay per head or per key channel costs one matrix product.
    """

    def __init__(self, kq: Tensor, k: Tensor, g: Tensor | None, reset: Tensor | None):
        self.into, self.out, self.total, self.reset, self._inverse, self._k = kq, k, None, reset, None, k
        self._see = _visible(kq, k)
        if g is not None and reset is not None:
            self._start, self._end, self.total = _edges(k, g, reset)
            self._inverse = g.neg().exp().to(k.dtype).repeat_interleave(k.shape[2] // g.shape[2], dim=2)
            self.into, self.out, self._k = kq * self._start, k * self._end, k * self._inverse

    def scores(self) -> Tensor:
        """Return sum over K of kq_i k_j decay(j -> i) [R H M+C M]; zero where i does not see j."""
        return (self.into @ self._k.mT).mul_(self._see)

    def backward(self, d_scores: Tensor, d_into: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients to kq and k from those to scores, into and out; overwrites its arguments."""
        d_scores = d_scores.mul_(self._see)
        d_into.flatten(0, 1).baddbmm_(d_scores.flatten(0, 1), self._k.flatten(0, 1))
        dk = d_scores.mT @ self.into
        if self._inverse is None:
            return d_into, dk.add_(d_out)
        return d_into.mul_(self._start), dk.mul_(self._inverse).addcmul_(d_out, self._end)


class HeadDecay:
    """One decay per head and token: scores are kq k^T times a [C C] matrix of decay products."""

    def __init__(self, kq: Tensor, k: Tensor, g: Tensor, reset: Tensor):
        self._kq, self._k, self.reset = kq, k, reset
        self._start, self._end, self.total = _edges(k, g, reset)
        self.into, self.out = kq * self._start, k * self._end
        r, tokens = reset.cumsum(2), g.shape[2]
        between = torch.where(r == r.mT, g - g.mT, -torch.inf).to(k.dtype)  # f64 difference, then rounded
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).triu(1)
        between = between.masked_fill_(later, -torch.inf).exp_()
        factors = k.shape[2] // tokens
        between = between.repeat_interleave(factors, dim=-1)
        both = torch.cat([between.repeat_interleave(factors, dim=-2), between], dim=-2)
        self._weights = both.mul_(_visible(kq, k))

    def scores(self) -> Tensor:
        """Return sum over K of kq_i k_j decay(j -> i) [R H M+C M]; zero where i does not see j."""
        return (self._kq @ self._k.mT).mul_(self._weights)

    def backward(self, d_scores: Tensor, d_into: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients to kq and k from those to scores, into and out; overwrites its arguments."""
        d_scores = d_scores.mul_(self._weights)
        d_into.mul_(self._start).add_(d_scores @ self._k)
        return d_into, d_out.mul_(self._end).add_(d_scores.mT @ self._kq)


class KeyDecay:
    """One decay per key channel: exp(g_i - g_j) differs by channel, so the product is taken in sub-blocks of tokens.

    Off the diagonal both sides are referred to the last token before the left sub-block, so both factors are at most 1;
    on the diagonal the [SUB SUB K] products are formed.
    """

    def __init__(self, kq: Tensor, k: Tensor, g: Tensor, reset: Tensor):
        self._kq, self._k, self.reset, self._g, self._r = kq, k, reset, g, reset.cumsum(2)
        self._start, self._end, self.total = _edges(k, g, reset)
        self.into, self.out = kq * self._start, k * self._end
        self._see, self._dtype, tokens = _visible(kq, k), k.dtype, g.shape[2]
        self._bounds = [(t, min(t + SUB, tokens)) for t in range(0, tokens, SUB)]

    def scores(self) -> Tensor:
        """Return sum over K of kq_i k_j decay(j -> i) [R H M+C M]; zero where i does not see j."""
        keys, queries = self._parts(self._kq)
        return torch.cat([self._scores(keys, self._k), self._scores(queries, self._k)], dim=2).mul_(self._see)

    def backward(self, d_scores: Tensor, d_into: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients to kq and k from those to scores, into and out; overwrites its arguments."""
        parts = zip(self._parts(d_scores.mul_(self._see)), self._parts(self._kq), strict=True)
        (da, db), (dq, db_more) = (self._scores_vjp(d, rows, self._k) for d, rows in parts)
        d_into.mul_(self._start).add_(torch.cat([da, dq], dim=2))
        return d_into, d_out.mul_(self._end).add_(db).add_(db_more)

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        M = self._k.shape[2]
        return rows[:, :, :M], rows[:, :, M:]

    def _between(self, left: slice, right: slice) -> Tensor:
        """Return decay(j -> i) for every pair [R H left right K] and channel; 0 where j is after i."""
        g, r = self._g, self._r
        out = (g[:, :, left, None] - g[:, :, None, right]).to(self._dtype)
        later = torch.arange(right.start, right.stop, device=g.device) > torch.arange(
            left.start, left.stop, device=g.device
        ).unsqueeze(1)
        hidden = (r[:, :, left, None] != r[:, :, None, right]) | later[..., None]
        return out.masked_fill_(hidden, -torch.inf).exp_()

    def _micro(self, tokens: slice, x: Tensor) -> slice:
        n = x.shape[2] // self._g.shape[2]
        return slice(tokens.start * n, tokens.stop * n)

    def _sides(self, a: Tensor, b: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return what scales a's rows of sub-block [start, stop) and b's rows before it: two factors of at most 1."""
        ref = slice(start - 1, start)
        left = self._between(slice(start, stop), ref).squeeze(3)
        right = self._between(ref, slice(0, start)).squeeze(2)
        tokens = self._g.shape[2]
        return (
            left.repeat_interleave(a.shape[2] // tokens, dim=2),
            right.repeat_interleave(b.shape[2] // tokens, dim=2),
        )

    def _scores(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the products of rows a, n of them to a token, with b where a's token does not come before b's."""
        out = a.new_zeros(*a.shape[:3], b.shape[2])
        for start, stop in self._bounds:
            here, past = slice(start, stop), slice(0, start)
            i, j = self._micro(here, a), self._micro(here, b)
            if start:
                left, right = self._sides(a, b, start, stop)
                out[:, :, i, : j.start] = (a[:, :, i] * left) @ (b[:, :, self._micro(past, b)] * right).mT
            tile = torch.einsum("rhiak,rhijk,rhjbk->rhiajb", *self._tiles(a, b, here))
            out[:, :, i, j] = tile.flatten(4, 5).flatten(2, 3)
        return out

    def _scores_vjp(self, d_scores: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for start, stop in self._bounds:
            here, past = slice(start, stop), slice(0, start)
            i, j = self._micro(here, a), self._micro(here, b)
            if start:
                left, right = self._sides(a, b, start, stop)
                before, d = self._micro(past, b), d_scores[:, :, i, : j.start]
                da[:, :, i] += (d @ (b[:, :, before] * right)) * left
                db[:, :, before] += (d.mT @ (a[:, :, i] * left)) * right
            ta, between, tb = self._tiles(a, b, here)
            d = d_scores[:, :, i, j].unflatten(3, tb.shape[2:4]).unflatten(2, ta.shape[2:4])
            da[:, :, i] += torch.einsum("rhiajb,rhijk,rhjbk->rhiak", d, between, tb).flatten(2, 3)
            db[:, :, j] += torch.einsum("rhiajb,rhijk,rhiak->rhjbk", d, between, ta).flatten(2, 3)
        return da, db

    def _tiles(self, a: Tensor, b: Tensor, here: slice) -> tuple[Tensor, Tensor, Tensor]:
        tokens = here.stop - here.start
        ta = a[:, :, self._micro(here, a)].unflatten(2, (tokens, -1))
        tb = b[:, :, self._micro(here, b)].unflatten(2, (tokens, -1))
        return ta, self._between(here, here), tb


def log_decay_grad(dg: Tensor, reset: Tensor) -> Tensor:
    """Return the gradient to log_decay from the gradient to its running sum g [R H C E]; 0 at a reset."""
    return dg.flip(2).cumsum(2).flip(2).masked_fill_(reset, 0)


def _visible(kq: Tensor, k: Tensor) -> Tensor:
    """Return 1 where keys, then queries, see a factor [M+C M] (an earlier one, a query also its token's), else 0."""
    M, C = k.shape[2], kq.shape[2] - k.shape[2]
    j = torch.arange(M, device=k.device)
    next_token = torch.arange(1, C + 1, device=k.device) * (M // C)
    return (j[None, :] < torch.cat([j, next_token])[:, None]).to(k.dtype)


def _edges(k: Tensor, g: Tensor, reset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decays from the chunk's start to its keys, then queries; from each factor to its end; and in all."""
    r, factors = reset.cumsum(2), k.shape[2] // g.shape[2]
    start = g.exp().masked_fill_(r != 0, 0).to(k.dtype)
    end = (g[:, :, -1:] - g).exp().masked_fill_(r != r[:, :, -1:], 0).to(k.dtype)
    both = torch.cat([start.repeat_interleave(factors, dim=2), start], dim=2)
    return both, end.repeat_interleave(factors, dim=2), start[:, :, -1:].mT
