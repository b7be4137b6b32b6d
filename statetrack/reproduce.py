"""The papers' tables from one command: every cell a resumable run, our number beside the paper's."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from statetrack.errors import UsageError
from statetrack.evaluate import LONGEST_ATTENTION, at_precision, evaluate, shown_length
from statetrack.execution import check_execution
from statetrack.layers import AttentionConfig, DeltaProductConfig
from statetrack.model import Model
from statetrack.progress import Bars
from statetrack.results import Cell, Extent, device_name, stored, terminal_table, write_page, write_results
from statetrack.runs import RESULT, Run, commit, write_json
from statetrack.tasks import Task, get_task
from statetrack.train import Interrupted, choose_device, load_run, load_settings, train
from statetrack.workers import Tell, side_by_side

TABLES = {
    "p1-chomsky": "recipes.p1_chomsky",
    "p1-s5": "recipes.p1_s5",
    "p2-groups": "recipes.p2_groups",
    "p2-chomsky": "recipes.p2_chomsky",
    "families": "recipes.chomsky_families",
}

SOLVED = 0.9
"""from here on a cell is evaluated at its longer lengths, too"""

TOKENS = 1 << 22
"""of an evaluation at a longer length, at least 8 sequences of it"""


def reproduce(
    table: str,
    *,
    cells: Sequence[str],
    seeds: Sequence[int],
    extent: Extent,
    list_only: bool,
    device: str,
    out: Path,
    jobs: int = 1,
    minutes: float = math.inf,
    execution: str = "auto",
) -> None:
    """Run the chosen cells of a table that are not finished yet, `jobs` at a time; then print and write all that are.

    minutes: save and stop after so many; the same call goes on. execution: how a step is run (statetrack.execution).
    Writes results.jsonl, table.md and figures into out/TABLE, out/TABLE-quick or out/TABLE-N-steps.
    """
    every = extent.cells(import_module(TABLES[table]))
    chosen = [cell for cell in every if not cells or any(part in cell.name for part in cells)]
    if not chosen:
        raise UsageError(
            f"no cell's name contains {' or '.join(cells)}; statetrack reproduce {table} --list names them"
        )
    if not seeds:
        raise UsageError("name at least one seed")
    for seed in seeds:
        chosen[0].settings(seed).check()
    check_execution(execution)
    if jobs < 1 or not minutes > 0:
        raise UsageError(f"jobs must be at least 1 and minutes above 0, got {jobs} and {minutes:g}")
    console = Console(markup=False)
    if list_only:
        console.print(_list(chosen, seeds))
        return
    folder = out / extent.name(table)
    work = {
        f"{cell.name} seed {seed}": Job(cell, seed, folder / cell.name / f"seed{seed}", device, execution)
        for cell in chosen
        for seed in seeds
    }
    left = _run_all(work, jobs, time.monotonic() + 60 * minutes, every, folder, extent)
    figures = write_results(every, folder, extent.command(table), extent)
    console.print(terminal_table(every, folder, extent))
    files = [folder / "table.md", folder / "results.jsonl", *figures]
    console.print(", ".join(map(str, files)), highlight=False, soft_wrap=True)
    if left:
        console.print(
            f"time is up with {len(left)} of {len(work)} runs unfinished; the same command goes on with {left[0]}",
            highlight=False,
            soft_wrap=True,
        )


def page(table: str, source: Path, out: Path, *, extent: Extent) -> None:
    """Write out/TABLE.md with its figures and TABLE.jsonl from the results that `reproduce` left in `source`.

    source may also be such an `out` of before. Raises UsageError where it holds no results of the table.
    """
    module = import_module(TABLES[table])
    every = extent.cells(module)
    name = extent.name(table)
    folder = source / name
    stored_page = source / f"{name}.jsonl"
    rows = {cell.name: stored(cell, folder, stored_page) for cell in every}
    if not any(rows.values()):
        raise UsageError(
            f"{folder} holds no results of {table}; run {extent.command(table)} first, or name the --out it had"
        )
    files = write_page(every, rows, out, name, module.__doc__ or "", extent.command(table), extent)
    Console(markup=False).print(", ".join(map(str, files)), highlight=False, soft_wrap=True)


class Job(NamedTuple):
    """One cell with one seed."""

    cell: Cell
    seed: int
    path: Path
    device: str
    execution: str
    until: float = math.inf


def _run_all(
    work: Mapping[str, Job], jobs: int, until: float, every: Sequence[Cell], folder: Path, extent: Extent
) -> list[str]:
    """Run what is not finished until the deadline; return the names of the runs that are left."""
    work = {name: job._replace(until=until) for name, job in work.items()}
    left = dict.fromkeys(work)
    with Bars() as bars:
        for name, job in work.items():
            if _is_done(job):
                del left[name]
                bars.update(name, 1, 1, "done before")
        waiting = {name: work[name] for name in left}
        if jobs == 1:
            ended = ((name, _run(job, partial(bars.update, name))) for name, job in waiting.items())
        else:
            on_cpu = choose_device(next(iter(work.values())).device).type == "cpu"
            ended = side_by_side(waiting, _run, jobs, bars, threads=1 if on_cpu else None, until=until)
        for name, done in ended:
            if done:
                del left[name]
            write_results(every, folder, "", extent, figures=False)
    return list(left)


def _is_done(job: Job) -> bool:
    """Return whether a run has its result; raise UsageError if it is a result of other settings."""
    if not (job.path / RESULT).exists():
        return False
    free = {"device": job.device, "execution": job.execution}
    if replace(load_settings(job.path), **free) != replace(job.cell.settings(job.seed), **free):
        raise UsageError(f"{job.path} was made with other settings; choose another --out")
    return True


def _run(job: Job, tell: Tell) -> bool:
    """Train and evaluate one cell with one seed; return whether it is done now."""
    cell, path = job.cell, job.path
    settings = replace(cell.settings(job.seed), device=job.device, execution=job.execution)
    if time.monotonic() > job.until:
        return False

    def report(row: dict[str, Any]) -> None:
        note = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  {1 / row['seconds']:.1f} steps/s"
        tell(row["step"], settings.steps, note)

    try:
        train(settings, path, resume=True, report=report, until=job.until)
    except Interrupted as stop:
        if stop.signum:
            raise
        return False
    _, model = load_run(path, job.device)
    task = get_task(settings.task)
    result = evaluate(model, task, cell.length, sequences=cell.sequences, batch_size=max(1, min(256, cell.sequences)))
    if result[cell.measure] >= SOLVED:
        tell(settings.steps, settings.steps, "longer lengths")
        result["longer"] = _longer(model, task, cell)
    logged = [row["seconds"] for row in Run(path).metrics()]
    cost = {"steps": settings.steps, "seconds": settings.steps * sum(logged) / len(logged)}
    where = {"device": device_name(next(model.parameters()).device), "commit": commit()}
    write_json(path / RESULT, {"cell": cell.name, "seed": job.seed, **result, **cost, **where})
    tell(settings.steps, settings.steps, f"{cell.measure} {result[cell.measure]:.3f}")
    return True


def _longer(model: Model, task: Task, cell: Cell) -> list[dict[str, Any]]:
    """Evaluate at the cell's longer lengths; on a GPU the delta rule with precision="fast", too."""
    models = {"tracking": model}
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu and any(isinstance(mixer, DeltaProductConfig) for mixer in model.config.mixers):
        models["fast"] = at_precision(model, "fast")
    attends = any(isinstance(mixer, AttentionConfig) for mixer in model.config.mixers)
    return [
        {"precision": name, **evaluate(each, task, length, sequences=max(8, min(512, TOKENS // length)))}
        for length in cell.longer
        if not (attends and length > LONGEST_ATTENTION)
        for name, each in models.items()
    ]


def _list(chosen: Sequence[Cell], seeds: Sequence[int]) -> Table:
    names = ("layers", "steps", "batch", "1e9 tokens", "length")
    table = Table(Column("cell", no_wrap=True), *names, box=None, title="in the order they run; tokens of all seeds")
    for cell in chosen:
        s = cell.settings(seeds[0])
        tokens = s.steps * s.batch_size * get_task(s.task).tokens(s.train_length) * len(seeds) / 1e9
        counts = (len(s.model.mixers), s.steps, s.batch_size)
        table.add_row(cell.name, *map(str, counts), f"{tokens:.3g}", shown_length(cell.length))
    return table
