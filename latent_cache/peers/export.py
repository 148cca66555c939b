"""Write a cache in the layout of another repository, so that its trainer runs on our latents unchanged.

The folder is written as OUT.partial and renamed. An export that was killed continues at the first block of samples
whose files are not all there.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from latent_cache.config import ExportConfig
from latent_cache.peers import fast_dit, lightningdit, mar, repa
from latent_cache.peers.exchange import Block
from latent_cache.read.dataset import LatentDataset
from latent_cache.read.stored_rows import Rows, stored_rows
from latent_cache.write.folder import clear_disk_errors, lock_of
from latent_cache.write.normalise import denormalised
from ssdd.engine.errors import UserError
from ssdd.engine.files import put, read_json, remove_leftovers, write_json
from ssdd.model.latent import LatentNorm

ORIGIN = "export.json"
ORIGIN_FORMAT = "ssdd-latent-export"
VERSION = 1
FORMATS = {"fast-dit": fast_dit, "lightningdit": lightningdit, "repa": repa, "mar": mar}
WITH_FLIPS = ("lightningdit", "mar")

log = logging.getLogger(__name__)


def export(cfg: ExportConfig) -> str:
    """Write the export, continue it, or find it finished; returns a line that describes what is there.

    UserError for what the format needs and the cache lacks, for a folder that already exists and for a disk too small.
    """
    cache = LatentDataset(cfg.cache, cfg.split)
    peer = FORMATS[cfg.format]
    values = values_norm(cfg, cache)
    if cfg.format in WITH_FLIPS and not cache.has_flips and cfg.flips == "stored":
        raise UserError(
            f"format={cfg.format} holds mirrored latents, the cache {cfg.cache} does not: build it with "
            "views.flip=true, or pass flips=repeat to train without mirrors"
        )
    if cfg.format in ("repa", "mar") and not cache.has_moments:
        log.warning("the cache holds posterior means only: deviations are written as 0 (content=moments has them)")
    needed = peer.size(cache.latent_shape, len(cache))
    told = f"{len(cache)} latents of {cfg.split} as {cfg.format}, {needed} bytes"
    if cfg.dry_run:
        return f"{cfg.out}: {told}; nothing was written"
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
    return f"{cfg.out}: {told}"


def values_norm(cfg: ExportConfig, cache: LatentDataset) -> LatentNorm:
    """What would normalise the values that are written."""
    channels = cache.latent_shape[0]
    if cfg.scaling_factor is None:
        return LatentNorm.identity(channels) if cfg.format == "fast-dit" else cache.norm
    if cfg.format not in ("repa", "mar") or not cfg.scaling_factor > 0:
        raise UserError(f"scaling_factor={cfg.scaling_factor}: a positive number, for format=repa and format=mar only")
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
        "flips": cfg.flips if cfg.format in WITH_FLIPS else None,
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
    peer, labels, names = FORMATS[cfg.format], cache.labels, cache.class_names
    peer.prepare(folder, names)
    with tqdm(total=len(cache), desc="export", unit="latent", mininterval=1.0) as bar:
        for start in range(0, len(cache), peer.BLOCK):
            samples = range(start, min(start + peer.BLOCK, len(cache)))
            if not all((folder / name).is_file() for name in peer.names(samples, labels[start : samples.stop], names)):
                rows = list(stored_rows(cache, np.arange(samples.start, samples.stop), peer.BLOCK))
                peer.write(folder, _block(rows, values, cache.has_moments), names, cfg.seed)
            bar.update(len(samples))
    peer.finish(folder, labels, cache.norm.mean.numpy(), cache.norm.std.numpy())


def _block(parts: list[Rows], values: LatentNorm, has_moments: bool) -> Block:
    """Stored rows in the values of the format."""
    rows = torch.from_numpy(denormalised(np.concatenate([part.values for part in parts]), values))
    means, logvars = rows.chunk(2, dim=2) if has_moments else (rows, None)
    indices, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("indices", "labels"))
    return Block(indices, labels, means, logvars)
