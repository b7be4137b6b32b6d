"""The delta rule's chunk inverses on Hopper GPUs, in Gluon: what `triton_forward.prepare` computes, in less time.

One warpgroup takes one chunk of one head. With D the decays (1 without gates), p a power of two per row, n = |p k| and
w = beta / n^2 it inverts

    M = diag(1/p) + strictly lower part of (k k^T * D) diag(w p)        (BACKWARD: diag(w p) (k k^T * D))

so that M^-1 = (I + L diag(w))^-1 diag(p), and diag(p) (I + diag(w) L)^-1, with the L of triton_forward.py. Every warp
inverts one 16-row block of the diagonal by substitution, a thread per row: rows 0 to 15 give the block's inverse, 16 to
31 the product of the block below with it. Then blocks are joined in pairs, products in two bf16 terms, that of the low
ones included: an error of X recurs with its keys, and adds up over a long sequence.

    [[A, 0], [B, D]]^-1 = [[P, 0], [-Q (B P), Q]],   P = A^-1,  Q = D^-1

Letters as in triton_forward.py.
"""

# Gluon's types are its compiler's:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from statetrack.ops.delta_rule.triton_forward import CUT
from statetrack.ops.delta_rule.triton_hopper_walk import barrier, exp, fetch, put, split

ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # [64 64], 16 rows per warp
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))  # [64 32]
BLOCKS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))  # [4 16 16], a block per warp
LINES = gl.constexpr(  # [4 2 16 16], a row of 16 per thread
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 0, 8]],
        [[0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 8, 0], [0, 1, 0, 0]],
        [[1, 0, 0, 0], [2, 0, 0, 0]],
        [],
        [4, 2, 16, 16],
    )
)
EXCHANGE = gl.constexpr(  # [4 2 16 16] as [8 16 16]: four inverses, then what the pair's other block multiplied
    gl.SharedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 0, 8]]
        + [[0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 8], [0, 0, 8, 0]]
        + [[1, 0, 0, 0], [2, 0, 0, 0], [1, 1, 0, 0]],
    )
)

THREADS = gl.constexpr([[0, 32], [1, 0], [2, 0], [4, 0], [8, 0]])  # of a warp: two per row of keys, no bank twice
WARPS = gl.constexpr([[16, 0], [32, 0]])
COLUMNS = gl.constexpr([[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]])
ROWS_64 = gl.constexpr(gl.DistributedLinearLayout(COLUMNS.value, THREADS.value, WARPS.value, [], [64, 64]))
ROWS_128 = gl.constexpr(
    gl.DistributedLinearLayout([*COLUMNS.value, [0, 64]], THREADS.value, WARPS.value, [], [64, 128])
)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _pick(mask, yes, no):
    """Return `yes` where the int16 mask is -1 and `no` where it is 0, for bf16 tiles."""
    mask, yes = gl.broadcast(mask, yes)
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xca;", "=r,r,r,r", [mask, yes, no], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _halves(x):
    """Return the left and the right half of a tile whose rows lie in one warp's registers, without moving anything."""
    M: gl.constexpr = x.shape[0]
    R: gl.constexpr = x.shape[1] // 2
    return gl.permute(gl.reshape(x, [M, 2, R]), (0, 2, 1)).split()


@gluon.jit
def _side_by_side(left, right):
    """Return [left right]."""
    M: gl.constexpr = left.shape[0]
    R: gl.constexpr = left.shape[1]
    return gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [M, 2 * R])


@gluon.jit
def prepare(
    k, beta, log_decay, X_hi, X_lo, scales, G, starts, slots,
    T, c_lo, n_chunks,
    HK: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, N: gl.constexpr, C: gl.constexpr,
    GATE: gl.constexpr, VARLEN: gl.constexpr, EVEN: gl.constexpr, BACKWARD: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """Write one chunk's X (M^-1), scales and running log decay, as `triton_forward.prepare`."""
    B16: gl.constexpr = gl.bfloat16
    F32: gl.constexpr = gl.float32
    PAIR: gl.constexpr = ROWS_128 if K == 128 else ROWS_64
    by_row: gl.constexpr = gl.SliceLayout(1, PAIR)
    slot = gl.program_id(0) // HV  # heads vary fastest: their rows are neighbours in memory
    h = gl.program_id(0) % HV
    if VARLEN:
        s = gl.load(slots + 2 * slot)
        c = gl.load(slots + 2 * slot + 1)
        first = gl.load(starts + s)
        total = gl.load(starts + s + 1) - first
    else:
        s = slot // n_chunks
        c = c_lo + slot % n_chunks
        first = s * T
        total = T
    token = first + c * C
    rows = gl.minimum(total - c * C, C) * N

    row = token.to(gl.int64) * N
    out = (slot.to(gl.int64) * HV + h) * 64
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(B16, [64, K], swizzled)
    fetch(keys, k + (row * HK + h // (HV // HK)) * K, HK * K, rows, EVEN)
    async_copy.commit_group()
    i = gl.arange(0, 64, by_row)
    alive = i < rows
    strength = gl.load(beta + (row * HV + h) + i * HV, mask=alive, other=0.0).to(gl.float64)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if GATE:
        line: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
        m = gl.arange(0, 64, line)
        opens = (m < rows) & (m % N == 0)
        g = gl.load(log_decay + (token.to(gl.int64) * HV + h) + m // N * HV, mask=opens, other=0.0).to(gl.float64)
        g = gl.associative_scan(gl.maximum(g, CUT), 0, _add)
        g_hi = g.to(F32)
        g_lo = (g - g_hi.to(gl.float64)).to(F32)
        gl.store(G + out * 2 + m, g_hi)
        gl.store(G + out * 2 + 64 + m, g_lo)
        g_his = gl.allocate_shared_memory(F32, [64], flat)
        g_los = gl.allocate_shared_memory(F32, [64], flat)
        g_his.store(g_hi)
        g_los.store(g_lo)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    A = gl.zeros([64, 64], F32, ACC)
    A = warpgroup_mma(keys, keys.permute((1, 0)), A, use_acc=False, is_async=True)
    kt = keys.load(PAIR).to(F32).to(gl.float64)
    squared = gl.sum(kt * kt, 1)
    A = warpgroup_mma_wait(0, deps=[A])

    if GATE:
        down: gl.constexpr = gl.SliceLayout(1, ACC)
        across: gl.constexpr = gl.SliceLayout(0, ACC)
        apart = g_his.load(down)[:, None] - g_his.load(across)[None, :]
        apart += g_los.load(down)[:, None] - g_los.load(across)[None, :]
        A *= exp(-gl.abs(apart))

    # per row: p, n^2 and w
    zero = squared == 0.0
    e = (((squared.to(gl.int64, bitcast=True) >> 32).to(gl.int32) >> 20) - 1023) >> 1  # |k| is 2^e to 2^(e+1)
    e = gl.where(zero, 0, gl.minimum(gl.maximum(e, -125), 126))
    p = ((127 - e) << 23).to(F32, bitcast=True)
    back = ((127 + e) << 23).to(F32, bitcast=True)  # 1 / p
    p2 = p.to(gl.float64)
    squared = gl.where(zero, 1.0, squared * p2 * p2)
    near = squared.to(F32)
    inverse = (1.0 / near).to(gl.float64)
    inverse += inverse * (1.0 - squared * inverse)
    inverse += inverse * (1.0 - squared * inverse)
    both = strength * inverse
    w = both.to(F32)
    n = gl.where(alive, gl.sqrt(near), 0.0)
    wp = w * p
    at = scales + out * 4 + i
    gl.store(at, wp)
    gl.store(at + 64, n * back)
    gl.store(at + 128, (both - w.to(gl.float64)).to(F32) * p)
    gl.store(at + 192, p)
    ps = gl.allocate_shared_memory(F32, [64], flat)
    ws = gl.allocate_shared_memory(F32, [64], flat)
    ps.store(p)
    ws.store(-wp)
    if BACKWARD:  # read 16 rows further on
        ws_on = gl.allocate_shared_memory(F32, [128], flat)
        ws_on.slice(0, 64).store(-wp)

    # what substitution reads: row j of a diagonal block, and the block below it
    wide: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    crossed: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [2, 1, 0])
    diagonal = gl.allocate_shared_memory(F32, [16, 4, 16], wide)
    below = gl.allocate_shared_memory(F32, [4, 16, 16], crossed)
    up = (gl.arange(0, 64, gl.SliceLayout(1, HALF)) < 32)[:, None]
    left, right = _halves(A)
    left = gl.convert_layout(left, HALF, assert_trivial=True)
    right = gl.convert_layout(right, HALF, assert_trivial=True)
    n0, n1 = _halves(gl.where(up, left, right))
    own: gl.constexpr = n0.type.layout
    odd = (gl.arange(0, 64, gl.SliceLayout(1, own)) // 16 % 2 == 1)[:, None]
    diagonal.permute((1, 0, 2)).store(gl.reshape(gl.where(odd, n1, n0), [4, 16, 16]))
    below.permute((0, 2, 1)).store(gl.reshape(n1, [4, 16, 16]))
    barrier()

    # substitution, from the last column to the first
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    vector: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LINES))
    j = gl.arange(0, 16, gl.SliceLayout(0, vector))[None, :][:, None, None, :]
    per_row: gl.constexpr = gl.SliceLayout(3, LINES)
    kind = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, per_row)))[None, :][:, :, None][:, :, :, None]
    r = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, per_row)))[None, :][:, None, :][:, :, :, None]
    p_j = ps.reshape([4, 16]).load(vector)[:, None, None, :]
    w_j = ws.reshape([4, 16]).load(vector)[:, None, None, :]
    rest = below.load(gl.SliceLayout(1, LINES))[:, None, :, :]
    unit = (kind == 0) & (r == j)
    if BACKWARD:
        on = ws_on._reinterpret(F32, [8, 16], flat).index(1)._reinterpret(F32, [4, 16], plain)
        w_r = on.load(gl.SliceLayout(1, per_row))
        rest = gl.where(kind == 1, rest * w_r[:, None, :, None], 0.0)
        rest = gl.where(unit, 1.0, rest)
    else:
        rest = gl.where(kind == 1, rest, 0.0)
        start = gl.where(unit, p_j, 0.0)
        step = p_j * w_j
    lines_of = diagonal._reinterpret(F32, [16, 4, 16], plain)
    z = gl.zeros([4, 2, 16, 16], F32, LINES)
    for back_j in gl.static_range(16):
        if BACKWARD:
            found = rest * p_j
            write = found * w_j
        else:
            found = start + rest * step
            write = found
        z = gl.where(j == 15 - back_j, found, z)
        if back_j < 15:
            write = gl.where(j == 15 - back_j, write.to(gl.int32, bitcast=True), 0)  # one register: adding 0 is nothing
            write = gl.sum(write, 3).to(F32, bitcast=True)
            rest += write[:, :, :, None] * lines_of.index(15 - back_j).load(vector)[:, None, None, :]

    # blocks of 32
    lines: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0])
    hi_s = gl.allocate_shared_memory(B16, [4, 2, 16, 16], EXCHANGE)
    lo_s = gl.allocate_shared_memory(B16, [4, 2, 16, 16], EXCHANGE)
    z_hi, z_lo = split(z)
    hi_s.store(z_hi)
    lo_s.store(z_lo)
    barrier()
    hi_s = hi_s._reinterpret(B16, [8, 16, 16], lines)
    lo_s = lo_s._reinterpret(B16, [8, 16, 16], lines)
    a: gl.constexpr = gl.DotOperandLayout(0, BLOCKS, 2)
    b: gl.constexpr = gl.DotOperandLayout(1, BLOCKS, 2)
    i_hi, i_lo = hi_s.slice(0, 4).load(a), lo_s.slice(0, 4).load(a)
    e_hi, e_lo = hi_s.slice(4, 4).load(b), lo_s.slice(4, 4).load(b)
    D = mma_v2(i_lo, e_lo, gl.zeros([4, 16, 16], F32, BLOCKS))
    D = mma_v2(i_lo, e_hi, D)
    D = mma_v2(i_hi, e_lo, D)
    D = mma_v2(i_hi, e_hi, D)
    d_hi, d_lo = split(D)
    i_hi = gl.convert_layout(i_hi, BLOCKS, assert_trivial=True)
    i_lo = gl.convert_layout(i_lo, BLOCKS, assert_trivial=True)
    second = -(gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, BLOCKS))) % 2).to(gl.int16)[:, None, None]
    near_hi = _near(second, d_hi, i_hi)
    near_lo = _near(second, d_lo, i_lo)
    top = -(gl.arange(0, 64, gl.SliceLayout(1, HALF)) // 32 ^ 1).to(gl.int16)[:, None]

    # blocks of 64
    rows64: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    near_his = gl.allocate_shared_memory(B16, [64, 32], rows64)
    near_los = gl.allocate_shared_memory(B16, [64, 32], rows64)
    near_his.store(near_hi)
    near_los.store(near_lo)
    if BACKWARD:
        left *= ws.load(gl.SliceLayout(1, HALF))[:, None]
    else:
        left *= ws.slice(0, 32).load(gl.SliceLayout(0, HALF))[None, :]
    operand: gl.constexpr = gl.DotOperandLayout(0, HALF, 2)
    f_hi, f_lo = split(left)
    f_hi = gl.convert_layout(f_hi, operand, assert_trivial=True)
    f_lo = gl.convert_layout(f_lo, operand, assert_trivial=True)
    fence_async_shared()
    barrier()
    Y = gl.zeros([64, 32], F32, HALF)
    Y = warpgroup_mma(f_lo, near_los.slice(0, 32), Y, use_acc=False, is_async=True)
    Y = warpgroup_mma(f_lo, near_his.slice(0, 32), Y, is_async=True)
    Y = warpgroup_mma(f_hi, near_los.slice(0, 32), Y, is_async=True)
    Y = warpgroup_mma(f_hi, near_his.slice(0, 32), Y, is_async=True)
    Y = warpgroup_mma_wait(0, deps=[Y])
    y_hi, y_lo = split(Y)
    t_his = gl.allocate_shared_memory(B16, [64, 32], rows64)
    t_los = gl.allocate_shared_memory(B16, [64, 32], rows64)
    t_his.store(y_hi)
    t_los.store(y_lo)
    fence_async_shared()
    barrier()
    n_hi = gl.convert_layout(near_hi, operand, assert_trivial=True)
    n_lo = gl.convert_layout(near_lo, operand, assert_trivial=True)
    Y = gl.zeros([64, 32], F32, HALF)
    Y = warpgroup_mma(n_lo, t_los.slice(32, 32), Y, use_acc=False, is_async=True)
    Y = warpgroup_mma(n_lo, t_his.slice(32, 32), Y, is_async=True)
    Y = warpgroup_mma(n_hi, t_los.slice(32, 32), Y, is_async=True)
    Y = warpgroup_mma(n_hi, t_his.slice(32, 32), Y, is_async=True)
    Y = warpgroup_mma_wait(0, deps=[Y])
    y_hi, y_lo = split(Y)
    high = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    nothing = gl.zeros([64, 32], B16, HALF)
    high.store(_side_by_side(_pick(top, near_hi, y_hi), _pick(top, nothing, near_hi)))
    if TERMS == 2:
        low = gl.allocate_shared_memory(B16, [64, 64], swizzled)
        low.store(_side_by_side(_pick(top, near_lo, y_lo), _pick(top, nothing, near_lo)))
    barrier()
    put(high, X_hi + out * 64, 64, 64, True)
    if TERMS == 2:
        put(low, X_lo + out * 64, 64, 64, True)


@gluon.jit
def _near(second, below, own):
    """Return a warp's 16 rows of its block of 32: [own 0] in the block's first warp, [below own] in its second."""
    left = _pick(second, below, own)
    right = _pick(second, own, gl.zeros_like(own))
    both = gl.reshape(gl.permute(gl.join(left, right), (0, 1, 3, 2)), [64, 32])
    return gl.convert_layout(both, HALF, assert_trivial=True)
