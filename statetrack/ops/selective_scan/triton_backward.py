"""The selective scan's backward kernel; see triton_kernels.py for how threads, tokens and channels lie.

Letters: S sequences, T tokens, D channels, M states per channel.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from statetrack.ops.selective_scan.triton_kernels import (
    apart,
    eigenvalue,
    fetch,
    from_lane,
    per_channel,
    prefix,
    put,
    shared,
    sigmoid,
    threads,
)
from statetrack.ops.triton_common import span


@triton.jit
def halve(values, n: tl.constexpr, lane, BIT: tl.constexpr):
    """Add n values over the pairs of threads that differ in BIT; the one with it keeps the second half of the sums."""
    upper = (lane & BIT) != 0
    kept = ()
    for v in tl.static_range(n // 2):
        mine = tl.where(upper, values[v + n // 2], values[v])
        other = tl.where(upper, values[v], values[v + n // 2])
        kept = kept + (mine + from_lane(other, lane ^ BIT, True),)
    return kept


@triton.jit
def backward(
    u, dt, z, A, BC, skip, dy, saved, d_state, product, du, d_dt, dz, dA, d_skip, parts, starts, bases,
    T, tiles, D, M, stride, lo, width,
    TOK: tl.constexpr, CH: tl.constexpr, WD: tl.constexpr, LT: tl.constexpr, DL: tl.constexpr,
    OUTPUT: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Walk back over one sequence, for WD CH DL channels; `d_state` [S M D] is read and written.

    OUTPUT writes all gradients: dA [S LT M D] adds up here what belongs to each place along the tile, d_skip [S LT D]
    likewise, and `parts` [blocks slots M TT 2] what the block's channels give to dB and dC. Otherwise `product` [S M D]
    is multiplied by all eigenvalues.
    """
    s, block, lane, place, d = threads(D, CH, WD, LT, DL)
    TT: tl.constexpr = TOK * LT
    N: tl.constexpr = WD * LT * DL
    if VARLEN:
        total = tl.load(starts + s + 1) - tl.load(starts + s)
        base = tl.load(bases + s)
    else:
        total = T
        base = s * tiles
    memory = s.to(tl.int64) * M * D
    own = (s.to(tl.int64) * LT + place) * M * D
    skips = ()
    d_skips = ()
    for j in tl.static_range(CH):
        skips = skips + (fetch(skip + d + j * DL, d + j * DL < D, FULL),)
        d_skips = d_skips + (tl.zeros((N,), tl.float32),)
    last = tl.cdiv(total, TT) - 1
    for back in range(0, last + 1):
        tile = last - back
        token, tokens = span(s, tile, starts, T, TT, VARLEN)
        left = tokens - place * TOK
        rows = token * D
        dt_rows = dt + rows
        dy_rows = dy + rows
        if z is not None:
            z_rows = z + rows
        if OUTPUT:
            u_rows = u + rows
        slot = (base + tile).to(tl.int64)
        dts = ()
        xs = ()
        dys = ()
        d_xs = ()
        d_dts = ()
        ys = ()
        for i in tl.static_range(TOK):
            for j in tl.static_range(CH):
                at = (place * TOK + i) * D + d
                known = (i < left) & (d + j * DL < D)
                delta = fetch(dt_rows + at + j * DL, known, FULL)
                grad = fetch(dy_rows + at + j * DL, known, FULL)
                if z is not None:
                    gate = fetch(z_rows + at + j * DL, known, FULL)
                    grad *= gate * sigmoid(gate)
                dts = dts + (delta,)
                dys = dys + (grad,)
                if OUTPUT:
                    value = fetch(u_rows + at + j * DL, known, FULL)
                    xs = xs + (delta * value,)
                    ys = ys + (skips[j] * value,)
                    d_xs = d_xs + (tl.zeros((N,), tl.float32),)
                    d_dts = d_dts + (tl.zeros((N,), tl.float32),)
        if OUTPUT:
            kept = saved + slot * M * D
            hs = per_channel(kept, d, 0, D, CH, DL, FULL)
        for m in range(M):
            rates = per_channel(A, d, m, D, CH, DL, FULL)
            Gs = per_channel(d_state + memory, d, m, D, CH, DL, FULL)
            Bs, Cs = apart(shared(BC + (slot * M + m) * TT + place, TOK, LT), TOK)
            if OUTPUT:  # from memory and the second cache: asked for early
                d_As = per_channel(dA + own, d, m, D, CH, DL, FULL)
                next_hs = per_channel(kept, d, tl.minimum(m + 1, M - 1), D, CH, DL, FULL)
            dBs = ()
            read = ()
            new_d_xs = ()
            new_d_dts = ()
            for j in tl.static_range(CH):
                known = d + j * DL < D
                at = m * D + d + j * DL
                rate = rates[j]
                G = Gs[j]
                e = ()
                a = ()
                for i in tl.static_range(TOK):
                    e = e + (tl.exp2(dts[i * CH + j] * rate),)
                    a = a + (eigenvalue(e[i], lo, width, i < left, WHOLE),)
                P = a[0]
                for i in tl.static_range(1, TOK):
                    P = P * a[i]
                R = a[TOK - 1] * (Cs[TOK - 1] * dys[(TOK - 1) * CH + j])
                for i in tl.static_range(1, TOK):
                    R = a[TOK - 1 - i] * (Cs[TOK - 1 - i] * dys[(TOK - 1 - i) * CH + j] + R)
                G, G_end, P_all = prefix(P, R, G, lane, place, WD, LT, DL, True)
                tl.store(d_state + memory + at, G_end, mask=known & (place == 0))
                if OUTPUT:
                    h = hs[j]
                    x = ()
                    for i in tl.static_range(TOK):
                        x = x + (xs[i * CH + j] * Bs[i],)
                    L = x[0]
                    for i in tl.static_range(1, TOK):
                        L = a[i] * L + x[i]
                    h, h_end, P_all = prefix(P, L, h, lane, place, WD, LT, DL, False)
                    before = ()
                    for i in tl.static_range(TOK):
                        before = before + (h,)
                        h = a[i] * h + x[i]
                        read = read + (h,)
                    d_rate = d_As[j]
                    for i in tl.static_range(1, TOK + 1):
                        delta = dts[(TOK - i) * CH + j]
                        g = Cs[TOK - i] * dys[(TOK - i) * CH + j] + G
                        G = a[TOK - i] * g
                        r = g * before[TOK - i] * e[TOK - i]
                        d_rate += r * delta
                        dBs = dBs + (xs[(TOK - i) * CH + j] * g,)
                        new_d_xs = new_d_xs + (d_xs[(TOK - i) * CH + j] + Bs[TOK - i] * g,)
                        new_d_dts = new_d_dts + (d_dts[(TOK - i) * CH + j] + r * rate,)
                    tl.store(dA + own + at, d_rate, mask=known)
                else:
                    P_all *= fetch(product + memory + at, known, FULL)
                    tl.store(product + memory + at, P_all, mask=known & (place == 0))
            if OUTPUT:
                d_xs = ()
                d_dts = ()
                new_ys = ()
                pairs = ()
                for i in tl.static_range(TOK):
                    to_B = dBs[TOK - 1 - i]
                    to_C = dys[i * CH] * read[i]
                    for j in tl.static_range(CH):
                        if j > 0:
                            to_B += dBs[j * TOK + TOK - 1 - i]
                            to_C += dys[i * CH + j] * read[j * TOK + i]
                        d_xs = d_xs + (new_d_xs[j * TOK + TOK - 1 - i],)
                        d_dts = d_dts + (new_d_dts[j * TOK + TOK - 1 - i],)
                        if z is not None:
                            new_ys = new_ys + (ys[i * CH + j] + Cs[i] * read[j * TOK + i],)
                        else:
                            new_ys = new_ys + (ys[i * CH + j],)
                    pairs = pairs + (to_B, to_C)
                ys = new_ys
                hs = next_hs
                share(pairs, parts + block * stride + (slot * M + m) * (2 * TT), lane, place, TOK, WD, LT, DL)
        if OUTPUT:
            du_rows = du + rows
            d_dt_rows = d_dt + rows
            if z is not None:
                dz_rows = dz + rows
            new_d_skips = ()
            for j in tl.static_range(CH):
                d_one = d_skips[j]
                for i in tl.static_range(TOK):
                    at = (place * TOK + i) * D + d
                    known = (i < left) & (d + j * DL < D)
                    value = fetch(u_rows + at + j * DL, known, FULL)
                    grad = dys[i * CH + j]
                    d_one += grad * value
                    d_x = d_xs[i * CH + j]
                    put(du_rows + at + j * DL, d_x * dts[i * CH + j] + grad * skips[j], known, FULL)
                    slope = d_dts[i * CH + j] * (width * 0.6931471805599453)
                    put(d_dt_rows + at + j * DL, d_x * value + slope, known, FULL)
                    if z is not None:
                        gate = fetch(z_rows + at + j * DL, known, FULL)
                        open = sigmoid(gate)
                        d_gate = fetch(dy_rows + at + j * DL, known, FULL) * ys[i * CH + j]
                        put(dz_rows + at + j * DL, d_gate * open * (1 + gate * (1 - open)), known, FULL)
                new_d_skips = new_d_skips + (d_one,)
            d_skips = new_d_skips
        tl.debug_barrier()
    if OUTPUT:
        for j in tl.static_range(CH):
            tl.store(d_skip + (s * LT + place) * D + d + j * DL, d_skips[j], mask=d + j * DL < D)


@triton.jit
def share(
    values, parts, lane, place, TOK: tl.constexpr, WD: tl.constexpr, LT: tl.constexpr, DL: tl.constexpr,
):  # fmt: skip
    """Sum 2 TOK values, (dB, dC) of each token, over a block's channels, and write them as [LT TOK 2].

    In log2(DL) steps a thread gives away half of its values and adds its partner's to the other half.
    """
    n: tl.constexpr = 2 * TOK
    first = lane * 0
    for bit in tl.static_range(0, 5):
        if (1 << bit) < DL:
            values = halve(values, n >> bit, lane, 1 << bit)
            first += tl.where((lane & (1 << bit)) != 0, n >> (bit + 1), 0)
    for v in tl.static_range(n // DL):
        out = values[v]
        at = place * n + first + v
        if WD > 1:
            out = tl.sum(tl.reshape(out, (WD, LT * DL)), 0)
            at = tl.min(tl.reshape(at, (WD, LT * DL)), 0)
        tl.store(parts + at, out)
