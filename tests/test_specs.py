"""What can be written for an automaton, the wrappers around a language, and texts as letters."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sympy import Symbol
from sympy.combinatorics.named_groups import AlternatingGroup

from statetrack.automata import (
    Automaton,
    automaton_of,
    contains,
    from_permutations,
    from_presentation,
    lines,
    parse_group,
    regex,
)
from statetrack.automata.sources import parse_cycles
from statetrack.errors import UsageError
from tests.test_sources import words

# --- contains, lines -------------------------------------------------------------------------------------------------

PATTERNS = ["a", "ab|ba", "a*", "(ab)+", "[^a]b", "aa?b{2}", "b.b", "", "(?:a|b)*abb", "a\n?b"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_contains_is_search(pattern: str):
    texts = words("ab\n", 6)
    found = contains(regex(pattern, alphabet="ab\n")).accepts(texts)
    assert found.tolist() == [re.search(pattern, text) is not None for text in texts]
    assert contains(regex(pattern)) == regex(f"(?s:.*)(?:{pattern})(?s:.*)")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lines_are_all_matched(pattern: str):
    texts = words("ab\n", 6)
    found = lines(regex(pattern, alphabet="ab\n")).accepts(texts)
    for text, accepted in zip(texts, found.tolist(), strict=True):
        whole = text == "" or text.endswith("\n")
        assert accepted == (whole and all(re.fullmatch(pattern, line) for line in text.split("\n")[:-1]))


def test_lines_of_bytes():
    assert lines(regex(r"\d+")) == regex(r"(\d+\n)*") and lines(regex("")) == regex(r"\n*")
    with pytest.raises(UsageError, match="lines needs a newline among the letters; the letters are a, b"):
        lines(regex("a", alphabet="ab"))


def test_wrappers_need_a_language():
    for wrapper in (contains, lines):
        with pytest.raises(UsageError, match="needs a language; this automaton has outputs"):
            wrapper(Automaton.from_group("S3"))


# --- specs -----------------------------------------------------------------------------------------------------------


def test_strings_that_are_regular_expressions():
    assert automaton_of(r"\d+") == automaton_of(r"regex:\d+") == regex(r"\d+")
    assert automaton_of("regex:group:S5") == regex("group:S5") and automaton_of("group") == regex("group")
    assert automaton_of("a:b") == regex("a:b")
    assert automaton_of("A*", alphabet="ab", flags="i") == regex("a*", alphabet="ab")
    assert automaton_of("contains:a|b") == contains(regex("a|b"))
    assert automaton_of("lines:contains:a:b") == lines(contains(regex("a:b")))
    assert automaton_of("contains:B", alphabet="ab", flags="i") == contains(regex("b", alphabet="ab"))


def test_groups():
    swaps = automaton_of("group:S5_swaps")
    assert (swaps.states, swaps.alphabet) == (120, 11) and swaps.names[:3] == ("()", "(3 4)", "(2 3)")
    assert automaton_of("group:S5_up_to_3").alphabet == 31
    for spec in ("group:A5", parse_group("A5"), AlternatingGroup(5)):
        automaton = automaton_of(spec)
        assert automaton.states == automaton.alphabet == automaton.num_outputs == 60
        assert automaton == automaton_of("group:A5")
    assert automaton_of("group:Z60").letters == tuple(map(str, range(60)))
    assert automaton_of("group:S3 x Z2").alphabet == 12


def test_group_letters_are_what_their_names_say():
    automaton = automaton_of("group:S4_swaps")
    generators = parse_cycles("; ".join(automaton.letters or ()))
    same = from_permutations(generators)
    draw = np.random.default_rng(0).integers(0, automaton.alphabet, (20, 30))
    assert np.array_equal(automaton.outputs(draw) == automaton.emits[0], same.outputs(draw) == 0)


def test_permutations_and_presentations():
    assert automaton_of("permutations:(0 1); (0 1 2 3 4)") == from_permutations([(1, 0, 2, 3, 4), (1, 2, 3, 4, 0)])
    assert automaton_of("presentation:x | x^3") == from_presentation("x | x^3")


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    table = Automaton(np.array([[1, 0], [2, 1], [3, 0], [0, 1]]), accepting=frozenset({0, 2}))  # two states too many
    for name in ("a.json", "table"):
        table.to_json(name)
    small = automaton_of(table)
    assert small.states == 2
    assert small == automaton_of("a.json") == automaton_of(Path("table")) == automaton_of("automaton:table")
    with pytest.raises(UsageError, match=r"there is no file .* write regex:absent\.json\)"):
        automaton_of("absent.json")
    with pytest.raises(UsageError, match="cannot read the automaton file"):
        automaton_of(Path("absent.json"))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("group:S5", {"flags": "i"}, "alphabet and flags go with a regular expression, not with 'group:S5'"),
        ("group:S5", {"alphabet": "ab"}, "alphabet and flags go with"),
        ("group:Q8", {}, "group 'Q8' is unknown"),
        ("group:", {}, "needs a name"),
        ("automaton:", {}, "needs a file"),
        ("contains:group:S3", {}, "contains needs a language"),
        ("lines:(", {}, "unterminated subpattern at position 0"),
        (5, {}, "got int"),
        (Symbol("x"), {}, "got Symbol"),
    ],
)
@pytest.mark.wrong_types
def test_specs_that_are_refused(spec: Any, options: dict[str, str], message: str):
    with pytest.raises(UsageError, match=message):
        automaton_of(spec, **options)


@pytest.mark.wrong_types
@pytest.mark.parametrize("spec", [3, None, ["ab"], {"table": []}])
def test_what_is_no_spec_is_refused_with_what_is_one(spec: Any):
    with pytest.raises(UsageError, match="a string such as .* or a DFA or NFA of automata-lib; got"):
        automaton_of(spec)


# --- letters of a text -----------------------------------------------------------------------------------------------


def test_encode_bytes():
    automaton = regex("a*")
    assert automaton.encode("aé\n").tolist() == [97, 0xC3, 0xA9, 10]
    assert automaton.encode(b"\x00\xff").tolist() == [0, 255] and automaton.encode(["a", "é"]).tolist() == [
        97,
        195,
        169,
    ]
    assert automaton.encode("").shape == (0,) and automaton.encode("a").dtype == np.int64
    with pytest.raises(UsageError, match=r"text\[1\] = '\\ud800' cannot be written in UTF-8"):
        automaton.encode("a\ud800")


def test_encode_named_letters():
    automaton = regex("(a|é|<up>)*", alphabet=["a", "up", "é"])
    assert automaton.encode("aéa").tolist() == [0, 2, 0] and automaton.encode("é".encode()).tolist() == [2]
    assert automaton.encode(["up", "a"]).tolist() == [1, 0] and automaton.encode([]).shape == (0,)
    with pytest.raises(
        UsageError, match=r"text\[2\] = 'b' is no letter; the letters are a, up, é \(a letter with a long"
    ):
        automaton.encode("aab")
    with pytest.raises(UsageError, match=r"text\[1\] = 'left' is no letter; the letters are a, up, é$"):
        automaton.encode(["a", "left"])
    with pytest.raises(UsageError, match=r"text\[1\] is not UTF-8"):
        automaton.encode(b"a\xff")
    assert Automaton.from_group("Z3").encode("0120").tolist() == [0, 1, 2, 0]
    assert Automaton.from_group("Z12").encode(["11", "0"]).tolist() == [11, 0]


@pytest.mark.parametrize("text", [b"ab" * 5_000_000, "ab" * 5_000_000])
def test_ten_million_letters_are_encoded_at_once(text: str | bytes):
    for automaton in (regex("(ab)*"), regex("(ab)*", alphabet="ab")):
        begin = time.process_time()
        assert len(automaton.encode(text)) == 10_000_000
        assert time.process_time() - begin < 1.5


def test_accepts_texts_of_any_length():
    automaton = regex(r"\d*")
    assert automaton.accepts(["", "12", b"3", np.array([48, 49]), ["4", "5"], "1a"]).tolist() == [True] * 5 + [False]
    assert automaton.accepts([]).shape == (0,)
    with pytest.raises(UsageError, match="accepts needs an accepting set"):
        Automaton.from_group("S3").accepts(["0"])


@pytest.mark.parametrize("spec", [r"\d+(\.\d+)?", "contains:foo", "group:S3", ".*"])
def test_merged_letters_act_alike(spec: str):
    automaton = automaton_of(spec)
    merged, class_of = automaton.merge_letters()
    assert np.array_equal(merged.table[:, class_of], automaton.table) and np.array_equal(merged.emits, automaton.emits)
    assert len(np.unique(merged.table, axis=1).T) == merged.alphabet
    first = [class_of.tolist().index(c) for c in range(merged.alphabet)]
    assert first == sorted(first) and merged.letters == tuple(automaton.names[letter] for letter in first)


def test_bytes_are_named_as_they_are_written():
    names = regex("a").names
    assert [names[byte] for byte in (0, 10, 32, 39, 92, 97, 255)] == [r"\x00", r"\n", " ", "'", r"\\", "a", r"\xff"]
    assert len(set(names)) == 256
    draw = random.Random(0)
    assert all(eval(f"b'{names[byte]}'"[:-1] + "'") == bytes([byte]) for byte in draw.sample(range(128, 256), 20))
