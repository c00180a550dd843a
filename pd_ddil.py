"""Progressive distillation with imitation learning: halve the steps of a guided diffusion model, 32 -> 16 -> 8 -> 4.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1, Algorithms 1-3, sec. 5, App. A.

    laptop          accelerate launch pd_ddil.py --teacher_steps 32
    one GPU         accelerate launch --mixed_precision bf16 pd_ddil.py --recipe sd15 --teacher PIPELINE --data IMAGES
    eight GPUs      accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 pd_ddil.py --recipe sd15 ...

paper                                            code
  sec. 5    eps -> v conversion                    v_step
  sec. 5    guidance conditioning (Meng et al.)    guidance_step, common.guidance_embedding
  Alg. 1    line 2, [D14] one source an update     common.SamplingPrior.draw
  Alg. 1/3  forward diffusion                      forward_batch, common.forward_diffuse
  Alg. 2    mixed trajectories -> D_DAgger         collect, common.mixed_rollout, common.TrajectoryBuffer
  Alg. 3    lines 1, 2, 12: stages                 main, plan_phases, open_phase, halve
  Alg. 3    lines 3, 4, 11: updates, D_DAgger      halve, dagger_batch
  Alg. 3    lines 7, 8: the teacher's two steps    forward_batch, teacher_target, common.mixed_rollout
  Alg. 3    lines 6, 9, 10 and Eq. 3: the loss     pd_step
  sec. 4.1  reflected distillation [D15]           common.reflect, common.ddim_step
  App. A    priors and schedule, two parts         RECIPES, plan_phases

Plain PD is --p_forward 1. What the paper adds to it: grep "# DDIL:" pd_ddil.py common.py
"""

import copy
import csv
import shutil
from argparse import ArgumentTypeError
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# By common.py's sections
# isort: off
from common import CLEAN, NoiseSchedule, forward_diffuse, timestep_grid, uniform_timesteps
from common import Support, ddim_step, reflect_v, rotation
from common import Model, mixed_rollout, teacher_rollout
from common import SamplingPrior, TrajectoryBuffer
from common import dpm_solver, drop_prompts, latent_shape, load_pipeline, with_guidance, with_w_embedding
from common import Run, across_ranks, derive_seed, flag_parser, noise_of, non_negative, positive, positive_int
from common import refuse_changes, replace_folder, resolve, share
# isort: on

# Any flag overrides its recipe. `updates` of a phase: one number for each part; halvings: by their student's steps.
PAPER = {"teacher_steps": 32, "student_steps": 4,  # sec. 5
         "p_forward": (0.75, 0.5), "student_rate": (0.15, 0.8)}  # App. A, [D9]  # fmt: skip
READINGS = {"reflect": "measured", "store_start": False, "reuse": 2, "buffer_size": 1024}  # [D15], [D16], [D17], [D21]
COMMON = PAPER | READINGS | {"forward_control": False, "eval_prompts": 128, "seed": 0}
RECIPES = {
    "tiny": COMMON | {
        "teacher": "assets/tiny/pipeline", "data": "assets/tiny/data", "output_dir": "runs/pd_ddil-tiny",
        "updates": {"v": [250], "gc": [600], "16": [250], "8": [200, 100], "4": [250, 150], "2": [250, 150], "1": [250, 150]},
        "guidance_range": (2.0, 14.0), "global_batch_size": 32, "learning_rate": (5e-4, 1e-4), "warmup": 20,
        "eval_guidance_scale": 8.0, "cache_latents": True, "log_every": 20, "save_every": 100,
    },
    "sd15": COMMON | {  # sec. 5, App. A
        "output_dir": "runs/pd_ddil-sd15",
        "updates": {"v": [4000], "gc": [6000],  # [D18], [D24]: "10K steps overall"
                    "16": [5000], "8": [6000, 4000], "4": [8000, 6000], "2": [8000, 6000], "1": [8000, 6000]},  # "1": [D24]
        "guidance_range": (2.0, 14.0), "global_batch_size": 224, "batch_size": 28, "learning_rate": (1e-5,), "warmup": 500,
        "eval_guidance_scale": 8.0, "gradient_checkpointing": True, "log_every": 50, "save_every": 500,  # 8: [D23]
    },
}  # fmt: skip
GRAD_CLIP, CAPTION_DROPOUT = 1.0, 0.1  # [D18]
Transitions = tuple[Tensor, Tensor, Tensor, Tensor, dict]  # what is trained on: z_t, z_s, t, s, cond

# ----------------------------------------------------------------------------------------------------------------------
# The algorithm. z_t [B, C, h, w] fp32, t [B] int64; losses come back per sample, [B]
# ----------------------------------------------------------------------------------------------------------------------


def v_step(
    schedule: NoiseSchedule, student: Model, x: Tensor, cond: dict, null: dict, generator
) -> tuple[Tensor, Tensor]:
    """Phase (a), eps -> v [D22]: plain v-loss on data, captions dropped so that the null prompt converts too [D18]."""
    t = uniform_timesteps(schedule, len(x), generator)
    cond = drop_prompts(cond, null, CAPTION_DROPOUT, generator)
    z_t, eps = forward_diffuse(schedule, x, t, generator)
    alpha_t, sigma_t = schedule.at(t)
    v = alpha_t * eps - sigma_t * x
    return (student(z_t, t, cond) - v).pow(2).mean(dim=(1, 2, 3)), t


def guidance_step(
    schedule: NoiseSchedule, student: Model, guided: Model, x: Tensor, cond: dict, support: Support, generator
) -> tuple[Tensor, Tensor]:
    """Phase (b), guidance conditioning [D22]: one network learns the CFG output for every w (Meng et al., stage 1)."""
    t = uniform_timesteps(schedule, len(x), generator)
    z_t, _ = forward_diffuse(schedule, x, t, generator)
    with torch.no_grad():
        v = reflect_v(schedule, z_t, guided(z_t, t, cond), t, support)  # DDIL: thresholding after CFG (App. A)
    return (student(z_t, t, cond) - v).pow(2).mean(dim=(1, 2, 3)), t


@torch.no_grad()
def teacher_target(
    schedule: NoiseSchedule, teacher: Model, z_t: Tensor, t: Tensor, m: Tensor, s: Tensor, cond: dict, support: Support
) -> Tensor:
    """z_s where the teacher's two reflected DDIM steps t -> m -> s lead from z_t (Alg. 3 line 8): teacher_rollout's
    steps, but t differs from sample to sample."""
    z_m = ddim_step(schedule, z_t, teacher(z_t, t, cond), t, m, support)
    return ddim_step(schedule, z_m, teacher(z_m, m, cond), m, s, support)


def pd_step(
    schedule: NoiseSchedule, student: Model, z_t: Tensor, z_s: Tensor, t: Tensor, s: Tensor, cond: dict
) -> Tensor:
    """Eq. 3 (Alg. 3 lines 6, 9, 10): the student's one step t -> s is to land where the teacher's two did, on z_s; at
    the clean end that is the x which the student is to estimate [D6].

    Line 9 prints x* = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t). As x = alpha_t z_t -
    sigma_t v, this is v* = (c z_t - z_s) / d, without a division by sigma_t; c, d as in ddim_step [D18].
    """
    v_s = student(z_t, t, cond)  # Alg. 3 line 6
    c, d = rotation(schedule, t, s)
    v_target = (c * z_t - z_s) / d  # Alg. 3 line 9
    alpha_t, sigma_t = schedule.at(t)
    weight = torch.maximum(alpha_t**2, sigma_t**2)  # max(1, SNR) |x_s - x*|^2 in terms of v [D18]
    return (weight * (v_s - v_target) ** 2).mean(dim=(1, 2, 3))  # Alg. 3 line 10


def data_batch(run: Run) -> tuple[Tensor, dict]:
    """(x, cond) of this rank's next images, each with a w of its own (Alg. 1 line 1)."""
    x, ids = run.data.next()
    return x, run.prompts.encode(ids) | {"w": run.draw_w(len(x))}


def forward_batch(run: Run, teacher: Model, grid: Tensor, intervals: range) -> Transitions:
    """By forward diffusion of data (Alg. 3 lines 5, 7, 8); `grid`: the teacher's, every second point the student's."""
    x, cond = data_batch(run)
    j = torch.randint(intervals.start, intervals.stop, (len(x),), generator=run.rng, device=x.device)
    t, m, s = grid[2 * j], grid[2 * j + 1], grid[2 * j + 2]  # t on the student's grid [D5]; Alg. 3 line 7
    z_t, _ = forward_diffuse(run.schedule, x, t, run.rng)  # Alg. 3 line 5
    return z_t, teacher_target(run.schedule, teacher, z_t, t, m, s, cond, run.support), t, s, cond  # Alg. 3 line 8


# DDIL: this class and the next three functions
class DAggerBuffer(TrajectoryBuffer):
    """D_DAgger, plus how many uses are left before new states are collected [D17]. The host, which holds the captions,
    draws indices: no wait for the device."""

    def __init__(self, capacity: int, device, seed: int = 0):
        super().__init__(capacity)
        self.device, self.remaining_uses, self.index_rng = device, 0.0, torch.Generator().manual_seed(seed)

    def clear(self) -> None:
        super().clear()
        self.remaining_uses = 0.0

    def state_dict(self) -> dict:
        return super().state_dict() | {"credit": self.remaining_uses, "choices": self.index_rng.get_state()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state, self.device)
        self.rows |= {name: value for name, value in state["rows"].items() if name == "ids"}  # on the host
        self.remaining_uses = state["credit"]
        self.index_rng.set_state(state["choices"])


def stored_intervals(args, steps: int) -> range:
    """Intervals of the student's grid whose states D_DAgger holds: not the pure noise at 999, where all start [D16]."""
    return range(0 if args.store_start else 1, steps)


def dagger_batch(
    run: Run, dagger: DAggerBuffer, teacher: Model, student: Model, grid: Tensor, student_rate: float
) -> Transitions:
    """From D_DAgger (Alg. 3 line 4), which is refreshed so that a state is used R times."""
    batch_size, now = run.args.batch_size, run.progress["total"]
    while dagger.remaining_uses < batch_size:  # Alg. 3 line 11
        rows = collect(run, teacher, student, [*timestep_grid(len(grid) - 1), CLEAN], student_rate)
        dagger.add(**rows, born=torch.full_like(rows["w"], now))  # Alg. 2 line 6
        dagger.remaining_uses += min(len(rows["w"]), dagger.capacity) * run.args.reuse
    dagger.remaining_uses -= batch_size
    rows = dagger.sample(batch_size, dagger.index_rng)
    run.add_metrics({"buffer_age": now - rows["born"]})
    t, s = grid[2 * rows["j"]], grid[2 * rows["j"] + 2]
    return rows["z_t"], rows["z_s"], t, s, run.prompts.encode(rows["ids"]) | {"w": rows["w"]}


def collect(run: Run, teacher: Model, student: Model, grid: list[int], student_rate: float) -> dict[str, Tensor]:
    """Rows for D_DAgger by one rollout of Alg. 2: states before each transition [D16] and, as their targets never
    change within a stage, where the teacher lands from them [D17]."""
    stored = stored_intervals(run.args, len(grid) // 2)
    ids = run.data.next_ids()
    cond = run.prompts.encode(ids) | {"w": run.draw_w(len(ids))}  # one w for a trajectory
    z = run.start_noise(len(ids))  # Alg. 2 line 1
    models, grids = (teacher, student), (grid, grid[::2])  # the teacher's, the student's
    more = {"query": stored, "multiple": -(-len(ids) // 2) if run.args.compile else 1}
    states, teacher_targets, moves = mixed_rollout(  # Alg. 2 lines 2-5
        run.schedule, *models, z, *grids, cond, student_rate, run.shared_rng, run.support, **more
    )
    run.add_metrics({"student_moves": torch.cat(moves).float() if moves else torch.zeros(0)})
    n, k = len(ids), len(stored)
    return {  # trajectory by trajectory, so that a full buffer lets go of the oldest ones whole
        "z_t": torch.stack([states[j] for j in stored], dim=1).flatten(0, 1),
        "z_s": torch.stack([teacher_targets[j] for j in stored], dim=1).flatten(0, 1),
        "j": torch.arange(stored.start, stored.stop, device=z.device).repeat(n),
        "w": cond["w"].repeat_interleave(k),
        "ids": ids.repeat_interleave(k, dim=0),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Phases, and how far their students are from the guided model
# ----------------------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    name: str  # "v", "gc", or the student's steps: "16", "8", ...
    updates: list[int]  # of each part
    p_forward: list[float]  # of each part
    student_rate: list[float]

    @property
    def title(self) -> str:
        return {"v": "v: eps to v", "gc": "gc: guidance as an input"}.get(self.name, f"{self.name} steps")


def halvings(teacher_steps: int, student_steps: int) -> list[str]:
    """Students' steps, e.g. 32, 4 -> ["16", "8", "4"]."""
    n = teacher_steps // 2
    return [str(n), *halvings(n, student_steps)] if n >= student_steps else []


def plan_phases(args, prediction_type: str, has_w: bool) -> list[Phase]:
    """The phases that this teacher still needs, with App. A's priors in each part [D8]."""
    names = ["v"] * (prediction_type != "v_prediction") + ["gc"] * (not has_w)
    phases = [Phase(name, u := args.updates[name], [1.0] * len(u), [0.0] * len(u)) for name in names]
    for name in halvings(args.teacher_steps, args.student_steps):
        updates = args.updates.get(name, args.updates["16"])  # a number of steps that the recipe does not list
        p_forward, rate = ([*v, *v][:2][: len(updates)] for v in (args.p_forward, args.student_rate))
        if name == "1" and not args.store_start:  # [D16]: one step visits nothing but the start, so this is plain PD
            p_forward = [1.0] * len(updates)
        phases.append(Phase(name, updates, p_forward, rate))
    if args.max_updates:
        phases = [p._replace(updates=[min(u, args.max_updates) for u in p.updates]) for p in phases]
    return phases


def export_stage(run: Run, unet, steps: int, out: Path, errors: dict | None = None) -> None:
    """A stage, which stock diffusers samples by DDIM."""
    scheduler, w = dpm_solver(run.pipe, "v_prediction", order=1), "{} to {}".format(*run.args.guidance_range)
    run.save_student(out, unet, scheduler, steps, w, errors)


class PairedEvaluation:
    """Fixed held-out prompts, noises and w, and the end points of stages/gc as it teaches, reflected: every student is
    compared with them."""

    def __init__(self, run: Run, gc: Path):
        self.run, self.gc, captions = run, gc, run.held_out
        self.n = min(run.args.eval_prompts, len(captions))
        self.ids = run.prompts.tokenize([captions[i * len(captions) // self.n] for i in range(self.n)])
        lo, hi = run.args.guidance_range
        self.w = lo + (hi - lo) * torch.rand(self.n, generator=torch.Generator().manual_seed(1))

    def trajectory_end(self, model: Model, steps: int, z: Tensor, cond: dict, support: Support = None) -> Tensor:
        return teacher_rollout(self.run.schedule, model, z, [*timestep_grid(steps), CLEAN], cond, support)[-1]

    @torch.no_grad()
    def end_points(self, model: Model, steps: int, support: Support = None) -> Tensor:
        """[n, C, h, w], by DDIM, reflected where a support is given; the work is split over the ranks."""
        run = self.run

        def ends_of(rows: Tensor) -> Tensor:
            cond = run.prompts.encode(self.ids[rows]) | {"w": self.w[rows].to(run.device)}
            z = noise_of(rows, latent_shape(run.pipe), seed=1).to(run.device)
            return self.trajectory_end(model, steps, z, cond, support)

        return torch.cat([*across_ranks(run.accelerator, self.n, run.args.batch_size, ends_of)])

    def preview_row(self, model: Model, steps: int) -> Tensor:
        sample = lambda z, cond, _: self.trajectory_end(model, steps, z, cond)
        return self.run.preview_row(sample, self.run.args.eval_guidance_scale)

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        """What stages/gc gives: end points at "32" steps, reflected, and, undistilled, at the students' "16", ...; rows
        "grid_32", ... of the pictures. A resumed run makes them anew, in six updates' time, as captions may change."""
        run, args = self.run, self.run.args
        unet = load_pipeline(str(self.gc), resolution=args.resolution).unet
        gc = run.model(unet.to(run.device), "v_prediction")
        supports = {args.teacher_steps: run.support}
        supports |= dict.fromkeys(map(int, halvings(args.teacher_steps, args.student_steps)))  # as it would sample
        ends = {str(n): self.end_points(gc, n, support) for n, support in supports.items()}
        return ends | {f"grid_{n}": self.preview_row(gc, n) for n in supports}

    def report(self, student: Model, teacher: Model, steps: int) -> dict[str, str]:
        """Latent RMS distances for the same noise, prompt and w, as a row of metrics.csv and a line: to the end points
        of stages/gc at teacher_steps (the student's, and stages/gc's own, undistilled), and to those of this stage's
        own teacher; both as they teach."""
        distance = lambda a, b: f"{(a - b).pow(2).mean().sqrt().item():.5f}"
        ends, goal = self.end_points(student, steps), self.reference[str(self.run.args.teacher_steps)]
        errors = {
            "paired_error": distance(ends, goal),
            "paired_error_undistilled": distance(self.reference[str(steps)], goal),
            "stage_error": distance(ends, self.end_points(teacher, 2 * steps, self.run.support)),
        }
        labels = {"phase": str(steps), "total_updates": self.run.progress["total"]}
        self.run.metrics.flush(self.run.accelerator, **labels, **errors)
        line = "{} steps: paired trajectory error {paired_error}, undistilled {paired_error_undistilled}, "
        self.run.print((line + "to its own teacher {stage_error}").format(steps, **errors))
        return errors


def table_of_errors(path: Path) -> str:
    """The rows that report() left in metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["paired_error"]]
    lines = [(r["phase"], r["paired_error"], r["paired_error_undistilled"], r["stage_error"]) for r in rows]
    lines = [("steps", "paired error", "undistilled", "stage error"), *lines]
    return "\n".join("{:>5} {:>13} {:>12} {:>12}".format(*line) for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------


def phase_updates(text: str) -> tuple[str, list[int]]:
    """argparse type of --updates: 8=6000,4000."""
    phase, _, values = text.partition("=")
    updates = [int(u) for u in values.split(",") if u.isdigit()]
    if not phase or not 1 <= len(updates) <= 2 or min(updates) < 1 or values.count(",") != len(updates) - 1:
        raise ArgumentTypeError(f"{text}: must read PHASE=U or PHASE=U,U, as 8=6000,4000; phases are v, gc, 16, ...")
    return phase, updates


def parse_args(argv=None):
    p, add = flag_parser(__doc__, RECIPES)
    add("--teacher_steps", type=positive_int, help="N, steps of the first teacher (sec. 5: 32)")
    add("--student_steps", type=positive_int, help="steps of the last student (sec. 5: 4 or 2)")
    add("--p_forward", type=share, nargs="+", help="share of forward diffusion in each part (.75 .5); 1: plain PD")
    add("--student_rate", type=share, nargs="+", help="Alg. 2's beta in each part: the student's moves (.15 .8)")
    add("--reuse", type=positive, help="R, mean uses of a collected state [D17] (not in paper; 2)")
    yes = {"action": "store_true", "default": None}
    add("--store_start", **yes, help="store the pure noise at 999 too [D16]")
    add("--forward_control", **yes, help="D_DAgger's timesteps on forward-diffused latents: the control of DDIL [D16]")
    add("--buffer_size", type=positive_int, help="states that D_DAgger holds on each process (not in paper)")
    add("--guidance_range", type=non_negative, nargs=2, help="w ~ U[lo, hi] in training (sec. 5: 2 14)")
    add("--updates", type=phase_updates, nargs="+", metavar="PHASE=U[,U]", help="of its parts: v=4000 8=6000,4000")
    add("--learning_rate", type=positive, nargs="+", help="peak, or two: before halvings and in them (1e-5)")
    add("--eval_prompts", type=positive_int, help="held-out prompts of the paired trajectory error")
    add("--eval_guidance_scale", type=non_negative, help="w of the sample grids")
    args = p.parse_args(argv)
    given, args.updates = dict(args.updates or ()), None  # merged into the recipe's, phase by phase
    args = resolve(args, RECIPES)
    if args.resume:
        refuse_changes({"updates": args.updates | given}, {"updates": args.updates})
    args.updates = args.updates | given
    check_args(args)
    return args


def check_args(args) -> None:
    """What concerns several flags."""
    n, m = args.teacher_steps, args.student_steps
    if n <= m or n % m or (n // m) & (n // m - 1) or n > 256:
        raise SystemExit(f"--teacher_steps {n}: must be --student_steps ({m}) times a power of two, at most 256")
    known = {"v", "gc", *halvings(n, m)} | set(RECIPES["tiny"]["updates"])
    if unknown := [phase for phase in args.updates if phase not in known]:
        raise SystemExit(f"--updates {unknown[0]}=...: no such phase; they are {', '.join(sorted(known))}")
    for name in ("p_forward", "student_rate", "learning_rate"):
        if len(getattr(args, name)) > 2:
            raise SystemExit(f"--{name} {getattr(args, name)}: give one value, or one for each of the two parts")
    if args.forward_control and min(args.p_forward) == 1:
        raise SystemExit(f"--forward_control: with --p_forward {args.p_forward} there are no trajectories to replace")


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def open_phase(run: Run, phase: Phase, folder: Path) -> tuple[Model, Model, torch.nn.Module]:
    """(teacher, the same noting what `reflect` moves, student's UNet) of a phase that distils what is in `folder`."""
    pipe = load_pipeline(str(folder), resolution=run.args.resolution)
    student = with_w_embedding(pipe.unet) if phase.name == "gc" else copy.deepcopy(pipe.unet)  # Alg. 3 line 2
    network = run.model(run.prepare_frozen(pipe.unet), pipe.scheduler.config.prediction_type)
    guided = network if phase.name.isdigit() else with_guidance(network, run.null)
    return guided, run.with_reflect_metric(guided, "moved_by_reflect"), student.requires_grad_(True)


def convert(run: Run, phase: Phase, evaluation: PairedEvaluation, folder: Path, out: Path) -> None:
    """A phase before the halvings: eps -> v ("v") or guidance conditioning ("gc"), from the pipeline in `folder`."""
    guided, teacher, unet = open_phase(run, phase, folder)
    student = run.prepare_trainable("student", unet)
    train_student, rollout_student = run.models_of(student, "v_prediction")
    args, steps = run.args, run.args.teacher_steps
    sampled = with_guidance(rollout_student, run.null) if phase.name == "v" else rollout_student
    rows = {f"teacher, {steps} steps": evaluation.preview_row(guided, steps)}

    def sample() -> None:
        run.save_preview(rows | {f"student, {steps} steps": evaluation.preview_row(sampled, steps)}, f"-{phase.name}")

    prior = SamplingPrior(run.shared_rng, forward=phase.p_forward)
    for part, n in enumerate(phase.updates):
        student.renew_optimizer()
        run.labels = {"phase": phase.name, "part": part + 1, "buffer_size": 0}
        for _ in run.updates(f"{phase.name} part {part + 1}", n, args.learning_rate[0], sample):
            source = prior.draw(part)  # Alg. 1 line 2: "forward", as the student has no states of its own yet
            for _ in run.minibatches(student):
                x, cond = data_batch(run)
                if phase.name == "v":
                    losses, t = v_step(run.schedule, train_student, x, cond, run.null, run.rng)
                else:
                    losses, t = guidance_step(run.schedule, train_student, teacher, x, cond, run.support, run.rng)
                run.backward(losses, t, source)
            run.step(student, GRAD_CLIP)
    final = run.unwrap_full_network(student)
    run.finish(lambda: export_stage(run, final, steps, out))


def halve(run: Run, phase: Phase, dagger: DAggerBuffer, evaluation: PairedEvaluation, folder: Path, out: Path) -> None:
    """Alg. 3 lines 2-12: the pipeline in `folder` is distilled into one of half the steps in `out`."""
    args, steps = run.args, int(phase.name)
    guided, teacher, unet = open_phase(run, phase, folder)  # Alg. 3 line 2
    student = run.prepare_trainable("student", unet)
    train_student, rollout_student = run.models_of(student, "v_prediction")
    grid = torch.tensor([*timestep_grid(2 * steps), CLEAN], device=run.device)  # the teacher's

    def sample() -> None:
        names = {f"guided model, {args.teacher_steps} steps": args.teacher_steps}
        names[f"guided model, {steps} steps, undistilled"] = steps
        rows = {name: evaluation.reference[f"grid_{n}"] for name, n in names.items()}
        rows[f"student, {steps} steps"] = evaluation.preview_row(rollout_student, steps)
        run.save_preview(rows, f"-{phase.name}")

    p_dagger = [1 - p for p in phase.p_forward]  # DDIL: App. A
    prior = SamplingPrior(run.shared_rng, forward=phase.p_forward, dagger=p_dagger)
    for part, n in enumerate(phase.updates):  # App. A: two parts
        student.renew_optimizer()  # [D7]
        for _ in run.updates(f"{phase.name} part {part + 1}", n, args.learning_rate[-1], sample):  # Alg. 3 line 3
            source = prior.draw(part)  # DDIL: Alg. 1 line 2, one for the update, the same on all ranks
            for _ in run.minibatches(student):
                if source == "forward":  # Alg. 3 lines 5, 7, 8
                    z_t, z_s, t, s, cond = forward_batch(run, teacher, grid, range(steps))
                elif args.forward_control:  # D_DAgger's timesteps without its trajectories [D16]
                    z_t, z_s, t, s, cond = forward_batch(run, teacher, grid, stored_intervals(args, steps))
                else:  # DDIL: Alg. 3 line 4
                    student_rate = phase.student_rate[part]
                    z_t, z_s, t, s, cond = dagger_batch(run, dagger, teacher, rollout_student, grid, student_rate)
                losses = pd_step(run.schedule, train_student, z_t, z_s, t, s, cond)  # Alg. 3 lines 6, 9, 10
                run.backward(losses, t, source)
            run.step(student, GRAD_CLIP)  # Alg. 3 line 11
            run.labels = {"phase": phase.name, "part": part + 1, "buffer_size": len(dagger)}
    errors = evaluation.report(rollout_student, guided, steps)
    final = run.unwrap_full_network(student)
    dagger.clear()  # its grid and models change with the stage [D16]
    run.finish(lambda: export_stage(run, final, steps, out, errors))  # Alg. 3 line 12: the next teacher


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)
    has_w = run.pipe.unet.config.time_cond_proj_dim is not None
    if run.predicts != "v_prediction" and (has_w or run.schedule.alpha.min() == 0):
        what = "a w embedding (an LCM, perhaps)" if has_w else "zero terminal SNR"
        raise SystemExit(f"--teacher {args.teacher}: predicts {run.predicts} and has {what}; that needs v-prediction")
    phases = plan_phases(args, run.predicts, has_w)
    if blind := [phase.name for phase in phases if max(phase.p_forward) == 0 and not args.store_start]:
        run.print(f"warning: in {', '.join(blind)} nothing is trained at 999, where sampling starts: add --store_start")
    labels = ["phase", "part", "update", "total_updates", "unet_forwards", "buffer_size", "lr", "seconds"]
    errors = ["paired_error", "paired_error_undistilled", "stage_error"]
    losses = ["loss", "loss_forward", "loss_dagger", *[f"loss_t{t}" for t in timestep_grid(args.teacher_steps // 2)]]
    columns = [*losses, "t_mean", "grad_norm", "buffer_age", "student_moves", "moved_by_reflect"]
    updates = {phase.title: sum(phase.updates) for phase in phases}
    run.open(__file__, labels + errors, columns, updates, plan={f"phase {phase.name}": phase for phase in phases})
    names = [phase.name for phase in phases]
    folders = [Path(args.teacher), *[run.out / "stages" / name for name in names]]  # phase i distils folders[i]
    dagger = DAggerBuffer(args.buffer_size, run.device, derive_seed(args.seed, "dagger", run.rank))
    run.register_for_checkpointing("buffer", dagger)
    evaluation = PairedEvaluation(run, gc=folders[names.index("gc") + 1 if "gc" in names else 0])
    for i, phase in run.unfinished(phases):  # Alg. 3 line 1
        if phase.name.isdigit():
            halve(run, phase, dagger, evaluation, folders[i], folders[i + 1])
        else:
            convert(run, phase, evaluation, folders[i], folders[i + 1])
    if run.accelerator.is_main_process:
        replace_folder(run.out / "pipeline", partial(shutil.copytree, folders[-1], dirs_exist_ok=True))
        run.print(table_of_errors(run.metrics.path))
    run.end(args.student_steps, "{} to {}".format(*args.guidance_range), args.eval_guidance_scale)


if __name__ == "__main__":
    main()
