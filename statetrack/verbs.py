"""What the command line's verbs do, given their parsed arguments."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from statetrack.checkpoint_verbs import convert as convert
from statetrack.checkpoint_verbs import inspect as inspect
from statetrack.checkpoint_verbs import unlock as unlock
from statetrack.cli import (
    MIXERS,
    CompileArguments,
    DemoArguments,
    ExplainArguments,
    PlotArguments,
    RunArguments,
    TasksArguments,
    TrainArguments,
)
from statetrack.errors import UsageError
from statetrack.evaluation_verbs import evaluate as evaluate
from statetrack.evaluation_verbs import evaluations
from statetrack.evaluation_verbs import reproduce as reproduce
from statetrack.layers import MIXERS as CONFIGS
from statetrack.layers import DeltaProductConfig
from statetrack.lm.arguments import LMArguments
from statetrack.model import Config
from statetrack.progress import Bars
from statetrack.tasks import TASKS, Task, get_task
from statetrack.train import Settings, load_settings, model_of_task

if TYPE_CHECKING:
    pass


def train(a: TrainArguments) -> None:
    """Train one run and draw its curves."""
    from statetrack.diagnosis import warning
    from statetrack.plots import training_curve
    from statetrack.runs import Run
    from statetrack.train import train as run_training

    task = get_task(a.task)
    settings = Settings(
        task=a.task,
        model=model_config(a, task),
        train_length=a.train_length,
        steps=a.steps,
        batch_size=a.batch_size,
        lr=a.lr,
        min_lr=min(1e-6, a.lr),
        weight_decay=a.weight_decay,
        label_smoothing=a.label_smoothing,
        clip=a.clip,
        seed=a.seed,
        device=a.device,
        precision=a.precision,
        execution=a.execution,
        init_from_automaton=a.init_from_automaton,
    )
    path = a.out or Path("runs") / run_name(a)
    if found := warning(task, settings.model):
        print(f"warning: {found}", file=sys.stderr)
    with Bars() as bars:

        def report(row: dict[str, Any]) -> None:
            note = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  {1 / row['seconds']:.1f} steps/s"
            bars.update(a.task, row["step"], settings.steps, note)

        run_training(settings, path, resume=a.resume, force=a.force, report=report)
    training_curve(Run(path).metrics(), path / "training", title=path.name)
    _say(f"trained {settings.steps} steps; next: statetrack evaluate {shlex.quote(str(path))}")


ARCHITECTURE = (
    *("mixer", "eigenvalues", "dim", "layers", "heads", "head_dim", "factors"),
    *("conv", "beta_std", "state_size", "mlp_dim"),
)
"""the options that describe a model"""


def model_config(a: TrainArguments, task: Task) -> Config:
    """Return the model that the arguments describe; an option that the mixer does not have is an error."""
    if a.layers < 1:
        raise UsageError(f"layers must be at least 1, got {a.layers}")
    if a.init_from_automaton:
        for field in fields(a):
            if field.name in ARCHITECTURE and getattr(a, field.name) != field.default:
                flag = "--" + field.name.replace("_", "-")
                raise UsageError(f"{flag} does not go with --init-from-automaton: the automaton gives the model")
        return model_of_task(task).config
    name, fixed = MIXERS[a.mixer]
    asked = {
        "eigenvalues": a.eigenvalues,
        "heads": a.heads,
        "head_dim": a.head_dim,
        "factors": a.factors,
        "conv_size": a.conv,
        "beta_std": a.beta_std,
        "state_size": a.state_size,
    }
    given = {option: value for option, value in asked.items() if value is not None}
    known = CONFIGS[name].__dataclass_fields__
    for option in given:
        if option not in known:
            flag = "--" + ("conv" if option == "conv_size" else option.replace("_", "-"))
            raise UsageError(f"{flag} does not apply to --mixer {a.mixer}")
    mixer = CONFIGS[name](dim=a.dim, **{**fixed, **given})
    return Config(
        vocab_size=task.vocab_size, num_outputs=task.num_outputs, mixers=(mixer,) * a.layers, mlp_dim=a.mlp_dim
    )


def run_name(a: TrainArguments) -> str:
    """Return the default name of a run's directory: what people vary most."""
    lo, hi = a.eigenvalues or (-1.0, 1.0)
    has_range = "eigenvalues" in CONFIGS[MIXERS[a.mixer][0]].__dataclass_fields__
    ranged = f"_{lo:g}to{hi:g}" if has_range else ""
    task = "".join(c if c.isalnum() else "-" for c in Path(a.task).stem)
    if a.init_from_automaton:
        return f"{task}_automaton_s{a.seed}"
    return f"{task}_{a.mixer}{ranged}_{a.layers}l_s{a.seed}"


def _say(line: str) -> None:
    Console(markup=False).print(line, highlight=False, soft_wrap=True)


def plot(a: PlotArguments) -> None:
    """Draw accuracy against length, one line per configuration."""
    from statetrack.plots import accuracy_by_length

    if not a.runs:
        raise UsageError("name at least one run directory")
    grouped: dict[Settings, list[list[tuple[int, float]]]] = {}
    measures = set()
    for path in a.runs:
        settings = load_settings(path)
        rows = [row for row in evaluations(path) if row.get("precision", "tracking") == "tracking"]
        if not rows:
            raise UsageError(f"{path} has not been evaluated; first: statetrack evaluate {shlex.quote(str(path))}")
        measure, curve = _curve(rows)
        if not curve:
            raise UsageError(
                f"{path} was evaluated on ranges of lengths only; give single lengths, e.g. --lengths 40 256"
            )
        measures.add(measure)
        watched = {"seed": 0, "device": "auto", "log_every": 20, "checkpoint_every": 500}
        grouped.setdefault(replace(settings, **watched), []).append(curve)
    if len(measures) > 1:
        raise UsageError("these runs mix tasks with one answer per sequence and with one per token; plot them apart")
    tasks = sorted({settings.task for settings in grouped})
    trained = {settings.train_length for settings in grouped}
    written = accuracy_by_length(
        dict(zip(_labels(list(grouped)), grouped.values(), strict=True)),
        a.out,
        title=", ".join(tasks),
        measure=measures.pop(),
        trained=trained.pop() if len(trained) == 1 else None,
    )
    _say(f"wrote {' and '.join(map(str, written))}")


def _curve(rows: list[dict[str, Any]]) -> tuple[str, list[tuple[int, float]]]:
    """Return what an evaluation measured, and its value against the length."""
    single = [row for row in rows if isinstance(row["length"], int)]
    whole = [row for row in single if "curve" in row]
    if whole:
        longest = max(whole, key=lambda row: row["length"])
        return "sequence accuracy", [(t, accuracy) for t, accuracy in longest["curve"]]
    return "scaled accuracy", sorted((row["length"], row["scaled_accuracy"]) for row in single)


def _labels(configurations: list[Settings]) -> list[str]:
    """Name every configuration by its mixers and width, and by what else tells it from the others."""
    several = [f.name for f in fields(Settings) if f.name not in ("model", "init_from_automaton")]
    several = [name for name in several if len({getattr(s, name) for s in configurations}) > 1]
    labels = [
        ", ".join(
            [
                _mixers(s.model) + " from its automaton" * s.init_from_automaton,
                *(f"{name} {getattr(s, name)}" for name in several),
            ]
        )
        for s in configurations
    ]
    return [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]


def _mixers(model: Config) -> str:
    parts = []
    for mixer in dict.fromkeys(model.mixers):
        lo, hi = getattr(mixer, "eigenvalues", (math.nan, math.nan))
        words = ["gated"] if getattr(mixer, "gate", False) else []
        words.append(type(mixer).__name__.removesuffix("Config"))
        words += [f"N={mixer.factors}"] if isinstance(mixer, DeltaProductConfig) else []
        words += [] if math.isnan(lo) else [f"[{lo:g},{hi:g}]"]
        parts.append(" ".join([*words, f"x{model.mixers.count(mixer)}"]))
    return f"{' + '.join(parts)} dim {model.dim}"


def demo(a: DemoArguments) -> None:
    """Run the demo."""
    from statetrack.demo import demo as run_demo

    run_demo(a.out, a.seed, a.workers)


def explain(a: ExplainArguments) -> None:
    """Print one page on a language."""
    from statetrack.diagnosis import explain as page

    _say(page(a.spec, alphabet=a.alphabet, flags=a.flags))


def compile(a: CompileArguments) -> None:
    """Compile a language, print the report and the certificates, and write the directory; exit with 1 if one fails."""
    from statetrack import artifact
    from statetrack.compiler import compile as compile_spec

    artifact.check_free(a.out, a.force)
    with Bars() as bars:
        began, limit = time.monotonic(), max(a.timeout, 1.0)

        def report(tried: str) -> None:
            bars.update("compile", min(time.monotonic() - began, limit), limit, f"s  {tried}")

        compiled = compile_spec(
            a.spec,
            structure=a.structure,
            window=a.window,
            keys=a.keys,
            objective=a.objective,
            timeout=a.timeout,
            alphabet=a.alphabet,
            flags=a.flags,
            report=report,
        )
        certificates = []
        for i, dtype in enumerate(CERTIFIED):
            bars.update("certify", i, len(CERTIFIED), dtype)
            certificates.append(compiled.certificate(dtype))
        bars.update("draw", 0, 1)
        said = "\n".join([compiled.report(), *map(str, certificates)])
        missing = artifact.write(a.out, compiled, said, force=a.force)
    _say(said)
    for line in missing:
        print(line, file=sys.stderr)
    _say(f"wrote {a.out}; next: statetrack run {shlex.quote(str(a.out))} FILE")
    if not all(certificate.passed for certificate in certificates):
        sys.exit(1)


CERTIFIED = ("float32", "bfloat16")


def run(a: RunArguments) -> None:
    """Stream a file through a compiled automaton and say what it accepts."""
    from statetrack import artifact, texts
    from statetrack.train import choose_device

    if a.lines and a.whole:
        raise UsageError("--lines and --whole exclude each other: a text is a line, or the whole file")
    compiled = artifact.read(a.directory).to(choose_device(a.device))
    out = sys.stdout  # a progress bar redirects what is printed later
    with contextlib.ExitStack() as stack:
        # One thread: the pieces are too small to gain from more, which lose much where others are at work.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        if a.file == "-":
            name, stream, size = "standard input", sys.stdin.buffer, 0
        else:
            name, stream = a.file, stack.enter_context(open(a.file, "rb"))
            size = Path(a.file).stat().st_size
        bars = stack.enter_context(Bars())

        def report(read: int) -> None:
            bars.update(name, read / 1e6, size / 1e6 if size else None, "MB")

        letters = texts.read_letters(stream.read, name, compiled.automaton, lines=not a.whole, report=report)
        if a.whole:
            verdict = texts.say_whole(compiled, letters, a.backend)
        else:
            counts = np.zeros(compiled.automaton.num_outputs, dtype=np.int64)
            for said in texts.say_lines(compiled, letters, a.backend):
                counts += np.bincount(said, minlength=len(counts))
                if a.show:
                    out.write("".join(f"{verdict}\n" for verdict in said.tolist()))
    accepting = compiled.automaton.accepting is not None
    if a.whole:
        _say(("rejected", "accepted")[verdict] if accepting else f"output {verdict}")
        return
    found = ", ".join(f"{verdict} on {count}" for verdict, count in enumerate(counts.tolist()) if count)
    total = f"{counts.sum()} lines"
    summary = f"accepted {counts[1]} of {total}" if accepting else f"{total}; output {found or 'none'}"
    print(summary, file=sys.stderr if a.show else out)


def lm(a: LMArguments) -> None:
    """Do one of the language models' verbs."""
    from statetrack.lm import verbs as implementation
    from statetrack.lm.arguments import VERBS

    getattr(implementation, VERBS[type(a.verb)])(a.verb)


def tasks(_: TasksArguments) -> None:
    """List the tasks."""
    table = Table("task", "what is asked", box=None)
    for name, line in TASKS.items():
        table.add_row(name, line)
    Console(markup=False).print(table)
