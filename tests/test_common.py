"""common.py against closed forms, diffusers and slow references. Errors are maxima of absolute values."""

import ast
import builtins
import sys
from collections import Counter
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from toys import BOX, MEAN, SCHEDULE, STD, clamped, gaussian_model, max_error, nonlinear_model, randn, seeded

# isort: off
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler
from diffusers import StableDiffusionPipeline
from common import CLEAN, NoiseSchedule, PromptEncoder, SamplingPrior, TrajectoryBuffer, add_noise, combine_guidance
from common import consistency_function, consistency_rollout, ddim_step, drop_prompts, eps_from_v, forward_diffuse
from common import guidance_embedding, load_pipeline, load_schedule, measure_support, mixed_rollout, clipped_fraction
from common import noise_of, reflect, rotation, student_rollout, teacher_rollout, timestep_grid, v_from_prediction
from common import with_guidance, x_from_v
# isort: on

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = NoiseSchedule.from_alphas_cumprod(DDPMScheduler(**SD_BETAS).alphas_cumprod)
T = torch.tensor([999, 999, 999, 749, 500, 250, 31, 1, 0])  # t > s from all over the schedule, some s the clean end
S = torch.tensor([998, 500, CLEAN, 500, 31, CLEAN, 5, 0, CLEAN])
with_and_without_support = pytest.mark.parametrize("support", [None, BOX])


def all_equal(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- noise schedule ---


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 10, 16, 20, 25, 32, 50, 64])
def test_grids_equal_diffusers(n):
    """Linspace that of DPM++, trailing that of DDIM; twice as many steps hold the same ones."""
    dpm = DPMSolverMultistepScheduler(**SD_BETAS, timestep_spacing="linspace", final_sigmas_type="zero")
    ddim = DDIMScheduler(**SD_BETAS, timestep_spacing="trailing")
    for sampler, spacing in ((dpm, "linspace"), (ddim, "trailing")):
        sampler.set_timesteps(n)
        assert timestep_grid(n, spacing) == sampler.timesteps.tolist()
    assert timestep_grid(2 * n)[::2] == timestep_grid(n)


@pytest.mark.parametrize("grid_size", [n for n in range(1, 501) if 1000 % n == 0])  # all that the scripts take
def test_stock_lcm_sampler_stays_on_the_trained_grid(grid_size):
    """Whatever its number of steps, LCMScheduler visits points of the solver grid; DMD2's students, all of theirs."""
    grid = timestep_grid(grid_size, "trailing")
    sampler = LCMScheduler(original_inference_steps=grid_size, steps_offset=1)
    for n in range(1, grid_size + 1):
        sampler.set_timesteps(n)
        assert set(sampler.timesteps.tolist()) <= {*grid} and (n < grid_size or sampler.timesteps.tolist() == grid)


def test_grids_are_the_paper_s():
    """PD's, and DMD2's, which lies on its teacher's of 20 steps."""
    assert timestep_grid(32) == [
        999, 968, 937, 905, 874, 843, 812, 780, 749, 718, 687, 656, 624, 593, 562, 531,
        500, 468, 437, 406, 375, 343, 312, 281, 250, 219, 187, 156, 125, 94, 62, 31,
    ]  # fmt: skip
    assert timestep_grid(4) == [999, 749, 500, 250] and timestep_grid(1) == [999]
    assert timestep_grid(4, "trailing") == [999, 749, 499, 249] == timestep_grid(20, "trailing")[::5]


@pytest.mark.parametrize("config", [
    SD_BETAS, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.01] * 1000},
    SD_BETAS | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
])  # fmt: skip
def test_schedule_equals_diffusers(config):
    """Tables, forward diffusion and v; and the clean end."""
    scheduler = DDPMScheduler(**config)
    schedule = load_schedule(SimpleNamespace(scheduler=scheduler))  # of a pipeline, only the scheduler is read
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float32
    assert max_error(schedule.alpha[:-1], scheduler.alphas_cumprod.sqrt()) < 1e-6
    assert max_error(schedule.alpha**2 + schedule.sigma**2, torch.ones(1001)) < 1e-6
    assert schedule.alpha[CLEAN] == 1 and schedule.sigma[CLEAN] == 0 and (schedule.sigma.diff()[:-1] >= 0).all()
    x, eps, t = randn(8).float(), randn(8, seed=1).float(), torch.tensor([0, 9, 31, 250, 500, 749, 998, 999])
    assert torch.equal(add_noise(schedule, x, eps, torch.full((8,), CLEAN)), x)
    z_t, v = add_noise(schedule, x, eps, t), scheduler.get_velocity(x, eps, t)
    assert max_error(z_t, scheduler.add_noise(x, eps, t)) < 1e-6
    assert max_error(x_from_v(schedule, z_t, v, t), x) < 1e-5
    v_hat = v_from_prediction(schedule, z_t, x, t, "sample")
    assert max_error(v_hat[1:], v[1:]) < 1e-4  # at t = 0, x says little of v


def test_conversions_invert_each_other():
    x, eps, (alpha_t, sigma_t) = randn(9), randn(9, seed=1), SCHEDULE.at(T)
    z_t, v = add_noise(SCHEDULE, x, eps, T), alpha_t * eps - sigma_t * x
    for prediction_type, output in {"epsilon": eps, "v_prediction": v, "sample": x}.items():
        v_hat = v_from_prediction(SCHEDULE, z_t, output, T, prediction_type)
        assert max_error(v_hat, v) < 1e-11
        assert max_error(x_from_v(SCHEDULE, z_t, v_hat, T), x) < 1e-11
        assert max_error(eps_from_v(SCHEDULE, z_t, v_hat, T), eps) < 1e-11


# --- DDIM step and its reflection ---


@with_and_without_support
def test_step_is_the_textbook_s(support):
    """alpha_s x + sigma_s eps. Where x is reflected, eps is that of the reflected x too [D15]."""
    z_t, v, (alpha_t, sigma_t), (alpha_s, sigma_s) = randn(9), randn(9, seed=1), SCHEDULE.at(T), SCHEDULE.at(S)
    x = clamped(alpha_t * z_t - sigma_t * v, support)
    expected = alpha_s * x + sigma_s * (z_t - alpha_t * x) / sigma_t
    assert max_error(ddim_step(SCHEDULE, z_t, v, T, S, support), expected) < 1e-10
    c, d = rotation(SCHEDULE, T, S)
    assert max_error(c**2 + d**2, torch.ones_like(c)) < 1e-12 and (d > 0).all()


def test_step_is_exact_where_it_must_be():
    """In fp32, to the last bit: the clean end is x_hat; and reflection leaves a value alone that it does not move."""
    z_t, v = randn(9).float(), randn(9, seed=1).float()
    x_hat, plain = x_from_v(SD, z_t, v, T), ddim_step(SD, z_t, v, T, S)
    assert torch.equal(plain[S == CLEAN], x_hat[S == CLEAN])
    reflected, stays = ddim_step(SD, z_t, v, T, S, BOX), (x_hat >= BOX[0]) & (x_hat <= BOX[1])
    assert torch.equal(plain[stays], reflected[stays]) and 0 < stays.float().mean() < 1
    assert not torch.equal(plain[~stays], reflected[~stays])


def test_sign_as_the_paper_prints_it_is_wrong():
    """[D1] With eps_hat = sigma_t z_t - alpha_t v the step misses z_s by 2 sigma_s alpha_t v: on 4 steps up to .6 v."""
    t, s = torch.tensor([*timestep_grid(4), CLEAN]).unfold(0, 2, 1).T
    x, eps = randn(4).float(), randn(4, seed=1).float()
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SD.at(t), SD.at(s)
    z_t, z_s, v = add_noise(SD, x, eps, t), add_noise(SD, x, eps, s), alpha_t * eps - sigma_t * x
    printed = alpha_s * (alpha_t * z_t - sigma_t * v) + sigma_s * (sigma_t * z_t - alpha_t * v)
    miss = 2 * sigma_s * alpha_t
    assert max_error(miss.flatten(), torch.tensor([0.133, 0.405, 0.600, 0.0])) < 0.001
    assert max_error(printed, z_s - miss * v) < 1e-5 and max_error(ddim_step(SD, z_t, v, t, s), z_s) < 1e-5


def test_reflect_projects_onto_the_support():
    support = torch.tensor([-1.0, -2, -3, -4]).view(1, 4, 1, 1), torch.tensor([4.0, 3, 2, 1]).view(1, 4, 1, 1)
    x_hat = 5 * randn(8).float()
    once, inside = reflect(x_hat, support), (x_hat >= support[0]) & (x_hat <= support[1])
    assert (once >= support[0]).all() and (once <= support[1]).all() and torch.equal(reflect(once, support), once)
    assert torch.equal(once[inside], x_hat[inside]) and torch.equal(reflect(x_hat, None), x_hat)
    assert 0 < clipped_fraction(x_hat, support) == (~inside).float().mean() < 1 and clipped_fraction(x_hat, None) == 0


def test_measured_support_leaves_the_tails_out():
    """Channel c holds 1 .. 10,000 times (c + 1), shuffled: the outer 0.05 % on either side are four or five."""
    values = torch.stack([torch.randperm(10_000, generator=seeded(c)) + 1.0 for c in range(4)])  # [C, n h w]
    x = (values * torch.arange(1, 5).view(4, 1)).view(4, 100, 10, 10).transpose(0, 1)
    for tail, low, high in ((5e-4, 5, 9996), (0, 1, 10_000)):
        for bound, value in zip(measure_support(x, tail), (low, high)):
            assert bound.shape == (1, 4, 1, 1) and bound.flatten().tolist() == [value * c for c in range(1, 5)]
    assert 0 < clipped_fraction(x, measure_support(x)) <= 2 * 5e-4


# --- rollouts ---

TEACHER, STUDENT = nonlinear_model, lambda z_t, t, cond: nonlinear_model(z_t, t, cond) + 0.25
TEACHER_GRID = [*timestep_grid(8), CLEAN]
STUDENT_GRID = TEACHER_GRID[::2]


def mixed(rate, n=64, seed=0, teacher=TEACHER, student=STUDENT, **more):
    """(states, teacher_targets, moves) of n samples on N = 8 / 4 steps."""
    inputs = randn(n), TEACHER_GRID, STUDENT_GRID, {"b": torch.linspace(-5, 5, n)}
    return mixed_rollout(SCHEDULE, teacher, student, *inputs, rate, seeded(seed), **more)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 16])
def test_rollouts_equal_diffusers(n):
    """Each state: first-order DPM-Solver++'s and, on the same noise, LCMScheduler's; also if a rollout stops early."""
    grid = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}
    dpm = DPMSolverMultistepScheduler(**SD_BETAS, **grid, solver_order=1, prediction_type="v_prediction")
    lcm = LCMScheduler(**SD_BETAS, original_inference_steps=50, prediction_type="v_prediction")
    consistency = lambda *inputs: consistency_rollout(*inputs, seeded(1))
    for sampler, rollout in ((dpm, student_rollout), (lcm, consistency)):
        sampler.set_timesteps(n)
        states, noise = [randn(8).float()], seeded(1)
        for t in sampler.timesteps:
            v = nonlinear_model(states[-1], t.expand(8), {})
            states.append(sampler.step(v, t, states[-1], generator=noise).prev_sample)
        timesteps = [*sampler.timesteps.tolist(), CLEAN]
        ours = rollout(SD, nonlinear_model, states[0], timesteps, {})
        assert len(ours) == n + 1 and max(max_error(a, b) for a, b in zip(ours, states)) < 2e-5
        assert all_equal(rollout(SD, nonlinear_model, states[0], timesteps[:2], {}), ours[:2])


@pytest.mark.parametrize("rate", [0.0, 0.15, 1.0])
def test_few_shapes_change_no_state(rate):
    """Who moves together is filled up to a multiple: networks see whole or half batches, and nothing else is different."""
    sizes, expected = [], mixed(rate, query=range(1, 4))
    noted = [
        lambda z_t, t, cond, model=model: sizes.append(len(z_t)) or model(z_t, t, cond) for model in (TEACHER, STUDENT)
    ]
    found = mixed(rate, teacher=noted[0], student=noted[1], query=range(1, 4), multiple=32)
    assert {*sizes} <= {32, 64}
    assert all_equal(found[0], expected[0])
    assert all_equal([*found[1].values()], [*expected[1].values()])


@with_and_without_support
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_mixed_rollout_is_each_sample_s_own(rate, support):
    """Each chooses at each transition and moves as it would alone: with the teacher reflected, with the student, as at
    inference, never."""
    states, _, moves = mixed(rate, support=support)
    choices = {tuple(row) for row in torch.stack(moves, dim=1).tolist()}
    assert choices == ({*product([False, True], repeat=4)} if rate == 0.5 else {(rate == 1,) * 4})
    for i in range(64):
        row, z = {"b": torch.linspace(-5, 5, 64)[i : i + 1]}, states[0][i : i + 1]
        for j, move in enumerate(moves):
            if move[i]:
                z = teacher_rollout(SCHEDULE, STUDENT, z, STUDENT_GRID[j : j + 2], row)[-1]
            else:
                z = teacher_rollout(SCHEDULE, TEACHER, z, TEACHER_GRID[2 * j : 2 * j + 3], row, support)[-1]
            assert torch.equal(z, states[j + 1][i : i + 1])


@with_and_without_support
def test_landings_are_the_teacher_s_from_the_visited_states(support):
    """Whoever moves. Asking changes no trajectory, which follows the seed; nothing is spent after the last answer."""
    states, teacher_targets, moves = mixed(0.5, query=[1, 2, 3], support=support)
    assert sorted(teacher_targets) == [1, 2, 3] and len(moves) == 3
    assert all_equal(states, mixed(0.5, support=support)[0][:4])
    assert not all_equal(states, mixed(0.5, seed=1, support=support)[0][:4])
    for j, z_s in teacher_targets.items():
        inputs = states[j], TEACHER_GRID[2 * j : 2 * j + 3], {"b": torch.linspace(-5, 5, 64)}
        assert torch.equal(z_s, teacher_rollout(SCHEDULE, TEACHER, *inputs, support)[-1])
    for j in (1, 2):  # where the teacher moved it moved there, and the student did not
        assert torch.equal((teacher_targets[j] != states[j + 1]).flatten(1).any(dim=1), moves[j])


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.8, 1.0])
def test_forward_counts(rate):
    """A transition costs 2 teacher or 1 student forwards, on average 2 - p. With M - 1 states labelled [D17]:
    2 for each label, 2 - p to leave the start, p for each later transition (the teacher's are the labels)."""
    n, M = 2000, len(STUDENT_GRID) - 1
    labelled = 2 * (M - 1) + (2 - rate) + rate * (M - 2)
    for query, expected in ((None, M * (2 - rate)), (range(1, M), labelled)):
        asked = Counter()
        teacher = lambda *inputs, asked=asked: asked.update(teacher=len(inputs[0])) or TEACHER(*inputs)
        student = lambda *inputs, asked=asked: asked.update(student=len(inputs[0])) or STUDENT(*inputs)
        moves = torch.stack(mixed(rate, n, teacher=teacher, student=student, query=query)[2])  # [M or M - 1, n]
        by_teacher = (~moves).sum() if query is None else (~moves[0]).sum() + n * (M - 1)
        assert asked["teacher"] == 2 * by_teacher and asked["student"] == moves.sum()
        assert abs(asked.total() / n - expected) < 0.1
        assert abs(moves.float().mean() - rate) <= 5 * (rate * (1 - rate) / moves.numel()) ** 0.5


def test_each_move_may_have_a_rate_of_its_own():
    """0 and 1 leave no choice; one rate for all is the same rate everywhere, and takes the same draws."""
    wanted = torch.rand(64, 4, generator=seeded(3)) < 0.5
    assert torch.equal(torch.stack(mixed(wanted.float(), seed=1)[2], dim=1), wanted)
    (states, _, moves), (same_states, _, same_moves) = mixed(0.3), mixed(torch.full((64, 4), 0.3))
    assert all_equal(states, same_states) and all_equal(moves, same_moves)


def test_no_graph_through_rollouts():
    scale = torch.nn.Parameter(torch.tensor(0.5))
    model = lambda z_t, t, cond: scale * z_t
    states, teacher_targets, _ = mixed(0.5, teacher=model, student=model, query=range(4))
    made = [*states, *teacher_targets.values(), *teacher_rollout(SCHEDULE, model, states[0], TEACHER_GRID, {})]
    made += consistency_rollout(SCHEDULE, model, states[0], TEACHER_GRID, {}, seeded())
    assert not any(z.requires_grad for z in made) and model(states[0], None, {}).requires_grad


# --- rollouts of Gaussian data: everything in closed form ---


def centred(z: torch.Tensor, t: int) -> torch.Tensor:
    return z - SCHEDULE.alpha[t] * MEAN


def std_at(t: int) -> torch.Tensor:
    """For z_t of data N(MEAN, STD^2)."""
    return ((SCHEDULE.alpha[t] * STD) ** 2 + SCHEDULE.sigma[t] ** 2).sqrt()


def test_ddim_converges_to_the_flow_as_one_over_n():
    """The probability flow scales what is centred by std_CLEAN / std_999; DDIM's error halves as its steps double."""
    z, errors = torch.ones(1, 1, 1, 1, dtype=torch.float64), []
    for n in (32, 64, 128, 256):
        end = student_rollout(SCHEDULE, gaussian_model, z, [*timestep_grid(n), CLEAN], {})[-1]
        errors.append(max_error(centred(end, CLEAN), STD / std_at(999) * centred(z, 999)))
    assert errors[-1] < 0.01 and all(0.4 < fine / coarse < 0.6 for coarse, fine in pairwise(errors))


def test_biased_student_drifts_as_predicted():
    """A DDIM step with the exact v scales what is centred by a gain. Student = exact teacher + bias b in v: each of its
    moves adds -d b, every later move rescales that."""

    def gain(t: int, s: int) -> torch.Tensor:
        (a_t, s_t), (a_s, s_s) = ((SCHEDULE.alpha[i], SCHEDULE.sigma[i]) for i in (t, s))
        return (a_s * a_t * STD**2 + s_s * s_t) / std_at(t) ** 2

    b = 0.3
    student = lambda z_t, t, cond: gaussian_model(z_t, t, cond) + b
    states, teacher_targets, moves = mixed(0.5, n=256, teacher=gaussian_model, student=student, query=range(4))
    u = centred(states[0], 999)
    for j, (t, s) in enumerate(pairwise(STUDENT_GRID)):
        m = TEACHER_GRID[2 * j + 1]
        by_teacher = gain(t, m) * gain(m, s) * u  # from the visited state, drift and all
        assert max_error(centred(states[j], t), u) < 1e-12
        assert max_error(centred(teacher_targets[j], s), by_teacher) < 1e-12
        if j < len(moves):
            d = rotation(SCHEDULE, torch.tensor([t]), torch.tensor([s]))[1]
            u = torch.where(moves[j].view(-1, 1, 1, 1), gain(t, s) * u - d * b, by_teacher)


def test_consistency_rollout_of_exact_estimates_keeps_the_marginals():
    """f = the flow's end: every state is distributed as forward diffusion of data."""

    def flow_model(z_t, t, cond):
        x = MEAN + STD * centred(z_t, t[0]) / std_at(t[0])
        return (SCHEDULE.alpha[t[0]] * z_t - x) / SCHEDULE.sigma[t[0]]

    x, timesteps = MEAN + STD * randn(2000), [999, 759, 499, 259]  # 72,000 independent values
    z, _ = forward_diffuse(SCHEDULE, x, torch.full((2000,), 999), seeded(1))
    for s, state in zip(timesteps, consistency_rollout(SCHEDULE, flow_model, z, timesteps, {}, seeded(2))):
        assert abs(centred(state, s).mean()) < 0.02 and abs(state.std() / std_at(s) - 1) < 0.02


def test_consistency_function_is_lcm_scheduler_s():
    """c_skip z + c_out x_hat by its scalings; at 0, to the last bit, the identity."""
    z, t = randn(4), torch.tensor([0, 1, 19, 999])
    c_skip, c_out = (c.view(-1, 1, 1, 1) for c in LCMScheduler().get_scalings_for_boundary_condition_discrete(t))
    x_hat = x_from_v(SCHEDULE, z, nonlinear_model(z, t, {}), t)
    end = consistency_function(SCHEDULE, nonlinear_model, z, t, {})
    assert max_error(end, c_skip * z + c_out * x_hat) < 1e-6 and torch.equal(end[0], z[0])


# --- sampling priors and D_DAgger ---


def test_prior_draws_by_cumulative_thresholds():
    """Each draw takes one uniform number, so that ranks with one seed agree; what has no share is never drawn."""
    shares = {"forward": (0.5, 0.1, 1.0, 0.0), "teacher": (0.3, 0.2, 0.0, 0.0), "student": (0.2, 0.7, 0.0, 1.0)}
    prior, reference = SamplingPrior(seeded(3), **shares), seeded(3)
    for part, (first, second) in enumerate([(0.5, 0.8), (0.1, 0.3), (1, 1), (0, 0)]):
        for _ in range(500):
            p = torch.rand((), generator=reference, dtype=torch.float64).item()
            assert prior.draw(part) == ("forward" if p < first else "teacher" if p < second else "student")


def test_buffer_is_a_ring():
    """Against a list of the last five. Rows stay together, are drawn uniformly and by the seed, and are copies; a saved
    buffer goes on at the same place."""
    buffer, held = TrajectoryBuffer(5), []
    for n in (3, 4, 12, 1, 2):
        j = torch.arange(n) + (held[-1] + 1 if held else 0)
        buffer.add(j=j, z_t=j.double().view(n, 1, 1, 1).expand(n, 2, 1, 1))
        held = [*held, *j.tolist()][-5:]
        j.zero_()
        rows, again = (buffer.sample(5000, seeded(n)) for _ in range(2))
        counts = rows["j"].bincount()[held[0] :] / 5000 * len(held)
        assert len(buffer) == len(held) and rows["j"].unique().tolist() == held and torch.equal(rows["j"], again["j"])
        assert torch.equal(rows["z_t"][:, 1, 0, 0], rows["j"].double()) and max_error(counts, torch.ones(())) < 0.15
        state, buffer = buffer.state_dict(), TrajectoryBuffer(5)
        buffer.load_state_dict(state)
    buffer.clear()
    assert len(buffer) == 0
    buffer.add(w=torch.tensor([7.0]))
    assert buffer.sample(2, seeded())["w"].tolist() == [7, 7]


def prior_of(forward, dagger) -> SamplingPrior:
    return SamplingPrior(seeded(), forward=forward, dagger=dagger)


@pytest.mark.parametrize("function, inputs, error, said", [
    *[(timestep_grid, [n], ValueError, f"a grid of {n} steps") for n in (0, -4, 1000)],
    (timestep_grid, [4, "leading"], ValueError, "'leading'"),
    (v_from_prediction, [SCHEDULE, randn(1), randn(1), torch.tensor([5]), "flow"], ValueError, "'flow'"),
    (prior_of, [(0.5,), (0.4,)], ValueError, "part 0 must be >= 0 and sum to 1"),
    (prior_of, [(1.5,), (-0.5,)], ValueError, "part 0 must be >= 0 and sum to 1"),
    (prior_of, [(1.0, 0.5), (0.0, 0.6)], ValueError, "part 1 must be >= 0 and sum to 1"),
    (prior_of, [(0.5, 0.5), (0.5,)], ValueError, "shorter"),
    (TrajectoryBuffer(4).sample, [1, seeded()], IndexError, "empty"),
])  # fmt: skip
def test_bad_input_is_named(function, inputs, error, said):
    with pytest.raises(error, match=said):
        function(*inputs)


def test_sections_1_to_4_can_be_copied():
    """They run where torch and the standard library alone can be imported, and name nothing that is defined later."""
    sections, _, others = (ROOT / "common.py").read_text().partition("# 5. Networks")

    def import_only(name, *args, **kwargs):
        if name.split(".")[0] not in sys.stdlib_module_names | {"torch"}:
            raise ImportError(f"{name} is neither torch nor the standard library")
        return __import__(name, *args, **kwargs)

    copied = {"__name__": "copied", "__builtins__": vars(builtins) | {"__import__": import_only}}
    exec(sections, copied)  # noqa: S102
    with pytest.raises(ImportError, match="neither torch"):  # or the line above shows nothing
        exec("import diffusers", copied)  # noqa: S102
    schedule = copied["NoiseSchedule"].from_alphas_cumprod(SCHEDULE.alpha[:-1] ** 2)
    grids = TEACHER_GRID, STUDENT_GRID
    states, *_ = copied["mixed_rollout"](schedule, TEACHER, STUDENT, randn(4), *grids, {}, 0.5, seeded(), BOX, [1, 2])
    assert len(states) == 3
    defined = {node.name for node in ast.parse(f"# {others}").body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    used = {node.id for node in ast.walk(ast.parse(sections)) if isinstance(node, ast.Name)}
    assert "UNetModel" in defined and not defined & used


# --- guidance, prompts, pipelines ---


def test_guidance():
    """[D10] w is diffusers' guidance_scale; Meng et al. write the same as (1 + w') c - w' u with w' = w - 1. It is the
    same in x, eps and v; a guided model asks for both branches at once."""
    t, w = torch.tensor([31, 250, 749, 999]), torch.tensor([0.0, 1.0, 3.0, 14.0], dtype=torch.float64)
    z_t, u, c, meng = randn(4), randn(4, seed=1), randn(4, seed=2), (w - 1).view(-1, 1, 1, 1)
    guided = combine_guidance(u, c, w)
    assert max_error(guided, (1 + meng) * c - meng * u) < 1e-12
    for kind in ("epsilon", "sample"):
        v_u, v_c, v = (v_from_prediction(SCHEDULE, z_t, output, t, kind) for output in (u, c, guided))
        assert max_error(combine_guidance(v_u, v_c, w), v) < 1e-9
    batches, shift, empty = [], torch.tensor([-5.0, 0, 4, 9]), torch.tensor([7.0])
    model = lambda z_t, t, cond: batches.append(len(z_t)) or z_t.sin() + cond["b"].view(-1, 1, 1, 1)
    v = with_guidance(model, {"b": empty})(z_t, t, {"b": shift, "w": w})
    v_u, v_c = (model(z_t, t, {"b": b}) for b in (empty.expand(4), shift))
    assert max_error(v, combine_guidance(v_u, v_c, w)) < 1e-12 and batches == [8, 4, 4]


def test_guidance_embedding_equals_the_pipeline_s():
    w, embed = torch.tensor([1.0, 1.5, 3.0, 7.5, 8.0, 14.0]), StableDiffusionPipeline.get_guidance_scale_embedding
    theirs, of_w_itself = (embed(None, value, embedding_dim=256) for value in (w - 1, w))  # uses nothing of a pipeline
    assert max_error(guidance_embedding(w, 256), theirs) < 1e-3  # sines of up to 13,000 radians, in fp32
    assert max_error(guidance_embedding(w, 256), of_w_itself) > 0.5


def test_dropped_prompts_are_the_empty_one_s():
    cond = {"prompt": randn(4000).abs().flatten(2), "w": torch.arange(4000)}
    out = drop_prompts(cond, {"prompt": torch.full((1, 4, 9), -1.0)}, 0.25, seeded())
    dropped = (out["prompt"] == -1).flatten(1).all(dim=1)
    assert abs(dropped.float().mean() - 0.25) < 0.035 and torch.equal(out["w"], cond["w"])
    assert torch.equal(out["prompt"][~dropped], cond["prompt"][~dropped])


CAPTIONS = ["a red seven on a yellow background", "", "a blue one, " * 9, "7"]


@pytest.mark.parametrize("kind, zeros", [("teacher", False), ("xl", True), ("xl", False)])
def test_prompts_equal_diffusers(kind, zeros, request):
    """Captions' and the empty prompt's, which SDXL may have as zeros; SDXL's pooled ones and sizes."""
    pipe = load_pipeline(str(request.getfixturevalue(f"{kind}_folder")))
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    prompts = PromptEncoder(pipe, "cpu")
    cond, null = prompts.encode(prompts.tokenize(CAPTIONS)), prompts.null()
    theirs = pipe.encode_prompt(CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    for name, prompt, empty in zip(null, theirs[::2], theirs[1::2], strict=True):  # captions', empty one's by turns
        assert max_error(cond[name], prompt) < 1e-5 and max_error(null[name], empty[:1]) < 1e-5
    assert (null["prompt"] == 0).all() == zeros and max_error(cond["prompt"][0], cond["prompt"][3]) > 0.1
    if kind == "xl":
        size, settings = (32, 32), {"dtype": torch.float32, "text_encoder_projection_dim": 16}
        time_ids = pipe._get_add_time_ids(size, (0, 0), size, **settings)
        assert torch.equal(cond["time_ids"].float(), time_ids.expand(4, -1)) and [*null] == ["prompt", "text_embeds"]


def test_prompts_are_the_same_from_memory(teacher_folder):
    """Embeddings of recent prompts are kept: with room for all, for some, and for fewer than a batch."""
    pipe = load_pipeline(str(teacher_folder))
    fresh = PromptEncoder(pipe, "cpu", memo=0)
    for memo in (100, 5, 3):
        prompts = PromptEncoder(pipe, "cpu", memo)
        for batch in (CAPTIONS, CAPTIONS[::-1], ["a", "b", "a"], ["c"], CAPTIONS):
            ids = prompts.tokenize(batch)
            assert max_error(prompts.encode(ids)["prompt"], fresh.encode(ids)["prompt"]) < 1e-5
            assert len(prompts.memo) <= max(memo, len(batch))


def test_half_precision_files(teacher_folder, tmp_path):
    """A folder that holds the fp16 variant alone, as some are published."""
    DiffusionPipeline.from_pretrained(teacher_folder, dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.glob("unet/diffusion_pytorch_model.safetensors"))
    assert next(load_pipeline(str(tmp_path)).unet.parameters()).dtype == torch.float32


def test_noise_belongs_to_its_index():
    noise = noise_of(range(10), (4, 3, 3), seed=1)
    assert torch.equal(noise_of([7, 3], (4, 3, 3), seed=1), noise[[7, 3]])
    assert not torch.equal(noise_of([7], (4, 3, 3), seed=2), noise[[7]]) and len(noise.unique(dim=0)) == 10
