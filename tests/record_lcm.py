"""A run of lcm_ddil.py that also notes what its loss was given: `python record_lcm.py OUT ...`, a file per rank."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lcm_ddil


def record(argv: list[str]) -> dict:
    """z_t and t of each mini-batch, and this rank's final weights of student and target."""
    seen = dict(z_t=[], t=[], target=[])
    step, train = lcm_ddil.consistency_step, lcm_ddil.train

    def noting_step(schedule, student, target, teacher, z_t, t, *rest):
        seen["z_t"].append(z_t)
        seen["t"].append(t)
        return step(schedule, student, target, teacher, z_t, t, *rest)

    def noting_train(run, nets, prior, trained, optimizer):
        done = train(run, nets, prior, trained, optimizer)
        seen.update(rank=run.accelerator.process_index, world_size=run.accelerator.num_processes)
        seen["student"] = [p.detach().clone() for p in trained.parameters()]
        seen["target"] = [p.detach().clone() for p in (trained if nets.ema is None else nets.ema).parameters()]
        return done

    lcm_ddil.consistency_step, lcm_ddil.train = noting_step, noting_train
    lcm_ddil.main(argv)
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = record(sys.argv[2:])
    torch.save(seen, Path(sys.argv[1]) / f"rank-{seen['rank']}.pt")
