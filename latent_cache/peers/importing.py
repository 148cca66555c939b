"""Make a cache of ours from one of another repository.

Statistics are computed again over all latents in float64: LightningDiT's own are of 10 000 random images, the others
have none. Only what `export` wrote carries its cache's statistics, and so is restored exactly: bit for bit from
fast-dit, which holds the normalised values themselves; to float32's rounding of raw values from the others, which
float16 forgets but for values next to 0.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from latent_cache.manifest import FORMAT, load_manifest
from latent_cache.manifest import VERSION as CACHE_VERSION
from latent_cache.peers.exchange import PeerLatents
from latent_cache.peers.export import ORIGIN, ORIGIN_FORMAT, VERSION
from latent_cache.peers.formats import FORMATS, readable
from latent_cache.write.encode import RawShard
from latent_cache.write.folder import CacheFolder, clear_disk_errors, lock_of
from latent_cache.write.normalise import normalise_shards, progress, statistics_of
from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import read_json
from ssdd.engine.processes import Processes
from ssdd.images.stored_files import ImageFiles
from ssdd.model.latent import UNKNOWN_ENCODER, LatentNorm
from ssdd.model.tokenizer import SSDD

CHUNK = 512


@dataclass
class ImportConfig:
    format: str = field(metadata={"choices": readable})
    """Whose layout `source` has."""
    source: str
    """Folder to read. Folders written by `export` record their origin and statistics in export.json; others do not."""
    out: str
    """Folder of the cache to make; an interrupted import of the same source in it is continued."""
    tokenizer: str | None = None
    """Checkpoint reference of the tokenizer that encoded these latents. It cannot be verified: latents do not
    record their encoder. Without it, and without fingerprint, the cache can be trained on but not decoded."""
    fingerprint: str | None = None
    """The same, by the fingerprint of the encoder's weights, as recorded in any z_stats.json of that encoder."""
    ckpt_dir: str = "runs"
    """Where run names are looked up."""
    classes: int | None = None
    """Number of classes; default: as recorded in export.json, else the largest label + 1."""
    scaling_factor: float | None = None
    """The stored values are raw latents times this; default: that of the format."""
    samples_per_shard: int = 10_000
    """Latents per shard."""
    overwrite: bool = False
    """Delete the cache, or unfinished import, with other settings that `out` holds."""


@dataclass
class Origin:
    """Where latents come from: as recorded in export.json, or as far as the keys describe it."""

    tokenizer: dict
    dataset: dict
    classes: list[str]
    values: LatentNorm | None = None
    """What normalises the latents that were read, where that is known and is not `norm`."""
    norm: LatentNorm | None = None
    """The statistics of the cache that they were exported from; computed again where there are none."""


def import_latents(cfg: ImportConfig) -> dict:
    """Make the cache, continue making it, or find it finished; returns its manifest."""
    if cfg.samples_per_shard < 1:
        raise UserError(f"samples_per_shard={cfg.samples_per_shard}: expected a positive number")
    source = Path(cfg.source)
    if not source.is_dir():
        raise UserError(f"source={source}: no such folder")
    peer, origin = identify(cfg, source)
    return store(Path(cfg.out), describe(cfg, peer, origin), peer, origin, cfg.overwrite)


def identify(cfg: ImportConfig, source: Path) -> tuple[PeerLatents, Origin]:
    """The latents and their origin. UserError where they do not agree with each other or with the keys."""
    check_regular(source / ORIGIN)
    record = read_json(source / ORIGIN) if (source / ORIGIN).is_file() else None
    if record is not None:
        if record.get("format") != ORIGIN_FORMAT or record.get("version") != VERSION or record["layout"] != cfg.format:
            raise UserError(f"{source / ORIGIN} is not that of an export with format={cfg.format} that this code reads")
        if cfg.scaling_factor is not None:
            raise UserError(f"scaling_factor={cfg.scaling_factor}: leave it out, {source / ORIGIN} records the scale")
    layout = FORMATS[cfg.format]
    factor = cfg.scaling_factor if cfg.scaling_factor is not None else layout.scaling_factor
    if not factor > 0:
        raise UserError(f"scaling_factor={factor}: expected a positive number")
    peer = layout.open(source)
    if not peer.count:
        raise UserError(f"{source} holds no latents: its files are empty")
    if record is not None and record["count"] != peer.count:
        raise UserError(f"{source} holds {peer.count} latents, its {ORIGIN} records {record['count']}: export it again")
    classes = record["classes"] if record is not None else [str(label) for label in range(int(peer.labels.max()) + 1)]
    if cfg.classes is not None:
        classes = classes if len(classes) == cfg.classes else [str(label) for label in range(cfg.classes)]
    if peer.labels.min() < 0 or peer.labels.max() >= len(classes):
        raise UserError(
            f"{source} has labels {peer.labels.min()} to {peer.labels.max()}: expected labels of {len(classes)} classes"
        )
    channels, height, width = peer.shape[0] // (2 if peer.content == "moments" else 1), *peer.shape[1:]
    named = _named_tokenizer(cfg, channels)
    if record is None:
        peer = _unscaled(peer, channels, factor)
        stride = named.pop("stride", None)
        dataset = {
            "source": cfg.format,
            "im_size": stride * height if stride and height == width else None,
            "crop": "unknown",
            "flip": peer.flip,
        }
        return peer, Origin(named | {"origin": cfg.format}, dataset, classes)
    named.pop("stride", None)
    tokenizer = record["tokenizer"] if named["fingerprint"] == UNKNOWN_ENCODER else named
    stats = record["z_stats"] | {"fingerprint": tokenizer["fingerprint"]}
    stats |= {name: torch.tensor(stats[name]) for name in ("mean", "std")}
    values = LatentNorm.of(record["values"]["mean"], record["values"]["std"])
    return peer, Origin(tokenizer, record["dataset"], classes, values, LatentNorm(**stats))


def _unscaled(peer: PeerLatents, channels: int, factor: float) -> PeerLatents:
    """`peer` with raw latents in place of raw latents times `factor`."""

    def read(asked: range) -> np.ndarray:
        rows = peer.read(asked).astype(np.float64)
        rows[:, :, :channels] /= factor
        rows[:, :, channels:] -= 2 * np.log(factor)  # of content=moments: log variances
        return rows.astype(np.float32)

    return peer if factor == 1 else replace(peer, read=read)


def _named_tokenizer(cfg: ImportConfig, channels: int) -> dict:
    """The manifest's tokenizer entry as the keys describe it, with its `stride` where the tokenizer is available."""
    if cfg.tokenizer is not None and cfg.fingerprint is not None:
        raise UserError("tokenizer and fingerprint both name the encoder: pass one of them")
    if cfg.tokenizer is None:
        fingerprint = cfg.fingerprint or UNKNOWN_ENCODER
        if fingerprint != UNKNOWN_ENCODER and (len(fingerprint) != 64 or set(fingerprint) - set("0123456789abcdef")):
            raise UserError(f"fingerprint={fingerprint}: expected 64 hex digits, as in the z_stats.json of a cache")
        return {"encoder": {"name": UNKNOWN_ENCODER}, "fingerprint": fingerprint}
    tokenizer = SSDD.from_pretrained(cfg.tokenizer, ckpt_dir=cfg.ckpt_dir)
    if tokenizer.z_dim != channels:
        raise UserError(
            f"tokenizer={cfg.tokenizer} has {tokenizer.z_dim} latent channels, the latents have {channels}: "
            "they come from another tokenizer"
        )
    fingerprint = tokenizer.encoder_fingerprint()
    return {"encoder": tokenizer.config["encoder"], "fingerprint": fingerprint, "stride": tokenizer.f}


def describe(cfg: ImportConfig, peer: PeerLatents, origin: Origin) -> dict:
    """The manifest but for the shards."""
    digest = hashlib.sha256()
    try:
        ImageFiles(peer.folder, peer.names).add_to(digest)
    except FileNotFoundError as problem:
        raise UserError(f"{problem.filename} is missing: copy it from an intact copy of {cfg.source}") from None
    return {
        "format": FORMAT,
        "version": CACHE_VERSION,
        "tokenizer": origin.tokenizer,
        "dataset": origin.dataset,
        "content": peer.content,
        "dtype": "float16",
        "shape": list(peer.shape),
        "views": ["npy", "flip.npy"] if peer.flip else ["npy"],
        "encoding": {"imported_from": cfg.format},
        "samples_per_shard": cfg.samples_per_shard,
        "classes": origin.classes,
        "splits": {"train": {"count": peer.count, "fingerprint": digest.hexdigest(), "skipped": []}},
    }


def store(root: Path, settings: dict, peer: PeerLatents, origin: Origin, overwrite: bool = False) -> dict:
    """Both passes of a build, with `peer` in place of an encoder; returns the manifest."""
    folder = CacheFolder(root, settings)
    alone = Processes(0, 1, torch.device("cpu"))
    with clear_disk_errors(root):
        folder.make()
        with lock_of(root) as lock:
            lock.claim("another build")
            if not folder.open(overwrite, any_device=False):
                _store_raw_rows(folder, peer, alone)
                norm = origin.norm or statistics_of(folder)
                normalise_shards(
                    folder, alone, lambda job: peer.labels[np.asarray(job.samples)], norm, rows_norm=origin.values
                )
    return load_manifest(root)


def _store_raw_rows(folder: CacheFolder, peer: PeerLatents, alone: Processes) -> None:
    """First pass: rows as they were read, and their statistics."""
    left = [job for job in folder.jobs if not folder.is_encoded(job)]
    with progress("read", folder.jobs, left, alone) as update:
        for job in left:
            shard = RawShard(folder, job)
            for start in range(job.samples.start, job.samples.stop, CHUNK):
                samples = range(start, min(start + CHUNK, job.samples.stop))
                shard.write(peer.read(samples))
                update(len(samples))
            shard.close()
