"""A script under FSDP2 on CPU: `python -m torch.distributed.run --standalone --nproc_per_node 2 tests/sharded.py pd_ddil.py FLAGS`.

accelerate shards on GPUs only: CPU processes become DDP, whatever plugin it is given. Here its FSDP2 branch is taken by hand.
"""

import importlib
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def start_sharded(start, **settings):
    """An accelerator as a launch with --use_fsdp --fsdp_version 2 makes it on GPUs."""
    accelerator = start(**settings)
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10_000, cpu_ram_efficient_loading=False
    )
    return accelerator


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1].removesuffix(".py"))
    start = script.start_accelerator
    script.start_accelerator = lambda **settings: start_sharded(start, **settings)
    script.main(sys.argv[2:])
