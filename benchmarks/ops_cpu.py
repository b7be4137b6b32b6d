"""Our CPU ops beside the peers', in one run: speed, memory, linearity, the range's cost, and tracking.

    make bench-cpu
    .bench-venv/bin/python benchmarks/ops_cpu.py --only delta tracking
    BACKEND=chunk .bench-venv/bin/python benchmarks/ops_cpu.py --only delta scan     # without the extra `cpu`

Every comparison first checks that the implementations agree. Times are medians, the implementations taking turns in one
process; a "forward" keeps nothing for a backward, a "both" gives the gradient of every input. Memory is how far forward
and backward raise the peak resident size above that with the inputs made and the code warm, each implementation in a
process of its own. A call over SLOW seconds is timed fewer times, at least once. The backward of mamba-ssm's reference
takes time quadratic in T: from QUADRATIC tokens it runs once, in a process that is stopped after LIMIT seconds, and
that limit is then a lower bound on its time. The figures per token (linearity) are of memory that the process keeps
between the calls, at every length.

The results go to benchmarks/results/ops_cpu.md and .json. Needs Linux and about ten quiet minutes on two cores.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from cpu_peers import (
    BACKEND,
    INPUTS,
    across_keys,
    both,
    delta_inputs,
    delta_rule_ours,
    forward,
    implementations,
    machine,
    scan_inputs,
    selective_scan_ours,
)
from tables import Rows, table
from torch import Tensor

from statetrack.layers import DeltaProductConfig, MambaConfig
from statetrack.ops import delta_rule
from statetrack.runs import write_atomically, write_json

ROOT = Path(__file__).parent.parent
DELTA = [(4, 2048, 4, 64), (1, 4096, 8, 128), (128, 40, 4, 16)]  # B, T, H, K = V
SCAN = [(8, 2048, 256, 16), (64, 40, 256, 16), (8, 256, 256, 16)]  # B, T, D, M
HEADS = [(1, 2048, 4, 64), (16, 64, 4, 64)]  # B, T, H, K = V, of gated linear attention and of dplr
QUADRATIC = 1024  # tokens; below, mamba-ssm's backward is timed as the others are
SLOW, LIMIT = 4, 60  # seconds
LINEAR = [2048, 8192, 32768, 131072]
QUICK = {"delta": [(1, 256, 2, 32), (8, 40, 4, 16)], "scan": [(1, 128, 32, 8), (8, 40, 32, 8)]}
QUICK |= {"gla": [(1, 128, 2, 16)], "dplr": [(1, 128, 2, 16)]}
KEEP_MEMORY = [(-4, 0), (-1, 2**31 - 1)]  # glibc's M_MMAP_MAX and M_TRIM_THRESHOLD: else over 32 MiB it asks anew
LEAST_SECONDS = 0.1  # of one measurement


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return each call's milliseconds in every round; the order turns round from one to the next."""
    once = {}
    for name, call in calls.items():
        for _ in range(2):  # the first call warms up, and is enough of a slow one
            began = time.perf_counter()
            call()
            once[name] = time.perf_counter() - began
            if once[name] > SLOW:
                break
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            if i * once[name] > SLOW * rounds / 2:
                continue
            repeats = max(1, round(LEAST_SECONDS / once[name]))
            began = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            times[name].append(1e3 * (time.perf_counter() - began) / repeats)
    return times


def disagreement(got: Tensor, want: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


def compare(op: str, shape: tuple[int, ...], archives: Path, rounds: int) -> Rows:
    """Time all implementations of an op on one shape and measure their memory."""
    x = INPUTS[op](*shape)
    found = implementations(op, archives)
    quadratic = {"mamba-ssm"} if shape[1] >= QUADRATIC else set()
    want_o, want_grads = both(found["statetrack"], x)
    rows = {}
    for name, f in found.items():
        worst = disagreement(forward(f, x), want_o)
        if name not in quadratic:
            grads = both(f, x)[1]
            grads = across_keys(x, grads) if op == "delta" else grads
            worst = max([worst, *map(disagreement, grads, want_grads)])
        if not worst < 1e-3:
            raise SystemExit(f"{op} {shape}: {name} differs from ours by {worst:.1e}; nothing to compare")
        rows[name] = {"implementation": name, "differs by": worst}
    del want_o, want_grads
    times = take_turns({name: partial(forward, f, x) for name, f in found.items()}, rounds)
    with_grads = {name: f for name, f in found.items() if name not in quadratic}
    times_both = take_turns({name: partial(both, f, x) for name, f in with_grads.items()}, rounds)
    for name, row in rows.items():
        row["forward ms"] = median(times[name])
        seconds, row["memory MiB"] = memory(op, shape, name, archives)
        row["both ms"] = median(times_both[name]) if name in times_both else 1e3 * (seconds or LIMIT)
        if seconds is None:
            row["note"] = f"both: stopped after {LIMIT} s, so slower than that"
    size = sum(t.nbytes for t in x.values())
    output = x["u" if op == "scan" else "v"].nbytes
    ours, *others = rows.values()
    ours["memory over inputs+outputs+gradients"] = (ours["memory MiB"] * 2**20 + size) / (2 * size + output)
    for row in others:
        row |= {f"{what}: ours faster by": row[f"{what} ms"] / ours[f"{what} ms"] for what in ("forward", "both")}
    return list(rows.values())


def memory(op: str, shape: tuple[int, ...], name: str, archives: Path) -> tuple[float | None, float | None]:
    """Return the seconds of one forward and backward in a fresh process, and by how many MiB it raises the peak."""
    child = _child("--memory-of", op, name, *map(str, shape), "--peers", str(archives))
    return (None, None) if child is None else (child[0], child[1])


def _child(*arguments: str) -> list[float] | None:
    """Return the numbers that this script prints in a process of its own, or None if its time was up."""
    child = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if child.returncode == -signal.SIGALRM:
        return None
    if child.returncode:
        raise SystemExit(child.stderr)
    return [float(number) for number in child.stdout.split()]


def memory_here(op: str, name: str, shape: tuple[int, ...], archives: Path) -> tuple[float, float]:
    """Warm up on a small input, then measure one call in this process."""
    make, f = INPUTS[op], implementations(op, archives)[name]
    both(f, make(1, 32, *shape[2:]))  # of the same width: our kernels are compiled for it
    x = make(*shape)
    signal.alarm(LIMIT)
    return raised(partial(both, f, x))[:2]


def raised(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the seconds of a call, by how many MiB it raises this process's peak, and its result.

    VmHWM can be reset and belongs to this process; ru_maxrss cannot, and starts at what the parent had.
    """
    ctypes.CDLL(None).malloc_trim(0)  # hand back what making the inputs freed, or the call would reuse it unseen
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, (_status("VmHWM") - before) / 1024, result


def _status(key: str) -> int:
    """Return a field of /proc/self/status in KiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def linearity(rounds: int, quick: bool) -> Rows:
    """Time ours at growing lengths, in microseconds per token; comes last, for the process keeps its memory then."""
    assert all(ctypes.CDLL(None).mallopt(*option) for option in KEEP_MEMORY)
    rows = []
    for T in LINEAR[: 2 if quick else None]:
        say(f"linear: T = {T}")
        row: dict[str, Any] = {"T": T}
        for f, x in ((delta_rule_ours, delta_inputs(1, T, 4, 64)), (selective_scan_ours, scan_inputs(1, T, 256, 16))):
            op = f.__name__.removesuffix("_ours")
            for what, run in (("forward", forward), ("both", both)):
                ms = median(take_turns({"ours": partial(run, f, x)}, rounds)["ours"])
                row[f"{op} {what} us/token"] = 1e3 * ms / T
        rows.append(row)
    return rows


def ranges(rounds: int, quick: bool) -> Rows:
    """Time eigenvalues in [-1, 1] against [0, 1]: ops and layers, forward and backward, taking turns."""
    d, s = delta_inputs(4, 256 if quick else 2048, 4, 64), scan_inputs(2, 128 if quick else 2048, 256, 16)
    half = {**d, "beta": (d["beta"] / 2).detach().requires_grad_()}
    x = torch.randn(8, 64 if quick else 512, 128)

    def layer(config: DeltaProductConfig | MambaConfig) -> Callable[[], Any]:
        mixer = config.build()
        return lambda: mixer(x)[0].sum().backward()

    def scan(eigenvalues: tuple[float, float]) -> Callable[[], Any]:
        return partial(both, partial(selective_scan_ours, eigenvalues), s)

    pairs = {
        "delta_rule": (partial(both, delta_rule_ours, d), partial(both, delta_rule_ours, half)),
        "selective_scan": (scan((-1.0, 1.0)), scan((0.0, 1.0))),
        "DeltaProduct layer": tuple(
            layer(DeltaProductConfig(dim=128, heads=4, eigenvalues=e)) for e in ((-1.0, 1.0), (0.0, 1.0))
        ),
        "Mamba layer": tuple(layer(MambaConfig(dim=128, eigenvalues=e)) for e in ((-1.0, 1.0), (0.0, 1.0))),
    }
    rows = []
    for name, (signed, unsigned) in pairs.items():
        say(f"ranges: {name}")
        signed()  # compiles, for seconds
        unsigned()
        times = take_turns({"[-1,1]": signed, "[0,1]": unsigned}, 6 * rounds)
        ratio = median(a / b for a, b in zip(times["[-1,1]"], times["[0,1]"], strict=True))
        medians = {f"{key} ms": median(values) for key, values in times.items()}
        rows.append({"what": name, **medians, "extra %": 100 * (ratio - 1)})
    return rows


def tracking(quick: bool) -> Rows:
    """Measure the state's error after reflections along 8 directions (beta = 2), one write at the start."""
    bounds = {
        "bfloat16": {4096: 1e-3, 65_536: 4e-3, 1_048_576: 1e-1},
        "float32": {4096: 3e-4, 65_536: 2e-3, 1_048_576: 1e-1},
    }
    rows = []
    for dtype, of in bounds.items():
        for T, bound in list(of.items())[: 1 if quick else None]:
            say(f"tracking: T = {T}, {dtype}")
            found = _child("--tracking-of", dtype, str(T))
            assert found is not None
            row = {"keys": dtype, "T": T, "error": found[0], "bound": bound, "seconds": found[1]}
            rows.append(row | {"raises the peak by MiB": found[2], "peak MiB": found[3]})
    return rows


def tracking_here(dtype: torch.dtype, T: int) -> tuple[float, ...]:
    """Return the state's error (the worse of 2 heads), the seconds, the peak's MiB above the inputs and in all."""
    g = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(8, 2, 64, generator=g), dim=-1).to(dtype)
    k = directions[torch.randint(0, 8, (1, T, 1), generator=g)]
    v = torch.zeros(1, T, 1, 2, 64, dtype=dtype)
    v[:, 0] = torch.randn(1, 1, 2, 64, generator=g).to(dtype)
    q = F.normalize(torch.randn(1, T, 2, 64, generator=g), dim=-1).to(dtype)
    x: dict[str, Any] = {"q": q, "k": k, "v": v, "beta": torch.full((1, T, 1, 2), 2.0)}
    seconds, mib, (_, state) = raised(lambda: delta_rule(**x, backend=BACKEND))
    peak, exact = _status("VmHWM") / 1024, None
    for start in range(0, T, 65_536):  # in float64 the chunks equal the definition to 1e-10 (tests/test_tracking.py)
        part: dict[str, Any] = {name: t[:, start : start + 65_536].double() for name, t in x.items()}
        exact = delta_rule(**part, initial_state=exact, backend="chunk")[1]
    assert exact is not None
    error = (state - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    return error.max().item(), seconds, mib, peak


Asked = tuple[str, float, str, float]  # what, measured, "at least" or "at most", bound


def verdicts(results: dict[str, Rows]) -> Rows:
    """Compare the figures with what was asked of them."""
    asked: list[Asked] = []
    for title, rows in results.items():
        if title == "linearity":
            for key in list(rows[0])[1:]:
                grown = rows[-1][key] / rows[0][key]
                asked.append((f"{key}, {rows[-1]['T']} over {rows[0]['T']} tokens", grown, "at most", 1.2))
        elif title == "ranges":
            asked += [(f"{row['what']}, % extra for [-1,1]", row["extra %"], "at most", 2.0) for row in rows]
        elif title == "tracking":
            asked += [(f"error, {row['keys']}, T = {row['T']}", row["error"], "at most", row["bound"]) for row in rows]
        else:
            asked += _asked_of_peers(title, rows)
    return [
        {
            "asked": what, "measured": value, "": f"{word} {bound:g}",
            "reached": "yes" if (value >= bound if word == "at least" else value <= bound) else "NO",
        }
        for what, value, word, bound in asked
    ]  # fmt: skip


def _asked_of_peers(title: str, rows: Rows) -> list[Asked]:
    ours, *peers = rows
    asked: list[Asked] = []
    for row in peers:
        name = row["implementation"]
        least = (1.5, 3.0) if title.startswith("delta") else (2.0, 2.0) if name == "mambapy" else (3.0, 3.0)
        for what, bound in zip(("forward", "both"), least, strict=True):
            ratio = row[f"{what}: ours faster by"]
            stopped = " (stopped: a lower bound)" if what == "both" and "note" in row else ""
            asked.append((f"{title}, {what}, times faster than {name}{stopped}", ratio, "at least", bound))
        if row["memory MiB"] is not None:
            share = ours["memory MiB"] / row["memory MiB"]
            asked.append((f"{title}, memory over {name}'s", share, "at most", 1.0))
    value = ours["memory over inputs+outputs+gradients"]
    return [*asked, (f"{title}, memory over inputs+outputs+gradients", value, "at most", 2.0)]


def main() -> None:
    """Measure what was asked for and write the report."""
    a = arguments()
    if a.memory_of:
        op, name, *shape = a.memory_of
        print(*memory_here(op, name, tuple(map(int, shape)), a.peers))
    elif a.tracking_of:
        dtype, T = a.tracking_of
        print(*tracking_here(getattr(torch, dtype), int(T)))
    else:
        where = machine(a.peers)
        report(a, where, measure(a))


def measure(a: argparse.Namespace) -> dict[str, Rows]:
    """Return every part that was asked for."""
    results: dict[str, Rows] = {}
    for op, title, shapes in (
        ("delta", "delta_rule B,T,H,K=V", DELTA),
        ("scan", "selective_scan B,T,D,M", SCAN),
        ("gla", "gated_linear_attention B,T,H,K=V", HEADS),
        ("dplr", "dplr B,T,H,K=V", HEADS),
    ):
        for shape in (QUICK[op] if a.quick else shapes) if op in a.only else []:
            say(f"{title} = {shape}")
            results[f"{title} = {shape}"] = compare(op, shape, a.peers, a.rounds)
    if "ranges" in a.only:
        results["ranges"] = ranges(a.rounds, a.quick)
    if "tracking" in a.only:
        results["tracking"] = tracking(a.quick)
    if "linear" in a.only:
        results["linearity"] = linearity(a.rounds, a.quick)
    return results


def report(a: argparse.Namespace, where: str, results: dict[str, Rows]) -> None:
    """Print the tables, and write them where that was asked for."""
    asked = verdicts(results)
    how = next(part for part in (__doc__ or "").split("\n\n") if part.startswith("Every"))
    for name, value in (("SLOW", SLOW), ("QUADRATIC", QUADRATIC), ("LIMIT", LIMIT)):
        how = how.replace(name, str(value))
    if a.quick:
        how += "\n\nSmall shapes: only shows that all runs; what was asked is asked of large ones."
    text = [f"# CPU ops beside their peers\n\n    {a.command}\n\n{where}\n\n{how}\n"]
    text += [table("Asked and measured", asked)] + [table(title, rows) for title, rows in results.items()]
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(a.out.with_suffix(".md"), lambda p: p.write_text("\n".join(text)))
        write_json(a.out.with_suffix(".json"), {"run": where, "command": a.command, "asked": asked, "results": results})
    print("\n".join(text))
    missed = sum(row["reached"] == "NO" for row in asked)
    say(f"{len(asked) - missed} of {len(asked)} reached" + (f"; {a.out}.md and .json" if a.out else ""))


def arguments() -> argparse.Namespace:
    """Read the command line; only a full run writes to benchmarks/results by itself."""
    parts = ("delta", "scan", "gla", "dplr", "linear", "ranges", "tracking")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, not how fast")
    parser.add_argument("--rounds", type=int, default=7, help="times that everything is timed (default 7)")
    parser.add_argument("--peers", type=Path, default=ROOT / ".bench-venv/peers", help="archives of the peers")
    parser.add_argument("--out", type=Path, help="without suffix; default benchmarks/results/ops_cpu for a full run")
    parser.add_argument("--memory-of", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--tracking-of", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {a.rounds}")
    full = not a.quick and set(a.only) == set(parts) and "BACKEND" not in os.environ
    if full and a.out is None:
        a.out = ROOT / "benchmarks/results/ops_cpu"
    words = (["--only", *a.only] if set(a.only) != set(parts) else []) + (["--quick"] if a.quick else [])
    chosen = [f"BACKEND={BACKEND}"] if "BACKEND" in os.environ else []
    a.command = "make bench-cpu" if full else " ".join([*chosen, "python benchmarks/ops_cpu.py", *words])
    return a


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
