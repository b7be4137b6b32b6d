"""Token mixers, one per file: a config with `build()`, and a module with `init_state`, `op_inputs` and `forward`."""

from statetrack.layers.attention import Attention as Attention
from statetrack.layers.attention import AttentionConfig as AttentionConfig
from statetrack.layers.deltaproduct import DeltaProduct as DeltaProduct
from statetrack.layers.deltaproduct import DeltaProductConfig as DeltaProductConfig
from statetrack.layers.lstm import LSTM as LSTM
from statetrack.layers.lstm import LSTMConfig as LSTMConfig
from statetrack.layers.mamba import Mamba as Mamba
from statetrack.layers.mamba import MambaConfig as MambaConfig

MixerConfig = AttentionConfig | DeltaProductConfig | LSTMConfig | MambaConfig

MIXERS: dict[str, type[MixerConfig]] = {
    "deltaproduct": DeltaProductConfig,
    "mamba": MambaConfig,
    "attention": AttentionConfig,
    "lstm": LSTMConfig,
}
