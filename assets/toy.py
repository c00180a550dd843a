"""DDIL in two dimensions: a guided model's 32 steps are halved to 16, 8, 4 and 2, by plain PD and by PD + DDIL.

`python assets/toy.py` prints the errors and draws toy.png, in less than a minute on one core. The data are blobs on a
ring, so the guided model is exact. Points are shaped like latents, [B, 2, 1, 1]: common.py is as it is for images.
"""

import copy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CLEAN, NoiseSchedule, SamplingPrior, TrajectoryBuffer, ddim_step, forward_diffuse
from common import mixed_rollout, rotation, teacher_rollout, timestep_grid, v_from_prediction

P_FORWARD = {"PD": 1, "PD + DDIL": 0.5}  # DDIL: share of the updates on forward-diffused data
STUDENT_RATE = 0.5  # DDIL: share of a trajectory's moves that are the student's, the others are the teacher's
SCALES = [1, 2, 4, 8]  # w of classifier-free guidance
UPDATES = {16: 1200, 8: 400, 4: 400, 2: 400}  # of the student with so many steps
SEEDS, BATCH, RATE = 3, 128, 2e-2  # runs of each arm, samples of an update, learning rate
PROMPTS, BLOBS, STD = 4, 16, 0.15  # of the data: prompts, blobs of all of them, a blob's width

CENTRES = 1.2 * torch.view_as_real(torch.exp(2j * torch.pi * torch.arange(BLOBS) / BLOBS))  # [16, 2]
SCHEDULE = NoiseSchedule.from_alphas_cumprod((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0))
CONDS, RNG = PROMPTS * (1 + max(SCALES)), torch.manual_seed(0)  # room for each prompt with each w; all randomness


def draw_data(n):  # points x [n, 2, 1, 1] with their prompts, each a quarter of the ring, and any w
    blob, w = torch.randint(BLOBS, (n,)), torch.tensor(SCALES)[torch.randint(len(SCALES), (n,))]
    return (CENTRES[blob] + STD * torch.randn(n, 2)).view(n, 2, 1, 1), {"prompt": blob * PROMPTS // BLOBS, "w": w}


def guided(z_t, t, cond):
    """model(z_t, t, cond) -> v, exact, by classifier-free guidance u + w (c - u): the first student's teacher."""
    alpha_t, sigma_t = (value.view(-1, 1, 1) for value in SCHEDULE.at(t))
    offset = z_t.view(-1, 1, 2) - alpha_t * CENTRES  # [B, 16, 2]
    variance = (alpha_t * STD) ** 2 + sigma_t**2  # of z_t from one blob [B, 1, 1]
    x_hat = CENTRES + alpha_t * STD**2 / variance * offset  # E[x | z_t, blob] [B, 16, 2]
    log_p = -offset.pow(2).sum(dim=2, keepdim=True) / (2 * variance)  # of each blob [B, 16, 1]
    others = torch.arange(BLOBS) * PROMPTS // BLOBS != cond["prompt"].view(-1, 1)  # blobs of other prompts [B, 16]
    u = (log_p.softmax(dim=1) * x_hat).sum(dim=1)  # E[x | z_t] [B, 2]
    c = (log_p.masked_fill(others.unsqueeze(2), -torch.inf).softmax(dim=1) * x_hat).sum(dim=1)  # E[x | z_t, prompt]
    return v_from_prediction(SCHEDULE, z_t, (u + cond["w"].view(-1, 1) * (c - u)).view_as(z_t), t, "sample")


class Student(nn.Sequential):  # model(z_t, t, cond) -> v, learned
    def forward(self, z_t, t, cond):
        phi = torch.atan2(SCHEDULE.sigma[t], SCHEDULE.alpha[t]).view(-1, 1) * torch.tensor([1, 2, 4])  # t as an angle
        c = 4 * nn.functional.one_hot(PROMPTS * cond["w"] + cond["prompt"], CONDS)  # 4: to be heard [B, CONDS]
        return super().forward(torch.cat([z_t.flatten(1), phi.cos(), phi.sin(), c], dim=1)).view_as(z_t)


def distil(p_forward, seed, updates=UPDATES):
    """Alg. 3: {steps: student}. Each student teaches the next one, which starts from it."""
    torch.manual_seed(seed)
    layers = nn.Linear(8 + CONDS, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
    student, teacher, students = Student(*layers), guided, {}
    prior = SamplingPrior(RNG, forward=[p_forward], dagger=[1 - p_forward])  # DDIL: where z_t comes from
    for n in updates:  # a student's n steps for its teacher's 2 n
        grid, buffer = [*timestep_grid(2 * n), CLEAN], TrajectoryBuffer(64 * BATCH)  # DDIL: D_DAgger
        tau, optimizer = torch.tensor(grid), torch.optim.Adam(student.parameters(), fused=True)
        for update in range(updates[n]):
            (x, cond), z = draw_data(BATCH), torch.randn(BATCH, 2, 1, 1)
            if p_forward < 1 and update % (4 * n) == 0:  # DDIL: Alg. 2, moves by the student and by the teacher
                states, *_ = mixed_rollout(SCHEDULE, teacher, student, z, grid, grid[::2], cond, STUDENT_RATE, RNG)
                for j in range(1, n):
                    buffer.add(z_t=states[j], j=torch.full((BATCH,), j), **cond)
            if prior.draw(0) == "forward":
                j = torch.randint(n, (BATCH,))
                z_t, _ = forward_diffuse(SCHEDULE, x, tau[2 * j], RNG)
            else:  # DDIL: a state that a trajectory visited
                cond = buffer.sample(BATCH, RNG)
                z_t, j = cond["z_t"], cond["j"]
            t, m, s = tau[2 * j], tau[2 * j + 1], tau[2 * j + 2]  # [B] each
            with torch.no_grad():  # the teacher's two steps
                z_m = ddim_step(SCHEDULE, z_t, teacher(z_t, t, cond), t, m)
                z_s = ddim_step(SCHEDULE, z_m, teacher(z_m, m, cond), m, s)
            c, d = rotation(SCHEDULE, t, s)
            v_target = (c * z_t - z_s) / d  # the v with which one step leads to z_s
            loss = (torch.maximum(*SCHEDULE.at(t)) * (student(z_t, t, cond) - v_target)).pow(2).mean()  # Eq. 3
            optimizer.param_groups[0]["lr"] = RATE * (1 - update / updates[n])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        teacher = students[n] = copy.deepcopy(student)
    return students


def sample(model, n):
    """States of n steps [n + 1, 4, 1000, 2], for each w from the same noise; every fourth is the first prompt's."""
    z = torch.randn(1000, 2, 1, 1, generator=torch.Generator().manual_seed(0)).repeat(len(SCALES), 1, 1, 1)
    cond = {"prompt": torch.arange(len(z)) % PROMPTS, "w": torch.tensor(SCALES).repeat_interleave(1000)}
    return torch.stack(teacher_rollout(SCHEDULE, model, z, [*timestep_grid(n), CLEAN], cond)).view(n + 1, -1, 1000, 2)


def main(seeds=SEEDS, updates=UPDATES, file=Path(__file__).with_suffix(".png")):
    torch.set_num_threads(1)  # networks as small as this gain nothing by more
    _, (a, b, c) = plt.subplots(1, 3, figsize=(9.2, 4.2), layout="constrained")
    x, cond = draw_data(1000)
    z_t, _ = forward_diffuse(SCHEDULE, x[cond["prompt"] == 0], torch.tensor([250]), RNG)
    a.plot(*z_t.flatten(1).T, ".", color="C1", label="data + noise, t = 250")
    states = sample(guided, 32)  # [24]: at t = 250, [-1]: at the end
    a.plot(*states[24, 0, ::4].T, ".", color="silver", label="guided trajectories, w = 1")
    a.plot(*states[24, 2, ::4].T, ".", color="black", label="guided trajectories, w = 4")
    for arm, color in zip(P_FORWARD, ("C1", "C0")):
        students = [distil(P_FORWARD[arm], seed, updates) for seed in range(seeds)]
        for n in updates:
            ends = torch.stack([sample(student[n], n)[-1] for student in students])  # [seeds, 4, 1000, 2]
            errors = (ends - states[-1]).pow(2).sum(dim=3).mean(dim=2).sqrt()  # RMS distances [seeds, 4]
            print(f"{arm}, {n} steps:", *(f"{e:.3f} (w = {w})" for w, e in zip(SCALES, errors.mean(dim=0))), sep="  ")
            if n == 4:
                b.plot(*torch.stack([states[-1], ends[0]])[:, 3, :200:4].permute(2, 0, 1), color=color, linewidth=0.5)
                b.plot(*ends[0, 3, :200:4].T, ".", color=color, label=f"{arm}, 4 steps")
                c.errorbar(SCALES, errors.mean(dim=0), errors.std(dim=0), color=color, capsize=3, marker="o", label=arm)
    b.plot(*states[-1, 3, :200:4].T, ".", color="black", label="target: guided, 32 steps")
    a.set_title("Guidance (black) leaves the\nstates that PD trains on")
    b.set_title("w = 8: PD misses the target,\nPD + DDIL is close to it")
    c.set(title="The stronger the guidance,\nthe more DDIL gains", xlabel="guidance scale w", xticks=SCALES, ylim=0)
    c.legend(title=f"error of 4 steps, {seeds} seeds", loc="upper left")
    for axis in (a, b):
        axis.set(xticks=[], yticks=[])
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False)
    plt.savefig(file, dpi=180)


if __name__ == "__main__":
    main()
