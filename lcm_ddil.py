"""Latent consistency distillation with imitation learning: sample a guided diffusion model in 1 to 8 steps; and LCM-LoRA.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1, Algorithm 1, sec. 4.2, 5.
LCM: Latent Consistency Models, arXiv:2310.04378.

    laptop, minutes     accelerate launch lcm_ddil.py
    one GPU             accelerate launch --mixed_precision bf16 lcm_ddil.py --recipe sd15 --teacher PIPELINE --data IMAGES
    eight GPUs          accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 lcm_ddil.py --recipe sd15
                        --batch_size 45 ...

paper                                            code
  Alg. 1    line 2, [D14] one source a mini-batch  common.SamplingPrior.draw
  Alg. 1    line 3, forward diffusion              forward_batch, common.forward_states
  Alg. 1    line 4, the teacher's trajectory       teacher_batch, common.teacher_rollout
  Alg. 1    line 5, the student's trajectory       student_batch, common.consistency_rollout
  Alg. 1    line 6, the loss                       consistency_step
  LCM       f = c_skip z + c_out x                 common.consistency_function
  LCM       guidance scale as an input             common.guidance_embedding, common.with_w_embedding
  sec. 4.1  reflected distillation [D15]           common.reflect in common.ddim_step, common.consistency_function
  sec. 5    n drawn from {3, 4, 5}                 draw_stop
  sec. 5    priors, schedule [D12]                 RECIPES, common.part_of

Plain LCM is --p_forward 1. What the paper adds to it: grep "# DDIL:" lcm_ddil.py common.py
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from common import (
    CLEAN, LatentData, Metrics, Model, NoiseSchedule, PromptEncoder, SamplingPrior, StopRequest, Support, UNetModel,
    accumulation_of, activation_memory, betas_of, check_engine, check_memory, check_output_dir, check_shared_flags,
    clip_gradient, compile_networks, consistency_function, consistency_rollout, count_of, create_output_dir,
    ddim_step, drop_prompts, fingerprint, forward_states, frozen_dtype, frozen_parameters, last_checkpoint,
    latent_shape, learning_rate, load_images, load_pipeline, load_schedule, load_state, memory_report, noise_of,
    noting, open_data, part_of, prepare_adamw, priors_of, rank_state, reflect_warning, refuse_changes,
    replace_folder, report_on_data, resolve, restore_rank, save_checkpoint, save_grid, save_pipeline, seed_of,
    select, shards_of, start_accelerator, student_rollout, support_of, teacher_rollout, timestep_grid, updates_of,
    wait_for_output_dir, whole, whole_network, with_guidance, with_w_embedding,
)  # fmt: skip

# Every number of the paper (sec. 5), and what the embedded default uses instead. Any flag overrides its recipe. [D12]
PAPER = dict(
    teacher_steps=50, student_steps=4, rollout_steps=(3, 4, 5), p_forward=(0.75, 0.5), p_teacher=(0.0,), p_student=None,
    loss="huber", huber_c=0.001, ema_decay=0.95, prompt_dropout=0.0, lora_rank=0, store_start=False, forward_control=False,
    reflect="measured", seed=0, report_to=None, streaming=False, image_column=None, caption_column=None, compile=False,
)  # fmt: skip
SD15 = PAPER | dict(
    teacher=None, data=None, output_dir="runs/lcm_ddil-sd15", updates=8000, guidance_range=(6.0, 16.0), global_batch_size=360,
    batch_size=60, learning_rate=1e-5, warmup=500, eval_guidance_scale=8.0, gradient_checkpointing=True, cache_latents=False,
    log_every=50, save_every=500,
)  # fmt: skip
RECIPES = {
    "tiny": PAPER | dict(
        teacher="assets/tiny/pipeline", data="assets/tiny/data", output_dir="runs/lcm_ddil-tiny", updates=1500,
        guidance_range=(1.5, 6.0), global_batch_size=32, batch_size=None, learning_rate=3e-4, warmup=50,
        eval_guidance_scale=4.0, gradient_checkpointing=False, cache_latents=True, log_every=50, save_every=250,
    ),
    "sd15": SD15,
    "ssd1b": SD15 | dict(output_dir="runs/lcm_ddil-ssd1b", batch_size=15),  # "SSD1B-LCM" of Table 3: numbers not in paper
}  # fmt: skip
# May differ when a run is resumed; the teacher's path too, as its weights are compared.
RUN_FLAGS = ("teacher", "output_dir", "compile", "log_every", "save_every", "report_to")
GRAD_CLIP = 1.0  # [D18]
LORA_GUIDANCE = 7.5  # [D12]: a LoRA has no input for w
LORA_MODULES = [  # LCM-LoRA's: attention, feed-forward and residual layers; neither conv_in, conv_out nor the time embedding
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--recipe", help=f"table of defaults: {', '.join(RECIPES)} (default tiny: all offline, CPU, minutes)")
    paper = p.add_argument_group("paper")
    paper.add_argument("--teacher", help="pipeline to distil: folder or hub name; it may take w already, as a PD run's stages/gc")
    paper.add_argument("--data", help="images with captions: folder (parquet, imagefolder, webdataset) or hub name")
    paper.add_argument("--teacher_steps", type=int, help="steps of the solver grid, a divisor of 1000, at most 500 (LCM: 50)")
    paper.add_argument("--student_steps", type=int, help="steps of the sample grids; the student takes any number (sec. 5: 4)")
    paper.add_argument("--rollout_steps", type=int, nargs="+", help="n of the student's rollouts is one of these (sec. 5: 3 4 5)")
    paper.add_argument("--p_forward", type=float, nargs="+", help="share of forward diffusion, a list for equal parts of the run (.75 .5 [D12]); 1 = plain LCM")
    paper.add_argument("--p_teacher", type=float, nargs="+", help="share of the teacher's trajectories (0)")
    paper.add_argument("--p_student", type=float, nargs="+", help="share of the student's trajectories (what the others leave)")
    paper.add_argument("--store_start", action="store_true", default=None, help="the pure noise at 999 may be drawn from a rollout too [D12]")
    paper.add_argument("--forward_control", action="store_true", default=None, help="in place of rollouts, forward diffusion to the same timesteps: what a DDIL run is to be compared with [D16]")
    paper.add_argument("--reflect", help="threshold for x estimates: measured | none | a radius (App. A; [D15])")
    paper.add_argument("--guidance_range", type=float, nargs=2, help="w ~ U[lo, hi] in training (LCM: 6 16 [D12]); for a LoRA one number twice (7.5 7.5)")
    paper.add_argument("--loss", choices=("huber", "l2"), help="distance of the two estimates (LCM: huber)")
    paper.add_argument("--huber_c", type=float, help="c of sqrt(d^2 + c^2) - c (LCM: 0.001)")
    paper.add_argument("--ema_decay", type=float, help="of the target network; 0: the student itself, and no copy (LCM: .95)")
    paper.add_argument("--prompt_dropout", type=float, help="share of prompts replaced by the empty one (not in paper: 0)")
    paper.add_argument("--lora_rank", type=int, help="train a LoRA of this rank instead of a UNet; 0: none (LCM-LoRA: 64)")
    paper.add_argument("--updates", type=int, help="in all (sec. 5: 8000)")
    paper.add_argument("--global_batch_size", type=int, help="samples an update, over all processes (sec. 5: 360)")
    paper.add_argument("--learning_rate", type=float, help="peak (sec. 5: 1e-5)")
    paper.add_argument("--warmup", type=int, help="updates of warm-up (500)")
    run = p.add_argument_group("run")
    run.add_argument("--batch_size", type=int, help="samples a process and forward; accumulation makes up the global batch")
    run.add_argument("--output_dir", help="run folder (default runs/lcm_ddil-RECIPE)")
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
    run.add_argument("--eval_guidance_scale", type=float, help="w of the sample grids")
    run.add_argument("--log_every", type=int, help="updates between lines and rows of metrics.csv")
    run.add_argument("--save_every", type=int, help="updates between checkpoints and sample grids")
    run.add_argument("--report_to", help="a tracker that accelerate knows (tensorboard, wandb, ...); default none")
    args = p.parse_args(argv)
    given = copy.copy(args)
    args = resolve(args, RECIPES, RUN_FLAGS)
    if args.lora_rank and not args.resume:  # no input for w, and no moving average: the target is the student itself
        args.guidance_range = tuple(given.guidance_range or (LORA_GUIDANCE, LORA_GUIDANCE))
        args.ema_decay, args.eval_guidance_scale = given.ema_decay or 0.0, args.guidance_range[0]
    check_args(args)
    return args


def check_args(args) -> None:
    """One clear message for what cannot work, before anything is loaded or written."""
    n = args.teacher_steps
    if not 1 <= n <= 500 or 1000 % n:
        raise SystemExit(f"--teacher_steps {n}: the solver's steps must divide 1000 and be at most 500, e.g. 50")
    least = 1 if args.store_start else 2
    for name, values, low in (("student_steps", [args.student_steps], 1), ("rollout_steps", args.rollout_steps, least)):
        off = [value for value in values if not low <= value <= n]
        if off:
            raise SystemExit(f"--{name} {off[0]}: the sampler's timesteps would leave the solver grid; give {low} to {n} steps")
    check_shared_flags(args, priors=("p_forward", "p_teacher", "p_student"))
    if min(priors_of(args)["forward"]) == 1 and args.forward_control:
        raise SystemExit(f"--forward_control: with --p_forward {args.p_forward} there are no rollouts to replace; this is plain LCM")
    for name in ("learning_rate", "huber_c"):
        if not 0 < getattr(args, name) < float("inf"):
            raise SystemExit(f"--{name} {getattr(args, name)}: must be > 0 and finite")
    if not args.updates > 0:
        raise SystemExit(f"--updates {args.updates}: must be > 0")
    if not 0 <= args.ema_decay < 1:
        raise SystemExit(f"--ema_decay {args.ema_decay}: must lie in [0, 1)")
    if not 0 <= args.prompt_dropout <= 1:
        raise SystemExit(f"--prompt_dropout {args.prompt_dropout}: must lie in [0, 1]")
    if args.lora_rank < 0:
        raise SystemExit(f"--lora_rank {args.lora_rank}: must be >= 0; 0 trains the whole UNet")
    if args.lora_rank and args.guidance_range[0] != args.guidance_range[1]:
        raise SystemExit(f"--guidance_range {args.guidance_range}: a LoRA has no input for w; give one number twice, or leave it "
                         f"at {LORA_GUIDANCE}")  # fmt: skip
    if args.lora_rank and args.ema_decay:
        raise SystemExit(f"--ema_decay {args.ema_decay}: a LoRA's target is the student itself; leave the flag out")


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm. z_t [B, C, h, w] fp32, t [B] int64; losses come back per sample, [B]
# ----------------------------------------------------------------------------------------------------------------------


def sampler_timesteps(n: int, solver_grid: list[int]) -> list[int]:
    """LCMScheduler's n timesteps, n points of the solver grid: 4 of 50 -> [999, 759, 499, 259]."""
    return [solver_grid[int(i * (len(solver_grid) / n))] for i in range(n)]  # in floating point, as NumPy's linspace


def distance(a: Tensor, b: Tensor, loss: str, c: float) -> Tensor:
    """Mean over each sample of the pseudo-Huber sqrt(d^2 + c^2) - c, or of d^2."""
    d2 = (a - b) ** 2
    return (d2 if loss == "l2" else (d2 + c**2).sqrt() - c).mean(dim=(1, 2, 3))


def consistency_step(
    schedule: NoiseSchedule, student: Model, target: Model, teacher: Model, z_t: Tensor, t: Tensor, s: Tensor, cond: dict,
    support: Support, loss: str, huber_c: float,
) -> Tensor:  # fmt: skip
    """LCM's loss: the student's estimate at z_t is to equal the target's where one teacher step leads, z_s (Alg. 1 line 6)."""
    with torch.no_grad():
        z_s = ddim_step(schedule, z_t, teacher(z_t, t, cond), t, s, support)
        x_target, inner = z_s.clone(), s != CLEAN  # at the clean end the estimate is z_s itself
        if inner.any():
            x_target[inner] = consistency_function(schedule, target, z_s[inner], s[inner], select(cond, inner), support)
    x_hat = consistency_function(schedule, student, z_t, t, cond)  # not reflected: a clamp has no gradient outside
    return distance(x_hat, x_target, loss, huber_c)


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def sampler_of(pipe, teacher_steps: int):
    """The sampler that the saved student carries: with the solver grid as its own, whatever the number of steps."""
    from diffusers import LCMScheduler

    return LCMScheduler(**betas_of(pipe), prediction_type=pipe.scheduler.config.prediction_type,
                        original_inference_steps=teacher_steps, clip_sample=False, steps_offset=1)  # fmt: skip


def check_sampler(pipe, args, solver_grid: list[int]) -> None:
    """Every timestep of the stock sampler must be a point of the solver grid, or nothing was learned there."""
    for n in {args.student_steps, *args.rollout_steps}:
        sampler = sampler_of(pipe, args.teacher_steps)
        sampler.set_timesteps(n)
        off = sorted(set(sampler.timesteps.tolist()) - set(solver_grid))
        if off:
            raise SystemExit(f"--teacher_steps {args.teacher_steps}: LCMScheduler's timesteps {off} of {n} steps are not on the solver "
                             "grid")  # fmt: skip


def add_lora(unet, rank: int):
    """The UNet itself with a LoRA; its second factor starts at zero, so the output is the same at first."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_MODULES))
    return unet


def without_lora(model: Model, unet) -> Model:
    """The frozen model inside of one that carries a LoRA."""

    def frozen(z_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        unet.disable_adapters()
        try:
            return model(z_t, t, cond)
        finally:
            unet.enable_adapters()

    return frozen


def expected_forwards(args, has_w: bool) -> float:
    """UNet forwards of all updates, as metrics.csv counts them: of single samples, a backward pass as two."""
    guided, grid, priors = (1 if has_w else 2), timestep_grid(args.teacher_steps, "trailing"), priors_of(args)
    share = {source: sum(values) / len(values) for source, values in priors.items()}
    student = teacher = 0.0
    for n in args.rollout_steps:  # mean way to z_t, over the points at which a rollout may stop
        stops = sampler_timesteps(n, grid)[0 if args.store_start else 1 :]
        student += sum(range(n)) / len(stops) / len(args.rollout_steps)
        teacher += guided * sum(grid.index(t) for t in stops) / len(stops) / len(args.rollout_steps)
    rollouts = 0 if args.forward_control else share["student"] * student + share["teacher"] * teacher
    update = 3 + guided + 1 + rollouts  # student, teacher, target
    return updates_of(args) * args.global_batch_size * update


def memory_of(args, pipe, accelerator, activations: float | None = None) -> str:
    """GiB of the networks and their optimiser in each process, beside the device's."""
    unet = trained = pipe.unet.num_parameters()
    if args.lora_rank:
        with torch.device("meta"):  # to be counted only
            blank = type(pipe.unet).from_config(pipe.unet.config)
            trained = sum(p.numel() for p in add_lora(blank.requires_grad_(False), args.lora_rank).parameters() if p.requires_grad)
    others = frozen_parameters(pipe)
    frozen = 4 if args.lora_rank else frozen_dtype(accelerator).itemsize  # a LoRA's teacher is the UNet under it
    gib = (16 * trained / shards_of(accelerator) + frozen * unet + 4 * unet * (args.ema_decay > 0) + 4 * others) / 2**30
    what = "student, gradient and AdamW (16 bytes a trained parameter), teacher, target, VAE and text encoders"
    return memory_report(gib, what, accelerator.device, activations)


def describe(args, pipe, n_images: int | str, accelerator) -> str:
    """What --dry_run prints: resolved recipe, batch arithmetic, parameters and memory."""
    unet = pipe.unet.num_parameters()
    others = frozen_parameters(pipe)
    has_w, world_size = pipe.unet.config.time_cond_proj_dim is not None, accelerator.num_processes
    accumulation = args.global_batch_size // (args.batch_size * world_size)
    activations = activation_memory(pipe, pipe.unet, args.batch_size, accelerator, args.gradient_checkpointing)
    rows = {name: value for name, value in sorted(vars(args).items())} | {
        "": "",
        "images": n_images,
        "batch": f"{world_size} processes x {args.batch_size} x {accumulation} accumulated = {args.global_batch_size}",
        "updates in all": updates_of(args),
        "UNet forwards in all": f"{expected_forwards(args, has_w):.3g} samples, a backward pass counted as two",
        "parameters": f"UNet {unet / 1e6:.1f}M, VAE and text encoders {others / 1e6:.1f}M",
        "memory a process": memory_of(args, pipe, accelerator, activations),
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
    pipe: object  # the teacher's pipeline: VAE, text encoders, scheduler config
    schedule: NoiseSchedule
    solver_grid: list[int]
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
    t_columns: list[str]  # of the metrics, from data to noise: the loss of t in (previous one, t]
    t_bins: Tensor

    def draw_cond(self, ids: Tensor) -> dict:
        """cond of token ids, each with a w of its own."""
        (lo, hi), n = self.args.guidance_range, len(ids)
        w = lo + (hi - lo) * torch.rand(n, generator=self.noise, device=self.noise.device)
        return drop_prompts(self.prompts.encode(ids), self.null, self.args.prompt_dropout, self.noise) | {"w": w}


class Networks(NamedTuple):
    """The models, as model(z_t, t, cond) -> v_hat."""

    teacher: Model  # frozen, under guidance
    student: Model  # as prepared for training
    rolling: Model  # the same weights without the wrapper of distributed training, for rollouts
    target: Model  # their moving average, or `rolling` itself
    ema: torch.nn.Module | None  # the average's network
    counted: list[UNetModel]  # the networks behind the models
    rows: dict[str, Tensor]  # the teacher's rows of the sample grids


def forward_batch(run: Run, timesteps: list[int]) -> tuple[Tensor, Tensor, dict]:
    """(z_t, t, cond) by forward diffusion of data to any of these timesteps (Alg. 1 line 3)."""
    x, ids = run.data.next()
    cond = run.draw_cond(ids)
    grid = torch.tensor(timesteps, device=x.device)
    t = grid[torch.randint(len(grid), (len(x),), generator=run.noise, device=x.device)]
    return forward_states(run.schedule, x, t, run.noise)[0], t, cond


# DDIL: the next three functions
def draw_stop(run: Run) -> list[int]:
    """A rollout's timesteps up to the point that becomes z_t: n steps, n from {3, 4, 5}, stopped at one of them [D12]."""
    choices = run.args.rollout_steps
    n = choices[torch.randint(len(choices), (), generator=run.shared)]
    j = torch.randint(0 if run.args.store_start else 1, n, (), generator=run.shared)  # alike on all ranks [D14]
    return sampler_timesteps(n, run.solver_grid)[: j + 1]


def student_batch(run: Run, nets: Networks) -> tuple[Tensor, Tensor, dict]:
    """(z_t, t, cond) of the student's own sampling, stopped on its way (Alg. 1 line 5)."""
    timesteps, cond = draw_stop(run), run.draw_cond(run.data.next_ids())
    z = torch.randn(len(cond["w"]), *latent_shape(run.pipe), generator=run.noise, device=run.noise.device)
    z_t = consistency_rollout(run.schedule, nets.rolling, z, timesteps, cond, run.noise)[-1]
    return z_t, torch.full((len(z),), timesteps[-1], device=z.device), cond


def teacher_batch(run: Run, nets: Networks) -> tuple[Tensor, Tensor, dict]:
    """(z_t, t, cond) of the teacher's DDIM trajectory on the solver grid, stopped where the student's would be (Alg. 1 line 4)."""
    t_stop, cond = draw_stop(run)[-1], run.draw_cond(run.data.next_ids())
    z = torch.randn(len(cond["w"]), *latent_shape(run.pipe), generator=run.noise, device=run.noise.device)
    path = run.solver_grid[: run.solver_grid.index(t_stop) + 1]
    z_t = teacher_rollout(run.schedule, nets.teacher, z, path, cond, run.support)[-1]
    return z_t, torch.full((len(z),), t_stop, device=z.device), cond


def losses_of(run: Run, source: str, nets: Networks) -> tuple[Tensor, Tensor]:
    """(losses [B], timesteps [B]) of one mini-batch."""
    args = run.args
    if source == "forward":
        z_t, t, cond = forward_batch(run, run.solver_grid)
    elif args.forward_control:  # a rollout's timesteps without the rollout [D16]
        z_t, t, cond = forward_batch(run, draw_stop(run)[-1:])
    else:
        z_t, t, cond = (student_batch if source == "student" else teacher_batch)(run, nets)  # DDIL: Alg. 1 lines 4, 5
    s = t - 1000 // args.teacher_steps  # the next point of the solver grid; after its last one, 19 - 20 = CLEAN
    losses = consistency_step(
        run.schedule, nets.student, nets.target, nets.teacher, z_t, t, s, cond, run.support, args.loss, args.huber_c
    )  # fmt: skip
    return losses, t


@torch.no_grad()
def update_target(ema: torch.nn.Module, student: torch.nn.Module, decay: float) -> None:
    """target <- decay target + (1 - decay) student, which may be sharded."""
    for average, value in zip(ema.parameters(), student.parameters(), strict=True):
        average.lerp_(whole(value), 1 - decay)


def update_student(run: Run, source: str, nets: Networks, trained, optimizer) -> None:
    """One update on the global mini-batch, all of it from one source. Raises FloatingPointError on a non-finite loss."""
    for model in nets.counted:
        model.forwards = 0
    for _ in range(run.accelerator.gradient_accumulation_steps):
        with run.accelerator.accumulate(trained):
            losses, t = losses_of(run, source, nets)
            loss = losses.mean()
            mean_loss = run.accelerator.reduce(loss.detach(), "mean")
            if not torch.isfinite(mean_loss):  # the same verdict on all ranks
                raise FloatingPointError(f"the loss is {mean_loss.item()} on {source} states")
            run.accelerator.backward(loss)
            if run.accelerator.sync_gradients:
                norm = clip_gradient(run.accelerator, trained, GRAD_CLIP)
                if run.accelerator.scaler is None and not torch.isfinite(norm):  # fp16's scaler skips such updates
                    raise FloatingPointError(f"the gradient's norm is {norm.item()} on {source} states")
                run.metrics.add("grad_norm", norm)
            optimizer.step()
            optimizer.zero_grad()
        losses = losses.detach()
        run.metrics.add("loss", losses)
        run.metrics.add(f"loss_{source}", losses)
        run.metrics.add("t_mean", t)
        run.metrics.add_by(run.t_columns, torch.bucketize(t, run.t_bins), losses)
        run.progress["forwards"] += 2 * len(losses)  # the backward pass; forwards are counted by the networks
    if nets.ema is not None:
        update_target(nets.ema, run.accelerator.unwrap_model(trained), run.args.ema_decay)
    run.progress["forwards"] += sum(model.forwards for model in nets.counted)


def train(run: Run, nets: Networks, prior: SamplingPrior, trained, optimizer) -> bool:
    """All updates, with logs, checkpoints and sample grids; False if the run is asked to stop."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    updates, folder, parts = updates_of(args), Path(args.output_dir) / "checkpoints", len(priors_of(args)["forward"])
    bar = tqdm(total=updates, initial=progress["total"], desc="lcm", disable=not accelerator.is_main_process,
               dynamic_ncols=True)  # fmt: skip
    with bar:
        clock = time.time()
        for update in range(progress["total"], updates):
            lr, part = learning_rate(update, updates, args.warmup, args.learning_rate), part_of(update, updates, parts)
            for group in optimizer.param_groups:
                group["lr"] = lr
            source = prior.draw(part)  # Alg. 1 line 2: one for the mini-batch, the same on all ranks
            try:
                update_student(run, source, nets, trained, optimizer)
            except FloatingPointError as error:
                bar.close()
                raise SystemExit(f"update {update + 1}: {error}; stopped. The last good checkpoint: "
                                 f"{last_checkpoint(folder) or 'none yet'}; a lower --learning_rate may help")  # fmt: skip
            progress["total"] = update + 1
            bar.update()
            if progress["total"] % args.log_every == 0 or update + 1 == updates:
                means = run.metrics.flush(
                    accelerator, part=part + 1, total_updates=progress["total"],
                    unet_forwards=progress["forwards"] * accelerator.num_processes, lr=f"{lr:.3g}",
                    seconds=f"{time.time() - clock:.2f}",
                )  # fmt: skip
                clock = time.time()
                accelerator.log(means, step=progress["total"])
                if accelerator.is_main_process:
                    tqdm.write(f"part {part + 1}: {update + 1}/{updates} loss {means['loss']:.4f} lr {lr:.1e}")
                    is_first, is_last = progress["total"] <= args.log_every, update + 1 == updates
                    if run.support and (is_first or is_last):
                        moved = {"teacher": means["moved_by_reflect"], "target": means.get("moved_in_target", 0.0)}
                        if warning := reflect_warning(args.reflect, moved, is_last):
                            tqdm.write(warning)
            stop, due = run.stop.agreed(accelerator), progress["total"] % args.save_every == 0 or update + 1 == updates
            if stop or due:
                save(run, student=(trained, optimizer), **({} if nets.ema is None else {"target": (nets.ema,)}))
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
    """Position and this rank's state; weights and optimiser are loaded by prepare."""
    run.progress.update(json.loads((checkpoint / "progress.json").read_text()))
    restore_rank(run, load_state(checkpoint / f"rank-{run.accelerator.process_index}.pt"))


def grid_cond(run: Run) -> tuple[Tensor, dict]:
    """Noise and cond of the sample grids: eight held-out prompts, one w."""
    n, device = min(8, len(run.held_out)), run.accelerator.device
    captions = [run.held_out[i * len(run.held_out) // n] for i in range(n)]
    w = torch.full((n,), run.args.eval_guidance_scale, device=device)
    cond = run.prompts.encode(run.prompts.tokenize(captions)) | {"w": w}
    return noise_of(range(n), latent_shape(run.pipe), seed=1).to(device), cond


def save_samples(run: Run, nets: Networks) -> None:
    """PNG of teacher and student, on the same noise in each column."""
    z, cond = grid_cond(run)
    grid = [*sampler_timesteps(run.args.student_steps, run.solver_grid), CLEAN]
    noise = torch.Generator(z.device).manual_seed(1)
    student = consistency_rollout(run.schedule, nets.rolling, z, grid, cond, noise)[-1]  # on all ranks: it may be sharded
    rows = nets.rows | {f"student, {run.args.student_steps} steps": student}
    if run.accelerator.is_main_process:
        save_grid(Path(run.args.output_dir) / "samples" / f"{run.progress['total']:06d}.png", run.pipe, rows)


def prepare(run: Run, unet, prediction_type: str, checkpoint: Path | None):
    """(nets, trained, optimizer): teacher, student under the engine, target; from a checkpoint if there is one."""
    args, accelerator, device = run.args, run.accelerator, run.accelerator.device
    has_w = unet.config.time_cond_proj_dim is not None
    if args.lora_rank:
        student_unet = frozen_unet = add_lora(unet.to(device), args.lora_rank)
    else:
        student_unet = (copy.deepcopy(unet) if has_w else with_w_embedding(unet)).to(device).requires_grad_(True)
        half = frozen_dtype(accelerator)
        frozen_unet = unet.to(device, half)
    student_unet.train()
    if args.gradient_checkpointing:
        student_unet.enable_gradient_checkpointing()
    network = UNetModel(frozen_unet, run.schedule, prediction_type, accelerator.autocast)
    frozen = without_lora(network, frozen_unet) if args.lora_rank else network
    guided = frozen if has_w else with_guidance(frozen, run.null)

    ema = copy.deepcopy(student_unet).requires_grad_(False) if args.ema_decay else None
    if checkpoint:
        student_unet.load_state_dict(load_state(checkpoint / "student.pt"))
        if ema is not None:
            ema.load_state_dict(load_state(checkpoint / "target.pt"))
    if args.compile:
        compile_networks(*{student_unet, frozen_unet, ema} - {None})
    trained, optimizer = prepare_adamw(accelerator, student_unet, checkpoint and checkpoint / "student_optimizer.pt")
    student = UNetModel(trained, run.schedule, prediction_type, accelerator.autocast)
    rolling = UNetModel(accelerator.unwrap_model(trained), run.schedule, prediction_type, accelerator.autocast)
    target = rolling if ema is None else UNetModel(ema, run.schedule, prediction_type, accelerator.autocast)
    z, cond = grid_cond(run)
    few = sampler_timesteps(args.student_steps, run.solver_grid)
    rows = {f"teacher, {len(grid)} steps": student_rollout(run.schedule, guided, z, [*grid, CLEAN], cond)[-1]
            for grid in (run.solver_grid, few)}  # fmt: skip
    noted = run.schedule, run.support, run.metrics
    teacher, noted_target = noting(guided, *noted, "moved_by_reflect"), noting(target, *noted, "moved_in_target")
    counted = [network, student, rolling] + [target] * (target is not rolling)
    return Networks(teacher, student, rolling, noted_target, ema, counted, rows), trained, optimizer


def setup(args, accelerator: Accelerator) -> Run | None:
    """Load and check everything, then make the run folder; None if the flags ask for a report only."""
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    check_engine(accelerator)
    if args.lora_rank and accelerator.is_fsdp2:
        raise SystemExit(f"--lora_rank {args.lora_rank}: has no use for shards, the frozen UNet is most of it; launch with --multi_gpu")
    if not args.ema_decay and accelerator.is_fsdp2:  # a rank may have no sample to ask the target about, and would not gather its shards
        raise SystemExit("--ema_decay 0: FSDP shards the student, which cannot be the target then; give a decay, or launch with --multi_gpu")
    facts = {"world_size": world_size, "mixed_precision": accelerator.mixed_precision}
    if args.resume:
        refuse_changes(facts, json.loads((Path(args.output_dir) / "config.json").read_text()))
    accelerator.gradient_accumulation_steps = accumulation_of(args, world_size)
    if accelerator.is_main_process and not (args.dry_run or args.check_data):
        check_output_dir(args)

    pipe = load_pipeline(args.teacher)
    has_w = pipe.unet.config.time_cond_proj_dim is not None
    if type(pipe.scheduler).__name__ in ("LCMScheduler", "TCDScheduler"):
        raise SystemExit(f"--teacher {args.teacher}: is an LCM already ({type(pipe.scheduler).__name__}); give the model it is from")
    if has_w and args.lora_rank:
        raise SystemExit(f"--lora_rank {args.lora_rank}: --teacher {args.teacher} takes w, for which a LoRA has no input")
    schedule = load_schedule(pipe).to(device)
    if schedule.alpha.min() == 0 and pipe.scheduler.config.prediction_type == "epsilon":
        raise SystemExit(f"--teacher {args.teacher}: predicts epsilon and has zero terminal SNR; that needs v-prediction")
    solver_grid = timestep_grid(args.teacher_steps, "trailing")
    check_sampler(pipe, args, solver_grid)
    dataset, held_out = load_images(
        args.data, streaming=args.streaming, image_column=args.image_column, caption_column=args.caption_column
    )
    if max(priors_of(args)["forward"]) == 0 and not args.store_start:
        accelerator.print("warning: nothing is trained at 999, where sampling starts: --store_start or a --p_forward above 0 adds it")
    if args.dry_run and accelerator.is_main_process:
        print(describe(args, pipe, count_of(dataset), accelerator))
    if args.check_data:
        accelerator.print(report_on_data(args, pipe, dataset, accelerator))
    if args.dry_run or args.check_data:
        return None

    check_memory(memory_of(args, pipe, accelerator))
    out = Path(args.output_dir)
    set_seed(args.seed, device_specific=True)
    noise = torch.Generator(device).manual_seed(seed_of(args.seed, "rank", rank))
    prompts = PromptEncoder(pipe, device)
    data = open_data(args, pipe, prompts, rank, world_size, noise, dataset, cache=args.cache_latents)
    bins = [*range(99, 1000, 100)]
    t_columns = [f"loss_t{t}" for t in bins]
    metrics = Metrics(
        out / "metrics.csv", ["part", "total_updates", "unet_forwards", "lr", "seconds"],
        ["loss", "loss_forward", "loss_teacher", "loss_student", *t_columns, "t_mean", "grad_norm", "moved_by_reflect",
         "moved_in_target"], device,
    )  # fmt: skip
    run = Run(
        args, accelerator, pipe, schedule, solver_grid, support_of(args.reflect, data), prompts, prompts.null(), held_out, data,
        noise, torch.Generator().manual_seed(seed_of(args.seed, "shared")), metrics, StopRequest(), dict(total=0, forwards=0),
        t_columns, torch.tensor(bins, device=device),
    )  # fmt: skip
    facts["teacher_weights"] = fingerprint(pipe.unet)
    if args.resume:
        refuse_changes(facts, json.loads((out / "config.json").read_text()))
    elif accelerator.is_main_process:
        create_output_dir(args, __file__, facts)
    wait_for_output_dir(accelerator, out)
    if args.report_to:
        accelerator.init_trackers("lcm_ddil", config={name: str(value) for name, value in vars(args).items()})
    return run


def save_student(run: Run, unet) -> None:
    """pipeline/ in stock diffusers' format; of a LoRA its weights alone in lora/, and the pipeline with them fused."""
    out = Path(run.args.output_dir)
    if run.args.lora_rank:
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(unet)
        replace_folder(out / "lora", lambda folder: run.pipe.save_lora_weights(folder, unet_lora_layers=layers))
        run.pipe.unet = load_pipeline(run.args.teacher).unet
        run.pipe.load_lora_weights(out / "lora")
        run.pipe.fuse_lora()
        run.pipe.unload_lora_weights()
        unet = run.pipe.unet
    save_pipeline(out / "pipeline", run.pipe, unet, sampler_of(run.pipe, run.args.teacher_steps))


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
    nets, trained, optimizer = prepare(run, run.pipe.unet, run.pipe.scheduler.config.prediction_type, checkpoint)
    if not checkpoint:
        save_samples(run, nets)
    prior = SamplingPrior(run.shared, **priors_of(args))  # DDIL: Alg. 1 lines 2-5
    if not train(run, nets, prior, trained, optimizer):
        accelerator.end_training()
        return
    unet = whole_network(accelerator, trained, type(run.pipe.unet))
    if accelerator.is_main_process:
        save_student(run, unet)
    w = "1.0" if args.lora_rank else "{} to {}".format(*args.guidance_range)
    accelerator.print(f"done: {out / 'pipeline'} samples in {args.student_steps} steps, guidance_scale {w}")
    if args.lora_rank:
        accelerator.print(f"{out / 'lora'} is for an LCMScheduler with original_inference_steps={args.teacher_steps}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
