"""The selective scan, token by token: the definition that everything else is tested against.

Letters: B batch, T tokens, D channels, M states per channel, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_reference(
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
    """Run the recurrence of `selective_scan` one token at a time, on tensors that share one float dtype.

    `lengths` has one entry per sequence: equal ones for a batch [B T ...], any for sequences packed along T with B = 1.
    """
    lo, hi = eigenvalues

    def loop(tokens: slice, rows: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for t in range(tokens.start, tokens.stop):
            a = lo + (hi - lo) * torch.exp(dt[rows, t, :, None] * A)
            h = a * h + (dt[rows, t] * u[rows, t])[..., None] * B[rows, t, None, :]
            out.append((h * C[rows, t, None, :]).sum(-1) + D * u[rows, t])
        return torch.stack(out, dim=1) if out else u[rows, tokens], h

    if len(lengths) == u.shape[0]:
        return loop(slice(0, u.shape[1]), slice(None), initial_state)
    outs, states, start = [], [], 0
    for s, length in enumerate(lengths):
        y, h = loop(slice(start, start + length), slice(None), initial_state[s : s + 1])
        outs, states, start = [*outs, y], [*states, h], start + length
    return torch.cat(outs, dim=1), torch.cat(states)
