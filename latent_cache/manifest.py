"""The manifest: what a cache holds and how it was made, without anything that depends on when, where or by whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latent_cache.shard import ShardLayout
from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import sha256_json, write_json

FORMAT = "ssdd-latent-cache"
VERSION = 1
MANIFEST = "manifest.json"
STATISTICS = "z_stats.json"


def layout_of(settings: dict) -> ShardLayout:
    """The layout of all shards of a cache."""
    return ShardLayout(tuple(settings["shape"]), "flip.npy" in settings["views"])


def shard_ranges(settings: dict, split: str) -> list[range]:
    """The sample indices of each shard of a split, in order."""
    count, step = settings["splits"][split]["count"], settings["samples_per_shard"]
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def write_manifest(folder: Path, settings: dict, shards: dict[str, list[dict]], statistics_sha256: str) -> None:
    """Write the manifest of a finished cache: its settings, the sidecars of its shards, and a checksum over both."""
    splits = {split: {**entry, "shards": shards[split]} for split, entry in settings["splits"].items()}
    manifest = {**settings, "splits": splits, STATISTICS: {"sha256": statistics_sha256}}
    write_json(folder / MANIFEST, {**manifest, "sha256": sha256_json(manifest)})


def load_manifest(folder: str | Path) -> dict:
    """Read and check the manifest of a cache. UserError when there is none, or one that this code can't read."""
    folder = Path(folder)
    path = folder / MANIFEST
    check_regular(path)
    if not path.is_file():
        unfinished = (folder / ".partial").is_dir()
        remedy = "its build was interrupted, run it again" if unfinished else "build one, or name another folder"
        raise UserError(f"no latent cache at {folder} ({MANIFEST} is missing): {remedy}")
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(data: bytes, path: Path | str) -> dict:
    """The manifest that was read at `path`, checked. UserError when this code can't trust it."""
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): copy it again, or build the cache again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a latent cache (format is not {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('version')}, this code reads {VERSION}: "
            "build the cache again, or use the release that made it"
        )
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != sha256_json(content):
        raise UserError(f"{path} was changed after it was written (its checksum is wrong): build the cache again")
    return manifest


def check_split(manifest: dict, split: str, where: object) -> None:
    """UserError unless the cache at `where` has this split."""
    if split not in manifest["splits"]:
        raise UserError(f"the cache {where} has no split {split!r}, only {', '.join(manifest['splits'])}")


def settings_of(manifest: dict) -> dict:
    """The settings that a finished cache was built with."""
    splits = {
        split: {key: value for key, value in entry.items() if key != "shards"}
        for split, entry in manifest["splits"].items()
    }
    return {**{key: manifest[key] for key in manifest if key not in (STATISTICS, "sha256")}, "splits": splits}


def differences(found: Any, wanted: Any, key: str = "") -> list[str]:
    """Where two settings differ, as lines "key: found, wanted ..."."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for name in dict.fromkeys([*found, *wanted])
            for line in differences(found.get(name), wanted.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if found == wanted else [f"{key}: {_short(found)}, wanted {_short(wanted)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
