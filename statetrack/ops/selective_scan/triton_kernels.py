"""The selective scan's kernels: forward, backward, a single token, and the packing of what the channels share.

A program walks over the tiles of one sequence for a block of channels. A thread owns TOK consecutive tokens of CH
channels, in registers, and goes through the states one by one: per token, channel and state an exponential, the state
and what is read from it. LT threads share a tile of LT * TOK tokens: each first finds the affine map h -> P h + L of
its own tokens, a scan over the threads composes them, and then each runs its tokens from its true first state. With
LT = 1 there is no scan and no product. The adjoint goes the same way, backwards.

All tensors of a program are one-dimensional, one element per thread, so that no layout is left to choose: thread
(wd, place, dl) of [WD LT DL] owns the tokens from place TOK on, and channels of block wd. Loops over tokens and
channels are unrolled.

Between the tiles, the states are kept in memory, [S M D]; the same threads of the same program write and read them.

    forward   e = 2^(dt A'), a = lo + width e, h <- a h + dt u B, y += C h        with A' = A log2(e), width = hi - lo
    backward  g = C dy + G, G <- a g, and from the states run again: dC = dy h, dB = dt u g,
              d(dt u) = B g, d(dt A) = width e h_before g

Letters: S sequences, T tokens, D channels, M states per channel. A `slot` numbers the (sequence, tile) pairs.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl

from statetrack.ops.triton_common import chunk_of, span


@triton.jit
def compose(P, L, Q, R):
    """Return the affine map that applies h -> P h + L, then h -> Q h + R."""
    return P * Q, Q * L + R


@triton.jit
def threads(D, CH: tl.constexpr, WD: tl.constexpr, LT: tl.constexpr, DL: tl.constexpr):
    """Return the program's sequence and block, and each thread's number, place along the tile and first channel.

    The thread's next channel is DL further.
    """
    lane = tl.arange(0, WD * LT * DL)
    blocks = tl.cdiv(D, WD * CH * DL)
    block = tl.program_id(0) % blocks
    d = block * (WD * CH * DL) + lane // (LT * DL) * (CH * DL) + lane % DL
    return tl.program_id(0) // blocks, block, lane, lane // DL % LT, d


@triton.jit
def from_lane(x, source, WARP: tl.constexpr):
    """Return x of thread `source`, which is in the same warp if WARP."""
    if WARP:
        N: tl.constexpr = x.shape[0]
        x = tl.gather(tl.reshape(x, (N // 32, 32)), tl.reshape(source % 32, (N // 32, 32)), 1)
        x = tl.reshape(x, (N,))
    else:
        x = tl.gather(x, source, 0)
    return x


@triton.jit
def prefix(P, L, seed, lane, place, WD: tl.constexpr, LT: tl.constexpr, DL: tl.constexpr, REVERSE: tl.constexpr):
    """Return the state before and after each thread's tokens, and the product up to there, from the tile's `seed`."""
    FIRST: tl.constexpr = LT - 1 if REVERSE else 0
    STEP: tl.constexpr = -DL if REVERSE else DL
    L = tl.where(place == FIRST, P * seed + L, L)
    if LT > 1:
        maps = tl.reshape(P, (WD, LT, DL)), tl.reshape(L, (WD, LT, DL))
        P3, L3 = tl.associative_scan(maps, 1, compose, reverse=REVERSE)
        P = tl.reshape(P3, (WD * LT * DL,))
        L = tl.reshape(L3, (WD * LT * DL,))
        source = tl.where(place == FIRST, lane, lane - STEP)
        before = tl.where(place == FIRST, seed, from_lane(L, source, LT * DL <= 32))
    else:
        before = seed
    return before, L, P


@triton.jit
def fetch(p, known, FULL: tl.constexpr):
    """Load float32, 0 where not known; FULL says that all is."""
    if FULL:
        x = tl.load(p)
    else:
        x = tl.load(p, mask=known, other=0.0)
    return x.to(tl.float32)


@triton.jit
def put(p, x, known, FULL: tl.constexpr):
    """Store in the type of the tensor, where known; FULL says that all is."""
    if FULL:
        tl.store(p, x.to(p.dtype.element_ty))
    else:
        tl.store(p, x.to(p.dtype.element_ty), mask=known)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def shared(BC, TOK: tl.constexpr, LT: tl.constexpr):
    """Load B and C of a thread's tokens for one state, a pair in 64 bits each."""
    pairs = ()
    for i in tl.static_range(TOK):
        pairs = pairs + (tl.load(BC + i * LT),)
    return pairs


@triton.jit
def per_channel(p, d, m, D, CH: tl.constexpr, DL: tl.constexpr, FULL: tl.constexpr):
    """Load a thread's channels of row m of [M D]."""
    out = ()
    for j in tl.static_range(CH):
        out = out + (fetch(p + m * D + d + j * DL, d + j * DL < D, FULL),)
    return out


@triton.jit
def apart(pairs, TOK: tl.constexpr):
    """Return B and C of the pairs."""
    Bs = ()
    Cs = ()
    for i in tl.static_range(TOK):
        Bs = Bs + ((pairs[i] & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True),)
        Cs = Cs + ((pairs[i] >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
    return Bs, Cs


@triton.jit
def eigenvalue(e, lo, width, inside, WHOLE: tl.constexpr):
    """Return lo + width e, or 1 outside the sequence; WHOLE says that e = 1 there is enough."""
    a = lo + width * e
    if not WHOLE:
        a = tl.where(inside, a, 1.0)
    return a


@triton.jit
def pack(
    B, C, BC, starts, slots, T, tiles, M,
    TOK: tl.constexpr, LT: tl.constexpr, BM: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Write B and C of one tile as [M TOK LT 2] in float32, 0 after the sequence's end."""
    slot = tl.program_id(0)
    TT: tl.constexpr = TOK * LT
    s, c = chunk_of(slot, slots, 0, tiles, VARLEN)
    token, tokens = span(s, c, starts, T, TT, VARLEN)
    t = tl.arange(0, TT)[:, None]
    m = tl.program_id(1) * BM + tl.arange(0, BM)[None, :]
    here = (t < tokens) & (m < M)
    out = BC + ((slot.to(tl.int64) * M + m) * TT + (t % TOK * LT + t // TOK)) * 2
    tl.store(out, tl.load(B + (token + t) * M + m, mask=here, other=0.0).to(tl.float32), mask=m < M)
    tl.store(out + 1, tl.load(C + (token + t) * M + m, mask=here, other=0.0).to(tl.float32), mask=m < M)


@triton.jit
def unpack(
    parts, dB, dC, starts, slots, T, tiles, M, count, stride,
    TT: tl.constexpr, BM: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Sum `count` parts [M TT 2] of one tile, first to last, into its rows of dB and dC."""
    slot = tl.program_id(0)
    s, c = chunk_of(slot, slots, 0, tiles, VARLEN)
    token, tokens = span(s, c, starts, T, TT, VARLEN)
    i = tl.arange(0, BM * TT * 2)
    m = tl.program_id(1) * BM + i // (2 * TT)
    t = i // 2 % TT
    known = m < M
    at = parts + (slot.to(tl.int64) * M + tl.program_id(1) * BM) * (2 * TT) + i
    total = tl.zeros((BM * TT * 2,), tl.float32)
    for part in range(count):
        total += tl.load(at + part * stride, mask=known, other=0.0)
    here = known & (t < tokens)
    out = (token + t) * M + m
    tl.store(dB + out, total.to(dB.dtype.element_ty), mask=here & (i % 2 == 0))
    tl.store(dC + out, total.to(dC.dtype.element_ty), mask=here & (i % 2 == 1))


@triton.jit
def forward(
    u, dt, z, A, BC, skip, y, state, product, saved, starts, bases, kept_bases,
    T, tiles, D, M, every, lo, width,
    TOK: tl.constexpr, CH: tl.constexpr, WD: tl.constexpr, LT: tl.constexpr, DL: tl.constexpr,
    AHEAD: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr,
    WHOLE: tl.constexpr, FULL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Walk over one sequence, for WD CH DL channels; `state` [S M D] is read and written.

    OUTPUT writes y; else `product` [S M D] is multiplied by all eigenvalues. SAVE keeps the state before each tile
    whose number `every` divides. AHEAD loads what the next state takes while one is worked on.
    """
    s, _, lane, place, d = threads(D, CH, WD, LT, DL)
    TT: tl.constexpr = TOK * LT
    if VARLEN:
        total = tl.load(starts + s + 1) - tl.load(starts + s)
        base = tl.load(bases + s)
        kept = tl.load(kept_bases + s)
    else:
        total = T
        base = s * tiles
        kept = s * tl.cdiv(tiles, every)
    memory = s.to(tl.int64) * M * D
    skips = ()
    for j in tl.static_range(CH):
        skips = skips + (fetch(skip + d + j * DL, d + j * DL < D, FULL),)
    for tile in range(0, tl.cdiv(total, TT)):
        token, tokens = span(s, tile, starts, T, TT, VARLEN)
        left = tokens - place * TOK
        rows = token * D
        dt_rows = dt + rows
        u_rows = u + rows
        dts = ()
        xs = ()
        ys = ()
        for i in tl.static_range(TOK):
            for j in tl.static_range(CH):
                at = (place * TOK + i) * D + d
                known = (i < left) & (d + j * DL < D)
                step = fetch(dt_rows + at + j * DL, known, FULL)
                value = fetch(u_rows + at + j * DL, known, FULL)
                dts = dts + (step,)
                xs = xs + (step * value,)
                ys = ys + (skips[j] * value,)
        BC_tile = BC + (base + tile).to(tl.int64) * M * TT + place
        keep_here = tile % every == 0
        keep = saved
        if SAVE:
            keep = saved + (kept + tile // every).to(tl.int64) * M * D
        if AHEAD:
            pairs = shared(BC_tile, TOK, LT)
            rates = per_channel(A, d, 0, D, CH, DL, FULL)
            before = per_channel(state + memory, d, 0, D, CH, DL, FULL)
        for m in range(M):
            if AHEAD:
                following = tl.minimum(m + 1, M - 1)
                next_pairs = shared(BC_tile + following * TT, TOK, LT)
                next_rates = per_channel(A, d, following, D, CH, DL, FULL)
                next_before = per_channel(state + memory, d, following, D, CH, DL, FULL)
            else:
                pairs = shared(BC_tile + m * TT, TOK, LT)
                rates = per_channel(A, d, m, D, CH, DL, FULL)
                before = per_channel(state + memory, d, m, D, CH, DL, FULL)
            Bs, Cs = apart(pairs, TOK)
            hs = ()
            for j in tl.static_range(CH):
                known = d + j * DL < D
                at = m * D + d + j * DL
                rate = rates[j]
                h = before[j]
                if SAVE:
                    tl.store(keep + at, h, mask=known & (place == 0) & keep_here)
                a = ()
                x = ()
                for i in tl.static_range(TOK):
                    a = a + (eigenvalue(tl.exp2(dts[i * CH + j] * rate), lo, width, i < left, WHOLE),)
                    x = x + (xs[i * CH + j] * Bs[i],)
                P = a[0]
                L = x[0]
                for i in tl.static_range(1, TOK):
                    P = P * a[i]
                    L = a[i] * L + x[i]
                if OUTPUT and LT == 1:
                    end = a[0] * h + x[0]
                    hs = hs + (end,)
                    for i in tl.static_range(1, TOK):
                        end = a[i] * end + x[i]
                        hs = hs + (end,)
                else:
                    h, end, P = prefix(P, L, h, lane, place, WD, LT, DL, False)
                    for i in tl.static_range(TOK):
                        h = a[i] * h + x[i]
                        hs = hs + (h,)
                tl.store(state + memory + at, end, mask=known & (place == LT - 1))
                if not OUTPUT:
                    P *= fetch(product + memory + at, known, FULL)
                    tl.store(product + memory + at, P, mask=known & (place == LT - 1))
            read = ()
            for i in tl.static_range(TOK):
                for j in tl.static_range(CH):
                    read = read + (ys[i * CH + j] + Cs[i] * hs[j * TOK + i],)
            ys = read
            if AHEAD:
                pairs = next_pairs
                rates = next_rates
                before = next_before
        if OUTPUT:
            y_rows = y + rows
            if z is not None:
                z_rows = z + rows
            for i in tl.static_range(TOK):
                for j in tl.static_range(CH):
                    at = (place * TOK + i) * D + d
                    known = (i < left) & (d + j * DL < D)
                    out = ys[i * CH + j]
                    if z is not None:
                        gate = fetch(z_rows + at + j * DL, known, FULL)
                        out *= gate * sigmoid(gate)
                    put(y_rows + at + j * DL, out, known, FULL)
        tl.debug_barrier()


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
