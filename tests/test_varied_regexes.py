"""Expressions as people write them, compiled and compared with `re` on words of the language and on near misses."""

from __future__ import annotations

import random
import re
import warnings
from collections import deque
from typing import Any

import numpy as np
import pytest

from statetrack import compile
from statetrack.automata import Automaton, regex
from statetrack.errors import UsageError
from tests.test_regex import compiled as oracle

VOWELS = "αεηιουωβγδ"
EXPRESSIONS: list[tuple[str, str, str]] = [  # pattern, alphabet, flags
    (r"(?:\xc3\xa9|e)+t(?:\xc3\xa9|e)", "bytes", ""),
    ("[αεηιουω]+([β-δ][αεηιουω])*", VOWELS, ""),
    ("(?i)hello,? world!?", "bytes", ""),
    ("<.+?>.*</.+?>", "bytes", "s"),
    ("\\d{3}  # area\n [-. ]? \\d{4}", "bytes", "x"),
    ("(ab){2,5}c{0,3}", "bytes", ""),
    ("x{3}|x{7,9}|x{20}", "bytes", ""),
    ("((a|b)(c|d)|((e|f)|g(h|i))*)+j", "bytes", ""),
    (r"(0[1-9]|[12]\d|3[01])/(0[1-9]|1[0-2])/(19|20)\d\d", "bytes", ""),
    (r"[\w.+-]+@[\w-]+\.[\w.-]+", "bytes", ""),
    (r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[fFlL]?", "bytes", ""),
    (r"[\d\s\-\]\[\\^]+", "bytes", ""),
    (r"[^\W\d_]+", "bytes", ""),
    ("[]a^-]*", "bytes", ""),
    (r"^\d+$", "bytes", ""),
    (r"\A(a|^b)*c\Z", "bytes", ""),
    ("^a*$|^b+", "bytes", ""),
    ("a*?b+?c??", "bytes", ""),
    ('"(.*?)"', "bytes", ""),
    (r"[^\x00-\xff]", "bytes", ""),  # nothing
    ("a^b|a$c", "bytes", ""),  # nothing
    ("()*|(|){3}", "bytes", ""),  # the empty word
    (".*", "bytes", "s"),  # everything
    (r"0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]*|[1-9]\d*", "bytes", ""),
    (r"(\d{1,3})(,\d{3})*(\.\d\d)?", "bytes", ""),
    ("true|false|null|True|False|None", "bytes", ""),
    (r"P(\d+Y)?(\d+M)?(\d+D)?(T(\d+H)?(\d+M)?(\d+S)?)?", "bytes", ""),
    (r"(\+\d{1,2}\s?)?\(?\d{3}\)?[\s.-]?\d{3}[\s.-]?\d{4}", "bytes", ""),
    ("(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", "bytes", ""),
    (r"//[^\n]*|/\*[^*]*\*+([^/*][^*]*\*+)*/", "bytes", ""),
    ("[a-z]+(-[a-z]+)*", "bytes", "i"),
    (r"(GET|POST) /\S* HTTP/1\.[01]\r\n([\w-]+: [^\r\n]*\r\n)*\r\n", "bytes", ""),
    (r"([01]?\d|2[0-3])(:[0-5]\d){1,2}(\s?[ap]m)?", "bytes", "i"),
    (r"4\d{3}([ -]?)\d{4}[ -]?\d{4}[ -]?\d{4}|5[1-5]\d{14}|3[47]\d{13}", "bytes", ""),
    (r"(?P<key>\w+)=(?P<value>\w*|'[^']*')(;(\w+)=(\w*|'[^']*'))*", "bytes", ""),
    (r"\[(\d+(, ?\d+)*)?\]", "bytes", ""),
    ("(([^,]*),){4}[^,]*", "bytes", ""),
    ("(a?){20}a{20}", "ab", ""),
    ("(a|aa)+b|(aab?)*", "ab", ""),
    ("[ab]*a[ab]{5}", "ab", ""),
    (r"(?s:.)(?i:b)[^a-c]\t\x41\101\0", "bytes", ""),
    ("a|b|ab|ba|aba|bab|[ab]{6,8}", "ab", ""),
    ("1*(01*01*)*", "01", ""),
    (r"-?(?:0|[1-9]\d{0,2}(?:_\d{3})*)", "bytes", ""),
]


def words_of(automaton: Automaton, draw: random.Random, count: int = 150) -> list[list[int]]:
    """Return words that are often accepted: random steps, then the shortest way to an accepting state, if any."""
    nearer, todo = {q: -1 for q in automaton.accepting or ()}, deque(automaton.accepting or ())
    table = automaton.table.tolist()
    distance = dict.fromkeys(todo, 0)
    while todo:
        r = todo.popleft()
        for q, row in enumerate(table):
            if q not in nearer and r in row:
                nearer[q], distance[q] = r, distance[r] + 1
                todo.append(q)
    words = []
    for _ in range(count):
        q, word = automaton.start, []
        for _ in range(draw.choice([0, 1, 3, 8, 20])):
            targets = sorted({r for r in table[q] if r in nearer})
            if not targets:
                break
            target = draw.choice(targets)
            word.append(draw.choice([x for x, r in enumerate(table[q]) if r == target]))
            q = target
        while distance.get(q, 0) > 0:
            word.append(draw.choice([x for x, r in enumerate(table[q]) if r == nearer[q]]))
            q = nearer[q]
        words.append(word)
    return words


def near(word: list[int], letters: int, draw: random.Random) -> list[int]:
    """Return the word with a letter more, less, another or two exchanged."""
    word, i, x = list(word), draw.randint(0, len(word)), draw.randrange(letters)
    kind = draw.choice(["more", "less", "other", "exchange"])
    if kind == "more" or not word:
        word.insert(i, x)
    elif kind == "less":
        del word[min(i, len(word) - 1)]
    elif kind == "other":
        word[min(i, len(word) - 1)] = draw.choice([x, *word])
    else:
        j = min(i, len(word) - 1)
        word[j], word[0] = word[0], word[j]
    return word


@pytest.mark.parametrize(("pattern", "alphabet", "flags"), EXPRESSIONS, ids=[pattern for pattern, *_ in EXPRESSIONS])
def test_it_is_what_re_says_and_certified(pattern: str, alphabet: str, flags: str, timeout: float = 0):
    network = compile(pattern, alphabet=alphabet, flags=flags, timeout=timeout)
    automaton, draw = network.automaton, random.Random(pattern)
    words = words_of(automaton, draw)
    words += [near(word, automaton.alphabet, draw) for word in words for _ in range(2)] + [[]]
    texts: list[Any] = [
        bytes(word) if alphabet == "bytes" else "".join(automaton.names[x] for x in word) for word in words
    ]
    python: re.Pattern[Any] = oracle(pattern, alphabet, flags)
    expected = np.array([python.fullmatch(text) is not None for text in texts])
    assert (network.accepts(texts) == expected).all()
    assert expected.any() == bool(automaton.accepting) and (not expected.all() or automaton.states == 1)
    for dtype in ("float32", "bfloat16", "float16"):
        assert network.certificate(dtype).passed


def test_the_report_says_that_nothing_or_everything_is_accepted():
    assert "; it says 0 of every text" in compile("a^b", timeout=0).report()
    assert "; it says 1 of every text" in compile(".*", flags="s", timeout=0).report()
    assert "every text" not in compile(".*", timeout=0).report()


@pytest.mark.parametrize(
    ("pattern", "place", "name"),
    [
        ("[[:alpha:]]", 1, "alpha"),
        (r"\[a[^_x\][:digit:]]+", 9, "digit"),
        ("a[:space:]", 1, "space"),
        ("[]b[:upper:]]", 3, "upper"),
    ],
)
def test_posix_classes_are_refused(pattern: str, place: int, name: str):
    """To Python they are sets of these characters, which nobody means."""
    with pytest.raises(UsageError) as caught:
        regex(pattern)
    message, shown, caret = str(caught.value).split("\n")
    assert message == (
        f"regex: [:{name}:] is no class in Python's syntax; write its letters, as in [a-z] at position {place}"
    )
    assert shown[caret.index("^") :].startswith(f"[:{name}:]")


@pytest.mark.filterwarnings("error")
def test_sets_that_python_warns_of_are_read_as_python_reads_them():
    for pattern in ("[[]", "[[a]", "[a[:b]+", "[a||b]", "[a&&b]", "[a~~b]", r"\[:a:]", r"[\[:a:]", "[[:]:]", "[^[]"):
        found = regex(pattern).accepts([bytes([byte]) for byte in range(256)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracle = re.compile(pattern.encode())
        assert found.tolist() == [oracle.fullmatch(bytes([byte])) is not None for byte in range(256)]
