"""From a regular expression, an automaton or a group to the exact weights of a linear RNN.

`compile` runs these passes, in this order; each has its file and its data, which the next one takes:

    automata.specs   what the user wrote            -> a minimal Automaton, equal letters merged
    search.py        Automaton                      -> Plan: layers that together know the state (cascade.py, kinds.py,
                                                       cuts.py), or group_heads.py for permutations
    assembly.py      Plan                           -> Stages: heads with operations on 0/1 vectors (operations.py),
                                                       and tables that decode them
    network.py       Stages                         -> tensors, run by ops.delta_rule or ops.dplr
    zeiger.py        Automaton                      -> the same, for any automaton, where the search finds nothing
    certificate.py   the compiled network           -> a proof that it is right at every length (discrete.py: if its
                                                       arithmetic is exact)

The theory is in docs/theory.md: Grazzi et al. (arXiv 2411.12537), Theorems 3 and 4, with partial injections in the
place of permutation-reset automata.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from statetrack.automata import Automaton, automaton_of
from statetrack.compiler.assembly import Stage, assemble, assemble_map
from statetrack.compiler.cascade import Limit
from statetrack.compiler.certificate import Certificate
from statetrack.compiler.compiled import STRUCTURES, Blueprint, CompiledAutomaton
from statetrack.compiler.group_heads import group_stage
from statetrack.compiler.operations import UNITS, Style
from statetrack.compiler.search import find_plans
from statetrack.errors import UsageError

__all__ = ["Certificate", "CompiledAutomaton", "compile"]

OBJECTIVES = ("depth", "factors", "width")
MOST_WINDOW = 8

Found = tuple[list[Stage], list[int], Stage | None]  # stages, state for each final code, window


def compile(
    spec: Any,
    *,
    structure: str = "householder",
    window: int = 0,
    keys: str = "integer",
    objective: str = "depth",
    timeout: float = 20.0,
    alphabet: str | Sequence[str] = "bytes",
    flags: str = "",
    report: Callable[[str], None] = lambda _: None,
) -> CompiledAutomaton:
    """Compile a regular expression, an automaton or a group to a network that follows it exactly, at any length.

    Args:
        spec: what `statetrack.automata.automaton_of` takes: a regular expression, "group:S5", a file, an Automaton.
        structure: "householder": products of I - beta kh kh^T with eigenvalues in [-1, 1] (DeltaProduct); "gated": with
            a forget gate, which makes resets free; "dplr": one layer for any automaton, asymmetric factors I + b a^T.
        window: tokens that the first layer sees (a short convolution); 0 or 1: the current one only.
        keys: "integer": exact for ops that divide by |k|^2, such as ours; "unit": of length 1 exactly, for kernels that
            normalise keys; "normalised": (1, -1) / sqrt(2), not exact, to see a certificate fail.
        objective: what is made small first: "depth" (layers), "factors" (per token), "width" (coordinates).
        timeout: seconds for all of it; 0 takes the first network found, within about a second of processor time for up
            to 128 states. When the time runs out, the best found so far is returned, and its report says so.
        alphabet, flags: for regular expressions.
        report: called with what is tried, again and again.

    Raises:
        UsageError: a spec or option that does not fit.
    """
    _check(structure=(structure, STRUCTURES), keys=(keys, tuple(UNITS)), objective=(objective, OBJECTIVES))
    if not (isinstance(window, int) and 0 <= window <= MOST_WINDOW):
        raise UsageError(f"window must be 0 (none) to {MOST_WINDOW} tokens, got {window}")
    if not (isinstance(timeout, int | float) and 0 <= timeout < float("inf")):
        raise UsageError(f"timeout must be a number of seconds, at least 0, got {timeout}")
    began = time.monotonic()
    automaton = automaton_of(spec, alphabet=alphabet, flags=flags)
    merged, _ = automaton.merge_letters()
    if structure == "dplr":
        candidates, late = [_map_stage(merged)], False
    else:
        with _uncollected():
            candidates, late = _candidates(merged, max(1, window), objective, timeout, report)
    stages, states, seen = min(
        candidates, key=_cost(objective, Style(structure == "gated", keys)), default=([], [], None)
    )
    seconds = time.monotonic() - began
    chain = not candidates
    return Blueprint(automaton, stages, states, seen, structure, keys, seconds, late, chain).build()


def _check(**options: tuple[str, Sequence[str]]) -> None:
    for name, (value, accepted) in options.items():
        if value not in accepted:
            raise UsageError(f"{name}={value!r} is unknown; accepted: {', '.join(accepted)}")


def _map_stage(merged: Automaton) -> Found:
    return [assemble_map(merged)], [*range(merged.states), merged.start], None


def _candidates(
    merged: Automaton, window: int, objective: str, timeout: float, report: Callable[[str], None]
) -> tuple[list[Found], bool]:
    """Return the networks found, and whether the time ran out."""
    end = Limit(timeout)
    report("one layer for a group")
    group = group_stage(merged, max(0.5, timeout / 4))
    if group is not None:
        return [([group], [*range(merged.states), merged.start], None)], False
    deeper = objective != "depth" and timeout > 0
    plans, late = find_plans(merged, window, timeout, deeper, report)
    found: list[Found] = []
    for plan in plans:
        if found and timeout and end.passed:
            return found, True
        report(f"weights of {plan.kinds}")
        stages, states, seen = assemble(plan)
        found.append((stages, states.tolist(), seen))
    return found, late


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector out: the search makes hundreds of thousands of containers and no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cost(objective: str, style: Style) -> Callable[[Found], tuple[int, ...]]:
    """Return what the networks are compared by."""

    def cost(found: Found) -> tuple[int, ...]:
        stages = found[0]
        depth, width = len(stages), sum(stage.width for stage in stages)
        factors = max((stage.factors(style) for stage in stages), default=0)
        first = {"depth": depth, "factors": factors, "width": width}[objective]
        return first, depth, factors, width

    return cost
