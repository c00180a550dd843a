"""End to end: whole runs, killed runs, two processes, bad input, and README. The networks are random and tiny; what is
checked is that everything fits together, and that a run is the same run however it is interrupted."""

import importlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import sys

import pytest
import torch
from conftest import ROOT, W_RANGE, change_json, rows_of, run_here, run_script, save_images, save_teacher
from conftest import scale_weights, weights_of
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

import common
from common import CLEAN, PromptEncoder, UNetModel, last_checkpoint, load_images, load_pipeline, load_schedule
from common import noise_of, student_rollout, timestep_grid, with_guidance

SMALL = "--global_batch_size 4 --warmup 1 --log_every 1 --save_every 3 --learning_rate 1e-3"
FLAGS = {
    "pd_ddil": f"{SMALL} --guidance_range 2 5 --teacher_steps 8 --student_steps 2 --max_updates 2 --p_forward 0.5 "
    "--buffer_size 64 --eval_prompts 4",
    "lcm_ddil": f"{SMALL} --guidance_range 2 5 --updates 9 --p_forward 0.4 --p_teacher 0.3",
    "dmd2_ddil": f"{SMALL} --updates 7 --fake_updates 2 --p_forward 0.2",
}
UPDATES = {"pd_ddil": 12, "lcm_ddil": 9, "dmd2_ddil": 7}  # in all; PD: v, gc, 8 -> 4 and 4 -> 2 in two parts each
FEWER = {
    "pd_ddil": "--teacher_steps 4 --max_updates 1",
    "lcm_ddil": "--updates 2 --teacher_steps 8 --student_steps 2 --rollout_steps 2",
    "dmd2_ddil": "--updates 2 --teacher_steps 4",
}
each_script = pytest.mark.parametrize("script", FLAGS)


def arguments(script, teacher, data, folder, *more) -> list[str]:
    name, *flags = script.split()
    return [
        *map(str, ["--teacher", teacher, "--data", data, "--output_dir", folder, *FLAGS[name].split(), *flags, *more])
    ]


# --- processes that have all imports behind them ---

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload([
    "test_scripts", "pd_ddil", "accelerate", "datasets", "transformers.models.clip.modeling_clip",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
])  # fmt: skip


def launch(log, *argv, ranks=1, stop=None, notes=None, env=None) -> list[int]:
    """Exit codes of `torchrun --nproc_per_node RANKS argv`; what they print is in `log`. `stop` is (signal, place, n): the
    first rank gets the signal at its n-th operation on a file whose path has `place` in it; by SIGKILL all ranks end."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        mine = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
        mine = {name: str(value) for name, value in mine.items()} | {"MASTER_ADDR": "localhost"} if ranks > 1 else {}
        inputs = (
            log,
            [*map(str, argv)],
            mine | (env or {}),
            stop if rank == 0 else None,
            notes and notes / f"{rank}.json",
        )
        processes.append(FRESH.Process(target=run_as_rank, args=inputs))
        processes[-1].start()
    processes[0].join(200)
    if processes[0].exitcode == -signal.SIGKILL:
        [process.kill() for process in processes]
    [process.join(200) for process in processes]
    return [process.exitcode for process in processes]


def run_as_rank(log, argv, env, stop, notes) -> None:
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.environ |= env
    if notes:
        take_notes(notes)
    if stop:
        signal_myself(*stop)
    sys.argv = argv
    runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def signal_myself(number, place: str, n: int) -> None:
    """Files are all that a kill leaves behind, so the moments before an operation on one are all that there are."""
    seen = []

    def count(event, args):
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree") and place in str(
            args[0]
        ):
            seen.append(event)
            if len(seen) == n:
                os.kill(os.getpid(), number)

    sys.addaudithook(count)


def take_notes(file) -> None:
    """Into a file the sources and the rows of the data that this process drew, and its forwards after each update."""
    notes = {"sources": [], "rows": [], "forwards": []}

    def noting(owner, method, column, value):
        original = getattr(owner, method)

        def noted(self, *args):
            rows = self.rows(self.k) if column == "rows" else None  # before they are drawn
            result = original(self, *args)
            notes[column].append(value(self, rows, result))
            file.write_text(json.dumps(notes))
            return result

        setattr(owner, method, noted)

    noting(common.SamplingPrior, "draw", "sources", lambda self, rows, source: source)
    noting(common.Run, "log", "forwards", lambda self, rows, result: self.progress["forwards"])
    for method in ("next", "next_ids"):
        noting(common.LatentData, method, "rows", lambda self, rows, result: rows.tolist())


# --- whole runs ---


@pytest.fixture(scope="session")
def finished(tmp_path_factory, teacher_folder, data_folder):
    """finished("SCRIPT FLAGS", ranks): the folder of a run that nothing interrupted."""
    folders = {}

    def of(script: str, ranks: int = 1):
        if (script, ranks) not in folders:
            folder = folders[script, ranks] = tmp_path_factory.mktemp("finished") / "run"
            log, argv = folder.with_name("log"), arguments(script, teacher_folder, data_folder, folder)
            codes = launch(log, f"{script.split()[0]}.py", *argv, ranks=ranks, notes=log.parent if ranks > 1 else None)
            assert codes == [0] * ranks and "starting at update 1" in log.read_text(), log.read_text()
        return folders[script, ranks]

    return of


def assert_same_run(folder, reference) -> None:
    """All weights to the last bit, and every figure of metrics.csv but the seconds."""
    files = [path.relative_to(reference) for path in reference.glob("**/unet/*.safetensors")]
    assert files and {path.relative_to(folder) for path in folder.glob("**/unet/*.safetensors")} == {*files}
    for file in files:
        assert distance(*(weights_of(run / file.parent.parent) for run in (folder, reference))) == 0, file
    ours, theirs = ([row | {"seconds": ""} for row in rows_of(run)] for run in (folder, reference))
    assert [row["total_updates"] for row in ours] == [row["total_updates"] for row in theirs]
    assert ours == theirs


def distance(a: dict, b: dict) -> float:
    """Between two UNets, over the weights of the second."""
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in b) ** 0.5)


@each_script
def test_run_folder(script, finished, teacher_folder):
    folder, stages = finished(script), ["v", "gc", "4", "2"] * (script == "pd_ddil")
    expected = {"pipeline", "checkpoints", "samples", "metrics.csv", "config.json", "common.py", f"{script}.py"}
    assert {path.name for path in folder.iterdir()} - {"stages", "paired_reference.safetensors"} == expected
    assert not [*folder.rglob("*.tmp")] and len([*(folder / "checkpoints").iterdir()]) == 1
    for file in ("common.py", f"{script}.py"):
        assert (folder / file).read_bytes() == (ROOT / file).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["teacher"] == str(teacher_folder) and config["world_size"] == 1 and config["mixed_precision"] == "no"
    pictures = [Image.open(file).convert("L").getextrema() for file in (folder / "samples").glob("*.png")]
    assert len(pictures) > 3 and all(low < 50 and high > 200 for low, high in pictures)
    updates = [int(row["total_updates"]) for row in rows_of(folder) if row["seconds"]]
    assert updates == [*range(1, UPDATES[script] + 1)]
    assert {path.name for path in folder.glob("stages/*")} == {*stages}
    networks = [teacher_folder, *[folder / "stages" / stage for stage in stages], folder / "pipeline"]
    weights = [*map(weights_of, networks)]  # each stage starts from the one before, the last one is the pipeline
    moved = [distance(after, before) for before, after in zip(weights, weights[1:])]
    assert all(1e-3 < way < 1 for way in moved[: len(stages) or 1]) and not any(moved[len(stages) or 1 :])


def test_metrics_of_pd(finished):
    """One source a mini-batch, on the student's timesteps, and the forwards that it takes: for each of B samples v 3
    (backward = 2), guidance 2 + 3, halvings 2 + 3 by forward diffusion and 3 from D_DAgger, to which a rollout of B prompts
    through M intervals adds B (2 M - 1) to B (3 M - 2)."""
    before, B = 0, 4
    for row in (row for row in rows_of(finished("pd_ddil")) if row["loss"]):
        spent, before = int(row["unet_forwards"]) - before, int(row["unet_forwards"])
        (source,) = [source for source in ("forward", "dagger") if row[f"loss_{source}"]]
        assert row[f"loss_{source}"] == row["loss"] and all(float(row[name]) > 0 for name in ("lr", "grad_norm"))
        M = int(row["phase"]) if row["phase"].isdigit() else None
        if source == "forward":
            assert spent == (3 if row["phase"] == "v" else 5) * B
        else:
            collected = spent - 3 * B
            assert B * (2 * M - 1) <= collected <= B * (3 * M - 2) if row["student_moves"] else collected == 0
        timesteps = {int(name[6:]) for name in row if re.match(r"loss_t\d", name) and row[name]}
        assert not M or timesteps <= set(timestep_grid(M)[source == "dagger" :])  # [D16] no start states


@pytest.mark.parametrize("stage, steps", [("v", 8), ("gc", 8), ("gc", 2), ("4", 4), ("2", 2)])
def test_stage_in_stock_diffusers_and_its_paired_error(stage, steps, finished, data_folder):
    """A saved stage in plain diffusers gives our rollout's images within 1/255: w embedding, grid, clean end. Its paired
    error is the RMS distance to stages/gc at 8 steps, from the same noise, held-out prompts and w."""
    held_out, z = load_images(str(data_folder))[1], noise_of(range(4), (4, 8, 8), seed=1)
    captions = [held_out[i] for i in (0, 2, 4, 6)]
    w = W_RANGE[0] + (W_RANGE[1] - W_RANGE[0]) * torch.rand(4, generator=torch.Generator().manual_seed(1))

    def end_points(stage, steps, w):
        pipe = load_pipeline(str(finished("pd_ddil") / "stages" / stage))
        prompts, schedule = PromptEncoder(pipe, "cpu"), load_schedule(pipe)
        model = UNetModel(pipe.unet, schedule, "v_prediction", torch.no_grad)
        model = with_guidance(model, prompts.null()) if stage == "v" else model
        cond = prompts.encode(prompts.tokenize(captions)) | {"w": w}
        return pipe, student_rollout(schedule, model, z, [*timestep_grid(steps), CLEAN], cond)[-1]

    pipe, latents = end_points(stage, steps, torch.full((4,), 4.0))
    with torch.no_grad():
        ours = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    stock = DiffusionPipeline.from_pretrained(finished("pd_ddil") / "stages" / stage)
    settings = dict(num_inference_steps=steps, latents=z, output_type="pt")
    images = stock(captions, guidance_scale=4.0, **settings).images
    assert stock.scheduler.timesteps.tolist() == timestep_grid(steps)
    assert (ours.clamp(0, 1) - images).abs().max() < 1 / 255
    assert not torch.equal(stock(captions, guidance_scale=7.0, **settings).images, images)  # it does listen to w
    for row in (row for row in rows_of(finished("pd_ddil")) if row["paired_error"] and row["phase"] == stage):
        for name, other in (("paired_error", stage), ("paired_error_undistilled", "gc")):
            difference = end_points(other, steps, w)[1] - end_points("gc", 8, w)[1]
            assert difference.pow(2).mean().sqrt().item() == pytest.approx(float(row[name]), abs=1e-4)


WAYS = {  # (flags, how far from the plain run the student may end, of the way from its teacher)
    "strict": ("--gradient_checkpointing", 1e-2),
    "compiled": ("--compile", 1e-5),
    "bf16": ("", 0.5),
}


@each_script
def test_other_ways_train_the_same(script, tmp_path, teacher_folder, data_folder, monkeypatch):
    """On a device that refuses what a GPU refuses, with compiled networks (the compiler itself is told to do nothing, or
    this would take minutes), in bf16 (weights and everything around the networks stay in fp32)."""

    def flags(way, *more):
        folder = tmp_path / way / "run"
        return arguments(script, teacher_folder, data_folder, folder, *FEWER[script].split(), *more)

    run_here(*flags("plain"), script=f"{script}.py")
    before, plain = weights_of(teacher_folder), weights_of(tmp_path / "plain/run/pipeline")
    for way, (more, tolerance) in WAYS.items():
        (tmp_path / way).mkdir()
        if way == "compiled":
            compiled, compile_module = [], torch.nn.Module.compile
            monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(net) or compile_module(net))
            with torch.compiler.set_stance("force_eager"):
                run_here(*flags(way, more), script=f"{script}.py")
            assert len(compiled) >= {"pd_ddil": 6, "lcm_ddil": 3, "dmd2_ddil": 3}[script]
        else:
            argv = ["tests/strict_device.py"] * (way == "strict") + [f"{script}.py", *flags(way, *more.split())]
            env = {"ACCELERATE_MIXED_PRECISION": "bf16"} if way == "bf16" else {}
            assert launch(tmp_path / way / "log", *argv, env=env) == [0], (tmp_path / way / "log").read_text()
        ours = weights_of(tmp_path / way / "run/pipeline")
        assert {weight.dtype for weight in ours.values()} == {torch.float32}
        assert distance(ours, plain) < tolerance * distance(plain, before), way


# --- interrupted runs ---


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script", [*FLAGS, "lcm_ddil --streaming"])
def test_interrupted_run_is_the_same_run(script, ranks, finished, tmp_path, teacher_folder, data_folder):
    """kill -9 while a checkpoint is written, between two updates, at the end of a phase; SIGTERM saves and leaves."""
    folder, log, name = tmp_path / "run", tmp_path / "log", script.split()[0]
    chance, results = random.Random(f"{script} {ranks}"), "/stages/" if name == "pd_ddil" else "/pipeline"
    stops = [
        (signal.SIGKILL, "/checkpoints/", chance.randint(2, 10)),
        (signal.SIGTERM, "metrics.csv", chance.randint(2, 3)),
    ]
    if ranks == 1:
        stops += [
            (signal.SIGKILL, "metrics.csv", chance.randint(2, 3)),
            (signal.SIGKILL, results, chance.randint(1, 20)),
        ]
    flags = arguments(script, teacher_folder, data_folder, folder)
    for stop in [*stops, None, None]:  # the last one finds nothing left to do
        log.unlink(missing_ok=True)
        code = launch(log, f"{name}.py", *flags, ranks=ranks, stop=stop)[0]
        is_killed = stop is not None and stop[0] == signal.SIGKILL
        assert code == (-signal.SIGKILL if is_killed else 0), (stop, log.read_text())
        if stop and not is_killed:
            (saved,) = re.findall(r"stopped after update (\d+): saved", log.read_text())
            assert int(last_checkpoint(folder / "checkpoints").name.rstrip("+")) == int(saved)
        flags = ["--resume", "--output_dir", folder]
    assert "resuming at 0" in log.read_text()
    assert_same_run(folder, finished(script, ranks))


@each_script
def test_ranks_are_in_step_and_apart(script, finished):
    """Two ranks take the same sources and run as many forwards [D14], and share neither samples nor noise."""
    folder = finished(script, 2)
    first, second = (json.loads((folder.parent / f"{rank}.json").read_text()) for rank in range(2))
    assert first["sources"] == second["sources"] and len(set(first["sources"])) > 1
    shown = [float(row["unet_forwards"]) for row in rows_of(folder) if row["unet_forwards"]]
    assert first["forwards"] == second["forwards"] and shown == [2 * forwards for forwards in first["forwards"]]
    rows = sum(first["rows"][:10] + second["rows"][:10], [])  # 40 images: an epoch at most
    assert len(rows) > 30 and len({*rows}) == len(rows)
    ours, theirs = (torch.load(last_checkpoint(folder / "checkpoints") / f"rank-{rank}.pt") for rank in range(2))
    assert torch.equal(ours["shared"], theirs["shared"]) and not torch.equal(ours["noise"], theirs["noise"])


@pytest.mark.parametrize("script, update", [("pd_ddil", 1), ("lcm_ddil", 1), ("dmd2_ddil", 1), ("pd_ddil", 3)])
def test_non_finite_loss_stops_all_ranks(script, update, tmp_path, teacher_folder, data_folder):
    """The teacher's weights are no numbers; or fp32 has none for such a w, and the phase before guidance is kept."""
    teacher, log = tmp_path / "teacher", tmp_path / "log"
    shutil.copytree(teacher_folder, teacher)
    flags = arguments(script, teacher, data_folder, tmp_path / "run", "--reflect", "none")
    if update == 1:
        scale_weights(teacher, float("nan"))
    else:
        flags += ["--guidance_range", "1e37", "1e38", "--eval_guidance_scale", "1"]
    assert launch(log, f"{script}.py", *flags, ranks=2) == [1, 1], log.read_text()
    assert re.search(
        rf"update {update}: the (loss on \w+ states|gradient's norm) is (nan|inf); stopped", log.read_text()
    )
    last = last_checkpoint(tmp_path / "run/checkpoints")
    assert (last and last.name) == (None if update == 1 else "00000002")
