"""transformers' olmo_hybrid: Gated DeltaNet with norms before it, and attention with norms after it (OLMo 2).

Its weights have two sets of names, those of its modules and those of its published files, and its short convolutions
come as one or as three; all are read, those of the published files are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from statetrack.convert.fla import conv_key, delta_names, gate_up_key
from statetrack.convert.keys import Key
from statetrack.errors import UsageError
from statetrack.hf import StateTrackConfig
from statetrack.layers import AttentionConfig, DeltaProductConfig
from statetrack.model import mlp_width

OUTPUT_NORM_EPS = 1e-5  # fixed in their code


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a StateTrackConfig; raise UsageError for what a Model cannot be."""
    c = theirs
    for name, accepted in (("hidden_act", "silu"), ("attention_bias", False)):
        if c.get(name, accepted) != accepted:
            raise UsageError(f"olmo_hybrid with {name}={c[name]!r} is not supported; accepted: {accepted!r}")
    rope = c.get("rope_parameters") or {"rope_theta": 10_000.0}
    if rope.get("rope_type", "default") != "default":
        raise UsageError(f"olmo_hybrid with rope_type={rope['rope_type']!r} is not supported; accepted: 'default'")
    dim, heads, eps = c["hidden_size"], c["num_attention_heads"], c.get("rms_norm_eps", 1e-6)
    key_heads = c.get("linear_num_key_heads") or heads
    key = c.get("linear_key_head_dim") or int(0.75 * dim / key_heads)
    delta = DeltaProductConfig(
        dim=dim,
        heads=c.get("linear_num_value_heads") or heads,
        head_dim=key,
        value_dim=c.get("linear_value_head_dim") or 2 * key,
        key_heads=key_heads,
        gate=True,
        output_gate=True,
        conv_size=c.get("linear_conv_kernel_dim", 4),
        eigenvalues=(-1.0, 1.0) if c.get("linear_allow_neg_eigval", True) else (0.0, 1.0),
        norm_eps=OUTPUT_NORM_EPS,
    )
    attention = AttentionConfig(
        dim=dim,
        heads=heads,
        head_dim=c.get("head_dim") or dim // heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        rotary_base=rope.get("rope_theta"),
        qk_norm=eps,
    )
    kinds = c["layer_types"]
    if unknown := set(kinds) - {"linear_attention", "full_attention"}:
        raise UsageError(
            f"olmo_hybrid has a layer of type {min(unknown)!r}; accepted: linear_attention, full_attention"
        )
    return {
        "vocab_size": c["vocab_size"],
        "hidden_size": dim,
        "mixers": [delta if kind == "linear_attention" else attention for kind in kinds],
        "intermediate_size": c["intermediate_size"],
        "norm_eps": eps,
        "post_norm": [i for i, kind in enumerate(kinds) if kind == "full_attention"],
    }


def write_config(ours: StateTrackConfig, kind: str) -> dict[str, Any]:
    """Return their config.json; raise UsageError for what theirs cannot be."""
    config = ours.model_config()
    deltas = {replace(m, beta_std=None, backend="auto") for m in config.mixers if isinstance(m, DeltaProductConfig)}
    attentions = {m for m in config.mixers if isinstance(m, AttentionConfig)}
    places = tuple(i for i, m in enumerate(config.mixers) if isinstance(m, AttentionConfig))
    others = [m for m in config.mixers if not isinstance(m, (DeltaProductConfig, AttentionConfig))]
    if len(deltas) != 1 or len(attentions) != 1 or others or config.post_norm != places:
        raise UsageError(
            f"{kind} needs DeltaProduct layers and attention layers with post_norm, all alike of their kind"
        )
    m, a = deltas.pop(), attentions.pop()
    key = m.head_dim or config.dim // m.heads
    fits = m.factors == 1 and m.gate is True and m.output_gate and m.conv_size and m.norm_eps == OUTPUT_NORM_EPS
    if not fits or m.learned_low or m.eigenvalues not in ((-1, 1), (0, 1)):
        raise UsageError(f"{kind} cannot express {m}")
    if a.qk_norm != config.norm_eps or (a.head_dim or config.dim // a.heads) * a.heads != config.dim:
        raise UsageError(f"{kind} cannot express {a} in blocks with norm_eps={config.norm_eps}")
    return {
        "model_type": kind,
        "architectures": ["OlmoHybridForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": mlp_width(config),
        "num_hidden_layers": len(config.mixers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads or a.heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": a.rotary_base, "rope_type": "default"},
        "attention_bias": False,
        "layer_types": ["full_attention" if i in places else "linear_attention" for i in range(len(config.mixers))],
        "linear_num_key_heads": m.key_heads or m.heads,
        "linear_num_value_heads": m.heads,
        "linear_key_head_dim": key,
        "linear_value_head_dim": m.value_dim or key,
        "linear_conv_kernel_dim": m.conv_size,
        "linear_allow_neg_eigval": m.eigenvalues[0] == -1,
    }


def keys(ours: StateTrackConfig, names: set[str] | None = None) -> Iterator[Key]:
    """Yield the names as `names`, those of the checkpoint to be read, have them, else as published."""
    config = ours.model_config()
    yield Key("model.embed.weight", ("model.embed_tokens.weight",))
    for i, m in enumerate(config.mixers):
        mine, its = f"model.blocks.{i}", f"model.layers.{i}"
        plain = {"down.weight": "mlp.down_proj.weight"}
        if isinstance(m, DeltaProductConfig):
            part = "linear_attn"
            plain |= {
                "mixer_norm.weight": "attention_layer_norm.weight",
                "mlp_norm.weight": "feedforward_layer_norm.weight",
            }
            plain |= delta_names(m, part)
        else:
            part = "self_attn"
            plain |= {"mixer_norm.weight": "post_attention_layernorm.weight"}
            plain |= {"mlp_norm.weight": "post_feedforward_layernorm.weight"}
            plain |= {f"mixer.{p}_norm.weight": f"{part}.{p}_norm.weight" for p in "qk"}
        plain |= {f"mixer.{p}_proj.weight": f"{part}.{p}_proj.weight" for p in "qkvo"}
        for a, b in plain.items():
            yield Key(f"{mine}.{a}", (_found(f"{its}.{b}", names),))
        if isinstance(m, DeltaProductConfig):
            together = f"{its}.{part}.conv1d.weight"
            yield (
                Key(f"{mine}.mixer.conv.weight", (together,), taps=True)
                if together in (names or ())
                else conv_key(mine, f"{its}.{part}", m)
            )
        yield gate_up_key(mine, its, mlp_width(config))
    yield Key("model.norm.weight", ("model.norm.weight",))
    if not ours.tie_word_embeddings:
        yield Key("model.head.weight", ("lm_head.weight",))


ALIASES = {
    "attention_layer_norm.weight": "input_layernorm.weight",
    "feedforward_layer_norm.weight": "post_attention_layernorm.weight",
    "post_attention_layernorm.weight": "feedforward_layer_norm.weight",
}


def _found(name: str, names: set[str] | None) -> str:
    """Return the name, or the other one for the same weight where the checkpoint has that."""
    layer, last, weight = name.rpartition(".")[0].rpartition(".")[0], *name.split(".")[-2:]
    other = ALIASES.get(f"{last}.{weight}")
    if names is None or name in names or other is None:
        return name
    return f"{layer}.{other}"
