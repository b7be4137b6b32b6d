"""What `ops_cpu.py` measures: inputs, our ops, the peers behind the signatures of ours, and on which machine.

fla-core       `naive_chunk_gated_delta_rule`, `naive_recurrent_gla`, `dplr_recurrence` and `dplr_chunkwise`, each
               function alone: importing the package needs Triton and a GPU, and transformers computes otherwise where
               fla is installed
transformers   `torch_chunk_gated_delta_rule` of Qwen3-Next, installed
mamba-ssm      `selective_scan_ref`, that function alone: the package does not build on a CPU. It takes [B _ T] and runs
               up to twice as fast on transposed views as on contiguous copies, so it gets views
mambapy        `MambaBlock.selective_scan`, which forms the coefficients and calls `pscan`, installed

fla-core and mamba-ssm are read from the archives that `make bench-cpu` downloads and never installs.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import tarfile
import zipfile
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from statetrack.ops import delta_rule, dplr, gated_linear_attention, selective_scan

BACKEND = os.environ.get("BACKEND", "numba")
"""of ours: the compiled kernels, or what BACKEND=chunk names"""

Op = Callable[..., Tensor]
"""From an op's tensors, by name, to its output."""

FLA = "fla_core-*.whl", "fla/ops/gated_delta_rule/naive.py"
FLA_GLA = "fla_core-*.whl", "fla/ops/gla/naive.py"
FLA_DPLR = "fla_core-*.whl", "fla/ops/generalized_delta_rule/dplr/naive.py"
MAMBA_SSM = "mamba_ssm-*.tar.gz", "mamba_ssm/ops/selective_scan_interface.py"


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


def attention_inputs(B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    """Draw normal queries, keys, values, and logarithms of decays per key channel near 1, all asking for gradients."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, K, generator=g) for _ in range(3))
    x = {"q": q, "k": k / K**0.5, "v": v, "log_decay": -0.05 * torch.rand(B, T, H, K, generator=g)}
    return {name: t.requires_grad_() for name, t in x.items()}


def dplr_inputs(B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    """Draw the same, and a = -kh, b = rate kh for unit kh, as in RWKV-7."""
    x = {name: t.detach() for name, t in attention_inputs(B, T, H, K).items()}
    g = torch.Generator().manual_seed(1)
    key = F.normalize(torch.randn(B, T, H, K, generator=g), dim=-1)
    x |= {"a": -key, "b": torch.rand(B, T, H, 1, generator=g) * key}
    return {name: t.requires_grad_() for name, t in x.items()}


INPUTS = {"delta": delta_inputs, "scan": scan_inputs, "gla": attention_inputs, "dplr": dplr_inputs}


def delta_rule_ours(**x: Any) -> Tensor:
    """Apply our delta rule."""
    return delta_rule(**x, backend=BACKEND)[0]


def selective_scan_ours(eigenvalues: tuple[float, float] = (-1.0, 1.0), **x: Any) -> Tensor:
    """Apply our selective scan."""
    return selective_scan(**x, eigenvalues=eigenvalues, backend=BACKEND)[0]


def attention_ours(log_decay: Tensor, **x: Any) -> Tensor:
    """Apply our gated linear attention; the exponential of the logarithms is part of what is timed, as in the peer."""
    return gated_linear_attention(**x, decay=log_decay.exp(), backend=BACKEND)[0]


def dplr_ours(**x: Any) -> Tensor:
    """Apply our diagonal plus low rank."""
    return dplr(**x, backend=BACKEND)[0]


def forward(f: Op, x: dict[str, Tensor]) -> Tensor:
    """Run without keeping anything for a backward."""
    with torch.no_grad():
        return f(**x)


def both(f: Op, x: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output and the gradients of its sum of squares."""
    o = f(**x)
    return o, torch.autograd.grad(o, list(x.values()), o.detach())


def across_keys(x: dict[str, Tensor], grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Take out what lies along a unit key in its gradient: ours has none, since it divides keys by their norm."""
    pairs = zip(x.items(), grads, strict=True)
    return [g - (g * t).sum(-1, keepdim=True) * t.detach() if name == "k" else g for (name, t), g in pairs]


def implementations(op: str, archives: Path) -> dict[str, Op]:
    """Return ours first, then the peers; the scan with eigenvalues in [0, 1], which is all that its peers know."""
    if op == "delta":
        return {"statetrack": delta_rule_ours, **delta_peers(archives)}
    if op == "gla":
        return {"statetrack": attention_ours, **attention_peers(archives)}
    if op == "dplr":
        return {"statetrack": dplr_ours, **dplr_peers(archives)}
    return {"statetrack": partial(selective_scan_ours, (0.0, 1.0)), **scan_peers(archives)}


def delta_peers(archives: Path) -> dict[str, Op]:
    """Return the peers of `delta_rule` with one factor per token and a scalar decay."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    fla = _function(_source(archives, *FLA), "naive_chunk_gated_delta_rule")

    def peer(run: Callable[..., tuple[Tensor, Tensor]]) -> Op:
        def op(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
            k, v, beta = (t.squeeze(2) for t in (k, v, beta))
            return run(q, k, v, g=log_decay, beta=beta, output_final_state=True)[0]

        return op

    return {"fla-core": peer(fla), "transformers": peer(torch_chunk_gated_delta_rule)}


def attention_peers(archives: Path) -> dict[str, Op]:
    """Return the peer of `gated_linear_attention` with positive decays per key channel."""
    run = _function(_source(archives, *FLA_GLA), "naive_recurrent_gla")

    def recurrent(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return run(q, k, v, log_decay, output_final_state=True)[0]

    return {"fla-core": recurrent}


def dplr_peers(archives: Path) -> dict[str, Op]:
    """Return the peers of `dplr`, which take [B H T K]."""
    source = _source(archives, *FLA_DPLR)

    def peer(run: Callable[..., tuple[Tensor, Tensor]]) -> Op:
        def op(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return run(*(t.transpose(1, 2) for t in (q, k, v, a, b, log_decay)))[0].transpose(1, 2)

        return op

    names = {"fla-core, recurrence": "dplr_recurrence", "fla-core, chunks": "dplr_chunkwise"}
    return {label: peer(_function(source, name)) for label, name in names.items()}


def scan_peers(archives: Path) -> dict[str, Op]:
    """Return the peers of `selective_scan` with eigenvalues in [0, 1]."""
    from mambapy.mamba import MambaBlock

    ref = _function(_source(archives, *MAMBA_SSM), "selective_scan_ref")

    def mamba_ssm(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return ref(u.mT, dt.mT, A, B.mT, C.mT, D, return_last_state=True)[0].mT

    def mambapy(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return MambaBlock.selective_scan(None, u, dt, A, B, C, D)

    return {"mamba-ssm": mamba_ssm, "mambapy": mambapy}


def _source(archives: Path, archive: str, member: str) -> str:
    """Read one file out of a wheel or a source archive."""
    found = sorted(archives.glob(archive))
    if len(found) != 1:
        raise SystemExit(f"{archives} holds {len(found)} of {archive}, needs one; `make bench-cpu` downloads the peers")
    if found[0].suffix == ".whl":
        return zipfile.ZipFile(found[0]).read(member).decode()
    with tarfile.open(found[0]) as tar:
        file = tar.extractfile(f"{found[0].name.removesuffix('.tar.gz')}/{member}")
        assert file is not None
        return file.read().decode()


def _function(source: str, wanted: str) -> Any:
    """Execute one function of a source file, with the names that these files import from torch and einops."""
    from einops import rearrange, repeat

    module = ast.parse(source)
    module.body = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == wanted]
    names: dict[str, Any] = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(compile(module, wanted, "exec"), names)
    return names[wanted]


def machine(archives: Path) -> str:
    """Return what was measured, where and when."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    unpacked = ", ".join(" ".join(path.name.removesuffix(".tar.gz").split("-")[:2]) for path in archives.glob("*_*-*"))
    processor = found[1] if found else platform.processor()
    packages = ", ".join(f"{name} {version(name)}" for name in ("statetrack", "torch", "transformers", "mambapy"))
    load = f"{os.getloadavg()[0]:.1f} before the run"
    return f"{processor}, {torch.get_num_threads()} threads, load {load}; {packages}, {unpacked}; {date.today()}"
