"""Text to packed rows: sources, tokenizers, prepared data, and no leak between documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from statetrack.errors import UsageError
from statetrack.layers import DeltaProductConfig
from statetrack.lm.corpus import STATE, Corpus, Data, Shard, prepare
from statetrack.lm.packing import IGNORED, Order, Rows, join, pack
from statetrack.lm.sources import documents
from statetrack.lm.tokenizers import END, digest, encode, load_tokenizer, train_tokenizer
from statetrack.model import Config

TEXTS = [f"def f{i}(x):\n    return x + {i}  # naïve {'y' * i}\n" for i in range(90)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder of text files, one of them empty, one a copy, one no text."""
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.py").write_text(text, encoding="utf-8")
    (folder / "copy.py").write_text(TEXTS[3], encoding="utf-8")
    (folder / "empty.py").write_text("\n")
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00")
    return folder


def data_of(folder: Path, **changes) -> Data:
    return replace(Data(source=str(folder), tokenizer="bpe:300", validation=0.2, shard_tokens=500), **changes)


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and p.name != ".lock"}


# Sources


def test_a_folder_of_texts_comes_once_each_in_one_order(source: Path):
    found = list(documents(str(source)))
    assert sorted(t for t in found if t.strip()) == sorted(TEXTS)
    assert found != sorted(found)
    assert found == list(documents(str(source)))
    assert found[7:] == list(documents(str(source), skip=7))


def test_the_standard_library_is_there():
    first = next(documents("stdlib"))
    assert len(first) > 100
    assert any("pydoc" in t for t in documents("stdlib"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_tables_give_their_texts_in_order(tmp_path: Path, suffix: str):
    rows = [{"content": text, "id": i} for i, text in enumerate(TEXTS[:5])]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(str(path))
    assert list(documents(str(path), field="content")) == TEXTS[:5]
    assert list(documents(str(tmp_path), field="content", skip=2)) == TEXTS[2:5]
    with pytest.raises(UsageError, match="no text in field 'text'; it has: content, id"):
        list(documents(str(path)))


def test_a_hub_name_is_streamed_by_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_list([{"text": text} for text in TEXTS]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(documents("HuggingFaceFW/fineweb:sample-10BT", skip=80)) == TEXTS[80:]
    assert asked == [("HuggingFaceFW/fineweb", "sample-10BT", "train", True)]


def test_a_download_that_breaks_off_is_one_line_and_goes_on_later(monkeypatch, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    left = [60]  # documents until the connection breaks

    def broken(rows):
        for row in rows:
            if left[0] == 0:
                raise ConnectionError("connection reset by peer")
            left[0] -= 1
            yield row

    class Stream:
        def __init__(self, rows):
            self.rows = rows

        def skip(self, count):
            return broken(self.rows[count:])

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Stream([{"text": t} for t in TEXTS]))
    folder = tmp_path / "tokenizer"
    train_tokenizer(TEXTS, 300).save_pretrained(str(folder))
    data = Data(source="some/name", tokenizer=str(folder), shard_tokens=300)
    with pytest.raises(UsageError, match="data set 'some/name' cannot be read: connection reset by peer"):
        prepare(data, tmp_path / "out")
    with pytest.raises(UsageError, match="prepared in part only"):
        Corpus(tmp_path / "out")
    left[0] = 10**9
    prepare(data, tmp_path / "out")
    prepare(data, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("bad", ["no/such/file.txt", "./missing", "nothing.jsonl"])
def test_a_source_that_does_not_exist_is_refused(bad: str):
    with pytest.raises(UsageError, match="does not exist"):
        list(documents(bad))


def test_a_broken_json_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(UsageError, match="is not JSON"):
        list(documents(str(tmp_path / "a.jsonl")))


# Tokenizers


def test_a_trained_tokenizer_gives_any_text_back(tmp_path: Path):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(str(tmp_path))
    again = load_tokenizer(tmp_path)
    assert digest(again) == digest(tokenizer) != digest(train_tokenizer(TEXTS, 301))
    for text in (*TEXTS, "\x00 \U0001f600 \t\r\n  ", f"a {END} b"):
        (tokens,) = encode(again, [text])
        assert tokens[0] == tokens[-1] == again.eos_token_id and again.eos_token_id not in tokens[1:-1]
        assert again.decode(tokens[1:-1]) == text


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="at least 257"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(UsageError, match="holds no text"):
        train_tokenizer([], 5000)
    with pytest.raises(UsageError, match="too short for a vocabulary of 5000"):
        train_tokenizer(TEXTS, 5000)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "nothing")


# Prepared data


def test_what_is_prepared_is_the_text(source: Path, tmp_path: Path):
    corpus = prepare(data_of(source), tmp_path)
    tokenizer, found = corpus.tokenizer(), []
    assert len(corpus.state["shards"]["train"]) > 2
    for split in ("train", "validation"):
        for shard in corpus.shards(split):
            for start, end in zip([0, *shard.ends], shard.ends, strict=False):
                assert shard.tokens[start] == shard.tokens[end - 1] == tokenizer.eos_token_id
                found.append(tokenizer.decode(shard.tokens[start + 1 : end - 1]))
    assert sorted(found) == sorted(TEXTS)
    assert corpus.documents("train") + corpus.documents("validation") == len(TEXTS)
    assert corpus.documents("validation") > 5


@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch, stop_after: int
):
    prepare(data_of(source), tmp_path / "whole")

    from statetrack.lm import corpus

    written = []
    save = corpus._save

    def stopping(path, array):
        if len(written) == 4 * stop_after:  # two files per split and shard
            raise KeyboardInterrupt
        written.append(path)
        save(path, array)

    with monkeypatch.context() as patched:
        patched.setattr(corpus, "_save", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(data_of(source), tmp_path / "cut")
    with pytest.raises(UsageError, match="in part only"):
        Corpus(tmp_path / "cut")
    prepare(data_of(source), tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_other_data_is_not_mixed_in_and_force_replaces_it(source: Path, tmp_path: Path):
    prepare(data_of(source), tmp_path)
    with pytest.raises(UsageError, match="validation: 0.2 there, 0.1 now"):
        prepare(data_of(source, validation=0.1), tmp_path)
    prepare(data_of(source, validation=0.1), tmp_path, force=True)
    assert Corpus(tmp_path).state["data"]["validation"] == 0.1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="it has thesis.tex"):
        prepare(data_of(source), tmp_path / "other", force=True)


def test_tokens_stop_the_preparation(source: Path, tmp_path: Path):
    assert 400 <= prepare(data_of(source, tokens=400), tmp_path).tokens("train") < 500


def test_data_that_was_tampered_with_is_refused(source: Path, tmp_path: Path):
    corpus = prepare(data_of(source), tmp_path)
    np.save(tmp_path / "train-00000.ends.npy", np.arange(3))
    with pytest.raises(UsageError, match="is not what data.json says"):
        corpus.shards("train")
    (tmp_path / "train-00000.tokens.npy").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be read"):
        corpus.shards("train")
    train_tokenizer(TEXTS, 301).save_pretrained(str(tmp_path / "tokenizer"))
    with pytest.raises(UsageError, match="tokenizer was changed"):
        corpus.tokenizer()
    (tmp_path / STATE).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        Corpus(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"validation": 1.0}, "validation must be a share"),
        ({"tokenizer": "bpe:many"}, "bpe:SIZE"),
        ({"tokens": 0}, "at least 1"),
        ({"tokenizer": "bpe:12"}, "at least 257"),
    ],
)
def test_bad_settings_are_one_line(source: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        prepare(data_of(source, **changes), tmp_path)


def test_a_source_without_text_is_refused(tmp_path: Path):
    train_tokenizer(TEXTS, 300).save_pretrained(str(tmp_path / "tokenizer"))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n')
    data = Data(source=str(tmp_path / "empty.jsonl"), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(UsageError, match="has no text to train on"):
        prepare(data, tmp_path / "out")


# Rows


def shards_of(*every: list[int]) -> list[Shard]:
    """Return files of documents of these lengths, every token a number of its own."""
    made, number = [], 0
    for lengths in every:
        made.append(Shard(np.arange(number, number + sum(lengths)), np.cumsum(lengths)))
        number += sum(lengths)
    return made


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@given(shards=st.lists(lengths, min_size=1, max_size=3), length=st.integers(2, 25), count=st.integers(1, 5))
def test_rows_hold_every_document_in_order_and_no_segment_holds_two(shards, length: int, count: int):
    made = shards_of(*shards)
    if all(sum(s) < length for s in shards):
        with pytest.raises(UsageError, match="not enough for one row of"):
            Rows(made, length)
        return
    rows = Rows(made, length)
    whole = [s.tokens[: len(s.tokens) // length * length] for s in made]
    assert np.array_equal(np.concatenate([rows[i]["tokens"] for i in range(len(rows))]), np.concatenate(whole))
    owner = np.concatenate([[(i, d)] * n for i, s in enumerate(shards) for d, n in enumerate(s)])
    batch = pack([rows[i % len(rows)] for i in range(count)])
    tokens, edges = batch["input_ids"][0], batch["cu_seqlens"].tolist()
    assert batch["cu_seqlens"].dtype == torch.int32 and edges[0] == 0 and edges[-1] == len(tokens) == count * length
    for start, end in zip(edges, edges[1:], strict=False):
        assert start < end
        assert len({tuple(owner[t]) for t in tokens[start:end].tolist()}) == 1
        assert torch.equal(tokens[start:end], torch.arange(int(tokens[start]), int(tokens[start]) + end - start))
        assert batch["labels"][0, start] == IGNORED
        assert torch.equal(batch["labels"][0, start + 1 : end], tokens[start + 1 : end])
    assert sum(end - start for start, end in zip(edges, edges[1:], strict=False)) == count * length


@given(seed=st.integers(0, 5), count=st.integers(1, 40))
def test_the_order_is_the_seeds_and_every_epoch_has_every_row(seed: int, count: int):
    rows = Rows(shards_of([7, 30, 11, 9]), 5)
    order = Order(rows, count, seed)
    starts = [int(order[i]["tokens"][0]) for i in range(count)]
    assert starts == [int(Order(rows, count + 9, seed)[i]["tokens"][0]) for i in reversed(range(count))][::-1]
    n = len(rows)
    for epoch in range(count // n):
        assert sorted(starts[epoch * n : (epoch + 1) * n]) == [5 * i for i in range(n)]
    with pytest.raises(IndexError):
        order[count]


def test_orders_differ_between_seeds_and_epochs():
    rows = Rows(shards_of([300]), 5)
    a, b = ([int(Order(rows, 120, seed)[i]["tokens"][0]) for i in range(120)] for seed in (0, 1))
    assert a[:60] != b[:60] and a[:60] != a[60:]


def test_no_document_changes_what_a_model_says_of_another(generator):
    """Change every token of one packed document: the logits of all the others stay as they are, to the last bit."""
    rows = Rows(shards_of([5, 9, 3, 20, 11]), 16)
    batch = pack([rows[0], rows[1], rows[2]])
    torch.manual_seed(0)
    mixers = (DeltaProductConfig(dim=16, heads=2, gate=True), DeltaProductConfig(dim=16, heads=2))
    model = Config(vocab_size=60, num_outputs=60, mixers=mixers).build().eval()
    edges = batch["cu_seqlens"].tolist()
    with torch.no_grad():
        logits, _ = model(batch["input_ids"], cu_seqlens=batch["cu_seqlens"])
        for start, end in zip(edges, edges[1:], strict=False):
            changed = batch["input_ids"].clone()
            changed[0, start:end] = torch.randint(0, 60, (end - start,), generator=generator)
            changed[0, start] = (batch["input_ids"][0, start] + 1) % 60
            other, _ = model(changed, cu_seqlens=batch["cu_seqlens"])
            same = (other == logits).all(-1)[0]
            assert same[:start].all() and same[end:].all() and not same[start]


def test_joined_rows_are_a_batch():
    rows = Rows(shards_of([5, 9, 3, 20]), 8)
    batch = join([rows[1], rows[0]])
    assert batch["input_ids"].tolist() == [list(range(8, 16)), list(range(8))]
    assert torch.equal(batch["labels"], batch["input_ids"])
