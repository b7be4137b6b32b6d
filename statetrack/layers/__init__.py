"""Token mixers, one per file: a config with `build()`, and a module with `init_state`, `op_inputs` and `forward`."""

from statetrack.layers.attention import Attention as Attention
from statetrack.layers.attention import AttentionConfig as AttentionConfig
from statetrack.layers.deltaproduct import DeltaProduct as DeltaProduct
from statetrack.layers.deltaproduct import DeltaProductConfig as DeltaProductConfig
from statetrack.layers.dense_rnn import DenseRNN as DenseRNN
from statetrack.layers.dense_rnn import DenseRNNConfig as DenseRNNConfig
from statetrack.layers.gla import GLA as GLA
from statetrack.layers.gla import GLAConfig as GLAConfig
from statetrack.layers.hgrn2 import HGRN2 as HGRN2
from statetrack.layers.hgrn2 import HGRN2Config as HGRN2Config
from statetrack.layers.lstm import LSTM as LSTM
from statetrack.layers.lstm import LSTMConfig as LSTMConfig
from statetrack.layers.mamba import Mamba as Mamba
from statetrack.layers.mamba import MambaConfig as MambaConfig
from statetrack.layers.mamba2 import Mamba2 as Mamba2
from statetrack.layers.mamba2 import Mamba2Config as Mamba2Config
from statetrack.layers.mlstm import MLSTM as MLSTM
from statetrack.layers.mlstm import MLSTMConfig as MLSTMConfig
from statetrack.layers.retnet import RetNet as RetNet
from statetrack.layers.retnet import RetNetConfig as RetNetConfig
from statetrack.layers.rwkv6 import RWKV6 as RWKV6
from statetrack.layers.rwkv6 import RWKV6Config as RWKV6Config
from statetrack.layers.rwkv7 import RWKV7 as RWKV7
from statetrack.layers.rwkv7 import RWKV7Config as RWKV7Config
from statetrack.layers.slstm import SLSTM as SLSTM
from statetrack.layers.slstm import SLSTMConfig as SLSTMConfig

MixerConfig = (
    AttentionConfig
    | DeltaProductConfig
    | DenseRNNConfig
    | GLAConfig
    | HGRN2Config
    | LSTMConfig
    | MambaConfig
    | Mamba2Config
    | MLSTMConfig
    | RetNetConfig
    | RWKV6Config
    | RWKV7Config
    | SLSTMConfig
)

MIXERS: dict[str, type[MixerConfig]] = {
    "deltaproduct": DeltaProductConfig,
    "mamba": MambaConfig,
    "gla": GLAConfig,
    "mamba2": Mamba2Config,
    "retnet": RetNetConfig,
    "hgrn2": HGRN2Config,
    "mlstm": MLSTMConfig,
    "rwkv6": RWKV6Config,
    "rwkv7": RWKV7Config,
    "attention": AttentionConfig,
    "lstm": LSTMConfig,
    "slstm": SLSTMConfig,
    "dense_rnn": DenseRNNConfig,
}
