"""Latent consistency distillation with imitation learning: a guided diffusion model in 1 to 8 steps; and LCM-LoRA.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1, Algorithm 1, sec. 4.2, 5.
LCM: Latent Consistency Models, arXiv:2310.04378.

    laptop          accelerate launch lcm_ddil.py
    one GPU         accelerate launch --mixed_precision bf16 lcm_ddil.py --recipe sd15 --teacher PIPELINE --data IMAGES
    eight GPUs      accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 lcm_ddil.py --recipe sd15
                    --batch_size 45 ...

paper                                            code
  Alg. 1    line 1, data, T_s                      forward_batch, sample_rollout_timesteps
  Alg. 1    line 2, [D14] one source an update     common.SamplingPrior.draw
  Alg. 1    line 3, forward diffusion              forward_batch, common.forward_diffuse
  Alg. 1    line 4, the teacher's trajectory       rollout_batch, common.teacher_rollout
  Alg. 1    line 5, the student's trajectory       rollout_batch, common.consistency_rollout
  Alg. 1    line 6, the loss                       consistency_step
  LCM       f = c_skip z + c_out x                 common.consistency_function
  LCM       guidance scale as an input             common.guidance_embedding, common.with_w_embedding
  sec. 4.1  reflected distillation [D15]           common.reflect in common.ddim_step, common.consistency_function
  sec. 5    n drawn from {3, 4, 5}                 sample_rollout_timesteps
  sec. 5    priors, schedule [D12]                 RECIPES, common.part_of

Plain LCM is --p_forward 1 --reflect none. What the paper adds to it: grep "# DDIL:" lcm_ddil.py common.py
"""

import copy

import torch
from torch import Tensor

# By common.py's sections
# isort: off
from common import CLEAN, NoiseSchedule, forward_diffuse, timestep_grid
from common import Support, ddim_step
from common import Model, consistency_function, consistency_rollout, student_rollout, teacher_rollout, to_device
from common import SamplingPrior
from common import add_lora, drop_prompts, lcm_scheduler, refuse_zero_snr, with_guidance, with_w_embedding
from common import without_lora
from common import Run, TrainableNetwork, add_lora_flag, add_prior_flags, flag_parser, full_tensor, non_negative
from common import part_of, positive, positive_int, resolve, resolve_priors, share
# isort: on

# Any flag overrides its recipe.
PAPER = {"student_steps": 4, "rollout_steps": (3, 4, 5)}  # sec. 5
LCM = {"teacher_steps": 50, "loss": "huber", "huber_c": 0.001, "ema_decay": 0.95, "prompt_dropout": 0.0}  # LCM's, [D12]
READINGS = {"p_forward": (0.75, 0.5), "p_teacher": (0.0,), "store_start": False, "reflect": "measured"}  # [D12], [D15]
COMMON = PAPER | LCM | READINGS | {"lora_rank": 0, "forward_control": False, "seed": 0}
SD15 = COMMON | {  # sec. 5; range of w [D12], warm-up [D24]
    "output_dir": "runs/lcm_ddil-sd15", "updates": 8000, "guidance_range": (6.0, 16.0), "global_batch_size": 360,
    "batch_size": 60, "learning_rate": 1e-5, "lora_learning_rate": 1e-4, "warmup": 500, "eval_guidance_scale": 8.0,
    "gradient_checkpointing": True, "log_every": 50, "save_every": 500,
}  # fmt: skip
RECIPES = {
    "tiny": COMMON | {
        "teacher": "assets/tiny/pipeline", "data": "assets/tiny/data", "output_dir": "runs/lcm_ddil-tiny", "updates": 1500,
        "guidance_range": (1.5, 6.0), "global_batch_size": 32, "learning_rate": 3e-4, "lora_learning_rate": 3e-4,
        "warmup": 50, "eval_guidance_scale": 4.0, "cache_latents": True, "log_every": 50, "save_every": 250,
    },
    "sd15": SD15,
    "ssd1b": SD15 | {"output_dir": "runs/lcm_ddil-ssd1b", "batch_size": 15},  # "SSD1B-LCM" of Table 3: not in paper
}  # fmt: skip
GRAD_CLIP = 1.0  # [D18]
LORA_GUIDANCE = 7.5  # [D12]: a LoRA has no input for w

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
    schedule: NoiseSchedule,
    student: Model,
    target: Model,
    teacher: Model,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: dict,
    support: Support,
    loss: str,
    huber_c: float,
) -> Tensor:
    """LCM's loss: the student's estimate at z_t is to equal the target's at z_s, a teacher step on (Alg. 1 line 6)."""
    with torch.no_grad():
        z_s = ddim_step(schedule, z_t, teacher(z_t, t, cond), t, s, support)
        x_target = consistency_function(schedule, target, z_s, s.clamp(min=0), cond, support)
        x_target = torch.where((s == CLEAN).view(-1, 1, 1, 1), z_s, x_target)  # at the clean end the estimate is z_s
    x_hat = consistency_function(schedule, student, z_t, t, cond)  # not reflected: a clamp has no gradient outside
    return distance(x_hat, x_target, loss, huber_c)


@torch.no_grad()
def update_target(ema: torch.nn.Module, student: torch.nn.Module, decay: float) -> None:
    """target <- decay target + (1 - decay) student, which may be sharded."""
    for average, value in zip(ema.parameters(), student.parameters(), strict=True):
        average.lerp_(full_tensor(value), 1 - decay)


def draw_cond(run: Run, ids: Tensor) -> dict:
    """cond of token ids, each with a w of its own."""
    w = run.draw_w(len(ids))
    return drop_prompts(run.prompts.encode(ids), run.null, run.args.prompt_dropout, run.rng) | {"w": w}


def forward_batch(run: Run, timesteps: list[int]) -> tuple[Tensor, Tensor, dict]:
    """(z_t, t, cond) by forward diffusion of data to any of these timesteps (Alg. 1 line 3)."""
    x, ids = run.data.next()  # Alg. 1 line 1
    cond = draw_cond(run, ids)
    grid = to_device(torch.tensor(timesteps), x.device)
    t = grid[torch.randint(len(grid), (len(x),), generator=run.rng, device=x.device)]
    return forward_diffuse(run.schedule, x, t, run.rng)[0], t, cond


# DDIL: the next two functions
def sample_rollout_timesteps(run: Run, grid: list[int]) -> list[int]:
    """Rollout timesteps down to that of z_t: an n-step grid, n from {3, 4, 5}, cut at a random point [D12]."""
    choices = run.args.rollout_steps
    n = choices[torch.randint(len(choices), (), generator=run.shared_rng)]
    j = torch.randint(0 if run.args.store_start else 1, n, (), generator=run.shared_rng)  # alike on all ranks [D14]
    return sampler_timesteps(n, grid)[: j + 1]


def rollout_batch(
    run: Run, source: str, grid: list[int], student: Model, teacher: Model
) -> tuple[Tensor, Tensor, dict]:
    """(z_t, t, cond) of a model's own sampling, stopped on its way: the teacher's DDIM on the solver grid (Alg. 1 line
    4) or the student's few steps (line 5)."""
    timesteps, cond = sample_rollout_timesteps(run, grid), draw_cond(run, run.data.next_ids())
    z = run.start_noise(len(cond["w"]))
    if source == "teacher":
        path = grid[: grid.index(timesteps[-1]) + 1]
        z_t = teacher_rollout(run.schedule, teacher, z, path, cond, run.support)[-1]  # Alg. 1 line 4
    else:
        z_t = consistency_rollout(run.schedule, student, z, timesteps, cond, run.rng)[-1]  # Alg. 1 line 5
    return z_t, torch.full((len(z),), timesteps[-1], device=z.device), cond


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    p, add = flag_parser(__doc__, RECIPES)
    add("--teacher_steps", type=positive_int, help="of the solver grid, a divisor of 1000 (LCM: 50)")
    add("--student_steps", type=positive_int, help="of the sample grids; it takes any number (sec. 5: 4)")
    add("--rollout_steps", type=positive_int, nargs="+", help="n of the student's rollouts (sec. 5: 3 4 5)")
    add_prior_flags(add, "LCM is --p_forward 1 (default: .75 .5 forward, the rest the student's [D12])")
    yes = {"action": "store_true", "default": None}
    add("--store_start", **yes, help="the pure noise at 999 may be drawn from a rollout too [D12]")
    add("--forward_control", **yes, help="forward diffusion to the rollouts' timesteps instead of them [D16]")
    add("--guidance_range", type=non_negative, nargs=2, help="w ~ U[lo, hi] (LCM: 6 16 [D12]; LoRA: 7.5 7.5)")
    add("--loss", choices=("huber", "l2"), help="distance of the two estimates (LCM: huber)")
    add("--huber_c", type=positive, help="c of sqrt(d^2 + c^2) - c (LCM: 0.001)")
    add("--ema_decay", type=share, help="of the target network; 0: the student itself, no copy (LCM: .95)")
    add("--prompt_dropout", type=share, help="share of prompts replaced by the empty one (not in paper: 0)")
    add_lora_flag(add)
    add("--updates", type=positive_int, help="in all (sec. 5: 8000)")
    add("--learning_rate", type=positive, help="peak (sec. 5: 1e-5; LCM-LoRA: 1e-4)")
    add("--eval_guidance_scale", type=non_negative, help="w of the sample grids")
    args = p.parse_args(argv)
    given = copy.copy(args)
    args = resolve(args, RECIPES)
    if args.lora_rank and not args.resume:  # no input for w, and no moving average: the target is the student itself
        args.guidance_range = tuple(given.guidance_range or (LORA_GUIDANCE, LORA_GUIDANCE))
        args.ema_decay, args.eval_guidance_scale = given.ema_decay or 0.0, args.guidance_range[0]
    check_args(args)
    return args


def check_args(args) -> None:
    """What concerns several flags."""
    n, priors = args.teacher_steps, resolve_priors(args)
    if 1000 % n or n > 500:
        raise SystemExit(f"--teacher_steps {n}: the solver's steps must divide 1000 and be at most 500, e.g. 50")
    least = 1 if args.store_start else 2
    for name, values, low in (("student_steps", [args.student_steps], 1), ("rollout_steps", args.rollout_steps, least)):
        if off := [value for value in values if not low <= value <= n]:
            raise SystemExit(f"--{name} {off[0]}: leaves the solver grid; give {low} to {n} steps")
    if args.forward_control and min(priors["forward"]) == 1:
        raise SystemExit(f"--forward_control: with --p_forward {args.p_forward} there are no rollouts to replace")
    if args.ema_decay == 1:
        raise SystemExit("--ema_decay 1.0: the target would never move; must be < 1")
    if args.lora_rank and args.guidance_range[0] != args.guidance_range[1]:
        raise SystemExit(f"--guidance_range {args.guidance_range}: a LoRA has no input for w; give one number twice")
    if args.lora_rank and args.ema_decay:
        raise SystemExit(f"--ema_decay {args.ema_decay}: a LoRA's target is the student itself; leave the flag out")


def check_run(run: Run) -> None:
    """SystemExit for a teacher or an engine that these flags do not go with."""
    args, teacher, sampler = run.args, f"--teacher {run.args.teacher}", type(run.pipe.scheduler).__name__
    run.check_lora("teacher", run.pipe)
    if not args.ema_decay and run.accelerator.is_fsdp2:  # a rank without a sample for the target would not gather it
        raise SystemExit("--ema_decay 0: FSDP shards the student, which cannot be the target then; give a decay")
    if sampler in ("LCMScheduler", "TCDScheduler"):
        raise SystemExit(f"{teacher}: is an LCM already ({sampler}); give the model it is from")
    refuse_zero_snr(run.pipe, "--teacher", args.teacher)
    if max(resolve_priors(args)["forward"]) == 0 and not args.store_start:
        run.print("warning: nothing is trained at 999, where sampling starts: add --store_start, or some --p_forward")


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def networks_of(run: Run) -> tuple[TrainableNetwork, torch.nn.Module | None, Model]:
    """(student under the engine, the target's network, None where it is the student itself, teacher under guidance)."""
    args, unet, has_w = run.args, run.pipe.unet, run.pipe.unet.config.time_cond_proj_dim is not None
    if args.lora_rank:  # one network, held once: with the LoRA it is the student and its target, without it the teacher
        frozen, student = run.model(run.prepare_frozen(unet)), add_lora(unet, args.lora_rank)
        teacher = without_lora(frozen, student)
    else:
        student = (copy.deepcopy(unet) if has_w else with_w_embedding(unet)).requires_grad_(True)
        teacher = run.model(run.prepare_frozen(unet))
    ema = None
    if args.ema_decay:
        ema = run.prepare_frozen(copy.deepcopy(student).requires_grad_(False), half=False)
        run.register_for_checkpointing("target", ema)
    return run.prepare_trainable("student", student), ema, teacher if has_w else with_guidance(teacher, run.null)


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)
    grid, n = timestep_grid(args.teacher_steps, "trailing"), min(args.updates, args.max_updates or args.updates)
    check_run(run)
    labels = ["part", "total_updates", "unet_forwards", "lr", "seconds"]
    sources = ["loss", "loss_forward", "loss_teacher", "loss_student", *[f"loss_t{t}" for t in range(99, 1000, 100)]]
    columns = [*sources, "t_mean", "grad_norm", "moved_by_reflect", "moved_in_target"]
    run.open(__file__, labels, columns, {"latent consistency": n}, plan={})

    schedule = run.schedule
    student, ema, guided = networks_of(run)
    train_student, rollout_student = run.models_of(student)
    teacher = run.with_reflect_metric(guided, "moved_by_reflect")
    target = run.with_reflect_metric(rollout_student if ema is None else run.model(ema), "moved_in_target")
    few, w = sampler_timesteps(args.student_steps, grid), args.eval_guidance_scale

    def teacher_row(timesteps: list[int]) -> Tensor:
        path = [*timesteps, CLEAN]
        return run.preview_row(lambda z, cond, _: student_rollout(schedule, guided, z, path, cond)[-1], w)

    def student_row() -> Tensor:
        path = [*few, CLEAN]
        sample = lambda z, cond, noise: consistency_rollout(schedule, rollout_student, z, path, cond, noise)[-1]
        return run.preview_row(sample, w)

    rows = {f"teacher, {len(grid)} steps": teacher_row(grid)}
    rows[f"teacher, {len(few)} steps, undistilled"] = teacher_row(few)

    def sample() -> None:
        run.save_preview(rows | {f"student, {len(few)} steps": student_row()})

    priors = resolve_priors(args)
    prior = SamplingPrior(run.shared_rng, **priors)  # DDIL: [D12]
    for update in run.updates("lcm", n, args.learning_rate, sample):
        part = part_of(update, n, len(priors["forward"]))
        source = prior.draw(part)  # DDIL: Alg. 1 line 2, one for the update, the same on all ranks
        for _ in run.minibatches(student):
            if source == "forward":  # Alg. 1 line 3
                z_t, t, cond = forward_batch(run, grid)
            elif args.forward_control:  # a rollout's timesteps without the rollout [D16]
                z_t, t, cond = forward_batch(run, sample_rollout_timesteps(run, grid)[-1:])
            else:  # DDIL: Alg. 1 lines 4, 5
                z_t, t, cond = rollout_batch(run, source, grid, rollout_student, teacher)
            s = t - 1000 // args.teacher_steps  # the next point of the solver grid; after its last one, 19 - 20 = CLEAN
            losses = consistency_step(  # Alg. 1 line 6
                schedule, train_student, target, teacher, z_t, t, s, cond, run.support, args.loss, args.huber_c
            )
            run.backward(losses, t, source)
        run.step(student, GRAD_CLIP)
        if ema is not None:
            update_target(ema, student.unwrapped, args.ema_decay)
        run.labels = {"part": part + 1}

    final = run.unwrap_full_network(student)
    w = "1.0" if args.lora_rank else "{} to {}".format(*args.guidance_range)
    if run.accelerator.is_main_process:
        final = run.save_lora(final, args.teacher) if args.lora_rank else final
        scheduler = lcm_scheduler(run.pipe, args.teacher_steps)
        run.save_student(run.out / "pipeline", final, scheduler, args.student_steps, w)
    run.end(args.student_steps, w, 1.0 if args.lora_rank else args.eval_guidance_scale)


if __name__ == "__main__":
    main()
