"""transformers: generation, padding, packed documents, the loss, saving, loading, initialisation."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statetrack import loss as loss_module
from statetrack.errors import UsageError
from statetrack.layers import MIXERS, DeltaProductConfig, Mamba2Config
from statetrack.loss import linear_cross_entropy
from statetrack.model import Config

from .cases import LAYERS, LayerCase

transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

from statetrack.hf import CACHE, StateTrackCache, StateTrackConfig, StateTrackForCausalLM  # noqa: E402

VOCAB = 23
HYBRID = (
    {"mixer": "deltaproduct", "heads": 2, "factors": 2, "gate": True},
    {"mixer": "attention", "heads": 2},
    {"mixer": "mamba", "state_size": 4},
    {"mixer": "rwkv7", "heads": 2},
)


def build(mixers=HYBRID, seed: int = 0, **options) -> Any:
    """Return a small model in float64, its weights far from where they start."""
    torch.manual_seed(seed)
    dim = mixers[0].dim if not isinstance(mixers[0], dict) else 16
    config = StateTrackConfig(vocab_size=VOCAB, hidden_size=dim, mixers=mixers, pad_token_id=0, **options)
    model = StateTrackForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


every_layer = pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)


def test_logits_are_the_model_s():
    model, ids = build(), tokens(2, 9)
    want, _ = model.model(ids)
    close(model(ids).logits, want)
    close(model(ids, logits_to_keep=2).logits, want[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, want[:, [0, 4]])
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1


def test_greedy_generation_equals_asking_again_for_every_token():
    model, ids = build(), tokens(2, 5)
    got = model.generate(ids, max_new_tokens=12, do_sample=False)
    want = ids
    for _ in range(12):
        want = torch.cat([want, model.model(want)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("how", [{"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}], ids=str)
def test_beams_and_sampling_do_not_depend_on_the_cache(how: dict):
    model, ids, found = build(), tokens(3, 6), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(model.generate(ids, max_new_tokens=10, use_cache=use_cache, **how))
    assert torch.equal(*found)
    assert len({tuple(row.tolist()) for row in found[0]}) == len(found[0])


@every_layer
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=4))
def test_padding_touches_neither_state_nor_convolution(case: LayerCase, lengths: list[int]):
    """Logits before and after the prompt equal those without padding, on whichever side the padding is."""
    lengths = [max(1, lengths[0]), *lengths[1:]]
    model, width = build([case.config]), max(1, *lengths)
    texts = [tokens(1, n, seed=n)[0] for n in lengths]
    more = tokens(len(lengths), 3, seed=7)
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
        for row, text in enumerate(texts):
            place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
            ids[row, place], mask[row, place] = text, 1
        out = model(ids, attention_mask=mask)
        after = model(more, past_key_values=out[CACHE], attention_mask=torch.cat([mask, torch.ones_like(more)], 1))
        for row, text in enumerate(texts):
            want, state = model.model(text[None])
            close(out.logits[row][mask[row].bool()], want[0])
            close(after.logits[row], model.model(more[row : row + 1], state)[0][0])


def test_a_padded_batch_generates_what_its_texts_alone_do():
    model, texts = build(), [tokens(1, n, seed=n) for n in (3, 8, 5)]
    ids = torch.cat([torch.nn.functional.pad(text, (8 - text.shape[1], 0)) for text in texts])
    for how in ({}, {"num_beams": 3}):
        got = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=10, do_sample=False, **how)
        for row, text in zip(got, texts, strict=True):
            assert torch.equal(
                row[8:], model.generate(text, max_new_tokens=10, do_sample=False, **how)[0, text.shape[1] :]
            )


def test_a_text_streams_token_by_token():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>")
    model, ids = build(), tokens(1, 4)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    work = Thread(
        target=model.generate, args=(ids,), kwargs={"max_new_tokens": 9, "do_sample": False, "streamer": streamer}
    )
    work.start()
    pieces = list(streamer)
    work.join()
    want = tokenizer.decode(model.generate(ids, max_new_tokens=9, do_sample=False)[0, 4:])
    assert "".join(pieces).split() == want.split() and len(pieces) > 5


def test_the_cache_does_not_grow():
    model, sizes = build([mixer for mixer in HYBRID if mixer["mixer"] != "attention"]), []
    for length in (1, 5, 60):
        cache = model(tokens(2, length))[CACHE]
        assert cache.get_seq_length() == length
        sizes.append(sum(x.numel() for x in tree_leaves(cache.state) if isinstance(x, Tensor)))
    assert len(set(sizes)) == 1


def test_a_cache_is_continued_selected_repeated_and_reset():
    model, ids = build(), tokens(3, 7)
    want = model(ids).logits
    cache = model(ids[:, :3])[CACHE]
    close(model(ids[:, 3:], past_key_values=cache).logits, want[:, 3:])
    cache = model(ids[:, :3])[CACHE]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 5]))
    close(model(ids[1:, 3:], past_key_values=cache).logits, want[1:, 3:])
    with pytest.raises(UsageError, match="cannot be taken back"):
        cache.crop(1)
    cache.reset()
    close(model(ids, past_key_values=cache).logits, want)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded_it_is_the_same(tied: bool, tmp_path: Path):
    model, ids = build(tie_word_embeddings=tied), tokens(2, 9)
    assert (model.model.head.weight is model.model.embed.weight) == tied
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, StateTrackForCausalLM) and loaded.config.mixers == model.config.mixers
    assert (loaded.model.head.weight is loaded.model.embed.weight) == tied
    for (name, p), (other, q) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
    close(loaded(ids).logits, model(ids).logits, 1e-12)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_config() == model.config.model_config()


def test_a_model_that_is_there_is_wrapped():
    bare = Config(vocab_size=5, num_outputs=3, mixers=(DeltaProductConfig(dim=16, heads=2),), mlp_dim=24).build()
    model, ids = StateTrackForCausalLM.from_model(bare), torch.arange(5)[None]
    close(model(ids).logits, bare(ids)[0])
    assert model.config.model_config() == bare.config and model.model is bare


def hf_loss(logits: Tensor, labels: Tensor, **options) -> Tensor:
    """Return transformers' loss; it rounds to float32."""
    return ForCausalLMLoss(logits, labels, VOCAB, **options)


def test_the_loss_follows_transformers_conventions():
    model, ids = build(), tokens(3, 9)
    labels = ids.clone()
    labels[0, :4] = labels[2, 5:] = -100
    logits = model(ids).logits
    close(model(ids, labels=labels).loss.float(), hf_loss(logits, labels), 1e-6)
    got = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    close(got.float(), hf_loss(logits, labels, num_items_in_batch=50), 1e-6)
    assert model.train()(ids, labels=labels).logits is None
    assert model(ids, labels=torch.full_like(labels, -100)).loss == 0


def test_no_document_sees_or_predicts_another():
    model, ids, lengths = build(), tokens(1, 20), [6, 1, 13]
    offsets = torch.tensor([0, 6, 7, 20], dtype=torch.int32)
    out = model(ids, labels=ids, cu_seqlens=offsets)
    parts = ids.split(lengths, dim=1)
    close(out.logits, torch.cat([model(part).logits for part in parts], dim=1))
    sums = [hf_loss(model(part).logits, part, num_items_in_batch=17) for part in parts if part.shape[1] > 1]
    close(out.loss.float(), torch.stack(sums).sum(), 1e-6)


def test_the_chunked_loss_is_cross_entropy_and_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    targets = torch.randint(0, 31, (70,))
    targets[:9] = -100
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    wanted = torch.autograd.grad(want, (hidden, weight))
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 31 * 16)

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.seen = max(self.seen, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)), 0)
            return result

    with Largest() as largest:
        got = linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(got, (hidden, weight))
    assert largest.seen == max(31 * 16, 70 * 8)
    close(got, want, 1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        close(one, other, 1e-6)


def test_the_fused_loss_is_the_chunked_one():
    pytest.importorskip("liger_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU through Triton's interpreter
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (37, 50))
    targets = torch.randint(0, 50, (37,), device=device)
    targets[:5] = -100
    fused, chunked = (total(hidden, weight, targets) for total in (loss_module._liger, loss_module._chunked))
    close(fused, chunked, 1e-3)
    for one, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (fused, chunked)), strict=True):
        close(one, other, 1e-4)


def test_under_autocast_the_softmax_is_in_float32():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 16), torch.randn(31, 16), torch.randint(0, 31, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    close(got, torch.nn.functional.cross_entropy(logits, targets), 1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids, gradients = build().train(), tokens(2, 12), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.model.gradient_checkpointing
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


EVERY = tuple({"mixer": name, **({} if name in ("lstm", "dense_rnn", "mamba") else {"heads": 4})} for name in MIXERS)


def statistics(model: StateTrackForCausalLM) -> dict[str, tuple[float, ...]]:
    return {
        name: tuple(torch.stack([p.mean(), *p.flatten().quantile(torch.tensor([0.1, 0.5, 0.9]))]).tolist())
        for name, p in model.named_parameters()
        if p.numel() >= 64 or p.unique().numel() == 1
    }


def test_weights_made_on_meta_start_as_those_of_the_constructor(tmp_path: Path):
    """Deferred initialisation, and loading with weights missing, draw from the constructor's distributions."""
    config = StateTrackConfig(vocab_size=64, hidden_size=64, mixers=EVERY)
    torch.manual_seed(0)
    want = statistics(StateTrackForCausalLM(config))
    with torch.device("meta"):
        deferred = StateTrackForCausalLM(config)
    deferred = deferred.to_empty(device="cpu")
    with torch.no_grad():
        for p in deferred.parameters():
            p.fill_(torch.nan)
    deferred.initialize_weights()
    StateTrackForCausalLM(config).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "blocks.0" not in k and "embed" not in k and "mixer.o_proj" not in k}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = StateTrackForCausalLM.from_pretrained(tmp_path)
    for name, p in loaded.named_parameters():
        assert name not in kept or torch.equal(p, kept[name]), name
    for model in (deferred, loaded):
        for name, values in statistics(model).items():
            scale = 0.02 + max(abs(v) for v in want[name])
            for value, wanted in zip(values, want[name], strict=True):
                assert abs(value - wanted) <= 0.5 * scale, (name, values, want[name])


def test_starting_weights_have_the_asked_spread():
    torch.manual_seed(0)
    config = StateTrackConfig(
        vocab_size=500, hidden_size=64, mixers=[DeltaProductConfig(dim=64)], initializer_range=0.006
    )
    model: Any = StateTrackForCausalLM(config).model
    for weight in (model.embed.weight, model.head.weight, model.blocks[0].gate_up.weight, model.blocks[0].down.weight):
        assert abs(weight.std() - 0.006) < 3e-4
    mixer = model.blocks[0].mixer
    assert abs(mixer.q_proj.weight.std() - 2**-2.5 * (2 / 128) ** 0.5) < 2e-3


def test_configurations_are_data():
    one = StateTrackConfig(hidden_size=64, num_hidden_layers=3, mixers={"mixer": "mamba2", "heads": 2, "groups": 2})
    assert [m["mixer"] for m in one.mixers] == ["mamba2"] * 3 and one.num_outputs == one.vocab_size == 32_000
    assert one.model_config().mixers == (Mamba2Config(dim=64, heads=2, groups=2),) * 3
    again = StateTrackConfig.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again.mixers == one.mixers and again.model_config() == one.model_config()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixers": "transformer"}, "unknown mixer 'transformer'; accepted: deltaproduct"),
        ({"mixers": {"mixer": "mamba", "heads": 3}}, "mamba has no option 'heads'"),
        ({"mixers": ["mamba", "gla"], "num_hidden_layers": 3}, "mixers names 2 layers, num_hidden_layers is 3"),
        ({"mixers": [DeltaProductConfig(dim=32)], "hidden_size": 64}, "dim 32, hidden_size is 64"),
        ({"mixers": {"mixer": "deltaproduct", "heads": 5}, "hidden_size": 64}, "does not divide by heads=5"),
        ({"num_outputs": 3, "tie_word_embeddings": True, "hidden_size": 64}, "tied embeddings need"),
    ],
)
def test_bad_settings_are_one_clear_line(options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        StateTrackForCausalLM(StateTrackConfig(**options))


@pytest.mark.wrong_types
def test_bad_calls_are_one_clear_line():
    model, ids, offsets = build(), tokens(1, 6), torch.tensor([0, 2, 6])
    with pytest.raises(UsageError, match="cu_seqlens does not go with"):
        model(ids, cu_seqlens=offsets, attention_mask=torch.ones_like(ids))
    with pytest.raises(UsageError, match="cu_seqlens does not go with"):
        model(ids, cu_seqlens=offsets, past_key_values=StateTrackCache())
    with pytest.raises(UsageError, match="must rise from 0 to T = 6"):
        model(ids, cu_seqlens=offsets + 1)
    with pytest.raises(UsageError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.zeros(1, 4))
    with pytest.raises(UsageError, match="must be a StateTrackCache, got DynamicCache"):
        model(ids, past_key_values=transformers.DynamicCache())


def test_a_compiled_automaton_becomes_a_checkpoint(tmp_path: Path):
    """From exact weights to transformers and back: the same answers, letter by letter."""
    from statetrack import compile
    from statetrack.convert import load

    compiled = compile("(a|b)*abb", alphabet="ab")
    StateTrackForCausalLM.from_model(compiled.to_model(), bos_token_id=2).save_pretrained(tmp_path)
    model, letters = load(tmp_path), torch.randint(0, 2, (6, 50), generator=torch.Generator().manual_seed(0))
    said = model(torch.cat([torch.full((6, 1), 2), letters], dim=1)).logits.argmax(-1)
    word = "".join("ab"[x] for x in letters[0].tolist())
    assert said[0, 1:].tolist() == [int(word[: n + 1].endswith("abb")) for n in range(50)]
    cache, steps = None, []
    for token in torch.cat([torch.full((6, 1), 2), letters], dim=1).split(1, dim=1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out[CACHE]
        steps.append(out.logits.argmax(-1))
    assert torch.equal(torch.cat(steps, 1), said)
