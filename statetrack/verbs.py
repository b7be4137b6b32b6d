"""What the command line's verbs do, given their parsed arguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from statetrack.cli import (
    MIXERS,
    DemoArguments,
    EvaluateArguments,
    PlotArguments,
    ReproduceArguments,
    TasksArguments,
    TrainArguments,
)
from statetrack.errors import UsageError
from statetrack.layers import MIXERS as CONFIGS
from statetrack.model import Config
from statetrack.progress import Bars
from statetrack.tasks import TASKS, Task, get_task
from statetrack.train import Settings, load_run


def train(a: TrainArguments) -> None:
    """Train one run and draw its curves."""
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
        clip=a.clip,
        seed=a.seed,
        device=a.device,
        precision=a.precision,
    )
    path = a.out or Path("runs") / run_name(a)
    with Bars() as bars:

        def report(row: dict[str, Any]) -> None:
            note = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  {1 / row['seconds']:.1f} steps/s"
            bars.update(a.task, row["step"], settings.steps, note)

        run_training(settings, path, resume=a.resume, force=a.force, report=report)
    training_curve(Run(path).metrics(), path / "training", title=path.name)
    Console().print(
        f"trained {settings.steps} steps; next: statetrack evaluate {path}", highlight=False, soft_wrap=True
    )


def model_config(a: TrainArguments, task: Task) -> Config:
    """Return the model that the arguments describe; an option that the mixer does not have is an error."""
    if a.layers < 1:
        raise UsageError(f"layers must be at least 1, got {a.layers}")
    name, fixed = MIXERS[a.mixer]
    asked = {
        "eigenvalues": a.eigenvalues,
        "heads": a.heads,
        "head_dim": a.head_dim,
        "factors": a.factors,
        "conv_size": a.conv,
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
    ranged = "" if a.mixer in ("attention", "lstm") else f"_[{lo:g},{hi:g}]"
    task = "".join(c if c.isalnum() else "-" for c in Path(a.task).stem)
    return f"{task}_{a.mixer}{ranged}_{a.layers}l_s{a.seed}"


def evaluate(a: EvaluateArguments) -> None:
    """Evaluate runs, print a table and keep the numbers in each run's evaluation.json."""
    from statetrack.evaluate import evaluate as measure
    from statetrack.evaluate import parse_lengths
    from statetrack.runs import read_json, write_json

    lengths = parse_lengths(a.lengths)
    if not a.runs or not lengths:
        raise UsageError("name at least one run directory and one length")
    table = Table("run", "length", "sequences", "accuracy", "scaled", "whole sequence right")
    with Bars() as bars:
        for path in a.runs:
            settings, model = load_run(path, a.device)
            task = get_task(settings.task)
            stored = path / "evaluation.json"
            kept = {_key(row): row for row in (read_json(stored) if stored.exists() else [])}
            for length in lengths:
                name = f"{path.name} at {'..'.join(map(str, length)) if isinstance(length, tuple) else length}"
                count = a.sequences or _sequences(length)
                row = measure(
                    model,
                    task,
                    length,
                    sequences=count,
                    batch_size=a.batch_size,
                    seed=a.seed,
                    report=lambda share, name=name: bars.update(name, 100 * share, 100, "%"),
                )
                kept[_key(row)] = row
                write_json(stored, list(kept.values()))
                table.add_row(
                    str(path),
                    _shown_length(row["length"]),
                    str(count),
                    f"{row['accuracy']:.4f}",
                    f"{row['scaled_accuracy']:.4f}",
                    f"{row['sequence_accuracy']:.4f}" if "sequence_accuracy" in row else "",
                )
    Console().print(table)


def _sequences(length: int | tuple[int, int]) -> int:
    if isinstance(length, tuple):
        return 8192
    return max(8, min(1024, (1 << 24) // max(1, length)))


def _key(row: dict[str, Any]) -> str:
    return _shown_length(row["length"])


def _shown_length(length: int | list[int]) -> str:
    return str(length) if isinstance(length, int) else f"{length[0]}..{length[1]}"


def plot(a: PlotArguments) -> None:
    """Draw accuracy against length, one line per configuration."""
    from statetrack.plots import accuracy_by_length
    from statetrack.runs import read_json

    curves: dict[str, list[list[tuple[float, float]]]] = {}
    trained, tasks, measures = set(), set(), set()
    for path in a.runs:
        settings = Settings.from_dict(read_json(path / "config.json")["settings"])
        if not (path / "evaluation.json").exists():
            raise UsageError(f"{path} has not been evaluated; first: statetrack evaluate {path}")
        rows = read_json(path / "evaluation.json")
        whole = [row for row in rows if "curve" in row and isinstance(row["length"], int)]
        if whole:
            curve = [(t, accuracy) for t, accuracy in max(whole, key=lambda row: row["length"])["curve"]]
        else:
            curve = sorted((row["length"], row["scaled_accuracy"]) for row in rows if isinstance(row["length"], int))
        if not curve:
            raise UsageError(
                f"{path} was evaluated on ranges of lengths only; give single lengths, e.g. --lengths 40 256"
            )
        measures.add("sequence accuracy" if whole else "scaled accuracy")
        curves.setdefault(_label(settings), []).append(curve)
        trained.add(settings.train_length)
        tasks.add(settings.task)
    if not curves:
        raise UsageError("name at least one run directory")
    if len(measures) > 1:
        raise UsageError("these runs mix tasks with one answer per sequence and with one per token; plot them apart")
    same = trained.pop() if len(trained) == 1 else None
    written = accuracy_by_length(curves, a.out, title=", ".join(sorted(tasks)), measure=measures.pop(), trained=same)
    Console().print(f"wrote {' and '.join(map(str, written))}", highlight=False, soft_wrap=True)


def _label(settings: Settings) -> str:
    """Name a configuration, its seed aside."""
    parts = []
    for mixer in dict.fromkeys(settings.model.mixers):
        count = settings.model.mixers.count(mixer)
        name = type(mixer).__name__.removesuffix("Config")
        factors = getattr(mixer, "factors", None)
        lo, hi = getattr(mixer, "eigenvalues", (math.nan, math.nan))
        parts.append(
            name + (f" N={factors}" if factors else "") + ("" if math.isnan(lo) else f" [{lo:g},{hi:g}]") + f" x{count}"
        )
    return f"{' + '.join(parts)} dim {settings.model.dim}"


def reproduce(a: ReproduceArguments) -> None:
    """Run the cells of a table."""
    from statetrack.reproduce import reproduce as run_table

    run_table(a.table, cells=a.cells, seeds=a.seeds, quick=a.quick, list_only=a.list, device=a.device, out=a.out)


def demo(a: DemoArguments) -> None:
    """Run the demo."""
    from statetrack.demo import demo as run_demo

    if a.workers < 1:
        raise UsageError(f"workers must be at least 1, got {a.workers}")
    run_demo(a.out, a.seed, a.workers)


def tasks(_: TasksArguments) -> None:
    """List the tasks."""
    table = Table("task", "what is asked", box=None)
    for name, line in TASKS.items():
        table.add_row(name, line)
    Console().print(table)
