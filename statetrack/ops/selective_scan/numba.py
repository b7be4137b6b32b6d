"""The selective scan token by token in compiled code (CPU): the states of W channels stay in a core's first cache.

The recurrence needs one exponential per state and token and little else, so nothing is gained by forming tensors
[T D M]: the states of W channels are updated in place, as many channels to an instruction as the processor can take.
The backward runs the recurrence again and keeps the state at the start of every CHUNK tokens; from the last chunk to
the first it fills in the chunk's states and goes back over them with the adjoint recurrence of `chunk.py`.

Letters: S sequences, T tokens of all, D channels, M states per channel, P = ceil(D / W) parts of the channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from numba.extending import overload
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.layout import untraced
from statetrack.ops.numba_common import array, inner, kernel, spread, starts

W = 256
CHUNK = 16  # tokens whose states and decays the backward holds: with W = 256 channels 512 KiB at M = 16


@untraced
def selective_scan_numba(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    eigenvalues: tuple[float, float],
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `selective_scan` in the dtype of A, D and initial_state; differentiable once."""
    return _Scan.apply(u, dt, A, B, C, D, eigenvalues, initial_state, lengths)  # pyright: ignore[reportReturnType]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, eigenvalues, initial_state, lengths):
        items, inputs = _arguments(u, dt, A, B, C, D, eigenvalues, initial_state, lengths)
        y, final = (torch.empty(x.shape, dtype=A.dtype) for x in (u, initial_state))
        spread(_forward, items, u.numel() * A.shape[1], *inputs, y.flatten(0, 1).numpy(), final.numpy())
        ctx.save_for_backward(u, dt, A, B, C, D, initial_state)
        ctx.eigenvalues, ctx.lengths = eigenvalues, lengths
        return y.to(u.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        u, dt, A, B, C, D, initial_state = ctx.saved_tensors
        sequences, parts = len(ctx.lengths), -(-A.shape[0] // _width(A, ctx.lengths))
        items, inputs = _arguments(u, dt, A, B, C, D, ctx.eigenvalues, initial_state, ctx.lengths)
        du, d_dt, d_initial = (torch.empty(x.shape, dtype=A.dtype) for x in (u, dt, d_final))
        dB, dC = (torch.empty(parts, *B.shape, dtype=A.dtype) for _ in range(2))
        dA, dD = (A.new_empty(sequences, *shape) for shape in (A.mT.shape, D.shape))
        outputs = du.flatten(0, 1), d_dt.flatten(0, 1), dA, dB.flatten(1, 2), dC.flatten(1, 2), dD, d_initial
        d_y, d_final = array(dy.flatten(0, 1), A.dtype), array(d_final, A.dtype)
        spread(_backward, items, 4 * u.numel() * A.shape[1], *inputs, d_y, d_final, *(x.numpy() for x in outputs))
        grads = ((du, u), (d_dt, dt), (dA.sum(0).mT, A), (dB.sum(0), B), (dC.sum(0), C), (dD.sum(0), D))
        return *(grad.to(x.dtype) for grad, x in grads), None, d_initial, None


def _width(A: Tensor, lengths: list[int]) -> int:
    """Return how many channels run side by side: many, but not so many that there is no work for eight threads."""
    return min(256, max(64, A.shape[0] * len(lengths) // 8 // 64 * 64))


def _arguments(u, dt, A, B, C, D, eigenvalues, initial_state, lengths) -> tuple[int, tuple[Any, ...]]:
    """Return the number of items, a sequence's part of the channels each, and what both kernels take first."""
    width = _width(A, lengths)
    tokens = (array(x.flatten(0, 1), A.dtype) for x in (u, dt, B, C))
    others = (array(x, A.dtype) for x in (A, D, A.new_tensor(eigenvalues), initial_state))
    return len(lengths) * -(-A.shape[0] // width), (width, starts(lengths), *tokens, *others)


def _exp(x):
    """Return e^x; compiled code has `_exp_compiled` instead."""
    return math.exp(x)


@overload(_exp)
def _exp_compiled(x):
    return (lambda x: _exp_of_float32(x)) if x.bitwidth == 32 else (lambda x: math.exp(x))


@njit(fastmath={"contract"}, nogil=True)
def _exp_of_float32(x):
    """Return e^x to 0.7 units in the last place, without a branch, so that a loop over it becomes vector code.

    e^x = 2^n e^r with n = round(x / ln 2): adding 1.5 2^23 rounds, and leaves n in the last bits. The polynomial of e^r
    is that of Cephes' expf. Results below 1.2e-38 are 0, above 2.3e38 infinite.
    """
    tiny, huge = np.float32(-87.3), np.float32(88.37)
    within = huge if x > huge else x  # written so that NaN stays
    within = tiny if within < tiny else within
    shifted = within * np.float32(1.44269504) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = within - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    exponent = np.int32((np.int32(np.float32(shifted).view(np.int32)) + np.int32(127)) << np.int32(23))
    e = p * np.int32(exponent).view(np.float32)
    e = np.float32(np.inf) if x > huge else e
    return np.float32(0.0) if x < tiny else e


@kernel
def _forward(first, last, width, offsets, u, dt, B, C, A, D, eigenvalues, initial, y, final):
    """Write y [T D] and the states after every sequence [S D M]."""
    (channels, M), S = A.shape, len(initial)
    lo, span = eigenvalues[0], eigenvalues[1] - eigenvalues[0]
    h, rates, x = np.empty((M, width), A.dtype), np.empty((M, width), A.dtype), np.empty(width, A.dtype)
    for item in range(first, last):
        s, part = item % S, slice(item // S * width, min(item // S * width + width, channels))
        _transpose(A[part], rates)
        _transpose(initial[s, part], h)
        skip = D[part]
        for t in range(offsets[s], offsets[s + 1]):
            dt_, out = dt[t, part], y[t, part]
            _begin(u[t, part], dt_, skip, x, out)
            for m in range(M):
                _advance(h[m], rates[m], dt_, x, B[t, m], out, C[t, m], lo, span)
        _transpose_back(h, final[s, part])


@kernel
def _backward(
    first, last, width, offsets, u, dt, B, C, A, D, eigenvalues, initial, dy, d_final,
    du, d_dt, dA, dB, dC, dD, d_initial,
):  # fmt: skip
    """Write the gradients: dA [S M D], dB and dC [P T M], dD [S D], the others in the shapes of what they belong to."""
    (channels, M), S, longest = A.shape, len(initial), np.max(offsets[1:] - offsets[:-1])
    lo, span = eigenvalues[0], eigenvalues[1] - eigenvalues[0]
    kept = np.empty(((longest + CHUNK - 1) // CHUNK + 1, M, width), A.dtype)
    h, a = np.empty((CHUNK + 1, M, width), A.dtype), np.empty((CHUNK, M, width), A.dtype)
    rates, g, d_rates = np.empty((M, width), A.dtype), np.empty((M, width), A.dtype), np.empty((M, width), A.dtype)
    x, d_x, d_a = np.empty(width, A.dtype), np.empty(width, A.dtype), np.empty(width, A.dtype)
    for item in range(first, last):
        p, s = item // S, item % S
        part, begin, end = slice(p * width, min(p * width + width, channels)), offsets[s], offsets[s + 1]
        _transpose(A[part], rates)
        _transpose(d_final[s, part], g)
        _transpose(initial[s, part], kept[0])
        d_rates[:] = 0
        dD[s, part] = 0
        chunks = (end - begin + CHUNK - 1) // CHUNK
        for c in range(chunks):
            _copy(kept[c], kept[c + 1])
            for t in range(begin + c * CHUNK, min(begin + c * CHUNK + CHUNK, end)):
                dt_ = dt[t, part]
                _multiply(u[t, part], dt_, x)
                for m in range(M):
                    _pass(kept[c + 1, m], rates[m], dt_, x, B[t, m], lo, span)
        for c in range(chunks - 1, -1, -1):
            start = begin + c * CHUNK
            stop = min(start + CHUNK, end)
            _copy(kept[c], h[0])
            for t in range(start, stop):
                i, dt_ = t - start, dt[t, part]
                _multiply(u[t, part], dt_, x)
                for m in range(M):
                    _follow(h[i, m], rates[m], dt_, x, B[t, m], a[i, m], h[i + 1, m], lo, span)
            for t in range(stop - 1, start - 1, -1):
                i, u_, dt_, dy_, d_dt_ = t - start, u[t, part], dt[t, part], dy[t, part], d_dt[t, part]
                _multiply(u_, dt_, x)
                d_x[:] = 0
                d_dt_[:] = 0
                for m in range(M):
                    dB[p, t, m], dC[p, t, m] = _reach(g[m], dy_, C[t, m], x, h[i + 1, m])
                    _apart(g[m], B[t, m], h[i, m], a[i, m], lo, d_x, d_a)
                    _to_rates(d_a, rates[m], dt_, d_dt_, d_rates[m])
                    _scale(g[m], a[i, m])
                _end(u_, dt_, dy_, D[part], d_x, du[t, part], d_dt_, dD[s, part])
        _transpose_back(g, d_initial[s, part])
        for m in range(M):
            _copy(d_rates[m : m + 1], dA[s, m : m + 1, part])


# What follows is inlined. A loop becomes vector code only if few pairs of its arrays could overlap, so it is cut up.


@inner
def _copy(x, out):
    for m in range(len(x)):
        for j in range(out.shape[1]):
            out[m, j] = x[m, j]


@inner
def _transpose(x, out):
    for m in range(len(out)):
        for j in range(len(x)):
            out[m, j] = x[j, m]


@inner
def _transpose_back(x, out):
    for j in range(len(out)):
        for m in range(len(x)):
            out[j, m] = x[m, j]


@inner
def _multiply(a, b, out):
    for j in range(len(a)):
        out[j] = a[j] * b[j]


@inner
def _scale(x, factors):
    for j in range(len(x)):
        x[j] *= factors[j]


@inner
def _begin(u, dt, skip, x, y):
    """Write the input of the states and what the output has of it without them."""
    for j in range(len(u)):
        x[j] = dt[j] * u[j]
        y[j] = skip[j] * u[j]


@inner
def _advance(h, rates, dt, x, b, y, c, lo, span):
    """Take one state of some channels over a token and add what is read of it to the output."""
    for j in range(len(dt)):
        now = (lo + span * _exp(dt[j] * rates[j])) * h[j] + x[j] * b
        h[j] = now
        y[j] += c * now


@inner
def _pass(h, rates, dt, x, b, lo, span):
    """Take one state of some channels over a token."""
    for j in range(len(dt)):
        h[j] = (lo + span * _exp(dt[j] * rates[j])) * h[j] + x[j] * b


@inner
def _follow(h, rates, dt, x, b, a, after, lo, span):
    """Write the transition and the state after the token."""
    for j in range(len(dt)):
        a[j] = lo + span * _exp(dt[j] * rates[j])
    for j in range(len(dt)):
        after[j] = a[j] * h[j] + x[j] * b


@inner
def _reach(g, dy, c, x, h):
    """Add to g what the output gives it; return the gradients to the token's B and C."""
    db, dc = g[0] * 0, g[0] * 0
    for j in range(len(dy)):
        g[j] += c * dy[j]
        db += g[j] * x[j]
        dc += h[j] * dy[j]
    return db, dc


@inner
def _apart(g, b, before, a, lo, d_x, d_a):
    """Add the gradient to x, and write that to dt A."""
    for j in range(len(d_x)):
        d_x[j] += g[j] * b
        d_a[j] = g[j] * before[j] * (a[j] - lo)


@inner
def _to_rates(d_a, rates, dt, d_dt, d_rates):
    for j in range(len(dt)):
        d_dt[j] += d_a[j] * rates[j]
        d_rates[j] += d_a[j] * dt[j]


@inner
def _end(u, dt, dy, skip, d_x, du, d_dt, d_skip):
    """Write what a token's gradients have beside that through the rates."""
    for j in range(len(u)):
        du[j] = d_x[j] * dt[j] + dy[j] * skip[j]
    for j in range(len(u)):
        d_dt[j] += d_x[j] * u[j]
        d_skip[j] += dy[j] * u[j]
