"""statetrack unlock: the same function at first, a gradient to every new parameter, a bound that holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from statetrack.errors import UsageError

from .command import Command

pytest.importorskip("transformers", minversion="5.17")

from statetrack.convert import convert, load  # noqa: E402
from statetrack.hf import StateTrackConfig, StateTrackForCausalLM  # noqa: E402
from statetrack.unlock import unlock  # noqa: E402

from .test_convert import checkpoint  # noqa: E402

LOCKED: dict[str, dict[str, Any]] = {
    "deltaproduct": {"factors": 2, "gate": True},
    **{"gla": {}, "hgrn2": {}, "mamba2": {"state_size": 4}, "mlstm": {}, "rwkv6": {}, "rwkv7": {}},
}


def locked(name: str, path: Path) -> Any:
    torch.manual_seed(0)
    mixer = {"mixer": name, "heads": 2, "eigenvalues": (0, 1), **LOCKED[name]}
    mixers = [mixer, {"mixer": "attention", "heads": 2}, {**mixer, "eigenvalues": (-1, 1)}, mixer]
    model = StateTrackForCausalLM(StateTrackConfig(vocab_size=19, hidden_size=16, mixers=mixers)).eval()
    model.save_pretrained(path)
    return model


def lower_ends(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if name.endswith("mixer.low")}


@pytest.mark.parametrize("name", LOCKED)
def test_the_same_function_at_first_then_it_learns_within_the_bound(name: str, tmp_path: Path):
    before, ids = locked(name, tmp_path / "locked"), torch.randint(0, 19, (2, 20))
    assert unlock(tmp_path / "locked", tmp_path / "open") == 2
    model: Any = StateTrackForCausalLM.from_pretrained(tmp_path / "open")
    assert [m.get("learned_low", False) for m in model.config.mixers] == [True, False, False, True]
    torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=0, atol=1e-6)  # as loaded from a file
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert set(lower_ends(model)) == {"model.blocks.0.mixer.low", "model.blocks.3.mixer.low"}
    assert all(p.shape == (2,) for p in lower_ends(model).values())
    assert all(p.grad.abs().min() > 0 for p in lower_ends(model).values())
    with torch.no_grad():
        for p in lower_ends(model).values():
            p.fill_(1000.0)
    wide = {
        **model.config.to_dict(),
        "mixers": [{k: v for k, v in m.items() if k != "learned_low"} for m in model.config.mixers],
    }
    signed: Any = StateTrackForCausalLM(StateTrackConfig.from_dict(wide)).eval()
    signed.load_state_dict({k: v for k, v in model.state_dict().items() if "low" not in k.split(".")})
    torch.testing.assert_close(model.eval()(ids).logits, signed(ids).logits, rtol=0, atol=1e-6)  # exactly [-1, 1]
    assert not torch.allclose(signed(ids).logits, before(ids).logits, atol=1e-3)


def test_bit_for_bit_in_one_process(tmp_path: Path):
    locked("deltaproduct", tmp_path / "locked")
    unlock(tmp_path / "locked", tmp_path / "open")
    ids = torch.randint(0, 19, (2, 20))
    one, other = load(tmp_path / "locked"), load(tmp_path / "open")
    mine, others = one.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    other.load_state_dict(mine, strict=False, assign=True)  # the same memory, so that products round alike
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_after_large_steps_no_eigenvalue_leaves_the_range(tmp_path: Path):
    locked("deltaproduct", tmp_path / "locked")
    unlock(tmp_path / "locked", tmp_path / "open")
    model: Any = load(tmp_path / "open").train()
    ids = torch.randint(0, 19, (4, 20))
    low: list[Any] = list(lower_ends(model).values())
    steps = torch.optim.SGD(low, lr=1e4)
    for _ in range(5):
        steps.zero_grad()
        model(ids, labels=ids).loss.backward()
        steps.step()
    assert max(p.abs().max() for p in low) > 3
    x = 30 * torch.randn(1, 50, 16)
    for block in (model.model.blocks[0], model.model.blocks[3]):
        eigenvalues = 1 - block.mixer.op_inputs(x)["beta"]
        assert eigenvalues.min() >= -1 and eigenvalues.max() <= 1


def test_a_checkpoint_of_fla_is_unlocked_and_cannot_go_back(tmp_path: Path):
    checkpoint("gated_deltanet-shared", tmp_path / "theirs")
    assert unlock(tmp_path / "theirs", tmp_path / "open") == 3
    ids = torch.randint(0, 29, (1, 12))
    torch.testing.assert_close(load(tmp_path / "open")(ids).logits, load(tmp_path / "theirs")(ids).logits)
    with pytest.raises(UsageError, match="gated_deltanet cannot express"):
        convert(tmp_path / "open", "gated_deltanet", tmp_path / "back")


def test_the_verb_and_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    command = Command(capsys)
    locked("gla", Path("locked"))
    code, out, _ = command("unlock locked --out open")
    assert code == 0 and "2 layers learn" in out
    assert "open is there already" in command.refused("unlock locked --out open")
    assert "has no layer with eigenvalues in [0, 1]; its ranges: [-1, 1]" in command.refused("unlock open --out b")
    mixer = {"mixer": "mamba", "eigenvalues": (0, 1)}
    StateTrackForCausalLM(StateTrackConfig(vocab_size=9, hidden_size=16, mixers=[mixer])).save_pretrained("mamba")
    assert "layer 0 cannot learn its lower end: Mamba" in command.refused("unlock mamba --out b")
