"""What the selective scan's kernels share, and the kernel of a single token.

All tensors of a walk are one-dimensional, one element per thread, so that no layout is left to choose; what a thread
holds several of is a tuple, and loops over it are unrolled.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def from_lane(x, source):
    """Return x of thread `source`, which is in the same warp."""
    N: tl.constexpr = x.shape[0]
    x = tl.gather(tl.reshape(x, (N // 32, 32)), tl.reshape(source % 32, (N // 32, 32)), 1)
    return tl.reshape(x, (N,))


@triton.jit
def halve(values, lane, BIT: tl.constexpr, LEAST: tl.constexpr):
    """Add values over the pairs of threads that differ in BIT; the one with it keeps the second half of the sums.

    The sums of LEAST values both keep.
    """
    n: tl.constexpr = len(values)
    upper = (lane & BIT) != 0
    kept = ()
    if n <= LEAST:
        for v in tl.static_range(n):
            kept = kept + (values[v] + from_lane(values[v], lane ^ BIT),)
    else:
        for v in tl.static_range(n // 2):
            mine = tl.where(upper, values[v + n // 2], values[v])
            other = tl.where(upper, values[v], values[v + n // 2])
            kept = kept + (mine + from_lane(other, lane ^ BIT),)
    return kept


@triton.jit
def fetch(p, known, FULL: tl.constexpr):
    """Load float32, 0 where not known; FULL says that all is."""
    if FULL:
        x = tl.load(p)
    else:
        x = tl.load(p, mask=known, other=0.0)
    return x.to(tl.float32)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def eigenvalue(e, lo, width, inside, WHOLE: tl.constexpr):
    """Return lo + width e, or 1 outside the sequence; WHOLE says that e = 1 there is enough."""
    a = lo + width * e
    if not WHOLE:
        a = tl.where(inside, a, 1.0)
    return a


@triton.jit
def step(
    u, dt, z, A, B, C, skip, state, y, final, D, M, lo, width,
    BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Advance BD channels of one sequence by one token, reading and writing the state [D M] once."""
    blocks = tl.cdiv(D, BD)
    s = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    m = tl.arange(0, BM)
    known = d < D
    inside = known[:, None] & (m < M)[None, :]
    flat = d[:, None] * M + m[None, :]
    at = s * D + d
    tile = s.to(tl.int64) * D * M + flat
    delta = tl.load(dt + at, mask=known, other=0.0).to(tl.float32)
    value = tl.load(u + at, mask=known, other=0.0).to(tl.float32)
    rate = tl.load(A + flat, mask=inside, other=0.0)
    Bt = tl.load(B + s * M + m, mask=m < M, other=0.0).to(tl.float32)
    Ct = tl.load(C + s * M + m, mask=m < M, other=0.0).to(tl.float32)
    h = tl.load(state + tile, mask=inside, other=0.0)
    h = (lo + width * tl.exp(delta[:, None] * rate)) * h + (delta * value)[:, None] * Bt[None, :]
    out = tl.sum(h * Ct[None, :], 1) + tl.load(skip + d, mask=known, other=0.0) * value
    if z is not None:
        gate = tl.load(z + at, mask=known, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=known)
    tl.store(final + tile, h, mask=inside)
