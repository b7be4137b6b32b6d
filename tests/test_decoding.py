"""Single tokens of a generation: the same with a recorded CUDA graph as op by op."""

import copy

import pytest
import torch

from statetrack.decoding import RECORD_AT, RecordedStep, SingleTokens, generation
from statetrack.layers import MIXERS
from statetrack.model import Config

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RECORDABLE = ["deltaproduct", "mamba", "mamba2", "gla", "mlstm", "rwkv7"]


def model_of(*mixers: str):
    torch.manual_seed(0)
    return Config(vocab_size=17, num_outputs=17, mixers=tuple(MIXERS[m](dim=64) for m in mixers)).build().eval()


def outputs(model, device: str, batch: int = 2, count: int = 7):
    """Feed a prompt, then single tokens; return what each gives, and the object that took them."""
    tokens = torch.randint(0, 17, (batch, 5 + count), generator=torch.Generator().manual_seed(1)).to(device)
    singles = SingleTokens()
    with torch.no_grad():
        hidden, state = model.hidden(tokens[:, :5])
        out = [hidden[:, -1:]]
        for t in range(5, 5 + count):
            hidden, state = singles(model.hidden, tokens[:, t : t + 1], state)
            out.append(hidden)
    return torch.cat(out, 1), singles


@pytest.mark.parametrize("mixer", ["deltaproduct", "attention"])
def test_on_a_cpu_nothing_is_recorded(mixer):
    model = model_of(mixer)
    want, _ = outputs(model, "cpu")
    with generation():
        got, singles = outputs(model, "cpu")
    assert singles.recorded is None and singles.count > RECORD_AT
    assert torch.equal(got, want)


def test_a_copy_records_for_itself():
    singles = SingleTokens()
    singles.recorded = object()  # pyright: ignore[reportAttributeAccessIssue]
    assert copy.deepcopy(singles).recorded is None


def test_a_step_is_counted_within_one_generation():
    model, tokens = model_of("deltaproduct"), torch.ones(1, 1, dtype=torch.long)
    singles, state = SingleTokens(), model.init_state(1)
    for _ in range(2):
        with generation():
            for n in range(2):
                _, state = singles(model.hidden, tokens, state)
                assert singles.count == n + 1
    assert RecordedStep.of(model.hidden, tokens, state) is None


@gpu_only
@pytest.mark.parametrize("mixer", RECORDABLE)
def test_recorded_equals_op_by_op(mixer):
    model = model_of(mixer, mixer).cuda()
    want, _ = outputs(model, "cuda")
    with generation():
        got, singles = outputs(model, "cuda")
    assert singles.recorded is not None
    assert torch.equal(got, want)


@gpu_only
def test_what_grows_is_not_recorded():
    with generation():
        _, singles = outputs(model_of("deltaproduct", "attention").cuda(), "cuda")
    assert singles.recorded is None


@gpu_only
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_the_same(beams, monkeypatch):
    hf = pytest.importorskip("statetrack.hf")
    torch.manual_seed(0)
    config = hf.StateTrackConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2)
    model = hf.StateTrackForCausalLM(config).cuda().eval()
    prompt = torch.randint(1, 50, (3, 6), device="cuda")
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    recorded, record = [], RecordedStep.of

    def kept(*args):
        recorded.append(record(*args))
        return recorded[-1]

    monkeypatch.setattr(RecordedStep, "of", kept)
    got = model.generate(prompt, **options)
    assert len(recorded) == 1 and recorded[0] is not None
    monkeypatch.setattr(RecordedStep, "of", lambda *_: None)
    assert torch.equal(got, model.generate(prompt, **options))
