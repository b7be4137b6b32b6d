"""Tokenizers: any of Hugging Face's fast ones, or a byte-level BPE trained here where there is no hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from statetrack.errors import UsageError
from statetrack.runs import first_line

END = "<|end|>"
"""begins and ends every document under a tokenizer trained here"""
TRAINING_BYTES = 1 << 25


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer of a folder or a hub name; raise UsageError where there is none that fits."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UsageError("language models need transformers: pip install 'statetrack[lm]'") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # whatever the network, the hub or a broken file raise
        if Path(name).is_dir():
            no_file = not (Path(name) / "tokenizer.json").exists()
            reason = "it has no tokenizer.json" if no_file else first_line(error)
        else:
            reason = f"{first_line(error).rstrip('.')}; a folder with a tokenizer, or bpe:SIZE, needs no hub"
        raise UsageError(f"tokenizer {str(name)!r} cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise UsageError(f"tokenizer {str(name)!r} has no fast version (tokenizer.json), which is needed")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"tokenizer {str(name)!r} has no end-of-sequence token, which separates documents")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Return a byte-level BPE of `vocab_size` tokens, trained on the first 32 MiB of the texts.

    Any text can be encoded and comes back unchanged. Raises UsageError for fewer than 257 tokens, or too little text.
    """
    if vocab_size < 257:
        raise UsageError(f"a byte-level tokenizer needs at least 257 tokens (256 bytes and {END}), got {vocab_size}")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise UsageError("language models need transformers and tokenizers: pip install 'statetrack[lm]'") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts, TRAINING_BYTES), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        found = tokenizer.get_vocab_size()
        if found == 257:  # the bytes and END: no pair was seen
            raise UsageError("the source holds no text, or too little to train a tokenizer on")
        raise UsageError(f"the text is too short for a vocabulary of {vocab_size}: it gave {found}; ask for fewer")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _first(texts: Iterable[str], size: int) -> Iterable[str]:
    for text in texts:
        yield text
        size -= len(text.encode("utf-8", "replace"))
        if size <= 0:
            return


def digest(tokenizer: Any) -> str:
    """Return a digest of all that decides how a tokenizer cuts text: equal digests, equal tokens."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of documents, each between BOS (EOS where there is none) and EOS.

    Text that spells a special token is text.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    coded = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [[first, *each.ids, tokenizer.eos_token_id] for each in coded]
