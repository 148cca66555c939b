"""The folder of a cache while it is built: what is done, what is left, and which build it belongs to.

    manifest.json, z_stats.json            written last
    <split>/NNNNNN.tar, NNNNNN.json        finished shards; the sidecar comes after the tar
    .partial/settings.json                 what is being built
    .partial/<split>/NNNNNN.npy, .json     raw float32 rows and their statistics; the statistics come after the rows

Every file is written beside, synced and renamed, so that a killed build leaves complete files and some leftovers in
.partial. Temporary names are the process's own: a process that outlived its killed launcher can't damage a file.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError

from latent_cache.manifest import MANIFEST, STATISTICS, differences, layout_of, load_manifest, settings_of, shard_ranges
from latent_cache.shard import shard_name
from latent_cache.verify import split_problems, statistics_problems
from ssdd.engine.errors import UserError, full_disk
from ssdd.engine.files import read_json, remove_leftovers, write_json
from ssdd.engine.locks import Lock
from ssdd.engine.resumable import WorkRecord
from ssdd.images.sources import SPLITS
from ssdd.model.channel_statistics import ChannelStatistics

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
RETRY = "make room and run the same command again; it will continue"
SHARD_FILE = re.compile(r"\d{6}\.(tar|json)")


class Job(NamedTuple):
    """One shard: its split, its number there, and the indices of its samples."""

    split: str
    number: int
    samples: range


class CacheFolder:
    """The folder `root` as the build of `settings` sees it."""

    def __init__(self, root: Path, settings: dict) -> None:
        self.root, self.settings = root, settings
        self.partial = root / ".partial"
        self.record = WorkRecord(self.partial / "settings.json", settings)
        self.layout = layout_of(settings)
        self.jobs = [
            Job(split, number, samples)
            for split in settings["splits"]
            for number, samples in enumerate(shard_ranges(settings, split))
        ]

    def raw(self, job: Job) -> Path:
        return self.partial / job.split / f"{shard_name(job.number)}.npy"

    def raw_statistics(self, job: Job) -> Path:
        return self.raw(job).with_suffix(".json")

    def tar(self, job: Job) -> Path:
        return self.root / job.split / f"{shard_name(job.number)}.tar"

    def sidecar(self, job: Job) -> Path:
        return self.tar(job).with_suffix(".json")

    def temporary(self, job: Job, suffix: str) -> Path:
        """A name in .partial that no other process uses."""
        return self.partial / job.split / f"{shard_name(job.number)}.{os.getpid()}{suffix}.tmp"

    def is_encoded(self, job: Job) -> bool:
        """The statistics of this shard are known, and its raw rows are there unless it is finished."""
        return self.raw_statistics(job).is_file() and (self.raw(job).is_file() or self.is_finished(job))

    def is_finished(self, job: Job) -> bool:
        """The shard is in its place, whole."""
        size = self.tar(job).stat().st_size if self.tar(job).is_file() else -1
        return self.sidecar(job).is_file() and size == self.layout.file_bytes(len(job.samples))

    def statistics(self) -> ChannelStatistics:
        """Those of the train split, merged in the order of its shards."""
        train = [read_json(self.raw_statistics(job)) for job in self.jobs if job.split == "train"]
        return ChannelStatistics.merged(map(ChannelStatistics.from_dict, train))

    def make(self) -> None:
        """Create the folder itself."""
        with clear_disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def open(self, overwrite: bool, any_device: bool) -> bool:
        """Make ready for the build; True if the cache is already finished. UserError for a folder of something else.

        any_device: a finished cache may have been encoded on another kind of device.
        """
        conflict = self._conflict(any_device)
        if conflict and not overwrite:
            raise UserError(conflict)
        if not conflict and (self.root / MANIFEST).is_file():
            self.tidy()
            return True
        self._check_space()
        if conflict:
            self._wipe()
        self.record.begin(self.partial)
        for split in self.settings["splits"]:
            (self.partial / split).mkdir(exist_ok=True)
            (self.root / split).mkdir(exist_ok=True)
            for leftover in (self.partial / split).glob("*.tmp"):  # of killed processes; they may be large
                leftover.unlink(missing_ok=True)
        return False

    def tidy(self) -> None:
        """Remove what only a build in progress needs, and what killed processes left."""
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in (self.root, *(self.root / split for split in self.settings["splits"])):
            remove_leftovers(folder)

    def _conflict(self, any_device: bool) -> str:
        """Why nothing can be built in this folder unless its content is deleted; "" if it can."""
        choice = "choose another folder, or delete what is there with overwrite=true"
        wanted = self.settings
        if (self.root / MANIFEST).is_file():
            if problem := self._damage():
                return f"out={self.root} holds a damaged cache ({problem}): {choice}"
            found, kind = settings_of(load_manifest(self.root)), "a cache"
            own = found["encoding"]  # nothing is left to encode: any CPU will do, and any device if none was requested
            kept = {"precision": own.get("precision")} | ({"device": own.get("device")} if any_device else {})
            wanted = {**wanted, "encoding": {**wanted["encoding"], **kept}}
        elif (found := self.record.found()) is not None:
            kind = "an unfinished build"
        elif taken := [name for name in (*SPLITS, STATISTICS) if (self.root / name).exists()]:
            raise UserError(
                f"out={self.root} holds {', '.join(taken)} but no cache: choose an empty or a new folder for the cache"
            )
        else:
            return ""
        lines = differences(found, wanted)
        more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
        if not lines:
            return ""
        return f"out={self.root} holds {kind} with other settings ({'; '.join(lines[:6])}{more}): {choice}"

    def _damage(self) -> str:
        """What is wrong with the finished cache in this folder, at a quick look."""
        try:
            manifest = load_manifest(self.root)
            problems = [*statistics_problems(self.root, manifest)]
            for split in manifest["splits"]:
                problems += split_problems(self.root, manifest, split, "quick")
        except UserError as problem:
            return str(problem)
        return problems[0] if problems else ""

    def bytes_while_building(self) -> int:
        """At most: the raw rows of all shards are there together, then shard by shard the tars take their place."""
        values = int(np.prod(self.layout.shape)) * len(self.layout.views)
        raw = sum(len(job.samples) for job in self.jobs) * values * 4
        tars = [self.layout.file_bytes(len(job.samples)) for job in self.jobs]
        return max(raw, sum(tars)) + 2 * max(tars)

    def _check_space(self) -> None:
        needed = self.bytes_while_building()
        own = sum(path.stat().st_size for path in self._own_files())
        free = shutil.disk_usage(self.root).free + own
        if needed > free:
            raise UserError(
                f"out={self.root}: the cache takes {needed / 1e9:.2f} GB while it is built, only {free / 1e9:.2f} GB "
                "are free: choose another disk for out=, or fewer images with dataset.limit"
            )

    def _own_files(self) -> Iterator[Path]:
        if self.partial.is_dir():
            yield from (path for path in self.partial.rglob("*") if path.is_file())
        for split in SPLITS:
            if (self.root / split).is_dir():
                yield from (path for path in (self.root / split).iterdir() if SHARD_FILE.fullmatch(path.name))

    def _wipe(self) -> None:
        """Delete the cache or build of other settings, and nothing else; a wipe that is killed can be repeated."""
        write_json(self.record.path, {"deleting": True})
        for name in (MANIFEST, STATISTICS):
            (self.root / name).unlink(missing_ok=True)
        for path in list(self._own_files()):
            if self.partial not in path.parents:
                path.unlink()
        for split in SPLITS:
            if (self.root / split).is_dir() and not any((self.root / split).iterdir()):
                (self.root / split).rmdir()
        shutil.rmtree(self.partial)


def lock_of(folder: Path) -> Lock:
    """Keeps two builds out of one folder, where its file system has locks. UserError where the folder is not seen."""
    try:
        return Lock(folder, optional=True)
    except FileNotFoundError:
        raise UserError(
            f"{folder} was made by process 0, but this process does not see it: all machines of a build must share "
            "the disk of out="
        ) from None


@contextmanager
def clear_disk_errors(root: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a UserError that says what to do."""
    try:
        yield
    except SafetensorError as problem:  # the library's own form of ENOSPC
        if full_disk(problem) is None:
            raise
        raise UserError(f"out={root}: {os.strerror(errno.ENOSPC)}: {RETRY}") from problem
    except OSError as problem:
        where = f"out={root}: {problem.strerror} ({problem.filename or 'while writing'})"
        if problem.errno in FULL:
            raise UserError(f"{where}: {RETRY}") from problem
        if problem.errno in CLOSED:
            raise UserError(f"{where}: choose a folder for out= that can be written") from problem
        raise
