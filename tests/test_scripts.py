"""End to end: whole runs, killed runs, two processes, bad input, and README. The networks are random and tiny; what is
checked is that everything fits together and that a run is the same run however it is interrupted."""

import importlib
import json
import re
import shlex
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    refusal,
    ROOT, SMALL, W_RANGE, change_json, interrupt, rows_of, run_here, run_script, save_images, save_teacher, scale_weights, weights_of,
)  # fmt: skip
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_common import max_error, randn
from test_pd_ddil import joined_gradient

from common import (
    CLEAN, PromptEncoder, UNetModel, last_checkpoint, load_images, load_pipeline, load_schedule, noise_of,
    student_rollout, timestep_grid, with_guidance,
)  # fmt: skip

STAGES = ["v", "gc", "16", "8", "4"]
UPDATES = 5  # of each part: 5 + 5 + 5 + (5 + 5) + (5 + 5)
RATES = 1e-3, 5e-4  # before the halvings, and in them


def command(folder, teacher, data, *flags) -> list:
    return ["--teacher", teacher, "--data", data, "--output_dir", folder, *SMALL, "--learning_rate", *RATES,
            "--max_updates", UPDATES, *flags]  # fmt: skip


def assert_same_run(folder, reference) -> None:
    """Every stage's weights to the last bit, and every figure of metrics.csv but the seconds."""
    for stage in STAGES:
        ours, theirs = (weights_of(f / "stages" / stage) for f in (folder, reference))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), stage
    ours, theirs = ([row | {"seconds": ""} for row in rows_of(f)] for f in (folder, reference))
    assert [row["total_updates"] for row in ours] == [row["total_updates"] for row in theirs]
    for row, other in zip(ours, theirs):
        assert row == other


# --- one whole run ---


@pytest.fixture(scope="session")
def finished(tmp_path_factory, teacher_folder, data_folder):
    """32 -> 16 -> 8 -> 4 from a teacher that predicts eps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = run_script(*command(folder, teacher_folder, data_folder))
    assert process.returncode == 0, process.stderr
    assert "starting at update 1; phases to do: v, gc, 16, 8, 4" in process.stdout
    return folder


def test_run_folder(finished, teacher_folder):
    assert {p.name for p in (finished / "stages").iterdir()} == set(STAGES)
    for name in ("pipeline", "checkpoints", "metrics.csv", "config.json", "samples"):
        assert (finished / name).exists(), name
    for script in ("pd_ddil.py", "common.py"):
        assert (finished / script).read_bytes() == (ROOT / script).read_bytes()
    assert len([*(finished / "checkpoints").iterdir()]) == 1
    assert not [*finished.rglob("*.tmp")]
    config = json.loads((finished / "config.json").read_text())
    assert config["teacher_steps"] == 32 and config["teacher"] == str(teacher_folder) and config["world_size"] == 1
    last, pipeline = weights_of(finished / "stages" / "4"), weights_of(finished / "pipeline")
    assert all(torch.equal(last[name], pipeline[name]) for name in last)


def test_samples(finished):
    """At the start and the end of each phase a picture with a row for each of teacher and student."""
    pictures = sorted((finished / "samples").glob("*.png"))
    for stage in STAGES:
        assert len([p for p in pictures if p.stem.endswith(f"-{stage}")]) >= 2
    for picture in pictures:
        low, high = Image.open(picture).convert("L").getextrema()
        assert low < 50 and high > 200


def test_every_stage_has_been_trained(finished, teacher_folder):
    before = weights_of(teacher_folder)
    for stage in STAGES:
        after = weights_of(finished / "stages" / stage)
        assert max(max_error(after[name], before[name]) for name in before) > 1e-4
        assert all(weight.isfinite().all() for weight in after.values())
        before = after


def test_metrics(finished):
    rows = rows_of(finished)
    updates, ends = [r for r in rows if r["loss"]], [r for r in rows if r["paired_error"]]
    assert [int(r["total_updates"]) for r in updates] == [*range(1, 7 * UPDATES + 1)]
    assert [r["phase"] for r in ends] == ["16", "8", "4"]
    assert all(float(r["paired_error"]) > 0 and float(r["paired_error_undistilled"]) > 0 for r in ends)
    for row in updates:
        assert all(float(row[name]) > 0 for name in ("loss", "lr", "grad_norm", "seconds"))
        sources = [s for s in ("forward", "dagger") if row[f"loss_{s}"]]
        assert len(sources) == 1 and row[f"loss_{sources[0]}"] == row["loss"]  # one source for each mini-batch
        timesteps = {int(c.removeprefix("loss_t")) for c in row if c.startswith("loss_t") and row[c]}
        if row["update"] == "2":  # warm-up is over
            assert float(row["lr"]) == RATES[row["phase"].isdigit()]
        if row["phase"].isdigit():
            assert timesteps and timesteps <= set(timestep_grid(int(row["phase"])))
    dagger = [r for r in updates if r["loss_dagger"]]
    assert {r["phase"] for r in dagger} <= {"16", "8", "4"} and len({r["phase"] for r in dagger}) > 1
    assert not any(r["loss_t999"] for r in dagger)  # [D16] no start states
    assert all(r["buffer_size"] != "0" and float(r["buffer_age"]) >= 0 for r in dagger)
    assert any(float(r["student_moves"]) > 0 for r in dagger if r["student_moves"])
    assert all(0 <= float(r["moved_by_reflect"]) <= 1 for r in updates if r["phase"] != "v" and r["loss_forward"])
    sizes = [int(r["buffer_size"]) for r in updates]
    for before, after, size, next_size in zip(updates, updates[1:], sizes, sizes[1:]):
        if before["phase"] == after["phase"]:
            assert next_size >= size  # kept from part to part
        elif after["loss_forward"]:
            assert next_size == 0  # emptied at each stage


def test_forwards_are_counted(finished):
    """For each of B samples: v 3 (backward = 2), guidance 2 + 3, halvings 2 + 3 by forward diffusion and 3 from
    D_DAgger, to which a rollout of B prompts through M intervals adds B (2 M - 1) to B (3 M - 2)."""
    B, before = 4, 0
    for row in (r for r in rows_of(finished) if r["loss"]):
        spent, before = int(row["unet_forwards"]) - before, int(row["unet_forwards"])
        if row["phase"] == "v":
            assert spent == 3 * B
        elif row["loss_forward"]:
            assert spent == 5 * B
        elif not row["student_moves"]:
            assert spent == 3 * B
        else:
            M = int(row["phase"])
            assert B * (2 * M - 1) <= spent - 3 * B <= B * (3 * M - 2)


def model_of(folder, stage: str):
    """(pipeline, its prompt encoder, model as it is sampled) of a stage."""
    pipe = load_pipeline(str(folder / "stages" / stage))
    prompts = PromptEncoder(pipe, "cpu")
    model = UNetModel(pipe.unet, load_schedule(pipe), "v_prediction", torch.no_grad)
    return pipe, prompts, with_guidance(model, prompts.null()) if stage == "v" else model


def end_points(folder, stage, steps, captions, z, w):
    pipe, prompts, model = model_of(folder, stage)
    cond = prompts.encode(prompts.tokenize(captions)) | {"w": w}
    return pipe, student_rollout(load_schedule(pipe), model, z, [*timestep_grid(steps), CLEAN], cond)[-1]


def test_paired_error_is_what_it_says(finished, data_folder):
    """RMS distance to the end points of stages/gc at 32 steps, from the same noise, held-out prompts and w."""
    captions = load_images(str(data_folder))[1]
    captions, z = [captions[i] for i in (0, 2, 4, 6)], noise_of(range(4), (4, 8, 8), seed=1)
    w = W_RANGE[0] + (W_RANGE[1] - W_RANGE[0]) * torch.rand(4, generator=torch.Generator().manual_seed(1))
    rms = lambda x: x.pow(2).mean().sqrt().item()  # noqa: E731
    reference = end_points(finished, "gc", 32, captions, z, w)[1]
    for row in (r for r in rows_of(finished) if r["paired_error"]):
        steps = int(row["phase"])
        student, undistilled = (end_points(finished, stage, steps, captions, z, w)[1] for stage in (row["phase"], "gc"))
        assert abs(rms(student - reference) - float(row["paired_error"])) < 1e-4
        assert abs(rms(undistilled - reference) - float(row["paired_error_undistilled"])) < 1e-4


@pytest.fixture(scope="session")
def finished_xl(tmp_path_factory, xl_folder, data_folder):
    folder = tmp_path_factory.mktemp("xl") / "run"
    run_here(*command(folder, xl_folder, data_folder, "--teacher_steps", 8, "--student_steps", 4, "--max_updates", 1))
    return folder


@pytest.mark.parametrize("run, stage, steps", [
    *[("finished", stage, int(stage) if stage.isdigit() else 32) for stage in STAGES],
    ("finished", "gc", 4), ("finished_xl", "gc", 8), ("finished_xl", "4", 4),
])  # fmt: skip
def test_stock_diffusers_samples_the_same_images(run, stage, steps, request):
    """A saved stage in plain diffusers gives our rollout's images within 1/255: w embedding, grid, clean end."""
    folder, captions, w = request.getfixturevalue(run), ["a", "image 3 of test"], 4.0
    z = randn(2, 4, 8, 8, dtype=torch.float32)
    pipe, latents = end_points(folder, stage, steps, captions, z, torch.full((2,), w))
    with torch.no_grad():
        ours = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    stock = DiffusionPipeline.from_pretrained(folder / "stages" / stage)
    stock.set_progress_bar_config(disable=True)
    images = stock(captions, num_inference_steps=steps, guidance_scale=w, latents=z, output_type="pt").images
    assert stock.scheduler.timesteps.tolist() == timestep_grid(steps)
    assert max_error(ours.clamp(0, 1), images) < 1 / 255
    other = stock(captions, num_inference_steps=steps, guidance_scale=w + 3, latents=z, output_type="pt").images
    assert max_error(images, other) > 0  # it does listen to w


# --- interrupted runs ---


def saved_progress(folder) -> dict:
    return json.loads((last_checkpoint(folder / "checkpoints") / "progress.json").read_text())


def test_killed_run_resumes_as_if_unbroken(finished, tmp_path, teacher_folder, data_folder):
    """kill -9 in the middle of a stage, in its second part."""
    folder = tmp_path / "run"
    process = interrupt("pd_ddil.py", folder, signal.SIGKILL, 22, *command(folder, teacher_folder, data_folder, "--save_every", 11))
    assert process.returncode == -signal.SIGKILL
    saved = saved_progress(folder)
    assert saved["phase"] in (3, 4) and 22 <= saved["total"] < 7 * UPDATES
    process = run_script("--resume", "--output_dir", folder)
    assert process.returncode == 0, process.stderr
    todo = ", ".join(STAGES[saved["phase"] :])
    assert f"resuming at update {saved['total'] + 1}; phases to do: {todo}" in process.stdout
    assert_same_run(folder, finished)


def test_streamed_run_resumes_as_if_unbroken(tmp_path, gc_folder, data_folder):
    """The place in a stream is part of a checkpoint."""
    flags = command("", gc_folder, data_folder, "--streaming", "--save_every", 4, "--teacher_steps", 8)
    flags.remove("--output_dir"), flags.remove("")
    run_here(*flags, "--output_dir", tmp_path / "whole")
    process = interrupt("pd_ddil.py", tmp_path / "run", signal.SIGKILL, 4, *flags, "--output_dir", tmp_path / "run")
    assert process.returncode == -signal.SIGKILL
    run_here("--resume", "--output_dir", tmp_path / "run")
    whole, resumed = (weights_of(tmp_path / run / "pipeline") for run in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_terminated_run_saves_and_resumes(finished, tmp_path, teacher_folder, data_folder, capsys):
    """SIGTERM in guidance conditioning: saved at once, exit code 0, and whole after --resume."""
    folder = tmp_path / "run"
    process = interrupt("pd_ddil.py", folder, signal.SIGTERM, 7, *command(folder, teacher_folder, data_folder, "--save_every", 7))
    assert process.returncode == 0, process.err
    saved = saved_progress(folder)
    assert saved["phase"] == 1 and 7 <= saved["total"] < 10
    assert f"stopped after update {saved['total']}" in process.out
    run_here("--resume", "--output_dir", folder, "--save_every", 100)
    assert f"resuming at update {saved['total'] + 1}" in capsys.readouterr().out
    assert_same_run(folder, finished)


def test_finished_run_has_nothing_left_to_do(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    run_here("--resume", "--output_dir", folder)
    assert "phases to do: none" in capsys.readouterr().out
    assert_same_run(folder, finished)


def test_another_run_starts_from_stages_gc(finished, tmp_path, data_folder):
    """Arms share their first phases."""
    gc = finished / "stages" / "gc"
    run_here(*command(tmp_path / "run", gc, data_folder, "--p_forward", 1, "--teacher_steps", 8, "--student_steps", 2))
    assert {p.name for p in (tmp_path / "run" / "stages").iterdir()} == {"4", "2"}
    assert not any(row["loss_dagger"] for row in rows_of(tmp_path / "run"))
    assert all(int(row["buffer_size"] or 0) == 0 for row in rows_of(tmp_path / "run"))


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, gc_folder, data_folder):
    flags = gc_folder, data_folder, "--teacher_steps", 8, "--student_steps", 4, "--no-cache_latents"
    run_here(*command(tmp_path / "a", *flags))
    run_here(*command(tmp_path / "b", *flags, "--gradient_checkpointing"))
    a, b = (weights_of(tmp_path / run / "pipeline") for run in "ab")
    assert max(max_error(a[name], b[name]) for name in a) < 1e-6


def test_bf16(tmp_path, gc_folder, data_folder, monkeypatch):
    """Networks in bf16; weights and everything around the networks stay in fp32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` sets it
    try:
        run_here(*command(tmp_path / "run", gc_folder, data_folder, "--teacher_steps", 8, "--student_steps", 4))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {weight.dtype for weight in weights_of(tmp_path / "run" / "pipeline").values()} == {torch.float32}
    assert all(float(row["loss"]) > 0 for row in rows_of(tmp_path / "run") if row["loss"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mixed_precision"] == "bf16"


# --- two processes ---


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, teacher_folder, data_folder):
    """(run folder, what each rank saw) of all phases on two CPU processes, two samples each."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = command(folder / "run", teacher_folder, data_folder, "--teacher_steps", 8, "--p_forward", 0.5)
    process = run_script("pd_ddil", folder, *flags, script="tests/record.py", launcher=launcher)
    assert process.returncode == 0, process.stderr
    return folder / "run", [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_are_two(two_ranks):
    folder, ranks = two_ranks
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert json.loads((folder / "config.json").read_text())["world_size"] == 2
    assert len([*last_checkpoint(folder / "checkpoints").glob("rank-*.pt")]) == 2


def test_ranks_share_the_source(two_ranks):
    """[D14] And so the number of forwards."""
    first, second = (rank["sources"] for rank in two_ranks[1])
    assert first == second and set(first) == {"forward", "dagger"}
    forwards = [int(row["unet_forwards"]) for row in rows_of(two_ranks[0]) if row["unet_forwards"]]
    assert forwards[0] == 3 * 4  # of both ranks together


def test_ranks_have_noise_of_their_own(two_ranks):
    first, second = (rank["batches"] for rank in two_ranks[1])
    assert len(first) == len(second) == 2 * UPDATES
    for a, b in zip(first, second):
        assert a["z_t"].shape == b["z_t"].shape and not torch.isclose(a["z_t"], b["z_t"]).flatten(1).all(dim=1).any()
        assert not torch.equal(a["cond"]["w"], b["cond"]["w"])


def test_ranks_share_no_data(two_ranks):
    """40 images: ten batches of two on each of two ranks are an epoch."""
    rows = [torch.cat(rank["rows"][:10]) for rank in two_ranks[1]]
    assert torch.cat(rows).sort().values.tolist() == list(range(40))


def test_ranks_end_with_equal_weights(two_ranks):
    folder, (first, second) = two_ranks
    assert all(torch.equal(a, b) for a, b in zip(first["student"], second["student"]))
    assert len(first["gradients"]) == 4 * UPDATES
    for (_, a), (_, b) in zip(first["gradients"], second["gradients"]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    saved = dict(load_pipeline(str(folder / "pipeline")).unet.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(first["student"], saved.values()))


def test_gradient_of_two_ranks_is_that_of_the_joined_batch(two_ranks):
    folder, ranks = two_ranks
    _, ours = ranks[0]["gradients"][2 * UPDATES]  # the first one of the halving, which starts from stages/gc
    joined = joined_gradient(folder / "stages" / "gc", [rank["batches"][0] for rank in ranks])
    alone = joined_gradient(folder / "stages" / "gc", [ranks[0]["batches"][0]])
    assert max(max_error(a, b) for a, b in zip(ours, joined)) < 1e-5
    assert max(max_error(a, b) for a, b in zip(ours, alone)) > 1e-3


def test_resume_on_another_number_of_processes_is_refused(two_ranks):
    with pytest.raises(SystemExit, match="world_size: saved 2, now 1"):
        run_here("--resume", "--output_dir", two_ranks[0])


# --- bad input: one clear message before anything is written ---


def refused(folder, *args) -> str:
    """The one message with which a run is refused; checks that the exit code is not 0 and that nothing is written."""
    existed = folder.exists()
    message = refusal(*args)
    assert folder.exists() == existed
    return message


QUICK = ["--max_updates", 1]  # what should be refused and is not fails soon
BAD_FLAGS = """
    --teacher no/such/folder               --teacher nobody/nothing               --data no/such/folder
    --data nobody/nothing                  --teacher_steps 24                     --teacher_steps 0
    --teacher_steps -8                     --teacher_steps 4                      --teacher_steps 512
    --teacher_steps 32 --student_steps 3   --p_forward 1.5                        --p_forward -0.1
    --p_forward nan                        --p_forward 0.5 0.5 0.5                --student_rate 2
    --student_rate -1                      --student_rate 1 1 1                   --p_forward 0.5 1.2
    --forward_control --p_forward 1
    --batch_size 0                         --batch_size -2                        --global_batch_size 0
    --global_batch_size -4                 --learning_rate 0                      --learning_rate -0.001
    --learning_rate nan                    --learning_rate inf                    --global_batch_size 5 --batch_size 2
    --global_batch_size 4 --batch_size 8   --recipe sd21                          --recipe sd15
    --reflect sometimes                    --reflect 0                            --reflect -1
    --reflect nan                          --reflect inf                          --warmup -1
    --guidance_range 6 2                   --guidance_range -1 2                  --guidance_range nan 2
    --guidance_range 2 inf                 --updates 3=100                        --updates 8=many
    --updates 8=0                          --updates 8=1,2,3                      --updates 8
    --max_updates 0                        --buffer_size 0                        --reuse 0
    --reuse nan                            --log_every 0                          --save_every 0
    --eval_prompts 0
"""


@pytest.mark.parametrize("flags", re.findall(r"--\S.*?(?=\s{2,}|\n)", BAD_FLAGS))
def test_bad_flag_is_named_with_its_value(flags, tmp_path, teacher_folder, data_folder):
    name, *values = flags.split()[:2] if flags.count("--") > 1 else flags.split()
    base = ["--data", data_folder] if "sd15" in flags else ["--teacher", teacher_folder, "--data", data_folder]
    message = refused(tmp_path / "run", *base, "--output_dir", tmp_path / "run", *SMALL, *QUICK, *flags.split())
    if flags == "--recipe sd15":  # has no default for a teacher
        assert "--teacher" in message and "sd15" in message
    else:
        assert name in message
        for value in values:
            assert all(part in message for part in re.split("[=,]", value)), message
    assert "\n" not in message


def test_refusal_on_the_command_line(tmp_path):
    """One line and nothing like a traceback."""
    process = run_script("--teacher_steps", 24, "--output_dir", tmp_path / "run")
    assert process.returncode == 1 and not (tmp_path / "run").exists()
    assert process.stderr.startswith("--teacher_steps 24: ") and process.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", ["--teacher_step 32", "--beta 0.5", "--teacher_steps many"])
def test_unknown_and_abbreviated_flags(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        run_here(*flags.split())
    assert caught.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def data_without_images(folder):
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"caption": f"a {i}"}) for i in range(20)))


def data_without_captions(folder):
    save_images(folder / "train", 20, seed=0)
    (folder / "train" / "metadata.jsonl").unlink()


def data_with_hardly_an_image(folder):
    save_images(folder / "train", 1, seed=0)  # which is held out, so that none is left


def no_data(folder):
    pass


@pytest.mark.parametrize("make", [data_without_images, data_without_captions, data_with_hardly_an_image, no_data])
def test_data_that_cannot_be_used(make, tmp_path, teacher_folder):
    data = tmp_path / "data"
    data.mkdir()
    make(data)
    message = refused(tmp_path / "run", *command(tmp_path / "run", teacher_folder, data))
    assert f"--data {data}" in message
    expected = {data_without_images: "image", data_without_captions: "caption"}.get(make, "")
    assert expected in message


def flow_matching_teacher(folder):
    save_teacher(folder)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    change_json(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])


def transformer_teacher(folder):
    save_teacher(folder)
    change_json(folder / "model_index.json", _class_name="PixArtAlphaPipeline")


def inpainting_teacher(folder):
    save_teacher(folder, in_channels=9)


def lcm_teacher(folder):
    save_teacher(folder, time_cond_proj_dim=256)  # predicts eps, yet takes w: no v phase could keep its w


def zero_snr_teacher(folder):
    save_teacher(folder)
    change_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)


def truncated_teacher(folder):
    save_teacher(folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("make", [
    flow_matching_teacher, transformer_teacher, inpainting_teacher, lcm_teacher, zero_snr_teacher, truncated_teacher,
])  # fmt: skip
def test_teacher_that_cannot_be_distilled(make, tmp_path, data_folder):
    teacher = tmp_path / "teacher"
    make(teacher)
    message = refused(tmp_path / "run", *command(tmp_path / "run", teacher, data_folder))
    assert f"--teacher {teacher}" in message


def contents(folder) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folder_of_another_run_is_kept(finished, tmp_path, teacher_folder, data_folder):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = contents(folder)
    message = refused(folder, *command(folder, teacher_folder, data_folder))
    assert str(folder) in message and "--resume" in message and "--overwrite" in message
    refused(folder, *command(folder, teacher_folder, data_folder, "--overwrite", "--teacher", "no/such/folder"))
    assert contents(folder) == before


def test_folder_that_is_no_run_is_never_deleted(tmp_path, teacher_folder, data_folder):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("all there is")
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert str(folder) in refused(folder, *command(folder, teacher_folder, data_folder, *flags))
    assert contents(folder) == {(folder / "chapter.txt").relative_to(folder): b"all there is"}
    message = refused(folder, *command(folder / "chapter.txt", teacher_folder, data_folder))
    assert str(folder / "chapter.txt") in message


def test_overwrite_replaces_a_run(tmp_path, gc_folder, data_folder):
    folder, flags = tmp_path / "run", ["--teacher_steps", 8, "--max_updates", 1]
    run_here(*command(folder, gc_folder, data_folder, *flags))
    (folder / "left-over.txt").write_text("of the old run")
    run_here(*command(folder, gc_folder, data_folder, *flags, "--overwrite", "--seed", 1))
    assert not (folder / "left-over.txt").exists()
    assert json.loads((folder / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize("flags, named", [
    (["--recipe", "sd15"], "recipe: saved tiny, now sd15"), (["--seed", 1], "seed: saved 0, now 1"),
    (["--learning_rate", 1], "learning_rate: saved [0.001, 0.0005], now [1.0]"),
    (["--p_forward", 1], "p_forward: saved [0.75, 0.5], now [1.0]"), (["--updates", "8=3"], "updates: saved"),
    (["--teacher_steps", 16], "teacher_steps: saved 32, now 16"), (["--overwrite"], "--overwrite"),
])  # fmt: skip
def test_resume_refuses_another_run_and_says_what_differs(finished, flags, named):
    before = contents(finished)
    message = refused(finished, "--resume", "--output_dir", finished, *flags)
    assert "--resume" in message and named in message
    assert contents(finished) == before


def test_resume_refuses_another_teacher_under_the_same_name(finished, tmp_path, teacher_folder):
    """Its weights are compared, not just its name."""
    teacher, folder = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher_folder, teacher)
    shutil.copytree(finished, folder)
    change_json(folder / "config.json", teacher=str(teacher))
    scale_weights(teacher, 1.01)
    assert "teacher_weights: saved" in refused(folder, "--resume", "--output_dir", folder)


def test_resume_without_a_run(tmp_path):
    assert "--resume" in refused(tmp_path / "run", "--resume", "--output_dir", tmp_path / "run")


@pytest.mark.parametrize("flag", ["--dry_run", "--check_data"])
def test_reports_write_nothing(flag, tmp_path, teacher_folder, data_folder, capsys):
    run_here(*command(tmp_path / "run", teacher_folder, data_folder, flag))
    out = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run-data.png"] * (flag == "--check_data")
    expected = {"--dry_run": ["learning_rate", "phase gc", "4 x 1 accumulated = 4", "GiB"], "--check_data": ["usable"]}
    assert all(words in out for words in expected[flag])


def test_broken_images_are_counted(tmp_path, teacher_folder, data_folder, capsys):
    data = tmp_path / "data"
    shutil.copytree(data_folder, data)
    (data / "train" / "003.png").write_bytes(b"no image")
    run_here(*command(tmp_path / "run", teacher_folder, data, "--check_data"))
    out = capsys.readouterr().out
    assert re.search(r"usable\s+39\b", out) and re.search(r"unreadable image.*\s1\b", out)
    assert Image.open(tmp_path / "run-data.png").height == 8 * (64 + 2) and "run-data.png" in out


def test_non_finite_loss_stops_at_once(tmp_path, teacher_folder, data_folder):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    scale_weights(teacher, float("nan"))
    with pytest.raises(SystemExit, match=r"phase v, part 1, update 1: the loss is nan on forward states"):
        run_here(*command(tmp_path / "run", teacher, data_folder))


def test_non_finite_loss_keeps_the_last_checkpoint(tmp_path, teacher_folder, data_folder):
    """A w for which fp32 has no number breaks the guidance phase; the v phase before it is kept, and is finite."""
    folder = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"phase gc, part 1, update 1: .*00000005"):
        flags = "--guidance_range", 1e37, 1e38, "--eval_guidance_scale", 1
        run_here(*command(folder, teacher_folder, data_folder, *flags))
    assert saved_progress(folder) | {"forwards": 0} == dict(phase=1, part=0, update=0, total=5, forwards=0, credit=0.0)
    assert all(weight.isfinite().all() for weight in weights_of(folder / "stages" / "v").values())
    assert not (folder / "stages" / "gc").exists() and not (folder / "pipeline").exists()


def test_diverging_run_stops(tmp_path, gc_folder, data_folder):
    folder = tmp_path / "run"
    flags = ["--teacher_steps", 8, "--learning_rate", 1e30, "--save_every", 1]
    with pytest.raises(SystemExit, match=r"phase 4, part 1, update [2345]: the .* is (nan|inf)") as caught:
        run_here(*command(folder, gc_folder, data_folder, *flags))
    assert str(last_checkpoint(folder / "checkpoints")) in caught.value.code


# --- README and the maps: words that must not outlive the code ---


README = ROOT / "README.md"
SCRIPTS = ["pd_ddil", "lcm_ddil", "dmd2_ddil"]
ALL_SCRIPTS = [*SCRIPTS, "evaluate"]


def readme_command(word: str) -> str:
    """The indented README line that starts with pip install and contains the word."""
    lines = [line.strip() for line in README.read_text().splitlines() if line.startswith("    pip install")]
    (line,) = [line for line in lines if word in line]
    return line


def test_readme_has_its_two_commands():
    first_screen = "\n".join(README.read_text().splitlines()[:40])
    assert "pip install -r requirements.txt && accelerate launch pd_ddil.py --teacher_steps 32" in first_screen
    assert "pip install -r requirements.txt && pytest" in first_screen


def test_ci_runs_readme_s_test_command():
    assert readme_command("pytest") in (ROOT / ".ci" / "run").read_text()


def test_readme_s_run_command(tmp_path):
    """As printed, on the embedded default, with fewer updates and fewer prompts to evaluate."""
    launcher, script, *flags = shlex.split(readme_command("pd_ddil").partition(" && ")[2])[1:]
    assert (launcher, script) == ("launch", "pd_ddil.py")
    process = run_script(*flags, "--max_updates", 2, "--eval_prompts", 8, "--output_dir", tmp_path / "run",
                         launcher=["-m", "accelerate.commands.launch"])  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert {p.name for p in (tmp_path / "run" / "stages").iterdir()} == set(STAGES)
    assert "done:" in process.stdout


def test_readme_s_snippet(finished):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert '"runs/pd_ddil-tiny/pipeline"' in snippet
    names = {}
    exec(snippet.replace('"runs/pd_ddil-tiny/pipeline"', f'"{finished / "pipeline"}"'), names)
    assert names["image"].size == (32, 32)


def flags_of(script: str, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out.partition("\noptions:")[2]))  # after the docstring


def test_flags_in_words_exist(capsys):
    """Those of README and of the scripts' docstrings; what stands before a script on a line is accelerate's."""
    known = {script: flags_of(script, capsys) for script in ALL_SCRIPTS}
    assert all({"--recipe", "--p_forward", "--dry_run"} <= known[script] for script in SCRIPTS)
    texts = [(README.read_text(), set.union(*known.values()))]
    texts += [(importlib.import_module(script).__doc__, known[script]) for script in ALL_SCRIPTS]
    for text, flags in texts:
        ours = re.sub(r"accelerate launch .*?(_ddil|evaluate)\.py|bf16 is accelerate's", "", text)
        assert set(re.findall(r"(?<![\w-])--\w+", ours)) <= flags


def test_links_and_files_of_readme_exist():
    text = README.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    files = re.findall(r"^\| `(\w+[./]\w+)` \|", text, flags=re.MULTILINE)
    assert links and files
    assert not [name for name in links + files if not (ROOT / name).exists()]


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_map_of_the_paper_names_what_exists(script):
    rows = importlib.import_module(script).__doc__.partition("paper   ")[2].partition("\n\n")[0].splitlines()[1:]
    assert 5 < len(rows) <= 15
    for row in rows:
        for symbol in re.split(r", | in ", re.split(r"\s{2,}", row.strip())[-1]):
            module, _, name = symbol.rpartition(".") if symbol.startswith("common.") else (script, "", symbol)
            owner, *rest = module.split(".")
            found = importlib.import_module(owner)
            for part in [*rest, name]:
                assert hasattr(found, part), symbol
                found = getattr(found, part)


def test_readings_cited_in_code_are_listed():
    code = "".join((ROOT / f"{name}.py").read_text() for name in ("common", *ALL_SCRIPTS))
    listed = set(re.findall(r"^\| D(\d+) \|", README.read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\[D(\d+)\]", code)) <= listed


@pytest.mark.parametrize("script, seams", [
    ("pd_ddil", ["SamplingPrior(", "reflect", "dagger_batch("]), ("lcm_ddil", ["SamplingPrior(", "student_batch"]),
    ("dmd2_ddil", ["SamplingPrior(", "reflect"]),
])  # fmt: skip
def test_seams_are_marked(script, seams):
    """grep "# DDIL:" shows what the paper adds to plain distillation."""
    marked = [line for line in (ROOT / f"{script}.py").read_text().splitlines() if "# DDIL:" in line]
    assert all(any(what in line for line in marked) for what in seams)
    assert any("reflect" in line for line in (ROOT / "common.py").read_text().splitlines() if "# DDIL:" in line)
