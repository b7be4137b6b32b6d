"""Sequences cut into segments that are walked side by side: the state before each of them."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from statetrack.ops.triton_launch import bind

BLOCK = 512  # numbers that a program takes


@triton.jit
def _compose(totals, c, first, out, count, size, group, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK numbers of each of a sequence's states; a total holds for `group` numbers side by side."""
    s = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if first is None:
        state = tl.zeros((BLOCK,), tl.float64)
    else:
        state = tl.load(first + s * size + at, mask=inside, other=0.0).to(tl.float64)
    for n in range(count):
        segment = s * count + n
        if BACK:
            segment = s * count + count - 1 - n
        tl.store(out + segment * size + at, state.to(tl.float32), mask=inside)
        total = tl.load(totals + segment * (size // group) + at // group, mask=inside, other=0.0).to(tl.float64)
        state = total * state + tl.load(c + segment * size + at, mask=inside, other=0.0).to(tl.float64)


def compose(totals: Tensor, c: Tensor, first: Tensor | None, out: Tensor, count: int, back: bool) -> Tensor:
    """Return each segment's initial state under S <- total S + c, taken in float64; from the last segment if `back`.

    Args:
        totals: [B*count ...] a factor for every so many numbers side by side of a state.
        c: [B*count ...] what each segment makes of a zero state, float32.
        first: [B ...] the state before the first segment (after the last one if `back`), float32. Default: zero.
        out: where to write them, as c.
        count: segments of a sequence.
        back: whether the adjoint is meant.
    """
    size = c[0].numel()
    group = c.numel() // totals.numel()
    grid = (-(-size // BLOCK), c.shape[0] // count)
    launch = bind(_compose, BACK=back, BLOCK=BLOCK, num_warps=4)
    launch(grid, (totals, c, first, out), (count, size, group))
    return out
