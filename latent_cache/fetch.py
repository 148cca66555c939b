"""Copy the files of a remote cache to a local folder: whole, checked, retried, ahead of their use.

The folder is itself a cache that grows; with all shards there, `LatentDataset` and `verify` take it as one. Processes
of one machine share it: a shard is downloaded under a lock on its sidecar, which is never replaced.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from latent_cache.manifest import MANIFEST, STATISTICS, load_manifest
from latent_cache.shard import shard_name
from ssdd.engine.errors import UserError, full_disk
from ssdd.engine.files import remove_leftovers, sync_folder, write_atomic, write_json

ATTEMPTS = 4
PAUSE = 0.5  # seconds before the second attempt; doubles each time
BLOCK = 2**20

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class RemoteFolder:
    """A folder at an fsspec URL: `s3://`, `gs://`, `https://`, `memory://`, `file://`, or a plain path."""

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self.url, self.storage_options = url.rstrip("/"), storage_options or {}

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def open(self, name: str) -> BinaryIO:
        """File `name` of the folder for reading. UserError when this kind of URL can't be read here."""
        filesystem, path = self._resolve(self.where(name))
        return filesystem.open(path, "rb")

    def is_at(self, folder: Path) -> bool:
        """Whether this is a local folder, and that one."""
        filesystem, path = self._resolve(self.url)
        return "file" in filesystem.protocol and Path(path).resolve() == folder.resolve()

    def _resolve(self, url: str) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(url, **self.storage_options)
        except (ImportError, ValueError) as error:  # a protocol whose package is missing, or that is none
            raise UserError(f"can't read {self.url}: {error}") from None

    def read(self, name: str) -> bytes:
        """A small file. UserError when it is missing or can't be read."""
        return self._attempts(name, lambda: self._read(name))

    def download(self, name: str, entry: dict, target: Path) -> None:
        """Copy file `name` to `target`; entry: its "bytes" and "sha256". A copy that differs is made again."""
        self._attempts(name, lambda: self._download(name, entry, target))

    def _attempts(self, name: str, act: Callable[[], Result]) -> Result:
        for attempt in range(ATTEMPTS):
            try:
                return act()
            except UserError:
                raise
            except FileNotFoundError:
                raise UserError(f"{self.where(name)} is missing: upload it, or build the cache again") from None
            except Exception as error:  # every file system has its own kinds of failures
                if full_disk(error):
                    raise
                problem = str(error) or type(error).__name__
                log.warning("%s: %s (attempt %d of %d)", self.where(name), problem, attempt + 1, ATTEMPTS)
                if attempt + 1 < ATTEMPTS:
                    time.sleep(PAUSE * 2**attempt)
        raise UserError(f"{self.where(name)} can't be read, after {ATTEMPTS} attempts: {problem}")

    def _read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def _download(self, name: str, entry: dict, target: Path) -> None:
        digest, size = hashlib.sha256(), 0
        with self.open(name) as source, open(target, "wb") as copy:
            while block := source.read(BLOCK):
                copy.write(block)
                digest.update(block)
                size += len(block)
            copy.flush()
            os.fsync(copy.fileno())
        if size != entry["bytes"]:
            raise OSError(f"{size} bytes came instead of {entry['bytes']}")
        if digest.hexdigest() != entry["sha256"]:
            raise OSError("what came is damaged (its checksum is wrong)")


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
            if number not in self._running and not self._is_here(number):
                self._running[number] = pool.submit(self._fetch_ahead, number)

    def wait(self, number: int) -> None:
        """Until this shard is in the folder. UserError when it can't be had."""
        self._executor()
        future = self._running.pop(number, None)
        if future is not None:
            future.result()
        if not self._is_here(number):
            self._fetch(number)

    def _executor(self) -> ThreadPoolExecutor:
        """The threads of this process: those of a parent do not survive a fork, nor do their downloads."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool, self._running = (os.getpid(), ThreadPoolExecutor(self.threads, "shards")), {}
        return self._pool[1]

    def _tar(self, number: int) -> Path:
        return self.folder / self.split / f"{shard_name(number)}.tar"

    def _is_here(self, number: int) -> bool:
        return self._tar(number).is_file()

    def _fetch_ahead(self, number: int) -> None:
        if threading.main_thread().is_alive():  # at its end, Python waits for all that was ordered
            self._fetch(number)

    def _fetch(self, number: int) -> None:
        tar = self._tar(number)
        temporary = tar.with_name(f".{tar.name}.tmp")
        try:
            with _lock(tar.with_suffix(".json")):
                if tar.is_file():  # another process was faster
                    return
                self._make_room(number)
                try:
                    self.remote.download(f"{self.split}/{tar.name}", self.entries[number], temporary)
                    os.replace(temporary, tar)
                finally:
                    temporary.unlink(missing_ok=True)
                sync_folder(tar.parent)
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
        others = [other for other in range(len(self.entries)) if other not in kept and self._is_here(other)]
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
    """Put manifest, statistics and sidecars into the folder; returns the shards of the split as the manifest has them.

    UserError when the folder holds another cache.
    """
    if remote.is_at(folder):
        raise UserError(f"cache_dir={folder} is the cache itself: open it with LatentDataset, or choose another folder")
    content = remote.read(MANIFEST)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
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
    if split not in manifest["splits"]:
        raise UserError(f"the cache {remote.url} has no split {split!r}, only {', '.join(manifest['splits'])}")
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


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock on an existing file or folder, against other processes and threads."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
