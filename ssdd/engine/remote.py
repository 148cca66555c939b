"""Files at any URL, through fsspec or from a plain web server, and copies of them here: whole, checked, retried."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ssdd.engine.errors import UserError, full_disk
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import put

log = logging.getLogger(__name__)

ATTEMPTS = 4
PAUSE = 1.0  # seconds before the second attempt; doubles each time
TIMEOUT = 60.0  # seconds without a byte
PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)  # besides the server's own errors (5xx)
BLOCK = 2**20
MARKS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")

Result = TypeVar("Result")


class MissingFile(UserError):
    """There is no such file at a URL, or none for us."""


class UnreadableFile(UserError):
    """No attempt to read a file at a URL was successful."""


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
            found = _attempts(self.where(name), lambda: filesystem.ls(path, detail=False))
        except MissingFile:
            return []
        bare = (entry.rstrip("/").rpartition("/")[2] for entry in found)
        return sorted(name for name in bare if not name.startswith("."))

    def version(self, name: str) -> dict[str, Any]:
        """What changes when the file does: "bytes" (None if unknown), and the marks that its file system has."""
        filesystem, path = self._resolve(name)
        info = _attempts(self.where(name), lambda: filesystem.info(path))
        return {"bytes": info.get("size"), **{mark: str(info[mark]) for mark in MARKS if info.get(mark) is not None}}

    def read(self, name: str) -> bytes:
        """A small file. UserError when it is missing (MissingFile) or can't be read."""
        return _attempts(self.where(name), lambda: self._read(name))

    def download(self, name: str, target: Path, size: int | None, sha256: str | None = None) -> None:
        """Copy file `name` to `target` as `download` does; a copy of other size or checksum is made again."""

        def check(checksum: str) -> None:
            if sha256 is not None and checksum != sha256:
                raise OSError("the received file is damaged (its checksum is wrong)")

        download(self.where(name), lambda _: Stream(self.open(name), 0, size), target, check)

    def _resolve(self, name: str) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.where(name) if name else self.url, **self.storage_options)
        except (ImportError, ValueError) as error:  # a protocol whose package is missing, or that does not exist
            raise UserError(f"can't read {self.url}: {error}") from None

    def _read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()


class Stream(NamedTuple):
    """A file that is being read: from which byte on, and how many there are from there, if that is known."""

    file: BinaryIO
    begin: int
    length: int | None


def open_web(url: str, begin: int = 0) -> Stream:
    """A file on a web server from byte `begin` on, or from its beginning where the server can't resume.

    Through the proxies that the environment names. MissingFile when the server refuses for good.
    """
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={begin}-"} if begin else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if begin and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return open_web(url)
        if error.code < 500 and error.code not in PASSING:
            raise MissingFile(f"{url} returned {error.code} {error.reason}") from None
        raise
    length = response.headers.get("Content-Length")
    resumes = response.status == HTTPStatus.PARTIAL_CONTENT
    return Stream(response, begin if resumes else 0, None if length is None else int(length))


def download(
    where: str,
    open_at: Callable[[int], Stream],
    target: Path,
    check: Callable[[str], None],
    resume: bool = False,
) -> str:
    """Make `target` the file at `where`, whole or not at all; returns its SHA-256. For one writer at a time.

    open_at: opens it at a byte, or at its beginning where that can't be done. check: takes the SHA-256 of all that was
    received; for a wrong one it raises OSError, and the file is fetched again, or UserError. resume: keep what a broken
    transfer received, also for a later call; for a `check` that tells whether parts belong together.

    OSError when `target` can't be written to, UserError when the file can't be fetched.
    """
    part = target.with_name(f".{target.name}.part")
    part.touch()  # where that is refused, no attempt would help
    try:
        checksum = _attempts(where, lambda: _transfer(open_at, part, check, resume))
        put(part, target)
        return checksum
    finally:
        if part.exists() and not (resume and part.stat().st_size):
            part.unlink()


def _transfer(open_at: Callable[[int], Stream], part: Path, check: Callable[[str], None], resume: bool) -> str:
    """Complete `part` in one go, and return its SHA-256, if `check` takes it; else drop it."""
    with open(part, "r+b") as copy:
        if not resume:
            copy.truncate()
        digest = hashlib.file_digest(copy, "sha256")
        if there := copy.tell():
            with suppress(UserError, OSError):
                check(digest.hexdigest())  # the last process was killed before the file got its name
                return digest.hexdigest()
        stream, begin, length = open_at(there)
        with stream:
            if begin == 0:
                copy.seek(0)
                copy.truncate()
                digest = hashlib.sha256()
            while block := stream.read(BLOCK):
                copy.write(block)
                digest.update(block)
            received = copy.tell() - begin
        if length is not None and received != length:
            raise OSError(f"the transfer ended after {received} of {length} bytes")
        try:
            check(digest.hexdigest())
        except (UserError, OSError):
            copy.truncate(0)
            if begin:
                raise OSError("the part that was there is damaged") from None
            raise
    return digest.hexdigest()


def _attempts(where: str, act: Callable[[], Result]) -> Result:
    """`act()`, again and again while it fails for reasons that may pass."""
    for attempt in range(ATTEMPTS):
        try:
            return act()
        except UserError:
            raise
        except FileNotFoundError:
            raise MissingFile(f"{where} is missing: upload it, or correct the address") from None
        except Exception as error:  # every file system has its own kinds of failures
            if full_disk(error):
                raise
            problem = str(error) or type(error).__name__
            log.warning("%s: %s (attempt %d of %d)", where, problem, attempt + 1, ATTEMPTS)
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE * 2**attempt)
    raise UnreadableFile(f"{where} can't be read, after {ATTEMPTS} attempts: {problem}")
