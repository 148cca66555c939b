"""The settings of the commands; those of `export` and `import` stand with the formats, in `peers`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssdd.images.sources import DatasetConfig


def adm_images() -> DatasetConfig:
    """Images of the tokenizer's training, with the ADM crop that every gFID reference uses."""
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
    """Delete the cache, or unfinished build, with other settings that `out` holds."""
    dataset: DatasetConfig = field(default_factory=adm_images)
    """Images to encode, in the order of the source. batch_size and aug_scale have no effect on a cache."""
    splits: list[str] = field(default_factory=lambda: ["train", "val"], metadata={"choices": ("train", "val")})
    """Splits to encode; train is always included, because the statistics are those of the train split."""
    samples_per_shard: int = 10_000
    """Images per shard. A shard is the unit of work: an interruption costs each process at most one shard."""
    content: str = field(default="mean", metadata={"choices": ("mean", "moments")})
    """What a row holds: the posterior mean, or mean and log variance, from which the reader draws a new sample."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Further views of every image."""
    batch_size: int = 32
    """Images encoded together. The batches are fixed by sample index, because the last bits of a latent depend on its
    batch."""
    threads: int = 1
    """CPU threads per process; a setting of the cache for the same reason. The number of processes may vary."""
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
    """JSON file for the figures, besides the printed table."""
