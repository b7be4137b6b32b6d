"""torch.compile gives what eager gives: nothing of ours is traced into something else."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.cases import OPS, OpCase
from tests.test_ops import run_with_grads

NAMES = ("delta", "delta-head-decay", "attention-head-decay", "dplr", "scan-[-1,1]")


def largest_difference(case: OpCase, tokens: int) -> float:
    """Return by how much outputs and gradients of the compiled op differ from those of the eager one."""
    tensors = case.make(torch.Generator().manual_seed(0), 2, tokens)
    want = run_with_grads(case, tensors, backend="chunk")
    compiled = OpCase(case.name, torch.compile(case.op), case.make, case.per_token, case.options)
    got = run_with_grads(compiled, tensors, backend="chunk")
    return max(float((got[key] - want[key]).abs().max()) for key in want)


def test_compiled_ops_have_the_gradients_of_eager_ones():
    """One chunk, where a chunk op that is traced loses gradients (torch 2.13, inductor).

    In a process of its own, since the checks of shapes that the other tests install cannot be traced.
    """
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_compile"],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    differences = [line.split() for line in found.stdout.splitlines()]
    assert len(differences) == len(NAMES)
    assert all(float(difference) == 0 for *_, difference in differences), found.stdout


if __name__ == "__main__":
    for chosen in OPS:
        if chosen.name in NAMES:
            print(chosen.name, largest_difference(chosen, tokens=5))
