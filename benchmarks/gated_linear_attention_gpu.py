"""Gated linear attention on one GPU: ours beside mamba-ssm's and fla-core's kernels, interleaved in one run.

    python benchmarks/gated_linear_attention_gpu.py [--out FILE.md] [--only mamba2 ..] [--mamba DIR] [--no-peers]
        [--variant walk.STAGES=1,head.num_warps=4 ..] [--profile]

Needs a CUDA device and Triton; a peer that is not installed is left out: fla-core 0.6.0, and mamba-ssm 2.3 from DIR,
the unpacked source archive (pip download --no-deps --no-binary :all: mamba-ssm), whose Triton kernels need no build.
Inputs are bf16, decays float32. mamba-ssm's function is given dt and A, makes the decays itself, and returns gradients
to dt and A. Times are medians of device events, the implementations taking turns; peak memory is above what is
allocated before the call, the previous gradients included; the first call's time is wall-clock, compilation included;
the error is the largest of output and gradients, relative in norm, against the chunked backend in float32 (first
sequence, 4096 tokens). A variant is a row of its own: schedules of the launches, or constants of their module, set
otherwise.
"""

from __future__ import annotations

import argparse
import sys
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from gpu_turns import Contender, report, take_turns
from tables import table

from statetrack.ops import gated_linear_attention
from statetrack.ops.gated_linear_attention import triton_plan as plans

SHAPES = {  # B, T, key heads, value heads, K, V, decay
    "mamba2": (8, 4096, 1, 64, 128, 64, "head"),
    "mamba2-32k": (1, 32768, 1, 64, 128, 64, "head"),
    "gla": (8, 4096, 16, 16, 128, 128, "key"),
    "retnet": (8, 4096, 16, 16, 128, 128, "head"),
}


def inputs(B, T, HK, HV, K, V, decay) -> dict:
    """Draw on the GPU: normal q, k, v, and log decays as a trained model has them, most between -1 and -0.01."""
    draw = partial(torch.randn, device="cuda")
    x = {"q": draw(B, T, HK, K) / K**0.5, "k": draw(B, T, HK, K) / K**0.5, "v": draw(B, T, HV, V)}
    x = {name: t.bfloat16() for name, t in x.items()}
    shape = (B, T, HV) if decay == "head" else (B, T, HV, K)
    x["dt"] = torch.nn.functional.softplus(draw(*shape) - 2)
    return {name: t.requires_grad_() for name, t in x.items()}


def ours(x: dict, signed: bool):
    """Return our call, and the tensors that get gradients."""
    decay = (-x["dt"]).exp().detach()
    if signed:
        decay = torch.where(torch.rand_like(decay) < 0.5, -decay, decay)
    leaves: dict = {n: x[n] for n in ("q", "k", "v")} | {"decay": decay.requires_grad_()}
    return lambda: gated_linear_attention(**leaves, backend="triton"), leaves


def mamba(x: dict, folder: Path):
    """Return mamba-ssm's call; its package is entered without the initialisation that imports CUDA extensions."""
    if x["dt"].ndim == 4 or x["k"].shape[2] > 1:
        raise NotImplementedError("shared heads with one decay per head only")
    if "mamba_ssm" not in sys.modules:
        module = types.ModuleType("mamba_ssm")
        module.__path__ = [str(folder / "mamba_ssm")]
        sys.modules["mamba_ssm"] = module
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    A = torch.full((x["v"].shape[2],), -1.0, device="cuda", requires_grad=True)
    leaves = {n: x[n] for n in ("q", "k", "v", "dt")} | {"A": A}
    call = partial(mamba_chunk_scan_combined, chunk_size=256, return_final_states=True)
    return lambda: call(x["v"], x["dt"], A, x["k"], x["q"]), leaves


def fla(x: dict):
    """Return fla-core's call, with the logarithms of the decays."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if x["q"].shape[2] != x["v"].shape[2]:
        raise NotImplementedError("as many key heads as value heads only")
    op = chunk_gla if x["dt"].ndim == 4 else chunk_simple_gla
    leaves = {n: x[n] for n in ("q", "k", "v")} | {"g": (-x["dt"]).detach().requires_grad_()}
    return lambda: op(**leaves, output_final_state=True), leaves


@contextmanager
def settings(variant: str):
    """Set constants (NAME=VALUE) and schedules (GROUP.NAME=VALUE, see `Plan`) of the launches for a while."""
    changes = dict(part.split("=") for part in variant.split(",") if part)
    plain = plans.Plan.__init__
    constants = {name: getattr(plans, name) for name in changes if "." not in name}

    def changed(self, *args):
        plain(self, *args)
        for name, value in changes.items():
            if "." in name:
                group, option = name.split(".")
                getattr(self, group)[option] = int(value)

    for name in constants:
        setattr(plans, name, int(changes[name]))
    setattr(plans.Plan, "__init__", changed)  # noqa: B010
    plans._plan.cache_clear()
    try:
        yield
    finally:
        setattr(plans.Plan, "__init__", plain)  # noqa: B010
        plans._plan.cache_clear()
        for name, value in constants.items():
            setattr(plans, name, value)


def worst_error(call, leaves: dict, d_out) -> float:
    """Return our largest relative error on the first sequence, up to 4096 tokens of it, against float32 chunks."""
    part = {n: t.detach()[:1, :4096].float().requires_grad_() for n, t in leaves.items()}
    o, _ = gated_linear_attention(**part, backend="chunk")
    o.backward(d_out[:1, :4096].float())
    low = {n: t.detach()[:1, :4096].clone().requires_grad_() for n, t in leaves.items()}
    got, _ = gated_linear_attention(**low, backend="triton")
    got.backward(d_out[:1, :4096])
    with torch.no_grad():
        whole = call()[0][:1, :4096]
    pairs = [(got, o), (whole, o), *((low[n].grad, part[n].grad) for n in leaves)]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)


def contenders(shape, args, d_out) -> dict[str, Contender]:
    """Return every implementation that is there, on one shape."""
    x = inputs(*shape)
    found = {}
    for name, signed, variant in (("", False, ""), (" signed", True, ""), *((f" {v}", True, v) for v in args.variant)):
        call, leaves = ours(x, signed)
        error = partial(worst_error, call, leaves, d_out)
        found[f"statetrack{name}"] = Contender(call, list(leaves.values()), partial(settings, variant), error)
    peers = {"fla-core": partial(fla, x)} | ({"mamba-ssm": partial(mamba, x, args.mamba)} if args.mamba else {})
    for name, make in peers.items() if args.peers else ():
        try:
            call, leaves = make()
            found[name] = Contender(call, list(leaves.values()))
        except (ImportError, NotImplementedError) as error:
            print(f"{name}: left out ({error})")
    return found


def profile(shape) -> str:
    """Return the device time of every kernel in one forward and backward."""
    call, _ = ours(inputs(*shape), True)
    d_out = torch.randn_like(call()[0])
    call()[0].backward(d_out)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        call()[0].backward(d_out)
        torch.cuda.synchronize()
    rows = [
        {"kernel": e.key[:60], "launches": e.count, "ms": e.device_time_total / 1e3}
        for e in sorted(recorded.key_averages(), key=lambda e: -e.device_time_total)[:12]
    ]
    return table("kernels of one forward and backward, signed", rows)


def measure(name: str, args: argparse.Namespace) -> str:
    """Return the table of one shape, and of its kernels if asked."""
    B, T, HK, HV, K, V, decay = SHAPES[name]
    title = f"B={B} T={T} heads {HV} (keys {HK}) K={K} V={V}, one decay per {decay}, bf16"
    d_out = torch.randn(B, T, HV, V, device="cuda").bfloat16()
    text = table(title, take_turns(contenders(SHAPES[name], args, d_out), d_out))
    return text + "\n" + profile(SHAPES[name]) if args.profile else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--mamba", type=Path, help="folder that holds mamba-ssm's package, unpacked")
    parser.add_argument("--variant", nargs="+", default=[], help="other schedules, a row each")
    parser.add_argument("--profile", action="store_true", help="device time per kernel")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours only")
    args = parser.parse_args()
    torch.manual_seed(0)
    report((measure(name, args) for name in args.only), args.out)


if __name__ == "__main__":
    main()
