"""The peers that `ops_cpu.py` measures, behind the signatures of `statetrack.ops`.

fla-core       `naive_chunk_gated_delta_rule`, its one file alone: importing the package needs Triton and a GPU, and
               transformers computes otherwise where fla is installed
transformers   `torch_chunk_gated_delta_rule` of Qwen3-Next, installed
mamba-ssm      `selective_scan_ref`, that function alone: the package does not build on a CPU. It takes [B _ T] and runs
               up to twice as fast on transposed views as on contiguous copies, so it gets views
mambapy        `MambaBlock.selective_scan`, which forms the coefficients and calls `pscan`, installed

fla-core and mamba-ssm are read from the archives that `make bench-cpu` downloads and never installs.
"""

from __future__ import annotations

import ast
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Tensor]
"""From an op's tensors, by name, to its output."""

FLA = "fla_core-*.whl", "fla/ops/gated_delta_rule/naive.py"
MAMBA_SSM = "mamba_ssm-*.tar.gz", "mamba_ssm/ops/selective_scan_interface.py"


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
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "rearrange": rearrange, "repeat": repeat}
    exec(compile(module, wanted, "exec"), names)
    return names[wanted]
