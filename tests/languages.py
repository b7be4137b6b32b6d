"""The 55 languages that tests and benchmarks share: `LANGUAGES["JSON number"]()` builds the minimal automaton.

PATTERNS holds those that are regular expressions, as (pattern, alphabet), for tests against Python's `re`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

from statetrack.automata import Automaton, from_function, regex

BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IPV4 = BYTE + r"(\." + BYTE + "){3}"
DATE = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
HOUR = r"([01]\d|2[0-3]):[0-5]\d"
FLOAT = r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?"
CELL = r'([^,"\n\r]*|"([^"]|"")*")'
UTF8 = (
    r"([\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    r"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}"
    r"|\xf4[\x80-\x8f][\x80-\xbf]{2})*"
)
URL = r"https?://[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+(:\d+)?(/[A-Za-z0-9._~/-]*)?(\?[A-Za-z0-9=&]*)?"
METHOD = "(GET|POST|PUT|HEAD|DELETE|OPTIONS|PATCH)"
KEYWORDS = (
    "int char void float double long short signed unsigned struct union enum const static extern return break continue "
    "switch case default while for goto if else do sizeof typedef volatile register auto"
).split()
HEX4 = "[0-9a-f]{1,4}"
IPV6 = "|".join(
    [f"({HEX4}:){{7}}{HEX4}"]
    + [f"(({HEX4}:){{0,{before}}}{HEX4})?::(({HEX4}:){{0,{5 - before}}}{HEX4})?" for before in range(6)]
)

PATTERNS: dict[str, tuple[str, str]] = {
    "(a|b)*abb": ("(a|b)*abb", "ab"),
    "parity (1s even)": ("(0*10*1)*0*", "01"),
    "a^(3m)": ("(b*ab*ab*a)*b*", "ab"),
    "binary %3==0": ("(0|1(01*0)*1)*", "01"),
    "ISO date loose": (r"\d{4}-\d{2}-\d{2}", "bytes"),
    "ISO date strict": (DATE, "bytes"),
    "time HH:MM[:SS]": (rf"{HOUR}(:[0-5]\d)?", "bytes"),
    "IPv4 strict": (IPV4, "bytes"),
    "float literal": (FLOAT, "bytes"),
    "JSON number": (r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", "bytes"),
    "JSON string": (r'"([^"\\\x00-\x1f]|\\(["\\/bfnrt]|u[0-9a-fA-F]{4}))*"', "bytes"),
    "email simple": (r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}", "bytes"),
    "identifier": (r"[A-Za-z_]\w*", "bytes"),
    "hex colour": ("#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})", "bytes"),
    "UUID": ("[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", "bytes"),
    "MAC address": ("([0-9A-F]{2}:){5}[0-9A-F]{2}", "bytes"),
    "semver core+pre": (r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?", "bytes"),
    "URL simple": (URL, "bytes"),
    "C comment": (r"/\*([^*]|\*+[^*/])*\*+/", "bytes"),
    "CSV quoted row": (f"{CELL}(,{CELL})*", "bytes"),
    "roman numeral": ("M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})", "bytes"),
    "py int with _": (r"0(_?0)*|[1-9](_?\d)*", "bytes"),
    "US phone": (r"(\(\d{3}\) |\d{3}-)\d{3}-\d{4}", "bytes"),
    "contains aab": ("(a|b)*aab(a|b)*", "ab"),
    "subseq a..b..a": (".*a.*b.*a.*", "abc"),
    "starts with a": ("a(a|b)*", "ab"),
    "4th last is a": ("(a|b)*a(a|b){3}", "ab"),
    "(aa|b)*": ("(aa|b)*", "ab"),
    "(ab)*": ("(ab)*", "ab"),
    "a*b*c*": ("a*b*c*", "abc"),
    "UTF-8 validity": (UTF8, "bytes"),
    "Tomita-7": ("0*1*0*1*", "01"),
    "ISO date lines": (rf"({DATE}\n)*", "bytes"),
    "IPv4 lines": (rf"({IPV4}\n)*", "bytes"),
    "float CSV file": (rf"({FLOAT}(,{FLOAT})*\n)*", "bytes"),
    "7th last is a": ("(a|b)*a(a|b){6}", "ab"),
    "C-ish token": (rf"({'|'.join(KEYWORDS)})|[A-Z_]+|\d+(\.\d+)?([eE][+-]?\d+)?|" r'"([^"\\]|\\.)*"', "bytes"),
    "ISO datetime+tz": (rf"{DATE}T{HOUR}:[0-5]\d(\.\d{{1,6}})?(Z|[+-]{HOUR})", "bytes"),
    "IPv6 full+compressed": (IPV6, "bytes"),
    "HTTP request line": (
        METHOD + r" (/[A-Za-z0-9._~%-]*)+(\?[A-Za-z0-9=&%._-]*)? HTTP/(1\.[01]|2|3)",
        "bytes",
    ),
}


def count_ones(modulus: int) -> Automaton:
    """Accept if the number of ones is divisible by `modulus`."""
    return from_function(0, lambda q, x: (q + (x == "1")) % modulus, lambda q: q == 0, "01")


def divisible(base: int, modulus: int) -> Automaton:
    """Accept the numbers, in positional notation, that `modulus` divides."""
    digits = "0123456789"[:base]
    return from_function(0, lambda q, x: (base * q + int(x)) % modulus, lambda q: q == 0, digits)


def even_a_odd_b() -> Automaton:
    """Accept an even number of a and an odd number of b."""

    def step(odd: tuple[bool, bool], x: str) -> tuple[bool, bool]:
        return odd[0] ^ (x == "a"), odd[1] ^ (x == "b")

    return from_function((False, False), step, lambda odd: odd == (False, True), "ab")


def dyck(brackets: str, depth: int) -> Automaton:
    """Accept well-bracketed words, nested at most `depth` deep; brackets: "()" or "()[]"."""
    closes = dict(zip(brackets[1::2], brackets[::2], strict=True))

    def step(stack: str | None, x: str) -> str | None:
        if stack is None:
            return None
        if x not in closes:
            return stack + x if len(stack) < depth else None
        return stack[:-1] if stack.endswith(closes[x]) else None

    return from_function("", step, lambda stack: stack == "", brackets)


def word_problem(*generators: tuple[int, ...]) -> Automaton:
    """Accept the words in permutations whose product is the identity; letters are "0", "1", ..."""
    identity = tuple(range(len(generators[0])))
    letters = [str(i) for i in range(len(generators))]

    def step(product: tuple[int, ...], x: str) -> tuple[int, ...]:
        return tuple(generators[int(x)][point] for point in product)

    return from_function(identity, step, lambda product: product == identity, letters)


def arithmetic(modulus: int) -> Automaton:
    """Accept digit (operator digit)* if its value, from left to right, is 0."""

    def step(state: tuple[int, str] | None, x: str) -> tuple[int, str] | None:
        if state is None or (x in "+*") == (state[1] != ""):
            return None
        value, operator = state
        if x in "+*":
            return value, x
        return (value + int(x) if operator == "+" else value * int(x)) % modulus, ""

    digits = "0123456789"[:modulus]
    return from_function((0, "+"), step, lambda q: q == (0, ""), digits + "+*")


def tomita_3() -> Automaton:
    """Accept if no odd run of ones is followed at once by an odd run of zeros."""

    def step(state: tuple[str, int, int] | None, x: str) -> tuple[str, int, int] | None:
        if state is None:
            return None
        run, ones, zeros = state
        if x == "0":
            return "0", ones, zeros ^ 1
        if run == "1":
            return "1", ones ^ 1, 0
        return None if ones and zeros else ("1", 1, 0)

    return from_function(("1", 0, 0), step, lambda q: q is not None and not (q[1] and q[2]), "01")


def ends_with(words: Iterable[str], letters: str) -> Automaton:
    """Accept if the text ends with one of the words: the state is the longest suffix that begins one (Aho-Corasick)."""
    words = set(words)
    prefixes = {word[:end] for word in words for end in range(len(word) + 1)}

    def step(suffix: str, x: str) -> str:
        text = suffix + x
        return next(text[begin:] for begin in range(len(text) + 1) if text[begin:] in prefixes)

    return from_function("", step, lambda suffix: any(suffix.endswith(word) for word in words), letters)


TABLES: dict[str, Callable[[], Automaton]] = {
    "even a, odd b": even_a_odd_b,
    "mod-7 counter": partial(count_ones, 7),
    "decimal %7==0": partial(divisible, 10, 7),
    "binary %6==0": partial(divisible, 2, 6),
    "Dyck-1 depth 3": partial(dyck, "()", 3),
    "Dyck-1 depth 8": partial(dyck, "()", 8),
    "Dyck-2 depth 3": partial(dyck, "()[]", 3),
    "S5 word problem": partial(word_problem, (1, 0, 2, 3, 4), (1, 2, 3, 4, 0)),
    "A5 word problem": partial(word_problem, (1, 2, 0, 3, 4), (1, 2, 3, 4, 0)),
    "mod-5 arith (+,*)": partial(arithmetic, 5),
    "Tomita-3": tomita_3,
    "ends with C keyword (AC)": partial(ends_with, KEYWORDS, "abcdefghijklmnopqrstuvwxyz "),
    "Dyck-1 depth 100": partial(dyck, "()", 100),
    "decimal %97==0": partial(divisible, 10, 97),
    "decimal %100==0": partial(divisible, 10, 100),
}


def _of_pattern(pattern: str, alphabet: str) -> Automaton:
    return regex(pattern, alphabet=alphabet)


LANGUAGES: dict[str, Callable[[], Automaton]] = {
    name: cache(build)
    for name, build in {**{name: partial(_of_pattern, *entry) for name, entry in PATTERNS.items()}, **TABLES}.items()
}
"""name -> a function that builds its minimal automaton, once."""
