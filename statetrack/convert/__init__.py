"""Checkpoints from elsewhere and back: fla's DeltaNet, Gated DeltaNet, Gated DeltaProduct, transformers' olmo_hybrid.

    convert(SOURCE, "statetrack", OUT);   convert(OUT, "gated_deltanet", BACK);   model = load(SOURCE)

A source is a directory as transformers writes it (config.json, safetensors or .bin), a name on the hub, a run directory
of `statetrack train` or `statetrack lm train` (its last model), or what `statetrack compile` wrote. Per format one
table of names serves both directions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from statetrack import artifact
from statetrack.compiler import CompiledAutomaton
from statetrack.convert import fla, olmo_hybrid
from statetrack.convert.keys import read_all, write_all
from statetrack.errors import UsageError
from statetrack.hf import StateTrackConfig, StateTrackForCausalLM, write_loader
from statetrack.model import Model
from statetrack.runs import first_line, read_json, why_not_written

FOREIGN: dict[str, ModuleType] = {
    "delta_net": fla,
    "gated_deltanet": fla,
    "gated_deltaproduct": fla,
    "olmo_hybrid": olmo_hybrid,
}
FORMATS = ("statetrack", *FOREIGN)
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "initializer_range", "dtype")
"""Settings that mean the same in every format."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
TOKENIZER += ("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A model in our names, wherever it came from."""

    config: StateTrackConfig
    weights: dict[str, Tensor]
    source: Path | None = None
    """where its tokenizer lies, if anywhere"""

    @classmethod
    def of(cls, model: Model, **settings: Any) -> Checkpoint:
        """Return a model that is there."""
        weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
        return cls(StateTrackConfig.from_model_config(model.config, **settings), weights)

    @classmethod
    def of_compiled(cls, compiled: CompiledAutomaton, normalising: bool) -> Checkpoint:
        """Return a compiled automaton as a model; normalising: for fla's kernels, in bfloat16."""
        model = compiled.to_model(normalising)
        return cls.of(model.bfloat16() if normalising else model, bos_token_id=compiled.automaton.alphabet)


def exported(checkpoint: Checkpoint, to: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings (config.json) and weights of a checkpoint in a format."""
    config, weights = checkpoint.config, checkpoint.weights
    if to == "statetrack":
        config.architectures = ["StateTrackForCausalLM"]
        return config.to_dict(), weights
    settings = FOREIGN[to].write_config(config, to)
    settings |= {name: getattr(config, name, None) for name in CARRIED}
    settings["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    return settings, write_all(FOREIGN[to].keys(config), weights)


def convert(source: str | Path, to: str, out: Path, force: bool = False) -> None:
    """Write the checkpoint `source` in another format to the directory `out`.

    force: replace a checkpoint that is there. Raises UsageError for a format or an architecture that is not supported,
    for one that the other format cannot express, for missing files and for weights of another shape.
    """
    if to not in FORMATS:
        raise UsageError(f"format {to!r} is unknown; accepted: {', '.join(FORMATS)}")
    check_free(out, force)
    write(read(source, normalising=to == "gated_deltaproduct"), to, out, force)


def load(source: str | Path) -> StateTrackForCausalLM:
    """Return the model of a checkpoint in any format, in evaluation mode, in the data types of the file."""
    found = read(source)
    with torch.device("meta"):
        model = StateTrackForCausalLM(found.config)
    model.load_state_dict(found.weights, assign=True, strict=False)  # `read` has checked names and shapes
    model.tie_weights()
    return model.eval()


def read(source: str | Path, normalising: bool = False) -> Checkpoint:
    """Return a checkpoint of any format; normalising: what was compiled, for kernels that normalise keys, as fla's."""
    path = directory(source)
    if (path / artifact.NETWORK).exists():
        return Checkpoint.of_compiled(artifact.read(path), normalising)
    if not (path / "config.json").exists():
        raise UsageError(f"{path} is no checkpoint and no run: it has no config.json")
    theirs = read_json(path / "config.json")
    if isinstance(theirs, dict) and "settings" in theirs:
        from statetrack.train import load_run

        return Checkpoint.of(load_run(path, "cpu")[1])
    kind = theirs.get("model_type") if isinstance(theirs, dict) else None
    if kind not in FORMATS:
        raise UsageError(f"{path}: model_type {kind!r} is not supported; accepted: {', '.join(FORMATS)}")
    if "dtype" not in theirs and "torch_dtype" in theirs:
        theirs["dtype"] = theirs["torch_dtype"]
    weights = _weights(path)
    if kind == "statetrack":
        config = StateTrackConfig.from_dict(theirs)
    else:
        carried = {name: theirs[name] for name in CARRIED if name in theirs}
        try:
            config = StateTrackConfig(**FOREIGN[kind].read_config(theirs), **carried)
        except KeyError as error:
            raise UsageError(f"{path / 'config.json'} lacks {error}, which {kind} needs") from None
        if config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        weights = read_all(FOREIGN[kind].keys(config, set(weights)), weights, str(path))
    _check_shapes(config, weights, path)
    return Checkpoint(config, weights, path)


def write(checkpoint: Checkpoint, to: str, out: Path, force: bool = False) -> None:
    """Write a checkpoint: everything, or nothing where that fails."""
    from huggingface_hub import save_torch_state_dict

    settings, weights = exported(checkpoint, to)
    check_free(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if to == "statetrack":
            write_loader(temporary)
        save_torch_state_dict(weights, temporary, metadata={"format": "pt"})
        for name in TOKENIZER:
            if checkpoint.source is not None and (checkpoint.source / name).exists():
                shutil.copy(checkpoint.source / name, temporary / name)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except Exception as error:  # OSError, safetensors' own
        raise UsageError(f"{out} cannot be written: {why_not_written(error, out.parent)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: Path, force: bool) -> None:
    """Refuse to write over something: with force only over a checkpoint."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UsageError(f"{out} is there already; another --out, or --force to replace it")
    if not (out / "config.json").exists():
        raise UsageError(f"{out} is no checkpoint, so --force does not replace it")


def directory(source: str | Path) -> Path:
    """Return the directory of a source; one on the hub is downloaded."""
    path = Path(source)
    if path.is_dir():
        language_model = (path / "recipe.json").exists() and (path / "model").is_dir()
        return path / "model" if language_model else path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UsageError(f"{source} is no directory with a checkpoint, and no name on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(f"{source} is no directory here and cannot be had from the hub: {first_line(error)}") from None


def _weights(path: Path) -> dict[str, Tensor]:
    """Return all weights of a directory: one file or several, safetensors or torch's."""
    from safetensors.torch import load_file

    for stem, loader in (("model.safetensors", load_file), ("pytorch_model.bin", _load_bin)):
        files = [path / stem]
        if (index := path / f"{stem}.index.json").exists():
            files = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        elif not files[0].exists():
            continue
        weights: dict[str, Tensor] = {}
        for file in files:
            if not file.exists():
                raise UsageError(f"{file} does not exist, but {index.name} names it; is the download complete?")
            try:
                weights |= loader(file)
            except Exception as error:  # safetensors and torch raise errors of many types for a broken file
                raise UsageError(f"{file} cannot be read: {first_line(error)}") from None
        return weights
    raise UsageError(f"{path} has neither model.safetensors nor pytorch_model.bin")


def _load_bin(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _check_shapes(config: StateTrackConfig, weights: dict[str, Tensor], path: Path) -> None:
    """Raise UsageError unless the weights are those of the configured model."""
    with torch.device("meta"):
        wanted: dict[str, Any] = {f"model.{k}": v.shape for k, v in config.model_config().build().state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("model.head.weight")
    if difference := sorted(set(wanted) ^ set(weights)):
        what = "lacks the weight" if difference[0] in wanted else "has the unknown weight"
        raise UsageError(f"{path} {what} {difference[0]}")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise UsageError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, the configuration says {tuple(shape)}"
            )
