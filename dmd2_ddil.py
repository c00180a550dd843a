"""Distribution matching distillation with imitation learning: sample a guided diffusion model in 1 to 5 steps.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1, Algorithm 1, sec. 4.2, 5.
DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv:2405.14867.

    laptop          accelerate launch dmd2_ddil.py
    one GPU         accelerate launch --mixed_precision bf16 dmd2_ddil.py --recipe ssd1b --teacher SSD-1B --data IMAGES
    seven GPUs      accelerate launch --multi_gpu --num_processes 7 --mixed_precision bf16 dmd2_ddil.py --recipe ssd1b

paper                                            code
  Alg. 1    line 1, data, T_s                      data_batch, sample_rollout_length
  Alg. 1    line 2, [D14] one source an iteration  common.SamplingPrior.draw
  Alg. 1    line 3, forward diffusion (*)          student_states, common.forward_diffuse
  Alg. 1    line 4, the teacher's trajectory       student_states, common.teacher_rollout
  Alg. 1    line 5, the student's trajectory       student_states, common.consistency_rollout
  sec. 4.2  both models within one trajectory (*)  draw_actors
  Alg. 1    line 6, the losses                     student_step, critic_step
  DMD2      gradient of the matching               matching_gradient
  DMD2      fake score and GAN's head              Critic, GANHead
  sec. 4.1  reflected distillation [D15]           reflect_value, matching_gradient, common.reflect
  sec. 5    ten critic updates for each, priors    RECIPES, main

(*) Off by default [D20]: --p_forward and --mixed_rollout turn them on.
Plain DMD2 is --p_student 1 --reflect none. What the paper adds to it: grep "# DDIL:" dmd2_ddil.py common.py
"""

import copy
import math
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# By common.py's sections
# isort: off
from common import CLEAN, NoiseSchedule, eps_from_v, forward_diffuse, timestep_grid, uniform_timesteps, x_from_v
from common import Support, clipped_fraction, reflect
from common import Model, consistency_function, consistency_rollout, student_rollout, teacher_rollout
from common import SamplingPrior
from common import UNetModel, add_lora, betas_of, latent_shape, lcm_scheduler, load_pipeline, load_schedule
from common import refuse_zero_snr, with_guidance, without_lora
from common import Run, TrainableNetwork, add_lora_flag, add_prior_flags, derive_seed, flag_parser, non_negative
from common import part_of, positive, positive_int, resolve, resolve_priors
# isort: on

# Any flag overrides its recipe.
PAPER = {"teacher_steps": 20, "student_steps": 4, "fake_updates": 10}  # Table 3, sec. 5
DMD2 = {"gan_weight": 5e-3, "critic_gan_weight": 1e-2}  # DMD2's
READINGS = {"p_forward": (0.0,), "mixed_rollout": False, "reflect": "measured"}  # [D19], [D20], [D15]
COMMON = PAPER | DMD2 | READINGS | {"lora_rank": 0, "seed": 0}
SSD1B = COMMON | {  # sec. 5; rates [D13], warm-up [D24]
    "output_dir": "runs/dmd2_ddil-ssd1b", "updates": 30_000, "guidance_scale": 8.0, "global_batch_size": 7,
    "batch_size": 1, "learning_rate": 5e-7, "lora_learning_rate": 5e-5, "lr_decay": False, "warmup": 500,
    "gradient_checkpointing": True, "log_every": 10, "save_every": 100,
}  # fmt: skip
RECIPES = {
    "tiny": COMMON | {
        "teacher": "assets/tiny/pipeline", "data": "assets/tiny/data", "output_dir": "runs/dmd2_ddil-tiny", "updates": 200,
        "fake_updates": 5, "guidance_scale": 4.0, "global_batch_size": 7, "learning_rate": 1e-4,
        "lora_learning_rate": 3e-4, "lr_decay": True, "warmup": 20, "cache_latents": True, "log_every": 10, "save_every": 100,
    },
    "sd15": SSD1B | {"output_dir": "runs/dmd2_ddil-sd15"},  # not in the paper: the numbers of its SSD-1B run
    "ssd1b": SSD1B,  # "small batch" of Table 3
    "ssd1b_oracle": SSD1B | {  # Table 3's large batch: --teacher and --fake_init are SDXL, --student_init is SSD-1B
        "output_dir": "runs/dmd2_ddil-ssd1b_oracle", "updates": 70_000, "global_batch_size": 64, "batch_size": 2,
        "p_student": (1.0,), "reflect": "none",
    },
}  # fmt: skip
GRAD_CLIP = 10.0  # DMD2's
NOISE_RANGE = 20, 980  # noise levels of the matching gradient, both included
ORIGINS = "noise", "forward", "teacher", "student"  # what a state is: pure noise at 999, or who made it
ENCODER = 0.4  # of a UNet's forward: what the GAN's features cost (SD1.5 .33, SDXL .43 of its FLOPs)

# ----------------------------------------------------------------------------------------------------------------------
# The algorithm. z_t, x_g [B, C, h, w] fp32, t [B] int64; losses come back per sample, [B]
# ----------------------------------------------------------------------------------------------------------------------

Discriminator = Callable[[Tensor, Tensor, dict], Tensor]  # (z_t, t, cond) -> logits [B], high for real images


def reflect_value(x_hat: Tensor, support: Support) -> Tensor:  # DDIL: the student's estimate is reflected too
    """x_hat reflected in its value but not in its gradient: a plain clamp has none outside of the support [D15]."""
    return x_hat + (reflect(x_hat, support) - x_hat).detach()


@torch.no_grad()
def matching_gradient(
    schedule: NoiseSchedule, real: Model, fake: Model, x_g: Tensor, tau: Tensor, cond: dict, support: Support, generator
) -> tuple[Tensor, Tensor, Tensor]:
    """DMD2's gradient at x_g, (x_fake - x_real) / mean |x_g - x_real|, and both scores' estimates before reflection."""
    z_tau, _ = forward_diffuse(schedule, x_g, tau, generator)
    estimates = [x_from_v(schedule, z_tau, score(z_tau, tau, cond), tau) for score in (real, fake)]
    x_real, x_fake = (reflect(x_hat, support) for x_hat in estimates)  # DDIL: reflected, after guidance
    scale = (x_g - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (x_fake - x_real) / scale.clamp(min=1e-3), *estimates  # finite even where the generator is perfect


def gan_gradient(
    schedule: NoiseSchedule, discriminator: Discriminator, x_g: Tensor, cond: dict, generator
) -> tuple[Tensor, Tensor]:
    """(gradient at x_g, losses [B]) of softplus(-logits), on x_g noised to any level; the critic's gradients stay."""
    x_g = x_g.detach().requires_grad_(True)
    t = uniform_timesteps(schedule, len(x_g), generator)
    losses = F.softplus(-discriminator(forward_diffuse(schedule, x_g, t, generator)[0], t, cond))
    return torch.autograd.grad(losses.sum(), x_g)[0], losses.detach()


def student_step(
    schedule: NoiseSchedule,
    real_score: Model,
    fake_score: Model,
    discriminator: Discriminator | None,
    x_g: Tensor,
    cond: dict,
    support: Support,
    gan_weight: float,
    generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's losses on what it generated, x_g with its graph: distribution matching, and GAN if there is one."""
    tau = torch.randint(NOISE_RANGE[0], NOISE_RANGE[1] + 1, (len(x_g),), generator=generator, device=x_g.device)
    g, x_real, x_fake = matching_gradient(schedule, real_score, fake_score, x_g, tau, cond, support, generator)
    losses = 0.5 * (x_g - (x_g - g).detach()).pow(2).mean(dim=(1, 2, 3))  # its gradient at x_g is g over C h w
    notes = {
        "loss_matching": losses.detach(),
        "matching_norm": g.flatten(1).norm(dim=1) / g[0].numel(),
        "moved_real": clipped_fraction(x_real, support),
        "moved_fake": clipped_fraction(x_fake, support),
    }
    if discriminator is not None:
        g, gan_losses = gan_gradient(schedule, discriminator, x_g, cond, generator)
        losses = losses + gan_weight * (x_g * g).sum(dim=(1, 2, 3))  # linear in x_g: has the GAN's gradient there
        notes |= {"loss_gan": gan_losses, "gan_norm": gan_weight * g.flatten(1).norm(dim=1)}
    return losses, notes


def critic_step(
    schedule: NoiseSchedule,
    fake_score: Model,
    discriminator: Discriminator | None,
    x_g: Tensor,
    x: Tensor | None,
    cond: dict,
    gan_weight: float,
    generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's losses: eps-MSE of the fake score on x_g and, with a discriminator, real latents x against x_g."""
    t = uniform_timesteps(schedule, len(x_g), generator)
    z_t, eps = forward_diffuse(schedule, x_g, t, generator)
    losses = (eps_from_v(schedule, z_t, fake_score(z_t, t, cond), t) - eps).pow(2).mean(dim=(1, 2, 3))
    notes = {"loss_fake": losses.detach()}
    if discriminator is not None:
        t = uniform_timesteps(schedule, 2 * len(x_g), generator)
        z_t, _ = forward_diffuse(schedule, torch.cat([x_g, x]), t, generator)
        cond = {name: torch.cat([value, value]) for name, value in cond.items()}
        generated, real = discriminator(z_t, t, cond).chunk(2)  # logits
        gan_losses = F.softplus(generated) + F.softplus(-real)
        losses = losses + gan_weight * gan_losses
        notes |= {"loss_judge": gan_losses.detach(), "logit_generated": generated.detach(), "logit_real": real.detach()}
    return losses, notes


def sample_rollout_length(seed: int, update: int, i: int, n: int) -> int:
    """How many of the student's n timesteps iteration i passes before it trains: uniform, alike on all ranks."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "transitions", update, i))
    return torch.randint(n, (), generator=generator).item()


# DDIL: both models within one trajectory (sec. 4.2)
def draw_actors(prior: SamplingPrior, source: str, part: int, transitions: int, mixed: bool) -> list[str]:
    """Who makes each transition of a trajectory, alike on all ranks [D14]: the source or, if mixed, anyone."""
    if not mixed or source == "forward":
        return [source] * transitions
    p_student, p_teacher = (prior.priors[who][part] for who in ("student", "teacher"))
    rate = p_student / (p_student + p_teacher)
    draws = torch.rand(transitions, generator=prior.generator).tolist()
    return ["student" if draw < rate else "teacher" for draw in draws]


def data_batch(run: Run, need_images: bool) -> tuple[Tensor | None, dict]:
    """(x, cond) of this rank's next images; x is None where their captions are enough."""
    x, ids = run.data.next() if need_images else (None, run.data.next_ids())
    return x, cond_of(run, run.prompts.with_sizes(ids))  # inference's, for real images too


def cond_of(run: Run, ids: Tensor) -> dict:
    return run.prompts.encode(ids) | {"w": torch.full((len(ids),), run.args.guidance_scale, device=run.device)}


def student_states(
    run: Run, student: Model, teacher: Model, grids: tuple, source: str, actors: list[str], x: Tensor | None, cond: dict
) -> tuple[Tensor, Tensor]:
    """(z_t, t) to train the student on, after the moves that `actors` make (Alg. 1 lines 3-5); at 999 z is pure noise
    for every source. grids: the student's and the teacher's timesteps."""
    timesteps, teacher_grid = grids
    n = len(cond["w"])
    t = torch.full((n,), timesteps[len(actors)], device=run.device)
    if source == "forward" and actors:
        return forward_diffuse(run.schedule, x, t, run.rng)[0], t  # DDIL: Alg. 1 line 3
    z = run.start_noise(n)
    for (t_i, s_i), who in zip(pairwise(timesteps), actors):
        if who == "teacher":  # its guided DDIM steps
            path = teacher_grid[teacher_grid.index(t_i) : teacher_grid.index(s_i) + 1]
            z = teacher_rollout(run.schedule, teacher, z, path, cond, run.support)[-1]  # DDIL: Alg. 1 line 4
        else:  # it estimates x and noises it again, as at inference
            z = consistency_rollout(run.schedule, student, z, (t_i, s_i), cond, run.rng)[-1]  # Alg. 1 line 5
    return z, t


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


class GANHead(torch.nn.Sequential):
    """Mid-block features [B, C, h, w] -> logits [B, 1, 1, 1]: strided convolutions to 4 x 4 or less, then over all."""

    def __init__(self, channels: int, height: int, width: int):
        groups = math.gcd(32, channels)
        while groups > 1 and channels // groups < 4:  # at 1 x 1 a group of a single channel would always be 0
            groups //= 2

        def layer(kernel, stride: int, padding: int):
            convolution = torch.nn.Conv2d(channels, channels, kernel, stride, padding)
            return [convolution, torch.nn.GroupNorm(groups, channels), torch.nn.SiLU()]

        layers = []
        while max(height, width) > 4 and min(height, width) > 1:
            layers, height, width = layers + layer(4, 2, 1), height // 2, width // 2
        super().__init__(*layers, *layer((height, width), 1, 0), torch.nn.Conv2d(channels, 1, 1))


class Critic(torch.nn.Module):
    """The fake score's UNet and the GAN's head on its mid block, in one module, so that one engine keeps both in step.

    critic(...) is the UNet's output; with return_logits=True the head's logits, for which the decoder is not run."""

    def __init__(self, unet, head: GANHead | None):
        super().__init__()
        self.unet, self.head, self.config = unet, head, unet.config

    def enable_gradient_checkpointing(self):
        self.unet.enable_gradient_checkpointing()

    def forward(self, *inputs, return_logits: bool = False, **more):
        if return_logits:
            return (self.head(mid_block_features(self.unet, *inputs, **more)),)
        return self.unet(*inputs, **more)


def mid_block_features(unet, *inputs, **more) -> Tensor:
    """[B, C, n, n]: a UNet's forward up to its mid block, whatever its family."""

    class Reached(Exception):
        pass

    def stop(module, args, output):
        raise Reached(output)

    hook = unet.mid_block.register_forward_hook(stop)
    try:
        unet(*inputs, **more)
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()


def make_head(unet, latent: Sequence[int]) -> GANHead:
    """A head for the shape that this UNet's mid block has: all down blocks but the last halve the latents' size."""
    widths, (_, height, width) = unet.config.block_out_channels, latent
    for _ in widths[1:]:
        height, width = -(-height // 2), -(-width // 2)
    return GANHead(widths[-1], height, width)


def make_discriminator(network: UNetModel) -> Discriminator:
    """The critic's network as discriminator(z_t, t, cond) -> logits [B]."""

    def discriminator(z_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        network.forwards += ENCODER * len(z_t)
        return network.run(z_t, t, cond, return_logits=True).flatten()

    return discriminator


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
    refuse_zero_snr(pipe, flag, name)


def load_pipes(run: Run) -> dict:
    """The pipelines of teacher, student and fake score; each folder is loaded once. The teacher's VAE and text encoders
    serve all, so the others keep none."""
    args, loaded = run.args, {run.args.teacher: run.pipe}
    run.check_lora("teacher", run.pipe)
    for flag in ("student_init", "fake_init"):
        path = getattr(args, flag) or args.teacher
        if path not in loaded:
            loaded[path] = load_pipeline(path, f"--{flag}", run.args.resolution)
            check_fit(run.pipe, loaded[path], f"--{flag}", path)
            run.check_lora(flag, loaded[path])
            loaded[path].vae = loaded[path].text_encoder = loaded[path].text_encoder_2 = None
    student, fake = args.student_init or args.teacher, args.fake_init or args.teacher
    refuse_zero_snr(run.pipe, "--teacher", args.teacher)
    if args.gan_weight and loaded[fake].unet.mid_block is None:
        raise SystemExit(f"--fake_init {fake}: its UNet has no mid block, which the GAN looks at; take --gan_weight 0")
    return {"teacher": run.pipe, "student": loaded[student], "fake": loaded[fake]}


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    p, add = flag_parser(__doc__, RECIPES)
    add("--student_init", help="pipeline whose UNet the student starts from (the teacher's)")
    add("--fake_init", help="pipeline whose UNet the fake score starts from (the teacher's)")
    add("--teacher_steps", type=positive_int, help="of the teacher's trajectories (Table 3: 20)")
    add("--student_steps", type=positive_int, help="a divisor of 1000: 4 are 999 749 499 249 (sec. 5: 4)")
    add_prior_flags(add, "DMD2 is --p_student 1 (default: half teacher, half student [D19])")
    yes = {"action": "store_true", "default": None}
    add("--mixed_rollout", **yes, help="choose the model anew at each transition, with these shares (sec. 4.2)")
    add("--guidance_scale", type=non_negative, help="of the teacher (sec. 5: 8)")
    add("--fake_updates", type=positive_int, help="updates of the fake score for each of the student (sec. 5: 10)")
    add("--gan_weight", type=non_negative, help="of the GAN's loss for the student (DMD2: 5e-3); 0: no GAN")
    add("--critic_gan_weight", type=non_negative, help="of the GAN's loss for the critic (DMD2: 1e-2)")
    add_lora_flag(add)
    add("--updates", type=positive_int, help="of the student (sec. 5: 30000)")
    add("--learning_rate", type=positive, help="of student and critic (DMD2: 5e-7, its LoRA: 5e-5 [D13])")
    yes_no = {"action": BooleanOptionalAction}
    add("--lr_decay", **yes_no, help="linear decay to 0 (sec. 5) instead of a constant rate (DMD2) [D13]")
    args = resolve(p.parse_args(argv), RECIPES)
    check_args(args)
    return args


def check_args(args) -> None:
    """What concerns several flags."""
    n, m = args.teacher_steps, args.student_steps
    if 1000 % m or m > 500 or n > 999:
        why = "the first must divide 1000, both be below it, e.g. 4 and 20"
        raise SystemExit(f"--student_steps {m}, --teacher_steps {n}: {why}")
    if off := sorted(set(timestep_grid(m, "trailing")) - set(timestep_grid(n, "trailing")), reverse=True):
        raise SystemExit(f"--teacher_steps {n}: its grid lacks the student's timesteps {off}; take a multiple of {m}")
    resolve_priors(args)
    if args.gan_weight and not args.critic_gan_weight:
        raise SystemExit("--critic_gan_weight 0: nothing would train the GAN's head; --gan_weight must be 0 too")
    if args.recipe == "ssd1b_oracle" and not args.student_init:
        raise SystemExit("--student_init: ssd1b_oracle distils SDXL into a smaller UNet; give that of SSD-1B")


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


class Networks(NamedTuple):
    """The trained networks, and the models as model(z_t, t, cond) -> v_hat."""

    student: TrainableNetwork
    critic: TrainableNetwork
    train_student: Model  # as prepared for training
    rollout_student: Model  # the same weights without the wrapper of distributed training, for rollouts
    real_score: Model  # the frozen teacher under guidance
    fake_score: Model  # as prepared for training
    unwrapped_fake_score: Model  # the same weights without the wrapper, where the critic is asked and not trained
    discriminator: Discriminator | None  # as prepared for training
    unwrapped_discriminator: Discriminator | None


def networks_of(run: Run, pipes: dict) -> Networks:
    """Teacher; student and critic under the engine. With --lora_rank, student and critic are LoRAs on frozen
    UNets, and the critic's with its LoRA switched off is the teacher, if it is the teacher's."""
    predicts = {name: pipe.scheduler.config.prediction_type for name, pipe in pipes.items()}
    rank, shared = run.args.lora_rank, pipes["fake"] is pipes["teacher"]

    def unet_of(name: str):  # a copy, where another network comes from the same pipeline
        unet = pipes[name].unet
        return copy.deepcopy(unet) if [*pipes.values()].count(pipes[name]) > 1 else unet

    student_unet, fake_unet = unet_of("student"), pipes["fake"].unet if rank else unet_of("fake")
    for pipe in pipes.values():
        if pipe is not run.pipe:
            pipe.unet = None  # is trained, or has been copied
    network = run.model(run.prepare_frozen(run.pipe.unet))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.args.seed, "head"))  # alike on all ranks
        head = make_head(fake_unet, latent_shape(run.pipe)) if run.args.gan_weight else None
        for unet in (student_unet, fake_unet):
            add_lora(run.prepare_frozen(unet), rank) if rank else unet.requires_grad_(True)
    teacher = without_lora(network, fake_unet) if rank and shared else network
    real_score = teacher if network.config.time_cond_proj_dim is not None else with_guidance(teacher, run.null)
    student = run.prepare_trainable("student", student_unet)
    critic = run.prepare_trainable("critic", Critic(fake_unet, head))
    scores = run.models_of(critic, predicts["fake"])
    discriminators = [make_discriminator(score) if run.args.gan_weight else None for score in scores]
    return Networks(student, critic, *run.models_of(student, predicts["student"]), real_score, *scores, *discriminators)


def make_preview(run: Run, nets: Networks, grids: list[list[int]]) -> Callable[[], None]:
    """sample(): PNG of teacher and student on the same noise in each column; below, what the two scores make of the
    student's images: where they differ, the student is being pushed from x_fake to x_real."""
    w, timesteps = run.args.guidance_scale, grids[0]

    def teacher_row(grid: list[int]) -> Tensor:
        path = [*grid, CLEAN]
        return run.preview_row(lambda z, cond, _: student_rollout(run.schedule, nets.real_score, z, path, cond)[-1], w)

    @torch.no_grad()
    def student(z: Tensor, cond: dict, noise: torch.Generator) -> Tensor:
        """[n, 3, C, h, w]: x_g of the last step, x_real, x_fake."""
        x_g = consistency_rollout(run.schedule, nets.rollout_student, z, [*timesteps, CLEAN], cond, noise)[-1]
        tau = torch.full((len(z),), 500, device=z.device)
        scores = nets.real_score, nets.unwrapped_fake_score
        _, x_real, x_fake = matching_gradient(run.schedule, *scores, x_g, tau, cond, None, noise)
        return torch.stack([x_g, x_real, x_fake], dim=1)

    rows = {f"teacher, {len(grids[1])} steps": teacher_row(grids[1])}
    rows[f"teacher, {len(timesteps)} steps, undistilled"] = teacher_row(timesteps)
    names = f"student, {len(timesteps)} steps", "x_real of it", "x_fake of it"
    return lambda: run.save_preview(rows | dict(zip(names, run.preview_row(student, w).unbind(dim=1))))


def columns_of(timesteps: list[int]) -> list[str]:
    """The columns of metrics.csv."""
    matching = [f"loss_matching_{origin}" for origin in ORIGINS] + [f"loss_matching_t{t}" for t in timesteps]
    fake = [f"loss_fake_{origin}" for origin in ORIGINS]
    gradients = ["loss_gan", "loss_judge", "matching_norm", "gan_norm", "grad_norm_student", "grad_norm_critic"]
    values = ["logit_real", "logit_generated", "x_mean", "x_g_mean", "x_std", "x_g_std"]
    reflected = ["moved_real", "moved_fake", "moved_student"]
    return ["loss_matching", *matching, "loss_fake", *fake, *gradients, *values, *reflected]


def statistics(x_hat: Tensor, x_g: Tensor, x: Tensor | None, support: Support) -> dict[str, Tensor]:
    """Columns that tell a collapse: mean and spread of what is generated, beside the data's."""
    columns = {"moved_student": clipped_fraction(x_hat, support)}
    for name, latents in (("x_g", x_g), ("x", x)):
        if latents is not None:
            columns |= {f"{name}_mean": latents.mean(dim=(1, 2, 3)), f"{name}_std": latents.std(dim=(1, 2, 3))}
    return columns


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)
    if run.accelerator.mixed_precision == "fp16" and args.gan_weight:
        raise SystemExit("--mixed_precision fp16: too coarse for the GAN's gradient; take bf16, or --gan_weight 0")
    pipes = load_pipes(run)
    grids = [timestep_grid(n, "trailing") for n in (args.student_steps, args.teacher_steps)]
    timesteps = grids[0]
    n, priors = min(args.updates, args.max_updates or args.updates), resolve_priors(args)
    need_images = args.gan_weight > 0 or max(priors["forward"]) > 0  # else prompts alone suffice
    plan = {"sources": priors, "updates in all": f"{n} of the student, {n * args.fake_updates} of the critic"}
    is_critic_s = args.lora_rank and pipes["fake"] is pipes["teacher"]
    plan["networks"] = "student, critic" + (" (without its LoRA the teacher)" if is_critic_s else ", frozen teacher")
    labels = ["total_updates", "unet_forwards", "lr", "seconds"]
    networks = {name: pipe.unet for name, pipe in pipes.items()}
    run.open(__file__, labels, columns_of(timesteps), {"distribution matching": n}, plan, networks, need_images)
    nets = networks_of(run, pipes)
    schedule, noise = run.schedule, run.rng
    models = nets.rollout_student, nets.real_score  # of trajectories: student and teacher
    scores = nets.real_score, nets.unwrapped_fake_score, nets.unwrapped_discriminator
    gan_cost = ENCODER if args.gan_weight else 0
    prior = SamplingPrior(run.shared_rng, **priors)  # DDIL: [D19], [D20]
    for update in run.updates("dmd2", n, args.learning_rate, make_preview(run, nets, grids), args.lr_decay):
        part = part_of(update, n, len(priors["forward"]))
        for i in range(args.fake_updates):  # of the critic; the first one also updates the student
            trains_student, made = i == 0, []
            source = prior.draw(part)  # DDIL: Alg. 1 line 2, one for the iteration, the same on all ranks
            transitions = sample_rollout_length(args.seed, update, i, len(timesteps))  # Alg. 1 line 1: T_s
            actors = draw_actors(prior, source, part, transitions, args.mixed_rollout)
            origin = actors[-1] if actors else "noise"  # whose states these are, for the metrics
            for _ in run.minibatches(nets.student if trains_student else None):
                x, cond = data_batch(run, need_images=source == "forward" or args.gan_weight > 0)
                z_t, t = student_states(run, *models, grids, source, actors, x, cond)  # Alg. 1 lines 3-5
                with torch.set_grad_enabled(trains_student):
                    student = nets.train_student if trains_student else nets.rollout_student
                    x_hat = consistency_function(schedule, student, z_t, t, cond)
                    x_g = reflect_value(x_hat, run.support)
                if trains_student:  # Alg. 1 line 6
                    losses, notes = student_step(schedule, *scores, x_g, cond, run.support, args.gan_weight, noise)
                    run.backward(losses, cost=2 + gan_cost)
                    columns = f"loss_matching_{origin}", f"loss_matching_t{timesteps[transitions]}"
                    run.add_metrics(notes | dict.fromkeys(columns, notes["loss_matching"]))
                run.add_metrics(statistics(x_hat.detach(), x_g.detach(), x, run.support))
                made.append((x_g.detach(), x, cond))  # the one forward feeds both updates
            if trains_student:
                run.step(nets.student, GRAD_CLIP, "grad_norm_student")
            for _, (x_g, x, cond) in zip(run.minibatches(nets.critic), made):
                inputs = nets.fake_score, nets.discriminator, x_g, x, cond, args.critic_gan_weight, noise
                losses, notes = critic_step(schedule, *inputs)
                run.backward(losses, cost=2 + 4 * gan_cost, of="critic")  # the GAN: back through twice as many samples
                run.add_metrics(notes | {f"loss_fake_{origin}": notes["loss_fake"]})
            run.step(nets.critic, GRAD_CLIP, "grad_norm_critic")

    final = run.unwrap_full_network(nets.student)
    w = str(args.guidance_scale if final.config.time_cond_proj_dim is not None else 1.0)
    if run.accelerator.is_main_process:
        final = run.save_lora(final, args.student_init or args.teacher) if args.lora_rank else final
        scheduler = lcm_scheduler(pipes["student"], args.student_steps)
        run.save_student(run.out / "pipeline", final, scheduler, args.student_steps, w)
    run.end(args.student_steps, w, float(w))


if __name__ == "__main__":
    main()
