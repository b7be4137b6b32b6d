"""The only model: token embedding, blocks of one mixer and one SwiGLU each, a linear head. The mixers are a field.

    x <- x + mixer(rmsnorm(x));   x <- x + W_down(silu(W_gate y) * W_up y), y = rmsnorm(x);   logits = W_head rmsnorm(x)

(the block of Grazzi et al., arXiv 2411.12537, appendix E). Letters: B batch, T tokens, D width, O outputs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from statetrack.errors import UsageError
from statetrack.layers import MIXERS, MixerConfig
from statetrack.layers.common import check_positive
from statetrack.layers.packing import Packing

State = tuple[Any, ...]  # one entry per block, whatever its mixer carries


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a `Model`; `mixers` names every layer, so hybrids are data."""

    vocab_size: int
    """input tokens"""
    num_outputs: int
    """classes of the head"""
    mixers: tuple[MixerConfig, ...]
    """one config per block, all of the same dim"""
    mlp_dim: int | None = None
    """hidden width of the SwiGLU; default 8/3 of dim rounded up to 256; 0 for blocks without it"""
    norm_eps: float = 1e-6
    post_norm: tuple[int, ...] = ()
    """numbers of the blocks that normalise what their mixer and SwiGLU return, not what they get (OLMo 2)"""

    @property
    def dim(self) -> int:
        """Width of the hidden stream."""
        return self.mixers[0].dim

    def build(self) -> Model:
        """Return the model, initialised from torch's global random state."""
        return Model(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` is the inverse."""
        names = {cls: name for name, cls in MIXERS.items()}
        mixers = [{"mixer": names[type(m)], **asdict(m)} for m in self.mixers]
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "mixers": mixers}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """Build the config from `to_dict`'s result; unknown names are errors."""
        try:
            mixers = tuple(_mixer_from_dict(m) for m in data["mixers"])
            return cls(**{**data, "mixers": mixers, "post_norm": tuple(data.get("post_norm", ()))})
        except (KeyError, TypeError) as error:
            raise UsageError(f"not a model configuration: {error}") from error


def mlp_width(config: Config) -> int:
    """Return the hidden width of every SwiGLU, 0 for none."""
    return 256 * -(-8 * config.dim // 768) if config.mlp_dim is None else config.mlp_dim


def _mixer_from_dict(data: dict[str, Any]) -> MixerConfig:
    data = dict(data)
    name = data.pop("mixer")
    if name not in MIXERS:
        raise UsageError(f"unknown mixer {name!r}; accepted: {', '.join(MIXERS)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return MIXERS[name](**values)


class Block(nn.Module):
    """One mixer and, unless mlp_dim is 0, one SwiGLU, each behind an RMSNorm and beside a residual."""

    def __init__(self, mixer: MixerConfig, mlp_dim: int, norm_eps: float, post_norm: bool = False):
        super().__init__()
        self.post_norm = post_norm
        self.mixer_norm = nn.RMSNorm(mixer.dim, eps=norm_eps)
        self.mixer = mixer.build()
        self.mlp_dim = mlp_dim
        if mlp_dim:
            self.mlp_norm = nn.RMSNorm(mixer.dim, eps=norm_eps)
            self.gate_up = nn.Linear(mixer.dim, 2 * mlp_dim, bias=False)
            self.down = nn.Linear(mlp_dim, mixer.dim, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], state: Any = None, packing: Packing | None = None
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """Return the hidden stream after the block, and the mixer's new state."""
        y, state = self.mixer(x if self.post_norm else self.mixer_norm(x), state, packing)
        x = x + (self.mixer_norm(y) if self.post_norm else y)
        if self.mlp_dim:
            gate, up = self.gate_up(x if self.post_norm else self.mlp_norm(x)).chunk(2, dim=-1)
            y = self.down(F.silu(gate) * up)
            x = x + (self.mlp_norm(y) if self.post_norm else y)
        return x, state


class Model(nn.Module):
    """A stack of blocks that reads tokens and answers at every one of them."""

    def __init__(self, config: Config):
        super().__init__()
        if not config.mixers or len({m.dim for m in config.mixers}) > 1:
            raise UsageError(f"mixers must be at least one, of one dim; got dims {[m.dim for m in config.mixers]}")
        check_positive(vocab_size=config.vocab_size, num_outputs=config.num_outputs)
        mlp_dim = mlp_width(config)
        if mlp_dim < 0:
            raise UsageError(f"mlp_dim must be 0 (none) or a width, got {mlp_dim}")
        if not set(config.post_norm) <= set(range(len(config.mixers))):
            raise UsageError(f"post_norm must number some of {len(config.mixers)} blocks, got {config.post_norm}")
        self.config = config
        self.gradient_checkpointing = False  # True: training keeps each block's input only, and runs the block again
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            Block(m, mlp_dim, config.norm_eps, i in config.post_norm) for i, m in enumerate(config.mixers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.num_outputs, bias=False)

    def init_state(self, batch: int) -> State:
        """Return every mixer's state before the first token."""
        return tuple(block.mixer.init_state(batch) for block in self.blocks)  # pyright: ignore

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: State | None = None,
        cu_seqlens: Int[Tensor, "offsets"] | None = None,
    ) -> tuple[Float[Tensor, "B T O"], State]:
        """Return the logits at every token, and the state after the last: feed it back to go on, one token or many.

        With cu_seqlens, offsets [0, ..., T] of sequences packed along T (B = 1), none sees another, and the state has
        one entry per sequence. Raises UsageError for offsets that do not fit.
        """
        x, state = self.hidden(tokens, state, cu_seqlens)
        return self.head(x), state

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        state: State | None = None,
        cu_seqlens: Int[Tensor, "offsets"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Return what the head reads, and the state; the arguments are those of `forward`."""
        packing = None if cu_seqlens is None else Packing.of(cu_seqlens, tokens)
        x, states = self.embed(tokens), []
        for block, block_state in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            if self.gradient_checkpointing and self.training:
                x, block_state = checkpoint(block, x, block_state, packing, use_reentrant=False)
            else:
                x, block_state = block(x, block_state, packing)
            states.append(block_state)
        return self.norm(x), tuple(states)
