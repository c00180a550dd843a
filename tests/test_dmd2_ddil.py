"""dmd2_ddil.py: its gradients against closed forms, its runs against a short independent loop and stock diffusers."""

import copy
import re
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import change_json, read_metrics, run_here, save_teacher, signals_kept, weights_of
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from torch.distributions import Normal, kl_divergence

import common
import dmd2_ddil

# isort: off
from common import LatentData, NoiseSchedule, PromptEncoder, Run, SamplingPrior, UNetModel, add_noise, betas_of
from common import checkpoints_of, consistency_function, derive_seed, forward_diffuse, latent_shape, lcm_scheduler
from common import load_pipeline, load_schedule, load_state, noise_of, open_rows, resolve_priors, timestep_grid
from common import with_guidance
from dmd2_ddil import Critic, GANHead, critic_step, draw_actors, sample_rollout_length, make_head, matching_gradient
from dmd2_ddil import parse_args, reflect_value, student_states, student_step
# isort: on

SD = NoiseSchedule.from_alphas_cumprod(DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
SCHEDULE = NoiseSchedule(SD.alpha.double(), (1 - SD.alpha.double() ** 2).sqrt())  # for identities
MEAN, STD = 0.5, 0.4  # of the data, where they are Gaussian
BOX = torch.tensor(-0.2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
T, W = [999, 749, 499, 249], 3.0
SMALL = "--global_batch_size 4 --warmup 1 --log_every 1 --learning_rate 1e-3 --updates 6 --fake_updates 2"


def arguments(folder, teacher, data, flags="") -> list[str]:
    paths = "--teacher", teacher, "--data", data, "--output_dir", folder, "--guidance_scale", W
    return [*map(str, paths), *SMALL.split(), *flags.split()]


def dmd2_here(*args) -> None:
    run_here(*arguments(*args), script="dmd2_ddil.py")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 4, 3, 3, generator=seeded(seed), dtype=torch.float64)


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def gaussian_v(mean: float, std: float, z_t, t, cond):
    """Exact, of data N(mean, std^2)."""
    alpha_t, sigma_t = SCHEDULE.at(t)
    x_hat = mean + alpha_t * std**2 / ((alpha_t * std) ** 2 + sigma_t**2) * (z_t - alpha_t * mean)
    return (alpha_t * z_t - x_hat) / sigma_t


REAL, FAKE = partial(gaussian_v, MEAN, STD), partial(gaussian_v, -0.3, 0.9)
DISCRIMINATOR = lambda z_t, t, cond: z_t.sin().sum(dim=(1, 2, 3)) + t / 1000


@pytest.mark.parametrize("t", [20, 249, 900])
@pytest.mark.parametrize("mean_g, std_g", [(1.2, STD), (MEAN, 0.7), (0.1, 0.2), (MEAN, STD)])
def test_matching_gradient_is_that_of_the_divergence(t, mean_g, std_g):
    """With x_g = mean + std u: E[dx_g (x_fake - x_real)] alpha^2 / sigma^2 = d KL, of what is generated from the data,
    both noised to t. Where they are alike nothing moves at all: the fixed point."""
    u, tau = randn(20_000), torch.full((20_000,), t)
    x_g, alpha_t, sigma_t = mean_g + std_g * u, SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    g, x_real, _ = matching_gradient(SCHEDULE, REAL, partial(gaussian_v, mean_g, std_g), x_g, tau, {}, None, seeded(1))
    ours = g * (x_g - x_real).abs().mean(dim=(1, 2, 3), keepdim=True) * alpha_t**2 / sigma_t**2
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean_g, std_g))
    noised = lambda mean, std: Normal(alpha_t * mean, ((alpha_t * std) ** 2 + sigma_t**2).sqrt())
    divergence = kl_divergence(noised(mean, std), noised(MEAN, STD))
    expected = torch.stack(torch.autograd.grad(divergence, [mean, std]))
    assert max_error(torch.stack([ours.mean(), (ours * u).mean()]), expected) <= 0.02 * expected.abs().max() + 1e-12
    assert (g.abs().max() == 0) == ((mean_g, std_g) == (MEAN, STD))


@pytest.mark.parametrize("support", [None, BOX])
def test_student_s_losses(support):
    """Each sample has its own normaliser, finite where it is perfect; both estimates are reflected, and counted as they
    were before. The gradient at x_g is matching's over the number of values, and GAN's by autograd on the whole."""
    perfect, x_g, noise = partial(gaussian_v, MEAN, 0.0), 2 * randn(8), seeded(3)
    x_g[0] = MEAN
    inputs = perfect, FAKE, DISCRIMINATOR, x_g.requires_grad_(True), {}, support, 0.3
    losses, notes = student_step(SCHEDULE, *inputs, seeded(3))
    tau = torch.randint(20, 981, (8,), generator=noise)
    z_tau, (alpha_t, sigma_t) = forward_diffuse(SCHEDULE, x_g.detach(), tau, noise)[0], SCHEDULE.at(tau)
    estimates = [alpha_t * z_tau - sigma_t * model(z_tau, tau, {}) for model in (perfect, FAKE)]
    x_real, x_fake = (x_hat if support is None else x_hat.clamp(*support) for x_hat in estimates)
    g = torch.stack([(b - a) / (x - a).abs().mean().clamp(min=1e-3) for x, a, b in zip(x_g.detach(), x_real, x_fake)])
    t = torch.randint(1000, (8,), generator=noise)
    gan = F.softplus(-DISCRIMINATOR(forward_diffuse(SCHEDULE, x_g, t, noise)[0], t, {}))
    ours, gan_g = (torch.autograd.grad(loss.sum(), x_g)[0] for loss in (losses, gan))
    assert max_error(ours, g / 36 + 0.3 * gan_g) < 1e-9
    assert max_error(notes["loss_matching"], 0.5 * (g**2).mean(dim=(1, 2, 3))) < 1e-9
    assert max_error(notes["matching_norm"], g.flatten(1).norm(dim=1) / 36) < 1e-9
    for name, x_hat, before in zip(("moved_real", "moved_fake"), (x_real, x_fake), estimates):
        share = (x_hat != before).double().mean()
        assert max_error(notes[name], share) < 1e-6 and (share > 0.05) == (support is not None)


def test_student_is_reflected_in_value_alone():
    x = (3 * randn(8)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reflect_value(x, BOX).sum(), x)
    assert max_error(reflect_value(x, BOX), x.clamp(*BOX)) < 1e-15 and torch.equal(gradient, torch.ones_like(x))


def test_critic_s_loss():
    x_g, x, noise = randn(4), randn(4, seed=1), seeded(5)
    losses, notes = critic_step(SCHEDULE, FAKE, DISCRIMINATOR, x_g, x, {}, 0.3, seeded(5))
    t = torch.randint(1000, (4,), generator=noise)
    (z_t, eps), (alpha_t, sigma_t) = forward_diffuse(SCHEDULE, x_g, t, noise), SCHEDULE.at(t)
    fake = (sigma_t * z_t + alpha_t * FAKE(z_t, t, {}) - eps).pow(2).mean(dim=(1, 2, 3))
    t = torch.randint(1000, (8,), generator=noise)
    generated, real = DISCRIMINATOR(forward_diffuse(SCHEDULE, torch.cat([x_g, x]), t, noise)[0], t, {}).chunk(2)
    expected = fake + 0.3 * ((1 + generated.exp()).log() + (1 + (-real).exp()).log())
    for ours, theirs in ((losses, expected), (notes["logit_generated"], generated), (notes["logit_real"], real)):
        assert max_error(ours, theirs) < 1e-9


@pytest.mark.parametrize("channels, size", [(16, 1), (16, 2), (32, 4), (48, 8), (64, 16), (32, 24), (32, 32)])
def test_head_fits_any_resolution_and_tells_samples_apart(channels, size):
    torch.manual_seed(0)
    logits = GANHead(channels, size, size)(torch.randn(64, channels, size, size))
    assert logits.shape == (64, 1, 1, 1) and logits.std() > 1e-2


@pytest.fixture(scope="module")
def opened(teacher_folder, data_folder, tmp_path_factory):
    """(run, networks) as main() sets them up."""
    with signals_kept():
        run = Run(parse_args(arguments(tmp_path_factory.mktemp("run"), teacher_folder, data_folder, "--reflect 0.5")))
        run.open(dmd2_ddil.__file__, [], [], {}, plan={})
    return run, dmd2_ddil.networks_of(run, dmd2_ddil.load_pipes(run))


def test_draws():
    """Transitions are uniform and follow the seed. The source moves; in a mixed rollout anyone, with the shares of this
    part of the run, but for forward diffusion."""
    draws = [sample_rollout_length(0, update, i, 4) for update in range(400) for i in range(2)]
    assert all(draws.count(k) / 800 == pytest.approx(0.25, abs=0.06) for k in range(4))
    assert draws != [sample_rollout_length(1, update, i, 4) for update in range(400) for i in range(2)]
    prior = SamplingPrior(seeded(), forward=[0.2, 0.0], teacher=[0.6, 0.5], student=[0.2, 0.5])
    assert all(draw_actors(prior, who, 0, 3, mixed=who == "forward") == [who] * 3 for who in prior.priors)
    for part, share in ((0, 0.25), (1, 0.5)):
        actors = [who for _ in range(500) for who in draw_actors(prior, "teacher", part, 3, mixed=True)]
        assert actors.count("student") / 1500 == pytest.approx(share, abs=0.04) and {*actors} == {"student", "teacher"}


@pytest.mark.parametrize("actors", ["", "forward forward", "student student teacher", "teacher student teacher"])
@torch.no_grad()
def test_states_are_those_of_diffusers_schedulers(actors, opened):
    """Noised data, pure noise at 999; the student's sampler, and the teacher's own five steps from one of its timesteps
    to the next, guided and reflected."""
    (run, nets), actors = opened, actors.split()
    x, cond = dmd2_ddil.data_batch(run, need_images=True)
    state, noise, grids = run.rng.get_state(), torch.Generator(), (T, timestep_grid(20, "trailing"))
    z_t, t = student_states(run, nets.rollout_student, nets.real_score, grids, [*actors, "forward"][0], actors, x, cond)
    noise.set_state(state)
    z = torch.randn(4, 4, 8, 8, generator=noise)
    lcm, ddim = lcm_scheduler(run.pipe, 4), DDIMScheduler(**betas_of(run.pipe), clip_sample_range=0.5)
    lcm.set_timesteps(4)
    ddim.set_timesteps(20)
    for t_i, s_i, who in zip(T, T[1:], actors):
        if who == "student":
            eps = nets.student.unwrapped(z, t_i, cond["prompt"]).sample
            z = lcm.step(eps, torch.tensor(t_i), z, generator=noise).prev_sample
        for step in range(t_i, s_i, -50) if who == "teacher" else ():
            prompts = torch.cat([run.null["prompt"].expand_as(cond["prompt"]), cond["prompt"]])
            eps_null, eps = run.pipe.unet(torch.cat([z, z]), step, prompts).sample.chunk(2)
            z = ddim.step(eps_null + W * (eps - eps_null), step, z, use_clipped_model_output=True).prev_sample
    z = ddim.add_noise(x, z, t) if actors == ["forward", "forward"] else z
    assert max_error(z, z_t) < 1e-4 and t.tolist() == [T[len(actors)]] * 4


def test_gradients_reach_only_whom_they_should(opened):
    """Three networks of their own; the student's update leaves critic and teacher alone, the critic's the other two."""
    run, nets = opened
    student, critic, real = ([*net.parameters()] for net in (nets.student.network, nets.critic.network, run.pipe.unet))
    assert len({p.data_ptr() for p in student + critic + real}) == len(student + critic + real)
    x, cond = dmd2_ddil.data_batch(run, need_images=True)
    x_g = consistency_function(run.schedule, nets.train_student, torch.randn_like(x), torch.full((4,), 999), cond)
    models = nets.real_score, nets.unwrapped_fake_score, nets.unwrapped_discriminator
    student_step(run.schedule, *models, x_g, cond, None, 1.0, run.rng)[0].mean().backward()
    assert all(p.grad.abs().max() > 0 for p in student) and all(p.grad is None for p in critic + real)
    nets.student.optimizer.zero_grad()
    inputs = nets.fake_score, nets.discriminator, x_g.detach(), x, cond, 1.0, run.rng
    critic_step(run.schedule, *inputs)[0].mean().backward()
    assert all(p.grad.abs().max() > 0 for p in critic) and all(p.grad is None for p in student + real)


@pytest.mark.parametrize("fake, half", [("", False), ("", True), ("--fake_init {}", False)])
def test_loras_on_two_bases(fake, half, tmp_path, folder_of, data_folder, monkeypatch):
    """The critic's base with its LoRA switched off is the teacher, or a network beside it where it is another's. What is
    trained, with checkpointing or without, are the LoRAs and the head, in fp32; the base is in half precision."""
    base = folder_of("sd") if fake else tmp_path / "none"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if half else "no")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    teacher = save_teacher(tmp_path / "teacher")
    flags = arguments(tmp_path / "run", teacher, data_folder, f"--lora_rank 2 {fake.format(base)}")
    with signals_kept():
        run = Run(parse_args(flags))
        run.open(dmd2_ddil.__file__, [], [], {}, plan={})
    nets = dmd2_ddil.networks_of(run, dmd2_ddil.load_pipes(run))
    x, cond = dmd2_ddil.data_batch(run, need_images=True)
    t, dtype = torch.full((4,), 499), torch.bfloat16 if half else torch.float32
    plain = UNetModel(load_pipeline(str(teacher)).unet.to(dtype), run.schedule, "epsilon", torch.no_grad)
    expected, inputs = (
        with_guidance(plain, run.null)(x, t, cond),
        (run.schedule, nets.fake_score, nets.discriminator, x, x, cond, 1.0),
    )
    assert (nets.critic.unwrapped.unet is run.pipe.unet) == (not fake)
    trained = dict(nets.critic.unwrapped.named_parameters())
    own = {name: p for name, p in trained.items() if p.requires_grad}
    assert {"lora" if "lora" in name else name.partition(".")[0] for name in own} == {"lora", "head"}
    assert {p.dtype for p in own.values()} == {torch.float32} and trained["unet.conv_in.weight"].dtype == dtype
    with torch.no_grad():
        [p.add_(0.1) for p in own.values()]
    assert max_error(nets.real_score(x, t, cond), expected) < (2e-2 if half else 1e-5)
    gradients = []
    for prepare in (lambda: None, nets.critic.unwrapped.enable_gradient_checkpointing):
        prepare()
        run.rng.manual_seed(1)
        critic_step(*inputs, run.rng)[0].mean().backward()
        gradients.append([p.grad.clone() for p in own.values()])
        nets.critic.optimizer.zero_grad()
    for a, b in zip(*gradients):
        assert a.abs().max() > 0 and max_error(a, b) <= 1e-5 * a.abs().max()


def test_a_unet_without_a_layer_for_a_lora_is_refused(teacher_folder, monkeypatch):
    monkeypatch.setattr(common, "LORA_MODULES", ["no_such_layer"])
    with pytest.raises(SystemExit, match="^--lora_rank 2: this UNet has no layer that a LoRA can be added to.*$"):
        common.add_lora(load_pipeline(str(teacher_folder)).unet, 2)


@pytest.mark.parametrize("parts", [1, 2])
def test_plain_dmd2_equals_a_short_independent_loop(parts, teacher_folder, data_folder, tmp_path):
    """--p_student 1 --reflect none through all of the script, bit for bit, in whole batches and accumulated ones: DMD2
    with backward simulation, which knows no prior, source or threshold. (Products with powers of two are exact.)"""
    B, flags = 4 // parts, "--p_student 1 --reflect none --no-lr_decay --gan_weight 0.25 --critic_gan_weight 0.5"
    dmd2_here(tmp_path, teacher_folder, data_folder, f"{flags} --seed 3 --batch_size {B}")
    pipe, rows = load_pipeline(str(teacher_folder)), open_rows(str(data_folder)).train
    schedule, prompts, noise = load_schedule(pipe), PromptEncoder(pipe, "cpu"), seeded(derive_seed(3, "rank", 0))
    data = LatentData(rows, pipe, prompts, B, 3, 0, 1, noise, cache=True)
    torch.manual_seed(derive_seed(3, "head"))
    modules = copy.deepcopy(pipe.unet), Critic(copy.deepcopy(pipe.unet), make_head(pipe.unet, latent_shape(pipe)))
    [module.requires_grad_(True).train() for module in modules]
    student, critic = (UNetModel(module, schedule, "epsilon", torch.enable_grad) for module in modules)
    real = with_guidance(UNetModel(pipe.unet, schedule, "epsilon", torch.no_grad), prompts.null())
    optimizers, middle = [torch.optim.AdamW(module.parameters()) for module in modules], []
    modules[1].unet.mid_block.register_forward_hook(lambda module, args, output: middle.append(output))
    normal, uniform = (partial(draw, generator=noise) for draw in (torch.randn, torch.randint))
    noised = lambda x, t: add_noise(schedule, x, normal(x.shape), t)

    def logits(z_t, t, cond):  # by a whole forward of the fake score, of which the head gets the mid block's output
        critic.run(z_t, t, cond)
        return modules[1].head(middle.pop()).flatten()

    def step(who, update):
        torch.nn.utils.clip_grad_norm_(modules[who].parameters(), 10.0)
        optimizers[who].param_groups[0]["lr"] = 1e-3 * min((update + 1) / 2, 1.0)
        optimizers[who].step()
        optimizers[who].zero_grad()

    for i in range(6 * 2):
        made, x_g, k = [], None, sample_rollout_length(3, i // 2, i % 2, 4)
        for _ in range(parts):
            x, ids = data.next()
            cond = prompts.encode(ids) | {"w": torch.full((B,), W)}
            for j, t in enumerate(torch.tensor(T)[: k + 1, None].expand(-1, B)):
                z = noised(x_g.detach(), t) if j else normal((B, 4, 8, 8))
                x_g = consistency_function(schedule, student, z, t, cond)
            made.append((x_g.detach(), x, cond))
            if i % 2 == 0:
                tau = uniform(20, 981, (B,))
                z_tau, (alpha_t, sigma_t) = noised(x_g.detach(), tau), schedule.at(tau)
                x_real, x_fake = (alpha_t * z_tau - sigma_t * m(z_tau, tau, cond).detach() for m in (real, critic))
                g = (x_fake - x_real) / (x_g - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
                loss, t = 0.5 * F.mse_loss(x_g, (x_g - g).detach()), uniform(1000, (B,))
                loss = loss + 0.25 * F.softplus(-logits(noised(x_g, t), t, cond)).mean()
                (loss / parts).backward(inputs=[*student.unet.parameters()])
        if i % 2 == 0:
            step(0, i // 2)
        for x_g, x, cond in made:
            t, eps = uniform(1000, (B,)), normal(x_g.shape)
            z_t, (alpha_t, sigma_t) = add_noise(schedule, x_g, eps, t), schedule.at(t)
            loss = (sigma_t * z_t + alpha_t * critic(z_t, t, cond) - eps).pow(2).mean(dim=(1, 2, 3))
            twice = {name: torch.cat([value, value]) for name, value in cond.items()}
            t = uniform(1000, (2 * B,))
            generated, of_data = logits(noised(torch.cat([x_g, x]), t), t, twice).chunk(2)
            loss = loss + 0.5 * (F.softplus(generated) + F.softplus(-of_data))
            (loss.mean() / parts).backward()
        step(1, i // 2)
    kept = load_state(checkpoints_of(tmp_path / "checkpoints")[-1] / "critic.pt")
    for saved, module in zip((weights_of(tmp_path / "pipeline"), kept), modules):
        assert all(torch.equal(saved[name], weight) for name, weight in module.state_dict().items())


@pytest.mark.parametrize("flags", ["--p_forward 0.3 --mixed_rollout --reflect 0.5", "--gan_weight 0 --reflect 0.5"])
def test_metrics(flags, tmp_path, teacher_folder, data_folder):
    """A run with images and one on prompts alone, by replaying who moved."""
    has_images, before, seen, cost = (
        "--mixed_rollout" in flags,
        0.0,
        set(),
        {"student": 1, "teacher": 2 * 5, "forward": 0},
    )
    (tmp_path / "train.txt").write_text("\n".join(f"image {i}" for i in range(20)))
    dmd2_here(tmp_path / "run", teacher_folder, data_folder if has_images else tmp_path, flags)
    prior = SamplingPrior(seeded(derive_seed(0, "shared")), **resolve_priors(parse_args(flags.split())))
    rows, rates = read_metrics(tmp_path / "run"), [5e-4, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4]
    for update, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        lengths = [sample_rollout_length(0, update, i, 4) for i in range(2)]
        actors = [draw_actors(prior, prior.draw(0), 0, length, has_images) for length in lengths]
        ends = [["noise", *who][-1] for who in actors]
        filled = {f"loss_fake_{who}" for who in ends} | {f"loss_matching_{ends[0]}", f"loss_matching_t{T[lengths[0]]}"}
        empty = {column for column in row if re.match("loss_(matching|fake)_", column)} - filled
        signed = {"logit_real", "logit_generated", "x_mean"}
        empty |= set() if has_images else signed | {"loss_gan", "loss_judge", "gan_norm", "x_std"}
        assert {column for column in row if not row[column]} == empty
        assert all(float(row[column]) > 0 for column in {*row} - empty - signed - {"x_g_mean"})
        # a critic's update: the rollout, student 1, fake score 1 + 2, GAN 2 (1 + 2) times the encoder, .4 of a UNet; a
        # student's besides: backward 2, guided teacher 2, fake score 1, the encoder 1 + 1 times
        forwards = 2 * 4 + 5 + (2 * 6 + 2) * 0.4 * has_images + sum(cost[who] for who in actors[0] + actors[1])
        assert float(row["unet_forwards"]) - before == pytest.approx(4 * forwards) and float(row["lr"]) == rate
        before, seen = float(row["unet_forwards"]), seen.union(ends)
    assert seen == {"noise", "teacher", "student", *["forward"] * has_images}


MODELS = {  # what save_teacher takes, and changes of the scheduler's config
    "sd": ({}, {}),
    "gc": ({"prediction_type": "v_prediction", "time_cond_proj_dim": 256}, {}),  # takes w
    "xl": ({"xl": True}, {}),
    "small": ({"xl": True, "mid_block_type": "UNetMidBlock2D"}, {}),  # no attention in the middle, as SSD-1B
    "large": ({"xl": True, "layers_per_block": 2}, {}),
    "no_middle": ({"mid_block_type": None}, {}),
    "zero_snr": ({}, {"rescale_betas_zero_snr": True}),
    "zero_snr_v": ({"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @cache
    def folder_of(name: str):
        networks, scheduler = MODELS[name]
        folder = save_teacher(tmp_path_factory.mktemp(name), **networks)
        change_json(folder / "scheduler" / "scheduler_config.json", **scheduler)
        return folder

    return folder_of


@pytest.mark.parametrize("case", ["sd sd sd 1", "gc gc gc 2", "gc sd gc 4", "xl small large 4", "xl small small 4",
                                  "sd sd sd 4 lora", "xl small large 4 lora"])  # fmt: skip
def test_stock_diffusers_samples_the_same(case, folder_of, tmp_path, data_folder, monkeypatch):
    """As the last sample grid, from the same noise: the exact timesteps, re-noising, no guidance; w for a student that
    takes it. Student and critic are what they started from, and trained."""
    (teacher, student, fake, steps, *lora), grids = case.split(), []
    monkeypatch.setattr(Run, "save_preview", lambda run, rows: grids.append(rows))
    flags = f"--student_init {folder_of(student)} --fake_init {folder_of(fake)} --student_steps {steps} --updates 2"
    flags += " --lora_rank 2 --learning_rate 0.02" * bool(lora)
    dmd2_here(tmp_path, folder_of(teacher), data_folder, flags)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    captions, z = [f"image {i} of test" for i in range(4)], noise_of(range(4), (4, 8, 8), seed=1)
    settings = {
        "num_inference_steps": int(steps),
        "guidance_scale": W if student == "gc" else 1.0,
        "output_type": "latent",
    }
    pipes = [stock]
    if lora:  # fused, and loaded into what it was made from
        base = load_pipeline(str(folder_of(student))).unet
        pipes.append(DiffusionPipeline.from_pretrained(tmp_path / "pipeline", unet=base))
        pipes[1].load_lora_weights(tmp_path / "lora")
    for pipe in pipes:
        latents = pipe(captions, latents=z, generator=seeded(1), **settings).images
        assert max_error(latents, grids[-1][f"student, {steps} steps"][:4]) < 1e-3
    saved, newest = weights_of(tmp_path / "pipeline"), checkpoints_of(tmp_path / "checkpoints")[-1]
    kept = load_state(newest / "critic.pt")
    critic = {name.removeprefix("unet."): value for name, value in kept.items() if name.startswith("unet.")}
    if lora:  # checkpoints are small: the base is not in them
        assert all("lora" in name or name.startswith("head.") for name in kept)
        critic, fake = saved, student
    for trained, init in ((saved, weights_of(folder_of(student))), (critic, weights_of(folder_of(fake)))):
        assert trained.keys() == init.keys() and max(max_error(trained[name], init[name]) for name in init) > 1e-4


# Flags, with @NAME for one of MODELS or the prompts, and what is said
ENDS = """
--dry_run                                    | 6 of the student, 12 of the critic
--student_steps 3                            | --student_steps 3, --teacher_steps 20: the first must divide 1000
--teacher_steps 30                           | --teacher_steps 30: its grid lacks the student's timesteps [749, 249]
--p_forward .5 --p_student .2 --p_teacher .2 | --p_forward, --p_teacher, --p_student (0.5, 0.2, 0.2): must be
--gan_weight -1                              | argument --gan_weight: -1: must be
--critic_gan_weight 0                        | --critic_gan_weight 0: nothing would train the GAN's head
--recipe ssd1b_oracle                        | --student_init: ssd1b_oracle distils SDXL into a smaller UNet
--student_init @xl                           | its UNet's cross_attention_dim is 32, the teacher's 16
--fake_init @no_middle                       | its UNet has no mid block, which the GAN looks at; take --gan_weight 0
--fake_init @zero_snr                        | its noise schedule differs from the teacher's in rescale_betas_zero_snr
--teacher @zero_snr                          | predicts epsilon and has zero terminal SNR
--teacher @zero_snr_v --fake_init @zero_snr  | predicts epsilon and has zero terminal SNR
--gan_weight 1                               | --mixed_precision fp16: too coarse for the GAN's gradient
--data @prompts --reflect none               | has no images (1 .txt
--lora_rank 4 --teacher @gc                  | takes w, for which a LoRA has no input
--lora_rank 4 --fake_init @gc                | takes w, for which a LoRA has no input
--lora_rank -1                               | argument --lora_rank: -1: must be
"""


@pytest.mark.parametrize("flags, said", [line.split("|") for line in ENDS.strip().splitlines()])
def test_what_ends_before_a_run_begins(flags, said, folder_of, tmp_path, data_folder, capsys, monkeypatch):
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    flags = re.sub(r"@(\w+)", lambda match: str(folder_of(match[1])), flags.replace("@prompts", str(tmp_path)))
    if "fp16" in said:
        monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(SystemExit) as caught:
        dmd2_ddil.main([*map(str, arguments(tmp_path / "run", folder_of("sd"), data_folder, flags))])
    assert said.strip() in str(caught.value) + "".join(capsys.readouterr()) and not (tmp_path / "run").exists()
