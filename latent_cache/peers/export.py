"""Write a cache in the layout of another repository, so that its trainer runs on our latents unchanged.

The folder is written as OUT.partial and renamed. An export that was killed continues at the first block of samples
whose files are not all there.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from latent_cache.peers.exchange import Block, Samples
from latent_cache.peers.formats import FORMATS
from latent_cache.read.dataset import LatentDataset
from latent_cache.read.stored_rows import stored_rows
from latent_cache.write.folder import clear_disk_errors, lock_of
from latent_cache.write.normalise import denormalised
from ssdd.engine.errors import UserError
from ssdd.engine.files import put, read_json, remove_leftovers, write_json
from ssdd.model.latent import LatentNorm

ORIGIN = "export.json"
ORIGIN_FORMAT = "ssdd-latent-export"
VERSION = 1

log = logging.getLogger(__name__)


@dataclass
class ExportConfig:
    cache: str
    """Folder of the cache."""
    format: str = field(metadata={"choices": FORMATS})
    """Whose layout."""
    out: str
    """Folder to create; it is written as OUT.partial and renamed, so that it is complete or absent."""
    split: str = "train"
    """Split to export."""
    flips: str = field(default="stored", metadata={"choices": ("stored", "repeat")})
    """Mirrored views. repeat: where the cache has none, store the plain view in their place, which trains without
    mirroring."""
    scaling_factor: float | None = None
    """Export normalised latents divided by this instead of raw ones, for code that multiplies by this literal
    (REPA 0.18215, MAR 0.2325) and so gets unit variance."""
    seed: int = 0
    """Seed of the posterior samples that are stored for a cache with content=moments."""
    dry_run: bool = False
    """Print count and bytes, and write nothing."""


def export(cfg: ExportConfig) -> str:
    """Write the export, continue it, or find it finished; returns a line that describes what is there.

    UserError for what the format needs and the cache lacks, for a folder that already exists and for a disk too small.
    """
    cache = LatentDataset(cfg.cache, cfg.split)
    layout = FORMATS[cfg.format]
    values = values_norm(cfg, cache)
    if layout.both_views and not cache.has_flips and cfg.flips == "stored":
        raise UserError(
            f"format={cfg.format} holds mirrored latents, the cache {cfg.cache} does not: build it with "
            "views.flip=true, or pass flips=repeat to train without mirrors"
        )
    if layout.posteriors and not cache.has_moments:
        log.warning("the cache holds posterior means only: deviations are written as 0 (content=moments has them)")
    needed = layout.size(cache.latent_shape, len(cache))
    summary = f"{len(cache)} latents of {cfg.split} as {cfg.format}, {needed} bytes"
    if cfg.dry_run:
        return f"{cfg.out}: {summary}; nothing was written"
    origin, out = origin_of(cfg, cache, values), Path(os.path.abspath(cfg.out))
    partial = out.with_name(f"{out.name}.partial")
    with clear_disk_errors(out):
        if not _is_finished(out, origin):
            partial.mkdir(parents=True, exist_ok=True)
            with lock_of(partial) as lock:
                lock.claim("another export")
                if not _is_finished(out, origin):  # another process may have ended while this one waited
                    _open(partial, origin, needed)
                    _write(cfg, cache, values, partial)
                    os.sync()
                    put(partial, out)
    return f"{cfg.out}: {summary}"


def values_norm(cfg: ExportConfig, cache: LatentDataset) -> LatentNorm:
    """What would normalise the values that are written."""
    channels = cache.latent_shape[0]
    if cfg.scaling_factor is None:
        return LatentNorm.identity(channels) if FORMATS[cfg.format].normalised else cache.norm
    if not FORMATS[cfg.format].posteriors or not cfg.scaling_factor > 0:
        takers = " and ".join(f"format={name}" for name, peer in FORMATS.items() if peer.posteriors)
        raise UserError(f"scaling_factor={cfg.scaling_factor}: a positive number, for {takers} only")
    return LatentNorm.of([0.0] * channels, [1 / cfg.scaling_factor] * channels)


def origin_of(cfg: ExportConfig, cache: LatentDataset, values: LatentNorm) -> dict:
    """Content of export.json: all that the exported files depend on, and what `import` needs to undo it."""
    manifest = cache.manifest
    return {
        "format": ORIGIN_FORMAT,
        "version": VERSION,
        "layout": cfg.format,
        "cache": manifest["sha256"],
        "split": cfg.split,
        "count": len(cache),
        "flips": cfg.flips if FORMATS[cfg.format].both_views else None,
        "seed": cfg.seed,
        "values": {"mean": values.mean.tolist(), "std": values.std.tolist()},
        "z_stats": cache.norm.to_dict(),
        **{key: manifest[key] for key in ("tokenizer", "dataset", "classes")},
    }


def _is_finished(out: Path, origin: dict) -> bool:
    """Whether `out` is this export. UserError if it is anything else that is not empty."""
    if (out / ORIGIN).is_file() and read_json(out / ORIGIN) == origin:
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not this export: choose another folder, or delete it")
    return False


def _open(partial: Path, origin: dict, needed: int) -> None:
    """Make the unfinished folder ready. UserError if it belongs to another export or the disk is too small."""
    if any(partial.iterdir()):
        if not (partial / ORIGIN).is_file() or read_json(partial / ORIGIN) != origin:
            raise UserError(f"{partial} is not an unfinished export of the same cache and settings: delete it")
        remove_leftovers(partial)
    own = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial).free + own
    if needed > free:
        raise UserError(
            f"out={partial.with_suffix('')}: the export takes {needed / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free"
        )
    write_json(partial / ORIGIN, origin)


def _write(cfg: ExportConfig, cache: LatentDataset, values: LatentNorm, folder: Path) -> None:
    layout, labels = FORMATS[cfg.format], cache.labels
    with tqdm(total=len(cache), desc="export", unit="latent", mininterval=1.0) as bar:
        for number, start in enumerate(range(0, len(cache), layout.block)):
            indices = range(start, min(start + layout.block, len(cache)))
            samples = Samples(number, indices, labels[start : indices.stop], cache.class_names)
            paths = [folder / name for name in layout.names(samples)]
            if not all(path.is_file() for path in paths):
                layout.write(paths, _block(cache, samples, values), cfg.seed)
            bar.update(len(indices))
    if layout.finish is not None:
        layout.finish(folder, labels, cache.class_names, cache.norm)


def _block(cache: LatentDataset, samples: Samples, values: LatentNorm) -> Block:
    """The latents of `samples` in the values that `values` would normalise."""
    parts = stored_rows(cache, np.array(samples.indices), chunk=len(samples.indices))
    rows = torch.from_numpy(denormalised(np.concatenate([part.values for part in parts]), values))
    means, logvars = rows.chunk(2, dim=2) if cache.has_moments else (rows, None)
    return Block(samples, means, logvars)
