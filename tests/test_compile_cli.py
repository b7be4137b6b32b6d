"""`statetrack compile` and `statetrack run`: what they write and print; one message per mistake, nothing half done."""

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from statetrack import CompiledAutomaton, artifact, cli, texts
from statetrack import compile as compile_spec
from statetrack.automata import Automaton, regex
from statetrack.compiler import pictures, search
from tests.command import Command, contents, signals_after

NUMBER = r"-?\d+(\.\d+)?"
COMPILE = rf"compile '{NUMBER}' --timeout 0 --out number"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes; copy it."""
    path = tmp_path_factory.mktemp("made")
    cli.main(shlex.split(COMPILE.replace("number", str(path / "number"))))
    return path / "number"


@pytest.fixture
def number(made: Path, here: Path) -> Path:
    return Path(shutil.copytree(made, here / "number"))


# --- compile ---------------------------------------------------------------------------------------------------------


def test_compile_writes_everything(command: Command, here: Path):
    code, out, _ = command(COMPILE)
    assert code == 0 and sorted(p.name for p in (here / "number").iterdir()) == sorted(artifact.OURS)
    *said, last = out.splitlines()
    assert last == "wrote number; next: statetrack run number FILE"
    assert (here / "number" / "report.txt").read_text().splitlines() == said
    assert "automaton   6 states, 4 classes of 256 letters" in said
    assert [line for line in said if "EXACT" in line] == [
        f"EXACT AT EVERY LENGTH in {dtype}, backend auto" for dtype in ("float32", "bfloat16")
    ]
    assert Automaton.from_json(here / "number" / "automaton.json") == regex(NUMBER)
    network = CompiledAutomaton.load(here / "number" / "compiled.safetensors")
    assert network.accepts(["-3.5", "3."]).tolist() == [True, False] and network.report() == "\n".join(
        said[: len(network.report().splitlines())]
    )
    for name in ("automaton", "layers", "trajectory"):
        assert np.asarray(Image.open(here / "number" / f"{name}.png").convert("L")).std() > 5
        assert "</svg>" in (here / "number" / f"{name}.svg").read_text()


OPTIONS = {
    "--structure gated": "structure gated",
    "--structure dplr": "1 recurrent layer(s); structure dplr",
    "--window 2": "recurrent layer(s), the first sees 2 tokens",
    "--keys unit": "keys unit",
    "--objective width --timeout 1": "network ",
    "--flags i": "2 classes of 4 letters",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_obeyed(command: Command, options: str):
    code, out, _ = command(f"compile '(a|b)*abb' --alphabet abAB --timeout 0 --out x {options}")
    assert code == 0 and OPTIONS[options] in out and out.count("EXACT AT EVERY LENGTH") == 2
    assert artifact.read(Path("x")).accepts(["ABB"]).tolist() == ["i" in options.split()]


def test_time_running_out_is_said(command: Command):
    code, out, _ = command(COMPILE.replace("--timeout 0", "--timeout 0.001"))
    assert code == 0 and "the time ran out: this is the best found so far" in out


def test_a_certificate_that_fails_is_exit_code_1(command: Command):
    code, out, _ = command("compile 'group:S3' --keys normalised --out x")
    assert code == 1 and "NOT EXACT in bfloat16" in out
    assert "NOT EXACT in bfloat16" in Path("x/report.txt").read_text()


MISTAKES = {
    "compile 'a(b' --out x": "regex: missing ), unterminated subpattern at position 1\n  a(b\n   ^",
    "compile 'ab*2' --alphabet ab --out x": "2",
    "compile '(?=a)b' --out x": "look-ahead",
    "compile a --flags q --out x": "'q'",
    "compile a": "--out",
    "compile a --out x --structure fast": "'fast'",
    "compile a --out x --window 99": "window must be 0 (none) to 8 tokens, got 99",
    "compile a --out x --timeout -1": "timeout must be a number of seconds, at least 0, got -1.0",
    "compile none.json --out x": "none.json",
    "compile gap.json --out x": "all integers; state 1 has no transition on letter 0 (to reject, go to",
    "compile '(a)\\1' --out x": "back-references",
    "compile '(?<!a)b' --out x": "negative look-behind",
    "compile 'a+2' --alphabet a --out x": "'2' in the regex is no letter; the letters are a",
    "compile a --alphabet aa --out x": "alphabet must be 'bytes' or different, non-empty letters, got 'aa'",
    "compile group:S0 --out x": "'S0'",
    "compile a --out other": "other is not empty and holds no compiled automaton; choose another directory",
    "compile a --out other --force": "other is not empty and holds no compiled automaton; choose another directory",
    "compile a --out file/x": "file/x cannot be made: ",
    "compile a --out file": "file is a file; choose another directory",
    f"{COMPILE}": "number holds a compiled automaton; --force replaces it",
    "run none file": "none/compiled.safetensors does not exist; first: statetrack compile SPEC --out none",
    "run number": "FILE",
    "run number none": "none: No such file or directory",
    "run number other": "other: Is a directory",
    "run number file --lines --whole": "--lines and --whole exclude each other",
    "run number file --device tpu": "got 'tpu'",
    "run number words --backend fast": "'fast'",
    "run other words": "other/compiled.safetensors does not exist",
    "run broken words": "broken/compiled.safetensors cannot be read",
}


@pytest.mark.parametrize("line", MISTAKES)
@pytest.mark.usefixtures("number")
def test_a_mistake_is_one_message_and_changes_nothing(command: Command, here: Path, line: str):
    (here / "file").touch()
    (here / "words").write_text("12\n")
    (here / "gap.json").write_text('{"table": [[0, 1], [null, 0]], "accepting": [0]}')
    for folder, name in (("other", "notes.txt"), ("broken", artifact.NETWORK)):
        (here / folder).mkdir()
        (here / folder / name).write_text("mine")
    before = contents(here)
    code, out, err = command(line)
    assert (code, out) == (2, "") and MISTAKES[line] in err and err.count("statetrack: ") == 1
    assert "Traceback" not in err and contents(here) == before and not (here / "x").exists()


def test_force_replaces_what_is_ours(command: Command, number: Path):
    (number / "notes.txt").write_text("mine")
    code, out, err = command("compile group:S5_swaps --timeout 0 --out number --force")
    assert code == 0 and "no picture of the automaton: 120 states are too many to draw; at most 40" in err
    assert sorted(p.name for p in number.iterdir() if "automaton." in p.name) == ["automaton.json"]
    assert (number / "notes.txt").read_text() == "mine"
    assert artifact.read(number).automaton.states == 120 and "120 states" in (number / "report.txt").read_text()


def test_a_replacement_that_fails_leaves_the_old_one(number: Path, monkeypatch: pytest.MonkeyPatch):
    (number / "notes.txt").write_text("mine")
    before, replace = contents(number.parent), os.replace

    def fails_to_arrive(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp") and target == number:
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_to_arrive)
    with pytest.raises(OSError, match="no"):
        artifact.write(number, compile_spec("(ab)*", alphabet="ab", timeout=0), "", force=True)
    assert contents(number.parent) == before


def test_without_pygraphviz(command: Command, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    code, _, err = command(COMPILE)
    told = [line for line in err.splitlines() if "pygraphviz" in line]
    assert code == 0 and len(told) == 2 and all("pip install 'statetrack[pictures]'" in line for line in told)
    drawn = sorted(p.name for p in (here / "number").iterdir() if p.suffix in (".png", ".svg"))
    assert drawn == ["trajectory.png", "trajectory.svg"]


STOPS = {
    "searching": (search, "make_layer"),
    "certifying": (CompiledAutomaton, "certificate"),
    "saving": (CompiledAutomaton, "save"),
    "drawing": (pictures, "draw_layers"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("stop", STOPS)
def test_ctrl_c_leaves_nothing_half_written(
    command: Command, here: Path, made: Path, stop: str, force: bool, monkeypatch: pytest.MonkeyPatch
):
    if force:
        shutil.copytree(made, here / "number")
    before = contents(here)
    owner, name = STOPS[stop]
    monkeypatch.setattr(owner, name, signals_after(1, getattr(owner, name), signal.SIGINT))
    line = "compile '(a|b)*abb' --timeout 0 --out number" + " --force" * force
    code, out, err = command(line)
    assert (code, out) == (130, "") and err.endswith("statetrack: stopped\n")
    assert contents(here) == before and [p.name for p in here.iterdir()] == ["number"] * force


# --- run -------------------------------------------------------------------------------------------------------------


def some_lines(count: int, seed: int = 0) -> list[str]:
    """Draw lines, short ones and a few long ones, of which about half are numbers."""
    rng = random.Random(seed)
    lengths = [0, 1, 2, 3, 8, 30]
    lines = []
    for i in range(count):
        digits = "".join(rng.choices("0123456789", k=rng.choice(lengths) if i % 50 else 700))
        lines.append(rng.choice(["", "-", "-", "x", "1."]) + digits + rng.choice(["", "", ".5", "."]))
    return lines


@pytest.mark.parametrize("block", [1 << 22, 64, 700])
@pytest.mark.parametrize("newline", ["\n", ""])
@pytest.mark.usefixtures("number")
def test_lines_are_accepted_as_by_re(command: Command, monkeypatch: pytest.MonkeyPatch, block: int, newline: str):
    """Blocks smaller than a line, so that lines are cut and the longest carried along; the last without a newline."""
    monkeypatch.setattr(texts, "BLOCK", block)
    monkeypatch.setattr(texts, "PIECE", 4096)
    monkeypatch.setattr(texts, "LONG_PIECE", 4096)
    lines = [*some_lines(1500 if block == 1 << 22 else 150), "7"]
    Path("words").write_text("\n".join(lines) + newline)
    want = [int(re.fullmatch(NUMBER, line) is not None) for line in lines]
    assert 0.2 < np.mean(want) < 0.8
    summary = f"accepted {sum(want)} of {len(want)} lines\n"
    code, out, _ = command("run number words")
    assert code == 0 and out == summary
    code, out, err = command("run number words --lines --show")
    assert code == 0 and out == "".join(f"{verdict}\n" for verdict in want) and err.endswith(summary)


@pytest.mark.parametrize("backend", ["auto", "chunk", "reference"])
@pytest.mark.usefixtures("number")
def test_every_backend_says_the_same(command: Command, backend: str):
    lines = some_lines(300, seed=1)
    Path("words").write_text("".join(f"{line}\n" for line in lines))
    accepted = sum(re.fullmatch(NUMBER, line) is not None for line in lines)
    assert command(f"run number words --backend {backend} --device cpu")[1] == f"accepted {accepted} of 300 lines\n"


FILES = {b"": (0, 0, False), b"\n": (0, 1, False), b"12": (1, 1, True), b"12\n": (1, 1, False), b"1\r\n": (0, 1, False)}


@pytest.mark.parametrize("content", FILES)
@pytest.mark.usefixtures("number")
def test_ends_of_files(command: Command, content: bytes, monkeypatch: pytest.MonkeyPatch):
    accepted, lines, whole = FILES[content]
    Path("words").write_bytes(content)
    assert command("run number words")[1] == f"accepted {accepted} of {lines} lines\n"
    assert command("run number words --whole")[1] == ("accepted\n" if whole else "rejected\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert command("run number -")[1] == f"accepted {accepted} of {lines} lines\n"


def test_the_empty_text_is_the_start(command: Command):
    assert command("compile '(a|b)*' --timeout 0 --out any")[0] == 0
    Path("words").write_text("\n\n")
    assert command("run any words")[1] == "accepted 2 of 2 lines\n"
    Path("words").write_text("")
    assert command("run any words --whole")[1] == "accepted\n"


@pytest.mark.usefixtures("number")
def test_a_whole_file_in_pieces(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts, "BLOCK", 1000)
    monkeypatch.setattr(texts, "LONG_PIECE", 300)
    for content, verdict in (
        ("-" + "7" * 5000 + ".25", "accepted\n"),
        ("7" * 3000 + "." + "7" * 3000 + ".", "rejected\n"),
    ):
        Path("words").write_text(content)
        assert command("run number words --whole")[1] == verdict


@pytest.mark.filterwarnings("error")
def test_letters_are_characters(command: Command):
    assert command("compile '(é|🙂)*é' --alphabet 'aé🙂' --timeout 0 --out x")[0] == 0
    Path("words").write_text("é\n🙂é\n\na\n🙂\n", encoding="utf-8")
    assert command("run x words --show")[1] == "1\n1\n0\n0\n0\n"


def test_a_character_may_be_cut_by_a_block(command: Command, monkeypatch: pytest.MonkeyPatch):
    assert command("compile '(é|🙂)*é' --alphabet 'aé🙂' --timeout 0 --out x")[0] == 0
    Path("words").write_text("a🙂é🙂é\n" * 3 + "🙂é", encoding="utf-8")
    for block in (1, 2, 3, 5):
        monkeypatch.setattr(texts, "BLOCK", block)
        assert command("run x words --show")[1] == "0\n0\n0\n1\n"


NO_LETTERS = {
    b"01\n1\n0x1\n": "words: line 3, column 2 (character 6 of the file): 'x' is no letter; the letters are 0, 1",
    b"x": "words: line 1, column 1 (character 0 of the file): 'x' is no letter; the letters are 0, 1",
    b"01\n\xc3\xa9": "words: line 2, column 1 (character 3 of the file): 'é' is no letter; the letters are 0, 1",
    b"0\n01\xff": "words: byte 4 is not UTF-8, and the letters are characters",
    b"0\n01\xc3": "words: byte 4 is not UTF-8, and the letters are characters",
}


@pytest.mark.parametrize("block", [1 << 22, 1, 2])
@pytest.mark.parametrize("content", NO_LETTERS)
def test_what_is_no_letter_is_named_with_its_place(
    command: Command, here: Path, content: bytes, block: int, monkeypatch: pytest.MonkeyPatch
):
    compile_spec("(0|1)*1", alphabet="01", timeout=0).save(here / artifact.NETWORK)
    monkeypatch.setattr(texts, "BLOCK", block)
    (here / "words").write_bytes(content)
    code, out, err = command("run . words")
    assert (code, out) == (2, "") and err.splitlines()[-1] == f"statetrack: {NO_LETTERS[content]}"


def test_a_newline_may_be_no_letter(command: Command, here: Path):
    compile_spec("(0|1)*1", alphabet="01", timeout=0).save(here / artifact.NETWORK)
    (here / "words").write_text("01\n")
    said = command.refused("run . words --whole")
    assert said == (
        r"words: line 1, column 3 (character 2 of the file): '\n' is no letter; the letters are 0, 1; "
        "without --whole each line is a text"
    )


def test_letters_with_long_names_and_outputs(command: Command, here: Path):
    compile_spec("group:S3_swaps", timeout=0).save(here / artifact.NETWORK)
    Path("words").write_text("012\n")
    assert "letters of a file are bytes or characters, but this automaton's are (" in command.refused("run . words")
    Path("thirds.json").write_text(json.dumps({"table": [[0, 1], [1, 2], [2, 0]], "output": [5, 0, 2]}))
    assert command("compile thirds.json --timeout 0 --out thirds")[0] == 0
    Path("words").write_text("0\n1\n11\n01\n\n")
    code, out, err = command("run thirds words --show")
    assert code == 0 and out == "5\n0\n2\n0\n5\n" and err.endswith("5 lines; output 0 on 2, 2 on 1, 5 on 2\n")
    Path("words").write_text("1101")
    assert command("run thirds words --whole")[1] == "output 5\n"


@pytest.mark.parametrize("line_length", [5, 1 << 16])
def test_memory_does_not_grow_with_the_file(number: Path, line_length: int, monkeypatch: pytest.MonkeyPatch):
    """What numpy holds at most is the same for a file several times as long."""
    monkeypatch.setattr(texts, "BLOCK", 1 << 13)
    monkeypatch.setattr(texts, "PIECE", 1 << 12)
    network = artifact.read(number)

    def peak(size: int) -> int:
        file = io.BytesIO((b"7" * (line_length - 1) + b"\n") * (size // line_length))
        letters = texts.read_letters(file.read, "f", network.automaton, lines=True, report=lambda _: None)
        tracemalloc.start()
        count = sum(int(said.sum()) for said in texts.say_lines(network, letters, "auto"))
        assert count == size // line_length
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = (1 << 15, 1 << 17) if line_length == 5 else (1 << 16, 1 << 17)
    assert peak(large) < 1.2 * peak(small) + 50_000


@pytest.mark.usefixtures("number")
def test_ctrl_c_while_a_file_is_read(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts, "BLOCK", 64)
    monkeypatch.setattr(texts, "_say_group", signals_after(2, texts._say_group, signal.SIGINT))
    Path("words").write_text("12\n" * 500)
    code, _, err = command("run number words")
    assert code == 130 and err.endswith("statetrack: stopped\n")


@pytest.mark.usefixtures("number")
def test_a_reader_that_has_enough():
    words = [sys.executable, "-m", "statetrack.cli", "run", "number", "-", "--show"]
    environment = {**os.environ, "PYTHONPATH": str(Path(texts.__file__).parent.parent)}
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(b"1\n" * 200_000)
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
