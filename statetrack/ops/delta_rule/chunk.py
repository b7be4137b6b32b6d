"""The delta rule in chunks: dense algebra inside a chunk, one matrix product per chunk across them.

With w, n from `scaled_keys`, decay products D inside the chunk, and S the state at its start,

    X = (I + L diag(w))^-1,  L_ij = D_ij k_i.k_j (j < i)
    W = X D_i0 K,  F = X n v - W S,  u_j = w_j f_j
    o_t = D_t0 S^T q_t + sum_j D_tj (q_t.k_j) u_j,   S <- D_C0 S + sum_j D_Cj k_j u_j^T

(Yang et al., arXiv 2406.06484, section 3, with unnormalised keys and N factors per token as M = C N rows.) The inverse
is by substitution: with eigenvalues near -1 and repeated keys the powers in a Neumann series cancel catastrophically.
The backward keeps the inverses and the states at chunk starts, and recomputes the rest block by block, so that forward
and backward need little more memory than inputs, outputs and gradients.

Letters: B batch, T tokens, S sequences, C tokens per chunk, N factors per token, M = C N, H heads, K key dim, V value
dim, R chunks in a block. Block tensors are [R H rows columns].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.decay import HeadDecay, KeyDecay, log_decay_grad
from statetrack.ops.layout import Block, Chunks

CHUNK_ROWS = 64  # target for M = C N
BLOCK_BYTES = 1 << 20  # of the largest temporary: a dozen of them stay in a core's cache


def delta_rule_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `delta_rule` chunk by chunk, with gradients to every tensor (once differentiable)."""
    return _Chunked.apply(q, k, v, beta, log_decay, scale, initial_state, lengths)  # pyright: ignore[reportReturnType]


@dataclass
class _Inputs:
    """One block's inputs in the compute dtype, keys scaled."""

    q: Tensor  # [R H C K], times scale
    k: Tensor  # [R H M K]
    v: Tensor  # [R H M V]
    w: Tensor  # [R H M 1]
    norm: Tensor  # [R H M 1]
    squared: Tensor  # [R H M 1]
    power: Tensor  # [R H M 1] what the stored keys were multiplied by
    decay: HeadDecay | KeyDecay


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, scale, initial_state, lengths):
        chunks = _cut(k, v, lengths, initial_state.dtype)
        flat = _flatten(q, k, v, beta, log_decay)
        out = v.new_empty(v.shape[0] * v.shape[1], 1, *v.shape[3:])
        order = torch.tensor(chunks.order, device=q.device)
        state = initial_state[order]
        saved = []
        for block in chunks.blocks():
            x = _load(block, flat, scale, initial_state.dtype)
            inverse = _unit_lower_inverse(x.decay.scores(x.k, x.k, strict=True).mul_(x.w.mT))
            W, F = inverse @ _times(x.k, x.decay.start_k), inverse @ (x.v * x.norm)
            states = _run_forward(block, x, state, W, F, kw=x.k * _times(x.w, x.decay.end_k))
            o = _times(x.q, x.decay.start_q) @ states
            o += x.decay.scores(x.q, x.k, strict=False) @ F.mul_(x.w)
            block.scatter(out, o)
            if any(ctx.needs_input_grad):
                saved += [inverse, states]
        final = torch.empty_like(state)
        final[order] = state
        ctx.save_for_backward(q, k, v, beta, log_decay, *saved)
        ctx.scale, ctx.lengths = scale, lengths
        return out.view(v.shape[0], v.shape[1], *v.shape[3:]), final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, beta, log_decay, *saved = ctx.saved_tensors
        chunks = _cut(k, v, ctx.lengths, d_final.dtype)
        flat = _flatten(q, k, v, beta, log_decay)
        grads = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in flat.items()}
        order = torch.tensor(chunks.order, device=q.device)
        d_state = d_final[order]
        d_out = d_out.flatten(0, 1).unsqueeze(1)
        for i, block in reversed(list(enumerate(chunks.blocks()))):
            x = _load(block, flat, ctx.scale, d_final.dtype)
            d_o = block.gather(d_out, d_final.dtype)
            block_grads = _block_backward(block, x, d_o, d_state, inverse=saved[2 * i], states=saved[2 * i + 1])
            block_grads["q"].mul_(ctx.scale)
            for name, grad in block_grads.items():
                groups = grad.shape[1] // grads[name].shape[2]
                block.scatter(grads[name], grad if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2))
        d_initial = torch.empty_like(d_state)
        d_initial[order] = d_state
        dq, dk, dv, d_beta, d_decay = (
            None if x is None else grads[name].view(x.shape)
            for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta), ("log_decay", log_decay))
        )
        return dq, dk, dv, d_beta, d_decay, None, d_initial, None


def _cut(k: Tensor, v: Tensor, lengths: list[int], dtype: torch.dtype) -> Chunks:
    N, H = v.shape[2], v.shape[3]
    rows = min(CHUNK_ROWS, max(16, 4 * k.shape[-1]))  # many more rows than K only cancel each other's digits
    chunk = max(1, min(rows // N, max(lengths, default=1)))
    row_bytes = chunk * N * H * max(k.shape[-1], v.shape[-1], chunk * N) * dtype.itemsize
    return Chunks(lengths, chunk, max(1, BLOCK_BYTES // row_bytes), k.device)


def _flatten(q, k, v, beta, log_decay) -> dict[str, Tensor]:
    """Return every input as [B*T N H D], the form in which `Block` reads and writes."""
    flat = {"q": q.unsqueeze(2), "k": k, "v": v, "beta": beta.unsqueeze(-1)}
    if log_decay is not None:
        flat["log_decay"] = (log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)).unsqueeze(2)
    return {name: x.flatten(0, 1) for name, x in flat.items()}


def _load(block: Block, flat: dict[str, Tensor], scale: float, dtype: torch.dtype) -> _Inputs:
    """Gather one block's inputs; key heads are repeated for the block only."""
    x = {name: block.gather(t, dtype) for name, t in flat.items()}
    q, k, v = x["q"].mul_(scale), x["k"], x["v"]
    limit = 1000 if dtype == torch.float64 else 120
    largest = k.abs().amax(-1, keepdim=True)
    power = torch.exp2(-torch.frexp(largest).exponent.clamp(-limit, limit).to(dtype))
    k = k.mul_(power)
    squared = k.square().sum(-1, keepdim=True)
    squared.masked_fill_(squared == 0, 1)
    groups = v.shape[1] // k.shape[1]
    if groups > 1:
        q, k, power, squared = (t.repeat_interleave(groups, dim=1) for t in (q, k, power, squared))
    C, N = q.shape[2], k.shape[2] // q.shape[2]
    log_decay = x.get("log_decay")
    if log_decay is None or log_decay.shape[-1] != q.shape[-1] or q.shape[-1] == 1:
        decay = HeadDecay(log_decay, C, N, dtype, q.device)
    else:
        decay = KeyDecay(log_decay, C, N, dtype)
    return _Inputs(q, k, v, x["beta"] / squared, squared.sqrt(), squared, power, decay)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _unit_lower_inverse(strict: Tensor) -> Tensor:
    """Return (I + strict)^-1 for strictly lower triangular matrices, by substitution in two blocks."""
    rows = strict.shape[-1]
    eye = torch.eye(rows, dtype=strict.dtype, device=strict.device)
    return torch.linalg.solve_triangular(strict, eye.expand_as(strict), upper=False, unitriangular=True)


def _run_forward(block: Block, x: _Inputs, state: Tensor, W: Tensor, F: Tensor, kw: Tensor) -> Tensor:
    """Turn Y into F = Y - W S in place, chunk after chunk, and return the state at every chunk's start [R H K V].

    `state` holds every sequence's state before the block, and after it on return.
    """
    states = F.new_empty(*F.shape[:2], kw.shape[-1], F.shape[-1])
    state = state[block.sequences]
    for rows, alive in block.steps():
        S = state[:alive]
        states[rows] = S
        F[rows] -= W[rows] @ S
        if x.decay.total is not None:
            S.mul_(x.decay.total[rows])
        S += kw[rows].mT @ F[rows]
    return states


def _run_backward(block: Block, x: _Inputs, d_state: Tensor, dU: Tensor, d_read: Tensor, W: Tensor) -> Tensor:
    """Add to dU what comes through later chunks, and return the gradient to the state at every chunk's end [R H K V].

    `d_state` holds the gradient to every sequence's state after the block, and before it on return.
    """
    d_ends = torch.empty_like(d_read)
    d_state = d_state[block.sequences]
    end_k = _times(x.k, x.decay.end_k)
    for rows, alive in reversed(block.steps()):
        dS = d_state[:alive]
        d_ends[rows] = dS
        dU[rows] += end_k[rows] @ dS
        if x.decay.total is not None:
            dS.mul_(x.decay.total[rows])
        dS += d_read[rows]
        dS -= W[rows].mT @ (dU[rows] * x.w[rows])
    return d_ends


def _block_backward(
    block: Block, x: _Inputs, d_o: Tensor, d_state: Tensor, inverse: Tensor, states: Tensor
) -> dict[str, Tensor]:
    """Return the gradients of one block's inputs; carries the gradient of the state in `d_state`.

    H = inverse^T diag(w) dU is the gradient to the right-hand side n v - D_i0 K S; L's is -H F^T diag(w).
    """
    L = x.decay.scores(x.k, x.k, strict=True)
    W = inverse @ _times(x.k, x.decay.start_k)
    dU = x.decay.scores(x.q, x.k, strict=False).mT @ d_o
    d_ends = _run_backward(block, x, d_state, dU, _times(x.q, x.decay.start_q).mT @ d_o, W)
    F = (inverse @ (x.v * x.norm)).sub_(W @ states)
    U = F * x.w
    H = inverse.mT @ (dU * x.w)

    d_see = d_o @ U.mT
    dq, dk_right = x.decay.scores_vjp(d_see, x.q, x.k, strict=False)
    HF = H @ F.mT
    dw = (F * dU).sum(-1, keepdim=True).sub_((HF * L).sum(-2).unsqueeze(-1))
    dk_left, dk_more = x.decay.scores_vjp(HF.mul_(x.w.mT).neg_(), x.k, x.k, strict=True)
    dq += _times(d_o @ states.mT, x.decay.start_q)
    dk_left -= _times(H @ states.mT, x.decay.start_k)
    dk_end = _times(U @ d_ends.mT, x.decay.end_k)
    dk_right += dk_more.add_(dk_end)

    grads = {"q": dq, "v": H * x.norm, "beta": dw / x.squared}
    if x.decay.reset is not None and x.decay.total is not None:
        carried = x.decay.total * (states * d_ends).sum(-1, keepdim=True)
        grads["log_decay"] = _decay_grad(x, x.decay.reset, dq, dk_left - dk_right, dk_end, carried.squeeze(-1))
    d_norm = (H * x.v).sum(-1, keepdim=True)
    d_squared = (d_norm / x.norm).mul_(0.5).sub_(grads["beta"] * x.w)
    grads["k"] = dk_left.add_(dk_right).addcmul_(x.k, d_squared, value=2).mul_(x.power)
    return grads


def _decay_grad(x: _Inputs, reset: Tensor, dq: Tensor, dk: Tensor, dk_end: Tensor, carried: Tensor) -> Tensor:
    """Return the gradient to log_decay: what is read at i gains g_i, what is written at j loses g_j.

    Every use of token i as the later one of a pair carries exp(+g_i), as the earlier one exp(-g_i); the chunk's end
    is a reader of all of it.
    """
    C, E = x.q.shape[2], reset.shape[-1]

    def reduce(t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True) if E == 1 else t

    dg = reduce(x.q * dq)
    dg += reduce(x.k * dk).unflatten(2, (C, -1)).sum(3)
    at_end = reduce(x.k * dk_end).sum(2) + reduce(carried)
    dg[:, :, -1] += at_end
    return log_decay_grad(dg, reset)
