"""Copy the files of a remote cache to a local folder, ahead of their use.

The folder is itself a cache that grows; with all shards there, `LatentDataset` and `verify` take it as one. Processes
of one machine share it: a shard is downloaded under a lock on its sidecar, which is never replaced.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from latent_cache.manifest import MANIFEST, STATISTICS, check_split, load_manifest
from latent_cache.shard import shard_name
from ssdd.engine.errors import UserError, full_disk
from ssdd.engine.files import remove_leftovers, write_atomic, write_json
from ssdd.engine.locks import locked
from ssdd.engine.remote import RemoteFolder


class ShardFetcher:
    """Shards of one split of the cache at `remote`, in `folder`.

    limit: bytes that the split's shards may take; the ones downloaded first, of those that `want` doesn't name, make
    room for others.
    """

    def __init__(self, remote: RemoteFolder, folder: Path, split: str, limit: int | None, threads: int) -> None:
        self.remote, self.folder, self.split = remote, folder, split
        self.limit, self.threads = limit, threads
        self.entries = _open_folder(remote, folder, split)
        self._wanted: set[int] = set()
        self._running: dict[int, Future[None]] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict:
        return {**vars(self), "_running": {}, "_pool": None}

    def want(self, numbers: Iterable[int]) -> None:
        """Download these shards in the background, in this order, and keep them until the next call."""
        numbers = list(numbers)
        self._wanted = set(numbers)
        pool = self._executor()
        for number in [number for number in self._running if number not in self._wanted]:
            if self._running[number].cancel():
                del self._running[number]
        for number in numbers:
            if number not in self._running and not self.is_here(number):
                self._running[number] = pool.submit(self._fetch_ahead, number)

    def wait(self, number: int) -> None:
        """Until this shard is in the folder. UserError when it can't be fetched."""
        self._executor()
        future = self._running.pop(number, None)
        if future is not None:
            future.result()
        if not self.is_here(number):
            self._fetch(number)

    def is_here(self, number: int) -> bool:
        return self._tar(number).is_file()

    def _executor(self) -> ThreadPoolExecutor:
        """The threads of this process: those of a parent do not survive a fork, nor do their downloads."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool, self._running = (os.getpid(), ThreadPoolExecutor(self.threads, "shards")), {}
        return self._pool[1]

    def _tar(self, number: int) -> Path:
        return self.folder / self.split / f"{shard_name(number)}.tar"

    def _fetch_ahead(self, number: int) -> None:
        if threading.main_thread().is_alive():  # at its end, Python waits for all that was ordered
            self._fetch(number)

    def _fetch(self, number: int) -> None:
        tar, entry = self._tar(number), self.entries[number]
        try:
            with locked(tar.with_suffix(".json")):
                if tar.is_file():  # another process was faster
                    return
                self._make_room(number)
                self.remote.download(f"{self.split}/{tar.name}", tar, entry["bytes"], entry["sha256"])
        except OSError as error:
            if not full_disk(error):
                raise
            name = self.remote.where(f"{self.split}/{tar.name}")
            raise UserError(
                f"no space left in {self.folder} for {name}: make room, choose another cache_dir, or bound it with "
                "cache_bytes"
            ) from None

    def _make_room(self, number: int) -> None:
        """Delete the oldest shards, until shard `number` and all that are wanted fit in with the rest."""
        if self.limit is None:
            return
        kept = self._wanted | {number}
        others = [other for other in range(len(self.entries)) if other not in kept and self.is_here(other)]
        total = sum(self.entries[shard]["bytes"] for shard in [*kept, *others])
        for other in sorted(others, key=lambda other: _written(self._tar(other))):
            if total > self.limit:
                self._tar(other).unlink(missing_ok=True)
                total -= self.entries[other]["bytes"]


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has just deleted it
        return 0.0


def _open_folder(remote: RemoteFolder, folder: Path, split: str) -> list[dict]:
    """Put manifest, statistics and sidecars into the folder; returns the shards of the split as in the manifest.

    UserError when the folder holds another cache.
    """
    at = remote.local()
    if at is not None and at.resolve() == folder.resolve():
        raise UserError(f"cache_dir={folder} is the cache itself: open it with LatentDataset, or choose another folder")
    content = remote.read(MANIFEST)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            remove_leftovers(folder)
            known = (folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else None
            if known is None:
                if next(folder.iterdir(), None) is not None:
                    raise UserError(f"cache_dir={folder} is not empty, nor a copy of {remote.url}: choose another one")
                write_atomic(folder / MANIFEST, content)
            elif known != content:
                raise UserError(f"cache_dir={folder} holds another cache than {remote.url}: choose another one")
            try:
                manifest = load_manifest(folder)
                _put_small_files(remote, folder, manifest, split)
            except UserError:
                if known is None:
                    (folder / MANIFEST).unlink()
                raise
    except OSError as error:
        raise UserError(f"cache_dir={folder} can't be written to ({error}): choose another one") from None
    return manifest["splits"][split]["shards"]


def _put_small_files(remote: RemoteFolder, folder: Path, manifest: dict, split: str) -> None:
    check_split(manifest, split, remote.url)
    if not (folder / STATISTICS).is_file():
        statistics = remote.read(STATISTICS)
        if hashlib.sha256(statistics).hexdigest() != manifest[STATISTICS]["sha256"]:
            raise UserError(f"{remote.where(STATISTICS)} is not the file that was built (its checksum is wrong)")
        write_atomic(folder / STATISTICS, statistics)
    (folder / split).mkdir(exist_ok=True)
    for number, entry in enumerate(manifest["splits"][split]["shards"]):
        sidecar = folder / split / f"{shard_name(number)}.json"
        if not sidecar.is_file():
            write_json(sidecar, entry)
