"""A script under FSDP2 on CPU: `accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 tests/sharded.py pd_ddil.py FLAGS`.

accelerate shards on GPUs only: CPU processes become DDP, whatever plugin it is given. Here its FSDP2 branch is taken by hand.
With DIE=1 in the environment, the run dies as soon as it has saved a checkpoint.
"""

import importlib
import os
import sys
from pathlib import Path

import accelerate
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


class ShardingAccelerator(accelerate.Accelerator):
    def __init__(self, **settings):
        super().__init__(**settings)
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from the environment
        if self.mixed_precision != "no":
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)


def save_and_die(run, save=common.Run.save_checkpoint):
    save(run)
    raise SystemExit("dies here")


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1].removesuffix(".py"))
    accelerate.Accelerator = ShardingAccelerator
    if "DIE" in os.environ:
        common.Run.save_checkpoint = save_and_die
    script.main(sys.argv[2:])
