"""Speed and memory, as ratios within one run: `python tests/benchmark.py [name ...]` prints a line for each figure.

pd.ddil_over_plain   seconds and UNet forwards of PD + DDIL over plain PD: each stage, the whole tiny recipe
lcm.ddil_over_plain, dmd2.ddil_over_plain    the same of LCM and DMD2 (mid: 30M parameters)
memory [--narrow]    GiB that are held between two updates, and at most, of all methods at the real shapes in bf16 with gradient
                     checkpointing and cached latents: counted on tensors without values, so that it needs no GPU
full [--narrow]      seconds of an update, model FLOP utilisation (of the device's own rate for large matrices), peak memory and
                     seconds to compile, of all methods with and without DDIL, in bf16 at the recipes' batches, with random
                     weights of the real shapes; what matters most first, so that it may be cut short. --narrow, and without
                     a GPU: small networks, to see that it runs
"""

import copy
import csv
import gc
import math
import os
import statistics
import sys
import tempfile
import time
import weakref
from contextlib import nullcontext, redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common
import dmd2_ddil
import lcm_ddil
import pd_ddil
from common import PromptEncoder, UNetModel, latent_shape, load_pipeline, save_pipeline


def report(name: str, value: float, unit: str = "x") -> None:
    print(f"{name} {value:.3f} {unit}", flush=True)


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def save_model(folder: Path, size: str, gc: bool) -> Path:
    """assets/tiny, or with a random 30M-parameter UNet ("mid"); gc: as a v-prediction teacher with a w embedding, so that PD
    has halvings only. Speed needs no training."""
    from diffusers import UNet2DConditionModel

    pipe = load_pipeline(str(ROOT / "assets/tiny/pipeline"))
    unet, down, up = pipe.unet, ["CrossAttnDownBlock2D"] * 2, ["CrossAttnUpBlock2D"] * 2
    if size == "mid":
        blocks = {"down_block_types": [*down, "DownBlock2D"], "up_block_types": ["UpBlock2D", *up]}
        blocks |= {"block_out_channels": (128, 192, 256), "cross_attention_dim": unet.config.cross_attention_dim}
        unet = UNet2DConditionModel(sample_size=32, in_channels=4, out_channels=4, attention_head_dim=8, **blocks)
    if gc:
        unet, pipe.scheduler = common.with_w_embedding(unet), common.dpm_solver(pipe, "v_prediction", 1)
    save_pipeline(folder, pipe, unet, pipe.scheduler)
    return folder


def few_images(folder: Path) -> Path:
    from datasets import load_dataset

    folder.mkdir()
    data = load_dataset(str(ROOT / "assets/tiny/data"))
    data["train"].select(range(64)).to_parquet(folder / "train.parquet")
    data["test"].select(range(16)).to_parquet(folder / "test.parquet")
    return folder


# --- updates of the scripts' own loops ---


def measure(script, size: str, sources: list[str], flags: str) -> list[dict]:
    """A run of `script` whose updates take the sources in turn: loop, source, seconds and UNet forwards of each."""
    found, whole_loop = [], common.Run.updates

    def updates(run, loop, *rest):
        for update in whole_loop(run, loop, *rest):
            known = {"loop": loop, "source": sources[update % len(sources)]}
            found.append(known)
            before, start = run.progress["forwards"], time.perf_counter()
            yield update
            known["time"] = time.perf_counter() - start
            known["forwards"] = run.progress["forwards"] - before + sum(model.forwards for model in run.models)

    def transitions(seed, update, i, n):
        return (update // len(sources) + i) % n

    with tempfile.TemporaryDirectory() as folder, patch.object(common.Run, "updates", updates):
        folder = Path(folder)
        base = ["--output_dir", folder / "run", "--save_every", 10**6]
        if size == "mid" or script is pd_ddil:
            base += ["--teacher", save_model(folder / "model", size, gc=script is pd_ddil)]
        if size == "mid":
            base += ["--data", few_images(folder / "data"), "--global_batch_size", 4]
        draw = patch.object(common.SamplingPrior, "draw", lambda prior, part: found[-1]["source"])
        no_pictures = patch.multiple(common.Run, save_preview_once=lambda *args: None, preview_row=lambda *args: None)
        nothing = {"reference": lambda *args: None, "report": lambda *args: None}
        no_evaluation = patch.multiple(pd_ddil.PairedEvaluation, **nothing)
        quiet = redirect_stdout(sys.stderr)
        with quiet, draw, no_pictures, no_evaluation, patch.object(dmd2_ddil, "sample_rollout_length", transitions):
            script.main([*map(str, base), *flags.split()])
    return found


def cost(found: list[dict], source: str, loop: str = "") -> torch.Tensor:
    """(seconds, forwards) of an update of this source, the first one of which warms up."""
    rows = [[row["time"], row["forwards"]] for row in found if row["source"] == source and row["loop"].startswith(loop)]
    return torch.tensor(rows).mean(dim=0)


def report_ratios(name: str, costs: torch.Tensor) -> None:
    """costs: (DDIL, plain) x (seconds, forwards)."""
    for unit, (ddil, plain) in zip(("time", "forwards"), costs.T.tolist()):
        report(f"{name}.{unit}", ddil / plain)


def pd_ddil_over_plain() -> None:
    """A part's time follows from the shares in which it mixes both sources; updates are whole cycles of a collection and
    its uses, of which a stage of n steps has 2 (n - 1)."""
    recipe, whole = pd_ddil.RECIPES["tiny"], torch.zeros(2, 2)
    found = measure(pd_ddil, "tiny", ["forward", "dagger"], "--updates 16=60 8=56,56 4=48,48 --eval_prompts 4")
    for stage in ("16", "8", "4"):
        costs = torch.zeros(2, 2)
        for part, n in enumerate(recipe["updates"][stage]):
            p, loop = recipe["p_forward"][part], f"{stage} part {part + 1}"
            plain = cost(found, "forward", loop)
            costs += n * torch.stack([p * plain + (1 - p) * cost(found, "dagger", loop), plain])
        report_ratios(f"pd.ddil_over_plain.{stage}", costs)
        whole += costs
    report_ratios("pd.ddil_over_plain.whole", whole)


def lcm_ddil_over_plain() -> None:
    found = measure(lcm_ddil, "tiny", ["forward", "student"], "--updates 96")
    plain, p = cost(found, "forward"), statistics.mean(lcm_ddil.RECIPES["tiny"]["p_forward"])  # over equal parts
    report_ratios("lcm.ddil_over_plain", torch.stack([p * plain + (1 - p) * cost(found, "student"), plain]))


def dmd2_ddil_over_plain(size: str) -> None:
    """Updates of a source with all of the critic's, through every length of trajectory."""
    found = measure(dmd2_ddil, size, ["student", "teacher"], "--updates 24" if size == "tiny" else "--updates 8")
    plain = cost(found, "student")
    report_ratios(f"dmd2.ddil_over_plain.{size}", torch.stack([(plain + cost(found, "teacher")) / 2, plain]))


def read_metrics(folder: Path) -> list[dict]:
    """Rows of metrics.csv, an update each."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["seconds"]]


# --- real shapes ---


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that are alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.storages = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage())._cdata not in self.storages:
                self.change(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.change, storage._cdata, -storage.nbytes())
        return output

    def change(self, storage: int, n: int) -> None:
        self.storages ^= {storage}
        self.now += n
        self.peak = max(self.peak, self.now)


class CountedRun(common.Run):
    """Networks as in a run, on tensors without values: no processes, no data."""

    def __init__(self, args, unet, xl: bool):
        scheduler = SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon"))
        self.args, self.pipe, self.predicts = args, SimpleNamespace(unet=unet, scheduler=scheduler), "epsilon"
        self.device, self.trained, self.models, self.checkpointed = torch.device("cpu"), {}, set(), {}
        autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        self.accelerator = SimpleNamespace(autocast=autocast, is_fsdp2=False, mixed_precision="bf16")
        self.schedule = common.NoiseSchedule.from_alphas_cumprod(torch.linspace(0.999, 0.005, 1000))
        self.rng, n, width = torch.Generator(), args.batch_size, unet.config.cross_attention_dim
        size = unet.config.sample_size
        self.x, self.cond = torch.randn(n, 4, size, size), {"prompt": torch.randn(n, 77, width), "w": torch.ones(n)}
        pooled = {"text_embeds": torch.randn(n, 1280), "time_ids": torch.randn(n, 6)}
        self.cond |= pooled if xl else {}
        self.null = {name: value[:1] for name, value in self.cond.items() if name in ("prompt", "text_embeds")}

    def prepare_trainable(self, name, network):
        network.train().enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
        self.trained[name] = common.TrainableNetwork(network, network, optimizer)
        return self.trained[name]

    def minimise(self, trained, losses) -> None:
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters, 1.0)
        trained.optimizer.step()
        trained.optimizer.zero_grad()


def convert(module, function, recurse=True):
    """torch's own Module._apply, that tensors without values do not bear."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(function(value.detach()), value.requires_grad)
    return module


def pd_update(run):
    teacher = run.model(run.prepare_frozen(copy.deepcopy(run.pipe.unet)))
    student = run.prepare_trainable("student", run.pipe.unet)
    model, t = run.model(student.network), torch.full((len(run.x),), 999)

    def update():
        z_s = pd_ddil.teacher_target(run.schedule, teacher, run.x, t, t - 100, t - 200, run.cond, None)
        run.minimise(student, pd_ddil.pd_step(run.schedule, model, run.x, z_s, t, t - 200, run.cond))

    return update


def lcm_update(run):
    student, ema, teacher = lcm_ddil.networks_of(run)
    model, t = run.model(student.network), torch.full((len(run.x),), 999)
    target = run.model(ema or student.unwrapped)

    def update():
        inputs = model, target, teacher, run.x, t, t - 20, run.cond, None, "huber", 0.001
        run.minimise(student, lcm_ddil.consistency_step(run.schedule, *inputs))

    return update


def dmd2_update(run):
    nets = dmd2_ddil.networks_of(run, dict.fromkeys(("teacher", "student", "fake"), run.pipe))
    scores = nets.real_score, nets.unwrapped_fake_score, nets.unwrapped_discriminator
    t = torch.full((len(run.x),), 999)

    def update():
        x_g = common.consistency_function(run.schedule, nets.train_student, run.x, t, run.cond)
        run.minimise(nets.student, dmd2_ddil.student_step(run.schedule, *scores, x_g, run.cond, None, 1, run.rng)[0])
        inputs = nets.fake_score, nets.discriminator, x_g.detach(), run.x, run.cond, 1, run.rng
        run.minimise(nets.critic, dmd2_ddil.critic_step(run.schedule, *inputs)[0])

    return update


METHODS = {"pd": (pd_ddil, pd_update), "lcm": (lcm_ddil, lcm_update), "dmd2": (dmd2_ddil, dmd2_update)}


def count(method: str, kind: str, n: int, rank: int, config: dict) -> tuple[int, int]:
    """Bytes that are held after an update, and at most in the next one."""
    from diffusers import UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    script, update_of = METHODS[method]
    args = script.RECIPES["tiny"] | {"batch_size": n, "lora_rank": rank, "ema_decay": 0 if rank else 0.95}
    mode, deepcopy = FakeTensorMode(), copy.deepcopy
    one_mode = patch.object(copy, "deepcopy", lambda value: deepcopy(value, {id(mode): mode}))
    with one_mode, patch.object(torch.nn.Module, "_apply", convert), mode, LiveBytes() as live:
        unet = UNet2DConditionModel.from_config(config | {"in_channels": 4, "out_channels": 4})
        run = CountedRun(SimpleNamespace(compile=False, **args), unet.requires_grad_(method == "pd"), kind != "sd15")
        update = update_of(run)
        update()  # after which the optimisers have their states
        del unet, run
        gc.collect()
        live.peak = live.now
        update()
    return live.now, live.peak


def memory(narrow: bool) -> None:
    """Latents are cached, so there is no VAE; prompts' encoders are in half precision."""
    with patch.dict(os.environ):
        from test_full_size import NARROW

    encoders = {"sd15": 2 * 123e6, "ssd1b": 2 * 817e6, "sdxl": 2 * 817e6}  # bytes
    lines = [("pd", "sd15", 28, 0), ("lcm", "sd15", 60, 0), ("dmd2", "sd15", 7, 0)]  # which were measured, too
    lines += [(method, kind, 1, rank) for kind in REAL for method, rank in product(("lcm", "dmd2"), (64, 0))]
    for method, kind, n, rank in [*lines, *(("pd", kind, 1, 0) for kind in REAL)]:
        config = NARROW[kind] | ({"sample_size": 8} if narrow else REAL[kind])
        if kind != "sd15":
            inputs = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
            config |= inputs | {"projection_class_embeddings_input_dim": 2816}
        config["cross_attention_dim"] = 768 if kind == "sd15" else 2048
        config["time_cond_proj_dim"] = 256 if method == "pd" else None
        name = f"memory.{kind}.{method}{'_lora' * bool(rank)}.batch{n}"
        for what, value in zip(("held", "peak"), count(method, kind, n, rank, config)):
            report(f"{name}.{what}", (value + encoders[kind]) / 2**30, "GiB")


def matrix_rate(device: str, n: int) -> float:
    """bf16 FLOPs a second of n x n matrices."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)

    def multiply(rounds: int):
        for _ in range(rounds):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    multiply(3)
    return 10 * 2 * n**3 / seconds(multiply, 10)


def forward_flops(folder: Path) -> int:
    """Counted for one sample through a pipeline's UNet, on tensors without values."""
    from torch.utils.flop_counter import FlopCounterMode

    pipe = load_pipeline(str(folder))
    prompts = PromptEncoder(pipe, "cpu")
    one = prompts.encode(prompts.tokenize([""])) | {"w": torch.ones(1)}
    network = UNetModel(pipe.unet.to("meta"), None, "", nullcontext)
    cond = {name: value.to("meta") for name, value in one.items()}
    z_t, t = torch.zeros(1, *latent_shape(pipe), device="meta"), torch.zeros(1, device="meta")
    with FlopCounterMode(display=False) as counter:
        network.run(z_t, t, cond)
    return counter.get_total_flops()


def run_full(script, flags: list, folder: Path, updates: int) -> tuple[float, float, float, float] | None:
    """(seconds, UNet forwards) of an update, over the second half of the run; peak GiB; seconds of the first update beyond
    those. None where memory is too small."""
    on_gpu = torch.cuda.is_available()
    AcceleratorState._reset_state(reset_partial_state=True)
    more = f"--output_dir {folder}/run --overwrite --log_every 1 --save_every 1000000"
    # checkpoints are 10 GB each
    no_files = patch.multiple(common.Run, save_checkpoint=lambda run: None, save_preview_once=lambda *args: None)
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with no_files, redirect_stdout(None):
            script.main([*map(str, flags), *more.split()])
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    rows = read_metrics(folder / "run")
    first, rows = float(rows[-updates]["seconds"]), rows[-updates // 2 - 1 :]
    forwards = float(rows[-1]["unet_forwards"]) - float(rows[0]["unet_forwards"])
    update = statistics.median(float(row["seconds"]) for row in rows[1:])
    peak = torch.cuda.max_memory_allocated() if on_gpu else math.nan
    return update, forwards / (len(rows) - 1), peak / 2**30, first - update


FULL = {  # script: a process's batch, what makes an update what it is in the recipes, and what makes it plain distillation
    pd_ddil: (28, "gc --teacher_steps 8 --student_steps 4 --updates 4={} --student_rate 0.8", "--p_forward 1"),
    lcm_ddil: (60, "teacher --updates {} --p_forward 0.5", "--p_forward 1"),
    dmd2_ddil: (7, "teacher --updates {} --fake_updates 10", "--p_student 1"),
}
ARMS = "ddil.checkpointing", "ddil", "ddil.compiled", "plain.compiled"  # the compiler takes minutes
XL = {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "sample_size": 128}
REAL = {"sd15": {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}, "ssd1b": XL, "sdxl": XL}


def full_size(narrow: bool) -> None:
    """In one process, line by line, what matters most first; without a GPU, or `narrow`, as its own rehearsal."""
    if torch.cuda.is_available():
        torch.cuda.init()  # with its devices: the tests hide them, and diffusers asks for them as it is imported
    with patch.dict(os.environ):
        from conftest import save_teacher
        from test_full_size import NARROW

    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    narrow = narrow or not torch.cuda.is_available()
    rate = matrix_rate("cpu", 1024) if narrow else matrix_rate("cuda", 8192)
    report("full.matrix_rate", rate / 1e12, "TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        folder, flops = Path(folder), {}
        data, of_gc = few_images(folder / "data"), {"prediction_type": "v_prediction"}
        of_gc["time_cond_proj_dim"] = common.W_EMBEDDING_DIM
        for kind, arm, script in product(("sd15", "ssd1b"), ARMS, FULL):
            if kind == "ssd1b" and script is not dmd2_ddil:
                continue
            if kind not in flops:
                unet = NARROW[kind] | ({} if narrow else REAL[kind])
                save_teacher(folder / kind / "gc", xl=kind == "ssd1b", **of_gc, **unet)
                flops[kind] = forward_flops(save_teacher(folder / kind / "teacher", xl=kind == "ssd1b", **unet))
                report(f"full.{kind}.forward", flops[kind] / 1e9, "GFLOP")
            n, ours, plain = FULL[script]
            n, updates = (2, 2) if narrow else (n, 8)
            teacher, *ours = ours.format(updates).split()
            batch = ["--global_batch_size", n, "--batch_size", n]
            flags = ["--teacher", folder / kind / teacher, "--data", data, *batch, *ours]
            flags += ["--eval_prompts", 2] * (script is pd_ddil) + plain.split() * ("plain" in arm)
            flags += ["--gradient_checkpointing"] * ("checkpointing" in arm)
            flags += ["--fake_updates", 2] * (narrow and script is dmd2_ddil)
            flags += ["--compile"] * ("compiled" in arm and not narrow)
            name, found = f"full.{kind}.{script.__name__}.{arm}", run_full(script, flags, folder, updates)
            if not found:
                print(f"{name}: a batch of {n} does not fit", flush=True)
                continue
            update, forwards, gib, first = found
            report(f"{name}.update", update, "s")
            report(f"{name}.utilisation", forwards * flops[kind] / update / rate)
            report(f"{name}.memory", gib, "GiB")
            report(f"{name}.first_update", first, "s")  # beyond the others: the compiler, mostly


BENCHMARKS = {
    "pd.ddil_over_plain": pd_ddil_over_plain,
    "lcm.ddil_over_plain": lcm_ddil_over_plain,
    **{f"dmd2.ddil_over_plain.{size}": lambda size=size: dmd2_ddil_over_plain(size) for size in ("tiny", "mid")},
    "memory": lambda: memory("--narrow" in sys.argv),
    "full": lambda: full_size("--narrow" in sys.argv),
}

if __name__ == "__main__":
    asked = [arg for arg in sys.argv[1:] if arg != "--narrow"]
    chosen = [name for name in BENCHMARKS if not asked or any(name.startswith(arg) for arg in asked)]
    if not chosen:
        raise SystemExit(f"no benchmark {asked}; there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        BENCHMARKS[name]()
