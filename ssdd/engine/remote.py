"""Files at any fsspec URL, and copies of them here: whole, checked, retried."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ssdd.engine.errors import UserError, full_disk
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import sync_folder

log = logging.getLogger(__name__)

ATTEMPTS = 4
PAUSE = 0.5  # seconds before the second attempt; doubles each time
BLOCK = 2**20
MARKS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")

Result = TypeVar("Result")


class MissingFile(UserError):
    """There is no such file at a URL."""


class RemoteFolder:
    """A folder at an fsspec URL: `s3://`, `gs://`, `https://`, `memory://`, `file://`, or a plain path."""

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self.url, self.storage_options = url.rstrip("/"), storage_options or {}

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def open(self, name: str) -> BinaryIO:
        """File `name` of the folder for reading. UserError when this kind of URL can't be read here."""
        filesystem, path = self._resolve(name)
        if "file" in filesystem.protocol:
            check_regular(path)
        return filesystem.open(path, "rb")

    def local(self, name: str = "") -> Path | None:
        """Where `name` lies on this machine's disks, if it does."""
        filesystem, path = self._resolve(name)
        return Path(path) if "file" in filesystem.protocol else None

    def names(self, name: str) -> list[str]:
        """Sorted names of what folder `name` holds but for hidden files; empty when there is no such folder."""
        filesystem, path = self._resolve(name)
        try:
            found = self._attempts(name, lambda: filesystem.ls(path, detail=False))
        except MissingFile:
            return []
        bare = (entry.rstrip("/").rpartition("/")[2] for entry in found)
        return sorted(name for name in bare if not name.startswith("."))

    def version(self, name: str) -> dict[str, Any]:
        """What changes when the file does: "bytes" (None if unknown), and the marks that its file system has."""
        filesystem, path = self._resolve(name)
        info = self._attempts(name, lambda: filesystem.info(path))
        return {"bytes": info.get("size"), **{mark: str(info[mark]) for mark in MARKS if info.get(mark) is not None}}

    def read(self, name: str) -> bytes:
        """A small file. UserError when it is missing (MissingFile) or can't be read."""
        return self._attempts(name, lambda: self._read(name))

    def download(self, name: str, target: Path, size: int | None, sha256: str | None = None) -> None:
        """Copy file `name` to `target`, whole or not at all; a copy of other size or checksum is made again.

        For one writer at a time. OSError when `target` can't be written to, UserError when the file can't be fetched.
        """
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            self._attempts(name, lambda: self._download(name, temporary, size, sha256))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)

    def _resolve(self, name: str) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.where(name) if name else self.url, **self.storage_options)
        except (ImportError, ValueError) as error:  # a protocol whose package is missing, or that does not exist
            raise UserError(f"can't read {self.url}: {error}") from None

    def _attempts(self, name: str, act: Callable[[], Result]) -> Result:
        for attempt in range(ATTEMPTS):
            try:
                return act()
            except UserError:
                raise
            except FileNotFoundError:
                raise MissingFile(f"{self.where(name)} is missing: upload it, or correct the address") from None
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

    def _download(self, name: str, target: Path, size: int | None, sha256: str | None) -> None:
        digest, copied = hashlib.sha256(), 0
        with self.open(name) as source, open(target, "wb") as copy:
            while block := source.read(BLOCK):
                copy.write(block)
                digest.update(block)
                copied += len(block)
            copy.flush()
            os.fsync(copy.fileno())
        if size is not None and copied != size:
            raise OSError(f"received {copied} bytes instead of {size}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise OSError("the received file is damaged (its checksum is wrong)")


def cache_folder() -> Path:
    """Where downloads and indices of this project lie: by the XDG rules, $XDG_CACHE_HOME/ssdd or ~/.cache/ssdd.

    Without a home, or with one that is not there and can't be made, a folder of this user's below $TMPDIR.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssdd"
        if folder.is_dir():
            return folder
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except (RuntimeError, PermissionError):  # no home and no such user, as in containers with --user; another's home
        usable = False
    return folder if usable else _temporary_cache()


def _temporary_cache() -> Path:
    """Refused if another user has made it: its content would be theirs."""
    folder = Path(tempfile.gettempdir()) / f"ssdd-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set HOME or XDG_CACHE_HOME to a folder of your own")
    return folder
