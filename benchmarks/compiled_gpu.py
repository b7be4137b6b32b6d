"""Compiled automata in parallel over tokens, beside one CPU core that steps the automaton's table; answers compared.

    python benchmarks/compiled_gpu.py --out DIR
    python benchmarks/compiled_gpu.py --device cpu --tokens 65536 --threads 1
    python benchmarks/compiled_gpu.py --only parity --set ROWS=8192 --profile
    python benchmarks/compiled_gpu.py --only "32 random states" --tokens 65536 --batches 1 64

One sequence of 2^24 random letters, and the same letters as batches of 64 and 1024 sequences. The network answers with
the automaton's state after every token: one text is cut into segments that run side by side (compiler/segments.py),
a batch of more than 16 is not. The tokens are int64 and lie on the device; "with copies" begins with bytes in the CPU's
memory and ends with the states there.

The table is stepped by one core: a loop compiled by Numba over bytes, one addition and one look-up a letter, one
sequence after the other, or eight side by side where there are several; "stepped by" says which was faster. Without
Numba it is Automaton.run. The states that it writes are bytes or 16-bit numbers.

Times are the shortest of five by the clock, taken in turns. Other processes on the machine make them longer. Results:
a table per automaton, DIR/compiled_DEVICE_DATE.md.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import Rows, table
from torch import Tensor

from statetrack import CompiledAutomaton, compile
from statetrack.automata import Automaton
from statetrack.compiler import network, segments
from statetrack.compiler.compiled import DTYPES

RANDOM = Automaton(np.random.default_rng(0).integers(0, 40, (40, 2)), accepting=frozenset(range(0, 40, 2)))
AUTOMATA: dict[str, tuple[str | Automaton, str, str]] = {  # what is compiled, its alphabet, the letters drawn ("": all)
    "parity": ("(0*10*1)*0*", "01", ""),
    "S5": ("group:S5_swaps", "bytes", ""),
    "5th last is a": ("[ab]*a[ab]{4}", "ab", ""),
    "a date in a text": (r"contains:\d{4}-\d{2}-\d{2}", "bytes", "0123456789-"),
    "32 random states": (RANDOM, "bytes", ""),  # Zeiger's chain, 31 layers; only where asked for
}
BATCHES = (1, 64, 1024)
TURNS = 5
ABREAST = 8
CONSTANTS = {"PIECE": network, "FEW": segments, "ROWS": segments, "SEGMENT": segments, "WIDEST": segments}

Step = Callable[[np.ndarray, int, np.ndarray, int, np.ndarray], None]
"""Takes the entries, each a state's row; how many bits a row has; letters [B T], the start, and states to fill in."""


def compiled_steps() -> dict[str, Step]:
    """Return loops over the table that Numba compiles, none where it is not installed."""
    try:
        from numba import njit
    except ImportError:
        return {}

    @njit
    def one_by_one(entries, bits, letters, start, out):
        for b in range(letters.shape[0]):
            row = start << bits
            for t in range(letters.shape[1]):
                row = entries[row + letters[b, t]]
                out[b, t] = row >> bits

    @njit
    def abreast(entries, bits, letters, start, out):
        rows = np.empty(ABREAST, dtype=np.int64)
        for b in range(0, letters.shape[0], ABREAST):
            rows[:] = start << bits
            for t in range(letters.shape[1]):
                for i in range(ABREAST):
                    row = entries[rows[i] + letters[b + i, t]]
                    rows[i] = row
                    out[b + i, t] = row >> bits

    return {"Numba, one by one": one_by_one, f"Numba, {ABREAST} abreast": abreast}


def by_run(automaton: Automaton) -> Step:
    """Return `Automaton.run` as a step."""

    def step(entries, bits, letters, start, out):  # noqa: ARG001
        out[:] = automaton.run(letters.astype(np.int64))

    return step


def steps_for(automaton: Automaton, batch: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return the ways to step the table through letters [B T]."""
    small = np.uint8 if automaton.states <= 256 else np.uint16
    bits = (automaton.alphabet - 1).bit_length()
    entries = np.zeros((automaton.states, 1 << bits), dtype=np.int64)
    entries[:, : automaton.alphabet] = automaton.table << bits
    ways = compiled_steps() or {"Automaton.run": by_run(automaton)}
    if batch % ABREAST:
        ways = {name: step for name, step in ways.items() if "abreast" not in name}

    def run(letters: np.ndarray, step: Step) -> np.ndarray:
        out = np.empty(letters.shape, dtype=small)
        step(entries.ravel(), bits, letters, automaton.start, out)
        return out

    return {name: partial(run, step=step) for name, step in ways.items()}


def seconds(fn: Callable[[], Any], device: str) -> float:
    """Return how long a call takes, until the device has done it."""
    began = time.perf_counter()
    fn()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(name: str, compiled: CompiledAutomaton, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: the network and the table on the same letters, in turns."""
    letters = draw(name, compiled.automaton, batch, args.tokens // batch)
    tokens = torch.from_numpy(letters.astype(np.int64)).to(args.device)
    host = torch.from_numpy(letters)

    def follow() -> Tensor:
        return compiled.states(tokens, backend=args.backend)

    def with_copies() -> Tensor:
        said = compiled.states(host.to(args.device).long(), backend=args.backend)
        return said.to(torch.uint8 if compiled.automaton.states <= 256 else torch.int32).cpu()

    calls: dict[str, Callable[[], Any]] = {"network": follow} | (
        {"with copies": with_copies} if args.device == "cuda" else {}
    )
    calls |= {way: partial(step, letters) for way, step in steps_for(compiled.automaton, batch).items()}
    times: dict[str, float] = {}
    first = seconds(follow, args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    answers = {what: call() for what, call in calls.items()}
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
    for _ in range(args.turns):
        for what, call in calls.items():
            times[what] = min(times.get(what, float("inf")), seconds(call, args.device))
    ways = [way for way in times if way not in ("network", "with copies")]
    best = min(ways, key=times.__getitem__)
    got = answers["network"].cpu().numpy()
    right = [np.asarray(answers[way]) for way in ways]
    million = tokens.numel() / 1e6
    row: dict[str, Any] = {"batch": batch, "length": tokens.shape[1], "network M tokens/s": million / times["network"]}
    if args.device == "cuda":
        row["with copies M tokens/s"] = million / times["with copies"]
    return row | {
        "table M tokens/s": million / times[best],
        "stepped by": best,
        "network / table": times[best] / times["network"],
        "first call s": first,
        **({"peak MiB": peak} if peak else {}),
        "states wrong": max(int((got != states).sum()) for states in right),
    }


def draw(name: str, automaton: Automaton, batch: int, length: int) -> np.ndarray:
    """Draw letters [B T] as bytes."""
    some = AUTOMATA[name][2]
    accepted = np.array([ord(c) for c in some] if some else range(automaton.alphabet), dtype=np.uint8)
    return accepted[np.random.default_rng(0).integers(0, len(accepted), (batch, length))]


def profile(compiled: CompiledAutomaton, name: str, args: argparse.Namespace) -> str:
    """Return the device time of every kernel, for one sequence."""
    tokens = torch.from_numpy(draw(name, compiled.automaton, 1, args.tokens).astype(np.int64)).to(args.device)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if args.device == "cuda" else activity.CPU]) as recorded:
        compiled.states(tokens, backend=args.backend)
    took = "device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda e: -getattr(e, took))[:15]
    rows: Rows = [{"kernel": e.key[:60], "launches": e.count, "ms": getattr(e, took) / 1e3} for e in events]
    return table(f"{name}: kernels for one sequence", rows)


def sections(args: argparse.Namespace) -> list[Callable[[], str]]:
    """Return what makes the tables: one for each automaton and data type."""

    def section(name: str, dtype: str) -> str:
        spec, alphabet, _ = AUTOMATA[name]
        compiled = compile(spec, alphabet=alphabet).copy_in(DTYPES[dtype], args.device)
        rows = [measure(name, compiled, batch, args) for batch in args.batches]
        a = compiled.automaton
        size = f"{a.states} states, {compiled.depth} layer(s), {max(compiled.factors)} factor(s)"
        text = table(f"{name}: {size}, keys {dtype}", rows)
        return text + "\n" + profile(compiled, name, args) if args.profile else text

    return [partial(section, name, dtype) for name in args.only for dtype in args.dtypes]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the tables are written (default: printed only)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=1 << 24, help="in all (default: 2^24)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="numbers of sequences")
    parser.add_argument("--only", nargs="+", choices=[*AUTOMATA], default=[*AUTOMATA][:-1])
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=["bfloat16", "float32"], help="of the keys")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"constants: {', '.join(CONSTANTS)}")
    parser.add_argument("--profile", action="store_true", help="time per kernel")
    args = parser.parse_args()
    if wrong := [batch for batch in args.batches if batch < 1 or args.tokens % batch]:
        parser.error(f"--tokens {args.tokens} are no {wrong[0]} sequences of one length")
    for change in args.set:
        constant, _, value = change.partition("=")
        if constant not in CONSTANTS or not value.isdigit():
            parser.error(f"--set takes NAME=VALUE for {', '.join(CONSTANTS)}, got {change!r}")
        setattr(CONSTANTS[constant], constant, int(value))
    return args


def main() -> None:
    """Measure and print, table by table."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":
        place = torch.cuda.get_device_name()
        card = place.removeprefix("NVIDIA ").split()[0].lower()
    else:
        place, card = f"a CPU ({platform.machine()}, {torch.get_num_threads()} thread(s) of torch)", "cpu"
    words = sys.argv[:]
    if "--out" in words:  # a folder of this machine says nothing to others
        words[words.index("--out") + 1] = "DIR"
    command = "python " + shlex.join(words)
    texts = [f"# Compiled automata on {place}, torch {torch.__version__}, {date.today()}\n\n    {command}\n"]
    print(texts[0])
    for make in sections(args):
        texts.append(make())
        print(texts[-1], flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"compiled_{card}_{date.today()}.md").write_text("\n".join(texts))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
