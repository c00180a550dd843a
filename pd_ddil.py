"""Progressive distillation with imitation learning: halve the steps of a guided diffusion model, 32 -> 16 -> 8 -> 4.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1, Algorithms 1-3, sec. 5, App. A.

    laptop, minutes     accelerate launch pd_ddil.py --teacher_steps 32
    one GPU             accelerate launch --mixed_precision bf16 pd_ddil.py --recipe sd15 --teacher PIPELINE --data IMAGES
    eight GPUs          accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 pd_ddil.py --recipe sd15 ...

paper                                            code
  sec. 5    eps -> v conversion                    v_step
  sec. 5    guidance conditioning (Meng et al.)    guidance_step, common.guidance_embedding
  Alg. 1    line 2, [D14] one source a mini-batch  common.SamplingPrior.draw
  Alg. 1/3  forward diffusion                      common.forward_states
  Alg. 2    mixed trajectories -> D_DAgger         collect, common.mixed_rollout, common.TrajectoryBuffer
  Alg. 3    lines 7, 8: the teacher's two steps    teacher_landing
  Alg. 3    lines 6, 9, 10 and Eq. 3: the loss     pd_step
  Alg. 3    lines 1, 2, 12: stages                 plan_phases, main, open_phase
  Alg. 3    lines 3, 11: updates, D_DAgger anew    train_part, update_student, dagger_batch
  sec. 4.1  reflected distillation [D15]           common.reflect, common.ddim_step
  App. A    priors and schedule, two parts         RECIPES, plan_phases

Plain PD is --p_forward 1. What the paper adds to it: grep "# DDIL:" pd_ddil.py common.py
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from common import (
    CLEAN, LatentData, Metrics, Model, NoiseSchedule, PromptEncoder, SamplingPrior, StopRequest, Support,
    TrajectoryBuffer, UNetModel, accumulation_of, activation_memory, any_timesteps, check_engine, check_memory,
    check_output_dir, check_shared_flags, clip_gradient, compile_networks, count_of, create_output_dir, ddim_step,
    dpm_solver, drop_prompts, fingerprint, forward_states, frozen_dtype, frozen_parameters, in_order, last_checkpoint,
    latent_shape, learning_rate, load_images, load_pipeline, load_schedule, load_state, memory_report, mixed_rollout,
    noise_of, noting, open_data, prepare_adamw, rank_state, reflect_v, reflect_warning, refuse_changes,
    report_on_data, resolve, restore_rank, rotation, save_checkpoint, save_grid, save_pipeline, seed_of, shards_of,
    start_accelerator, student_rollout, support_of, timestep_grid, wait_for_output_dir, whole_network,
    with_guidance, with_w_embedding,
)  # fmt: skip

# Every number of the paper (sec. 5, App. A), and what the embedded default uses instead. Any flag overrides its recipe.
# `updates` of a phase: one number for each of its parts; halvings are named by the steps of their student.
PAPER_PRIORS = dict(p_forward=(0.75, 0.5), student_rate=(0.15, 0.8), reuse=2)  # App. A; reuse: [D17]
RECIPES = {
    "tiny": dict(
        teacher="assets/tiny/pipeline", data="assets/tiny/data", output_dir="runs/pd_ddil-tiny", **PAPER_PRIORS,
        updates={"v": [250], "gc": [400], "16": [150], "8": [200, 100], "4": [250, 150], "2": [250, 150], "1": [250, 150]},
        guidance_range=(1.5, 6.0), global_batch_size=32, batch_size=None, learning_rate=(5e-4, 1e-4), warmup=20,
        buffer_size=1024, eval_prompts=128, eval_guidance_scale=4.0, gradient_checkpointing=False, cache_latents=True,
        log_every=20, save_every=100,
    ),
    "sd15": dict(
        teacher=None, data=None, output_dir="runs/pd_ddil-sd15", **PAPER_PRIORS,
        updates={"v": [4000], "gc": [6000],  # [D18]: "10K steps overall"
                 "16": [5000], "8": [6000, 4000], "4": [8000, 6000], "2": [8000, 6000], "1": [8000, 6000]},
        guidance_range=(2.0, 14.0), global_batch_size=224, batch_size=28, learning_rate=(1e-5,), warmup=500,
        buffer_size=1024, eval_prompts=128, eval_guidance_scale=8.0, gradient_checkpointing=True, cache_latents=False,
        log_every=50, save_every=500,
    ),
}  # fmt: skip
COMMON_DEFAULTS = dict(teacher_steps=32, student_steps=4, reflect="measured", store_start=False, forward_control=False, seed=0,
                       report_to=None, streaming=False, image_column=None, caption_column=None, compile=False)  # fmt: skip
RECIPES = {name: COMMON_DEFAULTS | recipe for name, recipe in RECIPES.items()}
# May differ when a run is resumed; the teacher's path too, as its weights are compared.
RUN_FLAGS = ("teacher", "output_dir", "compile", "log_every", "save_every", "report_to")
GRAD_CLIP, CAPTION_DROPOUT = 1.0, 0.1  # [D18]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--recipe", help=f"table of defaults: {', '.join(RECIPES)} (default tiny: all offline, CPU, minutes)")
    paper = p.add_argument_group("paper")
    paper.add_argument("--teacher", help="pipeline to distil: folder or hub name; v-prediction or a w embedding skip their phase")
    paper.add_argument("--data", help="images with captions: folder (parquet, imagefolder, webdataset) or hub name")
    paper.add_argument("--teacher_steps", type=int, help="N, steps of the first teacher (sec. 5: 32)")
    paper.add_argument("--student_steps", type=int, help="steps of the last student (sec. 5: 4 or 2)")
    paper.add_argument("--p_forward", type=float, nargs="+", help="share of forward diffusion, one value or one a part (App. A: .75 .5); 1 = plain PD")
    paper.add_argument("--student_rate", type=float, nargs="+", help="Alg. 2's beta: how often the student moves (App. A: .15 .8)")
    paper.add_argument("--reuse", type=float, help="R, mean uses of a collected state [D17] (not in paper; 2)")
    paper.add_argument("--store_start", action="store_true", default=None, help="store the pure-noise state at 999 too [D16]")
    paper.add_argument("--forward_control", action="store_true", default=None, help="in place of D_DAgger's states, forward diffusion to the same timesteps: what a DDIL run is to be compared with [D16]")
    paper.add_argument("--buffer_size", type=int, help="states that D_DAgger holds on each process (not in paper)")
    paper.add_argument("--reflect", help="threshold for x estimates: measured | none | a radius (App. A; [D15])")
    paper.add_argument("--guidance_range", type=float, nargs=2, help="w ~ U[lo, hi] in training (sec. 5: 2 14)")
    paper.add_argument("--updates", nargs="+", metavar="PHASE=U[,U]", help="updates of a phase's parts, e.g. v=4000 8=6000,4000")
    paper.add_argument("--global_batch_size", type=int, help="samples an update, over all processes (sec. 5: 224)")
    paper.add_argument("--learning_rate", type=float, nargs="+", help="peak of each part, or two: before the halvings, and in them (sec. 5: 1e-5)")
    paper.add_argument("--warmup", type=int, help="updates of warm-up in each part (sec. 5: 500)")
    run = p.add_argument_group("run")
    run.add_argument("--batch_size", type=int, help="samples a process and forward; accumulation makes up the global batch")
    run.add_argument("--output_dir", help="run folder (default runs/pd_ddil-RECIPE)")
    run.add_argument("--seed", type=int, help="of everything random")
    run.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    run.add_argument("--overwrite", action="store_true", help="delete the run in output_dir first")
    run.add_argument("--dry_run", action="store_true", help="print the resolved recipe, phases and memory, then stop")
    run.add_argument("--check_data", action="store_true", help="print how many samples are usable and why others are not, draw some to OUTPUT_DIR-data.png, then stop")
    run.add_argument("--max_updates", type=int, help="end each part after so many updates (for tests)")
    run.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="trade time for memory")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for all UNets: minutes at the start, faster updates")
    run.add_argument("--cache_latents", action=argparse.BooleanOptionalAction, help="encode all images once and keep their latents on disk, for later runs too")
    run.add_argument("--streaming", action=argparse.BooleanOptionalAction, help="read the data in order while training; nothing is copied or cached")
    run.add_argument("--image_column", help="of the data (default: its first column of images)")
    run.add_argument("--caption_column", help="of the data (default: caption, text, txt or prompt)")
    run.add_argument("--eval_prompts", type=int, help="held-out prompts of the paired trajectory error")
    run.add_argument("--eval_guidance_scale", type=float, help="w of the sample grids")
    run.add_argument("--log_every", type=int, help="updates between lines and rows of metrics.csv")
    run.add_argument("--save_every", type=int, help="updates between checkpoints and sample grids")
    run.add_argument("--report_to", help="a tracker that accelerate knows (tensorboard, wandb, ...); default none")
    args = p.parse_args(argv)
    updates = dict(item.partition("=")[::2] for item in args.updates or ())
    args.updates = None  # merged into the recipe's below, phase by phase
    args = resolve(args, RECIPES, RUN_FLAGS)
    try:
        merged = args.updates | {phase: [int(u) for u in values.split(",")] for phase, values in updates.items()}
    except ValueError:
        raise SystemExit(f"--updates {updates}: must read PHASE=U or PHASE=U,U with whole numbers, e.g. 8=6000,4000")
    if args.resume:
        refuse_changes({"updates": merged}, {"updates": args.updates})
    args.updates = merged
    check_args(args)
    return args


def check_args(args) -> None:
    """One clear message for what cannot work, before anything is loaded or written."""
    n, m = args.teacher_steps, args.student_steps
    if n < 1 or m < 1 or n % m or (n // m) & (n // m - 1) or n == m:
        raise SystemExit(f"--teacher_steps {n}: must be --student_steps ({m}) times a power of two, e.g. {4 * max(m, 1)}")
    if n > 256:
        raise SystemExit(f"--teacher_steps {n}: must be at most 256, so that the grids nest")
    check_shared_flags(args, priors=("p_forward", "student_rate"))
    for name in ("p_forward", "student_rate"):
        if len(getattr(args, name)) not in (1, 2):
            raise SystemExit(f"--{name} {getattr(args, name)}: give one value, or one for each of the two parts")
    if len(args.learning_rate) > 2 or not all(0 < value < float("inf") for value in args.learning_rate):
        raise SystemExit(f"--learning_rate {args.learning_rate}: give one or two values, > 0 and finite")
    if args.forward_control and min(args.p_forward) == 1:
        raise SystemExit(f"--forward_control: with --p_forward {args.p_forward} there are no trajectories to replace; this is plain PD")
    for name in ("reuse", "buffer_size", "eval_prompts"):
        if not 0 < getattr(args, name) < float("inf"):
            raise SystemExit(f"--{name} {getattr(args, name)}: must be > 0 and finite")
    known = {"v", "gc", *halvings(n, m)} | set(RECIPES["tiny"]["updates"])
    for phase, updates in args.updates.items():
        if phase not in known or not 1 <= len(updates) <= 2 or min(updates) < 1:
            raise SystemExit(f"--updates {phase}={updates}: phases are {', '.join(sorted(known))}; give each one or two "
                             "parts, of 1 update or more")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm. z_t [B, C, h, w] fp32, t [B] int64; losses come back per sample, [B]
# ----------------------------------------------------------------------------------------------------------------------


def v_step(schedule: NoiseSchedule, student: Model, x: Tensor, cond: dict, null: dict, generator) -> tuple[Tensor, Tensor]:
    """Phase (a), eps -> v: plain v-loss on data, some captions dropped so that the null prompt converts too [D18]."""
    t = any_timesteps(schedule, len(x), generator)
    cond = drop_prompts(cond, null, CAPTION_DROPOUT, generator)
    z_t, eps = forward_states(schedule, x, t, generator)
    alpha_t, sigma_t = schedule.at(t)
    v = alpha_t * eps - sigma_t * x
    return (student(z_t, t, cond) - v).pow(2).mean(dim=(1, 2, 3)), t


def guidance_step(
    schedule: NoiseSchedule, student: Model, guided: Model, x: Tensor, cond: dict, support: Support, generator
) -> tuple[Tensor, Tensor]:
    """Phase (b), guidance conditioning: one network learns the CFG output for every w (Meng et al., stage 1)."""
    t = any_timesteps(schedule, len(x), generator)
    z_t, _ = forward_states(schedule, x, t, generator)
    with torch.no_grad():
        v = reflect_v(schedule, z_t, guided(z_t, t, cond), t, support)  # DDIL: thresholding after CFG (App. A)
    return (student(z_t, t, cond) - v).pow(2).mean(dim=(1, 2, 3)), t


@torch.no_grad()
def teacher_landing(
    schedule: NoiseSchedule, teacher: Model, z_t: Tensor, t: Tensor, m: Tensor, s: Tensor, cond: dict, support: Support
) -> Tensor:
    """z_s where the teacher's two reflected DDIM steps t -> m -> s lead from z_t (Alg. 3 line 8)."""
    z_m = ddim_step(schedule, z_t, teacher(z_t, t, cond), t, m, support)
    return ddim_step(schedule, z_m, teacher(z_m, m, cond), m, s, support)


def pd_step(schedule: NoiseSchedule, student: Model, z_t: Tensor, z_s: Tensor, t: Tensor, s: Tensor, cond: dict) -> Tensor:
    """Eq. 3 (Alg. 3 lines 6, 9, 10): the student's one step t -> s is to land where the teacher's two did, on z_s."""
    c, d = rotation(schedule, t, s)
    v_target = (c * z_t - z_s) / d  # Alg. 3 line 9, as v: exactly the one from which DDIM goes z_t -> z_s [D18]
    v_s = student(z_t, t, cond)  # Alg. 3 line 6
    alpha_t, sigma_t = schedule.at(t)
    weight = torch.maximum(alpha_t**2, sigma_t**2)  # max(1, SNR) |x_s - x_target|^2 in terms of v [D18]
    return (weight * (v_s - v_target) ** 2).mean(dim=(1, 2, 3))  # Alg. 3 line 10


# ----------------------------------------------------------------------------------------------------------------------
# Phases, models, evaluation
# ----------------------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    name: str  # "v", "gc", or the student's steps: "16", "8", ...
    updates: list[int]  # of each part
    p_forward: list[float]  # of each part
    student_rate: list[float]


def halvings(teacher_steps: int, student_steps: int) -> list[str]:
    """Students' steps, e.g. 32, 4 -> ["16", "8", "4"]."""
    n, names = teacher_steps, []
    while n > student_steps:
        n //= 2
        names.append(str(n))
    return names


def plan_phases(args, prediction_type: str, has_w: bool) -> list[Phase]:
    """The phases that this teacher still needs, with App. A's priors in each part [D8]."""
    names = ["v"] * (prediction_type != "v_prediction") + ["gc"] * (not has_w)
    phases = [Phase(name, args.updates[name], [1.0], [0.0]) for name in names]
    for name in halvings(args.teacher_steps, args.student_steps):
        updates = args.updates.get(name, args.updates["16"])  # a number of steps that the recipe does not list
        p_forward, rate = ([*v, *v][:2][: len(updates)] for v in (args.p_forward, args.student_rate))
        if name == "1" and not args.store_start:  # [D16]: one step visits nothing but the start, so this is plain PD
            p_forward = [1.0] * len(updates)
        phases.append(Phase(name, updates, p_forward, rate))
    if args.max_updates:
        phases = [p._replace(updates=[min(u, args.max_updates) for u in p.updates]) for p in phases]
    return phases


def sampler_of(pipe):
    """The sampler that the saved stages carry: DDIM."""
    return dpm_solver(pipe, "v_prediction", order=1)


class Evaluation:
    """Fixed held-out prompts, noises and w; end points of stages/gc, against which every student is paired."""

    def __init__(self, args, accelerator, schedule, prompts, captions, shape):
        n = min(args.eval_prompts, len(captions))
        self.accelerator, self.schedule, self.prompts, self.batch_size = accelerator, schedule, prompts, args.batch_size
        self.teacher_steps, self.grid_w = args.teacher_steps, args.eval_guidance_scale
        self.ids = prompts.tokenize([captions[i * len(captions) // n] for i in range(n)])
        self.z = noise_of(range(n), shape, seed=1)
        lo, hi = args.guidance_range
        self.w = lo + (hi - lo) * torch.rand(n, generator=torch.Generator().manual_seed(1))
        self.file = Path(args.output_dir) / "paired_reference.safetensors"

    @torch.no_grad()
    def end_points(self, model: Model, steps: int, n: int | None = None, w: float | None = None) -> Tensor:
        """End points [n, C, h, w] of `steps` DDIM steps from the first n noises; the work is split over the ranks."""
        n, device, grid = n or len(self.z), self.accelerator.device, [*timestep_grid(steps), CLEAN]

        def ends_of(rows: Tensor) -> Tensor:
            w_rows = self.w[rows] if w is None else torch.full((len(rows),), w)
            cond = self.prompts.encode(self.ids[rows]) | {"w": w_rows.to(device)}
            return student_rollout(self.schedule, model, self.z[rows].to(device), grid, cond)[-1]

        return torch.cat([*in_order(self.accelerator, n, self.batch_size, ends_of)])

    def grid_row(self, model: Model, steps: int) -> Tensor:
        """The first eight prompts at the grid's own guidance scale, for a picture."""
        return self.end_points(model, steps, min(8, len(self.z)), self.grid_w)

    def make_reference(self, gc: Model, students: list[int]) -> None:
        """stages/gc at teacher_steps, and sampled, undistilled, at the students' steps; kept in a file of the run."""
        ends = {str(steps): self.end_points(gc, steps) for steps in (self.teacher_steps, *students)}
        ends |= {f"grid_{steps}": self.grid_row(gc, steps) for steps in (self.teacher_steps, *students)}
        if self.accelerator.is_main_process:
            save_file(ends, self.file.with_suffix(".tmp"))
            self.file.with_suffix(".tmp").rename(self.file)
        wait_for_output_dir(self.accelerator, self.file)

    def reference(self, name: str) -> Tensor:
        return load_file(self.file)[name].to(self.accelerator.device)

    def paired_error(self, ends: Tensor) -> float:
        """RMS distance in latent space to stages/gc at teacher_steps, from the same noise, prompt and w."""
        return (ends - self.reference(str(self.teacher_steps))).pow(2).mean().sqrt().item()


def expected_forwards(args, phases: list[Phase]) -> float:
    """UNet forwards of all updates, as metrics.csv counts them: of single samples, a backward pass as two."""
    total = 0.0
    for phase in phases:
        for part, updates in enumerate(phase.updates):
            student, teacher = 3, 0 if phase.name == "v" else 2  # its guidance, or its two steps
            p, rate = phase.p_forward[part], phase.student_rate[part]
            if p < 1 and not args.forward_control:
                # what a trajectory takes: the teacher is asked at each stored state, and moves the others alone
                stored = len(stored_intervals(args, int(phase.name)))
                unstored = int(phase.name) - stored
                trajectory = unstored * (rate + 2 * (1 - rate)) + (stored - 1) * (2 + rate) + 2
                teacher = p * teacher + (1 - p) * trajectory / stored / args.reuse
            total += updates * args.global_batch_size * (student + teacher)
    return total


def memory_of(args, pipe, accelerator, activations: float | None = None) -> str:
    """GiB of the networks and their optimiser in each process, beside the device's."""
    unet, frozen = pipe.unet.num_parameters(), frozen_dtype(accelerator).itemsize
    others = frozen_parameters(pipe)
    state = 2 * 4 * torch.Size(latent_shape(pipe)).numel()  # z_t and z_s in fp32
    gib = (16 * unet / shards_of(accelerator) + frozen * unet + 4 * others + args.buffer_size * state) / 2**30
    what = "student, gradient and AdamW (16 bytes a parameter), teacher, VAE, text encoders and D_DAgger"
    return memory_report(gib, what, accelerator.device, activations)


def describe(args, phases: list[Phase], pipe, n_images: int | str, accelerator) -> str:
    """What --dry_run prints: resolved recipe, phases, batch arithmetic, parameters and memory."""
    unet = pipe.unet.num_parameters()
    others = frozen_parameters(pipe)
    world_size = accelerator.num_processes
    accumulation = args.global_batch_size // (args.batch_size * world_size)
    activations = activation_memory(pipe, pipe.unet, args.batch_size, accelerator, args.gradient_checkpointing)
    rows = {name: value for name, value in sorted(vars(args).items())} | {
        "": "",
        "images": n_images,
        "batch": f"{world_size} processes x {args.batch_size} x {accumulation} accumulated = {args.global_batch_size}",
        **{f"phase {p.name}": f"{p.updates} updates, p_forward {p.p_forward}, student_rate {p.student_rate}" for p in phases},
        "updates in all": sum(sum(p.updates) for p in phases),
        "UNet forwards in all": f"{expected_forwards(args, phases):.3g} samples, a backward pass counted as two",
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
    support: Support
    prompts: PromptEncoder
    null: dict
    data: LatentData
    noise: torch.Generator  # this rank's own
    shared: torch.Generator  # alike on all ranks [D14]
    buffer: TrajectoryBuffer  # D_DAgger
    metrics: Metrics
    evaluation: Evaluation
    stop: StopRequest
    progress: dict
    t_columns: list[str]  # of the metrics, from data to noise: the loss of t in (previous one, t]
    t_bins: Tensor

    def draw_w(self, n: int) -> Tensor:
        lo, hi = self.args.guidance_range
        return lo + (hi - lo) * torch.rand(n, generator=self.noise, device=self.noise.device)

    def data_batch(self) -> tuple[Tensor, Tensor, dict]:
        """(x, ids, cond) of this rank's next images, each with a w of its own."""
        x, ids = self.data.next()
        return x, ids, self.prompts.encode(ids) | {"w": self.draw_w(len(x))}


class Networks(NamedTuple):
    """The models of a phase, as model(z_t, t, cond) -> v_hat."""

    teacher: Model  # frozen; under guidance until a student has learned it
    student: Model  # as prepared for training
    rolling: Model  # the same weights without the wrapper of distributed training, for rollouts
    tau: list[int]  # the teacher's grid with CLEAN (halvings)
    counted: list[UNetModel]  # the networks behind the models
    rows: dict[str, Tensor]  # the teacher's rows of the sample grids


def stored_intervals(args, steps: int) -> range:
    """Intervals of the student's grid whose states D_DAgger holds: not the pure noise at 999 that all start from [D16]."""
    return range(0 if args.store_start else 1, steps)


def forward_batch(run: Run, nets: Networks, intervals: range) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
    """(z_t, z_s, t, s, cond) by forward diffusion of data: Alg. 3 lines 5, 7, 8."""
    x, _, cond = run.data_batch()
    tau = torch.tensor(nets.tau, device=x.device)
    j = torch.randint(intervals.start, intervals.stop, (len(x),), generator=run.noise, device=x.device)  # t on the student's grid [D5]
    t, m, s = tau[2 * j], tau[2 * j + 1], tau[2 * j + 2]  # Alg. 3 line 7
    z_t, _ = forward_states(run.schedule, x, t, run.noise)  # Alg. 3 line 5
    z_s = teacher_landing(run.schedule, nets.teacher, z_t, t, m, s, cond, run.support)  # Alg. 3 line 8
    return z_t, z_s, t, s, cond


# DDIL: the next two functions
def dagger_batch(run: Run, nets: Networks, student_rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
    """(z_t, z_s, t, s, cond) from D_DAgger (Alg. 3 line 4), which is refreshed so that a state is used R times."""
    batch_size = run.args.batch_size
    while run.progress["credit"] < batch_size:  # Alg. 3 line 11
        rows = collect(run, nets, student_rate)
        run.buffer.add(**rows, born=torch.full_like(rows["w"], run.progress["total"]))
        run.progress["credit"] += len(rows["w"]) * run.args.reuse
    run.progress["credit"] -= batch_size
    rows = run.buffer.sample(batch_size, run.noise)
    run.metrics.add("buffer_age", run.progress["total"] - rows["born"])
    tau = torch.tensor(nets.tau, device=rows["j"].device)
    t, s = tau[2 * rows["j"]], tau[2 * rows["j"] + 2]
    return rows["z_t"], rows["z_s"], t, s, run.prompts.encode(rows["ids"]) | {"w": rows["w"]}


def collect(run: Run, nets: Networks, student_rate: float) -> dict[str, Tensor]:
    """Rows for D_DAgger by one rollout of Alg. 2: states before each transition [D16] and, as their targets never
    change within a stage, where the teacher lands from them [D17]."""
    stored = stored_intervals(run.args, len(nets.tau) // 2)
    ids = run.data.next_ids()
    n, cond = len(ids), run.prompts.encode(ids) | {"w": run.draw_w(len(ids))}  # one w for a trajectory
    z = torch.randn(n, *latent_shape(run.pipe), generator=run.noise, device=run.noise.device)  # Alg. 2 line 1
    states, landings, moves = mixed_rollout(
        run.schedule, nets.teacher, nets.rolling, z, nets.tau, nets.tau[::2], cond, student_rate, run.shared,
        run.support, query=stored,
    )  # fmt: skip
    run.metrics.add("student_moves", torch.cat(moves).float() if moves else torch.zeros(0))
    return dict(  # Alg. 2 line 6
        # trajectory by trajectory: a full buffer lets go of the oldest ones whole, not of their noisier states first
        z_t=torch.stack([states[j] for j in stored], dim=1).flatten(0, 1),
        z_s=torch.stack([landings[j] for j in stored], dim=1).flatten(0, 1),
        j=torch.tensor(stored, device=z.device).repeat(n),
        w=cond["w"].repeat_interleave(len(stored)), ids=ids.repeat_interleave(len(stored), dim=0),
    )  # fmt: skip


def losses_of(run: Run, phase: Phase, part: int, source: str, nets: Networks) -> tuple[Tensor, Tensor]:
    """(losses [B], timesteps [B]) of one mini-batch of this phase."""
    if phase.name == "v":
        x, _, cond = run.data_batch()
        return v_step(run.schedule, nets.student, x, cond, run.null, run.noise)
    if phase.name == "gc":
        x, _, cond = run.data_batch()
        return guidance_step(run.schedule, nets.student, nets.teacher, x, cond, run.support, run.noise)
    if source == "forward":
        z_t, z_s, t, s, cond = forward_batch(run, nets, range(int(phase.name)))
    elif run.args.forward_control:  # D_DAgger's timesteps without its trajectories [D16]
        z_t, z_s, t, s, cond = forward_batch(run, nets, stored_intervals(run.args, int(phase.name)))
    else:
        z_t, z_s, t, s, cond = dagger_batch(run, nets, phase.student_rate[part])  # DDIL: Alg. 3 line 4
    return pd_step(run.schedule, nets.student, z_t, z_s, t, s, cond), t


def update_student(run: Run, phase: Phase, part: int, source: str, nets: Networks, trained, optimizer) -> None:
    """One update on the global mini-batch, all of it from one source. Raises FloatingPointError on a non-finite loss."""
    for model in nets.counted:
        model.forwards = 0
    for _ in range(run.accelerator.gradient_accumulation_steps):
        with run.accelerator.accumulate(trained):
            losses, t = losses_of(run, phase, part, source, nets)
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
            optimizer.step()  # Alg. 3 line 11
            optimizer.zero_grad()
        losses = losses.detach()
        run.metrics.add("loss", losses)
        run.metrics.add(f"loss_{source}", losses)
        run.metrics.add("t_mean", t)  # D_DAgger shifts the marginal of t, as it has no start states [D16]
        run.metrics.add_by(run.t_columns, torch.bucketize(t, run.t_bins), losses)
        run.progress["forwards"] += 2 * len(losses)  # the backward pass; forwards are counted by the networks
    run.progress["forwards"] += sum(model.forwards for model in nets.counted)


def train_part(run: Run, phase: Phase, part: int, nets: Networks, prior: SamplingPrior, trained, optimizer) -> bool:
    """The updates of one part, with logs, checkpoints and sample grids; False if the run is asked to stop."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    updates, folder = phase.updates[part], Path(args.output_dir) / "checkpoints"
    peak = args.learning_rate[-1 if phase.name.isdigit() else 0]
    bar = tqdm(total=updates, initial=progress["update"], desc=f"{phase.name} part {part + 1}/{len(phase.updates)}",
               disable=not accelerator.is_main_process, dynamic_ncols=True)  # fmt: skip
    with bar:
        clock = time.time()
        for update in range(progress["update"], updates):
            lr = learning_rate(update, updates, args.warmup, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            source = prior.draw(part)  # Alg. 1 line 2: one for the mini-batch, the same on all ranks
            try:
                update_student(run, phase, part, source, nets, trained, optimizer)
            except FloatingPointError as error:
                bar.close()
                raise SystemExit(f"phase {phase.name}, part {part + 1}, update {update + 1}: {error}; stopped. The last good "
                                 f"checkpoint: {last_checkpoint(folder) or 'none yet'}; a lower --learning_rate may help")  # fmt: skip
            progress |= {"update": update + 1, "total": progress["total"] + 1}
            bar.update()
            if progress["total"] % args.log_every == 0 or update + 1 == updates:
                means = run.metrics.flush(
                    accelerator, phase=phase.name, part=part + 1, update=update + 1, total_updates=progress["total"],
                    unet_forwards=progress["forwards"] * accelerator.num_processes, buffer_size=len(run.buffer),
                    lr=f"{lr:.3g}", seconds=f"{time.time() - clock:.2f}",
                )  # fmt: skip
                clock = time.time()
                accelerator.log({f"{phase.name}/{name}": mean for name, mean in means.items()}, step=progress["total"])
                if accelerator.is_main_process:
                    tqdm.write(f"{phase.name} part {part + 1}: {update + 1}/{updates} loss {means['loss']:.4f} lr {lr:.1e}")
                    is_first, is_last = update < args.log_every, update + 1 == updates
                    if run.support and (is_first or is_last) and "moved_by_reflect" in means:
                        if warning := reflect_warning(args.reflect, {"teacher": means["moved_by_reflect"]}, is_last):
                            tqdm.write(warning)
            stop, due = run.stop.agreed(accelerator), progress["total"] % args.save_every == 0 and update + 1 < updates
            if stop or due:
                save(run, student=(trained, optimizer))
            if due:
                save_samples(run, phase, nets)
            if stop:
                bar.close()
                accelerator.print(f"stopped after update {progress['total']}, phase {phase.name}: saved; --resume goes on")
                return False
    return True


def save(run: Run, **trained) -> None:
    """A checkpoint of everything: --resume gives the weights that an unbroken run would have."""
    mine = rank_state(run) | {"buffer": run.buffer.state_dict()}
    folder = Path(run.args.output_dir) / "checkpoints"
    save_checkpoint(run.accelerator, folder, run.progress["total"], run.progress, mine, **trained)


def restore(run: Run, checkpoint: Path) -> None:
    """Position and this rank's state; weights and optimiser are loaded by the part that goes on."""
    run.progress.update(json.loads((checkpoint / "progress.json").read_text()))
    mine = load_state(checkpoint / f"rank-{run.accelerator.process_index}.pt")
    restore_rank(run, mine)
    run.buffer.load_state_dict(mine["buffer"], run.accelerator.device)


def save_samples(run: Run, phase: Phase, nets: Networks) -> None:
    """PNG of the phase's teacher and student, on the same noise in each column."""
    student = with_guidance(nets.rolling, run.null) if phase.name == "v" else nets.rolling
    steps = int(phase.name) if phase.name.isdigit() else run.args.teacher_steps
    rows = nets.rows | {f"student, {steps} steps": run.evaluation.grid_row(student, steps)}
    if run.accelerator.is_main_process:
        name = f"{run.progress['total']:06d}-{phase.name}.png"
        save_grid(Path(run.args.output_dir) / "samples" / name, run.pipe, rows)


def open_phase(run: Run, phase: Phase, source: Path) -> tuple[UNetModel, Model, torch.nn.Module]:
    """(network, teacher, student's UNet) of a phase that distils the pipeline folder `source`."""
    device, autocast = run.accelerator.device, run.accelerator.autocast
    pipe = load_pipeline(str(source))
    student_unet = with_w_embedding(pipe.unet) if phase.name == "gc" else copy.deepcopy(pipe.unet)  # Alg. 3 line 2
    student_unet.to(device).requires_grad_(True).train()
    if run.args.gradient_checkpointing:
        student_unet.enable_gradient_checkpointing()
    half = frozen_dtype(run.accelerator)
    if run.args.compile:
        compile_networks(student_unet, pipe.unet)
    network = UNetModel(pipe.unet.to(device, half), run.schedule, pipe.scheduler.config.prediction_type, autocast)
    guided = network if phase.name.isdigit() else with_guidance(network, run.null)
    teacher = noting(guided, run.schedule, run.support, run.metrics, "moved_by_reflect")
    return network, teacher, student_unet


def prepare_part(
    run: Run, phase: Phase, network: UNetModel, teacher: Model, student_unet, rows: dict, checkpoint: Path | None = None
):
    """(nets, trained, optimizer): the student under the engine, with the part's own optimiser [D7]."""
    accelerator = run.accelerator
    accelerator.free_memory()  # the engine, too, holds on to what it prepared for the part before
    if checkpoint and (run.progress["part"] or run.progress["update"]):
        student_unet.load_state_dict(load_state(checkpoint / "student.pt"))
    state = checkpoint / "student_optimizer.pt" if checkpoint and run.progress["update"] else None
    trained, optimizer = prepare_adamw(accelerator, student_unet, state)
    student = UNetModel(trained, run.schedule, "v_prediction", accelerator.autocast)
    rolling = UNetModel(accelerator.unwrap_model(trained), run.schedule, "v_prediction", accelerator.autocast)
    tau = [*timestep_grid(2 * int(phase.name)), CLEAN] if phase.name.isdigit() else []
    return Networks(teacher, student, rolling, tau, [network, student, rolling], rows), trained, optimizer


def train_phase(run: Run, phase: Phase, source: Path, gc: Path, checkpoint: Path | None):
    """One phase from the pipeline folder `source`, in its parts; returns the trained UNet, or None if asked to stop."""
    accelerator, evaluation, n = run.accelerator, run.evaluation, run.args.teacher_steps
    network, teacher, student_unet = open_phase(run, phase, source)
    if phase.name.isdigit():
        if not evaluation.file.exists():
            students = [int(name) for name in halvings(n, run.args.student_steps)]
            unet = load_pipeline(str(gc)).unet.to(accelerator.device)
            evaluation.make_reference(UNetModel(unet, run.schedule, "v_prediction", accelerator.autocast), students)
            del unet  # or each device would keep it for the whole phase
        rows = {f"gc, {steps} steps": evaluation.reference(f"grid_{steps}") for steps in (n, int(phase.name))}
    else:
        rows = {f"teacher, {n} steps": evaluation.grid_row(with_guidance(network, run.null), n)}

    prior = SamplingPrior(run.shared, forward=phase.p_forward, dagger=[1 - p for p in phase.p_forward])  # DDIL: App. A
    for part in range(run.progress["part"], len(phase.updates)):
        nets = trained = optimizer = None  # let go of the part before
        nets, trained, optimizer = prepare_part(run, phase, network, teacher, student_unet, rows, checkpoint)
        checkpoint = None
        if part == 0 and run.progress["update"] == 0:
            save_samples(run, phase, nets)
        if not train_part(run, phase, part, nets, prior, trained, optimizer):
            return None
        run.progress |= {"part": part + 1, "update": 0}
        if part + 1 < len(phase.updates):
            save(run, student=(trained, optimizer))

    save_samples(run, phase, nets)
    if phase.name.isdigit():
        m = int(phase.name)
        errors = {"paired_error": evaluation.paired_error(evaluation.end_points(nets.rolling, m)),
                  "paired_error_undistilled": evaluation.paired_error(evaluation.reference(str(m)))}  # fmt: skip
        errors = {name: f"{error:.5f}" for name, error in errors.items()}
        run.metrics.flush(accelerator, phase=phase.name, total_updates=run.progress["total"], **errors)
        accelerator.print("{} steps: paired trajectory error {paired_error}, undistilled {paired_error_undistilled}".format(m, **errors))
    return whole_network(accelerator, trained, type(run.pipe.unet))


def setup(args, accelerator: Accelerator) -> tuple[Run | None, list[Phase]]:
    """Load and check everything, then make the run folder; None if the flags ask for a report only."""
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    check_engine(accelerator)
    facts = {"world_size": world_size, "mixed_precision": accelerator.mixed_precision}
    if args.resume:
        refuse_changes(facts, json.loads((Path(args.output_dir) / "config.json").read_text()))
    accelerator.gradient_accumulation_steps = accumulation_of(args, world_size)
    if accelerator.is_main_process and not (args.dry_run or args.check_data):
        check_output_dir(args)

    pipe = load_pipeline(args.teacher)
    schedule, prediction_type = load_schedule(pipe).to(device), pipe.scheduler.config.prediction_type
    has_w = pipe.unet.config.time_cond_proj_dim is not None
    if prediction_type != "v_prediction" and (has_w or schedule.alpha.min() == 0):
        what = "a w embedding (an LCM, perhaps)" if has_w else "zero terminal SNR"
        raise SystemExit(f"--teacher {args.teacher}: predicts {prediction_type} and has {what}; that needs v-prediction")
    dataset, held_out = load_images(
        args.data, streaming=args.streaming, image_column=args.image_column, caption_column=args.caption_column
    )
    phases = plan_phases(args, prediction_type, has_w)
    if not args.store_start and (blind := [phase.name for phase in phases if max(phase.p_forward) == 0]):
        accelerator.print(f"warning: nothing is trained at 999, where sampling starts, in phase {', '.join(blind)}: --store_start or a "
                          "--p_forward above 0 adds it")  # fmt: skip
    if args.dry_run and accelerator.is_main_process:
        print(describe(args, phases, pipe, count_of(dataset), accelerator))
    if args.check_data:
        accelerator.print(report_on_data(args, pipe, dataset, accelerator))
    if args.dry_run or args.check_data:
        return None, phases

    check_memory(memory_of(args, pipe, accelerator))
    out = Path(args.output_dir)
    set_seed(args.seed, device_specific=True)
    noise = torch.Generator(device).manual_seed(seed_of(args.seed, "rank", rank))
    prompts = PromptEncoder(pipe, device)
    data = open_data(args, pipe, prompts, rank, world_size, noise, dataset, cache=args.cache_latents)
    grid = timestep_grid(args.teacher_steps // 2)  # of the first student: those of the later ones are parts of it
    t_columns = [f"loss_t{t}" for t in grid]
    metrics = Metrics(
        out / "metrics.csv",
        ["phase", "part", "update", "total_updates", "unet_forwards", "buffer_size", "lr", "seconds", "paired_error",
         "paired_error_undistilled"],
        ["loss", "loss_forward", "loss_dagger", *t_columns, "t_mean", "grad_norm", "buffer_age", "student_moves",
         "moved_by_reflect"], device,
    )  # fmt: skip
    run = Run(
        args, accelerator, pipe, schedule, support_of(args.reflect, data), prompts, prompts.null(), data, noise,
        torch.Generator().manual_seed(seed_of(args.seed, "shared")), TrajectoryBuffer(args.buffer_size), metrics,
        Evaluation(args, accelerator, schedule, prompts, held_out, latent_shape(pipe)), StopRequest(),
        dict(phase=0, part=0, update=0, total=0, forwards=0, credit=0.0), t_columns[::-1],
        torch.tensor(grid[::-1], device=device),
    )  # fmt: skip
    facts["teacher_weights"] = fingerprint(pipe.unet)
    if args.resume:
        refuse_changes(facts, json.loads((out / "config.json").read_text()))
    elif accelerator.is_main_process:
        create_output_dir(args, __file__, facts)
    wait_for_output_dir(accelerator, out)
    if args.report_to:
        accelerator.init_trackers("pd_ddil", config={name: str(value) for name, value in vars(args).items()})
    return run, phases


def main(argv=None) -> None:
    args = parse_args(argv)
    accelerator = start_accelerator(log_with=args.report_to, project_dir=args.output_dir)
    run, phases = setup(args, accelerator)
    if run is None:
        return
    out, names = Path(args.output_dir), [phase.name for phase in phases]
    folders = [Path(args.teacher), *[out / "stages" / name for name in names]]  # phase i distils folders[i]
    gc = folders[names.index("gc") + 1 if "gc" in names else 0]
    checkpoint = last_checkpoint(out / "checkpoints") if args.resume else None
    if checkpoint:
        restore(run, checkpoint)
    if args.resume and accelerator.is_main_process:
        run.metrics.forget_after(run.progress["total"])
    todo = names[run.progress["phase"] :]
    accelerator.print(f"{out}: {'resuming' if checkpoint else 'starting'} at update {run.progress['total'] + 1}; "
                      f"phases to do: {', '.join(todo) or 'none'}")  # fmt: skip
    for index in range(run.progress["phase"], len(phases)):  # Alg. 3 line 1
        unet = train_phase(run, phases[index], folders[index], gc, checkpoint)
        if unet is None:
            accelerator.end_training()
            return
        checkpoint = None
        if accelerator.is_main_process:
            save_pipeline(folders[index + 1], run.pipe, unet, sampler_of(run.pipe))  # Alg. 3 line 12: the next teacher
        del unet
        accelerator.wait_for_everyone()
        run.buffer.clear()  # DDIL: its grid and models change [D16]
        run.progress |= dict(phase=index + 1, part=0, update=0, credit=0.0)
        save(run)
    if accelerator.is_main_process:
        save_pipeline(out / "pipeline", run.pipe, load_pipeline(str(folders[-1])).unet, sampler_of(run.pipe))
    lo, hi = args.guidance_range
    accelerator.print(f"done: {out / 'pipeline'} samples in {args.student_steps} steps, guidance_scale {lo} to {hi}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
