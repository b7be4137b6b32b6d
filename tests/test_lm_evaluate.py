"""Evaluation and generation: what is measured is what the model says, at any length; lm-eval offline."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers import DeltaProductConfig
from statetrack.lm import evaluate
from statetrack.lm.corpus import Corpus, prepare
from statetrack.lm.generate import generate
from statetrack.lm.train import train
from tests.command import Command
from tests.lm_runs import OPTIONS, TEXT, small


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory) -> Path:
    """A model that has begun to learn."""
    path = tmp_path_factory.mktemp("lm") / "run"
    recipe = small(mixers=(DeltaProductConfig(dim=32, heads=2),) * 2, steps=40, save_every=20)
    train(recipe, path, data, options=OPTIONS)
    return path


@pytest.fixture(scope="module")
def loaded(run: Path):
    return evaluate.load_model(run, "cpu")


def test_loss_by_position_is_that_of_one_pass(loaded, data: Path, monkeypatch):
    """In pieces with the state carried, in batches, as in one pass over each window."""
    model, tokenizer = loaded
    tokens = evaluate.windows(evaluate.corpus_tokens(Corpus(data), tokenizer), 150, 5)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    want = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(0)
    monkeypatch.setattr(evaluate, "AT_ONCE", 32)
    counted = []
    got = evaluate.loss_by_position(model, tokens, batch_size=2, report=counted.append)
    assert np.allclose(got, want, atol=1e-5)
    assert sum(counted) == 5 * 149
    rows = evaluate.bucketed(got)
    assert [r["from"] for r in rows[1:]] == [r["to"] + 1 for r in rows[:-1]]
    assert (rows[0]["from"], rows[-1]["to"]) == (1, 149)
    wide = evaluate.bucketed(got, 40)
    assert [(r["from"], r["to"]) for r in wide] == [(1, 45), (46, 91), (92, 149)]
    total = sum(r["loss"] * (r["to"] - r["from"] + 1) for r in rows)
    assert total == pytest.approx(sum(got))
    assert evaluate.perplexity_within(got, 150) == pytest.approx(math.exp(sum(got) / 149))


def test_windows_are_joined_documents_or_the_beginnings_of_long_ones():
    texts = [np.arange(5), np.arange(10, 30), np.arange(40, 52)]
    joined = evaluate.windows(texts, 9, 10)
    assert joined.flatten().tolist() == [*range(5), *range(10, 30), *range(40, 51)]
    assert evaluate.windows(texts, 9, 10, whole=True).tolist() == [list(range(10, 19)), list(range(40, 49))]
    assert len(evaluate.windows(texts, 9, 2)) == 2
    with pytest.raises(UsageError, match="no text of 21 tokens: the longest document has 20"):
        evaluate.windows(texts, 21, 1, whole=True)
    with pytest.raises(UsageError, match="no text of 50 tokens: there are 37 in all"):
        evaluate.windows(texts, 50, 1)


def test_another_tokenizer_or_no_model_is_refused(loaded, run: Path, data: Path, tmp_path: Path):
    other = prepare(replace(small().data, tokenizer="bpe:301"), tmp_path / "other")
    with pytest.raises(UsageError, match="made with another tokenizer"):
        next(evaluate.corpus_tokens(other, loaded[1]))
    with pytest.raises(UsageError, match="no config.json"):
        evaluate.load_model(data, "cpu")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="not a statetrack model; first: statetrack convert"):
        evaluate.load_model(broken, "cpu")
    (broken / "config.json").write_bytes((run / "model" / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UsageError, match="cannot be loaded"):
        evaluate.load_model(broken, "cpu")


def test_an_unfinished_run_gives_its_last_checkpoint(run: Path, tmp_path: Path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UsageError, match="no checkpoint yet"):
        evaluate.load_model(tmp_path, "cpu")
    (tmp_path / "checkpoint-20").symlink_to(run / "checkpoint-20")
    model, tokenizer = evaluate.load_model(tmp_path, "cpu")
    other, _ = evaluate.load_model(run / "checkpoint-20", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert len(tokenizer) == 300


def test_greedy_text_is_the_likeliest_and_comes_in_pieces(loaded):
    model, tokenizer = loaded
    pieces = []
    text = generate(model, tokenizer, "import asyn", tokens=12, temperature=0, show=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 1
    ids = [tokenizer.eos_token_id, *tokenizer("import asyn", add_special_tokens=False)["input_ids"]]
    start = len(ids)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_drawn_text_is_the_seeds(loaded):
    model, tokenizer = loaded
    texts = [generate(model, tokenizer, "def ", tokens=20, temperature=1.0, top_p=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(UsageError, match="top-p above 0"):
        generate(model, tokenizer, "x", top_p=0.0)


def test_a_local_task_of_lm_eval_runs_offline(loaded, tmp_path: Path):
    """Multiple choice: the accuracy is that of the likelihoods that the model gives by itself."""
    pytest.importorskip("lm_eval")
    model, tokenizer = loaded
    questions = ["import", "async def run(self", "return self.", "class Task(", "raise Runtime"]
    choices = [[" asyncio", " qqqq"], ["):", "))))"], ["_loop", " 17"], ["zz", "futures"], ["Error", "zebra"]]
    rows = [{"q": q, "choices": c, "gold": 0} for q, c in zip(questions, choices, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own_code.yaml").write_text(
        "task: own_code\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    found = evaluate.run_tasks(model, tokenizer, ["own_code"], include=tmp_path, batch_size=2)

    def likelihood(question: str, choice: str) -> float:
        context = tokenizer(question)["input_ids"]
        ids = torch.tensor([tokenizer(question + choice)["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(logs.gather(1, ids[0, 1:, None])[len(context) - 1 :].sum())

    right = [likelihood(r["q"], r["choices"][0]) > likelihood(r["q"], r["choices"][1]) for r in rows]
    assert found["own_code"]["acc,none"] == pytest.approx(sum(right) / len(right))
    with pytest.raises(UsageError, match="lm-eval has no task 'no_such_task'"):
        evaluate.run_tasks(model, tokenizer, ["no_such_task"])


def test_the_command_line_evaluates_and_generates(capsys, run: Path, data: Path, tmp_path: Path):
    command = Command(capsys)
    code, out, _ = command(f"lm evaluate {run} --data {data} --length 100 --windows 4 --device cpu --out {tmp_path}/e")
    assert code == 0 and "perplexity" in out
    stored = json.loads((tmp_path / "e" / "evaluation.json").read_text())[str(run)]
    assert stored["trained"] == 48 and stored["windows"] == 4 and 1 < stored["perplexity"]["100"] < 300
    assert (tmp_path / "e" / "perplexity.png").exists() and (tmp_path / "e" / "perplexity.svg").exists()
    code, out, _ = command(
        f"lm evaluate {run} --text {TEXT}/tasks.py --length 64 --windows 5000 --device cpu --out {tmp_path}/t"
    )
    assert code == 0 and re.search(r"has text for \d+ window\(s\) of 64 tokens, not for \d+", out)
    code, out, _ = command(f"lm generate {run} --prompt 'def f' --tokens 5 --device cpu")
    assert code == 0 and out.startswith("def f") and len(out) > 6
    code, out, _ = command(f"inspect {run} --text {TEXT}/tasks.py --tokens 50 --out {tmp_path}/spectra")
    assert code == 0 and (tmp_path / "spectra.png").exists()
    assert "--data or --text" in command.refused(f"lm evaluate {run}")
    if find_spec("lm_eval") is not None:  # before anything is measured
        line = f"lm evaluate {run} --data {data} --out {tmp_path}/n --device cpu --tasks"
        assert "lm-eval has no task 'nonsense'" in command.refused(f"{line} nonsense")
        assert f"{tmp_path}/mine is no folder" in command.refused(f"{line} own --include {tmp_path}/mine")
        assert not (tmp_path / "n").exists()
    assert "no config.json" in command.refused(f"lm generate {data}")
