"""How busy the encoder is while a cache is built: `python scripts/bench.py builder`."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.report import Report
from bench.settings import Rounds, check_positive
from latent_cache.config import BuildConfig, adm_images
from latent_cache.write.arithmetic import exact_arithmetic
from latent_cache.write.build import build
from ssdd import SSDD
from ssdd.engine.cli import parse
from ssdd.engine.devices import synchronize
from ssdd.engine.tables import Column
from ssdd.images.batches import read_split
from ssdd.images.pixels import from_uint8

COLUMNS = (
    Column("round", "round", 5, 0),
    Column("encoder s", "encoder", 10, 2),
    Column("build s", "build", 10, 2),
    Column("images/s", "images_per_s", 9, 2),
    Column("overhead %", "overhead", 11, 1, 100),
)
FILE_SIDES = (400, 300)  # of the JPEG files, which the builder decodes and resizes


@dataclass
class BuilderSettings(Rounds):
    """Building a cache of JPEG files from nothing, compared with the encoder alone on the same batches in memory."""

    images: int = 64
    """JPEG files of 400 x 300 pixels, parts of scikit-learn's photographs."""
    side: int = 128
    """Pixels of the image's sides that are encoded."""
    encoder: str = "f8c4"
    """Our encoder, at its published width."""
    batch: int = 16
    """Images encoded together."""
    threads: int = torch.get_num_threads()
    """Of the encoder, on a CPU."""
    rounds: int = 3
    """Each is the encoder alone, then a build."""


def builder(argv: list[str]) -> int:
    """A table of seconds and overhead per round, and the same as one line of JSON."""
    settings = parse(BuilderSettings, argv, program="bench builder", description=__doc__)
    check_positive(settings, "images", "side", "batch", "threads", "rounds")
    title = f"Cache builder, {settings.images} images at {settings.side} px, {settings.encoder}"
    report = Report("builder", settings, argv, title)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "images", settings.images)
        tokenizer = SSDD(settings.encoder, "XXS").eval()
        tokenizer.save_pretrained(root / "tokenizer")
        tokenizer.encoder.to(report.device)
        report.begin(COLUMNS)
        for number in range(settings.rounds):
            row = {"round": number + 1} | measure(root, f"cache{number}", tokenizer, settings, report.device)
            report.add([row])
    report.end()
    return 0


def write_photographs(root: Path, count: int) -> None:
    """An image folder with one class: parts of scikit-learn's two photographs, at random places."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    (root / "train" / "photograph").mkdir(parents=True)
    width, height = FILE_SIDES
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        limits = (photograph.width - width, photograph.height - height)
        left, top = (int(torch.randint(limit + 1, (), generator=generator)) for limit in limits)
        part = photograph.crop((left, top, left + width, top + height))
        part.save(root / "train" / "photograph" / f"{number:06d}.jpg", quality=90)


def measure(
    root: Path, name: str, tokenizer: SSDD, settings: BuilderSettings, device: torch.device
) -> dict[str, float]:
    """Seconds of the encoder alone and of a build from opening the files to the finished shards, loading included."""
    dataset = replace(adm_images(), source="imagefolder", root=str(root / "images"), im_size=settings.side)
    cfg = BuildConfig(
        tokenizer=str(root / "tokenizer"),
        out=str(root / name),
        dataset=dataset,
        splits=["train"],
        samples_per_shard=settings.images,
        batch_size=settings.batch,
        threads=settings.threads,
    )
    pixels = read_split(dataset, "train")[0].to(device).split(settings.batch)
    with exact_arithmetic(device, settings.threads), torch.no_grad():
        tokenizer.encode(from_uint8(pixels[0]))  # warm-up
        synchronize(device)
        began = time.perf_counter()
        for part in pixels:
            tokenizer.encode(from_uint8(part))
        synchronize(device)
        alone = time.perf_counter() - began
    began = time.perf_counter()
    build(cfg)
    seconds = time.perf_counter() - began
    return {
        "encoder": alone,
        "build": seconds,
        "images_per_s": settings.images / seconds,
        "overhead": seconds / alone - 1,
    }
