"""The real architectures, with random weights: SD1.5's and SSD-1B's UNets (their own blocks and layers, fewer channels, small
latents) in each script, FSDP2, and a hub."""

import json
import os
import shutil
import subprocess
import sys

import hub
import pytest
from accelerate.utils import DistributedType
from conftest import ROOT, run_here, run_script, save_teacher, weights_of

import common

SD15 = {  # CompVis/stable-diffusion-v1-4, runwayml/stable-diffusion-v1-5
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
}
SSD1B = {  # segmind/SSD-1B: a UNet of SDXL's family, its two halves unlike, no attention in the middle
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
SDXL = SSD1B | {  # stabilityai/stable-diffusion-xl-base-1.0
    "mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": [1, 2, 10],
    "reverse_transformer_layers_per_block": None,
}  # fmt: skip
NARROW = {
    "tiny": {},
    "sd15": SD15 | {"block_out_channels": (32, 64, 64, 64)},
    "ssd1b": SSD1B | {"block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2)},
    "sdxl": SDXL | {"block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2)},
}
HALF = {  # half of the real widths: a few hundred million parameters
    "half sd15": SD15 | {"block_out_channels": (160, 320, 640, 640)},
    "half ssd1b": SSD1B | {"block_out_channels": (160, 320, 640), "attention_head_dim": (5, 10, 20)},
}
UNETS = NARROW | HALF
SHORT = "--warmup 1 --log_every 1 --save_every 2 --seed 1"
FLAGS = {
    "pd_ddil": "--guidance_range 2 5 --p_forward 0.5 --teacher_steps 4 --student_steps 2 --max_updates 3 --eval_prompts 2",
    "lcm_ddil": "--guidance_range 2 5 --p_forward 0.5 --updates 3",
    "dmd2_ddil": "--updates 3 --fake_updates 2",
}


def flags(script: str, teacher, data, folder, *more) -> list:
    base = ["--teacher", teacher, "--data", data, "--output_dir", folder, "--global_batch_size", 2]
    return [*base, *SHORT.split(), *FLAGS[script].split(), *more]


def teacher_of(folder, architecture: str, prediction_type: str = "epsilon"):
    settings = UNETS[architecture] | {"xl": "ssd1b" in architecture, "prediction_type": prediction_type}
    return save_teacher(folder / "teacher", **settings)


def distance(a: dict, b: dict) -> float:
    """Between two UNets, over the weights of the second."""
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in b) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("architecture, prediction_type", [
    ("sd15", "epsilon"), ("sd15", "v_prediction"), ("ssd1b", "epsilon"), ("ssd1b", "v_prediction"),
    ("half sd15", "epsilon"), ("half ssd1b", "epsilon"),
])  # fmt: skip
def test_architecture(script, architecture, prediction_type, tmp_path, data_folder, monkeypatch):
    """Through three updates, a death after the first checkpoint, a resume and an evaluation."""
    teacher = teacher_of(tmp_path, architecture, prediction_type)
    run_here(*flags(script, teacher, data_folder, tmp_path / "whole"), script=f"{script}.py")
    save = common.Run.save_checkpoint

    def save_and_die(run):
        save(run)
        raise ConnectionAbortedError

    with monkeypatch.context() as patched, pytest.raises(ConnectionAbortedError):
        patched.setattr("common.Run.save_checkpoint", save_and_die)
        run_here(*flags(script, teacher, data_folder, tmp_path / "run"), script=f"{script}.py")
    assert not (tmp_path / "run" / "pipeline").exists()
    run_here("--resume", "--output_dir", tmp_path / "run", script=f"{script}.py")
    whole, resumed = (weights_of(tmp_path / run / "pipeline") for run in ("whole", "run"))
    assert distance(whole, resumed) == 0 < distance(whole, weights_of(teacher))
    (tmp_path / "prompts.json").write_text(json.dumps(["a", "b"]))
    what = ["--prompts", tmp_path / "prompts.json", "--metrics", "clip", "--num_images", 2, "--steps", 2, 4]
    run_here(tmp_path / "run", teacher, *what, "--output_dir", tmp_path / "evaluation", script="evaluate.py")
    values = [r["value"] for r in json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]]
    assert len(values) == 2 and all(-1 <= value <= 1 for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("script, architecture, resumed_by", [
    ("pd_ddil", "tiny", "sharded"), ("lcm_ddil", "tiny", "ddp"), ("dmd2_ddil", "tiny", "sharded"),
    ("pd_ddil", "ssd1b", "ddp"), ("lcm_ddil", "ssd1b", "sharded"), ("dmd2_ddil", "sd15", "ddp"),
])  # fmt: skip
def test_sharded(script, architecture, resumed_by, tmp_path, data_folder, monkeypatch):
    """FSDP2, accumulating: a checkpoint goes on under either engine, and both train the same."""
    teacher = teacher_of(tmp_path, architecture)
    # DMD2 as README launches it
    few = ["--global_batch_size", 4, "--batch_size", 1, "--learning_rate", "1e-3"]
    few += ["--gradient_checkpointing"] * (script == "dmd2_ddil")
    precision = "bf16" if (script, resumed_by) == ("dmd2_ddil", "sharded") else "no"
    accelerate = f"-m accelerate.commands.launch --num_machines 1 --num_processes 2 --mixed_precision {precision} "
    accelerate += "--dynamo_backend no --main_process_port 0 --use_fsdp --fsdp_version 2"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2"

    def launch(*args, engine="sharded", returncode=0):
        if engine == "sharded":
            args, program, launcher = [f"{script}.py", *args], "tests/sharded.py", accelerate
        else:
            program, launcher = f"{script}.py", torchrun
        process = run_script(*args, script=program, launcher=launcher.split())
        assert process.returncode == returncode, process.stderr

    launch(*flags(script, teacher, data_folder, tmp_path / "whole", *few))
    monkeypatch.setenv("DIE", "1")
    launch(*flags(script, teacher, data_folder, tmp_path / "run", *few), returncode=1)
    monkeypatch.delenv("DIE")
    assert not (tmp_path / "run" / "pipeline").exists()
    launch("--resume", "--output_dir", tmp_path / "run", engine=resumed_by)
    whole, resumed = (weights_of(tmp_path / run / "pipeline") for run in ("whole", "run"))
    # DDP sums in another order: Adam's step is another one where a gradient is next to nothing
    allowed = 0 if resumed_by == "sharded" else 1e-2 * distance(whole, weights_of(teacher))
    assert distance(whole, resumed) <= allowed


@pytest.mark.slow
def test_optimiser_of_a_sharded_network_with_empty_shards():
    """Rank 5 of 8, whose shards of a layer with four outputs are empty, in a group of processes that are not there."""
    code = """
import os, torch
from types import SimpleNamespace
from torch.testing._internal.distributed.fake_pg import FakeStore
os.environ |= {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
os.environ["FSDP_VERSION"] = "2"
torch.distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
from sharded import ShardingAccelerator
from common import Run
run, network = Run.__new__(Run), torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
run.accelerator, run.args, run.trained = ShardingAccelerator(cpu=True), SimpleNamespace(), {}
run.device, run.args.gradient_checkpointing, run.args.compile = torch.device("cpu"), False, False
trained = run.prepare_trainable("student", network)
groups = trained.optimizer.param_groups
assert [id(p) for p in groups[0]["params"]] == [id(p) for p in trained.network.parameters()]
assert [p.to_local().numel() for p in trained.network.parameters()] == [16, 2, 0, 0]
"""
    env, command = os.environ | {"PYTHONPATH": str(ROOT)}, [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_engines_that_are_refused(tmp_path, teacher_folder, data_folder, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(SystemExit, match="DEEPSPEED: is not supported; launch with --multi_gpu"):
        run_here(*flags("pd_ddil", teacher_folder, data_folder, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
def test_hub_names(streaming, tmp_path, teacher_folder, data_folder, monkeypatch):
    """Teacher and data from a hub train the same as from folders; a run of theirs goes on."""
    run_here(*flags("lcm_ddil", teacher_folder, data_folder, tmp_path / "local", streaming), script="lcm_ddil.py")
    for name, folder in ("model", teacher_folder), ("data", data_folder):
        shutil.copytree(folder, tmp_path / "hub" / "owner" / name)
    with hub.serve(tmp_path / "hub") as address:
        caches = {"HF_HOME": tmp_path, "HF_DATASETS_CACHE": tmp_path / "c"}
        for name, value in ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address} | caches).items():
            monkeypatch.setenv(name, str(value))
        for args in (flags("lcm_ddil", "owner/model", "owner/data", tmp_path / "run", streaming), ["--resume"]):
            process = run_script("--output_dir", tmp_path / "run", *args, script="lcm_ddil.py")
            assert process.returncode == 0, process.stderr
    local, run = (weights_of(tmp_path / name / "pipeline") for name in ("local", "run"))
    assert distance(local, run) == 0
