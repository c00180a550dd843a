"""What the scripts' tests share: toy models, closed forms, and ways to look into a run."""

import torch
from conftest import signals_kept
from diffusers import DDPMScheduler

from common import NoiseSchedule, Run, noise_of

ALPHA2 = torch.cat([DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod, torch.ones(1)]).double()
SCHEDULE = NoiseSchedule(ALPHA2.sqrt(), (1 - ALPHA2).sqrt())  # for identities
BOX = torch.tensor(-0.2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
MEAN, STD = 0.5, 0.4  # of the data, where they are Gaussian
seeded = lambda seed=0: torch.Generator().manual_seed(seed)
randn = lambda n, seed=0: torch.randn(n, 4, 3, 3, generator=seeded(seed), dtype=torch.float64)
max_error = lambda a, b: (a - b).abs().max().item()
clamped = lambda x, support: x if support is None else x.clamp(*support)
paths = lambda folder, teacher, data: f"--teacher {teacher} --data {data} --output_dir {folder}"


def gaussian_model(z_t, t, cond):
    """The exact v of data N(MEAN, STD^2)."""
    alpha_t, sigma_t = SCHEDULE.at(t)
    x_hat = MEAN + alpha_t * STD**2 / ((alpha_t * STD) ** 2 + sigma_t**2) * (z_t - alpha_t * MEAN)
    return (alpha_t * z_t - x_hat) / sigma_t


def nonlinear_model(z_t, t, cond):
    shift = sum((value.reshape(len(z_t), -1).mean(dim=1) for value in cond.values()), torch.zeros(len(z_t)))
    return z_t * (t / 500 - 0.7).view(-1, 1, 1, 1) / (1 + z_t.abs()) + 0.3 * z_t + 0.1 * shift.view(-1, 1, 1, 1)


def open_run(script, flags: str) -> Run:
    with signals_kept():
        run = Run(script.parse_args(flags.split()))
        run.open(
            script.__file__, [], ["buffer_age", "student_moves", "moved_by_reflect", "moved_in_target"], {}, plan={}
        )
    return run


def noting(monkeypatch, owner, name: str) -> list:
    """(inputs, result) of every call of owner.name from now on."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *inputs: calls.append((inputs, function(*inputs))) or calls[-1][1])
    return calls


def stock_latents(pipe, steps: int, w: float) -> torch.Tensor:
    """What a stock pipeline samples from noise and prompts of the first four of a sample grid."""
    inputs = {"prompt": [f"image {i} of test" for i in range(4)], "latents": noise_of(range(4), (4, 8, 8), seed=1)}
    inputs |= {"num_inference_steps": steps, "guidance_scale": w, "generator": seeded(1), "output_type": "latent"}
    return pipe(**inputs).images
