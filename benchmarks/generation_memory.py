"""Memory of a language model that generates for a long time: python benchmarks/generation_memory.py 1000000

A small DeltaNet on the CPU, greedy, token by token, with the state as its only memory of the text. Prints the peak of
the process (resident set, MiB) after the first 1,000 tokens and every tenth of the way.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from statetrack.hf import StateTrackCache, StateTrackConfig, StateTrackForCausalLM

FIRST = 1000  # tokens after which everything that is allocated once has been


def peak() -> float:
    """Return the largest resident set so far, in MiB."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kib / 1024


@torch.no_grad()
def main(count: int, mixer: str = "deltaproduct") -> None:
    """Generate `count` tokens."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "mixers": {"mixer": mixer, "heads": 1}}
    model = StateTrackForCausalLM(StateTrackConfig(**config)).eval()
    cache, token, began = StateTrackCache(), torch.tensor([[1]]), time.process_time()
    for n in range(1, count + 1):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        if n == FIRST or n % max(1, count // 10) == 0:
            print(f"{n:>9,} tokens  {peak():8.2f} MiB  {time.process_time() - began:8.1f} s of CPU time", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, *sys.argv[2:3])
