"""Our CPU ops beside the peers', in one run: speed, memory, linearity, the range's cost, and tracking.

    make bench-cpu
    .bench-venv/bin/python benchmarks/ops_cpu.py --only delta tracking

Every comparison first checks that the implementations agree. Times are medians, the implementations taking turns in one
process; a "forward" keeps nothing for a backward, a "both" gives the gradient of every input. Memory is the growth of
the process's peak over forward and backward, each implementation in a process of its own. The results go to
benchmarks/results/ops_cpu.md and .json. Needs Linux and about ten quiet minutes on two cores.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from cpu_peers import Op, delta_peers, scan_peers
from torch import Tensor

from statetrack.layers import DeltaProductConfig, MambaConfig
from statetrack.ops import delta_rule, selective_scan
from statetrack.runs import write_atomically, write_json

ROOT = Path(__file__).parent.parent
DELTA = [(4, 2048, 4, 64), (1, 4096, 8, 128), (128, 40, 4, 16)]  # B, T, H, K = V
SCAN = [(8, 2048, 256, 16), (64, 40, 256, 16), (8, 512, 256, 16)]  # B, T, D, M
QUADRATIC = 1024  # tokens from which mamba-ssm's reference is not asked for gradients: its backward takes T^2
LINEAR = [2048, 8192, 32768, 131072]
LEAST_SECONDS = 0.1  # of one measurement

Rows = list[dict[str, Any]]


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


# --- inputs and implementations ---------------------------------------------------------------------------------------


def delta_inputs(B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    """Draw unit queries and keys, normal values, beta in [0, 2] and a decay near 1, all asking for gradients."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((B, T, H, K), (B, T, 1, H, K), (B, T, 1, H, K)))
    x = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v}
    x |= {"beta": 2 * torch.rand(B, T, 1, H, generator=g), "log_decay": -0.05 * torch.rand(B, T, H, generator=g)}
    return {name: t.requires_grad_() for name, t in x.items()}


def scan_inputs(B: int, T: int, D: int, M: int) -> dict[str, Tensor]:
    """Draw the arguments of a selective scan with Mamba's A = -(1..M)."""
    g = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=g)
    x = {"u": normal(B, T, D), "dt": F.softplus(normal(B, T, D) - 4), "A": -torch.arange(1.0, M + 1).repeat(D, 1)}
    x |= {"B": normal(B, T, M), "C": normal(B, T, M), "D": normal(D)}
    return {name: t.requires_grad_() for name, t in x.items()}


def implementations(op: str, archives: Path) -> dict[str, Op]:
    """Return ours first, then the peers."""
    if op == "delta":
        return {"statetrack": lambda **x: delta_rule(**x, backend="chunk")[0], **delta_peers(archives)}
    return {
        "statetrack": lambda **x: selective_scan(**x, eigenvalues=(0.0, 1.0), backend="chunk")[0],
        **scan_peers(archives),
    }


def forward(f: Op, x: dict[str, Tensor]) -> Tensor:
    """Run without keeping anything for a backward."""
    with torch.no_grad():
        return f(**x)


def both(f: Op, x: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output and the gradients of its sum of squares."""
    o = f(**x)
    return o, torch.autograd.grad(o, list(x.values()), o.detach())


# --- measuring --------------------------------------------------------------------------------------------------------


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return each call's milliseconds in every round."""
    repeats = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        repeats[name] = max(1, round(LEAST_SECONDS / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append(1e3 * (time.perf_counter() - began) / repeats[name])
    return times


def disagreement(got: Tensor, want: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


def compare(op: str, shape: tuple[int, ...], archives: Path, rounds: int) -> Rows:
    """Time all implementations of an op on one shape and measure their memory."""
    x = (delta_inputs if op == "delta" else scan_inputs)(*shape)
    found = implementations(op, archives)
    quadratic = {"mamba-ssm"} if shape[1] >= QUADRATIC else set()
    want_o, want_grads = both(found["statetrack"], x)
    rows = {}
    for name, f in found.items():
        worst = disagreement(forward(f, x), want_o)
        if name not in quadratic:
            worst = max([worst, *map(disagreement, both(f, x)[1], want_grads)])
        if not worst < 1e-3:
            raise SystemExit(f"{op} {shape}: {name} differs from ours by {worst:.1e}; nothing to compare")
        rows[name] = {"implementation": name, "differs by": worst}
    del want_o, want_grads
    times = take_turns({name: partial(forward, f, x) for name, f in found.items()}, rounds)
    with_grads = {name: f for name, f in found.items() if name not in quadratic}
    times_both = take_turns({name: partial(both, f, x) for name, f in with_grads.items()}, rounds)
    for name, row in rows.items():
        row["forward ms"] = median(times[name])
        row["both ms"] = median(times_both[name]) if name in times_both else None
        row["memory MiB"] = memory(op, shape, name, archives) if name not in quadratic else None
    size = sum(t.nbytes for t in x.values())
    output = x["v"].nbytes if op == "delta" else x["u"].nbytes
    needed = 2 * size + output
    rows["statetrack"]["memory over inputs+outputs+gradients"] = (
        rows["statetrack"]["memory MiB"] * 2**20 + size
    ) / needed
    for name, row in rows.items():
        if name != "statetrack":
            row["forward: ours faster by"] = row["forward ms"] / rows["statetrack"]["forward ms"]
            row["both: ours faster by"] = row["both ms"] and row["both ms"] / rows["statetrack"]["both ms"]
    return list(rows.values())


def memory(op: str, shape: tuple[int, ...], name: str, archives: Path) -> float:
    """Return how far forward and backward raise the peak of a fresh process, in MiB."""
    arguments = ["--peers", str(archives), "--memory-of", op, name, *map(str, shape)]
    child = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(child.stderr)
    return float(child.stdout)


def memory_here(op: str, name: str, shape: tuple[int, ...], archives: Path) -> float:
    """Measure in this process: warm up on a small input, then reset the peak and run once."""
    make, f = delta_inputs if op == "delta" else scan_inputs, implementations(op, archives)[name]
    both(f, make(1, 16, 2, 8))
    x = make(*shape)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = both(f, x)
    peak = _status("VmHWM")
    del result
    return (peak - before) / 1024


def _status(key: str) -> int:
    """Return a field of /proc/self/status in KiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def linearity(rounds: int) -> Rows:
    """Time ours at growing lengths, in microseconds per token."""
    rows = []
    for T in LINEAR:
        say(f"linear: T = {T}")
        row: dict[str, Any] = {"T": T}
        for op, x in (("delta_rule", delta_inputs(1, T, 4, 64)), ("selective_scan", scan_inputs(1, T, 256, 16))):
            f = implementations_of_ours()[op]
            for what, run in (("forward", forward), ("both", both)):
                ms = median(take_turns({"ours": partial(run, f, x)}, rounds)["ours"])
                row[f"{op} {what} us/token"] = 1e3 * ms / T
        rows.append(row)
    return rows


def implementations_of_ours() -> dict[str, Op]:
    """Return our two ops by name."""
    return {
        "delta_rule": lambda **x: delta_rule(**x, backend="chunk")[0],
        "selective_scan": lambda **x: selective_scan(**x, eigenvalues=(-1.0, 1.0), backend="chunk")[0],
    }


def ranges(rounds: int) -> Rows:
    """Time eigenvalues in [-1, 1] against [0, 1]: ops and layers, forward and backward, taking turns."""
    d, s = delta_inputs(4, 2048, 4, 64), scan_inputs(8, 2048, 256, 16)
    half = {**d, "beta": (d["beta"] / 2).detach().requires_grad_()}
    x = torch.randn(8, 1024, 128)

    def layer(config: DeltaProductConfig | MambaConfig) -> Callable[[], Any]:
        mixer = config.build()
        return lambda: mixer(x)[0].sum().backward()

    def scan(eigenvalues: tuple[float, float]) -> Callable[[], Any]:
        return partial(both, lambda **s: selective_scan(**s, eigenvalues=eigenvalues, backend="chunk")[0], s)

    delta = implementations_of_ours()["delta_rule"]
    pairs = {
        "delta_rule": (partial(both, delta, d), partial(both, delta, half)),
        "selective_scan": (scan((-1.0, 1.0)), scan((0.0, 1.0))),
        "DeltaProduct layer": tuple(
            layer(DeltaProductConfig(dim=128, heads=4, eigenvalues=e)) for e in ((-1.0, 1.0), (0.0, 1.0))
        ),
        "Mamba layer": tuple(layer(MambaConfig(dim=128, eigenvalues=e)) for e in ((-1.0, 1.0), (0.0, 1.0))),
    }
    rows = []
    for name, (signed, unsigned) in pairs.items():
        say(f"ranges: {name}")
        times = take_turns({"[-1,1]": signed, "[0,1]": unsigned}, 4 * rounds)
        ratio = median(a / b for a, b in zip(times["[-1,1]"], times["[0,1]"], strict=True))
        medians = {f"{key} ms": median(values) for key, values in times.items()}
        rows.append({"what": name, **medians, "extra %": 100 * (ratio - 1)})
    return rows


def tracking() -> Rows:
    """Measure the state's error after reflections along 8 directions (beta = 2), one write at the start."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for T, bound in ((4096, 1e-3), (65_536, 4e-3), (1_048_576, 1e-1)):
            say(f"tracking: T = {T}, {dtype}")
            g = torch.Generator().manual_seed(0)
            directions = F.normalize(torch.randn(8, 64, generator=g), dim=-1).to(dtype)
            k = directions[torch.randint(0, 8, (1, T, 1, 1), generator=g)]
            q, v = torch.zeros(1, T, 1, 64, dtype=dtype), torch.zeros(1, T, 1, 1, 64, dtype=dtype)
            v[0, 0] = torch.randn(64, generator=g).to(dtype)
            x: dict[str, Any] = {"q": q, "k": k, "v": v, "beta": torch.full((1, T, 1, 1), 2.0)}
            began = time.perf_counter()
            state = delta_rule(**x, backend="chunk")[1]
            seconds = time.perf_counter() - began
            exact = delta_rule(**{n: t.double() for n, t in x.items()}, backend="chunk")[1]  # the definition to 1e-10: tests
            error = ((state - exact).norm() / exact.norm()).item()
            if dtype == torch.float32 and T < 1_000_000:
                bound = {4096: 3e-4, 65_536: 2e-3}[T]
            rows.append(
                {"keys": str(dtype).removeprefix("torch."), "T": T, "error": error, "bound": bound, "seconds": seconds}
            )
    return rows


# --- what was asked, and the report -----------------------------------------------------------------------------------


Asked = tuple[str, float, str, float]  # what, measured, "at least" or "at most", bound


def verdicts(results: dict[str, Rows]) -> Rows:
    """Compare the figures with what was asked of them."""
    asked: list[Asked] = []
    for title, rows in results.items():
        if title == "linearity":
            for key in list(rows[0])[1:]:
                grown = rows[-1][key] / rows[0][key]
                asked.append((f"{key}, {LINEAR[-1]} over {LINEAR[0]} tokens", grown, "at most", 1.2))
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
        least = (1.5, 3.0) if title.startswith("delta") else (3.0, 3.0) if name == "mamba-ssm" else (2.0, 2.0)
        for what, bound in zip(("forward", "both"), least, strict=True):
            ratio = row[f"{what}: ours faster by"]
            if ratio is not None:
                asked.append((f"{title}, {what}, times faster than {name}", ratio, "at least", bound))
        if row["memory MiB"] is not None:
            share = ours["memory MiB"] / row["memory MiB"]
            asked.append((f"{title}, memory over {name}'s", share, "at most", 1.0))
    value = ours["memory over inputs+outputs+gradients"]
    return [*asked, (f"{title}, memory over inputs+outputs+gradients", value, "at most", 2.0)]


def show(value: Any) -> str:
    """Format a cell."""
    if value is None:
        return "-"
    return str(value) if not isinstance(value, float) else f"{value:.1e}" if 0 < value < 1e-2 else f"{value:.3g}"


def table(title: str, rows: Rows) -> str:
    """Format rows as a markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"## {title}", "", f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
    return "\n".join(lines + [f"| {' | '.join(show(row.get(key, '')) for key in keys)} |" for row in rows]) + "\n"


def machine() -> str:
    """Return what was measured on."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = found[1] if found else platform.processor()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}"


def main() -> None:
    """Measure what was asked for and write the report."""
    parts = ("delta", "scan", "linear", "ranges", "tracking")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--rounds", type=int, default=7, help="times that everything is timed (default 7)")
    parser.add_argument("--peers", type=Path, default=ROOT / ".bench-venv/peers", help="archives of the peers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ops_cpu", help="without suffix")
    parser.add_argument("--memory-of", nargs="+", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.memory_of:
        op, name, *shape = a.memory_of
        print(memory_here(op, name, tuple(map(int, shape)), a.peers))
        return
    results: dict[str, Rows] = {}
    for op, title, shapes in (("delta", "delta_rule B,T,H,K=V", DELTA), ("scan", "selective_scan B,T,D,M", SCAN)):
        for shape in shapes if op in a.only else []:
            say(f"{title} = {shape}")
            results[f"{title} = {shape}"] = compare(op, shape, a.peers, a.rounds)
    for name, title, measure in (
        ("linear", "linearity", partial(linearity, a.rounds)),
        ("ranges", "ranges", partial(ranges, a.rounds)),
        ("tracking", "tracking", tracking),
    ):
        if name in a.only:
            results[title] = measure()
    asked = verdicts(results)
    text = [
        f"# CPU ops beside their peers\n\n    make bench-cpu\n\n{machine()}\n",
        (__doc__ or "").split("\n\n")[2] + "\n",
    ]
    text += [table("Asked and measured", asked)] + [table(title, rows) for title, rows in results.items()]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(a.out.with_suffix(".md"), lambda p: p.write_text("\n".join(text)))
    write_json(a.out.with_suffix(".json"), {"machine": machine(), "asked": asked, "results": results})
    print("\n".join(text))
    missed = sum(row["reached"] == "NO" for row in asked)
    say(f"{len(asked) - missed} of {len(asked)} reached; {a.out}.md and .json")


if __name__ == "__main__":
    main()
