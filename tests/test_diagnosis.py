"""can_track, explain and the warning before training: the right structure is judged, on the words a task asks."""

import time

import numpy as np
import pytest

from statetrack import can_track, cli, diagnosis, explain, verbs
from statetrack.automata import Automaton
from statetrack.automata.verdicts import Structure
from statetrack.errors import UsageError
from statetrack.layers import MIXERS, AttentionConfig, DeltaProductConfig, LSTMConfig, MambaConfig, MixerConfig
from statetrack.model import Config
from statetrack.tasks import get_task
from tests.test_verdicts import FIRST_A, PARITY

SPECS = "statetrack.automata.specs"


def deltanet(lo: float = -1.0, **options) -> DeltaProductConfig:
    return DeltaProductConfig(dim=8, heads=1, eigenvalues=(lo, 1.0), **options)


def mamba(lo: float = -1.0, **options) -> MambaConfig:
    return MambaConfig(dim=8, eigenvalues=(lo, 1.0), **options)


def model(*mixers: MixerConfig) -> Config:
    return Config(vocab_size=3, num_outputs=3, mixers=mixers)


def test_every_mixer_has_a_structure():
    assert set(diagnosis.STRUCTURES) >= set(MIXERS.values())


@pytest.mark.parametrize(
    ("configuration", "structures"),
    [
        (deltanet(factors=3, gate=True), [Structure(family="householder", factors=3, gate=True, layers=1, window=3)]),
        (deltanet(0.0, conv_size=0), [Structure(family="householder", eigenvalues=(0.0, 1.0), layers=1)]),
        (mamba(conv_size=1), [Structure(family="diagonal", layers=1)]),
        (model(mamba(0.0), mamba(0.0)), [Structure(family="diagonal", eigenvalues=(0.0, 1.0), layers=2, window=3)]),
        (AttentionConfig(dim=8), [Structure(family="attention", layers=1)]),
        (LSTMConfig(dim=8), [Structure(family="nonlinear", layers=1)]),
    ],
)
def test_configurations_are_structures(configuration: Config | MixerConfig, structures: list[Structure]):
    assert diagnosis._layers(configuration) == structures


@pytest.mark.parametrize(
    ("task", "configuration", "answer"),
    [
        ("parity", deltanet(0.0, factors=4), "no"),
        ("parity", deltanet(), "yes"),
        ("parity", mamba(0.0), "no"),
        ("parity", mamba(), "yes"),
        ("S3", mamba(), "no"),
        ("S3", deltanet(), "no"),
        ("S3", deltanet(factors=2), "yes"),
        ("S3", model(deltanet(), deltanet()), "unknown"),
        ("S5", model(*[deltanet()] * 4), "yes"),
        ("S5", AttentionConfig(dim=8), "unknown"),
        ("S5", LSTMConfig(dim=8), "yes"),
        ("S5_swaps", deltanet(), "yes"),
        ("S5_4_tokens", deltanet(), "unknown"),  # four factors for every letter: P1 section 5.2
        ("S5_4_tokens", deltanet(0.0), "no"),
        ("Z60_2_tokens", mamba(), "no"),
        ("modular_arithmetic", mamba(), "no"),
        ("modular_arithmetic", deltanet(0.0), "no"),
        ("modular_arithmetic", deltanet(), "unknown"),
        ("parity", model(mamba(0.0), deltanet(0.0)), "no"),
        ("parity", model(mamba(0.0), deltanet()), "yes"),
        ("S3", model(mamba(), mamba(0.0)), "no"),
        ("S3", model(mamba(), deltanet()), "unknown"),
        ("S3", model(mamba(), LSTMConfig(dim=8)), "yes"),
        ("S3", model(mamba(), AttentionConfig(dim=8)), "unknown"),
    ],
)
def test_tasks(task: str, configuration: Config | MixerConfig, answer: str):
    verdict = can_track(get_task(task), configuration)
    assert verdict.answer == answer, verdict


def test_arithmetic_is_judged_on_its_own_words():
    """After a digit come an operation and a digit: 15 letters, which act on the value and the last term."""
    task = get_task("modular_arithmetic")
    automaton, single = diagnosis._asked(task)
    assert automaton.alphabet == 15 and not single
    names = automaton.letters or ()
    full = task.automaton  # pyright: ignore[reportAttributeAccessIssue]
    state = full.run(np.array([[5 + 2]]))[0, 0]
    word = [names.index(name) for name in ("* 3", "+ 4", "- 1")]
    ours = automaton.run(np.array([word]), int(state))[0, -1]
    tokens = [task.symbols.index(token) for token in "2*3+4-1"]
    assert full.output[ours] == full.outputs(np.array([tokens]))[0, -1] == task.symbols.index(str((2 * 3 + 4 - 1) % 5))


@pytest.mark.wrong_types
def test_mistakes():
    with pytest.raises(UsageError, match="not a regular language"):
        can_track(get_task("modular_arithmetic_brackets"), deltanet())
    with pytest.raises(UsageError, match="configuration must be a Structure, a Config or one of DeltaProductConfig, "):
        can_track(PARITY, 3)  # pyright: ignore[reportArgumentType]


# --- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "configuration", "way_out"),
    [
        ("parity", mamba(0.0), "--eigenvalues -1 1"),
        ("S3", deltanet(), "--mixer deltaproduct --factors 2"),
        ("S3", deltanet(0.0), "--mixer deltaproduct --eigenvalues -1 1"),
        ("S3", mamba(), "--mixer deltaproduct --eigenvalues -1 1"),
        ("group:Z2", mamba(), None),
        ("group:Z4", mamba(), "--layers 2"),
        ("group:Z4", mamba(0.0), "--eigenvalues -1 1 --layers 2"),
        ("S5_4_tokens", deltanet(), None),
        ("parity", AttentionConfig(dim=8), None),
        ("modular_arithmetic_brackets", mamba(), None),
    ],
)
def test_warnings_name_the_way_out(task: str, configuration: MixerConfig, way_out: str | None):
    said = diagnosis.warning(get_task(task), model(configuration))
    if way_out is None:
        assert said is None
        return
    assert said is not None and len(said.splitlines()) == 2 and said.startswith(f"{task} cannot be learned at every")
    assert said.splitlines()[1] == f"not excluded: {way_out}"
    words = (
        f"train {task} --mixer {'mamba' if isinstance(configuration, MambaConfig) else 'deltanet'} {way_out}".split()
    )
    if "deltaproduct" in way_out:
        del words[2:4]
    followed = verbs.model_config(cli.parse(words), get_task(task))
    assert can_track(get_task(task), followed).answer != "no"


@pytest.mark.parametrize("task", ["group:S6", "group:S7_swaps", "group:A6_up_to_3", "group:D60", "group:Z400"])
def test_a_warning_takes_no_time(task: str):
    asked = get_task(task)
    began = time.perf_counter()
    diagnosis.warning(asked, model(mamba(0.0)))
    assert time.perf_counter() - began < 2 * 4  # 2 s on an idle core


def test_training_warns(capsys: pytest.CaptureFixture[str], tmp_path):
    small = f"--dim 16 --mlp-dim 16 --train-length 3 6 --batch-size 4 --steps 1 --out {tmp_path / 'run'} --force"
    for line, lines in (("parity --eigenvalues 0 1", 2), ("parity", 0), ("S5_4_tokens", 0)):
        cli.main(["train", *line.split(), *small.split()])
        out, err = capsys.readouterr()
        warned = [part for part in err.splitlines() if part.startswith(("warning: parity cannot", "not excluded: "))]
        assert len(warned) == lines and out.startswith("trained 1 steps")


# --- explain ---------------------------------------------------------------------------------------------------------


def test_a_page_on_a_table():
    page = explain(FIRST_A)
    for line in (
        "states     3 (minimal automaton)",
        "letters    2, those with the same effect together: 'a', 'b'",
        "monoid     3 elements, 3 idempotent",
        "groups     none: the language is star-free",
        "e = 'a', f = 'b': e f = e, f e = f, but at the start, e and f lead to states 1 and 2",
        "without a window: at least 2 (e f e = f e fails",
        "with a window:    at least 1",
    ):
        assert line in page, page
    rows = {line.split("  ")[1]: line for line in page.splitlines() if line.startswith("  ")}
    assert " NO: one layer cannot" in rows["diagonal [-1,1], 1 layer"] and " yes: " in rows["Householder [-1,1]"]
    assert " NO: as for diagonal [-1,1], 1 layer" in rows["DeltaNet [-1,1], 1 layer"]
    assert page.count("Theorem 5") == 1 and len(page.splitlines()) < 40  # said once


def test_a_page_on_a_language_without_a_choice():
    assert explain("contains:").count("the answer is always the same") == 3 and "last 0" not in explain("contains:")


def test_a_page_on_a_task_and_on_a_large_monoid():
    assert "groups     S3" in explain(get_task("S3")) and "language   S3" in explain(get_task("S3"))
    merge = [[(q + 1) % 7, {0: 1, 1: 0}.get(q, q), 0 if q < 2 else q] for q in range(7)]
    page = explain(Automaton(np.array(merge), accepting=frozenset({0})))
    assert "unknown: more than 200000 elements" in page and "at least 6" in page


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("(0|1(01*0)*1)* --alphabet 01", "groups     S3"),
        ("group:S5", "groups     S5"),
        (r'"([^"\\]|\\.)*"', "groups     Z2"),
        ("AB --alphabet ab --flags i", "states     4"),
    ],
)
def test_the_verb(capsys: pytest.CaptureFixture[str], line: str, found: str):
    pytest.importorskip(SPECS)
    cli.main(["explain", *line.split(" ")])
    out, err = capsys.readouterr()
    assert found in out and err == ""


def test_what_the_verb_refuses(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip(SPECS)
    for words in (["(a"], ["group:X9"], ["none.json"], ["a", "--alphabet", "bc"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["explain", *words])
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("statetrack: ") and "Traceback" not in err
