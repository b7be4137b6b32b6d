"""What the kernels of several ops share: products in one or two terms, and where sequences and chunks lie.

Products take bf16 tiles, or float32 ones where EXACT (tf32x3). A float32 tile that must not be rounded to bf16 enters
as two bf16 terms, hi + lo (docs/numerics.md).

Letters: T tokens, C tokens per chunk. A `slot` numbers the (sequence, chunk) pairs of a workspace. VARLEN: sequences
are packed, and `starts`, `slots` and `bases` are what `layout.chunk_tables` returns.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from statetrack.ops.triton_assembler import choose_assembler

choose_assembler()  # before the first kernel is compiled


@triton.jit
def split(x, EXACT: tl.constexpr):
    """Return x as two bf16 terms, or twice itself where the products take float32."""
    if EXACT:
        hi = x
        lo = x
    else:
        near = ((x.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)  # packs two at a time
        hi = near.to(tl.bfloat16)
        lo = (x - near).to(tl.bfloat16)
    return hi, lo


@triton.jit
def dot(a, b, EXACT: tl.constexpr):
    """Return a b for operands of one term."""
    if EXACT:
        out = tl.dot(a, b, input_precision="tf32x3")
    else:
        out = tl.dot(a, b)
    return out


@triton.jit
def dot_add(a, b, acc, EXACT: tl.constexpr):
    """Return acc + a b for operands of one term."""
    if EXACT:
        out = tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        out = tl.dot(a, b, acc)
    return out


@triton.jit
def dot_split(hi, lo, b, TERMS: tl.constexpr, EXACT: tl.constexpr):
    """Return (hi + lo) b. The low term goes first: the tensor cores truncate whenever they add to a large sum."""
    if TERMS == 2 and not EXACT:
        out = tl.dot(hi, b, tl.dot(lo, b))
    else:
        out = dot(hi, b, EXACT)
    return out


@triton.jit
def dot_both(hi, lo, b_hi, b_lo, TERMS: tl.constexpr, EXACT: tl.constexpr):
    """Return (hi + lo) (b_hi + b_lo), without the product of the low terms."""
    if TERMS == 2 and not EXACT:
        out = tl.dot(lo, b_hi)
        out = tl.dot(hi, b_lo, out)
        out = tl.dot(hi, b_hi, out)
    else:
        out = dot(hi, b_hi, EXACT)
    return out


@triton.jit
def _mul3(a, b, EXACT: tl.constexpr):
    """Return a b for float32 tiles, to about 2^-17 (bf16 mode) or 2^-22."""
    a_hi, a_lo = split(a, EXACT)
    b_hi, b_lo = split(b, EXACT)
    return dot_both(a_hi, a_lo, b_hi, b_lo, 2, EXACT)


@triton.jit
def unit_lower_inverse(A, EXACT: tl.constexpr):
    """Return (I + A)^-1 for a strictly lower triangular [64 64] tile: substitution in 16-row blocks, then in pairs."""
    i = tl.arange(0, 64)
    r = tl.arange(0, 16)
    block = tl.arange(0, 4)
    same = block[:, None, None, None] == block[None, None, :, None]
    small = tl.sum(tl.where(same, tl.reshape(A, (4, 16, 4, 16)), 0.0), 2)  # [4 16 16]
    inv = tl.where(r[None, :, None] == r[None, None, :], 1.0, 0.0) + tl.zeros_like(small)
    for c in tl.static_range(15):
        column = tl.sum(tl.where(r[None, None, :] == c, small, 0.0), 2)
        row = tl.sum(tl.where(r[None, :, None] == c, inv, 0.0), 1)
        inv -= column[:, :, None] * row[:, None, :]
    X = tl.reshape(tl.where(same, inv[:, :, None, :], 0.0), (64, 64))
    pair = (i[:, None] // 32 == i[None, :] // 32) & (i[:, None] // 16 != i[None, :] // 16)
    X -= _mul3(X, _mul3(tl.where(pair, A, 0.0), X, EXACT), EXACT)
    rest = i[:, None] // 32 != i[None, :] // 32
    return X - _mul3(X, _mul3(tl.where(rest, A, 0.0), X, EXACT), EXACT)


@triton.jit
def operand(x, EXACT: tl.constexpr):
    """Return a stored tile in the type that the products take; exact."""
    if EXACT:
        out = x.to(tl.float32)
    else:
        out = x
    return out


@triton.jit
def span(s, c, starts, T, C: tl.constexpr, VARLEN: tl.constexpr):
    """Return chunk c of sequence s: its first token and its number of tokens."""
    if VARLEN:
        first = tl.load(starts + s).to(tl.int64)
        total = tl.load(starts + s + 1) - first
    else:
        first = s.to(tl.int64) * T
        total = tl.full((), T, tl.int64)
    return first + c * C, tl.minimum(total - c * C, C).to(tl.int32)


@triton.jit
def chunk_of(slot, slots, c_lo, n_chunks, VARLEN: tl.constexpr):
    """Return the sequence and the chunk that a workspace's slot is for."""
    if VARLEN:
        s = tl.load(slots + 2 * slot)
        c = tl.load(slots + 2 * slot + 1)
    else:
        s = slot // n_chunks
        c = c_lo + slot % n_chunks
    return s, c


@triton.jit
def stretch(s, starts, bases, T, c_lo, c_hi, C: tl.constexpr, VARLEN: tl.constexpr):
    """Return what a walk over sequence s takes: its tokens, its chunk 0's slot, and the chunk before which to stop.

    It walks the chunks [c_lo, c_hi), all of them if packed.
    """
    if VARLEN:
        total = tl.load(starts + s + 1) - tl.load(starts + s)
        base = tl.load(bases + s).to(tl.int64)
        stop = tl.cdiv(total, C)
    else:
        total = tl.full((), T, tl.int32)
        base = s.to(tl.int64) * (c_hi - c_lo) - c_lo
        stop = tl.full((), c_hi, tl.int32)
    return total, base, stop
