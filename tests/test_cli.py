"""The command line: one clear line for every mistake, and nothing lost when it is stopped."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from statetrack import cli, evaluate, runs, train, verbs
from statetrack.tasks import TASKS, get_task
from tests.command import Command, contents, signals_after, the_line

ROOT = Path(__file__).parent.parent
SMALL = "--dim 16 --heads 2 --mlp-dim 16 --train-length 3 6 --batch-size 4 --steps 45"
TRAIN = f"train parity {SMALL} --out run"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every test in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; copy it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    cli.main(shlex.split(f"train parity {SMALL} --out {path}"))
    return path


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    return Path(shutil.copytree(finished, here / "run"))


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in runs.Run(path).metrics()]


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_opens_with_its_command():
    """Importing torch takes seconds; help, version and misspelt words do not wait for it."""
    script = """
import sys
from statetrack import cli
for words in ([], ["--version"], ["--help"], ["train", "--no"], *([verb, "--help"] for verb in cli.VERBS.values())):
    print("$", *words, flush=True)
    try:
        cli.main(words)
    except SystemExit:
        pass
sys.exit("torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, "torch was imported"
    shown = dict(part.split("\n", 1) for part in found.stdout.split("$ ")[1:])
    for arguments, verb in cli.VERBS.items():
        text = shown[f"{verb} --help"]
        usage, first = [line for line in text.splitlines() if line][:2]
        assert usage.startswith(f"usage: statetrack {verb} ") and first == (arguments.__doc__ or "").splitlines()[0]
        assert "STR" not in text and "None" not in text
    for verb, operand in (("train", "TASK"), ("evaluate", "RUN ..."), ("plot", "RUN ...")):
        assert operand in shown[f"{verb} --help"].splitlines()[0]


def shown_commands() -> list[str]:
    """Return every command that help, README and guide show."""
    opening = [(arguments.__doc__ or "").splitlines()[0] for arguments in cli.VERBS]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    joined = [re.sub(r"\\\n *", "", page.read_text()) for page in pages]  # a backslash carries on with the next line
    return opening + [c for text in joined for c in re.findall(r"^(?:    |\$ )(statetrack .*)$", text, re.M)]


@pytest.mark.parametrize("line", shown_commands())
def test_shown_commands_parse(line: str):
    words = shlex.split(re.split(r" [<>|] ", line)[0], comments=True)[1:]  # without the shell's part
    parsed = cli.parse(words)
    assert cli.VERBS[type(parsed)] == words[0] and callable(getattr(verbs, words[0]))
    if isinstance(parsed, cli.TrainArguments) and not parsed.task.startswith("automaton:"):
        task = get_task(parsed.task)
        verbs.model_config(parsed, task)
        task.length_range(parsed.train_length)
    if isinstance(parsed, cli.EvaluateArguments):
        evaluate.parse_lengths(parsed.lengths)


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "trian parity": "trian, parity; Available subcommands: train,",
    "train": "Missing from statetrack train: TASK",
    "train parity more": "Unrecognized options: more; see statetrack train --help",
    "train partiy": "'partiy' is unknown (did you mean 'parity'?); accepted: parity, ",
    "train automaton:none.json": "'none.json'",
    "train group:S0": "'S0'",
    "train parity --mixer manba": "'manba' for argument '--mixer'. Expected one of ('deltanet', ",
    "train parity --hedas 3": "--hedas, 3; Perhaps you meant: --heads",
    "train parity --steps many": "--steps: invalid literal for int() with base 10: 'many'; see",
    "train parity --eigenvalues 1": "did not match expected argument count 2",
    "train parity --eigenvalues -3 1": "-1 <= lo < hi <= 1, got (-3.0, 1.0)",
    "train parity --eigenvalues nan 1": "got (nan, 1.0)",
    "train parity --batch-size 0": "batch_size must be at least 1, got 0",
    "train parity --heads 3": "dim=128 does not divide by heads=3",
    "train parity --heads 0": "got 0",
    "train parity --layers 0": "layers must be at least 1, got 0",
    "train parity --dim 0": "got 0",
    "train parity --conv -1": "got -1",
    "train parity --mixer deltanet --factors 0": "got 0",
    "train parity --mixer mamba --heads 3": "--heads does not apply to --mixer mamba",
    "train parity --mixer lstm --conv 3": "--conv does not apply to --mixer lstm",
    "train parity --train-length 5 3": "lo = 5, hi = 3",
    "train parity --lr nan": "got 1e-06 and nan",
    "train parity --seed -1": "seed must be at least 0",
    "train parity --device tpu": "got 'tpu'",
    "train parity --resume --force": "--resume and --force exclude each other",
    "train parity --out file": "file is a file; choose another directory",
    "train parity --out other": "other is not empty and not a run",
    "train parity --out other --force": "other is not empty and not a run",
    "train parity --out file/run": "file",
    "evaluate": "at least one run directory",
    "evaluate none": "none/config.json does not exist; is none a run directory?",
    "evaluate other --lengths 4": "other/config.json does not exist",
    "evaluate none --lengths 4-8": "a number or a range like 40..256, got '4-8'",
    "plot": "at least one run directory",
    "plot none": "none/config.json does not exist",
    "reproduce p3": "'p3' for argument 'table'. Expected one of ('p1-chomsky', ",
    "reproduce p1-s5 --cells none": "no cell's name contains none; statetrack reproduce p1-s5 --list",
    "demo --workers 0": "workers must be at least 1",
    "demo --out other": "other is not empty and not an earlier demo's",
    "demo --out file": "file",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(command: Command, here: Path, line: str):
    (here / "file").touch()
    (here / "other").mkdir()
    (here / "other" / "notes.txt").write_text("mine")
    before = contents(here)
    assert MISTAKES[line] in command.refused(line)
    assert contents(here) == before and sorted(p.name for p in here.iterdir()) == ["file", "other"]


RUN_MISTAKES = {
    TRAIN: "run holds a run; --resume to go on, --force to replace it",
    f"{TRAIN} --resume --lr 0.5 --heads 4": "(lr: 0.001 there, 0.5 now; model.mixers[0].heads: 2 there, 4 now)",
    f"{TRAIN} --resume --steps 9": "run is at step 45 already, beyond steps=9",
    "evaluate run --lengths 1": "lo = 1",
    "evaluate run --batch-size 0": "batch_size must be at least 1, got 0",
    "evaluate run --sequences 0": "sequences must be at least 1, got 0",
    "evaluate run --seed 99999999999999999999": "below 2**63, got 99999999999999999999",
    "evaluate run --device tpu": "got 'tpu'",
    "evaluate run none": "none/config.json does not exist",
    "plot run": "run has not been evaluated; first: statetrack evaluate run",
}


@pytest.mark.parametrize("line", RUN_MISTAKES)
def test_a_mistake_about_a_run_changes_nothing(command: Command, run: Path, line: str):
    before = contents(run)
    assert RUN_MISTAKES[line] in command.refused(line)
    assert contents(run) == before and list(Path().iterdir()) == [Path("run")]


BROKEN = {
    "checkpoint.pt": f"{TRAIN} --steps 50 --resume",
    "config.json": "evaluate run",
    "model.safetensors": "evaluate run",
    "metrics.jsonl": f"{TRAIN} --steps 50 --resume",
    "evaluation.json": "plot run",
}


@pytest.mark.parametrize("content", [b"", b"\xff\x00\x80\n", b"{}\n", b"3\n", b"[3]\n"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(command: Command, run: Path, name: str, content: bytes):
    if name == "metrics.jsonl" and not content:
        return  # a run that has logged nothing
    (run / name).write_bytes(content)
    assert f"run/{name}" in command.refused(BROKEN[name])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_mistakes_read_the_same_in_every_terminal(capsys: pytest.CaptureFixture[str], encoding: str):
    """The parser draws a box around what it says, with other characters where stdout is not UTF-8."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding)), pytest.raises(SystemExit):
        cli.parse(["train", "parity", "--hedas", "3"])
    expected = "Unrecognized options: --hedas, 3; Perhaps you meant: --heads INT heads; default 4 in statetrack train"
    assert the_line(capsys.readouterr().err) == f"{expected} --help; see statetrack train --help"


def test_too_much_memory(command: Command, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: Any) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(train.Trainer, "train_steps", refused)
    assert "not enough memory: " in command.refused(TRAIN)

    def broken(*_: Any) -> None:
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(train.Trainer, "train_steps", broken)
    with pytest.raises(RuntimeError, match="a defect of ours"):
        command(f"{TRAIN} --resume")


def test_an_infinite_loss_keeps_the_last_good_checkpoint(command: Command, here: Path):
    said = command.refused(f"{TRAIN} --lr 1e30 --clip 0")
    assert re.fullmatch(
        r"(loss|the gradient's norm) is (nan|inf) at step \d+; the last good checkpoint is of step 0 in run; "
        r"lower the learning rate\?",
        said,
    )
    state = runs.Run(here / "run").load_checkpoint()
    assert state["step"] == 0 and all(p.isfinite().all() for p in state["model"].values())
    assert command(f"{TRAIN} --force")[0] == 0


# --- use -------------------------------------------------------------------------------------------------------------


def test_train_evaluate_plot(command: Command, here: Path):
    code, out, _ = command(f"train parity {SMALL} --out 'a run'")
    assert code == 0 and out == "trained 45 steps; next: statetrack evaluate 'a run'\n"
    assert {"training.png", "training.svg", "model.safetensors"} <= {p.name for p in (here / "a run").iterdir()}
    assert command("evaluate 'a run' --lengths 3..6 5 --sequences 64")[0] == 0
    code, out, _ = command("evaluate 'a run' --lengths 5 9 --sequences 32")
    stored = {str(row["length"]): row for row in json.loads((here / "a run" / "evaluation.json").read_text())}
    assert code == 0 and {k: row["sequences"] for k, row in stored.items()} == {"[3, 6]": 64, "5": 32, "9": 32}
    assert all(f"{stored[length]['accuracy']:.4f}" in out for length in ("5", "9"))
    assert command("plot 'a run' --out p/x.png") == (0, "wrote p/x.png and p/x.svg\n", "")


def test_tasks_are_listed(command: Command):
    code, out, err = command("tasks")
    assert code == 0 and err == "" and all(name in out for name in TASKS)


@pytest.mark.parametrize("mixer", cli.MIXERS)
def test_every_mixer_trains_and_is_named(command: Command, here: Path, mixer: str):
    words = f"train parity --mixer {mixer} --dim 16 --steps 2 --batch-size 4 --train-length 3 9"
    assert command(words)[0] == 0
    named = [p.name for p in (here / "runs").iterdir()]
    ranged = mixer not in ("attention", "lstm", "slstm", "dense_rnn")
    assert named == [f"parity_{mixer}_-1to1_1l_s0" if ranged else f"parity_{mixer}_1l_s0"]


@pytest.mark.parametrize("name", ["parity", "S5_up_to_3", "group:Z2 x S3", "automaton:../my [tables]/a*b?.json"])
def test_default_directories_are_safe_in_a_shell(name: str):
    names = {
        verbs.run_name(cli.parse(["train", name, *shlex.split(options)]))
        for options in ("", "--eigenvalues 0 1", "--mixer mamba", "--mixer lstm", "--seed 1", "--layers 2")
    }
    assert len(names) == 6 and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", n) for n in names)


# --- stopped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_goes_on_as_if_it_had_not(
    command: Command, finished: Path, here: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_steps", signals_after(27, train.Trainer.train_steps, signum))
        found, out, err = command(TRAIN)
    assert (found, out) == (code, "") and the_line(err).startswith("stopped at step 27, saved in run; ")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert runs.Run(here / "run").load_checkpoint()["step"] == 27
    assert command(f"{TRAIN} --resume")[0] == 0
    assert [row["step"] for row in steps_of(here / "run")] == [20, 40, 45]
    assert steps_of(here / "run") == steps_of(finished)
    assert (here / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_evaluation_keeps_what_it_has(
    command: Command, run: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
):
    monkeypatch.setattr(evaluate, "evaluate", signals_after(2, evaluate.evaluate, signum))
    assert command("evaluate run --lengths 4 5 6 --sequences 8")[::2] == (code, "statetrack: stopped\n")
    assert [row["length"] for row in json.loads((run / "evaluation.json").read_text())] == [4]


@contextlib.contextmanager
def started(line: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a process group of its own, as a shell does; a test that fails leaves nothing running."""
    words = [sys.executable, "-m", "statetrack.cli", *shlex.split(line)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "too slow"
        time.sleep(0.05)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_trains_is_stopped(here: Path, signum: int, code: int):
    metrics = here / "run" / "metrics.jsonl"
    with started(f"{TRAIN} --steps 1000000") as process:
        wait_until(lambda: metrics.exists() and metrics.read_text(), process)
        os.killpg(process.pid, signum)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "") and the_line(err).startswith("stopped at step ")
    assert runs.Run(here / "run").load_checkpoint()["step"] >= runs.Run(here / "run").metrics()[-1]["step"] >= 20
