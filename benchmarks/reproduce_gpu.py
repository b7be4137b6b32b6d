"""Steps per second of the task trainer: op by op, compiled, as a CUDA graph; one run, and several on one device.

    python benchmarks/reproduce_gpu.py --out FILE.md [--cells parity S5] [--executions eager graph] [--runs 1 4]
    python benchmarks/reproduce_gpu.py --profile --executions eager [--cells parity]
    python benchmarks/reproduce_gpu.py --device cpu --quick --executions eager compile --runs 1 2 --seconds 3

The runs of a row are processes of their own (statetrack/workers.py) that begin to count together, once each has taken
its first steps; what is counted is every step, drawing its batch included, and what was learned is not kept. Seconds to
begin are those of the first steps: kernels compiled, the graph recorded. Memory is the largest of one run's process.
--profile counts nothing: it lists where the time of ten steps of one run goes, on the device and on the CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tables import Rows, table

from recipes import p1_chomsky, p2_groups
from statetrack.errors import UsageError
from statetrack.execution import EXECUTIONS
from statetrack.progress import Bars
from statetrack.results import Cell, device_name
from statetrack.train import Trainer, choose_device
from statetrack.workers import Tell, side_by_side

CELLS = {  # a cell of P1's Table 3, and of P2's Figure 5
    "parity": (p1_chomsky, "parity-deltanet_-1to1"),
    "mamba": (p1_chomsky, "parity-mamba_-1to1"),
    "S5": (p2_groups, "S5-N4_-1to1"),
}
AT_ONCE = 10
"""steps between two looks at the clock"""


class Job(NamedTuple):
    """One of several runs that count at the same time."""

    cell: Cell
    number: int
    runs: int
    device: str
    execution: str
    seconds: float
    meeting: Path


def count_steps(job: Job, tell: Tell) -> dict[str, float]:
    """Train for some seconds together with the others; return steps per second, seconds to begin, MiB."""
    began = time.perf_counter()
    trainer = Trainer(replace(job.cell.settings(job.number), device=job.device, execution=job.execution))
    trainer.train_steps(AT_ONCE)
    first = time.perf_counter() - began
    tell(0, job.runs, f"{job.execution}: {first:.1f} s to begin")
    (job.meeting / str(job.number)).touch()
    while len(list(job.meeting.iterdir())) < job.runs:
        time.sleep(0.01)
    taken, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < job.seconds:
        trainer.train_steps(AT_ONCE)
        taken += AT_ONCE
    memory = torch.cuda.max_memory_allocated() / 2**20 if trainer.device.type == "cuda" else 0.0
    return {"steps/s": taken / passed, "begin": first, "MiB": memory}


def profile(a: argparse.Namespace, name: str, execution: str) -> str:
    """Return tables of the kernels and of the CPU's operations that take most of AT_ONCE steps' time."""
    from torch.profiler import ProfilerActivity as Activity
    from torch.profiler import profile as recording

    trainer = Trainer(replace(cell_of(a, name).settings(0), device=a.device, execution=execution))
    trainer.train_steps(AT_ONCE)
    gpu = trainer.device.type == "cuda"
    with recording(activities=[Activity.CPU, *([Activity.CUDA] if gpu else [])]) as recorded:
        began = time.perf_counter()
        trainer.train_steps(AT_ONCE)
        passed = (time.perf_counter() - began) / AT_ONCE * 1e3
    texts = []
    for where, time_of in (("device", "self_device_time_total"), ("CPU", "self_cpu_time_total")):
        events = sorted(recorded.key_averages(), key=lambda e: -getattr(e, time_of))[:20]
        rows: Rows = [
            {where: e.key[:70], "calls a step": e.count / AT_ONCE, "ms a step": getattr(e, time_of) / 1e3 / AT_ONCE}
            for e in events
            if getattr(e, time_of) > 0
        ]
        texts.append(table(f"{name}, {execution}: {where}, {passed:.1f} ms a step while recorded", rows))
    return "\n".join(texts[0 if gpu else 1 :])


def cell_of(a: argparse.Namespace, name: str) -> Cell:
    """Return a cell of CELLS."""
    module, cell_name = CELLS[name]
    return next(cell for cell in module.cells(a.quick) if cell.name == cell_name)


def measure(a: argparse.Namespace, name: str) -> Rows:
    """Return a row for each way to run a step and each number of runs."""
    cell = cell_of(a, name)
    rows: Rows = []
    for execution in a.executions:
        for runs in a.runs:
            with tempfile.TemporaryDirectory() as meeting, Bars() as bars:
                settings = (cell, runs, a.device, execution, a.seconds, Path(meeting))
                jobs = {f"{name} {i}": Job(settings[0], i, *settings[1:]) for i in range(runs)}
                try:
                    found = [result for _, result in side_by_side(jobs, count_steps, runs, bars)]
                except UsageError as error:
                    rows.append({"execution": execution, "runs": runs, "note": str(error)})
                    continue
            total = sum(result["steps/s"] for result in found)
            before = next((row["steps/s in all"] for row in rows if "note" not in row), total)
            rows.append(
                {
                    "execution": execution,
                    "runs": runs,
                    "steps/s in all": total,
                    "steps/s of one": total / runs,
                    "times the first row": total / before,
                    "s to begin": max(result["begin"] for result in found),
                    "MiB of one": max(result["MiB"] for result in found) or None,
                }
            )
            print(table(f"{cell.name}, so far", rows), flush=True)
    return rows


def main() -> None:
    """Print the tables, and write them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=["parity", "S5"])
    ways = ["eager", "compile", "graph", "compile+graph"]
    parser.add_argument("--executions", nargs="+", choices=EXECUTIONS[1:], default=ways)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4, 8], help="runs side by side")
    parser.add_argument("--seconds", type=float, default=5.0, help="to count for, per row")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the recipes' quick settings")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, instead of counting")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    where = f"{device_name(choose_device(a.device))}, torch {torch.__version__}"
    pages = [f"# Steps per second of the task trainer ({where})\n"]
    for name in a.cells:
        if a.profile:
            pages += [profile(a, name, execution) for execution in a.executions]
        else:
            pages.append(table(f"{CELLS[name][1]}{', quick settings' if a.quick else ''}", measure(a, name)))
        if a.out:
            a.out.write_text("\n".join(pages))
    print("\n".join(pages))


if __name__ == "__main__":
    main()
