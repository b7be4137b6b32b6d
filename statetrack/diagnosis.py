"""Can this model learn this language? `can_track` answers for a configuration, `explain` describes a language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from statetrack.automata import Automaton
from statetrack.automata.monoid import Monoid
from statetrack.automata.verdicts import CONTRACTIONS, Family, Structure, Verdict, judge, lower_bounds
from statetrack.automata.witness import spell
from statetrack.errors import UsageError
from statetrack.layers import (
    AttentionConfig,
    DeltaProductConfig,
    DenseRNNConfig,
    GLAConfig,
    HGRN2Config,
    LSTMConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MLSTMConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
    SLSTMConfig,
)
from statetrack.model import Config
from statetrack.tasks import AutomatonTask, Task
from statetrack.tasks.chomsky import ModularArithmetic, Parity

QUICK = 20_000_000
"""entries of products of the monoid that a warning may compute"""

STRUCTURES: dict[type, Callable[[Any], Structure]] = {
    DeltaProductConfig: lambda c: _linear("householder", c, c.conv_size, factors=c.factors, gate=bool(c.gate)),
    MambaConfig: lambda c: _linear("diagonal", c, c.conv_size),
    Mamba2Config: lambda c: _linear("diagonal", c, c.conv_size),
    GLAConfig: lambda c: _linear("diagonal", c),
    HGRN2Config: lambda c: _linear("diagonal", c),
    MLSTMConfig: lambda c: _linear("diagonal", c),
    RWKV6Config: lambda c: _linear("diagonal", c, 2),  # its token shift sees two tokens
    RWKV7Config: lambda c: _linear("dplr", c, 2),
    RetNetConfig: lambda c: _linear("complex-diagonal", c, selective=False),  # its rotary keys turn the state
    AttentionConfig: lambda _: Structure(family="attention"),
    LSTMConfig: lambda _: Structure(family="nonlinear"),
    SLSTMConfig: lambda _: Structure(family="nonlinear"),
    DenseRNNConfig: lambda _: Structure(family="nonlinear"),
}
"""What each mixer is to the theorems. A new mixer is one line."""


def can_track(spec: Any, configuration: Structure | MixerConfig | Config) -> Verdict:
    """Return whether a model of this configuration can follow the automaton, with theorem and witness.

    spec: a Task, or whatever `statetrack.automata.specs.automaton_of` takes (a regular expression, "group:S5", an
    Automaton, a file). A task is judged on the sequences it really asks about. configuration: a `Structure`, one layer
    of a mixer, or a model. The answer is about every length, exact arithmetic and any weights: "no" is proved, "yes"
    has a construction if the layers are wide enough (training may still miss it), all else is "unknown".
    """
    automaton, token_by_token = _asked(spec)
    return _judge(Monoid(automaton), _layers(configuration), token_by_token)


def explain(spec: Any, **options: Any) -> str:
    """Return one page on a language: its automaton, its monoid, and what can track it.

    options: alphabet and flags, for regular expressions (`automaton_of`).
    """
    automaton = _asked(spec, **options)[0]
    m = Monoid(automaton)
    lines = [*_automaton_lines(spec, m), "", *_verdict_lines(m), ""]
    bounds = lower_bounds(m), lower_bounds(m, 1)
    lines.append("exact layers needed (contractions, compiled)")
    lines.append(f"  without a window: at least {bounds[0].layers} ({bounds[0].reason})")
    lines.append(f"  with a window:    at least {bounds[1].layers} ({bounds[1].reason})")
    return "\n".join(lines)


def warning(task: Task, model: Config) -> str | None:
    """Return why the model provably cannot learn the task, and the way out; None if that takes long to find out."""
    automaton = getattr(task, "automaton", None)
    known = all(type(mixer) in STRUCTURES for mixer in model.mixers)
    if automaton is None or automaton.table.size > 200_000 or not known:
        return None
    automaton, token_by_token = _asked(task)
    monoid, layers = Monoid(automaton, max(1, min(20_000, QUICK // automaton.table.size))), _layers(model)
    verdict = _judge(monoid, layers, token_by_token)
    if verdict.answer != "no":
        return None
    way_out = _way_out(monoid, layers, token_by_token)
    found = f" ({verdict.witness})" if verdict.witness else ""
    return f"{task.name} cannot be learned at every length: {verdict.reason}{found}\n{way_out}".rstrip()


# --- what is asked ---------------------------------------------------------------------------------------------------


def _asked(spec: Any, **options: Any) -> tuple[Automaton, bool]:
    """Return an automaton whose letters may follow each other freely, and whether a letter is one token.

    Padding and BOS never come before an answer; arithmetic goes on by an operation and a digit at a time; in tasks with
    special tokens a letter is k tokens and its answer comes late. Where a letter is more than a token, what holds of
    one layer that reads letters need not hold of one that reads tokens.
    """
    if isinstance(spec, Automaton) and not options:
        return spec, True
    if not isinstance(spec, Task):
        from statetrack.automata.specs import automaton_of

        return automaton_of(spec, **options), True
    if isinstance(spec, AutomatonTask):
        return _letters(spec.automaton, [[x] for x in range(spec.letters)]), spec.delay == 0
    if isinstance(spec, Parity):
        return _letters(spec.automaton, [[1], [2]]), True
    if isinstance(spec, ModularArithmetic):
        return _letters(spec.automaton, [[op, digit] for op in (1, 2, 3) for digit in range(5, 10)]), False
    automaton = getattr(spec, "automaton", None)
    if automaton is None:
        raise UsageError(f"task {spec.name!r} is not a regular language; no automaton decides it")
    return automaton, True


def _letters(automaton: Automaton, words: Sequence[Sequence[int]]) -> Automaton:
    """Return the automaton that reads whole words as letters."""
    table = automaton.table[:, [word[0] for word in words]]
    for place in range(1, len(words[0])):
        table = automaton.table[table, [word[place] for word in words]]
    names = automaton.letters
    letters = None if names is None else tuple(" ".join(names[x] for x in word) for word in words)
    return Automaton(table, automaton.start, automaton.accepting, automaton.output, letters)


# --- what answers ----------------------------------------------------------------------------------------------------


def _linear(family: Family, mixer: Any, sees: int = 1, **options: Any) -> Structure:
    """Return the structure of a linear recurrence whose layer sees some tokens at once (its short convolution)."""
    return Structure(family=family, eigenvalues=mixer.eigenvalues, window=max(0, sees - 1), **options)


def _layers(configuration: Any) -> list[Structure]:
    """Return one structure per layer; a Structure stands for all of its own."""
    if isinstance(configuration, Structure):
        return [configuration]
    mixers = configuration.mixers if isinstance(configuration, Config) else (configuration,)
    for mixer in mixers:
        if type(mixer) not in STRUCTURES:
            known = ", ".join(cls.__name__ for cls in STRUCTURES)
            raise UsageError(
                f"configuration must be a Structure, a Config or one of {known}; got {type(mixer).__name__}"
            )
    counts = Counter(STRUCTURES[type(mixer)](mixer) for mixer in mixers)
    return [replace(structure, layers=count) for structure, count in counts.items()]


def _judge(m: Monoid, parts: list[Structure], token_by_token: bool = True) -> Verdict:
    """Judge a stack of different layers: yes if some of them alone can, no if a superset of them all cannot."""
    if not token_by_token:
        verdict = judge(m, replace(_superset(parts), layers=None))
        if verdict.answer == "no":
            return verdict
        return Verdict("unknown", "", "a letter is several tokens: decided only where no depth helps, and here it may")
    if len(parts) == 1:
        return judge(m, parts[0])
    for verdict in (judge(m, part) for part in parts):
        if verdict.answer == "yes":
            return replace(verdict, reason=f"{verdict.reason} (the other layers pass it on)")
    verdict = judge(m, _superset(parts))
    if verdict.answer == "no":
        return verdict
    return Verdict("unknown", "", "no theorem excludes these layers together, and none of them alone is known to do")


def _superset(parts: list[Structure]) -> Structure:
    """Return a structure that can do whatever layers of these kinds can do together, as far as a "no" is concerned."""
    if len(parts) == 1:
        return parts[0]
    families: set[Family] = {part.family for part in parts}
    if not families <= set(CONTRACTIONS):
        return Structure(family="nonlinear")
    family: Family = "householder" if "householder" in families else "complex-diagonal"
    return Structure(
        family="diagonal" if families == {"diagonal"} else family,
        eigenvalues=(-1.0, 1.0)
        if "complex-diagonal" in families
        else (min(p.eigenvalues[0] for p in parts), max(p.eigenvalues[1] for p in parts)),
        factors=max(part.factors for part in parts),
        layers=sum(part.layers or 1 for part in parts),
        window=max(part.window for part in parts),
    )


def _way_out(m: Monoid, parts: list[Structure], token_by_token: bool) -> str:
    """Return the smallest change of the command line that no theorem excludes."""
    if len(parts) > 1:
        return ""
    part = parts[0]
    signed = replace(part, eigenvalues=(-1.0, 1.0))
    products = replace(signed, family="householder", factors=max(2, part.factors))
    deeper = judge(m, signed).min_layers or judge(m, products).min_layers or 1
    changes: list[tuple[str, Structure]] = [("--eigenvalues -1 1", signed)]
    if part.family == "householder":
        changes.append(("--mixer deltaproduct --factors 2", replace(part, factors=2)))
    changes.append((f"--layers {deeper}", replace(part, layers=deeper)))
    changes.append((f"--eigenvalues -1 1 --layers {deeper}", replace(signed, layers=deeper)))
    changes.append(("--mixer deltaproduct --eigenvalues -1 1", products))
    changes.append((f"--mixer deltaproduct --eigenvalues -1 1 --layers {deeper}", replace(products, layers=deeper)))
    for words, changed in changes:
        if _judge(m, [changed], token_by_token).answer != "no":
            return f"not excluded: {words}"
    return ""


# --- the page --------------------------------------------------------------------------------------------------------

ROWS: tuple[tuple[str, Structure], ...] = (
    ("diagonal [0,1]  (Mamba, GLA, mLSTM)", Structure(family="diagonal", eigenvalues=(0.0, 1.0))),
    ("diagonal [-1,1]", Structure(family="diagonal")),
    ("complex diagonal", Structure(family="complex-diagonal")),
    ("Householder [0,1]  (DeltaNet)", Structure(family="householder", eigenvalues=(0.0, 1.0))),
    ("Householder [-1,1]", Structure(family="householder")),
    ("diagonal [-1,1], 1 layer", Structure(family="diagonal", layers=1)),
    ("DeltaNet [-1,1], 1 layer", Structure(family="householder", layers=1)),
    ("the same, window 3", Structure(family="householder", layers=1, window=3)),
    ("DeltaProduct N=4 [-1,1], 1 layer", Structure(family="householder", factors=4, layers=1)),
    ("RWKV-7 [-1,1], 1 layer", Structure(family="dplr", layers=1)),
    ("attention", Structure(family="attention")),
    ("LSTM, 1 layer", Structure(family="nonlinear", layers=1)),
)
"""The verdict table; without a number of layers, as many as it takes."""


def _automaton_lines(spec: Any, m: Monoid) -> list[str]:
    name = spec if isinstance(spec, str) else getattr(spec, "name", type(spec).__name__)
    classes = [spell(m.automaton, letters, 24) for letters in m.letters[:8]]
    more = f", ... ({len(m.letters)} in all)" if len(m.letters) > len(classes) else ""
    lines = [f"language   {name}", f"states     {m.automaton.states} (minimal automaton)"]
    lines.append(f"letters    {m.automaton.alphabet}, those with the same effect together: {', '.join(classes)}{more}")
    if not m.complete:
        return [*lines, f"monoid     unknown: more than {m.size - 1} elements; verdicts go by those"]
    lines.append(f"monoid     {m.size} elements, {len(m.idempotents)} idempotent")
    names = list(dict.fromkeys(group.name for group in m.subgroups))
    lines.append(
        "groups     none: the language is star-free" if m.aperiodic.holds else f"groups     {', '.join(names)}"
    )
    return lines


def _verdict_lines(m: Monoid) -> list[str]:
    """Return the table of verdicts; a reason that was given above is not said again."""
    width = max(len(label) for label, _ in ROWS)
    lines, said = ["can it be tracked, at every length?"], {}
    for label, structure in ROWS:
        verdict = judge(m, structure)
        lines.append(f"  {label:{width}}  {verdict.answer.upper() if verdict.answer == 'no' else verdict.answer}")
        text = f"{verdict.reason}" + (f"; {verdict.witness}" if verdict.witness else "")
        if text in said:
            lines[-1] += f": as for {said[text]}"
            continue
        said[text] = label
        lines[-1] += f": {verdict.reason}"
        lines += [f"  {'':{width}}      {verdict.witness}"] if verdict.witness else []
        lines += [f"  {'':{width}}      by {verdict.theorem}"] if verdict.answer == "no" else []
    return lines
