"""The delta rule, token by token: the definition that everything else is tested against.

Letters: B batch, T tokens, N factors per token, H value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_keys(k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys brought near length 1 by an exact power of two, w = beta / (k . k), and |k|.

    The scaling changes no direction and rounds nothing, and `w` is one division by the squared norm of the key *as
    stored*, so each factor I - w k k^T has the eigenvalue 1 - beta to the rounding of `w`, whatever the dtype of k.
    A zero key counts as having length 1: the factor is the identity and its gradients are finite.

    Shapes: k [..., K], beta [...]; returns [..., K], [...], [...].
    """
    limit = 1000 if k.dtype == torch.float64 else 120  # keeps 2^-exponent itself a normal number
    exponent = torch.frexp(k.detach().abs().amax(-1, keepdim=True)).exponent
    k = k * torch.exp2(-exponent.clamp(-limit, limit).to(k.dtype))
    squared = (k * k).sum(-1)
    squared = torch.where(squared == 0, torch.ones_like(squared), squared)
    return k, beta / squared, squared.sqrt()


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of `delta_rule` one factor at a time, on tensors that share one float dtype.

    `lengths` has one entry per sequence: equal ones for a batch [B T ...], any for sequences packed along T with B = 1.
    """
    groups = v.shape[3] // k.shape[3]
    q, k = q.repeat_interleave(groups, dim=2), k.repeat_interleave(groups, dim=3)
    k, w, norm = scaled_keys(k, beta)
    packed = len(lengths) != q.shape[0]
    if packed:
        outs, states, start = [], [], 0
        for s, length in enumerate(lengths):
            part = slice(start, start + length)
            o, state = _loop(
                *(x if x is None else x[:, part] for x in (q, k, v, w, norm, log_decay)), initial_state[s : s + 1]
            )
            outs, states, start = [*outs, o], [*states, state], start + length
        return torch.cat(outs, dim=1) * scale, torch.cat(states)
    o, state = _loop(q, k, v, w, norm, log_decay, initial_state)
    return o * scale, state


def _loop(q, k, v, w, norm, log_decay, state: Tensor) -> tuple[Tensor, Tensor]:
    out = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            decay = log_decay[:, t].exp()  # [B H] or [B H K]
            state = state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
        for j in range(k.shape[2]):
            kj, wj, vj = k[:, t, j], w[:, t, j, :, None], v[:, t, j] * norm[:, t, j, :, None]
            read = (kj[..., None] * state).sum(-2)
            state = state + (wj * kj)[..., None] * (vj - read)[..., None, :]
        out.append((q[:, t, :, :, None] * state).sum(-2))
    o = torch.stack(out, dim=1) if out else v.new_zeros(v.shape[0], 0, *v.shape[3:])
    return o, state
