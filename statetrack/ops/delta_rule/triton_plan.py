"""The delta rule on a GPU: sizes, schedules and launches that depend on nothing but shapes and types, kept per shape.

On Hopper GPUs some kernels are in Gluon (triton_hopper_*.py): the same parameters, their sizes known when compiled.
"""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
from torch import Tensor

from statetrack.ops.delta_rule import triton_backward, triton_forward, triton_hopper_gather, triton_hopper_prepare
from statetrack.ops.delta_rule import triton_hopper_walk as hopper_walk
from statetrack.ops.delta_rule.triton_forward import ROWS
from statetrack.ops.layout import chunk_tables
from statetrack.ops.triton_launch import Launch, bind

BACKWARD_RANGES = 4  # the backward's workspace is about this fraction of one for the whole sequence
MIN_RANGE = 8  # chunks
FULL_GPU = 128  # (sequence, head) pairs that keep a GPU busy
MIN_SEGMENT = 16  # chunks
MIN_SEGMENTS = 4  # fewer do not pay for walking three times


def plan_of(q: Tensor, v: Tensor, log_decay: Tensor | None, packed: list[int], terms: int) -> Plan:
    """Return what all launches of one call share: the same plan for the same shapes and types."""
    return _plan(q.shape, v.shape, v.dtype, log_decay is not None, tuple(packed), terms, q.device)


class Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(
        self,
        q: tuple[int, ...],
        v: tuple[int, ...],
        dtype: torch.dtype,
        gate: bool,
        packed: tuple[int, ...],
        terms: int,
        device: torch.device,
    ):
        self.B, self.T, self.HK, self.K = q
        self.N, self.HV, self.V = v[2:]
        self.C, self.terms, self.gate = ROWS // self.N, terms, gate
        self.varlen, self.segments = len(packed) > 0, 1
        self.starts = self.slots = self.bases = None
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // self.C)
            self.starts, self.slots, self.bases = chunk_tables(packed, self.C, device)
            self.chunks = self.slots.shape[0]
        else:
            self.segments = segments(self.B * self.HV, self.T, self.C)
            self.S, self.T = self.B * self.segments, self.T // self.segments
            self.most = -(-self.T // self.C)
            self.chunks = self.S * self.most
        self.exact = dtype != torch.bfloat16
        self.low = torch.float32 if self.exact else torch.bfloat16
        self.BK, self.BQ = (max(16, triton.next_power_of_2(n)) for n in (self.K, self.C))
        self.whole = not self.varlen and self.T % self.C == 0 and ROWS % self.N == 0 and self.BQ == self.C
        self.hopper = serves(self.K, self.V, dtype, device)
        self.columns = 64 if self.hopper else walk_columns(self.V, self.BK, self.exact)  # of the state, per program
        self.common = {"N": self.N, "C": self.C, "GATE": gate, "VARLEN": self.varlen}
        if not self.hopper:
            self.common |= {"BK": self.BK, "EXACT": self.exact}
        self.ranges = self._ranges()
        self.pairs = max((self.pairs_of(*chunks) for chunks in self.ranges), default=0)  # of the longest range
        self.prepare, self.walk = cache(self._prepare), cache(self._walk)
        self.walk_back, self.gather = cache(self._walk_back), cache(self._gather)

    def _ranges(self) -> list[tuple[int, int]]:
        """Return the ranges of chunks that the backward takes one after another, last one first."""
        if self.chunks == 0:
            return []
        if self.varlen or self.segments > 1:
            return [(0, self.most)]
        step = max(MIN_RANGE, -(-self.most // BACKWARD_RANGES))
        return [(low, min(low + step, self.most)) for low in range(0, self.most, step)][::-1]

    def pairs_of(self, low: int, high: int) -> int:
        """Return how many (sequence, chunk) pairs the chunks [low, high) of every sequence are (all of packed ones)."""
        return self.chunks if self.varlen else self.S * (high - low)

    def workspace(self, pairs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Allocate what `prepare` writes for this many (sequence, chunk) pairs: X_hi, X_lo, scales, G."""
        shape = pairs, self.HV, ROWS, ROWS
        high = low = torch.empty(shape, dtype=self.low, device=device)
        if self.terms == 2 and not self.exact:
            low = torch.empty(shape, dtype=self.low, device=device)
        scales = torch.empty((pairs, self.HV, 4, ROWS), dtype=torch.float32, device=device)
        if not self.gate:
            return high, low, scales, scales  # G is not read
        return high, low, scales, torch.empty((pairs, self.HV, 2, ROWS), dtype=torch.float32, device=device)

    def preparing(self, low: int, high: int) -> tuple[int, ...]:
        """Return the numbers that `prepare` takes for the chunks [low, high)."""
        return self.T, low, high - low, *self.sizes(self.V)[:3]

    def sizes(self, V: int) -> tuple[int, ...]:
        """Return the last numbers that walks and `gather` take, for V value columns."""
        return () if self.hopper else (self.HK, self.HV, self.K, V)

    def grid(self, V: int) -> tuple[int, int]:
        """Return the grid of a walk over V value columns."""
        return -(-V // self.columns), self.S * self.HV

    def _constants(self, V: int) -> dict[str, int]:
        return {"HK": self.HK, "HV": self.HV, "K": self.K, "V": V}

    def _even(self, columns: int) -> bool:
        """Return whether no tile of so many value columns needs a mask."""
        return self.whole and (self.hopper or (self.BK == self.K and self.V % columns == 0))

    def _prepare(self, backward: bool) -> Launch:
        options = self.common | {"BACKWARD": backward, "TERMS": self.terms}
        if self.hopper:
            sizes = self._constants(self.V)
            del sizes["V"]
            return bind(triton_hopper_prepare.prepare, **sizes, **options, EVEN=self.whole, num_warps=4)
        registers = {} if self.exact else {"maxnreg": 168}  # three programs per multiprocessor
        warps = 8 if self.exact else 4
        return bind(triton_forward.prepare, **options, num_warps=warps, num_stages=1, **registers)

    def _walk(self, save: bool, values: bool, output: bool, V: int) -> Launch:
        """V: value columns of the state; whether to save for the backward, to take values, to write the output."""
        flags = {"SAVE": save, "VALUES": values, "OUTPUT": output}
        return bind(hopper_walk.walk if self.hopper else triton_forward.walk, **self._walking(V), **flags)

    def _walk_back(self, output: bool) -> Launch:
        kernel = hopper_walk.walk_back if self.hopper else triton_backward.walk_back
        return bind(kernel, **self._walking(self.V), OUTPUT=output)

    def _walking(self, V: int) -> dict[str, int]:
        """Return the options of the two walks over V value columns."""
        options = self.common | {"BQ": self.BQ, "EVEN": self._even(self.columns), "TERMS": self.terms}
        if self.hopper:
            return options | self._constants(V) | {"num_warps": 4}
        return options | {"BV": self.columns} | walk_schedule(self.BK, self.columns, self.exact)

    def _gather(self) -> Launch:
        if self.hopper:
            registers = {} if self.gate else {"maxnreg": 128}  # two programs per multiprocessor
            options = self.common | self._constants(self.V) | registers
            return bind(triton_hopper_gather.gather, **options, EVEN=self.whole, num_warps=8)
        wide = 64 if self.BK <= 128 and not self.exact else 32 if self.BK <= 128 else 16
        wide = max(16, min(wide, triton.next_power_of_2(self.V)))
        even = self._even(self.columns) and self.V % wide == 0
        warps = 4 if self.BK <= 128 and not self.exact else 8
        options = self.common | {"EVEN": even, "BQ": self.BQ, "BV": wide}
        return bind(triton_backward.gather, **options, num_warps=warps, STAGES=1)


_plan = lru_cache(maxsize=64)(Plan)


def segments(pairs: int, T: int, C: int) -> int:
    """Return into how many segments to cut sequences of T tokens, given the number of (sequence, head) pairs."""
    count = 1
    while pairs * count < FULL_GPU and T % (2 * count * C) == 0 and T // (2 * count * C) >= MIN_SEGMENT:
        count *= 2
    return count if count >= MIN_SEGMENTS else 1


def serves(K: int, V: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the kernels for Hopper GPUs are made for these widths, this type and this GPU."""
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return K in (64, 128) and V % 64 == 0


def walk_columns(V: int, BK: int, exact: bool) -> int:
    """Return how many value columns of the state one program walks with."""
    if exact:
        return 32 if BK == 256 else 64
    return 128 if BK == 128 and V > 64 else 64


def walk_schedule(BK: int, BV: int, exact: bool) -> dict[str, int]:
    """Return warps and pipeline depth of the two walks."""
    if exact:
        return {"num_warps": 8 if BK > 64 else 4, "STAGES": 1}
    return {"num_warps": 8 if BK == 256 or BV == 128 else 4, "STAGES": 1 if BK == 256 else 2}
