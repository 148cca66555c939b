"""A cache as a pipeline of the webdataset library, for loaders that are built on it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from latent_cache.manifest import MANIFEST, check_split, parse_manifest
from latent_cache.shard import shard_name
from ssdd.engine.errors import UserError
from ssdd.engine.remote import RemoteFolder


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What stock webdataset reads of one sample -> {"__key__": str, "index": int, "npy": array, "cls": int, ...}.

    For `webdataset.WebDataset(...).map(decode_sample)`, in place of its `.decode()`, which unpickles. Latents are
    float16 [K, h, w], normalised, "flip.npy" that of the mirrored image. UserError for any other member.
    """
    decoded: dict[str, Any] = {"__key__": sample["__key__"], "index": int(sample["__key__"])}
    for extension, data in sample.items():
        if extension in ("npy", "flip.npy"):
            decoded[extension] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        elif extension == "cls":
            decoded["cls"] = int(data)
        elif not extension.startswith("__"):
            raise UserError(f"sample {sample['__key__']} has a member .{extension}, which no latent cache has")
    return decoded


def open_webdataset(url: str, split: str = "train", storage_options: dict[str, Any] | None = None) -> Any:
    """A split as a pipeline of the webdataset library over fsspec, of `decode_sample`'s dicts in their order.

    For loaders that are built on that library: give it to `webdataset.WebLoader`, or append stages. It opens no `pipe:`
    and unpickles nothing; shards are split over DataLoader workers and processes as that library does it, so that
    these may get unequal numbers. UserError when there is no such cache or split.
    """
    import webdataset

    remote = RemoteFolder(url, storage_options)
    manifest = parse_manifest(remote.read(MANIFEST), remote.where(MANIFEST))
    check_split(manifest, split, url)
    names = [f"{split}/{shard_name(number)}.tar" for number in range(len(manifest["splits"][split]["shards"]))]

    def opened(shards: Iterator[dict]) -> Iterator[dict]:
        for shard in shards:
            with remote.open(shard["url"]) as stream:
                yield {**shard, "stream": stream}

    return webdataset.DataPipeline(
        webdataset.SimpleShardList(names),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        opened,
        webdataset.tariterators.tar_file_expander,
        webdataset.tariterators.group_by_keys,
        webdataset.map(decode_sample),
    )
