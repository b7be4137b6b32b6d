"""The delta rule on one GPU: ours beside fla-core's and FlashQLA's kernels, interleaved in one run.

    python benchmarks/delta_rule_gpu.py [--out FILE.md] [--only N1 T32k N2 N4 key decode tracking] [--long]
        [--no-peers]

Needs a CUDA device and Triton; a peer that is not installed is left out (fla-core 0.6.0, flash-qla 0.1.3). Times are
medians of device events, the implementations taking turns; peak memory is above what is allocated before the call, the
previous gradients included; the first call's time is wall-clock, compilation included. Decoding: a CUDA graph of 64
single tokens that update a float32 state in place; the floor is one read and one write of the state at 4.8 TB/s.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from gpu_turns import Contender, device_ms, report, take_turns
from tables import Rows, table

from statetrack.ops import delta_rule
from statetrack.ops.delta_rule.triton import delta_rule_step_

BANDWIDTH = 4.8e12  # bytes per second, H200
SHAPES = {  # B, T, H, K = V, N
    "N1": (8, 4096, 16, 128, 1),
    "T32k": (1, 32768, 16, 128, 1),
    "N2": (8, 4096, 16, 128, 2),
    "N4": (8, 4096, 16, 128, 4),
    "key": (8, 4096, 16, 128, 1),  # with a decay per key channel
}


def inputs(B, T, H, D, N, highest=2.0, per_key=False):
    """Draw unit keys and queries, normal values, beta in [0, highest], perhaps log decays, on the GPU in bf16."""
    draw = partial(torch.randn, device="cuda")
    q = F.normalize(draw(B, T, H, D), dim=-1).bfloat16()
    k = F.normalize(draw(B, T, N, H, D), dim=-1).bfloat16()
    v = draw(B, T, N, H, D).bfloat16()
    beta = torch.rand(B, T, N, H, device="cuda") * highest
    log_decay = [F.logsigmoid(draw(B, T, H, D) + 2)] if per_key else []
    return [x.requires_grad_() for x in (q, k, v, beta, *log_decay)]


def ours(precision="tracking"):
    def run(q, k, v, beta, log_decay=None):
        return delta_rule(q, k, v, beta, log_decay, backend="triton", precision=precision)

    return run


def ours_fast():
    return ours("fast")


def ours_without_decay():
    """Take a decay per key channel of 1."""
    run = ours()
    return lambda q, k, v, beta: run(q, k, v, beta, beta.new_zeros(()).expand(*v.shape[:2], v.shape[3], q.shape[3]))


def fla():
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_product import chunk_gated_delta_product
    from fla.ops.kda import chunk_kda

    def run(q, k, v, beta, log_decay=None):
        N = k.shape[2]
        if log_decay is not None:
            k, v, beta = (x.squeeze(2) for x in (k, v, beta))
            return chunk_kda(q, k, v, log_decay, beta, output_final_state=True)
        if N == 1:
            return chunk_delta_rule(q, k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2), output_final_state=True)
        flat = k.flatten(1, 2), v.flatten(1, 2)
        gate = torch.zeros(*q.shape[:3], device=q.device)
        return chunk_gated_delta_product(
            q, *flat, gate, beta.flatten(1, 2), num_householder=N, output_final_state=True
        )  # fmt: skip

    return run


def flash_qla():
    from flash_qla import chunk_gated_delta_rule

    def run(q, k, v, beta, log_decay=None):
        if k.shape[2] > 1 or log_decay is not None:
            raise NotImplementedError("one factor per token, one decay per head")
        gate = torch.zeros(*q.shape[:3], device=q.device)
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        return chunk_gated_delta_rule(q=q, k=k, v=v, g=gate, beta=beta, output_final_state=True)

    return run


def available(peers: bool = True) -> dict:
    """Return the implementations that can be imported here."""
    found = {}
    for name, make in (
        ("statetrack", ours),
        ("statetrack fast", ours_fast),
        ("fla-core", fla),
        ("FlashQLA", flash_qla),
    ):
        if not peers and not name.startswith("statetrack"):
            continue
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return found


def compare(shape, peers: bool, per_key: bool = False) -> Rows:
    """Time every implementation on one shape, taking turns."""
    x = inputs(*shape, per_key=per_key)
    d_out = torch.randn(*x[0].shape, device="cuda").bfloat16()
    return take_turns({name: Contender(partial(f, *x), x) for name, f in available(peers).items()}, d_out)


def decode(batches, H=16, D=128, steps=64) -> Rows:
    """Time single tokens, recorded as one CUDA graph, beside what moving the state takes."""
    rows = []
    for B in batches:
        q, k, v, beta = (x.detach() for x in inputs(B, 1, H, D, 1))
        state = torch.zeros(B, H, D, D, device="cuda")
        step = partial(delta_rule_step_, q, k, v, beta, None, state, D**-0.5)
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                step()
        microseconds = median(device_ms(graph.replay) for _ in range(5)) / steps * 1e3
        floor = 2 * state.numel() * 4 / BANDWIDTH * 1e6
        rows.append({"batch": B, "us per token": microseconds, "floor us": floor, "times": microseconds / floor})
    return rows


def tracking(lengths, peers: bool, dtype=torch.bfloat16, H=2, D=128) -> Rows:
    """Measure the state's error after reflections along 8 directions, one write at the start, against float64."""
    torch.manual_seed(0)
    T = max(lengths)
    directions = F.normalize(torch.randn(8, H, D, device="cuda"), dim=-1).to(dtype)
    index = torch.randint(0, 8, (T,), device="cuda")
    k = directions[index].view(1, T, 1, H, D)
    q = F.normalize(torch.randn(1, T, H, D, device="cuda"), dim=-1).to(dtype)
    v = torch.zeros(1, T, 1, H, D, device="cuda", dtype=dtype)
    v[:, 0] = torch.randn(1, H, D, device="cuda").to(dtype)
    beta = torch.full((1, T, 1, H), 2.0, device="cuda")
    exact = _reflect(directions.double(), index, v[0, 0, 0].double(), lengths)
    rows = []
    for name, f in (available(peers) | {"statetrack, decay per key of 1": ours_without_decay()}).items():
        row = {"implementation": name, "dtype": str(dtype).removeprefix("torch.")}
        for n in lengths:
            try:
                with torch.no_grad():
                    _, state = f(q[:, :n], k[:, :n], v[:, :n], beta[:, :n])
                state = state[0].double()
                row[f"T={n}"] = ((state - exact[n]).norm() / exact[n].norm()).item()
            except Exception as error:
                row[f"T={n}"] = type(error).__name__
        rows.append(row)
    return rows


def _reflect(directions, index, v, lengths) -> dict:
    """Return the exact state [H K V] after each length: one reflection matrix per direction, chunks of 64 composed."""
    d = F.normalize(directions, dim=-1).transpose(0, 1)  # [H 8 K]
    eye = torch.eye(d.shape[-1], dtype=d.dtype, device=d.device)
    mirrors = eye - 2 * d[..., :, None] * d[..., None, :]  # [H 8 K K]
    state = 2 * d[:, index[0], :, None] * v[:, None, :]
    path = mirrors[:, index[1:]] if len(index) <= 4096 else None
    out, t = {}, 1
    for n in sorted(lengths):
        while t < n:
            stop = min(n, t + 4096)
            block = path[:, t - 1 : stop - 1] if path is not None else mirrors[:, index[t:stop]]
            while block.shape[1] > 1:  # pairwise products, later factor on the left
                if block.shape[1] % 2:
                    block = torch.cat([block, eye.expand(block.shape[0], 1, *eye.shape)], dim=1)
                block = block[:, 1::2] @ block[:, 0::2]
            state, t = block[:, 0] @ state, stop
        out[n] = state.clone()
    return out


def measure(name: str, args: argparse.Namespace) -> str:
    """Return the table, or the tables, of one of the names that --only takes."""
    if name == "tracking":
        lengths = [4096, 65536] + ([1048576] if args.long else [])
        text = table("state error while tracking (beta = 2, 8 directions)", tracking(lengths, args.peers))
        return text + "\n" + table("the same, float32 inputs", tracking(lengths[:2], args.peers, torch.float32))
    if name == "decode":
        return table("one token: H=16 K=V=128 N=1, bf16, state float32", decode([1, 8, 64]))
    B, T, H, D, N = SHAPES[name]
    title = f"B={B} T={T} H={H} K=V={D} N={N}, bf16" + (", decay per key channel" if name == "key" else "")
    return table(title, compare(SHAPES[name], args.peers, per_key=name == "key"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    names = [*SHAPES, "decode", "tracking"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--long", action="store_true", help="tracking error up to a million tokens")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours only")
    args = parser.parse_args()
    torch.manual_seed(0)
    report((measure(name, args) for name in args.only), args.out)


if __name__ == "__main__":
    main()
