"""A binary tree over the tokens of a chunk: products of decays without logarithm or quotient.

Every pair of tokens parts at one level, at a node of 2h tokens with one of them in either half. From the leaves up, a
row's prefix and suffix within its node are multiplied by f, the product over the sibling.

Letters: C tokens per chunk; h tokens in a half.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LEVELS = tl.constexpr(6)  # of chunks of 64


@triton.jit
def _other(x):
    """Exchange the two halves of every node, [nodes 2 h width]."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.sum(bits, 1)[:, None] - bits).to(tl.float32, bitcast=True)  # exact: integers wrap


@triton.jit
def sibling(x, h: tl.constexpr):
    """Return what the sibling's rows hold of x [C width], constant within halves of h rows."""
    C: tl.constexpr = x.shape[0]
    return tl.reshape(_other(tl.reshape(x, (C // (2 * h), 2, h, x.shape[1]))), x.shape)


@triton.jit
def sibling_sum(x, h: tl.constexpr):
    """Return in every row of x [C width] the sum over the sibling's rows."""
    C: tl.constexpr = x.shape[0]
    halves = tl.sum(tl.reshape(x, (C // (2 * h), 2, h, x.shape[1])), 2)[:, :, None]
    spread = tl.broadcast_to(_other(halves), (C // (2 * h), 2, h, x.shape[1]))
    return tl.reshape(spread, x.shape)


@triton.jit
def toward_middle(a, f1, f2, f4, f8, f16, level: tl.constexpr):
    """Return the products of the decays between each row and the middle of its node at this level, f's those below."""
    i = tl.arange(0, a.shape[0])
    side = ((i >> level) & 1)[:, None]
    e = tl.where(side == 1, a, 1.0)
    if level > 0:
        e *= tl.where((i & 1)[:, None] == side, f1, 1.0)
    if level > 1:
        e *= tl.where(((i >> 1) & 1)[:, None] == side, f2, 1.0)
    if level > 2:
        e *= tl.where(((i >> 2) & 1)[:, None] == side, f4, 1.0)
    if level > 3:
        e *= tl.where(((i >> 3) & 1)[:, None] == side, f8, 1.0)
    if level > 4:
        e *= tl.where(((i >> 4) & 1)[:, None] == side, f16, 1.0)
    return e
