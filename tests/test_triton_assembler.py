"""Which ptxas is chosen, on pretended GPUs and drivers."""

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from statetrack.ops import triton_assembler
from statetrack.ops.triton_assembler import CHOICE, choose_assembler, driver_major, major_minor


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """Pretend that there is a Hopper GPU with a driver that knows CUDA 99; undo the choice afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(triton_assembler, "driver_major", lambda: 99)
    monkeypatch.delenv(CHOICE, raising=False)
    with knobs.nvidia.scope():
        yield monkeypatch


@pytest.mark.usefixtures("hopper")
def test_the_newer_one_on_hopper():
    before = knobs.nvidia.ptxas.version
    choose_assembler()
    assert knobs.nvidia.ptxas == knobs.nvidia.ptxas_blackwell
    assert major_minor(knobs.nvidia.ptxas.version) >= max((12, 9), major_minor(before))


@pytest.mark.parametrize("why", ["other GPU", "chosen by the user", "no GPU"])
def test_left_alone(hopper: pytest.MonkeyPatch, why: str):
    before = knobs.nvidia.ptxas
    if why == "other GPU":
        hopper.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    elif why == "no GPU":
        hopper.setattr(torch.cuda, "is_available", lambda: False)
    else:
        hopper.setenv(CHOICE, before.path)
    choose_assembler()
    assert knobs.nvidia.ptxas == before


def test_a_driver_too_old_is_told(hopper: pytest.MonkeyPatch):
    hopper.setattr(triton_assembler, "driver_major", lambda: 11)
    before = knobs.nvidia.ptxas
    with pytest.warns(UserWarning, match="needs a newer NVIDIA driver"):
        choose_assembler()
    assert knobs.nvidia.ptxas == before


def test_the_driver_is_asked():
    assert driver_major() >= (11 if torch.cuda.is_available() else 0)
