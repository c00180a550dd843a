"""Data as people have it: each layout that the field's tools write is read, each odd file costs its own sample and no other,
and the stream of batches is exact: every sample of an epoch once, none on two ranks, and on at the next one when resumed."""

import io
import json
import os
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import SMALL, change_json, refusal, run_here, save_images
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from toys import max_error, seeded
from transformers import CLIPTokenizer

import common
from common import LatentData, PromptEncoder, StreamedRows, decode, load_pipeline, open_image, open_rows, with_guidance

CAPTIONS = [f"image {i}" for i in range(24)]


def image_bytes(image, kind="PNG", **settings) -> bytes:
    image.save(file := io.BytesIO(), kind, **settings)
    return file.getvalue()


def picture(i: int, kind="PNG") -> bytes:
    return image_bytes(Image.new("RGB", (40, 32), (10 * i, 255 - 10 * i, 90)), kind)


def write_tar(file, members) -> None:
    """Members: (name, bytes)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz" if file.name.endswith("gz") else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write(file, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)


def pairs(kind=lambda i: "png", text=lambda caption: {"txt": caption}, start="", name=lambda i: f"{i:04d}"):
    """Members of a tar: an image of a kind, and a text in files of their own, for each caption."""
    for i, caption in enumerate(CAPTIONS):
        pillow = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}.get(kind(i).lower(), "PNG")
        yield f"{start}{name(i)}.{kind(i)}", picture(i, pillow)
        yield from ((f"{start}{name(i)}.{end}", content.encode()) for end, content in text(caption).items())


def table(folder, file="train.parquet", image="image", caption="caption", values=None, **columns):
    values = values or [{"bytes": picture(i), "path": None} for i in range(24)]
    rows = datasets.Dataset.from_dict({image: values, caption: CAPTIONS, **columns})
    folder.mkdir(parents=True, exist_ok=True)
    {"parquet": rows.to_parquet, "csv": rows.to_csv, "jsonl": rows.to_json}[file.rpartition(".")[2]](str(folder / file))


def files(folder, name=lambda i: f"{i:04d}.png", text=None) -> list[str]:
    """Image files, with a text beside each of this ending. The text begins with a BOM, as from Windows."""
    for i, caption in enumerate(CAPTIONS):
        write(folder / name(i), picture(i))
        if text:
            write((folder / name(i)).with_suffix(text), f"\ufeff{caption}".encode())
    return [name(i) for i in range(24)]


def img2dataset(folder):
    for s in range(2):
        members = [*pairs(lambda i: "jpg", lambda c: {"json": json.dumps({"caption": c, "url": "u"}), "txt": c})]
        write_tar(folder / f"{s:05d}.tar", members[36 * s : 36 * s + 36])
        table(folder, f"{s:05d}.parquet", image="url", values=["u"] * 24)
        write(folder / f"{s:05d}_stats.json", json.dumps({"count": 12}))


def imagefolder(folder, kind="jsonl"):
    names = files(folder / "train")
    table(folder / "train", f"metadata.{kind}", image="file_name", values=names)


def json_beside(folder, name="{i:04d}.png", entry=lambda caption: caption, start="."):
    """Image files, and all captions in one json, in another folder for a start."""
    files(folder)
    entries = {name.format(i=i, folder=folder): entry(caption) for i, caption in enumerate(CAPTIONS)}
    write(folder / start / "captions.json", json.dumps(entries))


def several_images(folder):
    for i, caption in enumerate(CAPTIONS):
        yield from ((f"{i:04d}.{k}.png", picture(abs(i - k))) for k in range(3))
        yield f"{i:04d}.json", json.dumps({"caption": caption}).encode()


def saved_to_disk(folder):
    """Under a name that does not follow the contents, as with data sets made by a function."""
    datasets.Dataset.from_dict({"image": [picture(i) for i in range(24)], "caption": CAPTIONS}).save_to_disk(folder)
    change_json(folder / "state.json", _fingerprint="same")


in_folder = lambda folder: files(folder, lambda i: f"images/{i}.png")
json_of = lambda key: lambda caption: {"json": json.dumps({key: caption, "score": 0.5})}
mixed = lambda i: ("jpg", "png", "webp", "JPEG")[i % 4]
LAYOUTS = {
    "img2dataset": img2dataset,
    "webdataset": lambda folder: write_tar(folder / "0.tar", pairs()),
    "a single tar": lambda folder: write_tar(folder / "0.tar", pairs()),
    "json alone, caption": lambda folder: write_tar(folder / "0.tar", pairs(text=json_of("caption"))),
    "json alone, prompt": lambda folder: write_tar(folder / "0.tar", pairs(text=json_of("Prompt"))),
    "mixed kinds in folders": lambda folder: write_tar(folder / "0.tar", pairs(mixed, start="a/b/")),
    "keys with dots": lambda folder: write_tar(folder / "0.tar", pairs(name=lambda i: f"x.{i}")),
    "input and outputs": lambda f: write_tar(f / "0.tar", pairs(lambda i: "input.png", lambda c: {"out.txt": c})),
    "absolute and .. names": lambda folder: write_tar(folder / "0.tar", pairs(start="/../../tmp/evil/")),
    "tars in folders": lambda folder: write_tar(folder / "a" / "b" / "0.tar", pairs()),
    "several images": lambda folder: write_tar(folder / "0.tar", several_images(folder)),
    "tar.gz": lambda folder: write_tar(folder / "0.tar.gz", pairs(text=lambda c: {"txt": f"\ufeff{c}"})),
    "tgz, caption members": lambda folder: write_tar(folder / "0.TGZ", pairs(text=lambda c: {"caption": c})),
    "imagefolder, jsonl": imagefolder,
    "imagefolder, csv": lambda folder: imagefolder(folder, "csv"),
    "imagefolder, parquet": lambda folder: imagefolder(folder, "parquet"),
    "image and txt": lambda folder: (files(folder, text=".txt"), write(folder / ".cache" / "x.tar", b"")),  # hidden
    "image and caption, in folders": lambda folder: files(folder, lambda i: f"{i % 3}_digit/{i:03d}.png", ".caption"),
    "JPG and TXT": lambda folder: files(folder, lambda i: f"{i}.JPG", text=".TXT"),
    "json of captions": json_beside,
    "kohya's json": lambda folder: json_beside(folder, "{i:04d}", lambda c: {"tags": "no", "caption": c}),
    "json, absolute paths": lambda folder: json_beside(folder, "{folder}/{i:04d}.png"),
    "json elsewhere": lambda folder: json_beside(folder, "..\\{i:04d}.png", start="meta"),
    "parquet of images": lambda folder: datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(i), "path": None} for i in range(24)], "text": CAPTIONS},
        features=datasets.Features(image=datasets.Image(), text=datasets.Value("string")),
    ).to_parquet(folder / "train.parquet"),
    "parquet of structs": table,
    "parquet of bytes": lambda folder: table(folder, image="jpg", values=[picture(i) for i in range(24)]),
    "paths in jsonl": lambda folder: table(folder, "train.jsonl", values=in_folder(folder)),
    "paths in csv": lambda folder: table(folder, "all.csv", image="path", values=in_folder(folder)),
    "backslashes": lambda folder: table(folder, "a.csv", values=[n.replace("/", "\\") for n in in_folder(folder)]),
    "absolute paths": lambda folder: table(folder, values=[str(folder / name) for name in files(folder)]),
    "lists of captions": lambda folder: table(folder, caption="captions", prompt=[[c, c] for c in CAPTIONS]),
    "captions": lambda folder: table(folder, caption="c", captions=[[c] for c in CAPTIONS]),
    "more columns, capitals": lambda folder: table(folder, caption="TEXT", image="IMAGE", score=[0.5] * 24),
    "save_to_disk": saved_to_disk,
    "splits": lambda folder: [table(folder, f"{split}-00000-of-00001.parquet") for split in ("train", "validation")],
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read(layout, streaming, tmp_path):
    """Every image under its own caption; held-out captions are not trained on."""
    (folder := tmp_path / "data").mkdir()
    LAYOUTS[layout](folder)
    rows = open_rows(str(folder / "0.tar" if layout == "a single tar" else folder), streaming=streaming)
    assert rows.held_out
    seen = {}
    for row in rows.train:
        reason, sample = decode(row, (32, 40))
        assert reason is None
        seen[sample["caption"]] = sample["pixels"][5, 5, 0]
    assert len(seen) == 24 if layout == "splits" else set(seen) == set(CAPTIONS) - set(rows.held_out)
    for caption, red in seen.items():
        assert abs(int(red) - 10 * int(caption.split()[1])) <= 3


PROMPTS = {"file": "prompts.txt", "folder": "a/prompts.txt", "table": "rows.csv"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_alone(kind, streaming, tmp_path):
    lines = ["caption"] * (kind == "table") + [*CAPTIONS, ""]
    write(tmp_path / PROMPTS[kind], "\ufeff{}".format("\n".join(lines)).encode())
    name = str(tmp_path / PROMPTS[kind] if kind == "file" else tmp_path)
    rows = open_rows(name, need_images=False, streaming=streaming)
    assert {row["caption"] for row in rows.train} == set(CAPTIONS) - set(rows.held_out)
    with pytest.raises(SystemExit, match="has no images"):
        open_rows(name, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_can_be_named(streaming, tmp_path):
    table(tmp_path, image="photo", caption="alt", image_path=["nowhere"] * 24)
    rows = open_rows(str(tmp_path), streaming=streaming, image="photo", caption="alt")
    assert decode(next(iter(rows.train)), (8, 8))[0] is None
    assert "'photo'" in rows.taken
    with pytest.raises(SystemExit, match=r"--caption_column text: .*'alt'"):
        open_rows(str(tmp_path), streaming=streaming, caption="text")
    with pytest.raises(SystemExit, match=r"has no captions .*1 .parquet.*'alt'.*; --caption_column names another"):
        open_rows(str(tmp_path), streaming=streaming)
    write_tar(tmp_path / "tars" / "0.tar", pairs(text=json_of("alt")))
    rows = open_rows(str(tmp_path / "tars"), streaming=streaming, caption="alt")
    assert next(iter(rows.train))["caption"] in CAPTIONS
    json_beside(tmp_path / "images", entry=lambda c: {"tags": c, "caption": "no"})
    assert open_rows(str(tmp_path / "images"), streaming=streaming, caption="tags").held_out[0] in CAPTIONS


REFUSED = {  # layout, and what the line must name
    "nothing": (lambda folder: None, "holds nothing; it must hold tars"),
    "a zip": (lambda folder: write(folder / "a.zip", b"PK"), "holds 1 .zip; it must hold tars, tables"),
    "a broken table": (lambda folder: write(folder / "a.parquet", b"PAR1"), "cannot be read as a data set"),
    "no captions": (lambda folder: table(folder, caption="c"), "has no captions (1 .parquet; beside it nothing)"),
    "no images": (lambda folder: table(folder, image="score"), "has no images"),
    "only a tar's table": (lambda folder: table(folder, image="url", values=["u"] * 24), "has no images"),
    "images alone": (files, "no row with a caption to hold out (24 .png; beside it nothing;"),
    "other texts": (lambda f: files(f) and write(f / "a.txt", "a"), "hold out (24 .png; beside it 1 .txt;"),
    "empty tar": (lambda folder: write_tar(folder / "0.tar", []), "cannot be read as a data set"),
    "symlink loop": (lambda folder: os.symlink(folder, folder / "loop"), "holds nothing"),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_refused_layouts_are_named(layout, tmp_path):
    (folder := tmp_path / "data").mkdir()
    make, words = REFUSED[layout]
    make(folder)
    with pytest.raises(SystemExit) as refused:
        open_rows(str(folder))
    assert f"--data {folder}: " in refused.value.code
    assert words in refused.value.code
    assert "\n" not in refused.value.code


def sixteen_bit(kind="PNG") -> bytes:
    return image_bytes(Image.fromarray(np.full((32, 40), 30000, dtype=np.uint16)), kind)


def rotated() -> bytes:
    image = Image.new("RGB", (32, 40), "blue")  # red on the left as it is stored; on top when it is upright
    image.paste("red", (0, 0, 8, 40))
    (exif := Image.Exif())[0x0112] = 6
    return image_bytes(image, "PNG", exif=exif)


def palette() -> bytes:
    image = Image.new("P", (40, 32), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    return image_bytes(image, "PNG", transparency=0)


def animated() -> bytes:
    frames = [Image.new("RGB", (40, 32), colour) for colour in ("lime", "red")]
    return image_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])


FLOAT = image_bytes(Image.fromarray(np.full((32, 40), 0.5, dtype=np.float32)), "TIFF")
ODD_IMAGES = {  # what is in the file: the colour at its top left, or why it cannot be used
    "16-bit grey": (sixteen_bit(), (117, 117, 117)), "16-bit TIFF": (sixteen_bit("TIFF"), (117, 117, 117)),
    "float TIFF": (FLOAT, "mode F"), "EXIF rotation": (rotated(), (255, 0, 0)), "animated": (animated(), (0, 255, 0)),
    "hidden colour": (image_bytes(Image.new("RGBA", (40, 32), (255, 0, 0, 0))), (255, 255, 255)),
    "palette, transparent": (palette(), (255, 255, 255)), "one pixel": (image_bytes(Image.new("RGB", (1, 1))), (0, 0, 0)),
    "CMYK": (image_bytes(Image.new("CMYK", (40, 32), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
    "grey and alpha": (image_bytes(Image.new("LA", (40, 32), (9, 255))), (9, 9, 9)),
    "one bit": (image_bytes(Image.new("1", (40, 32), 1)), (255, 255, 255)),
    "cut short": (image_bytes(Image.effect_noise((64, 64), 90), "JPEG")[:900], "OSError"), "empty": (b"", "no image"),
    "a web page": (b"<html>404</html>", "UnidentifiedImageError"), "none": (None, "no image"),
    "20,000 pixels": (image_bytes(Image.new("1", (20000, 20000))), "DecompressionBombError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_images(kind):
    content, expected = ODD_IMAGES[kind]
    reason, sample = decode({"image": content, "caption": "a"}, (32, 40))
    assert expected in reason if isinstance(expected, str) else tuple(sample["pixels"][0, 20]) == expected


ODD_CAPTIONS = {
    "null": (None, None), "blank": ("  ", None), "a number": (7, None), "list": (["", None, "a", "b"], {"a", "b"}),
    "empty list": ([], None), "text": ("a", {"a"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_CAPTIONS)
def test_odd_captions(kind):
    value, expected = ODD_CAPTIONS[kind]
    found = [decode({"caption": value}, (8, 8), draw) for draw in range(2)]
    assert {reason for reason, _ in found} == ({None} if expected else {"no caption"})
    assert not expected or {sample["caption"] for _, sample in found} == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_crawl(streaming, tmp_path, capsys):
    """Members that are missing, cut short, empty or not UTF-8, and a tar that ends early: each costs its own sample."""
    members, lost = [], {2: "jpg", 5: "txt"}
    for i, caption in enumerate(CAPTIONS):
        text = {7: b"caf\xe9 7", 9: b"", 11: b"word " * 500}.get(i, caption.encode())
        data = {13: picture(i, "JPEG")[:90], 15: b"<html>"}.get(i, picture(i, "JPEG"))
        members += [(f"{i}.{end}", b) for end, b in (("jpg", data), ("txt", text)) if lost.get(i) != end]
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", pairs(lambda i: "jpg", start="other"))
    write_tar(tmp_path / "2.tar", [("x.0.png", b""), ("x.1.png", picture(1)), ("x.1.txt", b"x 1"), ("y.0.png", b"")])
    cut = (tmp_path / "1.tar").read_bytes()
    write(tmp_path / "1.tar", cut[: cut.rindex(b"\xff\xd8\xff") + 20])
    rows = open_rows(str(tmp_path), streaming=streaming)
    found = [decode(row, (32, 40)) for row in rows.train]
    captions = {sample["caption"] for reason, sample in found if not reason} | set(rows.held_out)
    assert captions >= {c for i, c in enumerate(CAPTIONS) if i not in (2, 5, 7, 9, 11, 13, 15)}
    assert "caf\ufffd 7" in captions
    assert ("x 1", 10) in {(s["caption"], s["pixels"][5, 5, 0]) for reason, s in found if not reason} or not streaming
    assert 5 <= sum(reason is not None for reason, _ in found) <= 8  # and some that would be held out are passed over
    assert "1.tar: is cut short" in capsys.readouterr().err


# --- the stream ---


def captions_of(data, n_batches: int, prompts=False) -> list[str]:
    """Captions of the next batches; the tokenizer of these tests is invertible."""
    tokenizer = data.prompts.tokenizers[0]
    batches = [data.next_ids() if prompts else data.next()[1] for _ in range(n_batches)]
    return [tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "") for batch in batches for ids in batch]


def open_stream(folder, teacher, streaming=False, rank=0, n_ranks=1, cache=False, batch_size=4):
    pipe = load_pipeline(str(teacher))
    pipe.tokenizer.model_max_length = 64  # or captions are cut
    rows = open_rows(str(folder), streaming=streaming)
    place = batch_size, 0, rank, n_ranks
    return LatentData(rows.train, pipe, PromptEncoder(pipe, "cpu"), *place, seeded(rank), cache)


def save_shards(folder, kind: str, n: int) -> Path:
    """40 samples in n files; without a test split."""
    rows = [(f"{i:03d}", picture(i % 24), f"image {i}") for i in range(44)]
    for shard in range(n):
        part = rows[shard::n]
        if kind == "tar":
            members = [m for k, b, c in part for m in ((f"{k}.png", b), (f"{k}.txt", c.encode()))]
            write_tar(folder / f"{shard}.tar", members)
        else:
            columns = {"image": [b for _, b, _ in part], "caption": [c for _, _, c in part]}
            folder.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(columns).to_parquet(folder / f"{shard}.parquet", batch_size=4)
    return folder


def saved(value):
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_each_sample_reaches_training_once(kind, streaming, tmp_path, teacher_folder, monkeypatch):
    """Over two ranks and two epochs; and a rank that is resumed, in the second epoch too, goes on at the next sample."""
    monkeypatch.setattr(StreamedRows, "BLOCK", 7)
    folder, epochs = save_shards(tmp_path / kind, kind, 4), [[], []]
    for rank in range(2):
        data = open_stream(folder, teacher_folder, streaming, rank, 2, batch_size=2)
        for epoch in epochs:
            before, position = captions_of(data, 4), saved(data.position())
            after = captions_of(data, 5 if streaming else 6)  # streamed, each rank passes over four rows
            resumed = open_stream(folder, teacher_folder, streaming, rank, 2, batch_size=2)
            resumed.restore(position)
            assert captions_of(resumed, len(after) // 2) == after
            epoch += before + after
    assert [len(set(epoch)) for epoch in epochs] == [36 if streaming else 40] * 2
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("n_files", [1, 2, 3, 20])
def test_ranks_share_the_files_of_a_stream(n_files, tmp_path, teacher_folder, capsys):
    """Few files that cannot be shared evenly are read by each rank. Held-out captions are in no rank's."""
    folder, seen = save_shards(tmp_path / "tars", "tar", n_files), []
    for rank in range(2):
        data = open_stream(folder, teacher_folder, True, rank, 2, batch_size=1)
        epoch = []
        while data.source.epoch == 0:
            epoch += captions_of(data, 1)
        seen += epoch[: len(epoch) - (data.source.epoch == 1 and len(set(epoch)) < len(epoch))]
    is_shared = n_files % 2 == 0
    assert (f"2 processes read all {n_files} files each" in capsys.readouterr().err) == (not is_shared)
    assert len(seen) == len(set(seen)) >= 34
    assert not set(seen) & {caption.replace(" ", "") for caption in open_rows(str(folder), streaming=True).held_out}


@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_decoded_ahead(streaming, tmp_path, teacher_folder, monkeypatch):
    """Once each, without a change to what comes; prompts take the place of what was decoded, and wait for nothing nor
    begin it. Where there are several captions, one is drawn for both."""
    decoded, function = [], common.decode
    count = lambda row, *more: (decoded.append(row) if "image" in row else None) or function(row, *more)
    monkeypatch.setattr(common, "decode", count)
    captions = [[f"image {i} {k}" for k in "abc"] for i in range(44)]
    columns = {"image": [picture(i % 24) for i in range(44)], "caption": captions}
    folder = tmp_path / "rows"
    folder.mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    data, prompts_alone = (open_stream(folder, teacher_folder, streaming) for _ in range(2))
    alone = captions_of(prompts_alone, 3, prompts=True)
    assert not decoded
    batches = captions_of(data, 3)
    assert len(data.prefetched) == 8
    assert alone == batches
    assert captions_of(data, 2, prompts=True) == captions_of(prompts_alone, 2)
    assert captions_of(data, 2) == captions_of(prompts_alone, 2)
    assert len({caption[-1] for caption in batches}) == 3
    assert len(decoded) <= 2 * (28 + 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_support_is_the_same_on_all_ranks(streaming, tmp_path, teacher_folder):
    folder = save_shards(tmp_path / "tars", "tar", 2)
    a, b = (open_stream(folder, teacher_folder, streaming, rank, 2) for rank in range(2))
    assert torch.equal(a.calibration_latents(16, seeded()), b.calibration_latents(16, seeded()))
    assert len(captions_of(a, 5)) == 20  # which are still there


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_unusable_samples_stop_a_run(streaming, tmp_path, teacher_folder, capsys):
    save_images(tmp_path / "train", 100, seed=0)
    for i in range(0, 20, 5):
        write(tmp_path / "train" / f"{i:03d}.png", b"no image")
    data = open_stream(tmp_path, teacher_folder, streaming)
    assert not {f"image{i}oftrain" for i in range(0, 20, 5)} & set(captions_of(data, 22))
    warning = f"skipped 1 x unreadable image (UnidentifiedImageError), first {tmp_path / 'train'}"
    assert warning in capsys.readouterr().err
    for i in range(20, 80):
        write(tmp_path / "train" / f"{i:03d}.png", b"no image")
    with pytest.raises(SystemExit, match=r"--data: 17 among the first \d+ samples .* cannot be used: 17 x unreadable"):
        captions_of(open_stream(tmp_path, teacher_folder, streaming), 30)


def test_latents_equal_the_vae_s(teacher_folder, data_folder):
    """Mean over many draws = scaling * posterior mean of the image that diffusers' own processor makes."""
    data, pipe = open_stream(data_folder, teacher_folder), DiffusionPipeline.from_pretrained(teacher_folder)
    row = data.rows[7]
    with torch.no_grad():
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(open_image(row["image"]))).latent_dist
    moments, _ = data.encode([decode(row, data.shape)[1]])
    draws = torch.cat([data.sample_posterior(moments, seeded(i)) for i in range(200)])
    scale = pipe.vae.config.scaling_factor
    spread = scale * posterior.std / 200**0.5
    assert ((draws.mean(dim=0) - scale * posterior.mean).abs() < 6 * spread + 1e-5).all()


def test_latents_on_disk_serve_later_runs(teacher_folder, data_folder, tmp_path, monkeypatch):
    """The same batches, without asking VAE or images again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    plain, cached = (open_stream(data_folder, teacher_folder, cache=cache) for cache in (False, True))
    for _ in range(3):
        (x, ids), (x_cached, ids_cached) = plain.next(), cached.next()
        assert max_error(x, x_cached) < 1e-4
        assert torch.equal(ids, ids_cached)
    assert torch.equal(plain.next_ids(), cached.next_ids())
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", None)
        again, once_more = (open_stream(data_folder, teacher_folder, cache=True) for _ in range(2))
        assert torch.equal(again.next()[1], once_more.next()[1])
    # whoever made them: rounding in the VAE depends on its batch
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    other = open_stream(data_folder, teacher_folder, cache=True, batch_size=3)
    assert (other.rows[:]["moments"] == cached.rows[:]["moments"]).all()


FOLLOWED = ["img2dataset", "image and txt", "imagefolder, jsonl", "paths in csv", "parquet of bytes", "save_to_disk"]


@pytest.mark.parametrize("kept", ["size", "time"])
@pytest.mark.parametrize("layout", FOLLOWED)
def test_latents_on_disk_follow_the_images(layout, kept, tmp_path, teacher_folder, monkeypatch):
    """Other images under the old names, of the same size or time, in files that stay or in tables that change so."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    function, folder, times = picture, tmp_path / "data", {}
    padded = lambda i, kind="PNG", *, start, size: function(abs(start - i), kind).ljust(size, b"\0")
    for start, size in (0, 2000), (24, 2000 if kept == "size" else 3000):
        monkeypatch.setitem(globals(), "picture", partial(padded, start=start, size=size))
        LAYOUTS[layout](folder)
        for file in filter(Path.is_file, folder.rglob("*")):
            if kept == "time" or file.suffix in (".jsonl", ".csv"):
                os.utime(file, ns=(times.setdefault(file, file.stat().st_mtime_ns),) * 2)
        cached, plain = (open_stream(folder, teacher_folder, cache=cache) for cache in (True, False))
        _, sample = decode(plain.rows[3], (32, 40))
        assert abs(int(sample["pixels"][5, 5, 0]) - 10 * abs(start - int(sample["caption"].split()[1]))) <= 3
        assert max_error(*(data.calibration_latents(9, seeded()) for data in (cached, plain))) < 1e-4


@pytest.mark.parametrize("what", ["captions", "tokens", "code", "VAE", "unusable"])
def test_latents_on_disk_follow_what_makes_them(what, tmp_path, teacher_folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, teacher = tmp_path / "data", shutil.copytree(teacher_folder, tmp_path / "teacher")
    files(folder, text=".txt")
    first, again = (open_stream(folder, teacher, cache=True).rows for _ in range(2))
    assert again._fingerprint == first._fingerprint
    if what == "captions":
        write(folder / "0003.txt", "other")
    elif what == "tokens":
        (tokenizer := CLIPTokenizer.from_pretrained(teacher / "tokenizer")).add_tokens("<new>")
        tokenizer.save_pretrained(teacher / "tokenizer")
    elif what == "code":
        monkeypatch.setattr(common, "open_image", lambda value: Image.open(value).convert("RGB"))
    elif what == "VAE":
        weights = load_file(file := teacher / "vae" / "diffusion_pytorch_model.safetensors")
        save_file({name: 1.01 * value for name, value in weights.items()}, file)
    else:
        write(folder / "0003.png", b"no image")
    changed = open_stream(folder, teacher, cache=True).rows
    assert changed._fingerprint != first._fingerprint
    assert len(first) - len(changed) == (what == "unusable")
    assert np.array_equal(changed[0]["moments"], first[0]["moments"]) == (what != "VAE")


def test_sizes_of_images_condition_sdxl(xl_folder, tmp_path):
    """Original size, corner of the crop in the image as it is scaled, target size: as diffusers' SDXL training scripts.
    Rollouts, which have no image, and the unconditional branch see what the pipeline gives."""
    sizes = [(96, 32), (32, 64), (20, 20)]  # width, height
    for resolution, expected in (
        (None, [[32, 96, 0, 32, 32, 32], [64, 32, 16, 0, 32, 32], [20, 20, 0, 0, 32, 32]]),
        ([32, 48], [[32, 96, 0, 24, 32, 48], [64, 32, 32, 0, 32, 48], [20, 20, 8, 0, 32, 48]]),
    ):
        pipe = load_pipeline(str(xl_folder), resolution=resolution)
        prompts = PromptEncoder(pipe, "cpu")
        rows = [{"image": image_bytes(Image.new("RGB", size)), "caption": "a"} for size in sizes]
        data = LatentData(datasets.Dataset.from_list(rows), pipe, prompts, 3, 0, 0, 1, seeded(), False)
        moments, ids = data.encode([decode(row, data.shape)[1] for row in rows])
        assert moments.shape[3:] == data.latents[1:]
        assert prompts.encode(ids)["time_ids"].tolist() == expected
        target = expected[0][4:]
        assert prompts.encode(data.next_ids())["time_ids"].tolist() == [[*target, 0, 0, *target]] * 3
    seen = []
    guided = with_guidance(lambda z_t, t, cond: seen.append(cond["time_ids"]) or z_t, prompts.null())
    guided(torch.zeros(3, 4, 8, 8), torch.zeros(3, dtype=torch.long), prompts.encode(ids) | {"w": torch.ones(3)})
    assert torch.equal(seen[0], prompts.encode(ids)["time_ids"].repeat(2, 1))


# --- what --check_data says, and teachers that do not fit ---


def test_check_data(tmp_path, teacher_folder, capsys):
    img2dataset(tmp_path / "data")
    write_tar(tmp_path / "data" / "0.tar", [("x.jpg", b"no image"), ("x.txt", b"x")])
    flags = ["--teacher", teacher_folder, "--data", tmp_path / "data", "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as end:
        run_here(*flags, "--check_data", "--resolution", 32, 48, script="lcm_ddil.py")
    assert end.value.code is None
    out = capsys.readouterr().out
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if "  " in line)
    assert facts["read"].startswith("3 .tar; beside it 2 .json, 2 .parquet; columns"), out
    assert (facts["usable"], facts["held-out captions"], facts["captions cut"]) == ("22", "2", "0, to 16 tokens"), out
    assert facts["sizes"].startswith("22 smaller than 32 x 48"), out
    assert "unreadable image (UnidentifiedImageError) 1" in out
    assert Image.open(tmp_path / "run-data.png").height > 700  # eight rows of images
    assert not (tmp_path / "run").exists()


BAD_TEACHERS = {
    "without text_encoder": "lacks its text_encoder", "without tokenizer": "lacks its tokenizer",
    "latents_mean": "latents_mean", "shift_factor": "shift_factor", "bin": "let diffusers save it anew",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TEACHERS)
def test_teachers_that_do_not_fit(kind, tmp_path, xl_folder, data_folder):
    folder = shutil.copytree(xl_folder, tmp_path / "teacher")
    if kind.startswith("without"):
        part = kind.split()[1]
        shutil.rmtree(folder / part)
        change_json(folder / "model_index.json", **{part: [None, None]})
    elif kind == "bin":
        (file := folder / "unet" / "diffusion_pytorch_model.safetensors").rename(file.with_suffix(".bin"))
    else:
        change_json(folder / "vae" / "config.json", **{kind: [0.1] * 4 if "mean" in kind else 0.1})
    for script in ("pd_ddil.py", "lcm_ddil.py", "dmd2_ddil.py"):
        message = refusal("--teacher", folder, "--data", data_folder, "--output_dir", tmp_path / "run", script=script)
        assert f"--teacher {folder}: " in message
        assert BAD_TEACHERS[kind] in message


@pytest.mark.parametrize("script", ["pd_ddil.py", "lcm_ddil.py", "dmd2_ddil.py"])
def test_other_resolutions(script, tmp_path, teacher_folder, data_folder):
    """A UNet of [height, width], and --resolution: trained, drawn, saved; stock diffusers samples at that size."""
    oblong = shutil.copytree(teacher_folder, tmp_path / "teacher")
    change_json(oblong / "unet" / "config.json", sample_size=[8, 12])
    steps = ["--teacher_steps", 4, "--student_steps", 2] if script == "pd_ddil.py" else ["--student_steps", 2]
    small = SMALL if script == "pd_ddil.py" else ["--global_batch_size", 4]
    flags = ["--data", data_folder, *small, *steps, "--max_updates", 1, "--no-cache_latents"]
    for teacher, more, size in ((oblong, [], (48, 32)), (teacher_folder, ["--resolution", 24], (24, 24))):
        run_here("--teacher", teacher, *flags, *more, "--output_dir", tmp_path / f"run{size}", script=script)
        pipe = DiffusionPipeline.from_pretrained(tmp_path / f"run{size}" / "pipeline")
        assert pipe("a", num_inference_steps=2, guidance_scale=1.0).images[0].size == size
