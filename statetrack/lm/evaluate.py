"""Evaluate a language model: perplexity by position, beyond the training length too, and lm-eval's tasks.

Letters: W windows, T tokens of a window, C tokens at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.lm.corpus import Corpus
from statetrack.lm.sources import documents
from statetrack.lm.tokenizers import digest, encode, load_tokenizer
from statetrack.lm.train import MODEL, RECIPE
from statetrack.runs import first_line, read_json
from statetrack.train import choose_device

if TYPE_CHECKING:
    from statetrack.hf import StateTrackForCausalLM

AT_ONCE = 2048  # tokens of a window per call: memory does not grow with the window
BUCKETS_PER_DOUBLING = 4
PER_BUCKET = 512  # tokens of all windows: the perplexity of fewer is noise


def load_model(path: Path, device: str = "auto", precision: str = "auto") -> tuple[StateTrackForCausalLM, Any]:
    """Return model and tokenizer of a run directory (its model, or its last whole checkpoint), a checkpoint, or a name
    on the hub.

    precision: of the weights; auto: bfloat16 on a GPU, float32 elsewhere. Raises UsageError where there is none, where
    weights are missing or have another shape, and where the tokenizer is not the one that the model was trained with.
    """
    try:
        from transformers.utils.logging import disable_progress_bar

        from statetrack.convert import directory
        from statetrack.hf import StateTrackForCausalLM
        from statetrack.lm.trainer import checkpoints
    except ImportError as error:
        raise UsageError(f"{first_line(error)}: pip install 'statetrack[lm]'") from None
    path = path if path.exists() else directory(path)
    if (path / RECIPE).exists():
        whole = [path / MODEL] if (path / MODEL).exists() else checkpoints(path)
        if not whole:
            raise UsageError(f"{path} has no checkpoint yet")
        path = whole[-1]
    if not (path / "config.json").exists():
        raise UsageError(f"{path} is no run and no checkpoint: it has no config.json")
    stored = read_json(path / "config.json")
    if not isinstance(stored, dict) or stored.get("model_type") != "statetrack":
        raise UsageError(f"{path} is not a statetrack model; first: statetrack convert {path} --to statetrack")
    disable_progress_bar()
    chosen = choose_device(device)
    wide = precision == "float32" or (precision == "auto" and chosen.type != "cuda")
    try:
        dtype = torch.float32 if wide else torch.bfloat16
        found: Any = StateTrackForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except Exception as error:  # whatever a broken file raises
        raise UsageError(f"{path} cannot be loaded: {first_line(error)}") from None
    model, told = found
    if wrong := sorted({*told["missing_keys"], *told["unexpected_keys"]}):
        what = "lacks the weight" if wrong[0] in told["missing_keys"] else "has the unknown weight"
        raise UsageError(f"{path} {what} {wrong[0]}")
    tokenizer = load_tokenizer(path)
    if getattr(model.config, "tokenizer_digest", None) not in (None, digest(tokenizer)):
        raise UsageError(f"{path}: the tokenizer is not the one that the model was trained with")
    if len(tokenizer) > model.config.vocab_size:
        raise UsageError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    return model.to(chosen).eval(), tokenizer  # pyright: ignore[reportArgumentType, reportReturnType]


def corpus_tokens(corpus: Corpus, tokenizer: Any, split: str = "validation") -> Iterator[np.ndarray]:
    """Yield the documents of a split; raise UsageError if another tokenizer made them."""
    if digest(tokenizer) != corpus.digest:
        raise UsageError(f"{corpus.path} was made with another tokenizer than the model's")
    for shard in corpus.shards(split):
        for start, end in zip([0, *shard.ends], shard.ends, strict=False):
            yield shard.tokens[start:end]


def source_tokens(source: str, tokenizer: Any, field: str = "text") -> Iterator[np.ndarray]:
    """Yield the documents of a source, tokenised."""
    texts = (text for text in documents(source, field=field) if text.strip())
    while batch := list(islice(texts, 64)):
        yield from map(np.asarray, encode(tokenizer, batch))


def windows(texts: Iterable[np.ndarray], length: int, count: int, *, whole: bool = False) -> Int[Tensor, "W T"]:
    """Return up to `count` windows of `length` tokens: of documents joined one after the other or, with whole, the
    beginnings of documents that are as long as that. Raise UsageError where there is none.
    """
    found, waiting, longest, total = [], np.empty(0, dtype=np.int64), 0, 0
    for text in texts:
        longest, total = max(longest, len(text)), total + len(text)
        waiting = text.astype(np.int64) if whole else np.concatenate([waiting, text.astype(np.int64)])
        while len(waiting) >= length and len(found) < count:
            found.append(waiting[:length])
            waiting = waiting[:0] if whole else waiting[length:]
        if len(found) == count:
            break
    if not found:
        has = f"the longest document has {longest}" if whole else f"there are {total} in all"
        raise UsageError(f"no text of {length} tokens: {has}")
    return torch.from_numpy(np.stack(found))


@torch.no_grad()
def loss_by_position(
    model: StateTrackForCausalLM,
    tokens: Int[Tensor, "W T"],
    *,
    batch_size: int = 8,
    report: Callable[[int], None] | None = None,
) -> list[float]:
    """Return the mean loss of predicting token t + 1 from those up to t, for t = 1 .. T - 1, over the windows.

    The state is carried from piece to piece, so memory does not grow with T.
    """
    from statetrack.hf import StateTrackCache

    device = next(iter(model.parameters())).device
    total = torch.zeros(tokens.shape[1] - 1, dtype=torch.float64)
    for rows in tokens.split(batch_size):
        cache = StateTrackCache()
        for start in range(0, rows.shape[1] - 1, AT_ONCE):
            piece = rows[:, start : start + AT_ONCE + 1].to(device)
            logits = model(input_ids=piece[:, :-1], past_key_values=cache, use_cache=True).logits
            loss = F.cross_entropy(logits.float().transpose(1, 2), piece[:, 1:], reduction="none")
            total[start : start + loss.shape[1]] += loss.sum(0).double().cpu()
            if report is not None:
                report(loss.numel())
    return (total / len(tokens)).tolist()


def bucketed(losses: Sequence[float], least: int = 1) -> list[dict[str, float]]:
    """Return mean loss and perplexity over ranges of positions, four per doubling but of at least `least` positions.

    The last one ends with the text.
    """
    edges: list[int] = []
    for edge in (round(2 ** (i / BUCKETS_PER_DOUBLING)) for i in range(16, 400)):
        if edge - (edges[-1] if edges else 0) >= least and edge + least <= len(losses):
            edges.append(edge)
    found = []
    for first, end in zip([0, *edges], [*edges, len(losses)], strict=True):
        mean = sum(losses[first:end]) / (end - first)
        found.append({"from": first + 1, "to": end, "loss": mean, "perplexity": math.exp(min(mean, 700))})
    return found


def perplexity_within(losses: Sequence[float], length: int) -> float:
    """Return the perplexity of the first `length` tokens."""
    inside = losses[: max(1, length - 1)]
    return math.exp(min(700.0, sum(inside) / len(inside)))


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> Any:
    """Return lm-eval's manager of tasks; raise UsageError for unknown ones, and where lm-eval is missing."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError("tasks need lm-eval: pip install 'statetrack[lm]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is no name
    if include is not None and not include.is_dir():
        raise UsageError(f"{include} is no folder of tasks")
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UsageError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them, --include adds a folder")
    return manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int = 4096,
) -> dict[str, dict[str, Any]]:
    """Return lm-eval's results by task; `include` is a folder of tasks (YAML) of one's own.

    Raises UsageError for unknown tasks, data that cannot be had, and where lm-eval is missing.
    """
    manager = check_tasks(tasks, include)
    import lm_eval
    from lm_eval.models import huggingface

    wrap: Any = huggingface.HFLM
    options = {"backend": "causal", "batch_size": batch_size, "max_length": max_length}
    wrapped = wrap(pretrained=model, tokenizer=tokenizer, **options)
    run: Any = lm_eval.simple_evaluate
    try:
        found: Any = run(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise UsageError(f"lm-eval could not run {', '.join(tasks)}: {first_line(error)}") from None
    return {} if found is None else found["results"]
