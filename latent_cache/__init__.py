"""Images to normalised latents, once: WebDataset shards that are exact, resumable and read at memory speed."""

from __future__ import annotations

from latent_cache.read.dataset import LatentDataset
from latent_cache.read.shard_order import ShardOrder
from latent_cache.read.streaming import Download, StreamingLatents
from latent_cache.read.webdataset_pipeline import decode_sample, open_webdataset

__all__ = ["Download", "LatentDataset", "ShardOrder", "StreamingLatents", "decode_sample", "open_webdataset"]
