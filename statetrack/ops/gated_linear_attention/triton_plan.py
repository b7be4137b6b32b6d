"""Gated linear attention on a GPU: sizes, schedules and launches that depend on nothing but shapes and types."""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
from torch import Tensor

from statetrack.ops.gated_linear_attention import triton_head, triton_key, triton_walk
from statetrack.ops.layout import chunk_tables
from statetrack.ops.triton_launch import Launch, bind

CHUNK = 64
RANGE_BYTES = 2**27  # of the states at the starts of a range's chunks
MIN_RANGE = 8  # chunks
FULL_GPU = 256  # programs of `walk` that keep a GPU busy
MIN_SEGMENT = 16  # chunks
HEADS = 16  # that one program of `prepare_head` or `decay_head` takes
GATHERERS = 512  # programs of `pairs_head` that keep a GPU busy

Range = tuple[int, int]
Work = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # what walks take: q, k, k_lo, G, P


class Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(
        self,
        q: tuple[int, ...],
        v: tuple[int, ...],
        dtype: torch.dtype,
        key: bool,
        packed: tuple[int, ...],
        device: torch.device,
    ):
        self.B, self.T, self.HK, self.K = q
        self.HV, self.V = v[2:]
        self.key = key
        self.varlen, self.segments = len(packed) > 0, 1
        exact = dtype != torch.bfloat16
        self.low = torch.float32 if exact else torch.bfloat16
        BK = max(16, triton.next_power_of_2(self.K))
        BV = value_columns(self.V, BK, exact)
        self.starts = self.slots = self.bases = None
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // CHUNK)
            self.starts, self.slots, self.bases = chunk_tables(packed, CHUNK, device)
        else:
            self.segments = segments(self.B * self.HV * triton.cdiv(self.V, BV), self.T)
            self.S, self.T = self.B * self.segments, self.T // self.segments
            self.most = -(-self.T // CHUNK)
        self.every = max(1, self.most)
        if not self.varlen:
            chunk_bytes = self.S * self.HV * self.K * self.V * self.low.itemsize
            self.every = max(1, min(self.most, max(MIN_RANGE, RANGE_BYTES // max(1, chunk_bytes))))
        self.ranges = [(low, min(low + self.every, self.most)) for low in range(0, self.most, self.every)]
        self.pairs = self.pairs_of(0, min(self.every, self.most))  # of the longest range
        self.parts = 1  # among how many programs the value heads of a key head are split
        while self.pairs * self.HK * self.parts < GATHERERS and self.HV // self.HK % (2 * self.parts) == 0:
            self.parts *= 2
        self._schedules(BK, BV, exact)
        self.state = self.S, self.HV, self.K, self.V
        self.widths = self.HK, self.HV, self.K, self.V
        self.launch = cache(self._launch)

    def _schedules(self, BK: int, BV: int, exact: bool) -> None:
        """Choose every kernel's tiles and warps."""
        rows = not self.varlen and self.T % CHUNK == 0

        def full(columns: int) -> int:
            return 0 if BK != self.K or self.V % columns else 2 if rows else 1

        self.common = {"C": CHUNK, "VARLEN": self.varlen, "EXACT": exact}
        self.walk = {
            "BK": BK, "BV": BV, "KEY": self.key, "FULL": full(BV),
            "STAGES": 1 if exact or BK == 256 else 2, "num_warps": 8 if BK == 256 or (exact and BK > 64) else 4,
        }  # fmt: skip
        channels = min(BK, 32 if exact else 64)
        columns = min(BV, 32 if exact else 64)
        inner = {"BV": columns, "NV": triton.cdiv(self.V, columns), "num_warps": 4}
        self.scores = {"BK": channels, "NK": triton.cdiv(self.K, channels), "num_warps": 4}
        self.pairs_head = self.scores | inner | {"FULL": full(columns), "STAGES": 1 if exact else 2}
        self.gather_head = inner | {"BK": channels, "FULL": full(columns), "STAGES": 1 if exact else 2}
        self.decay_head = self.scores | inner | {"NE": self.scores["NK"], "BH": HEADS}
        columns = max(16, min(64 if exact else 128, triton.next_power_of_2(self.V)))
        self.tree = {"BK": min(BK, 32), "BV": columns, "NV": triton.cdiv(self.V, columns), "num_warps": 8}
        columns = min(BK, 64 if exact else 128)
        self.blocks = {"BK": columns, "NK": triton.cdiv(self.K, columns), "num_warps": 8}

    def _launch(self, name: str, **flags: bool) -> Launch:
        """Return a kernel's launch."""
        if name == "prepare_head":
            return bind(triton_head.prepare_head, C=CHUNK, BH=HEADS, VARLEN=self.varlen, num_warps=4)
        if name == "end_of_segment":
            options = {key: self.walk[key] for key in ("BK", "BV", "FULL", "num_warps")}
            return bind(triton_walk.end_of_segment, C=CHUNK, EXACT=self.common["EXACT"], **options, **flags)
        kernel, schedule = {
            "scores_head": (triton_head.scores_head, self.scores),
            "pairs_head": (triton_head.pairs_head, self.pairs_head),
            "gather_head": (triton_head.gather_head, self.gather_head),
            "decay_head": (triton_head.decay_head, self.decay_head),
            "prepare_key": (triton_key.prepare_key, self.blocks),
            "gather_key": (triton_key.gather_key, self.tree),
            "walk": (triton_walk.walk, self.walk),
            "walk_back": (triton_walk.walk_back, self.walk),
        }[name]
        return bind(kernel, **self.common, **schedule, **flags)

    @property
    def grid(self) -> tuple[int, int]:
        """The grid of the two walks."""
        return self.S * self.HV, -(-self.V // self.walk["BV"])

    def pairs_of(self, low: int, high: int) -> int:
        """Return how many (sequence, chunk) pairs the chunks [low, high) of every sequence are (all of packed ones)."""
        return self.slots.shape[0] if self.slots is not None else self.S * (high - low)

    def workspace(self, q: Tensor, k: Tensor) -> Work:
        """Allocate what `prepare` writes for the longest range."""
        P = q.new_empty((self.pairs, self.HV, CHUNK, CHUNK), dtype=self.low)
        if not self.key:
            return q, k, k, self.factors(q, self.pairs), P
        tiles = self.pairs, self.HV, CHUNK, self.K
        start, end = q.new_empty(tiles, dtype=self.low), q.new_empty(tiles, dtype=self.low)
        end_lo = end if self.common["EXACT"] else q.new_empty(tiles, dtype=self.low)
        return start, end, end_lo, q.new_empty((self.pairs, self.HV, self.K), dtype=torch.float32), P

    def factors(self, like: Tensor, pairs: int) -> Tensor:
        """Allocate what `prepare_head` writes."""
        return like.new_empty((pairs, self.HV, triton_walk.FACTORS.value, CHUNK), dtype=torch.float32)

    def prepare(self, work: Work, q: Tensor, k: Tensor, decay: Tensor, chunks: Range) -> None:
        """Fill the workspace for the chunks [low, high)."""
        (low, high), pairs, where = chunks, self.pairs_of(*chunks), (self.starts, self.slots)
        numbers = self.T, low, high - low, *self.widths[:3]
        if self.key:
            self.launch("prepare_key")((pairs * self.HV,), (q, k, decay, *work, *where), numbers)
            return
        self.prepare_head(work[3], decay, chunks)
        split = self.HV // self.HK // self.parts, self.parts
        grid = (pairs * self.HK * self.parts,)
        self.launch("scores_head")(grid, (q, k, *work[3:], *where), (*numbers, *split))

    def prepare_head(self, G: Tensor, decay: Tensor, chunks: Range) -> None:
        """Write the factors of the chunks [low, high), with one decay per head."""
        (low, high), grid = chunks, (self.pairs_of(*chunks), triton.cdiv(self.HV, HEADS))
        tensors = decay, G, self.starts, self.slots
        self.launch("prepare_head")(grid, tensors, (self.T, low, high - low, self.HV))


_plan = lru_cache(maxsize=64)(Plan)


def plan_of(q: Tensor, v: Tensor, decay: Tensor, packed: list[int]) -> Plan:
    """Return what all launches of one call share: the same plan for the same shapes and types."""
    return _plan(q.shape, v.shape, v.dtype, decay.ndim == 4, tuple(packed), q.device)


def value_columns(V: int, BK: int, exact: bool) -> int:
    """Return how many value columns of the state one program walks with."""
    return min(32 if exact and BK == 256 else 64, max(16, triton.next_power_of_2(V)))


def segments(programs: int, T: int) -> int:
    """Return into how many segments to cut sequences of T tokens, given how many programs would walk whole ones."""
    count = 1
    while programs * count < FULL_GPU and T % (2 * count * CHUNK) == 0 and T // (2 * count * CHUNK) >= MIN_SEGMENT:
        count *= 2
    return count
