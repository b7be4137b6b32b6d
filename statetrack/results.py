"""What `statetrack reproduce` found: cells with their seeds, as table and figure, beside the paper's numbers.

Results are read from the run directories of a folder, or from its results.jsonl where those are not there (the
repository keeps only the latter).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Column, Table

from statetrack.errors import UsageError
from statetrack.evaluate import shown_length
from statetrack.plots import accuracy_by_length, dots
from statetrack.runs import RESULT, first_line, read_json, write_atomically
from statetrack.train import Settings

RESULTS = "results.jsonl"


class Extent(NamedTuple):
    """How much of a paper's training the runs of a table take."""

    quick: bool = False
    """small settings of ours"""
    steps: int | None = None
    """in place of the recipe's; warm-up and cosine shrink with them"""

    def cells(self, recipe: Any) -> list[Cell]:
        """Return the cells of a module of `recipes`."""
        every: list[Cell] = recipe.cells(self.quick)
        if self.steps is None:
            return every
        return [replace(cell, settings=partial(_with_steps, cell.settings, self.steps)) for cell in every]

    @property
    def title(self) -> str:
        """What a table says of its runs."""
        text = "the paper's settings"
        if self.quick:
            text = "quick settings, NOT the paper's: shorter training, smaller models"
        return text if self.steps is None else f"{text}, but for {self.steps:,} steps of training"

    def name(self, table: str) -> str:
        """Return the name of a table's folder and page."""
        return f"{table}{'-quick' if self.quick else ''}{'' if self.steps is None else f'-{self.steps}-steps'}"

    def command(self, table: str) -> str:
        """Return the command that makes a table."""
        steps = "" if self.steps is None else f" --steps {self.steps}"
        return f"statetrack reproduce {table}{' --quick' if self.quick else ''}{steps}"


def _with_steps(settings: Callable[[int], Settings], steps: int, seed: int) -> Settings:
    return replace(settings(seed), steps=steps)


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
    longer: tuple[int, ...] = ()
    """lengths at which a cell that solves its task is evaluated, too"""


def stored(cell: Cell, folder: Path, page: Path | None = None) -> list[dict[str, Any]]:
    """Return the results of a cell's seeds: of its runs, else of the folder's results.jsonl, else of a page's."""
    runs = sorted((folder / cell.name).glob(f"seed*/{RESULT}"))
    if runs:
        return [read_json(path) for path in runs]
    for path in (folder / RESULTS, page):
        if path is not None and path.exists():
            try:
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                return [row for row in rows if row["cell"] == cell.name]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path} is not a list of results: {first_line(error)}") from None
    return []


Found = dict[str, list[dict[str, Any]]]
"""a cell's name: the results of its seeds"""


def write_results(
    every: Sequence[Cell], folder: Path, command: str, extent: Extent, figures: bool = True
) -> list[Path]:
    """Write results.jsonl, table.md and the figures of what is stored; return the figures' files."""
    found = {cell.name: stored(cell, folder) for cell in every}
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / RESULTS, found)
    text = "\n".join(_markdown(every, found, command, extent)) + "\n"
    write_atomically(folder / "table.md", lambda p: p.write_text(text))
    return draw(every, found, folder / "figure", f"{folder.name}: {extent.title}") if figures else []


def write_page(
    every: Sequence[Cell], found: Found, out: Path, name: str, recipe: str, command: str, extent: Extent
) -> list[Path]:
    """Write the page of a table: what is asked, how it was run, numbers beside the paper's, figures; return the files.

    recipe: the recipe's description, settings and deviations. NAME.notes.md in `out`, written by hand, becomes a
    section of the page.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(every, found, out / name, f"{name}: {extent.title}")
    lines = [f"# {name}", "", *_markdown(every, found, command, extent), ""]
    lines += [line for path in figures if path.suffix == ".png" for line in (f"![{path.stem}]({path.name})", "")]
    behind = [cell.name for cell in every if _behind(cell, found[cell.name])]
    if behind:
        lines += [f"Our best seed is more than {BEHIND} below the paper's best in: {', '.join(behind)}.", ""]
    notes = out / f"{name}.notes.md"
    if notes.exists():
        lines += ["## Notes", "", notes.read_text().strip(), ""]
    missing = [cell.name for cell in every if not found[cell.name]]
    if missing:
        lines += [f"Not run: {', '.join(missing)}.", ""]
    lines += ["## The paper's settings, and where the full recipe differs", "", recipe.strip(), ""]
    again = f"{command} --from-results {DIRECTORY}"
    lines += [f"Every run is a line of [{name}.jsonl]({name}.jsonl); `{again}` writes this page from it."]
    page, rows = out / f"{name}.md", out / f"{name}.jsonl"
    _write_rows(rows, found)
    write_atomically(page, lambda p: p.write_text("\n".join(lines) + "\n"))
    return [page, rows, *figures]


BEHIND = 0.05
"""how far our best seed must be below the paper's for the page to say so"""

DIRECTORY = "docs/results"
"""where pages are kept"""


def _behind(cell: Cell, results: Sequence[dict[str, Any]]) -> bool:
    return bool(results) and cell.best is not None and max(r[cell.measure] for r in results) < cell.best - BEHIND


def _write_rows(path: Path, found: Found) -> None:
    text = "".join(json.dumps(row) + "\n" for results in found.values() for row in results)
    write_atomically(path, lambda p: p.write_text(text))


def draw(every: Sequence[Cell], found: Found, path: Path, title: str) -> list[Path]:
    """Draw what was found: accuracy by length, a figure per task, or a line of dots per cell; return the files."""
    shown = [cell for cell in every if found[cell.name]]
    by_task: dict[str, list[Cell]] = {}
    for cell in shown:
        if "curve" in found[cell.name][0]:
            by_task.setdefault(cell.settings(0).task, []).append(cell)
    files: list[Path] = []
    for task, cells in by_task.items():
        curves = {cell.name: [[(t, share) for t, share in r["curve"]] for r in found[cell.name]] for cell in cells}
        name = path if len(by_task) == 1 else path.with_name(f"{path.name}-{task}")
        files += accuracy_by_length(curves, name, title=f"{task}, {title}", measure="sequence accuracy")
    dotted = [cell for cell in shown if "curve" not in found[cell.name][0]]
    if dotted:
        values = {cell.name: [r[cell.measure] for r in found[cell.name]] for cell in dotted}
        paper = {cell.name: cell.best if cell.best is not None else cell.median for cell in dotted}
        files += dots(values, paper, path, title=title, measure=dotted[0].measure.replace("_", " "))
    return files


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


def _rows(every: Sequence[Cell], found: Found) -> list[tuple[str, ...]]:
    rows = []
    for cell in every:
        results = found[cell.name]
        if not results:
            continue
        values = [result[cell.measure] for result in results]
        shown = [f"{v:.3f}" for v in (max(values), statistics.median(values), min(values), statistics.mean(values))]
        half = interval(values)
        shown.append("" if math.isnan(half) else f"{half:.3f}")
        paper = ["" if value is None else f"{value:.3f}" for value in (cell.best, cell.median)]
        measure = f"{cell.measure.replace('_', ' ')} at {shown_length(cell.length)}"
        seconds = f"{sum(result.get('seconds', 0.0) for result in results):.0f}"
        rows.append((cell.name, measure, str(len(results)), *shown, _reach(results), *paper, cell.says, seconds))
    return rows


def _reach(results: Sequence[dict[str, Any]]) -> str:
    """Return the longest length at which the best seed still has 90 % of the sequences right throughout."""
    curves = [result["curve"] for result in results if "curve" in result]
    if not curves:
        return ""
    return str(max(max((t for t, accuracy in curve if accuracy >= 0.9), default=0) for curve in curves))


def terminal_table(every: Sequence[Cell], folder: Path, extent: Extent) -> Table:
    """Return the table for a terminal: names whole, the measure in the title, columns without a number left out."""
    found = {cell.name: stored(cell, folder) for cell in every}
    rows: list[dict[str, str]] = [dict(zip(HEADER, row, strict=True)) for row in _rows(every, found)]
    measures = ", ".join(sorted({row["measure"] for row in rows}))
    names = [name for name in HEADER if name not in ONLY_WRITTEN and any(row[name] for row in rows)]
    columns = [Column(name, no_wrap=name == "cell", overflow="fold") for name in names]
    table = Table(*columns, title=f"{measures}; {extent.title}", box=None, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _markdown(every: Sequence[Cell], found: Found, command: str, extent: Extent) -> list[str]:
    lines = [f"{extent.title[0].upper()}{extent.title[1:]}.", ""]
    if command:
        lines += [f"    {command}", ""]
    results = [row for rows in found.values() for row in rows]
    devices = sorted({row["device"] for row in results if "device" in row})
    if devices:
        commits = sorted({row["commit"][:7] for row in results if row.get("commit")})
        at = f" at commit {', '.join(commits)}" if commits else ""
        lines += [f"Trained on {'; '.join(devices)}{at}; seconds are those of all seeds' training steps.", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(every, found)]
    return lines + _longer(every, found)


def _longer(every: Sequence[Cell], found: Found) -> list[str]:
    """Return the table of cells evaluated at longer lengths: the best and worst of the seeds that solve the task."""
    lines = []
    for cell in every:
        values: dict[tuple[int, str], list[float]] = {}
        for row in (row for result in found[cell.name] for row in result.get("longer", ())):
            values.setdefault((row["length"], row["precision"]), []).append(row[cell.measure])
        lines += [
            f"| {cell.name} | {length} | {precision} | {len(v)} | {max(v):.3f} | {min(v):.3f} |"
            for (length, precision), v in values.items()
        ]
    if not lines:
        return []
    title = "Seeds that solve their task, at longer lengths (precision: of the delta rule's kernels):"
    return ["", title, "", "| cell | length | precision | seeds | best | worst |", "|---" * 6 + "|", *lines]
