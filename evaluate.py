"""Evaluation of few-step models: the paper's metrics, and its analysis of covariate shift.

DDIL: Improved Diffusion Distillation with Imitation Learning, arXiv:2410.11971v1, sec. 5, App. E, Tables 2-8, Figure 4.

    laptop, minutes     accelerate launch evaluate.py assets/tiny/pipeline runs/pd_ddil-tiny
    covariate shift     accelerate launch evaluate.py runs/pd_ddil-tiny --shift
    eight GPUs          accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 evaluate.py --protocol coco2017-512
                        --prompts captions_val2017.json --reference val2017 runs/pd_ddil-sd15 --sampler dpm++

paper                                             code
  sec. 5    one image a caption, one seed           generate
  sec. 5    FID                                     Inception, frechet_distance
  sec. 5    CLIP score (OpenCLIP ViT-g/14)          clip_score
  sec. 5    LPIPS diversity, 10 seeds x 50 prompts  lpips_diversity
  Table 3   HPSv2                                   hps_score
  Table 5   teacher chosen with probability p_T     mixtures
  Table 6-7 one model first, then the other         switches
  Fig. 4    one interval handed over                one_interval
  Table 8   inverted prompts                        read_prompts, similarity
  (not in the paper) the shift itself               shift_gap

A MODEL is a run folder, one of its stages, a pipeline folder or a hub name, and LABEL=MODEL names its row: models of one label
are averaged, and a label of the paper's tables brings the paper's numbers along.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from common import (
    CLEAN, LatentData, PromptEncoder, UNetModel, add_noise, dpm_solver, find_pipeline, fingerprint, frozen_dtype, in_order,
    latent_shape, load_images, load_pipeline, load_schedule, mixed_rollout, noise_generator, noise_of, open_pipeline, priors_of, rotation,
    save_sheet, seed_of, start_accelerator, student_rollout, teacher_rollout, timestep_grid,
    with_guidance,
)  # fmt: skip

# What is measured, and on what. Any flag overrides its protocol; a resolution is that of FID and LPIPS on both sides:
# images are cut to their central square and resized by PIL's LANCZOS.
FID_WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
LPIPS_WEIGHTS = {"vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
                 "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"}  # fmt: skip
REAL_WEIGHTS = dict(fid_weights=FID_WEIGHTS, clip_weights="laion2b_s12b_b42k", hps_weights="xswu/HPSv2/HPS_v2_compressed.pt")
PROTOCOLS = {
    "tiny": REAL_WEIGHTS | dict(
        prompts="assets/tiny/data", reference="assets/tiny/data", resolution=32, num_images=1000, batch_size=50, steps=[32],
        guidance_scale=[4.0], metrics=["alignment", "clip", "fd", "coverage", "diversity", "paired"],
        clip_weights="assets/tiny/scorer",
    ),
    "coco2017-512": REAL_WEIGHTS | dict(  # Tables 2, 3, 5-7: val2017, one caption an image
        prompts=None, reference=None, resolution=512, num_images=5000, batch_size=16, steps=[32], guidance_scale=[8.0],
        metrics=["fid", "clip", "hps", "lpips", "coverage"],
    ),
    "coco2014-256": REAL_WEIGHTS | dict(  # Table 4: 30K captions of val2014 against all of its images
        prompts=None, reference=None, resolution=256, num_images=30000, batch_size=16, steps=[32], guidance_scale=[8.0],
        metrics=["fid", "clip"],
    ),
}  # fmt: skip
DEFAULTS = dict(sampler=["trained"], seed=[0], lpips_net="vgg", teacher_steps=None, mix_teacher=[0, 0.2, 0.4, 0.6, 0.8, 1],
                switch_order=["teacher-student", "student-teacher"])  # fmt: skip
IMAGE_METRICS = ("fid", "clip", "hps", "fd", "coverage", "alignment")  # of one image a caption
PROMPT_METRICS = ("lpips", "diversity", "similarity")  # of several images a prompt
METRICS = (*IMAGE_METRICS, *PROMPT_METRICS, "paired")
SHIFTS = ("mix", "switch", "interval", "gap")
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 50, 10  # sec. 5
DIVERSITY_NOISE = 1_000_000  # index of their first noise: none that one image a caption has
PAIRED_PROMPTS = 256
NEIGHBOURS = 5  # k of coverage
FEATURES_KEPT = 10_000  # for coverage; all other statistics are streamed

# What the paper's rows of DDIL were trained with (App. A, [D12], [D16], [D17], [D19]): other settings make a row of their own.
PAPER_ARMS = {
    "pd_ddil": dict(p_forward=[0.75, 0.5], student_rate=[0.15, 0.8], reuse=2, store_start=False),
    "lcm_ddil": dict(p_forward=[0.75, 0.5], p_teacher=[0.0], p_student=None, store_start=False),
    "dmd2_ddil": dict(p_forward=[0.0], p_teacher=None, p_student=None, mixed_rollout=False),
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


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("models", nargs="+", metavar="MODEL", help="run folder, runs/X/stages/8, pipeline folder, hub name; LABEL=MODEL names its row")
    p.add_argument("--protocol", default="tiny", help=f"table of defaults: {', '.join(PROTOCOLS)} (default tiny: all offline)")
    paper = p.add_argument_group("what is measured")
    paper.add_argument("--metrics", nargs="+", help=", ".join(METRICS))
    paper.add_argument("--prompts", help="COCO's annotation json, a text or json list, or a data set: its held-out captions")
    paper.add_argument("--reference", help="real images: a folder, a data set (its training images), or statistics kept by an evaluation")
    paper.add_argument("--num_images", type=int, help="one for each of so many prompts, spread evenly over the list")
    paper.add_argument("--resolution", type=int, help="of FID and LPIPS: images are cut to a square and resized by LANCZOS")
    paper.add_argument("--steps", type=int, nargs="+", help="one value, or one for each model (default: the run's; teachers 32)")
    paper.add_argument("--guidance_scale", type=float, nargs="+", help="one value, or one for each model (default: the run's, or the protocol's)")
    paper.add_argument("--sampler", nargs="+", help="trained (what is saved with the model) | ddim | dpm++ (2nd order: the paper's for PD); one, or one for each model")
    paper.add_argument("--seed", type=int, nargs="+", help="several are averaged")
    shift = p.add_argument_group("covariate shift (App. E)")
    shift.add_argument("--shift", nargs="*", metavar="KIND", help=f"analyse PD students beside their teacher: {', '.join(SHIFTS)}; none named = all")
    shift.add_argument("--teacher", help="default: the run's stages/v, or the teacher it was distilled from")
    shift.add_argument("--teacher_steps", type=int, help="its DDIM steps (default: the run's, or 32)")
    shift.add_argument("--mix_teacher", type=float, nargs="+", metavar="P", help="Table 5: how often the teacher moves, drawn for each image and interval")
    shift.add_argument("--switch_at", type=int, nargs="+", metavar="T", help="Tables 6, 7: timestep from which on the second model moves (default: all)")
    shift.add_argument("--switch_order", nargs="+", help="teacher-student (Table 6), student-teacher (Table 7; default: both)")
    shift.add_argument("--data", help="images with captions whose forward diffusion is compared (default: the run's)")
    run = p.add_argument_group("run")
    run.add_argument("--batch_size", type=int, help="images a process and forward; results do not depend on it")
    run.add_argument("--output_dir", help="images, scores, tables (default runs/evaluate-PROTOCOL); run again, it goes on there")
    run.add_argument("--overwrite", action="store_true", help="replace images there that were made by other settings")
    run.add_argument("--fid_weights", help="torch-fidelity's Inception: file or URL")
    run.add_argument("--clip_weights", help="of ViT-g-14: file or open_clip's tag; or a folder with open_clip_config.json")
    run.add_argument("--hps_weights", help="of HPSv2's ViT-H-14: file or hub OWNER/NAME/FILE (HPS_v2.1_compressed.pt for v2.1); or a folder as above")
    run.add_argument("--lpips_weights", help="torchvision's weights of the trunk: file or URL")
    run.add_argument("--lpips_net", help="vgg | alex (the paper does not say)")
    args = p.parse_args(argv)
    if args.protocol not in PROTOCOLS:
        raise SystemExit(f"--protocol {args.protocol}: unknown; the protocols are {', '.join(PROTOCOLS)}")
    args.given = {name for name, value in vars(args).items() if value is not None}
    defaults = DEFAULTS | PROTOCOLS[args.protocol] | {"output_dir": f"runs/evaluate-{args.protocol}"}
    for name, value in defaults.items():
        if name not in args.given:
            setattr(args, name, value)
    args.lpips_weights = args.lpips_weights or LPIPS_WEIGHTS.get(args.lpips_net)
    implied = ["mix"] * ("mix_teacher" in args.given) + ["switch"] * bool(args.given & {"switch_at", "switch_order"})
    args.shift = list(SHIFTS) if args.shift == [] else list(dict.fromkeys([*(args.shift or []), *implied]))
    check_args(args)
    return args


def check_args(args) -> None:
    """One clear message for what cannot work, before anything is loaded or written."""
    choices = dict(metrics=METRICS, sampler=("trained", "ddim", "dpm++"), shift=SHIFTS, switch_order=DEFAULTS["switch_order"],
                   lpips_net=tuple(LPIPS_WEIGHTS))  # fmt: skip
    for name, known in choices.items():
        values = getattr(args, name) or []
        for value in [values] if isinstance(values, str) else values:
            if value not in known:
                raise SystemExit(f"--{name} {value}: unknown; choose from {', '.join(known)}")
    for name in ("steps", "guidance_scale", "sampler"):
        if len(getattr(args, name)) not in (1, len(args.models)):
            raise SystemExit(f"--{name} {getattr(args, name)}: give one value, or one for each of the {len(args.models)} models")
    limits = dict(num_images=(2, 10**9), batch_size=(1, 10**6), resolution=(1, 10**5), teacher_steps=(1, 999), steps=(1, 999))
    for name, (lowest, highest) in limits.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not lowest <= value <= highest:
                raise SystemExit(f"--{name} {value}: must lie in {lowest}..{highest}")
    if not all(1 <= w < float("inf") for w in args.guidance_scale):
        raise SystemExit(f"--guidance_scale {args.guidance_scale}: must be finite and at least 1, which is no guidance")
    if not all(0 <= seed < 2**31 for seed in args.seed):
        raise SystemExit(f"--seed {args.seed}: must be whole numbers >= 0 and < 2^31")
    if not all(0 <= p <= 1 for p in args.mix_teacher):
        raise SystemExit(f"--mix_teacher {args.mix_teacher}: must lie in [0, 1]")
    if set(args.shift) - {"gap"} and not set(args.metrics) & set(IMAGE_METRICS):
        raise SystemExit(f"--shift {' '.join(args.shift)}: needs one of the --metrics {', '.join(IMAGE_METRICS)}, got {', '.join(args.metrics)}")
    needs_reference = {"fid", "fd", "coverage"} & set(args.metrics)
    for name, needed in (("prompts", True), ("reference", needs_reference)):
        if needed and getattr(args, name) is None:
            raise SystemExit(f"--{name}: the protocol {args.protocol} has no default; " + {
                "prompts": "give COCO's captions_val*.json, or any list of prompts", "reference": "give the folder of COCO's real images",
            }[name])  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# 1. What is evaluated: models and prompts
# ----------------------------------------------------------------------------------------------------------------------

METHODS = {"pd_ddil": "PD", "lcm_ddil": "LCM", "dmd2_ddil": "DMD2"}
RECIPE_METHODS = {  # of recipes that train another model than the paper's rows of the method show
    ("lcm_ddil", "ssd1b"): "SSD1B-LCM", ("dmd2_ddil", "ssd1b_oracle"): "DMD2 b64", ("dmd2_ddil", "sd15"): "SD1.5-DMD2",
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One model with the settings it is sampled at; a row of the table, or with others of its label a part of one."""

    label: str
    model: str  # pipeline folder or hub name
    steps: int
    guidance_scale: float
    sampler: str
    run: str | None = None  # the run folder that it comes from
    script: str | None = None
    config: dict = field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """Name of its files."""
        return re.sub(r"[^\w.-]+", "_", f"{self.model}-{self.steps}-{self.sampler}-w{self.guidance_scale:g}").strip("_.")

    @property
    def is_student(self) -> bool:
        return Path(self.model).name not in ("v", "gc") if self.run else True


def run_of(path: Path) -> tuple[Path, str, dict] | None:
    """(folder, script, config) of the run that a folder is or belongs to."""
    for folder in (path, path.parent, path.parent.parent):
        for script in METHODS:
            if (folder / f"{script}.py").is_file() and (folder / "config.json").is_file():
                return folder, script, json.loads((folder / "config.json").read_text())
    return None


def label_of(script: str, config: dict, stage: str) -> str:
    """The row's name, as in the paper's tables; what has no row there gets a name of its own."""
    if stage in ("v", "gc"):
        return f"SD({stage})"
    if script == "pd_ddil":  # the paper's are reflected
        name, is_plain, settings = "PD", min(config["p_forward"]) == 1, ["not reflected"] * (config["reflect"] == "none")
    else:
        name = RECIPE_METHODS.get((script, config.get("recipe")), METHODS[script]) + "-LoRA" * bool(config.get("lora_rank"))
        name += " + Reflected" * (config["reflect"] != "none")
        plain = {"lcm_ddil": "forward", "dmd2_ddil": "student"}[script]
        is_plain, settings = min(priors_of(argparse.Namespace(**config))[plain]) == 1, []
    if not is_plain:
        is_control = config.get("forward_control")
        name += " + control" if is_control else " + DDIL"
        for flag, usual in PAPER_ARMS[script].items():
            value = config.get(flag, usual)
            if value != usual and not (is_control and flag in ("student_rate", "reuse")):  # which are of trajectories
                settings.append(f"{flag} {json.dumps(value).strip('[]')}")
    return ", ".join([name, *settings])


def candidates_of(args) -> list[Candidate]:
    """The models in the order given, each with its own run's settings where no flag says otherwise."""
    found = []
    for i, name in enumerate(args.models):
        label, _, model = ("", "", name) if Path(name).exists() else name.rpartition("=")
        chosen = {n: (v[i] if len(v) > 1 else v[0]) for n in ("steps", "guidance_scale", "sampler") for v in [getattr(args, n)]}
        run = run_of(Path(model))
        if run is None:
            path = Path(model)
            found.append(Candidate(label or (path.parent if path.name == "pipeline" else path).name, model, **chosen))
            continue
        folder, script, config = run
        if Path(model) == folder:
            model = str(folder / "pipeline")
            if not Path(model).is_dir():
                raise SystemExit(f"{name}: the run is not finished (no pipeline/ in it); name one of its stages/, or finish it by --resume")
        stage = Path(model).name
        steps = int(stage) if stage.isdigit() else config["teacher_steps" if stage in ("v", "gc") else "student_steps"]
        w = 1.0 if config.get("lora_rank") else config.get("eval_guidance_scale", 1.0)  # 1: it is part of the student
        if script == "dmd2_ddil" and json.loads((Path(model) / "unet" / "config.json").read_text()).get("time_cond_proj_dim"):
            w = config["guidance_scale"]  # the only one that it was trained at
        own = dict(steps=steps, guidance_scale=w)
        chosen |= {n: value for n, value in own.items() if n not in args.given}
        found.append(Candidate(label or label_of(script, config, stage), model, **chosen, run=str(folder), script=script, config=config))
    return found


class Prompt(NamedTuple):
    text: str
    image: Path | None = None  # that it was inverted from


def read_prompts(name: str) -> list[Prompt]:
    """--prompts: COCO's annotations (the first caption of each image, by id), a json list or {id: prompt} (entries may be
    {"prompt": ..., "image": ...}), a text file with one a line, or a data set. SystemExit naming what is wrong."""
    path = Path(name)
    try:
        if path.suffix == ".json" and path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "annotations" in content:
                first = {}
                for row in sorted(content["annotations"], key=lambda row: row["id"]):
                    first.setdefault(row["image_id"], row["caption"])
                content = [first[image] for image in sorted(first)]
            entries = list(content.values()) if isinstance(content, dict) else content
        elif path.is_file():
            entries = path.suffix == ".txt" and [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            entries = load_images(name, "--prompts", need_images=False)[1]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--prompts {name}: is no text, no json, or one without captions ({error!r})")
    if not isinstance(entries, list) or not entries:
        raise SystemExit(f"--prompts {name}: holds no prompts; it must be a .txt or .json file, or a data set")
    prompts = []
    for i, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {"prompt": entry}
        text, image = entry.get("prompt"), entry.get("image")
        if not isinstance(text, str) or not text.strip() or set(entry) - {"prompt", "image"}:
            raise SystemExit(f"--prompts {name}: entry {i} is {entry}; it must be a text, or {{\"prompt\": text, \"image\": file}}")
        image = image and path.parent / image
        if image and not image.is_file():
            raise SystemExit(f"--prompts {name}: entry {i} has the image {image}, which does not exist")
        prompts.append(Prompt(text.strip(), image))
    return prompts


def spread(items: Sequence, n: int) -> list:
    """n of the items, evenly over the list."""
    return [items[i * len(items) // n] for i in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Images
# ----------------------------------------------------------------------------------------------------------------------


def central_square(image: Image.Image, size: int) -> Image.Image:
    """The central square of a PIL image, by LANCZOS."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.LANCZOS)


def to_uint8(images: list[Image.Image]) -> Tensor:
    """[B, 3, H, W] uint8."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


class Images:
    """Image files, or the rows of a data set, in order; `settings` say how they came to be."""

    def __init__(self, files: Sequence[Path] | None = None, dataset=None, prompts: Sequence[str] = (), settings: dict | None = None):
        self.files, self.dataset, self.prompts, self.settings = files, dataset, prompts, settings
        self.pool = ThreadPoolExecutor(4)

    def __len__(self) -> int:
        return len(self.dataset if self.files is None else self.files)

    def open(self, file: Path) -> Image.Image:
        try:
            return Image.open(file).convert("RGB")
        except Exception as error:  # whatever a broken file raises
            raise SystemExit(f"{file}: cannot be read ({short(error)}); a generated image is made again if it is deleted")

    def load(self, rows: Tensor) -> list[Image.Image]:
        """RGB; SystemExit naming the file that is broken."""
        if self.files is not None:
            return list(self.pool.map(self.open, [self.files[i] for i in rows.tolist()]))
        try:
            return [image.convert("RGB") for image in self.dataset[rows.tolist()]["image"]]
        except Exception as error:
            raise SystemExit(f"--reference: one of the rows {rows.tolist()} cannot be read ({short(error)})")


def reference_images(name: str) -> Images:
    """--reference: the images in a folder, or the training images of a data set."""
    path = Path(name)
    files = sorted(f for f in path.glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")) if path.is_dir() else []
    dataset = None if files else load_images(name, "--reference", need_captions=False)[0]
    contents = [(f.name, f.stat().st_size) for f in files] if files else dataset._fingerprint
    images = Images(files or None, dataset, settings={"reference": name, "reference_contents": digest(contents)})
    if len(images) < 2:
        raise SystemExit(f"--reference {name}: holds {len(images)} image(s)")
    return images


Sampler = Callable[[list[str], list[int]], Tensor]  # prompts and the indices of their noises -> images [B, 3, H, W] in [0, 1]


def pipeline_sampler(pipe, candidate: Candidate, seed: int) -> Sampler:
    """The stock pipeline, as anyone would use it; each image has a generator of its own."""

    def sample(prompts: list[str], noises: list[int]) -> Tensor:
        generators = [noise_generator(i, seed) for i in noises]  # its first draw is common.noise_of
        return pipe(prompts, generator=generators, num_inference_steps=candidate.steps,
                    guidance_scale=candidate.guidance_scale, output_type="pt").images  # fmt: skip

    return sample


def open_candidate(candidate: Candidate, accelerator):
    """Its pipeline with the sampler asked for, on the device, in the precision of the launch; and what tells it from others."""
    pipe = open_pipeline(candidate.model, "MODEL")
    if candidate.sampler != "trained":
        config = pipe.scheduler.config
        if "beta_start" not in config or config.get("prediction_type") not in ("epsilon", "v_prediction", "sample"):
            raise SystemExit(f"--sampler {candidate.sampler}: {candidate.model} has a {type(pipe.scheduler).__name__}; take trained")
        pipe.scheduler = dpm_solver(pipe, config.prediction_type, order={"ddim": 1, "dpm++": 2}[candidate.sampler])
    try:
        pipe.scheduler.set_timesteps(candidate.steps)
    except ValueError as error:
        raise SystemExit(f"--steps {candidate.steps}: {candidate.model} cannot be sampled in as many ({short(error)})")
    if hasattr(pipe, "vae") and pixels_of(pipe) > 256**2:
        pipe.vae.enable_slicing()  # a batch of decodes does not fit
    asked = {"model": candidate.model, "model_weights": contents_of(pipe), "steps": candidate.steps, "guidance_scale": candidate.guidance_scale,
             "sampler": candidate.sampler}  # fmt: skip
    return pipe.to(accelerator.device, frozen_dtype(accelerator)), asked


def contents_of(pipe) -> str:
    """A digest of all networks and of the scheduler's settings."""
    modules = {name: fingerprint(module) for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    return digest([modules, {name: str(value) for name, value in pipe.scheduler.config.items()}])


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def pixels_of(pipe) -> int:
    """Pixels of an image at the pipeline's own size."""
    size = network_of(pipe).config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * width * pipe.vae_scale_factor**2


def generate(ev: "Evaluation", name: str, settings: dict, sample: Sampler, prompts: list[str], first_noise: int = 0) -> Images:
    """images/NAME/: one PNG for each prompt, from noise first_noise + its place; the ranks share the work. What is there
    already is kept, so that a killed evaluation goes on. SystemExit if it was made by other settings, or if NaN comes out."""
    folder, accelerator = ev.out / "images" / name, ev.accelerator
    files = [folder / f"{i:06d}.png" for i in range(len(prompts))]
    settings = settings | {"precision": accelerator.mixed_precision, "prompts": digest(list(prompts)), "num_images": len(prompts)}
    rows = [{"file": f.name, "prompt": p, "noise": first_noise + i} for i, (f, p) in enumerate(zip(files, prompts))]
    if accelerator.is_main_process:
        claim(folder, {"settings": settings, "images": rows}, ev.args.overwrite)
    accelerator.wait_for_everyone()
    mine = range(accelerator.process_index, len(files), accelerator.num_processes)
    todo = [i for i in mine if not files[i].exists()]
    batches = [todo[k : k + ev.args.batch_size] for k in range(0, len(todo), ev.args.batch_size)]
    saving = []  # while the next batch is sampled
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(todo), desc=f"images/{name}", dynamic_ncols=True, leave=False,
                                             disable=not accelerator.is_main_process or not todo) as bar:  # fmt: skip
        for batch in batches:
            images = sample([prompts[i] for i in batch], [first_noise + i for i in batch]).float()
            for i, total in zip(batch, images.sum(dim=(1, 2, 3)).tolist()):  # of values in [0, 1]
                if not math.isfinite(total):
                    raise SystemExit(f"images/{name}: the image of prompt {i} ({prompts[i]!r}, seed {settings['seed']}, noise "
                                     f"{first_noise + i}) is not finite; what was made before is kept")  # fmt: skip
            pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # as diffusers does
            for task in saving:
                task.result()  # raises what went wrong
            saving = [pool.submit(save_image, files[i], image) for i, image in zip(batch, pixels)]
            bar.update(len(batch))
    for task in saving:
        task.result()
    accelerator.wait_for_everyone()
    return Images(files, prompts=prompts, settings=settings)


def save_image(file: Path, pixels) -> None:
    """Under another name first, so that no kill leaves half an image."""
    Image.fromarray(pixels).save(file.with_suffix(".tmp"), format="PNG")
    file.with_suffix(".tmp").rename(file)


def claim(folder: Path, manifest: dict, overwrite: bool) -> None:
    """Start the folder, or go on with it if its manifest has the same settings; otherwise SystemExit, or start anew."""
    file = folder / "manifest.json"
    if file.is_file():
        before = json.loads(file.read_text())["settings"]
        now = json.loads(json.dumps(manifest["settings"]))
        differs = [f"{n}: {before.get(n)} there, now {now.get(n)}" for n in before | now if before.get(n) != now.get(n)]
        if not differs:
            return
        if not overwrite:
            raise SystemExit(f"--output_dir: {folder} holds images of another evaluation ({'; '.join(differs)}); choose another "
                             "folder, or --overwrite replaces them")  # fmt: skip
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, manifest)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def write_json(file: Path, content) -> None:
    file.with_suffix(".tmp").write_text(json.dumps(content, indent=1))
    file.with_suffix(".tmp").rename(file)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Metrics
#
# Networks: a list of PIL images -> features [B, D]. Metrics: (evaluation, images) -> dict(value, standard_error, n)
# ----------------------------------------------------------------------------------------------------------------------


def weights_file(flag: str, source: str) -> Path:
    """The local file that a --<metric>_weights names; a URL or hub OWNER/NAME/FILE is fetched and kept by torch or the hub."""
    path = Path(source)
    if path.is_file():
        return path
    is_url, is_hub = source.startswith("https://"), source.count("/") == 2 and not source.startswith((".", "/", "~"))
    if not is_url and not is_hub:
        raise SystemExit(f"{flag} {source}: no such file")
    try:
        if is_hub:
            from huggingface_hub import hf_hub_download

            owner, name, file = source.split("/")
            return Path(hf_hub_download(f"{owner}/{name}", file))
        path = Path(torch.hub.get_dir()) / "checkpoints" / source.rpartition("/")[2]
        if not path.is_file():
            if os.environ.get("HF_HUB_OFFLINE") == "1":
                raise OSError("HF_HUB_OFFLINE is set")
            path.parent.mkdir(parents=True, exist_ok=True)
            hash_in_name = re.search(r"-([0-9a-f]{8,})\.", source)
            torch.hub.download_url_to_file(source, str(path), hash_prefix=hash_in_name and hash_in_name.group(1))
        return path
    except Exception as error:  # no network, no such file there, no space here
        raise SystemExit(f"{flag} {source}: cannot be fetched ({short(error)}); fetch it elsewhere and give the file")


def short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Inception:
    """FID's network: torch-fidelity's InceptionV3 and its own resize to 299; images -> [B, 2048]."""

    name = "Inception"

    def __init__(self, flag: str, source: str, resolution: int, device):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = weights_file(flag, source)
        try:
            torch.load(file, weights_only=True, map_location="cpu")  # torch-fidelity alone would run code that is in the file
            self.net = FeatureExtractorInceptionV3("inception", ["2048"], str(file)).to(device)
        except Exception as error:
            raise SystemExit(f"{flag} {source}: does not hold torch-fidelity's InceptionV3 ({short(error)})")
        self.resolution, self.device, self.weights = resolution, device, {"weights": file.name, "sha256": sha256(file)}

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> Tensor:
        return self.net(to_uint8([central_square(image, self.resolution) for image in images]).to(self.device))[0]


class Clip:
    """An open_clip model: images and texts -> normalised features [B, D]."""

    def __init__(self, flag: str, source: str, architecture: str, device):
        import open_clip

        path, name = Path(source), architecture
        if path.is_dir():
            name, (file, *_) = f"local-dir:{path}", [*sorted(path.glob("open_clip*model.*")), None]
            if file is None or not (path / "open_clip_config.json").is_file():
                raise SystemExit(f"{flag} {source}: must hold open_clip_config.json and open_clip_model.safetensors")
        elif tag := open_clip.get_pretrained_cfg(architecture, source):
            try:
                file = Path(open_clip.download_pretrained(tag))
            except Exception as error:
                raise SystemExit(f"{flag} {source}: {architecture} cannot be fetched ({short(error)}); fetch it elsewhere and give the file")
        else:
            file = weights_file(flag, source)
        try:
            pretrained = None if path.is_dir() else str(file)
            self.net, _, self.preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise SystemExit(f"{flag} {source}: does not hold a {name} ({short(error)})")
        self.net.eval().requires_grad_(False)
        is_tiny = path.resolve() == Path(__file__).resolve().parent / "assets" / "tiny" / "scorer"
        self.name = "tiny" if is_tiny else path.name if path.is_dir() else architecture
        self.device, self.weights = device, {"weights": f"{self.name}, {file.name}", "sha256": sha256(file)}

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> Tensor:
        return self.net.encode_image(torch.stack([self.preprocess(i) for i in images]).to(self.device), normalize=True)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        return self.net.encode_text(self.tokenizer(prompts).to(self.device), normalize=True)

    def cosines(self, images: Images, rows: Tensor) -> Tensor:
        """Of each image with its prompt, [B]."""
        return (self.images(images.load(rows)) * self.texts([images.prompts[i] for i in rows.tolist()])).sum(dim=1)


class HumanPreference(Clip):
    """HPSv2: a fine-tuned ViT-H-14 with a preprocessing of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        size = self.net.visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.mean, self.std = self.net.visual.image_mean, self.net.visual.image_std
        self.preprocess = self.resize_and_pad

    def resize_and_pad(self, image: Image.Image) -> Tensor:
        """The long side to 224 (bicubic, on the tensor), black bars to a square, then CLIP's normalisation."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        scale = self.size / max(image.size)
        height, width = round(image.height * scale), round(image.width * scale)
        x = F.resize(F.to_tensor(image), [height, width], InterpolationMode.BICUBIC, antialias=True)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        x = F.pad(x, [left, top, self.size - width - left, self.size - height - top])
        return F.normalize(x, self.mean, self.std)


class Lpips:
    """LPIPS with a trunk from a file; pairs of images [P, 3, H, W] in [0, 1] -> [P]."""

    def __init__(self, flag: str, source: str, net: str, resolution: int, device):
        import lpips

        file = weights_file(flag, source)
        try:
            trunk = torch.load(file, weights_only=True, map_location="cpu")
            self.net = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # the package brings its own linear heads
            names = self.net.net.state_dict()  # slice2.5.weight is torchvision's features.5.weight
            self.net.net.load_state_dict({name: trunk["features." + name.partition(".")[2]] for name in names})
        except Exception as error:
            raise SystemExit(f"{flag} {source}: does not hold torchvision's {net} ({short(error)})")
        self.net.to(device).eval().requires_grad_(False)
        self.name, self.resolution, self.device = net, resolution, device
        self.weights = {"weights": f"{net}, {file.name}", "sha256": sha256(file)}

    @torch.no_grad()
    def pairwise(self, images: list[Image.Image]) -> Tensor:
        """Of all pairs i < j."""
        x = to_uint8([central_square(image, self.resolution) for image in images]).to(self.device) / 255
        first, second = torch.combinations(torch.arange(len(x), device=self.device)).T
        pairs = zip(first.split(8), second.split(8))  # a few at a time: the trunk's activations are large
        return torch.cat([self.net(x[i], x[j], normalize=True).flatten() for i, j in pairs])


class Judge:
    """assets/tiny's own classifier of digits and colours."""

    name = "judge"

    def __init__(self, device):
        folder = Path(__file__).resolve().parent / "assets" / "tiny"
        spec = importlib.util.spec_from_file_location("make_tiny", folder / "make.py")
        self.world = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.world)
        self.net, self.device = self.world.load_judge(device), device
        self.weights = {"weights": "judge.safetensors", "sha256": sha256(folder / "judge" / "judge.safetensors")}

    def check(self, prompts: Sequence[str]) -> None:
        known = set(self.world.all_captions())
        for prompt in prompts:
            if prompt not in known:
                raise SystemExit(f"--metrics alignment: {prompt!r} is no caption of assets/tiny, whose digits and colours are judged")

    def verdicts(self, images: Images, rows: Tensor) -> Tensor:
        """[B, 4]: digit, foreground, background, all of them right."""
        pixels = to_uint8(images.load(rows)).to(self.device)
        right = self.world.alignment(self.net, pixels, [images.prompts[i] for i in rows.tolist()])
        return torch.stack(list(right.values()), dim=1).float()


class Features:
    """Mean and covariance of features, streamed in fp64, and the first FEATURES_KEPT of them; memory is bounded."""

    def __init__(self):
        self.n, self.sum, self.outer, self.kept = 0, 0.0, 0.0, []

    def add(self, features: Tensor) -> None:
        """features [B, D]"""
        f = features.double().cpu()
        if self.n < FEATURES_KEPT:
            self.kept.append(f[: FEATURES_KEPT - self.n].float())
        self.n, self.sum, self.outer = self.n + len(f), self.sum + f.sum(dim=0), self.outer + f.T @ f

    def statistics(self) -> dict[str, Tensor]:
        mean = self.sum / self.n  # [D]
        cov = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)  # [D, D]
        return {"mean": mean, "cov": cov, "kept": torch.cat(self.kept), "n": torch.tensor(self.n)}


def frechet_distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) between Gaussians of the given "mean" and "cov", fp64."""
    values, vectors = torch.linalg.eigh(a["cov"])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # C_a^(1/2); C_a C_b has the eigenvalues of root C_b root
    cross = torch.linalg.eigvalsh(root @ b["cov"] @ root).clamp(min=0).sqrt().sum()
    return ((a["mean"] - b["mean"]).square().sum() + a["cov"].trace() + b["cov"].trace() - 2 * cross).item()


def load_statistics(file: Path, facts: dict[str, str], strict: bool = True) -> dict[str, Tensor] | None:
    """Kept statistics; if they are not of `facts`, SystemExit with what differs or, unless strict, None."""
    if not file.is_file():
        if strict:
            raise SystemExit(f"--reference {file}: no such file")
        return None
    try:
        saved = safe_open(file, framework="pt")
    except Exception as error:
        raise SystemExit(f"{file}: cannot be read as statistics ({short(error)}); a file that an evaluation kept is computed again if deleted")
    with saved:
        found = saved.metadata() or {}
        differs = [f"{name} is {found.get(name)} there, {value} here" for name, value in facts.items() if found.get(name) != value]
        if differs and strict:
            raise SystemExit(f"--reference {file}: holds other statistics ({'; '.join(differs)})")
        return None if differs else {name: saved.get_tensor(name) for name in saved.keys()}


def coverage_of(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of the real points [n, D] with a generated one [m, D] nearer than their k-th real neighbour (Naeem et al., 2020)."""
    real, fake = real.double(), fake.double()
    radii = torch.cat([torch.cdist(part, real).kthvalue(k + 1, dim=1).values for part in real.split(1000)])  # 1st: itself
    nearest = torch.cat([torch.cdist(part, fake).amin(dim=1) for part in real.split(1000)])
    return (nearest < radii).double().mean().item()


def mean_of(values: Tensor) -> dict:
    """Mean of independent values [n], and its standard error."""
    values = values.double().cpu()
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return dict(value=values.mean().item(), standard_error=error, n=len(values))


def clip_score(ev, images: Images) -> dict:
    """Mean cosine of images and prompts, as it is: not times 100, not cut at 0."""
    return mean_of(ev.over(images, lambda rows: ev.nets["clip"].cosines(images, rows), "clip"))


def hps_score(ev, images: Images) -> dict:
    return mean_of(ev.over(images, lambda rows: ev.nets["hps"].cosines(images, rows), "hps"))


def alignment(ev, images: Images) -> dict:
    """Share of images whose digit and both colours are right."""
    parts = ev.over(images, lambda rows: ev.nets["judge"].verdicts(images, rows), "alignment")
    return mean_of(parts[:, -1]) | {"parts": dict(zip(("digit", "foreground", "background"), parts.mean(dim=0).tolist()))}


def fid(ev, images: Images) -> dict:
    return dict(value=frechet_distance(ev.features("fid", images), ev.reference("fid")), standard_error=None, n=len(images))


def fd(ev, images: Images) -> dict:
    """As FID, in the image features of the CLIP model."""
    return dict(value=frechet_distance(ev.features("clip", images), ev.reference("clip")), standard_error=None, n=len(images))


def coverage(ev, images: Images) -> dict:
    """k = 5, in the features of FID where that is asked for, otherwise of the CLIP model."""
    (net,) = ev.nets_of("coverage")
    fake, real = ev.features(net, images)["kept"], ev.reference(net)["kept"]
    return dict(value=coverage_of(real, fake), standard_error=None, n=len(fake), n_real=len(real))


def lpips_diversity(ev, images: Images) -> dict:
    """Mean LPIPS of all pairs of a prompt's images, mean over prompts."""
    of_prompt = lambda rows: ev.nets["lpips"].pairwise(images.load(rows)).mean()  # noqa: E731
    return ev.over_prompts(images, of_prompt, "lpips")


def diversity(ev, images: Images) -> dict:
    """As LPIPS diversity, with 1 - cosine of the CLIP model's image features."""

    def of_prompt(rows: Tensor) -> Tensor:
        f = ev.nets["clip"].images(images.load(rows))
        first, second = torch.combinations(torch.arange(len(f))).T
        return 1 - (f[first] * f[second]).sum(dim=1).mean()

    return ev.over_prompts(images, of_prompt, "diversity")


def similarity(ev, images: Images) -> dict:
    """Of images to the one that their prompt was inverted from: mean cosine of the CLIP model's image features."""
    references = [prompt.image for prompt in ev.several]

    def of_prompt(rows: Tensor) -> Tensor:
        source = Images([references[rows[0].item() // DIVERSITY_SEEDS]]).load(torch.tensor([0]))
        return (ev.nets["clip"].images(images.load(rows)) @ ev.nets["clip"].images(source).T).mean()

    return ev.over_prompts(images, of_prompt, "similarity")


def paired(ev, candidate: Candidate, pipe, teacher, seed: int) -> dict:
    """Paired trajectory error of PD: RMS distance in latent space between the end points of the student and of the guided
    model that its halvings started from, by DDIM from the same noise, prompt and w."""
    device, w = ev.accelerator.device, candidate.guidance_scale
    schedule, encoder = load_schedule(teacher).to(device), PromptEncoder(teacher, device)
    prompts = spread(ev.texts, min(PAIRED_PROMPTS, len(ev.texts)))

    def ends(pipeline, steps: int) -> Tensor:
        model = ddim_model(pipeline, schedule, encoder, ev.accelerator)

        def sample(rows: Tensor) -> Tensor:
            cond = encoder.encode(encoder.tokenize([prompts[i] for i in rows.tolist()]))
            z, w_rows = noise_of(rows, latent_shape(pipeline), seed).to(device), torch.full((len(rows),), w, device=device)
            return student_rollout(schedule, model, z, [*timestep_grid(steps), CLEAN], cond | {"w": w_rows})[-1]

        return torch.cat([*in_order(ev.accelerator, len(prompts), ev.args.batch_size, sample, "paired")])

    distance = ends(pipe, candidate.steps) - ends(teacher, candidate.config["teacher_steps"])
    return dict(value=distance.pow(2).mean().sqrt().item(), standard_error=None, n=len(prompts))


def halvings_teacher(candidate: Candidate) -> str | None:
    """The guided model that the halvings of a PD run started from; None for other models."""
    if candidate.script != "pd_ddil":
        return None
    gc = Path(candidate.run) / "stages" / "gc"
    return str(gc) if gc.is_dir() else candidate.config["teacher"]


def ddim_model(pipe, schedule, encoder: PromptEncoder, accelerator):
    """A pipeline's UNet as model(z_t, t, cond) -> v_hat at guidance scale cond["w"], which it takes as an input or by CFG."""
    unet = pipe.unet.to(accelerator.device, frozen_dtype(accelerator))
    model = UNetModel(unet, schedule, pipe.scheduler.config.prediction_type, accelerator.autocast)
    return model if unet.config.time_cond_proj_dim is not None else with_guidance(model, encoder.null())


NETS = dict(fid=["fid"], clip=["clip"], hps=["hps"], fd=["clip"], alignment=["judge"], lpips=["lpips"], diversity=["clip"],
            similarity=["clip"])  # fmt: skip  # the networks of each metric
FUNCTIONS = dict(fid=fid, clip=clip_score, hps=hps_score, fd=fd, coverage=coverage, alignment=alignment, lpips=lpips_diversity,
                 diversity=diversity, similarity=similarity)  # fmt: skip
TITLES = dict(fid="FID", clip="CLIP", hps="HPSv2", fd="FD", lpips="LPIPS diversity", paired="paired error")
PUBLISHED = ("ViT-g-14", "ViT-H-14", "Inception")  # networks that a metric's plain name stands for; others are named beside it


class Evaluation:
    """What all models share: prompts, reference, the metrics' networks, and the folder where everything is kept."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator, self.out = args, accelerator, Path(args.output_dir)
        prompts = read_prompts(args.prompts)
        self.image_metrics = [m for m in args.metrics if m in IMAGE_METRICS]
        if (self.image_metrics or args.shift or "paired" in args.metrics) and len(prompts) < args.num_images:
            raise SystemExit(f"--num_images {args.num_images}: --prompts {args.prompts} holds only {len(prompts)}")
        self.texts = [prompt.text for prompt in spread(prompts, min(args.num_images, len(prompts)))]
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))  # sec. 5: random prompts
        self.several = [prompts[i] for i in order[:DIVERSITY_PROMPTS].sort().values]  # of which several images are made
        if "similarity" in args.metrics and not all(prompt.image for prompt in self.several):
            raise SystemExit(f"--metrics similarity: the entries of --prompts {args.prompts} must name the \"image\" they were inverted from")
        self.nets, self.last_features, self.statistics, self.real = {}, {}, {}, None
        for net in dict.fromkeys(net for metric in args.metrics for net in self.nets_of(metric)):
            self.nets[net] = self.open_net(net)
        if "judge" in self.nets:
            self.nets["judge"].check(self.texts)
        needs_reference = [metric for metric in args.metrics if metric in ("fid", "fd", "coverage")]
        if needs_reference and not args.reference.endswith(".safetensors"):
            self.real = reference_images(args.reference)
        elif needs_reference:  # refused now, if at all
            for metric in needs_reference:
                for net in self.nets_of(metric):
                    self.reference(net)

    def nets_of(self, metric: str) -> list[str]:
        return NETS.get(metric, []) if metric != "coverage" else ["fid" if "fid" in self.args.metrics else "clip"]

    def open_net(self, net: str):
        args, device = self.args, self.accelerator.device
        if net == "fid":
            return Inception("--fid_weights", args.fid_weights, args.resolution, device)
        if net == "clip":
            return Clip("--clip_weights", args.clip_weights, "ViT-g-14", device)
        if net == "hps":
            return HumanPreference("--hps_weights", args.hps_weights, "ViT-H-14", device)
        if net == "lpips":
            return Lpips("--lpips_weights", args.lpips_weights, args.lpips_net, args.resolution, device)
        return Judge(device)

    def title(self, metric: str) -> str:
        """A column's name, which says what was measured: plain "CLIP" is that of ViT-g-14, plain "FID" Inception's."""
        names = [self.nets[net].name for net in self.nets_of(metric)]
        plain = not names or metric in ("lpips", "alignment") or metric in ("fid", "clip", "hps") and names[0] in PUBLISHED
        return TITLES.get(metric, metric) + ("" if plain else f" ({names[0]})")

    def over(self, images: Images, function: Callable[[Tensor], Tensor], desc: str) -> Tensor:
        """function(rows) of all images, in order."""
        return torch.cat([*in_order(self.accelerator, len(images), self.args.batch_size, function, desc)])

    def over_prompts(self, images: Images, of_prompt: Callable[[Tensor], Tensor], desc: str) -> dict:
        """Mean and standard error over prompts of of_prompt(the rows of its images)."""
        rows = lambda i: torch.arange(DIVERSITY_SEEDS) + i * DIVERSITY_SEEDS  # noqa: E731
        function = lambda prompts: torch.stack([of_prompt(rows(i)) for i in prompts])  # noqa: E731
        return mean_of(torch.cat([*in_order(self.accelerator, len(self.several), 1, function, desc)]))

    def compute_statistics(self, net: str, images: Images) -> dict[str, Tensor]:
        """Of the images' features; in a fixed random order, so that those kept for coverage are no special ones."""
        features, order = Features(), torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        function = lambda rows: self.nets[net].images(images.load(order[rows]))  # noqa: E731
        for part in in_order(self.accelerator, len(images), self.args.batch_size, function, f"{net} features"):
            features.add(part)
        return features.statistics()

    def features(self, net: str, images: Images) -> dict[str, Tensor]:
        """Statistics of generated images; FD and coverage share the last ones."""
        if self.last_features.get(net, (None,))[0] is not images:
            self.last_features[net] = images, self.compute_statistics(net, images)
        return self.last_features[net][1]

    def reference(self, net: str) -> dict[str, Tensor]:
        """Statistics of the real images, computed once and kept in a file, which --reference of another evaluation may name."""
        if net not in self.statistics:
            facts = {"net": net, **self.nets[net].weights, "resolution": str(self.args.resolution)}
            if self.real is None:
                self.statistics[net] = load_statistics(Path(self.args.reference), facts)
            else:
                facts |= self.real.settings
                file = self.out / f"reference-{net}.safetensors"
                self.statistics[net] = load_statistics(file, facts, strict=False) or self.compute_statistics(net, self.real)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_file(self.statistics[net], file.with_suffix(".tmp"), metadata=facts)
                    file.with_suffix(".tmp").rename(file)
        return self.statistics[net]

    def facts(self, metric: str) -> dict:
        """All that a metric's value depends on besides the images."""
        facts = {name: value for net in self.nets_of(metric) for name, value in self.nets[net].weights.items()}
        if metric == "lpips" or "fid" in self.nets_of(metric):
            facts |= {"resize": f"central square, LANCZOS to {self.args.resolution}"}
        if metric in ("fid", "fd", "coverage"):
            file = Path(self.args.reference)
            facts |= self.real.settings if self.real else {"reference": str(file), "reference_contents": sha256(file)}
        if metric == "similarity":
            facts |= {"sources": digest([sha256(prompt.image) for prompt in self.several])}
        return facts

    def measure(self, key: str, metric: str, settings: dict, function: Callable[[], dict]) -> dict:
        """The score that scores/KEY.json holds if the same was measured before; otherwise it is measured now, and kept there."""
        file, facts = self.out / "scores" / f"{key}.json", json.loads(json.dumps(self.facts(metric) | settings))
        kept = [json.loads(file.read_text()) if file.is_file() else {}]
        (known,) = broadcast_object_list(kept)  # the first process has the say, so that all of them do the same
        if known.get(metric, {}).get("facts") != facts:
            known[metric] = {"metric": self.title(metric)} | function() | {"facts": facts}
            if self.accelerator.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, known)
        return known[metric]


def evaluate(ev: Evaluation, candidate: Candidate) -> list[dict]:
    """What one model gave, for each seed; images are made first, and everything is kept."""
    pipe, asked = open_candidate(candidate, ev.accelerator)
    config = network_of(pipe).config
    takes_w = getattr(config, "time_cond_proj_dim", None) or getattr(config, "guidance_embeds", False)
    nfe = len(pipe.scheduler.timesteps) * (2 if candidate.guidance_scale > 1 and not takes_w else 1)
    teacher = halvings_teacher(candidate) if "paired" in ev.args.metrics else None
    if teacher:
        gc = load_pipeline(teacher, "--teacher")
        pairing = {"teacher": teacher, "teacher_weights": contents_of(gc), "teacher_steps": candidate.config["teacher_steps"]}
    results = []
    for seed in ev.args.seed:
        key, settings, sample = f"{candidate.key}-seed{seed}", asked | {"seed": seed}, pipeline_sampler(pipe, candidate, seed)
        one_each = several = None
        if ev.image_metrics:
            one_each = generate(ev, key, settings, sample, ev.texts)
        if set(PROMPT_METRICS) & set(ev.args.metrics):
            prompts = [prompt.text for prompt in ev.several for _ in range(DIVERSITY_SEEDS)]
            several = generate(ev, f"{key}-{DIVERSITY_SEEDS}each", settings, sample, prompts, DIVERSITY_NOISE)
        scores = {}
        for metric in ev.args.metrics:
            if metric != "paired":
                images = one_each if metric in IMAGE_METRICS else several
                scores[metric] = ev.measure(key, metric, images.settings, lambda: FUNCTIONS[metric](ev, images))
            elif teacher:
                facts = settings | pairing | {"prompts": digest(ev.texts), "precision": ev.accelerator.mixed_precision}
                scores[metric] = ev.measure(key, metric, facts, lambda: paired(ev, candidate, pipe, gc, seed))
        results.append({"label": candidate.label, "key": key, "nfe": nfe, "protocol": ev.args.protocol} | settings | {"scores": scores})
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

    def student_rate(self, noises: Sequence[int], n_intervals: int, seed: int) -> Tensor:
        """[B, intervals], 1 where the student moves, else 0: drawn for each image alone, the same draws in all mixtures."""
        if self.moves:
            return torch.tensor([float(who == "S") for who in self.moves]).expand(len(noises), -1)
        generators = [torch.Generator().manual_seed(seed_of(seed, "who moves", i)) for i in noises]
        return torch.stack([(torch.rand(n_intervals, generator=g) >= self.p_teacher).float() for g in generators])


def mixtures(p_teacher: Sequence[float], n_intervals: int) -> list[Arm]:
    """Table 5: at each interval the teacher moves with probability p_T."""
    pure = {0: "S" * n_intervals, 1: "T" * n_intervals}
    return [Arm("mix", f"p_T = {p:g}", pure.get(p, ""), p) for p in p_teacher]


def switches(orders: Sequence[str], switch_at: Sequence[int] | None, grid: list[int]) -> list[Arm]:
    """Tables 6 and 7: one model moves first, the other from timestep T on; at the grid's second point the first makes one move."""
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
    """Figure 4: one model's trajectory, and exactly one interval of it handed to the other, for each interval, both ways."""
    arms = []
    for own, other in ("student", "teacher"), ("teacher", "student"):
        for j, t in enumerate(grid):
            moves = own[0].upper() * j + other[0].upper() + own[0].upper() * (len(grid) - j - 1)
            arms.append(Arm("interval", f"{own}, but {other} at {t}", moves))
        arms.append(Arm("interval", f"{own} alone", own[0].upper() * len(grid)))
    return arms


class Pair:
    """A student and the teacher it is analysed with, as models of one trajectory. SystemExit if their grids do not align."""

    def __init__(self, ev: Evaluation, candidate: Candidate):
        self.candidate, device = candidate, ev.accelerator.device
        stage_v = Path(candidate.run or "") / "stages" / "v"
        self.teacher_name = ev.args.teacher or (str(stage_v) if candidate.run and stage_v.is_dir() else candidate.config.get("teacher"))
        if self.teacher_name is None:
            raise SystemExit(f"--shift: {candidate.model} belongs to no run, which would name its teacher; give --teacher")
        teacher_steps = ev.args.teacher_steps or candidate.config.get("teacher_steps", 32)
        self.pipe, self.teacher_pipe = load_pipeline(candidate.model, "MODEL"), load_pipeline(self.teacher_name, "--teacher")
        grid, teacher_grid = timestep_grid(candidate.steps), timestep_grid(teacher_steps)
        if candidate.sampler == "trained":  # the others take our grid
            self.pipe.scheduler.set_timesteps(candidate.steps)
            own = self.pipe.scheduler.timesteps.tolist()
            if own != grid:
                raise SystemExit(f"--shift: {candidate.model} samples at {own}, not on DDIM's grid {grid}, which only PD's students share "
                                 "with their teacher")  # fmt: skip
        if not set(grid) <= set(teacher_grid):
            raise SystemExit(f"--teacher_steps {teacher_steps}: the student's timesteps {grid} are not all on the teacher's grid "
                             f"{teacher_grid}; it must have a multiple of {candidate.steps} steps")  # fmt: skip
        self.schedule = load_schedule(self.teacher_pipe).to(device)
        if latent_shape(self.teacher_pipe) != latent_shape(self.pipe) or not torch.equal(load_schedule(self.pipe).alpha.to(device), self.schedule.alpha):
            raise SystemExit(f"--teacher {self.teacher_name}: its latents or its noise schedule are not those of {candidate.model}")
        self.teacher_weights, self.student_weights = contents_of(self.teacher_pipe), contents_of(self.pipe)
        self.encoder = PromptEncoder(self.teacher_pipe, device)
        self.teacher = ddim_model(self.teacher_pipe, self.schedule, self.encoder, ev.accelerator)
        self.student = ddim_model(self.pipe, self.schedule, self.encoder, ev.accelerator)
        half, vae = frozen_dtype(ev.accelerator), self.pipe.vae
        vae.to(device, torch.float32 if half == torch.float16 and vae.config.force_upcast else half)  # as the pipelines do
        self.dataset = None
        if "gap" in ev.args.shift:
            self.data = ev.args.data or candidate.config.get("data")
            if self.data is None:
                raise SystemExit(f"--shift gap: {candidate.model} belongs to no run, which would name its data; give --data")
            self.dataset = load_images(self.data)[0]
        self.label = f"{candidate.label}, {candidate.steps} steps"
        self.grid, self.teacher_grid, self.device = [*grid, CLEAN], [*teacher_grid, CLEAN], device

    def settings(self, seed: int) -> dict:
        return dict(model=self.candidate.model, model_weights=self.student_weights, steps=self.candidate.steps, seed=seed,
                    guidance_scale=self.candidate.guidance_scale, sampler="ddim", teacher=self.teacher_name,
                    teacher_weights=self.teacher_weights, teacher_steps=len(self.teacher_grid) - 1)  # fmt: skip

    def start(self, prompts: Sequence[str], noises: Sequence[int], seed: int) -> tuple[Tensor, dict]:
        """(z at 999, cond)"""
        z = noise_of(noises, latent_shape(self.pipe), seed).to(self.device)
        cond = self.encoder.encode(self.encoder.tokenize(prompts))
        return z, cond | {"w": torch.full((len(z),), self.candidate.guidance_scale, device=self.device)}

    def rollout(self, z: Tensor, cond: dict, student_rate: float | Tensor) -> list[Tensor]:
        """The states at all points of the student's grid."""
        return mixed_rollout(self.schedule, self.teacher, self.student, z, self.teacher_grid, self.grid, cond, student_rate,
                             torch.Generator())[0]  # fmt: skip

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""
        latents = (z / self.pipe.vae.config.scaling_factor).to(self.pipe.vae.dtype)
        parts = latents.split(max(1, 2**20 // pixels_of(self.pipe)))  # a batch of large decodes does not fit
        return (torch.cat([self.pipe.vae.decode(part, return_dict=False)[0] for part in parts]) / 2 + 0.5).clamp(0, 1)

    def disagreement(self, z_t: Tensor, j: int, cond: dict) -> Tensor:
        """Mean square [B] of what the student's one step over interval j and the teacher's own steps say about x."""
        t, s = self.grid[j], self.grid[j + 1]
        path = self.teacher_grid[self.teacher_grid.index(t) : self.teacher_grid.index(s) + 1]
        z_s = student_rollout(self.schedule, self.student, z_t, (t, s), cond)[-1]
        target = teacher_rollout(self.schedule, self.teacher, z_t, path, cond)[-1]
        t, s = (torch.full((len(z_t),), i, device=z_t.device) for i in (t, s))
        d = rotation(self.schedule, t, s)[1]
        return (self.schedule.at(t)[1] / d * (z_s - target)).square().mean(dim=(1, 2, 3))  # x = (sigma_t z_s - sigma_s z_t) / d


def evaluate_arms(ev: Evaluation, pair: Pair, seed: int) -> list[dict]:
    """Tables 5-7 and Figure 4: a row for each arm with its metrics; the same noise and captions in all of them."""
    args, grid = ev.args, pair.grid[:-1]
    arms = mixtures(args.mix_teacher, len(grid)) if "mix" in args.shift else []
    arms += switches(args.switch_order, args.switch_at, grid) if "switch" in args.shift else []
    arms += one_interval(grid) if "interval" in args.shift else []
    rows = []
    for arm in arms:
        key = f"{pair.candidate.key}-seed{seed}-shift-{arm.moves or arm.p_teacher}"  # arms of the same moves are made once

        def sample(prompts: list[str], noises: list[int]) -> Tensor:
            z, cond = pair.start(prompts, noises, seed)
            return pair.decode(pair.rollout(z, cond, arm.student_rate(noises, len(grid), seed))[-1])

        settings = pair.settings(seed) | {"moves": arm.moves or f"p_T = {arm.p_teacher}"}
        images = generate(ev, key, settings, sample, ev.texts)
        scores = {m: ev.measure(key, m, images.settings, lambda m=m: FUNCTIONS[m](ev, images)) for m in ev.image_metrics}
        rows.append(dict(label=pair.label, steps=len(grid), kind=arm.kind, arm=arm.name, moves=arm.moves, seed=seed, scores=scores))
    return rows


def shift_gap(ev: Evaluation, pair: Pair, seed: int) -> dict:
    """The shift itself, at each timestep of the student's grid: how far the latents that it visits are from forward-diffused
    ones of the same captions (Frechet distance of latents pooled to 4 x 4, and each channel's mean and std), and how much
    student and teacher disagree about x on both. Beside it the same of latents that the teacher visits, which guidance
    moves too, and of forward-diffused latents of other images: what no shift would give for so many."""
    dataset, n = pair.dataset, min(ev.args.num_images, len(pair.dataset) // 2)
    order, J = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)), len(pair.grid) - 1
    latents = LatentData(dataset, pair.teacher_pipe, pair.encoder, ev.args.batch_size, 0, 0, 1, torch.Generator(pair.device), cache=False)

    def forward(rows: Tensor, noise: str) -> tuple[list[Tensor], Tensor]:
        """Forward-diffused states at each t, and the captions' token ids; rows of the shuffled data."""
        moments, ids = latents.encode(order[rows])
        mean, std = moments.unbind(dim=1)
        draw = [noise_of(rows, mean.shape[1:], seed_of(seed, noise, what)).to(pair.device) for what in ("x", "eps")]
        x = (mean + std * draw[0]) * latents.scaling
        return [add_noise(pair.schedule, x, draw[1], torch.full((len(x),), t, device=pair.device)) for t in pair.grid[:-1]], ids

    def one_batch(rows: Tensor) -> Tensor:
        """[B, 4 sources x J x (features, channel means, channel mean squares) + 2 x J disagreements]"""
        here, ids = forward(rows, "forward")
        other, _ = forward(rows + n, "other images")
        z = noise_of(rows, here[0].shape[1:], seed).to(pair.device)
        cond = pair.encoder.encode(ids) | {"w": torch.full((len(z),), pair.candidate.guidance_scale, device=pair.device)}
        visited = [pair.rollout(z, cond, rate)[:-1] for rate in (1.0, 0.0)]  # by the student, by the teacher
        pooled = lambda z: torch.nn.functional.adaptive_avg_pool2d(z, [min(4, side) for side in z.shape[2:]])  # noqa: E731
        summaries = [torch.cat([pooled(z).flatten(1), z.mean(dim=(2, 3)), z.square().mean(dim=(2, 3))], dim=1)
                     for states in (here, other, *visited) for z in states]  # fmt: skip
        squares = [pair.disagreement(z, j, cond) for states in (here, visited[0]) for j, z in enumerate(states)]
        return torch.cat([*summaries, torch.stack(squares, dim=1)], dim=1).double()

    C = latent_shape(pair.pipe)[0]
    totals, squares = None, 0.0
    for part in in_order(ev.accelerator, n, ev.args.batch_size, one_batch, "shift"):
        summaries, disagreements = part.split([part.shape[1] - 2 * J, 2 * J], dim=1)
        summaries = summaries.unflatten(1, (4 * J, -1))  # [B, 4 J, features + 2 C]
        totals = totals or [(Features(), Features()) for _ in range(4 * J)]
        for (features, channels), summary in zip(totals, summaries.unbind(dim=1)):
            features.add(summary[:, : -2 * C])
            channels.add(summary[:, -2 * C :])
        squares = squares + disagreements.sum(dim=0).cpu()
    forward_rms, visited_rms = (squares / n).sqrt().split(J)
    rows = []
    for j, t in enumerate(pair.grid[:-1]):
        statistics = [totals[source * J + j][0].statistics() for source in range(4)]
        moments = [(totals[source * J + j][1].sum / n).split(C) for source in range(4)]
        row = {"t": t, "disagreement, forward": forward_rms[j].item(), "disagreement, visited": visited_rms[j].item()}
        row["disagreement, visited / forward"] = row["disagreement, visited"] / row["disagreement, forward"]
        mean, std = moments[0][0], (moments[0][1] - moments[0][0].square()).sqrt()
        for source, name in enumerate(("other images", "student", "teacher"), start=1):
            mean_there, std_there = moments[source][0], (moments[source][1] - moments[source][0].square()).sqrt()
            row[f"FD, {name}"] = frechet_distance(statistics[source], statistics[0])
            row[f"mean, {name}"] = ((mean_there - mean) / std).square().mean().sqrt().item()
            row[f"std, {name}"] = (std_there / std).mean().item()
        row["FD, student to teacher"] = frechet_distance(statistics[2], statistics[3])
        rows.append(row)
    return {"value": rows, "standard_error": None, "n": n}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Report
# ----------------------------------------------------------------------------------------------------------------------


def number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    digits = 2 if abs(value) >= 10 else 4
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def over_runs(values: list[float]) -> tuple[float | None, float | None]:
    """Mean over runs and seeds, and its standard error where there are several."""
    if not values:
        return None, None
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else None


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def main_table(ev: Evaluation, results: list[dict]) -> str:
    """A row for each label and setting, the mean over its runs and seeds, and beside it the paper's numbers."""
    groups = {}
    for result in results:
        groups.setdefault((result["label"], result["steps"], result["sampler"], result["guidance_scale"]), []).append(result)
    titles = {metric: ev.title(metric) for metric in ev.args.metrics}
    paper = PAPER.get(ev.args.protocol, PAPER["coco2017-512"])
    columns = list(dict.fromkeys(c for key in groups for c in paper.get(key[:2], ())))
    source = "COCO14-30K" if ev.args.protocol == "coco2014-256" else "COCO17-5K"
    header = ["", "steps", "NFE", "sampler", "w", "runs", *titles.values(), *[f"paper: {c} ({source})" for c in columns]]
    rows = []
    for (label, steps, sampler, w), group in groups.items():
        cells = []
        for metric in titles:
            scores = [result["scores"][metric] for result in group if metric in result["scores"]]
            mean, error = over_runs([score["value"] for score in scores])
            cells.append(number(mean, scores[0]["standard_error"] if len(scores) == 1 else error))
        numbers = paper.get((label, steps), {})
        cells += [f"{numbers[c]:g}" if c in numbers else "-" for c in columns]
        rows.append([label, str(steps), str(group[0]["nfe"]), sampler, f"{w:g}", str(len(group)), *cells])
    return markdown(header, rows)


def arm_means(rows: list[dict], label: str, kind: str, metric: str) -> dict[str, float]:
    """Arm -> mean of a metric over runs and seeds."""
    values = {}
    for row in rows:
        if (row["label"], row["kind"]) == (label, kind):
            values.setdefault(row["arm"], []).append(row["scores"][metric]["value"])
    return {arm: over_runs(found)[0] for arm, found in values.items()}


def gap_means(gaps: list[dict], label: str) -> list[dict]:
    """Mean over runs and seeds of shift_gap's rows."""
    found = zip(*[gap["value"] for gap in gaps if gap["label"] == label])
    return [{name: over_runs([row[name] for row in at])[0] for name in at[0]} for at in found]


def shift_tables(ev: Evaluation, rows: list[dict], gaps: list[dict]) -> str:
    """One table for each analysis; a column for each metric of each student."""
    captions = dict(mix="Table 5: the teacher moves with probability p_T at each interval",
                    switch="Tables 6 and 7: one model first, the other from a timestep on",
                    interval="Figure 4: exactly one interval handed over")  # fmt: skip
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        labels = dict.fromkeys(row["label"] for row in rows if row["kind"] == kind)
        columns = {f"{label}: {ev.title(m)}": arm_means(rows, label, kind, m) for label in labels for m in ev.image_metrics}
        arms = dict.fromkeys(arm for column in columns.values() for arm in column)
        columns = {title: [number(column.get(arm)) for arm in arms] for title, column in columns.items()}
        if set(arms) & set(PAPER_SHIFT) and any(row["steps"] == 4 for row in rows):
            for i, title in enumerate(("paper: FID (COCO17-5K)", "paper: CLIP (COCO17-5K)")):
                columns[title] = [f"{PAPER_SHIFT[arm][i]:g}" if arm in PAPER_SHIFT else "-" for arm in arms]
        parts.append(f"{captions[kind]}\n\n{markdown(['', *columns], [list(row) for row in zip(arms, *columns.values())])}")
    for label in dict.fromkeys(gap["label"] for gap in gaps):
        means = gap_means(gaps, label)
        lines = [[f"{row['t']:.0f}", *[number(value) for name, value in row.items() if name != "t"]] for row in means]
        parts.append(f"{label}: visited latents beside forward-diffused ones of the same captions\n\n{markdown([*means[0]], lines)}")
    return "\n\n".join(parts)


def plot_shift(ev: Evaluation, rows: list[dict], gaps: list[dict], file: Path) -> None:
    """A row of panels for each metric of the arms (at most two), and one for the shift itself; a colour for each student."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = [m for m in ("fid", "fd", "alignment", "clip", "hps", "coverage") if m in ev.image_metrics][:2] if rows else []
    height = len(metrics) + bool(gaps)
    figure, axes = plt.subplots(height, 3, figsize=(14, 3.8 * height), squeeze=False)

    def draw(axis, means: dict[str, float], line: str, colour: str, legend: str) -> None:
        if means:
            axis.plot([name.rpartition(" ")[2] for name in means], list(means.values()), line, color=colour, label=legend)

    for i, label in enumerate(dict.fromkeys(row["label"] for row in [*rows, *gaps])):
        colour = f"C{i}"
        for (mixed, switched, handed_over), metric in zip(axes, metrics):
            draw(mixed, arm_means(rows, label, "mix", metric), "o-", colour, label)
            for own, other, line in ("student", "teacher", "o--"), ("teacher", "student", "o-"):
                of_own = lambda kind: {arm: v for arm, v in arm_means(rows, label, kind, metric).items() if arm.startswith(own)}  # noqa: E731
                draw(switched, of_own("switch"), line, colour, f"{label}: {own} first")
                intervals = of_own("interval")
                alone = intervals.pop(f"{own} alone", None)
                draw(handed_over, intervals, line, colour, f"{label}: {own}, but {other} there")
                if alone is not None:
                    handed_over.axhline(alone, linestyle=line[1:], linewidth=0.8, color=colour, alpha=0.6)
            mixed.set(title="mixed (Table 5)", xlabel="probability of the teacher", ylabel=ev.title(metric))
            switched.set(title="switched (Tables 6, 7)", xlabel="second model moves from t", ylabel=ev.title(metric))
            handed_over.set(title="one interval handed over (Fig. 4; thin: none)", xlabel="interval that starts at t", ylabel=ev.title(metric))
        panels = (("FD", ("student", "teacher", "other images"), "visited and forward-diffused latents", "Frechet distance"),
                  ("disagreement", ("visited / forward",), "disagreement with the teacher about x, one interval", "on visited / on forward-diffused"),
                  ("std", ("student", "teacher", "other images"), "spread of visited latents", "std / std of forward-diffused"))  # fmt: skip
        for axis, (what, names, title, y) in zip(axes[-1], panels if gaps else ()):
            for name, line in zip(names, ("o-", "o--", "o:")):
                means = {f"{row['t']:.0f}": row[f"{what}, {name}"] for row in gap_means(gaps, label)}
                draw(axis, means, line, colour, f"{label}: {name}")
            axis.set(title=title, xlabel="t", ylabel=y)
    for axis in axes.flat:
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def report(ev: Evaluation, results: list[dict], rows: list[dict], gaps: list[dict]) -> str:
    """results.json, results.md, contact.png and shift.png from all that is measured so far; returns the tables."""
    args, names = ev.args, ("torch", "diffusers", "transformers", "open_clip_torch", "lpips", "torch-fidelity")
    settings = {n: v for n, v in sorted(vars(args).items()) if n not in ("given", "overwrite")}
    records = [{n: v for n, v in result.items() if n != "scores"} | score for result in results for score in result["scores"].values()]
    versions = {name: importlib.metadata.version(name) for name in names}
    write_json(ev.out / "results.json", {"settings": settings, "versions": versions, "results": records, "shift": rows, "gap": gaps})
    sizes = {score["metric"]: score["n"] for result in results for score in result["scores"].values()}
    tables = [f"Protocol {args.protocol}; prompts {args.prompts}, reference {args.reference}, seeds {args.seed}. Sample sizes: "
              f"{', '.join(f'{name} {n}' for name, n in sizes.items())}. ± is the standard error, over runs where there are several.",
              main_table(ev, results)]  # fmt: skip
    if rows or gaps:
        tables.append(shift_tables(ev, rows, gaps))
        plot_shift(ev, rows, gaps, ev.out / "shift.png")
    (ev.out / "results.md").write_text("\n\n".join(tables) + "\n")
    if ev.image_metrics:
        first = {f"{r['label']}, {r['steps']} steps": r for r in reversed(results)}
        sheets = {name: Images(sorted((ev.out / "images" / result["key"]).glob("*.png"))) for name, result in reversed(first.items())}
        save_sheet(ev.out / "contact.png", {name: images.load(torch.arange(min(8, len(images)))) for name, images in sheets.items()}, label_width=200)
    return "\n\n".join(tables)


def main(argv=None) -> None:
    args = parse_args(argv)
    candidates = candidates_of(args)
    folder = Path(args.output_dir)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not (folder / "images").is_dir():
        raise SystemExit(f"--output_dir {folder}: holds something else than an evaluation; choose another folder")
    for candidate in candidates:  # what cannot work is refused now, not after hours
        find_pipeline(candidate.model, "MODEL")
    accelerator = start_accelerator()
    ev = Evaluation(args, accelerator)
    students = [c for c in candidates if c.is_student and c.model != args.teacher and (c.run or args.teacher)] if args.shift else []
    if args.shift and not students:
        raise SystemExit("--shift: none of the models is a student that belongs to a run; name one, or give --teacher")
    for candidate in students:
        switches(args.switch_order, args.switch_at, Pair(ev, candidate).grid[:-1])
    (folder / "images").mkdir(parents=True, exist_ok=True)

    results, rows, gaps, tables = [], [], [], ""
    for candidate in candidates:
        results += evaluate(ev, candidate)
        tables = report(ev, results, rows, gaps) if accelerator.is_main_process else ""
    for candidate in students:
        pair = None  # let go of the one before
        pair = Pair(ev, candidate)
        for seed in args.seed:
            rows += evaluate_arms(ev, pair, seed)
            if "gap" in args.shift:
                settings = pair.settings(seed) | {"data": pair.data, "num_images": args.num_images, "precision": accelerator.mixed_precision}
                gap = ev.measure(f"{candidate.key}-seed{seed}-shift-gap", "gap", settings, lambda: shift_gap(ev, pair, seed))
                gaps.append({"label": pair.label, "seed": seed} | gap)
            tables = report(ev, results, rows, gaps) if accelerator.is_main_process else ""
    accelerator.print(tables)
    accelerator.print(f"{folder}: results.json, results.md" + ", contact.png" * bool(ev.image_metrics) + ", shift.png" * bool(students))
    accelerator.end_training()


if __name__ == "__main__":
    main()
