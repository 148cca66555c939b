"""The cost of a build on this machine: bytes, shards, GFLOP, and the time of a few batches times their number."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from latent_cache.config import BuildConfig
from latent_cache.write.arithmetic import exact_arithmetic
from latent_cache.write.build import check, describe
from latent_cache.write.encode import raw_rows
from latent_cache.write.folder import CacheFolder
from ssdd.engine.cost import cost_page
from ssdd.engine.processes import Processes
from ssdd.engine.throughput import count_forward_flop, seconds_a_call
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import open_source
from ssdd.model.tokenizer import SSDD


def dry_run(cfg: BuildConfig) -> str:
    """A page of figures; nothing is written. UserError for what a build would refuse before its first image.

    Unreadable images, which on_corrupt=skip skips, are counted here, since finding them means decoding all.
    """
    check(cfg)
    processes = Processes.join(cfg.device)
    device = processes.device
    tokenizer = SSDD.from_pretrained(cfg.tokenizer, ckpt_dir=cfg.ckpt_dir).eval()
    images = replace(cfg.dataset, on_corrupt="error")
    sources = {split: open_source(images, split) for split in cfg.splits}
    settings = describe(replace(cfg, dataset=images), tokenizer, sources, device)
    folder = CacheFolder(Path(cfg.out), settings)
    splits = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
    views = len(settings["views"])
    size = sum(folder.layout.file_bytes(len(job.samples)) for job in folder.jobs)
    train = ImageDataset(sources["train"], cfg.dataset, train=False)
    reading, encoding, gflop = measure(cfg, tokenizer, train, settings, device)
    workers = cfg.dataset.reading_processes
    seconds = max(reading / workers, encoding) if workers else reading + encoding
    hours = seconds * sum(map(len, sources.values())) / processes.world / 3600
    lines = {
        "latents": f"{splits}, {' x '.join(map(str, settings['shape']))}, {views} view{'s' * (views > 1)}",
        "shards": f"{len(folder.jobs)} of {cfg.samples_per_shard} or fewer",
        "size": f"{size} bytes of shards; {folder.bytes_while_building()} bytes while it is built, "
        f"{_free(folder.root)} are free",
        "GFLOP": f"{gflop * views:.2f} per image" + (" (both views)" if views > 1 else ""),
        "time": f"{hours:.3g} hours on {processes.world} process{'es' * (processes.world > 1)} ({device.type}, "
        f"{cfg.threads} thread{'s' * (cfg.threads > 1)}): {reading * 1e3:.3g} ms to read an image, "
        f"{encoding * 1e3:.3g} ms to encode it; {workers} workers read",
    }
    return cost_page(lines)


def measure(
    cfg: BuildConfig, tokenizer: SSDD, images: ImageDataset, settings: dict, device: torch.device
) -> tuple[float, float, float]:
    """(seconds to read an image, seconds to encode one with all its views, GFLOP of one view)."""
    numbers = [i * len(images) // cfg.batch_size % len(images) for i in range(cfg.batch_size)]
    began = time.perf_counter()
    pixels = [images[number][0] for number in numbers]
    reading = (time.perf_counter() - began) / len(numbers)
    tokenizer.encoder.to(device)
    batch = torch.stack(pixels).to(device)
    side = cfg.dataset.im_size
    flop = count_forward_flop(lambda: tokenizer.encode(torch.zeros(1, 3, side, side, device=device)))
    with exact_arithmetic(device, cfg.threads):
        encoding = seconds_a_call(device, lambda: raw_rows(tokenizer, batch, settings)) / cfg.batch_size
    return reading, encoding, flop / 1e9


def _free(folder: Path) -> int:
    """Bytes free where `folder` is or would be made."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
