"""The compiled network: stages of `delta_rule` (or `dplr`) with table look-ups between them, run on batches of tokens.

A stage looks up, for the letter and what the layers below knew before it, the factors of every head; runs the op, which
is a parallel scan over the tokens; and decodes what the heads read. Nothing in it is approximate: keys are small
integers or halves, so that states stay in {0, 1} to the last bit.

Letters: B batch, T tokens, R rows (one per head and reading), F factors per token, K key dim, V value dim, E events, Q
states of the automaton.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from statetrack.automata import Automaton
from statetrack.compiler.assembly import Stage, groups, rows_of
from statetrack.compiler.operations import Merge, Style
from statetrack.compiler.segments import Units
from statetrack.errors import UsageError
from statetrack.ops import delta_rule, dplr

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
PIECE = 1 << 24  # numbers in the keys of one call of an op
LOOP, SMALL = 128, 100
"""On a CPU a loop over tokens is faster than chunks for so many sequences side by side and so small a memory of each"""


class StageState(NamedTuple):
    """What a stage carries from token to token."""

    memory: Float[Tensor, "B R K V"]
    below: Int[Tensor, "B"] | Bool[Tensor, "B Q"]
    """what the layers below knew after the last token"""


class StageLayer(nn.Module):
    """One stage as tensors."""

    letters: Tensor
    keys: Tensor
    values: Tensor
    beta: Tensor
    log_decay: Tensor
    query: Tensor
    first: Tensor
    units: Units

    def __init__(self, stage: Stage, style: Style):
        super().__init__()
        self.kind, self.gated, self.asymmetric = stage.kind, style.gated, False
        rows = rows_of(stage)
        made = [[style.factors(head, op) for op in head.operations] for head, _ in rows]
        F = stage.factors(style)
        K = max(head.width * style.copies(head) for head, _ in rows)
        E = max(len(ops) for ops in made)
        R = len(rows)
        keys, values, beta = torch.zeros(E, F, R, K), torch.zeros(E, F, R), torch.zeros(E, F, R)
        keys[..., 0] = 1  # beta = 0 is a no-op too, and a key of length 0 would take the op longer
        V = max(len(head.start) for head in stage.heads)
        log_decay, query, first = torch.zeros(E, R), torch.zeros(R, K), torch.zeros(R, K, V)
        for r, (head, weights) in enumerate(rows):
            n = style.copies(head)
            query[r, : n * head.width : n] = torch.tensor(weights, dtype=torch.float32)
            for column, ones in enumerate(head.start):
                for i in ones:
                    first[r, n * i : n * i + n, column] = 1
            log_decay[[e for e, op in enumerate(head.operations) if style.resets(head, op)], r] = -torch.inf
            _place(made[r], keys[:, :, r], values[:, :, r], beta[:, :, r])
        self.resets = bool(torch.isinf(log_decay).any())
        letters = torch.tensor([head.letters for head, _ in rows])
        self._store(letters, stage, keys=keys, values=values, beta=beta, log_decay=log_decay, query=query, first=first)
        self.units = Units(K, [(head.width, style.copies(head)) for head, _ in rows])

    def _store(self, letters: Tensor, stage: Stage, **tensors: Tensor) -> None:
        self.register_buffer("letters", letters)  # [R codes letters] -> operation
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        for i, table in enumerate(stage.decoder):
            self.register_buffer(f"decoder_{i}", torch.from_numpy(table))
        self.decoders, self.start = len(stage.decoder), stage.start

    @property
    def tokens_at_once(self) -> int:
        """How many tokens of one sequence the op takes in one call."""
        _, F, R, K = self.keys.shape
        return max(1, PIECE // (R * max(F * K, self.units.number)))

    def init_state(self, batch: int, below: int) -> StageState:
        """Return the state before the first letter; `below` is what the layers below know there."""
        memory = self.first.float().expand(batch, *self.first.shape).contiguous()
        return StageState(memory, self.letters.new_full((batch,), below))

    def forward(
        self, x: Int[Tensor, "B T"], known: Int[Tensor, "B T"], state: StageState, backend: str
    ) -> tuple[Int[Tensor, "B T"], StageState]:
        """Return what is known after every token, given what the layers below know after it."""
        if x.shape[1] == 0:
            return known, state
        before = torch.cat([state.below[:, None], known[:, :-1]], dim=1)
        memory, read = state.memory, []
        step = max(1, self.tokens_at_once // x.shape[0])
        for start in range(0, x.shape[1], step):
            part = slice(start, start + step)
            events = self.letters[:, before[:, part], x[:, part]].movedim(0, -1)  # [B T R]
            o, memory = self.units.scan_segments(partial(self.scan, backend=backend), events, memory)
            read.append(o)
        return self.decode(known, torch.cat(read, dim=1)), StageState(memory, known[:, -1].clone())

    def scan(
        self, events: Int[Tensor, "B T R"], memory: Float[Tensor, "B R K V"], backend: str
    ) -> tuple[Float[Tensor, "B T R V"], Float[Tensor, "B R K V"]]:
        """Run every head's operations; return what it reads after each, and the new memory."""
        B, T, R = events.shape
        if R == 1:
            events = events[..., 0]
            k, v, beta, decay = (t[events] for t in (self.keys, self.values, self.beta, self.log_decay))
        else:
            row = torch.arange(R, device=events.device)
            k, v, beta = (t[events, :, row].movedim(2, 3) for t in (self.keys, self.values, self.beta))
            decay = self.log_decay[events, row]
        q = self.query.expand(B, T, *self.query.shape)
        v = v[..., None].expand(*v.shape, memory.shape[-1])
        loop = backend == "auto" and B >= LOOP and memory[0, 0].numel() <= SMALL and not memory.is_cuda
        options = {"scale": 1.0, "initial_state": memory, "backend": "reference" if loop else backend}
        return delta_rule(q, k, v, beta, decay if self.resets else None, **options)

    def decode(self, known: Int[Tensor, "B T"], o: Float[Tensor, "B T R V"]) -> Int[Tensor, "B T"]:
        """Look up the readings, one after the other."""
        code = known
        for table, reading in zip(self.tables(), o.flatten(2).round().long().unbind(-1), strict=False):
            code = table[code, reading.clamp(0, table.shape[1] - 1)]
        return code

    def tables(self) -> list[Tensor]:
        """Return the chain of tables that decodes the readings."""
        return [getattr(self, f"decoder_{i}") for i in range(self.decoders)]


def _place(
    made: list[list[tuple[dict[int, float], float, float]]],
    keys: Float[Tensor, "E F K"],
    values: Float[Tensor, "E F"],
    beta: Float[Tensor, "E F"],
) -> None:
    """Write the factors of one head's operations: key entries, value, beta of each."""
    places = [(e, f) for e, factors in enumerate(made) for f in range(len(factors))]
    if not places:
        return
    flat = [factor for factors in made for factor in factors]
    e, f = torch.tensor(places).T
    keys[e, f, 0] = 0
    values[e, f] = torch.tensor([value for _, value, _ in flat])
    beta[e, f] = torch.tensor([step for _, _, step in flat])
    entries = [(j, i) for j, (key, _, _) in enumerate(flat) for i in key]
    j, i = torch.tensor(entries).T
    keys[e[j], f[j], i] = torch.tensor([entry for key, _, _ in flat for entry in key.values()])


class MapLayer(StageLayer):
    """The stage of the dplr structure: factors I + b a^T, one micro-step each."""

    a: Tensor
    b: Tensor

    def __init__(self, stage: Stage):
        nn.Module.__init__(self)
        self.kind, self.gated, self.asymmetric = stage.kind, False, True
        (head,) = stage.heads
        F, K, rows = stage.factors(), head.width, groups(head)
        E = len(stage.asymmetric)
        a, b = torch.zeros(E, F, len(rows), K), torch.zeros(E, F, len(rows), K)
        for e, factors in enumerate(stage.asymmetric):
            for f, factor in enumerate(factors):
                a[e, f, :, factor.q], b[e, f, :, factor.q], b[e, f, :, factor.r] = 1, -1, 1
                if not isinstance(factor, Merge):
                    a[e, f, :, factor.r] = -1
        first = torch.zeros(len(rows), K, 1)
        first[:, list(head.start[0])] = 1
        query = torch.tensor(rows, dtype=torch.float32)
        self._store(torch.tensor([head.letters] * len(rows)), stage, keys=a, b=b, query=query, first=first)
        self.units = Units(K, [(K, 1)] * len(rows))

    def scan(
        self, events: Int[Tensor, "B T R"], memory: Float[Tensor, "B R K V"], backend: str
    ) -> tuple[Float[Tensor, "B T R V"], Float[Tensor, "B R K V"]]:
        """Run every letter's factors as micro-steps; read after the last."""
        B, T, R = events.shape
        a, b = (t[events[..., 0]].flatten(1, 2) for t in (self.keys, self.b))  # [B T*F R K]
        F = a.shape[1] // T
        q = a.new_zeros(B, T, F, R, a.shape[-1])
        q[:, :, -1] = self.query
        v = a.new_zeros(B, T * F, R, memory.shape[-1])
        options = {"scale": 1.0, "initial_state": memory, "backend": backend}
        o, memory = dplr(q.flatten(1, 2), torch.zeros_like(a), v, a, b, **options)
        return o.unflatten(1, (T, F))[:, :, -1], memory


class State(NamedTuple):
    """What a compiled automaton carries from token to token."""

    stages: tuple[StageState, ...]
    window: Int[Tensor, "B W_minus_1"]
    """the last letters, newest last; -1 where there was none yet"""
    known: Int[Tensor, "B"] | Bool[Tensor, "B Q"]
    """what the whole network knows after the last token"""


class Network(nn.Module):
    """Stages on top of each other: from letters to the state of an automaton after every one."""

    classes: Tensor
    states_of: Tensor
    emits: Tensor

    def __init__(
        self,
        automaton: Automaton,
        classes: Int[np.ndarray, "L"],
        stages: list[Stage],
        states: Int[np.ndarray, "codes"],
        window: Stage | None,
        style: Style,
    ):
        super().__init__()
        made = [MapLayer(stage) if stage.asymmetric else StageLayer(stage, style) for stage in stages]
        self.layers = nn.ModuleList(made)
        self.register_buffer("classes", torch.from_numpy(np.array(classes)))
        self.register_buffer("states_of", torch.from_numpy(states))
        self.register_buffer("emits", torch.from_numpy(np.array(automaton.emits)))
        self.window = 0
        self.first = 0
        if window is not None:
            self.window, self.first = len(window.decoder), window.start
            for i, table in enumerate(window.decoder):
                self.register_buffer(f"window_{i}", torch.from_numpy(table))

    def init_state(self, batch: int) -> State:
        """Return the state before the first token."""
        known, stages = self.first, []
        for layer in self.layers:
            assert isinstance(layer, StageLayer)
            stages.append(layer.init_state(batch, known))
            known = layer.start
        window = self.classes.new_full((batch, self.window), -1)
        return State(tuple(stages), window, self.classes.new_full((batch,), known))

    def follow(self, tokens: Int[Tensor, "B T"], state: State | None, backend: str) -> tuple[Int[Tensor, "B T"], State]:
        """Return the automaton's state after every token, and the state to go on from."""
        if tokens.ndim != 2 or tokens.dtype not in INTEGERS:
            raise UsageError(f"tokens must be integers [batch, length], got {tokens.dtype} {list(tokens.shape)}")
        tokens = tokens.long()
        state = self.init_state(tokens.shape[0]) if state is None else state
        if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < len(self.classes)):
            raise UsageError(
                f"tokens must be letters 0..{len(self.classes) - 1}, got {int(tokens.min())}..{int(tokens.max())}"
            )
        x = self.classes[tokens]
        known, window = self._seen(x, state.window)
        stages = []
        for layer, before in zip(self.layers, state.stages, strict=True):
            known, after = layer(x, known, before, backend)
            stages.append(after)
        last = known[:, -1] if tokens.shape[1] else state.known
        return self._states(known), State(tuple(stages), window, last)

    def _states(self, known: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """Return the automaton's state that this knowledge tells."""
        return self.states_of[known]

    def _seen(self, x: Int[Tensor, "B T"], window: Tensor) -> tuple[Int[Tensor, "B T"], Tensor]:
        """Return what the window alone tells after every token, and the window's new letters."""
        if not self.window:
            return torch.zeros_like(x), window
        padded = torch.cat([window, x], dim=1)
        code = torch.zeros_like(x)
        for i, table in enumerate(self.window_tables()):
            code = table[code, padded[:, self.window - i : padded.shape[1] - i] + 1]
        return code, padded[:, padded.shape[1] - self.window :]

    def window_tables(self) -> list[Tensor]:
        """Return the chain of tables that decodes the window, newest letter first."""
        return [getattr(self, f"window_{i}") for i in range(self.window)]
