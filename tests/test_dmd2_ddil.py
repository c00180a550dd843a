"""dmd2_ddil.py: its gradients against closed forms, the run against a short independent loop and against stock diffusers."""

import contextlib
import copy
import itertools
import json
import re
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import refusal, interrupt, rows_of, run_here, run_script, save_teacher, signals_kept, tiny_unet, weights_of
from diffusers import DiffusionPipeline, LCMScheduler
from test_common import MEAN, SD64, SHAPE, STD, box, max_error, nonlinear_model, randn, seeded, student_model

import dmd2_ddil
from common import (
    CLEAN, LatentData, PromptEncoder, SamplingPrior, UNetModel, add_noise, consistency_function, consistency_rollout,
    ddim_step, last_checkpoint, learning_rate, load_images, load_pipeline, load_schedule, load_state, reflect, seed_of,
    timestep_grid, with_guidance,
)  # fmt: skip
from dmd2_ddil import (Critic, GANHead, critic_step, draw_movers, draw_transitions, gan_gradient, make_head, matching_gradient, mid_block_features, parse_args, reflect_value, student_step)

T = [999, 749, 499, 249]
SMALL = ["--global_batch_size", "4", "--warmup", "1", "--log_every", "1", "--learning_rate", "1e-3", "--updates", "6",
         "--fake_updates", "2", "--guidance_scale", "3"]  # fmt: skip
ALL = ["--p_forward", "0.3"]  # so that all sources are drawn


def command(folder, teacher, data, *flags) -> list:
    return ["--teacher", teacher, "--data", data, "--output_dir", folder, *SMALL, *flags]


def dmd2_here(*args) -> None:
    run_here(*args, script="dmd2_ddil.py")


# --- the gradient of distribution matching: everything is Gaussian, so that scores and divergences are known ---


def gaussian(mean, std):
    """The exact v of data N(mean, std^2)."""

    def model(z_t, t, cond):
        alpha_t, sigma_t = SD64.at(t)
        x_hat = mean + alpha_t * std**2 / ((alpha_t * std) ** 2 + sigma_t**2) * (z_t - alpha_t * mean)
        return (alpha_t * z_t - x_hat) / sigma_t

    return model


def divergence(mean_g, std_g, t):
    """KL of the generated from the real distribution, both noised to t."""
    alpha_t, sigma_t = (value.flatten()[0] for value in SD64.at(torch.tensor([t])))
    V_g, V = (alpha_t * std_g) ** 2 + sigma_t**2, (alpha_t * STD) ** 2 + sigma_t**2
    return 0.5 * (V_g / V - 1 - (V_g / V).log() + alpha_t**2 * (mean_g - MEAN) ** 2 / V)


def difference(x_g, g, x_real):
    """x_fake - x_real, which DMD2's gradient g is without its normaliser."""
    return g * (x_g - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("t", [20, 249, 749, 980])
@pytest.mark.parametrize("mean_g, std_g", [(MEAN + 0.7, STD), (MEAN, 1.6 * STD), (MEAN - 0.4, 0.5 * STD)])
def test_gradient_is_that_of_the_divergence(t, mean_g, std_g):
    """Its value and its sign: with x_g = mean + std u, E[dx_g (x_fake - x_real)] alpha^2 / sigma^2 = d KL."""
    u, tau = randn(20_000, *SHAPE), torch.full((20_000,), t)
    x_g = mean_g + std_g * u
    g, x_real, _ = matching_gradient(SD64, gaussian(MEAN, STD), gaussian(mean_g, std_g), x_g, tau, {}, None, seeded(1))
    alpha_t, sigma_t = (value.flatten()[0] for value in SD64.at(tau))
    ours = difference(x_g, g, x_real) * alpha_t**2 / sigma_t**2
    parameters = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean_g, std_g)]
    expected = torch.autograd.grad(divergence(*parameters, t), parameters)
    size = max(abs(value.item()) for value in expected)
    assert abs(ours.mean() - expected[0]) < 0.02 * size
    assert abs((ours * u).mean() - expected[1]) < 0.02 * size


def test_no_gradient_at_the_optimum():
    x_g, tau = MEAN + STD * randn(64, *SHAPE), torch.randint(20, 981, (64,), generator=seeded())
    g, *_ = matching_gradient(SD64, gaussian(MEAN, STD), gaussian(MEAN, STD), x_g, tau, {}, None, seeded())
    assert torch.equal(g, torch.zeros_like(g))


def test_a_gaussian_generator_learns_mean_and_variance():
    """x_g = a + b u, with the exact fake score of the moment."""
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (MEAN + 1.0, 2.5 * STD))
    optimizer, noise = torch.optim.Adam([a, b], lr=0.02), seeded()
    for i in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - i / 400)
        x_g = a + b * torch.randn(64, *SHAPE, generator=noise, dtype=torch.float64)
        fake = gaussian(a.item(), b.item())
        losses, _ = student_step(SD64, gaussian(MEAN, STD), fake, None, x_g, {}, None, 0.0, noise)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert abs(a.item() - MEAN) < 0.02 and abs(b.item() - STD) < 0.03 * STD


def test_loss_has_the_gradient_over_the_number_of_values():
    x_g = randn(8, *SHAPE).requires_grad_(True)
    losses, notes = student_step(SD64, nonlinear_model, student_model, None, x_g, {}, None, 0.0, seeded(3))
    losses.mean().backward()
    noise = seeded(3)
    tau = torch.randint(20, 981, (8,), generator=noise)
    g, *_ = matching_gradient(SD64, nonlinear_model, student_model, x_g, tau, {}, None, noise)
    assert max_error(x_g.grad, g / g.numel()) < 1e-15
    assert max_error(notes["loss_matching"], 0.5 * (g**2).mean(dim=(1, 2, 3))) < 1e-12
    assert max_error(notes["matching_norm"], 8 * x_g.grad.flatten(1).norm(dim=1)) < 1e-15


def test_normaliser_is_each_sample_s_own():
    z, t = randn(3, *SHAPE), torch.tensor([100, 500, 900])
    together = matching_gradient(SD64, nonlinear_model, student_model, z, t, {}, None, seeded())[0]
    noise = torch.randn(z.shape, generator=seeded())
    for i in range(3):
        z_tau = add_noise(SD64, z[i : i + 1], noise[i : i + 1], t[i : i + 1])
        alpha_t, sigma_t = SD64.at(t[i : i + 1])
        x_real, x_fake = (alpha_t * z_tau - sigma_t * m(z_tau, t[i : i + 1], {}) for m in (nonlinear_model, student_model))
        assert max_error(together[i], ((x_fake - x_real) / (z[i] - x_real).abs().mean())[0]) < 1e-12


def test_normaliser_is_finite_where_the_generator_is_perfect():
    x_g, tau = randn(4, *SHAPE), torch.full((4,), 500)

    def perfect(z_t, t, cond):
        alpha_t, sigma_t = SD64.at(t)
        return (alpha_t * z_t - x_g) / sigma_t

    g, x_real, _ = matching_gradient(SD64, perfect, nonlinear_model, x_g, tau, {}, None, seeded())
    assert max_error(x_real, x_g) < 1e-12 and g.isfinite().all() and g.abs().max() > 0
    g, *_ = matching_gradient(SD64, perfect, perfect, x_g, tau, {}, None, seeded())
    assert g.abs().max() == 0


def test_both_estimates_are_reflected():
    x_g, tau, support = 2 * randn(16, *SHAPE), torch.full((16,), 700), box(0.2)
    g, x_real, x_fake = matching_gradient(SD64, nonlinear_model, student_model, x_g, tau, {}, support, seeded())
    assert x_real.abs().max() > 0.2 and x_fake.abs().max() > 0.2  # given back as they were, to be counted
    x_real, x_fake = reflect(x_real, support), reflect(x_fake, support)
    expected = (x_fake - x_real) / (x_g - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert max_error(g, expected) < 1e-12


def test_student_is_reflected_in_value_alone():
    x, support = (3 * randn(8, *SHAPE)).requires_grad_(True), box(1.0)
    reflected = reflect_value(x, support)
    assert max_error(reflected, reflect(x, support)) < 1e-15
    reflected.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(reflect_value(x, None), x)


# --- critic and GAN ---


def linear_judge(weight):
    return lambda z_t, t, cond: (z_t * weight).sum(dim=(1, 2, 3))


def test_gan_gradient_against_finite_differences():
    x_g, weight = randn(3, *SHAPE), randn(*SHAPE, seed=1)
    judge = lambda z_t, t, cond: (z_t * weight).sum(dim=(1, 2, 3)).sin()  # noqa: E731
    g, losses = gan_gradient(SD64, judge, x_g, {}, seeded(2))
    direction, h = randn(3, *SHAPE, seed=3), 1e-6
    up, down = (gan_gradient(SD64, judge, x_g + step * direction, {}, seeded(2))[1] for step in (h, -h))
    assert max_error((up - down) / (2 * h), (g * direction).sum(dim=(1, 2, 3))) < 1e-6
    assert (losses > 0).all()


def test_student_s_gradient_is_the_sum_of_both_losses_gradients():
    weight = randn(*SHAPE, seed=1)
    x_g = randn(4, *SHAPE).requires_grad_(True)
    losses, notes = student_step(SD64, nonlinear_model, student_model, linear_judge(weight), x_g, {}, None, 0.3, seeded())
    losses.mean().backward()
    plain, noise = x_g.detach().clone().requires_grad_(True), seeded()
    matching, _ = student_step(SD64, nonlinear_model, student_model, None, plain, {}, None, 0.0, noise)
    t = torch.randint(1000, (4,), generator=noise)
    z_t = add_noise(SD64, plain, torch.randn(plain.shape, generator=noise), t)
    (matching.mean() + 0.3 * F.softplus(-linear_judge(weight)(z_t, t, {})).mean()).backward()
    assert max_error(x_g.grad, plain.grad) < 1e-15
    assert notes["gan_norm"].shape == notes["loss_gan"].shape == (4,)


def test_critic_s_loss():
    """eps-MSE on what was generated, softplus on real against generated; by a slow loop over the samples."""
    x_g, x, weight, noise = randn(4, *SHAPE), randn(4, *SHAPE, seed=1), randn(*SHAPE, seed=2), seeded(5)
    losses, notes = critic_step(SD64, nonlinear_model, linear_judge(weight), x_g, x, {}, 0.3, seeded(5))
    t = torch.randint(1000, (4,), generator=noise)
    eps = torch.randn(x_g.shape, generator=noise)
    t_judge = torch.randint(1000, (8,), generator=noise)
    eps_judge = torch.randn(8, *SHAPE, generator=noise)
    for i in range(4):
        (a, s), at = (v.item() for v in SD64.at(t[i : i + 1])), t[i : i + 1]
        z = a * x_g[i] + s * eps[i]
        expected = ((s * z + a * nonlinear_model(z[None], at, {})[0] - eps[i]) ** 2).mean()
        logits = []
        for row, x_0 in ((i, x_g[i]), (4 + i, x[i])):
            a, s = (v.item() for v in SD64.at(t_judge[row : row + 1]))
            logits.append(((a * x_0 + s * eps_judge[row]) * weight).sum())
        expected += 0.3 * ((1 + logits[0].exp()).log() + (1 + (-logits[1]).exp()).log())
        assert abs(losses[i] - expected) < 1e-6
    assert notes["logit_generated"].shape == notes["logit_real"].shape == (4,)
    assert critic_step(SD64, nonlinear_model, None, x_g, None, {}, 0.3, seeded())[1].keys() == {"loss_fake"}


@pytest.mark.parametrize("channels, size", [(16, 1), (16, 2), (32, 4), (48, 8), (64, 16), (32, 24), (32, 32)])
def test_head_fits_any_resolution(channels, size):
    """And tells samples apart, whatever the normalisation does at 1 x 1."""
    torch.manual_seed(0)
    logits = GANHead(channels, size)(torch.randn(64, channels, size, size))
    assert logits.shape == (64, 1, 1, 1) and logits.std() > 1e-2


@pytest.mark.parametrize("family", ["teacher_folder", "xl_folder"])
def test_features_are_the_mid_block_s(family, request):
    """The same as by a whole forward, without the decoder; and the head has their shape."""
    pipe = load_pipeline(str(request.getfixturevalue(family)))
    prompts = PromptEncoder(pipe, "cpu")
    cond = prompts.encode(prompts.tokenize(["a", "b"]))
    z_t, t, seen = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), []
    hook = pipe.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    model = UNetModel(Critic(pipe.unet, make_head(pipe.unet)), load_schedule(pipe), "epsilon", torch.no_grad)
    model(z_t, t, cond)
    hook.remove()
    decoder = pipe.unet.up_blocks[0].register_forward_hook(lambda *_: pytest.fail("the decoder was run"))
    added = {name: value for name, value in cond.items() if name != "prompt"}
    features = mid_block_features(pipe.unet, z_t, t, cond["prompt"], added_cond_kwargs=added or None)
    assert torch.equal(features, seen[0])
    logits = dmd2_ddil.judge_of(model)(z_t, t, cond)
    decoder.remove()
    assert logits.shape == (2,) and not pipe.unet.mid_block._forward_hooks
    assert max_error(logits, model.unet.head(features).flatten()) < 1e-6


def test_head_of_the_published_shapes():
    """SD1.5 at 512 px and SDXL at 1024 px have 8 x 8 and 32 x 32 in the middle, 1280 wide."""
    for size, blocks, parameters in ((64, 4, 52.4e6), (128, 3, 104.9e6)):
        unet = tiny_unet(sample_size=size)
        unet.register_to_config(block_out_channels=[320, 640, 1280, 1280][:blocks])
        with torch.device("meta"):
            count = sum(p.numel() for p in make_head(unet).parameters())
        assert abs(count / parameters - 1) < 0.01


# --- where the student is trained ---




@pytest.mark.parametrize("n", [1, 2, 4, 5, 10, 20])
def test_timesteps_are_those_of_stock_diffusers(n):
    sampler = LCMScheduler(original_inference_steps=n)
    sampler.set_timesteps(n)
    assert sampler.timesteps.tolist() == timestep_grid(n, "trailing") == [*range(999, 0, -1000 // n)][:n]
    assert set(timestep_grid(n, "trailing")) <= set(timestep_grid(20, "trailing"))
















def test_priors_of_the_flags():
    priors = lambda *flags: dmd2_ddil.priors_of(parse_args([*flags]))  # noqa: E731
    assert priors() == dict(forward=[0.0], teacher=[0.5], student=[0.5])  # [D19]
    assert priors("--p_student", "1") == dict(forward=[0.0], teacher=[0.0], student=[1.0])
    assert priors("--p_forward", "1") == dict(forward=[1.0], teacher=[0.0], student=[0.0])
    assert priors("--p_forward", ".5", "0")["teacher"] == [0.25, 0.5]


def test_recipes_hold_the_paper_s_numbers():
    args = parse_args(["--recipe", "ssd1b", "--teacher", "t", "--data", "d"])
    assert (args.updates, args.global_batch_size, args.fake_updates, args.guidance_scale) == (30_000, 7, 10, 8.0)
    assert (args.gan_weight, args.critic_gan_weight, args.learning_rate) == (5e-3, 1e-2, 5e-7)
    args = parse_args(["--recipe", "ssd1b_oracle", "--teacher", "t", "--data", "d", "--student_init", "s"])
    assert (args.updates, args.global_batch_size) == (70_000, 64)


@pytest.mark.parametrize("decay, expected", [(True, [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]), (False, [0.5, 1, 1, 1, 1, 1])])
def test_learning_rate_with_and_without_decay(decay, expected):
    assert [round(learning_rate(update, 6, 1, 1.0, decay), 9) for update in range(6)] == expected


# --- one update ---










def plain_judge(critic, z_t, t, cond):
    """Logits by a whole forward of the fake score, of which the head gets the mid block's output."""
    seen = []
    hook = critic.unet.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    critic.run(z_t, t, cond)
    hook.remove()
    return critic.unet.head(seen[0]).flatten()


def plain_dmd2(student, critic, real, batches, schedule, noise, lr, ratio, weights):
    """DMD2 with backward simulation. It knows no prior, no source and no threshold."""
    optimizers = [torch.optim.AdamW(m.unet.parameters(), lr=lr) for m in (student, critic)]
    noised = lambda x, t: add_noise(schedule, x, torch.randn(x.shape, generator=noise), t)  # noqa: E731
    uniform = lambda n, lo=0, hi=1000: torch.randint(lo, hi, (n,), generator=noise)  # noqa: E731
    estimate = lambda z, t: consistency_function(schedule, student, z, torch.full((4,), t), cond)  # noqa: E731

    def step(who, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_((student, critic)[who].unet.parameters(), 10.0)
        optimizers[who].step(), optimizers[who].zero_grad()

    for i, (x, cond, k) in enumerate(batches):
        optimizers[0].param_groups[0]["lr"] = optimizers[1].param_groups[0]["lr"] = lr * min((i // ratio + 1) / 2, 1.0)
        z = torch.randn(4, 4, 8, 8, generator=noise)
        for t, s in zip(T[:k], T[1:]):
            z = noised(estimate(z, t).detach(), torch.full((4,), s))
        x_g = estimate(z, T[k])
        if i % ratio == 0:
            tau, critic_parameters = uniform(4, 20, 981), critic.unet.requires_grad_(False)
            z_tau, (alpha_t, sigma_t) = noised(x_g.detach(), tau), schedule.at(tau)
            x_real, x_fake = (alpha_t * z_tau - sigma_t * model(z_tau, tau, cond).detach() for model in (real, critic))
            g = (x_fake - x_real) / (x_g - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
            loss, t = 0.5 * F.mse_loss(x_g, (x_g - g).detach()), uniform(4)
            step(0, loss + weights[0] * F.softplus(-plain_judge(critic, noised(x_g, t), t, cond)).mean())
            critic_parameters.requires_grad_(True)
        t, x_g = uniform(4), x_g.detach()
        eps, (alpha_t, sigma_t) = torch.randn(x_g.shape, generator=noise), schedule.at(t)
        z_t, t_judge = add_noise(schedule, x_g, eps, t), uniform(8)
        loss = (sigma_t * z_t + alpha_t * critic(z_t, t, cond) - eps).pow(2).mean(dim=(1, 2, 3))
        twice = {name: torch.cat([value] * 2) for name, value in cond.items()}
        logits = plain_judge(critic, noised(torch.cat([x_g, x]), t_judge), t_judge, twice)
        step(1, (loss + weights[1] * (F.softplus(logits[:4]) + F.softplus(-logits[4:]))).mean())


@pytest.mark.parametrize("seed", [3])
def test_plain_dmd2_equals_a_short_independent_loop(teacher_folder, data_folder, tmp_path, seed):
    """--p_student 1 through all of the script, bit for bit. (GAN weights are powers of two: multiplying by one is exact.)"""
    weights = 2**-7, 2**-6
    flags = "--p_student", 1, "--reflect", "none", "--seed", seed, "--no-lr_decay", "--gan_weight", weights[0]
    flags += "--critic_gan_weight", weights[1]
    dmd2_here(*command(tmp_path / "run", teacher_folder, data_folder, *flags))
    pipe, (dataset, _) = load_pipeline(str(teacher_folder)), load_images(str(data_folder))
    schedule, prompts, noise = load_schedule(pipe), PromptEncoder(pipe, "cpu"), seeded(seed_of(seed, "rank", 0))
    data = LatentData(dataset, pipe, prompts, 4, seed, 0, 1, noise, cache=True)
    unets = [copy.deepcopy(pipe.unet).requires_grad_(True).train() for _ in range(2)]
    torch.manual_seed(seed_of(seed, "head"))
    modules = unets[0], Critic(unets[1], make_head(unets[1]))
    student, critic = (UNetModel(module, schedule, "epsilon", contextlib.nullcontext) for module in modules)
    real = with_guidance(UNetModel(pipe.unet, schedule, "epsilon", torch.no_grad), prompts.null())

    def batches():
        for i in range(6 * 2):
            x, ids = data.next()
            k = torch.randint(4, (), generator=seeded(seed_of(seed, "transitions", i // 2, i % 2))).item()
            yield x, prompts.encode(ids) | {"w": torch.full((4,), 3.0)}, k

    plain_dmd2(student, critic, real, batches(), schedule, noise, 1e-3, 2, weights)
    saved = weights_of(tmp_path / "run" / "pipeline")
    assert all(torch.equal(saved[name], weight) for name, weight in student.unet.state_dict().items())
    kept = load_state(last_checkpoint(tmp_path / "run" / "checkpoints") / "critic.pt")
    assert all(torch.equal(kept[name], weight) for name, weight in critic.unet.state_dict().items())


# --- whole runs ---


@pytest.fixture(scope="session")
def finished_dmd2(tmp_path_factory, teacher_folder, data_folder):
    folder = tmp_path_factory.mktemp("dmd2") / "run"
    dmd2_here(*command(folder, teacher_folder, data_folder, *ALL))
    return folder


def test_dmd2_run_folder(finished_dmd2):
    for name in ("pipeline", "checkpoints", "metrics.csv", "config.json", "samples", "dmd2_ddil.py", "common.py"):
        assert (finished_dmd2 / name).exists(), name
    rows = rows_of(finished_dmd2)
    assert [int(row["total_updates"]) for row in rows] == [*range(1, 7)]
    sources = {s for s in ("forward", "teacher", "student") for row in rows if row[f"loss_fake_{s}"]}
    assert sources == {"forward", "teacher", "student"}
    for row in rows:
        for name in ("loss_matching", "loss_fake", "loss_gan", "loss_judge", "matching_norm", "gan_norm", "grad_norm_student",
                     "grad_norm_critic", "x_std", "x_g_std"):  # fmt: skip
            assert float(row[name]) > 0, name
        assert all(0 <= float(row[f"moved_{name}"]) <= 1 for name in ("real", "fake", "student"))
        assert row["logit_real"] and row["logit_generated"] and row["x_mean"] and row["x_g_mean"]
    assert len([*(finished_dmd2 / "samples").glob("*.png")]) == 2


@pytest.mark.parametrize("steps, family", [(1, "teacher"), (2, "teacher"), (4, "teacher"), (4, "xl"), (4, "gc")])
def test_stock_diffusers_samples_the_student_s_images(steps, family, finished_dmd2, tmp_path, data_folder, request):
    """Within 1/255 of our rollout, from the same noise: the exact timesteps, re-noising, no guidance; a student that
    predicts v and takes w (gc) gets it from the pipeline."""
    folder, w = finished_dmd2, 3.0 if family == "gc" else 1.0
    if (steps, family) != (4, "teacher"):
        folder, teacher = tmp_path / "run", request.getfixturevalue(f"{family}_folder")
        dmd2_here(*command(folder, teacher, data_folder, "--student_steps", steps, "--updates", 2))
    captions, settings = ["a", "image 3 of test"], dict(num_inference_steps=steps, guidance_scale=w, output_type="pt")
    stock = DiffusionPipeline.from_pretrained(folder / "pipeline")
    stock.set_progress_bar_config(disable=True)
    z = randn(2, 4, 8, 8, dtype=torch.float32)
    images = stock(captions, latents=z, generator=seeded(5), **settings).images
    assert stock.scheduler.timesteps.tolist() == {1: [999], 2: [999, 499], 4: T}[steps]

    pipe = load_pipeline(str(folder / "pipeline"))
    prompts = PromptEncoder(pipe, "cpu")
    model = UNetModel(pipe.unet, load_schedule(pipe), pipe.scheduler.config.prediction_type, torch.no_grad)
    timesteps = [*timestep_grid(steps, "trailing"), CLEAN]
    cond = prompts.encode(prompts.tokenize(captions)) | {"w": torch.full((2,), w)}
    latents = consistency_rollout(load_schedule(pipe), model, z, timesteps, cond, seeded(5))[-1]
    with torch.no_grad():
        ours = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    assert max_error(ours.clamp(0, 1), images) < 1 / 255


def assert_same_run(folder, reference) -> None:
    ours, theirs = (weights_of(f / "pipeline") for f in (folder, reference))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (load_state(last_checkpoint(f / "checkpoints") / "critic.pt") for f in (folder, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [r | {"seconds": ""} for r in rows_of(folder)] == [r | {"seconds": ""} for r in rows_of(reference)]


def test_killed_dmd2_resumes_as_if_unbroken(finished_dmd2, tmp_path, teacher_folder, data_folder):
    folder = tmp_path / "run"
    flags = command(folder, teacher_folder, data_folder, *ALL, "--save_every", 2)
    process = interrupt("dmd2_ddil.py", folder, signal.SIGKILL, 2, *flags)
    assert process.returncode == -signal.SIGKILL
    saved = json.loads((last_checkpoint(folder / "checkpoints") / "progress.json").read_text())
    assert 2 <= saved["total"] < 6
    dmd2_here("--resume", "--output_dir", folder)
    assert_same_run(folder, finished_dmd2)




@pytest.mark.parametrize("batch_size", [1, 2])
def test_dmd2_on_two_processes(tmp_path, teacher_folder, data_folder, batch_size):
    """All three sources: ranks share the source and the trajectory's length and movers, have noise of their own, the
    critic's gradient is the mean over ranks and mini-batches, and they end with equal weights."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = command(tmp_path / "run", teacher_folder, data_folder, *ALL, "--mixed_rollout", "--gradient_checkpointing",
                    "--batch_size", batch_size)  # fmt: skip
    process = run_script("dmd2_ddil", tmp_path, *flags, script="tests/record.py", launcher=launcher)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["world_size"] == second["world_size"] == 2
    assert first["sources"] == second["sources"] and set(first["sources"]) == {"forward", "teacher", "student"}
    assert first["movers"] == second["movers"] and any(len(set(movers)) == 2 for movers in first["movers"])
    for name in ("student", "critic"):
        assert len(first[name]) > 0 and all(torch.equal(a, b) for a, b in zip(first[name], second[name])), name
    assert len(first["batches"]) == len(second["batches"]) == 6 * 2 * 2 // batch_size
    for one, other in zip(first["batches"], second["batches"]):
        a, b = one["x_g"], other["x_g"]
        assert a.shape == b.shape == (batch_size, 4, 8, 8) and not torch.isclose(a, b).flatten(1).all(dim=1).any()

    pipe = load_pipeline(str(teacher_folder))
    torch.manual_seed(seed_of(0, "head"))
    module = Critic(pipe.unet.requires_grad_(True), make_head(pipe.unet))
    fake = UNetModel(module, load_schedule(pipe), "epsilon", contextlib.nullcontext)
    for rank, i in itertools.product((first, second), range(2 // batch_size)):
        noise, (x_g, x, cond) = torch.Generator(), (rank["batches"][i][name] for name in ("x_g", "x", "cond"))
        noise.set_state(rank["batches"][i]["generator"])
        losses, _ = critic_step(load_schedule(pipe), fake, dmd2_ddil.judge_of(fake), x_g, x, cond, 1e-2, noise)
        (losses.mean() / (4 // batch_size)).backward()
    ours, theirs = (next(g for name, g in rank["gradients"] if name == "critic") for rank in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert max(max_error(a, p.grad) for a, p in zip(ours, fake.unet.parameters())) < 1e-5


@pytest.mark.parametrize("flags", [["--mixed_rollout"], ["--gan_weight", 0], ["--batch_size", 2], ["--reflect", "0.5"],
                                   ["--student_steps", 1], ["--teacher_steps", 40, "--student_steps", 8]])  # fmt: skip
def test_other_settings_train(tmp_path, teacher_folder, data_folder, flags):
    dmd2_here(*command(tmp_path / "run", teacher_folder, data_folder, "--updates", 2, *flags))
    before, after = weights_of(teacher_folder), weights_of(tmp_path / "run" / "pipeline")
    assert max(max_error(after[name], before[name]) for name in before) > 1e-4
    assert all(value.isfinite().all() for value in after.values())
    if "--reflect" in flags:  # a box that everything leaves
        assert all(float(row[f"moved_{name}"]) > 0 for row in rows_of(tmp_path / "run") for name in ("real", "fake", "student"))


def test_dmd2_in_bf16(tmp_path, teacher_folder, data_folder, monkeypatch):
    """Networks in bf16; weights and everything around the networks stay in fp32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` sets it
    try:
        dmd2_here(*command(tmp_path / "run", teacher_folder, data_folder, *ALL, "--gradient_checkpointing"))
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit, match="--mixed_precision fp16.*--gan_weight 0"):
            dmd2_here(*command(tmp_path / "other", teacher_folder, data_folder))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {weight.dtype for weight in weights_of(tmp_path / "run" / "pipeline").values()} == {torch.float32}
    assert all(float(row["gan_norm"]) > 0 and float(row["loss_fake"]) > 0 for row in rows_of(tmp_path / "run"))


def test_gradient_checkpointing_changes_no_dmd2(tmp_path, teacher_folder, data_folder):
    flags = teacher_folder, data_folder, "--updates", 2, *ALL
    dmd2_here(*command(tmp_path / "a", *flags))
    dmd2_here(*command(tmp_path / "b", *flags, "--gradient_checkpointing"))
    a, b = (weights_of(tmp_path / run / "pipeline") for run in "ab")
    assert max(max_error(a[name], b[name]) for name in a) < 1e-6


def test_prompts_alone_suffice(tmp_path, teacher_folder, data_folder):
    """Data-free: neither GAN nor forward diffusion, and a text file."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").write_text("\n".join(f"image {i}" for i in range(20)))
    flags = "--gan_weight", 0, "--reflect", 4, "--updates", 2
    dmd2_here(*command(tmp_path / "run", teacher_folder, data, *flags))
    assert all(not row["x_std"] and float(row["x_g_std"]) > 0 for row in rows_of(tmp_path / "run"))
    for bad, named in ((["--gan_weight", 0.1], "has no images"), (["--p_forward", 0.1], "has no images"),
                       (["--reflect", "measured"], "--reflect measured")):  # fmt: skip
        with pytest.raises(SystemExit, match=named) as caught:
            dmd2_here(*command(tmp_path / "other", teacher_folder, data, *flags, *bad))
        assert str(data) in caught.value.code and not (tmp_path / "other").exists()


@pytest.mark.parametrize("small_is", ["student", "critic", "both"])
def test_three_networks_of_sdxl_s_family(tmp_path, xl_folder, data_folder, small_is):
    """As in the oracle, student and critic differ, and one of them has no attention in its mid block, as SSD-1B; or they start
    from the same file, which gives a copy to each."""
    small, large = dict(mid_block_type="UNetMidBlock2D", layers_per_block=1), dict(layers_per_block=2)
    student = save_teacher(tmp_path / "student", xl=True, **(large if small_is == "critic" else small))
    critic = save_teacher(tmp_path / "critic", xl=True, **(small if small_is == "critic" else large))
    critic = student if small_is == "both" else critic
    flags = "--student_init", student, "--fake_init", critic, "--updates", 2, "--reflect", "none"
    dmd2_here(*command(tmp_path / "run", xl_folder, data_folder, *flags))
    ours, before = weights_of(tmp_path / "run" / "pipeline"), weights_of(student)
    assert ours.keys() == before.keys() and max(max_error(ours[name], before[name]) for name in ours) > 1e-4
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    stock.set_progress_bar_config(disable=True)
    assert stock("a", num_inference_steps=4, guidance_scale=1.0, output_type="pt").images.isfinite().all()
    kept = load_state(last_checkpoint(tmp_path / "run" / "checkpoints") / "critic.pt")
    kept = {name.removeprefix("unet."): value for name, value in kept.items() if name.startswith("unet.")}
    assert kept.keys() == weights_of(critic).keys()
    assert small_is != "both" or max(max_error(kept[name], ours[name]) for name in ours) > 1e-4


def test_networks_that_predict_different_things(tmp_path, gc_folder, data_folder):
    """A student that predicts eps under a teacher that predicts v and, taking w, is its own guidance; what is saved keeps
    the student's prediction type and the teacher's VAE and text encoders."""
    eps = save_teacher(tmp_path / "eps")
    dmd2_here(*command(tmp_path / "run", gc_folder, data_folder, "--student_init", eps, "--updates", 2))
    pipe = load_pipeline(str(tmp_path / "run" / "pipeline"))
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.unet.config.time_cond_proj_dim is None
    assert weights_of(tmp_path / "run" / "pipeline").keys() == weights_of(eps).keys()


# --- bad input ---


@pytest.mark.parametrize("flags", [
    "--student_steps 3", "--student_steps 0", "--student_steps 1000", "--teacher_steps 30", "--teacher_steps 0",
    "--p_forward .5 --p_student .2 --p_teacher .2", "--p_student 1.5", "--p_teacher -0.5", "--p_student nan",
    "--p_forward .5 .6 .7 --p_teacher .1 .2", "--fake_updates 0", "--gan_weight -1", "--critic_gan_weight nan",
    "--guidance_scale -1",
    "--learning_rate 0", "--learning_rate nan", "--updates 0", "--global_batch_size 5 --batch_size 2", "--batch_size 0",
    "--reflect 0", "--reflect sometimes", "--recipe sd21", "--recipe ssd1b", "--data no/such/folder", "--warmup -1",
    "--teacher no/such/folder", "--critic_gan_weight 0", "--student_init no/such/folder", "--fake_init no/such/folder",
    "--report_to nonsense",
])  # fmt: skip
def test_bad_dmd2_flag_is_named(flags, tmp_path, teacher_folder, data_folder):
    base = ["--data", data_folder] if "ssd1b" in flags else ["--teacher", teacher_folder, "--data", data_folder]
    flags = flags.split()
    message = refusal(*base, "--output_dir", tmp_path / "run", *SMALL, "--max_updates", 1, *flags, script="dmd2_ddil.py")
    named = "--teacher" if "ssd1b" in flags else flags[0]
    assert named in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what, make", [
    ("cross_attention_dim", lambda folder: save_teacher(folder, xl=True)),
    ("sample_size", lambda folder: save_teacher(folder, sample_size=16)),
    ("in_channels", lambda folder: save_teacher(folder, in_channels=8, out_channels=8)),
])  # fmt: skip
@pytest.mark.parametrize("flag", ["--student_init", "--fake_init"])
def test_networks_that_do_not_fit_are_named(what, make, flag, tmp_path, teacher_folder, data_folder):
    other = make(tmp_path / "other")
    with pytest.raises(SystemExit) as caught:
        dmd2_here(*command(tmp_path / "run", teacher_folder, data_folder, flag, other))
    assert f"{flag} {other}" in caught.value.code and (what in caught.value.code or what == "in_channels")
    assert not (tmp_path / "run").exists()


def test_another_noise_schedule_is_refused(tmp_path, teacher_folder, data_folder):
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    with pytest.raises(SystemExit, match="--fake_init .*noise schedule differs .* in beta_end"):
        dmd2_here(*command(tmp_path / "run", teacher_folder, data_folder, "--fake_init", other))


def test_oracle_needs_a_smaller_student(teacher_folder, data_folder):
    with pytest.raises(SystemExit, match="--student_init: the recipe ssd1b_oracle"):
        parse_args(["--recipe", "ssd1b_oracle", "--teacher", str(teacher_folder), "--data", str(data_folder)])


def test_zero_terminal_snr_is_refused(tmp_path, data_folder):
    """For a network that predicts eps there is no x estimate at 999."""
    teacher = save_teacher(tmp_path / "teacher")
    file = teacher / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(SystemExit, match="--teacher .*zero terminal SNR"):
        dmd2_here(*command(tmp_path / "run", teacher, data_folder))


def test_dmd2_s_losses_must_be_finite(tmp_path, teacher_folder, data_folder):
    flags = "--learning_rate", 1e30, "--save_every", 1, "--fake_updates", 1
    with pytest.raises(SystemExit, match=r"update [23456]: the .* is (nan|inf).*checkpoint: .*0000000[12345]"):
        dmd2_here(*command(tmp_path / "run", teacher_folder, data_folder, *flags))


@pytest.mark.parametrize("flags, named", [
    (["--gan_weight", 1], "gan_weight: saved 0.005, now 1.0"), (["--fake_updates", 3], "fake_updates: saved 2, now 3"),
    (["--p_student", 1], r"p_student: saved None, now \[1.0\]"),
])  # fmt: skip
def test_resume_refuses_another_dmd2(finished_dmd2, flags, named):
    with pytest.raises(SystemExit, match=named):
        dmd2_here("--resume", "--output_dir", finished_dmd2, *flags)


def test_check_data_of_prompts(tmp_path, teacher_folder, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").write_text("\n".join(["a", "b", " ", "c"] * 5))
    dmd2_here(*command(tmp_path / "run", teacher_folder, data, "--gan_weight", 0, "--reflect", 4, "--check_data"))
    assert re.search(r"usable\s+1[45]\b", capsys.readouterr().out) and not (tmp_path / "run").exists()


