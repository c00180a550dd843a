"""A run of pd_ddil.py that also notes what its algorithm was given: `python record.py OUT ...`, a file per rank."""

import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import pd_ddil


def record(argv: list[str]) -> dict:
    """Runs pd_ddil.py. Notes the source and the inputs of the loss for each mini-batch, the dataset rows in the order
    in which they were read, the gradient of each update as the optimiser gets it, and this rank's final weights."""
    seen = dict(sources=[], batches=[], rows=[], gradients=[])
    pd_step, losses_of, next_batch = pd_ddil.pd_step, pd_ddil.losses_of, common.LatentData.next
    optimizers = []

    def noting_pd_step(schedule, student, z_t, z_s, t, s, cond):
        seen["batches"].append(dict(z_t=z_t, z_s=z_s, t=t, s=s, cond=cond))
        return pd_step(schedule, student, z_t, z_s, t, s, cond)

    def noting_losses_of(run, phase, part, source, nets):
        seen.update(rank=run.accelerator.process_index, world_size=run.accelerator.num_processes)
        seen["sources"].append(source)
        return losses_of(run, phase, part, source, nets)

    def noting_next(data):
        seen["rows"].append(data.rows(data.k))
        return next_batch(data)

    def note_gradient(optimizer, args, kwargs):
        optimizers[:] = [optimizer]
        seen["gradients"].append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    hook = register_optimizer_step_pre_hook(note_gradient)
    pd_ddil.pd_step, pd_ddil.losses_of, common.LatentData.next = noting_pd_step, noting_losses_of, noting_next
    try:
        pd_ddil.main(argv)
    finally:
        hook.remove()
        pd_ddil.pd_step, pd_ddil.losses_of, common.LatentData.next = pd_step, losses_of, next_batch
    return seen | {"weights": [p.detach().clone() for p in optimizers[0].param_groups[0]["params"]]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = record(sys.argv[2:])
    torch.save(seen, Path(sys.argv[1]) / f"rank-{seen['rank']}.pt")
