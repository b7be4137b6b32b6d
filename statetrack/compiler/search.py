"""The search for a cascade with few layers: iterative deepening, with a beam of the best knowledge at each depth.

Cheap kinds of layer first, which gives some plan within a second; then the wide kinds, blocks side by side, to find one
with fewer layers, whose superfluous blocks are then dropped. An upper bound: fewer layers may exist. Lower bounds are
in `statetrack.automata` (see docs/theory.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from statetrack.automata import Automaton
from statetrack.compiler.cascade import (
    Block,
    Knowledge,
    Layer,
    Limit,
    Register,
    TooLarge,
    View,
    extend,
    nothing_known,
    sink_of,
    view,
)
from statetrack.compiler.cuts import cut
from statetrack.compiler.kinds import can_end, peel, suffix, tiles, zeiger

CHEAP = ("peel", "EM", "TR", "zei")
CHEAP_STAGE = (*CHEAP, "suf")
WIDE = ("all", "all1", "all2", "all3")
MOST_LAYERS, MOST_KNOWN, LONGEST_SUFFIX, BEAM = 6, 6000, 8, 10
FEW = 10  # plans of one depth that are pruned and compared
QUICK_SECONDS, QUICK_STATES, MOST_QUICK_SECONDS = 0.7, 128, 10.0
"""Processor time of the cheap kinds, for automata of up to so many states, growing with their square up to the most;
what needs more falls back to Zeiger's chain."""
GROWTH = 0.9  # of the time; the rest is for pruning and assembly
PRUNING_SECONDS = 3.0  # of processor time, for one plan


@dataclass(frozen=True)
class Plan:
    """A complete cascade: layers, and the knowledge below the first, between them, and above the last."""

    seen: View
    window: Layer | None
    """what the first layer sees of earlier letters"""
    layers: tuple[Layer, ...]
    known: tuple[Knowledge, ...]
    latch: bool
    """one more layer of one bit remembers that the word is dead"""

    @property
    def depth(self) -> int:
        """The number of recurrent layers."""
        return len(self.layers) + self.latch

    @property
    def kinds(self) -> str:
        """The kinds of the layers."""
        return "+".join([layer.kind for layer in self.layers] + ["latch"] * self.latch)

    @property
    def size(self) -> int:
        """A rough width, before there are weights."""
        return sum(block.size for layer in self.layers for block in layer.blocks)


def find_plans(
    automaton: Automaton,
    window: int,
    timeout: float,
    deeper: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[list[Plan], bool]:
    """Return the best cascades found, shallowest first, and whether the time ran out.

    window: tokens that the first layer sees, 0 or 1 for the current one only. timeout: seconds for the wide kinds; 0
    leaves them out. deeper: also return plans with more layers than necessary. report: called with what is tried.
    """
    end = Limit(timeout)
    seconds = min(MOST_QUICK_SECONDS, QUICK_SECONDS * max(1.0, automaton.states / QUICK_STATES) ** 2)
    quick = Limit(max(seconds, timeout / 4), time.thread_time, end if timeout > seconds else None)
    search = _Search(automaton, window, [CHEAP_STAGE], quick, quick, report)
    plans = search.run(MOST_LAYERS, deeper)
    if timeout:
        most = min((plan.depth for plan in plans), default=MOST_LAYERS)
        growth = Limit(GROWTH * timeout, outer=end)
        search = _Search(automaton, window, [CHEAP_STAGE, ("cut",), WIDE], growth, end, report)
        plans += search.run(most, deeper)
    return sorted(plans, key=lambda plan: (plan.depth, plan.size)), search.late


class _Search:
    """One search: the partial cascades at every depth, with the sink taken out and with it kept."""

    def __init__(
        self,
        automaton: Automaton,
        window: int,
        stages: list[tuple[str, ...]],
        limit: Limit,
        end: Limit,
        report: Callable[[str], None],
    ):
        self.stages, self.report = stages, report
        self.limit, self.end = limit, end  # of growing, and of all, pruning included
        self.late = False
        self.twins: list[_Partial] = []
        """cuts that know no more than another cascade, but may take fewer factors: not built upon, only completed"""
        self.roots: list[_Partial] = []
        for without_sink in (True, False) if sink_of(automaton) is not None else (False,):
            seen = view(automaton, without_sink)
            known, register = nothing_known(seen), None
            try:
                if window > 1:
                    register = suffix(window - 1)
                    known = extend(seen, known, register, MOST_KNOWN, limit)
            except TooLarge:
                continue
            self.roots.append(_Partial(seen, register, (), (known,)))
        self.suffixes = tuple(
            f"suf{n}" for n in range(1, LONGEST_SUFFIX + 1) if automaton.alphabet**n <= MOST_KNOWN and window <= 1
        )

    def run(self, most: int, deeper: bool) -> list[Plan]:
        """Return complete plans of the smallest depth found (of all depths up to `most` if deeper)."""
        level = [[root] for root in self.roots]
        found = self._ended(0, level)
        for depth in range(1, most + 1):
            if self.late or (found and not deeper):
                break
            plans = self._ended(depth, [*level, self.twins])
            if not plans or deeper:
                grown: list[list[_Partial]] = [[] for _ in level]
                met = [{p.known[-1].fingerprint for p in partials} for partials in level]
                self.twins = []
                for stage in self.stages:
                    self._grow(stage, level, grown, met)
                plans += self._ended(depth, [*grown, self.twins])
                level = grown
            found += plans
        return found

    def _ended(self, depth: int, level: list[list[_Partial]]) -> list[Plan]:
        """Return the pruned plans of this depth that the partial cascades give."""
        plans = [plan for partials in level for p in partials for plan in self._complete(p) if plan.depth == depth]
        return [self._pruned(plan) for plan in sorted(plans, key=lambda plan: plan.size)[:FEW]]

    def _grow(self, stage, level, following, met) -> None:
        """Put one more layer, of each kind of the stage, on every partial cascade; keep the best."""
        kinds = [k for kind in stage for k in (self.suffixes if kind == "suf" else (kind,))]
        for partials, grown, seen_before in zip(level, following, met, strict=True):
            for partial in partials:
                for kind in kinds:
                    if self.limit.passed:
                        self.late = True
                        return
                    self.report(f"layer {len(partial.layers) + 1}: {kind}")
                    more = self._with(partial, kind)
                    if more is None:
                        continue
                    if more.known[-1].fingerprint in seen_before:
                        self.twins += [more] if kind == "cut" else []
                        continue
                    seen_before.add(more.known[-1].fingerprint)
                    grown.append(more)
            grown.sort(key=lambda p: (p.known[-1].width, p.known[-1].size))
            del grown[BEAM:]

    def _with(self, partial: _Partial, kind: str) -> _Partial | None:
        """Return the cascade with one more layer, or None where the kind does not apply or grows too large."""
        if kind[:3] in ("suf", "all") and kind != "all" and (partial.layers or partial.window):
            return None
        try:
            layer = make_layer(kind, partial.seen, partial.known[-1], self.limit)
            return None if layer is None else partial.with_layer(layer, self.limit)
        except TooLarge:
            return None

    def _complete(self, partial: _Partial) -> Iterator[Plan]:
        """Yield the plans that a cascade gives as it is, with a latch, or with a last layer whose zero means death."""
        seen, known = partial.seen, partial.known[-1]
        if not seen.dies:
            if known.width <= 1:
                yield partial.plan(latch=False)
            return
        try:
            layer = make_layer("inj", seen, known, self.end)
            last = None if layer is None else partial.with_layer(layer, self.end)
        except TooLarge:
            last = None
        if last is not None and last.known[-1].width <= 1:
            yield last.plan(latch=False)
        if known.width <= 1:
            yield partial.plan(latch=True)

    def _pruned(self, plan: Plan) -> Plan:
        """Drop blocks that the same depth does not need, the widest first, while there is time."""
        limit = Limit(PRUNING_SECONDS, time.thread_time, self.end)
        for i in range(len(plan.layers)):
            kept = 0
            while kept < len(plan.layers[i].blocks) > 1:
                if limit.passed:
                    self.late |= self.end.passed
                    return plan
                blocks = plan.layers[i].blocks
                order = sorted(range(len(blocks)), key=lambda b: -blocks[b].size)
                smaller = _rebuilt(plan, i, [block for b, block in enumerate(blocks) if b != order[kept]], limit)
                if smaller is None:
                    kept += 1
                else:
                    plan = smaller
        return plan


@dataclass(frozen=True)
class _Partial:
    seen: View
    window: Layer | None
    layers: tuple[Layer, ...]
    known: tuple[Knowledge, ...]

    def with_layer(self, layer: Layer, limit: Limit) -> _Partial:
        """Return the cascade with one more layer. Raises TooLarge."""
        known = extend(self.seen, self.known[-1], layer, MOST_KNOWN, limit)
        return _Partial(self.seen, self.window, (*self.layers, layer), (*self.known, known))

    def plan(self, latch: bool) -> Plan:
        """Return it as complete."""
        return Plan(self.seen, self.window, self.layers, self.known, latch)


def make_layer(kind: str, seen: View, known: Knowledge, limit: Limit) -> Layer | None:
    """Return a layer of a kind by its name; None where it does not apply. Raises TooLarge."""
    fixed: dict[str, Callable[[], Layer | None]] = {
        "peel": lambda: peel(seen, known, limit=limit),
        "inj": lambda: peel(seen, known, resets=False, limit=limit) if can_end(seen, known, limit) else None,
        "EM": lambda: tiles(seen, known, carry=False, limit=limit),
        "TR": lambda: tiles(seen, known, carry=True, limit=limit),
        "zei": lambda: zeiger(seen, known, limit),
        "cut": lambda: cut(seen, known, limit),
    }
    if kind in fixed:
        return fixed[kind]()
    if kind.startswith("suf"):
        return suffix(int(kind[3:]))
    blocks: list[Block | Register] = []
    for part in (*CHEAP, "cut"):
        try:
            layer = fixed[part]()
        except TooLarge:
            continue
        blocks += layer.blocks if layer else []
    length = int(kind[3:] or 0)
    return Layer(kind, [*blocks, Register(length)] if length else blocks) if blocks else None


def _rebuilt(plan: Plan, i: int, blocks: list[Block | Register], limit: Limit) -> Plan | None:
    """Return the plan with other blocks in layer i and the layers above made anew; None where it is not complete."""
    partial = _Partial(plan.seen, plan.window, plan.layers[:i], plan.known[: i + 1])
    try:
        partial = partial.with_layer(Layer(plan.layers[i].kind, blocks), limit)
        for above in plan.layers[i + 1 :]:
            layer = make_layer(above.kind, plan.seen, partial.known[-1], limit)
            if layer is None:
                return None
            partial = partial.with_layer(layer, limit)
    except TooLarge:
        return None
    return partial.plan(plan.latch) if partial.known[-1].width <= 1 else None
