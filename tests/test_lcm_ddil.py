"""lcm_ddil.py: the loss against closed forms, the run against a short independent loop and against stock diffusers."""

import copy

import pytest
import torch
from conftest import read_metrics, run_here, weights_of
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from safetensors.torch import load_file

# isort: off
from toys import BOX, MEAN, SCHEDULE, STD, clamped, max_error, nonlinear_model, noting, open_run, paths, randn
from toys import seeded, stock_latents

import lcm_ddil
from common import CLEAN, LatentData, PromptEncoder, Run, SamplingPrior, StopRequest, UNetModel, add_noise, betas_of
from common import consistency_function, ddim_step, lcm_scheduler, load_pipeline, load_schedule, open_rows, part_of
from common import resolve_priors, rotation, derive_seed, timestep_grid, with_guidance, with_w_embedding
from lcm_ddil import consistency_step, draw_cond, networks_of, parse_args, rollout_batch, sample_rollout_timesteps
from lcm_ddil import sampler_timesteps
# isort: on

GRID = timestep_grid(50, "trailing")
FLAGS = "--global_batch_size 4 --warmup 1 --log_every 1 --learning_rate 1e-3 --updates 8 --guidance_range 2 5"
LORA = "--lora_rank 2 --learning_rate 0.05 --guidance_range 7.5 7.5"


def lcm_here(folder, teacher, data, flags) -> None:
    run_here(*f"{paths(folder, teacher, data)} {FLAGS} {flags}".split(), script="lcm_ddil.py")


def scalings(t):
    scaled_t = 10.0 * t.view(-1, 1, 1, 1)
    return 0.25 / (scaled_t**2 + 0.25), scaled_t / (scaled_t**2 + 0.25).sqrt()  # c_skip, c_out


def test_exact_consistency_function_has_no_loss_on_exact_steps():
    """Gaussian data, whose probability flow is known: f is its end, scalings included."""

    def flow(z_t, t, s):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE.at(t), SCHEDULE.at(s)
        scale = (((alpha_s * STD) ** 2 + sigma_s**2) / ((alpha_t * STD) ** 2 + sigma_t**2)).sqrt()
        return alpha_s * MEAN + scale * (z_t - alpha_t * MEAN)

    def consistent(z_t, t, cond):
        (alpha_t, sigma_t), (c_skip, c_out) = SCHEDULE.at(t), scalings(t)
        return (alpha_t * z_t - (flow(z_t, t, torch.full_like(t, CLEAN)) - c_skip * z_t) / c_out) / sigma_t

    (t, s), z_t = torch.tensor([*GRID, CLEAN]).unfold(0, 2, 1).T, randn(50)
    c, d = rotation(SCHEDULE, t, s)
    models = consistent, consistent, lambda *_: (c * z_t - flow(z_t, t, s)) / d
    assert consistency_step(SCHEDULE, *models, z_t, t, s, {}, None, "l2", 0.001).max() < 1e-20


@pytest.mark.parametrize("loss", ["huber", "l2"])
@pytest.mark.parametrize("support", [None, BOX])
def test_loss_is_the_paper_s(support, loss):
    """The teacher's step and the target are reflected, the student is not; at the clean end, the target is the teacher's
    estimate itself (the target network is asked at 0 there, so that all batches have one shape)."""
    student, asked = lambda *inputs: nonlinear_model(*inputs) + 0.2, []
    target = lambda z_t, t, cond: asked.extend(t.tolist()) or nonlinear_model(z_t, t, cond) - 0.2
    z_t, t, s = 2 * randn(4), torch.tensor([999, 499, 39, 19]), torch.tensor([979, 479, 19, CLEAN])
    cond = {"w": torch.linspace(1, 4, 4)}
    losses = consistency_step(SCHEDULE, student, target, nonlinear_model, z_t, t, s, cond, support, loss, 0.01)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE.at(t), SCHEDULE.at(s)
    x = clamped(alpha_t * z_t - sigma_t * nonlinear_model(z_t, t, cond), support)
    z_s = alpha_s * x + sigma_s * (z_t - alpha_t * x) / sigma_t
    x_target = clamped(alpha_s * z_s - sigma_s * (nonlinear_model(z_s, s, cond) - 0.2), support)
    (skip_t, out_t), (skip_s, out_s) = scalings(t), scalings(s)
    goal = torch.cat([(skip_s * z_s + out_s * x_target)[:3], x[3:]])
    d2 = (skip_t * z_t + out_t * (alpha_t * z_t - sigma_t * student(z_t, t, cond)) - goal) ** 2
    expected = (d2 if loss == "l2" else (d2 + 1e-4).sqrt() - 1e-2).mean(dim=(1, 2, 3))
    assert max_error(losses, expected) < 1e-9 and asked == [999 - 20, 499 - 20, 39 - 20, 0]


@pytest.mark.parametrize("teacher_steps", [20, 25, 40, 50, 100, 250])
def test_sampler_s_timesteps_are_stock_diffusers_and_on_the_solver_grid(teacher_steps):
    grid, sampler = timestep_grid(teacher_steps, "trailing"), LCMScheduler(original_inference_steps=teacher_steps)
    for n in range(1, teacher_steps + 1):
        sampler.set_timesteps(n)
        assert sampler_timesteps(n, grid) == sampler.timesteps.tolist() and {*sampler_timesteps(n, grid)} <= {*grid}


def test_settings_are_the_paper_s():
    """Sec. 5; the student gets of the priors what the others leave [D12]. A LoRA has no input for w, nor a moving average."""
    assert [sampler_timesteps(n, GRID) for n in (3, 4)] == [[999, 679, 339], [999, 759, 499, 259]]
    args = parse_args(["--recipe", "sd15", "--teacher", "t", "--data", "d"])
    assert (args.updates, args.global_batch_size, args.learning_rate, args.teacher_steps) == (8000, 360, 1e-5, 50)
    assert (args.rollout_steps, args.guidance_range) == ((3, 4, 5), (6.0, 16.0))
    assert resolve_priors(args) == {"forward": [0.75, 0.5], "teacher": [0.0, 0.0], "student": [0.25, 0.5]}
    args = parse_args(["--lora_rank"])
    assert (args.lora_rank, parse_args(["--lora_rank", "4"]).lora_rank) == (64, 4)
    assert (*args.guidance_range, args.ema_decay, args.eval_guidance_scale) == (7.5, 7.5, 0.0, 7.5)


@pytest.mark.parametrize("source", ["student", "teacher"])
@torch.no_grad()
def test_states_are_those_of_diffusers_schedulers(source, tmp_path, teacher_folder, data_folder, monkeypatch):
    """Equal to the student's sampler's, and to the teacher's DDIM on the solver grid, guided and reflected; stopped at any
    point of three to five steps of the student's, but at the start only if asked for [D12]."""
    run = open_run(lcm_ddil, f"{paths(tmp_path, teacher_folder, data_folder)} {FLAGS} --reflect 0.5")
    (trained, _, teacher), stops = networks_of(run), noting(monkeypatch, lcm_ddil, "sample_rollout_timesteps")
    student, noise, lcm = run.model(trained.unwrapped), torch.Generator(), lcm_scheduler(run.pipe, 50)
    ddim = DDIMScheduler(**betas_of(run.pipe), clip_sample_range=0.5)
    ddim.set_timesteps(50)
    for _ in range(3):
        noise.set_state(run.rng.get_state())
        z_t, t, cond = rollout_batch(run, source, GRID, student, teacher)
        w, _ = 2 + 3 * torch.rand(4, generator=noise), torch.rand(4, generator=noise)  # the other: prompts to drop
        z, stop = torch.randn(4, 4, 8, 8, generator=noise), stops[-1][1]
        lcm.set_timesteps(next(n for n in (3, 4, 5) if stop == sampler_timesteps(n, GRID)[: len(stop)]))
        for k in stop[:-1] if source == "student" else GRID[: GRID.index(stop[-1])]:
            if source == "student":
                v = student(z, torch.full((4,), k), cond)
                eps = run.schedule.sigma[k] * z + run.schedule.alpha[k] * v
                z = lcm.step(eps, torch.tensor(k), z, generator=noise).prev_sample
            else:
                prompts = cond["prompt"], run.null["prompt"].expand_as(cond["prompt"])
                c, u = (run.pipe.unet(z, k, prompt).sample for prompt in prompts)
                z = ddim.step(u + w.view(-1, 1, 1, 1) * (c - u), k, z, use_clipped_model_output=True).prev_sample
        assert max_error(z, z_t) < 1e-4 and t.tolist() == [stop[-1]] * 4 and torch.equal(cond["w"], w)
    for run.args.store_start in (False, True):
        seen, first = {tuple(sample_rollout_timesteps(run, GRID)) for _ in range(500)}, 1 if run.args.store_start else 2
        assert seen == {tuple(sampler_timesteps(n, GRID)[:j]) for n in (3, 4, 5) for j in range(first, n + 1)}


def test_control_differs_in_the_latents_alone(tmp_path, teacher_folder, data_folder, monkeypatch):
    """[D16] --forward_control has forward diffusion at the timesteps of the rollouts, in their share of the updates."""
    monkeypatch.setattr(lcm_ddil, "rollout_batch", None)
    drawn, diffused = (noting(monkeypatch, lcm_ddil, name) for name in ("sample_rollout_timesteps", "forward_diffuse"))
    trained = noting(monkeypatch, lcm_ddil, "consistency_step")
    lcm_here(tmp_path, teacher_folder, data_folder, "--p_forward 0 --forward_control")
    for (_, stop), (_, (made, _)), (inputs, _) in zip(drawn, diffused, trained, strict=True):
        assert inputs[4] is made and inputs[5].tolist() == [stop[-1]] * 4


@pytest.mark.parametrize("flags", ["", "--ema_decay 0", LORA])
def test_networks_at_the_start(flags, tmp_path, teacher_folder, data_folder):
    """Student and target are the teacher, which stays what it is as the student moves, the only one that is trained."""
    run = open_run(lcm_ddil, f"{paths(tmp_path, teacher_folder, data_folder)} {FLAGS} {flags}")
    trained, ema, teacher = networks_of(run)
    assert (ema is None) == (flags != "") and not (ema and any(p.requires_grad for p in ema.parameters()))
    student, target = run.model(trained.network), run.model(ema or trained.unwrapped)
    plain = UNetModel(load_pipeline(str(teacher_folder)).unet, run.schedule, "epsilon", torch.no_grad)
    (x, ids), t = run.data.next(), torch.full((4,), 499)
    cond = draw_cond(run, ids)
    expected, before = plain(x, t, cond), teacher(x, t, cond)
    assert max_error(before, with_guidance(plain, run.null)(x, t, cond)) < 1e-5
    assert max(max_error(model(x, t, cond), expected) for model in (student, target)) < 1e-6
    inputs = student, target, teacher, x, t, t - 20, cond, None, "huber", 0.001
    consistency_step(run.schedule, *inputs).mean().backward()
    own, everything = ([p for p in net.parameters() if p.requires_grad] for net in (trained.unwrapped, run.pipe.unet))
    assert all(p.grad is not None for p in own) and len(everything) == len(own) * (flags == LORA)
    with torch.no_grad():
        [p.add_(0.1) for p in own]
        assert torch.equal(teacher(x, t, cond), before) and max_error(student(x, t, cond), expected) > 1e-3


@pytest.mark.parametrize("flags", ["", "--batch_size 2", "--ema_decay 0 --teacher_steps 25 --prompt_dropout .5"])
def test_plain_lcm_equals_a_short_independent_loop(flags, teacher_folder, data_folder, tmp_path):
    """--p_forward 1 through all of the script, bit for bit, in whole batches and accumulated ones: latent consistency
    distillation, which knows no prior, rollout or threshold."""
    lcm_here(tmp_path, teacher_folder, data_folder, f"--p_forward 1 --reflect none --seed 3 {flags}")
    args, noise = parse_args(flags.split()), seeded(derive_seed(3, "rank", 0))
    B, grid = args.batch_size or 4, torch.tensor([*timestep_grid(args.teacher_steps, "trailing"), CLEAN])
    pipe, rows = load_pipeline(str(teacher_folder)), open_rows(str(data_folder)).train
    schedule, prompts = load_schedule(pipe), PromptEncoder(pipe, "cpu")
    data, null = LatentData(rows, pipe, prompts, B, 3, 0, 1, noise, cache=True), prompts.null()
    unet = with_w_embedding(pipe.unet).requires_grad_(True).train()
    ema, optimizer = copy.deepcopy(unet), torch.optim.AdamW(unet.parameters())
    student = UNetModel(unet, schedule, "epsilon", torch.enable_grad)
    target, teacher = (UNetModel(net, schedule, "epsilon", torch.no_grad) for net in (ema, pipe.unet))
    for i in range(8):
        for _ in range(4 // B):
            x, ids = data.next()
            w = 2 + 3 * torch.rand(B, generator=noise)
            is_dropped = torch.rand(B, 1, 1, generator=noise) < args.prompt_dropout
            prompt, k = prompts.encode(ids)["prompt"], torch.randint(len(grid) - 1, (B,), generator=noise)
            cond, t, s = {"prompt": torch.where(is_dropped, null["prompt"], prompt), "w": w}, grid[k], grid[k + 1]
            z_t = add_noise(schedule, x, torch.randn(x.shape, generator=noise), t)
            goal = ddim_step(schedule, z_t, with_guidance(teacher, null)(z_t, t, cond), t, s)
            estimate = consistency_function(schedule, target, goal, s.clamp(min=0), cond).detach()
            goal = torch.where((s >= 0).view(-1, 1, 1, 1), estimate, goal)
            d2 = (consistency_function(schedule, student, z_t, t, cond) - goal) ** 2
            (((d2 + 0.001**2).sqrt() - 0.001).mean(dim=(1, 2, 3)).mean() / (4 // B)).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min((i + 1) / 2, (8 - i) / 7)
        optimizer.step()
        optimizer.zero_grad()
        for average, value in zip(ema.parameters(), unet.parameters()):
            average.data.lerp_(value.data, 1 - args.ema_decay)
    saved = weights_of(tmp_path / "pipeline")
    assert all(torch.equal(saved[name], weight) for name, weight in unet.state_dict().items())


def test_metrics(tmp_path, teacher_folder, data_folder):
    """One source an update [D14], by replaying the draws, and the forwards that it takes: for each of B samples a guided
    teacher 2, the target 1 (0 at the last grid point), the student 1 + 2 (backward), and the steps of a rollout."""
    flags = f"{FLAGS} --p_forward .4 .1 --p_teacher .3 --updates 12"
    lcm_here(tmp_path / "run", teacher_folder, data_folder, flags)
    run = open_run(lcm_ddil, f"{paths(tmp_path / 'replay', teacher_folder, data_folder)} {flags}")
    priors, before, seen = resolve_priors(run.args), 0, set()
    prior = SamplingPrior(run.shared_rng, **priors)
    for update, row in enumerate(read_metrics(tmp_path / "run")):
        source, forwards = prior.draw(part_of(update, 12, 2)), int(row["unet_forwards"])
        assert [name for name in priors if row[f"loss_{name}"]] == [source] and row[f"loss_{source}"] == row["loss"]
        stop = [999] if source == "forward" else sample_rollout_timesteps(run, GRID)
        expected = 6 + (len(stop) - 1 if source == "student" else 2 * GRID.index(stop[-1]))
        assert 4 * expected - 4 * (source == "forward") <= forwards - before <= 4 * expected
        before, seen = forwards, seen | {source}
    assert seen == {*priors}


@pytest.mark.parametrize("teacher, steps", [("teacher", 1), ("teacher", 4), ("xl", 2), ("gc", 4)])
def test_stock_diffusers_samples_the_same(teacher, steps, request, data_folder, tmp_path, monkeypatch):
    """As the last sample grid: w embedding, timesteps, re-noising; also from a teacher that takes w, with its own guidance."""
    grids, flags = noting(monkeypatch, Run, "save_preview"), f"--updates 2 --student_steps {steps} --p_forward 0 1"
    lcm_here(tmp_path / "run", request.getfixturevalue(f"{teacher}_folder"), data_folder, flags)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    (stock, other), rows = (stock_latents(pipe, steps, w) for w in (4.0, 7.0)), grids[-1][0][1]
    assert max_error(rows[f"student, {steps} steps"][:4], stock) < 1e-3 < max_error(stock, other)
    with pytest.raises(SystemExit, match="is an LCM already"):
        lcm_here(tmp_path / "again", tmp_path / "run" / "pipeline", data_folder, flags)


@pytest.mark.parametrize("kind", ["teacher", "xl"])
def test_lora_in_stock_diffusers(kind, request, data_folder, tmp_path, monkeypatch):
    """Loaded into its teacher, and fused in what was saved: as the last sample grid. It resumes, and with checkpointing."""
    teacher, grids = request.getfixturevalue(f"{kind}_folder"), noting(monkeypatch, Run, "save_preview")
    flags, stops, folder = f"{LORA} --updates 3 --teacher_steps 20", iter([True, False, False]), tmp_path / "whole"
    lcm_here(folder, teacher, data_folder, flags)
    ours, pipe = grids[-1][0][1]["student, 4 steps"][:4], DiffusionPipeline.from_pretrained(teacher)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=20)
    assert max_error(stock_latents(pipe, 4, 1.0), ours) > 1e-2
    pipe.load_lora_weights(folder / "lora")
    for stock in (pipe, DiffusionPipeline.from_pretrained(folder / "pipeline")):
        assert max_error(stock_latents(stock, 4, 1.0), ours) < 1e-3
    if kind == "xl":
        return
    monkeypatch.setattr(StopRequest, "asked", property(lambda _: next(stops)))
    with pytest.raises(SystemExit):
        lcm_here(tmp_path / "run", teacher, data_folder, f"{flags} --gradient_checkpointing")
    run_here("--resume", "--output_dir", tmp_path / "run", script="lcm_ddil.py")
    lora, again = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (folder, tmp_path / "run"))
    assert max(max_error(again[name], lora[name]) for name in lora) < 1e-5


ENDS = """
--teacher_steps 32 | --teacher_steps 32: the solver's steps must divide 1000
--rollout_steps 1 3 | --rollout_steps 1: leaves the solver grid; give 2 to 50 steps
--ema_decay 1 | --ema_decay 1.0: the target would never move
--p_forward .5 .5 --p_teacher .1 .1 .1 | give one value, or one for each part
--p_forward .5 --p_teacher .2 --p_student .2 | must be >= 0 and sum to 1 in each part
--forward_control --p_forward 1 | --forward_control: with --p_forward [1.0] there are no rollouts
--lora_rank 2 | --guidance_range (2.0, 5.0): a LoRA has no input for w
--lora_rank 2 --guidance_range 3 3 --ema_decay .5 | --ema_decay 0.5: a LoRA's target is the student itself
--lora_rank 2 --guidance_range 3 3 --teacher GC | takes w, for which a LoRA has no input
--dry_run --p_forward 0 | at 999, where sampling starts
"""  # flags, and what is said


@pytest.mark.parametrize("flags, said", [line.split(" | ") for line in ENDS.strip().splitlines()])
def test_what_ends_before_a_run_begins(flags, said, teacher_folder, gc_folder, tmp_path, data_folder, capsys):
    with pytest.raises(SystemExit) as caught:
        lcm_here(tmp_path / "run", teacher_folder, data_folder, flags.replace("GC", str(gc_folder)))
    assert said in f"{caught.value}" + "".join(capsys.readouterr()) and not (tmp_path / "run").exists()
