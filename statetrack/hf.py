"""transformers: `Model` as a causal language model that generates, saves, loads and trains there.

    config = StateTrackConfig(vocab_size=32000, hidden_size=1024, num_hidden_layers=24)
    model = StateTrackForCausalLM(config);   model.generate(...);   model.save_pretrained(DIR)

Importing this module registers both with AutoConfig and AutoModelForCausalLM; a saved model brings a file that imports
it (`LOADER`), for those who load it with trust_remote_code=True. transformers 5.17 and later.

Letters: B batch, T tokens, P tokens seen before, D width, V vocabulary, O outputs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from statetrack.decoding import SingleTokens, generation
from statetrack.errors import UsageError
from statetrack.layers import MIXERS, MixerConfig
from statetrack.loss import IGNORED, linear_cross_entropy
from statetrack.model import Block, Config, Model, State

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""what this transformers calls the cache in a model's output"""

LOADER = "statetrack_loader.py"
"""the file beside a saved model that transformers imports where trust_remote_code=True, and statetrack.hf was not"""
LOADER_TEXT = '''"""Lets transformers load this model with trust_remote_code=True; pip install statetrack."""

from statetrack.hf import StateTrackConfig, StateTrackForCausalLM
'''

Mixer = MixerConfig | dict[str, Any] | str


class StateTrackConfig(PreTrainedConfig):
    """Settings of a `StateTrackForCausalLM`.

    vocab_size: tokens. hidden_size: width of the hidden stream. num_hidden_layers: blocks; default one per mixer.
    mixers: a mixer for every block, or one for all: a config of `statetrack.layers`, its name, or a dictionary with
    "mixer" (the name) and options; dim may be left out. intermediate_size: width of the SwiGLU, 0 for none, default
    8/3 of hidden_size rounded up to 256. norm_eps: of the blocks' norms. post_norm: numbers of the blocks that
    normalise what their mixer and SwiGLU return, not what they get. num_outputs: classes of the head, default
    vocab_size. initializer_range: standard deviation of embeddings, head and SwiGLU at the start; mixers start as their
    papers say. Further ones are those of any transformers config, such as tie_word_embeddings (False).
    """

    model_type = "statetrack"
    keys_to_ignore_at_inference = [CACHE]

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 1024,
        num_hidden_layers: int | None = None,
        mixers: Mixer | Sequence[Mixer] = "deltaproduct",
        intermediate_size: int | None = None,
        norm_eps: float = 1e-6,
        post_norm: Sequence[int] = (),
        num_outputs: int | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        if isinstance(mixers, Sequence) and not isinstance(mixers, str):
            every = [_mixer_dict(mixer, hidden_size) for mixer in mixers]
        else:
            every = [_mixer_dict(mixers, hidden_size)] * (1 if num_hidden_layers is None else num_hidden_layers)
        if num_hidden_layers is not None and len(every) != num_hidden_layers:
            raise UsageError(f"mixers names {len(every)} layers, num_hidden_layers is {num_hidden_layers}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = len(every)
        self.mixers = every
        self.intermediate_size = intermediate_size
        self.norm_eps = norm_eps
        self.post_norm = list(post_norm)
        self.num_outputs = vocab_size if num_outputs is None else num_outputs
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
        module = LOADER.removesuffix(".py")
        names = {"AutoConfig": "StateTrackConfig", "AutoModelForCausalLM": "StateTrackForCausalLM"}
        self.auto_map = {auto: f"{module}.{name}" for auto, name in names.items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and the file by which transformers finds this module."""
        write_loader(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: transformers would copy this whole file beside the weights."""
        del auto_class

    def model_config(self) -> Config:
        """Return the config of the `Model` inside; raise UsageError for settings that do not fit together."""
        if self.tie_word_embeddings and self.num_outputs != self.vocab_size:
            raise UsageError(f"tied embeddings need as many outputs as tokens: {self.num_outputs}, {self.vocab_size}")
        return Config.from_dict(
            {
                "vocab_size": self.vocab_size,
                "num_outputs": self.num_outputs,
                "mixers": self.mixers,
                "mlp_dim": self.intermediate_size,
                "norm_eps": self.norm_eps,
                "post_norm": self.post_norm,
            }
        )

    @classmethod
    def from_model_config(cls, config: Config, **kwargs: Any) -> StateTrackConfig:
        """Return the settings of a model that is there."""
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            mixers=config.mixers,
            intermediate_size=config.mlp_dim,
            norm_eps=config.norm_eps,
            post_norm=config.post_norm,
            num_outputs=config.num_outputs,
            **kwargs,
        )


def write_loader(path: Path) -> None:
    """Write the file by which transformers finds this module into the directory of a model, made if absent."""
    path.mkdir(parents=True, exist_ok=True)
    (path / LOADER).write_text(LOADER_TEXT)


def _mixer_dict(mixer: Mixer, dim: int) -> dict[str, Any]:
    """Return a mixer's settings as plain data for JSON, every option written out."""
    if isinstance(mixer, (str, dict)):
        options = {"mixer": mixer} if isinstance(mixer, str) else dict(mixer)
        name = options.pop("mixer", None)
        if name not in MIXERS:
            raise UsageError(f"unknown mixer {name!r}; accepted: {', '.join(MIXERS)}")
        known = {field.name for field in fields(MIXERS[name])}
        if unknown := set(options) - known:
            raise UsageError(f"{name} has no option {min(unknown)!r}; accepted: {', '.join(sorted(known))}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        mixer = MIXERS[name](**{"dim": dim, **values})
    if mixer.dim != dim:
        raise UsageError(f"a mixer has dim {mixer.dim}, hidden_size is {dim}")
    names = {cls: name for name, cls in MIXERS.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(mixer).items()}
    return {"mixer": names[type(mixer)], **plain}


class StateTrackCache(Cache):
    """What a model carries between calls: every mixer's state, of constant size (attention's grows)."""

    is_compileable = False  # pyright: ignore[reportAssignmentType]
    is_croppable = False  # pyright: ignore[reportAssignmentType]  # a recurrence cannot take tokens back

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: State | None = None
        self.seen = 0
        self.single_tokens = SingleTokens()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen, padding included."""
        del layer_idx
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no longest sequence."""
        del layer_idx
        return -1

    def reorder_cache(self, beam_idx: Int[Tensor, "B"]) -> None:
        """Let entry i go on from entry beam_idx[i]."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these entries of the batch."""
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every entry of the batch."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back."""
        if tokens_to_remove:
            raise UsageError("a recurrent state cannot be taken back to an earlier token; keep a copy of the cache")

    def _map(self, change: Any) -> None:
        self.state = tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, self.state)


class StateTrackPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of these models."""

    config_class = StateTrackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Block"]
    _is_stateful = True

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: transformers would copy this whole file beside the weights."""
        del auto_class

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Do not let transformers skip modules without parameters of their own, as it does for code outside of it."""
        del is_custom_code
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights that no checkpoint gave, as the constructors do, also for modules made on "meta"."""
        std = self.config.initializer_range
        if isinstance(module, Block):
            init.ones_(module.mixer_norm.weight)
            fresh = module.mixer.config.build()  # the mixer's own initialisation, on the CPU
            for parameter, value in zip(module.mixer.parameters(), fresh.parameters(), strict=True):
                init.copy_(parameter, value)
            if module.mlp_dim:
                init.ones_(module.mlp_norm.weight)
                init.normal_(module.gate_up.weight, std=std)
                init.normal_(module.down.weight, std=std)
        elif isinstance(module, Model):
            init.normal_(module.embed.weight, std=std)
            init.ones_(module.norm.weight)
            init.normal_(module.head.weight, std=std)


class StateTrackForCausalLM(StateTrackPreTrainedModel, GenerationMixin):
    """A language model of any mixers, with the state as its cache."""

    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}

    def __init__(self, config: StateTrackConfig):
        super().__init__(config)
        self.model = config.model_config().build()
        self.post_init()

    @classmethod
    def from_model(cls, model: Model, **kwargs: Any) -> StateTrackForCausalLM:
        """Wrap a model that is there, sharing its weights; kwargs go to the config."""
        with torch.device("meta"):
            wrapped = cls(StateTrackConfig.from_model_config(model.config, **kwargs))
        wrapped.model = model
        wrapped.tie_weights()
        return wrapped

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embed = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; on a GPU the single tokens are one CUDA graph each (decoding.py)."""
        with generation():
            return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a StateTrackCache

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        past_key_values: StateTrackCache | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Int[Tensor, "offsets"] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: StateTrackCache | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the loss where there are labels, the logits, and the cache where it is used.

        attention_mask: 0 for padding, on either side, [B T] or [B P+T]; padding touches no state. A call with one
        token per sequence and a cache goes on with every sequence, whatever the mask. cu_seqlens: offsets [0, ..., T]
        of documents packed along T (B = 1); none sees another, and no document predicts the next one's first token.
        labels: as input_ids, -100 for no target; the shift by one token is done here. num_items_in_batch: what the sum
        of the losses is divided by, default the number of targets. logits_to_keep: only the last ones, or those at
        these positions, 0 for all. In training with labels no logits are returned. cache: another name of
        past_key_values. Raises UsageError for cu_seqlens beside a mask or a cache.
        """
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, StateTrackCache):
            raise UsageError(f"the cache must be a StateTrackCache, got {type(cache).__name__}")
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        hidden, state = self._hidden(input_ids, attention_mask, cache, cu_seqlens)
        loss = logits = None
        if labels is not None:
            targets = _next_tokens(labels, cu_seqlens)
            weight = self.model.head.weight
            loss = linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), num_items_in_batch)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.head(hidden[:, kept])
        if use_cache and cu_seqlens is None:
            cache = StateTrackCache() if cache is None else cache
            cache.state, cache.seen = state, cache.seen + input_ids.shape[1]
        parts: dict[str, Any] = {"loss": loss, "logits": logits, CACHE: cache if use_cache else None}
        output = CausalLMOutputWithPast(**parts)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _hidden(
        self, tokens: Tensor, mask: Tensor | None, cache: StateTrackCache | None, cu_seqlens: Tensor | None
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run the model over the tokens that are no padding; padding gets zeros."""
        state = None if cache is None else cache.state
        if cache is not None and state is not None and tokens.shape[1] == 1 and cu_seqlens is None:
            return cache.single_tokens(self.model.hidden, tokens, state)
        if cu_seqlens is not None:
            if mask is not None or cache is not None:
                raise UsageError("cu_seqlens does not go with attention_mask or a cache: packed documents are whole")
            return self.model.hidden(tokens, None, cu_seqlens)
        if mask is None:
            return self.model.hidden(tokens, state)
        real = mask[:, mask.shape[1] - tokens.shape[1] :].bool()
        if real.shape != tokens.shape:
            raise UsageError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(tokens.shape)}")
        if real.all():
            return self.model.hidden(tokens, state)
        places = real.flatten().nonzero().squeeze(1)
        lengths = torch.cat([real.new_zeros(1, dtype=torch.int32), real.sum(1, dtype=torch.int32)])
        packed, state = self.model.hidden(tokens.flatten()[places][None], state, lengths.cumsum(0, dtype=torch.int32))
        hidden = packed.new_zeros(tokens.numel(), packed.shape[2]).index_copy(0, places, packed[0])
        return hidden.unflatten(0, tokens.shape), state


def _next_tokens(labels: Int[Tensor, "B T"], cu_seqlens: Tensor | None) -> Int[Tensor, "B T"]:
    """Return every token's target: the label of the next one, none at the end of a sequence or packed document."""
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(labels.device, torch.long) - 1
        targets = targets.index_fill(1, ends.clamp(min=0), IGNORED)
    return targets


AutoConfig.register("statetrack", StateTrackConfig)
AutoModelForCausalLM.register(StateTrackConfig, StateTrackForCausalLM)
