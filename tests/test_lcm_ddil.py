"""lcm_ddil.py: the loss against closed forms, the run against a short independent loop and against stock diffusers."""

import copy
import json
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from conftest import refusal, W_RANGE, interrupt, rows_of, run_here, run_script, save_teacher, signals_kept, weights_of
from datasets import Dataset, load_dataset
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from test_common import MEAN, SD64, SHAPE, STD, Counted, box, gaussian_model, max_error, nonlinear_model, randn, seeded

import lcm_ddil
from common import (
    CLEAN, LatentData, PromptEncoder, UNetModel, add_noise, consistency_function, consistency_rollout, ddim_step,
    last_checkpoint, load_images, load_pipeline, load_schedule, load_state, rotation, seed_of, teacher_rollout, timestep_grid,
    with_guidance,
)  # fmt: skip
from lcm_ddil import consistency_step, draw_stop, parse_args, part_of, sampler_timesteps

GRID = timestep_grid(50, "trailing")
SMALL = ["--global_batch_size", "4", "--warmup", "1", "--log_every", "1", "--learning_rate", "1e-3", "--updates", "8"]
W = ["--guidance_range", *map(str, W_RANGE)]
LORA = ["--lora_rank", "2", "--learning_rate", "0.05"]


def command(folder, teacher, data, *flags) -> list:
    return ["--teacher", teacher, "--data", data, "--output_dir", folder, *SMALL, *(W if "--lora_rank" not in flags else []), *flags]


def lcm_here(*args) -> None:
    run_here(*args, script="lcm_ddil.py")


# --- the loss ---


def flow_end(z_t, t):
    """Gaussian data: where the probability flow leads from z_t."""
    alpha_t, sigma_t = SD64.at(t)
    return MEAN + STD * (z_t - alpha_t * MEAN) / ((alpha_t * STD) ** 2 + sigma_t**2).sqrt()


def flow_model(z_t, t, cond):
    """v for which the consistency function, scalings included, is the flow's end."""
    alpha_t, sigma_t = SD64.at(t)
    scaled_t = 10.0 * t.view(-1, 1, 1, 1)
    c_skip, c_out = 0.25 / (scaled_t**2 + 0.25), scaled_t / (scaled_t**2 + 0.25).sqrt()
    return (alpha_t * z_t - (flow_end(z_t, t) - c_skip * z_t) / c_out) / sigma_t


def l2(teacher, z_t, t, s, student=flow_model, target=flow_model, support=None):
    return consistency_step(SD64, student, target, teacher, z_t, t, s, {}, support, "l2", 0.001)


def test_exact_consistency_function_has_no_loss_on_exact_steps():
    z_t, t = randn(len(GRID), *SHAPE), torch.tensor(GRID)
    s = torch.tensor([*GRID[1:], CLEAN])

    def exact_step(z_t, t, cond):
        """The v from which DDIM goes where the flow does."""
        (a_t, s_t), (a_s, s_s) = SD64.at(t), SD64.at(s)
        scale = (((a_s * STD) ** 2 + s_s**2) / ((a_t * STD) ** 2 + s_t**2)).sqrt()
        c, d = rotation(SD64, t, s)
        return (c * z_t - (a_s * MEAN + scale * (z_t - a_t * MEAN))) / d

    assert l2(exact_step, z_t, t, s).max() < 1e-20
    assert l2(gaussian_model, z_t, t, s).max() > 1e-8


def test_one_ddim_step_is_exact_to_second_order():
    """The root of the loss falls as h^2."""
    z_t, t = randn(64, *SHAPE), torch.full((64,), 499)
    errors = [l2(gaussian_model, z_t, t, t - h).mean().sqrt() for h in (40, 20, 10, 5)]
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.2 < fine / coarse < 0.3


def test_at_the_clean_end_the_target_is_the_teacher_s_estimate():
    """Without a call of the target network."""
    z_t, t = randn(4, *SHAPE), torch.tensor([19, 19, 39, 19])
    s, target = torch.tensor([CLEAN, CLEAN, 19, CLEAN]), Counted(flow_model)
    losses = l2(gaussian_model, z_t, t, s, target=target)
    assert target.samples == 1
    z_s = ddim_step(SD64, z_t, gaussian_model(z_t, t, {}), t, s)
    expected = (consistency_function(SD64, flow_model, z_t, t, {}) - z_s).pow(2).mean(dim=(1, 2, 3))
    assert max_error(losses[[0, 1, 3]], expected[[0, 1, 3]]) < 1e-15


def test_teacher_and_target_are_reflected_but_not_the_student():
    z_t, t, support = 3 * randn(8, *SHAPE), torch.full((8,), 499), box(0.7)
    s = t - 20
    z_s = ddim_step(SD64, z_t, nonlinear_model(z_t, t, {}), t, s, support)
    x_target = consistency_function(SD64, nonlinear_model, z_s, s, {}, support)
    x_hat = consistency_function(SD64, nonlinear_model, z_t, t, {})
    losses = l2(nonlinear_model, z_t, t, s, nonlinear_model, nonlinear_model, support)
    assert max_error(losses, (x_hat - x_target).pow(2).mean(dim=(1, 2, 3))) < 1e-15
    assert x_target.abs().max() < 0.7 + 1e-4 and x_hat.abs().max() > 1


def test_huber():
    a, b = randn(8, *SHAPE), randn(8, *SHAPE, seed=1)
    expected = torch.stack([(((p - q) ** 2 + 1e-4).sqrt() - 1e-2).mean() for p, q in zip(a, b)])
    assert max_error(lcm_ddil.distance(a, b, "huber", 0.01), expected) < 1e-15
    assert max_error(lcm_ddil.distance(a, b, "l2", 0.01), (a - b).pow(2).mean(dim=(1, 2, 3))) < 1e-15


def test_only_the_student_gets_a_gradient():
    scales = {name: torch.nn.Parameter(torch.tensor(0.5)) for name in ("student", "target", "teacher")}
    models = {name: lambda z, t, cond, scale=scale: scale * z for name, scale in scales.items()}
    z_t, t = randn(4, *SHAPE), torch.full((4,), 499)
    l2(models["teacher"], z_t, t, t - 20, models["student"], models["target"]).mean().backward()
    assert scales["student"].grad.abs() > 0 and scales["target"].grad is None and scales["teacher"].grad is None


# --- grids and priors ---


@pytest.mark.parametrize("teacher_steps", [20, 25, 40, 50, 100, 250])
def test_sampler_s_timesteps_are_stock_diffusers_and_on_the_solver_grid(teacher_steps):
    grid = timestep_grid(teacher_steps, "trailing")
    for n in range(1, teacher_steps + 1):
        sampler = LCMScheduler(original_inference_steps=teacher_steps)
        sampler.set_timesteps(n)
        assert sampler_timesteps(n, grid) == sampler.timesteps.tolist()
        assert set(sampler_timesteps(n, grid)) <= set(grid)


def test_timesteps_off_the_solver_grid_are_named(teacher_folder):
    pipe, args = load_pipeline(str(teacher_folder)), parse_args([])
    lcm_ddil.check_sampler(pipe, args, GRID)
    with pytest.raises(SystemExit, match=r"\[259\] of 4 steps are not on the solver grid"):
        lcm_ddil.check_sampler(pipe, args, [t for t in GRID if t != 259])


def test_paper_s_timesteps():
    assert sampler_timesteps(3, GRID) == [999, 679, 339] and sampler_timesteps(4, GRID) == [999, 759, 499, 259]
    assert sampler_timesteps(5, GRID) == [999, 799, 599, 399, 199]


def test_equal_parts():
    assert [part_of(u, 8, 2) for u in range(8)] == [0] * 4 + [1] * 4
    assert [part_of(u, 7, 3) for u in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_priors_of_the_flags():
    """The student gets what the others leave [D12]; a single value holds for all parts."""
    priors = lambda *flags: {k: v for k, v in lcm_ddil.priors_of(parse_args([*flags])).items()}  # noqa: E731
    assert priors() == dict(forward=[0.75, 0.5], teacher=[0.0, 0.0], student=[0.25, 0.5])
    assert priors("--p_forward", "1") == dict(forward=[1.0], teacher=[0.0], student=[0.0])
    assert priors("--p_forward", ".5", "--p_teacher", "0", ".5")["student"] == [0.5, 0.0]
    assert priors("--p_forward", ".8", "--p_teacher", ".2")["student"] == [0.0]  # not -5e-17
    assert priors("--p_forward", "0", "--p_student", "1", ".5", "--p_teacher", "0", ".5")["forward"] == [0.0, 0.0]


def test_recipes_hold_the_paper_s_numbers():
    args = parse_args(["--recipe", "sd15", "--teacher", "t", "--data", "d"])
    assert (args.updates, args.global_batch_size, args.learning_rate, args.teacher_steps) == (8000, 360, 1e-5, 50)
    assert list(args.rollout_steps) == [3, 4, 5] and args.reflect == "measured" and args.batch_size * 6 == 360


# --- one run ---
























def plain_lcm(student, target, teacher, data, prompts, schedule, noise, updates, lr, decay, lo, hi):
    """Latent consistency distillation. It knows no prior, no rollout and no threshold."""
    optimizer = torch.optim.AdamW(student.unet.parameters(), lr=lr)
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = lr * min((i + 1) / 2, (updates - i) / (updates - 1))
        x, ids = data.next()
        w, _ = lo + (hi - lo) * torch.rand(len(x), generator=noise), torch.rand(len(x), generator=noise)
        cond, k = prompts.encode(ids) | {"w": w}, torch.randint(50, (len(x),), generator=noise)
        t, s = torch.tensor(GRID)[k], torch.tensor([*GRID[1:], CLEAN])[k]
        z_t = add_noise(schedule, x, torch.randn(x.shape, generator=noise), t)
        z_s = ddim_step(schedule, z_t, teacher(z_t, t, cond), t, s)
        goal, inner = z_s.clone(), s >= 0
        rows = {name: value[inner] for name, value in cond.items()}
        goal[inner] = consistency_function(schedule, target, z_s[inner], s[inner], rows).detach()
        d = consistency_function(schedule, student, z_t, t, cond) - goal
        ((d**2 + 0.001**2).sqrt() - 0.001).mean(dim=(1, 2, 3)).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for a, p in zip(target.unet.parameters(), student.unet.parameters()):
            a.data.lerp_(p.data, 1 - decay)


@pytest.mark.parametrize("seed", [3])
def test_plain_lcm_equals_a_short_independent_loop(teacher_folder, data_folder, tmp_path, seed):
    """--p_forward 1 through all of the script, bit for bit."""
    lcm_here(*command(tmp_path / "run", teacher_folder, data_folder, "--p_forward", 1, "--reflect", "none", "--seed", seed))
    pipe, (dataset, _) = load_pipeline(str(teacher_folder)), load_images(str(data_folder))
    schedule, prompts, noise = load_schedule(pipe), PromptEncoder(pipe, "cpu"), seeded(seed_of(seed, "rank", 0))
    data = LatentData(dataset, pipe, prompts, 4, seed, 0, 1, noise, cache=True)
    student = UNetModel(lcm_ddil.with_w_embedding(pipe.unet).requires_grad_(True).train(), schedule, "epsilon", torch.enable_grad)
    target = UNetModel(copy.deepcopy(student.unet), schedule, "epsilon", torch.no_grad)
    teacher = with_guidance(UNetModel(pipe.unet, schedule, "epsilon", torch.no_grad), prompts.null())
    plain_lcm(student, target, teacher, data, prompts, schedule, noise, 8, 1e-3, 0.95, *W_RANGE)
    saved = load_pipeline(str(tmp_path / "run" / "pipeline")).unet.state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in student.unet.state_dict().items())


# --- whole runs ---


FLAGS = ["--p_forward", 0.4, "--p_teacher", 0.2]  # so that all sources are drawn


@pytest.fixture(scope="session")
def finished_lcm(tmp_path_factory, teacher_folder, data_folder):
    folder = tmp_path_factory.mktemp("lcm") / "run"
    lcm_here(*command(folder, teacher_folder, data_folder, *FLAGS))
    return folder


@pytest.fixture(scope="session")
def finished_lora(tmp_path_factory, teacher_folder, data_folder):
    folder = tmp_path_factory.mktemp("lora") / "run"
    lcm_here(*command(folder, teacher_folder, data_folder, *LORA))
    return folder


def test_lcm_run_folder(finished_lcm):
    for name in ("pipeline", "checkpoints", "metrics.csv", "config.json", "samples", "lcm_ddil.py", "common.py"):
        assert (finished_lcm / name).exists(), name
    rows = rows_of(finished_lcm)
    assert [int(row["total_updates"]) for row in rows] == [*range(1, 9)]
    assert {s for s in ("forward", "teacher", "student") for row in rows if row[f"loss_{s}"]} == {"forward", "teacher", "student"}
    assert all(float(row["loss"]) > 0 and 0 <= float(row[c]) <= 1 for row in rows for c in ("moved_by_reflect", "moved_in_target"))
    assert len([*(finished_lcm / "samples").glob("*.png")]) == 2


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stock_diffusers_samples_the_lcm_s_images(finished_lcm, steps):
    """Within 1/255 of our rollout, from the same noise: w embedding, timesteps, re-noising."""
    captions, w = ["a", "image 3 of test"], 4.0
    stock = DiffusionPipeline.from_pretrained(finished_lcm / "pipeline")
    stock.set_progress_bar_config(disable=True)
    z = randn(2, 4, 8, 8, dtype=torch.float32)
    settings = dict(num_inference_steps=steps, latents=z, output_type="pt")
    images = stock(captions, guidance_scale=w, generator=seeded(5), **settings).images
    assert stock.scheduler.timesteps.tolist() == sampler_timesteps(steps, GRID)

    pipe = load_pipeline(str(finished_lcm / "pipeline"))
    prompts = PromptEncoder(pipe, "cpu")
    cond = prompts.encode(prompts.tokenize(captions)) | {"w": torch.full((2,), w)}
    model = UNetModel(pipe.unet, load_schedule(pipe), "epsilon", torch.no_grad)
    timesteps = [*sampler_timesteps(steps, GRID), CLEAN]
    latents = consistency_rollout(load_schedule(pipe), model, z, timesteps, cond, seeded(5))[-1]
    with torch.no_grad():
        ours = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    assert max_error(ours.clamp(0, 1), images) < 1 / 255
    assert max_error(images, stock(captions, guidance_scale=w + 3, generator=seeded(5), **settings).images) > 0


def test_lora_in_stock_diffusers(finished_lora, teacher_folder):
    """Loaded into the teacher's own pipeline, fused there, and as the fused pipeline that was saved: the same images."""
    def sample(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(["a", "b"], num_inference_steps=4, guidance_scale=1.0, generator=seeded(5), output_type="pt",
                    latents=randn(2, 4, 8, 8, dtype=torch.float32)).images  # fmt: skip

    stock = StableDiffusionPipeline.from_pretrained(teacher_folder)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    without = sample(stock)
    stock.load_lora_weights(finished_lora / "lora")
    loaded = sample(stock)
    stock.fuse_lora()
    assert max_error(loaded, sample(stock)) < 1e-4
    assert max_error(loaded, sample(DiffusionPipeline.from_pretrained(finished_lora / "pipeline"))) < 1e-4
    assert max_error(loaded, without) > 1e-2


def test_lora_s_guidance_is_fixed():
    args = parse_args(["--lora_rank", "4"])
    assert tuple(args.guidance_range) == (7.5, 7.5)
    assert (args.ema_decay, args.eval_guidance_scale) == (0.0, 7.5)
    for flags in (["--guidance_range", "2", "5"], ["--ema_decay", ".5"]):
        with pytest.raises(SystemExit, match=flags[0]):
            parse_args(["--lora_rank", "4", *flags])


def assert_same_run(folder, reference) -> None:
    ours, theirs = (weights_of(f / "pipeline") for f in (folder, reference))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [r | {"seconds": ""} for r in rows_of(folder)] == [r | {"seconds": ""} for r in rows_of(reference)]


def test_killed_lcm_resumes_as_if_unbroken(finished_lcm, tmp_path, teacher_folder, data_folder):
    folder = tmp_path / "run"
    flags = command(folder, teacher_folder, data_folder, *FLAGS, "--save_every", 3)
    process = interrupt("lcm_ddil.py", folder, signal.SIGKILL, 3, *flags)
    assert process.returncode == -signal.SIGKILL
    saved = json.loads((last_checkpoint(folder / "checkpoints") / "progress.json").read_text())
    assert 3 <= saved["total"] < 8
    lcm_here("--resume", "--output_dir", folder)
    assert_same_run(folder, finished_lcm)




@pytest.mark.parametrize("flags", [[], LORA])
def test_lcm_on_two_processes(tmp_path, teacher_folder, data_folder, flags):
    """Ranks share the source and the stop, have noise of their own, and end with equal weights; and it can be resumed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = command(tmp_path / "run", teacher_folder, data_folder, *FLAGS, *flags)
    process = run_script("lcm_ddil", tmp_path, *flags, script="tests/record.py", launcher=launcher)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["world_size"] == second["world_size"] == 2
    for name in {"student", "target"} & set(first):
        assert len(first[name]) == len(second[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name])), name
    assert len(first["batches"]) == len(second["batches"]) == 8
    for one, other in zip(first["batches"], second["batches"]):
        a, b, t, u = one["z_t"], other["z_t"], one["t"], other["t"]
        assert a.shape == b.shape and not torch.isclose(a, b).flatten(1).all(dim=1).any()
        assert len(set(t.tolist())) > 1 or torch.equal(t, u)  # a rollout stops at the same point on both
    ours, theirs = (load_state(last_checkpoint(tmp_path / "run" / "checkpoints") / f"rank-{rank}.pt") for rank in range(2))
    assert torch.equal(ours["shared"], theirs["shared"]) and not torch.equal(ours["noise"], theirs["noise"])


@pytest.mark.parametrize("lora", [[], LORA])
def test_gradient_checkpointing_changes_no_lcm(tmp_path, teacher_folder, data_folder, lora):
    flags = teacher_folder, data_folder, "--updates", 3, *FLAGS, *lora
    lcm_here(*command(tmp_path / "a", *flags))
    lcm_here(*command(tmp_path / "b", *flags, "--gradient_checkpointing"))
    a, b = (weights_of(tmp_path / run / "pipeline") for run in "ab")
    assert max(max_error(a[name], b[name]) for name in a) < 1e-6


@pytest.mark.parametrize("flags", [["--ema_decay", 0], ["--prompt_dropout", 0.5], ["--teacher_steps", 25], ["--loss", "l2"]])
def test_other_settings_train(tmp_path, teacher_folder, data_folder, flags):
    lcm_here(*command(tmp_path / "run", teacher_folder, data_folder, "--updates", 2, *FLAGS, *flags))
    before, after = weights_of(teacher_folder), weights_of(tmp_path / "run" / "pipeline")
    assert max(max_error(after[name], before[name]) for name in before) > 1e-4


def test_lora_of_sdxl_s_shape(tmp_path, xl_folder, data_folder):
    lcm_here(*command(tmp_path / "run", xl_folder, data_folder, "--updates", 2, *LORA))
    stock = DiffusionPipeline.from_pretrained(xl_folder)
    stock.load_lora_weights(tmp_path / "run" / "lora")
    assert stock.get_active_adapters()


def test_lcm_of_sdxl_s_shape(tmp_path, xl_folder, data_folder):
    lcm_here(*command(tmp_path / "run", xl_folder, data_folder, "--updates", 2))
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    stock.set_progress_bar_config(disable=True)
    assert stock("a", num_inference_steps=2, guidance_scale=4.0, output_type="pt").images.isfinite().all()


def test_lcm_from_a_teacher_that_takes_w(tmp_path, gc_folder, data_folder):
    """As a PD run's stages/gc: its own guidance, one forward instead of two."""
    lcm_here(*command(tmp_path / "run", gc_folder, data_folder, "--updates", 2, "--p_forward", 1))
    spent = int(rows_of(tmp_path / "run")[0]["unet_forwards"])
    assert 4 * 4 <= spent <= 5 * 4


# --- bad input ---


@pytest.mark.parametrize("flags", [
    "--teacher_steps 32", "--teacher_steps 0", "--teacher_steps 1000", "--p_forward .8 --p_teacher .5", "--student_steps 51", "--student_steps 0", "--rollout_steps 3 60",
    "--rollout_steps 1", "--p_forward 1.5", "--p_forward -0.5", "--p_forward nan", "--p_forward .5 .6 .7 --p_teacher .1 .2",
    "--p_forward .5 --p_student .2", "--lora_rank -1", "--learning_rate 0", "--learning_rate nan", "--huber_c 0",
    "--ema_decay 1", "--ema_decay -.1", "--prompt_dropout 2", "--global_batch_size 5 --batch_size 2", "--batch_size 0",
    "--reflect 0", "--reflect sometimes", "--recipe sd21", "--recipe sd15", "--updates 0", "--data no/such/folder",
    "--teacher no/such/folder", "--guidance_range 6 2", "--lora_rank 2 --guidance_range 1 2", "--warmup -1",
    "--report_to nonsense", "--forward_control --p_forward 1",
])  # fmt: skip
def test_bad_lcm_flag_is_named(flags, tmp_path, teacher_folder, data_folder):
    base = ["--data", data_folder] if "sd15" in flags else ["--teacher", teacher_folder, "--data", data_folder]
    message = refusal(*base, "--output_dir", tmp_path / "run", *SMALL, "--max_updates", 1, *flags.split(), script="lcm_ddil.py")
    named = {"--recipe sd15": "--teacher", "--lora_rank 2 --guidance_range 1 2": "--guidance_range"}.get(flags, flags.split()[0])
    assert named in message
    assert not (tmp_path / "run").exists()


def test_lcm_of_an_lcm_is_refused(finished_lcm, tmp_path, data_folder):
    with pytest.raises(SystemExit, match="is an LCM already"):
        lcm_here(*command(tmp_path / "run", finished_lcm / "pipeline", data_folder))
    assert not (tmp_path / "run").exists()


def test_lora_of_a_teacher_that_takes_w_is_refused(gc_folder, tmp_path, data_folder):
    with pytest.raises(SystemExit, match="--lora_rank 2"):
        lcm_here(*command(tmp_path / "run", gc_folder, data_folder, *LORA))


def test_lcm_s_loss_must_be_finite(tmp_path, data_folder):
    teacher = save_teacher(tmp_path / "teacher")
    with pytest.raises(SystemExit, match=r"update [2345678]: the .* is (nan|inf)"):
        lcm_here(*command(tmp_path / "run", teacher, data_folder, "--learning_rate", 1e30))


@pytest.mark.parametrize("captions", [["a", None], []])
def test_held_out_captions_are_checked_before_a_run_is_deleted(captions, tmp_path, teacher_folder, data_folder):
    data, rows = tmp_path / "data", Dataset.from_dict({"image": [None] * len(captions), "caption": captions})
    data.mkdir()
    load_dataset(str(data_folder))["train"].to_parquet(data / "train.parquet")
    rows.cast(load_dataset(str(data_folder))["train"].features).to_parquet(data / "test.parquet")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="--data .*test"):
        lcm_here(*command(tmp_path / "run", teacher_folder, data, "--overwrite"))
    assert (tmp_path / "run" / "config.json").exists()


def test_caption_that_is_missing_is_skipped_and_reported(tmp_path, teacher_folder, data_folder, capsys):
    """On a rollout, which reads captions alone."""
    data, rows = tmp_path / "data", load_dataset(str(data_folder))["train"]
    data.mkdir()
    rows = rows.map(lambda row, i: {"caption": None if i == 7 else row["caption"]}, with_indices=True, features=rows.features)
    rows.to_parquet(data / "train.parquet")
    load_dataset(str(data_folder))["test"].to_parquet(data / "test.parquet")
    flags = "--p_forward", 0, "--updates", 20, "--reflect", "none", "--no-cache_latents"
    lcm_here(*command(tmp_path / "run", teacher_folder, data, *flags))
    assert "skipped 1 x no caption" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--dry_run", "--check_data"])
def test_lcm_reports_write_nothing(flag, tmp_path, teacher_folder, data_folder, capsys):
    lcm_here(*command(tmp_path / "run", teacher_folder, data_folder, flag))
    assert {"--dry_run": "accumulated", "--check_data": "usable"}[flag] in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_resume_refuses_another_lcm(finished_lcm, tmp_path):
    shutil.copytree(finished_lcm, tmp_path / "run")
    with pytest.raises(SystemExit, match="ema_decay: saved 0.95, now 0.5"):
        lcm_here("--resume", "--output_dir", tmp_path / "run", "--ema_decay", 0.5)
