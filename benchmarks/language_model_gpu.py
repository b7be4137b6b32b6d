"""Language models on one GPU: training speed, memory and generation beside fla's DeltaNet; 1.3 billion parameters.

    python benchmarks/language_model_gpu.py speed --out DIR [--seconds 420] [--no-peer] [--no-generation] [--profile]
    python benchmarks/language_model_gpu.py large --out DIR [--steps 200] [--minutes 3.5] [--rows 16] [--data DIR]

speed: 24 layers, width 1024, 8 heads, vocabulary 32,000, 16 rows of 2048 random tokens, bfloat16 autocast, AdamW, all
in one process, taking turns; fla's model where fla is installed. The first step counts compilation and autotuning.
large: P1's 1.3B (24 layers, width 2048, 16 heads) by `statetrack.lm.train`, on text that is installed here, once for
each range of eigenvalues, with fewer rows per step than the paper (960); same weights but for the range, same rows.
Writes language_model_MODE.md and .json in DIR, again after every part.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tables import table
from torch import Tensor

ROWS, LENGTH, VOCABULARY, DIM, LAYERS, HEADS = 16, 2048, 32_000, 1024, 24, 8
ROUNDS, STEPS = 5, 4
PROMPT, NEW = 128, 256


@dataclass
class Contender:
    """A model that trains, with its optimiser."""

    model: Any
    optimizer: torch.optim.Optimizer
    first: float  # seconds until the first step was done, from nothing
    static: int  # bytes that stay between steps
    seconds: list[float]
    peak: int = 0
    loss: float = 0.0


def ours(mode: str) -> Any:
    """Return our DeltaNet, with its blocks compiled or not."""
    from statetrack.hf import StateTrackConfig, StateTrackForCausalLM
    from statetrack.layers import DeltaProductConfig

    mixer = DeltaProductConfig(dim=DIM, heads=HEADS)
    config = StateTrackConfig(vocab_size=VOCABULARY, hidden_size=DIM, num_hidden_layers=LAYERS, mixers=mixer)
    model: Any = StateTrackForCausalLM(config)
    model.cuda()
    if mode == "blocks":
        for block in model.model.blocks:
            block.compile()
    return model


def fla() -> Any:
    """Return flash-linear-attention's DeltaNet of the same size, with its own fused kernels."""
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM

    config = DeltaNetConfig(
        hidden_size=DIM, num_hidden_layers=LAYERS, num_heads=HEADS, vocab_size=VOCABULARY, use_cache=True
    )
    return DeltaNetForCausalLM(config).cuda()


def has_fla() -> bool:
    """Return whether fla's models are installed; fla-core alone is not enough."""
    return find_spec("fla") is not None and find_spec("fla.models") is not None


def random_tokens(rows: int, length: int) -> Tensor:
    """Return tokens, always the same, none of them 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator).cuda()


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    """Take one step of training."""
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def begin(make: Callable[[], Any], tokens: Tensor) -> Contender:
    """Build a model and take its first step."""
    torch.cuda.synchronize()
    began, before = time.perf_counter(), torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    step(model, optimizer, tokens)
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    for _ in range(2):
        step(model, optimizer, tokens)
    torch.cuda.synchronize()
    return Contender(model, optimizer, first, torch.cuda.memory_allocated() - before, [])


def turn(c: Contender, tokens: Tensor) -> None:
    """Take STEPS steps, timed together; note peak memory without what the others keep."""
    others = torch.cuda.memory_allocated() - c.static
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        loss = step(c.model, c.optimizer, tokens)
    torch.cuda.synchronize()
    c.seconds.append((time.perf_counter() - began) / STEPS)
    c.peak, c.loss = max(c.peak, torch.cuda.max_memory_allocated() - others), float(loss)


def generated(model: Any, batch: int) -> float:
    """Return the seconds that generating NEW tokens after PROMPT takes, greedily, in bfloat16."""
    prompt = random_tokens(batch, PROMPT)
    options = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    times = []
    for _ in range(3):  # the first warms up
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        assert out.shape == (batch, PROMPT + NEW)
    return min(times[1:])


def speed(args: argparse.Namespace) -> None:
    """Measure training, then generation."""
    from recipes.lm import p1
    from statetrack.lm.settings import cost, peak_flops

    result: dict[str, Any] = {"mode": "speed", **about(), "rows": ROWS, "length": LENGTH}
    end = time.monotonic() + args.seconds
    tokens = random_tokens(ROWS, LENGTH)
    makers: dict[str, Callable[[], Any]] = {f"statetrack, compiled: {m}": partial(ours, m) for m in args.compile}
    if has_fla() and not args.no_peer:
        makers["fla DeltaNet"] = fla
    running: dict[str, Contender] = {}
    rows = result["training"] = {}
    for name, make in makers.items():
        try:
            running[name] = begin(make, tokens)
        except Exception as problem:  # a model that fails is a row, not the end of the run
            rows[name] = {"error": f"{type(problem).__name__}: {problem}"[:200]}
            gc.collect()
            torch.cuda.empty_cache()
        write(args.out, "speed", result)
    for name, c in running.items() if args.profile else ():
        print(profile(name, partial(step, c.model, c.optimizer, tokens)), flush=True)
    flops = cost(p1("340m").model(VOCABULARY), False).flops
    peak = peak_flops(torch.cuda.get_device_name())
    for _ in range(ROUNDS):
        for c in running.values():
            if time.monotonic() < end or len(c.seconds) < 2:
                turn(c, tokens)
        for name, c in running.items():
            seconds = median(c.seconds)
            rate = ROWS * LENGTH / seconds
            rows[name] = {
                "parameters, M": sum(p.numel() for p in c.model.parameters()) / 1e6,
                "tokens/s": rate,
                "step, ms": 1e3 * seconds,
                "fastest, ms": 1e3 * min(c.seconds),
                "mfu, %": 100 * rate * flops / peak if peak else None,
                "peak, GiB": c.peak / 2**30,
                "first step, s": c.first,
                "loss": c.loss,
            }
        write(args.out, "speed", result)
    running.clear()
    gc.collect()
    torch.cuda.empty_cache()
    if not args.no_generation:
        generation(args, result, end)
    write(args.out, "speed", result)


def profile(name: str, run: Callable[[], Any]) -> str:
    """Return where the device's time goes in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_device_time_total)
    rows = [{"kernel": e.key[:80], "calls": e.count, "ms": e.self_device_time_total / 1e3} for e in events[:40]]
    total = sum(e.self_device_time_total for e in events) / 1e3
    return table(f"{name}: {total:.0f} ms on the device in a step", rows)


def generation(args: argparse.Namespace, result: dict[str, Any], end: float) -> None:
    """Measure generation, a batch of 1 and one of 64, for both."""
    rows = result["generation"] = {}
    makers: dict[str, Callable[[], Any]] = {"statetrack": partial(ours, "off")}
    if has_fla() and not args.no_peer:
        makers["fla DeltaNet"] = fla
    for name, make in makers.items():
        rows[name] = {}
        torch.manual_seed(0)
        model = make().to(torch.bfloat16).eval()
        for batch in (1, 64):
            if time.monotonic() > end:
                rows[name][f"batch {batch}"] = "no time left"
                continue
            try:
                torch.cuda.reset_peak_memory_stats()
                rows[name][f"batch {batch}, tokens/s"] = batch * NEW / generated(model, batch)
                rows[name][f"batch {batch}, peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            except Exception as problem:
                rows[name][f"batch {batch}"] = f"{type(problem).__name__}: {problem}"[:200]
            write(args.out, "speed", result)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def large(args: argparse.Namespace) -> None:
    """Train P1's 1.3B on installed text, once for each range."""
    from recipes.lm import p1
    from statetrack.lm.corpus import Data, prepare
    from statetrack.lm.train import METRICS, Options, train

    result: dict[str, Any] = {"mode": "large", **about(), "rows": args.rows, "length": LENGTH, "runs": {}}
    data = Data(source="python", tokenizer="bpe:32000", tokens=args.steps * args.rows * LENGTH, validation=0.01)
    began = time.monotonic()
    prepare(data, args.data)
    result["seconds to prepare the text"] = time.monotonic() - began
    for lo in args.ranges:
        recipe = replace(
            p1("1.3b", (lo, 1.0)),
            data=data, rows=args.rows, micro_rows=args.micro_rows, steps=args.steps, warmup=args.warmup,
            log_every=5, evaluate_every=args.steps, evaluate_rows=64,
        )  # fmt: skip
        path = args.out / f"large_{lo:g}to1"
        options = Options(device="cuda", minutes=args.minutes, trackers=(), save=False)
        torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        try:
            train(recipe, path, args.data, options=options, force=True)
        except Exception as problem:
            result["runs"][f"[{lo:g}, 1]"] = {"error": f"{type(problem).__name__}: {problem}"[:300]}
        else:
            history = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
            result["runs"][f"[{lo:g}, 1]"] = summary(history) | {"seconds": time.monotonic() - began}
            result.setdefault("history", {})[f"[{lo:g}, 1]"] = history
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
        write(args.out, "large", result)


def summary(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a run's first and last losses, its gradient norms and its speed."""
    rows = [row for row in history if "loss" in row]
    later = rows[len(rows) // 4 :]
    found = {"steps": rows[-1]["step"], "first loss": rows[0]["loss"], "last loss": rows[-1]["loss"]}
    for key in ("tokens_per_second", "mfu"):
        values = [row[key] for row in later if key in row]
        found[key] = median(values) if values else None
    norms = [row["grad_norm"] for row in rows]
    found |= {"gradient norm, median": median(norms), "gradient norm, largest": max(norms)}
    found["validation loss"] = next((row["eval_loss"] for row in history if "eval_loss" in row), None)
    return found | {"peak, GiB": max(row.get("peak_memory_gib", 0) for row in rows)}


def about() -> dict[str, str]:
    """Say what this was measured on."""
    import transformers
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    peer = version("fla-core") if has_fla() else "absent"
    fused = "installed" if find_spec("liger_kernel") else "absent"
    return {"card": torch.cuda.get_device_name(), **versions, "fla": peer, "liger_kernel": fused}


def write(out: Path, mode: str, result: dict[str, Any]) -> None:
    """Write what is known so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"language_model_{mode}.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [", ".join(f"{k} {v}" for k, v in result.items() if not isinstance(v, dict))]
    for part in ("training", "generation", "runs"):
        if measured := result.get(part):
            lines += ["", table(part, [{"model": name, **row} for name, row in measured.items()])]
    text = "\n".join(lines) + "\n"
    (out / f"language_model_{mode}.md").write_text(text)
    print(text, flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("speed", "large"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420, help="speed: begin nothing new after that")
    parser.add_argument("--compile", nargs="+", default=["blocks"], choices=("blocks", "off"))
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-generation", action="store_true")
    parser.add_argument("--profile", action="store_true", help="speed: device time per kernel of a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--micro-rows", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=3.5, help="large: per range")
    parser.add_argument("--ranges", type=float, nargs="+", default=[0.0, -1.0], help="large: lower ends")
    parser.add_argument("--data", type=Path, default=Path("runs/lm-data"))
    args = parser.parse_args()
    speed(args) if args.mode == "speed" else large(args)


if __name__ == "__main__":
    main()
