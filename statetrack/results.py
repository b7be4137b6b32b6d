"""What `statetrack reproduce` found: cells with their seeds, as table and figure, beside the paper's numbers.

Results are read from the run directories of a folder, or from its results.jsonl where those are not there (the
repository keeps only the latter).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from statetrack.errors import UsageError
from statetrack.plots import accuracy_by_length, dots
from statetrack.runs import RESULT, first_line, read_json, write_atomically
from statetrack.train import Settings

RESULTS = "results.jsonl"


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


def stored(cell: Cell, folder: Path) -> list[dict[str, Any]]:
    """Return the results of a cell's seeds."""
    runs = sorted((folder / cell.name).glob(f"seed*/{RESULT}"))
    if runs:
        return [read_json(path) for path in runs]
    if not (folder / RESULTS).exists():
        return []
    try:
        rows = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
        return [row for row in rows if row["cell"] == cell.name]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / RESULTS} is not a list of results: {first_line(error)}") from None


def write_results(every: Sequence[Cell], folder: Path, command: str, quick: bool, figures: bool = True) -> list[Path]:
    """Write results.jsonl, table.md and the figure of what is stored; return the figure's files."""
    found = [(cell, stored(cell, folder)) for cell in every]
    rows = [json.dumps(row) for _, results in found for row in results]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULTS, lambda p: p.write_text("".join(row + "\n" for row in rows)))
    text = "\n".join(_markdown(every, folder, command, quick)) + "\n"
    write_atomically(folder / "table.md", lambda p: p.write_text(text))
    found = [(cell, results) for cell, results in found if results]
    if not figures or not found:
        return []
    curves = {
        cell.name: [[(t, share) for t, share in r["curve"]] for r in results]
        for cell, results in found
        if "curve" in results[0]
    }
    title = f"{folder.name}: {_title(quick)}"
    if curves:
        return accuracy_by_length(curves, folder / "figure", title=title, measure="sequence accuracy")
    values = {cell.name: [r[cell.measure] for r in results] for cell, results in found}
    paper = {cell.name: cell.best if cell.best is not None else cell.median for cell, _ in found}
    return dots(values, paper, folder / "figure", title=title, measure=found[0][0].measure.replace("_", " "))


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the mean (Student's t); NaN for a single value."""
    n = len(values)
    if n < 2:
        return math.nan
    return _t(n - 1) * statistics.stdev(values) / math.sqrt(n)


def _t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by bisection of its distribution function."""
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    log_c = torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * math.log(freedom * math.pi)

    def above_zero(t: float) -> float:  # probability of (0, t), by Simpson's rule
        x = torch.linspace(0.0, t, 2001, dtype=torch.float64)
        y = torch.exp(log_c - (half + 0.5) * torch.log1p(x * x / freedom))
        return float((y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * t / 6000)

    lo, hi = 0.0, 16.0
    for _ in range(50):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if above_zero(middle) < 0.475 else (lo, middle)
    return hi


def device_name(device: torch.device) -> str:
    """Return the name of the hardware."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


HEADER = (
    "cell",
    "measure",
    "seeds",
    "best",
    "median",
    "worst",
    "mean",
    "+- 95 %",
    "reaches",
    "paper's best",
    "paper's median",
    "paper says",
    "seconds",
)
ONLY_WRITTEN = ("measure", "mean", "+- 95 %", "seconds")
"""columns that a terminal has no room for"""


def _rows(every: Sequence[Cell], folder: Path) -> list[tuple[str, ...]]:
    rows = []
    for cell in every:
        results = stored(cell, folder)
        if not results:
            continue
        values = [result[cell.measure] for result in results]
        shown = [f"{v:.3f}" for v in (max(values), statistics.median(values), min(values), statistics.mean(values))]
        half = interval(values)
        shown.append("" if math.isnan(half) else f"{half:.3f}")
        paper = ["" if value is None else f"{value:.3f}" for value in (cell.best, cell.median)]
        length = f"{cell.length}" if isinstance(cell.length, int) else f"{cell.length[0]}..{cell.length[1]}"
        measure = f"{cell.measure.replace('_', ' ')} at {length}"
        seconds = f"{sum(result.get('seconds', 0.0) for result in results):.0f}"
        rows.append((cell.name, measure, str(len(results)), *shown, _reach(results), *paper, cell.says, seconds))
    return rows


def _reach(results: Sequence[dict[str, Any]]) -> str:
    """Return the longest length at which the best seed still has 90 % of the sequences right throughout."""
    curves = [result["curve"] for result in results if "curve" in result]
    if not curves:
        return ""
    return str(max(max((t for t, accuracy in curve if accuracy >= 0.9), default=0) for curve in curves))


def _title(quick: bool) -> str:
    return "quick settings, NOT the paper's: shorter training, smaller models" if quick else "the paper's settings"


def terminal_table(every: Sequence[Cell], folder: Path, quick: bool) -> Table:
    """Return the table for a terminal: names whole, the measure in the title, columns without a number left out."""
    rows: list[dict[str, str]] = [dict(zip(HEADER, row, strict=True)) for row in _rows(every, folder)]
    measures = ", ".join(sorted({row["measure"] for row in rows}))
    names = [name for name in HEADER if name not in ONLY_WRITTEN and any(row[name] for row in rows)]
    columns = [Column(name, no_wrap=name == "cell", overflow="fold") for name in names]
    table = Table(*columns, title=f"{measures}; {_title(quick)}", box=None, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _markdown(every: Sequence[Cell], folder: Path, command: str, quick: bool) -> list[str]:
    lines = [f"{_title(quick)[0].upper()}{_title(quick)[1:]}.", ""]
    if command:
        lines += [f"    {command}", ""]
    devices = sorted({row["device"] for cell in every for row in stored(cell, folder) if "device" in row})
    if devices:
        lines += [f"Trained on {'; '.join(devices)}; seconds are those of all seeds' training steps.", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in _rows(every, folder)]
