"""What the three methods of DDIL share: noise schedule, reflected DDIM step, rollouts, sampling priors.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1. Sections 1-4 are the paper; they need
`torch` alone, hold no state but two small classes, and are meant to be copied. Section 5 is plumbing around diffusers.
[D n] are the readings of the paper that README lists, lines of algorithms are counted as it does.

Glossary. z_t = alpha_t x + sigma_t eps with alpha_t^2 + sigma_t^2 = 1; v = alpha_t eps - sigma_t x; x_hat, v_hat are
          estimates. Time runs from noise (t = 999, the paper's 1000) to data (0): t > m > s, its t, t - k, t - 2k.
          CLEAN is the end of every trajectory: alpha = 1, sigma = 0. w is diffusers' guidance_scale [D10].
"""

import argparse
import copy
import csv
import gc
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import textwrap
import time
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, partialmethod
from itertools import accumulate, islice, pairwise
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy

# ----------------------------------------------------------------------------------------------------------------------
# 1. Noise schedule
# ----------------------------------------------------------------------------------------------------------------------

CLEAN = -1  # the "timestep" of the clean end: schedule tables have one entry more, and index -1 is that last one


@dataclass(frozen=True)
class NoiseSchedule:
    """Variance-preserving schedule: fp32 tables alpha_t, sigma_t of shape [T + 1]; entry CLEAN = -1 is (1, 0)."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> "NoiseSchedule":
        """Tables for alpha_t^2 = alphas_cumprod[t], t = 0..T-1 (any betas)."""
        alpha2 = torch.cat([alphas_cumprod.double().cpu(), torch.ones(1, dtype=torch.float64)])
        return cls(alpha2.sqrt().float(), (1 - alpha2).sqrt().float())

    def to(self, device) -> "NoiseSchedule":
        return NoiseSchedule(self.alpha.to(device), self.sigma.to(device))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each [B, 1, 1, 1], for timesteps t [B]."""
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)


def timestep_grid(n: int, spacing: str = "linspace", T: int = 1000) -> list[int]:
    """The n timesteps of a sampler, from noise to data, without the clean end [D2]: 4 -> [999, 749, 500, 250].

    "linspace" is PD's (DPM++'s default; 32 > 16 > 8 > 4 > 2 > 1 are nested), "trailing" LCM's and DMD2's: 999, 979, ...
    """
    if not 1 <= n <= T - 1:
        raise ValueError(f"a grid of {n} steps: must lie in 1..{T - 1}")
    if spacing == "linspace":
        return torch.linspace(0, T - 1, n + 1, dtype=torch.float64).round().long().flip(0)[:-1].tolist()
    if spacing == "trailing":
        return (torch.arange(n, 0, -1, dtype=torch.float64) * T / n).round().long().sub(1).tolist()
    raise ValueError(f"spacing {spacing!r}: must be 'linspace' or 'trailing'")


def add_noise(schedule: NoiseSchedule, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = alpha_t x + sigma_t eps, forward diffusion (Alg. 1 line 3)."""
    alpha_t, sigma_t = schedule.at(t)
    return alpha_t * x + sigma_t * eps


def forward_diffuse(schedule: NoiseSchedule, x: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(z_t, eps): forward diffusion of data x [B, C, h, w] with fresh noise, Alg. 1 line 3."""
    eps = torch.randn(x.shape, generator=generator, device=x.device)
    return add_noise(schedule, x, eps, t), eps


def uniform_timesteps(schedule: NoiseSchedule, n: int, generator: torch.Generator) -> Tensor:
    """t ~ U{0, ..., T - 1}, [n]."""
    return torch.randint(len(schedule.alpha) - 1, (n,), generator=generator, device=generator.device)


def x_from_v(schedule: NoiseSchedule, z_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_hat = alpha_t z_t - sigma_t v."""
    alpha_t, sigma_t = schedule.at(t)
    return alpha_t * z_t - sigma_t * v


def eps_from_v(schedule: NoiseSchedule, z_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """eps_hat = sigma_t z_t + alpha_t v. The paper prints a minus, which is a sign error [D1]."""
    alpha_t, sigma_t = schedule.at(t)
    return sigma_t * z_t + alpha_t * v


def v_from_prediction(schedule: NoiseSchedule, z_t: Tensor, output: Tensor, t: Tensor, prediction_type: str) -> Tensor:
    """v_hat from a network output that predicts "epsilon", "v_prediction" or "sample" (= x), as diffusers has it."""
    alpha_t, sigma_t = schedule.at(t)
    if prediction_type == "v_prediction":
        return output
    if prediction_type == "epsilon":
        return (output - sigma_t * z_t) / alpha_t
    if prediction_type == "sample":
        return (alpha_t * z_t - output) / sigma_t
    raise ValueError(f"prediction type {prediction_type!r}: must be 'epsilon', 'v_prediction' or 'sample'")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Reflected DDIM step
# ----------------------------------------------------------------------------------------------------------------------

Support = tuple[Tensor, Tensor] | None  # (lo, hi), each [1, C, 1, 1]: the data's range in latent space; None: none


def measure_support(x: Tensor, tail: float = 5e-4) -> Support:
    """Per-channel range of latents x [n, C, h, w], without the outer `tail` on either side [D15]."""
    values = x.float().transpose(0, 1).flatten(1)  # [C, n h w]
    n = values.shape[1]
    lo = values.kthvalue(max(1, round(tail * n)), dim=1).values  # torch.quantile stops at 2^24 values, kthvalue doesn't
    hi = values.kthvalue(min(n, round((1 - tail) * n) + 1), dim=1).values
    return lo.view(1, -1, 1, 1), hi.view(1, -1, 1, 1)


def reflect(x_hat: Tensor, support: Support) -> Tensor:  # DDIL: thresholding (sec. 4.1, App. A)
    """Project x_hat [B, C, h, w] onto the data's support."""
    return x_hat if support is None else x_hat.clamp(*support)


def clipped_fraction(x_hat: Tensor, support: Support) -> Tensor:
    """Share of values that `reflect` moves, a scalar: 0 means that it does nothing, above 0.2 that it distorts."""
    return (reflect(x_hat, support) != x_hat).float().mean()


def rotation(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """With alpha = cos(phi), sigma = sin(phi): (cos, sin) of phi_t - phi_s, each [B, 1, 1, 1]; sin > 0 as t > s."""
    alpha_t, sigma_t = schedule.at(t)
    alpha_s, sigma_s = schedule.at(s)
    return alpha_t * alpha_s + sigma_t * sigma_s, sigma_t * alpha_s - alpha_t * sigma_s


def reflect_v(schedule: NoiseSchedule, z_t: Tensor, v: Tensor, t: Tensor, support: Support) -> Tensor:
    """v = (alpha_t z_t - x) / sigma_t of the reflected x: eps is re-derived from the projected estimate too [D15]."""
    if support is None:
        return v
    x_hat = x_from_v(schedule, z_t, v, t)
    return v + (x_hat - reflect(x_hat, support)) / schedule.at(t)[1]  # in this form v is exact where nothing moves


def ddim_step(schedule: NoiseSchedule, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor, support: Support = None) -> Tensor:
    """z_s = alpha_s x_hat + sigma_s eps_hat: one DDIM step t -> s, with x_hat reflected where a support is given.

    DDIM is the rotation z_s = c z_t - d v [D18]: no division by alpha or sigma, and z_CLEAN is exactly x_hat.
    """
    v = reflect_v(schedule, z_t, v, t, support)  # DDIL: reflected
    c, d = rotation(schedule, t, s)
    return c * z_t - d * v


# ----------------------------------------------------------------------------------------------------------------------
# 3. Rollouts
#
# model(z_t, t, cond) -> v_hat    z_t [B, C, h, w] fp32, t [B] int64, cond: a dict of tensors [B, ...] (prompt, w, ...)
# ----------------------------------------------------------------------------------------------------------------------

Model = Callable[[Tensor, Tensor, dict], Tensor]


def to_device(value: Tensor, device) -> Tensor:
    """value.to(device) without blocking the host on work that is queued on the GPU."""
    if value.device.type != "cpu" or torch.device(device).type in ("cpu", "mps"):
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def select(cond: dict, rows: Tensor) -> dict:
    """The rows (mask or indices) of every tensor in cond."""
    return {name: value[rows] for name, value in cond.items()}


@torch.no_grad()
def teacher_rollout(
    schedule: NoiseSchedule, teacher: Model, z: Tensor, timesteps: Sequence[int], cond: dict, support: Support = None
) -> list[Tensor]:
    """DDIM through `timesteps`, from z at the first one; returns the state at each (Alg. 1 line 4, Alg. 2 line 4)."""
    states = [z]
    for t, s in pairwise(timesteps):
        t, s = (torch.full((len(z),), i, device=z.device) for i in (t, s))  # [B]
        states.append(ddim_step(schedule, states[-1], teacher(states[-1], t, cond), t, s, support))
    return states


def student_rollout(
    schedule: NoiseSchedule, student: Model, z: Tensor, timesteps: Sequence[int], cond: dict
) -> list[Tensor]:
    """The same of a student (Alg. 2 line 3): DDIM as at inference, and so never reflected [D15]."""
    return teacher_rollout(schedule, student, z, timesteps, cond)


def padded_rows(mask: Tensor, multiple: int) -> Tensor:
    """Indices where the mask is true, padded with the first one to a multiple of `multiple`."""
    rows = mask.nonzero().flatten()
    return torch.cat([rows, rows[:1].expand(-len(rows) % multiple)])


@torch.no_grad()
def mixed_rollout(  # DDIL: Alg. 2, both models within one trajectory
    schedule: NoiseSchedule,
    teacher: Model,
    student: Model,
    z: Tensor,
    teacher_grid: Sequence[int],
    student_grid: Sequence[int],
    cond: dict,
    student_rate: float | Tensor,
    generator: torch.Generator,
    support: Support = None,
    query: Sequence[int] | None = None,
    multiple: int = 1,
) -> tuple[list[Tensor], dict[int, Tensor], list[Tensor]]:
    """Alg. 2: at each interval t -> s of the student's grid, each sample moves with the student (probability
    `student_rate`, the paper's beta; a tensor [B, intervals] gives each move its own, 0 or 1 leave no choice) or with
    the teacher through its own grid points. Both grids end with CLEAN.

    Returns (states, teacher_targets, moves): the state at every point of student_grid; for each interval in `query`
    what pd_ddil.teacher_target gives for its visited state, whoever acts; masks [B], true where the student acted.
    Given `query`, it stops after its last interval. Rows that move together are padded to a `multiple`, which leaves
    compiled networks few shapes.
    """
    states, teacher_targets, moves = [z], {}, []
    rates = torch.as_tensor(student_rate, device=generator.device).expand(len(z), len(student_grid) - 1)
    for j, (t, s) in enumerate(pairwise(student_grid)):  # Alg. 2 line 2
        path = teacher_grid[teacher_grid.index(t) : teacher_grid.index(s) + 1]  # t -> m -> s, Alg. 3 line 7
        stop = query is not None and j >= max(query, default=0)
        # Alg. 2 line 3: p ~ U[0,1], one for each sample and transition; with a generator on the CPU no wait
        student_moves = torch.rand(len(z), generator=generator, device=generator.device) < rates[:, j]
        asks_all = query is not None and j in query
        masks = asks_all | ~student_moves, student_moves
        asked, moved = (to_device(padded_rows(m, multiple), z.device) for m in masks)
        n_asked, n_moved = (int(m.sum()) for m in masks)  # a repeated row is not written again
        z_s = torch.empty_like(z)
        if len(asked):  # Alg. 2 line 4; also the target of a state that is stored, Alg. 3 line 8 [D17]
            landed = teacher_rollout(schedule, teacher, z[asked], path, select(cond, asked), support)[-1]
            z_s[asked[:n_asked]] = landed[:n_asked]
        if asks_all:
            teacher_targets[j] = z_s.clone()
        if stop:
            break
        if len(moved):  # Alg. 2 line 3
            landed = student_rollout(schedule, student, z[moved], (t, s), select(cond, moved))[-1]
            z_s[moved[:n_moved]] = landed[:n_moved]
        z = z_s  # Alg. 2 line 5
        states.append(z)
        moves.append(to_device(student_moves, z.device))
    return states, teacher_targets, moves


def consistency_function(
    schedule: NoiseSchedule, model: Model, z_t: Tensor, t: Tensor, cond: dict, support: Support = None
) -> Tensor:
    """f(z_t, t) = c_skip z_t + c_out x_hat, the trajectory's clean end as estimated (LCM; LCMScheduler's scalings)."""
    scaled_t = 10.0 * t.view(-1, 1, 1, 1)
    c_skip, c_out = 0.25 / (scaled_t**2 + 0.25), scaled_t / (scaled_t**2 + 0.25).sqrt()
    x_hat = reflect(x_from_v(schedule, z_t, model(z_t, t, cond), t), support)  # DDIL: reflected
    return c_skip * z_t + c_out * x_hat


@torch.no_grad()
def consistency_rollout(
    schedule: NoiseSchedule, student: Model, z: Tensor, timesteps: Sequence[int], cond: dict, generator: torch.Generator
) -> list[Tensor]:
    """Multistep consistency sampling, as LCMScheduler's (Alg. 1 line 5): estimate x, noise it to the next timestep.

    Returns the state at each of `timesteps` (from z at timesteps[0]); at CLEAN it is the estimate itself.
    """
    states = [z]
    for t, s in pairwise(timesteps):
        t_all = torch.full((len(z),), t, device=z.device)  # [B]
        x_hat = consistency_function(schedule, student, states[-1], t_all, cond)  # never reflected: as at inference
        if s != CLEAN:
            x_hat = forward_diffuse(schedule, x_hat, torch.full_like(t_all, s), generator)[0]
        states.append(x_hat)
    return states


# ----------------------------------------------------------------------------------------------------------------------
# 4. Sampling priors
# ----------------------------------------------------------------------------------------------------------------------


class SamplingPrior:  # DDIL: chooses among Alg. 1 lines 3-5, App. A
    """Eq. 2's mixture [D25]: a categorical distribution over where z_t comes from [D3], for each part (App. A).

    SamplingPrior(generator, forward=(.75, .5), dagger=(.25, .5)). All ranks seed this generator identically and
    use it for shared draws alone, so all take the same source [D14]. ValueError if a part does not sum to 1.
    """

    def __init__(self, generator: torch.Generator, **priors: Sequence[float]):
        self.generator, self.priors = generator, {source: tuple(values) for source, values in priors.items()}
        for part, row in enumerate(zip(*self.priors.values(), strict=True)):
            if min(row) < 0 or abs(sum(row) - 1) > 1e-6:
                raise ValueError(f"sampling priors {self.priors}: part {part} must be >= 0 and sum to 1, got {row}")

    def draw(self, part: int) -> str:
        """One source for a whole update, on all ranks; before Alg. 1 line 1, as T_s depends on it [D4]."""
        row = {source: values[part] for source, values in self.priors.items()}
        p = torch.rand((), generator=self.generator, dtype=torch.float64).item()  # Alg. 1 line 2
        for source, upper in zip(row, accumulate(row.values())):  # Alg. 1 lines 3-5, cumulative thresholds
            if p < upper and row[source] > 0:
                return source
        return max(row, key=row.get)  # p fell into the rounding gap below 1


class TrajectoryBuffer:  # DDIL: Alg. 2 line 6
    """D_DAgger: a ring buffer of named rows [n, ...]; the oldest are overwritten [D21], sampling is uniform."""

    def __init__(self, capacity: int):
        self.capacity, self.added, self.rows = capacity, 0, {}

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, **rows: Tensor) -> None:
        """Append n rows; all names must be given at every call."""
        n = len(next(iter(rows.values())))
        slots = torch.arange(self.added, self.added + n)[-self.capacity :] % self.capacity
        for name, value in rows.items():
            if name not in self.rows:
                self.rows[name] = value.new_empty(self.capacity, *value.shape[1:])
            self.rows[name][to_device(slots, value.device)] = value[-self.capacity :]
        self.added += n

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n rows, uniformly and with replacement. Raises IndexError on an empty buffer."""
        if len(self) == 0:
            raise IndexError("D_DAgger is empty: collect trajectories before sampling")
        i = torch.randint(len(self), (n,), generator=generator, device=generator.device)
        return {name: value[to_device(i, value.device)] for name, value in self.rows.items()}

    def clear(self) -> None:
        self.added, self.rows = 0, {}

    def state_dict(self) -> dict:
        return {"added": self.added, "rows": self.rows}

    def load_state_dict(self, state: dict, device=None) -> None:
        self.added, self.rows = state["added"], {name: value.to(device) for name, value in state["rows"].items()}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Networks: SD1.x / 2.x and SDXL-family pipelines, in and out
# ----------------------------------------------------------------------------------------------------------------------

# here, not on top: sections 1-4 are to be copied with torch alone
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps


def combine_guidance(v_uncond: Tensor, v_cond: Tensor, w: Tensor) -> Tensor:
    """Classifier-free guidance u + w (c - u), w [B] = diffusers' guidance_scale [D10]; the same for x, eps and v."""
    return v_uncond + w.view(-1, 1, 1, 1) * (v_cond - v_uncond)


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [B, dim] of guidance_scale w [B], fp32: what diffusers pipelines feed (of w - 1 [D10])."""
    frequencies = torch.exp(torch.arange(dim // 2, device=w.device) * -(math.log(10000.0) / (dim // 2 - 1)))
    angles = (w.float() - 1)[:, None] * 1000.0 * frequencies  # [B, dim / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


W_EMBEDDING_DIM = 256  # what diffusers' pipelines expect


def with_w_embedding(unet):
    """A copy with the guidance embedding; its projection starts at zero, so the output is the same at first [D11]."""
    config = dict(unet.config)
    config.pop("_use_default_values", None)  # it would undo the change
    student = type(unet).from_config(config | {"time_cond_proj_dim": W_EMBEDDING_DIM})
    missing, unexpected = student.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def drop_prompts(cond: dict, null: dict, rate: float, generator: torch.Generator) -> dict:
    """cond with the share `rate` of its prompts replaced by the empty one's; null: one row."""
    n = len(next(iter(cond.values())))
    dropped = torch.rand(n, generator=generator, device=generator.device) < rate
    return {k: torch.where(dropped.view(-1, *[1] * (c.ndim - 1)), null.get(k, c), c) for k, c in cond.items()}


class UNetModel:
    """A diffusers UNet as `model(z_t, t, cond) -> v_hat` (section 3), fp32 outside of autocast; counts its forwards.

    cond: "prompt" [B, L, D], "w" [B] where the UNet has a w embedding, "text_embeds" and "time_ids" for SDXL's family.
    """

    def __init__(self, unet, schedule: NoiseSchedule, prediction_type: str, autocast: Callable):
        self.unet, self.schedule, self.prediction_type = unet, schedule, prediction_type
        self.config, self.dtype = getattr(unet, "module", unet).config, next(unet.parameters()).dtype
        # none for a network all in half precision (a LoRA on one is not): it would cast norms back and forth
        self.autocast = autocast if any(p.dtype == torch.float32 for p in unet.parameters()) else nullcontext
        self.forwards = 0  # samples evaluated so far

    def run(self, z_t: Tensor, t: Tensor, cond: dict, **more) -> Tensor:
        """The network's own output in fp32; `more` is for networks that take more than a UNet does."""
        inputs = {"encoder_hidden_states": cond["prompt"].to(self.dtype)}
        if self.config.time_cond_proj_dim is not None:
            inputs["timestep_cond"] = guidance_embedding(cond["w"], self.config.time_cond_proj_dim).to(self.dtype)
        if "time_ids" in cond:
            inputs["added_cond_kwargs"] = {name: cond[name].to(self.dtype) for name in ("text_embeds", "time_ids")}
        with self.autocast():
            return self.unet(z_t.to(self.dtype), t, **inputs, **more, return_dict=False)[0].float()

    def __call__(self, z_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        self.forwards += len(z_t)
        return v_from_prediction(self.schedule, z_t, self.run(z_t, t, cond), t, self.prediction_type)


def with_guidance(model: Model, null: dict) -> Model:
    """The model under classifier-free guidance cond["w"]; null: cond of the empty prompt, one row."""

    def guided(z_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        nulls = {name: value.expand_as(cond[name]) for name, value in null.items()}
        both = {name: torch.cat([nulls.get(name, value), value]) for name, value in cond.items()}
        v_uncond, v_cond = model(torch.cat([z_t, z_t]), torch.cat([t, t]), both).chunk(2)
        return combine_guidance(v_uncond, v_cond, cond["w"])

    return guided


LORA_MODULES = [  # LCM-LoRA's: attention, feed-forward, residual layers; not conv_in, conv_out nor the time embedding
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
]


def lora_layers(unet) -> list:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def add_lora(unet, rank: int):
    """The frozen UNet with a LoRA in fp32, whose second factor starts at zero: the output is the same at first."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    try:
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_MODULES))
    except ValueError as error:
        raise SystemExit(f"--lora_rank {rank}: this UNet has no layer that a LoRA can be added to ({error})")
    for layer in lora_layers(unet):
        layer.cast_input_dtype_enabled = False  # that is autocast's work; an fp32 copy of each input would be kept
    cast_training_params(unet)  # made in the base's precision
    return unet


def without_lora(model: Model, unet) -> Model:
    """The frozen model inside of a UNet with a LoRA; never called between a forward of the LoRA and its backward,
    which computes checkpointed blocks again with whatever is switched on by then."""
    layers = lora_layers(unet)

    def switch(off: bool) -> None:
        for layer in layers:
            layer._disable_adapters = off  # the library's own switch walks all modules: some 60 ms for SDXL's

    @torch.no_grad()
    def frozen(z_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        switch(off=True)
        try:
            return model(z_t, t, cond)
        finally:
            switch(off=False)

    return frozen


def find_pipeline(name: str, flag: str) -> str:
    """The class of the pipeline in a folder or, if no such folder exists, on the hub; SystemExit if there is none."""
    import diffusers  # here, not on top: it takes seconds
    import transformers

    for library in (diffusers, transformers):  # their progress bars would break ours
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    path = Path(name)
    is_hub_name = not path.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not is_hub_name and not (path / "model_index.json").is_file():
        raise SystemExit(f"{flag} {name}: no pipeline folder (which holds model_index.json), nor a hub name owner/name")
    try:
        return diffusers.DiffusionPipeline.load_config(name, local_files_only=not is_hub_name)["_class_name"]
    except Exception as error:  # noqa: BLE001  the libraries raise many kinds, all with a usable message
        raise SystemExit(f"{flag} {name}: cannot be loaded ({error})")


def open_pipeline(name: str, flag: str):
    """A text-to-image pipeline from a folder, or from the hub if no such folder exists, ready for inference.

    Safetensors only; no remote code. Raises SystemExit with what to do where it cannot be loaded.
    """
    import diffusers

    kind, failures = find_pipeline(name, flag), []
    settings = {"use_safetensors": True, "local_files_only": Path(name).exists(), "dtype": torch.float32}
    if kind == "StableDiffusionPipeline":
        settings |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for variant in (None, "fp16"):  # some are published in half precision alone
        try:
            pipe = getattr(diffusers, kind).from_pretrained(name, variant=variant, **settings)
            break
        except Exception as error:  # noqa: BLE001  as above
            failures.append(error)
    else:
        unsafe = "; its .bin files are not loaded: let diffusers save it anew, as safetensors"
        raise SystemExit(f"{flag} {name}: cannot be loaded ({failures[0]}){unsafe * any(Path(name).rglob('*.bin'))}")
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(name: str, flag: str = "--teacher", resolution: Sequence[int] | None = None):
    """A Stable Diffusion 1.x / 2.x or SDXL-family pipeline that we can distil; else SystemExit with the reason.
    `resolution`: height and width of its images, or one number for both, if not the UNet's own."""
    pipe = open_pipeline(name, flag)
    kind, config, unet = type(pipe).__name__, pipe.scheduler.config, pipe.unet.config if hasattr(pipe, "unet") else None
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise SystemExit(f"{flag} {name}: {kind} is not supported; Stable Diffusion and SDXL pipelines are")
    is_vp = "beta_start" in config and config.get("num_train_timesteps") == 1000
    if not is_vp or config.get("prediction_type") not in ("epsilon", "v_prediction", "sample"):
        wanted = "the betas of 1000 steps, and predict epsilon, v_prediction or sample (EDM and flow matching do not)"
        scheduler = type(pipe.scheduler).__name__
        raise SystemExit(f"{flag} {name}: {scheduler} is not supported; its config must hold {wanted}")
    is_plain = unet.in_channels == unet.out_channels == pipe.vae.config.latent_channels
    if not is_plain or unet.class_embed_type or unet.encoder_hid_dim_type:
        raise SystemExit(f"{flag} {name}: its UNet is for inpainting or images, not for text alone: not supported")
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")[: 4 if "XL" in kind else 2]:
        if getattr(pipe, part, None) is None or getattr(getattr(pipe, part), "model_max_length", 0) > 10**6:
            raise SystemExit(f"{flag} {name}: lacks its {part}; {kind} needs one")
    for setting in ("latents_mean", "shift_factor"):
        if pipe.vae.config.get(setting):
            raise SystemExit(f"{flag} {name}: its VAE has a {setting}, not a scaling factor alone: not supported")
    if resolution:
        height, width = (n // pipe.vae_scale_factor for n in (resolution[0], resolution[-1]))
        pipe.unet.register_to_config(sample_size=height if height == width else [height, width])
    return pipe


def refuse_zero_snr(pipe, flag: str, name: str) -> None:
    """SystemExit if it predicts eps and alpha is 0 at 999, where eps cannot give x."""
    if pipe.scheduler.config.prediction_type == "epsilon" and load_schedule(pipe).alpha.min() == 0:
        raise SystemExit(f"{flag} {name}: predicts epsilon and has zero terminal SNR; that needs v-prediction")


def betas_of(pipe) -> dict:
    """The part of a scheduler's config that says what the noise is, and nothing of how it samples."""
    names = "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"
    return {name: value for name, value in pipe.scheduler.config.items() if name in names}


def load_schedule(pipe) -> NoiseSchedule:
    """The teacher's noise schedule; diffusers computes the betas."""
    from diffusers import DDPMScheduler

    return NoiseSchedule.from_alphas_cumprod(DDPMScheduler(**betas_of(pipe)).alphas_cumprod)


def dpm_solver(pipe, prediction_type: str, order: int):
    """DPM-Solver++ on our linspace grid [D2] in diffusers: of first order it is DDIM, of second the paper's sampler."""
    from diffusers import DPMSolverMultistepScheduler

    grid = {"timestep_spacing": "linspace", "final_sigmas_type": "zero", "steps_offset": 1}  # which linspace ignores
    kind = {"algorithm_type": "dpmsolver++", "solver_order": order, "prediction_type": prediction_type}
    return DPMSolverMultistepScheduler(**betas_of(pipe), **kind, **grid)


def lcm_scheduler(pipe, solver_steps: int):
    """LCM's and DMD2's sampler in diffusers: it picks any number of steps from a trailing grid of `solver_steps`."""
    from diffusers import LCMScheduler

    grid = {"original_inference_steps": solver_steps, "clip_sample": False, "steps_offset": 1}
    return LCMScheduler(**betas_of(pipe), prediction_type=pipe.scheduler.config.prediction_type, **grid)


def latent_shape(pipe) -> tuple[int, int, int]:
    """Channels, height and width of latents: what is trained and sampled."""
    size = pipe.unet.config.sample_size
    return (pipe.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))


def image_shape(pipe) -> tuple[int, int]:
    """Height and width of images in pixels."""
    _, height, width = latent_shape(pipe)
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def images_at_once(shape: Sequence[int]) -> int:
    """How many images of this height and width a VAE takes: its activations are GiB at 512 pixels."""
    return max(1, 2**20 // math.prod(shape))


class PromptEncoder:
    """Captions -> token ids [B, encoders, L] -> cond, fp32. Ids are small enough for D_DAgger (5.4). In half precision
    the encoders are copies: the pipeline's own are saved with a student."""

    def __init__(self, pipe, device, memo: int = 1024, dtype: torch.dtype = torch.float32):
        both = lambda part: [x for x in (getattr(pipe, part), getattr(pipe, f"{part}_2", None)) if x is not None]
        encoders, self.tokenizers, self.device = both("text_encoder"), both("tokenizer"), device
        self.encoders = [(e if dtype == torch.float32 else copy.deepcopy(e)).to(device, dtype) for e in encoders]
        self.xl = hasattr(pipe, "text_encoder_2")
        self.zero_null = pipe.config.get("force_zeros_for_empty_prompt", False)
        self.time_ids = [*image_shape(pipe), 0, 0, *image_shape(pipe)]  # SDXL: original size, crop corner, target size
        self.memo, self.memo_size = {}, memo  # embeddings of recent prompts: small data sets are encoded just once

    def tokenize(self, captions: Sequence[str], sizes: Tensor | None = None) -> Tensor:
        """Token ids [B, encoders, L] on the CPU. SDXL's have one row more, which begins with the size conditioning:
        `sizes` [B, 6] (original height, width; crop top, left; target height, width) or, as at inference, its own."""
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = [t(list(captions), max_length=t.model_max_length, **padded).input_ids for t in self.tokenizers]
        ids = torch.stack(ids, dim=1)
        if not self.xl:
            return ids
        return self.with_sizes(torch.cat([ids, torch.zeros_like(ids[:, :1])], dim=1), sizes)

    def with_sizes(self, ids: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The same captions under another size conditioning, by default that of inference; only SDXL's have any."""
        if self.xl:
            ids = ids.clone()
            ids[:, -1, :6] = torch.tensor(self.time_ids) if sizes is None else sizes
        return ids

    @torch.no_grad()
    def encode(self, ids: Tensor) -> dict[str, Tensor]:
        """cond of token ids: "prompt" [B, L, D], for SDXL's family also "text_embeds" and "time_ids"."""
        keys = [row.numpy().tobytes() for row in ids.cpu()]
        new = {key: row for row, key in enumerate(keys) if key not in self.memo}
        if len(self.memo) + len(new) > self.memo_size:
            self.memo, new = {}, {key: row for row, key in enumerate(keys)}
        if new:
            cond = self._run_encoders(ids[list(new.values())])
            self.memo |= {key: {name: value[i] for name, value in cond.items()} for i, key in enumerate(new)}
        return {name: torch.stack([self.memo[key][name] for key in keys]) for name in self.memo[keys[0]]}

    def _run_encoders(self, ids: Tensor) -> dict[str, Tensor]:
        ids = to_device(ids, self.device)
        outputs = [e(ids[:, i], output_hidden_states=True) for i, e in enumerate(self.encoders)]
        if not self.xl:
            return {"prompt": outputs[0][0].float()}
        prompt = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1).float()  # SDXL: the layer before the last
        return {"prompt": prompt, "text_embeds": outputs[-1][0].float(), "time_ids": ids[:, -1, :6]}

    def null(self) -> dict[str, Tensor]:
        """cond of the empty prompt, one row: the unconditional branch of guidance, as the pipeline makes it."""
        null = self.encode(self.tokenize([""]))
        null.pop("time_ids", None)  # those of the prompt stay
        if self.zero_null:  # SDXL
            null |= {name: torch.zeros_like(null[name]) for name in ("prompt", "text_embeds")}
        return null


# ----------------------------------------------------------------------------------------------------------------------
# 6. Data: rows (image, caption) from wherever they are; one stream of batches, exact under resume
# ----------------------------------------------------------------------------------------------------------------------

HELD_OUT = 256  # captions, where the data have no test split
IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
IMAGE_COLUMNS = ("image", "img", *IMAGE_KINDS, "bytes", "image_bytes", "file_name", "image_path", "path", "file")
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt", "captions")
TABLES = {"parquet": "parquet", "jsonl": "json", "csv": "csv"}  # kinds of file: the library's readers


def find_column(names: Iterable[str], usual: Sequence[str]) -> str | None:
    """The first usual name that is there, in any case."""
    there = {name.lower(): name for name in reversed([*names])}
    return next((there[name] for name in usual if name in there), None)


def version_of(files: Iterable, *code: Callable) -> str:
    """A cache's key for what code makes of files: another one where a file's size or time or the code has changed."""
    digest = hashlib.sha256(repr([IMAGE_KINDS, CAPTION_COLUMNS, *map(inspect.getsource, code)]).encode())
    for file in files:
        found = None
        with suppress(OSError, ValueError):  # missing, or no file's name
            found = os.stat(file)
        digest.update(repr((str(file), found and (found.st_size, found.st_mtime_ns))).encode())
    return digest.hexdigest()[:16]


def row_of(sample: dict, caption: str | None) -> dict:
    """A row from contents by kind, as in tars: the first image; the text, else a usual or named field of the json."""
    fields = {}
    with suppress(ValueError):
        fields = json.loads(sample.get("json", b"{}"))
    fields = fields if isinstance(fields, dict) else {"caption": fields}
    fields |= {kind: sample[kind].decode("utf-8-sig", "replace") for kind in ("txt", "caption") if kind in sample}
    text = fields.get(caption or find_column(fields, ("txt", *CAPTION_COLUMNS)))
    text = caption_of(text, 0) if isinstance(text, list) else text and str(text)
    return {"image": next((sample[k] for k in sample if k in IMAGE_KINDS), None), caption or "caption": text}


def tar_rows(tars: list[str], caption: str | None, version: str):
    """Rows of tars whose members are grouped by name (0001.jpg, 0001.txt, 0001.json), as img2dataset and webdataset
    write them; the caption from text, else from json. `version` only names the contents, for the library's cache."""
    for file in tars:
        key, sample, before = None, {}, []
        try:
            with tarfile.open(file) as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):  # read, and never written anywhere
                    folder, _, name = member.name.rpartition("/")
                    start, kind = (folder, name.partition(".")[0]), name.rpartition(".")[2].lower()
                    if sample and (start != key or kind in sample):
                        before.append(sample)
                        if start != key or len(sample) > 1 or len(before) == 64:
                            yield from (row_of(sample, caption) for sample in before)
                            before = []
                        sample = {}
                    key = start
                    if kind in (*IMAGE_KINDS, "txt", "caption", "json"):
                        if before and kind not in IMAGE_KINDS and name.count(".") == 1:
                            sample, before = before[0], []  # 1.json after 1.0.jpg, 1.1.jpg: the first is its image
                        sample[kind] = tar.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            print(f"warning: --data {file}: is cut short or no tar ({error})", file=sys.stderr, flush=True)
        yield from (row_of(sample, caption) for sample in [*before, sample] if sample)


def read_tars(files: list[Path], streaming: bool, caption: str | None):
    import datasets

    features = {"image": datasets.Value("large_binary"), caption or "caption": datasets.Value("string")}
    version = version_of(files, tar_rows, row_of, caption_of, find_column)
    settings = {"tars": [*map(str, files)], "caption": caption, "version": version}
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(tar_rows, features=datasets.Features(features), gen_kwargs=settings)


def read_images(files: list[Path], streaming: bool, caption: str | None, beside: list[Path]):
    """Image files, with captions from files of the same name beside them, as in tars, or from a json {file: caption} or
    {file: {"caption": caption}}; in it a file is named as seen from there, with or without its ending."""
    import datasets

    samples = {file.with_suffix(""): {} for file in files}
    for file in beside:
        sample, kind = samples.get(file.with_suffix("")), file.suffix[1:].lower()
        if sample is not None and (kind != "json" or caption or not sample):
            sample[kind] = file.read_bytes()
        elif sample is None and kind == "json":
            with suppress(ValueError, AttributeError):  # it holds something else
                for name, entry in json.loads(file.read_bytes()).items():
                    path = Path(os.path.normpath(file.parent / name.replace("\\", "/")))
                    samples.get(path, samples.get(path.with_suffix(""), {}))["json"] = json.dumps(entry).encode()
    all_of = lambda file: {file.suffix[1:].lower(): str(file)} | samples[file.with_suffix("")]
    rows = datasets.Dataset.from_list([row_of(all_of(file), caption) for file in files])
    return rows.to_iterable_dataset(num_shards=min(64, len(rows))) if streaming else rows


def read_tables(files: list[Path], streaming: bool, caption: str | None):
    """Tables with images, or with the paths of image files beside them."""
    import datasets

    groups = {}
    for file in files:
        groups.setdefault((file.parent, TABLES[file.suffix[1:].lower()]), []).append(str(file))
    parts = []
    for (folder, kind), group in groups.items():
        rows = datasets.load_dataset(kind, version_of(group), data_files=group, split="train", streaming=streaming)
        features = rows.features or rows._resolve_features().features
        path = find_column(features, IMAGE_COLUMNS)
        if path and getattr(features[path], "dtype", "").endswith("string"):
            full = lambda row, path=path, at=folder: {path: row[path] and str(at / row[path].replace("\\", "/"))}
            rows = rows.map(full, features=features)
        parts.append(rows)
    return datasets.concatenate_datasets(parts)


def read_prompts(files: list[Path], streaming: bool, caption: str | None):
    """Text files of prompts, one a line."""
    import datasets

    lines = [line for file in files for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    rows = datasets.Dataset.from_dict({"caption": [line for line in lines if line.strip()]})
    return rows.to_iterable_dataset(num_shards=1) if streaming else rows


def read_path(path: Path, what: str, streaming: bool, caption: str | None) -> tuple[dict, str]:
    """({"train": rows, "test": rows, if there are}, what was read and what was not) of a file or folder. A file is in
    the test split if its path below `path` contains test, validation, valid or val."""
    import datasets

    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        splits = {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
        for rows in splits.values():  # saved anew they may bear the same name
            rows._fingerprint = version_of(part["filename"] for part in rows.cache_files)
        if streaming:
            splits = {name: rows.to_iterable_dataset(min(64, len(rows))) for name, rows in splits.items()}
        return splits, "save_to_disk"
    names = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    files = {}
    for file in names:
        if not any(part.startswith(".") for part in file.relative_to(path).parts):
            kind = "tgz" if file.name.lower().endswith(".tar.gz") else file.suffix[1:].lower()
            files.setdefault(kind, []).append(file)
    of = lambda kinds: sorted(file for kind in kinds for file in files.get(kind, []))
    images = partial(read_images, beside=[*of(["txt", "caption"]), *of(["json"])])
    readers = ((read_tars, ["tar", "tgz"]), (read_tables, TABLES), (images, IMAGE_KINDS), (read_prompts, ["txt"]))
    reader, kinds = next(((reader, kinds) for reader, kinds in readers if of(kinds)), (None, []))
    counts = lambda kinds: ", ".join(f"{len(files[kind])} .{kind}" for kind in kinds if kind in files) or "nothing"
    if not reader:
        wanted = "tars, tables (parquet, jsonl, csv), images, or a text file of prompts"
        raise SystemExit(f"{what}: holds {counts(files)}; it must hold {wanted}")
    says_test = re.compile(r"(^|[/._-])(test|validation|valid|val)([/._-]|$)")
    is_test = lambda file: says_test.search(str(file.relative_to(path)).lower())
    splits = {"train": [f for f in of(kinds) if not is_test(f)], "test": [f for f in of(kinds) if is_test(f)]}
    if not splits["train"]:
        splits = {"train": of(kinds)}
    read = {name: reader(found, streaming, caption) for name, found in splits.items() if found}
    return read, f"{counts(kinds)}; beside it {counts(sorted(files.keys() - set(kinds)))}"


@dataclass
class Rows:
    """What --data names: a Hugging Face data set to train on, with the columns image (file, bytes or path) and caption
    (text or list of texts); held-out captions; and in words which files and columns were taken."""

    train: object
    held_out: list[str]
    taken: str


def open_rows(
    name: str, flag="--data", need_images=True, need_captions=True, streaming=False, image=None, caption=None
) -> Rows:
    """--data: a folder, a file or a hub name. Held-out captions are the test / validation split's, else those of a
    tenth of the rows (at most HELD_OUT), which are not trained on. `image`, `caption`: columns, if not the usual."""
    import datasets

    path = Path(name)
    if not path.exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise SystemExit(f"{flag} {name}: no such file or folder, nor a hub name owner/name")
    try:
        if path.exists():
            splits, taken = read_path(path.resolve(), f"{flag} {name}", streaming, caption)
        else:
            splits, taken = datasets.load_dataset(name, streaming=streaming), "hub"
        train = splits["train"] if "train" in splits else next(iter(splits.values()))
        features = train.features or train._resolve_features().features
    except Exception as error:  # noqa: BLE001  the library raises many kinds, all with a usable message
        raise SystemExit(f"{flag} {name}: cannot be read as a data set ({' '.join(str(error).split())})")
    of_images = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    found = {"image": image or next(iter(of_images), find_column(features, IMAGE_COLUMNS))}
    found["caption"] = caption or find_column(features, CAPTION_COLUMNS)
    named = {what: f"; --{what}_column names another" * (flag == "--data") for what in found}
    for what, needed in ("image", need_images), ("caption", need_captions):
        if found[what] and found[what] not in features:
            raise SystemExit(f"--{what}_column {found[what]}: {flag} {name} has the columns {list(features)}")
        if needed and not found[what]:
            raise SystemExit(f"{flag} {name}: has no {what}s ({taken}); its columns are {list(features)}{named[what]}")
    found = {what: column for what, column in found.items() if column}
    others = [column for column in features if column not in found.values()]
    taken += f"; columns {found}" + f", and not {others}" * bool(others)

    def columns(rows):
        rows = rows.select_columns([*found.values()])
        rows = rows.rename_columns({column: what for what, column in found.items() if column != what})
        encoded = "image" in found and found["image"] in of_images
        return rows.cast_column("image", datasets.Image(decode=False)) if encoded else rows

    if not need_captions:
        return Rows(columns(train), [], taken)
    aside = next((splits[s] for s in ("test", "validation", "valid", "val") if s in splits), None)
    captions = lambda rows: columns(rows).select_columns("caption")
    if aside is not None:
        held_out = [row["caption"] for row in (captions(aside).take(HELD_OUT) if streaming else captions(aside))]
    elif streaming:
        first = [row["caption"] for row in captions(train).take(10 * HELD_OUT)]
        held_out = first[: max(1, len(first) // 10)]
        train = train.skip(len(held_out))
        train._ex_iterable.split_when_sharding = False  # every rank skips n rows of its own files; n is not split
    else:
        n = len(train) - min(HELD_OUT, max(1, len(train) // 10))
        held_out = [row["caption"] for row in captions(train.select(range(n, len(train))))]
        train = train.select(range(n))
    held_out = [text for text in (caption_of(value, 0) for value in held_out) if text]
    if not held_out or not streaming and len(train) == 0:
        why = f"has no row with a caption to {'train on' if held_out else 'hold out'} ({taken})"
        raise SystemExit(f"{flag} {name}: {why}{named['caption']}")
    return Rows(columns(train), held_out, taken)


def caption_of(value, draw: int) -> str | None:
    """A row's caption; of a list of them (COCO has five) the one that is drawn; None if there is no text in it."""
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    return texts[draw % len(texts)] if texts else None


def open_image(value):
    """An RGB PIL image of a file's bytes, {"bytes", "path"} or path: upright, 16 bits scaled, transparency on white."""
    data, path = (value["bytes"], value["path"]) if isinstance(value, dict) else (value, value)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data) if isinstance(data, bytes) else path))
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}")  # of unknown range; Pillow would make it white or black
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(row: dict, shape: Sequence[int], draw: int = 0) -> tuple[str | None, dict]:
    """(reason a row is unusable, or None; sample): its caption and, given an image, the centre crop "pixels" [H, W, 3]
    uint8 and the image's own "height_width". Rows of cached latents pass through."""
    if "moments" in row:
        return None, row
    sample = {"caption": caption_of(row["caption"], draw), "image": row.get("image")}
    if sample["caption"] is None:
        return "no caption", sample
    if "image" in row:
        if not row["image"]:
            return "no image", sample
        try:
            image = open_image(row["image"])
            cut = ImageOps.fit(image, (shape[1], shape[0]), Image.LANCZOS)
        except Exception as error:  # noqa: BLE001  whatever a broken file raises is a reason to report, not to stop
            why = str(error) if str(error).startswith("mode") else type(error).__name__
            return f"unreadable image ({why})", sample
        sample |= {"pixels": np.asarray(cut), "height_width": (image.height, image.width)}
    return None, sample


def report_on_data(args, pipe, rows: Rows) -> str:
    """What --check_data prints: what was read, counts of usable samples and of reasons against the others, sizes. The
    first eight usable images and their captions are drawn to OUTPUT_DIR-data.png."""
    from tqdm import tqdm

    shape = image_shape(pipe)
    counts, examples, sides, sheet = Counter(usable=0), {}, [], Path(f"{Path(args.output_dir)}-data.png")
    tokenizer, n_cut = pipe.tokenizer, 0
    with ThreadPoolExecutor() as threads:
        for reason, sample in tqdm(prefetch_map(threads, partial(decode, shape=shape), rows.train), desc="checking"):
            counts[reason or "usable"] += 1
            n_cut += not reason and len(tokenizer(sample["caption"]).input_ids) > tokenizer.model_max_length
            if not reason and "pixels" in sample:
                sides.append(min(h / n for h, n in zip(sample["height_width"], shape)))
                if len(examples) < 8:
                    examples[f"{counts['usable']}. {sample['caption'][:70]}"] = [Image.fromarray(sample["pixels"])]
    lines = [("read", rows.taken), ("held-out captions", len(rows.held_out)), *counts.items()]
    lines.append(("captions cut", f"{n_cut}, to {tokenizer.model_max_length} tokens"))
    if examples:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        save_sheet(sheet, examples)
        small, middle = sum(side < 1 for side in sides), sorted(sides)[len(sides) // 2]
        sizes = f"{small} smaller than {shape[0]} x {shape[1]}, which are enlarged; median {middle:.2f} times that"
        lines += [("sizes", sizes), ("examples", sheet)]
    return "\n".join(f"{what:24} {value}" for what, value in lines)


def rows_of_columns(columns: dict[str, Sequence]) -> list[dict]:
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def prefetch_map(threads: ThreadPoolExecutor, function: Callable, items: Iterable, n: int = 64):
    """Yield function(item) in order, prefetching up to n."""
    waiting = deque()
    for item in items:
        waiting.append(threads.submit(function, item))
        if len(waiting) == n:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class ShuffledRows:
    """One rank's endless rows of an indexed data set: batch k of rank r takes places (k n_ranks + r) B .. + B of the
    concatenated, shuffled epochs; the position is a number."""

    def __init__(self, rows, batch_size: int, seed: int, rank: int, n_ranks: int):
        self.rows, self.batch_size, self.seed, self.rank, self.n_ranks = rows, batch_size, seed, rank, n_ranks
        self.position, self.k, self.epoch = 0, -1, -1

    def read(self) -> tuple[dict, int]:
        """(the next row, epoch); the rows of a batch are fetched together, which is faster."""
        k, b = divmod(self.position, self.batch_size)
        if k != self.k:
            start = (k * self.n_ranks + self.rank) * self.batch_size
            places = [divmod(place, len(self.rows)) for place in range(start, start + self.batch_size)]
            columns = self.rows[[self.index(*place) for place in places]]
            self.k, self.batch = k, [(row, epoch) for row, (epoch, _) in zip(rows_of_columns(columns), places)]
        self.position += 1
        return self.batch[b]

    def index(self, epoch: int, i: int) -> int:
        """The i-th row of an epoch."""
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.rows), generator=generator)
        return int(self.order[i])

    def seek(self, position) -> None:
        self.position = position


class StreamedRows:
    """The same for a streamed data set: split across ranks by file where there are enough, shuffled within blocks. The
    position is the library's own state, at the very next row."""

    BLOCK = 1000

    def __init__(self, rows, batch_size: int, seed: int, rank: int, n_ranks: int):
        from datasets.distributed import split_dataset_by_node

        # whole files, nearly evenly; of few files whole ones if they can be shared evenly, else every n-th row of all
        strategy = "shards" if rows.num_shards >= 10 * n_ranks else "auto"
        if strategy == "auto" and rows.num_shards % n_ranks and rank == 0:
            faster = f"{10 * n_ranks} files or a multiple of the processes are faster"
            why = f"{n_ranks} processes read all {rows.num_shards} files each; {faster}"
            print(f"warning: --streaming: {why}", file=sys.stderr, flush=True)
        self.rows, self.seed, self.who = split_dataset_by_node(rows, rank, n_ranks, strategy), seed, (rank, n_ranks)
        self.seek({"epoch": 0, "state": None})

    @property
    def position(self) -> dict:
        return {"epoch": self.epoch, "state": self.stream.state_dict()}

    def seek(self, position: dict) -> None:
        self.epoch = position["epoch"]
        settings = {"batched": True, "batch_size": self.BLOCK, "with_indices": True}
        self.stream = self.rows.map(self.shuffle, **settings, fn_kwargs={"seed": derive_seed(self.seed, self.epoch)})
        if position["state"]:
            self.stream.load_state_dict(position["state"])
        self.iterator = iter(self.stream)

    @staticmethod
    def shuffle(block: dict, indices: list[int], seed: int) -> dict:
        generator = torch.Generator().manual_seed(derive_seed(seed, indices[0]))
        order = torch.randperm(len(indices), generator=generator).tolist()
        return {name: [values[i] for i in order] for name, values in block.items()}

    def read(self) -> tuple[dict, int]:
        for _ in range(2):
            for row in self.iterator:
                return row, self.epoch
            self.seek({"epoch": self.epoch + 1, "state": None})
        raise SystemExit(f"--data: yields no sample for process {self.who[0]} of {self.who[1]}")


class LatentData:
    """Endless seeded stream of (x, ids): latents [B, C, h, w] fp32 and token ids, each usable sample of an epoch once,
    none on two ranks. Images are decoded ahead, beside the device. With cache=True, VAE moments and ids are computed
    once, and kept on disk for all runs with the same data, VAE and tokenizers."""

    MAX_UNUSABLE = 0.05  # share of unusable samples that stops a run

    def __init__(self, rows, pipe, prompts, batch_size, seed, rank, n_ranks, generator: torch.Generator, cache: bool):
        self.rows, self.prompts, self.batch_size, self.generator = rows, prompts, batch_size, generator
        self.vae, self.scaling = pipe.vae.to(prompts.device), pipe.vae.config.scaling_factor
        self.latents, self.shape, self.seed = latent_shape(pipe), image_shape(pipe), seed
        self.seen, self.unusable, self.first = 0, Counter(), {}  # the first one, by reason
        self.threads, self.prefetched = ThreadPoolExecutor(), deque()  # (position, row, which caption, its decoding)
        is_stream = not hasattr(rows, "select")
        if cache and not is_stream:
            self.rows = make_cache(self, rank, n_ranks)
            self.vae.to("cpu")  # is left for sample grids alone
        self.source = (StreamedRows if is_stream else ShuffledRows)(self.rows, batch_size, seed, rank, n_ranks)

    def position(self):
        """The place in the data, for a checkpoint."""
        return self.prefetched[0][0] if self.prefetched else self.source.position

    def restore(self, position) -> None:
        self.prefetched.clear()
        self.source.seek(position)

    def take(self, n: int, need_images: bool = True) -> list[dict]:
        """The next n usable samples; without their images for prompts."""
        samples = []
        while len(samples) < n:
            self.prefetch(1, start=need_images)
            _, row, draw, decoding = self.prefetched.popleft()
            if need_images:
                decoded = decoding.result()
            else:
                if decoding:
                    decoding.cancel()
                without = {name: value for name, value in row.items() if name != "image"}
                decoded = decode(without, self.shape, draw)
            samples += self.filter_usable([decoded])
        return samples

    def prefetch(self, n: int, start: bool = True) -> None:
        """Read until n rows wait, and start to decode them."""
        while len(self.prefetched) < n:
            position = self.source.position
            row, epoch = self.source.read()
            draw = derive_seed(self.seed, epoch, row["caption"]) if isinstance(row.get("caption"), list) else 0
            decoding = self.threads.submit(decode, row, self.shape, draw) if start else None
            self.prefetched.append((position, row, draw, decoding))

    def filter_usable(self, decoded: Iterable[tuple[str | None, dict]]) -> list[dict]:
        """The samples that can be trained on, of what `decode` gave. SystemExit where too many cannot."""
        samples = []
        for reason, sample in decoded:
            self.seen += 1
            if not reason:
                samples.append(sample)
                continue
            self.unusable[reason] += 1
            file = sample["image"] if isinstance(sample["image"], str) else None
            self.first.setdefault(reason, f", first {file}" if file else "")
            n, among = self.unusable.total(), f"among the first {self.seen} samples of a process"
            if n.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...
                print(f"warning: --data: skipped {self.reasons()} {among}", file=sys.stderr, flush=True)
            if n > max(16, self.MAX_UNUSABLE * self.seen):
                raise SystemExit(f"--data: {n} {among} cannot be used: {self.reasons()}; --check_data counts them all")
        return samples

    def decode_usable(self, columns: dict[str, Sequence]) -> list[dict]:
        """The usable samples among rows that were not drawn by the stream."""
        return self.filter_usable(self.threads.map(partial(decode, shape=self.shape), rows_of_columns(columns)))

    def reasons(self) -> str:
        return ", ".join(f"{n} x {why}{self.first[why]}" for why, n in self.unusable.items()) or "no sample at all"

    @torch.no_grad()
    def encode(self, samples: list[dict]) -> tuple[Tensor, Tensor]:
        """VAE mean and std [B, 2, C, h, w], token ids [B, encoders, L] of decoded samples."""
        if "moments" in samples[0]:
            columns = (np.stack([sample[name] for sample in samples]) for name in ("moments", "ids"))
            moments, ids = map(torch.from_numpy, columns)
            ids = ids.unflatten(1, (len(self.prompts.tokenizers) + self.prompts.xl, -1))
            return to_device(moments.unflatten(1, (2, *self.latents)), self.prompts.device), ids
        original, target = torch.tensor([sample["height_width"] for sample in samples]), torch.tensor(self.shape)
        scaled = (original * (target / original).amax(dim=1, keepdim=True)).round()  # [B, 2]
        corners = (scaled.long() - target) // 2  # of the crop, in the image as it is scaled
        sizes = torch.cat([original, corners, target.expand_as(original)], dim=1)
        pixels = torch.from_numpy(np.stack([sample["pixels"] for sample in samples]))  # [B, H, W, 3] uint8
        moments = []
        for part in pixels.permute(0, 3, 1, 2).split(min(16, images_at_once(self.shape))):
            posterior = self.vae.encode(to_device(part, self.prompts.device) / 127.5 - 1).latent_dist
            moments.append(torch.stack([posterior.mean, posterior.std], dim=1))
        return torch.cat(moments), self.prompts.tokenize([sample["caption"] for sample in samples], sizes)

    def sample_posterior(self, moments: Tensor, generator: torch.Generator) -> Tensor:
        mean, std = moments.unbind(dim=1)
        return (mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)) * self.scaling

    def next(self) -> tuple[Tensor, Tensor]:
        samples = self.take(self.batch_size)
        self.prefetch(2 * self.batch_size)
        moments, ids = self.encode(samples)
        return self.sample_posterior(moments, self.generator), ids

    def next_ids(self) -> Tensor:
        """The captions of the next batch without its images: the prompts of a rollout."""
        samples = self.take(self.batch_size, need_images=False)
        if "ids" in samples[0]:
            return self.prompts.with_sizes(self.encode(samples)[1])
        return self.prompts.tokenize([sample["caption"] for sample in samples])

    def calibration_latents(self, n: int, generator: torch.Generator) -> Tensor:
        """Latents of up to n random samples (of a stream: its first n), the same on all ranks."""
        if hasattr(self.rows, "select"):
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(0))[:n].tolist()
            rows = (self.rows[i] for i in order)
        else:
            rows = self.rows.take(n)
        decoded, latents = prefetch_map(self.threads, partial(decode, shape=self.shape), rows), []
        while batch := [*islice(decoded, self.batch_size)]:
            if samples := self.filter_usable(batch):
                latents.append(self.sample_posterior(self.encode(samples)[0], generator))
        if not latents:
            raise SystemExit(f"--data: none of the first {n} samples can be used: {self.reasons()}")
        return torch.cat(latents)


def make_cache(data: LatentData, rank: int, n_ranks: int):
    """Columns moments and ids of all usable samples, as a data set on disk; each rank makes its part."""
    import datasets

    def encode(rows: dict) -> dict:
        samples = data.decode_usable(rows)
        moments, ids = data.encode(samples) if samples else (torch.empty(0, 1), torch.empty(0, 1).long())
        return {"moments": moments.flatten(1).cpu().numpy(), "ids": ids.flatten(1).numpy()}

    table = data.rows.data.flatten()  # {"bytes", "path"} become columns of their own
    columns = [table.column(name) for name in ("image", "image.path") if name in table.column_names]
    chunks = (chunk for column in columns if "string" in str(column.type) for chunk in column.chunks)
    files = (path for chunk in chunks for path in chunk.to_pylist() if path)
    images = version_of(files, open_image, decode, LatentData.encode)
    words = [sorted(tokenizer.get_vocab().items()) for tokenizer in data.prompts.tokenizers]
    tokens = data.prompts.tokenize(["a red 7"]).tolist()
    key = f"{derive_seed(fingerprint(data.vae), data.rows._fingerprint, images, data.shape, words, tokens):08x}"
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ddil-latents" / key
    folder.mkdir(parents=True, exist_ok=True)
    types = {"moments": datasets.List(datasets.Value("float32")), "ids": datasets.List(datasets.Value("int64"))}
    # a fixed size, as rounding depends on it and runs of any batch use the cache
    settings = {"batched": True, "batch_size": 64, "remove_columns": data.rows.column_names}
    settings |= {"features": datasets.Features(types), "desc": "caching latents"}

    def part(rank: int):
        name = f"{rank}-of-{n_ranks}"
        files = {"cache_file_name": str(folder / f"{name}.arrow"), "new_fingerprint": f"{key}-{name}"}
        return data.rows.shard(n_ranks, rank, contiguous=True).map(encode, **settings, **files)

    part(rank)
    if n_ranks > 1:
        torch.distributed.barrier()
    cache = datasets.concatenate_datasets([part(rank) for rank in range(n_ranks)]).with_format("numpy")
    if len(cache) == 0:
        raise SystemExit(f"--data: none of {len(data.rows)} samples can be used: {data.reasons()}")
    return cache


def make_support(threshold: str, data: LatentData) -> Support:
    """--reflect as a support; measured: on 1,024 training latents, the same ones on all ranks [D15]."""
    if threshold == "none":
        return None
    if threshold != "measured":
        radius = torch.full((1, 1, 1, 1), float(threshold), device=data.generator.device)
        return -radius, radius
    return measure_support(data.calibration_latents(1024, torch.Generator(data.generator.device).manual_seed(0)))


# ----------------------------------------------------------------------------------------------------------------------
# 7. The run: one engine for the three scripts, which are written as if never interrupted: resume is in the loop
# ----------------------------------------------------------------------------------------------------------------------


def number(kind: type, wanted: str, is_ok: Callable) -> Callable:
    """An argparse type: parse the text as `kind`, or say that it must be `wanted`."""

    def parse(text: str):
        with suppress(ValueError):
            if is_ok(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")

    return parse


positive_int = number(int, "a whole number > 0", lambda n: n > 0)
natural_int = number(int, "a whole number >= 0", lambda n: n >= 0)
seed_int = number(int, "a whole number from 0 to 2^31 - 1", lambda n: 0 <= n < 2**31)
multiple_of_8 = number(int, "a multiple of 8", lambda n: n > 0 and n % 8 == 0)
positive = number(float, "> 0 and finite", lambda x: 0 < x < math.inf)
non_negative = number(float, ">= 0 and finite", lambda x: 0 <= x < math.inf)
share = number(float, "in [0, 1]", lambda x: 0 <= x <= 1)
threshold = number(
    str, "measured, none or a radius > 0", lambda x: x in ("measured", "none") or 0 < float(x) < math.inf
)


def parser_of(doc: str, usage: str) -> argparse.ArgumentParser:
    """A script's parser. From now on what a terminal, pipe or log has no letters for is printed as \\N codes, and bars,
    the libraries' too, show only what takes two seconds or more."""
    from tqdm import tqdm

    tqdm.__init__ = partialmethod(vars(tqdm)["__init__"], delay=2)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(usage=f"%(prog)s {usage}; --help lists them", description=doc, **form)


def flag_parser(doc: str, recipes: dict):
    """(parser, add_argument of its group "paper") with what the scripts share. No flag has a default: recipes have."""
    p = parser_of(doc, "[FLAGS]")
    p.add_argument("--recipe", choices=recipes, help="table of defaults (default tiny: all offline, CPU, minutes)")
    paper, run, choice = p.add_argument_group("paper"), p.add_argument_group("run"), argparse.BooleanOptionalAction
    add = paper.add_argument
    add("--teacher", help="pipeline to distil: folder or hub name")
    add("--data", help="images with captions: folder or file (tars, tables, images beside texts), or hub name")
    add("--reflect", type=threshold, help="threshold for x estimates: measured | none | a radius (App. A; [D15])")
    add("--global_batch_size", type=positive_int, help="samples an update, over all processes (sec. 5)")
    add("--warmup", type=natural_int, help="updates of warm-up (PD, sec. 5: 500 [D24])")
    add = run.add_argument
    add("--batch_size", type=positive_int, help="samples a process and forward; accumulation makes up the global batch")
    add("--output_dir", help="run folder (default runs/SCRIPT-RECIPE)")
    add("--seed", type=seed_int, help="of everything random")
    add("--resume", action="store_true", help="go on with the run in output_dir")
    add("--overwrite", action="store_true", help="delete the run in output_dir first")
    add("--dry_run", action="store_true", help="print the resolved recipe and batch arithmetic, then stop")
    add("--check_data", action="store_true", help="count usable samples, draw some to OUTPUT_DIR-data.png, then stop")
    add("--max_updates", type=positive_int, help="end each part of a phase after so many updates (for tests)")
    add("--gradient_checkpointing", action=choice, help="trade time for memory")
    add("--compile", action=choice, help="torch.compile for the UNets' blocks: slower start, faster updates")
    add("--cache_latents", action=choice, help="encode images once and keep latents on disk, for later runs too")
    add("--streaming", action=choice, help="read the data in order while training; nothing is copied or cached")
    add("--resolution", type=multiple_of_8, nargs="+", help="pixels, or height and width (default: the UNet's own)")
    add("--image_column", help="of the data (default: its first column of images)")
    add("--caption_column", help="of the data (default: caption, text, txt or prompt)")
    add("--log_every", type=positive_int, help="updates between lines and rows of metrics.csv")
    add("--save_every", type=positive_int, help="updates between checkpoints and sample grids")
    add("--report_to", help="a tracker that accelerate knows (tensorboard, wandb, ...); default none")
    return p, paper.add_argument


def add_lora_flag(add: Callable) -> None:
    rank = {"type": natural_int, "nargs": "?", "const": 64}
    add("--lora_rank", **rank, help="train a LoRA of this rank (64 if none is given) instead of the UNet; 0: no LoRA")


def add_prior_flags(add: Callable, plain: str) -> None:
    """Source shares of Alg. 1 (LCM, DMD2): one value, or one per equal part. `plain` names the baseline's setting."""
    add("--p_forward", type=share, nargs="+", help=f"share of forward diffusion, one value or a list; {plain}")
    add("--p_teacher", type=share, nargs="+", help="share of the teacher's trajectories")
    add("--p_student", type=share, nargs="+", help="share of the student's trajectories")


NOT_SETTINGS = ("resume", "overwrite", "dry_run", "check_data")  # flags that are no setting of a run
# May differ when a run is resumed; the networks' paths too, as their weights are compared.
MAY_CHANGE = ["teacher", "student_init", "fake_init", "output_dir", "compile", "log_every", "save_every", "report_to"]


def resolve(args, recipes: dict):
    """Fill every flag that was not given: from the saved run with --resume, otherwise from the recipe. What is given
    with --resume must agree with the saved run, except MAY_CHANGE. SystemExit if that cannot work."""
    given = {name: value for name, value in vars(args).items() if value is not None and name not in NOT_SETTINGS}
    defaults = recipes[args.recipe or "tiny"] | {"recipe": args.recipe or "tiny"}
    if args.resume and args.overwrite:
        raise SystemExit("--resume and --overwrite exclude each other: one goes on with a run, the other deletes it")
    if args.resume:
        folder = args.output_dir or defaults["output_dir"]
        if not (Path(folder) / "config.json").is_file():
            raise SystemExit(f"--resume: {folder} holds no run (no config.json); name it by --output_dir")
        defaults = read_config(Path(folder)) | {"output_dir": folder}
        refuse_changes({name: value for name, value in given.items() if name not in MAY_CHANGE}, defaults)
    if given.get("lora_rank") and not args.resume:
        defaults = defaults | {"learning_rate": defaults["lora_learning_rate"]}
    for name in set(vars(args)) - set(given) - set(NOT_SETTINGS):
        setattr(args, name, defaults.get(name))
    for name in ("teacher", "data"):
        if getattr(args, name) is None:
            raise SystemExit(f"--{name}: the recipe {args.recipe} has no default; give a folder or a hub name")
    if args.resolution and len(args.resolution) > 2:
        raise SystemExit(f"--resolution {args.resolution}: must be one number, or height and width")
    if "guidance_range" in args and args.guidance_range[0] > args.guidance_range[1]:
        raise SystemExit(f"--guidance_range {args.guidance_range}: must be LO HI with LO <= HI")
    return args


def read_config(run: Path) -> dict:
    """What a run was started with. SystemExit if that is damaged."""
    try:
        return json.loads((run / "config.json").read_bytes())
    except ValueError as error:
        raise SystemExit(f"{run / 'config.json'}: is damaged ({error}); --overwrite starts anew")


def refuse_changes(now: dict, saved: dict) -> None:
    """SystemExit naming every entry of `now` that differs from the saved run's."""
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
    differs = [f"{name}: saved {saved.get(name)}, now {v}" for name, v in now.items() if saved.get(name) != v]
    if differs:
        raise SystemExit("--resume: this is not the run that was saved; " + "; ".join(differs))


def resolve_priors(args) -> dict[str, list[float]]:
    """--p_forward, --p_teacher, --p_student in each part of the run: one value holds for all parts; sources whose flag
    is not given share equally what the others leave. SystemExit if a part does not sum to 1."""
    given = {source: getattr(args, f"p_{source}") for source in ("forward", "teacher", "student")}
    parts = max(len(values or ()) for values in given.values())
    if any(values and len(values) not in (1, parts) for values in given.values()):
        raise SystemExit(f"--p_forward, --p_teacher, --p_student {given}: give one value, or one for each part")
    priors = {source: [*values] * (parts // len(values)) for source, values in given.items() if values}
    rest, open_sources = [round(1 - sum(part), 9) for part in zip(*priors.values())], set(given) - set(priors)
    priors = {source: priors.get(source) or [r / len(open_sources) for r in rest] for source in given}
    for part in zip(*priors.values()):
        if min(part) < 0 or abs(sum(part) - 1) > 1e-6:
            raise SystemExit(f"--p_forward, --p_teacher, --p_student {part}: must be >= 0 and sum to 1 in each part")
    return priors


def part_of(update: int, updates: int, parts: int) -> int:
    """Which of the equal parts of the run an update belongs to; `update` counts from 0."""
    return update * parts // updates


def learning_rate(update: int, updates: int, warmup: int, peak: float, decay: bool = True) -> float:
    """Linear warm-up, then linear decay to 0 at the end or, without it, the peak; `update` counts from 0."""
    warmup = min(warmup, updates - 1)
    return peak * min((update + 1) / (warmup + 1), (updates - update) / (updates - warmup) if decay else 1.0)


def derive_seed(*names) -> int:
    """A seed for each thing that is random, from the run's and its name: 32 bits, all that torch reads on a CPU."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:4], "big")


def noise_generator(index: int, seed: int) -> torch.Generator:
    """The generator of all noise of one image: it depends on nothing but the image's own index."""
    return torch.Generator().manual_seed(derive_seed(seed, "noise", int(index)))


def noise_of(indices: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """Noise [len(indices), *shape] that belongs to each index alone: the same for any batch size or number of ranks."""
    return torch.stack([torch.randn(shape, generator=noise_generator(index, seed)) for index in indices])


def fingerprint(module) -> str:
    """sha256 over a network's weights: the same weights under another path are still the same teacher."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        values = value.cpu().flatten().view(torch.uint8)  # NumPy has no bfloat16
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


REGIONS = ("ResnetBlock2D", "BasicTransformerBlock")  # what a UNet repeats: units of FSDP2 and of --compile


def start_accelerator(**settings):
    """An Accelerator over all the processes that were launched; SystemExit if it does not see every one of them, or for
    an engine that these scripts cannot use."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    if torch.backends.mps.is_available():  # it lacks fp64 and some operations: an Apple GPU is used if asked for
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.accelerator.is_available() and os.environ.get("ACCELERATE_TORCH_DEVICE") != "cpu"
    if "ACCELERATE_USE_CPU" in os.environ and not has_gpu:
        # accelerate launch leaves each process one thread, whatever the machine has
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(torch.get_num_threads(), cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # or transformers would leave the text encoders empty on all ranks but the first; they are not sharded
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(REGIONS))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, of what is left in fp32
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of every gradient
        InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # ranks wait while the first one writes a checkpoint
    ]
    try:  # without a GPU, accelerate takes each process for a run of its own, unless told that CPUs are meant
        accelerator = Accelerator(cpu=launched > 1 and not has_gpu, kwargs_handlers=handlers, **settings)
    except ValueError as error:  # a precision that the device has not, an unknown tracker
        raise SystemExit(f"accelerate launch --mixed_precision, or --report_to: {error}")
    if (n := accelerator.num_processes) != launched:
        raise SystemExit(f"{launched} processes were launched, but accelerate runs {n}: check its config")
    engine = accelerator.distributed_type
    if engine not in ("NO", "MULTI_CPU", "MULTI_GPU") and not accelerator.is_fsdp2:
        raise SystemExit(f"{engine.value}: is not supported; launch with --multi_gpu, or --use_fsdp --fsdp_version 2")
    if accelerator.is_fsdp2:
        # reduce gradients at every mini-batch, or each rank would hold unsharded ones between two
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        if accelerator.mixed_precision != "no":  # and in fp32, as under DDP
            policy = MixedPrecisionPolicy(param_dtype=frozen_dtype(accelerator), reduce_dtype=torch.float32)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def frozen_dtype(accelerator) -> torch.dtype:
    """Networks that are not trained are in half precision under mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def across_ranks(accelerator, n: int, batch_size: int, function: Callable[[Tensor], Tensor], desc: str | None = None):
    """Yields function(rows) [B, ...] for rows 0 .. n - 1 in order, the same on every rank; the ranks share the work."""
    from tqdm import tqdm

    rank, n_ranks = accelerator.process_index, accelerator.num_processes
    chunks = torch.arange(n).split(batch_size * n_ranks)
    for chunk in tqdm(chunks, desc=desc, disable=rank != 0 or desc is None, leave=False, dynamic_ncols=True):
        padded = torch.arange(-(-len(chunk) // n_ranks) * n_ranks) % len(chunk)  # so that every rank gets as many
        gathered = accelerator.gather(function(chunk[padded[rank::n_ranks]]))  # rank by rank
        yield gathered.unflatten(0, (n_ranks, -1)).transpose(0, 1).flatten(0, 1)[: len(chunk)]


# --- files ---

OF_A_RUN = re.compile(  # what --overwrite deletes: all that a run makes, but config.json, which is its lock
    r"(pipeline|lora|stages/(v|gc|\d+))(\.tmp)?|checkpoints/(\d{8,}\+*|saving)|samples/\d{6,}(-\w+)?\.png"
    r"|metrics\.csv|paired_reference\.(safetensors|tmp)|common\.py|\w+_ddil(\.py)?"  # the last: a tracker's
)


def check_output_dir(args) -> None:
    """Refuse a folder that holds another run, unless --overwrite; and never delete what is no run."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"--output_dir {folder}: is a file; choose a folder")
    if args.resume or not folder.exists() or not any(folder.iterdir()):
        return
    for flag in ("teacher", "data", "student_init", "fake_init"):
        source = getattr(args, flag, None) and Path(getattr(args, flag)).resolve()
        if source and folder.resolve() in (source, *source.parents):
            raise SystemExit(f"--output_dir {folder}: holds this run's own --{flag} {source}; choose another folder")
    if not args.overwrite:
        raise SystemExit(f"--output_dir {folder}: is not empty; --resume goes on with its run, --overwrite deletes it")
    if not all((folder / name).is_file() for name in ("config.json", "common.py")):
        raise SystemExit(f"--overwrite: {folder} is no run folder (no config.json with common.py) and is left alone")


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, then rename: no kill leaves half a folder. What others put there stays."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    if folder.exists():
        new = lambda at: temporary / Path(at).relative_to(folder)
        written = lambda at, names: [name for name in names if (new(at) / name).is_file()]
        shutil.copytree(folder, temporary, ignore=written, dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def save_pipeline(folder: Path, pipe, unet, scheduler, card: str = "") -> None:
    """The teacher's pipeline with another UNet and scheduler, as stock diffusers loads it; with a model card."""
    settings = ("requires_safety_checker", "force_zeros_for_empty_prompt")  # of one family each, and no components
    extra = {name: pipe.config[name] for name in settings if name in pipe.config}
    student = type(pipe)(**{**pipe.components, "unet": unet, "scheduler": scheduler}, **extra)

    def write(folder: Path) -> None:
        student.save_pretrained(folder)
        # paths have surrogates where the locale is not UTF-8, which so become their bytes again
        (folder / "README.md").write_text(card, encoding="utf-8", errors="surrogateescape")

    replace_folder(Path(folder), write)


def model_card(args, script: str, steps: int, w: str, measured: dict) -> str:
    """README.md of a saved pipeline: what it is, how to sample it, whose licence it has, which settings made it."""
    own = Path(args.teacher) / "README.md"
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    licence = re.findall(r"^license: *(\S+)", text, re.MULTILINE)[:1]
    head = [f"license: {name}" for name in licence]
    if not Path(args.teacher).exists():
        head.append(f"base_model: {args.teacher}")  # its name on the hub
    head += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags: [ddil, distillation, few-step]"]
    head = "\n".join(head)
    settings = {name: v for name, v in sorted(vars(args).items()) if name not in NOT_SETTINGS and v is not None}
    table = "\n".join(f"| {name} | {value} |" for name, value in (settings | measured).items())
    return f"""---
{head}
---
`{args.teacher}`, distilled on `{args.data}` by `{script}` of [DDIL](https://arxiv.org/abs/2410.11971), diffusion
distillation with imitation learning. It samples in {steps} steps, `guidance_scale` {w}:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS FOLDER")
image = pipe("a prompt", num_inference_steps={steps}, guidance_scale={w.split()[0]}).images[0]
```

The teacher's licence{"".join(f", {name}," for name in licence)} holds for what is distilled
from it, and the data may have terms of their own.

| setting | |
|---|---|
{table}
"""


def save_state(state, file: Path) -> None:
    """A tensor file of our own; SystemExit where the disk is full. The checkpoint before stays as it is."""
    try:
        torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        free = shutil.disk_usage(file.parent).free / 2**20
        raise SystemExit(f"{file}: cannot be written, {free:.0f} MiB are free ({error}); make room, then --resume")


def load_state(file: Path):
    """A tensor file of our own: tensors and plain values only, never code; ranks share the memory."""
    return torch.load(file, weights_only=True, map_location="cpu", mmap=os.name != "nt")  # or Windows cannot delete it


def checkpoints_of(folder: Path) -> list[Path]:
    """The oldest first; what else lies there, copies of them too, is not the run's."""
    return sorted(path for path in folder.glob("*") if re.fullmatch(r"\d{8,}\+*", path.name) and path.is_dir())


def is_intact(checkpoint: Path) -> bool:
    """Whether no file of it is missing, cut short or changed, by the checksums that torch's files hold."""
    try:
        files = [checkpoint / name for name in json.loads((checkpoint / "progress.json").read_bytes())["files"]]
        return all(zipfile.ZipFile(file).testzip() is None for file in files)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False


class Metrics:
    """Means over samples since the last flush, summed over ranks, as rows of metrics.csv. Fixed columns."""

    def __init__(self, path: Path, labels: Sequence[str], columns: Sequence[str], device):
        self.path, self.labels, self.columns, self.rows = path, list(labels), list(columns), 0
        self.totals = torch.zeros(2, len(columns), device=device)  # sums, counts

    def add(self, columns: dict[str, Tensor]) -> None:
        for column, values in columns.items():
            values = values.to(self.totals).flatten()
            self.totals[:, self.columns.index(column)] += torch.stack([values.sum(), torch.ones_like(values).sum()])

    def flush(self, accelerator, **labels) -> dict[str, float]:
        """Append one row to the file; returns the means of the columns that have any."""
        sums, counts = accelerator.reduce(self.totals, "sum").tolist()
        self.totals.zero_()
        means = {c: s / n for c, s, n in zip(self.columns, sums, counts) if n}
        self.rows += 1
        if accelerator.is_main_process:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.labels + self.columns, extrasaction="ignore")
                if self.rows == 1:
                    writer.writeheader()
                writer.writerow(labels | {c: f"{v:.6g}" for c, v in means.items()})
        return means

    def truncate(self, rows: int) -> None:
        """Drop what was written after the first so many rows: a run resumes there."""
        self.rows = rows
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            os.truncate(self.path, sum(map(len, lines[: rows + 1 if rows else 0])))


def save_sheet(path: Path, rows: dict[str, list], captions: Sequence[str] = ()) -> None:
    """PNG with one labelled row of PIL images for each entry, captions above the columns; small images are enlarged."""
    (width, height), n = next(iter(rows.values()))[0].size, max(map(len, rows.values()))
    zoom = max(1, 96 // height)
    width, height = width * zoom, height * zoom
    size = max(10, height // 24)
    font, line = ImageFont.load_default(size), size + 4
    chars = lambda width: max(8, int(width / font.getlength("n")))
    fit = lambda text, width, lines: textwrap.wrap(text, chars(width), break_long_words=False)[:lines]
    labels = [fit(name, 14 * size, height // line) for name in rows]
    above = [fit(caption, width, 4) for caption in captions]
    left = 8 + round(max(font.getlength(text) for label in labels for text in label))
    top = line * max(map(len, above), default=0)
    sheet = Image.new("RGB", (left + n * (width + 2), top + len(rows) * (height + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(above):
        draw.text((left + i * (width + 2), 0), "\n".join(text), "black", font)
    for r, (label, pictures) in enumerate(zip(labels, rows.values())):
        y = top + r * (height + 2)
        draw.text((4, y + (height - line * len(label)) // 2), "\n".join(label), "black", font)
        for i, picture in enumerate(pictures):
            sheet.paste(picture.resize((width, height), Image.NEAREST), (left + i * (width + 2), y))
    sheet.save(path)


class StopRequest:
    """Turns SIGTERM, SIGHUP and Ctrl-C into `asked`, which the loop reads once an update, the same on all ranks.
    Another one after five seconds stops at once (launchers may pass the first one on twice)."""

    def __init__(self):
        self.since = math.inf
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        # launchers pass a closed terminal's on, `nohup` or not; what `nohup` itself has started ignores it
        hangs_up = [hangup] if signal.getsignal(hangup) is not signal.SIG_IGN else []
        for number in (signal.SIGTERM, signal.SIGINT, *hangs_up):
            signal.signal(number, self.ask)

    @property
    def asked(self) -> bool:
        return self.since < math.inf

    def ask(self, *_):
        if time.monotonic() - self.since > 5:
            raise KeyboardInterrupt
        self.since = min(self.since, time.monotonic())


# --- the engine ---

# Gather sharded state on rank 0's CPU (all ranks must call); keys are parameter names. Frozen parameters (a LoRA's
# base) are left out, and not asked for when it is loaded.
FULL_STATE = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


@dataclass
class TrainableNetwork:
    """A network under the engine with its optimiser; `unwrapped`: the same weights without wrapper, for rollouts."""

    network: torch.nn.Module
    unwrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> list:
        return [p for p in self.network.parameters() if p.requires_grad]

    def renew_optimizer(self) -> None:
        """Clear its state for a new part [D7]; the learning rate is set at each update."""
        self.optimizer.optimizer.state.clear()


def full_tensor(value: Tensor) -> Tensor:
    """All of a tensor that an engine may have sharded (all ranks must call)."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class Run:
    """A training run: the teacher, processes, data, random streams, metrics, folder; and its place, where it resumes.

    Run(args) has the processes, the teacher's pipeline and its schedule; open() all else.
    """

    def __init__(self, args):
        self.args, self.out, self.trained, self.checkpointed = args, Path(args.output_dir), {}, {}
        self.accelerator = start_accelerator(log_with=args.report_to, project_dir=args.output_dir)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.n_ranks = self.accelerator.num_processes
        self.resume_invariants = {"world_size": self.n_ranks, "mixed_precision": self.accelerator.mixed_precision}
        if args.resume:
            refuse_changes(self.resume_invariants, read_config(self.out))
        args.batch_size = args.batch_size or max(1, args.global_batch_size // self.n_ranks)
        self.accumulation, rest = divmod(args.global_batch_size, args.batch_size * self.n_ranks)
        if rest or not self.accumulation:
            unit = f"--batch_size {args.batch_size} times {self.n_ranks} process(es)"
            raise SystemExit(f"--global_batch_size {args.global_batch_size}: must be a multiple of {unit}")
        self.accelerator.gradient_accumulation_steps = self.accumulation
        if self.accelerator.is_main_process and not (args.dry_run or args.check_data):
            check_output_dir(args)
        self.pipe = load_pipeline(args.teacher, resolution=args.resolution)
        self.schedule = load_schedule(self.pipe).to(self.device)
        self.predicts = self.pipe.scheduler.config.prediction_type
        self.models = WeakSet()  # all that are made by model(), while they live
        self.print = self.accelerator.print

    def open(self, script: str, labels, columns, phases: dict[str, int], plan: dict, networks=None, need_images=True):
        """Data, support [D15], random streams, metrics and folder. `phases`: what each does -> its updates. Ends here
        for --check_data and --dry_run, which also prints `plan`. `networks`: what a resumed run must find unchanged."""
        from accelerate.utils import set_seed

        args, device, networks = self.args, self.device, networks or {"teacher": self.pipe.unet}
        self.script = Path(script).name
        named = {"image": args.image_column, "caption": args.caption_column}
        rows = open_rows(args.data, need_images=need_images, streaming=args.streaming, **named)
        self.held_out = rows.held_out
        n = min(8, len(rows.held_out))
        self.preview_captions = [rows.held_out[i * len(rows.held_out) // n] for i in range(n)]
        if args.reflect == "measured" and "image" not in rows.train.column_names:
            raise SystemExit(f"--reflect measured: --data {args.data} has no images to measure; give a radius, or none")
        if args.check_data and self.accelerator.is_main_process:
            print(report_on_data(args, self.pipe, rows))
        if args.dry_run:
            batch = f"{self.n_ranks} processes x {args.batch_size} x {self.accumulation} accumulated"
            plan = {**dict(sorted(vars(args).items())), "": "", "batch": f"{batch} = {args.global_batch_size}", **plan}
            self.print("\n".join(f"{name:24} {value}" for name, value in plan.items()))
        if args.dry_run or args.check_data:
            raise SystemExit

        set_seed(args.seed, device_specific=True)
        self.rng = torch.Generator(device).manual_seed(derive_seed(args.seed, "rank", self.rank))  # this rank's own
        self.shared_rng = torch.Generator().manual_seed(derive_seed(args.seed, "shared"))  # alike on all ranks [D14]
        self.prompts = PromptEncoder(self.pipe, device, dtype=frozen_dtype(self.accelerator))
        cache = args.cache_latents and need_images
        place = args.batch_size, args.seed, self.rank, self.n_ranks
        self.data = LatentData(rows.train, self.pipe, self.prompts, *place, self.rng, cache)
        self.n_phases, self.n_updates = len(phases), sum(phases.values())
        self.support = make_support(args.reflect, self.data)
        self.null = self.prompts.null()
        self.metrics = Metrics(self.out / "metrics.csv", labels, columns, device)
        self.add_metrics = self.metrics.add
        bins = sorted(int(c.removeprefix("loss_t")) for c in columns if c.removeprefix("loss_t").isdigit())
        self.t_bins = torch.tensor(bins, device=device)
        self.t_places = torch.tensor([columns.index(f"loss_t{t}") for t in bins], device=device)  # their columns
        self.labels, self.last_preview = {}, None
        self.stop, self.n_ranks_stopping, self.exit_before_next_loop = StopRequest(), 0.0, False
        self.pending_checks = []  # (name, value) of losses and norms, still on the device
        self.progress = {"phase": 0, "loop": None, "update": 0, "total": 0, "forwards": 0.0, "rows": 0}

        fingerprints = {id(network): fingerprint(network) for network in networks.values()}
        self.resume_invariants |= {f"{name}_weights": fingerprints[id(network)] for name, network in networks.items()}
        if args.resume:
            refuse_changes(self.resume_invariants, read_config(self.out))
        if self.accelerator.is_main_process:
            if not args.resume:
                self.create_folder(script)
            self.lock()
        # where a resumed run is until its loop is reached
        self.pending_checkpoint = self.checkpoint_to_resume() if args.resume else None
        if self.accelerator.is_main_process and args.resume and not self.pending_checkpoint:
            self.metrics.truncate(0)
        self.accelerator.wait_for_everyone()
        if not self.out.exists():
            raise SystemExit(f"--output_dir {self.out}: process {self.rank} does not see it; all nodes must share it")
        if args.report_to:
            self.accelerator.init_trackers(Path(script).stem, config={k: str(v) for k, v in vars(args).items()})
        samples = "samples as they are read"
        if not args.streaming:
            skipped = len(rows.train) - len(self.data.rows)  # of latents that are cached; others are skipped on the way
            samples = f"{len(self.data.rows):,} samples" + f" ({skipped} unusable are skipped)" * (skipped > 0)
        self.print(f"{args.teacher} is distilled on {args.data}: {samples}, {len(self.held_out):,} held-out captions")
        self.print("updates: " + "; ".join(f"{what}, {n:,}" for what, n in phases.items()))
        self.print(f"pictures in {self.out / 'samples'}, numbers in {self.metrics.path}")
        done = int(self.pending_checkpoint.name.strip("+")) if self.pending_checkpoint else 0
        self.print(f"{self.out}: {'resuming' if done else 'starting'} at update {done + 1} of {self.n_updates:,}")

    def checkpoint_to_resume(self) -> Path | None:
        """The newest whole one, the same on all ranks; None if there is none yet. SystemExit if all are damaged."""
        from accelerate.utils import broadcast_object_list

        there = checkpoints_of(self.out / "checkpoints")[::-1]
        whole = [next((c for c in there if is_intact(c)), None)] if self.accelerator.is_main_process else [None]
        (found,) = broadcast_object_list(whole)
        if there and found is None:
            raise SystemExit(f"--resume: {there[0]} and those before it are damaged; --overwrite starts anew")
        if there and found != there[0]:
            self.print(f"warning: {there[0]} is damaged; going on from {found}")
        return found

    def create_folder(self, script: str) -> None:
        """The run folder, with config.json and a copy of the code that made it."""
        is_there = self.args.overwrite and (self.out / "config.json").is_file()
        if is_there:
            self.lock()
            for path in [*self.out.glob("*"), *self.out.glob("*/*")]:  # what else lies there is someone's, and stays
                if OF_A_RUN.fullmatch(path.relative_to(self.out).as_posix()):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=is_there)
        except FileExistsError:
            raise SystemExit(f"--output_dir {self.out}: another run was just started there; choose another folder")
        for file in (script, __file__):
            shutil.copy(file, self.out)
        settings = {name: value for name, value in vars(self.args).items() if name not in NOT_SETTINGS}
        (self.out / "config.json").write_text(json.dumps(settings | self.resume_invariants, indent=1), encoding="utf-8")

    def lock(self) -> None:
        """The folder is this run's until its process ends, however that is; SystemExit where it is another's."""
        try:
            import fcntl

            # nothing of this process may open the file again: closing it would unlock
            self.locked = (self.out / "config.json").open("rb+")
            fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise SystemExit(f"--output_dir {self.out}: another run is under way there; wait, or choose another folder")
        except (ImportError, OSError):  # Windows, whose open files nobody can delete either; a drive without locks
            pass

    # networks

    def prepare_frozen(self, network, half: bool = True):
        """A network that is asked and not trained, on the device."""
        dtype = frozen_dtype(self.accelerator) if half else torch.float32
        return self.compile_blocks(network.to(self.device, dtype))

    def compile_blocks(self, network):
        """Compile only the blocks that a UNet repeats: fast, without graph breaks around them."""
        if self.args.compile:
            # of one code: instances of several shapes, with and without gradient; beyond it, it would run uncompiled
            torch._dynamo.config.recompile_limit = 256
            torch._dynamo.config.optimize_ddp = False  # or blocks are split where DDP's buckets end
            for module in network.modules():
                if type(module).__name__ in REGIONS:
                    module.compile(dynamic=False)
        return network

    def prepare_trainable(self, name: str, network) -> TrainableNetwork:
        """The network under the engine, with AdamW on what of it asks for a gradient."""
        network = network.to(self.device).train()  # one by one: where they are sharded, it may not hold all as a whole
        if self.args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        parameters = [p for p in self.compile_blocks(network).parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, fused=self.device.type == "cuda" or None)
        network, optimizer = self.accelerator.prepare(network, optimizer)
        self.trained[name] = TrainableNetwork(network, self.accelerator.unwrap_model(network), optimizer)
        if self.accelerator.is_fsdp2:  # accelerate matches parameters by address, which empty shards share
            optimizer.param_groups[0]["params"] = self.trained[name].parameters
        self.last_preview = None
        return self.trained[name]

    def register_for_checkpointing(self, name: str, thing):
        """Into checkpoints, anything with state_dict / load_state_dict: each rank's D_DAgger, a moving average."""
        self.checkpointed[name] = thing

    def model(self, network, predicts: str | None = None) -> UNetModel:
        """network as model(z_t, t, cond) -> v_hat, its forwards counted; it predicts as the teacher, or `predicts`."""
        model = UNetModel(network, self.schedule, predicts or self.predicts, self.accelerator.autocast)
        self.models.add(model)
        return model

    def models_of(self, trained: TrainableNetwork, predicts: str | None = None) -> list[UNetModel]:
        """[the network as it is trained, the same without the engine's wrapper, for rollouts and pictures]"""
        return [self.model(network, predicts) for network in (trained.network, trained.unwrapped)]

    def with_reflect_metric(self, model: Model, column: str) -> Model:
        """The model, and in the metrics the share of its x estimate that `reflect` moves."""

        def noted(z_t: Tensor, t: Tensor, cond: dict) -> Tensor:
            v = model(z_t, t, cond)
            self.add_metrics({column: clipped_fraction(x_from_v(self.schedule, z_t, v, t), self.support)})
            return v

        return noted

    def save_student(self, folder: Path, unet, scheduler, steps: int, w: str, measured: dict | None = None) -> None:
        """A pipeline of stock diffusers that samples in so many steps at guidance scale w (a number, or "LO to HI"),
        and its model card, with what was measured of it."""
        save_pipeline(folder, self.pipe, unet, scheduler, model_card(self.args, self.script, steps, w, measured or {}))

    def check_lora(self, flag: str, pipe) -> None:
        """SystemExit for an engine, or for the pipeline that a flag names, that --lora_rank does not go with."""
        rank, name = self.args.lora_rank, f"--{flag} {getattr(self.args, flag)}"
        if rank and self.accelerator.is_fsdp2:
            raise SystemExit("--lora_rank: has no use for shards, most of it is frozen; launch with --multi_gpu")
        if rank and pipe.unet.config.time_cond_proj_dim is not None:
            raise SystemExit(f"--lora_rank {rank}: {name} takes w, for which a LoRA has no input")

    def save_lora(self, unet, base: str):
        """The LoRA of a UNet in lora/, under the names, and with the alphas, that diffusers, ComfyUI and A1111 read;
        returns the UNet of the pipeline `base`, in full precision, with it fused."""
        from diffusers.utils import convert_state_dict_to_kohya
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        layers = {f"unet.{name}": value.contiguous() for name, value in get_peft_model_state_dict(unet).items()}
        lora = convert_state_dict_to_kohya(layers)
        replace_folder(self.out / "lora", lambda folder: save_file(lora, folder / "pytorch_lora_weights.safetensors"))
        pipe = load_pipeline(base, resolution=self.args.resolution)
        pipe.load_lora_weights(self.out / "lora")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return pipe.unet

    def unwrap_full_network(self, trained: TrainableNetwork):
        """The UNet without its engine, to be saved; where it is sharded, a copy that is whole on the first rank."""
        if self.pending_checkpoint:
            raise SystemExit(f"--resume: {self.pending_checkpoint} was made in a loop that this script does not have")
        network = self.accelerator.unwrap_model(trained.network, keep_fp32_wrapper=False)
        if not self.accelerator.is_fsdp2:
            return network
        state = dcp_state.get_model_state_dict(trained.network, options=FULL_STATE)
        if self.accelerator.is_main_process:
            network = type(self.pipe.unet).from_config(network.config)
            network.load_state_dict(state)
        return network

    # draws

    def start_noise(self, n: int) -> Tensor:
        """z ~ N(0, I) [n, C, h, w], where every trajectory starts (t = 999)."""
        return torch.randn(n, *latent_shape(self.pipe), generator=self.rng, device=self.device)

    def draw_w(self, n: int) -> Tensor:
        """w ~ U[guidance_range], [n]."""
        lo, hi = self.args.guidance_range
        return lo + (hi - lo) * torch.rand(n, generator=self.rng, device=self.device)

    def preview_row(self, sample: Callable[[Tensor, dict, torch.Generator], Tensor], w: float) -> Tensor:
        """sample(z, cond, generator) for the preview's captions, in batches no larger than in training."""
        ids, noise = self.prompts.tokenize(self.preview_captions), torch.Generator(self.device).manual_seed(1)
        z = noise_of(range(len(ids)), latent_shape(self.pipe), seed=1)
        rows = []
        for part in torch.arange(len(ids)).split(self.args.batch_size):
            cond = self.prompts.encode(ids[part]) | {"w": torch.full((len(part),), w, device=self.device)}
            rows.append(sample(z[part].to(self.device), cond, noise))
        return torch.cat(rows)

    def save_preview(self, rows: dict[str, Tensor], suffix: str = "") -> None:
        """samples/UPDATE.png of preview_row's latents by name; all ranks make them, as a network may be sharded."""
        if not self.accelerator.is_main_process:
            return
        pipe, pictures = self.pipe, {}
        place = pipe.vae.device
        for name, latents in rows.items():
            latents = latents / pipe.vae.to(latents.device).config.scaling_factor
            # one by one: memory for a batch of decodes may not be left beside a student in training
            with torch.no_grad():
                pixels = torch.cat([pipe.vae.decode(z, return_dict=False)[0] for z in latents.split(1)])
            pictures[name] = pipe.image_processor.postprocess(pixels, output_type="pil")
        pipe.vae.to(place)
        file = self.out / "samples" / f"{self.progress['total']:06d}{suffix}.png"
        save_sheet(file, pictures, self.preview_captions)

    # phases

    def unfinished(self, phases: Sequence):
        """(place, phase) of those still to do. A phase is finished when finish() has written its results and a
        checkpoint says so."""
        if self.pending_checkpoint:
            self.progress = json.loads((self.pending_checkpoint / "progress.json").read_bytes())
            if self.progress["loop"] is None:  # made by finish(): between two phases
                self.load_checkpoint()
        for place in range(self.progress["phase"], len(phases)):
            yield place, phases[place]
            gc.collect()  # accelerate's wrappers are cycles, and only here has the phase's frame let go of its networks

    def finish(self, write: Callable[[], None]) -> None:
        """The end of a phase: write() its results on the first process, let go of its networks, and a checkpoint."""
        if self.accelerator.is_main_process:
            write()
        self.accelerator.wait_for_everyone()
        self.trained = {}
        self.accelerator.free_memory()
        self.progress |= {"phase": self.progress["phase"] + 1, "loop": None, "update": 0}
        self.save_checkpoint()

    # the loop

    def updates(self, loop: str, n: int, peak: float, sample: Callable[[], None], decay: bool = True):
        """Yields the updates of this loop that are still to do, each with its learning rate set; then log, checkpoint
        and sample() where they are due and, if the run is asked to stop, the end. A loop done before yields nothing."""
        from tqdm import tqdm

        start = self.first_update_of(loop)
        if start < n and self.exit_before_next_loop:
            self.exit_after_save()
        if start == 0:
            self.save_preview_once(sample)
        title, silent = self.title_of(loop), self.rank != 0 or start >= n
        bar = tqdm(initial=start, total=n, desc=title, disable=silent, dynamic_ncols=True)
        began = clock = time.time()
        for update in range(start, n):
            rate = learning_rate(update, n, self.args.warmup, peak, decay)
            for trained in self.trained.values():
                for group in trained.optimizer.param_groups:
                    group["lr"] = rate
            for model in self.models:
                model.forwards = 0
            yield update
            self.progress |= {"loop": loop, "update": update + 1, "total": self.progress["total"] + 1}
            self.progress["forwards"] += sum(model.forwards for model in self.models)
            if self.n_phases > 1:
                left = (time.time() - began) / (update + 1 - start) * (self.n_updates - self.progress["total"])
                bar.set_postfix_str(f"about {tqdm.format_interval(left)} left in all", refresh=False)
            bar.update()
            total, is_last = self.progress["total"], update + 1 == n
            is_logged, due = (total % every == 0 or is_last for every in (self.args.log_every, self.args.save_every))
            stop = self.n_ranks_stopping > 0
            if is_logged:
                self.log(title, n, rate, time.time() - clock)
                clock = time.time()
            if (due or stop) and self.pending_checks:
                self.check_finite()
            if due:
                self.save_preview_once(sample)  # before the checkpoint, or a kill between the two would lose it
            if due or stop:
                self.save_checkpoint()
            self.exit_before_next_loop = stop  # asked at a loop's last update: before the next loop, if there is one
            if stop and not is_last:
                bar.close()
                self.exit_after_save()
        bar.close()

    def title_of(self, loop: str) -> str:
        """A loop's name with its phase's place in the whole: "8 part 2" -> "8 steps 4/5, part 2"."""
        name, _, part = loop.partition(" part ")
        place = f" {self.progress['phase'] + 1}/{self.n_phases}" if self.n_phases > 1 else ""
        return name + " steps" * name.isdigit() + place + f", part {part}" * (part > "1")

    def exit_after_save(self) -> None:
        """The end of a run that was asked to stop, after a checkpoint."""
        self.print(f"stopped after update {self.progress['total']}: saved; --resume goes on")
        self.accelerator.end_training()
        raise SystemExit

    def save_preview_once(self, sample: Callable[[], None]) -> None:
        """A sample grid, unless one of these weights was drawn already."""
        if self.last_preview != self.progress["total"]:
            sample()
            self.last_preview = self.progress["total"]

    def minibatches(self, trained: TrainableNetwork | None):
        """The mini-batches of an update on each process; ranks exchange gradients at the last. None: no training."""
        for _ in range(self.accumulation):
            with self.accelerator.accumulate(trained.network) if trained else nullcontext():
                yield

    def backward(
        self, losses: Tensor, t: Tensor | None = None, source: str | None = None, cost: float = 2, of: str = "student"
    ) -> None:
        """Backpropagate losses [B]; given t and source, record them. A sample's backward pass counts as `cost` forwards
        of a UNet."""
        loss = losses.mean()
        self.queue_finite_check(f"{of}'s loss" + f" on {source} states" * bool(source), loss)
        self.accelerator.backward(loss)
        self.progress["forwards"] += cost * len(losses)
        if source:
            losses = losses.detach()
            self.add_metrics({"loss": losses, f"loss_{source}": losses, "t_mean": t})
            bins = torch.bucketize(t, self.t_bins)  # of t in (the bin before, bin]
            self.metrics.totals.index_add_(1, self.t_places[bins], torch.stack([losses, torch.ones_like(losses)]))

    def queue_finite_check(self, name: str, value: Tensor) -> None:
        """A value of this update that must be finite; it stays on the device until check_finite."""
        self.pending_checks.append((f"update {self.progress['total'] + 1}: the {name}", value.detach()))

    def check_finite(self) -> None:
        """The only device sync of an update: SystemExit on all ranks if a value since the last call was not finite. It
        also learns whether a rank was asked to stop."""
        asked = torch.full((), float(self.stop.asked), device=self.device)
        names, values = zip(*self.pending_checks, ("", asked))
        self.pending_checks = []
        *values, self.n_ranks_stopping = self.accelerator.reduce(torch.stack(values).float(), "sum").tolist()
        for name, value in zip(names, values):
            if not math.isfinite(value):  # the same verdict on all ranks
                last = (checkpoints_of(self.out / "checkpoints") or ["none yet"])[-1]
                raise SystemExit(f"{name} is {value}; stopped, last checkpoint: {last}; try a lower --learning_rate")

    def step(self, trained: TrainableNetwork, max_norm: float, column: str = "grad_norm") -> None:
        """Clip gradients, step AdamW, zero gradients. The first network's step first checks all values since its last
        one (the critic's too, before any checkpoint takes its weights)."""
        if self.accelerator.is_fsdp2:  # accelerate's own would compare the parameters of two networks by value
            self.accelerator.unscale_gradients()
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(trained.parameters, max_norm))
        else:
            norm = self.accelerator.clip_grad_norm_(trained.parameters, max_norm)
        if self.accelerator.scaler is None:  # fp16's scaler skips such updates
            self.queue_finite_check("gradient's norm", norm)
        if trained is next(iter(self.trained.values())):
            self.check_finite()
        self.add_metrics({column: norm})
        trained.optimizer.step()
        trained.optimizer.zero_grad()

    def log(self, title: str, n: int, rate: float, seconds: float) -> None:
        """A row of metrics.csv and a line; a loop's first and last one warn where `reflect` distorts or is idle."""
        from tqdm import tqdm

        update, total = self.progress["update"], self.progress["total"]
        forwards = f"{self.progress['forwards'] * self.n_ranks:.10g}"
        labels = self.labels | {"update": update, "total_updates": total, "unet_forwards": forwards}
        means = self.metrics.flush(self.accelerator, **labels, lr=f"{rate:.3g}", seconds=f"{seconds:.2f}")
        self.accelerator.log(means, step=total)
        if self.rank == 0:
            shown = [name for name in ("loss", "loss_matching", "loss_fake") if name in means]
            losses = " ".join(f"{name} {means[name]:.4f}" for name in shown)
            tqdm.write(f"{title}: {update}/{n} {losses} lr {rate:.1e}")
            moved = {name: value for name, value in means.items() if name.startswith("moved_")}
            if self.support and moved and (update <= self.args.log_every or update == n):
                distorts, is_idle = max(moved.values()) > 0.2, update == n and not any(moved.values())
                if distorts or is_idle:
                    what = "it distorts; take a wider range" if distorts else "it does nothing"
                    shares = ", ".join(f"{name} {value:.1%}" for name, value in moved.items())
                    tqdm.write(f"warning: --reflect {self.args.reflect}: {shares} of x estimates: {what}")

    # checkpoints

    def save_checkpoint(self) -> None:
        """checkpoints/<update>: progress, networks and optimisers (whole, so the same under every engine) and every
        rank's own state. Written, then renamed: a kill leaves the old ones or the new one too; the last two stay."""
        folder, total = self.out / "checkpoints", self.progress["total"]
        temporary, final, is_main = folder / "saving", folder / f"{total:08d}", self.accelerator.is_main_process
        self.progress["rows"] = self.metrics.rows
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        for name, state in self.network_states():  # all ranks must ask
            if is_main:
                save_state(state, temporary / f"{name}.pt")
            del state  # or it would stay in memory beside the next one
        self.accelerator.wait_for_everyone()
        save_state(self.rank_state(), temporary / f"rank-{self.rank}.pt")
        self.accelerator.wait_for_everyone()
        if is_main:
            files = sorted(file.name for file in temporary.iterdir())
            (temporary / "progress.json").write_text(json.dumps(self.progress | {"files": files}), encoding="utf-8")
            while final.exists():  # saved again at the same update: a later name, so that there always is a whole one
                final = final.with_name(final.name + "+")
            temporary.replace(final)
            for old in checkpoints_of(folder)[:-2]:
                shutil.rmtree(old, ignore_errors=True)  # on network drives, a file that is still mapped stays
        self.accelerator.wait_for_everyone()

    def network_states(self):
        """(name, state) one by one, gathered on the first rank's CPU where an engine has sharded them."""
        for name, trained in self.trained.items():
            network, optimizer = trained.network, trained.optimizer.optimizer
            yield name, dcp_state.get_model_state_dict(network, options=FULL_STATE)
            yield f"{name}_optimizer", dcp_state.get_optimizer_state_dict(network, optimizer, options=FULL_STATE)
        for name, thing in self.checkpointed.items():
            if isinstance(thing, torch.nn.Module):
                yield name, thing.state_dict()

    def rank_state(self) -> dict:
        """This rank's own part: generators, place in the data, metrics, support, fp16's scaler, what is kept."""
        scaler = self.accelerator.scaler
        own = {n: kept.state_dict() for n, kept in self.checkpointed.items() if not isinstance(kept, torch.nn.Module)}
        return {
            "noise": self.rng.get_state(),
            "shared": self.shared_rng.get_state(),
            "data": self.data.position(),
            "metrics": self.metrics.totals,
            "support": self.support,
            "scaler": scaler.state_dict() if scaler else {},
            "kept": own,
        }

    def first_update_of(self, loop: str) -> int:
        """The first update of a loop: 0, past its end if it was done before, or where the checkpoint was made."""
        if self.pending_checkpoint is None:
            return 0
        if json.loads((self.pending_checkpoint / "progress.json").read_bytes())["loop"] != loop:
            return sys.maxsize  # an earlier loop than the checkpoint's
        self.load_checkpoint()
        return self.progress["update"]

    def load_checkpoint(self) -> None:
        """Everything that the checkpoint holds."""
        folder, self.pending_checkpoint = self.pending_checkpoint, None
        for name, trained in self.trained.items():
            dcp_state.set_model_state_dict(trained.network, load_state(folder / f"{name}.pt"), options=FULL_STATE)
            state, optimizer = load_state(folder / f"{name}_optimizer.pt"), trained.optimizer.optimizer
            # the state that it has by then goes first, or both would be on the device for a moment
            hook = optimizer.register_load_state_dict_pre_hook(lambda optimizer, _: optimizer.state.clear())
            dcp_state.set_optimizer_state_dict(trained.network, optimizer, state, options=FULL_STATE)
            hook.remove()
        mine = load_state(folder / f"rank-{self.rank}.pt")
        for name, thing in self.checkpointed.items():
            is_network = isinstance(thing, torch.nn.Module)
            thing.load_state_dict(load_state(folder / f"{name}.pt") if is_network else mine["kept"][name])
        self.rng.set_state(mine["noise"])
        self.shared_rng.set_state(mine["shared"])
        self.data.restore(mine["data"])
        self.metrics.totals = mine["metrics"].to(self.device)
        self.support = mine["support"] and tuple(bound.to(self.device) for bound in mine["support"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(mine["scaler"])
        self.progress = json.loads((folder / "progress.json").read_bytes())
        if self.accelerator.is_main_process:
            self.metrics.truncate(self.progress["rows"])

    def end(self, steps: int, w: str, example: float) -> None:
        """Where the student is, its last picture, and a line that samples it, with `example` as guidance scale."""
        pipeline, pictures = self.out / "pipeline", self.out / "samples"
        picture = max(pictures.glob("*.png"), default=pictures)
        prompt = re.sub(r"[^\w ,.-]", "", self.held_out[0])  # as it goes through any shell
        sample = f"'{prompt}', num_inference_steps={steps}, guidance_scale={example}"
        load = f"from diffusers import DiffusionPipeline as P; P.from_pretrained('{pipeline.as_posix()}')"
        self.print(f"done: {pipeline} samples in {steps} steps, guidance_scale {w}")
        self.print(f"look at {picture}\nor try: python -c \"{load}({sample}).images[0].save('sample.png')\"")
        self.accelerator.end_training()
