"""Text from a language model, as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from statetrack.errors import UsageError


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    show: Callable[[str], None] | None = None,
) -> str:
    """Return up to `tokens` tokens of continuation by a causal language model.

    `show` gets the text in pieces, as soon as it is certain.

    temperature: 0 takes the likeliest token each time. top_p: draw from the likeliest tokens of that much probability.
    The prompt begins a document. Raises UsageError for settings out of range.
    """
    from transformers import TextStreamer

    if tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        given = f"{tokens}, {temperature} and {top_p}"
        raise UsageError(f"tokens must be at least 1, temperature at least 0, top-p above 0 and at most 1; got {given}")

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end
            if show is not None:
                show(text)

    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [first, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    asked = torch.tensor([ids], device=next(iter(model.parameters())).device)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=Shown(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **drawn,
        )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
