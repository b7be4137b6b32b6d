"""How long `statetrack.compile` takes: without optimisation (timeout 0), and with the default timeout of 20 s.

    python benchmarks/compile_times.py
    python benchmarks/compile_times.py --only "random 64 states, 2 letters" "group Z60"

The 55 languages of tests/languages.py, random tables of 16 to 150 states with 2 to 256 letters (before minimising),
groups with all elements as letters, some with few, and tables of two random permutations of up to 128 states. Processor
seconds are those of the process, on one thread; other work on the machine makes the wall clock slower, and lets the
optimising search, which counts wall seconds, try less. Results go to benchmarks/results/compile_times.md and .json
after every row; rows that are there are not measured again without --again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import table

from statetrack import compile
from statetrack.automata import Automaton, automaton_of
from statetrack.runs import write_atomically, write_json

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.languages import LANGUAGES  # noqa: E402

TIMEOUTS = {"at once": 0.0, "optimised": 20.0}
GROUPS = ("S5", "S5_swaps", "A5", "Z60", "Z128", "D7", "D30", "D60", "S4 x Z5", "Z2 x Z2 x Z2 x Z2 x Z2 x Z2 x Z2")


def random_table(states: int, letters: int, sparse: bool = False) -> Automaton:
    """Return the minimal automaton of a random table, half of whose states accept; sparse: 70 % lead to a sink."""
    rng = np.random.default_rng(states)
    table = rng.integers(0, states, (states, letters))
    if sparse:
        table[rng.random(table.shape) < 0.7] = table[-1] = states - 1
    return Automaton(table, accepting=frozenset(np.flatnonzero(rng.random(states) < 0.5).tolist())).minimise()


def random_permutations(states: int, letters: int = 2) -> Automaton:
    """Return the minimal automaton of random permutations."""
    rng = np.random.default_rng(states)
    table = np.stack([rng.permutation(states) for _ in range(letters)], axis=1)
    return Automaton(table, accepting=frozenset(np.flatnonzero(rng.random(states) < 0.5).tolist())).minimise()


def cases() -> dict[str, Callable[[], Automaton]]:
    """Return what is compiled, by name."""
    made: dict[str, Callable[[], Automaton]] = {}
    for states in (16, 32, 64, 128, 150):
        for letters in (2, 4):
            made[f"random {states} states, {letters} letters"] = partial(random_table, states, letters)
    for letters in (8, 64, 256):
        made[f"random 128 states, {letters} letters"] = partial(random_table, 128, letters)
        made[f"random 128 states, {letters} letters, most lead nowhere"] = partial(
            random_table, 128, letters, sparse=True
        )
        made[f"{letters} permutations of 128 states"] = partial(random_permutations, 128, letters)
    for states in (16, 60, 120, 128):
        made[f"2 permutations of {states} states"] = partial(random_permutations, states)
    made |= {f"group {name}": partial(automaton_of, f"group:{name}") for name in GROUPS}
    made["S5, 2 generators"] = partial(automaton_of, "permutations:(0 1); (0 1 2 3 4)")
    counter = (np.arange(128)[:, None] + np.array([0, 1])) % 128
    made["counter modulo 128"] = partial(Automaton, counter, accepting=frozenset({0}))
    return made | dict(LANGUAGES)


def measure(name: str, automaton: Automaton) -> dict[str, Any]:
    """Return one row."""
    row: dict[str, Any] = {"automaton": name, "states": automaton.states, "letters": automaton.alphabet}
    for label, timeout in TIMEOUTS.items():
        cpu, wall = time.process_time(), time.perf_counter()
        network = compile(automaton, timeout=timeout)
        row |= {
            f"processor s {label}": time.process_time() - cpu,
            f"wall s {label}": time.perf_counter() - wall,
            f"layers {label}": network.depth,
            f"factors {label}": max(network.factors, default=0),
            f"kinds {label}": network.kinds,
        }
    return row


def report(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write what was measured so far."""
    where = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}"
    up_to = [row for row in rows if row["states"] <= 128]
    summary = []
    for label in TIMEOUTS:
        for clock in ("processor", "wall"):
            slowest = max(up_to, key=lambda row: row[f"{clock} s {label}"])
            summary.append(
                {
                    "up to 128 states": f"longest, {clock} seconds, {label}",
                    "s": slowest[f"{clock} s {label}"],
                    "of": slowest["automaton"],
                }
            )
    text = [f"# {__doc__}\n{where}\n", table("Summary", summary), table("All", rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {"where": where, "rows": rows})
    write_atomically(out.with_suffix(".md"), lambda p: p.write_text("\n".join(text)))


def main() -> None:
    """Measure what is missing, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--again", action="store_true", help="measure what is in the results already, too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/compile_times", help="without suffix")
    a = parser.parse_args()
    torch.set_num_threads(1)
    made = cases()
    if unknown := sorted(set(a.only or ()) - set(made)):
        parser.error(f"{unknown[0]!r} is unknown; accepted: {', '.join(made)}")
    stored = a.out.with_suffix(".json")
    rows = {row["automaton"]: row for row in json.loads(stored.read_text())["rows"]} if stored.exists() else {}
    compile("a*b", alphabet="ab", timeout=0)  # what the first call loads
    for name in a.only or made:
        if name not in rows or a.again:
            rows[name] = measure(name, made[name]())
            print({k: v for k, v in rows[name].items() if "kinds" not in k}, file=sys.stderr, flush=True)
            report(a.out, [rows[name] for name in made if name in rows])
    report(a.out, [rows[name] for name in made if name in rows])
    print(a.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
