"""Tests that torch.compile traces, each in a process of its own: it cannot trace the checks that the tests install."""

import os
import subprocess
import sys
from pathlib import Path


def run_alone(module: str, *args: str) -> None:
    """Run `python -m module args` in the root of the repository; fail with the end of its errors."""
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    found = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, cwd=root, env=env)
    assert found.returncode == 0, found.stderr[-2000:]
