"""Train a language model: a recipe to transformers' Trainer, in a run directory that can always be resumed.

DIR/recipe.json        the resolved recipe, version, commit, digest of the tokenizer
DIR/checkpoint-STEP/   transformers' checkpoints, the last two, whole or absent
DIR/model/             the model and its tokenizer at the end
DIR/metrics.jsonl      what was logged; TensorBoard's files are in DIR/runs/
DIR/training.png .svg  loss by step
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import statetrack
from statetrack.errors import UsageError
from statetrack.lm.corpus import Corpus, held, prepare_shown
from statetrack.lm.packing import Order, Rows, join, pack
from statetrack.lm.pictures import loss_by_step
from statetrack.lm.settings import FREE, Recipe, cost
from statetrack.progress import Bars
from statetrack.runs import LOCK, commit, difference, read_json, why_not_written, write_json
from statetrack.train import Interrupted, Signals, choose_device

if TYPE_CHECKING:
    from statetrack.hf import StateTrackForCausalLM
    from statetrack.lm.trainer import Arguments, LMTrainer

RECIPE, METRICS, MODEL = "recipe.json", "metrics.jsonl", "model"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is carried out; nothing here changes what it computes but the rounding of sums over processes."""

    device: str = "auto"
    """cpu, cuda, or auto"""
    parallel: str = "auto"
    """with several processes: fsdp spreads weights and optimiser over them (FSDP2), ddp keeps them whole on each; auto:
    fsdp on GPUs, ddp on CPUs, where accelerate has nothing else"""
    minutes: float | None = None
    """stop and save after that time"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """tensorboard, wandb"""
    workers: int = 2
    """processes that read rows ahead, on a GPU"""
    save: bool = True
    """False: measure only, leave no checkpoint and no model"""

    def check(self) -> None:
        """Raise UsageError for unknown names and packages that are missing."""
        if self.parallel not in ("auto", "fsdp", "ddp"):
            raise UsageError(f"parallel must be auto, fsdp or ddp, got {self.parallel!r}")
        if self.minutes is not None and not self.minutes > 0:
            raise UsageError(f"minutes must be positive, got {self.minutes}")
        for package in ("transformers", "accelerate", *self.trackers):
            if find_spec(package) is None:
                extra = "wandb" if package == "wandb" else "lm"
                raise UsageError(f"{package} is not installed: pip install 'statetrack[{extra}]'")


def train(
    recipe: Recipe,
    path: Path,
    data: Path,
    *,
    options: Options | None = None,
    resume: bool = False,
    force: bool = False,
) -> dict[str, float]:
    """Train in the run directory `path` on the data prepared in `data` (made if absent); return the last metrics.

    Raises UsageError for bad settings, an existing run (without resume or force), data whose tokenizer is another, a
    loss that is not finite, or a disk that is full; the last whole checkpoint stays. Interrupted after SIGINT, SIGTERM
    or the time limit, when all is saved.
    """
    from statetrack.lm.trainer import check_start, greatest

    options = options or Options()
    recipe.check()
    options.check()
    processes, main = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")) == 0
    recipe.accumulation(processes)
    corpus = _corpus(recipe, data, main)
    config = {"settings": {**recipe.to_dict(), "tokenizer_digest": corpus.digest}}
    config |= {"version": statetrack.__version__, "commit": commit()}
    opened = _opened(path, config, resume, force, main)
    with opened as start, Bars() as bars, Signals(bars.say if main else None) as signals:
        trainer = _trainer(recipe, path, corpus, options, signals, bars if main else None)
        if start:
            check_start(start, trainer.is_fsdp_enabled)
        with _said(path):
            if main:
                write_json(path / RECIPE, config)
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        signum = greatest(signals.received, trainer.args)  # all stop, or all write the model together
        if signum and trainer.state.global_step < recipe.steps:
            raise Interrupted(signum, trainer.state.global_step, path, "the same command with --resume goes on")
        if options.save:
            _save_model(trainer, path)
    history = trainer.state.log_history
    if main:
        loss_by_step({path.name: history}, path / "training", title=path.name)
    return {k: v for row in history for k, v in row.items()}


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Say in one line that a log could not be written, and nothing from TensorBoard's thread, which says it again."""
    from statetrack.lm.trainer import last_good

    hook = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {why_not_written(error, path)}; {last_good(path)}") from error
    finally:
        threading.excepthook = hook


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """Leave a group of processes, and free what it held, while Python still runs.

    A thread of the group (gloo's live on) that lets go of its last tensor when Python ends would abort the process.
    """
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()


def _corpus(recipe: Recipe, data: Path, main: bool) -> Corpus:
    """Return the prepared data; make it where it is absent, which one process of several must have done before."""
    if not (data / "data.json").exists() and not main:
        raise UsageError(f"{data} holds no prepared data; with several processes, first: statetrack lm prepare")
    return prepare_shown(recipe.data, data) if main and not (data / "data.json").exists() else Corpus(data)


@contextlib.contextmanager
def _opened(path: Path, config: dict[str, Any], resume: bool, force: bool, main: bool) -> Iterator[Path | None]:
    """Hold the directory, ready for a run; yield the checkpoint to go on from, if any. Refuse what would mix runs.

    Every process looks by itself, before any waits for the others, so that all of them end where one does.
    """
    from statetrack.lm.trainer import checkpoints

    if resume and force:
        raise UsageError("--resume and --force exclude each other: one goes on with a run, the other replaces it")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; choose another directory")
    exists = (path / RECIPE).exists()
    if exists and resume:
        _check_same(read_json(path / RECIPE), config, path)
    elif exists and not force:
        raise UsageError(f"{path} holds a run; --resume to go on, --force to replace it")
    elif not exists and path.exists() and any(entry.name != LOCK for entry in path.iterdir()):
        raise UsageError(f"{path} is not empty and not a run; choose another directory")
    with held(path) if main else contextlib.nullcontext():  # the first process sees to the directory
        found = checkpoints(path) if resume else []
        if not main:
            yield found[-1] if found else None
            return
        for entry in [*path.glob("checkpoint-*"), path / MODEL]:
            if entry not in found:
                shutil.rmtree(entry, ignore_errors=True)
        if not resume:
            shutil.rmtree(path / "runs", ignore_errors=True)
        yield found[-1] if found else None


def _check_same(stored: Any, config: dict[str, Any], path: Path) -> None:
    old = stored.get("settings") if isinstance(stored, dict) else None
    if not isinstance(old, dict):
        raise UsageError(f"{path / RECIPE} is not that of a run; --force replaces it")
    new = json.loads(json.dumps(config["settings"]))
    differing = [k for k in sorted(old.keys() | new.keys()) if k not in FREE and old.get(k) != new.get(k)]
    if "tokenizer_digest" in differing:
        raise UsageError(f"{path} was started on data of another tokenizer; go on with that, or choose another --out")
    if differing:
        shown = "; ".join(difference(k, old.get(k), new.get(k)) for k in differing).split("; ")
        listed = "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")
        raise UsageError(f"{path} was started with other settings ({listed}); choose another --out or --force")


def with_model_of(recipe: Recipe, source: str) -> Recipe:
    """Return the recipe for the model of a checkpoint, to begin with its weights.

    Raises UsageError for what `statetrack.convert` cannot read, and for settings that recipes do not have.
    """
    from statetrack.convert import read

    found = read(source).config
    wanted = found.model_config()
    tied = bool(found.tie_word_embeddings)
    recipe = replace(recipe, init=source, mixers=wanted.mixers, mlp_dim=wanted.mlp_dim, tied=tied)
    if recipe.model(wanted.vocab_size) != wanted:
        raise UsageError(f"{source} has num_outputs, norm_eps or post_norm of its own, which recipes do not")
    return recipe


def _started(model: StateTrackForCausalLM, source: str, corpus: Corpus) -> None:
    """Give a model the weights of a checkpoint; raise UsageError if that has another model or another tokenizer."""
    from statetrack.convert import directory, load

    found = load(source)
    digest = getattr(found.config, "tokenizer_digest", None)
    if digest not in (None, corpus.digest) or found.config.vocab_size != corpus.vocab_size:
        first = f"statetrack lm prepare SOURCE --tokenizer {directory(source)} --out DIR"
        raise UsageError(f"{corpus.path} was made with another tokenizer than that of {source}; first: {first}")
    if found.config.model_config() != model.config.model_config():
        raise UsageError(f"{source} is another model than that of the recipe")
    model.load_state_dict(found.state_dict())


def build(recipe: Recipe, corpus: Corpus, *, empty: bool = False) -> StateTrackForCausalLM:
    """Return the recipe's model with the weights that its seed or its checkpoint gives; empty, for a process that gets
    them sent.
    """
    from statetrack.hf import StateTrackConfig, StateTrackForCausalLM

    tokenizer = corpus.tokenizer()
    config = StateTrackConfig.from_model_config(
        recipe.model(corpus.vocab_size),
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=recipe.tied,
        bos_token_id=tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tokenizer_digest=corpus.digest,
    )
    torch.manual_seed(recipe.seed)
    with torch.device("meta") if empty else contextlib.nullcontext():
        model = StateTrackForCausalLM(config)
    if empty:  # accelerate tells weights apart by their addresses, which "meta" does not have
        model.to_empty(device="cpu")
        model.tie_weights()
    elif recipe.init is not None:
        _started(model, recipe.init, corpus)
    model.model.gradient_checkpointing = recipe.gradient_checkpointing
    return model


def _trainer(
    recipe: Recipe, path: Path, corpus: Corpus, options: Options, signals: Signals, bars: Bars | None
) -> LMTrainer:
    """Return transformers' Trainer with model, rows and callbacks."""
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils import logging

    from statetrack.lm.trainer import CheckStart, LMTrainer, Report, StopSafely, sums

    logging.disable_progress_bar()
    held_out = corpus.shards("validation") if corpus.tokens("validation") >= recipe.length else []
    arguments = _arguments(recipe, path, options, evaluate=bool(held_out))
    sent = bool(arguments.fsdp) and arguments.process_index > 0  # the first process sends its weights
    model = build(recipe, corpus, empty=sent)
    callbacks = [StopSafely(signals, options.minutes), CheckStart({} if sent else sums(model))]
    if bars is not None:
        callbacks.append(Report(path / METRICS, bars))
    if recipe.compile and arguments.device.type == "cuda":
        for block in model.model.blocks:
            block.compile()
    rows = Rows(held_out, recipe.length) if held_out else None
    trainer = LMTrainer(
        cost=cost(recipe.model(corpus.vocab_size), recipe.tied),
        tokens_per_step=recipe.rows * recipe.length,
        model=model,
        args=arguments,
        train_dataset=Order(Rows(corpus.shards("train"), recipe.length), recipe.rows * recipe.steps, recipe.seed),
        eval_dataset=rows and Order(rows, min(recipe.evaluate_rows, len(rows)), 0),
        processing_class=corpus.tokenizer(),
        data_collator=pack if recipe.documents == "separate" else join,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(recipe: Recipe, path: Path, options: Options, *, evaluate: bool) -> Arguments:
    """Return the recipe in transformers' words."""
    from statetrack.lm.trainer import Arguments

    device = choose_device(options.device)
    gpu, processes = device.type == "cuda", int(os.environ.get("WORLD_SIZE", "1"))
    fsdp = options.parallel == "fsdp" or (options.parallel == "auto" and gpu)
    sharded = {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["Block"],
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "FULL_STATE_DICT",
        },
    }
    arguments = Arguments(
        output_dir=str(path),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_rows,
        per_device_eval_batch_size=recipe.micro_rows,
        gradient_accumulation_steps=recipe.accumulation(processes),
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": recipe.min_lr},
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        bf16=recipe.precision == "bfloat16" or (recipe.precision == "auto" and gpu),
        seed=recipe.seed,
        use_cpu=not gpu,
        ddp_backend="gloo" if processes > 1 and not gpu else None,
        ddp_find_unused_parameters=False,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save else "no",
        save_steps=recipe.save_every,
        save_total_limit=2,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.evaluate_every,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_num_workers=options.workers if gpu else 0,
        report_to=list(options.trackers) or "none",
        disable_tqdm=True,
        run_name=path.name,
        **(sharded if processes > 1 and fsdp else {}),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun, not for DataParallel
    return arguments


def _save_model(trainer: LMTrainer, path: Path) -> None:
    """Write model and tokenizer, whole or not at all."""
    temporary = path / f".{MODEL}.tmp"
    trainer.check_finite(trainer.model)  # pyright: ignore[reportArgumentType]
    try:
        trainer.save_model(str(temporary))
        if trainer.args.should_save:
            shutil.rmtree(path / MODEL, ignore_errors=True)
            os.replace(temporary, path / MODEL)
    except Exception as error:  # OSError, RuntimeError, safetensors' own
        reason = why_not_written(error, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(f"{path / MODEL} cannot be written: {reason}; --resume writes it again") from error
