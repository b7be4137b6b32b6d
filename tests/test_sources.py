"""Automata from functions, automata-lib, permutations, presentations; wrappers, specs, and the letters of a text."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from automata.fa.dfa import DFA
from automata.fa.nfa import NFA
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Symbol
from sympy.combinatorics import Permutation, PermutationGroup
from sympy.combinatorics.coset_table import coset_enumeration_r
from sympy.combinatorics.fp_groups import FpGroup
from sympy.combinatorics.free_groups import free_group
from sympy.combinatorics.named_groups import AlternatingGroup

from statetrack.automata import (
    Automaton,
    automaton_of,
    contains,
    from_automata_lib,
    from_function,
    from_permutations,
    from_presentation,
    lines,
    parse_group,
    regex,
)
from statetrack.automata.sources import cycles, parse_cycles
from statetrack.errors import UsageError

SWAP, CYCLE = (1, 0, 2, 3, 4), (1, 2, 3, 4, 0)


def words(letters: str, longest: int) -> list[str]:
    """Every word up to that length."""
    found = [""]
    for word in found:
        if len(word) < longest:
            found += [word + letter for letter in letters]
    return found


# --- a step function -------------------------------------------------------------------------------------------------


def test_from_function_explores_and_minimises():
    automaton = from_function(0, lambda q, x: (10 * q + int(x)) % 100, lambda q: q == 0, "0123456789")
    assert automaton.states == 3  # only the last two digits matter
    assert automaton.accepts(["", "100", "1200", "10", "7"]).tolist() == [True, True, True, False, False]


def test_from_function_stops_at_ten_thousand_states():
    with pytest.raises(UsageError, match="the step function has more than 10,000 states"):
        from_function(0, lambda q, _: q + 1, lambda q: q == 0, "a")


# --- automata-lib ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data(), states=st.integers(1, 6), partial=st.booleans())
def test_a_dfa_of_automata_lib(data: st.DataObject, states: int, partial: bool):
    target = st.integers(0, states - 1)
    row = (
        st.dictionaries(st.sampled_from("ab"), target) if partial else st.fixed_dictionaries({"a": target, "b": target})
    )
    machine = DFA(
        states=set(range(states)),
        input_symbols={"a", "b"},
        transitions={q: data.draw(row) for q in range(states)},
        initial_state=data.draw(target),
        final_states=data.draw(st.frozensets(target)),
        allow_partial=partial,
    )
    automaton = from_automata_lib(machine, complete=partial)
    assert automaton.letters == ("a", "b")
    texts = words("ab", 6)
    assert automaton.accepts(texts).tolist() == [machine.accepts_input(text) for text in texts]
    assert automaton.states == len(machine.to_complete().minify().states if partial else machine.minify().states)


@settings(max_examples=60)
@given(data=st.data(), states=st.integers(1, 5))
def test_an_nfa_of_automata_lib(data: st.DataObject, states: int):
    targets = st.sets(st.integers(0, states - 1))
    machine = NFA(
        states=set(range(states)),
        input_symbols={"a", "b"},
        transitions={q: data.draw(st.dictionaries(st.sampled_from(["a", "b", ""]), targets)) for q in range(states)},
        initial_state=0,
        final_states=data.draw(targets),
    )
    texts = words("ab", 6)
    assert automaton_of(machine).accepts(texts).tolist() == [machine.accepts_input(text) for text in texts]


def test_a_missing_transition_is_named():
    machine = DFA(
        states={"p", "q"},
        input_symbols={"a", "b"},
        transitions={"p": {"a": "q", "b": "p"}, "q": {"a": "p"}},
        initial_state="p",
        final_states={"q"},
        allow_partial=True,
    )
    with pytest.raises(
        UsageError, match="state 'q' has no transition for letter 'b'; complete=True adds a rejecting sink"
    ):
        from_automata_lib(machine)
    assert from_automata_lib(machine, complete=True) == regex("b*a(ab*a)*", alphabet="ab")


def test_what_is_no_automata_lib_object():
    with pytest.raises(UsageError, match="expected a DFA or an NFA of automata-lib, got int"):
        from_automata_lib(5)


# --- permutations ----------------------------------------------------------------------------------------------------


def test_permutations_give_the_word_problem():
    automaton = from_permutations([SWAP, CYCLE])
    assert automaton.letters == ("(0 1)", "(0 1 2 3 4)") and automaton.states == automaton.num_outputs == 120
    group = parse_group("S5")
    rows = [tuple(row) for row in group.permutations.tolist()]
    same = Automaton.from_group(group, [rows.index(SWAP), rows.index(CYCLE)])
    draw = np.random.default_rng(0).integers(0, 2, (50, 40))
    ours, theirs = automaton.outputs(draw), same.outputs(draw)
    assert len(set(zip(ours.ravel().tolist(), theirs.ravel().tolist(), strict=True))) == len(np.unique(theirs))
    assert np.array_equal(ours == 0, theirs == 0)  # 0 is the identity in both


def test_the_first_letter_is_applied_first():
    product = [(1, 0, 2)[point] for point in (1, 2, 0)]  # first the cycle, then the swap
    automaton = from_permutations([[1, 2, 0], [1, 0, 2], product])
    assert automaton.run(np.array([[0, 1]]))[0, -1] == automaton.run(np.array([[2]]))[0, -1]


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        ([], "at least one generator"),
        ([(0, 1), (1, 1)], r"generator 1 is no permutation of the points 0..1: \(1, 1\)"),
        ([(0, 1), (1, 2, 0)], "generator 1 is no permutation of the points 0..1"),
        ([(1, 0), (1, 0)], "letters must be 2 different strings"),
        ([(*range(1, 9), 0), (1, 0, *range(2, 9))], "a group of order 362,880; accepted: at most 10,000"),
    ],
)
def test_permutations_that_are_refused(generators: list[tuple[int, ...]], message: str):
    with pytest.raises(UsageError, match=message):
        from_permutations(generators)


@given(permutation=st.permutations(range(7)))
def test_cycles_round_trip(permutation: list[int]):
    text = f"{cycles(permutation)}; (0 6)"  # the second names the largest point
    assert parse_cycles(text) == [permutation, [6, 1, 2, 3, 4, 5, 0]]
    assert Permutation(permutation).order() == Permutation(parse_cycles(text)[0]).order()


@pytest.mark.parametrize("text", ["", "(0 1", "0 1", "(0 1);", "(a b)", "(0 1))", "(0 -1)"])
def test_cycles_that_cannot_be_read(text: str):
    with pytest.raises(UsageError, match="permutations: cannot read"):
        parse_cycles(text)


@pytest.mark.parametrize("text", ["(0 0)", "(0 1)(1 2)"])
def test_cycles_that_share_a_point(text: str):
    with pytest.raises(UsageError, match="a point occurs twice"):
        parse_cycles(text)


# --- presentations ---------------------------------------------------------------------------------------------------

COXETER_A5 = "a,b,c,d,e | " + ", ".join(
    [f"{x}^2" for x in "abcde"] + ["(a b)^3", "(b c)^3", "(c d)^3", "(d e)^3"]
    + ["(a c)^2", "(a d)^2", "(a e)^2", "(b d)^2", "(b e)^2", "(c e)^2"]
)  # fmt: skip
ORDERS = {
    "x | x^5": 5,
    "x | x": 1,
    "x, y | x^4, x^2 y^-2, y^-1 x y x": 8,
    "<x, y | x^2, y^3, (x y)^5>": 60,
    "a, b | a^2 = b^3 = (a b)^4 = 1": 24,
    "x, y | [x, y], x^9, y**11": 99,
    "r, s | r^12, s*s, s r s = r^-1": 24,
    "x, y | x^2, y^3, (x*y)^7, [x, y]^4": 168,
    "x, y, z | x y = z, y z = x, z x = y": 8,
    "x, y | x^-1 y x y^-2, y^-1 x y x^-2": 1,
    COXETER_A5: 720,
}


@pytest.mark.parametrize("presentation", ORDERS)
def test_presentations(presentation: str):
    automaton = from_presentation(presentation)
    table, states = automaton.table, np.arange(automaton.states)
    assert automaton.states == ORDERS[presentation] and np.array_equal(automaton.emits, states)
    assert (np.sort(table, axis=0) == states[:, None]).all()  # letters are permutations of the elements
    group = PermutationGroup([Permutation(column) for column in table.T.tolist()])
    assert group.order() == automaton.states  # and act regularly


def test_every_relator_holds_at_every_element():
    table = from_presentation("x, y | x^4, x^2 y^-2, y^-1 x y x").table
    letters: list[Any] = [Permutation(column) for column in table.T.tolist()]
    x, y = letters
    assert all(relator.order() == 1 for relator in (x**4, x**2 * y**-2, y**-1 * x * y * x))


FINITE = [(2, 2, 5), (2, 3, 3), (2, 3, 4), (3, 2, 5), (4, 3, 2), (2, 6, 2)]  # triangle groups


@settings(max_examples=40)
@given(powers=st.sampled_from(FINITE), extra=st.lists(st.sampled_from(["x y x", "[x,y]", "x y^-1"]), max_size=2))
def test_presentations_against_sympy(powers: tuple[int, int, int], extra: list[str]):
    free, x, y = free_group("x, y")
    meaning = {"x y x": x * y * x, "[x,y]": x**-1 * y**-1 * x * y, "x y^-1": x * y**-1}
    relators = [x ** powers[0], y ** powers[1], (x * y) ** powers[2], *(meaning[word] ** 2 for word in extra)]
    written = [f"x^{powers[0]}", f"y^{powers[1]}", f"(x y)^{powers[2]}", *(f"({word})^2" for word in extra)]
    enumerated = coset_enumeration_r(FpGroup(free, relators), [])
    order = sum(coset == first for coset, first in enumerate(enumerated.p))
    assert from_presentation(f"x, y | {', '.join(written)}").states == order


@pytest.mark.parametrize("text", ["x, y |", "x, y | x^2, y^3, (x y)^7", "x | x^10000"])
def test_infinite_and_huge_groups_end_within_seconds(text: str):
    begin = time.process_time()
    with pytest.raises(UsageError, match="is infinite or too large: gave up after naming [0-9,]* elements"):
        from_presentation(text)
    assert time.process_time() - begin < 10


def test_a_finite_group_with_too_many_elements():
    with pytest.raises(UsageError, match="has more than 10,000 states"):
        from_presentation("x, y | [x, y], x^101, y^103")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x, y", "expected different names, a bar, and relations"),
        ("x, x | x^2", "expected different names"),
        ("x, 2 | x^2", "expected different names"),
        ("x, y | xy", r"'xy' is no generator \(they are x, y\)"),
        ("x | x^y", "the exponent 'y' is no integer"),
        ("x | x^", "the exponent '' is no integer"),
        ("x | (x", "a bracket is not closed"),
        ("x | [x]", r"a commutator is written \[x, y\]"),
        ("x | [x, x", "a bracket is not closed"),
        ("x | x^2,, x", "',' is no generator"),
        ("x | x^2 =", "a word is missing"),
        ("x | x^2 )", r"cannot read '\)'"),
        ("x | x^20000", "a relator has more than 10,000 letters"),
        ("x | (x^9999) (x^9999)", "a relator has more than 10,000 letters"),
        ("x | ((x^999)^999)", "a relator has more than 10,000 letters"),
    ],
)
def test_presentations_that_cannot_be_read(text: str, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        from_presentation(text)
    assert "write it like 'x, y | x^4" in str(caught.value)


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
    assert automaton_of("permutations:(0 1); (0 1 2 3 4)") == from_permutations([SWAP, CYCLE])
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
