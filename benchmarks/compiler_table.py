"""What `statetrack.compile` makes of the 55 languages of tests/languages.py, beside a prototype's table.

    python benchmarks/compiler_table.py
    python benchmarks/compiler_table.py --only "JSON number" "S5 word problem" --again

One row per language and window. Every network is compiled without optimisation (timeout 0), and with it for at most
SECONDS, for both structures, householder and gated. The latter two get certificates in float32, bfloat16 and float16
with integer and unit keys, on the chunk backend. Random words that stay alive as long as they can, of lengths 10,
1,000 and 100,000, are run on the chunk backend in bfloat16 and compared with the table of the automaton after every
token; for regular expressions, Python's `re` is asked about prefixes too, for at most a few seconds.

Results go to benchmarks/results/compiler_table.md and .json after every row; rows that are there are not measured
again. Two processes of one thread each; half an hour. The optimising search counts wall seconds: where "late" is true
and other work ran beside it, measure again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tables import Rows, table

from statetrack import compile
from statetrack.automata import Automaton
from statetrack.automata.verdicts import lower_bounds
from statetrack.compiler import CompiledAutomaton
from statetrack.compiler.certificate import random_words
from statetrack.runs import write_atomically, write_json

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.languages import LANGUAGES, PATTERNS  # noqa: E402

SECONDS = 20.0
WINDOWS = (0, 2)
LENGTHS = {10: 1000, 1000: 16, 100_000: 1}  # length -> words
ALARM = 2  # seconds for `re` at one length
AT_ONCE = "processor s at once"
PREFIXES = 200  # asked of `re` at one length

# name -> depth, most factors per token, the same with a gate; depth and factors with a window of 2 tokens; factors of
# the one asymmetric layer: the best found by a prototype (numpy, C), in up to 26 s each
PROTOTYPE: dict[str, tuple[int, int, int, int, int, int]] = {
    "(a|b)*abb": (1, 3, 3, 1, 2, 3),
    "parity (1s even)": (1, 1, 1, 1, 1, 1),
    "even a, odd b": (1, 2, 2, 1, 2, 2),
    "a^(3m)": (1, 2, 2, 1, 2, 2),
    "mod-7 counter": (1, 6, 6, 1, 6, 6),
    "binary %3==0": (1, 1, 1, 1, 1, 1),
    "decimal %7==0": (1, 5, 5, 1, 5, 5),
    "binary %6==0": (1, 3, 1, 1, 1, 2),
    "ISO date loose": (1, 11, 11, 1, 8, 11),
    "ISO date strict": (2, 6, 6, 1, 8, 14),
    "time HH:MM[:SS]": (2, 4, 4, 1, 6, 10),
    "IPv4 strict": (2, 12, 12, 2, 3, 24),
    "float literal": (2, 2, 0, 2, 3, 8),
    "JSON number": (2, 1, 0, 2, 4, 9),
    "JSON string": (3, 12, 12, 2, 3, 8),
    "email simple": (2, 6, 6, 2, 2, 7),
    "identifier": (2, 2, 0, 1, 1, 2),
    "hex colour": (1, 8, 8, 1, 6, 8),
    "UUID": (1, 37, 37, 1, 31, 37),
    "MAC address": (1, 18, 18, 1, 12, 18),
    "semver core+pre": (3, 3, 2, 2, 3, 11),
    "URL simple": (2, 12, 3, 2, 5, 16),
    "C comment": (2, 3, 2, 2, 3, 4),
    "CSV quoted row": (2, 4, 2, 1, 2, 3),
    "roman numeral": (2, 3, 3, 2, 3, 19),
    "py int with _": (2, 1, 0, 1, 2, 5),
    "US phone": (1, 18, 18, 1, 13, 18),
    "contains aab": (2, 4, 4, 2, 2, 2),
    "subseq a..b..a": (2, 3, 1, 2, 4, 2),
    "starts with a": (2, 2, 0, 1, 1, 1),
    "4th last is a": (1, 8, 8, 1, 3, 15),
    "(aa|b)*": (1, 1, 1, 1, 2, 1),
    "(ab)*": (1, 2, 2, 1, 1, 2),
    "a*b*c*": (2, 3, 0, 1, 1, 2),
    "UTF-8 validity": (2, 3, 3, 1, 3, 8),
    "Dyck-1 depth 3": (1, 4, 4, 1, 3, 4),
    "Dyck-1 depth 8": (1, 9, 9, 1, 8, 9),
    "Dyck-2 depth 3": (1, 15, 15, 1, 7, 15),
    "S5 word problem": (1, 96, 96, 1, 96, 96),
    "A5 word problem": (1, 48, 48, 1, 48, 48),
    "mod-5 arith (+,*)": (2, 5, 4, 1, 11, 14),
    "Tomita-3": (3, 3, 2, 2, 3, 3),
    "Tomita-7": (2, 2, 2, 1, 2, 2),
    "ISO date lines": (2, 8, 8, 1, 8, 14),
    "IPv4 lines": (2, 12, 12, 2, 3, 24),
    "float CSV file": (2, 2, 0, 2, 3, 9),
    "ends with C keyword (AC)": (2, 15, 15, 1, 3, 110),
    "Dyck-1 depth 100": (1, 101, 101, 1, 100, 101),
    "decimal %97==0": (1, 95, 95, 1, 95, 95),
    "decimal %100==0": (1, 2, 2, 1, 2, 2),
    "7th last is a": (1, 14, 14, 2, 3, 127),
    "C-ish token": (3, 12, 12, 2, 3, 95),
    "ISO datetime+tz": (2, 10, 8, 2, 7, 38),
    "IPv6 full+compressed": (3, 11, 11, 2, 12, 71),
    "HTTP request line": (2, 30, 30, 2, 8, 35),
}


class TooLong(Exception):
    """Python's `re` took its time."""


def measure(name: str, window: int, quick: bool) -> dict[str, Any]:
    """Return one row."""
    torch.set_num_threads(1)
    automaton = LANGUAGES[name]()
    depth, factors, gated, window_depth, window_factors, map_factors = PROTOTYPE[name]
    wanted = (window_depth, window_factors, None) if window else (depth, factors, max(1, gated))
    began = time.process_time()
    first = compile(automaton, window=window, timeout=0)
    at_once = time.process_time() - began
    plain = first if quick else compile(automaton, window=window, timeout=SECONDS)
    with_gate = compile(automaton, window=window, structure="gated", timeout=0 if quick else SECONDS)
    bound = lower_bounds(automaton, window=max(0, window - 1))
    row = {
        "language": name,
        "window": window,
        "states": automaton.states,
        "kinds": plain.kinds,
        "at least": bound.layers,
        "depth": plain.depth,
        "prototype's": wanted[0],
        "factors": max(plain.factors),
        "prototype's factors": wanted[1],
        "gated": max(with_gate.factors),
        "prototype's gated": wanted[2],
        "factors by layer": "/".join(map(str, plain.factors)),
        "widths": "/".join(map(str, plain.widths)),
        "depth at once": first.depth,
        AT_ONCE: at_once,
        "s at once": first.blueprint.seconds,
        "s optimised": plain.blueprint.seconds,
        "late": plain.blueprint.late,
    }
    if not window:
        row |= {"dplr": max(compile(automaton, structure="dplr").factors), "prototype's dplr": map_factors}
    row |= certificates(plain, with_gate)
    for network, label in ((plain, ""), (with_gate, " gated")):
        row |= compare(network, name, {10: 1000} if quick else LENGTHS, label)
    row["worse"] = row["depth"] > wanted[0] or row["factors"] > wanted[1] or row.get("dplr", 0) > map_factors
    return row


def certificates(*networks: CompiledAutomaton) -> dict[str, Any]:
    """Certify networks in all arithmetics; return how many passed, and the seconds of the slowest."""
    passed, seconds = [], []
    for network in networks:
        for keys in ("integer", "unit"):
            made = CompiledAutomaton(replace(network.blueprint, keys=keys))
            for dtype in ("float32", "bfloat16", "float16"):
                began = time.perf_counter()
                passed.append(made.certificate(dtype, "chunk").passed)
                seconds.append(time.perf_counter() - began)
    return {"certified": f"{sum(passed)}/{len(passed)}", "s certificate": max(seconds)}


def compare(network: CompiledAutomaton, name: str, lengths: dict[int, int], label: str) -> dict[str, Any]:
    """Return the tokens run, after how many the state was wrong, and how often `re` was asked and said otherwise."""
    automaton = network.automaton
    network = network.copy_in(torch.bfloat16, "cpu")
    tokens = wrong = asked = otherwise = 0
    for length, words in lengths.items():
        x = random_words(automaton, words, length, seed=length)
        got = network.states(torch.from_numpy(x), backend="chunk").numpy()
        tokens, wrong = tokens + x.size, wrong + int((got != automaton.run(x)).sum())
        if name in PATTERNS and not label:
            counts = ask_python(name, automaton, x, automaton.emits[got])
            asked, otherwise = asked + counts[0], otherwise + counts[1]
    found: dict[str, Any] = {f"tokens{label}": tokens, f"wrong{label}": wrong}
    return found | ({} if label else {"asked re": asked, "re says otherwise": otherwise})


def ask_python(name: str, automaton: Automaton, words: np.ndarray, says: np.ndarray) -> tuple[int, int]:
    """Ask `re` about accepted and other prefixes while the time lasts; return how many, and how many differ."""
    pattern, alphabet = PATTERNS[name]
    oracle = re.compile(pattern.encode(), re.ASCII) if alphabet == "bytes" else re.compile(pattern)
    rng = np.random.default_rng(0)
    ends = [rng.permutation(np.argwhere(says == said))[: PREFIXES // 2].tolist() for said in (1, 0)]
    asked = otherwise = 0
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(ALARM)
    try:
        for row, t in sum(ends, []):
            word = words[row, : t + 1]
            text: Any = bytes(word.tolist()) if alphabet == "bytes" else "".join(automaton.names[x] for x in word)
            matches = oracle.fullmatch(text) is not None
            asked, otherwise = asked + 1, otherwise + int(matches != says[row, t])
    except (TooLong, RecursionError):
        pass
    finally:
        signal.alarm(0)
    return asked, otherwise


def _alarm(*_: Any) -> None:
    raise TooLong


def speed(quick: bool) -> Rows:
    """Time the compiled parity on the CPU, and one core that steps its table."""
    automaton = LANGUAGES["parity (1s even)"]()
    length = 256 if quick else 16_384
    words = np.random.default_rng(0).integers(0, 2, (64, length))
    tokens = torch.from_numpy(words)
    rows = []
    for structure in ("householder", "gated"):
        network = compile(automaton, structure=structure)
        for threads in (1, os.cpu_count() or 1):
            torch.set_num_threads(threads)
            seconds = timed(lambda network=network: network.states(tokens, backend="chunk"))
            rows.append(_speed_row(f"{structure}, chunk backend, batch 64", threads, words.size, seconds))
    for batch in (64, 1):
        seconds = timed(lambda batch=batch: automaton.run(words[:batch]))
        rows.append(_speed_row(f"the table, Automaton.run, batch {batch}", 1, batch * length, seconds))
    return rows


def _speed_row(what: str, threads: int, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "parity": what,
        "threads": threads,
        "tokens": tokens,
        "s": seconds,
        "million tokens/s": tokens / seconds / 1e6,
    }


def timed(call: Any, rounds: int = 5) -> float:
    """Return the median seconds of a call, after one to warm up."""
    call()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return median(took)


def report(out: Path, rows: Rows, speeds: Rows) -> None:
    """Write what was measured so far."""
    order = {name: i for i, name in enumerate(PROTOTYPE)}
    rows = sorted(rows, key=lambda row: (row["window"], order[row["language"]]))
    machine = platform.processor() or platform.machine()
    where = f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}"
    wrong = sum(row["wrong"] + row["wrong gated"] for row in rows)
    otherwise = sum(row["re says otherwise"] for row in rows)
    uncertified = [row for row in rows if len(set(row["certified"].split("/"))) > 1]
    worse = [f"{row['language']} (window {row['window']})" for row in rows if row["worse"]]
    below = sum(row["at least"] > row["depth"] for row in rows)
    tokens = sum(row["tokens"] + row["tokens gated"] for row in rows)
    summary = [
        {"what": "rows", "count": len(rows)},
        {"what": "states compared with the automaton", "count": tokens},
        {"what": "of these, wrong", "count": wrong},
        {"what": "prefixes asked of re", "count": sum(row["asked re"] for row in rows)},
        {"what": "of these, re says otherwise", "count": otherwise},
        {"what": "rows with a certificate that did not pass", "count": len(uncertified)},
        {"what": "rows shallower than their lower bound", "count": below},
        {"what": "rows that reach their lower bound", "count": sum(row["at least"] == row["depth"] for row in rows)},
        {"what": "rows deeper or with more factors than the prototype", "count": len(worse)},
        {"what": "longest processor seconds without optimisation", "count": max(map(itemgetter(AT_ONCE), rows))},
        {"what": "longest seconds with", "count": max(row["s optimised"] for row in rows)},
        {"what": "longest seconds of a certificate", "count": max(row["s certificate"] for row in rows)},
    ]
    how = (__doc__ or "").replace("SECONDS", f"{SECONDS:g} s")
    text = [f"# {how}\n{where}\n", table("Summary", summary)]
    if worse:
        text.append("Worse than the prototype: " + "; ".join(worse) + "\n")
    text += [table("Speed", speeds)] if speeds else []
    text += [table(f"Window {w}", [row for row in rows if row["window"] == w]) for w in WINDOWS]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {"where": where, "summary": summary, "speed": speeds, "rows": rows})
    write_atomically(out.with_suffix(".md"), lambda p: p.write_text("\n".join(text)))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PROTOTYPE, default=list(PROTOTYPE), metavar="LANGUAGE")
    parser.add_argument("--quick", action="store_true", help="no optimisation, short words: whether it runs")
    parser.add_argument("--again", action="store_true", help="measure what is in the results already, too")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="without suffix")
    a = parser.parse_args()
    a.out = a.out or ROOT / f"benchmarks/results/compiler_table{'_quick' if a.quick else ''}"
    return a


def main() -> None:
    """Measure what is missing, and write it down row by row."""
    a = arguments()
    stored = a.out.with_suffix(".json")
    before = json.loads(stored.read_text()) if stored.exists() else {"rows": [], "speed": []}
    rows = {(row["language"], row["window"]): row for row in before["rows"]}
    todo = [(name, w) for name in a.only for w in WINDOWS if a.again or (name, w) not in rows]
    todo.sort(key=lambda job: -PROTOTYPE[job[0]][5])  # the large ones first
    with ProcessPoolExecutor(a.processes, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(measure, name, w, a.quick): (name, w) for name, w in todo}
        for done, job in enumerate(as_completed(jobs), 1):
            rows[jobs[job]] = job.result()
            row = rows[jobs[job]]
            note = f"depth {row['depth']}, factors {row['factors by layer']}{', WORSE' if row['worse'] else ''}"
            print(f"{done}/{len(jobs)} {row['language']}, window {row['window']}: {note}", file=sys.stderr, flush=True)
            report(a.out, list(rows.values()), before["speed"])
    report(a.out, list(rows.values()), speed(a.quick))
    print(a.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
