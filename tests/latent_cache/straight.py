"""What a cache should hold, by a straight loop over the data set: one image at a time, everything in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.images.sources import DatasetConfig, open_source
from ssdd.model.tokenizer import SSDD


def posteriors(tokenizer: Path, cfg: DatasetConfig, split: str, flip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(means [n, C, h, w], log variances [n, C, h, w], labels [n]) of all images of a split, in the source's order."""
    model = SSDD.from_pretrained(tokenizer).eval()
    means, logvars, labels = [], [], []
    for pixels, label, _ in ImageDataset(open_source(cfg, split), cfg, train=False):
        image = from_uint8(pixels)[None]
        with torch.no_grad():
            posterior = model.encode(image.flip(-1) if flip else image)
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
        labels.append(label)
    return torch.cat(means), torch.cat(logvars), torch.tensor(labels)
