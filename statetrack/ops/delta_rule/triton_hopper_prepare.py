"""Every chunk's triangular inverse on Hopper GPUs, in Gluon: what `triton_forward.prepare` computes, in less time.

One warpgroup takes one chunk of one head. The squared lengths of the keys are summed in float64 while the tensor cores
multiply the keys with each other. The inverse is by substitution in the four 16-row blocks, where a thread holds a
column, and then joins blocks in pairs,

    (I + [[A, 0], [B, D]])^-1 = [[P, 0], [-Q B P, Q]],   P = (I + A)^-1,  Q = (I + D)^-1,

with products in two bf16 terms, that of the low ones included: an error of X recurs with its keys, and adds up over a
long sequence. Joins of 16 rows are each warp's own, that of 32 rows is the warpgroup's.

Letters as in triton_forward.py.
"""

# Gluon's types are its compiler's:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from statetrack.ops.delta_rule.triton_hopper_walk import barrier, exp, fetch, put, split

CUT = gl.constexpr(-1048576.0)  # as in triton_forward.py


@gluon.jit
def _halves(x):
    """Return the left and the right half of a [64 64] tile."""
    return gl.split(gl.permute(gl.reshape(x, [64, 2, 32]), [0, 2, 1]))


@gluon.jit
def _whole(a, b):
    """Return [a b] for two [64 32] tiles."""
    return gl.reshape(gl.permute(gl.join(a, b), [0, 2, 1]), [64, 64])


@gluon.jit
def _load_pairs(blocks, layout: gl.constexpr):
    """Return [2 2 16 16] blocks in shared memory as [4 16 16], or [2 1 16 16] ones twice each."""
    pairs: gl.constexpr = gl.reshape(gl.zeros([4, 16, 16], gl.float32, layout), [2, 2, 16, 16]).type.layout
    x = blocks.load(pairs)
    x = gl.broadcast(x, gl.zeros([2, 2, 16, 16], gl.float32, pairs))[0]
    return gl.convert_layout(gl.reshape(x, [4, 16, 16]), layout, assert_trivial=True)


@gluon.jit
def _multiply(a_hi, a_lo, b_hi, b_lo, layout: gl.constexpr):
    """Return (a_hi + a_lo) (b_hi + b_lo) [4 16 16]."""
    out = gl.zeros([4, 16, 16], gl.float32, layout)
    out = mma_v2(a_lo, b_lo, out)
    out = mma_v2(a_lo, b_hi, out)
    out = mma_v2(a_hi, b_lo, out)
    return mma_v2(a_hi, b_hi, out)


@gluon.jit
def prepare(
    k, beta, log_decay, X_hi, X_lo, scales, G, starts, slots,
    T, c_lo, n_chunks,
    HK: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, N: gl.constexpr, C: gl.constexpr,
    GATE: gl.constexpr, VARLEN: gl.constexpr, EVEN: gl.constexpr, BACKWARD: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """Write one chunk's X, scales and running log decay, as `triton_forward.prepare`."""
    B16: gl.constexpr = gl.bfloat16
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])  # [64 64]: a warp's 16 rows
    thin: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])  # [64 32]
    own: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])  # [4 16 16]: a warp's block
    lanes: gl.constexpr = gl.BlockedLayout([1, 16, 1], [2, 1, 16], [4, 1, 1], [1, 2, 0])  # a thread's column of 16 rows
    lines: gl.constexpr = gl.BlockedLayout([1, 32], [16, 2], [4, 1], [1, 0])  # two threads a row
    by_line: gl.constexpr = gl.SliceLayout(1, lines)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])

    here = gl.program_id(0) // HV
    h = gl.program_id(0) % HV
    if VARLEN:
        s = gl.load(slots + 2 * here)
        c = gl.load(slots + 2 * here + 1)
        begin = gl.load(starts + s)
        total = gl.load(starts + s + 1) - begin
    else:
        s = here // n_chunks
        c = c_lo + here % n_chunks
        begin = s * T
        total = T
    token = begin + c * C
    tokens = gl.minimum(total - c * C, C)
    rows = tokens * N
    slot = here * HV + h

    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    key = gl.allocate_shared_memory(B16, [64, K], swizzled)
    high = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    low = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    between_hi = gl.allocate_shared_memory(B16, [64, 32], gl.NVMMASharedLayout(64, 16, 2))
    between_lo = gl.allocate_shared_memory(B16, [64, 32], gl.NVMMASharedLayout(64, 16, 2))
    columns = gl.allocate_shared_memory(gl.float32, [16, 4, 16], cube)
    inverses = gl.allocate_shared_memory(gl.float32, [2, 2, 16, 16], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
    ps = gl.allocate_shared_memory(gl.float32, [64], flat)
    ws = gl.allocate_shared_memory(gl.float32, [64], flat)
    row = token.to(gl.int64) * N
    fetch(key, k + (row * HK + h // (HV // HK)) * K, HK * K, rows, EVEN)
    async_copy.commit_group()
    i = gl.arange(0, 64, by_line)
    b = gl.load(beta + (row + i) * HV + h, mask=i < rows, other=0.0).to(gl.float64)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    A = gl.zeros([64, 64], gl.float32, acc)
    A = warpgroup_mma(key, key.permute((1, 0)), A, use_acc=False, is_async=True)
    squared = gl.zeros([64], gl.float64, by_line)
    for e in gl.static_range(K // 64):
        x = key.slice(64 * e, 64, 1).load(lines).to(gl.float32).to(gl.float64)
        squared += gl.sum(x * x, 1)
    A = warpgroup_mma_wait(0, deps=[A])

    # p brings a key's length near 1; both = beta / |p k|^2
    exponent = ((squared.to(gl.int64, bitcast=True) >> 52) & 0x7FF).to(gl.int32) - 1023
    zero = squared == 0.0
    exponent = gl.where(zero, 0, gl.minimum(gl.maximum(exponent >> 1, -126), 126))
    p = ((127 - exponent) << 23).to(gl.float32, bitcast=True)
    inverse_p = ((127 + exponent) << 23).to(gl.float32, bitcast=True)
    squared = gl.where(zero, 1.0, squared * p.to(gl.float64) * p.to(gl.float64))
    both = b / squared
    w = both.to(gl.float32)
    to = scales + slot.to(gl.int64) * 256
    n = gl.where(i < rows, gl.sqrt(squared.to(gl.float32)) * inverse_p, 0.0)
    gl.store(to + i, w * p)
    gl.store(to + 64 + i, n)
    gl.store(to + 128 + i, (both - w.to(gl.float64)).to(gl.float32) * p)
    gl.store(to + 192 + i, p)
    ps.store(p)
    ws.store(w * p)
    r = gl.arange(0, 64, gl.SliceLayout(1, acc))[:, None]
    j = gl.arange(0, 64, gl.SliceLayout(0, acc))[None, :]
    row_p = ps.load(gl.SliceLayout(1, acc))[:, None]
    column_p = ps.load(gl.SliceLayout(0, acc))[None, :]
    if BACKWARD:
        A *= ws.load(gl.SliceLayout(1, acc))[:, None] * column_p
    else:
        A *= ws.load(gl.SliceLayout(0, acc))[None, :] * column_p
    if GATE:
        first = (i < rows) & (i % N == 0)
        g = gl.load(log_decay + (token.to(gl.int64) + i // N) * HV + h, mask=first, other=0.0).to(gl.float32)
        barrier()
        ps.store(gl.maximum(g, CUT))
        by_column: gl.constexpr = gl.SliceLayout(0, lines)
        earlier = gl.arange(0, 64, by_column)[None, :] <= i[:, None]
        g = gl.sum(gl.where(earlier, ps.load(by_column)[None, :], 0.0).to(gl.float64), 1)
        g_hi = g.to(gl.float32)
        g_lo = (g - g_hi.to(gl.float64)).to(gl.float32)
        to = G + slot.to(gl.int64) * 128
        gl.store(to + i, g_hi)
        gl.store(to + 64 + i, g_lo)
        barrier()
        ps.store(g_hi)
        ws.store(g_lo)
        from_hi, from_lo = ps.load(gl.SliceLayout(0, acc))[None, :], ws.load(gl.SliceLayout(0, acc))[None, :]
        g_hi, g_lo = ps.load(gl.SliceLayout(1, acc))[:, None], ws.load(gl.SliceLayout(1, acc))[:, None]
        A *= exp(gl.where(r > j, (g_hi - from_hi) + (g_lo - from_lo), 0.0))

    # 16 rows: substitution, column by column of the blocks on the diagonal
    tiles = gl.reshape(gl.where((r > j) & (r // 16 == j // 16), A, 0.0), [4, 16, 4, 16])
    by_tile: gl.constexpr = tiles.type.layout
    columns.store(gl.permute(gl.sum(tiles, 2), [2, 0, 1]))
    line = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, lanes)))[None, :, None]
    lane = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, lanes)))[None, None, :]
    inv = gl.zeros([4, 16, 16], gl.float32, lanes) + gl.where(line == lane, 1.0, 0.0)
    for e in gl.static_range(15):
        known = gl.sum(gl.where(line == e, inv, -0.0), 1)  # row e
        inv -= columns.slice(e, 1, 0).permute((1, 2, 0)).load(lanes) * known[:, None, :]
    inverses.store(gl.reshape(inv, [2, 2, 16, 16]))

    # 32 rows: every warp joins its block to the first of the pair (of which only the second's is kept)
    left: gl.constexpr = gl.DotOperandLayout(0, own, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, own, 2)
    tiles = gl.reshape(gl.where(r // 16 == j // 16 + 1, A, 0.0), [4, 16, 4, 16])
    b_hi, b_lo = split(gl.convert_layout(gl.sum(tiles, 2), left))
    p_hi, p_lo = split(_load_pairs(inverses.slice(0, 1, 1), right))
    q_hi, q_lo = split(_load_pairs(inverses, left))
    t_hi, t_lo = split(_multiply(b_hi, b_lo, p_hi, p_lo, own))
    joined = _multiply(q_hi, q_lo, gl.convert_layout(t_hi, right), gl.convert_layout(t_lo, right), own)
    same = _load_pairs(inverses, own)
    spread: gl.constexpr = gl.SliceLayout(2, by_tile)
    same = gl.convert_layout(same, spread)[:, :, None, :] + gl.zeros([4, 16, 4, 16], gl.float32, by_tile)
    joined = gl.convert_layout(joined, spread)[:, :, None, :] + gl.zeros([4, 16, 4, 16], gl.float32, by_tile)
    same = gl.convert_layout(gl.reshape(same, [64, 64]), acc)
    joined = gl.convert_layout(gl.reshape(joined, [64, 64]), acc)
    pair = (r // 16 == j // 16 + 1) & (r % 32 >= 16)
    X = gl.where(r // 16 == j // 16, same, gl.where(pair, -joined, 0.0))

    # 64 rows
    x_hi, x_lo = split(X)
    high.store(x_hi)
    low.store(x_lo)
    operand: gl.constexpr = gl.DotOperandLayout(0, acc, 2)
    below, rest = _halves(A)
    b_hi, b_lo = split(gl.convert_layout(below, operand))
    fence_async_shared()
    barrier()
    Y = gl.zeros([64, 64], gl.float32, acc)
    Y = warpgroup_mma(b_lo, low.slice(0, 32, 0), Y, use_acc=False, is_async=True)
    Y = warpgroup_mma(b_lo, high.slice(0, 32, 0), Y, is_async=True)
    Y = warpgroup_mma(b_hi, low.slice(0, 32, 0), Y, is_async=True)
    Y = warpgroup_mma(b_hi, high.slice(0, 32, 0), Y, is_async=True)
    Y = warpgroup_mma_wait(0, deps=[Y])
    t, rest = _halves(Y)
    t_hi, t_lo = split(t)
    between_hi.store(t_hi)
    between_lo.store(t_lo)
    rest, q_hi = _halves(x_hi)
    rest, q_lo = _halves(x_lo)
    operand_t: gl.constexpr = gl.DotOperandLayout(0, thin, 2)
    q_hi = gl.convert_layout(q_hi, operand_t)
    q_lo = gl.convert_layout(q_lo, operand_t)
    fence_async_shared()
    barrier()
    Z = gl.zeros([64, 32], gl.float32, thin)
    Z = warpgroup_mma(q_lo, between_lo.slice(32, 32, 0), Z, use_acc=False, is_async=True)
    Z = warpgroup_mma(q_lo, between_hi.slice(32, 32, 0), Z, is_async=True)
    Z = warpgroup_mma(q_hi, between_lo.slice(32, 32, 0), Z, is_async=True)
    Z = warpgroup_mma(q_hi, between_hi.slice(32, 32, 0), Z, is_async=True)
    Z = warpgroup_mma_wait(0, deps=[Z])
    Z = gl.convert_layout(_whole(Z, Z), acc)
    corner = (r >= 32) & (j < 32)
    X = gl.where(corner, -Z, X) * row_p
    x_hi, x_lo = split(X)
    high.store(x_hi)
    low.store(x_lo)
    barrier()
    put(high, X_hi + slot.to(gl.int64) * 4096, 64, 64, True)
    if TERMS == 2:
        put(low, X_lo + slot.to(gl.int64) * 4096, 64, 64, True)
