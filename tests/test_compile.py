"""torch.compile gives what eager gives: nothing of ours is traced into something else."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from statetrack.layers import DeltaProductConfig
from statetrack.layers.packing import Packing
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


def graphs_by_packing() -> list[int]:
    """Return how many graphs a compiled block has cost after each of some packings of different documents."""
    counted, graphs = [], []

    def count(graph, inputs):
        del inputs
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    block = DeltaProductConfig(dim=16, heads=2).build()
    block.compile(backend=count)
    for documents in range(2, 8):
        x = torch.randn(1, 32, 16)
        offsets = torch.tensor([0, *range(3, 3 + documents), 32], dtype=torch.int32)
        y, _ = block(x, None, Packing.of(offsets, x))
        y.sum().backward()
        counted.append(len(graphs))
    return counted


def test_compiled_ops_have_the_gradients_of_eager_ones():
    """One chunk, where a chunk op that is traced loses gradients (torch 2.13, inductor).

    And a compiled layer is not compiled again for every packing of documents. In a process of its own, since the checks
    of shapes that the other tests install cannot be traced.
    """
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_compile"],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    first, *lines = found.stdout.splitlines()
    counted = [int(word) for word in first.split()]
    assert counted[1] == counted[-1] > 0, "compiled again for other documents"
    differences = [line.split() for line in lines]
    assert len(differences) == len(NAMES)
    assert all(float(difference) == 0 for *_, difference in differences), found.stdout


if __name__ == "__main__":
    print(*graphs_by_packing())
    for chosen in OPS:
        if chosen.name in NAMES:
            print(chosen.name, largest_difference(chosen, tokens=5))
