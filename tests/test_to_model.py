"""A compiled automaton as an ordinary model: exact, streaming, a place to start training from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from statetrack.automata import Automaton
from statetrack.compiler import CompiledAutomaton, compile
from statetrack.compiler.to_model import opposite_preimages
from statetrack.errors import UsageError
from statetrack.evaluate import evaluate
from statetrack.model import Config
from statetrack.tasks import get_task
from statetrack.train import Settings, model_of_task, train

from .languages import LANGUAGES

CASES = [
    ("parity (1s even)", 0),
    ("(a|b)*abb", 0),
    ("identifier", 0),
    ("JSON number", 0),
    ("JSON number", 2),
    ("4th last is a", 0),
    ("S5 word problem", 0),
    ("(ab)*", 2),
]


def with_bos(compiled: CompiledAutomaton, words: np.ndarray) -> torch.Tensor:
    bos = np.full((len(words), 1), compiled.automaton.alphabet)
    return torch.from_numpy(np.concatenate([bos, words], axis=1))


def words_of(automaton: Automaton, batch: int, tokens: int) -> np.ndarray:
    """Draw words that seldom die."""
    rng = np.random.default_rng(0)
    words = np.empty((batch, tokens), dtype=np.int64)
    dead = [q for q in range(automaton.states) if set(automaton.table[q].tolist()) == {q}]
    for word in words:
        q = automaton.start
        for t in range(tokens):
            letters = [x for x in range(automaton.alphabet) if automaton.table[q, x] not in dead]
            stray = not letters or rng.random() < 0.01
            word[t] = rng.integers(automaton.alphabet) if stray else rng.choice(letters)
            q = int(automaton.table[q, word[t]])
    return words


@pytest.mark.parametrize("name, window", CASES)
def test_the_model_says_what_the_automaton_says_and_its_logits_are_exact(name: str, window: int):
    compiled = compile(LANGUAGES[name](), window=window, timeout=0)
    model = compiled.to_model()
    words = words_of(compiled.automaton, 4, 200)
    with torch.no_grad():
        logits, _ = model(with_bos(compiled, words))
    assert np.array_equal(logits[:, 1:].argmax(-1).numpy(), compiled.automaton.outputs(words))
    assert set(logits.unique().tolist()) <= {0.0, 10.0, 20.0, 30.0}


def test_an_exact_model_does_not_drift():
    compiled = compile("group:S4")
    words = np.random.default_rng(0).integers(0, 24, (1, 20_000))
    with torch.no_grad():
        logits, state = compiled.to_model()(with_bos(compiled, words))
    assert np.array_equal(logits[:, 1:].argmax(-1).numpy(), compiled.automaton.outputs(words))
    memory = state[0].memory
    assert set(memory.unique().tolist()) == {0.0, 32.0}


def test_it_streams():
    compiled = compile(LANGUAGES["JSON number"](), window=2, timeout=0)
    model, tokens = compiled.to_model(), with_bos(compiled, words_of(compiled.automaton, 2, 30))
    with torch.no_grad():
        want, _ = model(tokens)
        for cut in (1, 2, 17, 30):
            first, state = model(tokens[:, :cut])
            rest, _ = model(tokens[:, cut:], state)
            assert torch.equal(torch.cat([first, rest], dim=1), want)


def test_its_configuration_is_data():
    compiled = compile(LANGUAGES["(a|b)*abb"](), timeout=0)
    model = compiled.to_model()
    again = Config.from_dict(model.config.to_dict()).build()
    again.load_state_dict(model.state_dict())
    tokens = with_bos(compiled, words_of(compiled.automaton, 1, 20))
    assert torch.equal(model(tokens)[0], again(tokens)[0])


def test_a_frozen_automaton_inside_a_trainable_model():
    """Its blocks stay as they are, and exact, while what lies on top learns from what they say."""
    task = get_task("S3")
    exact = model_of_task(task).requires_grad_(False)
    before = {name: p.clone() for name, p in exact.named_parameters()}
    head = torch.nn.Linear(exact.config.num_outputs, 2)
    inputs, targets = task.sample(torch.Generator().manual_seed(0), 16, 40)
    odd = (targets[:, 1:] % 2).flatten()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(head(exact(inputs)[0][:, 1:]).flatten(0, 1), odd)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.1 and losses[-1] < 0.05
    assert all(torch.equal(p, before[name]) for name, p in exact.named_parameters())


def test_training_from_an_automaton_keeps_its_task_solved(tmp_path: Path):
    """With label smoothing the loss pulls at the weights from the first step, though every answer is right."""
    task = get_task("S3")
    model = model_of_task(task).config
    common = {"task": "S3", "model": model, "train_length": (4, 32), "batch_size": 32, "init_from_automaton": True}
    run = Settings(**common, steps=100, lr=1e-3, label_smoothing=0.1)  # pyright: ignore[reportArgumentType]
    trained = train(run, tmp_path / "run").eval()
    assert evaluate(trained, task, 64, sequences=64)["sequence_accuracy"] == 1.0
    assert any(
        not torch.equal(p, q) for p, q in zip(trained.parameters(), model_of_task(task).parameters(), strict=True)
    )
    again = train(run, tmp_path / "run", resume=True)
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), again.parameters(), strict=True))


def test_full_s5_in_one_layer_is_solved_before_the_first_step_and_after_some(tmp_path: Path):
    """What docs/compiler.md measures, shorter: its loss is 0, and small steps leave it right."""
    task = get_task("S5")
    exact = model_of_task(task)
    assert len(exact.blocks) == 1
    assert evaluate(exact.eval(), task, 300, sequences=8)["sequence_accuracy"] == 1.0
    run = Settings(
        task="S5", model=exact.config, train_length=(4, 32), batch_size=16, init_from_automaton=True, steps=5, lr=1e-6
    )
    trained = train(run, tmp_path / "run").eval()
    assert any(not torch.equal(p, q) for p, q in zip(trained.parameters(), exact.parameters(), strict=True))
    assert evaluate(trained, task, 300, sequences=8)["sequence_accuracy"] == 1.0


def test_swap_keys_are_exact_opposites():
    plus, minus = opposite_preimages()
    silu = torch.nn.functional.silu(torch.tensor([plus, minus]))
    assert silu[0] == -silu[1] and torch.frexp(silu[0]).mantissa == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"structure": "gated"}, 'needs structure="householder"'),
        ({"structure": "dplr"}, 'needs structure="householder"'),
        ({"window": 3}, "at most 2 tokens"),
    ],
)
def test_what_has_no_model_is_refused(options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        compile(LANGUAGES["(a|b)*abb"](), timeout=0, **options).to_model()


@pytest.mark.parametrize("task", ["parity", "modular_arithmetic"])
def test_tasks_without_bos_are_refused(task: str):
    with pytest.raises(UsageError, match="has no automaton that begins with BOS"):
        model_of_task(get_task(task))
