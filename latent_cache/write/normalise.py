"""The second pass: raw rows in `.partial` become normalised shards in their place, and a manifest closes the cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from latent_cache.manifest import STATISTICS, write_manifest
from latent_cache.shard import write_shard
from latent_cache.write.folder import CacheFolder, Job
from ssdd.engine.errors import UserError
from ssdd.engine.files import put, read_json, sha256_file, write_json
from ssdd.engine.processes import Processes
from ssdd.model.latent import LatentNorm

CHUNK = 1024  # rows that are normalised together; has no influence on the result


def statistics_of(folder: CacheFolder) -> LatentNorm:
    """Statistics of the raw rows of the train split. UserError for a channel that has the same value everywhere."""
    norm = folder.statistics().norm(folder.settings["tokenizer"]["fingerprint"])
    if not (norm.std > 0).all():
        dead = [channel for channel, std in enumerate(norm.std.tolist()) if not std > 0]
        raise UserError(
            f"latent channels {dead} have the same value everywhere in the train split and can't be normalised: "
            "use a tokenizer with fewer channels, or one that was trained longer"
        )
    return norm


def normalise_shards(
    folder: CacheFolder,
    processes: Processes,
    labels: Callable[[Job], np.ndarray],
    norm: LatentNorm,
    rows_norm: LatentNorm | None = None,
) -> None:
    """Write the shards of this process in their final form, then z_stats.json and the manifest.

    labels: the classes of a shard, int64 [n]. norm: the statistics that the cache carries. rows_norm: what normalises
    the rows in `.partial`, where these are not raw latents (default: norm).
    """
    mine = folder.jobs[processes.rank :: processes.world]
    left = [job for job in mine if not folder.is_finished(job)]
    with progress("normalise", mine, left, processes) as update:
        for job in left:
            _finish(folder, job, labels(job), rows_norm or norm)
            update(len(job.samples))
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


def normalised(raw: np.ndarray, norm: LatentNorm) -> np.ndarray:
    """Raw rows float32 [n, view, K, h, w] -> rows as stored, float16: (mean - m)/s, and logvar - 2 ln s for moments."""
    flat = torch.from_numpy(np.array(raw)).flatten(0, 1)
    channels = len(norm.mean)
    parts = [norm.normalise(flat[:, :channels])]
    if flat.shape[1] > channels:
        parts.append(flat[:, channels:] - 2 * norm.std.log().view(-1, 1, 1))
    return torch.cat(parts, 1).half().unflatten(0, raw.shape[:2]).numpy()


def denormalised(rows: np.ndarray, norm: LatentNorm) -> np.ndarray:
    """The inverse of `normalised`: rows as stored, [n, view, K, h, w] -> raw float32."""
    flat = torch.from_numpy(rows.astype(np.float32)).flatten(0, 1)
    channels = len(norm.mean)
    parts = [norm.denormalise(flat[:, :channels])]
    if flat.shape[1] > channels:
        parts.append(flat[:, channels:] + 2 * norm.std.log().view(-1, 1, 1))
    return torch.cat(parts, 1).unflatten(0, rows.shape[:2]).numpy()


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
def progress(what: str, mine: list[Job], left: list[Job], processes: Processes) -> Iterator[Callable[[int], object]]:
    """A bar with images/s and time left, for process 0 and its share of the images."""
    total, missing = (sum(len(job.samples) for job in jobs) for jobs in (mine, left))
    name = what if processes.world == 1 else f"{what} (process 0 of {processes.world})"
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(
        desc=name, total=total, initial=total - missing, unit="img", mininterval=interval, disable=processes.rank > 0
    ) as bar:
        yield bar.update
