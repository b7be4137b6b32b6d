"""Set up for every test: Triton's interpreter where there is no GPU, poisoned memory, reproducible draws."""

import os
import signal
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any test imports triton
NEEDS = {
    "triton": [
        "test_triton_launch.py",
        "test_triton_segments.py",
        *(f"test_{op}_triton.py" for op in ("delta_rule", "dplr", "gated_linear_attention", "selective_scan")),
    ],
    "numba": ["test_numba.py"],
}
collect_ignore = [file for module, files in NEEDS.items() if find_spec(module) is None for file in files]


class AsWritten(PathFinder):
    """Import kernels without checks of shapes: Triton and Numba compile their source."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """Find a module of kernels; leave others to the finders that follow."""
        kernels = fullname.startswith("statetrack.") and (".triton" in fullname or ".numba" in fullname)
        return super().find_spec(fullname, path, target) if kernels else None


check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float
jaxtyping.install_import_hook("statetrack", "tests.conftest.check_types")
sys.meta_path.insert(0, AsWritten)
settings.register_profile("statetrack", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("statetrack")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what it starts in the background
torch.set_num_threads(1)  # pytest-xdist runs one worker per core


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same seed, whichever worker runs it after whatever else."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that unwritten output shows: torch does where it is deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def shapes_are_checked(request: pytest.FixtureRequest):
    """Check every annotated shape and type at run time, but where a test is about what wrong types are answered."""
    wrong = request.node.get_closest_marker("wrong_types") is not None
    jaxtyping.config.update("jaxtyping_disable", wrong)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text of a package of the standard library, for language models."""
    from statetrack.lm.corpus import prepare
    from tests.lm_runs import small

    path = tmp_path_factory.mktemp("lm") / "data"
    prepare(small().data, path)
    return path


@pytest.fixture(autouse=True)
def plans_are_made_anew():
    """Forget the plans of the GPU kernels' launches, for tests that change the constants they are made from."""
    yield
    for name, module in list(sys.modules.items()):
        if name.startswith("statetrack.ops.") and hasattr(module, "_plan"):
            module._plan.cache_clear()
