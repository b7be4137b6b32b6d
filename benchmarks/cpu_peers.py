"""What statetrack's CPU ops are measured against, each in its own layout behind one signature.

    python benchmarks/cpu_peers.py      # unpack into .bench-venv what cannot be installed there; `make bench-cpu` does it

fla-core       `naive_chunk_gated_delta_rule`, its one file alone: importing the package needs Triton and a GPU, and
               transformers takes another code path where fla is installed, so its wheel is unpacked beside, not installed
transformers   `torch_chunk_gated_delta_rule` of Qwen3-Next
mamba-ssm      `selective_scan_ref`, that function alone: the package does not build on a CPU
mambapy        `MambaBlock.selective_scan`, which forms the coefficients and calls `pscan`

Letters: B batch, T tokens, H heads, K = V head width, D channels, M states per channel.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from statetrack.ops import delta_rule, selective_scan

UNPACKED = {"fla-core": "0.6.0", "mamba-ssm": "2.3.2.post1"}
FOLDER = Path(__file__).resolve().parents[1] / ".bench-venv" / "unpacked"

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: how it wants the inputs laid out, and the call from those to the output."""

    run: Callable[[Inputs], Tensor]
    lay_out: Callable[[Inputs], Inputs] = dict
    output: Callable[[Tensor], Tensor] = lambda y: y  # back to ours


def draw_delta_rule(B: int, T: int, H: int, D: int, highest: float = 1.0) -> Inputs:
    """Draw unit keys and queries [B T H K], values, beta in [0, highest] and log-decays in [-0.1, 0]."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, D, generator=g), dim=-1) for _ in range(2))
    v = torch.randn(B, T, H, D, generator=g)
    beta = torch.rand(B, T, H, generator=g) * highest
    return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": -0.1 * torch.rand(B, T, H, generator=g)}


def draw_selective_scan(B: int, T: int, D: int, M: int) -> Inputs:
    """Draw what a Mamba layer would give: dt in [0.001, 0.1], A = -1 .. -M."""
    g = torch.Generator().manual_seed(0)
    u, dt = torch.randn(B, T, D, generator=g), 1e-3 + 0.099 * torch.rand(B, T, D, generator=g)
    A = -torch.arange(1, M + 1).float().repeat(D, 1)
    b, c = (torch.randn(B, T, M, generator=g) for _ in range(2))
    return {"u": u, "dt": dt, "A": A, "B": b, "C": c, "D": torch.ones(D)}


def delta_rule_ours(x: Inputs) -> Tensor:
    k, v, beta = (x[name].unsqueeze(2) for name in ("k", "v", "beta"))  # N = 1 factor per token
    return delta_rule(x["q"], k, v, beta, x["log_decay"], backend="chunk")[0]


def delta_rule_fla(x: Inputs) -> Tensor:
    run = _fla().naive_chunk_gated_delta_rule
    return run(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], output_final_state=True)[0]


def delta_rule_transformers(x: Inputs) -> Tensor:
    return _transformers()(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], output_final_state=True)[0]


def selective_scan_ours(x: Inputs, eigenvalues: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    return selective_scan(**x, eigenvalues=eigenvalues, backend="chunk")[0]


def selective_scan_ref(x: Inputs) -> Tensor:
    return _mamba_ssm()(x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"], return_last_state=True)[0]


def selective_scan_mambapy(x: Inputs) -> Tensor:
    return _mambapy()(None, x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"])


def channels_first(x: Inputs) -> Inputs:
    """Lay out everything that has tokens as [B _ T]."""
    return {name: t.mT.contiguous() if t.ndim == 3 else t for name, t in x.items()}


OPS: dict[str, dict[str, Implementation]] = {
    "delta_rule": {
        "statetrack": Implementation(delta_rule_ours),
        "fla-core": Implementation(delta_rule_fla),
        "transformers": Implementation(delta_rule_transformers),
    },
    "selective_scan": {
        "statetrack": Implementation(selective_scan_ours),
        "mamba-ssm": Implementation(selective_scan_ref, channels_first, lambda y: y.mT),
        "mambapy": Implementation(selective_scan_mambapy),
    },
}
DRAW = {"delta_rule": draw_delta_rule, "selective_scan": draw_selective_scan}


def leaves(op: str, name: str, shape: tuple[int, ...]) -> Inputs:
    """Draw an op's inputs in the layout of one implementation, to be differentiated."""
    x = OPS[op][name].lay_out(DRAW[op](*shape))
    return {key: t.requires_grad_() for key, t in x.items()}


@cache
def _fla():
    path = FOLDER / "fla-core" / "fla" / "ops" / "gated_delta_rule" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _transformers():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


@cache
def _mamba_ssm():
    """Execute the source of `selective_scan_ref` alone, with the names it uses."""
    from einops import rearrange, repeat

    path = FOLDER / "mamba-ssm" / "mamba_ssm" / "ops" / "selective_scan_interface.py"
    found = [n for n in ast.parse(path.read_text()).body if getattr(n, "name", None) == "selective_scan_ref"]
    names = {"torch": torch, "F": torch.nn.functional, "rearrange": rearrange, "repeat": repeat}
    exec(compile(ast.Module(found, type_ignores=[]), path.name, "exec"), names)
    return names["selective_scan_ref"]


@cache
def _mambapy():
    from mambapy.mamba import MambaBlock

    return MambaBlock.selective_scan


def missing() -> list[str]:
    """Return the peers that this environment lacks."""
    absent = [name for name in UNPACKED if not (FOLDER / name).is_dir()]
    return absent + [name for name in ("transformers", "mambapy", "einops") if importlib.util.find_spec(name) is None]


def versions() -> dict[str, str]:
    """Return the versions of statetrack, torch and the peers that are here."""
    found = {}
    for name in ("statetrack", "torch", "transformers", "mambapy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {name: v for name, v in UNPACKED.items() if (FOLDER / name).is_dir()}


def unpack() -> None:
    """Download fla-core's wheel and mamba-ssm's source and unpack each into a folder of its own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    skip_build = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    for name, release in UNPACKED.items():
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            kind = ["--only-binary", name] if name == "fla-core" else ["--no-binary", name, "--no-build-isolation"]
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", temporary]
            subprocess.run([*command, f"{name}=={release}"], check=True, env=skip_build)
            archive = next(Path(temporary).iterdir())
            inside = Path(temporary) / "inside"
            shutil.unpack_archive(archive, inside, "zip" if archive.suffix == ".whl" else "gztar", **_safely(archive))
            top = inside if archive.suffix == ".whl" else next(inside.iterdir())
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            top.rename(FOLDER / name)


def _safely(archive: Path) -> dict[str, str]:
    """Return the option that keeps a tar archive's members inside its folder."""
    return {} if archive.suffix == ".whl" else {"filter": "data"}


if __name__ == "__main__":
    unpack()
