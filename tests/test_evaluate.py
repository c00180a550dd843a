"""evaluate.py: images that depend on nothing but their own seed, metrics against closed forms, torch-fidelity and slow
references, networks of the real code path with random weights, covariate shift, and what is refused."""

import importlib
import io
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ASCII, ROOT, SMALL, change_json, refusal, run_here, run_script, save_images, scale_weights
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler, PNDMScheduler
from lpips import LPIPS
from PIL import Image
from safetensors.torch import save_file
from test_scripts import launch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import evaluate
from common import CLEAN, noise_of, timestep_grid
from evaluate import Arm, Candidate, Images, coverage_of, frechet_distance, read_prompts

TINY = ROOT / "assets" / "tiny"


def evaluated(out, *args) -> dict:
    """results.json of an evaluation in this process."""
    run_here(*args, "--output_dir", out, script="evaluate.py")
    return json.loads((out / "results.json").read_text())


def refused(out, *args) -> str:
    """The one line of its refusal."""
    return refusal(*args, "--output_dir", out, script="evaluate.py")


def in_bf16(monkeypatch, function):
    """As `accelerate launch --mixed_precision bf16` sets it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        return function()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def images_of(out, *words) -> dict:
    """Images of the one folder whose name has all the words (and ends with the last, if several do)."""
    folders = [f for f in (out / "images").iterdir() if all(word in f.name for word in words)]
    (folder,) = [f for f in folders if len(folders) == 1 or f.name.endswith(words[-1])]
    return {f.name: np.asarray(Image.open(f)).astype(int) for f in sorted(folder.glob("*.png"))}


def assert_within_one(a: dict, b: dict) -> None:
    assert a and a.keys() == b.keys()
    assert max(abs(a[name] - b[name]).max() for name in a) <= 1


@pytest.fixture(scope="module")
def pd_run(tmp_path_factory, gc_folder, data_folder):
    """A finished PD run of a random teacher, 8 -> 4 -> 2 steps."""
    folder = tmp_path_factory.mktemp("runs") / "pd"
    flags = [*SMALL, "--teacher_steps", 8, "--student_steps", 2, "--max_updates", 1]
    run_here("--teacher", gc_folder, "--data", data_folder, "--output_dir", folder, *flags)
    return folder


@pytest.fixture(scope="module")
def small(data_folder):
    """Flags for six images of the test data."""
    prompts = data_folder.parent / "captions.json"
    prompts.write_text(json.dumps([f"caption number {i}" for i in range(12)]))
    flags = ["--prompts", prompts, "--reference", data_folder, "--num_images", 6]
    return [*flags, "--metrics", "clip", "fd", "--steps", 2, "--guidance_scale", 3]


def with_scheduler(folder, teacher, kind, **settings):
    pipe = DiffusionPipeline.from_pretrained(teacher)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    pipe.save_pretrained(folder)
    return folder


# --- images ---


@pytest.mark.parametrize("batch_size", [1, 7])
def test_first_noise_is_noise_of_the_index(batch_size, teacher_folder):
    """Bit for bit, whatever the batch: what the stock pipeline starts from is common.noise_of."""
    pipe, seen = DiffusionPipeline.from_pretrained(teacher_folder), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sample = evaluate.pipeline_sampler(pipe, Candidate("", "", 1, 1.0, "trained"), seed=5)
    for noises in torch.arange(7).split(batch_size):
        sample(["a"] * len(noises), noises.tolist())
    assert torch.equal(torch.cat(seen), noise_of(range(7), (4, 8, 8), seed=5))


@pytest.mark.parametrize("kind", ["teacher_folder", "xl_folder", "lcm"])
def test_images_do_not_depend_on_the_batch(kind, tmp_path, request, small):
    """The LCM sampler draws noise between its steps too."""
    model = request.getfixturevalue("teacher_folder" if kind == "lcm" else kind)
    model = with_scheduler(tmp_path / "lcm", model, LCMScheduler) if kind == "lcm" else model
    for batch_size in (1, 7):
        evaluated(tmp_path / str(batch_size), model, *small, "--metrics", "clip", "--batch_size", batch_size)
    assert_within_one(images_of(tmp_path / "1"), images_of(tmp_path / "7"))


def test_two_processes_give_the_same(tmp_path, pd_run, small):
    """Images, metrics, mixtures and the shift itself."""
    flags = [pd_run, *small[:-4], "--metrics", "clip", "fd", "coverage", "diversity", "paired", "--num_images", 7]
    flags += ["--mix_teacher", 0.5, "--shift", "mix", "gap"]
    one, log = evaluated(tmp_path / "one", *flags, "--batch_size", 7), tmp_path / "log"
    flags += ["--batch_size", 2, "--output_dir", tmp_path / "two"]
    assert launch(log, "evaluate.py", *flags, ranks=2) == [0, 0], log.read_text()
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    for words in (["seed0-shift-0.5"], ["10each"]):
        assert_within_one(images_of(tmp_path / "one", *words), images_of(tmp_path / "two", *words))
    for a, b in zip(one["results"], two["results"], strict=True):  # images may differ by 1/255
        assert a["value"] == pytest.approx(b["value"], rel=1e-2, abs=1e-4), a["metric"]
    for a, b in zip(one["gap"][0]["value"], two["gap"][0]["value"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("model", ["pd_run", "xl_folder"])
def test_bf16(model, tmp_path, request, small, monkeypatch):
    """Networks in bf16, everything around them works; images stay near those in fp32."""
    model, is_pd = request.getfixturevalue(model), model == "pd_run"
    flags = [model, *small, *(["--metrics", "clip", "paired", "--shift", "mix", "gap"] if is_pd else [])]
    exact = evaluated(tmp_path / "no", *flags)
    half = in_bf16(monkeypatch, lambda: evaluated(tmp_path / "bf16", *flags))
    assert [r["metric"] for r in half["results"]] == [r["metric"] for r in exact["results"]]
    assert half["results"][0]["facts"]["precision"] == "bf16"
    name = "shift-SS" if is_pd else "seed0"
    a, b = (images_of(tmp_path / precision, name) for precision in ("no", "bf16"))
    assert 0 < np.mean([abs(a[name] - b[name]).mean() for name in a]) < 8


def test_a_killed_evaluation_goes_on(tmp_path, teacher_folder, small):
    whole, before = evaluated(tmp_path, teacher_folder, *small), images_of(tmp_path)
    (folder,) = (tmp_path / "images").iterdir()
    for name in ("000001.png", "000004.png"):
        (folder / name).unlink()
    (folder / "000005.tmp").write_bytes(b"half an image")
    kept = (folder / "000002.png").stat().st_mtime_ns
    assert evaluated(tmp_path, teacher_folder, *small)["results"] == whole["results"]
    assert_within_one(before, images_of(tmp_path))
    assert (folder / "000002.png").stat().st_mtime_ns == kept


CHANGES_IN_PLACE = {
    "scheduler/scheduler_config.json": {"prediction_type": "v_prediction"}, "vae/config.json": {"scaling_factor": 0.5},
    "unet/config.json": {"sample_size": 12}, "text_encoder/config.json": {"hidden_act": "gelu"},
    "tokenizer/tokenizer_config.json": {"pad_token": "!"},
}  # fmt: skip


def test_images_by_other_settings_are_refused_or_replaced(tmp_path, teacher_folder, small, monkeypatch):
    """Another number, or another model under the same name: settings, size, prompts' tokens, weights. A kill in the midst
    of --overwrite leaves no image without the manifest that says what it is."""
    model, out, deleted, unlink = shutil.copytree(teacher_folder, tmp_path / "model"), tmp_path / "out", [], os.unlink
    evaluated(out, model, *small)
    before = images_of(out)
    (note := next((out / "images").iterdir()) / "best.txt").write_text("000003")
    message = refused(out, model, *small, "--num_images", 5)
    assert "num_images: 6 there, now 5" in message and "--overwrite" in message
    for file, change in CHANGES_IN_PLACE.items():
        as_it_was = (model / file).read_bytes()
        change_json(model / file, **change)
        assert "model_weights: " in refused(out, model, *small), file
        (model / file).write_bytes(as_it_was)
    scale_weights(model, 1.1)
    assert "model_weights: " in refused(out, model, *small)
    assert_within_one(before, images_of(out))
    monkeypatch.setattr(os, "unlink", lambda file, **at: deleted.append(Path(file).name) or unlink(file, **at))
    evaluated(out, model, *small, "--overwrite")
    assert before.keys() <= {*deleted} and "manifest.json" not in deleted
    assert any((image != before[name]).any() for name, image in images_of(out).items())
    assert note.read_text() == "000003"


def test_an_image_that_is_not_finite_is_named(tmp_path, teacher_folder, small, monkeypatch):
    stock = evaluate.pipeline_sampler

    def breaks_at_four(*args):
        nan = lambda noises: torch.tensor([math.nan if i == 4 else 0 for i in noises]).view(-1, 1, 1, 1)
        return lambda prompts, noises: stock(*args)(prompts, noises) + nan(noises)

    monkeypatch.setattr(evaluate, "pipeline_sampler", breaks_at_four)
    message = refused(tmp_path, teacher_folder, *small, "--batch_size", 2, "--seed", 3)
    assert "'caption number 8', seed 3" in message
    assert list(images_of(tmp_path)) == [f"{i:06d}.png" for i in range(4)]


@pytest.mark.parametrize("which", ["generated", "reference"])
def test_broken_images_are_named(which, tmp_path, teacher_folder, data_folder, small):
    evaluated(tmp_path / "out", teacher_folder, *small)
    (folder,) = (tmp_path / "out" / "images").iterdir()
    broken = folder / "000003.png"
    if which == "reference":
        shutil.copytree(data_folder / "train", tmp_path / "real")
        broken, small = tmp_path / "real" / "007.png", [*small, "--reference", tmp_path / "real"]
    broken.write_bytes(broken.read_bytes()[:200])
    assert str(broken) in refused(tmp_path / "out", teacher_folder, *small)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@torch.no_grad()
def test_samplers(sampler, tmp_path, teacher_folder, small):
    """DDIM on our grid, by diffusers' alphas; and second order as stock diffusers has it."""
    evaluated(tmp_path, teacher_folder, *small, "--metrics", "clip", "--steps", 4, "--sampler", sampler)
    pipe = DiffusionPipeline.from_pretrained(teacher_folder)
    if sampler == "ddim":  # independent of DPM-Solver, and to the clean end
        encoder = evaluate.PromptEncoder(pipe, "cpu")
        model = evaluate.ddim_model(pipe, evaluate.load_schedule(pipe), encoder, Accelerator())
        cond = encoder.encode(encoder.tokenize(["caption number 0"])) | {"w": torch.tensor([3.0])}
        alphas = [*DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod, torch.tensor(1.0)]
        z, grid = noise_of([0], (4, 8, 8), seed=0), [999, 749, 500, 250]
        for t, s in zip(grid, [*grid[1:], 1000]):
            v = model(z, torch.tensor([t]), cond)
            x = alphas[t].sqrt() * z - (1 - alphas[t]).sqrt() * v
            eps = (1 - alphas[t]).sqrt() * z + alphas[t].sqrt() * v
            z = alphas[s].sqrt() * x + (1 - alphas[s]).sqrt() * eps
        image = (pipe.vae.decode(z / pipe.vae.config.scaling_factor)[0] / 2 + 0.5).clamp(0, 1)[0]
        expected = (image * 255).round().permute(1, 2, 0).numpy()
    else:
        settings = {"solver_order": 2, "timestep_spacing": "linspace", "final_sigmas_type": "zero"}
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **settings)
        start = {"generator": evaluate.noise_generator(0, 0), "num_inference_steps": 4, "guidance_scale": 3.0}
        expected = np.asarray(pipe("caption number 0", **start).images[0]).astype(int)
    assert abs(images_of(tmp_path)["000000.png"] - expected).max() <= 1


# --- prompts ---


def test_prompts(tmp_path, data_folder):
    """COCO: the first caption of each image by annotation id, images by id, whatever the order in the file."""
    rows = [(9, 4, "later"), (9, 2, " A cat. \n"), (3, 7, "A dog.")]
    annotations = [dict(zip(("image_id", "id", "caption"), row)) for row in rows]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 3}], "annotations": annotations}))
    (tmp_path / "lines.txt").write_text("A dog.\n\nA cat.\n")
    (tmp_path / "by_id.json").write_text(json.dumps({"12": "A dog.", "7": "A cat."}))
    for name in ("coco.json", "lines.txt", "by_id.json"):
        assert [p.text for p in read_prompts(str(tmp_path / name))] == ["A dog.", "A cat."]
    assert [p.text for p in read_prompts(str(data_folder))] == [f"image {i} of test" for i in range(8)]


PROMPTS_THAT_ARE_NONE = [
    ('["a", 5]', "entry 1"), ('[{"prompt": "a", "tokens": [1]}]', "entry 0"), ('[{"image": "x.png"}]', "entry 0"),
    ("[]", "no prompts"), ('["  "]', "entry 0"), ('{"annotations": [{"image_id": 1, "id": 1}]}', "nor a data set"),
    ("[", "nor a data set"), ('[{"prompt": "a", "image": "x.png"}]', "x.png"), ('"a"', "no prompts"),
]  # fmt: skip


@pytest.mark.parametrize("content, named", PROMPTS_THAT_ARE_NONE)
def test_prompts_that_are_none(content, named, tmp_path):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(SystemExit, match=rf"--prompts {tmp_path}/prompts.json.*{named}"):
        read_prompts(str(tmp_path / "prompts.json"))


# --- metrics against closed forms, torch-fidelity and slow references ---


def features_of(mean, cov, generator) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly these."""
    x = torch.randn(50, len(mean), generator=generator, dtype=torch.float64)
    x = (x - x.mean(dim=0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return mean + x @ torch.linalg.cholesky(cov).T


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2; and Q diag Q^T of one of them against a multiple of I."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.1
    m, zero = torch.randn(5, generator=generator, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    distance = lambda *gaussians: frechet_distance(*(features_of(*g, generator) for g in gaussians))
    expected = (m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert distance((m, torch.diag(a)), (zero, torch.diag(b))) == pytest.approx(expected, rel=1e-10)
    q, identity = torch.linalg.qr(torch.randn(5, 5, generator=generator).double()).Q, torch.eye(5).double()
    expected = (a.sqrt() - 1.5).square().sum().item()
    assert distance((m, q @ torch.diag(a) @ q.T), (m, 2.25 * identity)) == pytest.approx(expected, rel=1e-9)
    assert distance((m, torch.diag(a)), (m, torch.diag(a))) == pytest.approx(0, abs=1e-10)


def fidelity_distance(a, b) -> float:
    statistics = [fid_features_to_statistics(features.double()) for features in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize("n", [200, 20])  # with 20 of 30 dimensions the covariances are singular
def test_frechet_distance_is_torch_fidelity_s(n):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 30, generator=draw) @ torch.randn(30, 30, generator=draw) + shift for shift in (0, 0.3))
    assert frechet_distance(a, b) == pytest.approx(fidelity_distance(a, b), rel=1e-6)


def test_coverage_is_its_slow_reference():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(40, 3, generator=generator), torch.randn(30, 3, generator=generator) + 0.7
    covered = 0
    for i in range(40):
        to_real = sorted(math.dist(real[i], real[j]) for j in range(40) if j != i)
        covered += any(math.dist(real[i], f) < to_real[4] for f in fake)
    assert 0 < covered < 40 and coverage_of(real, fake) == covered / 40
    assert coverage_of(real, real) == 1 and coverage_of(real, fake + 100) == 0


def random_images(n: int, size=(48, 32), seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    small = [generator.integers(0, 256, (4, 6, 3), dtype=np.uint8) for _ in range(n)]
    return [Image.fromarray(pixels).resize(size, Image.BICUBIC) for pixels in small]


def shown(images, prompts=()) -> Images:
    """Images in memory, as the rows of a data set: a file's bytes each."""
    rows = []
    for image in images:
        image.save(file := io.BytesIO(), "PNG")
        rows.append({"image": file.getvalue()})
    return Images(tuple(rows), prompts)


def random_clip(folder, weights: dict | None = None):
    """A ViT of open_clip's with random weights, as a local folder."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(config))).eval().requires_grad_(False)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    weights = weights or {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return model, config


def args_of(**flags):
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return type("args", (), {"batch_size": 4} | flags)


class Context(evaluate.Evaluation):
    """As much of an evaluation as a metric needs."""

    def __init__(self, several=(), reference=None):
        self.diversity_prompts, self.accelerator, self.args, self.last = several, Accelerator(), args_of(), {}
        self.reference = lambda net: reference


def test_clip_scores(tmp_path):
    """By open_clip's own calls, of images that are not square: score, diversity and similarity."""
    model, _ = random_clip(tmp_path / "clip")
    net, images = evaluate.load_clip(args_of(clip_weights=tmp_path / "clip"), "cpu"), random_images(20)
    images[0].save(tmp_path / "source.png")
    assert not Context().features(net, shown(images)).requires_grad  # or every batch would keep its graph
    preprocess, cosine = open_clip.image_transform(32, is_train=False), torch.cosine_similarity
    embed = lambda image: model.encode_image(preprocess(image)[None])[0]
    text = lambda prompt: model.encode_text(open_clip.tokenize([prompt]))[0]
    prompts, f = [f"prompt {i}" for i in range(20)], [embed(image) for image in images]
    cosines = torch.stack([cosine(a, text(p), dim=0) for a, p in zip(f, prompts)])
    found = evaluate.mean_cosine(Context(), net, shown(images, prompts))
    assert found["value"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert found["standard_error"] == pytest.approx(cosines.std().item() / 20**0.5, abs=1e-6)
    assert (found["n"], net.name, len(net.provenance["sha256"])) == (20, "clip", 64)
    pairs = [1 - cosine(f[i + a], f[i + b], dim=0).item() for i in (0, 10) for a in range(10) for b in range(a)]
    assert evaluate.diversity(Context(), net, shown(images))["value"] == pytest.approx(np.mean(pairs), abs=1e-5)
    context = Context([evaluate.Prompt(p, tmp_path / "source.png") for p in "ab"])
    expected = np.mean([cosine(a, f[0], dim=0).item() for a in f])
    assert evaluate.similarity(context, net, shown(images))["value"] == pytest.approx(expected, abs=1e-5)


def test_networks_of_one_name_are_two(tmp_path, teacher_folder, small):
    """Folders of the same name, one for --clip_weights, one for --hps_weights: features of one are not taken for the
    other's."""
    for seed, name in enumerate("ab"):
        model, _ = random_clip(tmp_path / name / "clip")
        weights = {key: (1 + seed) * value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights, tmp_path / name / "clip" / "open_clip_model.safetensors")
    flags = [*small[:6], "--steps", 1]
    flags += ["--clip_weights", tmp_path / "a" / "clip", "--hps_weights", tmp_path / "b" / "clip"]
    both = evaluated(tmp_path / "both", teacher_folder, *flags, "--metrics", "clip", "hps")["results"]
    alone = evaluated(tmp_path / "alone", teacher_folder, *flags, "--metrics", "hps")["results"]
    assert both[1]["value"] == alone[0]["value"] != both[0]["value"]


@pytest.mark.parametrize("architecture, maker", [("ViT-g-14", "clip"), ("ViT-H-14", "hps")])
def test_weights_from_a_file(architecture, maker, tmp_path, monkeypatch):
    """As the published checkpoints come, HPSv2's with its weights under "state_dict"; a small architecture here."""
    model, config = random_clip(tmp_path / "clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, config)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "weights.pt")
    open_net = lambda source: getattr(evaluate, f"load_{maker}")(args_of(**{f"{maker}_weights": source}), "cpu")
    net, expected, images = open_net(tmp_path / "weights.pt"), open_net(tmp_path / "clip"), random_images(2)
    assert torch.equal(net.encode_images(images), expected.encode_images(images))
    assert (net.name, net.provenance["weights"]) == (architecture, f"{architecture}, weights.pt")


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (40, 40), (20, 10)])
def test_hps_preprocessing(size, tmp_path):
    """The long side to the network's size, in the middle of black bars; inside them PIL's bicubic, within rounding."""
    model, _ = random_clip(tmp_path / "clip")
    model.visual.image_mean, model.visual.image_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    (image,) = random_images(1, size)
    found = evaluate.resize_and_pad(image, model.visual)
    width, height = (round(side * 32 / max(size)) for side in size)
    left, top = (32 - width) // 2, (32 - height) // 2
    expected = torch.zeros(3, 32, 32)
    resized = torch.from_numpy(np.array(image.resize((width, height), Image.BICUBIC))).permute(2, 0, 1) / 255
    expected[:, top : top + height, left : left + width] = resized
    assert (found - expected).abs().max() < 0.02 and (found - expected).abs().mean() < 0.002


def random_trunk(file, net: str) -> dict:
    """By torchvision's names; without the classifier, which LPIPS has no use for, and which is nine tenths of VGG."""
    import torchvision

    with torch.device("meta"):
        shapes = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[net]().features.state_dict()
    torch.manual_seed(0)
    weights = {f"features.{name}": torch.randn(p.shape) / p[0].numel() ** 0.5 for name, p in shapes.items()}
    torch.save(weights, file)
    return weights


@pytest.mark.parametrize("net", ["alex", "vgg"])
@torch.no_grad()
def test_lpips_diversity(net, tmp_path):
    """Two prompts: all pairs one by one through the lpips package, whose trunk is given our weights by its own names."""
    trunk = random_trunk(tmp_path / "trunk.pth", net)
    ours = evaluate.load_lpips(args_of(lpips_weights=tmp_path / "trunk.pth", lpips_net=net, resolution=32), "cpu")
    slow = LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    for name, parameter in slow.net.named_parameters():
        parameter.copy_(trunk[f"features.{name.split('.', 1)[1]}"])
    images, means = random_images(20, (32, 32)), []
    for i in (0, 10):
        x = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1 for image in images[i : i + 10]]
        means.append(np.mean([slow(x[a], x[b]).item() for a in range(10) for b in range(a)]))
    found = evaluate.lpips_diversity(Context(), ours, shown(images))
    assert found["value"] == pytest.approx(np.mean(means), rel=1e-4)
    assert found["standard_error"] == pytest.approx(np.std(means, ddof=1) / 2**0.5, rel=1e-3)


def test_fid(tmp_path, monkeypatch):
    """Inception's features of the central squares, then torch-fidelity's own distance; random weights in its names."""
    file = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save({}, file)
    with monkeypatch.context() as without:  # its own constructor needs a file: the first one is made without
        without.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save(FeatureExtractorInceptionV3("inception", ["2048"], str(file)).state_dict(), file)
    net = evaluate.load_inception(args_of(fid_weights=file, resolution=24), "cpu")
    reference = FeatureExtractorInceptionV3("inception", ["2048"], str(file))
    cut = lambda image: image.crop((8, 0, 40, 32)).resize((24, 24), Image.LANCZOS)
    sets = [random_images(5, (48, 32), seed) for seed in (1, 2)]
    batch = lambda images: torch.stack([torch.from_numpy(np.array(cut(i))).permute(2, 0, 1) for i in images])
    real, fake = (reference(batch(images))[0] for images in sets)
    context, images = Context(reference=real), shown(sets[1])
    found = evaluate.frechet(context, net, images)
    torch.testing.assert_close(context.features(net, images), fake)
    assert found["value"] == pytest.approx(fidelity_distance(real, fake), rel=1e-3, abs=1e-6)


def test_alignment_is_the_judge_s():
    """Real images of unseen digits, under their own captions and under another's; the colours and digit in full."""
    from datasets import load_dataset

    rows = load_dataset(str(TINY / "data"))["test"].select(range(60))
    net, images, captions = evaluate.load_tiny_classifier(None, "cpu"), list(rows["image"]), list(rows["caption"])
    right = evaluate.alignment(Context(), net, shown(images, captions))
    wrong = evaluate.alignment(Context(), net, shown(images, captions[1:] + captions[:1]))
    assert wrong["value"] < 0.1 and right["value"] > 0.9
    assert all(value > 0.9 for value in right["parts"].values())


def test_paired_error_is_the_stock_pipelines_own(tmp_path, pd_run, data_folder):
    """End points of student and teacher by stock diffusers' DDIM, from the same noise."""
    flags = ["--prompts", data_folder, "--num_images", 6, "--metrics", "paired"]
    found = evaluated(tmp_path, pd_run, *flags)["results"][0]
    config, ends = json.loads((pd_run / "config.json").read_text()), []
    for folder, steps in ((pd_run / "pipeline", 2), (config["teacher"], 8)):
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.scheduler = evaluate.dpm_solver(pipe, "v_prediction", 1)
        prompts = evaluate.subsample_evenly([f"image {i} of test" for i in range(8)], 6)
        settings = {"num_inference_steps": steps, "guidance_scale": config["eval_guidance_scale"]}
        generators = [evaluate.noise_generator(i, 0) for i in range(6)]
        ends.append(pipe(prompts, generator=generators, output_type="latent", **settings).images)
    assert found["value"] == pytest.approx((ends[0] - ends[1]).pow(2).mean().sqrt().item(), rel=1e-4)
    assert found["n"] == 6 and found["value"] > 0
    teacher, run = shutil.copytree(config["teacher"], tmp_path / "gc"), shutil.copytree(pd_run, tmp_path / "run")
    change_json(run / "config.json", teacher=str(teacher))
    scale_weights(teacher, 1.1)
    for metrics in ("paired",), ("clip", "--shift", "gap"):  # another one under its name is none to compare with
        assert f"its teacher {teacher} was trained anew" in refused(
            tmp_path / "out", run, *flags[:4], "--metrics", *metrics
        )


# --- covariate shift ---


def test_arms():
    grid, moves = timestep_grid(4), lambda arms: [arm.moves for arm in arms]
    assert moves(evaluate.switches(["teacher-student"], None, grid)) == ["TSSS", "TTSS", "TTTS"]
    assert moves(evaluate.switches(["student-teacher"], [500], grid)) == ["SSTT"]
    intervals = ["TSSS", "STSS", "SSTS", "SSST", "SSSS", "STTT", "TSTT", "TTST", "TTTS", "TTTT"]
    assert moves(evaluate.one_interval(grid)) == intervals
    assert moves(evaluate.mixtures([0, 0.4, 1], 4)) == ["SSSS", "", "TTTT"]


def test_mixtures_are_drawn_for_each_image_alone():
    """The right rate; the same draws whatever the batch; and who has the teacher at p_T has it at any higher one."""
    arms = {p: Arm("mix", "", p_teacher=p) for p in (0.2, 0.6)}
    rates = {p: arm.student_rate(range(500), 4, seed=0) for p, arm in arms.items()}
    for p, rate in rates.items():
        assert {*rate.unique().tolist()} == {0, 1} and rate.mean().item() == pytest.approx(1 - p, abs=0.04)
    assert (rates[0.6] <= rates[0.2]).all()
    assert torch.equal(arms[0.2].student_rate([7, 3], 4, seed=0), rates[0.2][[7, 3]])
    assert not torch.equal(arms[0.2].student_rate(range(500), 4, seed=1), rates[0.2])


def test_one_model_alone_is_that_model(tmp_path, pd_run, small):
    """All moves the student's: its own images in the stock pipeline; all the teacher's: the teacher's by DDIM."""
    teacher = json.loads((pd_run / "config.json").read_text())["teacher"]
    flags = ["--steps", 2, 8, "--sampler", "trained", "ddim", "--shift", "mix", "--mix_teacher", 0, 1]
    models = [pd_run, f"teacher={teacher}"]
    results = evaluated(tmp_path, *models, *small[:6], "--metrics", "clip", "--guidance_scale", 3, *flags)
    assert_within_one(images_of(tmp_path, "shift-SS"), images_of(tmp_path, "pd_pipeline-2", "seed0"))
    assert_within_one(images_of(tmp_path, "shift-TT"), images_of(tmp_path, "8-ddim-w3-seed0"))
    own, of_teacher = (row["scores"]["clip"]["value"] for row in results["shift"])
    assert [r["value"] for r in results["results"]] == pytest.approx([own, of_teacher], abs=1e-3)


def pair_of(*flags) -> evaluate.Pair:
    args = evaluate.parse_args([*map(str, flags), "--shift", "mix"])
    context = type("context", (), {"args": args, "accelerator": Accelerator()})
    return evaluate.Pair(context, evaluate.candidate_of(args, 0))


def start_of(pair):
    return pair.start(pair.encoder.tokenize(["a", "b"]), [0, 1], seed=0)


@torch.no_grad()
def test_one_interval_is_handed_over(pd_run):
    """The arm TS against a slow loop with diffusers' DDIM update: four steps of the teacher, then one of the student."""
    pair = pair_of(pd_run)
    z, cond = start_of(pair)
    found = pair.rollout(z, cond, Arm("interval", "", "TS").student_rate([0, 1], 2, seed=0))[-1]
    grid = timestep_grid(8)
    for t, s in zip(grid[:5], [*grid[1:5], CLEAN]):  # 999 .. 624 by the teacher, then 500 -> clean by the student
        model, tables = pair.teacher if t > 500 else pair.student, (pair.schedule.alpha, pair.schedule.sigma)
        alpha_t, sigma_t, alpha_s, sigma_s = (table[i] for i in (t, s) for table in tables)
        v = model(z, torch.full((2,), t), cond)
        z = alpha_s * (alpha_t * z - sigma_t * v) + sigma_s * (sigma_t * z + alpha_t * v)
    torch.testing.assert_close(found, z, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_disagreement(pd_run, gc_folder):
    """None of the teacher with itself, at as many steps; and its slow definition at more of them."""
    pair = pair_of(gc_folder, "--teacher", gc_folder, "--steps", 2, "--teacher_steps", 2, "--sampler", "ddim")
    z, cond = start_of(pair)
    assert pair.disagreement(z, 0, cond).max() < 1e-10
    pair = pair_of(pd_run)
    z_s, v = pair.rollout(z, cond, 0.0)[1], pair.student(z, torch.full((2,), 999), cond)
    a, b, c, d = (table[i] for i in (999, 500) for table in (pair.schedule.alpha, pair.schedule.sigma))
    x_teacher = (z_s - d / b * z) / (c - d / b * a)  # Alg. 3 line 9, as it is printed
    expected = (x_teacher - (a * z - b * v)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(pair.disagreement(z, 0, cond), expected, rtol=1e-3, atol=1e-6)


def test_shift_is_found_where_there_is_one(tmp_path, pd_run, small):
    """A student whose steps overshoot: its latents are far from forward-diffused ones at the later timestep, other
    images' are near; all arms and plots are there. Students of other steps are other columns, without the paper's."""
    run = shutil.copytree(pd_run, tmp_path / "run")
    scale_weights(run / "pipeline", 2)
    out, flags = tmp_path / "out", [*small[:4], "--num_images", 12, "--metrics", "fd", "--shift"]
    results = evaluated(out, f"{run}/stages/4", run, *flags, "--mix_teacher", 0.5, 1)
    gap = results["gap"][1]
    first, last = gap["value"]
    assert (first["t"], last["t"], gap["n"]) == (999, 500, 12)
    assert abs(last["std, student"] - 1) > 5 * abs(last["std, other images"] - 1)
    assert last["FD, student"] > last["FD, other images"]
    assert abs(first["FD, student to teacher"]) < 1e-6 < last["FD, student to teacher"]  # the same pure noise at first
    arms = {label: [r["arm"] for r in results["shift"] if r["label"] == label] for label in ("PD + DDIL, 2 steps",)}
    expected = ["p_T = 0.5", "p_T = 1", "teacher, then student from 500", "student, then teacher from 500"]
    for own, other in ("student", "teacher"), ("teacher", "student"):
        expected += [f"{own}, but {other} at 999", f"{own}, but {other} at 500", f"{own} alone"]
    assert arms["PD + DDIL, 2 steps"] == expected
    text = (out / "results.md").read_text()
    captions = "Table 5", "Tables 6 and 7", "Figure 4", "student to teacher", "4 steps: FD", "2 steps: FD", "| 0.317 |"
    assert all(caption in text for caption in captions)
    for name in ("shift.png", "contact.png"):
        assert Image.open(out / name).size[0] > 100
    evaluated(tmp_path / "two", run, *flags, "switch")
    assert "0.317" not in (tmp_path / "two" / "results.md").read_text()


def test_the_shift_s_data_may_hold_what_cannot_be_used(tmp_path, pd_run, data_folder, small):
    """Others of the batch take its place; data that cannot be read at all are refused before an image is made."""
    data = shutil.copytree(data_folder, tmp_path / "data")
    for i in range(0, 40, 10):
        (data / "train" / f"{i:03d}.png").write_bytes(b"no image")
    flags = [*small[:4], "--num_images", 12, "--metrics", "fd", "--shift", "gap", "--data"]
    assert evaluated(tmp_path / "out", pd_run, *flags, data)["gap"][0]["n"] == 12
    assert "--data no/such" in refused(tmp_path / "none", pd_run, *flags, "no/such")
    assert not (tmp_path / "none" / "images").exists()


def test_steps_that_cannot_be(tmp_path, pd_run, teacher_folder, data_folder, small):
    """More than the sampler has; a student's grid that its teacher's does not hold."""
    model = with_scheduler(tmp_path / "model", teacher_folder, LCMScheduler, original_inference_steps=4)
    assert f"--steps 8: {model}" in refused(tmp_path / "none", model, *small, "--steps", 8)
    flags = [*small[:6], "--metrics", "fd", "--shift", "switch"]
    message = refused(tmp_path / "out", pd_run, *flags, "--teacher_steps", 5)
    assert "--teacher_steps 5" in message and "multiple of 2" in message
    assert "[500]" in refused(tmp_path / "out", pd_run, *flags, "--switch_at", 700)
    data = ["--teacher", teacher_folder, "--data", data_folder, "--global_batch_size", 4, "--max_updates", 1]
    run_here(*data, "--output_dir", tmp_path / "lcm", script="lcm_ddil.py")
    message = refused(tmp_path / "out", tmp_path / "lcm", *flags)
    assert "[999, 759, 499, 259]" in message and "[999, 749, 500, 250]" in message
    assert not (tmp_path / "out" / "images").exists()


# --- report ---


def test_runs_of_one_label_are_averaged_beside_the_paper(tmp_path, pd_run, gc_folder, small):
    models = [f"PD={pd_run}", f"PD={pd_run}/stages/4", f"other={gc_folder}"]
    flags = [*small[:4], "--num_images", 8, "--metrics", "clip", "--steps", 4, "--guidance_scale", 3, "--seed", 0, 1]
    results = evaluated(tmp_path, *models, *flags)
    values = {label: [r["value"] for r in results["results"] if r["label"] == label] for label in ("PD", "other")}
    assert [len(v) for v in values.values()] == [4, 2]
    lines = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("|")]
    table = {cells[0]: cells[1:] for line in lines for cells in [[c.strip() for c in line.strip("|").split("|")]]}
    mean, error = np.mean(values["PD"]), np.std(values["PD"], ddof=1) / 2
    score = f"{mean:.4f} ± {error:.4f}"
    assert table["PD"] == ["4", "4", "trained", "3", "4", score, "23.34", "0.302", "0.6"]
    assert table["other"][-3:] == ["-"] * 3
    record = results["results"][0]
    assert record.keys() >= {"metric", "value", "n", "seed", "sampler", "steps", "guidance_scale", "standard_error"}
    assert record["facts"]["sha256"] and results["versions"]["torch"] == torch.__version__.partition("+")[0]
    manifest = json.loads(next((tmp_path / "images").iterdir()).joinpath("manifest.json").read_text())
    assert manifest["images"][2] == {"file": "000002.png", "prompt": "caption number 3", "noise": 2}


LABELS = [
    ("pd_ddil", "", "PD + DDIL"), ("pd_ddil", "--p_forward 1 --reuse 3", "PD"), ("pd_ddil", "--recipe sd15", "PD + DDIL"),
    ("pd_ddil", "--reflect none", "PD + DDIL, not reflected"), ("pd_ddil", "--forward_control --reuse 1", "PD + control"),
    ("pd_ddil", "--p_forward 0 .5 --store_start", "PD + DDIL, p_forward 0.0, 0.5, store_start true"),
    ("pd_ddil", "--p_forward 1 --reflect none", "PD, not reflected"), ("pd_ddil", "--reuse 0.5", "PD + DDIL, reuse 0.5"),
    ("lcm_ddil", "", "LCM + Reflected + DDIL"), ("lcm_ddil", "--p_forward 1 --reflect none", "LCM"),
    ("lcm_ddil", "--p_forward 1 --reflect none --lora_rank 8", "LCM-LoRA"), ("lcm_ddil", "--reflect none", "LCM + DDIL"),
    ("lcm_ddil", "--p_forward 1 .5", "LCM + Reflected + DDIL, p_forward 1.0, 0.5"),
    ("lcm_ddil", "--recipe ssd1b --p_forward 1 --reflect none", "SSD1B-LCM"),
    ("dmd2_ddil", "--recipe ssd1b", "DMD2 + Reflected + DDIL"), ("dmd2_ddil", "--p_student 1 --reflect none", "DMD2"),
    ("dmd2_ddil", "--recipe ssd1b_oracle --student_init z", "DMD2 b64"),
    ("dmd2_ddil", "--mixed_rollout", "DMD2 + Reflected + DDIL, mixed_rollout true"),
    ("dmd2_ddil", "--recipe sd15 --p_student 1", "SD1.5-DMD2 + Reflected"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, label", LABELS)
def test_labels_are_the_paper_s_and_tell_arms_apart(script, flags, label):
    args = importlib.import_module(script).parse_args(["--teacher", "x", "--data", "y", *flags.split()])
    config = json.loads(json.dumps(vars(args)))
    labels = [evaluate.label_of(script, config, stage) for stage in ("pipeline", "gc")]
    assert labels == [label, "SD(gc)"]


def test_settings_come_from_the_run(tmp_path, pd_run, teacher_folder):
    of = lambda *argv: evaluate.candidate_of(evaluate.parse_args([*map(str, argv)]), 0)
    run = of(pd_run)
    assert (run.steps, run.guidance_scale, run.model) == (2, 8.0, str(pd_run / "pipeline"))
    assert of(pd_run / "stages" / "4").steps == 4 and of(f"a=b={pd_run}").label == "a=b"
    assert of(pd_run, "--steps", 1, "--guidance_scale", 2).steps == 1
    teacher = of(TINY / "pipeline")
    assert (teacher.label, teacher.steps, teacher.guidance_scale) == ("tiny", 32, 4.0)
    folder = shutil.copytree(teacher_folder, tmp_path / "lr=1e-5")
    assert of(folder).model == str(folder)
    shutil.rmtree(shutil.copytree(pd_run, tmp_path / "run") / "pipeline")
    with pytest.raises(SystemExit, match=rf"{tmp_path / 'run'}.*stages/"):
        of(tmp_path / "run")


@pytest.mark.parametrize("takes_w, w", [(None, 1.0), (256, 3.0)])
def test_dmd2_students_have_one_guidance_scale(takes_w, w, tmp_path):
    """Guidance is part of them; one that takes w, from its teacher, was trained at this w alone."""
    config = {"guidance_scale": 3.0, "student_steps": 4, "reflect": "measured"}
    config |= {"p_forward": [0.0], "p_teacher": None, "p_student": None}
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "dmd2_ddil.py").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pipeline" / "unet" / "config.json").write_text(json.dumps({"time_cond_proj_dim": takes_w}))
    candidate = evaluate.candidate_of(evaluate.parse_args([str(tmp_path)]), 0)
    assert (candidate.steps, candidate.guidance_scale) == (4, w)


def test_inverted_prompts(tmp_path, teacher_folder):
    """Table 8's command on the sample file, with the tiny scorer."""
    random_trunk(tmp_path / "trunk.pth", "alex")
    flags = ["--prompts", ROOT / "tests" / "inverted.json", "--metrics", "lpips", "similarity", "--steps", 1]
    flags += ["--lpips_net", "alex", "--lpips_weights", tmp_path / "trunk.pth", "--resolution", 64]
    of_lpips, similarity = evaluated(tmp_path / "out", teacher_folder, *flags)["results"]
    assert of_lpips["n"] == 2 and of_lpips["value"] > 0 and -1 <= similarity["value"] <= 1
    assert of_lpips["facts"]["weights"] == "alex, trunk.pth" and "64" in of_lpips["facts"]["resize"]
    assert len(images_of(tmp_path / "out")) == 20


def test_references(tmp_path, teacher_folder, small):
    """Features that an evaluation kept, unless by another network or preprocessing; a folder without captions, measured
    anew each time: where its images were replaced, the result says so."""
    clip, plain = tmp_path / "clip", tmp_path / "plain" / "inner"
    random_clip(clip)
    flags = [teacher_folder, *small, "--metrics", "fd", "coverage", "--clip_weights", clip]
    first, kept = evaluated(tmp_path / "a", *flags), tmp_path / "a" / "reference-clip.safetensors"
    second = evaluated(tmp_path / "b", *flags, "--reference", kept)
    assert [r["value"] for r in first["results"]] == [r["value"] for r in second["results"]]
    change_json(clip / "open_clip_config.json", preprocess_cfg={"mean": [0, 0, 0], "std": [1, 1, 1]})
    for tiny, what in ([], "config is"), (["--clip_weights", TINY / "scorer"], "weights is"):
        message = refused(tmp_path / "c", *flags, "--reference", kept, *tiny)
        assert f"--reference {kept}" in message and what in message
    found = []
    for seed in (0, 1):
        save_images(plain, 6, seed)
        (plain / "metadata.jsonl").unlink()
        found.append(evaluated(tmp_path / "d", *flags, "--reference", plain.parent)["results"][0])
        shutil.rmtree(plain)
    assert found[0]["value"] != found[1]["value"] > 0
    assert found[0]["facts"]["reference_sha256"] != found[1]["facts"]["reference_sha256"]


def test_weights_of_one_name_at_two_addresses(tmp_path, monkeypatch):
    """Each is fetched, once: every CLIP on the hub is an open_clip_pytorch_model.bin."""
    urls, asked, reply = ["https://a/weights.bin", "https://b/weights.bin"], [], type("reply", (io.BytesIO,), {})
    reply.headers = {"Content-Length": 9}
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(tmp_path)))
    monkeypatch.setattr("urllib.request.urlopen", lambda url: asked.append(url) or reply(url.encode()))
    assert [evaluate.weights_file("--clip_weights", url).read_text() for url in 2 * urls] == 2 * urls and asked == urls


def test_forwards_are_counted(tmp_path, teacher_folder, gc_folder, small):
    """Twice the sampler's own timesteps under guidance, of which PNDM has one more than it is asked for."""
    pndm = with_scheduler(tmp_path / "pndm", teacher_folder, PNDMScheduler, skip_prk_steps=True)
    flags = [*small, "--metrics", "clip", "--num_images", 2, "--steps", 4]
    results = evaluated(tmp_path / "out", teacher_folder, pndm, gc_folder, *flags)["results"]
    assert [r["nfe"] for r in results] == [8, 10, 4]
    assert evaluated(tmp_path / "out", teacher_folder, *flags, "--guidance_scale", 1)["results"][0]["nfe"] == 4


# --- bad input ---

BAD_FLAGS = [
    ("--metrics clip fidd", "--metrics: invalid choice: 'fidd'"), ("--protocol coco", "coco2017-512"),
    ("--steps 1 2", "--steps [1, 2]: must be one value"), ("--steps 0", "--steps: 0: must be"),
    ("--steps 1001", "from 1 to 999"), ("--sampler euler", "ddim"), ("--seed -1", "--seed: -1"),
    ("--guidance_scale nan", "--guidance_scale: nan"), ("--guidance_scale 0.5", "at least 1"),
    ("--num_images 1", "--num_images: 1"), ("./no/model", "MODEL ./no/model: no pipeline folder"),
    ("no/such/model", "MODEL no/such/model"), ("--batch_size 0", "--batch_size: 0"),
    ("--mix_teacher 1.2", "--mix_teacher: 1.2"), ("--shift all", "--shift: invalid choice: 'all'"),
    ("--shift mix --metrics lpips", "--shift mix: needs"), ("--switch_order teacher", "teacher-student"),
    ("--lpips_net resnet", "vgg"), ("--shift", "--teacher"), ("--num_images 5000", "--num_images 5000"),
    ("--teacher assets/tiny/pipeline --shift gap --steps 4 --sampler ddim", "give --teacher"),
    ("--protocol coco2017-512", "--prompts: the protocol coco2017-512"),
    ("--protocol coco2017-512 --prompts assets/tiny/data", "--reference: the protocol coco2017-512"),
    ("--prompts no/such/file.json", "--prompts no/such/file.json"), ("--reference no/folder", "--reference no/folder"),
    ("--prompts assets/tiny/make.py", "--prompts assets/tiny/make.py"), ("--clip_weights no/file.pt", "no such file"),
    ("--reference no.safetensors", "--reference no.safetensors: no such file"),
    ("--clip_weights tests", "--clip_weights tests: must hold open_clip_config.json"),
    ("--metrics fid", "--fid_weights https://"), ("--metrics lpips", "--lpips_weights https://"),
    ("--metrics hps", "--hps_weights xswu/HPSv2/"), ("--clip_weights laion2b_s12b_b42k", "--clip_weights laion2b"),
    ("--metrics similarity", '"image"'), ("--metrics alignment --prompts tests/inverted.json --num_images 2", "alignment"),
]  # fmt: skip


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags_are_named(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    message = refused(tmp_path / "out", "assets/tiny/pipeline", *flags.split())
    assert words in message and not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize("metric", ["fid", "clip", "hps", "lpips"])
def test_weights_that_are_others_never_run_code(metric, tmp_path, teacher_folder, small):
    file, was_run = tmp_path / "weights.pt", tmp_path / "was-run"
    if metric in ("clip", "hps"):  # a folder: the real architectures are too large to be built here
        file = tmp_path / "clip"
        random_clip(file, weights={"conv.weight": torch.zeros(3)})
    else:
        evil = type("evil", (), {"__reduce__": lambda self: (open, (str(was_run), "w"))})
        torch.save({"conv.weight": evil()}, file)
    message = refused(tmp_path / "out", teacher_folder, *small, "--metrics", metric, f"--{metric}_weights", file)
    assert f"--{metric}_weights {file}: does not hold" in message and not was_run.exists()


def test_folders_that_are_no_evaluation_are_left_alone(tmp_path, teacher_folder, small, pd_run):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("all there is")
    for folder in (tmp_path / "thesis", pd_run):
        assert f"--output_dir {folder}" in refused(folder, teacher_folder, *small, "--overwrite")
    assert [f.name for f in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_command_line(tmp_path, like_windows):
    """README's command on assets/tiny, with fewer images, of two models; as on Windows, and where all text is ASCII."""
    flags = ["--num_images", 8, "--steps", 4, "--metrics", "alignment", "clip", "fd", "coverage"]
    flags, launcher = [*flags, "--output_dir", tmp_path / "out"], ["-m", "accelerate.commands.launch"]
    models, env = [TINY / "pipeline"] * 2, like_windows | ASCII
    process = run_script(*models, *flags, script="evaluate.py", launcher=launcher, env=env)
    assert process.returncode == 0, process.stderr
    assert "| tiny | 4 | 8 | trained | 4 | 2 |" in process.stdout and "FD (tiny)" in process.stdout
    assert "± is the standard error" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {"images", "results.json", "results.md", "contact.png"}
