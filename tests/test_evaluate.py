"""evaluate.py: images that depend on nothing but their own seed, metrics against closed forms, torch-fidelity and slow
references, networks of the real code path with random weights, covariate shift, and what is refused."""

import importlib
import json
import math
import shutil
import sys

import lpips
import numpy as np
import open_clip
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, SMALL, change_json, run_here, run_script, save_images, scale_weights
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import evaluate
from common import CLEAN, noise_of, timestep_grid
from evaluate import Arm, Candidate, Features, coverage_of, frechet_distance, mixtures, one_interval, read_prompts, switches

TINY = ROOT / "assets" / "tiny"
CAPTIONS = ["a red seven on a yellow background", "an orange two on a white background", "a blue nine on a red background"]


def evaluated(out, *args) -> dict:
    """results.json of an evaluation in this process; small unless the flags say otherwise."""
    run_here(*args, "--output_dir", out, script="evaluate.py")
    return json.loads((out / "results.json").read_text())


def refused(*args) -> str:
    with pytest.raises(SystemExit) as caught:
        run_here(*args, script="evaluate.py")
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def pixels_of(folder) -> dict:
    return {f.name: np.asarray(Image.open(f)).astype(int) for f in sorted(folder.glob("*.png"))}


def images_of(out, *words) -> dict:
    """Of the one folder of images whose name has all the words."""
    (folder,) = [f for f in (out / "images").iterdir() if all(word in f.name for word in words)]
    return pixels_of(folder)


def assert_within_one(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a
    assert max(abs(a[name] - b[name]).max() for name in a) <= 1


@pytest.fixture(scope="module")
def pd_run(tmp_path_factory, gc_folder, data_folder):
    """A finished PD run of a random teacher, 8 -> 4 -> 2 steps."""
    folder = tmp_path_factory.mktemp("runs") / "pd"
    run_here("--teacher", gc_folder, "--data", data_folder, "--output_dir", folder, *SMALL, "--teacher_steps", 8, "--student_steps", 2,
             "--max_updates", 1)  # fmt: skip
    return folder


@pytest.fixture
def small(data_folder):
    """Flags for six images of the test data."""
    prompts = data_folder.parent / "captions.json"
    if not prompts.exists():
        prompts.write_text(json.dumps([f"caption number {i}" for i in range(12)]))
    return ["--prompts", prompts, "--reference", data_folder, "--num_images", 6, "--metrics", "clip", "fd", "--steps", 2,
            "--guidance_scale", 3]  # fmt: skip


# --- images ---


@pytest.mark.parametrize("batch_size", [1, 7])
def test_first_noise_is_noise_of_the_index(batch_size, teacher_folder):
    """Bit for bit, whatever the batch: what the stock pipeline starts from is common.noise_of."""
    pipe, seen = DiffusionPipeline.from_pretrained(teacher_folder), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sample = evaluate.pipeline_sampler(pipe, Candidate("", "", 1, 1.0, "trained"), seed=5)
    for start in range(0, 7, batch_size):
        noises = range(start, min(start + batch_size, 7))
        sample(["a"] * len(noises), list(noises))
    assert torch.equal(torch.cat(seen), noise_of(range(7), (4, 8, 8), seed=5))


@pytest.mark.parametrize("kind", ["teacher_folder", "xl_folder", "lcm"])
def test_images_do_not_depend_on_the_batch(kind, tmp_path, request, small):
    """The LCM sampler draws noise between its steps too."""
    if kind == "lcm":
        model = tmp_path / "lcm"
        pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue("teacher_folder"))
        from diffusers import LCMScheduler

        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained(model)
    else:
        model = request.getfixturevalue(kind)
    for batch_size in (1, 7):
        evaluated(tmp_path / str(batch_size), model, *small, "--metrics", "clip", "--batch_size", batch_size)
    assert_within_one(images_of(tmp_path / "1"), images_of(tmp_path / "7"))


def test_two_processes_give_the_same(tmp_path, pd_run, small):
    """Images, metrics, mixtures and the shift itself."""
    flags = [pd_run, *small[:-4], "--metrics", "clip", "fd", "coverage", "diversity", "paired", "--mix_teacher", 0.5, "--shift", "mix", "gap",
             "--num_images", 7]  # fmt: skip
    one = evaluated(tmp_path / "one", *flags, "--batch_size", 7)
    process = run_script(*flags, "--batch_size", 2, "--output_dir", tmp_path / "two", script="evaluate.py",
                         launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])  # fmt: skip
    assert process.returncode == 0, process.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    for words in (["seed0-shift-0.5"], ["10each"]):
        assert_within_one(images_of(tmp_path / "one", *words), images_of(tmp_path / "two", *words))
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-2, abs=1e-4), a["metric"]  # images may differ by 1/255
    for a, b in zip(one["gap"][0]["value"], two["gap"][0]["value"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("model", ["pd_run", "xl_folder"])
def test_bf16(model, tmp_path, request, small, monkeypatch):
    """Networks in bf16, everything around them works; images stay near those in fp32."""
    model = request.getfixturevalue(model)
    flags = [model, *small, *(["--metrics", "clip", "paired", "--shift", "mix", "gap"] if model.name == "pd" else [])]
    exact = evaluated(tmp_path / "fp32", *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` sets it
    try:
        half = evaluated(tmp_path / "bf16", *flags)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert [r["metric"] for r in half["results"]] == [r["metric"] for r in exact["results"]]
    a, b = (images_of(tmp_path / precision, "trained-w3-seed0") if model.name != "pd" else images_of(tmp_path / precision, "shift-SS")
            for precision in ("fp32", "bf16"))  # fmt: skip
    assert max(abs(a[name] - b[name]).max() for name in a) > 0 and np.mean([abs(a[name] - b[name]).mean() for name in a]) < 8


def test_a_killed_generation_goes_on(tmp_path, teacher_folder, small):
    whole = evaluated(tmp_path, teacher_folder, *small)
    (folder,) = (tmp_path / "images").iterdir()
    before = pixels_of(folder)
    for name in ("000001.png", "000004.png"):
        (folder / name).unlink()
    (folder / "000005.tmp").write_bytes(b"half an image")
    kept = (folder / "000002.png").stat().st_mtime_ns
    again = evaluated(tmp_path, teacher_folder, *small)
    assert_within_one(before, pixels_of(folder))
    assert (folder / "000002.png").stat().st_mtime_ns == kept
    assert again["results"] == whole["results"]


def test_scores_that_are_known_are_not_measured_again(tmp_path, teacher_folder, small, monkeypatch):
    first = evaluated(tmp_path, teacher_folder, *small)
    monkeypatch.setitem(evaluate.FUNCTIONS, "clip", None)
    again = evaluated(tmp_path, teacher_folder, *small, "--metrics", "clip", "fd", "coverage")
    assert again["results"][:2] == first["results"] and len(again["results"]) == 3


def test_images_by_other_settings_are_refused_or_replaced(tmp_path, teacher_folder, small):
    model = tmp_path / "model"
    shutil.copytree(teacher_folder, model)
    evaluated(tmp_path / "out", model, *small)
    before = images_of(tmp_path / "out")
    message = refused(model, *small, "--num_images", 5, "--output_dir", tmp_path / "out")
    assert "num_images: 6 there, now 5" in message and "--overwrite" in message
    scale_weights(model, 1.1)
    assert "model_weights: " in refused(model, *small, "--output_dir", tmp_path / "out")
    assert images_of(tmp_path / "out").keys() == before.keys()
    evaluated(tmp_path / "out", model, *small, "--overwrite")
    after = images_of(tmp_path / "out")
    assert any((after[name] != before[name]).any() for name in before)


def test_an_image_that_is_not_finite_is_named(tmp_path, teacher_folder, small, monkeypatch):
    stock = evaluate.pipeline_sampler

    def breaks_at_four(*args):
        def sample(prompts, noises):
            images = stock(*args)(prompts, noises)
            images[[i == 4 for i in noises]] = math.nan
            return images

        return sample

    monkeypatch.setattr(evaluate, "pipeline_sampler", breaks_at_four)
    message = refused(teacher_folder, *small, "--batch_size", 2, "--seed", 3, "--output_dir", tmp_path)
    assert "'caption number 8'" in message and "seed 3" in message
    assert list(images_of(tmp_path)) == [f"{i:06d}.png" for i in range(4)]


@pytest.mark.parametrize("harm", ["truncated", "missing reference"])
def test_broken_images_are_named(harm, tmp_path, teacher_folder, data_folder, small):
    if harm == "truncated":
        evaluated(tmp_path / "out", teacher_folder, *small)
        (folder,) = (tmp_path / "out" / "images").iterdir()
        broken = folder / "000003.png"
    else:
        shutil.copytree(data_folder / "train", tmp_path / "reference")
        broken, small = tmp_path / "reference" / "007.png", [*small, "--reference", tmp_path / "reference"]
    broken.write_bytes(broken.read_bytes()[:200])
    shutil.rmtree(tmp_path / "out" / "scores", ignore_errors=True)
    assert str(broken) in refused(teacher_folder, *small, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2)])
def test_samplers(sampler, order, tmp_path, teacher_folder, small):
    """DDIM on our grid is student_rollout with guidance; both are what stock diffusers makes with DPMSolverMultistepScheduler."""
    evaluated(tmp_path, teacher_folder, *small, "--metrics", "clip", "--steps", 4, "--sampler", sampler)
    pipe = DiffusionPipeline.from_pretrained(teacher_folder)
    pipe.set_progress_bar_config(disable=True)
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if order == 1:  # independent of DPM-Solver: diffusers' DDIM at our timesteps, and to the clean end
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
        model = evaluate.ddim_model(pipe, evaluate.load_schedule(pipe), evaluate.PromptEncoder(pipe, "cpu"), Accelerator())
        cond = evaluate.PromptEncoder(pipe, "cpu").encode(pipe.tokenizer(
            ["caption number 0"], padding="max_length", max_length=16, return_tensors="pt").input_ids[:, None])  # fmt: skip
        z, alphas = noise_of([0], (4, 8, 8), seed=0), scheduler.alphas_cumprod
        for t, s in zip([999, 749, 500, 250], [749, 500, 250, None]):
            v = model(z, torch.tensor([t]), cond | {"w": torch.tensor([3.0])})
            a, b = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
            x, eps = a * z - b * v, b * z + a * v
            z = x if s is None else alphas[s].sqrt() * x + (1 - alphas[s]).sqrt() * eps
        with torch.no_grad():
            image = (pipe.vae.decode(z / pipe.vae.config.scaling_factor)[0] / 2 + 0.5).clamp(0, 1)[0]
        expected = (image * 255).round().permute(1, 2, 0).numpy()
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, solver_order=2, timestep_spacing="linspace", final_sigmas_type="zero", algorithm_type="dpmsolver++")  # fmt: skip
        generator = evaluate.noise_generator(0, 0)
        image = pipe("caption number 0", num_inference_steps=4, guidance_scale=3.0, generator=generator).images[0]
        expected = np.asarray(image).astype(int)
    assert abs(images_of(tmp_path)["000000.png"] - expected).max() <= 1


# --- prompts ---


def test_coco_captions(tmp_path):
    """The first caption of each image by annotation id, images by id, whatever the order in the file."""
    annotations = [{"image_id": 9, "id": 4, "caption": "later"}, {"image_id": 9, "id": 2, "caption": " A cat. \n"},
                   {"image_id": 3, "id": 7, "caption": "A dog."}]  # fmt: skip
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": [{"id": 3}, {"id": 9}], "annotations": annotations}))
    assert [p.text for p in read_prompts(str(file))] == ["A dog.", "A cat."]


def test_lists_of_prompts(tmp_path, data_folder):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.json").write_text(json.dumps({"12": "one", "7": "two"}))
    assert [[p.text for p in read_prompts(str(tmp_path / f))] for f in ("a.txt", "b.json")] == [["one", "two"]] * 2
    assert [p.text for p in read_prompts(str(data_folder))] == [f"image {i} of test" for i in range(8)]
    assert len({p.text for p in read_prompts(str(TINY / "data"))}) > 700


@pytest.mark.parametrize("content, named", [
    ('["a", 5]', "entry 1"), ('[{"prompt": "a", "tokens": [1]}]', "entry 0"), ('[{"image": "x.png"}]', "entry 0"), ("[]", "no prompts"),
    ('["  "]', "entry 0"), ('{"annotations": [{"image_id": 1, "id": 1, "bbox": []}]}', "without captions"), ("[", "no json"), ('[{"prompt": "a", "image": "x.png"}]', "x.png"), ('"a"', "no prompts"),
])  # fmt: skip
def test_prompts_that_are_none(content, named, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(SystemExit, match=rf"--prompts {file}.*{named}"):
        read_prompts(str(file))


# --- metrics against closed forms, torch-fidelity and slow references ---


def statistics(x: torch.Tensor, batch: int = 7) -> dict:
    features = Features()
    for part in x.split(batch):
        features.add(part)
    return features.statistics()


def test_streamed_statistics_are_numpy_s():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 10
    found = statistics(x)
    np.testing.assert_allclose(found["mean"], x.double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(found["cov"], np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    assert torch.equal(found["kept"], x) and found["n"] == 50


def test_memory_of_statistics_is_bounded(monkeypatch):
    monkeypatch.setattr(evaluate, "FEATURES_KEPT", 20)
    x = torch.randn(50, 6)
    assert torch.equal(statistics(x)["kept"], x[:20])


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2; and Q diag Q^T of one of them against a multiple of I."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.1
    m = torch.randn(5, generator=generator, dtype=torch.float64)
    expected = (m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    zero = torch.zeros(5, dtype=torch.float64)
    gaussian = lambda mean, cov: {"mean": mean, "cov": cov}  # noqa: E731
    assert frechet_distance(gaussian(m, torch.diag(a)), gaussian(zero, torch.diag(b))) == pytest.approx(expected, rel=1e-12)
    q = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    expected = (a.sqrt() - 1.5).square().sum().item()
    found = frechet_distance(gaussian(m, q @ torch.diag(a) @ q.T), gaussian(m, 2.25 * torch.eye(5, dtype=torch.float64)))
    assert found == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(gaussian(m, torch.diag(a)), gaussian(m, torch.diag(a))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [200, 20])  # with 20 of 30 dimensions the covariances are singular
def test_frechet_distance_is_torch_fidelity_s(n):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 30, generator=generator).double() @ torch.randn(30, 30, generator=generator).double() + shift for shift in (0, 0.3))
    expected = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (a, b)), verbose=False)["frechet_inception_distance"]
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-6)


def test_coverage_is_its_slow_reference(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(40, 3, generator=generator), torch.randn(30, 3, generator=generator) + 0.7
    covered = 0
    for i in range(40):
        to_real = sorted(math.dist(real[i], real[j]) for j in range(40) if j != i)
        covered += any(math.dist(real[i], f) < to_real[4] for f in fake)
    assert 0 < covered < 40
    assert coverage_of(real, fake) == covered / 40
    assert coverage_of(real, real) == 1 and coverage_of(real, fake + 100) == 0


class Shown:
    """Images in memory, as evaluate.Images."""

    def __init__(self, images, prompts):
        self.images, self.prompts, self.files = images, prompts, None

    def __len__(self):
        return len(self.images)

    def load(self, rows):
        return [self.images[i] for i in rows.tolist()]


def random_images(n: int, size=(48, 32), seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    small = [generator.integers(0, 256, (4, 6, 3), dtype=np.uint8) for _ in range(n)]
    return [Image.fromarray(pixels).resize(size, Image.BICUBIC) for pixels in small]


def random_clip(folder, image_size: int = 32, weights: bool = True):
    """A ViT of open_clip's with random weights, as a local folder."""
    config = dict(embed_dim=16, vision_cfg=dict(image_size=image_size, layers=1, width=32, head_width=16, patch_size=8),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))  # fmt: skip
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(config)))
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    if weights:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model.eval(), config


class Context:
    """As much of evaluate.Evaluation as a metric needs, one process."""

    def __init__(self, several=(), **nets):
        self.nets, self.several, self.accelerator, self.args = nets, several, Accelerator(), type("args", (), {"batch_size": 4})
        self.last_features = {}

    over, over_prompts = evaluate.Evaluation.over, evaluate.Evaluation.over_prompts
    features, compute_statistics = evaluate.Evaluation.features, evaluate.Evaluation.compute_statistics


@torch.no_grad()
def test_clip_score(tmp_path):
    """Mean cosine by open_clip's own calls, of images that are not square."""
    model, _ = random_clip(tmp_path / "clip")
    clip = evaluate.Clip("--clip_weights", str(tmp_path / "clip"), "ViT-g-14", "cpu")
    images = random_images(6)
    prompts = [f"prompt {i}" for i in range(6)]
    preprocess = open_clip.image_transform(32, is_train=False)
    cosines = [torch.cosine_similarity(model.encode_image(preprocess(i)[None]), model.encode_text(open_clip.tokenize([p])))
               for i, p in zip(images, prompts)]  # fmt: skip
    found = evaluate.clip_score(Context(clip=clip), Shown(images, prompts))
    cosines = torch.cat(cosines)
    assert found["value"] == pytest.approx(cosines.mean().item(), abs=1e-6) and found["n"] == 6
    assert found["standard_error"] == pytest.approx(cosines.std().item() / 6**0.5, abs=1e-6)
    assert clip.name == "clip" and len(clip.weights["sha256"]) == 64


@pytest.mark.parametrize("architecture, kind", [("ViT-g-14", evaluate.Clip), ("ViT-H-14", evaluate.HumanPreference)])
def test_weights_from_a_file(architecture, kind, tmp_path, monkeypatch):
    """As the published checkpoints come, HPSv2's with its weights under "state_dict"; the architecture is a small one here."""
    model, config = random_clip(tmp_path / "clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, config)
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, file)
    net = kind("--weights", str(file), architecture, "cpu")
    expected = kind("--weights", str(tmp_path / "clip"), architecture, "cpu")
    images = random_images(2)
    assert torch.equal(net.images(images), expected.images(images)) and net.name == architecture
    assert net.weights["weights"] == f"{architecture}, weights.pt"


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (40, 40), (20, 10)])
def test_hps_preprocessing(size, tmp_path):
    """The long side to the network's size, in the middle of black bars; inside them as PIL's bicubic, within rounding."""
    random_clip(tmp_path / "clip")
    hps = evaluate.HumanPreference("--hps_weights", str(tmp_path / "clip"), "ViT-H-14", "cpu")
    (image,) = random_images(1, size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    found = hps.resize_and_pad(image) * std + mean
    width, height = (round(side * 32 / max(size)) for side in size)
    left, top = (32 - width) // 2, (32 - height) // 2
    expected = torch.zeros(3, 32, 32)
    resized = torch.from_numpy(np.array(image.resize((width, height), Image.BICUBIC))).permute(2, 0, 1) / 255
    expected[:, top : top + height, left : left + width] = resized
    assert (found - expected).abs().max() < 0.02 and (found - expected).abs().mean() < 0.002
    score = evaluate.hps_score(Context(hps=hps), Shown([image] * 3, ["a"] * 3))
    assert -1 <= score["value"] <= 1 and score["standard_error"] < 1e-6


def random_trunk(file, net: str):
    import torchvision

    torch.manual_seed(0)
    model = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[net](weights=None)
    torch.save(model.state_dict(), file)


@pytest.mark.parametrize("net", ["alex", "vgg"])
@torch.no_grad()
def test_lpips_diversity(net, tmp_path):
    """Three prompts: all pairs one by one through the lpips package, whose trunk is given our weights by its own names."""
    random_trunk(tmp_path / "trunk.pth", net)
    ours = evaluate.Lpips("--lpips_weights", str(tmp_path / "trunk.pth"), net, 64, "cpu")
    slow = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    trunk = torch.load(tmp_path / "trunk.pth", weights_only=True)
    for name, parameter in slow.net.named_parameters():
        parameter.copy_(trunk[f"features.{name.split('.', 1)[1]}"])
    n, images = 2, random_images(20, (64, 64))
    means = []
    for i in range(n):
        x = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1 for image in images[10 * i : 10 * i + 10]]
        means.append(np.mean([slow(x[a], x[b]).item() for a in range(10) for b in range(a)]))
    found = evaluate.lpips_diversity(Context(several=range(n), lpips=ours), Shown(images, ["a"] * 20))
    assert found["value"] == pytest.approx(np.mean(means), rel=1e-4) and found["n"] == n
    assert found["standard_error"] == pytest.approx(np.std(means, ddof=1) / n**0.5, rel=1e-3)


@torch.no_grad()
def test_diversity_and_similarity(tmp_path):
    model, _ = random_clip(tmp_path / "clip")
    clip = evaluate.Clip("--clip_weights", str(tmp_path / "clip"), "ViT-g-14", "cpu")
    images, source = random_images(20), random_images(1, seed=9)[0]
    source.save(tmp_path / "source.png")
    preprocess = open_clip.image_transform(32, is_train=False)
    cosine = lambda a, b: torch.cosine_similarity(*(model.encode_image(preprocess(i)[None]) for i in (a, b))).item()  # noqa: E731
    several = [evaluate.Prompt(p, tmp_path / "source.png") for p in "ab"]
    context, shown = Context(several=several, clip=clip), Shown(images, ["a"] * 20)
    pairs = [np.mean([1 - cosine(images[10 * i + a], images[10 * i + b]) for a in range(10) for b in range(a)]) for i in range(2)]
    assert evaluate.diversity(context, shown)["value"] == pytest.approx(np.mean(pairs), abs=1e-5)
    expected = np.mean([cosine(image, source) for image in images])
    assert evaluate.similarity(context, shown)["value"] == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in torch-fidelity's names. Its own constructor needs a file, so the first one is made without."""
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    load = FeatureExtractorInceptionV3.load_state_dict
    try:
        torch.save({}, file)
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        net = FeatureExtractorInceptionV3("inception", ["2048"], str(file))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = load
    torch.save(net.state_dict(), file)
    return file


def test_fid(inception_file):
    """Inception's features of the central squares, then torch-fidelity's own distance."""
    ours = evaluate.Inception("--fid_weights", str(inception_file), 24, "cpu")
    reference = FeatureExtractorInceptionV3("inception", ["2048"], str(inception_file))
    sets = [random_images(5, (48, 32), seed) for seed in (1, 2)]
    cut = lambda image: image.crop((8, 0, 40, 32)).resize((24, 24), Image.LANCZOS)  # noqa: E731
    features = [reference(torch.stack([torch.from_numpy(np.array(cut(i))).permute(2, 0, 1) for i in images]))[0] for images in sets]
    for images, expected in zip(sets, features):
        torch.testing.assert_close(ours.images(images), expected)
    context = Context(fid=ours)
    context.reference = lambda net: statistics(features[1])
    expected = fid_statistics_to_metric(*(fid_features_to_statistics(f.double()) for f in features), verbose=False)
    found = evaluate.fid(context, Shown(sets[0], ["a"] * 5))["value"]
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-3, abs=1e-6)


def test_alignment_is_the_judge_s(tmp_path):
    """Real images of unseen digits, under their own captions and under another's."""
    from datasets import load_dataset

    rows = load_dataset(str(TINY / "data"))["test"].select(range(60))
    context = Context(judge=evaluate.Judge("cpu"))
    right = evaluate.alignment(context, Shown(rows["image"], list(rows["caption"])))
    wrong = evaluate.alignment(context, Shown(rows["image"], list(rows["caption"][1:]) + list(rows["caption"][:1])))
    assert right["value"] > 0.9 and wrong["value"] < 0.1
    assert right["parts"].keys() == {"digit", "foreground", "background"}


def test_paired_error_is_the_run_s_own(tmp_path, pd_run, data_folder, monkeypatch):
    """Against a slow loop over DDIM steps of both models, from the same noise."""
    found = evaluated(tmp_path, pd_run, "--prompts", data_folder, "--num_images", 6, "--metrics", "paired")["results"][0]
    ends = []
    config = json.loads((pd_run / "config.json").read_text())
    for folder, steps in ((pd_run / "pipeline", 2), (config["teacher"], 8)):
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = evaluate.dpm_solver(pipe, "v_prediction", 1)
        prompts = evaluate.spread([f"image {i} of test" for i in range(8)], 6)
        ends.append(pipe(prompts, num_inference_steps=steps, guidance_scale=config["eval_guidance_scale"], output_type="latent",
                         generator=[evaluate.noise_generator(i, 0) for i in range(6)]).images)  # fmt: skip
    assert found["value"] == pytest.approx((ends[0] - ends[1]).pow(2).mean().sqrt().item(), rel=1e-4)
    assert found["n"] == 6 and found["value"] > 0


# --- covariate shift ---


def test_arms():
    grid = timestep_grid(4)
    assert [a.moves for a in switches(["teacher-student"], None, grid)] == ["TSSS", "TTSS", "TTTS"]
    assert [a.moves for a in switches(["student-teacher"], [500], grid)] == ["SSTT"]
    assert [a.moves for a in one_interval(grid)] == ["TSSS", "STSS", "SSTS", "SSST", "SSSS", "STTT", "TSTT", "TTST", "TTTS", "TTTT"]
    assert [a.moves for a in mixtures([0, 0.4, 1], 4)] == ["SSSS", "", "TTTT"]
    with pytest.raises(SystemExit, match=r"--switch_at 700: .*\[749, 500, 250\]"):
        switches(["teacher-student"], [700], grid)


def test_mixtures_are_drawn_for_each_image_alone():
    """The right rate; the same draws whatever the batch; and whoever has the teacher at p_T has it at any higher one."""
    rates = [Arm("mix", "", p_teacher=p).student_rate(range(500), 4, seed=0) for p in (0.2, 0.6)]
    for p, rate in zip((0.2, 0.6), rates):
        assert set(rate.unique().tolist()) == {0, 1} and rate.mean().item() == pytest.approx(1 - p, abs=0.04)
    assert (rates[1] <= rates[0]).all()
    assert torch.equal(Arm("mix", "", p_teacher=0.2).student_rate([7, 3], 4, seed=0), rates[0][[7, 3]])
    assert not torch.equal(Arm("mix", "", p_teacher=0.2).student_rate(range(500), 4, seed=1), rates[0])


def test_one_model_alone_is_that_model(tmp_path, pd_run, small):
    """All moves the student's: its own images in the stock pipeline; all the teacher's: the teacher's by DDIM."""
    config = json.loads((pd_run / "config.json").read_text())
    flags = [*small[:6], "--metrics", "clip", "--guidance_scale", 3]
    results = evaluated(tmp_path, pd_run, f"teacher={config['teacher']}", *flags, "--steps", 2, 8, "--sampler", "trained", "ddim",
                        "--shift", "mix", "--mix_teacher", 0, 1)  # fmt: skip
    assert_within_one(images_of(tmp_path, "pd_pipeline", "seed0-shift-SS"), pixels_of(tmp_path / "images" / next(
        f.name for f in (tmp_path / "images").iterdir() if f.name.endswith("pd_pipeline-2-trained-w3-seed0"))))  # fmt: skip
    assert_within_one(images_of(tmp_path, "seed0-shift-TT"), images_of(tmp_path, "8-ddim-w3-seed0"))
    own, teacher = (row["scores"]["clip"]["value"] for row in results["shift"])
    assert [r["value"] for r in results["results"]] == [pytest.approx(own, abs=1e-3), pytest.approx(teacher, abs=1e-3)]


@torch.no_grad()
def test_one_interval_is_handed_over(pd_run, tmp_path, monkeypatch):
    """The arm TS against a slow loop with diffusers' DDIM update: four steps of the teacher, then one of the student."""
    pair, ev = pair_of(pd_run, tmp_path)
    z, cond = pair.start(["a", "b"], [0, 1], seed=0)
    rate = Arm("interval", "", "TS").student_rate([0, 1], 2, seed=0)
    found = pair.rollout(z, cond, rate)[-1]
    grid = timestep_grid(8)
    for t, s in zip(grid[:5], [*grid[1:5], CLEAN]):  # 999 .. 624 by the teacher, then 500 -> clean by the student
        model = pair.teacher if t > 500 else pair.student
        alpha_t, sigma_t, alpha_s, sigma_s = (table[i] for i in (t, s) for table in (pair.schedule.alpha, pair.schedule.sigma))
        v = model(z, torch.full((2,), t), cond)
        z = alpha_s * (alpha_t * z - sigma_t * v) + sigma_s * (sigma_t * z + alpha_t * v)
    torch.testing.assert_close(found, z, atol=1e-5, rtol=1e-4)


def pair_of(run, tmp_path, *flags):
    args = evaluate.parse_args([str(run), "--output_dir", str(tmp_path / "out"), "--shift", *map(str, flags)])
    (candidate,) = evaluate.candidates_of(args)
    ev = type("ev", (), {"args": args, "accelerator": Accelerator()})
    return evaluate.Pair(ev, candidate), ev


def test_disagreement_vanishes_where_there_is_none(pd_run, gc_folder, tmp_path):
    """The teacher as its own student, at as many steps, and its slow definition at more of them."""
    args = evaluate.parse_args([str(gc_folder), "--output_dir", str(tmp_path), "--shift", "mix", "--teacher", str(gc_folder), "--steps", "2",
                                "--teacher_steps", "2", "--sampler", "ddim"])  # fmt: skip
    (candidate,) = evaluate.candidates_of(args)
    ev = type("ev", (), {"args": args, "accelerator": Accelerator()})
    pair = evaluate.Pair(ev, candidate)
    z, cond = pair.start(["a", "b"], [0, 1], seed=0)
    assert pair.disagreement(z, 0, cond).max() < 1e-10
    pair, _ = pair_of(pd_run, tmp_path)
    z_s = pair.rollout(z, cond, 0.0)[1]
    with torch.no_grad():
        v = pair.student(z, torch.full((2,), 999), cond)
    a, b, c, d = (table[i] for i in (999, 500) for table in (pair.schedule.alpha, pair.schedule.sigma))
    x_teacher = (z_s - d / b * z) / (c - d / b * a)  # Alg. 3 line 9, as it is printed
    expected = (x_teacher - (a * z - b * v)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(pair.disagreement(z, 0, cond), expected, rtol=1e-3, atol=1e-6)


def test_shift_is_found_where_there_is_one(tmp_path, pd_run, data_folder, small):
    """A student whose steps overshoot: its latents are far from forward-diffused ones at the later timestep, other images'
    are near, and it disagrees with its teacher more on what it visits; all arms and plots are there."""
    run = tmp_path / "run"
    shutil.copytree(pd_run, run)
    scale_weights(run / "pipeline", 2)
    tmp_path = tmp_path / "out"
    results = evaluated(tmp_path, run, *small[:4], "--num_images", 12, "--metrics", "fd", "--shift", "--mix_teacher", 0.5, 1)
    first, last = results["gap"][0]["value"]
    assert first["t"] == 999 and last["t"] == 500 and results["gap"][0]["n"] == 12
    assert abs(last["std, student"] - 1) > 5 * abs(last["std, other images"] - 1)
    assert last["FD, student"] > last["FD, other images"]
    assert abs(first["FD, student to teacher"]) < 1e-6 < last["FD, student to teacher"]  # the same pure noise at first
    arms = [row["arm"] for row in results["shift"]]
    assert arms == ["p_T = 0.5", "p_T = 1", "teacher, then student from 500", "student, then teacher from 500",
                    "student, but teacher at 999", "student, but teacher at 500", "student alone", "teacher, but student at 999",
                    "teacher, but student at 500", "teacher alone"]  # fmt: skip
    text = (tmp_path / "results.md").read_text()
    assert all(caption in text for caption in ("Table 5", "Tables 6 and 7", "Figure 4", "student to teacher"))
    for name in ("shift.png", "contact.png"):
        assert Image.open(tmp_path / name).size[0] > 100


def test_grids_that_do_not_align(tmp_path, pd_run, teacher_folder, data_folder):
    message = refused(pd_run, "--prompts", data_folder, "--num_images", 4, "--metrics", "fd", "--shift", "mix", "--teacher_steps", 5,
                      "--output_dir", tmp_path)  # fmt: skip
    assert "--teacher_steps 5" in message and "multiple of 2" in message
    run_here("--teacher", teacher_folder, "--data", data_folder, "--output_dir", tmp_path / "lcm", "--global_batch_size", 4, "--max_updates", 1,
             script="lcm_ddil.py")  # fmt: skip
    message = refused(tmp_path / "lcm", "--prompts", data_folder, "--num_images", 4, "--metrics", "fd", "--shift", "--output_dir", tmp_path / "out")
    assert "[999, 759, 499, 259]" in message and "[999, 749, 500, 250]" in message
    assert not (tmp_path / "out" / "images").exists()


# --- report ---


def test_runs_of_one_label_are_averaged_beside_the_paper(tmp_path, pd_run, gc_folder, small):
    results = evaluated(tmp_path, f"PD={pd_run}", f"PD={pd_run}/stages/4", f"other={gc_folder}", *small[:4], "--num_images", 8, "--metrics",
                        "clip", "--steps", 4, "--guidance_scale", 3, "--seed", 0, 1)  # fmt: skip
    values = {}
    for r in results["results"]:
        values.setdefault(r["label"], []).append(r["value"])
    assert [len(v) for v in values.values()] == [4, 2]
    table = {row[0]: row[1:] for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("|")
             for row in [[cell.strip() for cell in line.strip("|").split("|")]]}  # fmt: skip
    mean, error = np.mean(values["PD"]), np.std(values["PD"], ddof=1) / 2
    assert table["PD"] == ["4", "4", "trained", "3", "4", f"{mean:.4f} ± {error:.4f}", "23.34", "0.302", "0.6"]
    assert table["other"][-3:] == ["-"] * 3
    record = results["results"][0]
    assert record.keys() >= {"metric", "value", "n", "seed", "sampler", "steps", "guidance_scale", "model_weights", "standard_error"}
    assert record["facts"]["sha256"] and results["versions"]["torch"] == torch.__version__.partition("+")[0]
    manifest = json.loads(next((tmp_path / "images").iterdir()).joinpath("manifest.json").read_text())
    assert manifest["images"][2] == {"file": "000002.png", "prompt": "caption number 3", "noise": 2}


@pytest.mark.parametrize("script, config, stage, label", [
    ("pd_ddil", {"p_forward": [0.75, 0.5], "reflect": "measured"}, "pipeline", "PD + DDIL"),
    ("pd_ddil", {"p_forward": [1.0], "reflect": "measured"}, "4", "PD"), ("pd_ddil", {"p_forward": [1.0]}, "gc", "SD(gc)"),
    ("lcm_ddil", {"p_forward": [1.0], "p_teacher": [0.0], "p_student": None, "reflect": "none", "lora_rank": 0}, "pipeline", "LCM"),
    ("lcm_ddil", {"p_forward": [1.0], "p_teacher": [0.0], "p_student": None, "reflect": "none", "lora_rank": 8}, "pipeline", "LCM-LoRA"),
    ("lcm_ddil", {"p_forward": [0.75, 0.5], "p_teacher": [0.0], "p_student": None, "reflect": "measured"}, "pipeline", "LCM + Reflected + DDIL"),
    ("dmd2_ddil", {"p_forward": [0.0], "p_teacher": None, "p_student": [1.0], "reflect": "4"}, "pipeline", "DMD2 + Reflected"),
    ("dmd2_ddil", {"p_forward": [0.0], "p_teacher": None, "p_student": None, "reflect": "4"}, "pipeline", "DMD2 + Reflected + DDIL"),
])  # fmt: skip
def test_labels_are_the_paper_s(script, config, stage, label):
    assert evaluate.label_of(script, config, stage) == label


@pytest.mark.parametrize("script, flags, label", [
    ("pd_ddil", "", "PD + DDIL"), ("pd_ddil", "--p_forward 1 --reuse 3", "PD"),
    ("pd_ddil", "--reflect none", "PD + DDIL, not reflected"), ("pd_ddil", "--forward_control", "PD + control"),
    ("pd_ddil", "--student_rate 0", "PD + DDIL, student_rate 0.0"), ("pd_ddil", "--reuse 0.5", "PD + DDIL, reuse 0.5"),
    ("pd_ddil", "--p_forward 0 .5 --store_start", "PD + DDIL, p_forward 0.0, 0.5, store_start true"),
    ("pd_ddil", "--forward_control --reuse 1", "PD + control"), ("lcm_ddil", "--store_start", "LCM + Reflected + DDIL, store_start true"),
    ("lcm_ddil", "--p_forward 1 .5", "LCM + Reflected + DDIL, p_forward 1.0, 0.5"),
    ("dmd2_ddil", "--mixed_rollout", "DMD2 + Reflected + DDIL, mixed_rollout true"), ("pd_ddil", "--p_forward 1 --reflect none", "PD, not reflected"),
    ("pd_ddil", "--recipe sd15", "PD + DDIL"), ("lcm_ddil", "--recipe sd15", "LCM + Reflected + DDIL"),
    ("lcm_ddil", "--recipe ssd1b --p_forward 1 --reflect none", "SSD1B-LCM"), ("lcm_ddil", "--forward_control", "LCM + Reflected + control"),
    ("dmd2_ddil", "--recipe ssd1b_oracle --student_init z", "DMD2 b64"), ("dmd2_ddil", "--recipe ssd1b --p_student 1 --reflect none", "DMD2"),
    ("dmd2_ddil", "--recipe ssd1b", "DMD2 + Reflected + DDIL"), ("dmd2_ddil", "--recipe sd15 --p_student 1", "SD1.5-DMD2 + Reflected"),
])  # fmt: skip
def test_labels_tell_recipes_and_arms_apart(script, flags, label):
    args = importlib.import_module(script).parse_args(["--teacher", "x", "--data", "y", *flags.split()])
    assert evaluate.label_of(script, json.loads(json.dumps(vars(args))), "pipeline") == label


def test_settings_come_from_the_run(pd_run):
    of = lambda *argv: evaluate.candidates_of(evaluate.parse_args([*map(str, argv)]))[0]  # noqa: E731
    run = of(pd_run)
    assert (run.steps, run.guidance_scale, run.model) == (2, 4.0, str(pd_run / "pipeline"))
    assert of(pd_run / "stages" / "4").steps == 4 and of(f"a=b={pd_run}").label == "a=b"
    assert of(pd_run, "--steps", 1, "--guidance_scale", 2).steps == 1
    teacher = of(TINY / "pipeline")
    assert (teacher.label, teacher.steps, teacher.guidance_scale) == ("tiny", 32, 4.0)


@pytest.mark.parametrize("takes_w, w", [(None, 1.0), (256, 3.0)])
def test_dmd2_students_have_one_guidance_scale(takes_w, w, tmp_path):
    """Guidance is part of them; one that takes w, from its teacher, was trained at this w alone."""
    config = {"guidance_scale": 3.0, "student_steps": 4, "p_forward": [0.0], "p_teacher": None, "p_student": None, "reflect": "measured"}
    for file, content in ("config.json", config), ("dmd2_ddil.py", ""), ("pipeline/unet/config.json", {"time_cond_proj_dim": takes_w}):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    (candidate,) = evaluate.candidates_of(evaluate.parse_args([str(tmp_path)]))
    assert (candidate.steps, candidate.guidance_scale) == (4, w)


def test_inverted_prompts(tmp_path, teacher_folder):
    """Table 8's command on the sample file, with the tiny scorer."""
    random_trunk(tmp_path / "trunk.pth", "alex")
    results = evaluated(tmp_path / "out", teacher_folder, "--prompts", ROOT / "tests" / "inverted.json", "--metrics", "lpips", "similarity",
                        "--lpips_net", "alex", "--lpips_weights", tmp_path / "trunk.pth", "--resolution", 64, "--steps", 1)  # fmt: skip
    lpips_score, similarity = results["results"]
    assert lpips_score["n"] == 2 and lpips_score["value"] > 0 and -1 <= similarity["value"] <= 1
    assert lpips_score["facts"]["weights"] == "alex, trunk.pth" and "64" in lpips_score["facts"]["resize"]
    assert len(images_of(tmp_path / "out")) == 20


def test_statistics_can_be_the_reference(tmp_path, teacher_folder, small):
    first = evaluated(tmp_path / "a", teacher_folder, *small, "--metrics", "fd", "coverage")
    kept = tmp_path / "a" / "reference-clip.safetensors"
    second = evaluated(tmp_path / "b", teacher_folder, *small, "--metrics", "fd", "coverage", "--reference", kept)
    assert [r["value"] for r in first["results"]] == [r["value"] for r in second["results"]]
    random_clip(tmp_path / "clip")
    message = refused(teacher_folder, *small, "--metrics", "fd", "--reference", kept, "--clip_weights", tmp_path / "clip", "--output_dir", tmp_path / "c")
    assert f"--reference {kept}" in message and "weights is" in message


# --- bad input ---


@pytest.mark.parametrize("flags, words", [
    (["--metrics", "clip", "fidd"], ["--metrics fidd", "fid, clip"]), (["--protocol", "coco"], ["--protocol coco", "coco2017-512"]),
    (["--steps", "1", "2"], ["--steps [1, 2]", "1 models"]), (["--steps", "0"], ["--steps 0"]), (["--sampler", "euler"], ["--sampler euler", "ddim"]),
    (["--seed", "-1"], ["--seed [-1]"]), (["--guidance_scale", "nan"], ["--guidance_scale [nan]"]), (["--guidance_scale", "0.5"], ["--guidance_scale [0.5]", "at least 1"]),
    (["--num_images", "1"], ["--num_images 1"]), (["--steps", "1001"], ["--steps 1001", "999"]), (["no/such/model"], ["MODEL no/such/model"]),
    (["--shift", "mix", "--metrics", "lpips"], ["--shift mix", "alignment", "lpips"]), (["--prompts", "assets/tiny/make.py"], ["--prompts assets/tiny/make.py", ".txt"]),
    (["--teacher", "assets/tiny/pipeline", "--shift", "gap", "--steps", "4", "--sampler", "ddim"], ["--shift", "--teacher"]),
    (["--mix_teacher", "1.2"], ["--mix_teacher [1.2]"]), (["--shift", "all"], ["--shift all", "mix"]), (["--batch_size", "0"], ["--batch_size 0"]),
    (["--switch_order", "teacher"], ["--switch_order teacher", "teacher-student"]), (["--lpips_net", "resnet"], ["--lpips_net resnet", "vgg"]),
    (["--num_images", "5000"], ["--num_images 5000", "holds only 1500"]), (["--protocol", "coco2017-512"], ["--prompts", "coco2017-512", "captions_val"]),
    (["--protocol", "coco2017-512", "--prompts", "assets/tiny/data"], ["--reference", "coco2017-512"]),
    (["--prompts", "no/such/file.json"], ["--prompts no/such/file.json"]), (["--reference", "no/such/folder"], ["--reference no/such/folder"]),
    (["--reference", "no.safetensors"], ["--reference no.safetensors", "no such file"]),
    (["--clip_weights", "no/file.pt"], ["--clip_weights no/file.pt", "no such file"]), (["--clip_weights", "tests"], ["--clip_weights tests", "open_clip_config.json"]),
    (["--metrics", "fid"], ["--fid_weights https://", "cannot be fetched", "HF_HUB_OFFLINE"]), (["--metrics", "lpips"], ["--lpips_weights https://", "cannot be fetched"]),
    (["--metrics", "hps"], ["--hps_weights xswu/HPSv2/", "cannot be fetched"]), (["--clip_weights", "laion2b_s12b_b42k"], ["--clip_weights laion2b", "cannot be fetched"]),
    (["--metrics", "similarity"], ["--metrics similarity", '"image"']), (["--shift"], ["--shift", "--teacher"]),
])  # fmt: skip
def test_bad_flags_are_named(flags, words, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    message = refused("assets/tiny/pipeline", *flags, "--output_dir", tmp_path / "out")
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "images").exists()


def test_alignment_needs_the_tiny_world(tmp_path, teacher_folder, small):
    assert "'caption number 0'" in refused(teacher_folder, *small, "--metrics", "alignment", "--output_dir", tmp_path)


@pytest.mark.parametrize("metric", ["fid", "clip", "hps", "lpips"])
def test_weights_of_another_architecture(metric, tmp_path, teacher_folder, small):
    file = tmp_path / "weights.pt"
    torch.save({"conv.weight": torch.zeros(3)}, file)
    if metric in ("clip", "hps"):  # a folder: the real architectures are too large to be built here
        folder = tmp_path / "clip"
        random_clip(folder, weights=False)
        save_file({"conv.weight": torch.zeros(3)}, folder / "open_clip_model.safetensors")
        file = folder
    message = refused(teacher_folder, *small, "--metrics", metric, f"--{metric}_weights", file, "--output_dir", tmp_path / "out")
    assert f"--{metric}_weights {file}" in message and "does not hold" in message


class Evil:
    def __reduce__(self):
        return (open, (EVIL, "w"))


@pytest.mark.parametrize("metric", ["fid", "lpips"])
def test_weights_never_run_code(metric, tmp_path, teacher_folder, small):
    global EVIL
    EVIL = str(tmp_path / "was-run")
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    refused(teacher_folder, *small, "--metrics", metric, f"--{metric}_weights", tmp_path / "evil.pt", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "was-run").exists()


def test_folders_that_are_no_evaluation_are_left_alone(tmp_path, teacher_folder, small, pd_run):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("all there is")
    for folder in (tmp_path / "thesis", pd_run):
        assert f"--output_dir {folder}" in refused(teacher_folder, *small, "--overwrite", "--output_dir", folder)
    assert [f.name for f in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_more_steps_than_the_sampler_has(tmp_path, teacher_folder, small):
    pipe = DiffusionPipeline.from_pretrained(teacher_folder)
    from diffusers import LCMScheduler

    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=4)
    pipe.save_pretrained(tmp_path / "model")
    message = refused(tmp_path / "model", *small, "--steps", 8, "--output_dir", tmp_path / "out")
    assert "--steps 8" in message and str(tmp_path / "model") in message


def test_scheduler_and_vae_belong_to_a_model(tmp_path, teacher_folder, small):
    """Its images are not taken for those of the same UNet with another sampler."""
    model = tmp_path / "model"
    shutil.copytree(teacher_folder, model)
    evaluated(tmp_path / "out", model, *small)
    change_json(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert "model_weights" in refused(model, *small, "--output_dir", tmp_path / "out")


def test_scores_follow_the_images(tmp_path, pd_run, small, monkeypatch):
    """Arms made again in another precision are scored again too."""
    flags = [pd_run, *small[:-4], "--metrics", "clip", "--shift", "switch", "gap", "--num_images", 4]
    exact = evaluated(tmp_path, *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        half = evaluated(tmp_path, *flags, "--overwrite")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for a, b in zip(exact["shift"], half["shift"], strict=True):
        assert a["scores"]["clip"]["facts"]["precision"] != b["scores"]["clip"]["facts"]["precision"]
    assert exact["gap"][0]["value"] != half["gap"][0]["value"]


def test_forwards_are_counted(tmp_path, teacher_folder, gc_folder, small):
    """Twice the sampler's own timesteps under guidance, of which PNDM has one more than it is asked for."""
    pipe = DiffusionPipeline.from_pretrained(teacher_folder)
    from diffusers import PNDMScheduler

    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.save_pretrained(tmp_path / "pndm")
    results = evaluated(tmp_path / "out", teacher_folder, tmp_path / "pndm", gc_folder, *small, "--metrics", "clip", "--num_images", 2,
                        "--steps", 4)["results"]  # fmt: skip
    assert [r["nfe"] for r in results] == [8, 10, 4]
    results = evaluated(tmp_path / "out", teacher_folder, *small, "--metrics", "clip", "--num_images", 2, "--guidance_scale", 1, "--steps", 4)
    assert results["results"][0]["nfe"] == 4


def test_students_of_other_steps_are_other_columns(tmp_path, pd_run, small):
    """And the paper's numbers, which are of four steps, stand beside nothing else."""
    flags = [f"{pd_run}/stages/4", pd_run, *small[:-4], "--metrics", "clip", "--num_images", 4, "--shift", "switch", "gap"]
    results = evaluated(tmp_path, *flags)
    assert {row["label"] for row in results["shift"]} == {"PD + DDIL, 4 steps", "PD + DDIL, 2 steps"}
    text = (tmp_path / "results.md").read_text()
    assert "| teacher, then student from 500 | " in text and "| 23.8 | 0.317 |" in text
    evaluated(tmp_path / "two", pd_run, *flags[2:])
    assert "0.317" not in (tmp_path / "two" / "results.md").read_text()


def test_reference_needs_no_captions(tmp_path, teacher_folder, small):
    save_images(tmp_path / "plain" / "inner", 6, seed=0)
    (tmp_path / "plain" / "inner" / "metadata.jsonl").unlink()
    assert evaluated(tmp_path / "out", teacher_folder, *small, "--reference", tmp_path / "plain")["results"][1]["value"] > 0


def test_a_folder_with_an_equals_sign(tmp_path, teacher_folder):
    folder = tmp_path / "lr=1e-5"
    shutil.copytree(teacher_folder, folder)
    (candidate,) = evaluate.candidates_of(evaluate.parse_args([str(folder)]))
    assert candidate.model == str(folder)


def test_unfinished_run(tmp_path, pd_run):
    shutil.copytree(pd_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pipeline")
    message = refused(tmp_path / "run", "--output_dir", tmp_path / "out")
    assert str(tmp_path / "run") in message and "stages/" in message


def test_a_model_that_is_none(tmp_path):
    assert "no/such/model" in refused("no/such/model", "--output_dir", tmp_path / "out", "--metrics", "clip")


def test_command_line(tmp_path):
    """README's command on assets/tiny, with fewer images."""
    process = run_script(TINY / "pipeline", "--num_images", 8, "--steps", 4, "--metrics", "alignment", "clip", "fd", "coverage", "--output_dir",
                         tmp_path, script="evaluate.py", launcher=["-m", "accelerate.commands.launch"])  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "| tiny | 4 | 8 | trained | 4 |" in process.stdout and "FD (tiny)" in process.stdout
    assert {f.name for f in tmp_path.iterdir()} >= {"images", "scores", "results.json", "results.md", "contact.png"}
