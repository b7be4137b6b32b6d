"""The papers' tables: their recipes, and running them cell by cell."""

import json
import math
import os
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes import p1_chomsky, p1_s5, p2_groups
from recipes.demo import demo_settings
from statetrack import reproduce as tables
from statetrack.errors import UsageError
from statetrack.layers import DeltaProductConfig
from statetrack.model import Config, Model
from statetrack.reproduce import TABLES
from statetrack.results import Cell, Extent, interval
from statetrack.runs import Run
from statetrack.tasks import get_task
from statetrack.train import Interrupted, Report, Settings, train


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("recipe", [p1_chomsky, p1_s5, p2_groups], ids=lambda r: r.__name__)
def test_recipes_build(recipe: Any, quick: bool):
    cells: list[Cell] = recipe.cells(quick)
    assert len({cell.name for cell in cells}) == len(cells)
    seen = set()
    for cell in cells:
        settings = cell.settings(3)
        settings.check()
        assert settings.seed == 3
        assert not set(cell.name) & set(" []()*?{}$'\"\\/&;|<>~!"), "a name is a directory, typed into shells"
        task = get_task(settings.task)
        task.length_range(settings.train_length)
        task.length_range(cell.length)
        assert cell.measure in ("scaled_accuracy", "sequence_accuracy")
        assert (cell.measure == "sequence_accuracy") == (task.supervision == "every")
        assert (settings.model.vocab_size, settings.model.num_outputs) == (task.vocab_size, task.num_outputs)
        if settings.model not in seen:
            seen.add(settings.model)
            with torch.device("meta"):
                settings.model.build()
    said = getattr(recipe, "SAYS", {})
    assert set(said) <= {cell.name for cell in cells}, "what the paper says belongs to a cell"


def test_quick_recipes_are_smaller():
    for recipe in (p1_chomsky, p1_s5, p2_groups):
        for small, full in zip(recipe.cells(True), recipe.cells(False), strict=True):
            assert small.name == full.name and small.settings(0).steps < full.settings(0).steps / 10


@pytest.mark.parametrize("mixer", ["deltanet", "mamba"])
def test_demo_recipe_differs_in_the_range_only(mixer: str):
    whole, half = (demo_settings(mixer, eigenvalues, 0) for eigenvalues in ((-1.0, 1.0), (0.0, 1.0)))
    mixers = (replace(half.model.mixers[0], eigenvalues=(-1.0, 1.0)),)
    assert whole != half and replace(half, model=replace(half.model, mixers=mixers)) == whole


# one tiny table


def tiny_settings(seed: int) -> Settings:
    task = get_task("S3")
    model = Config(
        vocab_size=task.vocab_size,
        num_outputs=task.num_outputs,
        mixers=(DeltaProductConfig(dim=16, heads=2),),
        mlp_dim=16,
    )
    return Settings(task="S3", model=model, train_length=(4, 4), steps=6, batch_size=4, seed=seed, log_every=1)


SMALL = Cell(
    name="S3-small", settings=tiny_settings, length=8, measure="sequence_accuracy", sequences=16, best=0.5, says="x"
)
CELLS = [SMALL, replace(SMALL, name="S3-other", best=None, says="")]


class Reproduction:
    """Reproduce a table made of CELLS; `steps` lists the steps taken, and Ctrl-C comes after `stop_after` of them."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch):
        self.out, self.cells, self.stop_after, self.steps = out, CELLS, -1, []
        monkeypatch.setattr(tables, "train", self.train)
        monkeypatch.setattr(tables, "import_module", lambda _: SimpleNamespace(cells=lambda _: self.cells))

    def train(self, settings: Settings, path: Path, *, resume: bool, report: Report, until: float) -> Model:
        def counted(row: dict[str, Any]) -> None:
            report(row)
            self.steps.append(row["step"])
            if len(self.steps) == self.stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        return train(settings, path, resume=resume, report=counted, until=until)

    def __call__(self, **changes: Any) -> list[int]:
        self.steps = []
        options = {"cells": (), "seeds": (0, 1), "list_only": False, "device": "cpu", "out": self.out}
        options["extent"] = Extent()
        tables.reproduce("p2-groups", **{**options, **changes})
        return self.steps


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reproduction:
    return Reproduction(tmp_path, monkeypatch)


def test_reproduce_runs_then_skips(table: Reproduction, capsys: pytest.CaptureFixture[str]):
    assert table() == [1, 2, 3, 4, 5, 6] * 4
    folder = table.out / "p2-groups"
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(r["cell"], r["seed"]) for r in results] == [(c.name, seed) for c in CELLS for seed in (0, 1)]
    assert all(r["length"] == 8 and r["sequences"] == 16 and "sequence_accuracy" in r for r in results)
    text = (folder / "table.md").read_text()
    assert text.startswith("The paper's settings.") and "S3-other" in text
    header, _, first, *_ = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    row = {name.strip(): value.strip() for name, value in zip(header, first, strict=True)}
    values = sorted(r["sequence_accuracy"] for r in results[:2])
    assert row["cell"] == "S3-small" and row["measure"] == "sequence accuracy at 8" and row["seeds"] == "2"
    assert [float(row[k]) for k in ("worst", "best")] == [round(v, 3) for v in values]
    assert row["paper's best"] == "0.500" and row["paper's median"] == "" and row["paper says"] == "x"
    printed = capsys.readouterr().out.split()
    assert {"S3-small", "S3-other", "0.500"} <= set(printed), "names are whole at 80 columns"
    assert table() == []
    assert (folder / "table.md").read_text() == text


def test_reproduce_resumes_what_was_interrupted(table: Reproduction):
    table.stop_after = 9  # in the second run's third step
    with pytest.raises(Interrupted):
        table(cells=["small"])
    done = table.out / "p2-groups" / "S3-small"
    assert (done / "seed0" / "result.json").exists() and not (done / "seed1" / "result.json").exists()
    assert table(cells=["small"]) == [5, 6]
    train(tiny_settings(1), table.out / "whole")
    whole, resumed = (Run(p).load_weights() for p in (table.out / "whole", done / "seed1"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (table.out / "p2-groups" / "S3-other").exists()


def test_reproduce_keeps_quick_apart_and_says_so(table: Reproduction):
    table(cells=["small"], seeds=(0,), extent=Extent(quick=True))
    assert "NOT the paper's" in (table.out / "p2-groups-quick" / "table.md").read_text()
    assert not (table.out / "p2-groups").exists()


def test_reproduce_with_fewer_steps_says_so(table: Reproduction):
    assert max(table(cells=["small"], seeds=(0,), extent=Extent(steps=3))) == 3
    text = (table.out / "p2-groups-3-steps" / "table.md").read_text()
    assert "but for 3 steps of training" in text and "statetrack reproduce p2-groups --steps 3" in text
    with pytest.raises(UsageError, match="steps must be"):
        table(cells=["small"], extent=Extent(steps=0))


def test_reproduce_goes_on_slice_by_slice(table: Reproduction, capsys: pytest.CaptureFixture[str]):
    slices = [table(minutes=1e-9)]  # time is up before the first run
    assert (
        slices == [[]]
        and "4 of 4 runs unfinished; the same command goes on with S3-small seed 0\n" in capsys.readouterr().out
    )
    first = {"cells": ["small"], "seeds": (0,)}
    while not (table.out / "p2-groups" / "S3-small" / "seed0" / "result.json").exists():
        slices.append(table(**first, minutes=1e-3))
    assert sorted(step for taken in slices for step in taken) == [1, 2, 3, 4, 5, 6], "no step is taken twice"
    train(tiny_settings(0), table.out / "whole")
    whole, sliced = (
        Run(p).load_weights() for p in (table.out / "whole", table.out / "p2-groups" / "S3-small" / "seed0")
    )
    assert all(torch.equal(whole[name], sliced[name]) for name in whole)


def test_reproduce_side_by_side(table: Reproduction, monkeypatch: pytest.MonkeyPatch):
    one = table.out / "one"
    table(cells=["small"], out=one)
    monkeypatch.setattr(tables, "train", train)  # each run has a process of its own
    table(cells=["small"], jobs=2)
    names = ("results.jsonl", "table.md", "figure.png", "figure.svg")
    left, right = (
        [json.loads(x) for x in (o / "p2-groups" / names[0]).read_text().splitlines()] for o in (one, table.out)
    )
    measured = ("cell", "seed", "curve", "sequence_accuracy", "steps")
    assert [[r[k] for k in measured] for r in left] == [[r[k] for k in measured] for r in right]
    assert all((table.out / "p2-groups" / name).stat().st_size > 0 for name in names)


def test_interval_of_a_mean():
    """Student's 97.5 % quantiles, as tables have them: 12.706 (1 degree of freedom), 4.303 (2), 2.262 (9)."""
    assert math.isnan(interval([0.5]))
    assert interval([0.0, 2.0]) == pytest.approx(12.706, abs=1e-3)
    assert interval([0.0, 1.0, 2.0]) == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    ten = [float(i % 2) for i in range(10)]
    assert interval(ten) == pytest.approx(2.262 * math.sqrt(10 / 36 / 10), abs=1e-3)


def test_reproduce_refuses(table: Reproduction):
    bad = (
        ({"cells": ("zzz",)}, "contains zzz"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (0, -1)}, "seed must be at least 0"),
        ({"execution": "quick"}, "execution must be auto"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"minutes": 0.0}, "minutes above 0"),
    )
    for changes, message in bad:
        with pytest.raises(UsageError, match=message):
            table(**changes)
    assert list(table.out.iterdir()) == []
    table(cells=["small"], seeds=(0,))
    table.cells = [replace(SMALL, settings=lambda seed: replace(tiny_settings(seed), lr=0.5))]
    with pytest.raises(UsageError, match="was made with other settings"):
        table(cells=["small"], seeds=(0,))


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_of_a_table_is_listed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The list is for copying names to --cells, so none may be cut, however narrow the terminal."""
    tables.reproduce(name, cells=(), seeds=(0,), extent=Extent(), list_only=True, device="cpu", out=tmp_path)
    shown = capsys.readouterr().out.split()
    assert [cell.name for cell in import_module(TABLES[name]).cells(False) if cell.name not in shown] == []
    assert list(tmp_path.iterdir()) == []
