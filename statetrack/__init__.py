"""statetrack: linear RNNs that track state: exact, fast, anywhere.

The public names, loaded on first use, so that `import statetrack` and the command line start at once. Beside them:
`statetrack.ops`, `statetrack.layers`, `statetrack.train.train` and `statetrack.evaluate.evaluate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statetrack.automata import Automaton as Automaton
    from statetrack.automata.verdicts import Structure as Structure
    from statetrack.automata.verdicts import Verdict as Verdict
    from statetrack.compiler import CompiledAutomaton as CompiledAutomaton
    from statetrack.compiler import compile as compile
    from statetrack.diagnosis import can_track as can_track
    from statetrack.diagnosis import explain as explain
    from statetrack.errors import UsageError as UsageError
    from statetrack.layers import AttentionConfig as AttentionConfig
    from statetrack.layers import DeltaProductConfig as DeltaProductConfig
    from statetrack.layers import DenseRNNConfig as DenseRNNConfig
    from statetrack.layers import GLAConfig as GLAConfig
    from statetrack.layers import HGRN2Config as HGRN2Config
    from statetrack.layers import LSTMConfig as LSTMConfig
    from statetrack.layers import Mamba2Config as Mamba2Config
    from statetrack.layers import MambaConfig as MambaConfig
    from statetrack.layers import MLSTMConfig as MLSTMConfig
    from statetrack.layers import RetNetConfig as RetNetConfig
    from statetrack.layers import RWKV6Config as RWKV6Config
    from statetrack.layers import RWKV7Config as RWKV7Config
    from statetrack.layers import SLSTMConfig as SLSTMConfig
    from statetrack.model import Config as Config
    from statetrack.model import Model as Model
    from statetrack.tasks import get_task as get_task
    from statetrack.train import Settings as Settings
    from statetrack.train import load_run as load_run

__version__ = "0.1.0"

_HOMES = {
    "Automaton": "automata",
    "Structure": "automata.verdicts",
    "Verdict": "automata.verdicts",
    "CompiledAutomaton": "compiler",
    "can_track": "diagnosis",
    "compile": "compiler",
    "explain": "diagnosis",
    "UsageError": "errors",
    "AttentionConfig": "layers",
    "DeltaProductConfig": "layers",
    "DenseRNNConfig": "layers",
    "GLAConfig": "layers",
    "HGRN2Config": "layers",
    "LSTMConfig": "layers",
    "Mamba2Config": "layers",
    "MambaConfig": "layers",
    "MLSTMConfig": "layers",
    "RetNetConfig": "layers",
    "RWKV6Config": "layers",
    "RWKV7Config": "layers",
    "SLSTMConfig": "layers",
    "Config": "model",
    "Model": "model",
    "get_task": "tasks",
    "Settings": "train",
    "load_run": "train",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'statetrack' has no attribute {name!r}")
    return getattr(import_module(f"statetrack.{_HOMES[name]}"), name)
