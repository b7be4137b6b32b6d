"""Decays inside a chunk: products of per-token decays between any two of its tokens, without overflow or division.

With g_t = sum of log_decay up to and including token t of the chunk, every factor used is exp(g_i - g_j) with j <= i,
the product of the decays after j up to i. A decay of exactly 0 (log_decay = -inf) is counted, not summed: a product
that crosses it is exactly 0, any other is unaffected by it.

Letters: R rows (chunks), H heads, C tokens per chunk, N factors per token, M = C N, K key dim; E = 1 (one decay per
head) or K (one per key channel).
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY_LOG = {torch.float32: -104.0, torch.float64: -746.0}  # exp of anything below is 0
SUB = 16  # tokens per sub-block of KeyDecay


def triangle(tokens: int, factors: int, strict: bool, device: torch.device) -> Tensor:
    """Return which factors j [M] come before factor i [M] (strict), or are seen by token i's query [C] (not strict)."""
    j = torch.arange(tokens * factors, device=device)
    if strict:
        return j[None, :] < j[:, None]
    return (j // factors)[None, :] <= torch.arange(tokens, device=device)[:, None]


class HeadDecay:
    """One decay per head and token, or none: scores are a b^T times a [.. C] matrix of decay products."""

    def __init__(self, log_decay: Tensor | None, tokens: int, factors: int, dtype: torch.dtype, device: torch.device):
        self.start_q = self.start_k = self.end_k = self.total = self.reset = None
        see = triangle(tokens, factors, False, device)
        before = triangle(tokens, factors, True, device)
        if log_decay is None:
            self._weights = {False: see.to(dtype), True: before.to(dtype)}
            return
        g, r, self.reset = _cumulate(log_decay, dtype)  # [R H C 1]
        between = torch.where(r == r.mT, g - g.mT, -torch.inf).to(dtype)  # f64 difference, then rounded
        between.masked_fill_(~triangle(tokens, 1, False, device), -torch.inf).exp_()
        between = between.repeat_interleave(factors, dim=-1)
        self._weights = {False: between, True: between.repeat_interleave(factors, dim=-2) * before}
        self.start_q, self.start_k, self.end_k, self.total = _edges(g, r, factors, dtype)

    def scores(self, a: Tensor, b: Tensor, strict: bool) -> Tensor:
        """Return sum over K of a_i b_j decay(j -> i), zero where j does not come before i."""
        return (a @ b.mT).mul_(self._weights[strict])

    def scores_vjp(self, d_scores: Tensor, a: Tensor, b: Tensor, strict: bool) -> tuple[Tensor, Tensor]:
        """Return the gradients of `scores` to a and b; overwrites d_scores."""
        d_scores = d_scores.mul_(self._weights[strict])
        return d_scores @ b, d_scores.mT @ a


class KeyDecay:
    """One decay per key channel: exp(g_i - g_j) differs by channel, so the product is taken in sub-blocks of tokens.

    Off the diagonal both sides are referred to the last token before the left sub-block, so both factors are at most 1;
    on the diagonal the [SUB SUB K] products are formed.
    """

    def __init__(self, log_decay: Tensor, tokens: int, factors: int, dtype: torch.dtype):
        g, r, self.reset = _cumulate(log_decay, dtype)  # [R H C K]
        self._g, self._r, self._dtype, self._factors = g, r, dtype, factors
        self._bounds = [(t, min(t + SUB, tokens)) for t in range(0, tokens, SUB)]
        self.start_q, self.start_k, self.end_k, self.total = _edges(g, r, factors, dtype)

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

    def scores(self, a: Tensor, b: Tensor, strict: bool) -> Tensor:
        """Return sum over K of a_i b_j decay(j -> i), zero where j does not come before i."""
        out = a.new_zeros(*a.shape[:3], b.shape[2])
        for start, stop in self._bounds:
            here, past = slice(start, stop), slice(0, start)
            i, j = self._micro(here, a), self._micro(here, b)
            if start:
                left, right = self._sides(a, b, start, stop)
                out[:, :, i, : j.start] = (a[:, :, i] * left) @ (b[:, :, self._micro(past, b)] * right).mT
            out[:, :, i, j] = (
                torch.einsum("rhiak,rhijk,rhjbk->rhiajb", *self._tiles(a, b, here)).flatten(4, 5).flatten(2, 3)
            )
        return out.mul_(triangle(self._g.shape[2], self._factors, strict, a.device))

    def scores_vjp(self, d_scores: Tensor, a: Tensor, b: Tensor, strict: bool) -> tuple[Tensor, Tensor]:
        """Return the gradients of `scores` to a and b; overwrites d_scores."""
        d_scores = d_scores.mul_(triangle(self._g.shape[2], self._factors, strict, a.device))
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


def _cumulate(log_decay: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the running sum in float64, so that differences keep float32 accuracy, the resets so far, and where."""
    reset = log_decay < TINY_LOG[dtype]
    return log_decay.masked_fill(reset, 0).double().cumsum(2), reset.cumsum(2), reset


def _edges(g: Tensor, r: Tensor, factors: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the decays from the chunk's start to each query and factor, from each factor to its end, and in all."""
    start = g.to(dtype).exp().masked_fill_(r != 0, 0)
    end = (g[:, :, -1:] - g).to(dtype).exp().masked_fill_(r != r[:, :, -1:], 0)
    start_k, end_k = start.repeat_interleave(factors, dim=2), end.repeat_interleave(factors, dim=2)
    return start, start_k, end_k, start[:, :, -1:].mT
