"""The delta rule token by token in compiled code (CPU): the state of W value columns stays in a core's first cache.

A factor's step reads the state, S^T k, before it writes it. One sweep over the state does both for two steps at a time,

    S <- a S + k u^T,   o = S^T q,   r' = S^T (a' k'),   then   u' = w' (n' v' - r')

with w, n, k as in `chunk.py`, a the decays of the state's rows before the step, and primes for the step after it: three
multiply-adds per number loaded, a third of the arithmetic of chunks, and the rounding of the definition. The backward
runs the recurrence again, keeps the state at the start of every CHUNK steps, and from the last chunk to the first fills
in the chunk's states and sweeps back over them with the gradient G of the state, G_m = gradient to S_m:

    dq = S do,  du = G^T k,  df = w du,  dk = G u - P df,  dP = G - k df^T,  da = rowsum(dP S'),  G' = a dP + q' do'^T

where P = S - k u^T is the decayed state before the step, S' the state before that, and primes are for the step before.
With one decay per head the sum of a dP S' is sum(dP S) - u^T dP^T k, since a S' = S - k u^T; dP^T k = du - |k|^2 df is
known, and the sweep has S at hand.

Letters: S sequences, T tokens of all, N factors per token, M = T N steps, H heads, K key dim, V value dim; E = 0 (no
decay), 1 (one per head) or K. Rows of a state are padded to a multiple of 4, its columns to W.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.layout import untraced
from statetrack.ops.numba_common import array, inner, kernel, spread, starts

CHUNK = 16  # steps whose states the backward holds: 256 KiB at K = W = 64
SAFE = 2.0**-60  # keys whose squared length lies between this and its inverse are taken as they are


@untraced
def delta_rule_numba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `delta_rule` in the dtype of initial_state, with gradients to every tensor (once differentiable)."""
    return _Recurrence.apply(q, k, v, beta, log_decay, scale, initial_state, lengths)  # pyright: ignore[reportReturnType]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, scale, initial_state, lengths):
        lanes, inputs = _arguments(q, k, v, beta, log_decay, scale, initial_state, lengths)
        o, final = (torch.empty(shape, dtype=initial_state.dtype) for shape in (_output(v), initial_state.shape))
        items = len(lengths) * v.shape[3] * -(-v.shape[4] // len(lanes))
        spread(_forward, items, 3 * v.numel() * k.shape[4], *inputs, o.flatten(0, 1).numpy(), final.numpy())
        ctx.save_for_backward(q, k, v, beta, log_decay, initial_state)
        ctx.scale, ctx.lengths = scale, lengths
        return o.to(v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, beta, log_decay, initial_state = ctx.saved_tensors
        _, inputs = _arguments(q, k, v, beta, log_decay, ctx.scale, initial_state, ctx.lengths)
        dtype = initial_state.dtype
        grads = [torch.empty(x.shape, dtype=dtype) for x in (q, k, v, beta)]
        d_decay = torch.empty((0, 0, 0) if log_decay is None else log_decay.shape, dtype=dtype)
        d_initial = torch.empty(initial_state.shape, dtype=dtype)
        outputs = [
            x.numpy() for x in (*_flatten(*grads), _by_token(None if log_decay is None else d_decay, dtype), d_initial)
        ]
        given = array(d_o.flatten(0, 1), dtype), array(d_final, dtype)
        items = len(ctx.lengths) * q.shape[2]
        spread(_backward, items, 14 * v.numel() * k.shape[4], *inputs, *given, *outputs)
        dq, dk, dv, d_beta = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v, beta), strict=True))
        return dq, dk, dv, d_beta, None if log_decay is None else d_decay.to(log_decay.dtype), None, d_initial, None


def _output(v: Tensor) -> tuple[int, ...]:
    return *v.shape[:2], *v.shape[3:]


def _flatten(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs by token, [T Hk K], and by step, [M Hk K], [M H V], [M H]."""
    return q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2), beta.flatten(0, 2)


def _by_token(decay: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return [B T H] or [B T H K] as [T H E], no decay as no numbers."""
    if decay is None:
        return torch.empty((0, 0, 0), dtype=dtype)
    return decay.flatten(0, 1) if decay.ndim == 4 else decay.flatten(0, 1).unsqueeze(-1)


def _arguments(q, k, v, beta, log_decay, scale, initial_state, lengths) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Return the lanes, a tuple of W numbers (compiled code knows its length), and what both kernels take first."""
    dtype, width = initial_state.dtype, v.shape[-1]
    lanes = (0,) * (16 if width <= 16 else 32 if width <= 32 else 64)
    decay = None if log_decay is None else log_decay.detach().to(dtype).exp()
    tensors = *_flatten(q, k, v, beta), _by_token(decay, dtype), initial_state
    return lanes, (lanes, starts(lengths), scale, *(array(x, dtype) for x in tensors))


@kernel
def _forward(first, last, lanes, offsets, scale, q, k, v, beta, decay, initial, o, final):
    """Write o [T H V] and the states after every sequence [S H K V]; an item is one head's W columns of a sequence."""
    (H, V), (Hk, K), W = v.shape[1:], k.shape[1:], len(lanes)
    parts, blocks = (V + W - 1) // W, (K + 3) // 4
    S, x, F = np.zeros((blocks, 4 * W), v.dtype), np.zeros(4 * W, v.dtype), np.empty((0, W), v.dtype)
    c, ahead = np.zeros((blocks, 16), v.dtype), np.zeros((blocks, 8), v.dtype)
    kept = np.empty((0, blocks, 4 * W), v.dtype)
    for item in range(first, last):
        s, h, left = item // parts // H, item // parts % H, item % parts * W
        where = h // (H // Hk), h, left, min(left + W, V)
        _load(initial[s, h], left, S, W)
        begin, end = offsets[s], offsets[s + 1]
        _walk(begin, end, where, scale, q, k, v, beta, decay, S, x, c, ahead, 1, kept, F, o, lanes)
        _store(S, left, final[s, h], W)


@kernel
def _backward(
    first, last, lanes, offsets, scale, q, k, v, beta, decay, initial, d_o, d_final,
    dq, dk, dv, d_beta, d_decay, d_initial,
):  # fmt: skip
    """Write the gradients, each in the shape of what it belongs to; an item is the heads of a sequence with one key."""
    (H, V), (Hk, K), W, N = v.shape[1:], k.shape[1:], len(lanes), max(1, len(k) // max(1, len(q)))
    group, blocks, tokens = H // Hk, (K + 3) // 4, (CHUNK + N - 1) // N
    longest = np.max(offsets[1:] - offsets[:-1])
    kept = np.empty(((longest + tokens - 1) // tokens, blocks, 4 * W), v.dtype)
    states, F = np.zeros((tokens * N + 1, blocks, 4 * W), v.dtype), np.zeros((tokens * N, W), v.dtype)
    S, G = np.zeros((blocks, 4 * W), v.dtype), np.zeros((blocks, 4 * W), v.dtype)
    x, y, results = np.zeros(4 * W, v.dtype), np.zeros(6 * W, v.dtype), np.zeros((blocks, 8), v.dtype)
    c, ahead = np.zeros((blocks, 16), v.dtype), np.zeros((blocks, 8), v.dtype)
    b, behind, carry = np.zeros((blocks, 16), v.dtype), np.zeros((blocks, 8), v.dtype), np.ones(2)
    for item in range(first, last):
        s, hk = item // Hk, item % Hk
        begin, end = offsets[s], offsets[s + 1]
        _clear(dq, begin, end, hk, hk + 1)
        _clear(dk, begin * N, end * N, hk, hk + 1)
        _clear(d_decay, begin, end if d_decay.shape[2] else begin, hk * group, hk * group + group)
        for h in range(hk * group, hk * group + group):
            for m in range(begin * N, end * N):
                d_beta[m, h] = 0
            for left in range(0, V, W):
                where, chunks = (hk, h, left, min(left + W, V)), (end - begin + tokens - 1) // tokens
                _load(initial[s, h], left, S, W)
                _walk(
                    begin, end, where, scale, q, k, v, beta, decay, S, x, c, ahead, tokens * N, kept[:chunks], F[:0],
                    d_o[:0], lanes,
                )  # fmt: skip
                _load(d_final[s, h], left, G, W)
                for chunk in range(chunks - 1, -1, -1):
                    start = begin + chunk * tokens
                    stop = min(start + tokens, end)
                    _copy_state(kept[chunk], S)
                    _walk(
                        start, stop, where, scale, q, k, v, beta, decay, S, x, c, ahead, 1, states, F, d_o[:0], lanes
                    )  # fmt: skip
                    _walk_back(
                        start, stop, begin, chunk == chunks - 1, where, scale, q, k, v, beta, decay, d_o, states, F,
                        G, y, b, behind, results, carry, dq, dk, dv, d_beta, d_decay, lanes,
                    )  # fmt: skip
                _store(G, left, d_initial[s, h], W)


# What follows works on views without counting references to them. A state is [K / 4, 4 W], four of its rows side by
# side; what its rows are multiplied by is [K / 4, 16], a, k, q, n for four rows (`behind` and `ahead`: a, k). The
# vectors of W numbers that a sweep needs lie in one array (forward x: r, o, u, f; backward y: du, df, u, do, do' and
# the sums of dP S), and W is a constant, so that the compiler sees that none overlaps another.


@inner
def _walk(start, stop, where, scale, q, k, v, beta, decay, S, x, c, ahead, every, kept, F, o, lanes):
    """Take S over the tokens; write o, every step's f to F, and the state before every `every`-th step to `kept`.

    The first sweep is one before the first step: all it does is to read the state with the first key.
    """
    (hk, h, left, right), W, N, E = where, len(lanes), max(1, len(k) // max(1, len(q))), decay.shape[2]
    t, n, squared, until, slot = start - 1, N - 1, 1.0, 0, 0
    for i in range(len(c)):
        for j in range(16):
            c[i, j] = 0
        for j in range(4):
            ahead[i, j], ahead[i, 4 + j] = 1, 0
    for j in range(4 * W):
        x[j] = 0
    for m in range(start * N - 1, stop * N):
        if (t + 1 - start) % 16 == 0 and n == N - 1:
            ends = min(t + 17, stop)
            c[0, 0] = _touch(k, (t + 1) * N, ends * N, hk) + _touch(v, (t + 1) * N, ends * N, h)
            if len(o):
                c[0, 0] = _touch(q, t + 1, ends, hk)
        if t >= start:
            w, norm, vs = v.dtype.type(beta[m, h] / squared), v.dtype.type(math.sqrt(squared)), v[m, h, left:right]
            for j in range(len(vs)):
                x[3 * W + j] = norm * vs[j] - x[j]
            for j in range(W):
                x[2 * W + j] = w * x[3 * W + j]
            if len(F):
                for j in range(W):
                    F[m - start * N, j] = x[3 * W + j]
            if n == 0:
                _spread(q[t, hk], c, 8)
        later, first = t + (n + 1) // N, n == N - 1
        for i in range(len(c)):
            for j in range(8):
                c[i, j] = ahead[i, j]
        if later < stop:
            squared, _ = _scaled_key(k[m + 1, hk], ahead)
            _decays(decay, later, h, E if first else 0, ahead)
            for i in range(len(c)):
                for j in range(4):
                    c[i, 12 + j] = ahead[i, j] * ahead[i, 4 + j]
        _sweep(S, x, c, lanes)
        if first and t >= start and len(o):
            out = o[t, h, left:right]
            for j in range(len(out)):
                out[j] = scale * x[W + j]
        if until == 0 and slot < len(kept):
            _copy_state(S, kept[slot])
            slot, until = slot + 1, every
        until -= 1
        t, n = later, (n + 1) % N


@inner
def _sweep(S, x, c, lanes):
    """S <- a S + k u^T in place; r <- S^T n, o <- S^T q."""
    W = len(lanes)
    for j in range(2 * W):
        x[j] = 0
    for i in range(len(S)):
        s, e = S[i], c[i]
        a0, a1, a2, a3, k0, k1, k2, k3 = e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]
        q0, q1, q2, q3, n0, n1, n2, n3 = e[8], e[9], e[10], e[11], e[12], e[13], e[14], e[15]
        for j in range(W):
            u = x[2 * W + j]
            s0, s1 = a0 * s[j] + k0 * u, a1 * s[W + j] + k1 * u
            s2, s3 = a2 * s[2 * W + j] + k2 * u, a3 * s[3 * W + j] + k3 * u
            s[j], s[W + j], s[2 * W + j], s[3 * W + j] = s0, s1, s2, s3
            x[j] += n0 * s0 + n1 * s1 + n2 * s2 + n3 * s3
            x[W + j] += q0 * s0 + q1 * s1 + q2 * s2 + q3 * s3


@inner
def _walk_back(
    start, stop, begin, fresh, where, scale, q, k, v, beta, decay, d_o, states, F,
    G, y, b, behind, results, carry, dq, dk, dv, d_beta, d_decay, lanes,
):  # fmt: skip
    """Take G back over the tokens and write or add their gradients.

    Each sweep ends a step and begins the one before, so a fresh G needs one sweep before the first step. carry holds
    |k|^2 and the power of two of the key in `behind`.
    """
    (hk, h, left, right), W, N, E = where, len(lanes), max(1, len(k) // max(1, len(q))), decay.shape[2]
    if fresh:
        for i in range(len(behind)):
            for j in range(4):
                behind[i, j], behind[i, 4 + j] = 1, 0
        for j in range(6 * W):
            y[j] = 0
    b[0, 0] = _touch(q, start, stop, hk) + _touch(d_o, start, stop, h)
    t, n = (stop, 0) if fresh else (stop - 1, N - 1)
    for m in range(t * N + n, start * N - 1, -1):
        squared, power, along, apart, i = carry[0], carry[1], 0.0, 0.0, m - start * N
        if t < stop:
            w, norm = v.dtype.type(beta[m, h] / squared), v.dtype.type(math.sqrt(squared))
            dw, dn, uf = _correct(w, norm, v[m, h, left:right], F[i], dv[m, h, left:right], y, lanes)
            d_beta[m, h] += dw / squared
            apart = w * dw - squared * uf
            along = uf + dn / math.sqrt(squared) - 2 * dw * beta[m, h] / squared / squared
            _decays(decay, t, h, E if n == 0 else 0, behind)
        for row in range(len(b)):
            for j in range(8):
                b[row, j], b[row, 8 + j] = behind[row, j], 0
        if E > 1 and n == 0 and t < stop:
            _decay_gradient(G, states[i], y, b, d_decay[t, h], lanes)
        for j in range(W):
            y[4 * W + j] = 0
        if n == 0 and t > begin:
            _spread(q[t - 1, hk], b, 8)
            given = d_o[t - 1, h, left:right]
            for j in range(len(given)):
                y[4 * W + j] = scale * given[j]
        if m > begin * N:
            carry[0], carry[1] = _scaled_key(k[m - 1, hk], behind)
            for row in range(len(b)):
                for j in range(4):
                    b[row, 12 + j] = behind[row, 4 + j]
        _sweep_back(states[min(i + 1, len(states) - 1)], G, y, b, results, lanes)
        if t < stop:
            _add_keys(power, along, results, b, dk[m, hk])
            if E == 1 and n == 0 and decay[t, h, 0] != 0:
                total = -apart
                for j in range(W):
                    total += y[5 * W + j]
                d_decay[t, h, 0] += total
            if n == N - 1:
                _add_queries(results, dq[t, hk])
        t, n = (t, n - 1) if n else (t - 1, N - 1)


@inner
def _correct(w, norm, v, f, dv, y, lanes):
    """Write df, u, do and the gradient to v from du, f and do'; return f.du, v.df and u.df."""
    W, dw, dn, uf = len(lanes), w * 0, w * 0, w * 0
    for j in range(W):
        df, u = w * y[j], w * f[j]
        dw += f[j] * y[j]
        uf += u * df
        y[W + j], y[2 * W + j], y[3 * W + j] = df, u, y[4 * W + j]
    for j in range(len(v)):
        dn += v[j] * y[W + j]
        dv[j] = norm * y[W + j]
    return dw, dn, uf


@inner
def _sweep_back(S, G, y, b, results, lanes):
    """G <- a (G - k df^T) + q do'^T in place; dk <- G u - S df, dq <- S do from G before, du <- G^T n from G after."""
    W, zero = len(lanes), y.dtype.type(0)
    for j in range(W):
        y[j], y[5 * W + j] = 0, 0
    for i in range(len(G)):
        g, s, e, out = G[i], S[i], b[i], results[i]
        a0, a1, a2, a3, k0, k1, k2, k3 = e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]
        q0, q1, q2, q3, n0, n1, n2, n3 = e[8], e[9], e[10], e[11], e[12], e[13], e[14], e[15]
        dk0, dk1, dk2, dk3, dq0, dq1, dq2, dq3 = zero, zero, zero, zero, zero, zero, zero, zero
        for j in range(W):
            df, u, do, later = y[W + j], y[2 * W + j], y[3 * W + j], y[4 * W + j]
            g0, g1, g2, g3 = g[j], g[W + j], g[2 * W + j], g[3 * W + j]
            s0, s1, s2, s3 = s[j], s[W + j], s[2 * W + j], s[3 * W + j]
            dk0 += g0 * u - s0 * df
            dk1 += g1 * u - s1 * df
            dk2 += g2 * u - s2 * df
            dk3 += g3 * u - s3 * df
            dq0 += s0 * do
            dq1 += s1 * do
            dq2 += s2 * do
            dq3 += s3 * do
            g0, g1, g2, g3 = g0 - k0 * df, g1 - k1 * df, g2 - k2 * df, g3 - k3 * df
            y[5 * W + j] += g0 * s0 + g1 * s1 + g2 * s2 + g3 * s3
            g0, g1, g2, g3 = a0 * g0 + q0 * later, a1 * g1 + q1 * later, a2 * g2 + q2 * later, a3 * g3 + q3 * later
            g[j], g[W + j], g[2 * W + j], g[3 * W + j] = g0, g1, g2, g3
            y[j] += n0 * g0 + n1 * g1 + n2 * g2 + n3 * g3
        out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7] = dk0, dk1, dk2, dk3, dq0, dq1, dq2, dq3


@inner
def _decay_gradient(G, before, y, b, out, lanes):
    """Add a rowsum((G - k df^T) S') to the gradient of the logarithms of the decays per key channel."""
    W, K = len(lanes), len(out)
    for i in range(len(G)):
        g, s = G[i], before[i]
        for row in range(4):
            a, k, total = b[i, row], b[i, 4 + row], y.dtype.type(0)
            for j in range(W):
                total += (g[row * W + j] - k * y[W + j]) * s[row * W + j]
            if 4 * i + row < K:
                out[4 * i + row] += a * total


@inner
def _scaled_key(k, out):
    """Write k times a power of two that brings it near length 1 if it is far from it; return |k|^2 and the power.

    The sum is taken in double precision, so that w = beta / |k|^2 has one rounding. 1 stands for 0.
    """
    squared, power, whole = 0.0, 1.0, len(k) // 16 * 16
    _spread(k, out, 4)
    for i in range(0, whole, 16):
        part = 0.0
        for j in range(16):
            part += np.float64(k[i + j]) * np.float64(k[i + j])
        squared += part
    for i in range(whole, len(k)):
        squared += np.float64(k[i]) * np.float64(k[i])
    if not (squared > SAFE and squared < 1 / SAFE):
        largest = 0.0
        for i in range(len(k)):
            largest = max(largest, abs(np.float64(k[i])))
        if largest > 0 and largest < np.inf:
            limit = 120 if k.itemsize == 4 else 1000
            power = math.ldexp(1.0, -min(max(math.frexp(largest)[1], -limit), limit))
            squared = 0.0
            for i in range(len(k)):
                scaled = k[i] * power
                out[i // 4, 4 + i % 4] = scaled
                squared += scaled * scaled
        if squared == 0:
            squared = 1.0
    return squared, power


@inner
def _decays(decay, t, h, E, out):
    """Write by what the state's rows are multiplied before a step."""
    if E > 1:
        _spread(decay[t, h], out, 0)
    else:
        factor = decay[t, h, 0] if E else decay.dtype.type(1)
        for i in range(len(out)):
            for j in range(4):
                out[i, j] = factor


@inner
def _spread(x, out, at):
    """Write four by four to the columns from `at` on."""
    whole = len(x) // 4
    for i in range(whole):
        for j in range(4):
            out[i, at + j] = x[4 * i + j]
    for i in range(4 * whole, len(x)):
        out[whole, at + i - 4 * whole] = x[i]


@inner
def _add_keys(power, along, results, b, out):
    factor, along, whole = out.dtype.type(power), out.dtype.type(along), len(out) // 4
    for i in range(whole):
        for j in range(4):
            out[4 * i + j] += factor * (results[i, j] + along * b[i, 4 + j])
    for j in range(len(out) - 4 * whole):
        out[4 * whole + j] += factor * (results[whole, j] + along * b[whole, 4 + j])


@inner
def _add_queries(results, out):
    whole = len(out) // 4
    for i in range(whole):
        for j in range(4):
            out[4 * i + j] += results[i, 4 + j]
    for j in range(len(out) - 4 * whole):
        out[4 * whole + j] += results[whole, 4 + j]


@inner
def _touch(x, begin, end, h):
    """Bring the rows of some tokens to the cache, many at a time; only what no thread writes, or they wait in turn."""
    total = x.dtype.type(0)
    for t in range(begin, end):
        for i in range(0, x.shape[2], 16):
            total += x[t, h, i]
    return total


@inner
def _clear(x, begin, end, first, last):
    for t in range(begin, end):
        for h in range(first, last):
            for i in range(x.shape[2]):
                x[t, h, i] = 0


@inner
def _copy_state(S, out):
    for i in range(len(S)):
        for j in range(S.shape[1]):
            out[i, j] = S[i, j]


@inner
def _load(state, left, out, W):
    """Copy W columns of [K V], padded with zeros."""
    for i in range(4 * len(out)):
        for j in range(W):
            inside = i < len(state) and left + j < state.shape[1]
            out[i // 4, i % 4 * W + j] = state[i, left + j] if inside else 0


@inner
def _store(S, left, state, W):
    for i in range(len(state)):
        for j in range(min(W, state.shape[1] - left)):
            state[i, left + j] = S[i // 4, i % 4 * W + j]
