"""The delta rule's gradients of one chunk on Hopper GPUs, in Gluon: what `triton_backward.gather` computes, faster.

Two warpgroups take one chunk of one head. Everything is read once: F, Z and v into registers, where dw, dn, dv and the
operands u = p w F and h = -p w Z are made; keys, queries and dO into shared memory; S and dS in halves through one
buffer. dk is kept in two parts, what a key reads (R) and what it writes (W), since the gradient to a running log decay
is the difference of k.R and k.W (and q.dq for queries).

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

from statetrack.ops.delta_rule.triton_hopper_walk import barrier, exp, fetch, put

HALF = gl.constexpr(64)  # value rows of S and dS that are in shared memory at a time


@gluon.jit
def _save(to, tile, x, stride: gl.constexpr, alive, EVEN: gl.constexpr):
    """Store the rows before `alive` of a float32 tile; as bf16 it goes through shared memory."""
    if to.dtype.element_ty == gl.bfloat16:
        tile.store(x.to(gl.bfloat16))
        barrier()
        put(tile, to, stride, alive, EVEN, 8)
    else:
        own: gl.constexpr = x.type.layout
        i = gl.arange(0, tile.shape[0], gl.SliceLayout(1, own))
        d = gl.arange(0, tile.shape[1], gl.SliceLayout(0, own))
        gl.store(to + ((i * stride)[:, None] + d[None, :]), x, mask=(i < alive)[:, None] & (d >= 0)[None, :])


@gluon.jit
def gather(
    q, k, v, log_decay, d_out, scales, G, saved, F, d_saved, z, dq, dk, d_beta, d_decay, starts, slots,
    T, c_lo, n_chunks, n_all, scale,
    HK: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    N: gl.constexpr, C: gl.constexpr, GATE: gl.constexpr, VARLEN: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk's inputs, as `triton_backward.gather`; dv replaces Z."""
    B16: gl.constexpr = gl.bfloat16
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])  # [64 64]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, K // 2, 16])  # [64 K]
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])  # [64 HALF]
    in_lines: gl.constexpr = gl.SliceLayout(1, lines)
    tall: gl.constexpr = gl.SliceLayout(1, wide)

    here = gl.program_id(0) // HV
    h = gl.program_id(0) % HV
    hk = h // (HV // HK)
    if VARLEN:
        s = gl.load(slots + 2 * here)
        c = gl.load(slots + 2 * here + 1)
        begin = gl.load(starts + s)
        total = gl.load(starts + s + 1) - begin
        there = here
    else:
        s = here // n_chunks
        c = c_lo + here % n_chunks
        begin = s * T
        total = T
        there = s * n_all + c
    token = begin + c * C
    tokens = gl.minimum(total - c * C, C)
    rows = tokens * N
    slot = (here * HV + h).to(gl.int64)
    row = token.to(gl.int64) * N

    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    key = gl.allocate_shared_memory(B16, [64, K], swizzled)
    query = gl.allocate_shared_memory(B16, [64, K], swizzled)
    asked = gl.allocate_shared_memory(B16, [V // HALF, 64, HALF], swizzled)
    us = gl.allocate_shared_memory(B16, [V // HALF, 64, HALF], swizzled)
    hs = gl.allocate_shared_memory(B16, [V // HALF, 64, HALF], swizzled)
    state = gl.allocate_shared_memory(B16, [HALF, K], swizzled)
    P_s = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    L_s = gl.allocate_shared_memory(B16, [64, 64], swizzled)
    fetch(key, k + (row * HK + hk) * K, HK * K, rows, EVEN, 8)
    fetch(query, q + (token.to(gl.int64) * HK + hk) * K, HK * K, tokens, EVEN and C == 64, 8)
    d_out += (token.to(gl.int64) * HV + h) * V
    for e in gl.static_range(V // HALF):
        fetch(asked.index(e), d_out + e * HALF, HV * V, tokens, EVEN and C == 64, 8)
    async_copy.commit_group()
    saved += (there.to(gl.int64) * HV + h) * K * V
    d_saved += slot * K * V
    fetch(state, saved, K, HALF, True, 8)
    async_copy.commit_group()

    # row by row: dw, dn, dv and the products' operands
    i = gl.arange(0, 64, in_lines)
    x = gl.arange(0, HALF, gl.SliceLayout(0, lines))
    scales += slot * 256
    wp = gl.load(scales + i)
    np = gl.load(scales + 64 + i)  # n / p
    p = gl.load(scales + 192 + i)
    at = (row * HV + h) * V + ((i * (HV * V))[:, None] + x[None, :])
    alive = (i < rows)[:, None] & (x >= 0)[None, :]
    dw = gl.zeros([64], gl.float32, in_lines)
    dn = gl.zeros([64], gl.float32, in_lines)
    for e in gl.static_range(V // HALF):
        if EVEN:
            zt = gl.load(z + at + e * HALF).to(gl.float32)
            ft = gl.load(F + at + e * HALF).to(gl.float32)
            vt = gl.load(v + at + e * HALF).to(gl.float32)
        else:
            zt = gl.load(z + at + e * HALF, mask=alive, other=0.0).to(gl.float32)
            ft = gl.load(F + at + e * HALF, mask=alive, other=0.0).to(gl.float32)
            vt = gl.load(v + at + e * HALF, mask=alive, other=0.0).to(gl.float32)
        dw += gl.sum(zt * ft, 1)
        dn += gl.sum(zt * vt, 1)
        us.index(e).store((ft * wp[:, None]).to(B16))
        hs.index(e).store((zt * -wp[:, None]).to(B16))
        gl.store(z + at + e * HALF, (zt * (wp * np)[:, None]).to(B16), mask=alive)
    n = np * p
    db = dw / (n * n)
    gl.store(d_beta + (row + i) * HV + h, db, mask=i < rows)
    along = p * p * (dn * (wp / p) / n - 2.0 * db * (wp / p))  # 2 p^2 d|k p|^2, the part of dk that lies along k
    async_copy.wait_group(1)
    fence_async_shared()
    barrier()

    # between the chunk's own rows
    dP = gl.zeros([64, 64], gl.float32, square)
    dL = gl.zeros([64, 64], gl.float32, square)
    for e in gl.static_range(V // HALF):
        dP = warpgroup_mma(asked.index(e), us.index(e).permute((1, 0)), dP, is_async=True)
        dL = warpgroup_mma(hs.index(e), us.index(e).permute((1, 0)), dL, is_async=True)
    dP, dL = warpgroup_mma_wait(0, deps=[dP, dL])
    r = gl.arange(0, 64, gl.SliceLayout(1, square))
    j = gl.arange(0, 64, gl.SliceLayout(0, square))
    see = (j[None, :] // N <= r[:, None]) & (r < tokens)[:, None]
    before = r[:, None] > j[None, :]
    if GATE:
        G += slot * 128
        g_j, rest_j = gl.load(G + j)[None, :], gl.load(G + 64 + j)[None, :]
        g_i, rest_i = gl.load(G + r)[:, None], gl.load(G + 64 + r)[:, None]
        a = gl.minimum(r * N, 63)
        g_q, rest_q = gl.load(G + a)[:, None], gl.load(G + 64 + a)[:, None]
        dP *= exp(gl.where(see, (g_q - g_j) + (rest_q - rest_j), 0.0))
        dL *= exp(gl.where(before, (g_i - g_j) + (rest_i - rest_j), 0.0))
    P_s.store(gl.where(see, dP * scale, 0.0).to(B16))
    L_s.store(gl.where(before, dL, 0.0).to(B16))
    if GATE:
        m = gl.arange(0, 64, gl.SliceLayout(1, left))
        last_hi, last_lo = gl.load(G + 63), gl.load(G + 127)
        start = exp(gl.load(G + m))
        end = exp((last_hi - gl.load(G + m)) + (last_lo - gl.load(G + 64 + m)))
        carried = gl.zeros([HALF, K], gl.float32, wide)

    # with the states at both ends
    dQ = gl.zeros([64, K], gl.float32, wide)
    R = gl.zeros([64, K], gl.float32, wide)
    W = gl.zeros([64, K], gl.float32, wide)
    for e in gl.static_range(V // HALF):
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        if GATE:
            S = state.load(wide)
            h_e = (hs.index(e).load(left).to(gl.float32) * start[:, None]).to(B16)
        else:
            h_e = hs.index(e)
        dQ = warpgroup_mma(asked.index(e), state, dQ, is_async=True)
        R = warpgroup_mma(h_e, state, R, is_async=True)
        dQ, R = warpgroup_mma_wait(0, deps=[dQ, R])
        barrier()
        fetch(state, d_saved + e * HALF * K, K, HALF, True, 8)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        if GATE:
            carried += S.to(gl.float32) * state.load(wide).to(gl.float32)
            u_e = (us.index(e).load(left).to(gl.float32) * end[:, None]).to(B16)
        else:
            u_e = us.index(e)
        W = warpgroup_mma(u_e, state, W, is_async=True)
        W = warpgroup_mma_wait(0, deps=[W])
        if e + 1 < V // HALF:
            barrier()
            fetch(state, saved + (e + 1) * HALF * K, K, HALF, True, 8)
            async_copy.commit_group()

    fence_async_shared()
    barrier()
    dQ *= scale
    if GATE:
        a = gl.minimum(gl.arange(0, 64, tall) * N, 63)
        dQ *= exp(gl.load(G + a))[:, None]
        kept = gl.sum(W * key.load(wide).to(gl.float32), 1)  # what is left of each row's write at the chunk's end
        at_end = gl.sum(kept, 0) + gl.sum(gl.sum(carried, 1), 0) * gl.exp(last_hi)
    dQ = warpgroup_mma(P_s, key, dQ, is_async=True)
    R = warpgroup_mma(L_s, key, R, is_async=True)
    W = warpgroup_mma(P_s.permute((1, 0)), query, W, is_async=True)
    W = warpgroup_mma(L_s.permute((1, 0)), key, W, is_async=True)
    dQ, R, W = warpgroup_mma_wait(0, deps=[dQ, R, W])
    kt = key.load(wide).to(gl.float32)
    if GATE:
        by_token: gl.constexpr = gl.SliceLayout(0, square)
        gains = gl.sum(kt * (R - W), 1)  # of every row's running decay, and of every query's
        asks = gl.sum(query.load(wide).to(gl.float32) * dQ, 1)
        t = gl.arange(0, 64, by_token)
        gains = gl.convert_layout(gains, gl.SliceLayout(1, square))
        asks = gl.convert_layout(asks, gl.SliceLayout(1, square))
        later = gl.where(r[:, None] // N >= t[None, :], gains[:, None], 0.0)
        later += gl.where((r[:, None] >= t[None, :]) & (r < tokens)[:, None], asks[:, None], 0.0)
        dg = gl.sum(later, 0) + at_end
        gp = (token.to(gl.int64) + t) * HV + h
        live = gl.load(log_decay + gp, mask=t < tokens, other=0.0).to(gl.float32) > -104.0
        gl.store(d_decay + gp, gl.where(live, dg, 0.0), mask=t < tokens)
    barrier()
    along = gl.convert_layout(along, tall)
    W += R + kt * along[:, None]
    _save(dq + (token.to(gl.int64) * HV + h) * K, query, dQ, HV * K, tokens, EVEN and C == 64)
    _save(dk + (row * HV + h) * K, key, W, HV * K, rows, EVEN)
