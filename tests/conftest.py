"""Tiny random pipelines and images, so that every test runs offline, on CPU, in seconds."""

import contextlib
import csv
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Before the libraries read it: nothing here may ask the network, and all runs on the CPU
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ["OMP_WAIT_POLICY"] = "passive"  # tests run side by side: threads that wait let others have the core
if "ddil-tests-" not in os.environ.get("HF_DATASETS_CACHE", ""):  # the processes that tests start have it from here
    CACHE = tempfile.TemporaryDirectory(prefix="ddil-tests-", ignore_cleanup_errors=True)
    os.environ["HF_DATASETS_CACHE"] = CACHE.name

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # these networks are too small for more; and the same number everywhere gives the same bits
session = pytest.fixture(scope="session")


def pytest_collection_finish():
    gc.freeze()  # runs collect garbage, and would look through half a million objects of the imports each time


def pytest_unconfigure():
    gc.unfreeze()


# Flags that make a run small; all else stays as in the recipe, so that the runs go through all of the code.
W_RANGE = 2.0, 5.0
SMALL = ["--global_batch_size", "4", "--eval_prompts", "4", "--buffer_size", "64", "--warmup", "1", "--log_every", "1"]
SMALL += ["--learning_rate", "1e-3", "--guidance_range", *map(str, W_RANGE)]


def run_script(*args, script="pd_ddil.py", launcher=(), env=None) -> subprocess.CompletedProcess:
    """`python pd_ddil.py ...` in a process of its own."""
    command, settings = [sys.executable, *launcher, str(ROOT / script), *map(str, args)], {"cwd": ROOT, "timeout": 400}
    return subprocess.run(
        command, **settings, env=os.environ | (env or {}), capture_output=True, text=True, check=False
    )


# A terminal, pipe or log that takes nothing but ASCII, as in minimal containers; what Windows lacks and what it refuses
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
LIKE_WINDOWS = """
import os, signal, sys
rename, sys.modules["fcntl"] = os.rename, None
vars(signal).pop("SIGHUP", None)
def refusing(source, target, **more):
    if os.path.exists(target):
        raise FileExistsError(17, "exists", str(target))
    rename(source, target, **more)
os.rename = refusing
"""


@pytest.fixture
def like_windows(tmp_path, monkeypatch) -> dict:
    """Here, and in the processes to whose environment this is added."""
    monkeypatch.setattr(os, "rename", os.rename)  # all three are put back in the end
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    exec(LIKE_WINDOWS, {})  # noqa: S102
    (tmp_path / "sitecustomize.py").write_text(LIKE_WINDOWS)
    # without fcntl, what is left of a lock in the shared cache is taken for a lock
    return {"PYTHONPATH": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}


@contextlib.contextmanager
def signals_kept():
    """A run listens to SIGTERM and Ctrl-C; afterwards they are pytest's again."""
    with contextlib.ExitStack() as afterwards:
        for number in (signal.SIGTERM, signal.SIGINT):
            afterwards.callback(signal.signal, number, signal.getsignal(number))
        yield


def run_here(*args, script="pd_ddil.py") -> None:
    """The same as run_script in this process: no imports to wait for, and SystemExit can be caught."""
    with signals_kept():
        importlib.import_module(script.removesuffix(".py")).main([*map(str, args)])


def refusal(*args, script="pd_ddil.py") -> str:
    """The one line with which a script refuses these flags: its own, or the last of argparse's."""
    errors = io.StringIO()
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(errors):
        run_here(*args, script=script)
    message = caught.value.code if isinstance(caught.value.code, str) else errors.getvalue().strip().split("\n")[-1]
    assert message and "\n" not in message
    return message


def read_metrics(folder: Path) -> list[dict]:
    """metrics.csv of a run."""
    return [*csv.DictReader((folder / "metrics.csv").read_text(encoding="utf-8").splitlines())]


def weights_of(pipeline: Path) -> dict:
    """The UNet's of a saved pipeline."""
    return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def scale_weights(pipeline: Path, factor: float) -> None:
    scaled = {name: factor * weight for name, weight in weights_of(pipeline).items()}
    save_file(scaled, pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))


def tiny_unet(cross_attention_dim: int = 16, **config):
    """4 x 8 x 8 latents, about 50K parameters."""
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "block_out_channels": (8, 16)}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 8}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": cross_attention_dim}
    return diffusers.UNet2DConditionModel(**{"layers_per_block": 1} | blocks | sizes | config)


def save_teacher(folder: Path, xl: bool = False, prediction_type: str = "epsilon", **unet_config) -> Path:
    """A random Stable Diffusion pipeline (xl: with SDXL's two text encoders) in diffusers' folder format."""
    torch.manual_seed(0)
    (vocabulary := folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    words = [chr(c) + end for end in ("", "</w>") for c in range(33, 127)] + ["<|startoftext|>", "<|endoftext|>"]
    (vocabulary / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(f"{vocabulary}/vocab.json", f"{vocabulary}/merges.txt", model_max_length=16)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=(8, 8, 8), norm_num_groups=4, sample_size=32)
    widths = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16, "max_position_embeddings": 16}
    tokens = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = transformers.CLIPTextConfig(num_hidden_layers=2, num_attention_heads=2, **widths, **tokens)
    parts = {"vae": vae, "tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(text)}
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    noise |= {"prediction_type": prediction_type, "clip_sample": False, "set_alpha_to_one": False}
    parts["scheduler"] = diffusers.DDIMScheduler(**noise)
    if xl:
        inputs = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        inputs["projection_class_embeddings_input_dim"] = 16 + 6 * 8  # pooled prompt, six time ids
        parts |= {"unet": tiny_unet(32, **inputs, **unet_config), "tokenizer_2": tokenizer}
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(text)
        pipe = diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
    else:
        parts |= {"unet": tiny_unet(**unet_config), "safety_checker": None, "feature_extractor": None}
        pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    (folder / "README.md").write_bytes("---\nlicense: openrail\n---\ndéjà vu\n".encode("latin-1"))
    return folder


def teacher_fixture(**settings):
    """A pipeline's folder, made once."""
    return session(lambda tmp_path_factory: save_teacher(tmp_path_factory.mktemp("teacher"), **settings))


teacher_folder = teacher_fixture()  # predicts eps, as SD1.5 does: needs all phases
gc_folder = teacher_fixture(prediction_type="v_prediction", time_cond_proj_dim=256)  # as stages/gc: needs halvings only
xl_folder = teacher_fixture(xl=True)  # shaped like SDXL


def save_images(folder: Path, n: int, seed: int) -> None:
    """n random 32 x 32 images with captions, as an imagefolder with metadata.jsonl."""
    folder.mkdir(parents=True)
    generator, lines = np.random.default_rng(seed), []
    for i in range(n):
        colour = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colour).resize((32, 32), Image.BICUBIC).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "caption": f"image {i} of {folder.name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@session
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_images(folder / "train", 40, seed=0)
    save_images(folder / "test", 8, seed=1)
    return folder
