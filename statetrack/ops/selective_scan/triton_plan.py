"""The selective scan on a GPU: sizes, schedules and launches that depend on nothing but shapes and types."""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
from torch import Tensor

from statetrack.ops.layout import chunk_tables
from statetrack.ops.selective_scan import triton_backward, triton_forward
from statetrack.ops.triton_launch import Launch, bind


@dataclass(frozen=True)
class Schedule:
    """How many tokens, channels and states a thread takes (see triton_forward.py), and the warps of a program.

    A thread takes more states where a warp would not hold them. REGS limits a thread's
    registers, so that more threads fit; 0 does not. SUB, of the backward alone: how many times TOK tokens lie between
    kept states.
    """

    TOK: int
    CH: int
    K: int
    WARPS: int
    REGS: int = 0
    SUB: int = 1

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.TOK * self.SUB

    def threads(self, M: int) -> dict[str, int]:
        """Return the kernels' parameters for M states."""
        every = triton.next_power_of_2(M)
        K = min(every, max(self.K, every // 32))
        return {"TOK": self.TOK, "CH": self.CH, "K": K, "G": every // K, "N": 32 * self.WARPS}

    def memory(self, S: int, D: int, M: int) -> list[tuple[int, ...]]:
        """Return the shapes of the backward's d_skip, scratch and sums, for S sequences."""
        threads = self.threads(M)
        G, values, programs = threads["G"], self.CH * threads["K"], S * self.blocks(D, M)
        owners = G // max(1, G // self.TOK)
        width = 2 * G * threads["K"]
        return [
            (S, owners, D),
            (programs, self.SUB, values, threads["N"]),
            (programs, self.WARPS, self.tile, width),
        ]

    def blocks(self, D: int, M: int) -> int:
        """Programs that D channels take."""
        return -(-D // (32 * self.WARPS // self.threads(M)["G"] * self.CH))


FORWARD = [Schedule(8, 2, 4, 4), Schedule(8, 1, 2, 4)]  # many channels, few
BACKWARD = [Schedule(4, 1, 4, 16, 128, 8), Schedule(8, 1, 2, 4, 168, 4)]  # a tile is a multiple of the forward's TOK
FULL_GPU = 2000  # warps that keep a GPU busy
MIN_SEGMENT = 1024  # tokens
PACKED = 4096  # values that one program of `pack` or `unpack` takes


class Plan:
    """The sizes and schedules that all launches of one call share; `whole`: the largest eigenvalue is 1.

    back: the call is the backward, which cuts sequences into segments of its own.
    """

    def __init__(
        self,
        u: tuple[int, ...],
        M: int,
        packed: tuple[int, ...],
        whole: bool,
        device: torch.device,
        back: bool = False,
    ):
        (B, T, self.D), self.M = u, M
        self.varlen, self.packed, self.whole = len(packed) > 0, packed, whole
        self.S, self.T, self.device, self.rows = len(packed) if self.varlen else B, T, device, B * T
        for size in range(len(FORWARD)):
            self.size, self.forward, self.backward = size, FORWARD[size], BACKWARD[size]
            count, cut = (self._segments(schedule, T) for schedule in (self.forward, self.backward))
            if count * self._warps(self.forward) >= FULL_GPU:
                break
        self.segments = cut if back else count
        self.every = self.backward.tile // self.forward.tile
        self.starts = self.bases = None  # packed sequences' offsets, and each one's first slot
        if self.varlen:
            self.starts, _, self.bases = chunk_tables(packed, self.backward.tile, device)
        else:
            self.S, self.T = B * self.segments, T // self.segments
        self.state = self.S, self.D, self.M
        self.blocks = self._blocks(self.backward)
        self.walk, self.walk_back, self.packing = cache(self._walk), cache(self._walk_back), cache(self._packing)

    def _blocks(self, schedule: Schedule) -> int:
        return schedule.blocks(self.D, self.M)

    def _warps(self, schedule: Schedule) -> int:
        return self._blocks(schedule) * self.S * schedule.WARPS

    def _segments(self, schedule: Schedule, T: int) -> int:
        return 1 if self.varlen else segments(self._warps(schedule), T, self.backward.tile)

    def grid(self, schedule: Schedule) -> tuple[int]:
        """Return the grid of a walk."""
        return (self.S * self._blocks(schedule),)

    def slots(self) -> int:
        """Return how many (sequence, tile of the backward) pairs there are."""
        lengths = self.packed or [self.T] * self.S
        return sum(-(-length // self.backward.tile) for length in lengths)

    def _options(self, schedule: Schedule) -> dict:
        """Return the compile-time choices of a walk."""
        threads = schedule.threads(self.M)
        channels = threads["N"] // threads["G"] * schedule.CH
        full = not self.varlen and self.T % schedule.tile == 0 and self.D % channels == 0
        limit = {"maxnreg": schedule.REGS} if schedule.REGS else {}
        rest = {"WHOLE": self.whole, "FULL": full, "VARLEN": self.varlen, "num_warps": schedule.WARPS}
        return {"D": self.D, "M": self.M} | threads | limit | rest

    def _walk(self, save: bool, output: bool) -> Launch:
        return bind(triton_forward.forward, **self._options(self.forward), SAVE=save, OUTPUT=output)

    def _walk_back(self, output: bool) -> Launch:
        if not output:
            return bind(triton_backward.adjoint, **self._options(self.backward))
        return bind(triton_backward.backward, **self._options(self.backward), SUB=self.backward.SUB)

    def _packing(self, schedule: Schedule, back: bool) -> tuple[tuple[int], Launch, int]:
        """Return grid and launch of `pack` (`unpack`), and how many numbers it makes of a token."""
        threads = schedule.threads(self.M)
        width = 2 * threads["G"] * threads["K"]
        BT = max(1, PACKED // width)
        kernel = triton_backward.unpack if back else triton_forward.pack
        return (-(-self.rows // BT),), bind(kernel, G=threads["G"], K=threads["K"], BT=BT), width

    def pack(self, schedule: Schedule, B: Tensor, C: Tensor) -> Tensor:
        """Return B and C as the walks of this schedule read them."""
        grid, launch, width = self.packing(schedule, False)
        out = torch.empty((self.rows, width), dtype=torch.float32, device=self.device)
        launch(grid, (B, C, out), (self.rows, self.M))
        return out

    def unpack(self, parts: Tensor, dB: Tensor, dC: Tensor) -> None:
        """Sum the blocks' parts into dB and dC."""
        grid, launch, width = self.packing(self.backward, True)
        launch(grid, (parts, dB, dC), (self.rows, self.M, self.blocks, self.rows * width))


_plan = lru_cache(maxsize=64)(Plan)


def plan_of(u: Tensor, A: Tensor, packed: list[int], hi: float, back: bool = False) -> Plan:
    """Return what all launches of one call share: the same plan for the same shapes."""
    return _plan(u.shape, A.shape[1], tuple(packed), hi == 1, u.device, back)


def segments(warps: int, T: int, tile: int) -> int:
    """Return into how many segments to cut sequences of T tokens, given how many warps would walk whole ones."""
    count = 1
    while warps * count < FULL_GPU and T % (2 * count * tile) == 0 and T // (2 * count) >= MIN_SEGMENT:
        count *= 2
    return count
