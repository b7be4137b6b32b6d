"""Verbs about what models can do: measuring runs, the papers' tables; their arguments, and what they do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from statetrack.cli_types import Device, Execution, RunPaths, Unset
from statetrack.errors import UsageError

if TYPE_CHECKING:
    from statetrack.evaluate import Length
    from statetrack.progress import Bars


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """statetrack evaluate runs/RUN --lengths 40..256 1000 1000000

    Measure accuracy at given lengths, streaming in constant memory; adds to evaluation.json in the run directory.
    """

    runs: RunPaths
    """run directories"""
    lengths: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LENGTH ...")] = ("40", "64", "128", "256", "40..256")
    """lengths; 40..256 draws each sequence's length from that range"""
    sequences: Unset[int | None] = None
    """sequences per length; default 1024, fewer for lengths above 16384, 8192 for ranges"""
    batch_size: int = 256
    """sequences at once"""
    seed: int = 1_000_003
    """of the sequences"""
    device: Device = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    precision: Literal["tracking", "fast"] = "tracking"
    """fast: the delta rule's GPU kernels round what they multiply, as other libraries' do, to see what that costs"""


@dataclass(frozen=True, kw_only=True)
class ReproduceArguments:
    """statetrack reproduce p1-chomsky --quick

    Run the cells of a paper's table and print our numbers beside the paper's. Cells resume; finished ones are kept.
    """

    table: tyro.conf.Positional[Literal["p1-chomsky", "p1-s5", "p2-groups", "p2-chomsky", "families"]]
    """p1: arXiv 2411.12537 (Table 3, Figure 4); p2: arXiv 2502.10297 (Figure 5, Table 2);
    families: every layer on parity and modular arithmetic"""
    cells: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """names, or parts of names, of the cells to run; default all"""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED ...")] = (0, 1, 2)
    """one run per cell and seed"""
    quick: bool = False
    """a small setting of ours, minutes instead of hours; the table says so"""
    steps: Unset[int | None] = None
    """train for so many steps in place of the recipe's, warm-up and cosine with them; the table says so"""
    list: bool = False
    """print the cells and their cost, run nothing"""
    jobs: int = 1
    """runs at the same time, each in a process of its own; small models leave room on a GPU for several"""
    minutes: float = math.inf
    """save and stop after so many minutes; the same command goes on"""
    from_results: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """train nothing; write TABLE.md, its figures and TABLE.jsonl from what an earlier call left in DIR (its --out)"""
    device: Device = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    execution: Execution = "auto"
    """how a training step is run; auto: as one CUDA graph on a GPU, eager elsewhere"""
    out: Unset[Path | None] = None
    """where the runs and tables go, default runs/reproduce; with --from-results the page, default docs/results"""


def evaluate(a: EvaluateArguments) -> None:
    """Evaluate runs, print a table and keep the numbers in each run's evaluation.json."""
    from rich.console import Console
    from rich.table import Column, Table

    from statetrack.evaluate import check_length, parse_lengths, shown_length
    from statetrack.progress import Bars
    from statetrack.tasks import get_task
    from statetrack.train import load_settings

    lengths = parse_lengths(a.lengths)
    if not a.runs or not lengths:
        raise UsageError("name at least one run directory and one length")
    for path in a.runs:
        settings = load_settings(path)
        for length in lengths:
            check_length(settings.model, get_task(settings.task), length)
    table = Table(Column("run", overflow="fold"), "length", "sequences", "accuracy", "scaled", "whole sequence right")
    with Bars() as bars:
        for path in a.runs:
            for row in _evaluate_run(path, lengths, a, bars):
                shown = [f"{row[key]:.4f}" if key in row else "" for key in MEASURES]
                table.add_row(path.name, shown_length(row["length"]), str(row["sequences"]), *shown)
    Console(markup=False).print(table)


MEASURES = ("accuracy", "scaled_accuracy", "sequence_accuracy")


def _evaluate_run(path: Path, lengths: list[Length], a: EvaluateArguments, bars: Bars) -> Iterator[dict[str, Any]]:
    """Yield the numbers at every length; each is kept in evaluation.json as soon as it is there."""
    from statetrack.evaluate import at_precision, shown_length
    from statetrack.evaluate import evaluate as measure
    from statetrack.runs import EVALUATION, WEIGHTS, write_json
    from statetrack.tasks import get_task
    from statetrack.train import load_run

    settings, model = load_run(path, a.device)
    if a.precision != "tracking":
        model = at_precision(model, a.precision)
    if not (path / WEIGHTS).exists():
        bars.console.print(f"{path} is not trained to its end: this is its last checkpoint", soft_wrap=True)
    kept = {(shown_length(row["length"]), row.get("precision", "tracking")): row for row in evaluations(path)}
    for length in lengths:
        name = f"{path.name} at {shown_length(length)}"
        row = measure(
            model,
            get_task(settings.task),
            length,
            sequences=_sequences(length) if a.sequences is None else a.sequences,
            batch_size=a.batch_size,
            seed=a.seed,
            report=lambda share, name=name: bars.update(name, 100 * share, 100, "%"),
        )
        if a.precision != "tracking":
            row["precision"] = a.precision
        kept[shown_length(length), a.precision] = row
        write_json(path / EVALUATION, list(kept.values()))
        yield row


def evaluations(path: Path) -> list[dict[str, Any]]:
    """Return what earlier evaluations of a run found."""
    from statetrack.runs import EVALUATION, read_json

    stored = path / EVALUATION
    rows = read_json(stored) if stored.exists() else []
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and {"length", "scaled_accuracy"} <= r.keys() for r in rows
    ):
        raise UsageError(f"{stored} is not an evaluation; delete it and evaluate the run again")
    return rows


def _sequences(length: int | tuple[int, int]) -> int:
    if isinstance(length, tuple):
        return 8192
    return max(8, min(1024, (1 << 24) // max(1, length)))


def reproduce(a: ReproduceArguments) -> None:
    """Run the cells of a table, or write the page of what is stored."""
    from statetrack.reproduce import page
    from statetrack.reproduce import reproduce as run_table
    from statetrack.results import Extent

    extent = Extent(a.quick, a.steps)
    if a.from_results is not None:
        page(a.table, a.from_results, a.out or Path("docs/results"), extent=extent)
        return
    options = {"jobs": a.jobs, "minutes": a.minutes, "execution": a.execution, "out": a.out or Path("runs/reproduce")}
    run_table(a.table, cells=a.cells, seeds=a.seeds, extent=extent, list_only=a.list, device=a.device, **options)
