"""End to end: whole runs, killed runs, two processes, bad input, and README. The networks are random and tiny; what is
checked is that everything fits together, and that a run is the same run however it is interrupted."""

import gc
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
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch._dynamo.utils import counters

import common

# isort: off
from conftest import ASCII, ROOT, change_json, refusal, read_metrics, run_here, run_script, save_images, save_teacher
from conftest import scale_weights, weights_of
from common import CLEAN, PromptEncoder, UNetModel, checkpoints_of, load_pipeline, load_schedule, noise_of, open_rows
from common import teacher_rollout, timestep_grid, with_guidance
# isort: on

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
SHORT = ["pd_ddil --teacher_steps 4 --seed 2", "lcm_ddil", "dmd2_ddil"]  # for two processes
LORA = "dmd2_ddil --lora_rank 2 --updates 11"
posix = pytest.mark.skipif(os.name != "posix", reason="has no such signals and locks")
each_script = pytest.mark.parametrize("script", FLAGS)


def arguments(script, teacher, data, folder, *more) -> list[str]:
    name, *flags = script.split()
    flags = ["--teacher", teacher, "--data", data, "--output_dir", folder, *FLAGS[name].split(), *flags, *more]
    return [*map(str, flags)]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """With four held-out captions, so that sample grids are small."""
    folder = tmp_path_factory.mktemp("images")
    save_images(folder / "train", 40, seed=0)
    save_images(folder / "test", 4, seed=1)
    return folder


# --- processes that have all imports behind them ---

FRESH = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
FRESH.set_forkserver_preload([
    "pd_ddil", "accelerate", "datasets", "transformers.models.clip.modeling_clip",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
])  # fmt: skip


def launch(log, *argv, ranks=1, stop=None, notes=None, env=None) -> list[int]:
    """Exit codes of `torchrun --nproc_per_node RANKS argv`; what they print is in `log`. `stop` is (signal, place, n): the
    first rank gets the signal at its n-th operation on a file whose path has `place` in it; by SIGKILL all ranks end."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port, "MASTER_ADDR": "localhost"}
    processes = []
    for rank in range(ranks):
        mine = world | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        mine = {name: str(value) for name, value in mine.items()} | (env or {})
        inputs = log, [*map(str, argv)], mine, stop if rank == 0 else None, notes and notes / f"{rank}.json"
        processes.append(FRESH.Process(target=run_as_rank, args=inputs))
        processes[-1].start()
    processes[0].join(200)
    for process in processes:
        if processes[0].exitcode == -9:
            process.kill()
        process.join(200)
    return [process.exitcode for process in processes]


def run_as_rank(log, argv, env, stop, notes) -> None:
    gc.freeze()  # of what was imported there is nothing to collect
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.environ |= env
    if "WORLD_SIZE" not in env:
        sys.addaudithook(refuse_network)
    if notes:
        take_notes(notes)
    if stop:
        signal_myself(*stop)
    sys.argv = argv
    runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def refuse_network(event, args) -> None:
    """No run on one process speaks to anything but files, as nothing here has a hub's name."""
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(args[1], tuple):
        raise PermissionError(f"{event} {args}")


def signal_myself(number, place: str, n: int) -> None:
    """Files are all that a kill leaves behind, so the moments before an operation on one are all that there are."""
    operations = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
    left = iter(range(n - 1, -1, -1))

    def count(event, args):
        if event in operations and place in str(args[0]) and next(left, None) == 0:
            os.kill(os.getpid(), number)

    sys.addaudithook(count)


def take_notes(file) -> None:
    """Into a file the sources and the rows of the data that this process drew, and its forwards after each update."""
    notes = {"sources": [], "rows": [], "forwards": []}

    def noting(name, function, value):
        def noted(self, *args):
            result = function(self, *args)
            notes[name].append(value(self, result))
            file.write_text(json.dumps(notes))
            return result

        return noted

    common.SamplingPrior.draw = noting("sources", common.SamplingPrior.draw, lambda prior, source: source)
    common.ShuffledRows.read = noting("rows", common.ShuffledRows.read, lambda _, read: read[0]["moments"].tolist())
    common.Run.log = noting("forwards", common.Run.log, lambda run, _: run.progress["forwards"])


# --- whole runs ---


@pytest.fixture(scope="session")
def finished(tmp_path_factory, teacher_folder, data):
    """finished("SCRIPT FLAGS", ranks): the folder of a run that nothing interrupted."""
    folders = {}

    def of(script: str, ranks: int = 1):
        if (script, ranks) not in folders:
            folder = folders[script, ranks] = tmp_path_factory.mktemp("finished") / "run"
            log, argv = folder.with_name("log"), arguments(script, teacher_folder, data, folder)
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
    ours, theirs = ([row | {"seconds": ""} for row in read_metrics(run)] for run in (folder, reference))
    assert [row["total_updates"] for row in ours] == [row["total_updates"] for row in theirs]
    assert ours == theirs


def distance(a: dict, b: dict) -> float:
    """Between two UNets, over the weights of the second."""
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in b) ** 0.5)


@each_script
def test_run_folder(script, finished, teacher_folder):
    folder, stages = finished(script), ["v", "gc", "4", "2"] * (script == "pd_ddil")
    expected = {"pipeline", "checkpoints", "samples", "metrics.csv", "config.json", "common.py", f"{script}.py"}
    assert {path.name for path in folder.iterdir()} - {"stages"} == expected
    assert not [*folder.rglob("*.tmp")] and len([*(folder / "checkpoints").iterdir()]) == 2
    for file in ("common.py", f"{script}.py"):
        assert (folder / file).read_bytes() == (ROOT / file).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["teacher"] == str(teacher_folder) and config["world_size"] == 1 and config["mixed_precision"] == "no"
    pictures = [Image.open(file).convert("L").getextrema() for file in (folder / "samples").glob("*.png")]
    assert len(pictures) > 3 and all(low < 50 and high > 200 for low, high in pictures)
    updates = [int(row["total_updates"]) for row in read_metrics(folder) if row["seconds"]]
    assert updates == [*range(1, UPDATES[script] + 1)]
    assert {path.name for path in folder.glob("stages/*")} == {*stages}
    steps = {"v": 8, "gc": 8, "pipeline": config["student_steps"]}
    for pipeline in (folder / "pipeline", *folder.glob("stages/*")):  # model cards; the licence is the teacher's
        card = (pipeline / "README.md").read_text(encoding="utf-8")
        assert "\nlicense: openrail\n" in card and f"| teacher | {teacher_folder} |" in card
        assert f"num_inference_steps={steps.get(pipeline.name, pipeline.name)}" in card
    assert ("| paired_error |" in (folder / "pipeline" / "README.md").read_text(encoding="utf-8")) == bool(stages)
    networks = [teacher_folder, *[folder / "stages" / stage for stage in stages], folder / "pipeline"]
    weights = [*map(weights_of, networks)]  # each stage starts from the one before, the last one is the pipeline
    moved = [distance(after, before) for before, after in pairwise(weights)]
    assert all(1e-3 < way < 1 for way in moved[: len(stages) or 1]) and not any(moved[len(stages) or 1 :])


@pytest.mark.parametrize("script", UPDATES)
def test_terminal(script, finished, tmp_path):
    """What comes, how far it is, and in the end a picture that exists and a line that samples, as a shell takes it."""
    folder = finished(script)
    out = folder.with_name("log").read_text()
    for words in ("is distilled on", "updates: ", "pictures in ", f"starting at update 1 of {UPDATES[script]}"):
        assert words in out, out
    assert script != "pd_ddil" or "gc 2/4: " in out and "paired error  undistilled  stage error\n    4 " in out
    assert Path(re.search(r"^look at (.+\.png)$", out, re.MULTILINE)[1]).is_file()
    (line,) = re.findall(r"^or try: (python .+)$", out, re.MULTILINE)
    if script != "pd_ddil":
        return
    subprocess.run(line.replace("python", f'"{sys.executable}"', 1), shell=True, cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "sample.png").width == 32


def test_forwards_of_pd(finished):
    """For each of B samples v 3 (backward = 2), guidance 2 + 3, halvings 2 + 3 by forward diffusion and 3 from D_DAgger, to
    which a rollout of B prompts through M intervals adds B (2 M - 1) to B (3 M - 2)."""
    before, B = 0, 4
    for row in (row for row in read_metrics(finished("pd_ddil")) if row["loss"]):
        spent, before = int(row["unet_forwards"]) - before, int(row["unet_forwards"])
        if row["loss_forward"]:
            assert spent == (3 if row["phase"] == "v" else 5) * B and not row["loss_dagger"]
        else:
            least, most = (2, 3) if row["student_moves"] else (0, 0)
            M = int(row["phase"])
            assert max(0, B * (least * M - 1)) <= spent - 3 * B <= max(0, B * (most * M - 2))


@pytest.mark.parametrize("stage, steps", [("v", 8), ("gc", 8), ("gc", 2), ("4", 4), ("2", 2)])
def test_stage_in_stock_diffusers_and_its_paired_error(stage, steps, finished, data):
    """A saved stage in plain diffusers gives our rollout's images within 1/255: w embedding, grid, clean end. Its paired
    error is the RMS distance to stages/gc at 8 reflected steps, from the same noise, held-out prompts and w; its stage
    error, that to the stage which taught it, reflected too."""
    captions, z = open_rows(str(data)).held_out, noise_of(range(4), (4, 8, 8), seed=1)
    w = 2 + 3 * torch.rand(4, generator=torch.Generator().manual_seed(1))
    support = common.load_state(checkpoints_of(finished("pd_ddil") / "checkpoints")[-1] / "rank-0.pt")["support"]

    def end_points(stage, steps, w, support=None):
        pipe = load_pipeline(str(finished("pd_ddil") / "stages" / stage))
        prompts, schedule = PromptEncoder(pipe, "cpu"), load_schedule(pipe)
        model = UNetModel(pipe.unet, schedule, "v_prediction", torch.no_grad)
        model = with_guidance(model, prompts.null()) if stage == "v" else model
        cond = prompts.encode(prompts.tokenize(captions)) | {"w": w}
        return pipe, teacher_rollout(schedule, model, z, [*timestep_grid(steps), CLEAN], cond, support)[-1]

    pipe, latents = end_points(stage, steps, torch.full((4,), 4.0))
    with torch.no_grad():
        ours = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    stock = DiffusionPipeline.from_pretrained(finished("pd_ddil") / "stages" / stage)
    settings = {"num_inference_steps": steps, "latents": z, "output_type": "pt"}
    images = stock(captions, guidance_scale=4.0, **settings).images
    assert stock.scheduler.timesteps.tolist() == timestep_grid(steps)
    assert (ours.clamp(0, 1) - images).abs().max() < 1 / 255
    assert not torch.equal(stock(captions, guidance_scale=7.0, **settings).images, images)  # it does listen to w
    for row in (row for row in read_metrics(finished("pd_ddil")) if row["paired_error"] and row["phase"] == stage):
        teacher = {"4": "gc", "2": "4"}[stage], 2 * steps
        pairs = {"paired_error": (stage, "gc", 8), "paired_error_undistilled": ("gc", "gc", 8)}
        for name, (other, *goal) in (pairs | {"stage_error": (stage, *teacher)}).items():
            difference = end_points(other, steps, w)[1] - end_points(*goal, w, support)[1]
            assert difference.pow(2).mean().sqrt().item() == pytest.approx(float(row[name]), abs=1e-4)


@each_script
def test_curves(script, finished, tmp_path):
    """Beside the reference; also of a run that is under way, once it has a row."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(finished(script), run, ignore=shutil.ignore_patterns("pipeline", "stages", "checkpoints"))
    run_here(run, "--curves", "--output_dir", out, script="evaluate.py")
    assert Image.open(out / "curves.png").convert("L").getextrema() == (0, 255)
    (run / "metrics.csv").write_text("")
    for model in run, "assets/tiny/pipeline":
        flags = ["--curves", "--output_dir", tmp_path / "none"]
        assert "no run whose metrics.csv has a row" in refusal(model, *flags, script="evaluate.py")
        assert not (tmp_path / "none").exists()


DAMAGES = {
    "truncated": lambda checkpoint: os.truncate(checkpoint / "student.pt", 1000),
    "a byte flipped": lambda checkpoint: flip_byte(checkpoint / "student_optimizer.pt"),
    "a rank's file missing": lambda checkpoint: (checkpoint / "rank-0.pt").unlink(),
    "progress empty": lambda checkpoint: (checkpoint / "progress.json").write_text(""),
}


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path, finished, capsys, like_windows):
    """For the one before it, with the same result; if that is damaged too, the run is refused and left alone."""
    shutil.copytree(finished("lcm_ddil"), tmp_path / "run")
    newest, before = (sorted((tmp_path / "run" / "checkpoints").iterdir())[i] for i in (-1, -2))
    DAMAGES[damage](newest)
    shutil.copytree(before, tmp_path / "run" / "checkpoints" / "00000099-mine")
    (tmp_path / "run" / "pipeline" / "notes.txt").write_text("mine")
    run_here("--resume", "--output_dir", tmp_path / "run", script="lcm_ddil.py")
    assert f"{newest} is damaged; going on from {before}" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished("lcm_ddil"))
    assert (tmp_path / "run" / "pipeline" / "notes.txt").read_text() == "mine"
    for checkpoint in filter(common.is_intact, (tmp_path / "run" / "checkpoints").iterdir()):
        DAMAGES[damage](checkpoint)
    assert "those before it are damaged" in refusal("--resume", "--output_dir", tmp_path / "run", script="lcm_ddil.py")
    (tmp_path / "run" / "config.json").write_text("")
    assert "config.json: is damaged" in refusal("--resume", "--output_dir", tmp_path / "run", script="lcm_ddil.py")


def test_a_full_disk_loses_nothing(tmp_path, teacher_folder, data, finished, monkeypatch):
    """The run stops and says so; the checkpoint before is whole, and it goes on from there."""
    flags = arguments("lcm_ddil", teacher_folder, data, tmp_path / "run")
    save, left = torch.save, iter(range(4))  # three files are a checkpoint

    def save_until_full(state, file):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", save_until_full)
    message = refusal(*flags, script="lcm_ddil.py")
    assert "No space left on device" in message and "MiB are free" in message
    monkeypatch.undo()
    run_here("--resume", "--output_dir", tmp_path / "run", script="lcm_ddil.py")
    assert_same_run(tmp_path / "run", finished("lcm_ddil"))


ALL_SOURCES = {
    "pd_ddil": "--teacher_steps 4 --student_steps 2 --p_forward .4 --student_rate .5 --eval_prompts 4",
    "lcm_ddil": "--p_forward .4 --p_teacher .3 --rollout_steps 4",
    "dmd2_ddil": "--fake_updates 2",
}


@pytest.mark.parametrize("script", [*FLAGS, LORA])
def test_compiled_blocks_have_few_shapes(script, tmp_path, data, monkeypatch):
    """No graph is broken, and none is compiled once all sources have been drawn. (The compiler's first half; the second,
    which turns graphs into kernels, takes minutes.) A UNet of one level has blocks of all kinds."""
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    teacher = save_teacher(tmp_path / "teacher", **blocks, block_out_channels=[8])
    compile_module, graphs, updates = torch.nn.Module.compile, {}, common.Run.updates
    noted = lambda module, **settings: compile_module(module, backend="eager", **settings)

    def counting(run, loop, *args):
        for update in updates(run, loop, *args):
            yield update
            graphs.setdefault(loop, []).append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(torch.nn.Module, "compile", noted)
    monkeypatch.setattr(common.Run, "updates", counting)
    torch._dynamo.reset()
    counters.clear()
    flags = ["--teacher", teacher, "--data", data, "--output_dir", tmp_path / "run", "--compile"]
    flags += ["--global_batch_size", 4, "--warmup", 1, "--max_updates", 30, "--save_every", 1000]
    name, *more = script.split()
    run_here(*flags, *more, *ALL_SOURCES[name].split(), script=f"{name}.py")
    assert not counters["graph_break"] and graphs
    assert all(counts[0] > 0 and counts[8] == counts[-1] for counts in graphs.values()), graphs


@pytest.mark.parametrize("script", [*FLAGS, LORA])
def test_other_ways_train_the_same(script, tmp_path, teacher_folder, data, monkeypatch):
    """On a device that refuses what a GPU refuses, with compiled networks (the compiler itself is told to do nothing, or
    this would take minutes), in bf16 (weights and everything around the networks stay in fp32)."""
    compiled, compile_module, weights, name = [], torch.nn.Module.compile, {}, script.split()[0]
    noted = lambda module, **settings: compiled.append(module) or compile_module(module, **settings)
    monkeypatch.setattr(torch.nn.Module, "compile", noted)
    ways = {"plain": [], "compiled": ["--compile"], "strict": ["--gradient_checkpointing"], "bf16": []}
    for way, flag in ways.items():
        folder, log = tmp_path / way, tmp_path / f"{way}.log"
        flags = arguments(script, teacher_folder, data, folder, *FEWER[name].split(), *flag)
        if way in ("strict", "bf16"):
            argv = ["tests/strict_device.py"] * (way == "strict") + [f"{name}.py", *flags]
            env = {"ACCELERATE_MIXED_PRECISION": "bf16"} if way == "bf16" else {"STRICT_WAITS": str(tmp_path / "waits")}
            assert launch(log, *argv, env=env) == [0], log.read_text()
        else:
            with torch.compiler.set_stance("force_eager"):
                run_here(*flags, script=f"{name}.py")
        weights[way] = weights_of(folder / "pipeline")
        assert {weight.dtype for weight in weights[way].values()} == {torch.float32}
    trained = distance(weights["plain"], weights_of(teacher_folder))
    for way, tolerance in (("compiled", 1e-5), ("strict", 1e-2), ("bf16", 0.5)):
        assert distance(weights[way], weights["plain"]) < tolerance * trained, way
    assert {type(module).__name__ for module in compiled} == {"ResnetBlock2D", "BasicTransformerBlock"}
    waits = json.loads((tmp_path / "waits").read_text())  # of the host for the device, in each update
    assert set(waits) == {1}


# --- interrupted runs ---


@posix
@pytest.mark.parametrize("script, ranks", [
    *product([*FLAGS, "lcm_ddil --streaming"], [1]), *product([*SHORT, LORA], [2]),
])  # fmt: skip
def test_interrupted_run_is_the_same_run(script, ranks, finished, tmp_path, teacher_folder, data):
    """kill -9 while a checkpoint is written, between two updates, at the end of a phase; SIGTERM, SIGHUP save."""
    folder, log, name = tmp_path / "run", tmp_path / "log", script.split()[0]
    chance, results = random.Random(f"{script} {ranks}"), "/stages/" if name == "pd_ddil" else "/pipeline"
    kill, rows = signal.SIGKILL, chance.randint(2, 3)
    hangs_up = name == "lcm_ddil" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    asks = signal.SIGHUP if hangs_up else signal.SIGTERM
    stops = [(kill, "/checkpoints/", chance.randint(2, 10)), (asks, "metrics.csv", rows)]
    stops += [(kill, "metrics.csv", rows), (kill, results, chance.randint(1, 20))] * (ranks == 1)
    flags = arguments(script, teacher_folder, data, folder)
    for stop in [*stops, None]:
        log.unlink(missing_ok=True)
        code = launch(log, f"{name}.py", *flags, ranks=ranks, stop=stop)[0]
        is_killed = stop is not None and stop[0] == signal.SIGKILL
        assert code == (-signal.SIGKILL if is_killed else 0), (stop, log.read_text())
        if stop and not is_killed:
            (saved,) = re.findall(r"stopped after update (\d+): saved", log.read_text())
            assert int(checkpoints_of(folder / "checkpoints")[-1].name.rstrip("+")) == int(saved)
        flags = ["--resume", "--output_dir", folder]
    assert "resuming at update" in log.read_text()
    assert_same_run(folder, finished(script, ranks))


@pytest.mark.parametrize("script", SHORT)
def test_ranks_are_in_step_and_apart(script, finished):
    """Two ranks take the same sources and run as many forwards [D14], and share neither samples nor noise."""
    folder = finished(script, 2)
    first, second = (json.loads((folder.parent / f"{rank}.json").read_text()) for rank in range(2))
    assert first["sources"] == second["sources"] and len(set(first["sources"])) > 1
    shown = [float(row["unet_forwards"]) for row in read_metrics(folder) if row["unet_forwards"]]
    assert first["forwards"] == second["forwards"] and shown == pytest.approx([2 * n for n in first["forwards"]])
    rows = [str(row) for rank in (first, second) for row in rank["rows"][:20]]  # 40 images: an epoch
    assert len({*rows}) == len(rows) == 40
    ours, theirs = (torch.load(checkpoints_of(folder / "checkpoints")[-1] / f"rank-{rank}.pt") for rank in range(2))
    assert torch.equal(ours["shared"], theirs["shared"]) and not torch.equal(ours["noise"], theirs["noise"])


@pytest.mark.parametrize("script, update", [("pd_ddil", 1), ("lcm_ddil", 1), ("dmd2_ddil", 1), ("pd_ddil", 3)])
def test_non_finite_loss_stops_all_ranks(script, update, tmp_path, teacher_folder, data):
    """The teacher's weights are no numbers; or fp32 has none for such a w, and the phase before guidance is kept."""
    teacher, log = tmp_path / "teacher", tmp_path / "log"
    shutil.copytree(teacher_folder, teacher)
    flags = arguments(script, teacher, data, tmp_path / "run", "--reflect", "none")
    if update == 1:
        scale_weights(teacher, float("nan"))
    else:
        flags += ["--guidance_range", "1e37", "1e38", "--eval_guidance_scale", "1"]
    assert launch(log, f"{script}.py", *flags, ranks=2) == [1, 1], log.read_text()
    words = rf"update {update}: the (student's loss.*|gradient's norm) is (nan|inf); stopped"
    assert re.search(words, log.read_text()), log.read_text()
    names = [checkpoint.name for checkpoint in checkpoints_of(tmp_path / "run/checkpoints")]
    assert names[-1:] == ([] if update == 1 else ["00000002+"])


# --- bad input: one clear line before anything is written ---

BAD = """
--teacher no/such/folder          | --teacher no/such/folder: no pipeline folder
--teacher nobody/nothing          | --teacher nobody/nothing:
--teacher flow_matching           | FlowMatchEulerDiscreteScheduler is not supported
--teacher lcm                     | predicts epsilon and has a w embedding
--teacher zero_snr                | predicts epsilon and has zero terminal SNR
--teacher truncated               | cannot be loaded
--teacher inpainting              | its UNet is for inpainting or images, not for text alone
--teacher image_to_image          | StableDiffusionImg2ImgPipeline is not supported
--data no/such/folder             | --data no/such/folder: no such file or folder
--data no_images                  | has no images
--recipe sd21                     | argument --recipe: invalid choice: 'sd21'
--teacher_step 32                 | unrecognized arguments: --teacher_step
--teacher_steps many              | argument --teacher_steps: many: must be a whole number > 0
--teacher_steps 24                | --teacher_steps 24: must be --student_steps (2) times a power of two
--teacher_steps 512               | --teacher_steps 512: must be --student_steps (2) times
--p_forward nan                   | argument --p_forward: nan: must be in [0, 1]
--p_forward 0.5 0.5 0.5           | --p_forward [0.5, 0.5, 0.5]: give one value, or one for each
--forward_control --p_forward 1   | --forward_control: with --p_forward [1.0] there are no
--reuse 0                         | argument --reuse: 0: must be > 0 and finite
--warmup -1                       | argument --warmup: -1: must be a whole number >= 0
--seed 3000000000                 | argument --seed: 3000000000: must be a whole number from 0 to 2^31 - 1
--reflect 0                       | argument --reflect: 0: must be measured, none or a radius > 0
--guidance_range -1 2             | argument --guidance_range: -1: must be >= 0 and finite
--guidance_range 6 2              | --guidance_range [6.0, 2.0]: must be LO HI
--updates 8=1,2,3                 | argument --updates: 8=1,2,3: must read PHASE=U or PHASE=U,U
--resolution 16 16 16             | --resolution [16, 16, 16]: must be one number, or height and width
--batch_size 3                    | --global_batch_size 4: must be a multiple of --batch_size 3
--image_column picture            | --image_column picture: --data
--resume                          | --resume: FOLDER holds no run
--resume --overwrite              | --resume and --overwrite exclude each other
"""


def make_bad(name: str, folder) -> None:
    """A teacher or data that cannot be used."""
    if name == "no_images":
        folder.mkdir()
        return (folder / "train.jsonl").write_text('{"caption": "a"}\n' * 20)
    save_teacher(folder, **{"lcm": {"time_cond_proj_dim": 256}, "inpainting": {"in_channels": 9}}.get(name, {}))
    if name == "flow_matching":
        FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
        change_json(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    elif name == "zero_snr":
        change_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    elif name == "image_to_image":
        change_json(folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    elif name == "truncated":
        os.truncate(folder / "unet" / "diffusion_pytorch_model.safetensors", 1000)


@pytest.mark.parametrize("flags, line", re.findall(r"(\S.*?) +\| (.*)", BAD))
def test_bad_input_gets_one_line(flags, line, tmp_path, teacher_folder, data):
    flag, name = flags.split()[0], flags.split()[-1]
    if flag in ("--data", "--teacher") and "/" not in name:
        make_bad(name, tmp_path / name)
        flags = f"{flag} {tmp_path / name}"
    message = refusal(*arguments("pd_ddil", teacher_folder, data, tmp_path / "run", *flags.split()))
    assert line.replace("FOLDER", str(tmp_path / "run")) in message and not (tmp_path / "run").exists()


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags, line", [
    ("--resume --recipe sd15", "recipe: saved tiny, now sd15"), ("--resume --seed 1", "seed: saved 0, now 1"),
    ("--resume --p_forward 1", "p_forward: saved [0.5], now [1.0]"), ("--resume --updates 8=3", "updates: saved"),
    ("--resume --teacher OTHER", "teacher_weights: saved"), ("", "--resume goes on with its run, --overwrite deletes it"),
    ("--overwrite --teacher no/such/folder", "no/such/folder"),
])  # fmt: skip
def test_another_run_leaves_the_folder_alone(flags, line, finished, tmp_path, teacher_folder, data):
    folder = finished("pd_ddil")
    if "OTHER" in flags:  # its weights are compared, not just its name
        shutil.copytree(teacher_folder, tmp_path / "OTHER")
        scale_weights(tmp_path / "OTHER", 1.01)
    before, flags = contents(folder), flags.replace("OTHER", str(tmp_path / "OTHER")).split()
    base = ["--output_dir", folder] if "--resume" in flags else arguments("pd_ddil", teacher_folder, data, folder)
    assert line in refusal(*base, *flags) and contents(folder) == before
    if "--resume" in flags:
        launch(tmp_path / "log", "pd_ddil.py", "--resume", "--output_dir", folder, ranks=2)
        assert "world_size: saved 1, now 2" in (tmp_path / "log").read_text() and contents(folder) == before


@posix
def test_two_runs_in_one_folder(finished, tmp_path, teacher_folder, data):
    """The second one is refused for as long as the first one's process lives."""
    folder = finished("lcm_ddil")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    before, flags = contents(folder), arguments("lcm_ddil", teacher_folder, data, folder)
    with subprocess.Popen([sys.executable, "-c", hold, folder / "config.json"], **pipes) as first:
        first.stdout.readline()
        for more in (["--overwrite"], ["--resume"]):
            assert "another run is under way" in refusal(*flags, *more, script="lcm_ddil.py")
        assert contents(folder) == before
        first.kill()


SOMEONE_S = ["notes.txt", "checkpoints/best/student.pt", "checkpoints/00000006-mine/student.pt", "samples/mine.png"]
SOMEONE_S += ["pipeline.old/model.safetensors", "stages/mine/notes.txt"]


def test_overwrite_deletes_what_a_run_made_and_nothing_else(finished, tmp_path, teacher_folder, data):
    run = shutil.copytree(finished("lcm_ddil"), tmp_path / "run")
    (run / "checkpoints" / "00000099").mkdir()  # of a longer run
    for file in map(run.joinpath, SOMEONE_S):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    run_here(*arguments("lcm_ddil", teacher_folder, data, run, "--overwrite"), script="lcm_ddil.py")
    assert_same_run(run, finished("lcm_ddil"))
    assert all((run / name).read_text() == "mine" for name in SOMEONE_S)
    assert [path.name for path in checkpoints_of(run / "checkpoints")] == ["00000006", "00000009"]


def test_folder_that_is_no_run_is_never_deleted(tmp_path, teacher_folder, data):
    (tmp_path / "config.json").write_text("all there is")  # of a model, say
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert str(tmp_path) in refusal(*arguments("pd_ddil", teacher_folder, data, tmp_path, *flags))
    flags = arguments("pd_ddil", teacher_folder, data, tmp_path / "config.json")
    assert str(tmp_path / "config.json") in refusal(*flags)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["all there is"]


def test_an_apple_gpu_is_taken_if_asked_for(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "mps")
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    for device in ("mps", "cpu"):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert common.start_accelerator().device.type == device
        monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")


def test_captions_outside_ascii_where_the_locale_is_ascii(tmp_path, teacher_folder):
    (folder := tmp_path / "data").mkdir()
    for i in range(20):
        Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{i} grüne 猫", encoding="utf-8")
    flags = arguments("lcm_ddil", teacher_folder, folder, tmp_path / "run", "--updates", 2)
    process = run_script(*flags, script="lcm_ddil.py", env=ASCII)
    assert process.returncode == 0, process.stderr


def test_dry_run_writes_no_run(tmp_path, teacher_folder, data, capsys):
    with pytest.raises(SystemExit) as end:
        run_here(*arguments("pd_ddil", teacher_folder, data, tmp_path / "run", "--dry_run"))
    out = capsys.readouterr().out
    assert end.value.code is None and not [*tmp_path.iterdir()]
    assert "phase gc" in out and "1 processes x 4 x 1 accumulated = 4" in out


# --- README and the maps: words that must not outlive the code ---

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_s_two_commands(tmp_path, like_windows):
    """They are on its first screen, CI's, and run as printed: here with fewer updates and fewer prompts to evaluate, as on
    Windows, in a folder whose name a terminal cannot print."""
    run, test = re.findall(r"^    (pip install .*)$", "\n".join(README.splitlines()[:20]), flags=re.MULTILINE)
    assert f'command="{test}"' in (ROOT / ".ci/run").read_text() and test.endswith("&& pytest")
    assert {f"- run: {run}", f"- run: {test}"} <= {*map(str.strip, (ROOT / ".github/workflows/tests.yml").open())}
    command, *flags = shlex.split(run.partition(" && accelerate launch ")[2])
    launcher = ["-m", "accelerate.commands.launch"]
    fewer = "--max_updates 1 --reflect none --global_batch_size 8 --eval_prompts 4 --teacher_steps 8 --no-cache_latents"
    run = tmp_path / "a folder" / ("ü" if os.name == "nt" else "ü\\n") / "run"
    flags += [*fewer.split(), "--output_dir", run]
    process = run_script(*flags, script=command, launcher=launcher, env=like_windows | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and "done:" in process.stdout, process.stderr
    snippet, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(snippet.replace('"runs/pd_ddil-tiny/pipeline"', repr(str(run / "pipeline"))), names := {})  # noqa: S102
    assert names["image"].size == (32, 32)


def test_commands_flags_files_and_readings_of_readme_exist(capsys):
    known = set()
    for script in (*FLAGS, "evaluate"):
        module = importlib.import_module(script)
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        flags = set(re.findall(r"--\w+", capsys.readouterr().out.partition("\noptions:")[2]))  # after the docstring
        known |= flags | {flag.replace("--no-", "--") for flag in flags}
        assert set(re.findall(r"(?<![\w-])--\w+", re.sub(r"accelerate launch .*", "", module.__doc__))) <= flags, script
        commands = re.findall(rf"^accelerate launch .*?{script}\.py(.*?)(?:  #.*)?$", README, flags=re.MULTILINE)
        assert len(commands) > 2
        for command in commands:
            module.parse_args(shlex.split(command))
    text = re.sub(r"accelerate launch .*?(_ddil|evaluate)\.py|bf16 is accelerate's", "", README)
    assert set(re.findall(r"(?<![\w-])--\w+", text)) <= known
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    files = re.findall(r"^\| `(\w+[./]\w+)` \|", README, flags=re.MULTILINE)
    assert links and files and all((ROOT / name).exists() for name in links + files)
    code = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("common", "evaluate", *FLAGS))
    assert {*re.findall(r"\[D(\d+)\]", code)} <= {*re.findall(r"^\| D(\d+) \|", README, flags=re.MULTILINE)}


@pytest.mark.parametrize("script", [*FLAGS, "evaluate"])
def test_map_of_the_paper_names_what_exists(script):
    rows = importlib.import_module(script).__doc__.partition("paper   ")[2].partition("\n\n")[0].splitlines()[1:]
    assert 5 < len(rows) <= 15
    for symbol in (name for row in rows for name in re.split(r", | in ", re.split(r"\s{2,}", row.strip())[-1])):
        found, parts = importlib.import_module("common" if symbol.startswith("common.") else script), symbol.split(".")
        for part in parts[parts[0] == "common" :]:
            assert hasattr(found, part), symbol
            found = getattr(found, part)
