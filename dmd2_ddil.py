"""Distribution matching distillation with imitation learning: sample a guided diffusion model in 1 to 5 steps.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1, Algorithm 1, sec. 4.2, 5.
DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv:2405.14867.

    laptop, minutes     accelerate launch dmd2_ddil.py
    one GPU             accelerate launch --mixed_precision bf16 dmd2_ddil.py --recipe ssd1b --teacher PIPELINE --data IMAGES
    seven GPUs          accelerate launch --multi_gpu --num_processes 7 --mixed_precision bf16 dmd2_ddil.py --recipe ssd1b ...

paper                                            code
  Alg. 1    line 2, [D14] one source a mini-batch  common.SamplingPrior.draw
  Alg. 1    line 3, forward diffusion              student_input, common.forward_states
  Alg. 1    line 4, the teacher's trajectory       backward_states, common.teacher_rollout
  Alg. 1    line 5, the student's trajectory       backward_states, common.consistency_rollout
  sec. 4.2  both models within one trajectory      draw_movers
  Alg. 1    line 6, the losses                     student_step, critic_step
  DMD2      gradient of the matching               matching_gradient
  DMD2      fake score and GAN's head              Critic, GANHead
  sec. 4.1  reflected distillation [D15]           reflect_value, matching_gradient, common.reflect
  sec. 5    ten critic updates for each, priors    RECIPES, update_all

Plain DMD2 is --p_student 1. What the paper adds to it: grep "# DDIL:" dmd2_ddil.py common.py
"""

import argparse
import copy
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from common import (
    CLEAN, LatentData, Metrics, Model, NoiseSchedule, PromptEncoder, SamplingPrior, StopRequest, Support, UNetModel,
    accumulation_of, activation_memory, any_timesteps, betas_of, check_engine, check_memory, check_output_dir,
    check_shared_flags, clip_gradient, compile_networks, consistency_function, consistency_rollout, count_of,
    create_output_dir, eps_from_v, fingerprint, forward_states, frozen_dtype, frozen_parameters, last_checkpoint,
    latent_shape, learning_rate, load_images, load_pipeline, load_schedule, load_state, memory_report,
    moved_fraction, noise_of, open_data, part_of, prepare_adamw, priors_of, rank_state, reflect, reflect_warning,
    refuse_changes, report_on_data, resolve, restore_rank, save_checkpoint, save_grid, save_pipeline, seed_of,
    shards_of, start_accelerator, student_rollout, support_of, teacher_rollout, timestep_grid, updates_of,
    wait_for_output_dir, whole_network, with_guidance, x_from_v,
)  # fmt: skip

# Every number of the paper (sec. 5, App. A), and what the embedded default uses instead. Any flag overrides its recipe.
PAPER = dict(
    student_init=None, fake_init=None, teacher_steps=20, student_steps=4, p_forward=(0.0,), p_teacher=None, p_student=None,
    mixed_rollout=False, reflect="measured", fake_updates=10, gan_weight=5e-3, critic_gan_weight=1e-2, seed=0, report_to=None,
    streaming=False, image_column=None, caption_column=None, compile=False,
)  # fmt: skip
SSD1B = PAPER | dict(
    teacher=None, data=None, output_dir="runs/dmd2_ddil-ssd1b", updates=30_000, guidance_scale=8.0, global_batch_size=7,
    batch_size=1, learning_rate=5e-7, lr_decay=False, warmup=500, gradient_checkpointing=True, cache_latents=False,  # [D13]
    log_every=10, save_every=100,
)  # fmt: skip
RECIPES = {
    "tiny": PAPER | dict(
        teacher="assets/tiny/pipeline", data="assets/tiny/data", output_dir="runs/dmd2_ddil-tiny", updates=200,
        fake_updates=5, guidance_scale=4.0, global_batch_size=7, batch_size=None, learning_rate=1e-4, lr_decay=True, warmup=20,
        gradient_checkpointing=False, cache_latents=True, log_every=10, save_every=100,
    ),
    "sd15": SSD1B | dict(output_dir="runs/dmd2_ddil-sd15"),  # not in the paper: the numbers of its SSD-1B run
    "ssd1b": SSD1B,  # "small batch" of Table 3
    "ssd1b_oracle": SSD1B | dict(  # Table 3's large batch: --teacher and --fake_init are SDXL, --student_init is SSD-1B
        output_dir="runs/dmd2_ddil-ssd1b_oracle", updates=70_000, global_batch_size=64, batch_size=2, p_student=(1.0,),
        reflect="none",
    ),
}  # fmt: skip
# May differ when a run is resumed; the networks' paths too, as their weights are compared.
RUN_FLAGS = ("teacher", "student_init", "fake_init", "output_dir", "compile", "log_every", "save_every", "report_to")
GRAD_CLIP = 10.0  # DMD2's
TAU = 20, 980  # noise levels of the matching gradient, both included
ORIGINS = "noise", "forward", "teacher", "student"  # of what the student is trained on: pure noise at 999, or who made it
ENCODER = 0.4  # of a UNet's forward: what the GAN's features cost (SD1.5 .33, SDXL .43 of its FLOPs)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--recipe", help=f"table of defaults: {', '.join(RECIPES)} (default tiny: all offline, CPU, minutes)")
    paper = p.add_argument_group("paper")
    paper.add_argument("--teacher", help="pipeline to distil, the real score: folder or hub name; all networks work with its text encoders and VAE")
    paper.add_argument("--student_init", help="pipeline whose UNet the student starts from (the teacher's)")
    paper.add_argument("--fake_init", help="pipeline whose UNet the fake score starts from (the teacher's)")
    paper.add_argument("--data", help="images with captions: folder (parquet, imagefolder, webdataset) or hub name; prompts alone where neither GAN nor forward diffusion asks for images")
    paper.add_argument("--teacher_steps", type=int, help="steps of the teacher's trajectories (Table 3: 20)")
    paper.add_argument("--student_steps", type=int, help="steps of the student, a divisor of 1000: 4 are 999 749 499 249 (sec. 5: 4)")
    paper.add_argument("--p_forward", type=float, nargs="+", help="share of forward diffusion, a list for equal parts of the run (0 [D19])")
    paper.add_argument("--p_teacher", type=float, nargs="+", help="share of the teacher's trajectories (half of what is left [D19])")
    paper.add_argument("--p_student", type=float, nargs="+", help="share of the student's trajectories (half of what is left [D19]); 1 = plain DMD2")
    paper.add_argument("--mixed_rollout", action="store_true", default=None, help="choose the model anew at each transition of a trajectory, with these shares (sec. 4.2)")
    paper.add_argument("--reflect", help="threshold for x estimates: measured | none | a radius (App. A; [D15])")
    paper.add_argument("--guidance_scale", type=float, help="of the teacher (sec. 5: 8)")
    paper.add_argument("--fake_updates", type=int, help="updates of the fake score for each of the student (sec. 5: 10)")
    paper.add_argument("--gan_weight", type=float, help="of the GAN's loss for the student (DMD2: 5e-3); 0: no GAN")
    paper.add_argument("--critic_gan_weight", type=float, help="of the GAN's loss for the critic (DMD2: 1e-2)")
    paper.add_argument("--updates", type=int, help="of the student (sec. 5: 30000)")
    paper.add_argument("--global_batch_size", type=int, help="samples an update, over all processes (sec. 5: 7)")
    paper.add_argument("--learning_rate", type=float, help="of student and critic (DMD2: 5e-7 [D13])")
    paper.add_argument("--lr_decay", action=argparse.BooleanOptionalAction, help="linear decay to 0 (sec. 5) instead of a constant rate (DMD2) [D13]")
    paper.add_argument("--warmup", type=int, help="student updates of warm-up (500)")
    run = p.add_argument_group("run")
    run.add_argument("--batch_size", type=int, help="samples a process and forward; accumulation makes up the global batch")
    run.add_argument("--output_dir", help="run folder (default runs/dmd2_ddil-RECIPE)")
    run.add_argument("--seed", type=int, help="of everything random")
    run.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    run.add_argument("--overwrite", action="store_true", help="delete the run in output_dir first")
    run.add_argument("--dry_run", action="store_true", help="print the resolved recipe, batch arithmetic and memory, then stop")
    run.add_argument("--check_data", action="store_true", help="print how many samples are usable and why others are not, draw some to OUTPUT_DIR-data.png, then stop")
    run.add_argument("--max_updates", type=int, help="end after so many updates (for tests)")
    run.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="trade time for memory")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for all UNets: minutes at the start, faster updates")
    run.add_argument("--cache_latents", action=argparse.BooleanOptionalAction, help="encode all images once and keep their latents on disk, for later runs too")
    run.add_argument("--streaming", action=argparse.BooleanOptionalAction, help="read the data in order while training; nothing is copied or cached")
    run.add_argument("--image_column", help="of the data (default: its first column of images)")
    run.add_argument("--caption_column", help="of the data (default: caption, text, txt or prompt)")
    run.add_argument("--log_every", type=int, help="updates between lines and rows of metrics.csv")
    run.add_argument("--save_every", type=int, help="updates between checkpoints and sample grids")
    run.add_argument("--report_to", help="a tracker that accelerate knows (tensorboard, wandb, ...); default none")
    args = resolve(p.parse_args(argv), RECIPES, RUN_FLAGS)
    check_args(args)
    return args


def check_args(args) -> None:
    """One clear message for what cannot work, before anything is loaded or written."""
    n, m = args.teacher_steps, args.student_steps
    if not 1 <= m <= 500 or 1000 % m:
        raise SystemExit(f"--student_steps {m}: must divide 1000 and be at most 500, e.g. 4")
    if not 1 <= n <= 999:
        raise SystemExit(f"--teacher_steps {n}: must lie in 1..999")
    off = sorted(set(timestep_grid(m, "trailing")) - set(timestep_grid(n, "trailing")), reverse=True)
    if off:
        raise SystemExit(f"--teacher_steps {n}: the student's timesteps {off} are not on the teacher's grid; take a multiple of "
                         f"--student_steps {m}")  # fmt: skip
    check_shared_flags(args, priors=("p_forward", "p_teacher", "p_student"))
    priors_of(args)
    if not 0 < args.learning_rate < float("inf"):
        raise SystemExit(f"--learning_rate {args.learning_rate}: must be > 0 and finite")
    for name in ("guidance_scale", "gan_weight", "critic_gan_weight"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise SystemExit(f"--{name} {getattr(args, name)}: must be >= 0 and finite")
    if args.gan_weight and not args.critic_gan_weight:
        raise SystemExit(f"--critic_gan_weight 0: nothing would train the GAN's head; --gan_weight {args.gan_weight} must be 0 too")
    if args.recipe == "ssd1b_oracle" and not args.student_init:
        raise SystemExit("--student_init: the recipe ssd1b_oracle distils SDXL into a smaller UNet; give that of SSD-1B")
    for name in ("updates", "fake_updates"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} {getattr(args, name)}: must be >= 1")


def needs_images(args) -> bool:
    """Without forward diffusion and GAN, prompts alone suffice."""
    return args.gan_weight > 0 or max(priors_of(args)["forward"]) > 0


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm. z_t, x_g [B, C, h, w] fp32, t [B] int64; losses come back per sample, [B]
# ----------------------------------------------------------------------------------------------------------------------

Judge = Callable[[Tensor, Tensor, dict], Tensor]  # judge(z_t, t, cond) -> logits [B], high for real images


def reflect_value(x_hat: Tensor, support: Support) -> Tensor:  # DDIL: the student's estimate is reflected too
    """x_hat reflected in its value but not in its gradient: a plain clamp has none outside of the support [D15]."""
    return x_hat + (reflect(x_hat, support) - x_hat).detach()


@torch.no_grad()
def matching_gradient(
    schedule: NoiseSchedule, real: Model, fake: Model, x_g: Tensor, tau: Tensor, cond: dict, support: Support, generator
) -> tuple[Tensor, Tensor, Tensor]:
    """DMD2's gradient at x_g, (x_fake - x_real) / mean |x_g - x_real|, and both estimates before they are reflected."""
    z_tau, _ = forward_states(schedule, x_g, tau, generator)
    estimates = [x_from_v(schedule, z_tau, score(z_tau, tau, cond), tau) for score in (real, fake)]
    x_real, x_fake = (reflect(x_hat, support) for x_hat in estimates)  # DDIL: reflected, after guidance
    scale = (x_g - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (x_fake - x_real) / scale.clamp(min=1e-3), *estimates  # finite even where the generator is perfect


def gan_gradient(schedule: NoiseSchedule, judge: Judge, x_g: Tensor, cond: dict, generator) -> tuple[Tensor, Tensor]:
    """(gradient at x_g, losses [B]) of softplus(-judge), on x_g noised to any level. Leaves the critic's gradients alone."""
    x_g = x_g.detach().requires_grad_(True)
    t = any_timesteps(schedule, len(x_g), generator)
    losses = F.softplus(-judge(forward_states(schedule, x_g, t, generator)[0], t, cond))
    return torch.autograd.grad(losses.sum(), x_g)[0], losses.detach()


def student_step(
    schedule: NoiseSchedule, real: Model, fake: Model, judge: Judge | None, x_g: Tensor, cond: dict, support: Support,
    gan_weight: float, generator,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The student's losses on what it generated, x_g with its graph: distribution matching, and GAN where there is a judge."""
    tau = torch.randint(TAU[0], TAU[1] + 1, (len(x_g),), generator=generator, device=x_g.device)
    g, x_real, x_fake = matching_gradient(schedule, real, fake, x_g, tau, cond, support, generator)
    losses = 0.5 * (x_g - (x_g - g).detach()).pow(2).mean(dim=(1, 2, 3))  # its gradient at x_g is g over C h w
    notes = dict(loss_matching=losses.detach(), matching_norm=g.flatten(1).norm(dim=1) / g[0].numel(),
                 moved_real=moved_fraction(x_real, support), moved_fake=moved_fraction(x_fake, support))  # fmt: skip
    if judge is not None:
        g, gan_losses = gan_gradient(schedule, judge, x_g, cond, generator)
        losses = losses + gan_weight * (x_g * g).sum(dim=(1, 2, 3))  # linear in x_g: has the GAN's gradient there
        notes |= dict(loss_gan=gan_losses, gan_norm=gan_weight * g.flatten(1).norm(dim=1))
    return losses, notes


def critic_step(
    schedule: NoiseSchedule, fake: Model, judge: Judge | None, x_g: Tensor, x: Tensor | None, cond: dict, gan_weight: float,
    generator,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The critic's losses on x_g and, with a judge, on real latents x: eps-MSE of the fake score; real against generated."""
    t = any_timesteps(schedule, len(x_g), generator)
    z_t, eps = forward_states(schedule, x_g, t, generator)
    losses = (eps_from_v(schedule, z_t, fake(z_t, t, cond), t) - eps).pow(2).mean(dim=(1, 2, 3))
    notes = dict(loss_fake=losses.detach())
    if judge is not None:
        t = any_timesteps(schedule, 2 * len(x_g), generator)
        z_t, _ = forward_states(schedule, torch.cat([x_g, x]), t, generator)
        generated, real = judge(z_t, t, {name: torch.cat([value, value]) for name, value in cond.items()}).chunk(2)
        gan_losses = F.softplus(generated) + F.softplus(-real)
        losses = losses + gan_weight * gan_losses
        notes |= dict(loss_judge=gan_losses.detach(), logit_generated=generated.detach(), logit_real=real.detach())
    return losses, notes


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


class GANHead(torch.nn.Sequential):
    """Mid-block features [B, C, n, n] -> logits [B, 1, 1, 1]: strided convolutions down to 4 x 4 or less, then one over all."""

    def __init__(self, channels: int, size: int):
        groups = math.gcd(32, channels)
        while groups > 1 and channels // groups < 4:  # at 1 x 1 a group of a single channel would always be 0
            groups //= 2

        def layer(kernel: int, stride: int, padding: int):
            convolution = torch.nn.Conv2d(channels, channels, kernel, stride, padding)
            return [convolution, torch.nn.GroupNorm(groups, channels), torch.nn.SiLU()]

        layers = []
        while size > 4:
            layers, size = layers + layer(4, 2, 1), size // 2
        super().__init__(*layers, *layer(size, 1, 0), torch.nn.Conv2d(channels, 1, 1))


class Critic(torch.nn.Module):
    """The fake score's UNet and the GAN's head on its mid block, in one module, so that one engine keeps both in step.

    critic(...) is the UNet's output; critic(..., judged=True) the head's logits, for which the decoder is not run."""

    def __init__(self, unet, head: GANHead | None):
        super().__init__()
        self.unet, self.head, self.config = unet, head, unet.config

    def forward(self, *inputs, judged: bool = False, **more):
        return (self.head(mid_block_features(self.unet, *inputs, **more)),) if judged else self.unet(*inputs, **more)


def mid_block_features(unet, *inputs, **more) -> Tensor:
    """[B, C, n, n]: a UNet's forward up to its mid block, whatever its family."""

    class Reached(Exception):
        pass

    def stop(module, args, output):
        raise Reached(output)

    hook = unet.mid_block.register_forward_hook(stop)
    try:
        unet.forward(*inputs, **more)  # not as it is compiled: the hook would break the graph
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()


def make_head(unet) -> GANHead:
    """A head for the shape that this UNet's mid block has: all down blocks but the last halve the latent's size."""
    widths, size = unet.config.block_out_channels, unet.config.sample_size
    for _ in widths[1:]:
        size = -(-size // 2)
    return GANHead(widths[-1], size)


def judge_of(network: UNetModel) -> Judge:
    """The critic's network as judge(z_t, t, cond) -> logits [B]."""

    def judge(z_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        network.forwards += ENCODER * len(z_t)
        return network.run(z_t, t, cond, judged=True).flatten()

    return judge


def sampler_of(pipe, student_steps: int):
    """The sampler that the saved student carries: with as many solver steps as the student's, LCMScheduler's timesteps are ours."""
    from diffusers import LCMScheduler

    return LCMScheduler(**betas_of(pipe), prediction_type=pipe.scheduler.config.prediction_type,
                        original_inference_steps=student_steps, clip_sample=False, steps_offset=1)  # fmt: skip


def check_sampler(pipe, timesteps: list[int]) -> None:
    """The stock sampler must visit the very timesteps that are trained."""
    sampler = sampler_of(pipe, len(timesteps))
    sampler.set_timesteps(len(timesteps))
    if sampler.timesteps.tolist() != timesteps:
        raise SystemExit(f"--student_steps {len(timesteps)}: LCMScheduler takes {sampler.timesteps.tolist()} instead of {timesteps}")


def check_fit(teacher, pipe, flag: str, name: str) -> None:
    """Student and fake score live in the teacher's latent space, on its noise schedule and its prompts."""
    for what in ("in_channels", "sample_size", "cross_attention_dim", "addition_embed_type"):
        ours, theirs = teacher.unet.config[what], pipe.unet.config[what]
        if ours != theirs:
            raise SystemExit(f"{flag} {name}: its UNet's {what} is {theirs}, the teacher's {ours}; they must be equal")
    ours, theirs = betas_of(teacher), betas_of(pipe)
    if not torch.equal(load_schedule(teacher).alpha, load_schedule(pipe).alpha):
        differs = ", ".join(what for what in ours | theirs if ours.get(what) != theirs.get(what))
        raise SystemExit(f"{flag} {name}: its noise schedule differs from the teacher's in {differs}")
    if load_schedule(pipe).alpha.min() == 0 and pipe.scheduler.config.prediction_type == "epsilon":
        raise SystemExit(f"{flag} {name}: predicts epsilon and has zero terminal SNR; that needs v-prediction")


def trained_parameters(args, pipes: dict) -> dict[str, int]:
    networks = {"student": pipes["student"].unet, "fake score": pipes["fake"].unet}
    with torch.device("meta"):  # to be counted only
        networks |= {"GAN head": make_head(pipes["fake"].unet)} if args.gan_weight else {}
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def expected_forwards(args, has_w: bool) -> float:
    """UNet forwards of all updates, as metrics.csv counts them: of single samples, a backward pass as two."""
    guided, encoder, T = (1 if has_w else 2), ENCODER * (args.gan_weight > 0), args.student_steps
    share = {source: sum(values) / len(values) for source, values in priors_of(args).items()}
    transition = share["student"] + share["teacher"] * guided * args.teacher_steps / T  # forward diffusion is for free
    critic = 1 + 3 + 6 * encoder + (T - 1) / 2 * transition  # x_g, fake score, GAN on real and generated; way to z_t
    student = 2 + guided + 1 + 2 * encoder  # back through x_g, both scores, GAN's gradient
    return updates_of(args) * args.global_batch_size * (args.fake_updates * critic + student)


def memory_of(args, pipes: dict, accelerator, activations: float | None = None) -> str:
    """GiB of the networks and their optimisers in each process, beside the device's."""
    gib = (16 * sum(trained_parameters(args, pipes).values()) / shards_of(accelerator) + 4 * frozen_parameters(pipes["teacher"])) / 2**30
    gib += frozen_dtype(accelerator).itemsize * pipes["teacher"].unet.num_parameters() / 2**30
    what = "student and critic with gradients and AdamW (16 bytes a parameter), teacher, VAE and text encoders"
    return memory_report(gib, what, accelerator.device, activations)


def describe(args, pipes: dict, n_samples: int | str, accelerator) -> str:
    """What --dry_run prints: resolved recipe, batch arithmetic, and the memory of each network."""

    def gib(parameters: int, bytes_each: int) -> str:
        return f"{parameters / 1e6:.4g}M parameters, {bytes_each * parameters / 2**30:.4g} GiB"

    counts, teacher = trained_parameters(args, pipes), pipes["teacher"].unet.num_parameters()
    has_w = pipes["teacher"].unet.config.time_cond_proj_dim is not None
    frozen, world_size = frozen_dtype(accelerator).itemsize, accelerator.num_processes
    accumulation = args.global_batch_size // (args.batch_size * world_size)
    settings = args.batch_size, accelerator, args.gradient_checkpointing
    of_student = of_fake = activation_memory(pipes["teacher"], pipes["student"].unet, *settings)
    if pipes["fake"] is not pipes["student"]:
        of_fake = activation_memory(pipes["teacher"], pipes["fake"].unet, *settings)
    encoder = ENCODER * (args.gan_weight > 0)  # of the GAN, beside the student's graph, and of twice as many samples beside the fake score's
    activations = max(of_student + encoder * of_fake, of_fake + 2 * encoder * of_fake)
    rows = {name: value for name, value in sorted(vars(args).items())} | {
        "": "",
        "images" if needs_images(args) else "prompts": n_samples,
        "sources": ", ".join(f"{source} {share}" for source, share in priors_of(args).items()),
        "batch": f"{world_size} processes x {args.batch_size} x {accumulation} accumulated = {args.global_batch_size}",
        "updates in all": f"{updates_of(args)} of the student, {updates_of(args) * args.fake_updates} of the critic",
        "UNet forwards in all": f"{expected_forwards(args, has_w):.3g} samples, a backward pass counted as two",
        "teacher, weights": gib(teacher, frozen),
        **{f"{name}, weights": gib(n, 4) for name, n in counts.items()},
        **{f"{name}, AdamW": gib(n, 8) for name, n in counts.items()},
        "VAE, text encoders": gib(frozen_parameters(pipes["teacher"]), 4),
        "memory a process": memory_of(args, pipes, accelerator, activations),
    }
    return "\n".join(f"{name:24} {value}" for name, value in rows.items())


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What lives as long as the run; `progress` and the generators are its position."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipes: dict  # "teacher", "student", "fake": the pipelines that the networks come from
    schedule: NoiseSchedule
    timesteps: list[int]  # the student's
    teacher_grid: list[int]
    support: Support
    prompts: PromptEncoder
    null: dict
    held_out: list[str]  # captions of the sample grids
    data: LatentData
    noise: torch.Generator  # this rank's own
    shared: torch.Generator  # alike on all ranks [D14]
    metrics: Metrics
    stop: StopRequest
    progress: dict

    def cond_of(self, ids: Tensor) -> dict:
        w = torch.full((len(ids),), self.args.guidance_scale, device=self.noise.device)
        return self.prompts.encode(ids) | {"w": w}

    def batch(self, source: str) -> tuple[Tensor | None, dict]:
        """(x, cond) of this rank's next images; x is None where their captions are enough."""
        x, ids = self.data.next() if source == "forward" or self.args.gan_weight else (None, self.data.next_ids())
        return x, self.cond_of(self.prompts.with_sizes(ids))  # inference's, for real images too

    def note(self, notes: dict[str, Tensor]) -> None:
        for column, values in notes.items():
            self.metrics.add(column, values)


class Networks(NamedTuple):
    """The models, as model(z_t, t, cond) -> v_hat."""

    real: Model  # frozen teacher under guidance
    student: Model  # as prepared for training
    rolling: Model  # the same weights without the wrapper of distributed training, for rollouts
    fake: Model  # as prepared for training
    judge: Judge | None  # as prepared for training
    still_fake: Model  # the same weights without the wrapper, where the critic is asked and not trained
    still_judge: Judge | None
    counted: list[UNetModel]  # the networks behind the models
    rows: dict[str, Tensor]  # the teacher's rows of the sample grids


class Trained(NamedTuple):
    """A network under the engine, with its optimiser."""

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer


def draw_transitions(run: Run, i: int) -> int:
    """How far down the student's timesteps this iteration trains it, uniformly; alike on all ranks, from the seed alone."""
    generator = torch.Generator().manual_seed(seed_of(run.args.seed, "transitions", run.progress["total"], i))
    return torch.randint(len(run.timesteps), (), generator=generator).item()


# DDIL: both models within one trajectory (sec. 4.2)
def draw_movers(run: Run, prior: SamplingPrior, source: str, part: int, transitions: int) -> list[str]:
    """Who makes each transition of a trajectory, alike on all ranks [D14]: the source or, with --mixed_rollout, anyone."""
    if not run.args.mixed_rollout or source == "forward":
        return [source] * transitions
    p_student, p_teacher = (prior.priors[who][part] for who in ("student", "teacher"))
    rate = p_student / (p_student + p_teacher)
    return ["student" if draw < rate else "teacher" for draw in torch.rand(transitions, generator=run.shared).tolist()]


def backward_states(run: Run, nets: Networks, movers: list[str], z: Tensor, cond: dict) -> Tensor:
    """The state after these transitions through the student's timesteps, from noise z at the first: the student estimates x
    and noises it again, as at inference (Alg. 1 line 5); the teacher takes its guided DDIM steps (Alg. 1 line 4)."""
    for (t, s), mover in zip(pairwise(run.timesteps), movers):
        if mover == "student":
            z = consistency_rollout(run.schedule, nets.rolling, z, (t, s), cond, run.noise)[-1]
        else:  # DDIL: the teacher's trajectory
            path = run.teacher_grid[run.teacher_grid.index(t) : run.teacher_grid.index(s) + 1]
            z = teacher_rollout(run.schedule, nets.real, z, path, cond, run.support)[-1]
    return z


def student_input(
    run: Run, nets: Networks, source: str, movers: list[str], x: Tensor | None, cond: dict
) -> tuple[Tensor, Tensor]:
    """(z_t, t) on which the student is trained, as far down its timesteps as there are movers (Alg. 1 lines 3 to 5)."""
    n, t = len(cond["w"]), torch.full_like(cond["w"], run.timesteps[len(movers)], dtype=torch.long)
    if source == "forward" and movers:  # DDIL: Alg. 1 line 3
        return forward_states(run.schedule, x, t, run.noise)[0], t
    z = torch.randn(n, *latent_shape(run.pipes["teacher"]), generator=run.noise, device=run.noise.device)
    return backward_states(run, nets, movers, z, cond), t  # z at 999 is pure noise for every source


def backward(run: Run, losses: Tensor, who: str) -> None:
    """Adds this mini-batch's gradient. Raises FloatingPointError, on all ranks alike, if the loss is not finite."""
    loss = losses.mean()
    mean_loss = run.accelerator.reduce(loss.detach(), "mean")
    if not torch.isfinite(mean_loss):
        raise FloatingPointError(f"the {who}'s loss is {mean_loss.item()}")
    run.accelerator.backward(loss)
    run.progress["forwards"] += 2 * len(losses)  # the backward pass; forwards are counted by the networks


def sync_at_last(accelerator: Accelerator, trained: Trained, is_last: bool):
    """Around a mini-batch: ranks exchange gradients at the last of an update alone. With shards they do at each, or each rank
    would hold a whole gradient."""
    return nullcontext() if is_last or accelerator.is_fsdp2 else accelerator.no_sync(trained.network)


def finish_update(run: Run, trained: Trained, who: str) -> None:
    """Clip the gradient, step, and leave none."""
    norm = clip_gradient(run.accelerator, trained.network, GRAD_CLIP)
    if run.accelerator.scaler is None and not torch.isfinite(norm):  # fp16's scaler skips such updates
        raise FloatingPointError(f"the norm of the {who}'s gradient is {norm.item()}")
    run.metrics.add(f"grad_norm_{who}", norm)
    trained.optimizer.step()
    trained.optimizer.zero_grad()


def iterate(
    run: Run, nets: Networks, source: str, movers: list[str], student: Trained, critic: Trained, update_student: bool
) -> None:
    """One update of the critic, before it one of the student if asked for; both on what the student generates from states
    of one source. Raises FloatingPointError on a non-finite loss."""
    args, schedule, accelerator, noise = run.args, run.schedule, run.accelerator, run.noise
    last, made = accelerator.gradient_accumulation_steps - 1, []
    origin = movers[-1] if movers else "noise"  # whose states these are, for the metrics
    for model in nets.counted:
        model.forwards = 0

    for i in range(last + 1):
        x, cond = run.batch(source)
        z_t, t = student_input(run, nets, source, movers, x, cond)
        with sync_at_last(accelerator, student, i == last), torch.set_grad_enabled(update_student):
            x_hat = consistency_function(schedule, nets.student if update_student else nets.rolling, z_t, t, cond)
            x_g = reflect_value(x_hat, run.support)
            if update_student:
                losses, notes = student_step(schedule, nets.real, nets.still_fake, nets.still_judge, x_g, cond, run.support,
                                             args.gan_weight, noise)  # fmt: skip
                backward(run, losses, "student")
                run.progress["forwards"] += ENCODER * len(losses) * (nets.judge is not None)  # the GAN's gradient at x_g
                columns = f"loss_matching_{origin}", f"loss_matching_t{run.timesteps[len(movers)]}"
                run.note(notes | dict.fromkeys(columns, notes["loss_matching"]))
        made.append((x_g.detach(), x, cond))  # the one forward feeds both updates
        run.note(dict(moved_student=moved_fraction(x_hat.detach(), run.support), x_g_mean=x_g.detach().mean(dim=(1, 2, 3)),
                      x_g_std=x_g.detach().std(dim=(1, 2, 3))))  # fmt: skip
        if x is not None:
            run.note(dict(x_mean=x.mean(dim=(1, 2, 3)), x_std=x.std(dim=(1, 2, 3))))
    if update_student:
        finish_update(run, student, "student")

    for i, (x_g, x, cond) in enumerate(made):
        with sync_at_last(accelerator, critic, i == last):
            losses, notes = critic_step(schedule, nets.fake, nets.judge, x_g, x, cond, args.critic_gan_weight, noise)
            backward(run, losses, "critic")
        run.progress["forwards"] += 4 * ENCODER * len(losses) * (nets.judge is not None)  # back through twice as many samples
        run.note(notes | {f"loss_fake_{origin}": notes["loss_fake"]})
    finish_update(run, critic, "critic")
    run.progress["forwards"] += sum(model.forwards for model in nets.counted)


def update_all(run: Run, nets: Networks, prior: SamplingPrior, student: Trained, critic: Trained) -> None:
    """One update of the student and `fake_updates` of the critic, each from a source and to a timestep of its own."""
    part = part_of(run.progress["total"], updates_of(run.args), len(prior.priors["forward"]))
    for i in range(run.args.fake_updates):
        source = prior.draw(part)  # DDIL: Alg. 1 line 2, one for the mini-batch, the same on all ranks
        movers = draw_movers(run, prior, source, part, draw_transitions(run, i))
        iterate(run, nets, source, movers, student, critic, update_student=i == 0)


def train(run: Run, nets: Networks, prior: SamplingPrior, student: Trained, critic: Trained) -> bool:
    """All updates, with logs, checkpoints and sample grids; False if the run is asked to stop."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    updates, folder = updates_of(args), Path(args.output_dir) / "checkpoints"
    bar = tqdm(total=updates, initial=progress["total"], desc="dmd2", disable=not accelerator.is_main_process,
               dynamic_ncols=True)  # fmt: skip
    with bar:
        clock = time.time()
        for update in range(progress["total"], updates):
            lr = learning_rate(update, updates, args.warmup, args.learning_rate, args.lr_decay)
            for group in student.optimizer.param_groups + critic.optimizer.param_groups:
                group["lr"] = lr
            try:
                update_all(run, nets, prior, student, critic)
            except FloatingPointError as error:
                bar.close()
                raise SystemExit(f"update {update + 1}: {error}; stopped. The last good checkpoint: "
                                 f"{last_checkpoint(folder) or 'none yet'}; a lower --learning_rate may help")  # fmt: skip
            progress["total"] = update + 1
            bar.update()
            if progress["total"] % args.log_every == 0 or update + 1 == updates:
                means = run.metrics.flush(
                    accelerator, total_updates=progress["total"], unet_forwards=round(progress["forwards"] * accelerator.num_processes, 1),
                    lr=f"{lr:.3g}", seconds=f"{time.time() - clock:.2f}",
                )  # fmt: skip
                clock = time.time()
                accelerator.log(means, step=progress["total"])
                if accelerator.is_main_process:
                    tqdm.write("{}/{} matching {loss_matching:.4f} fake {loss_fake:.4f} std of x_g {x_g_std:.2f}".format(
                        update + 1, updates, **means) + (f", of data {means['x_std']:.2f}" if "x_std" in means else "")
                        + f" lr {lr:.1e}")  # fmt: skip
                    is_first, is_last = progress["total"] <= args.log_every, update + 1 == updates
                    if run.support and (is_first or is_last):
                        columns = {"real score": "moved_real", "fake score": "moved_fake", "student": "moved_student"}
                        moved = {who: means[column] for who, column in columns.items()}
                        if warning := reflect_warning(args.reflect, moved, is_last):
                            tqdm.write(warning)
            stop, due = run.stop.agreed(accelerator), progress["total"] % args.save_every == 0 or update + 1 == updates
            if stop or due:
                save(run, student=student, critic=critic)
            if due:
                save_samples(run, nets)
            if stop and update + 1 < updates:
                bar.close()
                accelerator.print(f"stopped after update {progress['total']}: saved; --resume goes on")
                return False
    return True


def save(run: Run, **trained) -> None:
    """A checkpoint of everything: --resume gives the weights that an unbroken run would have."""
    folder = Path(run.args.output_dir) / "checkpoints"
    save_checkpoint(run.accelerator, folder, run.progress["total"], run.progress, rank_state(run), **trained)


def restore(run: Run, checkpoint: Path) -> None:
    """Position and this rank's state; weights and optimisers are loaded by prepare."""
    run.progress.update(json.loads((checkpoint / "progress.json").read_text()))
    restore_rank(run, load_state(checkpoint / f"rank-{run.accelerator.process_index}.pt"))


def grid_rows(run: Run, sample: Callable[[Tensor, dict, torch.Generator], Tensor]) -> Tensor:
    """sample(z, cond, generator) for eight held-out prompts, in batches no larger than those in training."""
    n, device = min(8, len(run.held_out)), run.accelerator.device
    ids = run.prompts.tokenize([run.held_out[i * len(run.held_out) // n] for i in range(n)])
    z, noise = noise_of(range(n), latent_shape(run.pipes["teacher"]), seed=1), torch.Generator(device).manual_seed(1)
    parts = torch.arange(n).split(run.args.batch_size)
    return torch.cat([sample(z[rows].to(device), run.cond_of(ids[rows]), noise) for rows in parts])


@torch.no_grad()
def save_samples(run: Run, nets: Networks) -> None:
    """PNG of teacher and student, on the same noise in each column; below, what the two scores make of the student's
    images: where they differ, the student is being pushed from x_fake to x_real."""

    def student(z: Tensor, cond: dict, noise: torch.Generator) -> Tensor:
        """[n, 3, C, h, w]: x_g of the last step, x_real, x_fake."""
        x_g = consistency_rollout(run.schedule, nets.rolling, z, [*run.timesteps, CLEAN], cond, noise)[-1]
        tau = torch.full((len(z),), 500, device=z.device)
        _, x_real, x_fake = matching_gradient(run.schedule, nets.real, nets.still_fake, x_g, tau, cond, None, noise)
        return torch.stack([x_g, x_real, x_fake], dim=1)

    names = f"student, {len(run.timesteps)} steps", "x_real of it", "x_fake of it"
    rows = nets.rows | dict(zip(names, grid_rows(run, student).unbind(dim=1)))  # on all ranks: a network may be sharded
    if run.accelerator.is_main_process:
        save_grid(Path(run.args.output_dir) / "samples" / f"{run.progress['total']:06d}.png", run.pipes["teacher"], rows)


def prepare(run: Run, checkpoint: Path | None) -> tuple[Networks, Trained, Trained]:
    """Teacher, student and critic, the latter two under the engine; from a checkpoint if there is one."""
    args, accelerator, device, pipes = run.args, run.accelerator, run.accelerator.device, run.pipes
    prediction_type = {name: pipe.scheduler.config.prediction_type for name, pipe in pipes.items()}

    def unet_of(name: str):
        is_shared = sum(pipe is pipes[name] for pipe in pipes.values()) > 1
        return copy.deepcopy(pipes[name].unet) if is_shared else pipes[name].unet

    student_unet, fake_unet = unet_of("student"), unet_of("fake")
    for unet in (student_unet, fake_unet):
        unet.requires_grad_(True).train()
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(args.seed, "head"))  # alike on all ranks
        critic_module = Critic(fake_unet, make_head(fake_unet) if args.gan_weight else None)
    half = frozen_dtype(accelerator)

    def model(unet, name: str) -> UNetModel:
        return UNetModel(unet, run.schedule, prediction_type[name], accelerator.autocast)

    for name in ("student", "fake"):
        if pipes[name] is not pipes["teacher"]:
            pipes[name].unet = None  # is trained, or has been copied
    if args.compile:
        compile_networks(student_unet, fake_unet, pipes["teacher"].unet)
    network = model(pipes["teacher"].unet.to(device, half), "teacher")
    real = network if network.config.time_cond_proj_dim is not None else with_guidance(network, run.null)
    trained = {}
    for name, module in (("student", student_unet), ("critic", critic_module)):
        if checkpoint:
            module.load_state_dict(load_state(checkpoint / f"{name}.pt"))
        # on the device one by one: where they are sharded, it may not hold both as a whole
        trained[name] = Trained(*prepare_adamw(accelerator, module.to(device), checkpoint and checkpoint / f"{name}_optimizer.pt"))

    student, fake = model(trained["student"].network, "student"), model(trained["critic"].network, "fake")
    rolling = model(accelerator.unwrap_model(trained["student"].network), "student")
    still_fake = model(accelerator.unwrap_model(trained["critic"].network), "fake")
    judge, still_judge = (judge_of(fake), judge_of(still_fake)) if args.gan_weight else (None, None)
    rows = {f"teacher, {len(grid)} steps":
            grid_rows(run, lambda z, cond, _: student_rollout(run.schedule, real, z, [*grid, CLEAN], cond)[-1])
            for grid in (run.teacher_grid, run.timesteps)}  # fmt: skip
    counted = [network, student, rolling, fake, still_fake]
    nets = Networks(real, student, rolling, fake, judge, still_fake, still_judge, counted, rows)
    return nets, trained["student"], trained["critic"]


def load_pipes(args) -> dict:
    """The pipelines of teacher, student and fake score; each folder is loaded once."""
    loaded, pipes = {}, {}
    for name, flag in (("teacher", "--teacher"), ("student", "--student_init"), ("fake", "--fake_init")):
        path = getattr(args, flag.removeprefix("--")) or args.teacher
        if path not in loaded:
            loaded[path] = load_pipeline(path, flag)
            check_fit(loaded[args.teacher], loaded[path], flag, path)
        pipes[name] = loaded[path]
        if pipes[name] is not pipes["teacher"]:  # whose VAE and text encoders serve all
            pipes[name].vae = pipes[name].text_encoder = pipes[name].text_encoder_2 = None
    if args.gan_weight and pipes["fake"].unet.mid_block is None:
        raise SystemExit(f"--fake_init {args.fake_init or args.teacher}: its UNet has no mid block, which the GAN looks at; take --gan_weight 0")
    return pipes


def setup(args, accelerator: Accelerator) -> Run | None:
    """Load and check everything, then make the run folder; None if the flags ask for a report only."""
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    check_engine(accelerator)
    if accelerator.mixed_precision == "fp16" and args.gan_weight:
        raise SystemExit("--mixed_precision fp16: too coarse for the GAN's gradient; take bf16, or --gan_weight 0")
    facts = {"world_size": world_size, "mixed_precision": accelerator.mixed_precision}
    if args.resume:
        refuse_changes(facts, json.loads((Path(args.output_dir) / "config.json").read_text()))
    accelerator.gradient_accumulation_steps = accumulation_of(args, world_size)
    if accelerator.is_main_process and not (args.dry_run or args.check_data):
        check_output_dir(args)

    pipes = load_pipes(args)
    timesteps = timestep_grid(args.student_steps, "trailing")
    check_sampler(pipes["student"], timesteps)
    dataset, held_out = load_images(
        args.data, need_images=False, streaming=args.streaming, image_column=args.image_column, caption_column=args.caption_column
    )
    has_images = "image" in dataset.column_names
    if needs_images(args) and not has_images:
        raise SystemExit(f"--data {args.data}: has no images, which --gan_weight {args.gan_weight} and --p_forward "
                         f"{args.p_forward} need; give images, or 0 for both")  # fmt: skip
    if args.reflect == "measured" and not has_images:
        raise SystemExit(f"--reflect measured: --data {args.data} has no images to measure; give a radius, or none")
    if args.dry_run and accelerator.is_main_process:
        print(describe(args, pipes, count_of(dataset), accelerator))
    if args.check_data:
        accelerator.print(report_on_data(args, pipes["teacher"], dataset, accelerator))
    if args.dry_run or args.check_data:
        return None

    check_memory(memory_of(args, pipes, accelerator))
    out, pipe, schedule = Path(args.output_dir), pipes["teacher"], load_schedule(pipes["teacher"]).to(device)
    set_seed(args.seed, device_specific=True)
    noise = torch.Generator(device).manual_seed(seed_of(args.seed, "rank", rank))
    prompts = PromptEncoder(pipe, device)
    data = open_data(args, pipe, prompts, rank, world_size, noise, dataset, cache=args.cache_latents and needs_images(args))
    metrics = Metrics(
        out / "metrics.csv", ["total_updates", "unet_forwards", "lr", "seconds"],
        ["loss_matching", *[f"loss_matching_{origin}" for origin in ORIGINS], *[f"loss_matching_t{t}" for t in timesteps],
         "loss_fake", *[f"loss_fake_{origin}" for origin in ORIGINS], "loss_gan", "loss_judge", "matching_norm", "gan_norm",
         "grad_norm_student", "grad_norm_critic", "logit_real", "logit_generated", "x_mean", "x_g_mean", "x_std", "x_g_std",
         "moved_real", "moved_fake", "moved_student"], device,
    )  # fmt: skip
    run = Run(
        args, accelerator, pipes, schedule, timesteps, timestep_grid(args.teacher_steps, "trailing"),
        support_of(args.reflect, data), prompts, prompts.null(), held_out, data, noise,
        torch.Generator().manual_seed(seed_of(args.seed, "shared")), metrics, StopRequest(), dict(total=0, forwards=0),
    )  # fmt: skip
    prints = {id(pipe): fingerprint(pipe.unet) for pipe in pipes.values()}
    facts |= {f"{name}_weights": prints[id(pipe)] for name, pipe in pipes.items()}
    if args.resume:
        refuse_changes(facts, json.loads((out / "config.json").read_text()))
    elif accelerator.is_main_process:
        create_output_dir(args, __file__, facts)
    wait_for_output_dir(accelerator, out)
    if args.report_to:
        accelerator.init_trackers("dmd2_ddil", config={name: str(value) for name, value in vars(args).items()})
    return run


def main(argv=None) -> None:
    args = parse_args(argv)
    accelerator = start_accelerator(log_with=args.report_to, project_dir=args.output_dir)
    run = setup(args, accelerator)
    if run is None:
        return
    out = Path(args.output_dir)
    checkpoint = last_checkpoint(out / "checkpoints") if args.resume else None
    if checkpoint:
        restore(run, checkpoint)
    if args.resume and accelerator.is_main_process:
        run.metrics.forget_after(run.progress["total"])
    accelerator.print(f"{out}: {'resuming' if checkpoint else 'starting'} at update {run.progress['total'] + 1} of {updates_of(args)}")
    nets, student, critic = prepare(run, checkpoint)
    if not checkpoint:
        save_samples(run, nets)
    prior = SamplingPrior(run.shared, **priors_of(args))  # DDIL: Alg. 1 lines 2-5
    if not train(run, nets, prior, student, critic):
        accelerator.end_training()
        return
    unet = whole_network(accelerator, student.network, type(run.pipes["teacher"].unet))
    if accelerator.is_main_process:
        save_pipeline(out / "pipeline", run.pipes["teacher"], unet, sampler_of(run.pipes["student"], args.student_steps))
    w = args.guidance_scale if unet.config.time_cond_proj_dim is not None else 1.0
    accelerator.print(f"done: {out / 'pipeline'} samples in {args.student_steps} steps, guidance_scale {w}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
