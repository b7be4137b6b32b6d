"""statetrack inspect: eigenvalues against dense matrices, planted spectra, every kind of source."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.layers import (
    DeltaProductConfig,
    GLAConfig,
    LSTMConfig,
    Mamba2Config,
    MambaConfig,
    RetNetConfig,
    RWKV7Config,
)
from statetrack.model import Config
from statetrack.spectra import BINS, WINDOWS, order_distances, spectra, summary, transitions, verdict

from .command import Command


def state_map(mixer: Any, x: Tensor, K: int) -> Tensor:
    """Return the transition of the last token [H K K], found by running the mixer from every unit state."""
    state = mixer(x[:, :-1])[1]
    maps = []
    for row in range(K):
        memory = torch.zeros_like(state.memory)
        memory[:, :, row, 0] = 1
        maps.append(mixer(x[:, -1:], state._replace(memory=memory))[1].memory)
    zero = mixer(x[:, -1:], state._replace(memory=torch.zeros_like(state.memory)))[1].memory
    return torch.stack([(m - zero)[0, :, :, 0] for m in maps], dim=-1)


@pytest.mark.parametrize(
    "config, dependent",
    [
        (DeltaProductConfig(dim=16, heads=2, beta_std=2.0), 1),
        (DeltaProductConfig(dim=16, heads=2, factors=3, gate=True, beta_std=2.0), 3),
        (DeltaProductConfig(dim=16, heads=4, key_heads=2, head_dim=6, factors=2, beta_std=2.0), 2),
        (DeltaProductConfig(dim=16, heads=2, gate="key", beta_std=2.0), None),
        (GLAConfig(dim=16, heads=2, temperature=1.0), None),
        (Mamba2Config(dim=16, heads=2, state_size=4), 1),
        (RWKV7Config(dim=16, heads=2), None),
    ],
    ids=lambda v: type(v).__name__ if hasattr(v, "dim") else "",
)
def test_eigenvalues_are_those_of_what_the_state_goes_through(config: Any, dependent: int | None):
    torch.manual_seed(0)
    mixer, x = config.build().double(), torch.randn(1, 9, 16, dtype=torch.float64)
    K = mixer.init_state(1).memory.shape[2]
    dense = torch.linalg.eigvals(state_map(mixer, x, K))
    seen = transitions(mixer, x)
    assert seen is not None
    values = seen.eigenvalues[-1]
    assert values.shape[1] == (K if dependent is None else dependent)
    for h in range(config.heads):
        for value in values[h]:  # every reported one is an eigenvalue of the matrix
            assert (dense[h] - value).abs().min() < 1e-7
        if dependent is None or "gate" not in config.__dataclass_fields__:
            continue
        rest = sorted(dense[h].tolist(), key=lambda z: min(abs(z - v) for v in values[h].tolist()))[dependent:]
        assert len({round(z.real, 6) for z in rest}) == 1 and max(abs(z.imag) for z in rest) < 1e-7  # the decay alone


def test_windows_are_products_of_their_transitions():
    torch.manual_seed(0)
    mixer = DeltaProductConfig(dim=16, heads=1, factors=2, head_dim=6, conv_size=0, beta_std=2.0).build().double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    total = torch.eye(6, dtype=torch.float64)
    for t in range(5):
        total = state_map(mixer, torch.cat([x[:, t : t + 1], x[:, t : t + 1]], 1), 6)[0] @ total
    seen = transitions(mixer, x)
    assert seen is not None
    for value in seen.product(0, 5)[0]:
        assert (torch.linalg.eigvals(total) - value).abs().min() < 1e-7


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_a_rotation_has_its_order(order: int):
    angle = torch.tensor(2j * math.pi / order, dtype=torch.complex128)
    distances = order_distances(torch.stack([angle.exp(), (-angle).exp()]))
    assert (distances < 1e-9).nonzero()[0].item() + 1 == order
    assert abs(distances[0].item() - abs(1 - angle.exp().item())) < 1e-9


def tracker(angle: float, eigenvalues: tuple[float, float] = (-1.0, 1.0)) -> Any:
    """Return a model whose one head reflects twice at token 1, by keys `angle` apart, and rests at token 0."""
    mixer = DeltaProductConfig(dim=4, heads=1, head_dim=4, factors=2, conv_size=0, eigenvalues=eigenvalues)
    model: Any = Config(vocab_size=2, num_outputs=2, mixers=(mixer,), mlp_dim=0).build()
    with torch.no_grad():
        for p in model.blocks[0].mixer.parameters():
            p.zero_()
        model.embed.weight.copy_(torch.eye(4)[:2])
        keys = model.blocks[0].mixer.k_proj.weight.view(2, 4, 4)
        keys[0, 0, :] = 20.0  # silu(20) = 20
        keys[1, 0, :], keys[1, 1, :] = 20.0 * math.cos(angle), 20.0 * math.sin(angle)
        model.blocks[0].mixer.beta_proj.weight[:, 0] = -30.0
        model.blocks[0].mixer.beta_proj.weight[:, 1] = 30.0
    return model


def test_planted_rotations_and_reflections_are_found():
    tokens = torch.tensor([[0, 1] * 40])
    (head,) = spectra(tracker(math.pi / 3), tokens)  # two reflections 60 degrees apart: a turn of 120 degrees
    assert head.orders[3] == 0.5 and head.orders[1] == 0.5 and head.turning == 0.5 and head.negative == 0.5
    assert head.distance < 1e-3 and head.verdict == "turns, order 3: 50% of the tokens are close to such a rotation"
    assert set(head.windows) == set(WINDOWS) and all(abs(w.largest - 1) < 1e-3 for w in head.windows.values())
    assert abs(sum(head.histogram) - 1) < 1e-9 and len(head.histogram) == BINS
    (locked,) = spectra(tracker(math.pi / 3, (0.0, 1.0)), tokens)
    assert locked.negative == 0 and locked.lowest >= 0 and locked.windows[4].negative == 0
    assert locked.verdict.startswith("never below 0: ")
    (flip,) = spectra(tracker(math.pi / 2), tokens)  # orthogonal keys: -1 twice
    assert flip.orders[2] == 0.5 and flip.verdict.startswith("flips: 50% of the tokens")
    assert summary([flip, locked]) == "of 2 heads 1 flip, 1 never go below 0"


def test_what_fades_is_said_to_fade():
    head = {"orders": dict.fromkeys(range(1, 7), 0.0), "lowest": -0.5, "negative": 0.3, "turning": 0.0}
    assert verdict(head) == "fades: negative, but at most 0.50 of what is flipped is left after one flip"


def test_layers_without_a_linear_transition_are_left_out():
    mixers = (LSTMConfig(dim=8), MambaConfig(dim=8), RetNetConfig(dim=8, heads=2))
    model = Config(vocab_size=5, num_outputs=5, mixers=mixers, mlp_dim=0).build()
    found = spectra(model, torch.randint(0, 5, (1, 30)))
    assert [(head.layer, head.mixer) for head in found] == [(1, "Mamba"), (2, "RetNet"), (2, "RetNet")]
    alone = Config(vocab_size=5, num_outputs=5, mixers=mixers[:1], mlp_dim=0).build()
    with pytest.raises(UsageError, match="no layer of this model has a linear transition"):
        spectra(alone, torch.randint(0, 5, (1, 30)))
    with pytest.raises(UsageError, match="at least 2 tokens"):
        spectra(model, torch.zeros(1, 1, dtype=torch.long))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(capsys)


def report(name: str) -> dict[str, Any]:
    assert Path(f"{name}.png").stat().st_size > 1000 and "<svg" in Path(f"{name}.svg").read_text()
    return json.loads(Path(f"{name}.json").read_text())


def test_a_run_and_a_compiled_automaton(command: Command):
    command("train parity --dim 16 --steps 3 --batch-size 4 --eigenvalues 0 1 --out run")
    code, out, _ = command("inspect run --out seen/run --every")
    assert code == 0 and "4 never go below 0" in out and len(report("seen/run")["heads"]) == 4
    assert command("compile group:S3 --out s3")[0] == 0
    code, out, _ = command("inspect s3 --tokens 300")
    assert code == 0 and "of 3 heads 3 turn" in out  # two of the six permutations are rotations, three are swaps
    for head in report("spectra")["heads"]:
        assert head["distance"] < 1e-3 and 0.2 < head["orders"]["3"] < 0.5 and 0.3 < head["orders"]["2"] < 0.7
    assert "is no language model" in command.refused("inspect run --text x")
    assert "tokens must be at least 2" in command.refused("inspect run --tokens 1")


def test_checkpoints_of_all_formats(command: Command):
    pytest.importorskip("transformers", minversion="5.17")
    from statetrack.convert import convert
    from statetrack.lm.tokenizers import train_tokenizer

    from .test_convert import checkpoint

    tokenizer = train_tokenizer([Path(__file__).read_text()], 300)
    _, c, weights = checkpoint("gated_deltaproduct", Path("theirs"))
    c["vocab_size"] = 300
    from safetensors.torch import save_file

    for name in ("model.embeddings.weight", "lm_head.weight"):
        weights[name] = torch.randn(300, 32, dtype=torch.float64)
    save_file(weights, "theirs/model.safetensors")
    Path("theirs/config.json").write_text(json.dumps({"model_type": "gated_deltaproduct", **c}))
    assert "no tokenizer in theirs" in command.refused("inspect theirs")
    tokenizer.save_pretrained("theirs")
    convert("theirs", "statetrack", Path("ours"))
    Path("text.txt").write_text("def f(x):\n    return x\n" * 30)
    for source in ("theirs", "ours"):
        code, _, err = command(f"inspect {source} --text text.txt --out {source}-seen")
        assert code == 0, err
    assert report("theirs-seen")["heads"] == report("ours-seen")["heads"]
    assert 0 < report("ours-seen")["heads"][0]["negative"] <= 1
    assert command("inspect ours --tokens 50")[0] == 0 and report("spectra")["tokens"] == 50
    assert "nowhere.txt cannot be read" in command.refused("inspect ours --text nowhere.txt")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    assert "binary cannot be read as text" in command.refused("inspect ours --text binary")
    Path("empty").write_text("")
    assert "at least 2 tokens" in command.refused("inspect ours --text empty")
