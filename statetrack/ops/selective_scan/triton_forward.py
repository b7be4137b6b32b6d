"""The selective scan's forward kernel.

A thread holds K states of CH channels in registers for a whole sequence and walks over its tokens, TOK at a time; G
threads of a warp, side by side, share a channel and hold its M <= G K states. Of the TOK tokens each owns R = TOK / G:
it loads these tokens' u, dt and z, hands them to the others, and writes y. Each thread sums its part of C h for all TOK
tokens; exchanges then leave it with the whole sums of its own. Nothing waits for a neighbour but these sums, and the
exponentials of TOK tokens do not wait for each other. With more threads than tokens, Q = G / TOK own the same one.

B and C of all channels come from `pack` in the order in which a thread reads them, [tokens G 2 K], with loads of
up to four values.

Letters: S sequences, T tokens, D channels, M states per channel, N threads of a program.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl

from statetrack.ops.selective_scan.triton_kernels import eigenvalue, fetch, from_lane, halve, sigmoid
from statetrack.ops.triton_common import span


@triton.jit
def columns(x, K: tl.constexpr):
    """Return the K <= 4 columns of x [N K], each [N]."""
    N: tl.constexpr = x.shape[0]
    if K == 4:
        even, odd = tl.split(tl.reshape(x, (N, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        out = a, b, c, d
    elif K == 2:
        a, b = tl.split(x)
        out = a, b
    else:
        out = (tl.reshape(x, (N,)),)
    return out


@triton.jit
def threads(D, CH: tl.constexpr, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr):
    """Return the program's sequence and block, and each thread's number, group, first channel and first token."""
    lane = tl.arange(0, N)
    g = lane % G
    blocks = tl.cdiv(D, CH * (N // G))
    block = tl.program_id(0) % blocks
    return tl.program_id(0) // blocks, block, lane, g, block * (CH * (N // G)) + lane // G, g // Q * R


@triton.jit
def load_states(
    p, g, d,
    M: tl.constexpr, TURNED: tl.constexpr, D: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, DL: tl.constexpr,
):  # fmt: skip
    """Load a thread's part of [M D], TURNED: [D M]: the K states of channel d, then of the next; 0 where there is none.

    All zero if p is None.
    """
    out = ()
    for j in tl.static_range(CH):
        for k in tl.static_range(K):
            known = (g * K + k < M) & (d + j * DL < D)
            if p is None:
                out = out + (tl.zeros(d.shape, tl.float32),)
            elif TURNED:
                out = out + (tl.load(p + (d * M + g * K) + (j * DL * M + k), mask=known, other=0.0),)
            else:
                out = out + (tl.load(p + (g * (K * D) + d) + (k * D + j * DL), mask=known, other=0.0),)
    return out


@triton.jit
def store_states(
    p, values, g, d,
    M: tl.constexpr, TURNED: tl.constexpr, D: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, DL: tl.constexpr,
):  # fmt: skip
    """Store what `load_states` loads."""
    for j in tl.static_range(CH):
        for k in tl.static_range(K):
            known = (g * K + k < M) & (d + j * DL < D)
            if TURNED:
                tl.store(p + (d * M + g * K) + (j * DL * M + k), values[j * K + k], mask=known)
            else:
                tl.store(p + (g * (K * D) + d) + (k * D + j * DL), values[j * K + k], mask=known)


@triton.jit
def load_rates(A, g, d, M: tl.constexpr, D: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, DL: tl.constexpr):
    """Load a thread's part of A [D M], in units of log 2."""
    A = load_states(A, g, d, M, True, D, CH, K, DL)
    out = ()
    for v in tl.static_range(CH * K):
        out = out + (A[v] * 1.4426950408889634,)
    return out


@triton.jit
def load_own(
    p, at, first, d, left, D: tl.constexpr, R: tl.constexpr, CH: tl.constexpr, DL: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Load R tokens of a thread's channels, from `first` on, `left` being in the sequence; in the type of the tensor.

    `at` is first D + d; what is not there is 0.
    """
    out = ()
    for i in tl.static_range(R):
        for j in tl.static_range(CH):
            if FULL:
                x = tl.load(p + at + (i * D + j * DL))
            else:
                x = tl.load(p + at + (i * D + j * DL), mask=(first + i < left) & (d + j * DL < D), other=0.0)
            out = out + (x,)
    return out


@triton.jit
def store_own(
    p, values, at, first, d, left,
    D: tl.constexpr, R: tl.constexpr, CH: tl.constexpr, DL: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Store what `load_own` loads."""
    for i in tl.static_range(R):
        for j in tl.static_range(CH):
            x = values[i * CH + j].to(p.dtype.element_ty)
            if FULL:
                tl.store(p + at + (i * D + j * DL), x)
            else:
                tl.store(p + at + (i * D + j * DL), x, mask=(first + i < left) & (d + j * DL < D))


@triton.jit
def widen(values):
    """Return values in float32."""
    out = ()
    for v in tl.static_range(len(values)):
        out = out + (values[v].to(tl.float32),)
    return out


@triton.jit
def times(xs, ys):
    """Return the products of two tuples' values."""
    out = ()
    for v in tl.static_range(len(xs)):
        out = out + (xs[v] * ys[v],)
    return out


@triton.jit
def everyones(own, source, G: tl.constexpr, Q: tl.constexpr):
    """Return the values of all G threads that share a channel, first to last, Q at a time holding the same.

    `source` is the first of them.
    """
    out = ()
    for g in tl.static_range(0, G, Q):
        for v in tl.static_range(len(own)):
            if G > 1:
                out = out + (from_lane(own[v], source + g),)
            else:
                out = out + (own[v],)
    return out


@triton.jit
def gather_sums(values, lane, LOW: tl.constexpr, HIGH: tl.constexpr, LEAST: tl.constexpr):
    """Sum each of the values over the threads whose numbers differ only in the bits from LOW to below HIGH.

    The threads share the work: each is left with the sums of its part, first to last. With LEAST values left, several
    threads end with the same ones.
    """
    for step in tl.static_range(0, 5):
        if (HIGH >> (step + 1)) >= LOW:
            values = halve(values, lane, HIGH >> (step + 1), LEAST)
    return values


@triton.jit
def load_shared(p, g, i, left, G: tl.constexpr, K: tl.constexpr, FULL: tl.constexpr):
    """Load B and C of group g from row i of [tokens G 2 K], of which `left` are in the sequence: 2 K tensors [N]."""
    N: tl.constexpr = g.shape[0]
    WIDE: tl.constexpr = 4 if K >= 2 else 2
    out = ()
    for part in tl.static_range(2 * K // WIDE):
        at = p + i * (2 * G * K) + part * WIDE + (g * (2 * K))[:, None] + tl.arange(0, WIDE)[None, :]
        if FULL:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=tl.full((N, WIDE), i, tl.int32) < left, other=0.0)
        out = out + columns(x, WIDE)
    return out


@triton.jit
def pack(B, C, BC, rows, M, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """Write B and C [rows M] as [rows G 2 K] in float32, 0 where there is no state."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    m = tl.arange(0, G * K)[None, :]
    here = (t < rows) & (m < M)
    t = t.to(tl.int64)
    out = BC + t * (2 * G * K) + m // K * (2 * K) + m % K
    tl.store(out, tl.load(B + t * M + m, mask=here, other=0.0).to(tl.float32), mask=t < rows)
    tl.store(out + K, tl.load(C + t * M + m, mask=here, other=0.0).to(tl.float32), mask=t < rows)


@triton.jit
def forward(
    u, dt, z, A, BC, skip, y, initial, state, product, saved, starts, kept_bases, T, every, lo, width,
    D: tl.constexpr, M: tl.constexpr, TOK: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """Walk over one sequence, for CH N / G channels, from `initial` to `state` [S D M]; none is zero.

    OUTPUT writes y; else `product` [S D M] gets the product of all eigenvalues. SAVE keeps the state before the first
    token and each time `every` times TOK tokens have passed.
    """
    DL: tl.constexpr = N // G
    R: tl.constexpr = max(1, TOK // G)
    Q: tl.constexpr = max(1, G // TOK)
    s, _, lane, g, d, first = threads(D, CH, G, N, R, Q)
    at = first * D + d
    if VARLEN:
        total = tl.load(starts + s + 1) - tl.load(starts + s)
        kept = tl.load(kept_bases + s)
    else:
        total = T
        kept = s * tl.cdiv(T, TOK * every)
    memory = s.to(tl.int64) * M * D
    rates = load_rates(A, g, d, M, D, CH, K, DL)
    if initial is not None:
        initial += memory
    hs = load_states(initial, g, d, M, True, D, CH, K, DL)
    Ps = ()
    for _ in tl.static_range(CH * K):
        Ps = Ps + (tl.full((N,), 1.0, tl.float32),)
    skips = ()
    for j in tl.static_range(CH):
        skips = skips + (fetch(skip + d + j * DL, d + j * DL < D, FULL),)
    last = tl.cdiv(total, TOK) - 1
    token, left = span(s, 0, starts, T, TOK, VARLEN)
    next_dts = load_own(dt + token * D, at, first, d, left, D, R, CH, DL, FULL)
    next_us = load_own(u + token * D, at, first, d, left, D, R, CH, DL, FULL)
    for tile in range(0, last + 1):
        token, left = span(s, tile, starts, T, TOK, VARLEN)
        rows = token * D
        own_dts = widen(next_dts)
        own_us = widen(next_us)
        following, ahead = span(s, tl.minimum(tile + 1, last), starts, T, TOK, VARLEN)
        next_dts = load_own(dt + following * D, at, first, d, ahead, D, R, CH, DL, FULL)
        next_us = load_own(u + following * D, at, first, d, ahead, D, R, CH, DL, FULL)
        dts = everyones(own_dts, lane - g, G, Q)
        xs = everyones(times(own_dts, own_us), lane - g, G, Q)
        if OUTPUT and z is not None:
            gates = widen(load_own(z + rows, at, first, d, left, D, R, CH, DL, FULL))
        if SAVE:
            if tile % every == 0:
                keep = saved + (kept + tile // every).to(tl.int64) * M * D
                store_states(keep, hs, g, d, M, False, D, CH, K, DL)
        ys = ()
        for i in tl.static_range(TOK):
            BCs = load_shared(BC + token * (2 * G * K), g, i, left, G, K, FULL)
            new_hs = ()
            new_Ps = ()
            for j in tl.static_range(CH):
                out = tl.zeros((N,), tl.float32)
                for k in tl.static_range(K):
                    e = tl.exp2(dts[i * CH + j] * rates[j * K + k])
                    a = eigenvalue(e, lo, width, i < left, WHOLE)
                    h = a * hs[j * K + k] + xs[i * CH + j] * BCs[k]
                    new_hs = new_hs + (h,)
                    out += BCs[K + k] * h
                    if not OUTPUT:
                        new_Ps = new_Ps + (Ps[j * K + k] * a,)
                ys = ys + (out,)
            hs = new_hs
            if not OUTPUT:
                Ps = new_Ps
        if OUTPUT:
            ys = gather_sums(ys, lane, 1, G, CH)
            outs = ()
            for v in tl.static_range(R * CH):
                out = ys[v] + skips[v % CH] * own_us[v]
                if z is not None:
                    out *= gates[v] * sigmoid(gates[v])
                outs = outs + (out,)
            store_own(y + rows, outs, at, first, d, left, D, R, CH, DL, FULL)
    store_states(state + memory, hs, g, d, M, True, D, CH, K, DL)
    if not OUTPUT:
        store_states(product + memory, Ps, g, d, M, True, D, CH, K, DL)
