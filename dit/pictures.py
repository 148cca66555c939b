"""Pictures of a generator in training: samples of the same classes from the same noise, decoded with a tokenizer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from dit.config import DiTConfig
from dit.model import DiT
from dit.sample import draw
from latent_cache import LatentDataset
from latent_cache.manifest import STATISTICS
from ssdd.engine.noise import indexed_noise
from ssdd.engine.pictures import grid, to_uint8
from ssdd.latent import LatentNorm
from ssdd.tokenizer import SSDD

SAMPLES, COLUMNS = 16, 8
SMALLEST_SIDE = 64  # images below this size are enlarged


class SamplePicture:
    """Sixteen samples with the settings of `sampling`, of classes spread over all there are.

    UserError when the encoder of `training.tokenizer` is not the one that the cache was made with.
    """

    def __init__(self, cfg: DiTConfig, cache: LatentDataset, accelerator: Accelerator):
        tokenizer = SSDD.from_pretrained(cfg.training.tokenizer, cfg.ckpt_dir)
        self.norm = LatentNorm.load(cache.path / STATISTICS, tokenizer.encoder_fingerprint())
        self.tokenizer = tokenizer.to(accelerator.device).eval().requires_grad_(False)
        self.accelerator = accelerator
        guided = cfg.model.class_dropout > 0
        self.sampling = cfg.sampling if guided else replace(cfg.sampling, cfg_scale=1.0)
        classes, indices = cache.num_classes, range(SAMPLES)
        self.labels = torch.tensor([i * classes // SAMPLES if classes >= SAMPLES else i % classes for i in indices])
        _, height, width = cache.latent_shape
        shape = (3, height * tokenizer.f, width * tokenizer.f)
        self.noise = indexed_noise(indices, shape, cfg.sampling.seed, "decoder")

    @torch.no_grad()
    def draw(self, model: DiT) -> np.ndarray:
        """uint8 [H, W, 3]: the samples, row by row."""
        device, steps = self.accelerator.device, self.tokenizer.config["fm_sampler"]["steps"]
        with self.accelerator.autocast():
            z_n = draw(model, range(SAMPLES), self.labels, self.sampling)
            z = self.norm.denormalise(z_n.to(device))
            images = to_uint8(self.tokenizer.decode(z, steps=steps, noise=self.noise.to(device)))
        return grid(images, columns=COLUMNS, scale=max(1, SMALLEST_SIDE // images.shape[-1]))
