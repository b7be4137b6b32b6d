"""Evaluation: the same numbers however it is cut; pictures."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from statetrack import evaluate as evaluation
from statetrack.errors import UsageError
from statetrack.evaluate import Length, evaluate, parse_lengths
from statetrack.layers import AttentionConfig, DeltaProductConfig, LSTMConfig, MambaConfig, MixerConfig
from statetrack.model import Config, Model
from statetrack.plots import COLOURS, accuracy_by_length, drawable, training_curve
from statetrack.tasks import Task, get_task
from statetrack.tasks.metrics import accuracy, correct, sequence_accuracy

DELTA = DeltaProductConfig(dim=16, heads=2)
MIXERS = {
    "deltanet": DELTA,
    "mamba": MambaConfig(dim=16, state_size=4),
    "attention": AttentionConfig(dim=16, heads=2),
    "lstm": LSTMConfig(dim=16),
}


def model_for(task: Task, mixer: MixerConfig = DELTA) -> Model:
    """Return an untrained model in float64, where no rounding decides which answer is the largest."""
    torch.manual_seed(0)
    config = Config(vocab_size=task.vocab_size, num_outputs=task.num_outputs, mixers=(mixer,), mlp_dim=16)
    return config.build().double().eval()


class Oracle(Model):
    """Follow the task's automaton, but answer wrongly at given positions of given sequences."""

    def __init__(self, task: Any, mistakes: list[tuple[int, int]]):
        super().__init__(model_for(task).config)
        self.task, self.mistakes = task, mistakes

    def forward(self, tokens: torch.Tensor, state: Any = None):
        done, states = state or (0, None)
        automaton = self.task.automaton
        before = torch.full((len(tokens),), automaton.start) if states is None else states
        run = automaton.run(tokens.numpy(), before.numpy())
        answers = torch.from_numpy(automaton.emits[run])
        for sequence, position in self.mistakes:
            if done <= position < done + tokens.shape[1]:
                answers[sequence, position - done] += 1
        logits = torch.nn.functional.one_hot(answers % self.task.num_outputs, self.task.num_outputs)
        return logits.double(), (done + tokens.shape[1], torch.from_numpy(run[:, -1].copy()))


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS.keys())
@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("parity", 23),
        ("parity", (4, 23)),
        ("modular_arithmetic", (3, 17)),
        ("S3", 21),
        ("S3", (5, 21)),
        ("Z60_2_tokens", 12),
    ],
)
def test_pieces_equal_one_pass(monkeypatch: pytest.MonkeyPatch, name: str, length: Length, mixer: MixerConfig):
    task = get_task(name)
    model = model_for(task, mixer)
    whole = evaluate(model, task, length, sequences=20, batch_size=8)
    for tokens_at_once in (8, 24, 56):  # 1, 3 and 7 tokens of 8 sequences
        monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", tokens_at_once)
        assert evaluate(model, task, length, sequences=20, batch_size=8) == whole


@pytest.mark.parametrize("name", ["parity", "S3", "Z60_2_tokens"])
def test_numbers_are_those_of_the_metrics(monkeypatch: pytest.MonkeyPatch, name: str):
    """Compare with the definitions in tasks.metrics, on the same sequences read in one pass."""
    task = get_task(name)
    model = model_for(task)
    inputs, targets = task.sample(torch.Generator().manual_seed(5), 64, 12)
    predictions = model(inputs)[0].argmax(-1)
    monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", 64 * 5)
    found = evaluate(model, task, 12, sequences=64, batch_size=64, seed=5)
    assert found["accuracy"] == accuracy(predictions, targets)
    assert found["scaled_accuracy"] == (found["accuracy"] - task.chance) / (1 - task.chance)
    if task.supervision == "last":
        assert "curve" not in found
        return
    expected = sequence_accuracy(correct(predictions, targets)).tolist()
    assert found["curve"] == [[t, expected[t - 1 + task.bos]] for t in range(1, 13)]
    assert found["sequence_accuracy"] == expected[-1]


@pytest.mark.parametrize("tokens_at_once", [4, 12, 1 << 15])
def test_the_curve_of_known_mistakes(monkeypatch: pytest.MonkeyPatch, tokens_at_once: int):
    monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", tokens_at_once)
    task = get_task("S3")
    mistakes = [(0, 3), (0, 7), (2, 10), (3, 0)]  # position 0 is BOS, where nothing is asked
    found = evaluate(Oracle(task, mistakes), task, 10, sequences=4, batch_size=4)
    assert found["curve"] == [[t, 1.0 if t < 3 else 0.75 if t < 10 else 0.5] for t in range(1, 11)]
    assert found["sequence_accuracy"] == 0.5 and found["accuracy"] == 37 / 40
    assert evaluate(Oracle(task, []), task, 10, sequences=4, batch_size=4)["sequence_accuracy"] == 1.0


def test_progress_and_the_last_smaller_batch():
    task, shares = get_task("parity"), []
    evaluate(model_for(task), task, 9, sequences=20, batch_size=8, report=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) == 3


def test_twenty_thousand_tokens_in_pieces():
    task = get_task("parity")
    largest = 0

    def watch(module: Any, arguments: Any) -> None:
        nonlocal largest
        largest = max(largest, arguments[0].numel())
        del module

    model = model_for(task).float()
    model.register_forward_pre_hook(watch)
    found = evaluate(model, task, 20_000, sequences=8, batch_size=8)
    assert 0 <= found["accuracy"] <= 1
    assert largest <= evaluation.TOKENS_AT_ONCE < 8 * 20_000


def test_attention_is_refused_beyond_its_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation, "LONGEST_ATTENTION", 20)
    task = get_task("parity")
    hybrid = Config(vocab_size=3, num_outputs=3, mixers=(DELTA, AttentionConfig(dim=16, heads=2))).build()
    for model in (hybrid, model_for(task, AttentionConfig(dim=16, heads=2))):
        evaluate(model, task, 21, sequences=2)  # 20 tokens: the last letter is asked, not read
        with pytest.raises(UsageError, match="up to 20 are accepted, got 29"):
            evaluate(model, task, 30)
    assert evaluate(model_for(task), task, 30, sequences=2)["length"] == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 0}, "sequences must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"length": 0}, "2 <= lo <= hi, got lo = 0"),
        ({"length": (9, 4)}, "lo = 9, hi = 4"),
    ],
)
def test_bad_evaluations(options: dict[str, Any], message: str):
    task = get_task("parity")
    with pytest.raises(UsageError, match=message):
        evaluate(model_for(task), task, **{"length": 8, **options})


def test_lengths_as_written():
    assert parse_lengths(["256", "40..256", "1_000", "1,000,000"]) == [256, (40, 256), 1000, 1_000_000]
    for word in ("", "abc", "4..", "..4", "-3", "3.5", "1e6", "4...8", "4-8"):
        with pytest.raises(UsageError, match="a number or a range like 40..256"):
            parse_lengths([word])


def inked(png: Path, colour: str, opacity: float = 1.0) -> int:
    """Count the pixels of a colour on white, to within the picture's 8 bits."""
    expected = 1 - opacity * (1 - np.array(to_rgb(colour)))
    return int((np.abs(imread(png)[..., :3] - expected) < 2 / 255).all(-1).sum())


def test_accuracy_is_drawn(tmp_path: Path):
    one, two = [(3, 1.0), (8, 0.5)], [(3, 0.0), (8, 1.0), (16, 1.0)]
    both = {"both [-1,1]": [one, two], "alone": [two]}
    png, svg = accuracy_by_length(both, tmp_path / "new" / "accuracy", title="a title", trained=(3, 4))
    assert (
        {path.name for path in (tmp_path / "new").iterdir()} == {"accuracy.png", "accuracy.svg"} == {png.name, svg.name}
    )
    assert all(inked(png, colour) > 100 for colour in COLOURS[:2]) and inked(png, COLOURS[2]) == 0
    assert inked(png, COLOURS[0], opacity=0.2) > 1000, "the band from the worst seed to the best"
    assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for text in ("a title", "both [-1,1] (2 seeds, worst to best)", "alone", "trained up to here"):
        assert f"<!-- {text}" in svg.read_text()
    accuracy_by_length({"alone": [two]}, png, title="a title")
    assert inked(png, COLOURS[0]) > 100 and inked(png, COLOURS[1]) == 0, "a second picture replaces the first"


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_curves(tmp_path: Path):
    name = "DeltaProduct N=4 [-1,1] x1 dim 128, steps 1500, lr 0.003, label_smoothing 0.1"
    png, svg = accuracy_by_length({name: [[(4, 1.0), (8, 0.5)]], "short": [[(4, 0.0)]]}, tmp_path / "a", title="t")
    assert f"<!-- {name} -->" in svg.read_text()
    columns = np.atleast_1d((np.abs(imread(png)[..., :3] - np.array(to_rgb(COLOURS[0]))) < 2 / 255).all(-1).any(0))
    assert columns.mean() > 0.7, "the curve goes from side to side"


def test_characters_that_fonts_lack_are_numbers():
    assert drawable("é␣…🙂\n漢") == "é␣…U+1F642\nU+6F22"


def test_training_is_drawn(tmp_path: Path):
    rows = [{"step": i, "loss": 1 / i, "accuracy": 0.5} for i in range(1, 9)]
    png, svg = training_curve(rows, tmp_path / "training", title="t")
    assert all(inked(png, colour) > 100 for colour in COLOURS[:2]) and "training loss" in svg.read_text()


def test_names_of_pictures(tmp_path: Path):
    for given, stem in (("a", "a"), ("a.png", "a"), ("a.svg", "a"), ("lr0.5", "lr0.5"), ("a.pdf", "a.pdf")):
        written = accuracy_by_length({"x": [[(3, 1.0)]]}, tmp_path / given, title="t")
        assert [path.name for path in written] == [f"{stem}.png", f"{stem}.svg"]
    with pytest.raises(UsageError, match="'.' is no name for a picture"):
        accuracy_by_length({"x": [[(3, 1.0)]]}, Path("."), title="t")
