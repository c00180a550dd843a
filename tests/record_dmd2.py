"""A run of dmd2_ddil.py that also notes what its critic was given: `python record_dmd2.py OUT ...`, a file per rank."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dmd2_ddil


def record(argv: list[str]) -> dict:
    """Who moved, what was generated and the critic's gradient of each iteration, its losses' noise, and the final weights."""
    seen = dict(sources=[], movers=[], x_g=[], x=[], cond=[], noise=[], gradients=[])
    iterate, critic_step, finish, train = dmd2_ddil.iterate, dmd2_ddil.critic_step, dmd2_ddil.finish_update, dmd2_ddil.train

    def noting_iterate(run, nets, source, movers, *rest, **more):
        seen["sources"].append(source)
        seen["movers"].append(movers)
        return iterate(run, nets, source, movers, *rest, **more)

    def noting_critic_step(schedule, fake, judge, x_g, x, cond, weight, noise):
        for name, value in dict(x_g=x_g, x=x, cond=cond, noise=noise.get_state()).items():
            seen[name].append(value)
        return critic_step(schedule, fake, judge, x_g, x, cond, weight, noise)

    def noting_finish(run, trained, who):
        if who == "critic":
            seen["gradients"].append([p.grad.clone() for p in trained.network.parameters()])
        finish(run, trained, who)

    def noting_train(run, nets, prior, student, critic):
        done = train(run, nets, prior, student, critic)
        seen.update(rank=run.accelerator.process_index, world_size=run.accelerator.num_processes)
        seen.update({name: [p.detach().clone() for p in trained.network.parameters()]
                     for name, trained in (("student", student), ("critic", critic))})  # fmt: skip
        return done

    dmd2_ddil.iterate, dmd2_ddil.critic_step = noting_iterate, noting_critic_step
    dmd2_ddil.finish_update, dmd2_ddil.train = noting_finish, noting_train
    dmd2_ddil.main(argv)
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = record(sys.argv[2:])
    torch.save(seen, Path(sys.argv[1]) / f"rank-{seen['rank']}.pt")
