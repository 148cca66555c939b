"""Build a cache: encode every image once, merge the statistics, normalise, and write the shards.

Shard i is made by process i modulo their number. Nothing that is written depends on which process wrote it, when, or
after how many interruptions.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from latent_cache.config import BuildConfig
from latent_cache.manifest import FORMAT, VERSION, load_manifest
from latent_cache.write.arithmetic import exact_arithmetic
from latent_cache.write.encode import ImagesToEncode, encode_shards
from latent_cache.write.folder import CacheFolder, clear_disk_errors, lock_of
from latent_cache.write.normalise import normalise_shards, progress, statistics_of
from ssdd.engine.errors import UserError
from ssdd.engine.locks import Lock
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.images.sources import ImageSource, open_source
from ssdd.model.tokenizer import SSDD

log = logging.getLogger(__name__)


def build(cfg: BuildConfig) -> dict:
    """Build the cache that `cfg` describes, continue building it, or find it finished; returns its manifest.

    To be called by every process. UserError for anything that the caller can correct.
    """
    check(cfg)
    root = Path(cfg.out)
    processes = Processes.join(cfg.device)
    tokenizer = SSDD.from_pretrained(cfg.tokenizer, ckpt_dir=cfg.ckpt_dir).eval()
    sources = {split: open_source(cfg.dataset, split) for split in cfg.splits}
    settings = processes.agree(lambda: describe(cfg, tokenizer, sources, processes.device))
    folder = CacheFolder(root, settings)
    with clear_disk_errors(root):
        processes.agree(folder.make)
        with lock_of(root) as lock:
            if not processes.agree(lambda: _open(folder, lock, cfg)):
                lock.share()
                skipped = {split: entry["skipped"] for split, entry in settings["splits"].items()}
                images = ImagesToEncode(cfg.dataset, sources, skipped)
                tokenizer.encoder.to(processes.device)
                with exact_arithmetic(processes.device, cfg.threads):
                    _encode(folder, processes, tokenizer, images, cfg.dataset.reading_processes)
                    normalise_shards(folder, processes, images.labels, statistics_of(folder))
    return load_manifest(root)


def check(cfg: BuildConfig) -> None:
    """UserError for values that can't be built with."""
    for key in ("samples_per_shard", "batch_size", "threads"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: expected a positive number")
    if "train" not in cfg.splits or len(set(cfg.splits)) < len(cfg.splits):
        raise UserError(
            f"splits=[{','.join(cfg.splits)}]: expected [train] or [train,val]; all splits are normalised with the "
            "statistics of train"
        )


def describe(cfg: BuildConfig, tokenizer: SSDD, sources: dict[str, ImageSource], device: torch.device) -> dict:
    """All that the bytes of the cache depend on: its manifest but for the shards."""
    dataset, size, stride = cfg.dataset, cfg.dataset.im_size, tokenizer.f
    if size % stride or size < stride:
        raise UserError(f"dataset.im_size={size} is not a multiple of {stride}, the tokenizer's stride")
    if cfg.views.flip and not sources["train"].flip:
        raise UserError(
            f"views.flip=true, but a mirror image is not a valid image of {dataset.source}: leave it out, "
            "or set dataset.flip=true if it is one"
        )
    channels = tokenizer.z_dim * (2 if cfg.content == "moments" else 1)
    skipped = {split: _unreadable(source) if dataset.on_corrupt == "skip" else [] for split, source in sources.items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {"encoder": tokenizer.config["encoder"], "fingerprint": tokenizer.encoder_fingerprint()},
        "dataset": {"source": dataset.source, "im_size": size, "crop": dataset.crop, "flip": sources["train"].flip},
        "content": cfg.content,
        "dtype": "float16",
        "shape": [channels, size // stride, size // stride],
        "views": ["npy", "flip.npy"] if cfg.views.flip else ["npy"],
        "encoding": {
            "batch_size": cfg.batch_size,
            "threads": cfg.threads,
            "device": device.type,
            "dtype": "float32",
            "precision": Precision.float32(device).record(),
        },
        "samples_per_shard": cfg.samples_per_shard,
        "classes": sources["train"].class_names,
        "splits": {
            split: {
                "count": len(source) - len(skipped[split]),
                "fingerprint": source.fingerprint(),
                "skipped": skipped[split],
            }
            for split, source in sources.items()
        },
    }


def _open(folder: CacheFolder, lock: Lock, cfg: BuildConfig) -> bool:
    lock.claim("another build")
    with clear_disk_errors(folder.root):
        return folder.open(cfg.overwrite, any_device=cfg.device == "auto")


def _unreadable(source: ImageSource) -> list[int]:
    """Numbers of the images that can't be decoded; each is logged with its place."""
    found = []
    for number in range(len(source)):
        try:
            source.image(number)
        except UserError:
            found.append(number)
            log.warning("skipped unreadable image %s (%d so far)", source.where(number), len(found))
    if len(found) == len(source):
        raise UserError(f"none of the {len(source)} images of {source.name} {source.split} can be read")
    return found


def _encode(folder: CacheFolder, processes: Processes, tokenizer: SSDD, images: ImagesToEncode, workers: int) -> None:
    """First pass: the raw rows of this process's shards, those that are not there yet."""
    mine = folder.jobs[processes.rank :: processes.world]
    left = [job for job in mine if not folder.is_encoded(job)]
    with progress("encode", mine, left, processes) as update:
        encode_shards(folder, left, tokenizer, images, workers, processes.device, update)
    processes.wait()
