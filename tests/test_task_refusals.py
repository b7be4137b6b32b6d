"""Tasks: unknown names, unknown options, impossible lengths and sizes are one clear error each."""

from typing import Any

import pytest
import torch

from statetrack.errors import UsageError
from statetrack.tasks import IGNORE, TASKS, get_task

NAMES = [*(name for name in TASKS if ":" not in name), "group:Z2 x S3"]

pytestmark = pytest.mark.wrong_types


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partiy", "did you mean 'parity'.*accepted: parity, modular_arithmetic"),
        ("S5_swap", "did you mean 'S5_swaps'"),
        ("xyzzyx", "unknown; accepted: parity"),
        ("", "unknown; accepted"),
        ("group:Q8", "group 'Q8' is unknown"),
        ("group:", "unknown"),
        ("S9", "more than 5040 elements"),
        ("S5_0_tokens", "tokens_per_letter must be an integer >= 1"),
        ("S5_up_to_1", "no element but the identity"),
        ("Z60_swaps", "no element but the identity"),
        ("Z1", "no element but the identity|says the same"),
        ("automaton:/absent.json", "cannot read the automaton file '/absent.json'"),
    ],
)
def test_unknown_tasks_are_refused(name: str, message: str):
    with pytest.raises(UsageError, match=message):
        get_task(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("parity", {"bos": True}, "no option bos; its options: none"),
        ("S5", {"mult": True, "colour": 1}, "no option colour, mult; its options: supervision, bos"),
        ("modular_arithmetic_brackets", {"multiply": True}, "its options: mult"),
        ("modular_arithmetic_brackets", {"mult": "no"}, "mult must be True or False, got 'no'"),
        ("S5", {"bos": 1}, "bos must be True or False, got 1"),
        ("S5", {"supervision": "first"}, "'first' is unknown; accepted: last, every"),
    ],
)
def test_unknown_options_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        get_task(name, **options)


def test_options_are_read():
    assert get_task("modular_arithmetic_brackets", mult=False).name == "modular_arithmetic_brackets_no_mult"
    assert get_task("S5", bos=False).vocab_size == 120
    _, targets = get_task("S5", supervision="last").sample(seeded(), 4, 9)
    assert ((targets != IGNORE).sum(1) == 1).all() and (targets[:, -1] != IGNORE).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, -3, (5, 4), (1, 2, 3), 2.5, "40", (3, 4.0), True])
def test_impossible_lengths_are_refused(name: str, length: Any):
    with pytest.raises(UsageError, match="length"):
        get_task(name).sample(seeded(), 4, length)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_chunks_are_refused(name: str):
    task = get_task(name)
    with pytest.raises(UsageError, match="batch must be an integer >= 1, got 0"):
        task.sample(seeded(), 0, 10)
    with pytest.raises(UsageError, match="chunk must be an integer >= 1, got 0"):
        task.stream(seeded(), 2, 10, 0)


def test_the_shortest_lengths():
    assert get_task("parity").sample(seeded(), 3, 2)[0].shape == (3, 1)
    assert get_task("modular_arithmetic").sample(seeded(), 3, 3)[0][:, 1].tolist() == [4, 4, 4]
    for name, shortest in (("parity", 2), ("modular_arithmetic", 3)):
        with pytest.raises(UsageError, match=f"{shortest} <= lo"):
            get_task(name).sample(seeded(), 3, shortest - 1)
