"""pd_ddil.py: the steps of the algorithm against closed forms, and whole stages against a short independent loop."""

import copy
import json
import shutil
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL, W_RANGE, run_here, signals_kept
from record import record
from test_common import (
    MEAN, SD, SD64, SHAPE, STD, Counted, box, centred, gain, gaussian_model, max_error, nonlinear_model, randn, seeded,
)  # fmt: skip

import pd_ddil
from common import (
    CLEAN, LatentData, PromptEncoder, UNetModel, add_noise, ddim_step, eps_from_v, load_images, load_pipeline,
    load_schedule, rotation, seed_of, student_rollout, teacher_rollout, timestep_grid, v_from_prediction, with_guidance,
    x_from_v,
)  # fmt: skip
from pd_ddil import (collect, dagger_batch, forward_batch, guidance_step, parse_args, pd_step, plan_phases, teacher_landing, v_step, with_w_embedding)


def intervals(n: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(t, m, s), each [1], of all intervals of the student of an n-step teacher; the last s is the clean end."""
    tau = torch.tensor([*timestep_grid(n), CLEAN])
    return [(tau[j : j + 1], tau[j + 1 : j + 2], tau[j + 2 : j + 3]) for j in range(0, n, 2)]


def v_target_of(schedule, z_t, z_s, t, s):
    """Where pd_step has its minimum over the student's output: one Newton step, as the loss is quadratic in it."""
    with torch.enable_grad():
        v = torch.zeros_like(z_t, requires_grad=True)
        loss = pd_step(schedule, lambda *_: v, z_t, z_s, t, s, {}).sum()
        (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), v)
    return -gradient.detach() / curvature


# --- the target and the loss of progressive distillation ---


@pytest.mark.parametrize("support", [None, box(0.7)])
@pytest.mark.parametrize("n", [32, 8, 2])
def test_one_step_with_the_target_lands_where_two_of_the_teacher_s_did(n, support):
    """For any network, here a nonlinear one; the student's own step is not reflected."""
    for t, m, s in intervals(n):
        z_t = randn(4, *SHAPE)
        z_s = teacher_landing(SD64, nonlinear_model, z_t, t, m, s, {}, support)
        assert max_error(ddim_step(SD64, z_t, v_target_of(SD64, z_t, z_s, t, s), t, s), z_s) < 1e-12


@pytest.mark.parametrize("support", [None, box(0.7)])
def test_landing_is_a_rollout_of_two_steps(support):
    z_t, grid = randn(4, *SHAPE), [749, 624, 500]
    t, m, s = torch.tensor(grid).view(3, 1)
    landed = teacher_landing(SD64, nonlinear_model, z_t, t, m, s, {}, support)
    assert torch.equal(landed, teacher_rollout(SD64, nonlinear_model, z_t, grid, {}, support)[-1])


@pytest.mark.parametrize("n", [32, 8, 2])
def test_target_of_the_last_interval_is_the_teacher_s_x(n):
    """[D6] At the clean end the target is the teacher's x estimate at m, exactly: z_s = x_hat, x_target = z_s."""
    t, m, s = intervals(n)[-1]
    z_t = randn(4, *SHAPE, dtype=torch.float32)
    z_m = ddim_step(SD, z_t, nonlinear_model(z_t, t, {}), t, m)
    x_m = x_from_v(SD, z_m, nonlinear_model(z_m, m, {}), m)
    z_s = teacher_landing(SD, nonlinear_model, z_t, t, m, s, {}, None)
    assert torch.equal(z_s, x_m)
    assert max_error(x_from_v(SD, z_t, v_target_of(SD, z_t, z_s, t, s), t), x_m) < 1e-6


@pytest.mark.parametrize("n", [32, 8, 2])
def test_loss_equals_the_paper_s(n):
    """Eq. 3 with the target of Alg. 3 line 9, as printed: in x, with divisions by sigma_t, slowly."""
    for t, m, s in intervals(n):
        z_t, v_s = randn(4, *SHAPE), randn(4, *SHAPE, seed=1)
        z_s = teacher_landing(SD64, nonlinear_model, z_t, t, m, s, {}, None)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = SD64.at(t), SD64.at(s)
        x_s = alpha_t * z_t - sigma_t * v_s
        target = (z_s - sigma_s / sigma_t * z_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
        weight = max(1.0, (alpha_t**2 / sigma_t**2).item())
        slow = (weight * (x_s - target) ** 2).flatten(1).mean(dim=1)
        ours = pd_step(SD64, lambda *_: v_s, z_t, z_s, t, s, {})
        assert ours.shape == (4,) and max_error(ours / slow, torch.ones(4)) < 1e-9


def test_loss_takes_each_sample_s_own_timestep():
    t, m, s = (torch.cat(column) for column in zip(*intervals(8)))
    z_t, v_s = randn(4, *SHAPE), randn(4, *SHAPE, seed=1)
    z_s = teacher_landing(SD64, nonlinear_model, z_t, t, m, s, {}, box(0.7))
    together = pd_step(SD64, lambda *_: v_s, z_t, z_s, t, s, {})
    for i in range(4):
        row = slice(i, i + 1)
        alone = teacher_landing(SD64, nonlinear_model, z_t[row], t[row], m[row], s[row], {}, box(0.7))
        assert max_error(z_s[row], alone) < 1e-12
        assert max_error(together[row], pd_step(SD64, lambda *_: v_s[row], z_t[row], alone, t[row], s[row], {})) < 1e-12


def distilled(teacher, n: int):
    """The ideal student of an n-step teacher: at each of its timesteps the network that pd_step asks for."""
    interval_at = {t.item(): (m, s) for t, m, s in intervals(n)}

    def student(z_t, t, cond):
        m, s = interval_at[t[0].item()]
        z_s = teacher_landing(SD64, teacher, z_t, t, m.expand_as(t), s.expand_as(t), cond, None)
        return v_target_of(SD64, z_t, z_s, t, s.expand_as(t))

    return student


def test_fixed_point_through_all_halvings():
    """Gaussian data: 32 -> 16 -> ... -> 1 ideal halvings, and one step still goes where 32 went."""
    noise = randn(2, *SHAPE)
    teacher, states = gaussian_model, teacher_rollout(SD64, gaussian_model, noise, [*timestep_grid(32), CLEAN], {})
    total = torch.tensor([gain(t, s) for t, s in pairwise([*timestep_grid(32), CLEAN])]).prod()
    for n in (32, 16, 8, 4, 2):
        student = distilled(teacher, n)
        t, m, s = intervals(n)[0]
        z_s = teacher_landing(SD64, teacher, noise, t, m, s, {}, None)
        assert pd_step(SD64, student, noise, z_s, t.expand(2), s.expand(2), {}).max() < 1e-20
        beside = lambda z_t, t, cond, student=student: student(z_t, t, cond) + 0.01  # noqa: E731
        assert pd_step(SD64, beside, noise, z_s, t.expand(2), s.expand(2), {}).min() > 1e-5
        ours = student_rollout(SD64, student, noise, [*timestep_grid(n // 2), CLEAN], {})
        assert max(max_error(a, b) for a, b in zip(ours, states[:: 64 // n])) < 1e-10
        assert max_error(centred(ours[-1], CLEAN), total * centred(noise, 999)) < 1e-6
        teacher = student


def test_only_the_student_gets_a_gradient():
    scale_t, scale_s = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.tensor(0.4))
    t, m, s = intervals(8)[1]
    z_t = randn(4, *SHAPE, dtype=torch.float32)
    z_s = teacher_landing(SD, lambda z, t, cond: scale_t * z, z_t, t, m, s, {}, None)
    pd_step(SD, lambda z, t, cond: scale_s * z, z_t, z_s, t, s, {}).mean().backward()
    assert not z_s.requires_grad and scale_t.grad is None and scale_s.grad.abs() > 0


# --- eps -> v, guidance ---


def v_loss(x, h=0.0, basis=lambda z_t: torch.ones_like(z_t)) -> torch.Tensor:
    """v_step's losses at the closed-form v of Gaussian data plus h times a function of z_t; the same noise always."""
    student = lambda z_t, t, cond: gaussian_model(z_t, t, cond) + h * basis(z_t)  # noqa: E731
    return v_step(SD64, student, x, {"b": torch.zeros(len(x))}, {}, seeded(1))[0]


@pytest.mark.parametrize("basis", [torch.ones_like, lambda z: z, torch.sin, lambda z: z**2])
def test_v_step_has_its_minimum_at_the_true_v(basis):
    """Its derivative in any direction, here four, is zero there in expectation: over n samples within 5 deviations."""
    x, h = MEAN + STD * randn(100_000, 1, 1, 1), 0.1
    slope = (v_loss(x, h, basis) - v_loss(x, -h, basis)) / (2 * h)  # [n], exact for a quadratic
    assert slope.mean().abs() < 5 * slope.std() / len(x) ** 0.5
    beside = (v_loss(x, 3 * h, basis) - v_loss(x, h, basis)) / (2 * h)
    assert beside.mean() > 20 * beside.std() / len(x) ** 0.5


def test_v_of_an_exact_eps_is_the_closed_form():
    t, z_t = torch.tensor([0, 31, 250, 500, 999]), randn(5, *SHAPE)
    alpha_t, sigma_t = SD64.at(t)
    eps = sigma_t * (z_t - alpha_t * MEAN) / ((alpha_t * STD) ** 2 + sigma_t**2)  # -sigma_t * score
    assert max_error(v_from_prediction(SD64, z_t, eps, t, "epsilon"), gaussian_model(z_t, t, {})) < 1e-9
    assert max_error(eps_from_v(SD64, z_t, gaussian_model(z_t, t, {}), t), eps) < 1e-12


def test_v_step_drops_captions():
    """A tenth of the prompts becomes the empty one; w and the others stay. [D18]"""
    n, seen = 5000, {}

    def student(z_t, t, cond):
        seen.update(cond, t=t)
        return z_t

    prompt, null = torch.ones(n, 3, 2), torch.zeros(1, 3, 2)
    v_step(SD, student, torch.zeros(n, 1, 1, 1), {"prompt": prompt, "w": torch.arange(n)}, {"prompt": null}, seeded())
    dropped = (seen["prompt"] == 0).flatten(1)
    assert torch.equal(dropped.all(dim=1), dropped.any(dim=1))
    assert abs(dropped[:, 0].float().mean() - 0.1) < 0.02
    assert torch.equal(seen["w"], torch.arange(n))
    assert seen["t"].min() < 10 and seen["t"].max() > 989 and abs(seen["t"].float().mean() - 499.5) < 20


@pytest.mark.parametrize("support", [None, tuple(bound.float() for bound in box(0.7))])
def test_student_that_has_learned_guidance_has_no_loss(support):
    """Its target is the x estimate under guidance, reflected after the branches are combined (App. A)."""
    x, cond = randn(64, *SHAPE, dtype=torch.float32), {"b": torch.linspace(-1, 1, 64), "w": torch.linspace(1, 14, 64)}
    guided = with_guidance(nonlinear_model, {"b": torch.tensor([0.2])})

    def oracle(z_t, t, cond):
        v = guided(z_t, t, cond)
        if support is None:
            return v
        alpha_t, sigma_t = SD.at(t)
        return (alpha_t * z_t - (alpha_t * z_t - sigma_t * v).clamp(*support)) / sigma_t

    assert guidance_step(SD, oracle, guided, x, cond, support, seeded())[0].max() < 1e-6
    assert guidance_step(SD, nonlinear_model, guided, x, cond, support, seeded())[0].mean() > 0.1
    if support is not None:  # reflection acts here
        assert guidance_step(SD, guided, guided, x, cond, support, seeded())[0].mean() > 0.1


def test_w_embedding_changes_nothing_at_first(teacher_folder):
    """[D11] The student with its new, zero-initialised input equals the teacher, bit for bit, and can learn it."""
    pipe = load_pipeline(str(teacher_folder))
    student_unet = with_w_embedding(pipe.unet).requires_grad_(True)
    schedule, prompts = load_schedule(pipe), PromptEncoder(pipe, "cpu")
    teacher, student = (UNetModel(u, schedule, "v_prediction", torch.no_grad) for u in (pipe.unet, student_unet))
    cond = prompts.encode(prompts.tokenize(["a", "b", "c", "d"]))
    z_t, t = randn(4, 4, 8, 8, dtype=torch.float32), torch.tensor([999, 500, 250, 0])
    for w in (0.0, 1.0, 8.0, 14.0):
        assert torch.equal(student(z_t, t, cond | {"w": torch.full((4,), w)}), teacher(z_t, t, cond))
    student.autocast = torch.enable_grad
    student(z_t, t, cond | {"w": torch.tensor([1.0, 2, 5, 14])}).pow(2).mean().backward()
    assert student_unet.time_embedding.cond_proj.weight.grad.abs().max() > 0
    assert pipe.unet.config.time_cond_proj_dim is None  # the teacher is left as it was


# --- D_DAgger in a run ---


def test_w_embedding_of_a_unet_whose_config_does_not_know_it(teacher_folder, tmp_path):
    """Old config files, as Stable Diffusion 1.5's, have no time_cond_proj_dim; diffusers then keeps it at its default."""
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    file = tmp_path / "teacher" / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config["time_cond_proj_dim"]
    file.write_text(json.dumps(config))
    unet = load_pipeline(str(tmp_path / "teacher")).unet
    assert unet.config.time_cond_proj_dim is None
    assert with_w_embedding(unet).config.time_cond_proj_dim == 256




def prompted_model(z_t, t, cond):
    return nonlinear_model(z_t, t, {"b": 0.1 * cond["prompt"].mean(dim=(1, 2)) + 0.02 * cond["w"]})


def recomputed(run, nets, rows):
    """Where the teacher lands from the stored states, from nothing but what is stored with them."""
    tau = torch.tensor(nets.tau)
    t, m, s = (tau[2 * rows["j"] + i] for i in range(3))
    cond = run.prompts.encode(rows["ids"]) | {"w": rows["w"]}
    return teacher_landing(run.schedule, nets.teacher, rows["z_t"], t, m, s, cond, run.support)


















# --- schedules ---




def phases_of(*flags, prediction_type="epsilon", has_w=False):
    return plan_phases(parse_args(list(flags)), prediction_type, has_w)


def test_phases_of_the_default():
    """32 -> 16 -> 8 -> 4; the first halving has one part and the first part's priors [D8], the others have App. A's."""
    phases = {phase.name: phase for phase in phases_of("--teacher_steps", "32")}
    assert list(phases) == ["v", "gc", "16", "8", "4"]
    assert (phases["16"].p_forward, phases["16"].student_rate) == ([0.75], [0.15])
    for name in ("8", "4"):
        assert (phases[name].p_forward, phases[name].student_rate) == ([0.75, 0.5], [0.15, 0.8])
        assert len(phases[name].updates) == 2
    assert phases["v"].p_forward == phases["gc"].p_forward == [1.0]


def test_phases_of_the_paper():
    """Sec. 5 and App. A: about 40K updates to 4 steps and 55K to 2."""
    flags = "--recipe sd15 --teacher a/b --data c/d --student_steps".split()
    phases = {phase.name: phase.updates for phase in phases_of(*flags, "2")}
    assert phases == {"v": [4000], "gc": [6000], "16": [5000], "8": [6000, 4000], "4": [8000, 6000], "2": [8000, 6000]}
    assert sum(sum(phase.updates) for phase in phases_of(*flags, "4")) == 39_000
    args = parse_args([*flags, "2"])
    assert (args.global_batch_size, args.warmup) == (224, 500)
    assert set(args.learning_rate) == {1e-5} and tuple(args.guidance_range) == (2, 14)


def test_a_teacher_skips_the_phases_that_it_does_not_need():
    assert [p.name for p in phases_of(prediction_type="v_prediction")] == ["gc", "16", "8", "4"]
    assert [p.name for p in phases_of(prediction_type="v_prediction", has_w=True)] == ["16", "8", "4"]
    assert [p.name for p in phases_of("--teacher_steps", "64", "--student_steps", "16")] == ["v", "gc", "32", "16"]


def test_a_one_step_student_has_nothing_to_collect():
    """[D16] Without the start state its last halving is plain PD, whatever the flags."""
    last = phases_of("--student_steps", "1", "--p_forward", "0.2")[-1]
    assert last.name == "1" and last.p_forward == [1.0, 1.0]
    assert phases_of("--student_steps", "1", "--p_forward", "0.2", "--store_start")[-1].p_forward == [0.2, 0.2]


def test_flags_of_the_priors():
    one = {p.name: p for p in phases_of("--p_forward", "0.3", "--student_rate", "1")}
    assert (one["8"].p_forward, one["8"].student_rate) == ([0.3, 0.3], [1.0, 1.0])
    flags = "--p_forward 0.3 0.2 --updates 16=5,6 8=7 --max_updates 6"
    two = {p.name: p for p in phases_of(*flags.split())}
    assert (two["16"].p_forward, two["16"].updates) == ([0.3, 0.2], [5, 6])
    assert (two["8"].p_forward, two["8"].updates) == ([0.3], [6])


# --- whole stages ---


def plain_pd(student, teacher, data, prompts, schedule, noise, tau, updates, lr, warmup, lo, hi):
    """One part of Salimans & Ho's progressive distillation. It knows no prior, no buffer and no threshold."""
    optimizer = torch.optim.AdamW(student.unet.parameters(), lr=lr)
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = lr * min((i + 1) / (warmup + 1), (updates - i) / (updates - warmup))
        x, ids = data.next()
        cond = prompts.encode(ids) | {"w": lo + (hi - lo) * torch.rand(len(x), generator=noise)}
        j = torch.randint(len(tau) // 2, (len(x),), generator=noise)
        t, m, s = (tau[2 * j + i] for i in range(3))
        z_t = add_noise(schedule, x, torch.randn(x.shape, generator=noise), t)
        z_m = ddim_step(schedule, z_t, teacher(z_t, t, cond), t, m)
        z_s = ddim_step(schedule, z_m, teacher(z_m, m, cond), m, s)
        (c, d), weight = rotation(schedule, t, s), torch.maximum(*(a**2 for a in schedule.at(t)))
        (weight * (student(z_t, t, cond) - (c * z_t - z_s) / d) ** 2).mean(dim=(1, 2, 3)).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("parts", [[4], [4, 3]])
def test_plain_pd_equals_a_short_independent_loop(gc_folder, data_folder, tmp_path, parts):
    """--p_forward 1 through all of the script, bit for bit: one stage, in one part and in two."""
    run_here("--teacher", gc_folder, "--data", data_folder, "--output_dir", tmp_path / "run", *SMALL,
             "--teacher_steps", 8, "--student_steps", 4, "--updates", "4=" + ",".join(map(str, parts)),
             "--p_forward", 1, "--reflect", "none", "--seed", 3)  # fmt: skip

    pipe, (dataset, _) = load_pipeline(str(gc_folder)), load_images(str(data_folder))
    schedule, prompts, noise = load_schedule(pipe), PromptEncoder(pipe, "cpu"), seeded(seed_of(3, "rank", 0))
    data = LatentData(dataset, pipe, prompts, 4, 3, 0, 1, noise, cache=True)
    trained = copy.deepcopy(pipe.unet).requires_grad_(True).train()
    teacher, student = (UNetModel(unet, schedule, "v_prediction", torch.enable_grad) for unet in (pipe.unet, trained))
    tau = torch.tensor([*timestep_grid(8), CLEAN])
    for updates in parts:
        plain_pd(student, teacher, data, prompts, schedule, noise, tau, updates, 1e-3, 1, *W_RANGE)

    saved = load_pipeline(str(tmp_path / "run" / "stages" / "4")).unet.state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in trained.state_dict().items())
    assert any(not torch.equal(saved[name], weight) for name, weight in pipe.unet.state_dict().items())


def joined_gradient(folder, batches: list[dict]) -> list[torch.Tensor]:
    """The gradient at the stage's start of the mean loss over several mini-batches taken as one."""
    pipe = load_pipeline(str(folder))
    unet = pipe.unet.requires_grad_(True)
    student = UNetModel(unet, load_schedule(pipe), "v_prediction", torch.enable_grad)
    z_t, z_s, t, s = (torch.cat([batch[name] for batch in batches]) for name in ("z_t", "z_s", "t", "s"))
    cond = {name: torch.cat([batch["cond"][name] for batch in batches]) for name in batches[0]["cond"]}
    pd_step(student.schedule, student, z_t, z_s, t, s, cond).mean().backward()
    return [p.grad for p in unet.parameters()]


def test_accumulated_gradient_is_that_of_the_joined_batch(gc_folder, data_folder, tmp_path):
    flags = ["--teacher", gc_folder, "--data", data_folder, "--output_dir", tmp_path / "run", *SMALL,
             "--teacher_steps", 8, "--updates", "4=1", "--global_batch_size", 6, "--batch_size", 2]  # fmt: skip
    with signals_kept():
        seen = record("pd_ddil", [*map(str, flags)])
    assert len(seen["batches"]) == 3 and len(seen["gradients"]) == 1
    expected = joined_gradient(gc_folder, seen["batches"])
    assert max(max_error(a, b) for a, b in zip(seen["gradients"][0][1], expected)) < 1e-6
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
