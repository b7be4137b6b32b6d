"""Tasks: answers against independent evaluators, distributions against the definition, streams, speed, refusals."""

import time
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statetrack.automata import Automaton
from statetrack.errors import UsageError
from statetrack.tasks import (
    IGNORE,
    TASKS,
    AutomatonTask,
    RegularTask,
    accuracy,
    correct,
    get_task,
    position_accuracy,
    scaled_accuracy,
    sequence_accuracy,
)

FIXED = [name for name in TASKS if ":" not in name]
NAMES = [*FIXED, "group:Z2 x S3", "group:D4_swaps_2_tokens", "S4_up_to_3_3_tokens"]
CHOMSKY = [name for name in FIXED if name == "parity" or name.startswith("modular")]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def questions(name: str, count: int, length: Any, seed: int = 0) -> list[tuple[list[str], str]]:
    """Return the supervised prefix of every sequence, as printed symbols, and the printed answer."""
    task = get_task(name)
    inputs, targets = task.sample(seeded(seed), count, length)
    assert ((targets != IGNORE).sum(1) == 1).all()
    ends = (targets != IGNORE).int().argmax(1).tolist()
    rows = zip(inputs.tolist(), targets.tolist(), ends, strict=True)
    return [([task.symbols[x] for x in row[: end + 1]], task.symbols[target[end]]) for row, target, end in rows]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_parity_counts_ones():
    for bits, answer in questions("parity", 500, (3, 40)):
        assert set(bits) <= {"0", "1"}
        assert answer == str(bits.count("1") % 2)


@pytest.mark.parametrize("name", CHOMSKY[1:])
@pytest.mark.parametrize("length", [(3, 40), (40, 256), 7])
def test_arithmetic_answers_are_pythons(name: str, length: Any):
    for question, answer in questions(name, 300, length):
        assert question[-1] == "="
        assert answer == str(eval("".join(question[:-1])) % 5)


def test_the_example_of_the_paper():
    task = get_task("modular_arithmetic")
    assert isinstance(task, RegularTask)
    word = [task.symbols.index(symbol) for symbol in "4+0-2-1="]
    assert task.symbols[task.automaton.outputs(np.array([word]))[0, -1]] == "1"


@pytest.mark.parametrize("name", ["S3", "S5", "S5_swaps", "S5_up_to_3", "A5"])
def test_word_problems_compose_permutations(name: str):
    task = get_task(name, bos=False)
    n, most = int(name[1]), {"S5_swaps": 2, "S5_up_to_3": 3}.get(name, 5)
    outputs = [p for p in permutations(range(n)) if name[0] == "S" or is_even(p)]
    letters = [p for p in outputs if sum(p[i] != i for i in range(n)) <= most]
    assert (task.vocab_size, task.num_outputs) == (len(letters), len(outputs))
    inputs, targets = task.sample(seeded(), 50, 40)
    for word, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        points = tuple(range(n))
        for letter, answer in zip(word, answers, strict=True):
            points = tuple(letters[letter][p] for p in points)
            assert outputs[answer] == points


def is_even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


def test_cyclic_word_problem_adds():
    inputs, targets = get_task("Z60", bos=False).sample(seeded(), 50, 100)
    assert torch.equal(targets, inputs.cumsum(1) % 60)


@pytest.mark.parametrize("bos", [False, True])
def test_four_tokens_per_element(bos: bool):
    """Inputs x1 $ $ $ x2 ..., targets 0 0 0 y1 y1 y1 y1 y2 ...: the answer comes 3 tokens late."""
    task = get_task("S5_4_tokens", bos=bos)
    table = Automaton.from_group("S5").table
    inputs, targets = task.sample(seeded(), 20, 18)
    if bos:
        assert (inputs[:, 0] == task.vocab_size - 1).all() and (targets[:, 0] == IGNORE).all()
        inputs, targets = inputs[:, 1:], targets[:, 1:]
    assert (inputs[:, torch.arange(18) % 4 != 0] == 120).all()
    elements = inputs[:, ::4]
    assert elements.shape == (20, 5) and elements.max() < 120
    for letters, row in zip(elements.tolist(), targets.tolist(), strict=True):
        y = [0]
        for letter in letters:
            y.append(int(table[y[-1], letter]))
        assert row == [y[0]] * 3 + [y[1]] * 4 + [y[2]] * 4 + [y[3]] * 4 + [y[4]] * 3


@pytest.mark.parametrize("supervision", ["every", "last"])
def test_automaton_file(tmp_path, supervision: Any):
    """(ab)* as a table: 0 expects a, 1 expects b, 2 is dead."""
    Automaton(np.array([[1, 2], [2, 0], [2, 2]]), accepting=frozenset({0}), letters=("a", "b")).to_json(
        tmp_path / "ab.json"
    )
    task = get_task(f"automaton:{tmp_path / 'ab.json'}", supervision=supervision, bos=False)
    assert (task.vocab_size, task.num_outputs, task.chance, task.symbols) == (2, 2, 1 / 2, ("a", "b"))
    inputs, targets = task.sample(seeded(), 400, (1, 6))
    ends = set()
    for word, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        last = max(i for i, answer in enumerate(answers) if answer != IGNORE)
        ends.add(last)
        text = "".join("ab"[x] for x in word)
        said = [int(text[: i + 1] == "ab" * ((i + 1) // 2) and i % 2 == 1) for i in range(6)]
        asked = range(last + 1) if supervision == "every" else [last]
        assert answers == [said[i] if i in asked else IGNORE for i in range(6)]
    assert ends == set(range(6))


# --- distributions ---------------------------------------------------------------------------------------------------


def lengths_of(name: str, length: Any) -> set[int]:
    after = 2 if name.startswith("modular_arithmetic_brackets") else 1  # the answer, and with brackets one padding
    return {len(question) + after for question, _ in questions(name, 4000, length)}


def test_lengths_are_the_papers():
    assert lengths_of("parity", (3, 40)) == set(range(3, 41))
    assert lengths_of("parity", (40, 256)) == set(range(40, 257))
    assert lengths_of("modular_arithmetic", (3, 40)) == set(range(3, 40, 2))
    assert lengths_of("modular_arithmetic", (40, 256)) == set(range(39, 256, 2))
    assert lengths_of("modular_arithmetic_brackets", (3, 40)) == set(range(5, 41))
    assert lengths_of("modular_arithmetic_brackets", (40, 256)) == set(range(40, 257))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("parity", 0.0),
        ("modular_arithmetic", 0.01),
        ("modular_arithmetic_brackets", 0.12),
        ("modular_arithmetic_brackets_no_mult", 0.01),
    ],
)
def test_the_most_frequent_answer_scores_what_was_measured(name: str, expected: float):
    count = 20000
    answers = Counter(answer for _, answer in questions(name, count, (40, 256)))
    (top, hits), *_ = answers.most_common(1)
    assert scaled_accuracy(hits / count, get_task(name).chance) == pytest.approx(expected, abs=0.02)
    if name == "modular_arithmetic_brackets":
        assert top == "0" and hits / count == pytest.approx(0.30, abs=0.015)


def recursive_expression(rng: np.random.Generator, length: int, mult: bool) -> list[str]:
    """The generator as the paper's code defines it, one span at a time."""
    if length < 5:
        digit = str(rng.integers(0, 5))
        return [[digit], ["-", digit], ["(", digit, ")"], ["(", "-", digit, ")"]][length - 1]
    left = int(rng.integers(1, length - 3))
    first = recursive_expression(rng, left, mult)
    second = recursive_expression(rng, length - 3 - left, mult)
    return ["(", *first, "+-*"[rng.integers(0, 3 if mult else 2)], *second, ")"]


def parse_expression(tokens: list[str], splits: Counter, operations: Counter) -> None:
    """Check one span against the grammar, and count (length, left length) and the operations."""
    if len(tokens) < 5:
        digit = tokens[len(tokens) // 2]
        forms = [[digit], ["-", digit], ["(", digit, ")"], ["(", "-", digit, ")"]]
        assert digit in set("01234") and tokens == forms[len(tokens) - 1]
        return
    assert tokens[0] == "(" and tokens[-1] == ")"
    inside, depth, end = tokens[1:-1], 0, 1 if tokens[1] == "-" else 0
    while True:  # the first operand is a digit, or ends where its bracket closes
        depth += {"(": 1, ")": -1}.get(inside[end], 0)
        end += 1
        if depth == 0:
            break
    splits[len(tokens), end] += 1
    operations[inside[end]] += 1
    parse_expression(inside[:end], splits, operations)
    parse_expression(inside[end + 1 :], splits, operations)


@pytest.mark.parametrize(("name", "symbols"), [("modular_arithmetic_brackets", "+-*"), (CHOMSKY[3], "+-")])
def test_brackets_follow_the_grammar_with_uniform_choices(name: str, symbols: str):
    splits, operations = Counter(), Counter()
    for question, _ in questions(name, 3000, (20, 60)):
        parse_expression(question[:-1], splits, operations)
    total = operations.total()
    assert set(operations) == set(symbols)
    for hits in operations.values():
        assert abs(hits - total / len(symbols)) < 5 * total**0.5
    for length in range(5, 21):
        hits = [splits[length, left] for left in range(1, length - 3)]
        expected = sum(hits) / (length - 4)
        assert sum((h - expected) ** 2 for h in hits) / expected < (length - 5) + 6 * (2 * length) ** 0.5  # chi-square
    assert all(1 <= left <= length - 4 for length, left in splits)


@pytest.mark.parametrize("mult", [True, False])
def test_brackets_agree_with_the_recursive_generator(mult: bool):
    """Mean number of each symbol, and of each answer, at one length: within 5 standard errors of each other."""
    count, rng = 3000, np.random.default_rng(1)
    name = "modular_arithmetic_brackets" + "_no_mult" * (not mult)
    ours = [question[:-1] for question, _ in questions(name, count, 60)]
    theirs = [recursive_expression(rng, 57, mult) for _ in range(count)]
    assert {len(tokens) for tokens in ours} == {57}

    def statistics(expressions: list[list[str]]) -> np.ndarray:
        counts = [[tokens.count(symbol) for symbol in "01234+-*()"] for tokens in expressions]
        values = [eval("".join(tokens)) % 5 for tokens in expressions]
        return np.concatenate([counts, np.eye(5)[values]], axis=1)

    a, b = statistics(ours), statistics(theirs)
    error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / count)
    assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("name", [name for name in FIXED if name not in CHOMSKY])
def test_letters_are_uniform(name: str):
    task = get_task(name, bos=False)
    assert isinstance(task, AutomatonTask)
    inputs, _ = task.sample(seeded(), 1000, 100)
    used = inputs[inputs < task.letters].bincount(minlength=task.letters).double()
    expected = used.sum() / task.letters
    assert ((used - expected).abs() < 5.5 * expected.sqrt()).all()


def test_modular_arithmetic_symbols_are_uniform_and_independent():
    questions_ = [question[:-1] for question, _ in questions("modular_arithmetic", 2000, 39)]
    pairs = Counter(pair for tokens in questions_ for pair in zip(tokens[::2], tokens[1::2], strict=False))
    assert len(pairs) == 15
    expected = pairs.total() / 15
    assert all(abs(hits - expected) < 5.5 * expected**0.5 for hits in pairs.values())


def test_chances_and_sizes():
    found = {name: (get_task(name).vocab_size, get_task(name).num_outputs, get_task(name).chance) for name in FIXED}
    assert found == {
        "parity": (3, 3, 1 / 2),
        "modular_arithmetic": (10, 10, 1 / 5),
        "modular_arithmetic_brackets": (12, 12, 1 / 5),
        "modular_arithmetic_brackets_no_mult": (12, 12, 1 / 5),
        "S3": (7, 6, 1 / 6),  # one more than the letters: BOS
        "S4": (25, 24, 1 / 24),
        "A5": (61, 60, 1 / 60),
        "S5": (121, 120, 1 / 120),
        "Z60": (61, 60, 1 / 60),
        "S5_swaps": (12, 120, 1 / 120),
        "S5_up_to_3": (32, 120, 1 / 120),
        "S5_4_tokens": (122, 120, 1 / 120),
        "Z60_2_tokens": (62, 60, 1 / 60),
    }


# --- shapes, seeds, streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [5, 40, (3, 40)])
def test_shape_and_range(name: str, length: Any):
    task = get_task(name)
    inputs, targets = task.sample(seeded(), 64, length)
    longest = length if isinstance(length, int) else length[1]
    assert task.tokens(length) == (longest - 1 if name in CHOMSKY else longest + 1)
    for tensor, limit, least in ((inputs, task.vocab_size, 0), (targets, task.num_outputs, IGNORE)):
        assert tensor.shape == (64, task.tokens(length)) and tensor.dtype == torch.int64 and tensor.is_contiguous()
        assert tensor.min() >= least and tensor.max() < limit
    assert len(task.symbols) == task.vocab_size
    assert task.supervision == ("last" if name in CHOMSKY else "every")


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_every_bit(name: str):
    task = get_task(name)
    (x, y), (x_again, y_again), (x_other, _) = (task.sample(seeded(seed), 32, (5, 40)) for seed in (7, 7, 8))
    assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert not torch.equal(x, x_other)
    generator = seeded(7)
    task.sample(generator, 32, (5, 40))
    assert not torch.equal(task.sample(generator, 32, (5, 40))[0], x)  # a stream, not one batch for ever


@pytest.mark.parametrize("name", NAMES)
@given(chunk=st.integers(1, 50), batch=st.sampled_from([1, 3, 20]), length=st.sampled_from([40, (5, 40)]))
def test_a_stream_is_the_sample_in_pieces(name: str, chunk: int, batch: int, length: Any):
    task = get_task(name)
    pieces = list(task.stream(seeded(), batch, length, chunk))
    assert all(x.shape[1] == chunk for x, _ in pieces[:-1])
    inputs, targets = task.sample(seeded(), batch, length)
    assert torch.equal(torch.cat([x for x, _ in pieces], dim=1), inputs)
    assert torch.equal(torch.cat([y for _, y in pieces], dim=1), targets)


@pytest.mark.parametrize("name", ["parity", "modular_arithmetic", "S5", "S5_4_tokens"])
def test_a_stream_needs_the_memory_of_one_piece(name: str):
    pieces = get_task(name).stream(seeded(), 2, 10**12, 64)  # far beyond any memory, were it drawn whole
    (first, _), (second, _) = next(pieces), next(pieces)
    assert first.shape == second.shape == (2, 64)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("length", [256, (40, 256)])
def test_a_large_batch_takes_milliseconds(name: str, length: Any):
    """1024 x 256 in 50 ms on one core (measured: at most 6); three times that here, for busy machines."""
    task, generator, times = get_task(name), seeded(), []
    for _ in range(5):
        begin = time.process_time()
        task.sample(generator, 1024, length)
        times.append(time.process_time() - begin)
    assert min(times) < 0.15


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    targets = torch.tensor([[IGNORE, 1, 2, 3], [IGNORE, 1, IGNORE, 3]])
    predictions = torch.tensor([[0, 1, 0, 3], [9, 1, 5, 0]])
    assert accuracy(predictions, targets) == pytest.approx(3 / 5)
    assert accuracy(predictions[:, :1], targets[:, :1]) != accuracy(predictions[:, :1], targets[:, :1])  # NaN
    by_position = position_accuracy(predictions, targets)
    assert by_position[0].isnan() and by_position[1:].tolist() == [1.0, 0.0, 0.5]
    assert correct(predictions, targets).tolist() == [[True, True, False, True], [True, True, True, False]]
    assert sequence_accuracy(correct(predictions, targets)).tolist() == [1.0, 1.0, 0.5, 0.0]


def test_scaled_accuracy():
    assert scaled_accuracy(0.2, 0.2) == 0 and scaled_accuracy(1.0, 0.2) == 1
    assert scaled_accuracy(0.75, 0.5) == pytest.approx(0.5) and scaled_accuracy(0.0, 0.5) == -1
    with pytest.raises(UsageError, match="chance"):
        scaled_accuracy(1.0, 1.0)
