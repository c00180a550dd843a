"""Evaluation of few-step models: the paper's metrics, and its analysis of covariate shift.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1, sec. 5, App. E, Tables 2-8, Figure 4.

    laptop, minutes     accelerate launch evaluate.py assets/tiny/pipeline runs/pd_ddil-tiny
    covariate shift     accelerate launch evaluate.py runs/pd_ddil-tiny --shift
    training curves     accelerate launch evaluate.py runs/pd_ddil-tiny --curves
    eight GPUs          accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 evaluate.py
                        --protocol coco2017-512 --prompts captions_val2017.json --reference val2017
                        runs/pd_ddil-sd15 --sampler dpm++

paper                                             code
  sec. 5    one image a caption, one seed           generate
  sec. 5    FID                                     load_inception, frechet_distance
  sec. 5    CLIP score (OpenCLIP ViT-g/14)          load_clip, mean_cosine
  sec. 5    LPIPS diversity, 10 seeds x 50 prompts  lpips_diversity
  Table 3   HPSv2                                   resize_and_pad, mean_cosine
  Table 5   teacher chosen with probability p_T     mixtures
  Table 6-7 one model first, then the other         switches
  Fig. 4    one interval handed over                one_interval
  Table 8   inverted prompts                        read_prompts, similarity
  (not in the paper) the shift itself               shift_gap

A MODEL is a run folder, one of its stages, a pipeline folder or a hub name, and LABEL=MODEL names its row: models of
one label are averaged, and a label of the paper's tables brings the paper's numbers along.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import json
import math
import os
import re
import runpy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

# By common.py's sections
# isort: off
from common import CLEAN, add_noise, timestep_grid
from common import rotation
from common import mixed_rollout, student_rollout, teacher_rollout
from common import PromptEncoder, UNetModel, dpm_solver, find_pipeline, image_shape, images_at_once, latent_shape
from common import load_pipeline, load_schedule, open_pipeline, with_guidance
from common import IMAGE_KINDS, LatentData, open_image, open_rows
from common import across_ranks, derive_seed, fingerprint, frozen_dtype, noise_generator, noise_of, number, parser_of
from common import positive_int, read_config, resolve_priors, save_sheet, seed_int, share, start_accelerator
# isort: on

TINY = Path(__file__).resolve().parent / "assets" / "tiny"
LPIPS_WEIGHTS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}
# What is measured, and on what. Any flag overrides its protocol; a resolution is that of FID and LPIPS on both sides:
# images are cut to their central square and resized by PIL's LANCZOS.
PROTOCOLS = {
    "tiny": {
        "prompts": "assets/tiny/data", "reference": "assets/tiny/data", "clip_weights": "assets/tiny/scorer",
        "resolution": 32, "num_images": 1000, "batch_size": 50, "steps": [32], "guidance_scale": [4.0],
        "metrics": ["alignment", "clip", "fd", "coverage", "diversity", "paired"],
    },
    "coco2017-512": {  # Tables 2, 3, 5-7: val2017, one caption an image; guidance 8 [D23]
        "resolution": 512, "num_images": 5000, "batch_size": 16, "steps": [32], "guidance_scale": [8.0],
        "metrics": ["fid", "clip", "hps", "lpips", "coverage"],
    },
    "coco2014-256": {  # Table 4: 30K captions of val2014 against all of its images
        "resolution": 256, "num_images": 30000, "batch_size": 16, "steps": [32], "guidance_scale": [8.0],
        "metrics": ["fid", "clip"],
    },
}  # fmt: skip
ORDERS, SHIFTS = ["teacher-student", "student-teacher"], ["mix", "switch", "interval", "gap"]
DEFAULTS = {
    "sampler": ["trained"], "seed": [0], "mix_teacher": [0, 0.2, 0.4, 0.6, 0.8, 1], "switch_order": ORDERS,
    "fid_weights": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "clip_weights": "laion2b_s12b_b42k", "hps_weights": "xswu/HPSv2/HPS_v2_compressed.pt", "lpips_net": "vgg",
}  # fmt: skip
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 50, 10  # sec. 5
FIRST_DIVERSITY_NOISE = 1_000_000  # index of their first noise: none that one image a caption has
PAIRED_PROMPTS = 256
IMAGE_THREADS = ThreadPoolExecutor(4)  # that reads and writes images

METHODS = {
    ("pd_ddil", None): "PD", ("lcm_ddil", None): "LCM", ("dmd2_ddil", None): "DMD2",
    # of recipes that train another model than the paper's rows of the method show
    ("lcm_ddil", "ssd1b"): "SSD1B-LCM", ("dmd2_ddil", "ssd1b_oracle"): "DMD2 b64", ("dmd2_ddil", "sd15"): "SD1.5-DMD2",
}  # fmt: skip
# The plain method's only source, and the settings of the paper's DDIL rows (App. A, [D12], [D16], [D17], [D19]): others
# get a row of their own.
PAPER_ARMS = {
    "pd_ddil": ("forward", {"p_forward": [0.75, 0.5], "student_rate": [0.15, 0.8], "reuse": 2, "store_start": False}),
    "lcm_ddil": ("forward", {"p_forward": [0.75, 0.5], "p_teacher": [0.0], "p_student": None, "store_start": False}),
    "dmd2_ddil": ("student", {"p_forward": [0.0], "p_teacher": None, "p_student": None, "mixed_rollout": False}),
}
# (label, steps) -> the paper's numbers, by the names of our columns
PAPER = {
    "coco2017-512": {  # Tables 2 and 3
        ("SD(v)", 32): {"FID": 22.50, "CLIP": 0.321, "LPIPS diversity": 0.62},
        ("SD(gc)", 32): {"FID": 24.46, "CLIP": 0.304, "LPIPS diversity": 0.62},
        ("PD", 4): {"FID": 23.34, "CLIP": 0.302, "LPIPS diversity": 0.60},
        ("PD + DDIL", 4): {"FID": 22.42, "CLIP": 0.302, "LPIPS diversity": 0.60},
        ("PD", 2): {"FID": 26.43, "CLIP": 0.288, "LPIPS diversity": 0.58},
        ("PD + DDIL", 2): {"FID": 24.13, "CLIP": 0.291, "LPIPS diversity": 0.58},
        ("LCM", 4): {"FID": 24.39, "CLIP": 0.305, "LPIPS diversity": 0.61},
        ("LCM + Reflected", 4): {"FID": 24.25, "CLIP": 0.306, "LPIPS diversity": 0.59},
        ("LCM + DDIL", 4): {"FID": 23.44, "CLIP": 0.308, "LPIPS diversity": 0.59},
        ("LCM + Reflected + DDIL", 4): {"FID": 22.86, "CLIP": 0.309, "LPIPS diversity": 0.59},
        ("LCM-LoRA", 4): {"FID": 36.46, "CLIP": 0.291, "LPIPS diversity": 0.61},
        ("SSD1B", 20): {"FID": 30.23, "CLIP": 0.336, "HPSv2": 0.297, "LPIPS diversity": 0.48},
        ("SSD1B-LCM", 4): {"FID": 35.23, "CLIP": 0.311, "HPSv2": 0.282, "LPIPS diversity": 0.45},
        ("DMD2 b64", 4): {"FID": 26.56, "CLIP": 0.337, "HPSv2": 0.309, "LPIPS diversity": 0.49},
        ("DMD2", 4): {"FID": 31.77, "CLIP": 0.320, "HPSv2": 0.302, "LPIPS diversity": 0.52},
        ("DMD2 + Reflected", 4): {"FID": 29.32, "CLIP": 0.323, "HPSv2": 0.302, "LPIPS diversity": 0.51},
        ("DMD2 + Reflected + DDIL", 4): {"FID": 27.72, "CLIP": 0.326, "HPSv2": 0.304, "LPIPS diversity": 0.51},
    },
    "coco2014-256": {  # Table 4
        ("LCM-LoRA", 4): {"FID": 23.62}, ("LCM-LoRA", 2): {"FID": 24.28}, ("PD", 4): {"FID": 14.72},
        ("PD + DDIL", 4): {"FID": 13.97}, ("PD", 2): {"FID": 16.46}, ("PD + DDIL", 2): {"FID": 15.81},
    },
}  # fmt: skip
PAPER_SHIFT = {  # Tables 5-7: (FID, CLIP)
    "p_T = 0.8": (23.14, 0.319), "p_T = 0.6": (22.33, 0.317), "p_T = 0.4": (21.95, 0.313), "p_T = 0.2": (21.92, 0.307),
    "teacher, then student from 749": (23.60, 0.309), "teacher, then student from 500": (23.80, 0.317),
    "teacher, then student from 250": (24.21, 0.320), "student, then teacher from 749": (21.64, 0.321),
    "student, then teacher from 500": (21.16, 0.314), "student, then teacher from 250": (22.05, 0.306),
}  # fmt: skip


steps_int = number(int, "a whole number from 1 to 999", lambda n: 1 <= n <= 999)
several_int = number(int, "a whole number > 1", lambda n: n > 1)
scale = number(float, "finite and at least 1, which is no guidance", lambda w: 1 <= w < math.inf)


def parse_args(argv=None):
    p = parser_of(__doc__, "MODEL ... [FLAGS]")
    p.add_argument("models", nargs="+", metavar="MODEL", help="run folder, runs/X/stages/8, pipeline folder, hub name")
    add, each = p.add_argument_group("what is measured").add_argument, "one value, or one for each model"
    add("--protocol", choices=PROTOCOLS, default="tiny", help="table of defaults (default tiny: all offline)")
    add("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=", ".join(METRICS))
    add("--prompts", help="COCO's annotation json, a text or json list, or a data set: its held-out captions")
    add("--reference", help="real images: a folder, a data set (its training images), or an evaluation's .safetensors")
    add("--num_images", type=several_int, help="one for each of so many prompts, spread evenly over the list")
    add("--resolution", type=positive_int, help="of FID and LPIPS: images are cut to a square and resized by LANCZOS")
    add("--steps", type=steps_int, nargs="+", help=f"{each} (default: the run's; teachers 32)")
    add("--guidance_scale", type=scale, nargs="+", help=f"{each} (default: the run's, or the protocol's)")
    add("--sampler", choices=["trained", "ddim", "dpm++"], nargs="+", help=f"dpm++ is the paper's for PD; {each}")
    add("--seed", type=seed_int, nargs="+", help="several are averaged")
    add = p.add_argument_group("covariate shift (App. E)").add_argument
    add("--shift", nargs="*", choices=SHIFTS, help="analyse PD students beside their teacher; none named = all")
    add("--teacher", help="default: the run's stages/v, or the teacher it was distilled from")
    add("--teacher_steps", type=steps_int, help="its DDIM steps (default: the run's, or 32)")
    add("--mix_teacher", type=share, nargs="+", metavar="P", help="Table 5: how often the teacher moves")
    add("--switch_at", type=int, nargs="+", metavar="T", help="Tables 6, 7: where the second takes over")
    add("--switch_order", choices=ORDERS, nargs="+", help="Table 6, Table 7; default both")
    add("--data", help="images with captions whose forward diffusion is compared (default: the run's)")
    add = p.add_argument_group("run").add_argument
    add("--curves", action="store_true", help="only draw the runs' metrics.csv, beside the embedded default's own")
    add("--batch_size", type=positive_int, help="images a process and forward; results do not depend on it")
    add("--output_dir", help="images and tables (default runs/evaluate-PROTOCOL); run again, it goes on there")
    add("--overwrite", action="store_true", help="replace images there that were made by other settings")
    add("--fid_weights", help="torch-fidelity's Inception: file or URL")
    add("--clip_weights", help="of ViT-g-14: file or open_clip's tag; or a folder with open_clip_config.json")
    add("--hps_weights", help="of HPSv2's ViT-H-14: file, folder or hub OWNER/NAME/FILE (HPS_v2.1_compressed.pt: v2.1)")
    add("--lpips_weights", help="torchvision's weights of the trunk: file or URL")
    add("--lpips_net", choices=LPIPS_WEIGHTS, help="the paper does not say which")
    args = p.parse_args(argv)
    args.given = {name for name, value in vars(args).items() if value is not None}
    defaults = DEFAULTS | PROTOCOLS[args.protocol] | {"output_dir": f"runs/evaluate-{args.protocol}"}
    for name in defaults.keys() - args.given:
        setattr(args, name, defaults[name])
    args.lpips_weights = args.lpips_weights or LPIPS_WEIGHTS[args.lpips_net]
    implied = ["mix"] * ("mix_teacher" in args.given) + ["switch"] * bool(args.given & {"switch_at", "switch_order"})
    args.shift = SHIFTS if args.shift == [] else list(dict.fromkeys([*(args.shift or []), *implied]))
    for name in ("steps", "guidance_scale", "sampler"):
        if len(getattr(args, name)) not in (1, len(args.models)):
            raise SystemExit(f"--{name} {getattr(args, name)}: must be one value, or one for each of the models")
    if set(args.shift) - {"gap"} and not any(METRICS[metric].image_set == "one each" for metric in args.metrics):
        raise SystemExit(f"--shift {' '.join(args.shift)}: needs --metrics of one image a prompt, got {args.metrics}")
    for name, needed in ("prompts", True), ("reference", {"fid", "fd", "coverage"} & set(args.metrics)):
        if needed and getattr(args, name) is None:
            raise SystemExit(f"--{name}: the protocol {args.protocol} has no default; give COCO's own, or others")
    return args


@contextmanager
def exit_on_error(message: str):
    """Whatever goes wrong within, and be it in a library, ends as SystemExit with this message and the reason."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  broken files and lacking networks raise all there is
        raise SystemExit(f"{message} ({' '.join(str(error).split())[:200]})")


# ----------------------------------------------------------------------------------------------------------------------
# 1. What is evaluated: models and prompts
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One model and its sampling settings; candidates of one label share a row of the table."""

    label: str
    model: str  # pipeline folder or hub name
    steps: int
    guidance_scale: float
    sampler: str
    run: Path | None = None  # the run folder that it comes from, and what that says
    script: str | None = None
    config: dict = field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """Name of its files."""
        name = f"{self.model}-{self.steps}-{self.sampler}-w{self.guidance_scale:g}"
        return re.sub(r"[^\w.-]+", "_", name).strip("_.")

    @property
    def is_teacher(self) -> bool:
        return bool(self.run) and Path(self.model).name in ("v", "gc")


def label_of(script: str, config: dict, stage: str) -> str:
    """Row name as in the paper's tables; variants that the paper has not list the flags that differ."""
    if stage in ("v", "gc"):
        return f"SD({stage})"
    plain, arm = PAPER_ARMS[script]
    name = METHODS.get((script, config.get("recipe"))) or METHODS[script, None]
    settings = []
    if script == "pd_ddil":  # the paper's are reflected
        is_plain, settings = min(config["p_forward"]) == 1, ["not reflected"] * (config["reflect"] == "none")
    else:
        name += "-LoRA" * bool(config.get("lora_rank")) + " + Reflected" * (config["reflect"] != "none")
        is_plain = min(resolve_priors(argparse.Namespace(**config))[plain]) == 1
    if not is_plain:
        is_control = config.get("forward_control", False)
        name += " + control" if is_control else " + DDIL"
        without = ("student_rate", "reuse") if is_control else ()  # which are of trajectories
        others = {flag: config.get(flag, usual) for flag, usual in arm.items() if flag not in without}
        settings += [f"{f} {json.dumps(v).strip('[]')}" for f, v in others.items() if v != arm[f]]
    return ", ".join([name, *settings])


def parse_model(name: str) -> tuple[str, str, Path | None, str | None]:
    """(label or "", model, the run folder that it belongs to, its script) of LABEL=MODEL."""
    label, _, model = ("", "", name) if Path(name).exists() else name.rpartition("=")
    path = Path(model)
    for folder, script in product((path, path.parent, path.parent.parent), PAPER_ARMS):
        if (folder / f"{script}.py").is_file() and (folder / "config.json").is_file():
            return label, model, folder, script
    return label, model, None, None


def candidate_of(args, i: int) -> Candidate:
    """The i-th model, with its own run's settings where no flag says otherwise."""
    label, model, folder, script = parse_model(args.models[i])
    path = Path(model)
    settings = {n: getattr(args, n)[i % len(getattr(args, n))] for n in ("steps", "guidance_scale", "sampler")}
    if not folder:
        return Candidate(label or (path.parent if path.name == "pipeline" else path).name, model, **settings)
    if path == folder:
        path = folder / "pipeline"
        if not path.is_dir():
            raise SystemExit(f"{folder}: the run is not finished (no pipeline/); name one of stages/, or --resume it")
    config, stage, own = read_config(folder), path.name, {}
    whose = "teacher_steps" if stage in ("v", "gc") else "student_steps"
    own["steps"] = int(stage) if stage.isdigit() else config[whose]
    own["guidance_scale"] = 1.0 if config.get("lora_rank") else config.get("eval_guidance_scale", 1.0)
    takes_w = json.loads((path / "unet" / "config.json").read_bytes()).get("time_cond_proj_dim")
    if script == "dmd2_ddil" and takes_w:
        own["guidance_scale"] = config["guidance_scale"]  # the only one that it was trained at
    settings |= {n: value for n, value in own.items() if n not in args.given}
    label = label or label_of(script, config, stage)
    return Candidate(label, str(path), **settings, run=folder, script=script, config=config)


class Prompt(NamedTuple):
    text: str
    image: Path | None = None  # that it was inverted from


def read_prompts(name: str) -> list[Prompt]:
    """--prompts: COCO's annotations (the first caption of each image, by id), a json list or {id: prompt} (entries may
    be {"prompt": ..., "image": ...}), a text file with one a line, or a data set. SystemExit naming what is wrong."""
    path = Path(name)
    with exit_on_error(f"--prompts {name}: is no .txt or .json file of prompts, nor a data set"):
        if path.suffix == ".json":
            entries = json.loads(path.read_text(encoding="utf-8"))
            if "annotations" in entries:
                rows = sorted(entries["annotations"], key=lambda row: (row["image_id"], row["id"]), reverse=True)
                entries = dict(sorted({row["image_id"]: row["caption"] for row in rows}.items()))
            entries = [*entries.values()] if isinstance(entries, dict) else entries
        elif path.suffix == ".txt":
            entries = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            entries = open_rows(name, "--prompts", need_images=False).held_out
    if not isinstance(entries, list) or not entries:
        raise SystemExit(f"--prompts {name}: holds no prompts")
    prompts = []
    for i, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {"prompt": entry}
        text, image = entry.get("prompt"), path.parent / entry["image"] if entry.get("image") else None
        is_usable = isinstance(text, str) and text.strip() and not set(entry) - {"prompt", "image"}
        if not is_usable or image and not image.is_file():
            wanted = 'a text, or {"prompt": text, "image": a file that exists}'
            raise SystemExit(f"--prompts {name}: entry {i} is {entry}; it must be {wanted}")
        prompts.append(Prompt(text.strip(), image))
    return prompts


def subsample_evenly(items: Sequence, n: int) -> list:
    return [items[i * len(items) // n] for i in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Images: a folder with a manifest, made once, and gone on with
# ----------------------------------------------------------------------------------------------------------------------


class Images:
    """Images in order: files, or the rows of a data set; their prompts, and `settings` that say how they came to be."""

    def __init__(self, source, prompts: Sequence[str] = (), settings: dict | None = None):
        self.source, self.prompts, self.settings = source, prompts, settings or {}

    def __len__(self) -> int:
        return len(self.source)

    def open(self, row: int) -> Image.Image:
        file = self.source[row] if isinstance(self.source, list) else None
        what = file or f"--reference: image {row}"
        with exit_on_error(f"{what}: cannot be read; a generated one is made again if deleted"):
            return open_image(file or self.source[row]["image"])

    def load(self, rows: Tensor) -> list[Image.Image]:
        """RGB; SystemExit naming the one that is broken."""
        return list(IMAGE_THREADS.map(self.open, rows.tolist()))


def reference_images(name: str) -> Images:
    """--reference: the images in a folder, or the training images of a data set."""
    files = [f for f in sorted(Path(name).glob("*")) if f.suffix[1:].lower() in IMAGE_KINDS]
    images = Images(files or open_rows(name, "--reference", need_captions=False).train)
    if len(images) < 2:
        raise SystemExit(f"--reference {name}: holds {len(images)} image(s)")
    return images


Sampler = Callable[[list[str], list[int]], Tensor]  # prompts, noise indices -> images [B, 3, H, W] in [0, 1]


def pipeline_sampler(pipe, candidate: Candidate, seed: int) -> Sampler:
    """The stock pipeline, as anyone would use it; each image has a generator of its own."""
    settings = {"num_inference_steps": candidate.steps, "guidance_scale": candidate.guidance_scale, "output_type": "pt"}
    settings["height"], settings["width"] = image_shape(pipe)

    def sample(prompts: list[str], noise_indices: list[int]) -> Tensor:
        generators = [noise_generator(i, seed) for i in noise_indices]  # its first draw is common.noise_of
        return pipe(prompts, generator=generators, **settings).images

    return sample


def open_candidate(candidate: Candidate, accelerator):
    """Its pipeline with the sampler asked for, on the device, in the precision of the launch."""
    pipe = open_pipeline(candidate.model, "MODEL")
    if not hasattr(pipe, "unet"):
        raise SystemExit(f"MODEL {candidate.model}: {type(pipe).__name__} has no UNet")
    if candidate.sampler != "trained":
        config = pipe.scheduler.config
        if "beta_start" not in config or config.get("prediction_type") not in ("epsilon", "v_prediction", "sample"):
            raise SystemExit(f"--sampler: {candidate.model} has a {type(pipe.scheduler).__name__}; take trained")
        pipe.scheduler = dpm_solver(pipe, config.prediction_type, order={"ddim": 1, "dpm++": 2}[candidate.sampler])
    with exit_on_error(f"--steps {candidate.steps}: {candidate.model} cannot be sampled in as many"):
        pipe.scheduler.set_timesteps(candidate.steps)
    if math.prod(image_shape(pipe)) > 256**2:
        pipe.vae.enable_slicing()  # a batch of decodes does not fit
    return pipe.to(accelerator.device, frozen_dtype(accelerator))


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def fingerprint_pipeline(pipe) -> str:
    """A digest of all networks and settings and what tokenizers do: no other model of the same name is taken for it."""
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    networks = [fingerprint(part) for part in parts.values() if isinstance(part, torch.nn.Module)]
    configs = [vars(part.config) for part in (pipe, *parts.values()) if hasattr(part, "config")]
    settings = [{n: v for n, v in config.items() if n[0] != "_"} for config in configs]  # the others: paths, versions
    tokens = [part("a 7", padding="max_length").input_ids for n, part in parts.items() if n.startswith("tokenizer")]
    return digest([networks, settings, tokens])


def generate(ev, name: str, settings: dict, sample: Sampler, prompts: list[str], first_index: int = 0) -> Images:
    """images/NAME/: one PNG for each prompt, from noise first_index + its place; the ranks share the work. What is
    there already is kept, so that a killed evaluation goes on. SystemExit if other settings made it, or at a NaN."""
    folder, accelerator = ev.out / "images" / name, ev.accelerator
    files = [folder / f"{i:06d}.png" for i in range(len(prompts))]
    settings = settings | {"prompts": digest(prompts), "num_images": len(prompts)}
    settings["precision"] = accelerator.mixed_precision
    if accelerator.is_main_process:
        rows = [{"file": f.name, "prompt": p, "noise": first_index + i} for i, (f, p) in enumerate(zip(files, prompts))]
        create_or_resume(folder, {"settings": settings, "images": rows}, ev.args.overwrite)
    accelerator.wait_for_everyone()
    mine = range(accelerator.process_index, len(files), accelerator.num_processes)
    todo, size = [i for i in mine if not files[i].exists()], ev.args.batch_size
    silent = not accelerator.is_main_process or not todo
    saving = []  # while the next batch is sampled
    with tqdm(total=len(todo), desc=f"images/{name}", dynamic_ncols=True, leave=False, disable=silent) as bar:
        for batch in (todo[k : k + size] for k in range(0, len(todo), size)):
            images = sample([prompts[i] for i in batch], [first_index + i for i in batch]).float()
            list(saving)  # raises what went wrong
            for i, is_finite in zip(batch, images.isfinite().all(dim=(1, 2, 3)).tolist()):
                if not is_finite:
                    raise SystemExit(f"{files[i]}: the image of {prompts[i]!r}, seed {settings['seed']}, is not finite")
            pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # as diffusers does
            saving = IMAGE_THREADS.map(save_image, [files[i] for i in batch], pixels)
            bar.update(len(batch))
        list(saving)
    accelerator.wait_for_everyone()
    return Images(files, prompts, settings)


def save_image(file: Path, pixels) -> None:
    """Under another name first, so that no kill leaves half an image."""
    Image.fromarray(pixels).save(file.with_suffix(".tmp"), format="PNG")
    file.with_suffix(".tmp").replace(file)


def create_or_resume(folder: Path, manifest: dict, overwrite: bool) -> None:
    """Start the folder, or go on with it if its manifest has the same settings; otherwise SystemExit, or start anew."""
    file, now = folder / "manifest.json", json.loads(json.dumps(manifest["settings"]))
    if file.is_file():
        before = json.loads(file.read_bytes())["settings"]
        differs = [f"{n}: {before.get(n)} there, now {now.get(n)}" for n in before | now if before.get(n) != now.get(n)]
        if not differs:
            return
        if not overwrite:
            why = f"holds images of another evaluation ({'; '.join(differs)})"
            raise SystemExit(f"--output_dir: {folder} {why}; choose another folder, or --overwrite replaces them")
        for old in folder.iterdir():
            if re.fullmatch(r"\d{6,}\.(png|tmp)", old.name):
                old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, manifest)


def write_json(file: Path, content) -> None:
    file.with_suffix(".tmp").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    file.with_suffix(".tmp").replace(file)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Metrics: networks -> features of all images -> scores
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A network that measures, and what its numbers depend on: name and sha256 of its weights, a resize."""

    name: str
    provenance: dict
    encode_images: Callable[[list[Image.Image]], Tensor]  # [B, ...] -> features [B, D]; LPIPS: -> [1, pairs]
    encode_texts: Callable[[list[str]], Tensor] | None = None  # -> features [B, D]


def weights_file(flag: str, source: str) -> Path:
    """The local file that a --<metric>_weights names; a URL or hub OWNER/NAME/FILE is fetched and kept in the cache."""
    from open_clip.pretrained import download_pretrained_from_hf, download_pretrained_from_url

    if Path(source).is_file():
        return Path(source)
    is_url = source.startswith("https://")
    if not is_url and (source.count("/") != 2 or source.startswith((".", "/", "~"))):
        raise SystemExit(f"{flag} {source}: no such file")
    with exit_on_error(f"{flag} {source}: cannot be fetched; fetch it elsewhere and give the file"):
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise OSError("HF_HUB_OFFLINE is set")
        if is_url:  # each has a folder, as many files have one name
            return Path(download_pretrained_from_url(source, os.path.expanduser(f"~/.cache/clip/{digest(source)}")))
        return Path(download_pretrained_from_hf(*source.rsplit("/", 1)))


def describe_weights(file: Path, name: str = "", resolution: int | None = None) -> dict:
    with file.open("rb") as f:
        facts = {"weights": f"{name}, {file.name}".strip(", "), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
    return facts | ({"resize": f"central square, LANCZOS to {resolution}"} if resolution else {})


def stack_uint8(images: list[Image.Image], size: int | None = None) -> Tensor:
    """[B, 3, H, W]; of their central squares, resized by LANCZOS, where a size is given."""
    arrays = []
    for image in images:
        if size:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)
        arrays.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(arrays)


def load_inception(args, device) -> FeatureExtractor:
    """FID's network: torch-fidelity's InceptionV3 and its own resize to 299; [B, 2048]."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = weights_file("--fid_weights", args.fid_weights)
    with exit_on_error(f"--fid_weights {args.fid_weights}: does not hold torch-fidelity's InceptionV3"):
        torch.load(file, weights_only=True, map_location="cpu")  # torch-fidelity alone would run code in the file
        net = FeatureExtractorInceptionV3("inception", ["2048"], str(file)).to(device)
    features = lambda images: net(stack_uint8(images, args.resolution).to(device))[0]
    return FeatureExtractor("Inception", describe_weights(file, resolution=args.resolution), features)


def load_clip(args, device, flag: str = "clip_weights", architecture: str = "ViT-g-14") -> FeatureExtractor:
    """An open_clip model: normalised features of images and texts."""
    import open_clip

    source = getattr(args, flag)
    what, path, name, weights = f"--{flag} {source}", Path(source), architecture, None
    if path.is_dir():
        name, file = f"local-dir:{path}", next(path.glob("open_clip*model.*"), None)
        if file is None or not (path / "open_clip_config.json").is_file():
            raise SystemExit(f"{what}: must hold open_clip_config.json and open_clip_model.safetensors")
    elif tag := open_clip.get_pretrained_cfg(name, source):
        with exit_on_error(f"{what}: {name} cannot be fetched; fetch it elsewhere and give the file"):
            file = weights = Path(open_clip.download_pretrained(tag))
    else:
        file = weights = weights_file(f"--{flag}", source)
    with exit_on_error(f"{what}: does not hold a {name}"):
        net, _, preprocess = open_clip.create_model_and_transforms(name, weights and str(weights), device=device)
        tokenizer = open_clip.get_tokenizer(name)
    net.eval()
    if flag == "hps_weights":
        preprocess = partial(resize_and_pad, visual=net.visual)
    features = lambda images: net.encode_image(torch.stack([*map(preprocess, images)]).to(device), normalize=True)
    title = "tiny" if path.resolve() == TINY / "scorer" else path.name if path.is_dir() else architecture
    texts = lambda prompts: net.encode_text(tokenizer(prompts).to(device), normalize=True)
    facts = describe_weights(file, title)
    if path.is_dir():
        facts["config"] = digest((path / "open_clip_config.json").read_text(encoding="utf-8"))  # has the preprocessing
    return FeatureExtractor(title, facts, features, texts)


def resize_and_pad(image: Image.Image, visual) -> Tensor:
    """HPSv2's preprocessing: the long side to 224 (bicubic, on tensors), black bars to a square, CLIP's mean, std."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    size = visual.image_size[0]
    height, width = (round(side * (size / max(image.size))) for side in (image.height, image.width))
    x = F.resize(F.to_tensor(image), [height, width], InterpolationMode.BICUBIC, antialias=True)
    return F.normalize(F.center_crop(x, [size, size]), visual.image_mean, visual.image_std)  # it pads


def load_lpips(args, device) -> FeatureExtractor:
    """LPIPS with a trunk from a file: distances of all pairs of a prompt's images."""
    from lpips import LPIPS

    file = weights_file("--lpips_weights", args.lpips_weights)
    with exit_on_error(f"--lpips_weights {args.lpips_weights}: does not hold torchvision's {args.lpips_net}"):
        trunk = torch.load(file, weights_only=True, map_location="cpu")
        net = LPIPS(net=args.lpips_net, pnet_rand=True, verbose=False)  # the package brings its own linear heads
        names = net.net.state_dict()  # slice2.5.weight is torchvision's features.5.weight
        net.net.load_state_dict({name: trunk["features." + name.partition(".")[2]] for name in names})
    net.to(device).eval()

    def pairwise(images: list[Image.Image]) -> Tensor:
        x = stack_uint8(images, args.resolution).to(device) / 255
        pairs = torch.combinations(torch.arange(len(x), device=device)).split(8)  # the trunk's activations are large
        return torch.cat([net(x[i], x[j], normalize=True).flatten() for i, j in (p.T for p in pairs)])[None]

    return FeatureExtractor(args.lpips_net, describe_weights(file, args.lpips_net, args.resolution), pairwise)


def load_tiny_classifier(args, device) -> FeatureExtractor:
    """assets/tiny's own classifier: the colour, digit and background in an image, and those in a caption, [B, 3]."""
    world = runpy.run_path(str(TINY / "make.py"))
    net, colour = world["load_judge"](device), world["nearest_colour"]

    def seen(images: list[Image.Image]) -> Tensor:
        digit, foreground, background = world["separate"](stack_uint8(images).to(device) / 255)
        return torch.stack([colour(foreground), net(digit).argmax(dim=1), colour(background)], dim=1)

    def said(prompts: list[str]) -> Tensor:
        with exit_on_error("--metrics alignment: judges the captions of assets/tiny, and not all prompts are such"):
            return torch.tensor([world["parse_caption"](prompt) for prompt in prompts], device=device)

    return FeatureExtractor("judge", describe_weights(TINY / "judge" / "judge.safetensors"), seen, said)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) between the Gaussians of features [n, D], [m, D], in fp64."""
    (m_a, c_a), (m_b, c_b) = ((f.mean(dim=0), f.T.cov()) for f in (a.double(), b.double()))
    values, vectors = torch.linalg.eigh(c_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # C_a^(1/2); C_a C_b has the eigenvalues of root C_b root
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * cross).item()


def coverage_of(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real points [n, D] with a generated one [m, D] nearer than their k-th real neighbour (Naeem 2020)."""
    real, fake = real.double(), fake.double()
    parts = real.split(1000)
    radii = torch.cat([torch.cdist(part, real).kthvalue(k + 1, dim=1).values for part in parts])  # the 1st is itself
    nearest = torch.cat([torch.cdist(part, fake).amin(dim=1) for part in parts])
    return (nearest < radii).double().mean().item()


def score(value: float, n: int, standard_error: float | None = None, **more) -> dict:
    return {"value": value, "standard_error": standard_error, "n": n} | more


def mean_of(values: Tensor, **more) -> dict:
    """Mean of independent values [n], and its standard error."""
    values = values.double()
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return score(values.mean().item(), len(values), error, **more)


def mean_cosine(ev, net: FeatureExtractor, images: Images) -> dict:
    """Mean cosine of images and their prompts, as it is: not times 100, not cut at 0."""
    return mean_of((ev.features(net, images) * ev.texts(net, images)).sum(dim=1))


def alignment(ev, net: FeatureExtractor, images: Images) -> dict:
    """Share of images whose digit and both colours are right."""
    right = ev.features(net, images) == ev.texts(net, images)  # [n, 3]
    parts = right.double().mean(dim=0).tolist()
    return mean_of(right.all(dim=1), parts=dict(zip(("foreground", "digit", "background"), parts)))


def frechet(ev, net: FeatureExtractor, images: Images) -> dict:
    return score(frechet_distance(ev.features(net, images), ev.reference(net)), len(images))


def coverage(ev, net: FeatureExtractor, images: Images) -> dict:
    """Coverage of at most 10,000 images a side, drawn at random."""
    drawn = lambda f: f[torch.randperm(len(f), generator=torch.Generator().manual_seed(0))[:10_000]]
    real, fake = drawn(ev.reference(net)), drawn(ev.features(net, images))
    return score(coverage_of(real, fake), len(fake), n_real=len(real))


def lpips_diversity(ev, net: FeatureExtractor, images: Images) -> dict:
    """Mean LPIPS of all pairs of a prompt's images, mean over prompts."""
    of_prompt = lambda i: net.encode_images(images.load(i * DIVERSITY_SEEDS + torch.arange(DIVERSITY_SEEDS)))
    return mean_of(ev.across_ranks(len(images) // DIVERSITY_SEEDS, of_prompt, 1).mean(dim=1))


def diversity(ev, net: FeatureExtractor, images: Images) -> dict:
    """As LPIPS diversity, with 1 - cosine of image features."""
    f = ev.features(net, images).unflatten(0, (-1, DIVERSITY_SEEDS))  # [prompts, 10, D]
    first, second = torch.combinations(torch.arange(DIVERSITY_SEEDS)).T
    return mean_of(1 - (f[:, first] * f[:, second]).sum(dim=-1).mean(dim=1))


def similarity(ev, net: FeatureExtractor, images: Images) -> dict:
    """Mean cosine, in image features, to the image that a prompt was inverted from (Table 8)."""
    f = ev.features(net, images).unflatten(0, (-1, DIVERSITY_SEEDS))
    sources = ev.features(net, Images([prompt.image for prompt in ev.diversity_prompts]))
    return mean_of((f * sources[:, None]).sum(dim=-1).mean(dim=1))


class Metric(NamedTuple):
    title: str
    net: Callable | None
    image_set: str  # that it takes: one each | several
    function: Callable | None  # (evaluation, network, images) -> score


load_hps = partial(load_clip, flag="hps_weights", architecture="ViT-H-14")
METRICS = {
    "fid": Metric("FID", load_inception, "one each", frechet),
    "clip": Metric("CLIP", load_clip, "one each", mean_cosine),
    "hps": Metric("HPSv2", load_hps, "one each", mean_cosine),
    "fd": Metric("FD", load_clip, "one each", frechet),
    "coverage": Metric("coverage", load_clip, "one each", coverage),  # or load_inception, where FID is asked for
    "alignment": Metric("alignment", load_tiny_classifier, "one each", alignment),
    "lpips": Metric("LPIPS diversity", load_lpips, "several", lpips_diversity),
    "diversity": Metric("diversity", load_clip, "several", diversity),
    "similarity": Metric("similarity", load_clip, "several", similarity),
    "paired": Metric("paired error", None, "none", None),  # of PD's students: see paired
}
PLAIN = ["FID (Inception)", "CLIP (ViT-g-14)", "HPSv2 (ViT-H-14)", "alignment (judge)"]  # known by their first word
PLAIN += [f"LPIPS diversity ({net})" for net in LPIPS_WEIGHTS]


class Evaluation:
    """What all models share: prompts, reference, the metrics' networks, and the folder where everything is kept."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator, self.out = args, accelerator, Path(args.output_dir)
        prompts = read_prompts(args.prompts)
        self.kinds = {METRICS[metric].image_set for metric in args.metrics} | ({"one each"} if args.shift else set())
        if len(prompts) < args.num_images and self.kinds != {"several"}:
            raise SystemExit(f"--num_images {args.num_images}: --prompts {args.prompts} holds only {len(prompts)}")
        self.prompts = [prompt.text for prompt in subsample_evenly(prompts, min(args.num_images, len(prompts)))]
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))  # sec. 5: random prompts
        self.diversity_prompts = [prompts[i] for i in order[:DIVERSITY_PROMPTS].sort().values]
        if "similarity" in args.metrics and not all(prompt.image for prompt in self.diversity_prompts):
            raise SystemExit(f'--metrics similarity: --prompts {args.prompts} must name the "image" of each prompt')
        makers = {metric: METRICS[metric].net for metric in args.metrics if METRICS[metric].net}
        if {"coverage", "fid"} <= makers.keys():
            makers["coverage"] = load_inception
        opened = {maker: maker(args, accelerator.device) for maker in dict.fromkeys(makers.values())}
        self.nets = {metric: opened[maker] for metric, maker in makers.items()}
        if "alignment" in self.nets:
            self.nets["alignment"].encode_texts(self.prompts)  # refused now, if at all
        self.by_reference = [metric for metric in args.metrics if metric in ("fid", "fd", "coverage")]
        self.image_metrics = [metric for metric in args.metrics if METRICS[metric].image_set == "one each"]
        self.real, self.last, self.of_reference = None, {}, {}
        if self.by_reference and not args.reference.endswith(".safetensors"):
            self.real = reference_images(args.reference)
        for metric in self.by_reference if self.real is None else ():
            self.reference(self.nets[metric])  # refused now, if at all

    def title(self, metric: str) -> str:
        """A column's name, which says what was measured: plain "CLIP" is that of ViT-g-14, plain "FID" Inception's."""
        title = METRICS[metric].title
        named = f"{title} ({self.nets[metric].name})" if metric in self.nets else title
        return title if named in PLAIN else named

    @torch.no_grad()  # or each batch would keep its graph
    def across_ranks(self, n: int, function: Callable[[Tensor], Tensor], batch_size: int | None = None) -> Tensor:
        """function(rows) [B, ...] of the rows 0 .. n - 1, in order; the ranks share the work."""
        batch_size = batch_size or self.args.batch_size
        return torch.cat([part.cpu() for part in across_ranks(self.accelerator, n, batch_size, function, "measuring")])

    def features(self, net: FeatureExtractor, images: Images) -> Tensor:
        """Features of all images, [n, D]; metrics of one network share the last ones."""
        if self.last.get(net, (None,))[0] is not images:
            self.last[net] = images, self.across_ranks(len(images), lambda rows: net.encode_images(images.load(rows)))
        return self.last[net][1]

    def texts(self, net: FeatureExtractor, images: Images) -> Tensor:
        return self.across_ranks(len(images), lambda rows: net.encode_texts([images.prompts[i] for i in rows]))

    def reference(self, net: FeatureExtractor) -> Tensor:
        """Features of the real images; kept in a file, which --reference of another evaluation may name."""
        if net not in self.of_reference and self.real is None:
            self.of_reference[net] = load_features(Path(self.args.reference), net.provenance)
        elif net not in self.of_reference:
            features = lambda rows: net.encode_images(self.real.load(rows))
            self.of_reference[net] = f = self.across_ranks(len(self.real), features)
            if self.accelerator.is_main_process:
                facts = net.provenance | {"reference": self.args.reference}
                save_file({"features": f}, self.out / f"reference-{net.name}.safetensors", metadata=facts)
        return self.of_reference[net]

    def measure(self, metric: str, images: Images) -> dict:
        net = self.nets[metric]
        facts = net.provenance | images.settings
        if metric in self.by_reference:
            facts["reference"] = self.args.reference
            facts["reference_sha256"] = hashlib.sha256(self.reference(net).numpy()).hexdigest()  # its images may change
        return {"metric": self.title(metric)} | METRICS[metric].function(self, net, images) | {"facts": facts}


def load_features(file: Path, facts: dict[str, str]) -> Tensor:
    """Those that an evaluation kept; SystemExit if they are of another network or another resize."""
    if not file.is_file():
        raise SystemExit(f"--reference {file}: no such file")
    with exit_on_error(f"--reference {file}: cannot be read as features"), safe_open(file, framework="pt") as saved:
        there = saved.metadata() or {}
        differs = [f"{name} is {there.get(name)} there, {v} here" for name, v in facts.items() if there.get(name) != v]
        if differs:
            raise SystemExit(f"--reference {file}: holds other features ({'; '.join(differs)})")
        return saved.get_tensor("features")


def ddim_model(pipe, schedule, encoder: PromptEncoder, accelerator):
    """A pipeline's UNet as model(z_t, t, cond) -> v_hat at guidance scale cond["w"], an input of it or by CFG."""
    unet = pipe.unet.to(accelerator.device, frozen_dtype(accelerator))
    model = UNetModel(unet, schedule, pipe.scheduler.config.prediction_type, accelerator.autocast)
    return model if unet.config.time_cond_proj_dim is not None else with_guidance(model, encoder.null())


def refuse_retrained(candidate: Candidate, teacher: str, pipe) -> None:
    """SystemExit if the teacher that the run names has other weights by now than those that it was distilled from."""
    config = candidate.config
    if teacher == config.get("teacher") and config.get("teacher_weights") not in (None, fingerprint(pipe.unet)):
        why = f"its teacher {teacher} was trained anew since; distil it anew, or do without paired and give --teacher"
        raise SystemExit(f"MODEL {candidate.model}: {why}")


def paired(ev: Evaluation, candidate: Candidate, pipe, teacher, seed: int) -> dict:
    """Paired trajectory error of PD: latent RMS distance between DDIM end points of the student and of the guided model
    it was distilled from, for the same noise, prompt and w."""
    device, prompts = ev.accelerator.device, subsample_evenly(ev.prompts, min(PAIRED_PROMPTS, len(ev.prompts)))
    schedule, encoder = load_schedule(teacher).to(device), PromptEncoder(teacher, device)

    def ends(pipeline, steps: int) -> Tensor:
        model, grid = ddim_model(pipeline, schedule, encoder, ev.accelerator), [*timestep_grid(steps), CLEAN]

        def sample(rows: Tensor) -> Tensor:
            cond = encoder.encode(encoder.tokenize([prompts[i] for i in rows]))
            cond["w"] = torch.full((len(rows),), candidate.guidance_scale, device=device)
            z = noise_of(rows, latent_shape(pipeline), seed).to(device)
            return student_rollout(schedule, model, z, grid, cond)[-1]

        return ev.across_ranks(len(prompts), sample)

    distance = ends(pipe, candidate.steps) - ends(teacher, candidate.config["teacher_steps"])
    return score(distance.square().mean().sqrt().item(), len(prompts), metric=ev.title("paired"))


def evaluate(ev: Evaluation, candidate: Candidate) -> list[dict]:
    """What one model gave, for each seed."""
    pipe = open_candidate(candidate, ev.accelerator)
    is_guided_twice = candidate.guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
    nfe = len(pipe.scheduler.timesteps) * (1 + is_guided_twice)
    asked = {name: getattr(candidate, name) for name in ("model", "steps", "guidance_scale", "sampler")}
    asked["model_weights"], guided, results = fingerprint_pipeline(pipe), None, []
    if "paired" in ev.args.metrics and candidate.script == "pd_ddil":
        gc = candidate.run / "stages" / "gc"
        guided = load_pipeline(teacher := str(gc) if gc.is_dir() else candidate.config["teacher"])
        refuse_retrained(candidate, teacher, guided)
    for seed in ev.args.seed:
        key, settings, images = f"{candidate.key}-seed{seed}", asked | {"seed": seed}, {}
        sample = pipeline_sampler(pipe, candidate, seed)
        if ev.image_metrics:
            images["one each"] = generate(ev, key, settings, sample, ev.prompts)
        if "several" in ev.kinds:
            prompts = [prompt.text for prompt in ev.diversity_prompts for _ in range(DIVERSITY_SEEDS)]
            name = f"{key}-{DIVERSITY_SEEDS}each"
            images["several"] = generate(ev, name, settings, sample, prompts, FIRST_DIVERSITY_NOISE)
        scores = {metric: ev.measure(metric, images[METRICS[metric].image_set]) for metric in ev.nets}
        if guided:
            scores["paired"] = paired(ev, candidate, pipe, guided, seed)
        row = {"label": candidate.label, "key": key, "nfe": nfe, "protocol": ev.args.protocol}
        results.append(row | settings | {"scores": scores})
    return results


# ----------------------------------------------------------------------------------------------------------------------
# 4. Covariate shift: teacher and student on one trajectory, by DDIM, which is stateless (App. E)
# ----------------------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """Who makes each of the student's intervals."""

    kind: str
    name: str
    moves: str = ""  # one letter an interval, e.g. "TSSS": the teacher makes the first one
    p_teacher: float = 0.0  # without moves: the teacher's chance at each interval

    def student_rate(self, noise_indices: Sequence[int], n_intervals: int, seed: int) -> Tensor:
        """[B, intervals], 1 where the student moves, else 0: drawn for each image alone, the same in all mixtures."""
        if self.moves:
            return torch.tensor([float(who == "S") for who in self.moves]).expand(len(noise_indices), -1)
        generators = [torch.Generator().manual_seed(derive_seed(seed, "who moves", i)) for i in noise_indices]
        return torch.stack([(torch.rand(n_intervals, generator=g) >= self.p_teacher).float() for g in generators])


def mixtures(p_teacher: Sequence[float], n_intervals: int) -> list[Arm]:
    """Table 5: at each interval the teacher moves with probability p_T."""
    pure = {0: "S" * n_intervals, 1: "T" * n_intervals}
    return [Arm("mix", f"p_T = {p:g}", pure.get(p, ""), p) for p in p_teacher]


def switches(orders: Sequence[str], switch_at: Sequence[int] | None, grid: list[int]) -> list[Arm]:
    """Tables 6, 7: one model first, the other from timestep T on; at the grid's second point that is after one move."""
    arms = []
    for order in orders:
        first, second = order.split("-")
        for at in switch_at or grid[1:]:
            if at not in grid[1:]:
                raise SystemExit(f"--switch_at {at}: the student can take over, or hand over, at {grid[1:]}")
            moves = "".join((first if t > at else second)[0].upper() for t in grid)
            arms.append(Arm("switch", f"{first}, then {second} from {at}", moves))
    return arms


def one_interval(grid: list[int]) -> list[Arm]:
    """Figure 4: one model's trajectory, and exactly one interval of it handed to the other, for each, both ways."""
    arms = []
    for own, other in ("student", "teacher"), ("teacher", "student"):
        alone = own[0].upper() * len(grid)
        for j, t in enumerate(grid):
            moves = alone[:j] + other[0].upper() + alone[j + 1 :]
            arms.append(Arm("interval", f"{own}, but {other} at {t}", moves))
        arms.append(Arm("interval", f"{own} alone", alone))
    return arms


class Pair:
    """A student and the teacher it is analysed with, on one trajectory. SystemExit if their grids do not align."""

    def __init__(self, ev: Evaluation, candidate: Candidate):
        self.candidate, self.device, config = candidate, ev.accelerator.device, candidate.config
        stage_v = candidate.run / "stages" / "v" if candidate.run else None
        teacher = ev.args.teacher or (str(stage_v) if stage_v and stage_v.is_dir() else config.get("teacher"))
        data = ev.args.data or config.get("data")
        if "gap" in ev.args.shift and not data:
            raise SystemExit(f"--shift gap: {candidate.model} belongs to no run that names its data; give --data")
        teacher_steps = ev.args.teacher_steps or config.get("teacher_steps", 32)
        self.pipe, self.teacher_pipe = load_pipeline(candidate.model, "MODEL"), load_pipeline(teacher, "--teacher")
        if not ev.args.teacher:
            refuse_retrained(candidate, teacher, self.teacher_pipe)
        grid, teacher_grid = timestep_grid(candidate.steps), timestep_grid(teacher_steps)
        self.pipe.scheduler.set_timesteps(candidate.steps)
        own = self.pipe.scheduler.timesteps.tolist()
        if candidate.sampler == "trained" and own != grid:  # the other samplers take our grid
            raise SystemExit(f"--shift: {candidate.model} samples at {own}, not on PD's and DDIM's grid {grid}")
        if not set(grid) <= set(teacher_grid):
            raise SystemExit(f"--teacher_steps {teacher_steps}: must be a multiple of {candidate.steps}, the student's")
        self.schedule = load_schedule(self.teacher_pipe).to(self.device)
        is_same = torch.equal(load_schedule(self.pipe).alpha.to(self.device), self.schedule.alpha)
        if latent_shape(self.teacher_pipe) != latent_shape(self.pipe) or not is_same:
            raise SystemExit(f"--teacher {teacher}: its latents or noise schedule are not those of {candidate.model}")
        self.settings = {name: getattr(candidate, name) for name in ("model", "steps", "guidance_scale")}
        self.settings |= {"model_weights": fingerprint_pipeline(self.pipe), "sampler": "ddim", "teacher": teacher}
        self.settings |= {"teacher_weights": fingerprint_pipeline(self.teacher_pipe), "teacher_steps": teacher_steps}
        self.encoder = PromptEncoder(self.teacher_pipe, self.device)
        self.teacher = ddim_model(self.teacher_pipe, self.schedule, self.encoder, ev.accelerator)
        self.student = ddim_model(self.pipe, self.schedule, self.encoder, ev.accelerator)
        half, vae = frozen_dtype(ev.accelerator), self.pipe.vae
        needs_fp32 = half == torch.float16 and vae.config.force_upcast  # as in the pipelines
        vae.to(self.device, torch.float32 if needs_fp32 else half)
        self.dataset = open_rows(data).train if "gap" in ev.args.shift else None  # refused now, if at all
        self.label = f"{candidate.label}, {candidate.steps} steps"
        self.grid, self.teacher_grid = [*grid, CLEAN], [*teacher_grid, CLEAN]

    def start(self, ids: Tensor, noise_indices: Sequence[int], seed: int) -> tuple[Tensor, dict]:
        """(z at 999, cond)"""
        z = noise_of(noise_indices, latent_shape(self.pipe), seed).to(self.device)
        w = torch.full((len(z),), self.candidate.guidance_scale, device=self.device)
        return z, self.encoder.encode(ids) | {"w": w}

    def rollout(self, z: Tensor, cond: dict, student_rate: float | Tensor) -> list[Tensor]:
        """The states at all points of the student's grid."""
        models, grids = (self.teacher, self.student), (self.teacher_grid, self.grid)
        return mixed_rollout(self.schedule, *models, z, *grids, cond, student_rate, torch.Generator())[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""
        latents = (z / self.pipe.vae.config.scaling_factor).to(self.pipe.vae.dtype)
        parts = latents.split(images_at_once(image_shape(self.pipe)))
        return (torch.cat([self.pipe.vae.decode(part, return_dict=False)[0] for part in parts]) / 2 + 0.5).clamp(0, 1)

    def disagreement(self, z_t: Tensor, j: int, cond: dict) -> Tensor:
        """Mean squared difference [B] in x between the student's step over interval j and the teacher's."""
        t, s = self.grid[j], self.grid[j + 1]
        path = self.teacher_grid[self.teacher_grid.index(t) : self.teacher_grid.index(s) + 1]
        z_s = student_rollout(self.schedule, self.student, z_t, (t, s), cond)[-1]
        target = teacher_rollout(self.schedule, self.teacher, z_t, path, cond)[-1]
        t, s = (torch.full((len(z_t),), i, device=z_t.device) for i in (t, s))
        _, d = rotation(self.schedule, t, s)
        return (self.schedule.at(t)[1] / d * (z_s - target)).square().mean(dim=(1, 2, 3))  # x = (s_t z_s - s_s z_t) / d


def evaluate_arms(ev: Evaluation, pair: Pair, seed: int) -> list[dict]:
    """Tables 5-7 and Figure 4: a row for each arm with its metrics; the same noise and captions in all of them."""
    args, grid, rows = ev.args, pair.grid[:-1], []
    arms = mixtures(args.mix_teacher, len(grid)) if "mix" in args.shift else []
    arms += switches(args.switch_order, args.switch_at, grid) if "switch" in args.shift else []
    arms += one_interval(grid) if "interval" in args.shift else []
    for arm in arms:

        def sample(prompts: list[str], noise_indices: list[int], arm=arm) -> Tensor:
            z, cond = pair.start(pair.encoder.tokenize(prompts), noise_indices, seed)
            return pair.decode(pair.rollout(z, cond, arm.student_rate(noise_indices, len(grid), seed))[-1])

        key = f"{pair.candidate.key}-seed{seed}-shift-{arm.moves or arm.p_teacher}"  # arms of equal moves: made once
        settings = pair.settings | {"seed": seed, "moves": arm.moves or f"p_T = {arm.p_teacher}"}
        images = generate(ev, key, settings, sample, ev.prompts)
        scores = {metric: ev.measure(metric, images) for metric in ev.image_metrics}
        row = {"label": pair.label, "steps": len(grid), "kind": arm.kind, "arm": arm.name, "moves": arm.moves}
        rows.append(row | {"seed": seed, "scores": scores})
    return rows


def shift_gap(ev: Evaluation, pair: Pair, seed: int) -> dict:
    """The shift itself, at each timestep of the student's grid: how far the latents that it visits are from
    forward-diffused ones of the same captions (Frechet distance of latents pooled to 4 x 4, and each channel's mean and
    std), and how much student and teacher disagree about x on both. For comparison: latents that the teacher visits,
    and forward-diffused latents of other images, the no-shift baseline at this sample size."""
    dataset, timesteps = pair.dataset, pair.grid[:-1]
    order, rng = torch.Generator().manual_seed(0), torch.Generator(pair.device)
    n, order = min(ev.args.num_images, len(dataset) // 2), torch.randperm(len(dataset), generator=order)
    latents = LatentData(dataset, pair.teacher_pipe, pair.encoder, ev.args.batch_size, 0, 0, 1, rng, cache=False)

    def forward(rows: Tensor, noise: str) -> tuple[list[Tensor], Tensor]:
        """Forward-diffused states at each t, and the captions' token ids; rows of the shuffled data."""
        samples = latents.decode_usable(dataset[order[rows].tolist()])
        if not samples:
            raise SystemExit(f"--data: none of the rows {order[rows].tolist()} can be used: {latents.reasons()}")
        moments, ids = latents.encode([samples[i % len(samples)] for i in range(len(rows))])  # in place of others
        mean, std = moments.unbind(dim=1)
        seeds = (derive_seed(seed, noise, what) for what in ("x", "eps"))
        x, eps = (noise_of(rows, mean.shape[1:], of_what).to(pair.device) for of_what in seeds)
        x = (mean + std * x) * latents.scaling
        return [add_noise(pair.schedule, x, eps, torch.full((len(x),), t, device=pair.device)) for t in timesteps], ids

    def summary(z: Tensor) -> Tensor:
        """[B, features + 2 C]: pooled latents; each channel's mean and mean square."""
        pooled = torch.nn.functional.adaptive_avg_pool2d(z, [min(4, side) for side in z.shape[2:]])
        return torch.cat([pooled.flatten(1), z.mean(dim=(2, 3)), z.square().mean(dim=(2, 3))], dim=1)

    def one_batch(rows: Tensor) -> Tensor:
        """[B, J, 4 sources x (features + 2 C) + 2 disagreements]"""
        (here, ids), (other, _) = forward(rows, "forward"), forward(rows + n, "other images")
        z, cond = pair.start(ids, rows, seed)
        by_student, by_teacher = (pair.rollout(z, cond, rate)[:-1] for rate in (1.0, 0.0))
        at = [
            [summary(z) for z in states] + [pair.disagreement(z, j, cond)[:, None] for z in (states[0], states[2])]
            for j, states in enumerate(zip(here, other, by_student, by_teacher))
        ]
        return torch.stack([torch.cat(parts, dim=1) for parts in at], dim=1)

    values = ev.across_ranks(n, one_batch).double()  # by then on the CPU: not every device has fp64
    C, rows = latent_shape(pair.pipe)[0], []
    for t, at_t in zip(timesteps, values.unbind(dim=1)):
        summaries, disagreement = at_t[:, :-2].unflatten(1, (4, -1)), at_t[:, -2:].mean(dim=0).sqrt()
        row = {"t": t, "disagreement, forward": disagreement[0].item(), "disagreement, visited": disagreement[1].item()}
        row["disagreement, visited / forward"] = row["disagreement, visited"] / row["disagreement, forward"]
        pooled = [summaries[:, source, : -2 * C] for source in range(4)]
        means, squares = summaries[..., -2 * C :].mean(dim=0).split(C, dim=1)  # [4, C]
        stds = (squares - means.square()).sqrt()
        for source, name in enumerate(("other images", "student", "teacher"), start=1):
            row[f"FD, {name}"] = frechet_distance(pooled[source], pooled[0])
            row[f"mean, {name}"] = ((means[source] - means[0]) / stds[0]).square().mean().sqrt().item()
            row[f"std, {name}"] = (stds[source] / stds[0]).mean().item()
        row["FD, student to teacher"] = frechet_distance(pooled[2], pooled[3])
        rows.append(row)
    return {"label": pair.label, "seed": seed, "metric": "gap", "value": rows, "standard_error": None, "n": n}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Report
# ----------------------------------------------------------------------------------------------------------------------


def format_score(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    digits = 2 if abs(value) >= 10 else 4
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def over_runs(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean over runs and seeds, and its standard error where there are several."""
    if not values:
        return None, None
    mean = mean_of(torch.tensor(values))
    return mean["value"], mean["standard_error"]


def grouped(rows: Sequence[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by the values that they have under these names, in order of their first."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def main_table(ev: Evaluation, results: list[dict]) -> str:
    """A row for each label and setting, the mean over its runs and seeds, and beside it the paper's numbers."""
    groups = grouped(results, "label", "steps", "sampler", "guidance_scale")
    paper = PAPER.get(ev.args.protocol, PAPER["coco2017-512"])
    columns = list(dict.fromkeys(c for key in groups for c in paper.get(key[:2], ())))
    source = "COCO14-30K" if ev.args.protocol == "coco2014-256" else "COCO17-5K"
    header = ["", "steps", "NFE", "sampler", "w", "runs", *[ev.title(metric) for metric in ev.args.metrics]]
    rows = []
    for (label, steps, sampler, w), group in groups.items():
        rows.append([label, str(steps), str(group[0]["nfe"]), sampler, f"{w:g}", str(len(group))])
        for metric in ev.args.metrics:
            scores = [result["scores"][metric] for result in group if metric in result["scores"]]
            mean, error = over_runs([score["value"] for score in scores])
            rows[-1].append(format_score(mean, scores[0]["standard_error"] if len(scores) == 1 else error))
        numbers = paper.get((label, steps), {})
        rows[-1] += [f"{numbers[c]:g}" if c in numbers else "-" for c in columns]
    return markdown([*header, *[f"paper: {c} ({source})" for c in columns]], rows)


Scores = dict[str, tuple[float, float | None]]  # name -> mean over runs and seeds, and its standard error


def arm_scores(rows: list[dict], label: str, kind: str, metric: str) -> Scores:
    groups = grouped([row for row in rows if (row["label"], row["kind"]) == (label, kind)], "arm")
    return {arm: over_runs([row["scores"][metric]["value"] for row in group]) for (arm,), group in groups.items()}


def gap_scores(gaps: list[dict], label: str) -> list[Scores]:
    """Scores of shift_gap's columns, at each timestep."""
    found = zip(*[gap["value"] for gap in gaps if gap["label"] == label])
    return [{name: over_runs([row[name] for row in at]) for name in at[0]} for at in found]


def shift_tables(ev: Evaluation, rows: list[dict], gaps: list[dict]) -> str:
    """One table for each analysis; a column for each metric of each student."""
    captions = {
        "mix": "Table 5: the teacher moves with probability p_T at each interval",
        "switch": "Tables 6 and 7: one model first, the other from a timestep on",
        "interval": "Figure 4: exactly one interval handed over",
    }
    parts = []
    for (kind,), group in grouped(rows, "kind").items():
        labels, arms = [label for (label,) in grouped(group, "label")], [arm for (arm,) in grouped(group, "arm")]
        columns = {}
        for label, metric in product(labels, ev.image_metrics):
            scores = arm_scores(rows, label, kind, metric)
            columns[f"{label}: {ev.title(metric)}"] = [format_score(*scores.get(arm, (None,))) for arm in arms]
        if set(arms) & set(PAPER_SHIFT) and any(row["steps"] == 4 for row in group):
            for i, title in enumerate(("paper: FID (COCO17-5K)", "paper: CLIP (COCO17-5K)")):
                columns[title] = [f"{PAPER_SHIFT[arm][i]:g}" if arm in PAPER_SHIFT else "-" for arm in arms]
        parts.append(f"{captions[kind]}\n\n{markdown(['', *columns], [*zip(arms, *columns.values())])}")
    for (label,) in grouped(gaps, "label"):
        means = gap_scores(gaps, label)
        lines = [[f"{v:.0f}" if name == "t" else format_score(v, e) for name, (v, e) in row.items()] for row in means]
        title = f"{label}: visited latents beside forward-diffused ones of the same captions"
        parts.append(f"{title}\n\n{markdown([*means[0]], lines)}")
    return "\n\n".join(parts)


@contextmanager
def saved_figure(file: Path, height: int, width: int):
    """The axes [height, width] of a figure that is then saved, with a legend wherever something was named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14 / 3 * width, 3.8 * height), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    yield axes
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def plot_shift(ev: Evaluation, rows: list[dict], gaps: list[dict], file: Path) -> None:
    """A row of panels for each metric of the arms (at most two), one for the shift itself. Colours tell students, line
    styles who moves; what is the same for all students is black."""
    from matplotlib.lines import Line2D

    best = [m for m in ("fid", "fd", "alignment", "clip", "hps", "coverage") if m in ev.image_metrics]
    metrics = best[:2] if rows else []
    labels = [label for (label,) in grouped([*rows, *gaps], "label")]
    styles = {"student": "--", "teacher": "-", "other images": ":"}
    shifts = {  # title: columns of shift_gap
        "visited to forward-diffused latents": {f"FD, {who}": line for who, line in styles.items()},
        "visited latents to the guided model's own": {"FD, student to teacher": "--"},
        "disagreement on visited / forward-diffused": {"disagreement, visited / forward": "--"},
    }

    def draw(axis, curves: list[Scores], line: str) -> None:
        is_shared = len(labels) > 1 and all(scores == curves[0] for scores in curves)
        for i, scores in enumerate(curves[:1] if is_shared else curves):
            if scores:
                (means, errors), ticks = zip(*scores.values()), [name.rpartition(" ")[2] for name in scores]
                bars, colour = None if None in errors else errors, "black" if is_shared else f"C{i}"
                axis.errorbar(ticks, means, bars, fmt=line, capsize=2, color=colour)

    def arms(kind: str, metric: str, first: str = "") -> list[Scores]:
        found = [arm_scores(rows, label, kind, metric) for label in labels]
        is_shown = lambda arm: arm.startswith(first) and not arm.endswith("alone")
        return [{arm: score for arm, score in scores.items() if is_shown(arm)} for scores in found]

    with saved_figure(file, len(metrics) + bool(gaps), 3) as axes:
        for panels, metric in zip(axes, metrics):
            draw(panels[0], arms("mix", metric), "-")
            for who, (axis, kind) in product(("student", "teacher"), zip(panels[1:], ("switch", "interval"))):
                draw(axis, arms(kind, metric, who), styles[who])
            panels[0].set(title="mixed (Table 5)", xlabel="probability of the teacher", ylabel=ev.title(metric))
            panels[1].set(title="switched (Tables 6, 7): who is first", xlabel="second moves from t")
            panels[2].set(title="one interval handed over (Fig. 4)", xlabel="interval that starts at t")
        found = [gap_scores(gaps, label) for label in labels]
        for axis, (title, columns) in zip(axes[-1], shifts.items() if gaps else ()):
            for column, line in columns.items():
                draw(axis, [{f"{row['t'][0]:.0f}": row[column] for row in at} for at in found], line)
            axis.set(title=title, xlabel="t", ylabel="ratio" if "/" in title else "Frechet distance")
        named = [Line2D([], [], color=f"C{i}", label=label) for i, label in enumerate(labels)]
        named += [Line2D([], [], color="black", label="the same for all")] * (len(labels) > 1)
        named += [Line2D([], [], color="grey", linestyle=line, label=who) for who, line in styles.items()]
        axes[0, 0].figure.legend(handles=named, loc="outside lower center", ncols=len(named))


# Panels of --curves: title, and the columns of metrics.csv that it shows
CURVES = {
    "loss": "loss(_forward|_dagger|_teacher|_student|_matching|_fake|_gan|_judge)?",
    "gradient norm": "grad_norm.*|matching_norm|gan_norm",
    "share that reflect moves": "moved_.*",
}
OWN_CURVE = {
    "pd_ddil": {"error against the teacher": "paired_error|stage_error"},
    "lcm_ddil": {"loss by timestep": r"loss_t\d+"},
    "dmd2_ddil": {"latents of data, x, and generated, x_g": "x_mean|x_std|x_g_mean|x_g_std"},
}


def run_with_rows(model: str) -> tuple[str, Path, str]:
    """(label, run folder, script) of what --curves is to draw, finished or not; SystemExit if that has no row."""
    label, model, run, script = parse_model(model)
    if not run or not (run / "metrics.csv").is_file() or not (run / "metrics.csv").stat().st_size:
        raise SystemExit(f"--curves: {model} belongs to no run whose metrics.csv has a row yet")
    return label or label_of(script, read_config(run), "pipeline"), run, script


def mark_phases(axes, rows: list[dict]) -> None:
    """Vertical lines where PD's phases begin, with their names."""
    starts, last = {}, 0
    for row in rows:
        starts.setdefault(row.get("phase"), last)
        last = int(row["total_updates"])
    for axis in axes if None not in starts else ():
        for name, start in starts.items():
            axis.axvline(start, color="lightgrey", linewidth=0.8, zorder=0)
            axis.annotate(f" {name}", (start, 0.99), xycoords=("data", "axes fraction"), fontsize=7, va="top")


def plot_curves(runs: Sequence[tuple[str, Path, str]], file: Path) -> None:
    """A row of panels for each run: its metrics.csv, and dashed that of the embedded default."""
    with saved_figure(file, len(runs), 4) as axes:
        for (label, run, script), row in zip(runs, axes):
            sources = run / "metrics.csv", TINY.parent / "results" / "curves" / f"{script}.csv"
            for source, style in zip(sources, ({}, {"linestyle": "--", "alpha": 0.4})):
                found = [*csv.DictReader(source.read_text(encoding="utf-8").splitlines())]
                if not style:
                    mark_phases(row, found)
                for axis, (what, columns) in zip(row, (CURVES | OWN_CURVE[script]).items()):
                    for i, name in enumerate(name for name in found[0] if re.fullmatch(columns, name)):
                        points = [(int(r["total_updates"]), float(r[name])) for r in found if r[name]]
                        more = {"label": None if style else name, "marker": "o" if len(points) < 12 else None}
                        axis.plot(*zip(*points), color=f"C{i}", **style, **more)
                    scale = "log" if what in ("loss", "gradient norm") else "linear"
                    axis.set(title=what, xlabel="update", yscale=scale)
            row[0].plot([], [], "--", color="grey", label="the embedded default")
            row[0].set_ylabel(label)


def report(ev: Evaluation, results: list[dict], rows: list[dict], gaps: list[dict]) -> str:
    """results.json, results.md, contact.png and shift.png from all that is measured so far; returns the tables."""
    args, names = ev.args, ("torch", "diffusers", "transformers", "open_clip_torch", "lpips", "torch-fidelity")
    settings = {n: v for n, v in sorted(vars(args).items()) if n not in ("given", "overwrite")}
    records = [row | score for row in results for score in row["scores"].values()]
    records = [{name: value for name, value in record.items() if name != "scores"} for record in records]
    versions = {name: importlib.metadata.version(name) for name in names}
    everything = {"settings": settings, "versions": versions, "results": records, "shift": rows, "gap": gaps}
    write_json(ev.out / "results.json", everything)
    sizes = ", ".join({f"{record['metric']} {record['n']}": None for record in records})
    head = f"Protocol {args.protocol}; prompts {args.prompts}, reference {args.reference}, seeds {args.seed}."
    sizes = f"Sample sizes: {sizes}. ± is the standard error, over runs where there are several."
    tables = [f"{head} {sizes}", main_table(ev, results)]
    if rows or gaps:
        tables.append(shift_tables(ev, rows, gaps))
        plot_shift(ev, rows, gaps, ev.out / "shift.png")
    (ev.out / "results.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8", errors="surrogateescape")
    if ev.image_metrics:
        sheet = {}
        for result in results:
            files = sorted((ev.out / "images" / result["key"]).glob("*.png"))[:8]
            sheet.setdefault(f"{result['label']}, {result['steps']} steps", [Image.open(file) for file in files])
        save_sheet(ev.out / "contact.png", sheet, ev.prompts[:8])
    return "\n\n".join(tables)


def main(argv=None) -> None:
    args = parse_args(argv)
    folder = Path(args.output_dir)
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or there and not there & {"images", "curves.png"}:
        raise SystemExit(f"--output_dir {folder}: holds something else than an evaluation; choose another folder")
    if args.curves:
        runs = [run_with_rows(model) for model in args.models]
        folder.mkdir(parents=True, exist_ok=True)
        plot_curves(runs, folder / "curves.png")
        print(f"{folder / 'curves.png'}: dashed, the embedded default")
        return
    candidates = [candidate_of(args, i) for i in range(len(args.models))]
    for candidate in candidates:  # what cannot work is refused now, not after hours
        find_pipeline(candidate.model, "MODEL")
    accelerator = start_accelerator()
    ev = Evaluation(args, accelerator)
    students = [c for c in candidates if not c.is_teacher and c.model != args.teacher and (c.run or args.teacher)]
    if args.shift and not students:
        raise SystemExit("--shift: none of the models is a student that belongs to a run; name one, or give --teacher")
    for candidate in students if args.shift else ():
        switches(args.switch_order, args.switch_at, Pair(ev, candidate).grid[:-1])
    (folder / "images").mkdir(parents=True, exist_ok=True)

    results, rows, gaps, tables = [], [], [], ""
    for candidate in candidates:
        results += evaluate(ev, candidate)
        tables = report(ev, results, rows, gaps) if accelerator.is_main_process else ""
    for candidate in students if args.shift else ():
        pair = Pair(ev, candidate)
        for seed in args.seed:
            rows += evaluate_arms(ev, pair, seed)
            gaps += [shift_gap(ev, pair, seed)] if "gap" in args.shift else []
            tables = report(ev, results, rows, gaps) if accelerator.is_main_process else ""
    accelerator.print(f"{tables}\n{folder}: results.json, results.md, images/ and pictures of them")
    accelerator.end_training()


if __name__ == "__main__":
    main()
