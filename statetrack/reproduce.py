"""The papers' tables from one command: every cell a resumable run, our number beside the paper's."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from statetrack.errors import UsageError
from statetrack.evaluate import evaluate
from statetrack.progress import Bars
from statetrack.runs import RESULT, read_json, write_atomically, write_json
from statetrack.tasks import get_task
from statetrack.train import Settings, load_run, load_settings, train

TABLES = {"p1-chomsky": "recipes.p1_chomsky", "p1-s5": "recipes.p1_s5", "p2-groups": "recipes.p2_groups"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a paper's table: how to train it, where to evaluate it, and what the paper reports."""

    name: str
    settings: Callable[[int], Settings]
    """the run for a seed"""
    length: int | tuple[int, int]
    """length of evaluation"""
    measure: str
    """which number of the evaluation the table shows"""
    sequences: int
    best: float | None = None
    """the paper's best seed"""
    median: float | None = None
    """the paper's median seed"""
    says: str = ""
    """what the paper says where it gives no number"""


def reproduce(
    table: str,
    *,
    cells: Sequence[str],
    seeds: Sequence[int],
    quick: bool,
    list_only: bool,
    device: str,
    out: Path,
) -> None:
    """Run the chosen cells of a table that are not finished yet, then print and write all that are.

    Writes results.jsonl and table.md into out/TABLE (out/TABLE-quick for quick runs).
    """
    every: list[Cell] = import_module(TABLES[table]).cells(quick)
    chosen = [cell for cell in every if not cells or any(part in cell.name for part in cells)]
    if not chosen:
        raise UsageError(
            f"no cell's name contains {' or '.join(cells)}; statetrack reproduce {table} --list names them"
        )
    if not seeds:
        raise UsageError("name at least one seed")
    console = Console(markup=False)
    if list_only:
        console.print(_list(chosen, seeds))
        return
    folder = out / (f"{table}-quick" if quick else table)
    with Bars() as bars:
        for cell in chosen:
            for seed in seeds:
                _run(cell, seed, folder / cell.name / f"seed{seed}", device, bars)
                _write_results(every, folder, quick)
    console.print(_table(every, folder, quick))
    console.print(f"{folder / 'table.md'}, {folder / 'results.jsonl'}", highlight=False, soft_wrap=True)


def _run(cell: Cell, seed: int, path: Path, device: str, bars: Bars) -> None:
    """Train and evaluate one cell with one seed, unless that is done already."""
    settings = replace(cell.settings(seed), device=device)
    name = f"{cell.name} seed {seed}"
    if (path / RESULT).exists():
        stored = load_settings(path)
        if replace(stored, device=device) != settings:
            raise UsageError(f"{path} was made with other settings; choose another --out")
        bars.update(name, settings.steps, settings.steps, "done before")
        return

    def report(row: dict[str, Any]) -> None:
        note = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  {1 / row['seconds']:.1f} steps/s"
        bars.update(name, row["step"], settings.steps, note)

    train(settings, path, resume=True, report=report)
    _, model = load_run(path, device)
    batch = max(1, min(256, cell.sequences))
    result = evaluate(model, get_task(settings.task), cell.length, sequences=cell.sequences, batch_size=batch)
    write_json(path / RESULT, {"cell": cell.name, "seed": seed, **result})
    bars.update(name, settings.steps, settings.steps, f"{cell.measure} {result[cell.measure]:.3f}")


def _results(cell: Cell, folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((folder / cell.name).glob(f"seed*/{RESULT}"))]


def _write_results(every: Sequence[Cell], folder: Path, quick: bool) -> None:
    rows = [json.dumps(row) for cell in every for row in _results(cell, folder)]
    write_atomically(folder / "results.jsonl", lambda p: p.write_text("".join(row + "\n" for row in rows)))
    text = "\n".join(_markdown(every, folder, quick)) + "\n"
    write_atomically(folder / "table.md", lambda p: p.write_text(text))


HEADER = (
    "cell",
    "measure",
    "seeds",
    "best",
    "median",
    "worst",
    "reaches",
    "paper's best",
    "paper's median",
    "paper says",
)


def _rows(every: Sequence[Cell], folder: Path) -> list[tuple[str, ...]]:
    rows = []
    for cell in every:
        results = _results(cell, folder)
        if not results:
            continue
        values = [result[cell.measure] for result in results]
        shown = [f"{value:.3f}" for value in (max(values), statistics.median(values), min(values))]
        paper = ["" if value is None else f"{value:.3f}" for value in (cell.best, cell.median)]
        length = f"{cell.length}" if isinstance(cell.length, int) else f"{cell.length[0]}..{cell.length[1]}"
        measure = f"{cell.measure.replace('_', ' ')} at {length}"
        rows.append((cell.name, measure, str(len(results)), *shown, _reach(results), *paper, cell.says))
    return rows


def _reach(results: Sequence[dict[str, Any]]) -> str:
    """Return the longest length at which the best seed still has 90 % of the sequences right throughout."""
    curves = [result["curve"] for result in results if "curve" in result]
    if not curves:
        return ""
    return str(max(max((t for t, accuracy in curve if accuracy >= 0.9), default=0) for curve in curves))


def _title(quick: bool) -> str:
    return "quick settings, NOT the paper's: shorter training, smaller models" if quick else "the paper's settings"


def _table(every: Sequence[Cell], folder: Path, quick: bool) -> Table:
    """Return the table for a terminal: names whole, columns without a number left out, the measure in the title."""
    rows: list[dict[str, str]] = [dict(zip(HEADER, row, strict=True)) for row in _rows(every, folder)]
    measures = ", ".join(sorted({row["measure"] for row in rows}))
    names = [name for name in HEADER if name != "measure" and any(row[name] for row in rows)]
    columns = [Column(name, no_wrap=name == "cell", overflow="fold") for name in names]
    table = Table(*columns, title=f"{measures}; {_title(quick)}", box=None, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _markdown(every: Sequence[Cell], folder: Path, quick: bool) -> list[str]:
    lines = [
        f"{_title(quick)[0].upper()}{_title(quick)[1:]}.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|---" * len(HEADER) + "|",
    ]
    return lines + [f"| {' | '.join(row)} |" for row in _rows(every, folder)]


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
