"""Build a cache: encode every image once, merge the statistics, normalise, and write the shards.

Shard i is made by process i modulo their number. Nothing that is written depends on which process wrote it, when, or
after how many interruptions.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from latent_cache.config import BuildConfig
from latent_cache.encode import Images, encode_shards
from latent_cache.folder import CacheFolder, FolderLock, Job, clear_disk_errors, put
from latent_cache.manifest import FORMAT, STATISTICS, VERSION, load_manifest, write_manifest
from latent_cache.processes import Processes, exact_arithmetic
from latent_cache.shard import write_shard
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, sha256_file, write_json
from ssdd.engine.images import ImageSource, open_source
from ssdd.latent import LatentNorm
from ssdd.tokenizer import SSDD

CHUNK = 1024  # rows that are normalised together; has no influence on the result

log = logging.getLogger(__name__)


def build(cfg: BuildConfig) -> dict:
    """Build the cache that `cfg` describes, continue building it, or find it finished; returns its manifest.

    To be called by every process. UserError for anything that the caller can mend.
    """
    check(cfg)
    root = Path(cfg.out)
    processes = Processes.join(cfg.device)
    tokenizer = SSDD.from_pretrained(cfg.tokenizer, ckpt_dir=cfg.ckpt_dir).eval()
    sources = {split: open_source(cfg.dataset, split) for split in cfg.splits}
    settings = processes.agree(lambda: describe(cfg, tokenizer, sources, processes.device.type))
    folder = CacheFolder(root, settings)
    with clear_disk_errors(root):
        processes.agree(folder.make)
        with FolderLock(root) as lock:
            if not processes.agree(lambda: _open(folder, lock, cfg)):
                lock.share()
                images = Images(cfg.dataset, sources, {s: entry["skipped"] for s, entry in settings["splits"].items()})
                tokenizer.encoder.to(processes.device)
                with exact_arithmetic(cfg.threads):
                    _encode(folder, processes, tokenizer, images, cfg.dataset.workers)
                    _normalise(folder, processes, images)
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


def describe(cfg: BuildConfig, tokenizer: SSDD, sources: dict[str, ImageSource], device: str) -> dict:
    """All that the bytes of the cache depend on: its manifest but for the shards."""
    dataset, size, stride = cfg.dataset, cfg.dataset.im_size, tokenizer.f
    if size % stride or size < stride:
        raise UserError(f"dataset.im_size={size} is not a multiple of {stride}, the tokenizer's stride")
    if cfg.views.flip and not sources["train"].flip:
        raise UserError(
            f"views.flip=true, but a mirror image is not a valid image of {dataset.source}: leave it out, "
            "or say dataset.flip=true if it is one"
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
        "encoding": {"batch_size": cfg.batch_size, "threads": cfg.threads, "device": device, "dtype": "float32"},
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


def normalised(raw: np.ndarray, norm: LatentNorm) -> np.ndarray:
    """Raw rows float32 [n, view, K, h, w] -> rows as stored, float16: (mean - m)/s, and logvar - 2 ln s for moments."""
    flat = torch.from_numpy(np.array(raw)).flatten(0, 1)
    channels = len(norm.mean)
    parts = [norm.normalise(flat[:, :channels])]
    if flat.shape[1] > channels:
        parts.append(flat[:, channels:] - 2 * norm.std.log().view(-1, 1, 1))
    return torch.cat(parts, 1).half().unflatten(0, raw.shape[:2]).numpy()


def _open(folder: CacheFolder, lock: FolderLock, cfg: BuildConfig) -> bool:
    lock.claim()
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
            log.warning("left out unreadable image %s (%d so far)", source.where(number), len(found))
    if len(found) == len(source):
        raise UserError(f"none of the {len(source)} images of {source.name} {source.split} can be read")
    return found


def _encode(folder: CacheFolder, processes: Processes, tokenizer: SSDD, images: Images, workers: int) -> None:
    """First pass: the raw rows of this process's shards, those that are not there yet."""
    mine = folder.jobs[processes.rank :: processes.world]
    left = [job for job in mine if not folder.is_encoded(job)]
    with _progress("encode", mine, left, processes) as progress:
        encode_shards(folder, left, tokenizer, images, workers, processes.device, progress)
    processes.wait()


def _normalise(folder: CacheFolder, processes: Processes, images: Images) -> None:
    """Second pass: the statistics, the shards of this process in their final form, then the manifest."""
    norm = folder.statistics().norm(folder.settings["tokenizer"]["fingerprint"])
    if not (norm.std > 0).all():
        dead = [channel for channel, std in enumerate(norm.std.tolist()) if not std > 0]
        raise UserError(
            f"latent channels {dead} have the same value everywhere in the train split and can't be normalised: "
            "take a tokenizer with fewer channels, or one that was trained longer"
        )
    mine = folder.jobs[processes.rank :: processes.world]
    left = [job for job in mine if not folder.is_finished(job)]
    with _progress("normalise", mine, left, processes) as progress:
        for job in left:
            _finish(folder, job, images.labels(job), norm)
            progress(len(job.samples))
    for job in mine:
        folder.raw(job).unlink(missing_ok=True)
    processes.wait()
    if processes.rank == 0:
        norm.save(folder.root / STATISTICS)
        shards = {split: [] for split in folder.settings["splits"]}
        for job in folder.jobs:
            shards[job.split].append(read_json(folder.sidecar(job)))
        write_manifest(folder.root, folder.settings, shards, sha256_file(folder.root / STATISTICS))
        folder.tidy()
    processes.wait()


def _finish(folder: CacheFolder, job: Job, labels: np.ndarray, norm: LatentNorm) -> None:
    """Normalise one shard and put it and then its sidecar in place."""
    raw = np.load(folder.raw(job), mmap_mode="r", allow_pickle=False)
    rows = np.concatenate([normalised(raw[i : i + CHUNK], norm) for i in range(0, len(raw), CHUNK)])
    if not np.isfinite(rows).all():
        raise UserError(
            f"normalised latents of {job.split} samples {job.samples.start} to {job.samples.stop - 1} do not fit in "
            "float16: they lie more than 65504 deviations from the mean of the train split, which it does not cover"
        )
    temporary = folder.temporary(job, ".tar")
    sidecar = write_shard(temporary, folder.layout, job.samples.start, rows, labels)
    put(temporary, folder.tar(job))
    write_json(folder.sidecar(job), sidecar)
    folder.raw(job).unlink()


@contextmanager
def _progress(what: str, mine: list[Job], left: list[Job], processes: Processes) -> Iterator[Callable[[int], object]]:
    """A bar with images/s and time left, for process 0 and its share of the images."""
    total, missing = (sum(len(job.samples) for job in jobs) for jobs in (mine, left))
    name = what if processes.world == 1 else f"{what} (process 0 of {processes.world})"
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(
        desc=name, total=total, initial=total - missing, unit="img", mininterval=interval, disable=processes.rank > 0
    ) as bar:
        yield bar.update
