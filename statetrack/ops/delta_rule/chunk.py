"""The delta rule in chunks: dense algebra inside a chunk, two matrix products per chunk across them.

With w, n from `scaled_keys`, decay products D inside the chunk, and S the state at its start,

    X = (I + L diag(w))^-1,  L_ij = D_ij k_i.k_j (j < i)
    F = X (n v - D_i0 K S),  u_j = w_j f_j
    o_t = D_t0 S^T q_t + sum_j D_tj (q_t.k_j) u_j,   S <- D_C0 S + sum_j D_Cj k_j u_j^T

(Yang et al., arXiv 2406.06484, section 3, with unnormalised keys and N factors per token as M = C N rows.) The inverse
is by substitution: with eigenvalues near -1 and repeated keys the powers in a Neumann series cancel catastrophically.
Keys and queries lie in one buffer, keys first, since both are multiplied by the same things. The backward keeps the
inverses and the states at chunk starts, and recomputes the rest block by block, so that forward and backward need
little more memory than inputs, outputs and gradients.

Letters: B batch, T tokens, S sequences, C tokens per chunk, N factors per token, M = C N, H heads, K key dim, V value
dim, R chunks in a block. Block tensors are [R H rows columns].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.decay import HeadDecay, KeyDecay, MildDecay, decayed, log_decay_grad
from statetrack.ops.layout import Block, Chunks, untraced

CHUNK_ROWS = 32  # target for M = C N
BLOCK_BYTES = 1 << 20  # of the largest temporary: a dozen of them stay in a core's cache
SAFE = 2.0**-60  # keys whose squared length lies between this and its inverse need no power of two: it changes nothing


@untraced
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
    given = [x for x in (q, k, v, beta, log_decay, initial_state) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return _Chunked.apply(q, k, v, beta, log_decay, scale, initial_state, lengths, keep)  # pyright: ignore[reportReturnType]


@dataclass
class _Inputs:
    """One block's inputs in the compute dtype, keys scaled."""

    kq: Tensor  # [R H M+C K] keys, then queries times scale
    k: Tensor  # [R H M K] the keys of kq
    v: Tensor  # [R H M V]
    w: Tensor  # [R H M 1]
    norm: Tensor  # [R H M 1]
    squared: Tensor  # [R H M 1]
    power: Tensor | None  # [R H M 1] what the stored keys were multiplied by, if not by 1
    decay: MildDecay | HeadDecay | KeyDecay


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, scale, initial_state, lengths, keep):
        chunks = _cut(k, v, lengths, initial_state.dtype)
        flat = _flatten(q, k, v, beta, log_decay)
        out = v.new_empty(v.shape[0] * v.shape[1], 1, *v.shape[3:])
        order = torch.tensor(chunks.order, device=q.device)
        state = initial_state[order]
        saved = []
        for block in chunks.blocks():
            x = _load(block, flat, scale, initial_state.dtype)
            M = x.k.shape[2]
            scores = x.decay.scores()
            inverse = _unit_lower_inverse(scores[:, :, :M] * x.w.mT)
            states = None
            if keep:
                states = state.new_empty(block.rows, *state.shape[1:])
                saved += [inverse, states]
            rest, u = _run_forward(block, x, state, inverse, states)
            o = torch.baddbmm(rest[:, :, M:].flatten(0, 1), scores[:, :, M:].flatten(0, 1), u.flatten(0, 1), beta=-1)
            block.scatter(out, o.unflatten(0, u.shape[:2]))
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
            block_grads = _block_backward(block, x, d_out, d_state, inverse=saved[2 * i], states=saved[2 * i + 1])
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
        return dq, dk, dv, d_beta, d_decay, None, d_initial, None, None


def _cut(k: Tensor, v: Tensor, lengths: list[int], dtype: torch.dtype) -> Chunks:
    """Cut every sequence into chunks of one length, so chosen that the longest has no padding to speak of."""
    N, H = v.shape[2], v.shape[3]
    rows = min(CHUNK_ROWS, max(16, 4 * k.shape[-1]))  # many more rows than K only cancel each other's digits
    longest = max(1, max(lengths, default=1))
    chunk = -(-longest // -(-longest // max(1, rows // N)))
    row_bytes = H * chunk * (N + 1) * max(k.shape[-1], v.shape[-1], chunk * N) * dtype.itemsize
    return Chunks(lengths, chunk, max(1, BLOCK_BYTES // row_bytes), k.device)


def _flatten(q, k, v, beta, log_decay) -> dict[str, Tensor]:
    """Return every input as [B*T N H D], the form in which `Block` reads and writes."""
    flat = {"q": q.unsqueeze(2), "k": k, "v": v, "beta": beta.unsqueeze(-1)}
    if log_decay is not None:
        flat["log_decay"] = (log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)).unsqueeze(2)
    return {name: x.flatten(0, 1) for name, x in flat.items()}


def _load(block: Block, flat: dict[str, Tensor], scale: float, dtype: torch.dtype) -> _Inputs:
    """Gather one block's inputs; key heads are repeated for the block only."""
    (R, C), (N, Hk, K), H = (block.rows, block.chunk), flat["k"].shape[1:], flat["v"].shape[2]
    M = C * N
    kq = torch.empty(R, Hk, M + C, K, dtype=dtype, device=flat["k"].device)
    k, q = kq[:, :, :M], kq[:, :, M:]
    block.gather(flat["k"], dtype, out=k)
    block.gather(flat["q"], dtype, out=q).mul_(scale)
    squared = k.square().sum(-1, keepdim=True)
    power = None
    if k.numel() and not (squared.min() > SAFE and squared.max() < 1 / SAFE):
        limit = 1000 if dtype == torch.float64 else 120
        power = torch.exp2(-torch.frexp(k.abs().amax(-1, keepdim=True)).exponent.clamp(-limit, limit).to(dtype))
        squared = k.mul_(power).square().sum(-1, keepdim=True)
        squared.masked_fill_(squared == 0, 1)
    if Hk < H:
        kq, squared = (t.repeat_interleave(H // Hk, dim=1) for t in (kq, squared))
        power = None if power is None else power.repeat_interleave(H // Hk, dim=1)
    v, beta = block.gather(flat["v"], dtype), block.gather(flat["beta"], dtype)
    log_decay = block.gather(flat["log_decay"], dtype) if "log_decay" in flat else None
    k = kq[:, :, :M]
    return _Inputs(kq, k, v, beta / squared, squared.sqrt(), squared, power, decayed(kq, k, log_decay))


def _unit_lower_inverse(strict: Tensor) -> Tensor:
    """Return (I + strict)^-1 for strictly lower triangular matrices, by substitution in blocks."""
    rows = strict.shape[-1]
    if rows <= 16 or rows % 2:
        eye = torch.eye(rows, dtype=strict.dtype, device=strict.device)
        return torch.linalg.solve_triangular(strict, eye.expand_as(strict), upper=False, unitriangular=True)
    first, last = slice(None, rows // 2), slice(rows // 2, None)
    a, b = _unit_lower_inverse(torch.stack([strict[..., first, first], strict[..., last, last]]))
    out = torch.zeros_like(strict)
    out[..., first, first], out[..., last, last] = a, b
    out[..., last, first] = (b @ (strict[..., last, first] @ a)).neg_()
    return out


def _run_forward(
    block: Block, x: _Inputs, state: Tensor, inverse: Tensor, states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Walk over a block's chunks; return [n v; 0] - D_i0 [k; q] S, and u.

    `state` holds every sequence's state before the block, and after it on return; `states` [R H K V] gets those at the
    chunks' starts.
    """
    M = x.k.shape[2]
    rest = x.v.new_empty(*x.kq.shape[:3], x.v.shape[3])
    torch.mul(x.v, x.norm, out=rest[:, :, :M])
    rest[:, :, M:] = 0
    u = torch.empty_like(x.v)
    flat = state[block.sequences].flatten(0, 1)
    parts = block.split(x.decay.into, x.decay.out, x.w, inverse, rest, u, x.decay.total, states)
    for into, out, w, X, left, step, total, kept in parts:
        S = flat[: len(into)]
        if kept is not None:
            kept.copy_(S)
        left.baddbmm_(into, S, alpha=-1)
        torch.mul(torch.bmm(X, left[:, :M]), w, out=step)
        if total is not None:
            S *= total
        S.baddbmm_(out.mT, step)
    return rest, u


def _run_backward(
    block: Block, x: _Inputs, d_state: Tensor, du: Tensor, d_rest: Tensor, inverse: Tensor, states: Tensor, u: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Walk back over a block's chunks; return the gradients to decay.out and (over V) to decay.total.

    Adds to du what comes through later chunks, and writes the keys' rows of d_rest = [-X^T diag(w) du; d_o], minus the
    gradient to `rest`. `d_state` holds the gradient to every sequence's state after the block, and before it on return.
    """
    M = x.k.shape[2]
    d_out = torch.empty_like(x.k)
    d_total = None if x.decay.total is None else states.new_empty(states.shape[:3])
    flat = d_state[block.sequences].flatten(0, 1)
    tensors = x.decay.into, x.decay.out, -x.w, inverse, u, du, d_rest, d_out, x.decay.total, states, d_total
    for into, out, minus_w, X, step, d_step, back, d_written, total, S, d_decayed in reversed(block.split(*tensors)):
        dS = flat[: len(into)]
        torch.bmm(step, dS.mT, out=d_written)
        d_step.baddbmm_(out, dS)
        back[:, :M] = torch.bmm(X.mT, d_step * minus_w)
        if total is not None:
            torch.sum(S * dS, -1, out=d_decayed)
            dS *= total
        dS.baddbmm_(into.mT, back)
    return d_out, d_total


def _block_backward(
    block: Block, x: _Inputs, d_out: Tensor, d_state: Tensor, inverse: Tensor, states: Tensor
) -> dict[str, Tensor]:
    """Return the gradients of one block's inputs; carries the gradient of the state in `d_state`.

    With H = X^T diag(w) du the gradient to n v - D_i0 K S, that of L diag(w) is -H F^T: one product [-H; d_o] F^T
    gives, column by column times w, the gradients of both L and the queries' scores.
    """
    M = x.k.shape[2]
    scores = x.decay.scores()
    d_rest = torch.empty(*x.kq.shape[:3], x.v.shape[3], dtype=x.v.dtype, device=x.v.device)
    d_o = block.gather(d_out, x.v.dtype, out=d_rest[:, :, M:])
    du = scores[:, :, M:].mT @ d_o
    f = inverse @ (x.v * x.norm).sub_(x.decay.into[:, :, :M] @ states)
    d_out_k, d_total = _run_backward(block, x, d_state, du, d_rest, inverse, states, f * x.w)

    d_scores = d_rest @ f.mT
    dw = f.mul_(du).sum(-1, keepdim=True)
    dw += (d_scores[:, :, :M] * scores[:, :, :M]).sum(-2).unsqueeze(-1)
    at_end = None if d_total is None else (x.decay.out * d_out_k).sum(2)
    d_kq, dk = x.decay.backward(d_scores.mul_(x.w.mT), d_rest @ states.mT, d_out_k)
    h = d_rest[:, :, :M].neg()

    grads = {"q": d_kq[:, :, M:], "v": h * x.norm, "beta": dw / x.squared}
    if x.decay.reset is not None and x.decay.total is not None and at_end is not None and d_total is not None:
        at_end += x.decay.total.squeeze(-1) * d_total
        grads["log_decay"] = _decay_grad(x, x.decay.reset, d_kq, dk, at_end)
    d_norm = h.mul_(x.v).sum(-1, keepdim=True)
    d_squared = (d_norm / x.norm).mul_(0.5).sub_(grads["beta"] * x.w)
    grads["k"] = dk.add_(d_kq[:, :, :M]).addcmul_(x.k, d_squared, value=2)
    if x.power is not None:
        grads["k"].mul_(x.power)
    return grads


def _decay_grad(x: _Inputs, reset: Tensor, d_kq: Tensor, dk: Tensor, at_end: Tensor) -> Tensor:
    """Return the gradient to log_decay: what reads at i gains g_i, what is written at j loses g_j.

    Every use of token i as the later one of a pair carries exp(+g_i), as the earlier one exp(-g_i); the chunk's end
    is a reader of all of it, which gives it at_end [R H K].
    """
    C, E, M = reset.shape[2], reset.shape[-1], x.k.shape[2]

    def reduce(t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True) if E == 1 else t

    dg = reduce(x.kq[:, :, M:] * d_kq[:, :, M:])
    dg += reduce(x.k * (d_kq[:, :, :M] - dk)).unflatten(2, (C, -1)).sum(3)
    dg[:, :, -1] += reduce(at_end)
    return log_decay_grad(dg, reset)
