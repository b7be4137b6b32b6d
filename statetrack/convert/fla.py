"""flash-linear-attention's DeltaNet, Gated DeltaNet and Gated DeltaProduct, attention layers included.

Their blocks are ours: RMSNorm, mixer, RMSNorm, SwiGLU. Their kernels divide keys and queries by sqrt(|k|^2 + 1e-6),
ours by |k|: the same but for keys shorter than about 0.01.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from statetrack.convert.keys import Key
from statetrack.errors import UsageError
from statetrack.hf import StateTrackConfig
from statetrack.layers import AttentionConfig, DeltaProductConfig
from statetrack.model import mlp_width

DEFAULTS: dict[str, dict[str, Any]] = {
    "delta_net": {"hidden_size": 2048, "num_heads": 16, "expand_k": 1.0, "expand_v": 1.0, "use_gate": False},
    "gated_deltanet": {"hidden_size": 2048, "num_heads": 6, "head_dim": 256, "expand_v": 2.0, "use_gate": True},
    "gated_deltaproduct": {
        **{"hidden_size": 2048, "num_heads": 6, "head_dim": 256, "expand_v": 2.0},
        **{"use_output_gate": True, "use_forget_gate": False, "num_householder": 1},
    },
}
COMMON: dict[str, Any] = {
    **{"use_short_conv": True, "conv_size": 4, "allow_neg_eigval": False, "norm_eps": 1e-6, "attn": None},
    **{"hidden_ratio": 4, "intermediate_size": None, "vocab_size": 32_000, "num_hidden_layers": 24},
}
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "qk_activation": ("silu",),
    "qk_norm": ("l2",),
    "use_beta": (True,),
    "attnres_block_size": (None,),
}
"""Settings that a Model has no other choice of."""


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a StateTrackConfig; raise UsageError for what a Model cannot be."""
    kind = theirs["model_type"]
    for name, accepted in ONLY.items():
        if theirs.get(name, accepted[0]) not in accepted:
            raise UsageError(f"{kind} with {name}={theirs[name]!r} is not supported; accepted: {accepted[0]!r}")
    c = {**COMMON, **DEFAULTS[kind], **theirs}
    mixer, layers = _mixer(kind, c), c["num_hidden_layers"]
    mixers: list[Any] = [mixer] * layers
    specs = [c["attn"]] if isinstance(c["attn"], dict) else c["attn"] or []
    for spec in specs:
        attention = _attention(kind, c, spec)
        for i in spec["layers"]:
            mixers[i] = attention
    width = c["intermediate_size"]
    if width is None:
        width = 256 * -(-int(c["hidden_size"] * (c["hidden_ratio"] or 4) * 2 / 3) // 256)
    return {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "mixers": mixers,
        "intermediate_size": width,
        "norm_eps": c["norm_eps"],
    }


def _mixer(kind: str, c: dict[str, Any]) -> DeltaProductConfig:
    dim, heads = c["hidden_size"], c["num_heads"]
    if kind == "delta_net":
        key, value, value_heads = int(dim * c["expand_k"]) // heads, int(dim * c["expand_v"]) // heads, heads
    else:
        key, value_heads = c["head_dim"], c.get("num_v_heads") or heads
        value = int(key * c["expand_v"])
    return DeltaProductConfig(
        dim=dim,
        heads=value_heads,
        head_dim=key,
        value_dim=value,
        key_heads=heads,
        factors=c.get("num_householder", 1),
        gate=kind == "gated_deltanet" or bool(c.get("use_forget_gate")),
        conv_size=c["conv_size"] if c["use_short_conv"] else 0,
        output_gate=c["use_output_gate" if kind == "gated_deltaproduct" else "use_gate"],
        eigenvalues=(-1.0, 1.0) if c["allow_neg_eigval"] else (0.0, 1.0),
        norm_eps=c["norm_eps"],
    )


def _attention(kind: str, c: dict[str, Any], spec: dict[str, Any]) -> AttentionConfig:
    if spec.get("qkv_bias") or spec.get("window_size"):
        raise UsageError(f"{kind} with attention in a window or with biases is not supported, got {spec}")
    return AttentionConfig(
        dim=c["hidden_size"],
        heads=spec["num_heads"],
        kv_heads=spec.get("num_kv_heads") or spec["num_heads"],
        rotary_base=spec.get("rope_theta", 10_000.0),
    )


def write_config(ours: StateTrackConfig, kind: str) -> dict[str, Any]:
    """Return their config.json; raise UsageError for what theirs cannot be."""
    config = ours.model_config()
    deltas = {replace(m, beta_std=None, backend="auto") for m in config.mixers if isinstance(m, DeltaProductConfig)}
    if len(deltas) != 1 or config.post_norm:
        raise UsageError(f"{kind} needs DeltaProduct layers, all alike, with norms before them; got {config.mixers}")
    m = deltas.pop()
    key, value, key_heads = _widths(m)
    attention = [
        _attention_spec(kind, config.dim, i, mixer)
        for i, mixer in enumerate(config.mixers)
        if type(mixer) is not type(m)
    ]
    fits = {
        "delta_net": m.factors == 1 and not m.gate and key_heads == m.heads,
        "gated_deltanet": m.factors == 1 and m.gate is True,
        "gated_deltaproduct": m.gate != "key" and key_heads == m.heads,
    }
    if not fits[kind] or m.learned_low or m.eigenvalues not in ((-1, 1), (0, 1)) or m.norm_eps != config.norm_eps:
        raise UsageError(f"{kind} cannot express {m} in blocks with norm_eps={config.norm_eps}")
    theirs = {
        "model_type": kind,
        "architectures": [
            {"delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet"}.get(kind, "GatedDeltaProduct") + "ForCausalLM"
        ],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": len(config.mixers),
        "num_heads": key_heads,
        "intermediate_size": mlp_width(config),
        "norm_eps": config.norm_eps,
        "use_short_conv": m.conv_size > 0,
        "conv_size": m.conv_size or 4,
        "allow_neg_eigval": m.eigenvalues[0] == -1,
        "attn": attention or None,
        "hidden_act": "swish",
    }
    if kind == "delta_net":
        expand = {"expand_k": key * key_heads / config.dim, "expand_v": value * m.heads / config.dim}
        return {
            **theirs,
            **expand,
            "use_gate": m.output_gate,
            "qk_norm": "l2",
            "qk_activation": "silu",
            "use_beta": True,
        }
    theirs |= {"head_dim": key, "expand_v": value / key}
    if kind == "gated_deltanet":
        return {**theirs, "num_v_heads": m.heads, "use_gate": m.output_gate}
    gates = {"use_output_gate": m.output_gate, "use_forget_gate": m.gate is True}
    return {**theirs, **gates, "num_householder": m.factors}


def _widths(m: DeltaProductConfig) -> tuple[int, int, int]:
    """Return the widths of keys and values, and the heads of keys."""
    key = m.dim // m.heads if m.head_dim is None else m.head_dim
    return key, m.value_dim or key, m.key_heads or m.heads


def _attention_spec(kind: str, dim: int, layer: int, m: Any) -> dict[str, Any]:
    plain = isinstance(m, AttentionConfig) and m.qk_norm is None and m.rotary_base is not None
    if not plain or (m.head_dim or dim // m.heads) * m.heads != dim:
        raise UsageError(f"{kind} has no such layer: {m}")
    kv_heads = m.kv_heads or m.heads
    return {"layers": [layer], "num_heads": m.heads, "num_kv_heads": kv_heads, "rope_theta": m.rotary_base}


def keys(ours: StateTrackConfig, names: set[str] | None = None) -> Iterator[Key]:
    """Yield the names; `names`, those of a checkpoint to be read, do not matter here."""
    del names
    config = ours.model_config()
    yield Key("model.embed.weight", ("model.embeddings.weight",))
    for i, m in enumerate(config.mixers):
        mine, its = f"model.blocks.{i}", f"model.layers.{i}"
        plain = {"mixer_norm.weight": "attn_norm.weight", "mlp_norm.weight": "mlp_norm.weight"}
        plain |= {"down.weight": "mlp.down_proj.weight"}
        plain |= {f"mixer.{p}_proj.weight": f"attn.{p}_proj.weight" for p in "qkvo"}
        if isinstance(m, DeltaProductConfig):
            plain |= delta_names(m, "attn")
        for a, b in plain.items():
            yield Key(f"{mine}.{a}", (f"{its}.{b}",))
        if isinstance(m, DeltaProductConfig) and m.conv_size:
            yield conv_key(mine, f"{its}.attn", m)
        yield gate_up_key(mine, its, mlp_width(config))
    yield Key("model.norm.weight", ("model.norm.weight",))
    if not ours.tie_word_embeddings:
        yield Key("model.head.weight", ("lm_head.weight",))


def delta_names(m: DeltaProductConfig, its: str) -> dict[str, str]:
    """Return our name and theirs for what the projections of q, k, v and o leave out."""
    names = {"mixer.beta_proj.weight": f"{its}.b_proj.weight", "mixer.norm.weight": f"{its}.o_norm.weight"}
    if m.gate:
        names |= {"mixer.gate.proj.weight": f"{its}.a_proj.weight", "mixer.gate.rate": f"{its}.A_log"}
        names |= {"mixer.gate.bias": f"{its}.dt_bias"}
    if m.output_gate:
        names |= {"mixer.output_gate.weight": f"{its}.g_proj.weight"}
    return names


def conv_key(mine: str, its: str, m: DeltaProductConfig) -> Key:
    """Return the entry of the short convolution: one for q, k and v together here, three there."""
    key, value, key_heads = _widths(m)
    rows = key_heads * key, m.factors * key_heads * key, m.factors * m.heads * value
    return Key(f"{mine}.mixer.conv.weight", tuple(f"{its}.{p}_conv1d.weight" for p in "qkv"), rows, taps=True)


def gate_up_key(mine: str, its: str, width: int) -> Key:
    """Return the entry of the SwiGLU's two input maps."""
    return Key(f"{mine}.gate_up.weight", (f"{its}.mlp.gate_proj.weight", f"{its}.mlp.up_proj.weight"), (width, width))
