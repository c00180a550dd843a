"""A run that also notes what its algorithm was given: `python record.py SCRIPT OUT FLAGS`, a file for each rank."""

import importlib
import inspect
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

STEPS = {"pd_ddil": "pd_step", "lcm_ddil": "consistency_step", "dmd2_ddil": "critic_step"}


def plain(value):
    """Tensors, dicts of them and the state of generators, to be kept; None for all else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value if isinstance(value, torch.Tensor | dict) else None


def record(script: str, argv: list[str]) -> dict:
    """Notes each update's source, the inputs of the loss for each mini-batch, the rows of the data in the order in which
    they were read, who made each trajectory (DMD2), the gradient before each step, and this rank's final weights."""
    module, seen, trained = importlib.import_module(script), {}, {}
    for name in ("sources", "batches", "rows", "movers", "gradients"):
        seen[name] = []
    step, draw, next_batch = getattr(module, STEPS[script]), common.SamplingPrior.draw, common.LatentData.next
    run_step, end, movers = common.Run.step, common.Run.end, getattr(module, "draw_movers", None)

    def noting(function, name: str):
        def noted(*args, **more):
            seen[name].append(function(*args, **more))
            return seen[name][-1]

        return noted

    def noting_step(*args):
        inputs = inspect.signature(step).bind(*args).arguments
        seen["batches"].append({name: plain(value) for name, value in inputs.items() if plain(value) is not None})
        return step(*args)

    def noting_next(data):
        seen["rows"].append(data.rows(data.k))
        return next_batch(data)

    def noting_run_step(run, network, *rest):
        trained.update({name: network for name, known in run.trained.items() if known is network})
        name = next(name for name, known in run.trained.items() if known is network)
        seen["gradients"].append((name, [p.grad.clone() for p in network.parameters]))
        run_step(run, network, *rest)

    def noting_end(run, message):
        seen.update(rank=run.rank, world_size=run.n_ranks)
        seen.update({name: [p.detach().clone() for p in known.parameters] for name, known in trained.items()})
        seen.update({name: [*thing.parameters()] for name, thing in run.kept.items() if hasattr(thing, "parameters")})
        end(run, message)

    with (
        patch.object(module, STEPS[script], noting_step),
        patch.object(module, "draw_movers", noting(movers, "movers"), create=True),
        patch.object(common.SamplingPrior, "draw", noting(draw, "sources")),
        patch.object(common.LatentData, "next", noting_next),
        patch.object(common.Run, "step", noting_run_step),
        patch.object(common.Run, "end", noting_end),
    ):
        module.main(argv)
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = record(sys.argv[1], sys.argv[3:])
    torch.save(seen, Path(sys.argv[2]) / f"rank-{seen['rank']}.pt")
