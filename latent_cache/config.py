"""The settings of the commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssdd.images.sources import DatasetConfig


def adm_images() -> DatasetConfig:
    """Images as every gFID reference has them: those of the tokenizer's training, with the ADM crop."""
    return DatasetConfig(crop="adm")


@dataclass
class ViewsConfig:
    flip: bool = False
    """Also store the latent of every mirrored image; only for sources where a mirror image is a valid image."""


@dataclass
class BuildConfig:
    tokenizer: str
    """Checkpoint reference of the tokenizer: a run name, name@last, name@best, a folder or a weights file."""
    out: str
    """Folder of the cache; an interrupted build of the same settings in it is continued."""
    ckpt_dir: str = "runs"
    """Where run names are looked up, as in ssdd/main.py."""
    overwrite: bool = False
    """Delete the cache, or the unfinished build, of other settings that `out` holds."""
    dataset: DatasetConfig = field(default_factory=adm_images)
    """Images to encode, in the order of the source. batch_size and aug_scale have no effect on a cache."""
    splits: list[str] = field(default_factory=lambda: ["train", "val"], metadata={"choices": ("train", "val")})
    """Splits to encode; train is always one of them, since the statistics are those of the train split."""
    samples_per_shard: int = 10_000
    """Images a shard. A shard is the unit of work: an interruption costs each process one shard at most."""
    content: str = field(default="mean", metadata={"choices": ("mean", "moments")})
    """What a row holds: the posterior mean, or mean and log variance, from which the reader draws a new sample."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Further views of every image."""
    batch_size: int = 32
    """Images encoded together. The batches are fixed by sample index, since other batches mean other last bits."""
    threads: int = 1
    """Threads of one process on the CPU, for the same reason a setting of the cache; more processes are free."""
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda")})
    """Where the encoder runs; auto: on the GPU if there is one."""
    dry_run: bool = False
    """Print size, shards, GFLOP and a measured estimate of the time, and write nothing."""


@dataclass
class InfoConfig:
    cache: str
    """Folder of the cache."""


@dataclass
class VerifyConfig:
    cache: str
    """Folder of the cache."""
    mode: str = field(default="full", metadata={"choices": ("quick", "full")})
    """quick: names, counts and sizes of all files; full: also the checksum of every shard."""


@dataclass
class StatsConfig:
    cache: str
    """Folder of the cache."""
    split: str = "train"
    """Split to look at."""
    limit: int | None = 50_000
    """Samples to look at, spread evenly over the split; null: all of them."""
    out: str | None = None
    """JSON file for the figures, next to the table that is printed."""


@dataclass
class ExportConfig:
    cache: str
    """Folder of the cache."""
    format: str = field(metadata={"choices": ("fast-dit", "lightningdit", "repa", "mar")})
    """Whose layout: fast-dit: normalised samples; lightningdit: raw samples, both views; repa: raw mean and deviation;
    mar: raw mean and log variance, both views."""
    out: str
    """Folder to make; it is written as OUT.partial and renamed, so that it is whole or absent."""
    split: str = "train"
    """Split to export."""
    flips: str = field(default="stored", metadata={"choices": ("stored", "repeat")})
    """Mirrored views for lightningdit and mar. repeat: the plain view in their place, which trains without mirrors."""
    scaling_factor: float | None = None
    """repa, mar: instead of raw latents, normalised ones divided by this, for code that multiplies with this literal
    (REPA 0.18215, MAR 0.2325) and so sees unit variance."""
    seed: int = 0
    """Of the posterior samples that fast-dit and lightningdit store of a cache with content=moments."""
    dry_run: bool = False
    """Print count and bytes, and write nothing."""


@dataclass
class ImportConfig:
    format: str = field(metadata={"choices": ("fast-dit", "lightningdit", "repa")})
    """Whose layout `source` has."""
    source: str
    """Folder to read. What `export` wrote tells its origin and statistics in export.json; others don't."""
    out: str
    """Folder of the cache to make; an interrupted import of the same source in it is continued."""
    tokenizer: str | None = None
    """Checkpoint reference of the tokenizer that encoded these latents. You vouch for it: latents don't tell their
    encoder. Without it, and without fingerprint, the cache can be trained on, but is refused where it is decoded."""
    fingerprint: str | None = None
    """The same, by the fingerprint of the encoder's weights, as any z_stats.json of that encoder holds it."""
    ckpt_dir: str = "runs"
    """Where run names are looked up."""
    classes: int | None = None
    """Number of classes; default: as export.json says, else the largest label + 1."""
    scaling_factor: float | None = None
    """The stored values are raw latents times this; default: 0.18215 for fast-dit, else 1."""
    samples_per_shard: int = 10_000
    """Latents a shard."""
    overwrite: bool = False
    """Delete the cache, or the unfinished import, of other settings that `out` holds."""
