"""Train on several CPU processes; run by torchrun from tests/test_lm_train.py: DATA OUT ddp|fsdp [STOP].

With STOP the second process gets a SIGINT after that step; a run that is there is gone on with.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from statetrack.errors import UsageError
from statetrack.lm.train import leaving_group, train
from statetrack.train import Interrupted
from tests.lm_runs import OPTIONS, acting, spread


def let_accelerate_shard_on_cpus() -> None:
    """Have accelerate choose FSDP2 on CPU processes, as it does on GPUs: torch can, accelerate does not offer it."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def sharding(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = sharding


if __name__ == "__main__":
    data, out, parallel, *stop = sys.argv[1:]
    torch.set_num_threads(1)
    if parallel == "fsdp":
        let_accelerate_shard_on_cpus()
    if stop and os.environ["RANK"] == "1":
        acting(pytest.MonkeyPatch(), int(stop[0]), lambda **_: os.kill(os.getpid(), signal.SIGINT))
    options = replace(OPTIONS, parallel=parallel)
    try:
        with leaving_group():
            train(spread(), Path(out), Path(data), options=options, resume=Path(out).exists())
    except (Interrupted, UsageError) as error:
        print(error)
