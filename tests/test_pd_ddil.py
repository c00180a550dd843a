"""pd_ddil.py: the steps of the algorithm against closed forms, and whole stages against a short independent loop."""

import copy
import re
import shutil
from itertools import pairwise

import pytest
import torch
from conftest import SMALL, W_RANGE, change_json, read_metrics, run_here, save_teacher, weights_of
from diffusers import DiffusionPipeline

# isort: off
from toys import BOX, MEAN, SCHEDULE, STD, clamped, gaussian_model, max_error, nonlinear_model, noting, open_run
from toys import paths, randn, seeded, stock_latents

import pd_ddil
from common import CLEAN, add_noise, ddim_step, rotation, teacher_rollout, timestep_grid
from common import PromptEncoder, UNetModel, load_pipeline, load_schedule, with_guidance, with_w_embedding
from common import LatentData, Run, open_rows, derive_seed
from pd_ddil import DAggerBuffer, Phase, collect, dagger_batch, forward_batch, guidance_step, open_phase
from pd_ddil import parse_args, pd_step, plan_phases, teacher_target, v_step
# isort: on

FLAGS = " ".join(SMALL)
TEACHER_GRID = torch.tensor([*timestep_grid(16), CLEAN])  # 16 steps of the toy teacher, 8 of its student
TEACHER, STUDENT = nonlinear_model, lambda z_t, t, cond: nonlinear_model(z_t, t, cond) + 0.2


def intervals(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(t, m, s), each [n / 2], of the intervals of the student of an n-step teacher; the last s is the clean end."""
    tau = torch.tensor([*timestep_grid(n), CLEAN])
    return tau[:-1:2], tau[1::2], tau[2::2]


def v_target_of(z_t, z_s, t, s) -> torch.Tensor:
    """Where pd_step has its minimum over the student's output: one Newton step, as the loss is quadratic in it."""
    v = torch.zeros_like(z_t, requires_grad=True)
    loss = pd_step(SCHEDULE, lambda *_: v, z_t, z_s, t, s, {}).sum()
    (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
    return -gradient.detach() / torch.autograd.grad(gradient.sum(), v)[0]


@pytest.mark.parametrize("support", [None, BOX])
@pytest.mark.parametrize("n", [32, 8, 2])
def test_target_and_loss_are_the_paper_s(n, support):
    """Alg. 3 lines 6 to 10 as printed, in x and eps, with divisions by sigma_t; each sample has an interval of its own. The
    teacher's steps are reflected [D15], the student's is not; at the clean end both land on an estimate of x [D6]."""
    t, m, s = intervals(n)
    z_t, v_s = 2 * randn(n // 2), randn(n // 2, seed=1)
    z_s = teacher_target(SCHEDULE, nonlinear_model, z_t, t, m, s, {}, support)
    landed = z_t
    for now, then in ((t, m), (m, s)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE.at(now), SCHEDULE.at(then)
        x = clamped(alpha_t * landed - sigma_t * nonlinear_model(landed, now, {}), support)
        landed = alpha_s * x + sigma_s * (landed - alpha_t * x) / sigma_t
    assert max_error(z_s, landed) < 1e-10 and max_error(z_s[-1], x[-1]) < 1e-15
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE.at(t), SCHEDULE.at(s)
    x_s, weight = alpha_t * z_t - sigma_t * v_s, (alpha_t / sigma_t).pow(2).clamp(min=1)
    x_target = (z_s - sigma_s / sigma_t * z_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
    ratio = pd_step(SCHEDULE, lambda *_: v_s, z_t, z_s, t, s, {}) / (weight * (x_s - x_target) ** 2).mean(dim=(1, 2, 3))
    assert max_error(ratio, torch.ones(())) < 1e-9
    v = v_target_of(z_t, z_s, t, s)
    assert max_error(alpha_s * (alpha_t * z_t - sigma_t * v) + sigma_s * (sigma_t * z_t + alpha_t * v), z_s) < 1e-10


def test_fixed_point_through_all_halvings():
    """Gaussian data: with the network that pd_step asks for, halved again and again, a step leads where 32 led at first."""
    tau, teacher = [*timestep_grid(32), CLEAN], gaussian_model
    z = dict(zip(tau, teacher_rollout(SCHEDULE, teacher, randn(1), tau, {})))
    for n in (32, 16, 8, 4, 2):
        t, m, s = intervals(n)
        z_t, z_s = (torch.cat([z[k] for k in times.tolist()]) for times in (t, s))
        assert max_error(teacher_target(SCHEDULE, teacher, z_t, t, m, s, {}, None), z_s) < 1e-10
        outputs = dict(zip(t.tolist(), v_target_of(z_t, z_s, t, s)))
        teacher = lambda z_t, t, cond, outputs=outputs: torch.stack([outputs[k] for k in t.tolist()])
        assert pd_step(SCHEDULE, teacher, z_t, z_s, t, s, {}).max() < 1e-20


@pytest.mark.parametrize("basis", [torch.ones_like, torch.sin, lambda z: z, lambda z: z**2])
def test_v_step_has_its_minimum_at_the_true_v(basis):
    """Its slope in any direction, here four, is zero there in expectation: over n samples within 5 deviations."""
    x = MEAN + STD * torch.randn(100_000, 1, 1, 1, generator=seeded(), dtype=torch.float64)
    beside = lambda h: lambda z_t, t, cond: gaussian_model(z_t, t, cond) + h * basis(z_t)
    losses = [v_step(SCHEDULE, beside(h), x, {"w": x.flatten()}, {}, seeded(1))[0] for h in (-0.1, 0.1, 0.3)]
    scores = [(b - a).mean() / (b - a).std() * len(x) ** 0.5 for a, b in pairwise(losses)]
    assert abs(scores[0]) < 5 and scores[1] > 20


@pytest.mark.parametrize("support", [None, BOX])
def test_guidance_step_is_the_paper_s(support):
    """Its target is the x estimate under guidance, reflected after the branches are combined (App. A)."""
    x, w, prompts, seen = randn(64), torch.linspace(1, 14, 64), randn(64, seed=1).flatten(2), []
    guided = with_guidance(nonlinear_model, {"prompt": prompts[:1]})
    student = lambda *inputs: seen.append(inputs) or 0 * inputs[0]
    losses, t = guidance_step(SCHEDULE, student, guided, x, {"prompt": prompts, "w": w}, support, seeded())
    (alpha_t, sigma_t), z_t = SCHEDULE.at(t), seen[0][0]
    c, u = (nonlinear_model(z_t, t, {"prompt": p, "w": w}) for p in (prompts, prompts[:1].expand_as(prompts)))
    x_hat = clamped(alpha_t * z_t - sigma_t * (u + w.view(-1, 1, 1, 1) * (c - u)), support)
    v = (alpha_t * z_t - x_hat) / sigma_t
    assert max_error(losses / (v**2).mean(dim=(1, 2, 3)), torch.ones(())) < 1e-6


def pd_here(folder, teacher, data, flags) -> None:
    run_here(*f"{paths(folder, teacher, data)} {FLAGS} {flags}".split())


@pytest.mark.parametrize("case", ["0 none --store_start", "1 none --store_start", "0.5 measured", "0.5 0.5"])
def test_stored_states(case, tmp_path, gc_folder, data_folder):
    """[D16] Those before each transition, the pure noise only if asked for, of trajectories with one w and prompt, the student's
    own, the teacher's or mixed; and where the teacher lands from them [D17]. A full buffer lets go of whole trajectories."""
    rate, flags = case.split(" ", 1)
    run = open_run(pd_ddil, f"{paths(tmp_path, gc_folder, data_folder)} {FLAGS} --reflect {flags}")
    rows, first = collect(run, TEACHER, STUDENT, TEACHER_GRID.tolist(), float(rate)), 1 - run.args.store_start
    assert rows["j"].tolist() == [*range(first, 8)] * 4
    cond, times = (
        run.prompts.encode(rows["ids"]) | {"w": rows["w"]},
        (TEACHER_GRID[2 * rows["j"] + i] for i in range(3)),
    )
    landed = teacher_target(run.schedule, TEACHER, rows["z_t"], *times, cond, run.support)
    assert max_error(rows["z_s"], landed) < 1e-5 and W_RANGE[0] <= rows["w"].min() < rows["w"].max() <= W_RANGE[1]
    w, ids, z_t = (rows[name].unflatten(0, (4, -1)) for name in ("w", "ids", "z_t"))
    assert (w == w[:, :1]).all() and (ids == ids[:, :1]).all()
    if rate in "01":
        model, steps = (STUDENT, 8) if rate == "1" else (TEACHER, 16)
        one_each = {name: value[::8] for name, value in cond.items()}
        states = teacher_rollout(run.schedule, model, z_t[:, 0], timestep_grid(steps), one_each)
        assert max_error(z_t, torch.stack(states[:: steps // 8], dim=1)) < 1e-5
    (dagger := DAggerBuffer(2 * (8 - first), "cpu")).add(**rows)
    assert dagger.rows["j"].bincount()[first:].tolist() == [2] * (8 - first)


@pytest.mark.parametrize(("reuse", "capacity"), [(0.5, 1000), (2.0, 1000), (3.0, 1000), (2.0, 21)])
def test_a_state_is_used_reuse_times(reuse, capacity, tmp_path, gc_folder, data_folder):
    """States collected, as far as they fit in, x R exceed those used by less than a rollout, when alone networks are
    asked; also after a resume."""
    run = open_run(pd_ddil, f"{paths(tmp_path, gc_folder, data_folder)} {FLAGS} --reuse {reuse}")
    dagger, calls, seen, timesteps = DAggerBuffer(capacity, "cpu"), [], (set(), set()), timestep_grid(8)
    models = [lambda *inputs, model=model: calls.append(model) or model(*inputs) for model in (TEACHER, STUDENT)]
    for _ in range(40):
        before, saved, dagger = (dagger.added, len(calls)), dagger.state_dict(), DAggerBuffer(capacity, "cpu")
        dagger.load_state_dict(saved)
        seen[0].update(dagger_batch(run, dagger, *models, TEACHER_GRID, 0.5)[2].tolist())
        assert (dagger.added == before[0]) == (len(calls) == before[1])
        seen[1].update(forward_batch(run, TEACHER, TEACHER_GRID, range(2, 8))[2].tolist())
    fits = min(4 * 7, capacity)  # of a rollout's states
    assert 0 <= dagger.added // (4 * 7) * fits * reuse - 40 * 4 < fits * reuse
    assert seen == ({*timesteps[1:]}, {*timesteps[2:]})


@pytest.mark.parametrize("start", ["", "--store_start"])
def test_control_differs_in_the_latents_alone(start, tmp_path, gc_folder, data_folder, monkeypatch):
    """[D16] --forward_control has forward diffusion at the timesteps of D_DAgger, in its share of the updates."""
    monkeypatch.setattr(pd_ddil, "collect", None)
    names = "forward_diffuse", "teacher_target", "pd_step"
    diffused, landed, trained = (noting(monkeypatch, pd_ddil, name) for name in names)
    flags = f"--teacher_steps 8 --updates 4=20 --p_forward 0 --forward_control --reflect 0.5 {start}"
    pd_here(tmp_path / "run", gc_folder, data_folder, flags)
    for (_, (z_t, _)), (landing, z_s), (inputs, _) in zip(diffused, landed, trained, strict=True):
        assert landing[2] is inputs[2] is z_t and inputs[3] is z_s and landing[-1][1] == 0.5
    assert {t for inputs, _ in trained for t in inputs[4].tolist()} == {*timestep_grid(4)[0 if start else 1 :]}


def test_guidance_conditioning_starts_from_its_teacher(teacher_folder, data_folder, tmp_path):
    """[D11] The input for w, of which old config files do not know, starts at zero. All of the student is trained alone."""
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"time_cond_proj_dim": null,', ""))
    run, t = open_run(pd_ddil, paths(tmp_path / "run", folder, data_folder)), torch.tensor([999, 500, 250, 0])
    _, teacher, unet = open_phase(run, Phase("gc", [1], [1.0], [0.0]), folder)
    student, (x, ids) = run.model(unet), [rows[:4] for rows in run.data.next()]
    v = student(x, t, run.prompts.encode(ids) | {"w": torch.tensor([1.0, 2.0, 8.0, 14.0])})
    assert max_error(v, teacher(x, t, run.prompts.encode(ids) | {"w": torch.ones(4)})) < 1e-5
    v.pow(2).mean().backward()
    others = [p for model in run.models if model is not student for p in model.unet.parameters()]
    assert all(p.grad.abs().max() > 0 for p in unet.parameters()) and not any(p.requires_grad for p in others)


def phases_of(flags="", predicts="epsilon", has_w=False) -> dict:
    return {name: phase for name, *phase in plan_phases(parse_args(flags.split()), predicts, has_w)}


def test_phases():
    """Sec. 5, App. A; the first halving has the first part's priors [D8], and one step has nothing to collect [D16]."""
    phases = phases_of("--teacher_steps 32")
    assert [*phases] == ["v", "gc", "16", "8", "4"] and phases["v"][1:] == phases["gc"][1:] == [[1.0], [0.0]]
    assert phases["16"][1:] == [[0.75], [0.15]] and phases["8"][1:] == phases["4"][1:] == [[0.75, 0.5], [0.15, 0.8]]
    paper = "--recipe sd15 --teacher a/b --data c/d --student_steps 2"
    args, updates = parse_args(paper.split()), [phase[0] for phase in phases_of(paper).values()]
    assert updates == [[4000], [6000], [5000], [6000, 4000], [8000, 6000], [8000, 6000]]
    assert (args.global_batch_size, args.warmup, *args.learning_rate, *args.guidance_range) == (224, 500, 1e-5, 2, 14)
    assert [*phases_of("--teacher_steps 64 --student_steps 16", "v_prediction", has_w=True)] == ["32", "16"]
    one_step = [phases_of(f"--student_steps 1 --p_forward .2 {flag}")["1"][1] for flag in ("", "--store_start")]
    assert one_step == [[1.0, 1.0], [0.2, 0.2]]
    phases = phases_of("--p_forward .3 .2 --student_rate 1 --updates 16=5,6 8=7 --max_updates 6")
    assert phases["16"] == [[5, 6], [0.3, 0.2], [1.0, 1.0]] and phases["8"] == [[6], [0.3], [1.0]]


@pytest.mark.parametrize("B", [4, 2])
def test_plain_pd_equals_a_short_independent_loop(B, teacher_folder, data_folder, tmp_path):
    """--p_forward 1 through all of the script, bit for bit, in whole batches and accumulated ones: eps -> v, guidance
    conditioning and Salimans & Ho's distillation, which knows no prior, buffer or threshold. It refuses to be another run."""
    flags = f"--p_forward 1 --reflect none --seed 3 --teacher_steps 4 --student_steps 2 --batch_size {B}"
    pd_here(tmp_path, teacher_folder, data_folder, f"{flags} --updates v=3 gc=4 2=4,3")
    pipe, rows = load_pipeline(str(teacher_folder)), open_rows(str(data_folder)).train
    schedule, prompts, noise = load_schedule(pipe), PromptEncoder(pipe, "cpu"), seeded(derive_seed(3, "rank", 0))
    data, unet, predicts = LatentData(rows, pipe, prompts, B, 3, 0, 1, noise, cache=True), pipe.unet, "epsilon"

    def loss_of(phase, x, cond):
        if phase == "2":
            t, m, s = torch.stack(intervals(4))[:, torch.randint(2, (B,), generator=noise)]
        else:
            t = torch.randint(1000, (B,), generator=noise)
        if phase == "v":
            is_dropped = torch.rand(B, 1, 1, generator=noise) < 0.1
            cond["prompt"] = torch.where(is_dropped, prompts.null()["prompt"], cond["prompt"])
        eps, (alpha_t, sigma_t) = torch.randn(x.shape, generator=noise), schedule.at(t)
        z_t, weight = add_noise(schedule, x, eps, t), 1.0
        v = alpha_t * eps - sigma_t * x if phase == "v" else teacher(z_t, t, cond)
        if phase == "2":
            z_m = ddim_step(schedule, z_t, v, t, m)
            z_s, (c, d) = ddim_step(schedule, z_m, teacher(z_m, m, cond), m, s), rotation(schedule, t, s)
            v, weight = (c * z_t - z_s) / d, torch.maximum(alpha_t**2, sigma_t**2)
        return (weight * (student(z_t, t, cond) - v) ** 2).mean(dim=(1, 2, 3)).mean()

    for phase, parts in {"v": [3], "gc": [4], "2": [4, 3]}.items():
        teacher = UNetModel(unet.requires_grad_(False), schedule, predicts, torch.no_grad)
        teacher = with_guidance(teacher, prompts.null()) if phase == "gc" else teacher
        unet, predicts = with_w_embedding(unet) if phase == "gc" else copy.deepcopy(unet), "v_prediction"
        student = UNetModel(unet.requires_grad_(True).train(), schedule, predicts, torch.enable_grad)
        for updates in parts:
            optimizer = torch.optim.AdamW(unet.parameters())
            for i in range(updates):
                for _ in range(4 // B):
                    x, ids = data.next()
                    w = W_RANGE[0] + (W_RANGE[1] - W_RANGE[0]) * torch.rand(B, generator=noise)
                    (loss_of(phase, x, prompts.encode(ids) | {"w": w}) / (4 // B)).backward()
                torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.param_groups[0]["lr"] = 1e-3 * min((i + 1) / 2, (updates - i) / (updates - 1))
                optimizer.step()
                optimizer.zero_grad()
        saved = weights_of(tmp_path / "stages" / phase)
        assert all(torch.equal(saved[name], weight) for name, weight in unet.state_dict().items()), phase
    with pytest.raises(SystemExit, match="updates: saved"):
        run_here("--resume", "--output_dir", tmp_path, "--updates", "2=9")


def test_errors_are_of_the_captions_at_hand(gc_folder, data_folder, tmp_path):
    """A run that finds other held-out captions when it is resumed ends with the errors of one that had them all along."""
    data, flags = shutil.copytree(data_folder, tmp_path / "data"), "--teacher_steps 4 --student_steps 2 --updates 2=2"
    captions, ends = data / "test" / "metadata.jsonl", []
    pd_here(tmp_path / "resumed", gc_folder, data, flags)
    captions.write_text(captions.read_text().replace("image", "another"))
    pd_here(tmp_path / "fresh", gc_folder, data, flags)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "00000002+")  # as if killed before the stage was finished
    ends.append(read_metrics(tmp_path / "resumed")[-1])
    run_here("--resume", "--output_dir", tmp_path / "resumed")
    ends += [read_metrics(tmp_path / name)[-1] for name in ("resumed", "fresh")]
    before, resumed, fresh = ([row[name] for name in row if "_error" in name] for row in ends)
    assert resumed == fresh != before


def test_stock_diffusers_samples_the_same(xl_folder, data_folder, tmp_path, monkeypatch):
    """In SDXL's shape, as each phase's last preview: w embedding, timesteps, clean end, size conditioning."""
    grids = {}
    monkeypatch.setattr(Run, "save_preview", lambda run, rows, suffix: grids.update({suffix: rows}))
    flags = "--teacher_steps 4 --student_steps 1 --store_start --p_forward 0 --max_updates 1"
    pd_here(tmp_path, xl_folder, data_folder, flags)
    for stage, steps in {"v": 4, "gc": 4, "2": 2, "1": 1}.items():
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "stages" / stage)
        stock, other = (stock_latents(pipe, steps, w) for w in (8.0, 7.0))
        assert max_error(grids[f"-{stage}"][f"student, {steps} steps"][:4], stock) < 1e-3 < max_error(stock, other)


ENDS = """
--teacher_steps 12 | --teacher_steps 12: must be --student_steps (4) times a power of two
--p_forward .5 .6 .7 | --p_forward [0.5, 0.6, 0.7]: give one value
--reuse 0 | argument --reuse: 0: must be > 0
--updates 8 | argument --updates: 8: must read PHASE=U
--forward_control --p_forward 1 | --forward_control: with --p_forward [1.0] there are no trajectories
--teacher @takes_w | predicts epsilon and has a w embedding
--teacher @zero_snr | predicts epsilon and has zero terminal SNR
--dry_run --p_forward 0 | at 999, where sampling starts
"""  # flags, with @NAME for a teacher, and what is said


@pytest.mark.parametrize("flags, said", [line.split(" | ") for line in ENDS.strip().splitlines()])
def test_what_ends_before_a_run_begins(flags, said, teacher_folder, tmp_path, data_folder, capsys):
    if "@" in flags:
        teacher = save_teacher(tmp_path / "teacher", time_cond_proj_dim=256 if "takes_w" in flags else None)
        change_json(teacher / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr="zero_snr" in flags)
        flags = re.sub("@.*", str(teacher), flags)
    with pytest.raises(SystemExit) as caught:
        pd_here(tmp_path / "run", teacher_folder, data_folder, f"--max_updates 1 {flags}")
    assert said in f"{caught.value}" + "".join(capsys.readouterr()) and not (tmp_path / "run").exists()
