"""common.py against closed forms, diffusers and slow references. Errors are maxima of absolute values."""

import ast
import builtins
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)  # fmt: skip

import common
from common import (
    CLEAN,
    NoiseSchedule,
    PromptEncoder,
    SamplingPrior,
    TrajectoryBuffer,
    add_noise,
    combine_guidance,
    consistency_function,
    consistency_rollout,
    ddim_step,
    drop_prompts,
    eps_from_v,
    forward_states,
    guidance_embedding,
    load_pipeline,
    load_schedule,
    measure_support,
    mixed_rollout,
    moved_fraction,
    noise_of,
    reflect,
    rotation,
    student_rollout,
    teacher_rollout,
    timestep_grid,
    v_from_prediction,
    x_from_v,
)

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = NoiseSchedule.from_alphas_cumprod(DDPMScheduler(**SD_BETAS).alphas_cumprod)
SD64 = NoiseSchedule(SD.alpha.double(), (1 - SD.alpha.double() ** 2).sqrt())  # for identities
SHAPE = (4, 3, 3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def pairs_of_times() -> tuple[torch.Tensor, torch.Tensor]:
    """t > s from all over the schedule, some of the s the clean end."""
    t = torch.tensor([999, 999, 999, 749, 500, 250, 31, 1, 0])
    s = torch.tensor([998, 500, CLEAN, 500, 31, CLEAN, 5, 0, CLEAN])
    return t, s


# --- noise schedule ---


GRID_32 = [
    999, 968, 937, 905, 874, 843, 812, 780, 749, 718, 687, 656, 624, 593, 562, 531,
    500, 468, 437, 406, 375, 343, 312, 281, 250, 219, 187, 156, 125, 94, 62, 31,
]  # fmt: skip


def test_grid_is_the_paper_s():
    assert timestep_grid(32) == GRID_32
    assert timestep_grid(4) == [999, 749, 500, 250]
    assert timestep_grid(1) == [999]
    assert timestep_grid(4, "trailing") == [999, 749, 499, 249]  # DMD2's list


def test_grids_nest():
    for n in (1, 2, 4, 8, 16, 32):
        assert timestep_grid(2 * n)[::2] == timestep_grid(n)
    assert set(timestep_grid(4, "trailing")) < set(timestep_grid(20, "trailing"))  # DMD2's teacher goes 20 steps
    assert not set(timestep_grid(4, "trailing")) < set(timestep_grid(20))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 10, 16, 25, 32, 50, 64])
def test_grid_equals_dpm_solver_s(n):
    sampler = DPMSolverMultistepScheduler(**SD_BETAS, timestep_spacing="linspace", final_sigmas_type="zero")
    sampler.set_timesteps(n)
    assert timestep_grid(n) == sampler.timesteps.tolist()


def test_trailing_grid_equals_diffusers():
    lcm = LCMScheduler(**SD_BETAS, original_inference_steps=50)
    lcm.set_timesteps(50)
    assert timestep_grid(50, "trailing") == lcm.timesteps.tolist()
    for n in (3, 4, 5):  # what LCM samples at lies on that grid
        lcm.set_timesteps(n)
        assert set(lcm.timesteps.tolist()) < set(timestep_grid(50, "trailing"))
    for n in (1, 4, 20, 32):
        ddim = DDIMScheduler(**SD_BETAS, timestep_spacing="trailing")
        ddim.set_timesteps(n)
        assert timestep_grid(n, "trailing") == ddim.timesteps.tolist()


def test_grid_refuses_what_it_cannot_make():
    for n, spacing in [(0, "linspace"), (-4, "linspace"), (1000, "linspace"), (4, "leading")]:
        with pytest.raises(ValueError):
            timestep_grid(n, spacing)


@pytest.mark.parametrize("config", [
    SD_BETAS, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"},
    SD_BETAS | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"trained_betas": [0.01] * 1000},
])  # fmt: skip
def test_schedule_tables_equal_diffusers(config):
    scheduler = DDPMScheduler(**config)
    schedule = load_schedule(SimpleNamespace(scheduler=scheduler))  # of a pipeline, only the scheduler is read
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float32
    assert len(schedule.alpha) == len(schedule.sigma) == 1001
    assert max_error(schedule.alpha[:-1], scheduler.alphas_cumprod.sqrt()) < 1e-6
    assert max_error(schedule.alpha**2 + schedule.sigma**2, torch.ones(1001)) < 1e-6
    assert schedule.alpha[CLEAN] == 1 and schedule.sigma[CLEAN] == 0
    assert (schedule.sigma.diff()[:-1] >= 0).all()  # more noise with larger t


def test_add_noise_equals_diffusers():
    x, eps = randn(8, *SHAPE, dtype=torch.float32), randn(8, *SHAPE, seed=1, dtype=torch.float32)
    t = torch.tensor([0, 1, 31, 250, 500, 749, 998, 999])
    assert max_error(add_noise(SD, x, eps, t), DDPMScheduler(**SD_BETAS).add_noise(x, eps, t)) < 1e-6
    assert torch.equal(add_noise(SD, x, eps, torch.full((8,), CLEAN)), x)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_conversions_invert_each_other(prediction_type):
    x, eps, t = randn(9, *SHAPE), randn(9, *SHAPE, seed=1), torch.tensor([0, 1, 31, 250, 354, 500, 749, 998, 999])
    alpha_t, sigma_t = SD64.at(t)
    z_t, v = add_noise(SD64, x, eps, t), alpha_t * eps - sigma_t * x
    output = {"epsilon": eps, "v_prediction": v, "sample": x}[prediction_type]
    v_hat = v_from_prediction(SD64, z_t, output, t, prediction_type)
    assert max_error(v_hat, v) < 1e-12
    assert max_error(x_from_v(SD64, z_t, v_hat, t), x) < 1e-12
    assert max_error(eps_from_v(SD64, z_t, v_hat, t), eps) < 1e-12


def test_velocity_equals_diffusers():
    x, eps = randn(4, *SHAPE, dtype=torch.float32), randn(4, *SHAPE, seed=1, dtype=torch.float32)
    t = torch.tensor([0, 250, 749, 999])
    z_t = add_noise(SD, x, eps, t)
    v = DDPMScheduler(**SD_BETAS).get_velocity(x, eps, t)
    assert max_error(v_from_prediction(SD, z_t, x, t, "sample")[1:], v[1:]) < 1e-5  # at t = 0 x says little of v
    assert max_error(x_from_v(SD, z_t, v, t), x) < 1e-5


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="flow"):
        v_from_prediction(SD, randn(1, *SHAPE), randn(1, *SHAPE), torch.tensor([5]), "flow")


# --- DDIM step ---


def textbook_ddim(schedule, z_t, x_hat, t, s):
    """alpha_s x_hat + sigma_s eps_hat, eps_hat = (z_t - alpha_t x_hat) / sigma_t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    return alpha_s * x_hat + sigma_s * (z_t - alpha_t * x_hat) / sigma_t


def test_rotation_is_the_textbook_step():
    t, s = pairs_of_times()
    z_t, v = randn(len(t), *SHAPE), randn(len(t), *SHAPE, seed=1)
    x_hat = x_from_v(SD64, z_t, v, t)
    assert max_error(ddim_step(SD64, z_t, v, t, s), textbook_ddim(SD64, z_t, x_hat, t, s)) < 1e-11
    c, d = rotation(SD64, t, s)
    assert max_error(c**2 + d**2, torch.ones_like(c)) < 1e-12 and (d > 0).all()


def test_clean_end_is_x_hat_exactly():
    t = torch.tensor([999, 500, 250, 31, 0])
    z_t, v = randn(5, *SHAPE, dtype=torch.float32), randn(5, *SHAPE, seed=1, dtype=torch.float32)
    assert torch.equal(ddim_step(SD, z_t, v, t, torch.full((5,), CLEAN)), x_from_v(SD, z_t, v, t))


def test_true_v_leads_along_the_diffusion():
    """With the true v the step goes from alpha_t x + sigma_t eps to alpha_s x + sigma_s eps."""
    t, s = pairs_of_times()
    x, eps = randn(len(t), *SHAPE), randn(len(t), *SHAPE, seed=1)
    alpha_t, sigma_t = SD64.at(t)
    z_s = ddim_step(SD64, add_noise(SD64, x, eps, t), alpha_t * eps - sigma_t * x, t, s)
    assert max_error(z_s, add_noise(SD64, x, eps, s)) < 1e-12


def test_sign_as_the_paper_prints_it_is_wrong():
    """[D1] With eps_hat = sigma_t z_t - alpha_t v the step misses by 2 sigma_s alpha_t v: on 4 steps up to .6 v."""
    grid = torch.tensor([*timestep_grid(4), CLEAN])
    t, s = grid[:-1], grid[1:]
    x, eps = randn(4, *SHAPE), randn(4, *SHAPE, seed=1)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SD64.at(t), SD64.at(s)
    z_t, z_s, v = add_noise(SD64, x, eps, t), add_noise(SD64, x, eps, s), alpha_t * eps - sigma_t * x
    printed = alpha_s * (alpha_t * z_t - sigma_t * v) + sigma_s * (sigma_t * z_t - alpha_t * v)
    miss = (2 * sigma_s * alpha_t).flatten()
    assert max_error(miss, torch.tensor([0.133, 0.405, 0.600, 0.0])) < 0.001
    assert max_error(printed, z_s - miss.view(-1, 1, 1, 1) * v) < 1e-12
    assert max_error(printed, z_s) > 0.5 and max_error(ddim_step(SD64, z_t, v, t, s), z_s) < 1e-12


def nonlinear_model(z_t, t, cond):
    """Made of operations that IEEE defines to the last bit, so that a row's value never depends on its batch."""
    b = cond["b"].view(-1, 1, 1, 1) if "b" in cond else 0.0
    return z_t * (t.view(-1, 1, 1, 1) / 500 - 0.7) / (1 + z_t.abs()) + 0.3 * z_t + b


@pytest.mark.parametrize("n", [4, 8, 16])
def test_rollout_equals_first_order_dpm_solver(n):
    sampler = DPMSolverMultistepScheduler(
        **SD_BETAS, prediction_type="v_prediction", solver_order=1, timestep_spacing="linspace",
        final_sigmas_type="zero",
    )  # fmt: skip
    sampler.set_timesteps(n)
    noise = randn(8, *SHAPE, dtype=torch.float32)
    z = noise
    for t in sampler.timesteps:
        z = sampler.step(nonlinear_model(z, t.expand(8), {}), t, z).prev_sample
    ours = student_rollout(SD, nonlinear_model, noise, [*timestep_grid(n), CLEAN], {})[-1]
    assert max_error(ours, z) < 5e-6


# --- Gaussian data: everything in closed form ---


MEAN, STD = 0.5, 0.4  # x ~ N(m, q^2)


def gaussian_model(z_t, t, cond):
    """The exact v of data N(m, q^2): alpha E[eps | z] - sigma E[x | z]."""
    alpha_t, sigma_t = SD64.at(t)
    u, C_t = z_t - alpha_t * MEAN, (alpha_t * STD) ** 2 + sigma_t**2
    return alpha_t * sigma_t / C_t * u - sigma_t * (MEAN + alpha_t * STD**2 / C_t * u)


def gain(t: int, s: int) -> float:
    """One DDIM step with that v: z_s - alpha_s m = gain (z_t - alpha_t m)."""
    (a_t, s_t), (a_s, s_s) = ((SD64.alpha[i].item(), SD64.sigma[i].item()) for i in (t, s))
    return (a_s * a_t * STD**2 + s_s * s_t) / ((a_t * STD) ** 2 + s_t**2)


def centred(z: torch.Tensor, t: int) -> torch.Tensor:
    return z - SD64.alpha[t] * MEAN


def test_gaussian_step_gain():
    z = randn(8, *SHAPE)
    states = teacher_rollout(SD64, gaussian_model, z, [*timestep_grid(8), CLEAN], {})
    for i, (t, s) in enumerate(zip(timestep_grid(8), [*timestep_grid(8)[1:], CLEAN])):
        assert max_error(centred(states[i + 1], s), gain(t, s) * centred(states[i], t)) < 1e-12


def test_ddim_converges_to_the_flow_as_one_over_n():
    """The probability flow takes u_999 to sqrt(C_clean / C_999) u_999; DDIM's error halves as its steps double."""
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    C_999 = (SD64.alpha[999] * STD) ** 2 + SD64.sigma[999] ** 2
    exact = STD / C_999.sqrt() * centred(z, 999)
    errors = []
    for n in (32, 64, 128, 256):
        end = student_rollout(SD64, gaussian_model, z, [*timestep_grid(n), CLEAN], {})[-1]
        errors.append(max_error(centred(end, CLEAN), exact))
    assert errors[-1] < 0.01
    for coarse, fine in itertools.pairwise(errors):
        assert 0.4 < fine / coarse < 0.6


# --- reflect ---


def box(radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 4, 1, 1), -radius, dtype=torch.float64), torch.full((1, 4, 1, 1), radius, dtype=torch.float64)


def test_reflect_projects_onto_the_support():
    lo, hi = torch.tensor([-1.0, -2, -3, -4]).view(1, 4, 1, 1), torch.tensor([4.0, 3, 2, 1]).view(1, 4, 1, 1)
    x_hat = 5 * randn(8, *SHAPE, dtype=torch.float32)
    once = reflect(x_hat, (lo, hi))
    assert (once >= lo).all() and (once <= hi).all()
    assert torch.equal(reflect(once, (lo, hi)), once)
    inside = (x_hat >= lo) & (x_hat <= hi)
    assert torch.equal(once[inside], x_hat[inside]) and 0 < inside.float().mean() < 1
    assert torch.equal(reflect(x_hat, None), x_hat)


def test_reflected_step_derives_eps_from_the_projected_x():
    """[D15] alpha_s x + sigma_s (z_t - alpha_t x) / sigma_t with x = clamp(x_hat), not with the eps of x_hat."""
    t, s = pairs_of_times()
    z_t, v = 2 * randn(len(t), *SHAPE), 2 * randn(len(t), *SHAPE, seed=1)
    x = x_from_v(SD64, z_t, v, t).clamp(-0.5, 0.5)
    assert max_error(ddim_step(SD64, z_t, v, t, s, box(0.5)), textbook_ddim(SD64, z_t, x, t, s)) < 1e-11
    (alpha_s, sigma_s), eps_hat = SD64.at(s), eps_from_v(SD64, z_t, v, t)
    assert max_error(ddim_step(SD64, z_t, v, t, s, box(0.5)), alpha_s * x + sigma_s * eps_hat) > 0.1


def test_reflected_step_is_a_no_op_where_nothing_moves():
    t, s = pairs_of_times()
    z_t, v = randn(len(t), *SHAPE, dtype=torch.float32), randn(len(t), *SHAPE, seed=1, dtype=torch.float32)
    support = tuple(bound.float() for bound in box(1.0))
    plain, reflected = ddim_step(SD, z_t, v, t, s), ddim_step(SD, z_t, v, t, s, support)
    stays = x_from_v(SD, z_t, v, t).abs() <= 1
    assert torch.equal(plain[stays], reflected[stays]) and 0 < stays.float().mean() < 1
    assert not torch.equal(plain[~stays], reflected[~stays])
    assert torch.equal(plain, ddim_step(SD, z_t, v, t, s, tuple(100 * bound for bound in support)))


def test_moved_fraction():
    x_hat = torch.tensor([-3.0, -1, 0, 0.5, 1, 2, 3, 0.9]).view(2, 4, 1, 1).double()
    assert moved_fraction(x_hat, box(1.0)) == 3 / 8
    assert moved_fraction(x_hat, box(3.0)) == 0
    assert moved_fraction(x_hat, None) == 0


def test_measured_support_leaves_the_tails_out():
    """Channel c holds 1 .. 10,000 times (c + 1), shuffled: the outer 0.05 % on either side are four or five."""
    values = torch.stack([torch.randperm(10_000, generator=seeded(c)) + 1.0 for c in range(4)])  # [C, n h w]
    x = (values * torch.arange(1, 5).view(4, 1)).view(4, 100, 10, 10).transpose(0, 1)
    lo, hi = measure_support(x, tail=5e-4)
    assert lo.shape == hi.shape == (1, 4, 1, 1)
    assert torch.equal(lo.flatten(), 5.0 * torch.arange(1, 5))
    assert torch.equal(hi.flatten(), 9996.0 * torch.arange(1, 5))
    assert 0 < moved_fraction(x, (lo, hi)) <= 2 * 5e-4
    lo, hi = measure_support(x, tail=0)
    assert lo[0, 0] == 1 and hi[0, 0] == 10_000


# --- rollouts ---


class Counted:
    """A model that counts the samples it evaluates."""

    def __init__(self, model):
        self.model, self.samples = model, 0

    def __call__(self, z_t, t, cond):
        self.samples += len(z_t)
        return self.model(z_t, t, cond)


def student_model(z_t, t, cond):
    return nonlinear_model(z_t, t, cond) + 0.25


TEACHER_GRID = [*timestep_grid(8), CLEAN]
STUDENT_GRID = TEACHER_GRID[::2]


def mixed(rate, n=64, seed=0, query=None, support=None, teacher=nonlinear_model, student=student_model):
    """A rollout of n samples on N = 8 / 4 steps; (noise, cond, states, landings, moves)."""
    noise, cond = randn(n, *SHAPE, dtype=torch.float32), {"b": torch.linspace(-0.5, 0.5, n)}
    grids = TEACHER_GRID, STUDENT_GRID
    out = mixed_rollout(SD, teacher, student, noise, *grids, cond, rate, seeded(seed), support, query)
    return noise, cond, *out


def all_equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("support", [None, tuple(bound.float() for bound in box(0.7))])
def test_rate_0_is_the_teacher_s_trajectory(support):
    noise, cond, states, _, moves = mixed(0.0, support=support)
    assert all_equal(states, teacher_rollout(SD, nonlinear_model, noise, TEACHER_GRID, cond, support)[::2])
    assert not torch.cat(moves).any()


@pytest.mark.parametrize("support", [None, tuple(bound.float() for bound in box(0.7))])
def test_rate_1_is_the_student_s_trajectory(support):
    """The student moves as it does at inference: never reflected."""
    noise, cond, states, _, moves = mixed(1.0, support=support)
    assert all_equal(states, student_rollout(SD, student_model, noise, STUDENT_GRID, cond))
    assert torch.cat(moves).all()


def test_rollout_follows_its_seed():
    assert all_equal(mixed(0.5)[2], mixed(0.5)[2])
    assert not all_equal(mixed(0.5)[2], mixed(0.5, seed=1)[2])


def test_each_sample_chooses_at_each_transition():
    """Every row of a mixed rollout is what that row alone would do under its own choices."""
    noise, cond, states, _, moves = mixed(0.5)
    assert all(0 < move.float().mean() < 1 for move in moves)
    assert len({tuple(row.tolist()) for row in torch.stack(moves, dim=1)}) == 2 ** len(moves)
    for i in range(len(noise)):
        z, row = noise[i : i + 1], {"b": cond["b"][i : i + 1]}
        for j, move in enumerate(moves):
            by_student, by_teacher = STUDENT_GRID[j : j + 2], TEACHER_GRID[2 * j : 2 * j + 3]
            model, path = (student_model, by_student) if move[i] else (nonlinear_model, by_teacher)
            z = teacher_rollout(SD, model, z, path, row)[-1]
            assert torch.equal(z, states[j + 1][i : i + 1])


def test_share_of_student_moves_is_the_rate():
    for rate in (0.15, 0.8):
        moves = torch.cat(mixed(rate, n=5000)[4]).float()
        assert abs(moves.mean() - rate) < 5 * (rate * (1 - rate) / len(moves)) ** 0.5


@pytest.mark.parametrize("support", [None, tuple(bound.float() for bound in box(0.7))])
def test_landings_are_the_teacher_s_from_the_visited_states(support):
    query = [1, 2, 3]
    _noise, cond, states, landings, moves = mixed(0.5, query=query, support=support)
    assert sorted(landings) == query
    for j in query:
        path = TEACHER_GRID[2 * j : 2 * j + 3]
        assert torch.equal(landings[j], teacher_rollout(SD, nonlinear_model, states[j], path, cond, support)[-1])
    for j in (1, 2):  # where the teacher moved it moved there, and the student did not
        assert torch.equal(landings[j][~moves[j]], states[j + 1][~moves[j]])
        assert not torch.isclose(landings[j][moves[j]], states[j + 1][moves[j]]).all(dim=(1, 2, 3)).any()
    assert len(states) == 4 and len(moves) == 3  # nothing is spent after the last answer


def test_querying_does_not_change_the_trajectory():
    assert all_equal(mixed(0.5)[2][:4], mixed(0.5, query=[0, 3])[2])


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.8, 1.0])
def test_forward_counts(rate):
    """A transition costs 2 teacher or 1 student forwards, on average 2 - p. With M - 1 states labelled [D17]:
    2 for each label, 2 - p to leave the start, p for each later transition (the teacher's are the labels)."""
    n, M = 2000, len(STUDENT_GRID) - 1
    teacher, student = Counted(nonlinear_model), Counted(student_model)
    moves = torch.stack(mixed(rate, n=n, teacher=teacher, student=student)[4])  # [M, n]
    assert teacher.samples == 2 * (~moves).sum() and student.samples == moves.sum()

    teacher, student = Counted(nonlinear_model), Counted(student_model)
    moves = torch.stack(mixed(rate, n=n, teacher=teacher, student=student, query=range(1, M))[4])  # [M - 1, n]
    assert teacher.samples == 2 * (~moves[0]).sum() + 2 * n * (M - 1)
    assert student.samples == moves.sum()
    expected = 2 * (M - 1) + (2 - rate) + rate * (M - 2)
    assert abs((teacher.samples + student.samples) / n - expected) < 0.1


def test_each_move_may_have_a_rate_of_its_own():
    """0 and 1 leave no choice; one rate for all is the same rate everywhere, and takes the same draws."""
    wanted = torch.rand(64, 4, generator=seeded(3)) < 0.5
    _, _, _, _, moves = mixed(wanted.float(), seed=1)
    assert torch.equal(torch.stack(moves, dim=1), wanted)
    (*_, states, _, moves), (*_, same_states, _, same_moves) = mixed(0.3), mixed(torch.full((64, 4), 0.3))
    assert all_equal(states, same_states) and all_equal(moves, same_moves)


def test_no_graph_through_rollouts():
    scale = torch.nn.Parameter(torch.tensor(0.5))
    model = lambda z_t, t, cond: scale * z_t
    noise = randn(8, *SHAPE, dtype=torch.float32).requires_grad_()
    states, landings, _ = mixed_rollout(
        SD, model, model, noise, TEACHER_GRID, STUDENT_GRID, {}, 0.5, seeded(), query=range(4)
    )
    made = states[1:] + [*landings.values()] + teacher_rollout(SD, model, noise, TEACHER_GRID, {})[1:]
    made += consistency_rollout(SD, model, noise, TEACHER_GRID, {}, seeded())[1:]
    assert not any(z.requires_grad for z in made)
    assert model(noise, None, {}).requires_grad  # or the line above shows nothing


def test_biased_student_drifts_as_predicted():
    """Student = exact Gaussian teacher + bias b in v: each of its moves adds -d b, every later move rescales that."""
    b, n = 0.3, 256
    student = lambda z_t, t, cond: gaussian_model(z_t, t, cond) + b
    noise = randn(n, *SHAPE)
    states, landings, moves = mixed_rollout(
        SD64, gaussian_model, student, noise, TEACHER_GRID, STUDENT_GRID, {}, 0.5, seeded(), query=range(4)
    )
    u = centred(noise, 999)
    for j, (t, s) in enumerate(itertools.pairwise(STUDENT_GRID)):
        m = TEACHER_GRID[2 * j + 1]
        assert max_error(centred(states[j], t), u) < 1e-12
        by_teacher = gain(t, m) * gain(m, s) * u  # from the visited state, drift and all
        assert max_error(centred(landings[j], s), by_teacher) < 1e-12
        if j < len(moves):
            d = rotation(SD64, torch.tensor([t]), torch.tensor([s]))[1]
            u = torch.where(moves[j].view(-1, 1, 1, 1), gain(t, s) * u - d * b, by_teacher)


# --- consistency functions and their sampling ---


def eps_of(z_t, t, cond=None):
    """nonlinear_model's v as eps, which LCMScheduler is given."""
    t = torch.as_tensor(t).expand(len(z_t))
    return eps_from_v(SD, z_t, nonlinear_model(z_t, t, {}), t)


def test_consistency_function_is_the_identity_at_the_clean_end():
    z = randn(8, *SHAPE)
    assert torch.equal(consistency_function(SD64, nonlinear_model, z, torch.zeros(8, dtype=torch.long), {}), z)
    t = torch.full((8,), 19)
    x_hat = x_from_v(SD64, z, nonlinear_model(z, t, {}), t)
    assert max_error(consistency_function(SD64, nonlinear_model, z, t, {}), x_hat) < 1e-4 < max_error(z, x_hat)


def test_consistency_function_reflects_the_estimate():
    z, t, support = randn(8, *SHAPE), torch.full((8,), 999), box(0.7)
    assert consistency_function(SD64, nonlinear_model, z, t, {}).abs().max() > 1
    assert consistency_function(SD64, nonlinear_model, z, t, {}, support).abs().max() < 0.7 + 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_consistency_rollout_equals_lcm_scheduler_s(n):
    """Every state and the end, on the same noise."""
    sampler = LCMScheduler(**SD_BETAS, original_inference_steps=50)
    sampler.set_timesteps(n)
    noise = randn(8, *SHAPE, dtype=torch.float32)
    theirs, generator = [noise], seeded(1)
    for t in sampler.timesteps:
        step = sampler.step(eps_of(theirs[-1], t), t, theirs[-1], generator=generator)
        theirs.append(step.prev_sample)
    timesteps = [*sampler.timesteps.tolist(), CLEAN]
    ours = consistency_rollout(SD, nonlinear_model, noise, timesteps, {}, seeded(1))
    assert len(ours) == len(theirs) == n + 1
    assert max(max_error(a, b) for a, b in zip(ours, theirs)) < 2e-5
    stopped = consistency_rollout(SD, nonlinear_model, noise, timesteps[:2], {}, seeded(1))  # on its way
    assert all(torch.equal(a, b) for a, b in zip(stopped, ours))


def test_consistency_rollout_of_exact_estimates_keeps_the_marginals():
    """Gaussian data and f = the flow's end: every state is distributed as forward diffusion of data."""

    def flow_model(z_t, t, cond):
        alpha_t, sigma_t = SD64.at(t)
        x = MEAN + STD * (z_t - alpha_t * MEAN) / ((alpha_t * STD) ** 2 + sigma_t**2).sqrt()
        return (alpha_t * z_t - x) / sigma_t

    t = torch.full((50_000,), 999)
    z, _ = forward_states(SD64, MEAN + STD * randn(50_000, 1, 1, 1), t, seeded(1))
    timesteps = [999, 759, 499, 259]
    for s, state in zip(timesteps, consistency_rollout(SD64, flow_model, z, timesteps, {}, seeded(2))):
        std = ((SD64.alpha[s] * STD) ** 2 + SD64.sigma[s] ** 2).sqrt()
        assert abs(state.mean() - SD64.alpha[s] * MEAN) < 0.02 and abs(state.std() / std - 1) < 0.02


# --- sampling priors ---


def test_prior_draws_by_cumulative_thresholds():
    priors = {"forward": (0.5, 0.1), "teacher": (0.3, 0.2), "student": (0.2, 0.7)}
    prior, reference = SamplingPrior(seeded(3), **priors), seeded(3)
    for part, (first, second) in enumerate([(0.5, 0.8), (0.1, 0.3)]):
        for _ in range(200):
            p = torch.rand((), generator=reference, dtype=torch.float64).item()
            assert prior.draw(part) == ("forward" if p < first else "teacher" if p < second else "student")


def test_prior_frequencies_and_seed():
    prior, twin = (SamplingPrior(seeded(1), forward=(0.75, 0.5), dagger=(0.25, 0.5)) for _ in range(2))
    for part, p in enumerate((0.75, 0.5)):
        sources = [prior.draw(part) for _ in range(4000)]
        assert sources == [twin.draw(part) for _ in range(4000)]  # two ranks with one seed
        assert abs(sources.count("forward") / 4000 - p) < 0.03
        assert set(sources) == {"forward", "dagger"}
    firsts = {SamplingPrior(seeded(seed), forward=(0.5,), dagger=(0.5,)).draw(0) for seed in range(20)}
    assert firsts == {"forward", "dagger"}  # and other seeds draw otherwise


def test_certain_source_is_always_drawn():
    prior = SamplingPrior(seeded(), forward=(1.0, 0.0), dagger=(0.0, 1.0))
    assert {prior.draw(0) for _ in range(2000)} == {"forward"}
    assert {prior.draw(1) for _ in range(2000)} == {"dagger"}


@pytest.mark.parametrize("priors", [
    {"forward": (0.5,), "dagger": (0.4,)}, {"forward": (1.5,), "dagger": (-0.5,)}, {"forward": (0.5, 0.5), "dagger": (0.5,)},
    {"forward": (1.0, 0.5), "dagger": (0.0, 0.6)},
])  # fmt: skip
def test_prior_refuses_what_is_no_distribution(priors):
    with pytest.raises(ValueError):
        SamplingPrior(seeded(), **priors)


# --- D_DAgger ---


def rows(first: int, n: int) -> dict:
    values = torch.arange(first, first + n)
    return {"z_t": values.float().view(n, 1, 1, 1).expand(n, 2, 1, 1), "j": values}


def test_buffer_overwrites_the_oldest():
    buffer = TrajectoryBuffer(5)
    held = lambda: sorted(set(buffer.sample(400, seeded())["j"].tolist()))
    buffer.add(**rows(0, 3))
    assert len(buffer) == 3 and held() == [0, 1, 2]
    buffer.add(**rows(3, 4))
    assert len(buffer) == 5 and held() == [2, 3, 4, 5, 6]
    buffer.add(**rows(7, 12))  # more than it holds
    assert len(buffer) == 5 and held() == [14, 15, 16, 17, 18]
    buffer.add(**rows(19, 1))
    assert held() == [15, 16, 17, 18, 19]
    buffer.clear()
    assert len(buffer) == 0
    buffer.add(**rows(30, 2))
    assert held() == [30, 31]


def test_buffer_keeps_rows_together_and_samples_uniformly():
    buffer = TrajectoryBuffer(8)
    buffer.add(**rows(0, 11))
    batch = buffer.sample(8000, seeded())
    assert torch.equal(batch["z_t"][:, 0, 0, 0], batch["j"].float())
    counts = batch["j"].bincount()[3:]
    assert (counts - 1000).abs().max() < 150  # five standard deviations
    assert torch.equal(batch["j"], buffer.sample(8000, seeded())["j"])


def test_buffer_copies_what_it_is_given():
    buffer, given = TrajectoryBuffer(4), torch.ones(2)
    buffer.add(w=given)
    given.zero_()
    assert buffer.sample(1, seeded())["w"] == 1


def test_empty_buffer_says_so():
    with pytest.raises(IndexError, match="empty"):
        TrajectoryBuffer(4).sample(1, seeded())


@pytest.mark.parametrize("n", [3, 5, 13])
def test_buffer_goes_through_its_state(n):
    buffer, copy = TrajectoryBuffer(5), TrajectoryBuffer(5)
    buffer.add(**rows(0, n))
    copy.load_state_dict(buffer.state_dict())
    for both in (buffer, copy):
        both.add(**rows(100, 2))  # the position in the ring is part of the state
    assert torch.equal(buffer.sample(50, seeded())["j"], copy.sample(50, seeded())["j"])


# --- sections 1-4 are to be copied ---


PAPER_SECTIONS, _, PLUMBING = (ROOT / "common.py").read_text().partition("# 5. Networks")


def test_paper_sections_run_with_torch_alone():
    def import_only(name, *args, **kwargs):
        if name.split(".")[0] not in sys.stdlib_module_names | {"torch"}:
            raise ImportError(f"{name} is neither torch nor the standard library")
        return builtins.__import__(name, *args, **kwargs)

    copied = {"__name__": "copied", "__builtins__": vars(builtins) | {"__import__": import_only}}
    exec(PAPER_SECTIONS, copied)  # noqa: S102
    with pytest.raises(ImportError):
        exec("import diffusers", copied)  # noqa: S102  or the line above shows nothing
    schedule = copied["NoiseSchedule"].from_alphas_cumprod(DDPMScheduler(**SD_BETAS).alphas_cumprod)
    noise = randn(4, *SHAPE, dtype=torch.float32)
    states, *_ = copied["mixed_rollout"](
        schedule, nonlinear_model, student_model, noise, TEACHER_GRID, STUDENT_GRID, {}, 0.5, seeded(), None, [1, 2]
    )
    assert len(states) == 3


def test_paper_sections_call_nothing_of_the_plumbing():
    definitions = (ast.ClassDef, ast.FunctionDef)
    later = {node.name for node in ast.parse("# 5. Networks" + PLUMBING).body if isinstance(node, definitions)}
    used = {node.id for node in ast.walk(ast.parse(PAPER_SECTIONS)) if isinstance(node, ast.Name)}
    assert "UNetModel" in later and not later & used


# --- guidance ---


def test_guidance_convention():
    """[D10] w is diffusers' guidance_scale; Meng et al. write the same as (1 + w') c - w' u with w' = w - 1."""
    u, c, w = randn(4, *SHAPE), randn(4, *SHAPE, seed=1), torch.tensor([0.0, 1.0, 3.0, 14.0], dtype=torch.float64)
    guided = combine_guidance(u, c, w)
    assert max_error(guided[0], u[0]) == 0 and max_error(guided[1], c[1]) < 1e-15
    meng = (w - 1).view(-1, 1, 1, 1)
    assert max_error(guided, (1 + meng) * c - meng * u) < 1e-12


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_guidance_is_the_same_in_x_eps_and_v(prediction_type):
    t, w = torch.tensor([31, 250, 749, 999]), torch.tensor([1.5, 3.0, 8.0, 14.0], dtype=torch.float64)
    z_t, u, c = randn(4, *SHAPE), randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2)
    v_u, v_c, v = (v_from_prediction(SD64, z_t, out, t, prediction_type) for out in (u, c, combine_guidance(u, c, w)))
    assert max_error(combine_guidance(v_u, v_c, w), v) < 1e-10


def test_guidance_embedding_equals_the_pipeline_s():
    w = torch.tensor([1.0, 1.5, 3.0, 7.5, 8.0, 14.0])
    embed = StableDiffusionPipeline.get_guidance_scale_embedding  # uses nothing of a pipeline
    theirs = embed(None, w - 1, embedding_dim=256)
    assert max_error(guidance_embedding(w, 256), theirs) < 1e-3  # sines of up to 13,000 radians, in fp32
    assert max_error(guidance_embedding(w, 256), embed(None, w, embedding_dim=256)) > 0.5


def test_dropped_prompts_are_the_empty_one_s():
    n, null = 4000, {"prompt": torch.full((1, 2, 3), -1.0)}
    cond = {"prompt": randn(n, 2, 3).abs(), "w": torch.arange(n)}
    out = drop_prompts(cond, null, 0.25, seeded())
    dropped = (out["prompt"] == -1).all(dim=2).all(dim=1)
    assert abs(dropped.float().mean() - 0.25) < 0.02 and torch.equal(out["w"], cond["w"])
    assert torch.equal(out["prompt"][~dropped], cond["prompt"][~dropped])
    assert torch.equal(drop_prompts(cond, null, 0.0, seeded())["prompt"], cond["prompt"])


def test_with_guidance_evaluates_both_branches():
    null = {"b": torch.tensor([0.5])}
    model = Counted(nonlinear_model)
    z_t, t = randn(3, *SHAPE, dtype=torch.float32), torch.tensor([31, 500, 999])
    cond = {"b": torch.tensor([-0.2, 0.0, 0.3]), "w": torch.tensor([1.0, 3.0, 8.0])}
    v_c = nonlinear_model(z_t, t, cond)
    v_u = nonlinear_model(z_t, t, {"b": torch.full((3,), 0.5)})
    guided = common.with_guidance(model, null)(z_t, t, cond)
    assert max_error(guided, combine_guidance(v_u, v_c, cond["w"])) < 1e-6
    assert model.samples == 6


# --- prompts ---


CAPTIONS = ["a red seven on a yellow background", "", "a blue one, " * 9, "7"]


def test_prompts_equal_stable_diffusion_s(teacher_folder):
    pipe = load_pipeline(str(teacher_folder))
    prompts = PromptEncoder(pipe, "cpu")
    cond, null = prompts.encode(prompts.tokenize(CAPTIONS)), prompts.null()
    theirs, their_null = pipe.encode_prompt(CAPTIONS, "cpu", 1, True)
    assert max_error(cond["prompt"], theirs) < 1e-5
    assert max_error(null["prompt"], their_null[:1]) < 1e-5
    assert max_error(cond["prompt"][0], cond["prompt"][3]) > 0.1  # captions do make a difference


@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_equal_sdxl_s(xl_folder, zeros):
    pipe = load_pipeline(str(xl_folder))
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    prompts = PromptEncoder(pipe, "cpu")
    cond, null = prompts.encode(prompts.tokenize(CAPTIONS)), prompts.null()
    theirs = pipe.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=True)
    prompt, null_prompt, pooled, null_pooled = theirs
    assert max_error(cond["prompt"], prompt) < 1e-5 and max_error(cond["text_embeds"], pooled) < 1e-5
    assert max_error(null["prompt"], null_prompt[:1]) < 1e-5 and max_error(null["text_embeds"], null_pooled[:1]) < 1e-5
    assert (null["prompt"] == 0).all() == zeros
    size = (32, 32)
    theirs = pipe._get_add_time_ids(size, (0, 0), size, torch.float32, text_encoder_projection_dim=16)
    assert torch.equal(cond["time_ids"].float(), theirs.expand(4, -1)) and "time_ids" not in null


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
    pipe = DiffusionPipeline.from_pretrained(teacher_folder, dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.glob("unet/diffusion_pytorch_model.safetensors"))
    assert next(load_pipeline(str(tmp_path)).unet.parameters()).dtype == torch.float32


def test_noise_belongs_to_its_index():
    noise = noise_of(range(10), SHAPE, seed=1)
    assert torch.equal(noise_of([7, 3], SHAPE, seed=1), noise[[7, 3]])
    assert not torch.equal(noise_of([7], SHAPE, seed=2), noise[[7]])
    assert len(noise.flatten(1).unique(dim=0)) == 10
