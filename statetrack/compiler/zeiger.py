"""Zeiger's chain: any automaton of n states in n - 1 layers, without a search and without tables.

Every layer remembers a state that the automaton is *not* in. What layers 1..j know is the set P_j of the n - j states
that are left; the last leaves only the automaton's own (Zeiger; Ginzburg, Algebraic Theory of Automata, 1968, ch. 3):

    P_0 = all states,   P_j = P_{j-1} minus the label of layer j

On a letter x let P be P_{j-1} before and P' after it. By induction x(P) lies in P', and |P| = |P'|.
- If x maps P onto P', it does so one to one, and the label moves with it: y -> x(y), a permutation of coordinates.
- Otherwise the label is reset to the first state of P' outside x(P), whatever it was.
Either way the automaton's state q in P, q != y, goes to x(q) in P', which is not the new label: x(P_j) lies in the new
P_j.

The sets are vectors of n bits per token, images are computed from them, and the factors of the distinct events
(P, P', x) of a batch are made when they occur.

Letters: B batch, T tokens, Q states, E distinct events, F factors per token, S swaps, R rows (one per
reading), K key dim.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from statetrack.compiler.assembly import READING, groups
from statetrack.compiler.certificate import Comparison, are_moves
from statetrack.compiler.compiled import Blueprint, CompiledAutomaton
from statetrack.compiler.discrete import Search
from statetrack.compiler.network import PIECE, StageState, State
from statetrack.compiler.operations import UNITS, Head
from statetrack.compiler.segments import Units
from statetrack.ops import delta_rule

WORD = 62  # bits of a set in one integer
CUT_ON = ("cuda",)
"""Where one text is cut into segments. On a CPU a factor takes as long for one text as for one of many, and cut texts
take twice the time (docs/LOG.md)."""
ARGUMENT = "Zeiger's chain:      right by induction over layers and letters (zeiger.py), if every factor is exact"


class ChainLayer(nn.Module):
    """One layer: a one-hot label among the states that are possible below."""

    moves: Tensor
    query: Tensor
    first: Tensor

    def __init__(self, table: Int[np.ndarray, "Q L"], label: int, structure: str, keys: str, units: Units):
        super().__init__()
        self.gated, self.copies, self.unit = structure == "gated", 1 + (keys == "unit"), UNITS[keys]
        states = len(table)
        weights = torch.tensor(groups(Head(states, (), [])), dtype=torch.float32)
        self.register_buffer("moves", torch.from_numpy(np.array(table)))
        self.register_buffer("query", torch.zeros(len(weights), self.copies * states))
        self.query[:, :: self.copies] = weights
        self.register_buffer("first", torch.zeros(self.copies * states))
        self.first[self.copies * label : self.copies * (label + 1)] = 1
        self.units = units

    def init_state(self, batch: int, below: Bool[Tensor, "Q"]) -> StageState:
        """Return the state before the first letter."""
        memory = self.first.float()[None, None, :, None].expand(batch, len(self.query), -1, 1).contiguous()
        return StageState(memory, below.expand(batch, -1))

    def forward(
        self, x: Int[Tensor, "B T"], known: Bool[Tensor, "B T Q"], state: StageState, backend: str
    ) -> tuple[Bool[Tensor, "B T Q"], StageState]:
        """Return the states that are left after every token, given those that the layers below leave."""
        if x.shape[1] == 0:
            return known, state
        before = torch.cat([state.below[:, None], known[:, :-1]], dim=1)
        memory, read = state.memory, []
        step = max(1, PIECE // (len(self.moves) * self.query.numel() * x.shape[0]))
        for start in range(0, x.shape[1], step):
            part = slice(start, start + step)
            events, factors = self.events(before[:, part], known[:, part], x[:, part])
            scan = partial(self.scan, factors=factors, backend=backend)
            cut = memory.device.type in CUT_ON
            o, memory = self.units.scan_segments(scan, events, memory) if cut else scan(events, memory)
            read.append(o)
        label = self.label(torch.cat(read, dim=1))
        return known.scatter(2, label[..., None], False), StageState(memory, known[:, -1].clone())

    def events(
        self, before: Bool[Tensor, "B T Q"], after: Bool[Tensor, "B T Q"], x: Int[Tensor, "B T"]
    ) -> tuple[Int[Tensor, "B T"], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Number the distinct events; return every token's number, and the events' factors."""
        words = torch.cat([packed(before), packed(after), x[..., None]], dim=-1).flatten(0, 1)
        _, number = torch.unique(words, dim=0, return_inverse=True)
        example = torch.empty(int(number.max()) + 1, dtype=torch.long, device=x.device)
        example[number] = torch.arange(len(number), device=x.device)
        P, onto = before.flatten(0, 1)[example], after.flatten(0, 1)[example]
        to = self.moves.T[x.flatten()[example]]
        return number.view(x.shape), self.factors(*operations(P.cpu(), onto.cpu(), to.cpu()))

    def factors(
        self, swaps: Int[Tensor, "E S 2"], clears: Bool[Tensor, "E Q"], write: Int[Tensor, "E"]
    ) -> tuple[Float[Tensor, "E F K"], Float[Tensor, "E F"], Float[Tensor, "E F"], Float[Tensor, "E"]]:
        """Return keys, values, betas and log decays of operations: swaps, or clears of which one writes."""
        n, resets = self.copies, write >= 0
        log_decay = torch.zeros(len(write))
        if self.gated:
            log_decay[resets] = -torch.inf
            clears = torch.zeros_like(clears)
            clears[resets, write[resets]] = True
        e, c = clears.nonzero().T
        place = (clears.long().cumsum(1) - 1)[e, c]
        F = max(1, swaps.shape[1], n * int(clears.sum(1).max()))
        keys, values, beta = torch.zeros(len(write), F, self.query.shape[1]), *torch.zeros(2, len(write), F)
        at, f = (swaps[..., 0] >= 0).nonzero().T
        a, b = swaps[at, f].T
        beta[at, f] = 2
        for i in range(n):
            keys[at, f, n * a + i], keys[at, f, n * b + i] = self.unit, -self.unit
            keys[e, n * place + i, n * c + i] = 1
            beta[e, n * place + i] = 1
            values[e, n * place + i] = (c == write[e]).float()
        kind = {"dtype": self.query.dtype, "device": self.query.device}
        return keys.to(**kind), values.to(**kind), beta.to(**kind), log_decay.to(**kind)

    def scan(
        self,
        events: Int[Tensor, "B T"],
        memory: Float[Tensor, "B R K V"],
        factors: tuple[Tensor, Tensor, Tensor, Tensor],
        backend: str,
    ) -> tuple[Float[Tensor, "B T R V"], Float[Tensor, "B R K V"]]:
        """Run the events' factors; return what is read after each token, and the new memory."""
        (B, T), (R, V) = events.shape, (memory.shape[1], memory.shape[3])
        k, v, beta, decay = (t[events] for t in factors)
        k = k[:, :, :, None].expand(*k.shape[:3], R, -1)
        v = v[:, :, :, None, None].expand(*v.shape, R, V)
        beta = beta[..., None].expand(*beta.shape, R)
        q = self.query.expand(B, T, *self.query.shape)
        options = {"scale": 1.0, "initial_state": memory, "backend": backend}
        return delta_rule(q, k, v, beta, decay[..., None].expand(B, T, R) if self.gated else None, **options)

    def label(self, o: Float[Tensor, "B T R V"]) -> Int[Tensor, "B T"]:
        """Return which coordinate is 1: row r reads 1, 2, ... where it is one of its own, else 0."""
        read = o[..., 0].round().long()
        offset = torch.arange(read.shape[-1], device=o.device) * (READING - 1)
        return (torch.where(read > 0, read + offset, 0).sum(-1) - 1).clamp(0, len(self.moves) - 1)


def packed(sets: Bool[Tensor, "B T Q"]) -> Int[Tensor, "B T words"]:
    """Return the same sets as integers of WORD bits."""
    parts = sets.split(WORD, dim=-1)
    return torch.stack(
        [(part.long() << torch.arange(part.shape[-1], device=part.device)).sum(-1) for part in parts], -1
    )


def operations(
    before: Bool[Tensor, "E Q"], after: Bool[Tensor, "E Q"], to: Int[Tensor, "E Q"]
) -> tuple[Int[Tensor, "E F 2"], Bool[Tensor, "E Q"], Int[Tensor, "E"]]:
    """Return what the events P -> P' under maps `to` do to the label: swaps in order (-1: none), or, for a reset, the
    coordinates to clear and the one to write (-1: no reset).
    """
    E, Q = before.shape
    image = torch.zeros_like(before)
    e, q = before.nonzero().T
    image[e, to[e, q]] = True
    left = after & ~image
    resets = left.any(1)
    write = torch.where(resets, left.long().argmax(1), -1)
    clears = (before | left & (torch.arange(Q) == write[:, None])) & resets[:, None]
    return permutation_swaps(close_paths(before & ~resets[:, None], to)), clears, write


def close_paths(domain: Bool[Tensor, "E Q"], to: Int[Tensor, "E Q"]) -> Int[Tensor, "E Q"]:
    """Extend maps, one to one on their domains, to permutations: where a path ends it goes back to its beginning."""
    E, Q = domain.shape
    here = torch.arange(Q).expand(E, Q)
    origin = here.clone()  # of a coordinate: where it comes from; itself where nothing comes
    e, q = domain.nonzero().T
    origin[e, to[e, q]] = q
    hit = torch.zeros_like(domain)
    hit[e, to[e, q]] = True
    begin = origin
    for _ in range(max(1, (Q - 1).bit_length())):  # a path has at most Q - 1 steps
        begin = begin.gather(1, begin)
    return torch.where(domain, to, torch.where(hit, begin, here))


def permutation_swaps(permutation: Int[Tensor, "E Q"]) -> Int[Tensor, "E F 2"]:
    """Return swaps which, applied in order, do the permutations: Q - #cycles each, -1 beyond them."""
    left, here, rows = permutation.clone(), torch.arange(permutation.shape[1]), torch.arange(len(permutation))
    swaps = []
    while (moved := left != here).any():
        a = moved.long().argmax(1)
        b = left[rows, a]
        swaps.append(torch.where(moved.any(1)[:, None], torch.stack([a, b], 1), -1))
        left[rows, a] = left[rows, b]
        left[rows, b] = b
    return torch.stack(swaps, 1) if swaps else permutation.new_zeros(len(permutation), 0, 2)


class Chain(CompiledAutomaton):
    """An automaton as Zeiger's chain. What it knows is a set of states, as bits: [B Q]."""

    def __init__(self, blueprint: Blueprint):
        super().__init__(blueprint)
        table, states = self.merged.table, self.merged.states
        others = [q for q in range(states) if q != self.merged.start]
        copies = 1 + (blueprint.keys == "unit")
        units = Units(copies * states, [(states, copies)] * len(groups(Head(states, (), []))))
        made = [ChainLayer(table, label, blueprint.structure, blueprint.keys, units) for label in others]
        self.layers = nn.ModuleList(made)

    @property
    def depth(self) -> int:
        """The number of recurrent layers."""
        return self.merged.states - 1

    @property
    def factors(self) -> tuple[int, ...]:
        """The most factors per token, layer by layer: a bound, what an event needs is known when it occurs."""
        table, n = self.merged.table, 1 + (self.style.keys == "unit")
        ranks = [len(set(column)) for column in table.T.tolist()]
        moved = (table != np.arange(len(table))[:, None]).sum(0).tolist()
        bounds = []
        for left in range(self.merged.states, 1, -1):
            swaps = [min(left, count) for rank, count in zip(ranks, moved, strict=True) if rank >= left]
            clears = n if self.style.gated else n * min(left + 1, self.merged.states)
            bounds.append(max(1, clears if min(ranks) < self.merged.states or left < self.merged.states else 0, *swaps))
        return tuple(bounds)

    @property
    def widths(self) -> tuple[int, ...]:
        """The coordinates of the state, layer by layer."""
        return (self.merged.states,) * self.depth

    @property
    def kinds(self) -> str:
        """How the layers were found."""
        return "zeiger"

    def layer_lines(self) -> list[str]:
        """Return the report's lines about the layers."""
        most = max(self.factors, default=0)
        return [
            f"  layers      Zeiger's chain (no cascade of other kinds was found): heads of width {self.merged.states}; "
            f"at most {most} factor(s) a token; sets of states instead of tables"
        ]

    def init_state(self, batch: int) -> State:
        """Return the state before the first token."""
        known = torch.ones(self.merged.states, dtype=torch.bool, device=self.classes.device)
        stages = []
        for layer in self.layers:
            assert isinstance(layer, ChainLayer)
            stages.append(layer.init_state(batch, known))
            known = known & (layer.first[:: layer.copies] == 0)
        return State(tuple(stages), self.classes.new_zeros(batch, 0), known.expand(batch, -1))

    def _seen(self, x: Int[Tensor, "B T"], window: Tensor) -> tuple[Bool[Tensor, "B T Q"], Tensor]:
        """Return that all states are possible below the first layer."""
        return torch.ones(*x.shape, self.merged.states, dtype=torch.bool, device=x.device), window

    def _states(self, known: Bool[Tensor, "B T Q"]) -> Int[Tensor, "B T"]:
        """Return the one state that is left."""
        return known.long().argmax(-1)

    def search(self) -> Search:
        """Return that the induction above stands for the search, and what differs from the tables that it is about."""
        made = self.blueprint.build().state_dict()
        tensors = [(tensor.cpu(), made[name]) for name, tensor in self.state_dict().items()]
        differ = sum(int((tensor != right.to(tensor.dtype)).sum()) for tensor, right in tensors)
        return Search(0, differ, complete=True, argument=ARGUMENT)

    def compare(self, backend: str) -> Comparison:
        """Return how every factor compares; all layers have the same."""
        layer = self.layers[0] if self.depth else None
        assert isinstance(layer, ChainLayer | None)
        return compare_factors(layer, backend) if layer else Comparison(0, 0, 0, 0)


def compare_factors(layer: ChainLayer, backend: str) -> Comparison:
    """Run every swap, clear and write on all 0/1 values of the coordinates that it touches; a gated write on ones too.

    What is read is compared as well where at most one coordinate is 1, as in a label.
    """
    Q, n = len(layer.moves), layer.copies
    weights = torch.tensor(groups(Head(Q, (), [])), dtype=torch.float32)
    swaps, clears, write, values, want = _each_factor(Q, layer.gated)
    differ = others = number = 0
    for part in torch.arange(len(write)).split(max(1, PIECE // (8 * layer.query.numel()))):
        factors = layer.factors(swaps[part], clears[part], write[part])
        good = are_moves(*(t.float() for t in factors[:3]), copies=n)
        number, others = number + good.numel(), others + int((~good).sum())
        memory = values[part].repeat_interleave(n, dim=1)[:, None].expand(-1, len(weights), -1, -1)
        events = torch.arange(len(part), device=layer.query.device)[:, None]
        o, got = layer.scan(events, memory.contiguous().to(events.device), factors, backend)
        unequal = (got.cpu() != want[part].repeat_interleave(n, dim=1)[:, None]).any(2)
        misread = (o[:, 0].cpu() != weights @ want[part]) & (want[part].sum(1, keepdim=True) <= 1)
        differ += int((unequal | misread).any(1).sum())
    return Comparison(want[:, 0].numel(), differ, number, others)


def _each_factor(Q: int, gated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return operations of one factor each, as `operations` does: swaps, clears, writes; and vectors before and after.

    With a gate there are no clears, and writes clear all other coordinates.
    """
    a, b = torch.triu_indices(Q, Q, 1)
    S, C, one = len(a), 0 if gated else Q, torch.tensor([0.0, 1.0, 0.0, 1.0])
    E = S + C + Q
    swaps, clears, write = torch.full((E, 1, 2), -1), torch.zeros(E, Q, dtype=torch.bool), torch.full((E,), -1)
    swaps[:S, 0] = torch.stack([a, b], 1)
    coordinate = torch.cat([torch.arange(Q)[:C], torch.arange(Q)])
    clears[torch.arange(S, E), coordinate] = True
    write[S + C :] = torch.arange(Q)
    values = torch.zeros(E, Q, 4)
    values[torch.arange(S), a], values[torch.arange(S), b] = one, torch.tensor([0.0, 0.0, 1.0, 1.0])
    values[S + C :, :, 2:] = float(gated)
    values[torch.arange(S, E), coordinate] = one
    want = values.clone()
    want[torch.arange(S), a], want[torch.arange(S), b] = values[torch.arange(S), b], values[torch.arange(S), a]
    want[S:] = 0
    want[torch.arange(S + C, E), torch.arange(Q)] = 1
    return swaps, clears, write, values, want
