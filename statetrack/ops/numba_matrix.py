"""`gated_linear_attention` and `dplr` token by token in compiled code (CPU): the state stays in a core's cache.

    S <- diag(w) S + b (a^T S) + k v^T,   o = scale S^T q

where gated linear attention has no a and b. With P the state before a token, u = P^T a and G the gradient to the state
after it, what its own output asks for included, the gradients of a token are

    dv = G^T k,  du = G^T b,  dk = G v,  db = G u,  da = P du,  dw = rowsum(G P),  dq = w (P do) + k (v.do) + b (u.do)

and the gradient to P is diag(w) G + a du^T: no quotient, whatever the sign of w or if it is 0. The backward runs the
recurrence again, keeps the state at the start of every CHUNK tokens, and from the last chunk to the first fills in the
chunk's states and goes back over them.

Letters: S sequences, T tokens of all, H heads, K key dim, V value dim; E = 1 (a decay per head) or K. The state is held
W columns at a time as [K / 4, 4 W], four of its rows side by side, padded with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.layout import untraced
from statetrack.ops.numba_common import array, inner, kernel, spread, starts

CHUNK = 16  # tokens whose states the backward holds: 256 KiB at K = W = 64


@untraced
def gated_linear_attention_numba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `gated_linear_attention` in the dtype of initial_state, with gradients to every tensor (once)."""
    decay = decay if decay.ndim == 4 else decay.unsqueeze(-1)
    return _Recurrence.apply(scale, lengths, initial_state, q, k, v, decay)  # pyright: ignore[reportReturnType]


@untraced
def dplr_numba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `dplr` in the dtype of initial_state, with gradients to every tensor (once differentiable)."""
    decay = log_decay.to(initial_state.dtype).exp()
    return _Recurrence.apply(scale, lengths, initial_state, q, k, v, decay, a, b)  # pyright: ignore[reportReturnType]


class _Recurrence(torch.autograd.Function):
    """Both ops; `tensors` are q, k, v, decay [B T H E] and, of `dplr` alone, a and b."""

    @staticmethod
    def forward(ctx, scale, lengths, initial_state, *tensors):
        v, dtype = tensors[2], initial_state.dtype
        o, final = (torch.empty(x.shape, dtype=dtype) for x in (v, initial_state))
        lanes, inputs = _arguments(scale, lengths, initial_state, tensors)
        items = len(lengths) * v.shape[2] * -(-v.shape[3] // len(lanes))
        work = len(tensors) * v.numel() * initial_state.shape[2]
        spread(_forward, items, work, *inputs, o.flatten(0, 1).numpy(), final.numpy())
        ctx.save_for_backward(initial_state, *tensors)
        ctx.scale, ctx.lengths = scale, lengths
        return o.to(v.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        initial_state, *tensors = ctx.saved_tensors
        dtype = initial_state.dtype
        grads = [torch.empty(x.shape, dtype=dtype) for x in tensors]
        d_initial = torch.empty(initial_state.shape, dtype=dtype)
        outputs = [x.flatten(0, 1).numpy() for x in grads] + [None] * (6 - len(grads))
        _, inputs = _arguments(ctx.scale, ctx.lengths, initial_state, tensors)
        given = array(d_o.flatten(0, 1), dtype), array(d_final, dtype)
        work = 3 * len(tensors) * tensors[2].numel() * initial_state.shape[2]
        spread(_backward, len(ctx.lengths) * tensors[0].shape[2], work, *inputs, *given, *outputs, d_initial.numpy())
        return None, None, d_initial, *(grad.to(x.dtype) for grad, x in zip(grads, tensors, strict=True))


def _arguments(scale, lengths, initial_state, tensors) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Return the lanes, a tuple of W numbers (compiled code knows its length), and what both kernels take first."""
    dtype, width = initial_state.dtype, initial_state.shape[3]
    lanes = (0,) * (16 if width <= 16 else 32 if width <= 32 else 64)
    by_token = [array(x.flatten(0, 1), dtype) for x in tensors] + [None] * (6 - len(tensors))
    initial = array(initial_state, dtype)
    return lanes, (lanes, starts(lengths), initial.dtype.type(scale), *by_token, initial)


@kernel
def _forward(first, last, lanes, offsets, scale, q, k, v, decay, a, b, initial, o, final):
    """Write o [T H V] and the states after every sequence [S H K V]; an item is one head's W columns of a sequence."""
    (H, V), (Hk, K), W = v.shape[1:], k.shape[1:], len(lanes)
    parts, blocks = (V + W - 1) // W, (K + 3) // 4
    states, x, c = np.zeros((1, blocks, 4 * W), v.dtype), np.zeros(3 * W, v.dtype), np.zeros((5, 4 * blocks), v.dtype)
    fours, U = c.reshape(5, blocks, 4), np.empty((0, W), v.dtype)
    for item in range(first, last):
        s, h, left = item // parts // H, item // parts % H, item % parts * W
        where, begin, end = (h // (H // Hk), h, left, min(left + W, V)), offsets[s], offsets[s + 1]
        _load(initial[s, h], left, states[0], W)
        _walk(begin, end, where, scale, q, k, v, decay, a, b, states, U, o, x, c, fours, lanes)
        _store(states[0], left, final[s, h], W)


@kernel
def _backward(
    first, last, lanes, offsets, scale, q, k, v, decay, a, b, initial, d_o, d_final,
    dq, dk, dv, d_decay, da, db, d_initial,
):  # fmt: skip
    """Write the gradients, each in the shape of what it belongs to; an item is the heads of a sequence with one key."""
    (H, V), (Hk, K), W = v.shape[1:], k.shape[1:], len(lanes)
    group, blocks, longest = H // Hk, (K + 3) // 4, np.max(offsets[1:] - offsets[:-1])
    kept = np.empty(((longest + CHUNK - 1) // CHUNK, blocks, 4 * W), v.dtype)
    states, G = np.zeros((CHUNK + 1, blocks, 4 * W), v.dtype), np.zeros((blocks, 4 * W), v.dtype)
    U, x, y = np.zeros((CHUNK, W), v.dtype), np.zeros(3 * W, v.dtype), np.zeros(5 * W, v.dtype)
    c, results = np.zeros((5, 4 * blocks), v.dtype), np.zeros((5, 4 * blocks), v.dtype)
    fours, by_four = c.reshape(5, blocks, 4), results.reshape(5, blocks, 4)
    for item in range(first, last):
        s, hk = item // Hk, item % Hk
        begin, end = offsets[s], offsets[s + 1]
        chunks = (end - begin + CHUNK - 1) // CHUNK
        _clear(dq, begin, end, hk, hk + 1)
        _clear(dk, begin, end, hk, hk + 1)
        for h in range(hk * group, hk * group + group):
            _clear(d_decay, begin, end, h, h + 1)
            if a is not None:
                _clear(da, begin, end, h, h + 1)
                _clear(db, begin, end, h, h + 1)
            for left in range(0, V, W):
                where = hk, h, left, min(left + W, V)
                _load(initial[s, h], left, states[0], W)
                for chunk in range(chunks):
                    start, stop = begin + chunk * CHUNK, min(begin + chunk * CHUNK + CHUNK, end)
                    _copy(states[0], kept[chunk])
                    _walk(start, stop, where, scale, q, k, v, decay, a, b, states, U, None, x, c, fours, lanes)
                    if chunk < chunks - 1:
                        _copy(states[CHUNK], states[0])
                _load(d_final[s, h], left, G, W)
                for chunk in range(chunks - 1, -1, -1):
                    start, stop = begin + chunk * CHUNK, min(begin + chunk * CHUNK + CHUNK, end)
                    if chunk < chunks - 1:
                        _copy(kept[chunk], states[0])
                        _walk(start, stop, where, scale, q, k, v, decay, a, b, states, U, None, x, c, fours, lanes)
                    _walk_back(
                        start, stop, where, scale, q, k, v, decay, a, b, d_o, states, U, G, y, c, fours,
                        results, by_four, dq, dk, dv, d_decay, da, db, lanes,
                    )  # fmt: skip
                _store(G, left, d_initial[s, h], W)


# What follows works on views without counting references to them. `c` holds w, k, q, b and a of a token, a number per
# row of the state, and `fours` is the same memory seen as [5 K/4 4]; `results` and `by_four` likewise. The vectors of W
# numbers that a sweep needs lie in one array (forward x: v, o, u; backward y: v, do, u, dv, du), and W is a constant,
# so that the compiler sees that none overlaps another.


@inner
def _walk(start, stop, where, scale, q, k, v, decay, a, b, states, U, o, x, c, fours, lanes):
    """Take states[0] over the tokens: with o in place, writing o, without it from one of `states` to the next."""
    (hk, h, left, right), W = where, len(lanes)
    for j in range(3 * W):
        x[j] = 0
    for t in range(start, stop):
        i = t - start
        before, after = (states[i], states[i + 1]) if o is None else (states[0], states[0])
        _fill_coefficients(t, hk, h, q, k, decay, a, b, c)
        _fill_vector(v[t, h, left:right], x)
        if a is not None:
            _read(before, fours, x[2 * W : 3 * W], lanes)
            if i < len(U):
                for j in range(W):
                    U[i, j] = x[2 * W + j]
        _update(before, after, x, fours, a, o, lanes)
        if o is not None:
            out = o[t, h, left:right]
            for j in range(len(out)):
                out[j] = scale * x[W + j]


@inner
def _fill_coefficients(t, hk, h, q, k, decay, a, b, c):
    if decay.shape[2] > 1:
        _fill_vector(decay[t, h], c[0])
    else:
        for i in range(c.shape[1]):
            c[0, i] = decay[t, h, 0]
    _fill_vector(k[t, hk], c[1])
    _fill_vector(q[t, hk], c[2])
    if a is not None:
        _fill_vector(b[t, h], c[3])
        _fill_vector(a[t, h], c[4])


@inner
def _fill_vector(x, out):
    for i in range(len(x)):
        out[i] = x[i]


@inner
def _read(S, c, u, lanes):
    """u <- S^T a."""
    W = len(lanes)
    for j in range(W):
        u[j] = 0
    for i in range(len(S)):
        s, a0, a1, a2, a3 = S[i], c[4, i, 0], c[4, i, 1], c[4, i, 2], c[4, i, 3]
        for j in range(W):
            u[j] += a0 * s[j] + a1 * s[W + j] + a2 * s[2 * W + j] + a3 * s[3 * W + j]


@inner
def _update(before, after, x, c, a, o, lanes):
    """after <- diag(w) before + k v^T + b u^T; with o in place of before, and then o <- S^T q."""
    W = len(lanes)
    for j in range(W):
        x[W + j] = 0
    for i in range(len(after)):
        s, out = before[i], after[i]
        w0, w1, w2, w3 = c[0, i, 0], c[0, i, 1], c[0, i, 2], c[0, i, 3]
        k0, k1, k2, k3 = c[1, i, 0], c[1, i, 1], c[1, i, 2], c[1, i, 3]
        q0, q1, q2, q3 = c[2, i, 0], c[2, i, 1], c[2, i, 2], c[2, i, 3]
        b0, b1, b2, b3 = c[3, i, 0], c[3, i, 1], c[3, i, 2], c[3, i, 3]
        for j in range(W):
            v = x[j]
            s0, s1 = w0 * s[j] + k0 * v, w1 * s[W + j] + k1 * v
            s2, s3 = w2 * s[2 * W + j] + k2 * v, w3 * s[3 * W + j] + k3 * v
            if a is not None:
                u = x[2 * W + j]
                s0, s1, s2, s3 = s0 + b0 * u, s1 + b1 * u, s2 + b2 * u, s3 + b3 * u
            if o is None:
                out[j], out[W + j], out[2 * W + j], out[3 * W + j] = s0, s1, s2, s3
            else:
                s[j], s[W + j], s[2 * W + j], s[3 * W + j] = s0, s1, s2, s3
                x[W + j] += q0 * s0 + q1 * s1 + q2 * s2 + q3 * s3


@inner
def _walk_back(
    start, stop, where, scale, q, k, v, decay, a, b, d_o, states, U, G, y, c, fours,
    results, by_four, dq, dk, dv, d_decay, da, db, lanes,
):  # fmt: skip
    """Take G back over the tokens and write or add their gradients."""
    (hk, h, left, right), W = where, len(lanes)
    for j in range(5 * W):
        y[j] = 0
    for t in range(stop - 1, start - 1, -1):
        i, given, vs, along_k, along_b = t - start, d_o[t, h, left:right], v[t, h, left:right], scale * 0, scale * 0
        _fill_coefficients(t, hk, h, q, k, decay, a, b, c)
        for j in range(len(vs)):
            y[j] = vs[j]
            y[W + j] = scale * given[j]
        for j in range(W):
            along_k += y[j] * y[W + j]
        if a is not None:
            for j in range(W):
                y[2 * W + j] = U[i, j]
                along_b += U[i, j] * y[W + j]
        _sweep_back(states[i], G, y, fours, by_four, a, lanes)
        if a is not None:
            _sweep_back_again(states[i], G, y, fours, by_four, lanes)
            _add(results[3], db[t, h])
            _add(results[4], da[t, h])
        out = dv[t, h, left:right]
        for j in range(len(out)):
            out[j] = y[3 * W + j]
        _add(results[0], dk[t, hk])
        if decay.shape[2] > 1:
            _add(results[1], d_decay[t, h])
        else:
            for row in range(results.shape[1]):
                d_decay[t, h, 0] += results[1, row]
        _add_queries(results[2], c, along_k, along_b, dq[t, hk])


@inner
def _sweep_back(P, G, y, c, results, a, lanes):
    """G <- G + q do^T, or without a at once diag(w) times that, in place.

    From G before that product: dv <- G^T k, du <- G^T b; row by row dk <- G v, dw <- rowsum(G P), db <- G u; P do.
    """
    W, zero = len(lanes), y.dtype.type(0)
    for j in range(2 * W):
        y[3 * W + j] = 0
    for i in range(len(G)):
        g, p = G[i], P[i]
        w0, w1, w2, w3 = c[0, i, 0], c[0, i, 1], c[0, i, 2], c[0, i, 3]
        k0, k1, k2, k3 = c[1, i, 0], c[1, i, 1], c[1, i, 2], c[1, i, 3]
        q0, q1, q2, q3 = c[2, i, 0], c[2, i, 1], c[2, i, 2], c[2, i, 3]
        b0, b1, b2, b3 = c[3, i, 0], c[3, i, 1], c[3, i, 2], c[3, i, 3]
        dk0, dk1, dk2, dk3, dw0, dw1, dw2, dw3 = zero, zero, zero, zero, zero, zero, zero, zero
        dq0, dq1, dq2, dq3, db0, db1, db2, db3 = zero, zero, zero, zero, zero, zero, zero, zero
        for j in range(W):
            v, do = y[j], y[W + j]
            p0, p1, p2, p3 = p[j], p[W + j], p[2 * W + j], p[3 * W + j]
            g0, g1 = g[j] + q0 * do, g[W + j] + q1 * do
            g2, g3 = g[2 * W + j] + q2 * do, g[3 * W + j] + q3 * do
            dk0, dk1, dk2, dk3 = dk0 + g0 * v, dk1 + g1 * v, dk2 + g2 * v, dk3 + g3 * v
            dw0, dw1, dw2, dw3 = dw0 + g0 * p0, dw1 + g1 * p1, dw2 + g2 * p2, dw3 + g3 * p3
            dq0, dq1, dq2, dq3 = dq0 + p0 * do, dq1 + p1 * do, dq2 + p2 * do, dq3 + p3 * do
            y[3 * W + j] += k0 * g0 + k1 * g1 + k2 * g2 + k3 * g3
            if a is None:
                g0, g1, g2, g3 = w0 * g0, w1 * g1, w2 * g2, w3 * g3
            else:
                u = y[2 * W + j]
                db0, db1, db2, db3 = db0 + g0 * u, db1 + g1 * u, db2 + g2 * u, db3 + g3 * u
                y[4 * W + j] += b0 * g0 + b1 * g1 + b2 * g2 + b3 * g3
            g[j], g[W + j], g[2 * W + j], g[3 * W + j] = g0, g1, g2, g3
        results[0, i, 0], results[0, i, 1], results[0, i, 2], results[0, i, 3] = dk0, dk1, dk2, dk3
        results[1, i, 0], results[1, i, 1], results[1, i, 2], results[1, i, 3] = dw0, dw1, dw2, dw3
        results[2, i, 0], results[2, i, 1], results[2, i, 2], results[2, i, 3] = dq0, dq1, dq2, dq3
        results[3, i, 0], results[3, i, 1], results[3, i, 2], results[3, i, 3] = db0, db1, db2, db3


@inner
def _sweep_back_again(P, G, y, c, results, lanes):
    """G <- diag(w) G + a du^T in place; row by row da <- P du."""
    W, zero = len(lanes), y.dtype.type(0)
    for i in range(len(G)):
        g, p = G[i], P[i]
        w0, w1, w2, w3 = c[0, i, 0], c[0, i, 1], c[0, i, 2], c[0, i, 3]
        a0, a1, a2, a3 = c[4, i, 0], c[4, i, 1], c[4, i, 2], c[4, i, 3]
        da0, da1, da2, da3 = zero, zero, zero, zero
        for j in range(W):
            du = y[4 * W + j]
            da0, da1 = da0 + p[j] * du, da1 + p[W + j] * du
            da2, da3 = da2 + p[2 * W + j] * du, da3 + p[3 * W + j] * du
            g[j], g[W + j] = w0 * g[j] + a0 * du, w1 * g[W + j] + a1 * du
            g[2 * W + j], g[3 * W + j] = w2 * g[2 * W + j] + a2 * du, w3 * g[3 * W + j] + a3 * du
        results[4, i, 0], results[4, i, 1], results[4, i, 2], results[4, i, 3] = da0, da1, da2, da3


@inner
def _add(x, out):
    for i in range(len(out)):
        out[i] += x[i]


@inner
def _add_queries(reads, c, along_k, along_b, out):
    """dq <- dq + w (P do) + k (v.do) + b (u.do)."""
    for i in range(len(out)):
        out[i] += c[0, i] * reads[i] + c[1, i] * along_k + c[3, i] * along_b


@inner
def _clear(x, begin, end, first, last):
    for t in range(begin, end):
        for h in range(first, last):
            for i in range(x.shape[2]):
                x[t, h, i] = 0


@inner
def _copy(S, out):
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
