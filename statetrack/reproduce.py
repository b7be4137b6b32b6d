"""The papers' tables from one command: every cell a resumable run, our number beside the paper's."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from statetrack.errors import UsageError
from statetrack.evaluate import evaluate
from statetrack.progress import Bars
from statetrack.results import Cell, device_name, stored, terminal_table, write_results
from statetrack.runs import RESULT, Run, commit, write_json
from statetrack.tasks import get_task
from statetrack.train import Interrupted, choose_device, load_run, load_settings, train
from statetrack.workers import Tell, side_by_side

TABLES = {"p1-chomsky": "recipes.p1_chomsky", "p1-s5": "recipes.p1_s5", "p2-groups": "recipes.p2_groups"}


def reproduce(
    table: str,
    *,
    cells: Sequence[str],
    seeds: Sequence[int],
    quick: bool,
    list_only: bool,
    device: str,
    out: Path,
    jobs: int = 1,
    minutes: float = math.inf,
    from_results: bool = False,
) -> None:
    """Run the chosen cells of a table that are not finished yet, `jobs` at a time; then print and write all that are.

    minutes: save and stop after so many; the same call goes on. from_results: run nothing, only draw what is stored.
    Writes results.jsonl, table.md, figure.png and figure.svg into out/TABLE (out/TABLE-quick for quick runs).
    """
    every: list[Cell] = import_module(TABLES[table]).cells(quick)
    chosen = [cell for cell in every if not cells or any(part in cell.name for part in cells)]
    if not chosen:
        raise UsageError(
            f"no cell's name contains {' or '.join(cells)}; statetrack reproduce {table} --list names them"
        )
    if not seeds:
        raise UsageError("name at least one seed")
    if jobs < 1 or not minutes > 0:
        raise UsageError(f"jobs must be at least 1 and minutes above 0, got {jobs} and {minutes:g}")
    console = Console(markup=False)
    if list_only:
        console.print(_list(chosen, seeds))
        return
    folder = out / (f"{table}-quick" if quick else table)
    command = f"statetrack reproduce {table}{' --quick' if quick else ''}"
    left = 0
    if from_results:
        if not any(stored(cell, folder) for cell in every):
            raise UsageError(
                f"{folder} holds no results of {table}; run {command} first, or name their folder with --out"
            )
    else:
        left = _run_all(chosen, seeds, folder, device, jobs, time.monotonic() + 60 * minutes, every, quick)
    figures = write_results(every, folder, command, quick)
    console.print(terminal_table(every, folder, quick))
    files = [folder / "table.md", folder / "results.jsonl", *figures]
    console.print(", ".join(map(str, files)), highlight=False, soft_wrap=True)
    if left:
        console.print(f"time is up with {left} of {len(chosen) * len(seeds)} runs unfinished; the same command goes on")


Job = tuple[Cell, int, Path, str, float]  # cell, seed, run directory, device, deadline


def _run_all(
    chosen: Sequence[Cell],
    seeds: Sequence[int],
    folder: Path,
    device: str,
    jobs: int,
    until: float,
    every: Sequence[Cell],
    quick: bool,
) -> int:
    """Run what is not finished until the deadline; return how many runs are left."""
    work = {
        f"{cell.name} seed {seed}": (cell, seed, folder / cell.name / f"seed{seed}", device, until)
        for cell in chosen
        for seed in seeds
    }
    left = 0
    with Bars() as bars:
        if jobs == 1:
            ended = ((name, _run(job, partial(bars.update, name))) for name, job in work.items())
        else:
            ended = side_by_side(work, _run, jobs, bars, threads=1 if choose_device(device).type == "cpu" else None)
        for _, done in ended:
            left += not done
            write_results(every, folder, "", quick, figures=False)
    return left


def _run(job: Job, tell: Tell) -> bool:
    """Train and evaluate one cell with one seed, unless that is done already; return whether it is done now."""
    cell, seed, path, device, until = job
    settings = replace(cell.settings(seed), device=device)
    if (path / RESULT).exists():
        known = load_settings(path)
        if replace(known, device=device) != settings:
            raise UsageError(f"{path} was made with other settings; choose another --out")
        tell(settings.steps, settings.steps, "done before")
        return True
    if time.monotonic() > until:
        return False

    def report(row: dict[str, Any]) -> None:
        note = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  {1 / row['seconds']:.1f} steps/s"
        tell(row["step"], settings.steps, note)

    try:
        train(settings, path, resume=True, report=report, until=until)
    except Interrupted as stop:
        if stop.signum:
            raise
        return False
    _, model = load_run(path, device)
    batch = max(1, min(256, cell.sequences))
    result = evaluate(model, get_task(settings.task), cell.length, sequences=cell.sequences, batch_size=batch)
    logged = [row["seconds"] for row in Run(path).metrics()]
    cost = {"steps": settings.steps, "seconds": settings.steps * sum(logged) / len(logged)}
    where = {"device": device_name(next(model.parameters()).device), "commit": commit()}
    write_json(path / RESULT, {"cell": cell.name, "seed": seed, **result, **cost, **where})
    tell(settings.steps, settings.steps, f"{cell.measure} {result[cell.measure]:.3f}")
    return True


def _list(chosen: Sequence[Cell], seeds: Sequence[int]) -> Table:
    table = Table(
        Column("cell", no_wrap=True),
        "task",
        "layers",
        "steps",
        "batch",
        "tokens in all (1e9)",
        "evaluated at",
        box=None,
    )
    for cell in chosen:
        s = cell.settings(seeds[0])
        tokens = s.steps * s.batch_size * get_task(s.task).tokens(s.train_length) * len(seeds) / 1e9
        table.add_row(
            cell.name,
            s.task,
            str(len(s.model.mixers)),
            str(s.steps),
            str(s.batch_size),
            f"{tokens:.3g}",
            str(cell.length),
        )
    return table
