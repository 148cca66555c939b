"""The images of a data set's split, as evaluation sees them, as a set to measure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ssdd.engine.files import sha256_json
from ssdd.fidelity.stored_sets import Treatment
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import DatasetConfig, open_source


class SplitImages:
    """A split ("train" or "val") with the crop and size of its config; read by `dataset.workers` processes."""

    def __init__(self, cfg: DatasetConfig, split: str):
        self.dataset = ImageDataset(open_source(cfg, split), cfg, train=False)
        self.treatment = Treatment(cfg.crop, (cfg.im_size, cfg.im_size))
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        """Hex sha256 of what the split holds; another one where unreadable images are skipped instead of an error."""
        if self._fingerprint is None:  # reads all images of a small set
            source, skips = self.dataset.source.fingerprint(), self.dataset.cfg.on_corrupt == "skip"
            self._fingerprint = sha256_json([source, "unreadable skipped"]) if skips else source
        return self._fingerprint

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 [n, 3, H, W], indices int64 [n]) of the readable images rank, rank + world, ..."""
        for pixels, _, indices in eval_batches(
            self.dataset, batch_size, rank, world, self.dataset.cfg.reading_processes
        ):
            yield pixels, indices

    def describe(self) -> dict[str, Any]:
        """What a result records of the set, in JSON values."""
        source, cfg = self.dataset.source, self.dataset.cfg
        return {
            "source": source.name,
            "split": source.split,
            "crop": cfg.crop,
            "size": [cfg.im_size, cfg.im_size],
            "count": len(self),
            "fingerprint": source.fingerprint(),
            "on_corrupt": cfg.on_corrupt,
        }
