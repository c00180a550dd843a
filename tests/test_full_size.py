"""The real architectures, with random weights: SD1.5's and SSD-1B's UNets (their own blocks and layers, fewer channels, small
latents), predicting eps and v, through three updates, a kill, a resume and an evaluation in each script."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import hub
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import ROOT, rows_of, run_here, run_script, save_teacher, weights_of

from common import (PromptEncoder, UNetModel, load_pipeline)

SD15 = dict(  # CompVis/stable-diffusion-v1-4, runwayml/stable-diffusion-v1-5
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2, norm_num_groups=32, attention_head_dim=8,
)  # fmt: skip
SSD1B = dict(  # segmind/SSD-1B: a UNet of SDXL's family, its two halves unlike, no attention in the middle
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    mid_block_type="UNetMidBlock2D", layers_per_block=2, norm_num_groups=32, use_linear_projection=True,
    transformer_layers_per_block=[1, [2, 2], [4, 4]], reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1],
)  # fmt: skip
NARROW = {
    "sd15": SD15 | dict(block_out_channels=(32, 64, 64, 64)),
    "ssd1b": SSD1B | dict(block_out_channels=(32, 64, 64), attention_head_dim=(1, 2, 2)),
}
HALF = {  # half of the real widths: a few hundred million parameters
    "sd15": SD15 | dict(block_out_channels=(160, 320, 640, 640)),
    "ssd1b": SSD1B | dict(block_out_channels=(160, 320, 640), attention_head_dim=(5, 10, 20)),
}
SHORT = "--warmup 1 --log_every 1 --save_every 2 --seed 1".split()
FLAGS = {
    "pd_ddil": "--teacher_steps 4 --student_steps 2 --max_updates 3 --p_forward 0.5 --eval_prompts 2 --guidance_range 2 5".split(),
    "lcm_ddil": "--updates 3 --p_forward 0.5 --guidance_range 2 5".split(),
    "dmd2_ddil": "--updates 3 --fake_updates 2".split(),
}


def flags(script: str, teacher, data, folder) -> list:
    return ["--teacher", teacher, "--data", data, "--output_dir", folder, *SHORT, "--global_batch_size", 2, *FLAGS[script]]


def killed(script: str, after: int, args: list, monkeypatch) -> None:
    """The run, which dies while it makes update after + 1."""
    module, name = importlib.import_module(script), "iterate" if script == "dmd2_ddil" else "update_student"
    update, calls = getattr(module, name), []

    def dies(*inputs, **more):
        calls.append(1)
        if len(calls) > after:
            raise ConnectionAbortedError
        return update(*inputs, **more)

    with monkeypatch.context() as patched, pytest.raises(ConnectionAbortedError):
        patched.setattr(module, name, dies)
        run_here(*args, script=f"{script}.py")


def trains_resumes_and_evaluates(script, unet, xl, prediction_type, tmp_path, data_folder, monkeypatch) -> None:
    teacher = save_teacher(tmp_path / "teacher", xl=xl, prediction_type=prediction_type, **unet)
    run_here(*flags(script, teacher, data_folder, tmp_path / "whole"), script=f"{script}.py")
    updates = 2 * (2 if script == "dmd2_ddil" else 1)
    killed(script, updates, flags(script, teacher, data_folder, tmp_path / "run"), monkeypatch)
    assert not (tmp_path / "run" / "pipeline").exists()
    run_here("--resume", "--output_dir", tmp_path / "run", script=f"{script}.py")
    whole, resumed = (weights_of(tmp_path / run / "pipeline") for run in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = weights_of(teacher)
    assert any(not torch.equal(whole[name], before[name]) for name in before)
    (tmp_path / "prompts.json").write_text(json.dumps(["a", "b"]))
    run_here(tmp_path / "run", teacher, "--prompts", tmp_path / "prompts.json", "--metrics", "clip", "--num_images", 2, "--steps", 2, 4,
             "--output_dir", tmp_path / "evaluation", script="evaluate.py")  # fmt: skip
    values = [r["value"] for r in json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]]
    assert len(values) == 2 and all(-1 <= value <= 1 for value in values)


def distance(a: dict, b: dict) -> float:
    """Between two UNets, over the weights of the second."""
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in b) ** 0.5)


def slow_unless(fast, *case):
    return pytest.param(*case, marks=() if fast else pytest.mark.slow)


# All of them: -m ""
CASES = [slow_unless((architecture == "sd15") == (prediction_type == "epsilon"), script, architecture, prediction_type)
         for script in FLAGS for architecture in NARROW for prediction_type in ("epsilon", "v_prediction")]  # fmt: skip


@pytest.mark.parametrize("script, architecture, prediction_type", CASES)
def test_architecture(script, architecture, prediction_type, tmp_path, data_folder, monkeypatch):
    trains_resumes_and_evaluates(script, NARROW[architecture], architecture == "ssd1b", prediction_type, tmp_path, data_folder, monkeypatch)


@pytest.mark.parametrize("script", FLAGS)
def test_compiled_networks_train_the_same(script, tmp_path, teacher_folder, data_folder, monkeypatch):
    """What --compile wraps; the compiler itself is told to do nothing, or this would take minutes."""
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module) or compile_module(module))
    with torch.compiler.set_stance("force_eager"):
        for run, more in ("plain", []), ("compiled", ["--compile"]):
            run_here(*flags(script, teacher_folder, data_folder, tmp_path / run), *more, script=f"{script}.py")
    plain, same = (weights_of(tmp_path / run / "pipeline") for run in ("plain", "compiled"))
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert len(compiled) >= {"pd_ddil": 6, "lcm_ddil": 3, "dmd2_ddil": 3}[script]


@pytest.mark.parametrize("script", FLAGS)
def test_device_that_is_not_the_cpu(script, tmp_path, xl_folder, data_folder):
    """Nothing is left on the CPU that a GPU would miss, and the same is trained there."""
    on_cpu, on_strict = ([*flags(script, xl_folder, data_folder, tmp_path / run), "--gradient_checkpointing"] for run in ("cpu", "strict"))
    run_here(*on_cpu, script=f"{script}.py")
    process = run_script(f"{script}.py", *on_strict, script="tests/strict_device.py")
    assert process.returncode == 0, process.stderr
    here, there, before = (weights_of(folder) for folder in (tmp_path / "cpu" / "pipeline", tmp_path / "strict" / "pipeline", xl_folder))
    assert distance(here, there) < 1e-2 * distance(here, before)


def test_evaluation_on_a_device_that_is_not_the_cpu(tmp_path, gc_folder, data_folder):
    run_here(*flags("pd_ddil", gc_folder, data_folder, tmp_path / "run"))
    (tmp_path / "prompts.json").write_text(json.dumps(["a", "b"]))
    process = run_script("evaluate.py", tmp_path / "run", "--metrics", "clip", "--prompts", tmp_path / "prompts.json", "--num_images", 2, "--shift",
                         "--data", data_folder, "--output_dir", tmp_path / "evaluation", script="tests/strict_device.py")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "evaluation" / "shift.png").exists()


@pytest.mark.parametrize("script", FLAGS)
def test_device_that_is_too_small(script, tmp_path, teacher_folder, data_folder, monkeypatch, capsys):
    """Said by --dry_run, and refused by a run before it writes anything."""
    monkeypatch.setattr("common.device_memory", lambda device: 1e-3)
    run_here(*flags(script, teacher_folder, data_folder, tmp_path / "run"), "--dry_run", script=f"{script}.py")
    assert "has 0.0 GiB: does NOT fit" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"this run needs \d.\d\d GiB for student.* does NOT fit"):
        run_here(*flags(script, teacher_folder, data_folder, tmp_path / "run"), script=f"{script}.py")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script, more", [
    ("pd_ddil", "--teacher_steps 8 --student_steps 2 --updates 4=24,12 2=24 --p_forward 0 0.5 --student_rate 0.5 --reuse 1 --eval_prompts 2"),
    ("lcm_ddil", "--updates 60 --p_forward 0.4 --p_student 0.6"),
    ("lcm_ddil", "--updates 10 --p_forward 0 --p_teacher 1 --rollout_steps 2"),
    ("lcm_ddil", "--updates 10 --p_forward 0 --p_student 1 --forward_control"),
    ("dmd2_ddil", "--updates 20 --fake_updates 3"),
])  # fmt: skip
def test_expected_forwards_are_those_that_are_counted(script, more, tmp_path, gc_folder, data_folder, capsys):
    args = ["--teacher", gc_folder, "--data", data_folder, "--output_dir", tmp_path / "run", "--seed", 1, *more.split()]
    args += ["--global_batch_size", 4, "--warmup", 1, *["--guidance_range", 2, 5] * (script != "dmd2_ddil")]
    run_here(*args, "--dry_run", script=f"{script}.py")
    expected = float(re.search(r"UNet forwards in all +(\S+)", capsys.readouterr().out)[1])
    run_here(*args, script=f"{script}.py")
    counted = [float(row["unet_forwards"]) for row in rows_of(tmp_path / "run") if row["unet_forwards"]]
    assert counted[-1] == pytest.approx(expected, rel=0.07)




def test_precision_that_the_device_has_not(tmp_path, teacher_folder, data_folder, monkeypatch):
    """accelerate knows; what it says is passed on in one line."""

    def refuses(*args, **settings):
        raise ValueError("bf16 mixed precision requires another device.")

    monkeypatch.setattr("accelerate.Accelerator", refuses)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SystemExit, match="--mixed_precision bf16: bf16 mixed precision requires"):
        run_here(*flags("pd_ddil", teacher_folder, data_folder, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", HALF)
@pytest.mark.parametrize("script", FLAGS)
def test_half_of_the_real_width(script, architecture, tmp_path, data_folder, monkeypatch):
    trains_resumes_and_evaluates(script, HALF[architecture], architecture == "ssd1b", "epsilon", tmp_path, data_folder, monkeypatch)


@pytest.mark.parametrize("script, architecture", [slow_unless(False, "pd_ddil", "ssd1b"), slow_unless(False, "lcm_ddil", "sd15"),
                                                  slow_unless(True, "dmd2_ddil", "ssd1b")])  # fmt: skip
def test_two_processes(script, architecture, tmp_path, data_folder):
    """DDP: trained, saved, and resumed at the end."""
    teacher = save_teacher(tmp_path / "teacher", xl=architecture == "ssd1b", **NARROW[architecture])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for more in (flags(script, teacher, data_folder, tmp_path / "run"), ["--resume", "--output_dir", tmp_path / "run"]):
        process = run_script(*more, script=f"{script}.py", launcher=launcher)
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
def test_hub_names(streaming, tmp_path, teacher_folder, data_folder, monkeypatch):
    """Teacher and data from a hub train the same as from folders; a run of theirs goes on."""
    args = ["--warmup", 1, "--global_batch_size", 2, "--guidance_range", 2, 5, "--updates", 3, "--p_forward", 0.5, streaming]
    run_here("--teacher", teacher_folder, "--data", data_folder, "--output_dir", tmp_path / "local", *args, script="lcm_ddil.py")
    for name, folder in ("model", teacher_folder), ("data", data_folder):
        shutil.copytree(folder, tmp_path / "hub" / "owner" / name)
    with hub.serve(tmp_path / "hub") as address:
        for name, value in ("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", address), ("HF_HOME", tmp_path), ("HF_DATASETS_CACHE", tmp_path / "cache"):
            monkeypatch.setenv(name, str(value))
        for more in (["--teacher", "owner/model", "--data", "owner/data", *args], ["--resume"]):
            process = run_script("--output_dir", tmp_path / "run", *more, script="lcm_ddil.py")
            assert process.returncode == 0, process.stderr
    local, run = (weights_of(tmp_path / name / "pipeline") for name in ("local", "run"))
    assert all(torch.equal(local[name], run[name]) for name in local)


@pytest.mark.parametrize("script, architecture, resumed_by", [
    slow_unless(True, "pd_ddil", "tiny", "sharded"), slow_unless(True, "lcm_ddil", "tiny", "ddp"), slow_unless(True, "dmd2_ddil", "tiny", "sharded"),
    slow_unless(False, "pd_ddil", "ssd1b", "ddp"), slow_unless(False, "lcm_ddil", "ssd1b", "sharded"), slow_unless(False, "dmd2_ddil", "sd15", "ddp"),
    slow_unless(False, "dmd2_ddil", "ssd1b", "sharded"), slow_unless(False, "lcm_ddil", "sd15", "ddp"),
])  # fmt: skip
def test_sharded(script, architecture, resumed_by, tmp_path, data_folder, monkeypatch):
    """FSDP2, accumulating: a checkpoint goes on under either engine, and both train the same."""
    teacher = save_teacher(tmp_path / "teacher", xl=architecture == "ssd1b", **NARROW.get(architecture, {}))
    accelerate = "-m accelerate.commands.launch --num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no --main_process_port 0"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2"

    def launch(*args, engine="sharded", returncode=0):
        if engine == "sharded":
            launcher = [*accelerate.split(), "--use_fsdp", "--fsdp_version", "2"]
            process = run_script(f"{script}.py", *args, script="tests/sharded.py", launcher=launcher)
        else:
            process = run_script(*args, script=f"{script}.py", launcher=torchrun.split())
        assert process.returncode == returncode, process.stderr

    few = ["--global_batch_size", 4, "--batch_size", 1, "--learning_rate", "1e-3"]  # not so many that rounding errors have grown
    if (script, resumed_by) == ("dmd2_ddil", "sharded"):  # as README launches it
        accelerate, few = accelerate.replace("mixed_precision no", "mixed_precision bf16"), [*few, "--gradient_checkpointing"]
    launch(*flags(script, teacher, data_folder, tmp_path / "whole"), *few)
    monkeypatch.setenv("DIE", "1")
    launch(*flags(script, teacher, data_folder, tmp_path / "run"), *few, returncode=1)
    monkeypatch.delenv("DIE")
    assert not (tmp_path / "run" / "pipeline").exists()
    launch("--resume", "--output_dir", tmp_path / "run", engine=resumed_by)
    whole, resumed = (weights_of(tmp_path / run / "pipeline") for run in ("whole", "run"))
    if resumed_by == "sharded":
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    else:  # sums in another order: Adam's step is another one where a gradient is next to nothing
        assert distance(whole, resumed) < 1e-2 * distance(whole, weights_of(teacher))


def test_optimiser_of_a_sharded_network_with_empty_shards():
    """Rank 5 of 8, whose shards of a layer with four outputs are empty, in a group of processes that are not there; a second part."""
    code = """
import os, torch
from torch.testing._internal.distributed.fake_pg import FakeStore
os.environ |= {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "FSDP_VERSION": "2"}
torch.distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
from sharded import ShardingAccelerator
from common import prepare_adamw
accelerator, network = ShardingAccelerator(cpu=True), torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
for part in range(2):
    network, optimizer = prepare_adamw(accelerator, network)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in network.parameters()], part
    assert [p.to_local().numel() for p in network.parameters()] == [16, 2, 0, 0]
    accelerator.free_memory()
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_engines_that_are_refused(tmp_path, teacher_folder, data_folder, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(SystemExit, match="DEEPSPEED: is not supported; launch with --multi_gpu"):
        run_here(*flags("pd_ddil", teacher_folder, data_folder, tmp_path / "run"))
