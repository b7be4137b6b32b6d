"""The demo: parity needs a negative eigenvalue. Four small models, two at a time, in about a minute.

DeltaNet and Mamba, each with the eigenvalues of its transition in [0, 1] and in [-1, 1], are trained on lengths 3 to 40
and asked at lengths 40 to 256 (Grazzi et al., arXiv 2411.12537, Figure 1 and Table 3).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recipes.demo import EVALUATED, demo_settings
from statetrack.errors import UsageError
from statetrack.evaluate import evaluate
from statetrack.plots import accuracy_by_length
from statetrack.progress import Bars
from statetrack.runs import write_json
from statetrack.tasks import get_task
from statetrack.train import Settings, train
from statetrack.workers import Tell, side_by_side

LENGTHS = (3, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256)
MIXERS = ("deltanet", "mamba")
RANGES = {"[-1,1]": (-1.0, 1.0), "[0,1]": (0.0, 1.0)}
FOLDERS = {"[-1,1]": "-1to1", "[0,1]": "0to1"}  # brackets mean something to a shell

Job = tuple[str, str]  # mixer and range


def demo(
    out: Path,
    seed: int,
    workers: int,
    recipe: Callable[[str, tuple[float, float], int], Settings] = demo_settings,
    sequences: int = 4096,
) -> dict[str, dict[str, Any]]:
    """Train and evaluate the four models; write parity.png and summary.json into `out`; return the summary.

    `out` belongs to the demo: what an earlier demo left there is replaced. `recipe` gives a model's run from its mixer,
    range and seed; `sequences` are asked for the table, an eighth of them for each point of the picture.
    """
    if workers < 1 or sequences < 8:
        raise UsageError(f"workers must be at least 1 and sequences at least 8, got {workers} and {sequences}")
    if out.exists() and any(out.iterdir()) and not (out / ".demo").exists():
        raise UsageError(f"{out} is not empty and not an earlier demo's; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".demo").touch()
    began = time.perf_counter()
    jobs = {(mixer, name): recipe(mixer, RANGES[name], seed) for name in RANGES for mixer in MIXERS}
    results = _run_all(jobs, out, workers, sequences)
    summary = {m: {r: {"scaled_accuracy": results[m, r]["scaled_accuracy"]} for r in RANGES} for m in MIXERS}
    write_json(out / "summary.json", summary)
    titles = {"deltanet": "DeltaNet", "mamba": "Mamba"}
    curves = {f"{titles[m]} {r}": [results[m, r]["curve"]] for m in MIXERS for r in RANGES}
    train_length = next(iter(jobs.values())).train_length
    accuracy_by_length(curves, out / "parity", title="Parity, by range of eigenvalues", trained=train_length)
    _print(results, Console(markup=False), time.perf_counter() - began, out)
    return summary


def _run_all(jobs: dict[Job, Settings], out: Path, workers: int, sequences: int) -> dict[Job, dict[str, Any]]:
    """Run every job in its own process, `workers` at a time."""
    names = {" ".join(job): job for job in jobs}
    work = {name: (jobs[job], out / f"{job[0]}_{FOLDERS[job[1]]}", sequences) for name, job in names.items()}
    with Bars() as bars:
        for name, (settings, *_) in work.items():
            bars.update(name, 0, settings.steps, "waiting")
        return {names[name]: result for name, result in side_by_side(work, _work, workers, bars)}


def _work(job: tuple[Settings, Path, int], tell: Tell) -> dict[str, Any]:
    """Train and evaluate one model."""
    settings, path, sequences = job

    def report(row: dict[str, Any]) -> None:
        if row["step"] % 5 == 0 or row["step"] == settings.steps:
            tell(row["step"], settings.steps, f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.2f}")

    model = train(settings, path, report=report).eval()
    task = get_task(settings.task)
    result = evaluate(model, task, EVALUATED, sequences=sequences, batch_size=512)
    points = [evaluate(model, task, n, sequences=sequences // 8, batch_size=512) for n in LENGTHS]
    result["curve"] = [(p["length"], p["scaled_accuracy"]) for p in points]
    return result


def _print(results: dict[Job, dict[str, Any]], console: Console, seconds: float, out: Path) -> None:
    table = Table(title="Parity: scaled accuracy on lengths 40 to 256 (0 is guessing, 1 is perfect)")
    table.add_column("mixer")
    for name in RANGES:
        table.add_column(f"eigenvalues in {name}", justify="right")
    for mixer in MIXERS:
        table.add_row(mixer, *(f"{results[mixer, name]['scaled_accuracy']:.3f}" for name in RANGES))
    console.print(table)
    console.print(f"{seconds:.0f} s; the picture is {out / 'parity.png'}, the numbers are in {out / 'summary.json'}")
