"""The settings of the commands `build`, `info` and `verify`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssdd.engine.images import DatasetConfig


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
