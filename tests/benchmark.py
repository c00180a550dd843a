"""Speed and memory, as ratios within one run: `python tests/benchmark.py [name ...]` prints a line for each figure.

    pd.ddil_over_plain   seconds and UNet forwards of PD + DDIL over plain PD: each stage, the whole tiny recipe
    pd.update_over_unet  seconds of an update over its bare UNet forwards and backward: tiny (without the optimiser; two
                         sums of the same numbers, what is left is overhead), mid size (30M parameters, everything)
    pd.peak_memory       peak resident memory of a mid-size stage with DDIL over the same stage without
    pd.weak_scaling      seconds of an update in one process over those in two (DDP), mid size, one thread and as many samples each
    lcm.ddil_over_plain, lcm.update_over_unet    the same of LCM: the whole recipe; tiny, and mid size
    lcm.networks         UNets in memory, with the moving average and with --ema_decay 0
    lcm.over_diffusers   seconds of an update, and peak resident memory, over diffusers' own script on the same tars, tiny, with and
                         without cached latents. PEER=examples/consistency_distillation/train_lcm_distill_sd_wds.py of a clone of
                         diffusers names it; it needs webdataset 0.2.86 and braceexpand, in a folder of PYTHONPATH for instance
    dmd2.ddil_over_plain, dmd2.update_over_unet  the same of DMD2: a student's update with all of its critic's
    full.sd15, full.ssd1b    seconds of an update, peak memory and model FLOP utilisation (of the device's own rate for large
                             matrices) of all three methods, with and without DDIL and --compile, in bf16 at the largest batch that
                             fits: random weights of the real shapes on a GPU; without one narrow networks, to see that it runs
    evaluate.over_stock      images a second, noise and PNG files included, over a plain loop around the stock pipeline at the
                             same batch: tiny in 4 and 32 steps, mid size in 4
    evaluate.memory          peak resident memory of FID's statistics of 3,000 and of 30,000 images of 256 pixels, without a network
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate import Accelerator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dmd2_ddil  # noqa: E402
import evaluate  # noqa: E402
import lcm_ddil  # noqa: E402
import pd_ddil  # noqa: E402
from common import W_EMBEDDING_DIM, PromptEncoder, UNetModel, latent_shape, load_pipeline, save_pipeline  # noqa: E402


def report(name: str, value: float, unit: str = "x") -> None:
    print(f"{name} {value:.3f} {unit}", flush=True)


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def tiny_gc(folder: Path) -> Path:
    """assets/tiny as a v-prediction teacher with a w embedding, so that a run has halvings only; speed needs no training."""
    pipe = load_pipeline(str(ROOT / "assets/tiny/pipeline"))
    save_pipeline(folder, pipe, pd_ddil.with_w_embedding(pipe.unet), pd_ddil.sampler_of(pipe))
    return folder


def mid_unet(pipe):
    """A random 30M-parameter UNet on 32x32 latents of 128-pixel images."""
    from diffusers import UNet2DConditionModel

    down, up = ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2
    return UNet2DConditionModel(sample_size=32, in_channels=4, out_channels=4, block_out_channels=(128, 192, 256),
                                down_block_types=down, up_block_types=up, layers_per_block=2, attention_head_dim=8,
                                cross_attention_dim=pipe.unet.config.cross_attention_dim)  # fmt: skip


def mid_gc(folder: Path) -> Path:
    """As tiny_gc, with a UNet of middle size."""
    pipe = load_pipeline(str(ROOT / "assets/tiny/pipeline"))
    save_pipeline(folder, pipe, pd_ddil.with_w_embedding(mid_unet(pipe)), pd_ddil.sampler_of(pipe))
    return folder


def mid_teacher(folder: Path) -> Path:
    """A plain eps-predicting teacher of middle size."""
    pipe = load_pipeline(str(ROOT / "assets/tiny/pipeline"))
    save_pipeline(folder, pipe, mid_unet(pipe), pipe.scheduler)
    return folder


def few_images(folder: Path) -> Path:
    from datasets import load_dataset

    folder.mkdir()
    data = load_dataset(str(ROOT / "assets/tiny/data"))
    data["train"].select(range(64)).to_parquet(folder / "train.parquet")
    data["test"].select(range(16)).to_parquet(folder / "test.parquet")
    return folder


def open_run(folder: Path, *flags: str):
    args = pd_ddil.parse_args(["--teacher", str(folder / "gc"), "--output_dir", str(folder / "run"), "--overwrite", *flags])
    return pd_ddil.setup(args, Accelerator())


def open_part(run, phase, part: int, source: Path):
    network, teacher, student_unet = pd_ddil.open_phase(run, phase, source)
    return pd_ddil.prepare_part(run, phase, network, teacher, student_unet, rows={})


def ddil_over_plain() -> None:
    """Forward and D_DAgger updates in turn; a part's time follows from the shares in which it mixes them."""
    with tempfile.TemporaryDirectory() as folder:
        source = tiny_gc(Path(folder) / "gc")
        run, phases = open_run(Path(folder))
        whole = torch.zeros(2, 2)  # (time, forwards) x (DDIL, plain)
        for phase in phases:
            stage = torch.zeros(2, 2)
            for part, updates in enumerate(phase.updates):
                nets, trained, optimizer = open_part(run, phase, part, source)
                run.buffer.clear()
                run.progress["credit"] = 0.0
                cost = {}
                for s in ("forward", "dagger"):
                    pd_ddil.update_student(run, phase, part, s, nets, trained, optimizer)  # warm-up; fills D_DAgger
                    cost[s] = torch.zeros(2)
                run.progress["credit"], rounds = 0.0, 0
                # whole cycles of one collection and its uses; at least 16 updates of each kind
                while rounds < 16 or run.progress["credit"] >= run.args.batch_size:
                    for s in ("forward", "dagger"):
                        before = run.progress["forwards"]
                        elapsed = seconds(pd_ddil.update_student, run, phase, part, s, nets, trained, optimizer)
                        cost[s] += torch.tensor([elapsed, run.progress["forwards"] - before])
                    rounds += 1
                p = phase.p_forward[part]
                mixture = p * cost["forward"] + (1 - p) * cost["dagger"]
                stage += updates / rounds * torch.stack([mixture, cost["forward"]], dim=1)
            for unit, (ddil, plain) in zip(("time", "forwards"), stage.tolist()):
                report(f"pd.ddil_over_plain.{phase.name}.{unit}", ddil / plain)
            whole += stage
        for unit, (ddil, plain) in zip(("time", "forwards"), whole.tolist()):
            report(f"pd.ddil_over_plain.whole.{unit}", ddil / plain)


def update_over_unet(name: str, make_gc, flags: list[str], rounds: int, with_optimizer: bool) -> None:
    """Plain PD updates and their bare UNet work (two teacher forwards, the student's forward and backward) in turn."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = make_gc(folder / "gc")
        run, phases = open_run(folder, "--data", str(few_images(folder / "data")), *flags)
        nets, trained, optimizer = open_part(run, phases[-1], 0, source)
        network = nets.counted[0]
        x, _, cond = run.data_batch()
        t = torch.full((len(x),), 500)
        inputs = dict(encoder_hidden_states=cond["prompt"], timestep_cond=torch.randn(len(x), W_EMBEDDING_DIM))

        def bare():
            with torch.no_grad():
                for _ in range(2):
                    network.unet(x, t, **inputs)
            trained(x, t, **inputs).sample.mean().backward()
            trained.zero_grad()

        def update():
            pd_ddil.update_student(run, phases[-1], 0, "forward", nets, trained, optimizer)

        if not with_optimizer:
            optimizer.step = lambda: None
        update(), bare()
        updates, bares = zip(*[(seconds(update), seconds(bare)) for _ in range(rounds)])
        report(f"pd.update_over_unet.{name}", statistics.median(updates) / statistics.median(bares))


def set_up(script, folder: Path, *flags: str):
    """The run of lcm_ddil.py or dmd2_ddil.py; folder/teacher, where there is one, is distilled."""
    teacher = ["--teacher", str(folder / "teacher")] * (folder / "teacher").exists()
    args = script.parse_args([*teacher, "--output_dir", str(folder / "run"), "--overwrite", *flags])
    return script.setup(args, Accelerator())


def on_tiny(benchmark, *args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        benchmark("tiny", Path(folder), [], *args)


def on_mid(benchmark, *args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        mid_teacher(folder / "teacher")
        benchmark("mid", folder, ["--data", str(few_images(folder / "data")), "--global_batch_size", "4"], *args)


def open_lcm(folder: Path, *flags: str):
    """(run, nets, trained, optimizer) of lcm_ddil.py."""
    run = set_up(lcm_ddil, folder, *flags)
    return run, *lcm_ddil.prepare(run, run.pipe.unet, run.pipe.scheduler.config.prediction_type, None)


def lcm_ddil_over_plain(rounds: int = 48) -> None:
    """Forward and student updates in turn; the run's time follows from the shares in which its parts mix them."""
    with tempfile.TemporaryDirectory() as folder:
        run, nets, trained, optimizer = open_lcm(Path(folder))
        cost = {source: torch.zeros(2) for source in ("forward", "student")}
        for update in range(-1, rounds):
            for source in cost:
                before = run.progress["forwards"]
                elapsed = seconds(lcm_ddil.update_student, run, source, nets, trained, optimizer)
                if update >= 0:  # one to warm up
                    cost[source] += torch.tensor([elapsed, run.progress["forwards"] - before])
        p = statistics.mean(run.args.p_forward)  # over equal parts
        ratios = (p * cost["forward"] + (1 - p) * cost["student"]) / cost["forward"]
        for unit, ratio in zip(("time", "forwards"), ratios.tolist()):
            report(f"lcm.ddil_over_plain.{unit}", ratio)


def lcm_update_over_unet(name: str, folder: Path, flags: list[str], rounds: int, with_optimizer: bool) -> None:
    """Plain LCM updates and their bare UNet work (guided teacher, target, the student's forward and backward) in turn."""
    run, nets, trained, optimizer = open_lcm(folder, *flags)
    network, target = nets.counted[0], nets.ema
    x, ids = run.data.next()
    cond = run.draw_cond(ids)
    t = torch.full((len(x),), 499)
    prompt, w = cond["prompt"], torch.randn(len(x), W_EMBEDDING_DIM)

    def bare():
        with torch.no_grad():
            network.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([prompt, prompt]))
            target(x, t, prompt, timestep_cond=w)
        trained(x, t, prompt, timestep_cond=w).sample.mean().backward()
        trained.zero_grad()

    def update():
        lcm_ddil.update_student(run, "forward", nets, trained, optimizer)

    if not with_optimizer:
        optimizer.step = lambda: None
    update(), bare()
    updates, bares = zip(*[(seconds(update), seconds(bare)) for _ in range(rounds)])
    report(f"lcm.update_over_unet.{name}", statistics.median(updates) / statistics.median(bares))


def lcm_networks() -> None:
    for decay in ("0.95", "0"):
        with tempfile.TemporaryDirectory() as folder:
            _, nets, _, _ = open_lcm(Path(folder), "--ema_decay", decay)
            report(f"lcm.networks.ema_decay_{decay}", len({id(model.unet) for model in nets.counted}), "UNets")


def few_tars(folder: Path, n: int = 512) -> Path:
    """Images and captions as tars in webdataset's layout, which both read."""
    from datasets import load_dataset

    with patch.dict(os.environ):  # the tests have a cache of their own
        from conftest import save_tar

    folder.mkdir()
    data = load_dataset(str(ROOT / "assets/tiny/data"))
    for split, count in (("train", n), ("test", 16)):
        save_tar(folder / f"{split}.tar", data[split].select(range(count)))
    return folder


def process_cost(command: list[str], cwd: Path) -> tuple[float, float]:
    """(seconds, peak resident GiB) of a program."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *command], cwd=cwd, stdout=log, stderr=log, env=os.environ | {"HF_DATASETS_CACHE": f"{cwd}/cache"})
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(log.read().decode()[-2000:])
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def lcm_over_diffusers(rounds: int = 3, few: int = 10, many: int = 60, batch_size: int = 32) -> None:
    """Programs as users start them; a long run less a short one leaves out start and end."""
    if "PEER" not in os.environ:
        return print("lcm.over_diffusers: name diffusers' script by PEER, as told on top of this file", flush=True)
    teacher = ROOT / "assets/tiny/pipeline"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data, peer = few_tars(folder / "data"), folder / "peer.py"
        # its empty prompt is always 77 tokens long, those of the tiny pipeline are shorter
        peer.write_text(Path(os.environ["PEER"]).read_text().replace("max_length=77", "max_length=tokenizer.model_max_length"))
        ours = f"{ROOT}/lcm_ddil.py --teacher {teacher} --data {data} --p_forward 1 --reflect none --overwrite --save_every 10000 "
        ours += f"--global_batch_size {batch_size} --output_dir ours --updates"
        theirs = f"{peer} --pretrained_teacher_model {teacher} --train_shards_path_or_url {data}/train.tar --resolution 32 --report_to all "
        theirs += f"--train_batch_size {batch_size} --dataloader_num_workers 1 --max_train_samples 512 --loss_type huber --w_min 0.5 "
        theirs += "--w_max 5 --unet_time_cond_proj_dim 256 --validation_steps 10000 --checkpointing_steps 10000 --output_dir theirs --max_train_steps"
        commands = {"theirs": (theirs, []), "cached": (ours, ["--cache_latents"]), "uncached": (ours, ["--no-cache_latents"])}
        time_of, memory_of = {name: [] for name in commands}, {name: [] for name in commands}
        for round in range(-1, rounds):  # one to warm up, which caches the latents
            for name, (flags, more) in commands.items():
                (short, _), (long, peak) = (process_cost([*flags.split(), str(updates), *more], folder) for updates in (few, many))
                if round >= 0:
                    time_of[name].append((long - short) / (many - few))
                    memory_of[name].append(peak)
        for name in ("cached", "uncached"):
            report(f"lcm.over_diffusers.{name}.time", statistics.median(time_of[name]) / statistics.median(time_of["theirs"]))
            report(f"lcm.over_diffusers.{name}.memory", max(memory_of[name]) / max(memory_of["theirs"]))


def open_dmd2(folder: Path, *flags: str):
    """(run, nets, student, critic) of dmd2_ddil.py."""
    run = set_up(dmd2_ddil, folder, *flags)
    return run, *dmd2_ddil.prepare(run, None)


def dmd2_ddil_over_plain(name: str, folder: Path, flags: list[str], rounds: int) -> None:
    """Iterations of each source, length of trajectory and kind in turn; a run's time follows from their shares."""
    run, nets, student, critic = open_dmd2(folder, *flags)
    cost, ratio = {source: torch.zeros(2) for source in ("student", "teacher")}, run.args.fake_updates
    for round in range(-1, rounds):
        for transitions in range(len(run.timesteps)):
            for update_student, weight in ((True, 1), (False, ratio - 1)):
                for source in cost:
                    before = run.progress["forwards"]
                    inputs = run, nets, source, [source] * transitions, student, critic, update_student
                    elapsed = seconds(dmd2_ddil.iterate, *inputs)
                    if round >= 0:  # one to warm up
                        cost[source] += weight * torch.tensor([elapsed, run.progress["forwards"] - before])
    priors = {source: values[0] for source, values in dmd2_ddil.priors_of(run.args).items() if source in cost}
    ratios = sum(priors[source] * cost[source] for source in cost) / cost["student"]
    for unit, value in zip(("time", "forwards"), ratios.tolist()):
        report(f"dmd2.ddil_over_plain.{name}.{unit}", value)


def dmd2_update_over_unet(name: str, folder: Path, flags: list[str], rounds: int, with_optimizer: bool) -> None:
    """An iteration that trains the student and one that does not, from pure noise, and their bare UNet work in turn: student;
    guided teacher, fake score and the GAN's gradient through the encoder; the critic's two losses."""
    run, nets, student, critic = open_dmd2(folder, *flags)
    network, module = nets.counted[0], critic.network
    x, cond = run.batch("forward")
    prompt, t = cond["prompt"], torch.full((len(x),), 499)
    twice = [torch.cat([value, value]) for value in (x, t, prompt)]

    def bare(update_student: bool):
        with torch.set_grad_enabled(update_student):
            x_g = student.network(x, t, prompt).sample
        if update_student:
            with torch.no_grad():
                network.unet(*twice)
                module(x, t, prompt)
            leaf = x.clone().requires_grad_(True)
            torch.autograd.grad(module(leaf, t, prompt, judged=True)[0].sum(), leaf)
            x_g.mean().backward()
            student.network.zero_grad()
        (module(x, t, prompt).sample.mean() + module(*twice, judged=True)[0].mean()).backward()
        module.zero_grad()

    def update(update_student: bool):
        dmd2_ddil.iterate(run, nets, "student", [], student, critic, update_student)

    if not with_optimizer:
        student.optimizer.step = critic.optimizer.step = lambda: None
    times = {}
    for both in (True, False):
        update(both), bare(both)
        pairs = [(seconds(update, both), seconds(bare, both)) for _ in range(rounds)]
        times[both] = [statistics.median(column) for column in zip(*pairs)]
    ratio = run.args.fake_updates
    ours, theirs = (times[True][i] + (ratio - 1) * times[False][i] for i in range(2))
    report(f"dmd2.update_over_unet.{name}", ours / theirs)


def peak_memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        mid_gc(folder / "gc"), few_images(folder / "data")
        peaks = {}
        for arm, prior in (("ddil", "0.5"), ("plain", "1")):
            flags = f"--teacher {folder}/gc --data {folder}/data --output_dir {folder}/{arm} --p_forward {prior} --teacher_steps 8 "
            flags += "--updates 4=8 --global_batch_size 4 --eval_prompts 4"
            code = "import pd_ddil, resource, sys; pd_ddil.main(sys.argv[1:]); "
            code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
            command = [sys.executable, "-c", code, *flags.split()]
            out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            peaks[arm] = int(out.split()[-1]) / 2**20
        report("pd.peak_memory.plain", peaks["plain"], "GiB")
        report("pd.peak_memory.ddil_over_plain", peaks["ddil"] / peaks["plain"])


def evaluate_over_stock(name: str, make, steps: int, batch_size: int, rounds: int) -> None:
    """Six batches of ours and of a user's own loop in turn; both leave PNG files."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = str(make(folder / "model"))
        candidate = evaluate.Candidate("", model, steps, 4.0, "trained")
        accelerator = Accelerator()
        pipe, _ = evaluate.open_candidate(candidate, accelerator)
        ev = SimpleNamespace(args=SimpleNamespace(batch_size=batch_size, overwrite=False), out=folder, accelerator=accelerator)
        sample, prompts = evaluate.pipeline_sampler(pipe, candidate, 0), ["a red seven on a yellow background"] * (6 * batch_size)

        def ours(round: int):
            evaluate.generate(ev, str(round), {"seed": 0}, sample, prompts)

        def stock(round: int):
            generator = torch.Generator().manual_seed(round)
            for i in range(0, len(prompts), batch_size):
                images = pipe(prompts[i : i + batch_size], generator=generator, num_inference_steps=steps, guidance_scale=4.0).images
                for j, image in enumerate(images):
                    image.save(folder / f"{round}-{i + j}.png")

        ours(-1), stock(-1)
        times = [(seconds(ours, round), seconds(stock, round)) for round in range(rounds)]
        mine, theirs = (statistics.median(column) for column in zip(*times))
        report(f"evaluate.over_stock.{name}", theirs / mine)


def evaluate_memory() -> None:
    code = """
import resource, sys, torch, evaluate
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from PIL import Image
file, n = Path(sys.argv[1]), int(sys.argv[2])
Image.effect_noise((256, 256), 50).convert("RGB").save(file)
projection = torch.randn(3 * 16 * 16, 2048, generator=torch.Generator().manual_seed(0))
pixels = lambda images: evaluate.to_uint8([evaluate.central_square(i, 16) for i in images]).flatten(1).float()
ev = SimpleNamespace(accelerator=Accelerator(), args=SimpleNamespace(batch_size=100),
                     nets={"fid": SimpleNamespace(images=lambda images: pixels(images) @ projection)})
statistics = evaluate.Evaluation.compute_statistics(ev, "fid", evaluate.Images([file] * n))
evaluate.frechet_distance(statistics, statistics)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    with tempfile.TemporaryDirectory() as folder:
        for n in (3000, 30000):
            command = [sys.executable, "-c", code, f"{folder}/image.png", str(n)]
            out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            report(f"evaluate.memory.{n}", int(out.split()[-1]) / 2**20, "GiB")


def weak_scaling(rounds: int = 2) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder, found = Path(folder), {1: [], 2: []}
        mid_gc(folder / "gc"), few_images(folder / "data")
        for round in range(rounds):
            for n in found:
                out = folder / f"{round}-{n}"
                flags = f"--teacher {folder}/gc --data {folder}/data --output_dir {out} --p_forward 0.5 --teacher_steps 8 --log_every 1 "
                flags += f"--updates 4=12 --global_batch_size {4 * n} --batch_size 4 --eval_prompts 4"
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), "pd_ddil.py"]
                subprocess.run([sys.executable, *launcher, *flags.split()], cwd=ROOT, capture_output=True, check=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
                with (out / "metrics.csv").open(newline="") as file:
                    found[n] += [float(row["seconds"]) for row in csv.DictReader(file) if row["seconds"]][2:]  # two to warm up
        report("pd.weak_scaling", statistics.mean(found[1]) / statistics.mean(found[2]))


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
    """Of one sample through the UNet of a pipeline, counted on tensors without values."""
    from torch.utils.flop_counter import FlopCounterMode

    pipe = load_pipeline(str(folder))
    prompts = PromptEncoder(pipe, "cpu")
    one = prompts.encode(prompts.tokenize([""])) | {"w": torch.ones(1)}
    network = UNetModel(pipe.unet.to("meta"), None, "", nullcontext)
    with FlopCounterMode(display=False) as counter:
        network.run(torch.zeros(1, *latent_shape(pipe), device="meta"), torch.zeros(1, device="meta"), {k: v.to("meta") for k, v in one.items()})
    return counter.get_total_flops()


def run_full(script: str, flags: list, folder: Path, updates: int) -> tuple[float, float, float] | None:
    """(seconds, UNet forwards) of an update, over the second half of the run, and peak GiB; None where memory is too small."""
    code = f"import {script}, torch, resource, sys; {script}.main(sys.argv[1:]); "
    code += "print(torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    command = [sys.executable, "-c", code, *flags, "--output_dir", folder / "run", "--overwrite", "--log_every", 1, "--save_every", 10**6]
    process = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"})
    if "out of memory" in process.stderr:
        return None
    if process.returncode:
        raise SystemExit(process.stderr[-2000:])
    with (folder / "run/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["seconds"]][-updates // 2 - 1 :]
    forwards = float(rows[-1]["unet_forwards"]) - float(rows[0]["unet_forwards"])
    return statistics.mean(float(row["seconds"]) for row in rows[1:]), forwards / (len(rows) - 1), float(process.stdout.split()[-1])


FULL = {  # the arguments that make an update what it is in the recipes; then those of plain distillation
    "pd_ddil": ("gc", "--teacher_steps 8 --student_steps 4 --updates 4={} --p_forward 0.5 --student_rate 0.8 --eval_prompts 2", "--p_forward 1"),
    "lcm_ddil": ("teacher", "--updates {} --p_forward 0.5", "--p_forward 1"),
    "dmd2_ddil": ("teacher", "--updates {} --fake_updates 10", "--p_student 1"),
}


def full_size(kind: str) -> None:
    with patch.dict(os.environ):  # the tests hide GPUs
        from conftest import save_teacher
        from test_full_size import NARROW, SD15, SSD1B

    on_gpu = torch.cuda.is_available()
    real = {"sd15": SD15 | dict(block_out_channels=(320, 640, 1280, 1280), sample_size=64),
            "ssd1b": SSD1B | dict(block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), sample_size=128)}  # fmt: skip
    unet, batches, updates = (real[kind], (64, 32, 16, 8, 4, 2, 1), 24) if on_gpu else (NARROW[kind], (4,), 4)
    rate = matrix_rate("cuda", 8192) if on_gpu else matrix_rate("cpu", 1024)
    report("full.matrix_rate", rate / 1e12, "TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data, xl = few_images(folder / "data"), kind == "ssd1b"
        save_teacher(folder / "gc", xl=xl, prediction_type="v_prediction", time_cond_proj_dim=W_EMBEDDING_DIM, **unet)
        flops = forward_flops(save_teacher(folder / "teacher", xl=xl, **unet))
        report(f"full.{kind}.forward", flops / 1e9, "GFLOP")
        for script, (teacher, ours, plain) in FULL.items():
            fitting, arms = batches, {"plain": plain, "ddil": "", "plain.compiled": f"{plain} --compile", "ddil.compiled": "--compile"}
            time_of = {}
            for arm, more in arms.items():
                for batch_size in fitting:
                    flags = ["--teacher", folder / teacher, "--data", data, "--global_batch_size", batch_size, "--gradient_checkpointing"]
                    if found := run_full(script, [*flags, *ours.format(updates).split(), *more.split()], folder, updates):
                        break
                else:
                    print(f"full.{kind}.{script}.{arm}: a batch of {fitting[-1]} does not fit", flush=True)
                    continue
                fitting, (time_of[arm], forwards, gib) = (batch_size,), found
                name = f"full.{kind}.{script}.{arm}"
                report(f"{name}.batch_size", batch_size, "samples")
                report(f"{name}.update", time_of[arm], "s")
                report(f"{name}.memory", gib, "GiB")
                report(f"{name}.utilisation", forwards * flops / time_of[arm] / rate)
            for compiled in ("", ".compiled"):
                if {f"ddil{compiled}", f"plain{compiled}"} <= time_of.keys():
                    report(f"full.{kind}.{script}.ddil_over_plain{compiled}", time_of[f"ddil{compiled}"] / time_of[f"plain{compiled}"])


BENCHMARKS = {
    "pd.ddil_over_plain": ddil_over_plain,
    "pd.update_over_unet.tiny": lambda: update_over_unet("tiny", tiny_gc, [], 30, with_optimizer=False),
    "pd.update_over_unet.mid": lambda: update_over_unet("mid", mid_gc, ["--global_batch_size", "4"], 8, with_optimizer=True),
    "pd.peak_memory": peak_memory,
    "pd.weak_scaling": weak_scaling,
    "lcm.ddil_over_plain": lcm_ddil_over_plain,
    "lcm.update_over_unet.tiny": lambda: on_tiny(lcm_update_over_unet, 30, False),
    "lcm.update_over_unet.mid": lambda: on_mid(lcm_update_over_unet, 8, True),
    "lcm.networks": lcm_networks,
    "lcm.over_diffusers": lcm_over_diffusers,
    "dmd2.ddil_over_plain.tiny": lambda: on_tiny(dmd2_ddil_over_plain, 3),
    "dmd2.ddil_over_plain.mid": lambda: on_mid(dmd2_ddil_over_plain, 1),
    "dmd2.update_over_unet.tiny": lambda: on_tiny(dmd2_update_over_unet, 30, False),
    "dmd2.update_over_unet.mid": lambda: on_mid(dmd2_update_over_unet, 6, True),
    "full.sd15": lambda: full_size("sd15"),
    "full.ssd1b": lambda: full_size("ssd1b"),
    "evaluate.over_stock.tiny.4": lambda: evaluate_over_stock("tiny.4", tiny_gc, 4, 50, 7),
    "evaluate.over_stock.tiny.32": lambda: evaluate_over_stock("tiny.32", tiny_gc, 32, 50, 3),
    "evaluate.over_stock.mid.4": lambda: evaluate_over_stock("mid.4", mid_gc, 4, 4, 3),
    "evaluate.memory": evaluate_memory,
}

if __name__ == "__main__":
    chosen = [name for name in BENCHMARKS if not sys.argv[1:] or any(name.startswith(arg) for arg in sys.argv[1:])]
    if not chosen:
        raise SystemExit(f"no benchmark {sys.argv[1:]}; there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        BENCHMARKS[name]()
