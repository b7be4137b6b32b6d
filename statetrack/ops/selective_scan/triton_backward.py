"""The selective scan's backward kernels; see triton_forward.py for how threads, states, channels and tokens lie.

A tile is SUB parts of TOK tokens; the forward kept the state before each tile. A walk back takes a tile in two runs:
the first only runs the states on and keeps those before each part, in a scratch that only the same thread reads; the
second takes the parts last to first, runs each one's states again in registers and then goes back over its tokens:

    g = C dy + G, G <- a g:   dC = dy h, dB = dt u g, d(dt u) = B g, d(dt A) = width e h_before g

Letters: S sequences, T tokens, D channels, M states per channel, N threads of a program.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl

from statetrack.ops.selective_scan.triton_forward import (
    everyones,
    gather_sums,
    load_own,
    load_rates,
    load_shared,
    load_states,
    store_own,
    store_states,
    threads,
    times,
    widen,
)
from statetrack.ops.selective_scan.triton_kernels import eigenvalue, fetch, sigmoid
from statetrack.ops.triton_common import span


@triton.jit
def gated(dys, zs):
    """Return dy times silu(z)."""
    out = ()
    for v in tl.static_range(len(dys)):
        out = out + (dys[v] * (zs[v] * sigmoid(zs[v])),)
    return out


@triton.jit
def adjoint(
    dt, z, A, BC, dy, d_state, product, starts, T, lo, width,
    D: tl.constexpr, M: tl.constexpr, TOK: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Walk back over one sequence from zero to `d_state` [S D M]; `product` gets all eigenvalues' product."""
    DL: tl.constexpr = N // G
    R: tl.constexpr = max(1, TOK // G)
    Q: tl.constexpr = max(1, G // TOK)
    s, _, lane, g, d, first = threads(D, CH, G, N, R, Q)
    at = first * D + d
    if VARLEN:
        total = tl.load(starts + s + 1) - tl.load(starts + s)
    else:
        total = T
    memory = s.to(tl.int64) * M * D
    rates = load_rates(A, g, d, M, D, CH, K, DL)
    Gs = load_states(None, g, d, M, True, D, CH, K, DL)
    Ps = ()
    for _ in tl.static_range(CH * K):
        Ps = Ps + (tl.full((N,), 1.0, tl.float32),)
    last = tl.cdiv(total, TOK) - 1
    for back in range(0, last + 1):
        token, left = span(s, last - back, starts, T, TOK, VARLEN)
        rows = token * D
        own_dys = widen(load_own(dy + rows, at, first, d, left, D, R, CH, DL, FULL))
        if z is not None:
            own_dys = gated(own_dys, widen(load_own(z + rows, at, first, d, left, D, R, CH, DL, FULL)))
        dts = everyones(widen(load_own(dt + rows, at, first, d, left, D, R, CH, DL, FULL)), lane - g, G, Q)
        dys = everyones(own_dys, lane - g, G, Q)
        for i in tl.static_range(TOK - 1, -1, -1):
            BCs = load_shared(BC + token * (2 * G * K), g, i, left, G, K, FULL)
            new_Gs = ()
            new_Ps = ()
            for j in tl.static_range(CH):
                for k in tl.static_range(K):
                    e = tl.exp2(dts[i * CH + j] * rates[j * K + k])
                    a = eigenvalue(e, lo, width, i < left, WHOLE)
                    new_Gs = new_Gs + (a * (BCs[K + k] * dys[i * CH + j] + Gs[j * K + k]),)
                    new_Ps = new_Ps + (Ps[j * K + k] * a,)
            Gs = new_Gs
            Ps = new_Ps
    store_states(d_state + memory, Gs, g, d, M, True, D, CH, K, DL)
    store_states(product + memory, Ps, g, d, M, True, D, CH, K, DL)


@triton.jit
def backward(
    u, dt, z, A, BC, skip, dy, saved, d_final, d_state, du, d_dt, dz, dA, d_skip, parts, scratch, sums, starts, bases,
    T, stride, lo, width,
    D: tl.constexpr, M: tl.constexpr, TOK: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, SUB: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Walk back over one sequence, for CH N / G channels, from `d_final` to `d_state` [S D M]; none is zero.

    Writes dA [S D M], d_skip [S G/Q D] (what belongs to each thread's tokens), and to `parts` [blocks tokens G 2 K]
    what the block's channels give to dB and dC. A program has scratch [SUB CH K N] and sums [N/32 SUB TOK G 2 K].
    """
    DL: tl.constexpr = N // G
    R: tl.constexpr = max(1, TOK // G)
    Q: tl.constexpr = max(1, G // TOK)
    WIDE: tl.constexpr = 2 * G * K
    SPAN: tl.constexpr = SUB * TOK
    s, block, lane, g, d, first = threads(D, CH, G, N, R, Q)
    at = first * D + d
    if VARLEN:
        total = tl.load(starts + s + 1) - tl.load(starts + s)
        base = tl.load(bases + s)
    else:
        total = T
        base = s * tl.cdiv(T, SPAN)
    memory = s.to(tl.int64) * M * D
    scratch += tl.program_id(0).to(tl.int64) * (SUB * CH * K * N) + lane
    sums += tl.program_id(0).to(tl.int64) * (N // 32 * SPAN * WIDE)
    # Which of a token's 2 K sums over channels are a thread's: halved while there are two for the 32 / G threads.
    PARTS: tl.constexpr = min(32 // G, 2 * K)
    EACH: tl.constexpr = 2 * K // PARTS
    own_sums = sums + lane // 32 * (SPAN * WIDE) + g * (2 * K) + lane % 32 // (32 // PARTS) * EACH
    rates = load_rates(A, g, d, M, D, CH, K, DL)
    if d_final is not None:
        d_final += memory
    Gs = load_states(d_final, g, d, M, True, D, CH, K, DL)
    dAs = ()
    for _ in tl.static_range(CH * K):
        dAs = dAs + (tl.zeros((N,), tl.float32),)
    skips = ()
    d_skips = ()
    for j in tl.static_range(CH):
        skips = skips + (fetch(skip + d + j * DL, d + j * DL < D, FULL),)
        d_skips = d_skips + (tl.zeros((N,), tl.float32),)
    last = tl.cdiv(total, SPAN) - 1
    for back in range(0, last + 1):
        tile = last - back
        tile_token, tile_left = span(s, tile, starts, T, SPAN, VARLEN)
        hs = load_states(saved + (base + tile).to(tl.int64) * M * D, g, d, M, False, D, CH, K, DL)
        for sub in range(0, SUB):
            for v in tl.static_range(CH * K):
                tl.store(scratch + (sub * (CH * K) + v) * N, hs[v])
            if sub < SUB - 1:
                token = tile_token + sub * TOK
                left = tile_left - sub * TOK
                own_dts = widen(load_own(dt + token * D, at, first, d, left, D, R, CH, DL, FULL))
                own_us = widen(load_own(u + token * D, at, first, d, left, D, R, CH, DL, FULL))
                dts = everyones(own_dts, lane - g, G, Q)
                xs = everyones(times(own_dts, own_us), lane - g, G, Q)
                for i in tl.static_range(TOK):
                    BCs = load_shared(BC + token * WIDE, g, i, left, G, K, FULL)
                    new_hs = ()
                    for j in tl.static_range(CH):
                        for k in tl.static_range(K):
                            e = tl.exp2(dts[i * CH + j] * rates[j * K + k])
                            a = eigenvalue(e, lo, width, i < left, WHOLE)
                            new_hs = new_hs + (a * hs[j * K + k] + xs[i * CH + j] * BCs[k],)
                    hs = new_hs
        tl.debug_barrier()
        for part in range(0, SUB):
            sub = SUB - 1 - part
            token = tile_token + sub * TOK
            left = tile_left - sub * TOK
            rows = token * D
            own_dts = widen(load_own(dt + rows, at, first, d, left, D, R, CH, DL, FULL))
            own_us = widen(load_own(u + rows, at, first, d, left, D, R, CH, DL, FULL))
            raw_dys = widen(load_own(dy + rows, at, first, d, left, D, R, CH, DL, FULL))
            own_dys = raw_dys
            if z is not None:
                zs = widen(load_own(z + rows, at, first, d, left, D, R, CH, DL, FULL))
                own_dys = gated(raw_dys, zs)
            dts = everyones(own_dts, lane - g, G, Q)
            xs = everyones(times(own_dts, own_us), lane - g, G, Q)
            dys = everyones(own_dys, lane - g, G, Q)
            befores = ()
            for v in tl.static_range(CH * K):
                befores = befores + (tl.load(scratch + (sub * (CH * K) + v) * N),)
            es = ()
            ys = ()
            for i in tl.static_range(TOK):
                BCs = load_shared(BC + token * WIDE, g, i, left, G, K, FULL)
                for j in tl.static_range(CH):
                    out = tl.zeros((N,), tl.float32)
                    for k in tl.static_range(K):
                        e = tl.exp2(dts[i * CH + j] * rates[j * K + k])
                        a = eigenvalue(e, lo, width, i < left, WHOLE)
                        h = a * befores[(i * CH + j) * K + k] + xs[i * CH + j] * BCs[k]
                        es = es + (e,)
                        befores = befores + (h,)
                        out += BCs[K + k] * h
                    ys = ys + (out,)
            if z is not None:
                ys = gather_sums(ys, lane, 1, G, CH)
            d_xs = ()
            slopes = ()
            for i in tl.static_range(TOK - 1, -1, -1):
                BCs = load_shared(BC + token * WIDE, g, i, left, G, K, FULL)
                dBs = ()
                dCs = ()
                new_Gs = ()
                new_dAs = ()
                row_d_xs = ()
                row_slopes = ()
                for j in tl.static_range(CH):
                    d_x = tl.zeros((N,), tl.float32)
                    slope = tl.zeros((N,), tl.float32)
                    new_dBs = ()
                    new_dCs = ()
                    for k in tl.static_range(K):
                        e = es[(i * CH + j) * K + k]
                        a = eigenvalue(e, lo, width, i < left, WHOLE)
                        grad = BCs[K + k] * dys[i * CH + j] + Gs[j * K + k]
                        to_B = xs[i * CH + j] * grad
                        to_C = dys[i * CH + j] * befores[((i + 1) * CH + j) * K + k]
                        if j > 0:
                            to_B += dBs[k]
                            to_C += dCs[k]
                        new_dBs = new_dBs + (to_B,)
                        new_dCs = new_dCs + (to_C,)
                        d_x += BCs[k] * grad
                        r = grad * e * befores[(i * CH + j) * K + k]
                        new_dAs = new_dAs + (dAs[j * K + k] + r * dts[i * CH + j],)
                        slope += r * rates[j * K + k]
                        new_Gs = new_Gs + (a * grad,)
                    dBs = new_dBs
                    dCs = new_dCs
                    row_d_xs = row_d_xs + (d_x,)
                    row_slopes = row_slopes + (slope,)
                Gs = new_Gs
                dAs = new_dAs
                dBCs = gather_sums(dBs + dCs, lane, G, 32, 1)
                for v in tl.static_range(EACH):
                    tl.store(own_sums + (sub * TOK + i) * WIDE + v, dBCs[v])
                d_xs = row_d_xs + d_xs
                slopes = row_slopes + slopes
            d_xs = gather_sums(d_xs, lane, 1, G, CH)
            slopes = gather_sums(slopes, lane, 1, G, CH)
            dus = ()
            d_dts = ()
            new_d_skips = ()
            for v in tl.static_range(R * CH):
                dus = dus + (d_xs[v] * own_dts[v] + own_dys[v] * skips[v % CH],)
                d_dts = d_dts + (d_xs[v] * own_us[v] + slopes[v] * (width * 0.6931471805599453),)
            for j in tl.static_range(CH):
                d_one = d_skips[j]
                for i in tl.static_range(R):
                    d_one += own_dys[i * CH + j] * own_us[i * CH + j]
                new_d_skips = new_d_skips + (d_one,)
            d_skips = new_d_skips
            store_own(du + rows, dus, at, first, d, left, D, R, CH, DL, FULL)
            store_own(d_dt + rows, d_dts, at, first, d, left, D, R, CH, DL, FULL)
            if z is not None:
                dzs = ()
                for v in tl.static_range(R * CH):
                    open = sigmoid(zs[v])
                    y = ys[v] + skips[v % CH] * own_us[v]
                    dzs = dzs + (raw_dys[v] * y * (open * (1 + zs[v] * (1 - open))),)
                store_own(dz + rows, dzs, at, first, d, left, D, R, CH, DL, FULL)
        tl.debug_barrier()
        there = sums + lane
        to = parts + block * stride + tile_token * WIDE + lane
        for r in tl.range(0, tl.cdiv(SPAN * WIDE, N), loop_unroll_factor=1):
            here = r * N + lane < tl.minimum(tile_left, SPAN) * WIDE
            out = tl.zeros((N,), tl.float32)
            for warp in tl.static_range(N // 32):
                out += tl.load(there + (warp * (SPAN * WIDE) + r * N), mask=here, other=0.0)
            tl.store(to + r * N, out, mask=here)
        tl.debug_barrier()
    store_states(d_state + memory, Gs, g, d, M, True, D, CH, K, DL)
    new_dAs = ()
    for v in tl.static_range(CH * K):
        new_dAs = new_dAs + (dAs[v] * width,)
    store_states(dA + memory, new_dAs, g, d, M, True, D, CH, K, DL)
    for j in tl.static_range(CH):
        tl.store(d_skip + (s * (G // Q) + g // Q) * D + d + j * DL, d_skips[j], mask=(d + j * DL < D) & (g % Q == 0))


@triton.jit
def unpack(parts, dB, dC, rows, M, count, stride, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """Sum `count` parts [rows G 2 K], first to last, into dB and dC [rows M]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    i = tl.arange(0, 2 * G * K)[None, :]
    m = i // (2 * K) * K + i % K
    of_B = i // K % 2 == 0
    here = (t < rows) & (m < M)
    t = t.to(tl.int64)
    total = tl.zeros((BT, 2 * G * K), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * stride + t * (2 * G * K) + i, mask=here, other=0.0)
    tl.store(dB + t * M + m, total.to(dB.dtype.element_ty), mask=here & of_B)
    tl.store(dC + t * M + m, total.to(dC.dtype.element_ty), mask=here & (i // K % 2 == 1))
