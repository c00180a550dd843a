"""DDIL in two dimensions, and flow matching by README's code."""

import re

import pytest
import torch
from conftest import ROOT
from diffusers import FlowMatchEulerDiscreteScheduler
from toys import max_error, nonlinear_model, randn, seeded

from common import CLEAN, NoiseSchedule, forward_diffuse, teacher_rollout, timestep_grid


def test_the_gain_comes_with_guidance(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "assets")
    import toy

    toy.main(seeds=2, updates={16: 800, 8: 100, 4: 100}, file=tmp_path / "toy.png")
    rows = re.findall(r" 4 steps: (.*)", capsys.readouterr().out)  # PD's and PD + DDIL's errors at w = 1, 2, 4, 8
    gain = [1 - float(b) / float(a) for a, b in zip(*(re.findall(r"0\.\d+", row) for row in rows), strict=True)]
    assert abs(gain[0]) < 0.2 < gain[2] and gain[3] > 0.4, gain
    assert (tmp_path / "toy.png").stat().st_size > 10_000


@pytest.mark.parametrize(("shift", "n"), [(1.0, 5), (3.0, 32)])
def test_flow_matching_is_the_same_schedule(shift, n):
    source = re.search(r"(?s)```python\n(def flow_schedule.*?)```", (ROOT / "README.md").read_text("utf-8"))[1]
    exec(source, code := {"torch": torch, "NoiseSchedule": NoiseSchedule})  # noqa: S102
    network = lambda z_flow, s, cond: nonlinear_model(z_flow, 1000 * s, cond)  # u
    x, cond, grid = randn(6).float(), {"w": torch.linspace(1, 4, 6)}, timestep_grid(n, "trailing")
    schedule, scheduler = code["flow_schedule"](shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[(t + 1) / 1000 for t in grid])  # 1, ..., 1 / n before the shift
    states, z_flow = teacher_rollout(schedule, code["flow_model"](network, schedule), x, [*grid, CLEAN], cond), x
    for i, t in enumerate([*grid, CLEAN]):
        scale, s = sum(schedule.at(torch.full((6,), t))), scheduler.sigmas[i]  # alpha_t + sigma_t
        assert max_error(states[i] / scale, z_flow) < 1e-5
        z_t, eps = forward_diffuse(schedule, x, torch.full((6,), t), seeded())
        assert max_error(z_t / scale, (1 - s) * x + s * eps) < 1e-6
        if t != CLEAN:  # Euler's step
            z_flow = scheduler.step(network(z_flow, s.expand(6), cond), scheduler.timesteps[i], z_flow).prev_sample
