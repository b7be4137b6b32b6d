"""The delta rule's walks on Hopper GPUs, in Gluon: what `triton_forward.walk` computes, in less time.

Gluon is Triton's language with explicit layouts, copies and waits. One warpgroup walks with 64 value columns of one
head, and two of them share a multiprocessor, so that one fills the tensor cores while the other splits its numbers. S,
R and U stay in registers, from where `wgmma` takes its left operand. A chunk's tiles are copied to shared memory while
the chunk before it is worked on.

No fence, barrier or branch may stand between a product and the wait for it: ptxas 12.8 crashes on it.

Letters as in triton_forward.py.
"""

# Gluon's types are its compiler's:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

COLUMNS = gl.constexpr(64)  # value columns of a warpgroup
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed between Triton 3.6 and 3.7


@gluon.jit
def split(x):
    """Return a float32 tile as two bf16 terms."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 a, b;
        cvt.rn.bf16x2.f32 $0, $3, $2;
        shl.b32 a, $0, 16;
        and.b32 b, $0, 0xffff0000;
        sub.f32 a, $2, a;
        sub.f32 b, $3, b;
        cvt.rn.bf16x2.f32 $1, b, a; }""",
        "=&r,=r,r,r",
        [x],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def exp(x):
    """Return exp of a tile that is at most 0; 0 below about -87."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * 1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def fetch(tile, source, stride: gl.constexpr, alive, EVEN: gl.constexpr, warps: gl.constexpr = 4):
    """Start the copy of rows `stride` apart into a bf16 tile; if not EVEN, those from `alive` on become 0."""
    across: gl.constexpr = tile.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])
    i = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    d = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    pointers = source + ((i * stride)[:, None] + d[None, :])
    if EVEN:
        async_copy.async_copy_global_to_shared(tile, pointers)
    else:
        async_copy.async_copy_global_to_shared(tile, pointers, mask=(i < alive)[:, None] & (d >= 0)[None, :])


@gluon.jit
def _fetch_vector(vector, source, step: gl.constexpr = 1):
    """Start the copy of every step-th of 64 floats into shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.minimum(gl.arange(0, vector.shape[0], layout) * step, 63)
    async_copy.async_copy_global_to_shared(vector, source + at)


@gluon.jit
def _fetch(
    k, q, v, X_hi, X_lo, scales, G, keys, queries, values, high, low, ws, rests, ns, g_his, g_los, q_his, q_los,
    here, now, slot,
    row: gl.constexpr, column: gl.constexpr, N: gl.constexpr,
    GATE: gl.constexpr, EVEN: gl.constexpr, VALUES: gl.constexpr, OUTPUT: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """Start the copies of a chunk of `now` tokens; k, q and v point to its first rows."""
    fetch(keys.index(here), k, row, now * N, EVEN)
    fetch(high, X_hi + slot * 4096, 64, 64, True)
    if TERMS == 2:
        fetch(low, X_lo + slot * 4096, 64, 64, True)
        _fetch_vector(rests.index(here), scales + slot * 256 + 128)
    _fetch_vector(ws.index(here), scales + slot * 256)
    if VALUES:
        fetch(values, v, column, now * N, EVEN)
        _fetch_vector(ns.index(here), scales + slot * 256 + 64)
    if OUTPUT:
        fetch(queries, q, row, now, EVEN)
    if GATE:
        _fetch_vector(g_his.index(here), G + slot * 128)
        _fetch_vector(g_los.index(here), G + slot * 128 + 64)
        if OUTPUT:
            _fetch_vector(q_his.index(here), G + slot * 128, N)
            _fetch_vector(q_los.index(here), G + slot * 128 + 64, N)
    async_copy.commit_group()


@gluon.jit
def _fetch_back(
    k, q, d_out, X_hi, X_lo, scales, G, keys, queries, asked, high, low, ws, g_his, g_los, q_his, q_los,
    here, now, slot,
    row: gl.constexpr, column: gl.constexpr, N: gl.constexpr,
    GATE: gl.constexpr, EVEN: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """Start the copies of what the walk back needs of a chunk of `now` tokens."""
    fetch(keys.index(here), k, row, now * N, EVEN)
    fetch(queries, q, row, now, EVEN)
    fetch(asked, d_out, column, now, EVEN)
    fetch(high, X_hi + slot * 4096, 64, 64, True)
    if TERMS == 2:
        fetch(low, X_lo + slot * 4096, 64, 64, True)
    _fetch_vector(ws.index(here), scales + slot * 256)
    if GATE:
        _fetch_vector(g_his.index(here), G + slot * 128)
        _fetch_vector(g_los.index(here), G + slot * 128 + 64)
        _fetch_vector(q_his.index(here), G + slot * 128, N)
        _fetch_vector(q_los.index(here), G + slot * 128 + 64, N)
    async_copy.commit_group()


@gluon.jit
def put(page, to, stride: gl.constexpr, alive, EVEN: gl.constexpr, warps: gl.constexpr = 4):
    """Store the rows of a page of shared memory, `stride` apart; if not EVEN, only those before `alive`."""
    across: gl.constexpr = page.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])
    i = gl.arange(0, page.shape[0], gl.SliceLayout(1, layout))
    d = gl.arange(0, page.shape[1], gl.SliceLayout(0, layout))
    pointers = to + ((i * stride)[:, None] + d[None, :])
    if EVEN:
        gl.store(pointers, page.load(layout))
    else:
        gl.store(pointers, page.load(layout), mask=(i < alive)[:, None] & (d >= 0)[None, :])


@gluon.jit
def _write_pages(pages, x):
    """Write a [64 K] tile into pages of 64 columns of shared memory."""
    if x.shape[1] == 64:
        pages.index(0).store(x)
    else:
        a, b = gl.split(gl.permute(gl.reshape(x, [64, 2, 64]), [0, 2, 1]))
        pages.index(0).store(a)
        pages.index(1).store(b)


@gluon.jit
def _put_pages(pages, to, K: gl.constexpr):
    """Store the [64 K] tile that lies in pages."""
    for e in gl.static_range(K // 64):
        put(pages.index(e), to + 64 * e, K, 64, True)


@gluon.jit
def walk(
    q, k, v, X_hi, X_lo, scales, G, initial, o, final, saved, F, starts, bases,
    T, scale,
    HK: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    N: gl.constexpr, C: gl.constexpr, BQ: gl.constexpr,
    GATE: gl.constexpr, VARLEN: gl.constexpr, EVEN: gl.constexpr, SAVE: gl.constexpr,
    VALUES: gl.constexpr, OUTPUT: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """Walk over the chunks of one sequence and head, for 64 columns of the state, as `triton_forward.walk`."""
    B16: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])  # [V M]
    by_query: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ, 16])  # [V Q]
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # [V K]
    in_row: gl.constexpr = gl.SliceLayout(0, by_row)
    in_query: gl.constexpr = gl.SliceLayout(0, by_query)
    left: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)
    left_k: gl.constexpr = gl.DotOperandLayout(0, by_key, 2)
    left_q: gl.constexpr = gl.DotOperandLayout(0, by_query, 2)

    iv = gl.program_id(0)
    sh = gl.program_id(1)
    s = sh // HV
    h = sh % HV
    hk = h // (HV // HK)
    if VARLEN:
        first = gl.load(starts + s).to(gl.int64)
        total = (gl.load(starts + s + 1) - first).to(gl.int32)
        base = gl.load(bases + s).to(gl.int64)
    else:
        first = s.to(gl.int64) * T
        total = T
        base = s.to(gl.int64) * ((T + C - 1) // C)
    chunks = (total + C - 1) // C
    row: gl.constexpr = HK * K
    column: gl.constexpr = HV * V
    k += (first * N * HK + hk) * K
    q += (first * HK + hk) * K
    v += (first * N * HV + h) * V + iv * COLUMNS
    F += (first * N * HV + h) * V + iv * COLUMNS
    o += (first * HV + h) * V + iv * COLUMNS
    slot = base * HV + h

    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(B16, [2, 64, K], swizzled)
    queries = gl.allocate_shared_memory(B16, [BQ, K], swizzled)
    values = gl.allocate_shared_memory(B16, [64, COLUMNS], swizzled)
    high = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    low = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    scores = gl.allocate_shared_memory(B16, [BQ, 64], swizzled)
    pages = gl.allocate_shared_memory(B16, [2, 64, COLUMNS], swizzled)
    page = pages.index(0).slice(0, BQ, 0)
    page_F = pages.index(1)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ws = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    rests = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    ns = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    g_his = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    g_los = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    q_his = gl.allocate_shared_memory(gl.float32, [2, BQ], flat)
    q_los = gl.allocate_shared_memory(gl.float32, [2, BQ], flat)
    e = gl.arange(0, COLUMNS, gl.SliceLayout(1, by_key))
    d = gl.arange(0, K, gl.SliceLayout(0, by_key))
    tile = (sh.to(gl.int64) * K + d[None, :]) * V + iv * COLUMNS + e[:, None]
    if initial is not None:
        ST = gl.load(initial + tile)
    elif VALUES:
        ST = gl.zeros([COLUMNS, K], gl.float32, by_key)
    else:
        ST = gl.where(iv * COLUMNS + e[:, None] == d[None, :], 1.0, 0.0)
    jq = gl.arange(0, BQ, in_query)

    _fetch(
        k, q, v, X_hi, X_lo, scales, G, keys, queries, values, high, low, ws, rests, ns, g_his, g_los, q_his, q_los,
        0, gl.minimum(total, C), slot, row, column, N, GATE, EVEN, VALUES, OUTPUT, TERMS,
    )  # fmt: skip
    for c in range(0, chunks):
        here = c % 2
        key = keys.index(here)
        now = gl.minimum(total - c * C, C)  # tokens of this chunk
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()

        if OUTPUT:  # what queries see of this chunk's writes
            PT = gl.zeros([64, BQ], gl.float32, by_query)
            PT = warpgroup_mma(key, queries.permute((1, 0)), PT, use_acc=False, is_async=True)
        s_hi, s_lo = split(ST)
        s_hi = gl.convert_layout(s_hi, left, assert_trivial=True)
        s_lo = gl.convert_layout(s_lo, left, assert_trivial=True)
        if SAVE:
            _write_pages(pages, gl.convert_layout(s_hi, by_key, assert_trivial=True))
        if OUTPUT:
            PT = warpgroup_mma_wait(0, deps=[PT])
        RT = gl.zeros([COLUMNS, 64], gl.float32, by_row)
        if TERMS == 2:
            RT = warpgroup_mma(s_lo, key.permute((1, 0)), RT, use_acc=False, is_async=True)
            RT = warpgroup_mma(s_hi, key.permute((1, 0)), RT, is_async=True)
        else:
            RT = warpgroup_mma(s_hi, key.permute((1, 0)), RT, use_acc=False, is_async=True)
        if OUTPUT:
            s_q = gl.convert_layout(s_hi, left_q, assert_trivial=True)
            OT = gl.zeros([COLUMNS, BQ], gl.float32, by_query)
            OT = warpgroup_mma(s_q, queries.permute((1, 0)), OT, use_acc=False, is_async=True)
            i = gl.arange(0, 64, gl.SliceLayout(1, by_query))
            see = i[:, None] // N <= jq[None, :]
            if GATE:
                by_line: gl.constexpr = gl.SliceLayout(1, by_query)
                PT *= exp(gl.where(see, (
                    (q_his.index(here).load(in_query)[None, :] - g_his.index(here).load(by_line)[:, None])
                    + (q_los.index(here).load(in_query)[None, :] - g_los.index(here).load(by_line)[:, None])
                ), 0.0))  # fmt: skip
            PT = gl.where(see, PT, 0.0)
            scores.permute((1, 0)).store(PT.to(B16))
            RT = warpgroup_mma_wait(1, deps=[RT])
        else:
            RT = warpgroup_mma_wait(0, deps=[RT])
        if GATE:
            RT *= exp(g_his.index(here).load(in_row))[None, :]
        if VALUES:
            RT = values.permute((1, 0)).load(by_row).to(gl.float32) * ns.index(here).load(in_row)[None, :] - RT
        else:
            RT = -RT
        r_hi, r_lo = split(RT)
        r_hi = gl.convert_layout(r_hi, left, assert_trivial=True)
        r_lo = gl.convert_layout(r_lo, left, assert_trivial=True)
        UT = gl.zeros([COLUMNS, 64], gl.float32, by_row)
        if TERMS == 2:
            UT = warpgroup_mma(r_lo, high.permute((1, 0)), UT, use_acc=False, is_async=True)
            UT = warpgroup_mma(r_hi, low.permute((1, 0)), UT, is_async=True)
            UT = warpgroup_mma(r_hi, high.permute((1, 0)), UT, is_async=True)
        else:
            UT = warpgroup_mma(r_hi, high.permute((1, 0)), UT, use_acc=False, is_async=True)
        if OUTPUT:
            UT, OT = warpgroup_mma_wait(0, deps=[UT, OT])
        else:
            UT = warpgroup_mma_wait(0, deps=[UT])
        fence_async_shared()
        barrier()  # scores are written, pages are free, all but the keys is read
        if c + 1 < chunks:
            k += C * N * row
            q += C * row
            v += C * N * column
            _fetch(
                k, q, v, X_hi, X_lo, scales, G, keys, queries, values, high, low, ws, rests, ns, g_his, g_los, q_his,
                q_los, 1 - here, gl.minimum(total - (c + 1) * C, C), slot + HV, row, column, N,
                GATE, EVEN, VALUES, OUTPUT, TERMS,
            )  # fmt: skip
        if SAVE:
            _put_pages(pages, saved + slot * K * V + iv * COLUMNS * K, K)
            barrier()
            page_F.permute((1, 0)).store(UT.to(B16))
        if TERMS == 2:  # the rounding of w is the same whenever a key recurs, so it would add up
            UT = UT * ws.index(here).load(in_row)[None, :] + UT * rests.index(here).load(in_row)[None, :]
        else:
            UT = UT * ws.index(here).load(in_row)[None, :]
        u_hi, u_lo = split(UT)
        if OUTPUT:
            if GATE:
                OT *= exp(q_his.index(here).load(in_query))[None, :]
            u_q = gl.convert_layout(u_hi, left_q, assert_trivial=True)
            OT = warpgroup_mma(u_q, scores.permute((1, 0)), OT, is_async=True)
        if GATE:
            last_hi, last_lo = gl.load(G + slot * 128 + 63), gl.load(G + slot * 128 + 127)
            g_hi, g_lo = g_his.index(here).load(in_row), g_los.index(here).load(in_row)
            u_hi, u_lo = split(UT * exp((last_hi - g_hi) + (last_lo - g_lo))[None, :])
            ST *= gl.exp(last_hi)
        u_hi = gl.convert_layout(u_hi, left_k, assert_trivial=True)
        u_lo = gl.convert_layout(u_lo, left_k, assert_trivial=True)
        ST = warpgroup_mma(u_hi, key, ST, is_async=True)
        if TERMS == 2:
            ST = warpgroup_mma(u_lo, key, ST, is_async=True)
        if OUTPUT:
            OT = warpgroup_mma_wait(TERMS, deps=[OT])
            page.permute((1, 0)).store((OT * scale).to(B16))
        ST = warpgroup_mma_wait(0, deps=[ST])
        barrier()  # pages are written
        if OUTPUT:
            put(page, o, column, now, EVEN)
            o += C * column
        if SAVE:
            put(page_F, F, column, now * N, EVEN)
            F += C * N * column
        slot += HV
    gl.store(final + tile, ST)


@gluon.jit
def walk_back(
    q, k, d_out, X_hi, X_lo, scales, G, d_state, d_final, z, d_saved, starts, bases,
    T, c_lo, c_hi, scale,
    HK: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    N: gl.constexpr, C: gl.constexpr, BQ: gl.constexpr,
    GATE: gl.constexpr, VARLEN: gl.constexpr, EVEN: gl.constexpr, OUTPUT: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """Walk back over the chunks [c_lo, c_hi) of a sequence and head, for 64 columns, as `triton_backward.walk_back`."""
    B16: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])  # [V M]
    by_query: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ, 16])  # [M Q]
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # [V K]
    in_row: gl.constexpr = gl.SliceLayout(0, by_row)
    in_query: gl.constexpr = gl.SliceLayout(0, by_query)
    left: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)
    left_k: gl.constexpr = gl.DotOperandLayout(0, by_key, 2)

    iv = gl.program_id(0)
    sh = gl.program_id(1)
    s = sh // HV
    h = sh % HV
    hk = h // (HV // HK)
    if VARLEN:
        first = gl.load(starts + s).to(gl.int64)
        total = (gl.load(starts + s + 1) - first).to(gl.int32)
        base = gl.load(bases + s).to(gl.int64)
        stop = (total + C - 1) // C
    else:
        first = s.to(gl.int64) * T
        total = T
        base = s.to(gl.int64) * (c_hi - c_lo) - c_lo
        stop = c_hi
    row: gl.constexpr = HK * K
    column: gl.constexpr = HV * V
    first += (stop - 1) * C
    k += (first * N * HK + hk) * K
    q += (first * HK + hk) * K
    d_out += (first * HV + h) * V + iv * COLUMNS
    z += (first * N * HV + h) * V + iv * COLUMNS
    slot = (base + stop - 1) * HV + h

    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(B16, [2, 64, K], swizzled)
    queries = gl.allocate_shared_memory(B16, [BQ, K], swizzled)
    asked = gl.allocate_shared_memory(B16, [BQ, COLUMNS], swizzled)
    high = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    low = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    scores = gl.allocate_shared_memory(B16, [BQ, 64], swizzled)
    pages = gl.allocate_shared_memory(B16, [K // 64, 64, COLUMNS], swizzled)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ws = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    g_his = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    g_los = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    q_his = gl.allocate_shared_memory(gl.float32, [2, BQ], flat)
    q_los = gl.allocate_shared_memory(gl.float32, [2, BQ], flat)

    e = gl.arange(0, COLUMNS, gl.SliceLayout(1, by_key))
    d = gl.arange(0, K, gl.SliceLayout(0, by_key))
    tile = (sh.to(gl.int64) * K + d[None, :]) * V + iv * COLUMNS + e[:, None]
    jq = gl.arange(0, BQ, in_query)
    # every adjoint is held divided by `scale`, so that dO enters the products as stored
    if d_final is None:
        DT = gl.zeros([COLUMNS, K], gl.float32, by_key)
    else:
        DT = gl.load(d_final + tile) / scale
    if stop > c_lo:
        _fetch_back(
            k, q, d_out, X_hi, X_lo, scales, G, keys, queries, asked, high, low, ws, g_his, g_los, q_his, q_los,
            0, gl.minimum(total - (stop - 1) * C, C), slot, row, column, N, GATE, EVEN, TERMS,
        )  # fmt: skip
    for back in range(0, stop - c_lo):
        c = stop - 1 - back
        here = back % 2
        key = keys.index(here)
        now = gl.minimum(total - c * C, C)  # tokens of this chunk
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()

        PT = gl.zeros([64, BQ], gl.float32, by_query)
        PT = warpgroup_mma(key, queries.permute((1, 0)), PT, use_acc=False, is_async=True)
        s_hi, s_lo = split(DT)
        s_hi = gl.convert_layout(s_hi, left, assert_trivial=True)
        s_lo = gl.convert_layout(s_lo, left, assert_trivial=True)
        PT = warpgroup_mma_wait(0, deps=[PT])
        i = gl.arange(0, 64, gl.SliceLayout(1, by_query))
        see = i[:, None] // N <= jq[None, :]
        if GATE:
            by_line: gl.constexpr = gl.SliceLayout(1, by_query)
            PT *= exp(gl.where(see, (
                (q_his.index(here).load(in_query)[None, :] - g_his.index(here).load(by_line)[:, None])
                + (q_los.index(here).load(in_query)[None, :] - g_los.index(here).load(by_line)[:, None])
            ), 0.0))  # fmt: skip
        scores.permute((1, 0)).store(gl.where(see, PT, 0.0).to(B16))
        if OUTPUT:
            _write_pages(pages, (DT * scale).to(B16))
        reads = asked.permute((1, 0)).load(left)  # [V Q]
        fence_async_shared()
        barrier()  # scores and the state are written
        if OUTPUT:
            _put_pages(pages, d_saved + slot * K * V + iv * COLUMNS * K, K)

        UT = gl.zeros([COLUMNS, 64], gl.float32, by_row)
        if TERMS == 2:
            UT = warpgroup_mma(s_lo, key.permute((1, 0)), UT, use_acc=False, is_async=True)
            UT = warpgroup_mma(s_hi, key.permute((1, 0)), UT, is_async=True)
        else:
            UT = warpgroup_mma(s_hi, key.permute((1, 0)), UT, use_acc=False, is_async=True)
        if GATE:
            UT = warpgroup_mma_wait(0, deps=[UT])
            last_hi, last_lo = gl.load(G + slot * 128 + 63), gl.load(G + slot * 128 + 127)
            g_hi, g_lo = g_his.index(here).load(in_row), g_los.index(here).load(in_row)
            UT *= exp((last_hi - g_hi) + (last_lo - g_lo))[None, :]
            DT *= gl.exp(last_hi)
            at: gl.constexpr = gl.SliceLayout(0, left)
            faded = (reads.to(gl.float32) * exp(q_his.index(here).load(at))[None, :]).to(B16)
        else:
            faded = reads
        UT = warpgroup_mma(reads, scores, UT, is_async=True)
        DT = warpgroup_mma(gl.convert_layout(faded, left_k, assert_trivial=True), queries, DT, is_async=True)
        UT = warpgroup_mma_wait(1, deps=[UT])
        u_hi, u_lo = split(UT)
        u_hi = gl.convert_layout(u_hi, left, assert_trivial=True)
        u_lo = gl.convert_layout(u_lo, left, assert_trivial=True)
        ZT = gl.zeros([COLUMNS, 64], gl.float32, by_row)
        if TERMS == 2:
            ZT = warpgroup_mma(u_lo, high, ZT, use_acc=False, is_async=True)
            ZT = warpgroup_mma(u_hi, low, ZT, is_async=True)
            ZT = warpgroup_mma(u_hi, high, ZT, is_async=True)
        else:
            ZT = warpgroup_mma(u_hi, high, ZT, use_acc=False, is_async=True)
        ZT, DT = warpgroup_mma_wait(0, deps=[ZT, DT])
        barrier()  # all but the keys is read
        if c > c_lo:
            k -= C * N * row
            q -= C * row
            d_out -= C * column
            _fetch_back(
                k, q, d_out, X_hi, X_lo, scales, G, keys, queries, asked, high, low, ws, g_his, g_los, q_his, q_los,
                1 - here, C, slot - HV, row, column, N, GATE, EVEN, TERMS,
            )  # fmt: skip
        if OUTPUT:
            pages.index(0).permute((1, 0)).store((ZT * scale).to(B16))
        read = ws.index(here).load(in_row)
        if GATE:
            read *= exp(g_his.index(here).load(in_row))
        h_hi, h_lo = split(-ZT * read[None, :])
        h_hi = gl.convert_layout(h_hi, left_k, assert_trivial=True)
        h_lo = gl.convert_layout(h_lo, left_k, assert_trivial=True)
        DT = warpgroup_mma(h_hi, key, DT, is_async=True)
        if TERMS == 2:
            DT = warpgroup_mma(h_lo, key, DT, is_async=True)
        DT = warpgroup_mma_wait(0, deps=[DT])
        barrier()  # the page is written
        if OUTPUT:
            put(pages.index(0), z, column, now * N, EVEN)
            z -= C * N * column
        slot -= HV
    gl.store(d_state + tile, DT * scale)
