"""Pictures of a tokenizer in training: the same validation images above their reconstructions from the same noise."""

from __future__ import annotations

import numpy as np
import torch

from ssdd.config import SSDDConfig
from ssdd.engine.precision import Precision
from ssdd.engine.random import indexed_noise
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8, grid, to_uint8
from ssdd.images.sources import open_source
from ssdd.model.tokenizer import SSDD

SMALLEST_SIDE = 64  # images below this size are enlarged


class ReconstructionPicture:
    """The first `show_samples` validation images, and what a tokenizer makes of them."""

    def __init__(self, cfg: SSDDConfig, precision: Precision):
        dataset = ImageDataset(open_source(cfg.dataset, "val"), cfg.dataset, train=False)
        indices = range(max(1, min(cfg.show_samples, len(dataset))))
        self.precision, self.scale = precision, max(1, SMALLEST_SIDE // cfg.dataset.im_size)
        self.originals = torch.stack([dataset[i][0] for i in indices])
        self.noise = indexed_noise(indices, self.originals.shape[1:], cfg.seed, "decoder")

    @torch.no_grad()
    def draw(self, tokenizer: SSDD) -> np.ndarray:
        """uint8 [H, W, 3]: originals in the upper row, below them posterior means decoded as evaluation does."""
        device = self.precision.device
        x = from_uint8(self.originals).to(device, memory_format=torch.channels_last)
        with self.precision.autocast():
            z = tokenizer.encode(x).mode()
            y = tokenizer.decode(z, steps=tokenizer.config["fm_sampler"]["steps"], noise=self.noise.to(device))
        return grid(torch.cat([self.originals, to_uint8(y).cpu()]), columns=len(self.originals), scale=self.scale)
