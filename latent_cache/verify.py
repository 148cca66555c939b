"""Is this cache complete? Every file is compared with the manifest, by size and count or by checksum."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from latent_cache.manifest import MANIFEST, STATISTICS, layout_of, load_manifest, shard_ranges
from latent_cache.shard import Shard, ShardLayout, shard_name
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, sha256_file
from ssdd.model.latent import LatentNorm


def verify(folder: str | Path, mode: str = "full") -> list[str]:
    """Everything that is wrong with a cache, one line each; [] if it is whole.

    mode: "quick" checks names, counts and sizes, "full" also the sha256 of every shard. UserError when there is no
    manifest to compare the files with.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    expected = {MANIFEST, STATISTICS, *manifest["splits"]}
    extra = sorted(path for path in folder.iterdir() if path.name not in expected)
    found = [f"{path} does not belong to this cache: move it away" for path in extra]
    found += statistics_problems(folder, manifest)
    for split in manifest["splits"]:
        found += split_problems(folder, manifest, split, mode)
    return found


def statistics_problems(folder: Path, manifest: dict) -> Iterator[str]:
    """What is wrong with z_stats.json."""
    path = folder / STATISTICS
    try:
        LatentNorm.load(path, manifest["tokenizer"]["fingerprint"])
    except UserError as problem:
        yield str(problem)
        return
    if sha256_file(path) != manifest[STATISTICS]["sha256"]:
        yield f"{path} is not the file that was built (its checksum is wrong): copy or build the cache again"


def split_problems(folder: Path, manifest: dict, split: str, mode: str) -> Iterator[str]:
    """What is wrong with the shards of one split: missing or extra files, counts, sizes, headers, checksums."""
    entries, ranges, layout = manifest["splits"][split]["shards"], shard_ranges(manifest, split), layout_of(manifest)
    if [entry["count"] for entry in entries] != [len(samples) for samples in ranges]:
        yield f"{folder / MANIFEST}: the shards of {split} are not those of its number of samples; build it again"
        return
    names = {f"{shard_name(number)}.{suffix}" for number in range(len(ranges)) for suffix in ("tar", "json")}
    for extra in sorted(path for path in (folder / split).glob("*") if path.name not in names):
        yield f"{extra} does not belong to this cache: move it away"
    for number, (entry, samples) in enumerate(zip(entries, ranges, strict=True)):
        yield from _shard_problems(folder / split / f"{shard_name(number)}.tar", layout, samples, entry, mode)


def _shard_problems(tar: Path, layout: ShardLayout, samples: range, entry: dict, mode: str) -> Iterator[str]:
    sidecar = tar.with_suffix(".json")
    try:
        Shard(tar, layout, samples)
        if read_json(sidecar) != entry:
            yield f"{sidecar} does not match the manifest: this shard belongs to another cache"
    except UserError as problem:
        yield str(problem)
        return
    if mode == "full" and sha256_file(tar) != entry["sha256"]:
        yield f"{tar} is damaged (its checksum is wrong): copy it again, or build the cache again"
