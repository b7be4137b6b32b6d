"""The demo's runs: one small layer of each mixer on parity, the same but for the range of eigenvalues.

Without label smoothing the loss is near 0 after 30 steps, and a state that forgets a little per token is never punished
for it within 40 tokens; with it, answers must not fade with the length. The norm's large epsilon has the same purpose:
it does not amplify a faded state (docs/LOG.md).
"""

from __future__ import annotations

from statetrack.layers import DeltaProductConfig, MambaConfig, MixerConfig
from statetrack.model import Config
from statetrack.train import Settings

EVALUATED = (40, 256)
"""lengths asked, drawn uniformly (arXiv 2411.12537, E.1.2)"""


def demo_settings(mixer: str, eigenvalues: tuple[float, float], seed: int) -> Settings:
    """Return the run of "deltanet" or "mamba" with the given range."""
    configs: dict[str, MixerConfig] = {
        "deltanet": DeltaProductConfig(
            dim=32, heads=8, conv_size=0, beta_std=4.0, norm_eps=0.1, eigenvalues=eigenvalues
        ),
        "mamba": MambaConfig(dim=32, state_size=4, rank=32, conv_size=0, dt_range=(0.1, 1.0), eigenvalues=eigenvalues),
    }
    model = Config(vocab_size=3, num_outputs=3, mixers=(configs[mixer],), mlp_dim=64)
    return Settings(
        task="parity",
        model=model,
        train_length=(3, 40),
        steps=300,
        batch_size=128,
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        label_smoothing=0.1,
        seed=seed,
        device="cpu",
    )
