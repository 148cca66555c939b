"""Images to normalised latents, once: WebDataset shards that are exact, resumable and read at memory speed."""

from __future__ import annotations

from latent_cache.read.dataset import LatentDataset
from latent_cache.read.streaming import StreamingLatents
from latent_cache.read.webdataset_pipeline import decode_sample, open_webdataset

__all__ = ["LatentDataset", "StreamingLatents", "decode_sample", "open_webdataset"]
