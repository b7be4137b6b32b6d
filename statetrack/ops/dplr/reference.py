"""Diagonal plus low rank, token by token: the definition that everything else is tested against.

Letters: B batch, T tokens, H value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dplr_reference(
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
    """Run the recurrence of `dplr` one token at a time, on tensors that share one float dtype.

    `lengths` has one entry per sequence: equal ones for a batch [B T ...], any for sequences packed along T with B = 1.
    """
    groups = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(groups, dim=2), k.repeat_interleave(groups, dim=2)
    decay = log_decay.exp()

    def loop(tokens: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for t in range(tokens.start, tokens.stop):
            read = (a[:, t, ..., None] * state).sum(-2, keepdim=True)
            written = b[:, t, ..., None] * read + k[:, t, ..., None] * v[:, t, :, None]
            state = decay[:, t, ..., None] * state + written
            out.append((q[:, t, ..., None] * state).sum(-2))
        return torch.stack(out, dim=1) * scale if out else v[:, tokens], state

    if len(lengths) == q.shape[0]:
        return loop(slice(0, q.shape[1]), initial_state)
    outs, states, start = [], [], 0
    for s, length in enumerate(lengths):
        o, state = loop(slice(start, start + length), initial_state[s : s + 1])
        outs, states, start = [*outs, o], [*states, state], start + length
    return torch.cat(outs, dim=1), torch.cat(states)
