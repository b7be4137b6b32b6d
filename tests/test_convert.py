"""Checkpoints of fla and transformers' olmo_hybrid: the same logits here, and the same weights back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers import AttentionConfig, DeltaProductConfig
from statetrack.layers.common import decayed_names

from .command import Command

transformers = pytest.importorskip("transformers", minversion="5.17")

from statetrack.convert import FORMATS, Checkpoint, convert, load, read, write  # noqa: E402
from statetrack.hf import StateTrackConfig, StateTrackForCausalLM  # noqa: E402

COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 29, "intermediate_size": 40, "norm_eps": 1e-5}
ATTENTION = {
    "layers": [1],
    "num_heads": 4,
    "num_kv_heads": 2,
    "qkv_bias": False,
    "window_size": None,
    "rope_theta": 500.0,
}
FLA: dict[str, dict[str, Any]] = {
    "delta_net": {"num_heads": 4, "expand_k": 0.75, "expand_v": 1.0, "allow_neg_eigval": True},
    "delta_net-gate-no-conv": {"num_heads": 2, "use_gate": True, "use_short_conv": False, "intermediate_size": None},
    "delta_net-hybrid": {"num_heads": 2, "attn": ATTENTION, "allow_neg_eigval": True},
    "gated_deltanet": {"num_heads": 2, "head_dim": 12, "expand_v": 1.5, "use_gate": True, "allow_neg_eigval": True},
    "gated_deltanet-shared": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 2, "conv_size": 3},
    "gated_deltaproduct": {
        **{"num_heads": 3, "head_dim": 8, "expand_v": 2.0, "num_householder": 2, "use_forget_gate": True},
        **{"allow_neg_eigval": True, "use_output_gate": True},
    },
    "gated_deltaproduct-plain": {
        "num_heads": 2,
        "head_dim": 8,
        "expand_v": 1.0,
        "num_householder": 3,
        "use_output_gate": False,
    },
}
every_fla = pytest.mark.parametrize("name", FLA)


def shapes(kind: str, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of one of fla's checkpoints, from its modelling files."""
    dim, H, N = c["hidden_size"], c["num_heads"], c.get("num_householder", 1)
    width = c["intermediate_size"] or 256 * -(-int(dim * 4 * 2 / 3) // 256)
    if kind == "delta_net":
        K, V, Hv = int(dim * c.get("expand_k", 1)), int(dim * c.get("expand_v", 1)), H
        head_v = V // H
    else:
        Hv, K = c.get("num_v_heads") or H, H * c["head_dim"]
        head_v = int(c["head_dim"] * c.get("expand_v", 2.0))
        V = Hv * head_v
    out = {"model.embeddings.weight": (c["vocab_size"], dim), "model.norm.weight": (dim,)}
    out["lm_head.weight"] = (c["vocab_size"], dim)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        out |= {f"{layer}.attn_norm.weight": (dim,), f"{layer}.mlp_norm.weight": (dim,)}
        out |= {f"{layer}.mlp.{p}_proj.weight": (width, dim) for p in ("gate", "up")}
        out[f"{layer}.mlp.down_proj.weight"] = (dim, width)
        if c.get("attn") and i in c["attn"]["layers"]:
            kv = dim // c["attn"]["num_heads"] * c["attn"]["num_kv_heads"]
            out |= {
                f"{layer}.attn.{p}_proj.weight": (size, dim) for p, size in zip("qkvo", (dim, kv, kv, dim), strict=True)
            }
            continue
        sizes = dict(zip("qkv", (K, N * K, N * V), strict=True))
        out |= {f"{layer}.attn.{p}_proj.weight": (size, dim) for p, size in sizes.items()}
        out |= {f"{layer}.attn.o_proj.weight": (dim, V), f"{layer}.attn.b_proj.weight": (N * Hv, dim)}
        out[f"{layer}.attn.o_norm.weight"] = (head_v,)
        if c.get("use_short_conv", True):
            out |= {f"{layer}.attn.{p}_conv1d.weight": (size, 1, c.get("conv_size", 4)) for p, size in sizes.items()}
        if c.get("use_gate", kind == "gated_deltanet") if "product" not in kind else c.get("use_output_gate", True):
            out[f"{layer}.attn.g_proj.weight"] = (V, dim)
        if kind == "gated_deltanet" or c.get("use_forget_gate"):
            out |= {
                f"{layer}.attn.a_proj.weight": (Hv, dim),
                f"{layer}.attn.A_log": (Hv,),
                f"{layer}.attn.dt_bias": (Hv,),
            }
    return out


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attention(x: Tensor, w: dict[str, Tensor], spec: dict[str, Any]) -> Tensor:
    """Causal softmax attention with rotary positions, one query at a time."""
    T, dim = x.shape
    H, Hk = spec["num_heads"], spec["num_kv_heads"]
    K = dim // H
    q, k, v = ((x @ w[f"{p}_proj.weight"].T).view(T, -1, K) for p in "qkv")
    angle = torch.arange(T)[:, None] * spec["rope_theta"] ** (-torch.arange(0, K, 2) / K)

    def turned(y: Tensor) -> Tensor:
        a, b = y[..., : K // 2], y[..., K // 2 :]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    q, k, out = turned(q), turned(k), torch.zeros(T, H, K, dtype=x.dtype)
    for t in range(T):
        for h in range(H):
            g = h // (H // Hk)
            out[t, h] = torch.softmax(k[: t + 1, g] @ q[t, h] / K**0.5, 0) @ v[: t + 1, g]
    return out.flatten(1) @ w["o_proj.weight"].T


def delta(x: Tensor, w: dict[str, Tensor], c: dict[str, Any]) -> Tensor:
    """One delta-rule layer of fla's, token by token and factor by factor."""
    T, N = len(x), c.get("num_householder", 1)
    Hk, Hv = c["num_heads"], c.get("num_v_heads") or c["num_heads"]
    projected = {}
    for p in "qkv":
        y = x @ w[f"{p}_proj.weight"].T
        if f"{p}_conv1d.weight" in w:
            taps = w[f"{p}_conv1d.weight"].squeeze(1)
            padded = torch.cat([y.new_zeros(taps.shape[1] - 1, y.shape[1]), y])
            y = torch.stack([(padded[t : t + taps.shape[1]] * taps.T).sum(0) for t in range(T)])
        projected[p] = F.silu(y)
    K = projected["q"].shape[1] // Hk
    q, k = projected["q"].view(T, Hk, K), projected["k"].view(T, N, Hk, K)
    v = projected["v"].view(T, N, Hv, -1)
    q, k = (y / torch.sqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    beta = (x @ w["b_proj.weight"].T).sigmoid().view(T, N, Hv) * (2 if c.get("allow_neg_eigval") else 1)
    log_decay = torch.zeros(T, Hv, dtype=x.dtype)
    if "A_log" in w:
        log_decay = -w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
    out = torch.zeros(T, Hv, v.shape[-1], dtype=x.dtype)
    for h in range(Hv):
        S, g = torch.zeros(K, v.shape[-1], dtype=x.dtype), h // (Hv // Hk)
        for t in range(T):
            S = S * log_decay[t, h].exp()
            for j in range(N):
                S = S + beta[t, j, h] * torch.outer(k[t, j, g], v[t, j, h] - k[t, j, g] @ S)
            out[t, h] = q[t, g] @ S / K**0.5
    out = rms(out, w["o_norm.weight"], c["norm_eps"])
    if "g_proj.weight" in w:
        out = out * F.silu(x @ w["g_proj.weight"].T).view_as(out)
    return out.flatten(1) @ w["o_proj.weight"].T


def fla_logits(c: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    x = w["model.embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in w.items() if k.startswith(f"model.layers.{i}.")}
        mixer = {k.removeprefix("attn."): v for k, v in layer.items() if k.startswith("attn.")}
        y = rms(x, layer["attn_norm.weight"], c["norm_eps"])
        attends = c.get("attn") and i in c["attn"]["layers"]
        x = x + (attention(y, mixer, c["attn"]) if attends else delta(y, mixer, c))
        y = rms(x, layer["mlp_norm.weight"], c["norm_eps"])
        gate, up, down = (layer[f"mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return rms(x, w["model.norm.weight"], c["norm_eps"]) @ w["lm_head.weight"].T


def checkpoint(
    name: str, path: Path, dtype: torch.dtype = torch.float64
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Write one of fla's checkpoints with random weights; return its kind, settings and weights."""
    kind, c = name.split("-")[0], {**COMMON, **FLA[name]}
    g = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes(kind, c).items():
        std = 1.0 if len(shape) < 2 or "embed" in key else 2.0 * shape[-1] ** -0.5
        weights[key] = (std * torch.randn(shape, generator=g) + (len(shape) == 1)).to(dtype)
    path.mkdir(parents=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": kind, "eos_token_id": 2, "dtype": "float64", **c}))
    return kind, c, weights


@every_fla
def test_logits_of_fla_checkpoints_and_the_way_back(name: str, tmp_path: Path):
    kind, c, weights = checkpoint(name, tmp_path / "theirs")
    ids = torch.randint(0, 29, (2, 17), generator=torch.Generator().manual_seed(1))
    want = torch.stack([fla_logits(c, weights, row) for row in ids])
    convert(tmp_path / "theirs", "statetrack", tmp_path / "ours")
    for model in (
        load(tmp_path / "theirs"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64),
    ):
        assert model.config.eos_token_id == 2
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-4 * want.abs().max().item())
    convert(tmp_path / "ours", kind, tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert set(again) == set(weights) and all(torch.equal(again[k], weights[k]) for k in weights)
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert shapes(kind, settings | {"attn": c.get("attn")}) == shapes(kind, c) and settings["eos_token_id"] == 2
    assert read(tmp_path / "back").config.model_config() == read(tmp_path / "theirs").config.model_config()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fla runs on a GPU only")
@pytest.mark.parametrize("name", [name for name in FLA if "hybrid" not in name])
def test_logits_of_fla_itself(name: str, tmp_path: Path):
    pytest.importorskip("fla.models")
    _, c, _ = checkpoint(name, tmp_path / "theirs", torch.float32)
    peer: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    peer = peer.cuda().eval()
    ids = torch.randint(0, c["vocab_size"], (2, 100), device="cuda")
    want = peer(ids).logits
    ours: Any = load(tmp_path / "theirs")
    got = ours.float().cuda()(ids).logits
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()  # their kernels multiply in tf32


def test_tied_embeddings_have_no_head_in_the_file(tmp_path: Path):
    _, c, weights = checkpoint("gated_deltanet", tmp_path / "a")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "a" / "model.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    convert(tmp_path / "a", "gated_deltanet", tmp_path / "b")
    model: Any = load(tmp_path / "b")
    assert model.model.head.weight is model.model.embed.weight
    want = fla_logits(c, weights | {"lm_head.weight": weights["model.embeddings.weight"]}, torch.arange(9))
    torch.testing.assert_close(
        model(torch.arange(9)[None]).logits[0], want, rtol=0, atol=1e-4 * want.abs().max().item()
    )


OLMO: dict[str, dict[str, Any]] = {
    "rotary": {},
    "no-positions": {"rope_parameters": {"rope_theta": None, "rope_type": "default"}, "linear_allow_neg_eigval": False},
    "other-rotary": {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", OLMO)
def test_logits_of_olmo_hybrid_both_ways(name: str, tmp_path: Path):
    torch.manual_seed(0)
    peer = transformers.OlmoHybridForCausalLM(
        transformers.OlmoHybridConfig(
            vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
            linear_value_head_dim=10, pad_token_id=None, eos_token_id=3, **OLMO[name],
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    ids = torch.randint(0, 30, (2, 40))
    want = peer(ids).logits
    peer.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", "statetrack", tmp_path / "ours")
    ours = load(tmp_path / "ours")
    torch.testing.assert_close(ours(ids).logits, want, rtol=0, atol=1e-3)
    convert(tmp_path / "ours", "olmo_hybrid", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert type(again) is type(peer)
    for (key, p), (other, q) in zip(peer.named_parameters(), again.named_parameters(), strict=True):
        assert key == other and torch.equal(p, q), key
    torch.testing.assert_close(again(ids).logits, want, rtol=0, atol=1e-5)


def test_names_of_olmo_s_modules_are_read_too(tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.OlmoHybridConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        pad_token_id=None,
    )
    peer = transformers.OlmoHybridForCausalLM(config).eval()
    peer.save_pretrained(tmp_path)
    saved = read(tmp_path).weights
    save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, tmp_path / "model.safetensors")
    named = read(tmp_path).weights
    assert set(saved) == set(named) and all(torch.equal(saved[k], named[k]) for k in saved)


def test_one_foreign_format_to_another_and_the_tokenizer_along(tmp_path: Path):
    checkpoint("delta_net", tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "a", "gated_deltaproduct", tmp_path / "b")
    ids = torch.randint(0, 29, (1, 20))
    assert torch.equal(load(tmp_path / "a")(ids).logits, load(tmp_path / "b")(ids).logits)
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    command = Command(capsys)
    checkpoint("gated_deltaproduct", Path("a"))
    code, out, _ = command("convert a --to statetrack --out b")
    assert code == 0 and "StateTrackForCausalLM.from_pretrained('b')" in out
    assert "--force to replace it" in command.refused("convert a --to statetrack --out b")
    assert command("convert a --to statetrack --out b --force")[0] == 0
    assert "no directory with a checkpoint" in command.refused("convert nowhere --to statetrack --out c")
    Path("d").mkdir()
    Path("d", "diary.txt").write_text("dear")
    assert "d is no checkpoint" in command.refused("convert a --to statetrack --out d --force")
    assert Path("d", "diary.txt").exists()


def refused(path: Path, message: str, to: str = "statetrack") -> None:
    """Check that the conversion ends in one clear line and leaves nothing behind."""
    before = set(path.parent.iterdir())
    with pytest.raises(UsageError, match=message) as error:
        convert(path, to, path.parent / "out")
    assert "\n" not in str(error.value)
    assert set(path.parent.iterdir()) == before


def change(path: Path, **settings: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported; accepted: statetrack, delta_net"),
        ({"qk_norm": "sum"}, "delta_net with qk_norm='sum' is not supported"),
        ({"attnres_block_size": 2}, "attnres_block_size=2 is not supported"),
        ({"attn": ATTENTION | {"window_size": 64}}, "attention in a window"),
        ({"num_hidden_layers": 4}, "lacks the weight model.layers.3.attn.b_proj.weight and 13 more"),
        ({"num_hidden_layers": 2}, "has the weight model.layers.2.* for which a Model has no place"),
        ({"hidden_size": 64}, "has shape .* the configuration says"),
        ({"num_heads": 5}, "q_proj.weight has shape .24, 32., the configuration says .20, 32."),
    ],
)
def test_what_does_not_fit_is_one_clear_line(settings: dict[str, Any], message: str, tmp_path: Path):
    checkpoint("delta_net", tmp_path / "a")
    change(tmp_path / "a", **settings)
    refused(tmp_path / "a", message)


def test_broken_files_are_one_clear_line(tmp_path: Path):
    checkpoint("delta_net", tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(tmp_path / "a", "model.safetensors cannot be read")
    file.unlink()
    refused(tmp_path / "a", "has neither model.safetensors nor pytorch_model.bin")
    (tmp_path / "a" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "part-1.safetensors"}}')
    refused(tmp_path / "a", "part-1.safetensors does not exist, but .* names it")
    (tmp_path / "a" / "config.json").write_text("{")
    refused(tmp_path / "a", "config.json cannot be read")


OTHERS = {
    "delta_net": {"mixer": "deltaproduct", "factors": 2},
    "gated_deltanet": {"mixer": "deltaproduct", "gate": "key"},
    "gated_deltaproduct": {"mixer": "mamba"},
    "olmo_hybrid": {"mixer": "deltaproduct", "gate": True},
}


@pytest.mark.parametrize("to", FORMATS[1:])
def test_what_a_format_cannot_express_is_one_clear_line(to: str, tmp_path: Path):
    StateTrackForCausalLM(StateTrackConfig(hidden_size=32, mixers=OTHERS[to])).save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", f"{to} (cannot|needs|has no)", to)


def test_a_range_of_its_own_and_other_epsilons_are_refused(tmp_path: Path):
    for mixer in (DeltaProductConfig(dim=32, eigenvalues=(-0.5, 1.0)), DeltaProductConfig(dim=32, norm_eps=1e-3)):
        config = StateTrackConfig(hidden_size=32, mixers=[mixer])
        with pytest.raises(UsageError, match="cannot express"):
            write(Checkpoint(config, {}), "delta_net", tmp_path / "out")
    mixers = [DeltaProductConfig(dim=32), AttentionConfig(dim=32, rotary_base=None)]
    with pytest.raises(UsageError, match="has no such layer"):
        write(Checkpoint(StateTrackConfig(hidden_size=32, mixers=mixers), {}), "delta_net", tmp_path / "out")


@pytest.mark.parametrize("mixer", ["mamba", "rwkv6", "rwkv7", "slstm", "dense_rnn", "deltaproduct"])
def test_what_was_loaded_or_copied_is_spared_weight_decay_as_before(mixer: str, tmp_path: Path):
    model = StateTrackForCausalLM(StateTrackConfig(vocab_size=9, hidden_size=16, mixers=[{"mixer": mixer}]))
    model.save_pretrained(tmp_path)
    spared = {f"model.blocks.0.mixer.{name}" for name in getattr(model.model.blocks[0].mixer, "undecayed", ())}
    spared |= {name for name, _ in model.named_parameters() if name.endswith("conv.weight")}
    assert spared
    opened: Any = StateTrackForCausalLM.from_pretrained(tmp_path)
    for same in (model, load(tmp_path), opened, copy.deepcopy(model)):
        matrices = {name for name, p in same.named_parameters() if p.ndim >= 2}
        assert spared < matrices and matrices - set(decayed_names(same)) == spared
