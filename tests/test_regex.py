"""Regular expressions: the automaton accepts what `re.fullmatch` does; everything else is refused by name."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statetrack.automata import Automaton, regex
from statetrack.errors import UsageError
from tests.languages import LANGUAGES, PATTERNS

FLAGS = {"i": re.IGNORECASE, "s": re.DOTALL, "x": re.VERBOSE}
LETTERS = {"ab": "ab", "01": "01", "bytes": "aB1_ \n\x00\x80\xff"}  # what the random texts are made of


def compiled(pattern: str, alphabet: str, flags: str = "") -> re.Pattern[Any]:
    """Return Python's own regular expression: of bytes, or of text with ASCII classes."""
    bits = sum(FLAGS[flag] for flag in flags)
    return re.compile(pattern.encode(), bits) if alphabet == "bytes" else re.compile(pattern, bits | re.ASCII)


def agree(pattern: str, alphabet: str, flags: str, texts: list[str]) -> None:
    """Compare with `re` on texts (characters up to U+00FF stand for bytes)."""
    oracle = compiled(pattern, alphabet, flags)
    texts = texts if alphabet == "bytes" else [text for text in texts if set(text) <= set(alphabet)]
    asked: list[Any] = [text.encode("latin1") for text in texts] if alphabet == "bytes" else list(texts)
    found = regex(pattern, alphabet=alphabet, flags=flags).accepts(asked)
    assert len(asked)
    for text, accepted in zip(asked, found, strict=True):
        assert accepted == (oracle.fullmatch(text) is not None), (pattern, flags, text)


# --- random expressions ----------------------------------------------------------------------------------------------

CLASSES = {
    "ab": ["[ab]", "[^a]", "[^b-z]", r"\w", r"[\w\d]", ".", "(?i:A)", "[a-b]", "(?s:.)", r"[^\W]"],
    "01": ["[01]", "[^0]", r"\d", r"[^\D]", ".", r"\x30", r"[\x30-\x31]", r"\w"],
    "bytes": [r"\W", r"\w", r"\D", r"\s", r"\S", ".", "[^a]", r"[^\n]", r"[\x80-\xff]", "[A-Z_]", "[Z-b]", r"[^\s\w]"]
    + [r"\x00", r"\n", "[^B1]", r"\377", "(?i:[a-k])", "(?i:[^b])", "(?s:.)", "(?s-i:.B)", r"[\w-]", "[]^]", r"\."],
}
REPEATS = {"*": (0, 2), "+": (1, 2), "?": (0, 1), "*?": (0, 2), "+?": (1, 2), "??": (0, 1), "{2}": (2, 2)}
REPEATS |= {"{0}": (0, 0), "{1,2}": (1, 2), "{,2}": (0, 2), "{2,}": (2, 3), "{0,3}?": (0, 3), "{1,}?": (1, 2)}


@st.composite
def expressions(draw: st.DrawFn, alphabet: str, flags: str, depth: int = 3) -> tuple[str, str]:
    """A random pattern, and a text that it matches."""
    kind = draw(st.sampled_from(["letter", "class", "letter", "sequence", "choice", "repeat"])) if depth else "letter"
    deeper = expressions(alphabet, flags, depth - 1) if depth else st.nothing()
    if kind == "letter":
        letter = draw(st.sampled_from(LETTERS[alphabet].strip("\x80\xff")))
        return re.escape(letter), letter
    if kind == "class":
        pattern = draw(st.sampled_from(CLASSES[alphabet]))
        oracle = compiled(pattern, alphabet, flags)
        texts = [character * n for character in LETTERS[alphabet] for n in (1, 2)]
        texts = [t for t in texts if oracle.fullmatch(t.encode("latin1") if alphabet == "bytes" else t)]
        return (pattern, draw(st.sampled_from(texts))) if texts else ("", "")
    if kind == "repeat":
        pattern, text = draw(deeper)
        sign = draw(st.sampled_from(sorted(REPEATS)))
        return f"({pattern}){sign}", text * draw(st.integers(*REPEATS[sign]))
    parts = draw(st.lists(deeper, min_size=1, max_size=3))
    if kind == "sequence":
        return "".join(pattern for pattern, _ in parts), "".join(text for _, text in parts)
    return "(?:" + "|".join(pattern for pattern, _ in parts) + ")", draw(st.sampled_from(parts))[1]


def texts_near(text: str, letters: str, seed: int) -> list[str]:
    """The text, some with one letter changed, added or left out, and some that have nothing to do with it."""
    draw = random.Random(seed)
    texts = ["", text, text.encode("latin1").swapcase().decode("latin1")]  # of ASCII letters only
    for _ in range(12):
        at, letter = draw.randint(0, len(text)), draw.choice(letters)
        texts += [text[:at] + letter + text[at + draw.randint(0, 1) :], text[:at] + text[at + 1 :]]
        texts.append("".join(draw.choices(letters, k=draw.randint(0, 6))))
    return [t for t in texts if len(t) <= 24]


@pytest.mark.parametrize("alphabet", LETTERS)
@settings(max_examples=120)
@given(data=st.data(), flags=st.sampled_from(["", "i", "s", "is"]), seed=st.integers(0, 2**16))
def test_random_expressions_against_re(alphabet: str, data: st.DataObject, flags: str, seed: int):
    pattern, text = data.draw(expressions(alphabet, flags))
    agree(pattern, alphabet, flags, texts_near(text, LETTERS[alphabet], seed))


ANCHORED = ["a", "b", r"\n", ".", "^", "$", r"\A", r"\Z", "(?:a|^)", "(?:b|$)", r"(?:$|\n)", "(?:^a|b)*", "(?:a$|b)+"]


@settings(max_examples=120)
@given(parts=st.lists(st.sampled_from(ANCHORED), max_size=6), flags=st.sampled_from(["", "s"]))
def test_anchors_are_exact_wherever_they_stand(parts: list[str], flags: str):
    texts = ["", *"ab\n", "aa", "ab", "a\n", "b\n", "\n\n", "\na", "aab", "ab\n", "a\n\n", "abab", "bab\n", "a\nb\n"]
    agree("".join(parts), "bytes", flags, texts)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(?i)straSSe", "STRASSE"),
        ("(?s).", "\n"),
        ("(?x) a b # a comment\n c", "abc"),
        ("(?x: a b )c", "abc"),
        ("(?i:a)b", "Ab"),
        ("(?i:a(?-i:b))", "Ab"),
        ("(?P<year>[0-9]{2})", "42"),
        ("a(?#comment)b", "ab"),
        ("(?ai)A", "a"),
        ("a{,2}b{x}", "aab{x}"),
        ("", ""),
        ("a||b", "b"),
    ],
)
def test_syntax_that_is_read(pattern: str, text: str):
    agree(pattern, "bytes", "", [text, text.upper(), text.lower(), text + "a", " " + text, "aB", "AB", "2"])
    assert regex(pattern).accepts([text])[0]


def test_flag_x_as_an_argument():
    assert regex(" a b", flags="x") == regex("ab") and regex("A", flags="ii") == regex("[aA]")


def test_lazy_quantifiers_are_the_same_language():
    assert regex("(a+?b*?)??c{2,5}?") == regex("(a+b*)?c{2,5}")


def test_every_byte_in_every_class():
    for pattern in [r"\w", r"\d", r"\s", r"\W", r"\D", r"\S", ".", "[k-z]", "[^k-z]", "[@-k]", "K", r"[^\wK]"]:
        for flags in ("", "i", "s"):
            agree(pattern, "bytes", flags, [chr(byte) for byte in range(256)])


# --- the shared languages --------------------------------------------------------------------------------------------

SIZES = {  # states, classes of letters
    "(a|b)*abb": (4, 2), "parity (1s even)": (2, 2), "even a, odd b": (4, 2), "a^(3m)": (3, 2), "mod-7 counter": (7, 2),
    "binary %3==0": (3, 2), "decimal %7==0": (7, 7), "binary %6==0": (4, 2), "ISO date loose": (12, 3),
    "ISO date strict": (15, 7), "time HH:MM[:SS]": (11, 7), "IPv4 strict": (25, 8), "float literal": (9, 5),
    "JSON number": (10, 7), "JSON string": (9, 8), "email simple": (8, 6), "identifier": (3, 3), "hex colour": (9, 3),
    "UUID": (38, 5), "MAC address": (19, 3), "semver core+pre": (12, 6), "URL simple": (17, 14), "C comment": (6, 3),
    "CSV quoted row": (5, 4), "roman numeral": (20, 8), "py int with _": (6, 4), "US phone": (19, 6),
    "contains aab": (4, 2), "subseq a..b..a": (4, 3), "starts with a": (3, 2), "4th last is a": (16, 2),
    "(aa|b)*": (3, 2), "(ab)*": (3, 2), "a*b*c*": (4, 3), "UTF-8 validity": (9, 12), "Dyck-1 depth 3": (5, 2),
    "Dyck-1 depth 8": (10, 2), "Dyck-2 depth 3": (16, 4), "S5 word problem": (120, 2), "A5 word problem": (60, 2),
    "mod-5 arith (+,*)": (15, 7), "Tomita-3": (5, 2), "Tomita-7": (5, 2), "ISO date lines": (15, 8),
    "IPv4 lines": (25, 9), "float CSV file": (10, 7), "ends with C keyword (AC)": (111, 25),
    "Dyck-1 depth 100": (102, 2), "decimal %97==0": (97, 10), "decimal %100==0": (3, 2), "7th last is a": (128, 2),
    "C-ish token": (96, 33), "ISO datetime+tz": (39, 13), "IPv6 full+compressed": (72, 3),
    "HTTP request line": (36, 25),
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_shared_languages_are_minimal(name: str):
    automaton = LANGUAGES[name]()
    assert (automaton.states, automaton.merge_letters()[0].alphabet) == SIZES[name]
    assert automaton.minimise() == automaton


@pytest.mark.parametrize("name", PATTERNS)
def test_shared_languages_against_re(name: str):
    pattern, alphabet = PATTERNS[name]
    draw = random.Random(name)
    words = [random_word(LANGUAGES[name](), draw) for _ in range(60)]
    if alphabet == "bytes":
        texts = [bytes(word).decode("latin1") for word in words]
    else:
        texts = ["".join(alphabet[letter] for letter in word) for word in words]
    letters = alphabet if alphabet != "bytes" else '09aAzZ-.:"\\/*,\n\r\xe0\x80eE+@#_ '
    near = [t for i, text in enumerate(texts) for t in texts_near(text, letters, i)] + texts
    agree(pattern, alphabet, "", near)
    oracle = compiled(pattern, alphabet)
    matched = sum(oracle.fullmatch(t.encode("latin1") if alphabet == "bytes" else t) is not None for t in texts)
    assert matched > 10 and len(near) - matched > 10


def random_word(automaton: Automaton, draw: random.Random) -> list[int]:
    """Walk at random through states from which an accepting one can be reached; stop in an accepting one by a coin."""
    alive = set(automaton.accepting or ())
    while more := {q for q in range(automaton.states) if q not in alive and alive & set(automaton.table[q].tolist())}:
        alive |= more
    state, word = automaton.start, []
    while not (state in (automaton.accepting or ()) and draw.random() < 0.3) and len(word) < 60:
        targets = automaton.table[state].tolist()
        choices = sorted({q for q in targets if q in alive})  # first a state, so that rare letters are met
        if not choices:
            break
        chosen = draw.choice(choices)
        word.append(draw.choice([letter for letter, q in enumerate(targets) if q == chosen]))
        state = chosen
    return word


def test_utf_8_against_the_decoder():
    automaton, draw = LANGUAGES["UTF-8 validity"](), random.Random(0)
    texts = [
        "".join(chr(draw.choice([65, 0xE9, 0x7FF, 0x800, 0xFFFF, 0x10FFFF])) for _ in range(5)) for _ in range(200)
    ]
    valid = [text.encode() for text in texts]
    broken = [text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :] for text in valid for at in (1, 3, 6)]

    def decodes(text: bytes) -> bool:
        try:
            text.decode()
        except UnicodeDecodeError:
            return False
        return True

    assert automaton.accepts(valid).all()
    assert automaton.accepts(broken).tolist() == [decodes(text) for text in broken]


# --- letters with names ----------------------------------------------------------------------------------------------


def test_letters_with_longer_names():
    names = ["up", "down", "a", "\n"]
    written = {"up": "U", "down": "D", "a": "a", "\n": "\n"}
    automaton = regex(r"<up>+(?:<down>|a){1,2}[^<up>a].?", alphabet=names)
    oracle = re.compile(r"U+(?:D|a){1,2}[^Ua].?", re.ASCII)
    assert automaton.letters == tuple(names)
    draw = random.Random(0)
    words = [draw.choices(names, k=draw.randint(0, 7)) for _ in range(2000)]
    expected = [oracle.fullmatch("".join(written[name] for name in word)) is not None for word in words]
    assert automaton.accepts(words).tolist() == expected and any(expected)


def test_a_named_group_is_no_letter():
    assert regex("(?P<up>a)<up>", alphabet=["up", "a"]).accepts([["a", "up"], ["up", "a"]]).tolist() == [True, False]


def test_letters_of_any_script():
    assert regex("[α-γ]+β", alphabet="αβγδ").accepts(["αγβ", "αδβ", "β"]).tolist() == [True, False, False]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "back-references .* not regular"),
        (r"(?P<x>a)(?P=x)", "back-references"),
        ("(a)?(?(1)b|c)", "conditional groups .* not regular"),
        ("a(?=b)", r"look-ahead \(\?="),
        ("a(?!b)", r"negative look-ahead \(\?!"),
        ("(?!)", r"negative look-ahead \(\?!"),
        ("(?<=a)b", r"look-behind \(\?<="),
        ("(?<!a)b", r"negative look-behind \(\?<!"),
        ("(?>a*)b", "atomic groups"),
        ("a*+b", "possessive quantifiers"),
        ("a{1,2}+b", "possessive quantifiers"),
        (r"\bword", r"word boundaries \(\\b\)"),
        (r"wo\Brd", r"word boundaries \(\\B\)"),
        ("(?m)^a$", "multi-line flag m"),
        ("(?m:^a)", "multi-line flag m"),
        ("(?L)a", "locale flag L"),
        ("(?L:a)", "locale flag L"),
        ("(a{1000}){1000}", "1,000,000 letters once its counted repetitions are written out; accepted: at most 10,000"),
        ("(?:){99999999}", "99,999,999 letters"),
        ("a{99999999999}", "repetition number is too large"),
        ("(a|b)*a(a|b){14}", "more than 10,000 states"),
        ("(a{0,60}){0,60}", "too many ways"),
        ("(?:a?){2500}", "too many ways"),
        ("(" * 3000 + ")" * 3000, "nested too deeply"),
    ],
)
def test_what_is_refused_by_name(pattern: str, message: str):
    begin = time.process_time()
    with pytest.raises(UsageError, match=message) as caught:
        regex(pattern)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("pattern", "place", "message"),
    [
        ("(ab", 0, "missing ), unterminated subpattern"),
        ("ab)", 2, "unbalanced parenthesis"),
        ("a**", 2, "multiple repeat"),
        ("*a", 0, "nothing to repeat"),
        ("a[b", 1, "unterminated character set"),
        ("[z-a]", 1, "bad character range z-a"),
        ("a{3,1}", 2, "min repeat greater than max repeat"),
        (r"ab\q", 2, r"bad escape \q"),
        (r"\u00e9", 0, r"bad escape \u"),
        ("a(?i)", 1, "global flags not at the start of the expression"),
        ("(?y)", 1, "unknown extension ?y"),
        ("a\\", 1, "bad escape (end of pattern)"),
        (r"(a)\2", 4, "invalid group reference 2"),
        ("x" * 70 + "[a", 70, "unterminated character set"),
        ("(?x)\n abc\n  (d", 12, "missing ), unterminated subpattern"),
        ("é", 0, r"'é' is not ASCII; write its bytes: (?:\xc3\xa9)"),
        ("a|[€]", 3, r"'€' is not ASCII; write its bytes: (?:\xe2\x82\xac)"),
    ],
)
def test_syntax_errors_point_at_the_place(pattern: str, place: int, message: str):
    with pytest.raises(UsageError) as caught:
        regex(pattern)
    first, shown, caret = str(caught.value).split("\n")
    assert first == f"regex: {message} at position {place}"
    assert set(caret) == {" ", "^"} and caret.count("^") == 1
    pointed = shown[caret.index("^") :]
    assert pattern[place:].startswith(pointed) and pointed and max(len(shown), len(caret)) < 80
    if pattern.isascii():
        with pytest.raises(re.error) as python:
            re.compile(pattern.encode())
        assert python.value.pos == place and python.value.msg == message


def test_the_caret_counts_names_as_they_are_written():
    with pytest.raises(UsageError, match="at position 4") as caught:
        regex("<up>(<down>", alphabet=["up", "down"])
    assert str(caught.value).split("\n")[1:] == ["  <up>(<down>", "      ^"]
    with pytest.raises(UsageError, match="bad character range <up>-a"):
        regex("[<up>-a]", alphabet=["up", "a"])


@pytest.mark.parametrize(
    ("pattern", "alphabet", "message"),
    [
        ("ac", "ab", "'c' in the regex is no letter; the letters are a, b"),
        ("[ac]", "ab", "'c' in the regex is no letter"),
        ("a|b|c", "ab", "'c' in the regex is no letter"),
        ("[a-c]", "ab", r"'c' in the regex \(a-c\) is no letter; the letters are a, b"),
        (r"[\w0-9]*", "01", r"'2' in the regex \(0-9\) is no letter"),
        ("(?i:[A-Ca])", "ab", r"'C' in the regex \(A-C\) is no letter"),
        ("<up><left>", ["up", "down"], "<left> is no letter; the letters are up, down at position 4"),
        ("a", "", "alphabet must be"),
        ("a", "aa", "alphabet must be"),
        ("a", ["a", ""], "alphabet must be"),
        ("(?u:a)", "a", "Unicode flag u"),
        ("(?u)a", "a", "Unicode flag u"),
    ],
)
def test_alphabets_that_do_not_fit(pattern: str, alphabet: Any, message: str):
    with pytest.raises(UsageError, match=message):
        regex(pattern, alphabet=alphabet)


def test_a_negated_class_may_name_what_is_no_letter():
    assert regex(r"[^c]*[^d-z][^e]\w\D", alphabet="ab") == regex(".*.{4}", alphabet="ab")
    assert regex("(?i:[A-B])*", alphabet="ab") == regex("[ab]*", alphabet="ab")


@pytest.mark.wrong_types
def test_what_is_no_string_is_refused():
    with pytest.raises(UsageError, match="the regex must be a string, got bytes"):
        regex(b"a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="alphabet must be 'bytes' or different, non-empty letters, got 3"):
        regex("a", alphabet=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("flags", ["m", "L", "u", "g"])
def test_unknown_flags(flags: str):
    with pytest.raises(UsageError, match=f"flag '{flags}' is not supported; accepted: i, s, x"):
        regex("a", flags=flags)


# --- size ------------------------------------------------------------------------------------------------------------


def test_patterns_that_are_large_but_allowed_take_a_moment():
    begin = time.process_time()
    assert regex(r"(a|b)*a(a|b){11}", alphabet="ab").states == 4096
    assert regex(".{0,1000}").states == 1002
    assert regex("|".join(f"{number:04d}" for number in range(0, 10000, 7))).states < 40
    assert regex(".*(a|b){0,1000}").states == 2
    assert time.process_time() - begin < 10


def test_tables_are_integers_over_every_byte():
    table = regex("a").table
    assert table.shape == (3, 256) and table.dtype == np.int64
