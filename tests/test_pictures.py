"""Pictures: what is drawn is what is there; letters stay letters; what is too big is refused in one line."""

from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from statetrack import compile as compile_spec
from statetrack.automata import Automaton, automaton_of, regex
from statetrack.compiler.pictures import _trajectory as trajectory
from statetrack.compiler.pictures import draw_automaton, draw_layers, draw_trajectory, example_word, letter_set
from statetrack.errors import UsageError

STRING = r'"([^"\\]|\\["\\bfnrt])*"'


def drawn(files: list[Path]) -> str:
    """Return the SVG's text, after checking that the PNG is a picture of something."""
    png, svg = files
    assert (png.suffix, svg.suffix) == (".png", ".svg") and np.asarray(Image.open(png).convert("L")).std() > 5
    return unescape(svg.read_text()).replace("\xa0", " ")


SETS = {
    (r"[0-9]", "bytes"): "0-9",
    (r"[a-fA-F0-9_]", "bytes"): "0-9 A-F _ a-f",
    (r"[^\"\\]", "bytes"): 'any but " \\',
    (r"(?s).", "bytes"): "any",
    (r"[ .\-]", "bytes"): "␣ - .",
    (r"[ab]", "bytes"): "a b",
    (r"[\x80-\xff]", "bytes"): "\\x80-\\xff",
    (r"[ace]", "abcdef"): "a c e",
    (r"[a-e]", "abcdef"): "a-e",
}


@pytest.mark.parametrize("pattern, alphabet", SETS)
def test_sets_of_letters_are_brief(pattern: str, alphabet: str):
    automaton = regex(pattern, alphabet=alphabet)
    goal = min(automaton.accepting or {0})
    letters = np.flatnonzero(automaton.table[automaton.start] == goal).tolist()
    assert letter_set(automaton, letters) == SETS[pattern, alphabet]


def test_the_automaton(tmp_path: Path):
    automaton = automaton_of(r"-?\d+(\.\d+)?")
    text = drawn(draw_automaton(automaton, tmp_path / "a"))
    assert text.count('class="node"') == 6  # five states, the start; not the sink
    assert text.count('class="edge"') == 8 and text.count("0-9") == 5 and "rejected for good" in text
    assert text.count("<ellipse") == 6 + 2  # two states accept: two circles each


def test_letters_stay_letters(tmp_path: Path):
    names = ("<b>", "\\N", '"', "&")
    table = np.array([[0, 1, 2, 3]] * 4)
    text = drawn(draw_automaton(Automaton(table, accepting=frozenset({1}), letters=names), tmp_path / "a"))
    assert all(f" {name} " in text for name in names)


def test_outputs_are_drawn(tmp_path: Path):
    text = drawn(draw_automaton(Automaton.from_group("Z3"), tmp_path / "a"))
    assert all(f">{q}/{q}<" in text for q in range(3)) and "rejected" not in text


def test_too_big(tmp_path: Path):
    compiled = compile_spec("group:S5_swaps", timeout=0)
    with pytest.raises(UsageError, match="120 states are too many to draw; at most 40"):
        draw_automaton(compiled.automaton, tmp_path / "a")
    with pytest.raises(UsageError, match="20 coordinates along 121 letters are too many to draw"):
        draw_trajectory(compiled, np.zeros(121, dtype=np.int64), tmp_path / "t")
    assert "5 x 4 coordinates" in drawn(draw_layers(compiled, tmp_path / "l")) and not list(tmp_path.glob("[at]*"))


@pytest.mark.parametrize("options", [{}, {"structure": "dplr"}, {"window": 2}, {"keys": "unit"}])
def test_every_layer_is_drawn(tmp_path: Path, options: dict):
    compiled = compile_spec(STRING, timeout=0, **options)
    text = drawn(draw_layers(compiled, tmp_path / "l"))
    for i, stage in enumerate(compiled.stages):
        assert f"layer {i + 1}: {stage.kind}, {compiled.factors[i]} factor" in text
        assert f"{sum(table.size for table in stage.decoder)} entries" in text
    assert text.count("entries") == compiled.depth and f"1 of {compiled.automaton.states}" in text
    assert ("the last 2 letters" in text) == ("window" in options)
    assert "</svg>" in drawn(draw_trajectory(compiled, '"a\\n"', tmp_path / "t"))


@pytest.mark.parametrize("options", [{}, {"structure": "dplr"}, {"keys": "unit"}])
def test_a_trajectory_is_what_the_operations_say(options: dict):
    compiled = compile_spec("(a|b)*abb", alphabet="ab", timeout=0, **options)
    word = compiled.automaton.encode("ababbab")
    states, layers = trajectory(compiled, word)
    assert states == [compiled.automaton.start, *compiled.automaton.run(word[None])[0].tolist()]
    assert [values.shape for values in layers] == [(width, len(word) + 1) for width in compiled.widths]
    assert set(np.unique(np.concatenate(layers))) == {0.0, 1.0}
    if not options and compiled.depth == 1:
        (head,), classes = compiled.stages[0].heads, compiled.classes.tolist()
        ones = head.start[0]
        for t, x in enumerate(word.tolist()):
            ones = head.operations[head.letters[0][classes[x]]].apply(ones)
            assert set(np.flatnonzero(layers[0][:, t + 1])) == ones


@pytest.mark.parametrize("spec", [STRING, r"-?\d+(\.\d+)?", r"\d{4}-\d\d", "a*"])
def test_the_example_is_accepted(spec: str):
    automaton = automaton_of(spec)
    word = example_word(automaton)
    assert 4 <= len(word) <= 40 and automaton.accepts([word]).all()
    assert bytes(word.tolist()).decode().isprintable()
