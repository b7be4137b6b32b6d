"""What a structure can and cannot track: theorems applied to the syntactic monoid of an automaton.

A stack of layers tracks an automaton if, after every token of every word, its output tells the automaton's, with a
margin (states closer than some delta > 0 count as the same) and in exact arithmetic on bounded states. A layer is
S_t = A(x_t) S_{t-1} + B(x_t), read as dec(S_t, x_t); A, B and dec may be any functions. "no" follows from a theorem
whose hypotheses hold here, "yes" from a construction, everything else is "unknown". Proofs: docs/theory.md.

P1 is Grazzi et al. (arXiv 2411.12537), P2 Siems et al. (2502.10297).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from statetrack.automata.automaton import Automaton
from statetrack.automata.monoid import Monoid
from statetrack.automata.shapes import (
    definite_order,
    injection_reset_cost,
    is_full_transformation_monoid,
    merge_cost,
    symmetric_cost,
    told_by_signs,
)
from statetrack.automata.witness import Witness, cycle_witness, local_witness, pair_witness
from statetrack.errors import UsageError

Family = Literal["diagonal", "complex-diagonal", "householder", "dplr", "attention", "nonlinear"]
CONTRACTIONS = ("diagonal", "complex-diagonal", "householder")
"""Families whose transitions never lengthen a vector."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What the theorems need to know of a stack of equal layers."""

    family: Family
    eigenvalues: tuple[float, float] = (-1.0, 1.0)
    """closed range of the eigenvalues of a diagonal transition or a factor; complex-diagonal: |eigenvalue| <= hi"""
    factors: int = 1
    """factors per token (householder, dplr)"""
    layers: int | None = None
    """number of layers; None for as many as it takes"""
    window: int = 0
    """tokens before the current one that the first layer sees"""
    gate: bool = False
    """whether a scalar in [0, 1] multiplies the transition"""
    selective: bool = True
    """whether the transition depends on the token"""

    def __post_init__(self) -> None:
        """Check everything once."""
        if self.family not in get_args(Family):
            raise UsageError(f"family={self.family!r} is unknown; accepted: {', '.join(get_args(Family))}")
        lo, hi = self.eigenvalues
        if not -1 <= lo < hi <= 1:
            raise UsageError(f"eigenvalues must be (lo, hi) with -1 <= lo < hi <= 1, got {self.eigenvalues}")
        for name, least in (("factors", 1), ("layers", 1), ("window", 0)):
            value = getattr(self, name)
            if (value is not None or name != "layers") and (type(value) is not int or value < least):
                raise UsageError(f"{name} must be an integer >= {least}, got {value!r}")


@dataclass(frozen=True)
class Verdict:
    """An answer with its reason. `min_layers` and `min_factors` are lower bounds; None where no number suffices."""

    answer: Literal["yes", "no", "unknown"]
    theorem: str
    """the theorem or construction, and where it is proved"""
    reason: str
    witness: Witness | None = None
    min_layers: int | None = 1
    min_factors: int | None = 1

    def __str__(self) -> str:
        """Return the verdict as printable text."""
        lines = [f"{self.answer}: {self.reason}"]
        lines += [f"  witness: {self.witness}"] if self.witness else []
        lines += [f"  by: {self.theorem}"] if self.theorem else []
        if self.answer != "no" and (self.min_layers or 1) > 1:
            lines.append(f"  at least {self.min_layers} layers")
        return "\n".join(lines)


@dataclass(frozen=True)
class Bounds:
    """At least so many layers, and why."""

    layers: int
    reason: str


@dataclass(frozen=True)
class _Limit:
    """A theorem that asks for `layers` or `factors` at least; None: no number is enough."""

    theorem: str
    reason: str
    witness: Witness | None = None
    layers: int | None = 1
    factors: int = 1


def judge(automaton: Automaton | Monoid, structure: Structure) -> Verdict:
    """Return whether the structure can track the automaton, with theorem and witness.

    Give the automaton's Monoid to use it for many structures. The monoid may be cut short: then what its elements prove
    is answered, and the rest is unknown.
    """
    monoid = automaton if isinstance(automaton, Monoid) else Monoid(automaton)
    limits = list(_limits(monoid, structure))
    needed = [limit.layers for limit in limits]
    min_layers = None if None in needed else max((n for n in needed if n is not None), default=1)
    min_factors = max((limit.factors for limit in limits), default=1)
    for limit in limits:
        too_deep = limit.layers is None or (structure.layers is not None and structure.layers < limit.layers)
        if too_deep or structure.factors < limit.factors:
            return Verdict("no", limit.theorem, limit.reason, limit.witness, min_layers, min_factors)
    for construction in _constructions(monoid, structure):
        return Verdict("yes", construction[0], construction[1], None, min_layers, min_factors)
    return Verdict("unknown", "", _open_question(monoid, structure), None, min_layers, min_factors)


def lower_bounds(automaton: Automaton | Monoid, window: int = 0) -> Bounds:
    """Return a number of layers below which no stack of contractions with exact, finite states tracks the automaton.

    For layers whose states take finitely many values, bit for bit, as compiled ones do. Layers above the first may see
    any window. 0 where the current token and the window before it decide alone.
    """
    if type(window) is not int or window < 0:
        raise UsageError(f"window must be an integer >= 0, got {window!r}")
    monoid = automaton if isinstance(automaton, Monoid) else Monoid(automaton)
    order = definite_order(monoid.automaton)
    if order is not None and order <= window + 1:
        return Bounds(0, _last(order))
    found = [Bounds(1, "no window decides alone")]
    if is_full_transformation_monoid(monoid):
        n = monoid.automaton.states
        found.append(Bounds(n - 1, f"the words do all {n}^{n} maps of {n} states: {COMPLEXITY}"))
    one_layer = monoid.locally_last_wins if window else monoid.last_wins
    if one_layer.holds is False:
        found.append(Bounds(2, f"{_local(window)}e f e = f e fails for idempotents: {ONE_EXACT_LAYER}"))
    best = max(found, key=lambda bounds: bounds.layers)
    if best.layers == 1 and not monoid.complete:
        return Bounds(1, f"unknown beyond 1: more than {monoid.size - 1} elements")
    return best


# --- what cannot be --------------------------------------------------------------------------------------------------

APERIODIC = "docs/theory.md, Theorem 1 (P1 Theorem 1 for parity; Sarrof et al. 2024 for diagonal layers)"
FORGETS = "docs/theory.md, Theorem 2"
TWO_GROUPS = "docs/theory.md, Theorem 3 (P1 Theorem 2 for counting)"
SOLVABLE = "docs/theory.md, Theorem 4"
ONE_LAYER = "docs/theory.md, Theorem 5"
ONE_DIAGONAL_LAYER = "docs/theory.md, Theorem 6"
ONE_EXACT_LAYER = "docs/theory.md, Theorem 7"
ONE_REFLECTION = "docs/theory.md, Theorem 8"
COMPLEXITY = "docs/theory.md, Theorem 9 (Krohn-Rhodes complexity)"


def _limits(m: Monoid, s: Structure) -> Iterator[_Limit]:
    """Yield every theorem that limits the structure on this automaton, those that no depth helps against first."""
    if s.family not in CONTRACTIONS:
        return
    lo, hi = s.eigenvalues
    if s.family != "householder" and max(abs(lo), abs(hi)) < 1 and definite_order(m.automaton) is None:
        reason = f"every eigenvalue lies in [{lo:g}, {hi:g}], so what lies far back fades; here it decides"
        yield _Limit(FORGETS, reason, layers=None)
    if s.family != "complex-diagonal" and lo > -1 and m.aperiodic.holds is False:
        reason = f"eigenvalues in [{lo:g}, {hi:g}] without -1 track star-free languages only, at any depth"
        yield _Limit(APERIODIC, reason, cycle_witness(m, int(m.periodic[0])), layers=None)
    if s.family != "householder":
        yield from _group_limits(m, s)
    yield from _one_layer_limits(m, s)
    n = m.automaton.states
    if is_full_transformation_monoid(m) and n > 2:
        yield _Limit(
            COMPLEXITY, f"the words do all {n}^{n} maps of {n} states, which takes {n - 1} layers", layers=n - 1
        )


def _group_limits(m: Monoid, s: Structure) -> Iterator[_Limit]:
    """Yield what the groups in the monoid ask of diagonal layers."""
    if s.family == "diagonal":
        odd = next((int(x) for x in m.periodic if (p := m.period(int(x))) & (p - 1)), None)
        if odd is not None:
            reason = "real diagonal layers count modulo powers of 2 only, at any depth"
            yield _Limit(TWO_GROUPS, reason, cycle_witness(m, odd), layers=None)
            return
    if not m.complete or m.aperiodic.holds:
        return
    for group in m.subgroups:
        e = cycle_witness(m, int(group.elements[np.argmax(group.orders)]))
        if s.family == "complex-diagonal" and group.derived_length is None:
            reason = f"the words contain {group.name}, which is not solvable; diagonal layers commute"
            yield _Limit(SOLVABLE, reason, e, layers=None)
            return
        real = s.family == "diagonal"
        layers = group.two_length if real else group.derived_length
        parts = "groups Z2 x ... x Z2" if real else "commutative groups"
        reason = f"the words contain {group.name}, built of {layers} {parts} and no fewer: one layer for each"
        yield _Limit(TWO_GROUPS if real else SOLVABLE, reason, e, layers=layers)


def _one_layer_limits(m: Monoid, s: Structure) -> Iterator[_Limit]:
    """Yield what one layer cannot do, which two may."""
    law = m.locally_one_idempotent_per_image if s.window else m.one_idempotent_per_image
    show = local_witness if s.window else pair_witness
    if law.holds is False:
        reason = f"one layer cannot keep apart two idempotents with the same image{_inside(s.window)}"
        yield _Limit(ONE_LAYER, reason, show(m, law.witness), layers=2)
    elif s.family != "householder":
        law = m.locally_last_wins if s.window else m.last_wins
        if law.holds is False:
            reason = f"in one diagonal layer e f e = f e for all idempotents{_inside(s.window)}"
            yield _Limit(ONE_DIAGONAL_LAYER, reason, show(m, law.witness), layers=2)
    if s.family == "householder" and s.layers == 1:
        effects = [m.element((letters[0],)) for letters in m.letters]
        slow = next((x for x in effects if m.period(x) > 2), None)
        if slow is not None:
            reason = "in one layer with one factor a letter that is repeated has period 1 or 2"
            yield _Limit(ONE_REFLECTION, reason, cycle_witness(m, slow), factors=2)


def _last(order: int) -> str:
    if order == 0:
        return "the answer is always the same"
    return "the last token decides" if order == 1 else f"the last {order} tokens decide"


def _inside(window: int) -> str:
    return " of one local monoid" if window else ""


def _local(window: int) -> str:
    return "inside a local monoid " if window else ""


# --- what can be -----------------------------------------------------------------------------------------------------

RWKV7 = "Peng et al. 2025 (RWKV-7), P2 Table 1"
Found = Iterator[tuple[str, str]]
ROTATIONS = ("Z", "D", "S3", "A4", "S4", "A5")
"""The groups whose elements are rotations of a plane or of space, or of several planes at once (Z2 x Z12), by names."""


def _constructions(m: Monoid, s: Structure) -> Found:
    """Yield the constructions that the structure has room for: (who gives it, what it does)."""
    order = definite_order(m.automaton)
    if order is not None and order <= s.window + 1:
        yield "docs/theory.md, Construction 1", _last(order) + ", and the first layer sees as much" * (order > 0)
    if s.family == "nonlinear":
        yield "Minsky 1967 (an RNN with one unit per state and letter)", "a nonlinear recurrence follows any automaton"
    if s.family in ("attention", "nonlinear"):
        return
    if order is not None:
        yield "docs/theory.md, Construction 1", f"{_last(order)}; a decaying state holds them"
    if not s.selective or not _keeps_and_forgets(s):
        return
    yield from _any_depth(m, s)
    yield from _STACKS[s.family](m, s)


def _keeps_and_forgets(s: Structure) -> bool:
    """Return whether a state can be kept as it is and be overwritten; a Householder factor can act on a spare key."""
    lo, hi = s.eigenvalues
    return lo <= 0 <= hi and (hi == 1 or s.family == "householder")


def _any_depth(m: Monoid, s: Structure) -> Found:
    """Yield the constructions that may take any number of layers."""
    lo, _ = s.eigenvalues
    if s.layers is not None:
        return
    if s.family == "dplr" and lo == -1:
        yield RWKV7, "four layers recognise every regular language"
    elif s.family == "householder" and lo == -1:
        yield "P1 Theorem 4, P2 Theorem 2; docs/theory.md, Construction 4", "every regular language, with enough layers"
    elif m.aperiodic.holds:
        yield "Krohn-Rhodes; docs/theory.md, Construction 2", "star-free: a cascade of resets, with enough layers"
    elif s.family == "diagonal" and lo == -1 and m.complete and all(g.two_length is not None for g in m.subgroups):
        yield "Krohn-Rhodes; docs/theory.md, Construction 3", "a cascade of resets and sign flips, with enough layers"
    elif s.family == "complex-diagonal" and m.complete and all(g.solvable for g in m.subgroups):
        yield "Krohn-Rhodes; docs/theory.md, Construction 3", "a cascade of resets and counters, with enough layers"


def _diagonal_stack(m: Monoid, s: Structure) -> Found:
    """Yield what a given number of diagonal layers can do: one is enough for these."""
    lo, _ = s.eigenvalues
    real = s.family != "complex-diagonal"
    if m.is_group and m.complete and (lo == -1 or not real):
        group = next(iter(m.subgroups), None)
        depth = 0 if group is None else group.two_length if real else group.derived_length
        if depth is not None and depth <= 1:
            yield "docs/theory.md, Construction 3", "a commutative group: one sign or one rotation for each generator"
    if m.complete and len(m.idempotents) == m.size and m.last_wins.holds:
        yield "docs/theory.md, Construction 2", "the order of the letters' last occurrences decides; one layer holds it"
    signed = lo == -1 or not real
    if told_by_signs(m.automaton, signed):
        acts = "keeps, sets or negates" if signed else "keeps or sets"
        yield "docs/theory.md, Construction 7", f"coordinates of two values tell the state; every letter {acts} them"


def _householder_stack(m: Monoid, s: Structure) -> Found:
    """Yield what so many layers of so many factors can do."""
    lo, _ = s.eigenvalues
    layers, n = s.layers or 1, s.factors
    yield from _diagonal_stack(m, s)
    if lo > -1:
        return
    cost = injection_reset_cost(m.automaton, s.gate)
    if cost is not None and cost <= n:
        yield "docs/theory.md, Construction 5", f"every letter moves or resets a one-hot state: {_factors(cost)}"
    if m.is_group and m.complete and m.subgroups:
        name = m.subgroups[0].name
        swaps = symmetric_cost(m)
        if swaps is not None and swaps <= n:
            yield "P1 Theorem 3, P2 Theorem 1", f"every letter permutes points, {name} in all: {_factors(swaps)}"
        if n >= 2 and name.startswith(ROTATIONS):
            yield "P1 Theorem 3, P2 Theorem 4", f"{name}: a rotation for each letter, made of 2 factors"
        if layers >= 2 and name.startswith("Z"):
            yield "P1 Theorem 6", f"{name}: two layers of reflections count"
        if layers >= (4 if n == 1 else 3):
            yield "P2 Theorem 1", f"{name} is a group of permutations: {4 if n == 1 else 3} layers follow it"


def _factors(number: int) -> str:
    return f"{number} factors" if number != 1 else "1 factor"


def _dplr_stack(m: Monoid, s: Structure) -> Found:
    """Yield what so many layers with non-symmetric factors can do."""
    yield from _householder_stack(m, s)
    if s.eigenvalues[0] == -1:
        cost = merge_cost(m.automaton)
        if cost <= s.factors:
            yield "P2 Theorem 6; docs/theory.md, Construction 6", f"every letter is {cost} swaps and merges of states"
        if (s.layers or 1) >= 4:
            yield RWKV7, "four layers recognise every regular language"


_STACKS: dict[str, Callable[[Monoid, Structure], Found]] = {
    "diagonal": _diagonal_stack,
    "complex-diagonal": _diagonal_stack,
    "householder": _householder_stack,
    "dplr": _dplr_stack,
}


def _open_question(m: Monoid, s: Structure) -> str:
    """Say why neither a theorem nor a construction decides."""
    if s.family == "attention":
        if m.complete and not all(g.solvable for g in m.subgroups):
            return (
                "word problems of groups that are not solvable are out of reach of attention of fixed depth and "
                "logarithmic precision only if TC0 is not NC1 (Merrill and Sabharwal 2023), which is not proved"
            )
        return "no theorem here decides for softmax attention of fixed depth and precision at every length"
    if not m.complete:
        return f"the syntactic monoid has more than {m.size - 1} elements, too many to decide"
    if not s.selective:
        return "the transition is the same for every token; the constructions need one that depends on it"
    lo, hi = s.eigenvalues
    if not _keeps_and_forgets(s):
        return f"eigenvalues in [{lo:g}, {hi:g}]: the constructions need 0 (to forget) and 1 (to keep) in the range"
    if s.layers is None:
        return "no theorem and no construction here decides"
    more = " and factors" if s.family in ("householder", "dplr") else ""
    number = "1 layer" if s.layers == 1 else f"{s.layers} layers"
    return f"no theorem excludes {number}, and no construction here is that small; more layers{more} may do"
