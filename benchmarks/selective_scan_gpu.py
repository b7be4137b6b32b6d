"""The selective scan on one GPU: ours beside mamba-ssm's CUDA kernels, interleaved in one run.

    python benchmarks/selective_scan_gpu.py [--out FILE.md] [--only long ..] [--mamba DIR] [--no-gate]
        [--variant FORWARD=8,1,4,4;FULL_GPU=1 ..] [--variants] [--profile]

Needs a CUDA device and Triton. With DIR, mamba-ssm's unpacked source (pip download --no-deps --no-binary :all:
mamba-ssm), its csrc/selective_scan is built for this card alone, which takes two minutes and needs nvcc and ninja.
Inputs are bf16, A, D and the state float32, with a gate unless --no-gate. mamba-ssm gets its own layout, [B D T], and
its time steps ready, as ours does. Times are medians of device events, the implementations taking turns; the floor is
one exponential per token, channel and state at 16 per cycle and multiprocessor and 1.98 GHz; peak memory is above
what is allocated before the call, the previous gradients included; the first call's time is wall-clock, compilation
included; the error is the largest of y and the gradients to u, dt and z, relative in norm, against the chunked backend
in float32 (512 channels of one sequence).

A variant is a row of its own: constants of `ops/selective_scan/triton.py` set otherwise, a number, or a schedule for
this shape as TOK,CH,K,WARPS,REGS,SUB (see there). --variants takes a list of likely ones.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from gpu_turns import Contender, report, take_turns
from tables import table

from statetrack.ops import selective_scan
from statetrack.ops.selective_scan import triton_plan as plans

CLOCK = 1.98e9  # Hz, an H200 at work

SHAPES = {"batch": (8, 4096, 4096, 16), "long": (1, 32768, 4096, 16)}  # B, T, D, M
VARIANTS = {
    "batch": [
        "BACKWARD=4,2,4,4,168,8",
        "BACKWARD=4,1,4,4,128,8",
        "BACKWARD=4,1,4,8,128,8",
        "BACKWARD=4,1,4,8,128,4",
        "FORWARD=8,1,4,4",
    ],
    "long": [
        "BACKWARD=4,2,4,4,168,8",
        "BACKWARD=4,1,4,4,128,8",
        "BACKWARD=4,1,4,8,128,8",
        "FULL_GPU=4000",
        "FORWARD=8,2,4,8",
    ],
}


def inputs(B: int, T: int, D: int, M: int, gate: bool) -> dict:
    """Draw on the GPU: normal u, B, C, z, and time steps and rates as a trained model has them."""
    draw = partial(torch.randn, device="cuda")
    x = {"u": draw(B, T, D), "dt": torch.nn.functional.softplus(draw(B, T, D) - 2), "B": draw(B, T, M)}
    x |= {"C": draw(B, T, M)} | ({"z": draw(B, T, D)} if gate else {})
    x = {name: t.bfloat16() for name, t in x.items()}
    x |= {"A": -torch.arange(1.0, M + 1, device="cuda").repeat(D, 1), "D": torch.ones(D, device="cuda")}
    return {name: t.requires_grad_() for name, t in x.items()}


def build(folder: Path):
    """Return mamba-ssm's extension, compiled from its source for this card."""
    from torch.utils.cpp_extension import load

    major, minor = torch.cuda.get_device_capability()
    source = folder / "csrc" / "selective_scan"
    half = [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS")]
    half += [f"-U__CUDA_NO_{name}__" for name in ("BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS")]
    half += ["-U__CUDA_NO_BFLOAT162_CONVERSIONS__"]
    return load(
        "selective_scan_cuda",
        [str(path) for path in sorted([*source.glob("*.cu"), *source.glob("*.cpp")])],
        extra_cflags=["-O3", "-std=c++17"],
        extra_cuda_cflags=["-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr"]
        + ["--expt-extended-lambda", f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}", *half],
        extra_include_paths=[str(source)],
    )


def mamba(x: dict, extension, d_out: torch.Tensor) -> Contender:
    """Return mamba-ssm's scan with autograd around it as in its own interface, on tensors [B D T] of its own."""
    d_own = d_out.mT.contiguous()
    order = ("u", "dt", "A", "B", "C", "D", "z")
    given = {n: x[n].detach() for n in order if n in x}
    given = {n: t.mT.contiguous() if t.ndim == 3 else t for n, t in given.items()}
    leaves = [t.requires_grad_() for t in given.values()]

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, dt, A, B, C, D, z=None):
            B, C = B.unsqueeze(1), C.unsqueeze(1)
            out, x, *gated = extension.fwd(u, dt, A, B, C, D, z, None, False)
            ctx.save_for_backward(u, dt, A, B, C, D, z, x, out if gated else None)
            return gated[0] if gated else out

        @staticmethod
        def backward(ctx, _):  # pyright: ignore[reportIncompatibleMethodOverride]
            u, dt, A, B, C, D, z, x, out = ctx.saved_tensors
            du, d_dt, dA, dB, dC, dD, _, *dz = extension.bwd(
                u, dt, A, B, C, D, z, None, d_own, x, out, None, False, False
            )
            return du, d_dt, dA, dB.squeeze(1), dC.squeeze(1), dD, *(dz[:1] if z is not None else [])

    return Contender(lambda: (Scan.apply(*leaves).mT,), leaves)


@contextmanager
def settings(variant: str, size: int):
    """Set constants of the kernels' module for a while; schedules are those of one size."""
    changes = dict(part.split("=") for part in variant.split(";") if part)
    plain = {name: getattr(plans, name) for name in changes}
    for name, value in changes.items():
        numbers = [int(n) for n in value.split(",")]
        new = numbers[0]
        if len(numbers) > 1:
            new = [*plain[name][:size], plans.Schedule(*numbers), *plain[name][size + 1 :]]
        setattr(plans, name, new)
    plans._plan.cache_clear()
    try:
        yield
    finally:
        for name, value in plain.items():
            setattr(plans, name, value)
        plans._plan.cache_clear()


def worst_error(x: dict, eigenvalues, d_out) -> float:
    """Return our largest relative error on a part of the channels against float32 chunks."""
    part = {n: t.detach()[:512] if n in ("A", "D") else t.detach()[:1, :, :512] for n, t in x.items()}
    exact = {n: t.float().requires_grad_() for n, t in part.items()}
    y, _ = selective_scan(**exact, eigenvalues=eigenvalues, backend="chunk")
    y.backward(d_out[:1, :, :512].float())
    ours = {n: t.detach().requires_grad_() for n, t in x.items()}
    got, _ = selective_scan(**ours, eigenvalues=eigenvalues, backend="triton")
    got.backward(d_out)
    pairs = [(got, y), *((ours[n].grad, exact[n].grad) for n in ("u", "dt", "z") if n in x)]
    return max(((a[:1, :, :512].float() - b).norm() / b.norm()).item() for a, b in pairs)


def contenders(name: str, args: argparse.Namespace, extension) -> tuple[dict[str, Contender], torch.Tensor]:
    """Return every implementation that is there, on one shape, and the gradient to the output."""
    x = inputs(*SHAPES[name], args.gate)
    d_out = torch.randn_like(x["u"])
    found = {}
    variants = args.variant + (VARIANTS[name] if args.variants else [])
    size = plans.plan_of(x["u"], x["A"], [], 1.0).size
    for label, eigenvalues, variant in (
        ("[-1,1]", (-1.0, 1.0), ""),
        ("[0,1]", (0.0, 1.0), ""),
        *((v, (-1.0, 1.0), v) for v in variants),
    ):
        call = partial(selective_scan, **x, eigenvalues=eigenvalues, backend="triton")
        error = partial(worst_error, x, eigenvalues, d_out)
        found[f"statetrack {label}"] = Contender(call, list(x.values()), partial(settings, variant, size), error)
    if extension is not None:
        found["mamba-ssm"] = mamba(x, extension, d_out)
    return found, d_out


def profile(name: str, gate: bool) -> str:
    """Return the device time of every kernel in one forward and backward."""
    x = inputs(*SHAPES[name], gate)
    d_out = torch.randn_like(x["u"])
    for recorded in (None, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])):
        if recorded is not None:
            recorded.start()
        selective_scan(**x, backend="triton")[0].backward(d_out)
        torch.cuda.synchronize()
    assert recorded is not None
    recorded.stop()
    rows = [
        {"kernel": e.key[:60], "launches": e.count, "ms": e.device_time_total / 1e3}
        for e in sorted(recorded.key_averages(), key=lambda e: -e.device_time_total)[:12]
    ]
    return table("kernels of one forward and backward", rows)


def measure(name: str, args: argparse.Namespace, extension) -> str:
    """Return the table of one shape, and of its kernels if asked."""
    B, T, D, M = SHAPES[name]
    found, d_out = contenders(name, args, extension)
    rows = take_turns(found, d_out)
    card = torch.cuda.get_device_properties(0)
    floor = B * T * D * M / (16 * card.multi_processor_count * CLOCK) * 1e3
    for row in rows:
        if "forward ms" in row:
            row["backward ms"] = row["forward+backward ms"] - row["forward ms"]
            row["forward / floor"] = row["forward ms"] / floor
    title = f"B={B} T={T} D={D} M={M}, bf16{', gate' if args.gate else ''}; floor {floor:.3f} ms"
    text = table(title, rows)
    return text + "\n" + profile(name, args.gate) if args.profile else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--mamba", type=Path, help="folder of mamba-ssm's unpacked source")
    parser.add_argument("--no-gate", dest="gate", action="store_false", help="without z")
    parser.add_argument("--variant", nargs="+", default=[], help="other constants, a row each")
    parser.add_argument("--variants", action="store_true", help="rows for a list of likely ones")
    parser.add_argument("--profile", action="store_true", help="device time per kernel")
    args = parser.parse_args()
    torch.manual_seed(0)
    extension = build(args.mamba) if args.mamba else None
    report((measure(name, args, extension) for name in args.only), args.out)


if __name__ == "__main__":
    main()
