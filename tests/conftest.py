"""Tiny random pipelines and images, so that every test runs offline, on CPU, in seconds."""

import atexit
import contextlib
import csv
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: nothing here may ask the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="ddil-tests-")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CPU everywhere
os.environ["OMP_NUM_THREADS"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common import last_checkpoint

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # these networks are too small for more; and the same number everywhere gives the same bits

# Flags that make a run small; all else stays as in the recipe, so that the runs go through all of the code.
W_RANGE = 2.0, 5.0
SMALL = ["--global_batch_size", "4", "--eval_prompts", "4", "--buffer_size", "64", "--warmup", "1", "--log_every", "1",
         "--learning_rate", "1e-3", "--guidance_range", *map(str, W_RANGE)]  # fmt: skip


def run_script(*args, script="pd_ddil.py", launcher=(), timeout=400) -> subprocess.CompletedProcess:
    """`python pd_ddil.py ...` in a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@contextlib.contextmanager
def signals_kept():
    """A run listens to SIGTERM and Ctrl-C; afterwards they are pytest's again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_here(*args, script="pd_ddil.py") -> None:
    """The same as run_script in this process: no imports to wait for, and SystemExit can be caught."""
    with signals_kept():
        try:
            importlib.import_module(script.removesuffix(".py")).main([*map(str, args)])
        except SystemExit as end:
            if end.code:
                raise


def refusal(*args, script="pd_ddil.py") -> str:
    """The one line with which a script refuses these flags: its own, or the last of argparse's."""
    errors = io.StringIO()
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(errors):
        run_here(*args, script=script)
    message = caught.value.code if isinstance(caught.value.code, str) else errors.getvalue().strip().split("\n")[-1]
    assert message and "\n" not in message
    return message


def rows_of(folder: Path) -> list[dict]:
    """metrics.csv of a run."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights_of(pipeline: Path) -> dict:
    """The UNet's of a saved pipeline."""
    return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def scale_weights(pipeline: Path, factor: float) -> None:
    scaled = {name: factor * weight for name, weight in weights_of(pipeline).items()}
    save_file(scaled, pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def interrupt(script: str, folder: Path, number: signal.Signals, after_update: int, *flags) -> subprocess.Popen:
    """Starts a run in `folder` and signals it as soon as it has saved `after_update`."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    while process.poll() is None:
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint and int(checkpoint.name) >= after_update:
            process.send_signal(number)
            break
        time.sleep(0.005)
    process.out, process.err = process.communicate(timeout=300)
    return process


def tiny_tokenizer(folder: Path):
    """CLIP's tokenizer with a vocabulary of single characters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    characters = [chr(c) for c in range(33, 127)]
    words = [*characters, *[c + "</w>" for c in characters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_text_encoder(vocab_size: int, projected: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, projection_dim=16,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def tiny_unet(cross_attention_dim: int = 16, **config):
    """4 x 8 x 8 latents, about 50K parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=cross_attention_dim, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ) | config)  # fmt: skip


def save_teacher(folder: Path, xl: bool = False, prediction_type: str = "epsilon", **unet_config) -> Path:
    """A random Stable Diffusion pipeline (xl: with SDXL's two text encoders) in diffusers' folder format."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4,
        sample_size=32, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    parts = dict(
        vae=vae, tokenizer=tokenizer, text_encoder=tiny_text_encoder(len(tokenizer)),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type),
    )  # fmt: skip
    if xl:
        added = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
        added |= dict(projection_class_embeddings_input_dim=16 + 6 * 8)  # pooled prompt, six time ids
        pipe = StableDiffusionXLPipeline(
            **parts, unet=tiny_unet(32, **added, **unet_config), tokenizer_2=tokenizer,
            text_encoder_2=tiny_text_encoder(len(tokenizer), projected=True), force_zeros_for_empty_prompt=True,
        )  # fmt: skip
    else:
        pipe = StableDiffusionPipeline(
            **parts, unet=tiny_unet(**unet_config), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """Predicts eps, as SD1.5 does: needs all phases."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def gc_folder(tmp_path_factory) -> Path:
    """Predicts v and takes w, as a run's stages/gc does: needs halvings only."""
    return save_teacher(tmp_path_factory.mktemp("gc"), prediction_type="v_prediction", time_cond_proj_dim=256)


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory) -> Path:
    """Shaped like SDXL."""
    return save_teacher(tmp_path_factory.mktemp("xl"), xl=True)


def save_images(folder: Path, n: int, seed: int) -> None:
    """n random 32 x 32 images with captions, as an imagefolder with metadata.jsonl."""
    folder.mkdir(parents=True)
    generator, lines = np.random.default_rng(seed), []
    for i in range(n):
        colour = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colour).resize((32, 32), Image.BICUBIC).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "caption": f"image {i} of {folder.name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def save_tar(file: Path, rows) -> None:
    """Rows with image and caption in webdataset's layout."""
    with tarfile.open(file, "w") as tar:
        for i, row in enumerate(rows):
            png = io.BytesIO()
            row["image"].save(png, "PNG")
            for suffix, content in (("png", png.getvalue()), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{file.stem}{i:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_images(folder / "train", 40, seed=0)
    save_images(folder / "test", 8, seed=1)
    return folder
