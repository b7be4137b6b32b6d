"""Pages of results: what a paper's table became, from stored runs, made ones here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import p1_chomsky
from statetrack.errors import UsageError
from statetrack.evaluate import at_precision
from statetrack.layers import DeltaProductConfig, LSTMConfig
from statetrack.model import Config
from statetrack.reproduce import TABLES, import_module, page
from statetrack.results import Cell, Extent


def made(folder: Path, cell: Cell, values: list[float], **more: Any) -> None:
    """Write results of a cell's seeds as a run leaves them."""
    for seed, value in enumerate(values):
        path = folder / cell.name / f"seed{seed}"
        path.mkdir(parents=True)
        row = {
            "cell": cell.name,
            "seed": seed,
            cell.measure: value,
            "seconds": 30.0,
            "device": "made",
            "commit": "c" * 40,
        }
        (path / "result.json").write_text(json.dumps(row | more))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a directory with made results of some cells of P1's table."""
    solved, behind, *_ = p1_chomsky.cells(False)
    longer = [
        {"length": 100_000, "precision": p, "scaled_accuracy": v} for p, v in (("tracking", 0.987), ("fast", 0.012))
    ]
    made(tmp_path / "runs" / "p1-chomsky", solved, [1.0, 0.96, 0.98], longer=longer)
    made(tmp_path / "runs" / "p1-chomsky", behind, [0.0, 0.0])
    return tmp_path


def test_a_page_says_all_there_is(results: Path):
    out = results / "pages"
    out.mkdir()
    (out / "p1-chomsky.notes.md").write_text("Tried twice.")
    page("p1-chomsky", results / "runs", out, extent=Extent())
    text = (out / "p1-chomsky.md").read_text()
    assert "appendix E.1.1" in text and "Deviations: one learning rate" in text
    assert "    statetrack reproduce p1-chomsky\n" in text and "Trained on made at commit ccccccc" in text
    row = next(line for line in text.splitlines() if line.startswith("| parity-deltanet_-1to1 |"))
    cells = [word.strip() for word in row.strip("|").split("|")]
    assert cells[:7] == ["parity-deltanet_-1to1", "scaled accuracy at 40..256", "3", "1.000", "0.980", "0.960", "0.980"]
    assert cells[7] == "0.050" and cells[9:11] == ["1.000", "0.999"] and cells[-1] == "90", "interval, paper, seconds"
    assert "| parity-deltanet_-1to1 | 100000 | fast | 3 | 0.012 | 0.012 |" in text
    assert "below the paper's best in" not in text, "0.017 is not more than 0.05 away"
    assert "![p1-chomsky](p1-chomsky.png)" in text and "Tried twice." in text
    assert "Not run: parity-mamba_-1to1, " in text
    assert len((out / "p1-chomsky.jsonl").read_text().splitlines()) == 5
    assert (out / "p1-chomsky.png").stat().st_size > 0 and (out / "p1-chomsky.svg").stat().st_size > 0


def test_a_page_is_drawn_again_from_its_own_rows(results: Path):
    first, again = results / "first", results / "again"
    page("p1-chomsky", results / "runs", first, extent=Extent())
    page("p1-chomsky", first, again, extent=Extent())
    for name in ("p1-chomsky.md", "p1-chomsky.jsonl"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_what_is_lower_than_the_paper_is_named(tmp_path: Path):
    arithmetic = next(cell for cell in p1_chomsky.cells(False) if cell.name == "arithmetic-deltanet_-1to1")
    made(tmp_path / "p1-chomsky", arithmetic, [0.91, 0.5])
    page("p1-chomsky", tmp_path, tmp_path / "out", extent=Extent())
    said = "Our best seed is more than 0.05 below the paper's best in: arithmetic-deltanet_-1to1."
    assert said in (tmp_path / "out" / "p1-chomsky.md").read_text()


def test_a_figure_per_task(tmp_path: Path):
    every = import_module(TABLES["p2-groups"]).cells(False)
    for cell in (every[0], every[-1]):
        made(tmp_path / "p2-groups", cell, [0.5, 0.25], curve=[[1, 1.0], [512, 0.5]])
    page("p2-groups", tmp_path, tmp_path / "out", extent=Extent())
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"p2-groups-S3.png", "p2-groups-S5.png"}
    text = (tmp_path / "out" / "p2-groups.md").read_text()
    assert all(f"]({name})" in text for name in names)


def test_no_page_without_results(tmp_path: Path):
    with pytest.raises(UsageError, match="holds no results of p1-s5; run statetrack reproduce p1-s5 first"):
        page("p1-s5", tmp_path, tmp_path / "out", extent=Extent())
    (tmp_path / "p1-s5.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"p1-s5.jsonl is not a list of results"):
        page("p1-s5", tmp_path, tmp_path / "out", extent=Extent())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_every_cell_is_a_run(table: str, quick: bool):
    every = import_module(TABLES[table]).cells(quick)
    assert len({cell.name for cell in every}) == len(every)
    for cell in every:
        settings = cell.settings(1)
        settings.check()
        assert settings.seed == 1 and cell.longer


def test_the_order_of_the_cells():
    names = [cell.name for cell in p1_chomsky.cells(False)]
    first = [n for n in names if "deltanet" in n or "mamba" in n]
    assert names[:16] == first and names[0].startswith("parity") and names[15].startswith("brackets-no-mult")
    assert names[16:19] == ["parity-transformer", "parity-mlstm", "parity-slstm"]


def test_precision_needs_a_delta_rule_on_a_gpu():
    lstm, delta = (
        Config(vocab_size=3, num_outputs=3, mixers=(mixer,)).build()
        for mixer in (LSTMConfig(dim=16), DeltaProductConfig(dim=16))
    )
    with pytest.raises(UsageError, match="no delta rule"):
        at_precision(lstm, "fast")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="this model is on cpu"):
            at_precision(delta, "fast")
        return
    fast = at_precision(delta.cuda(), "fast")
    assert all(torch.equal(a, b) for a, b in zip(fast.parameters(), delta.parameters(), strict=True))
    tokens = torch.randint(0, 3, (2, 300), device="cuda")
    assert not torch.equal(fast(tokens)[0], delta(tokens)[0])


def test_ctrl_c_in_the_middle_of_runs_side_by_side(tmp_path: Path):
    """Every process ends, and the same command goes on where each run was stopped."""
    root = Path(__file__).parent.parent
    words = ["p2-groups", "--quick", "--cells", "S3-N1_-1to1", "--seeds", "0", "1", "--jobs", "2", "--device", "cpu"]
    main = "from statetrack.cli import main; main()"
    command = [sys.executable, "-c", main, "reproduce", *words, "--out", str(tmp_path)]
    runs = [tmp_path / "p2-groups-quick" / "S3-N1_-1to1" / f"seed{seed}" for seed in (0, 1)]
    with subprocess.Popen(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not all((run / "metrics.jsonl").exists() for run in runs) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.strip().splitlines()[-1].startswith("statetrack: stopped"), said
    assert all((run / "checkpoint.pt").exists() for run in runs)
