"""Samples of a generator in training, decoded with a tokenizer, and pictures of them: always the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dit.config import DiTConfig
from dit.model import DiT
from dit.tasks.build import Cache
from dit.tasks.sample import check_sampling, draw
from ssdd.engine.precision import Precision
from ssdd.engine.random import indexed_noise
from ssdd.images.pixels import grid, to_uint8
from ssdd.model.tokenizer import SSDD

SAMPLES, COLUMNS = 16, 8
SMALLEST_SIDE = 64  # images below this size are enlarged


class SampleDecoder:
    """Images of samples drawn as `sampling` describes, but without its `guide`, decoded with `training.tokenizer`.

    UserError when the encoder of the tokenizer is not the one that the cache was made with, or for numbers in
    `sampling` that no sampler can work with.
    """

    def __init__(self, cfg: DiTConfig, cache: Cache, precision: Precision):
        check_sampling(cfg.sampling)
        tokenizer = SSDD.from_pretrained(cfg.training.tokenizer, cfg.ckpt_dir)
        cache.norm.check_encoder(tokenizer.encoder_fingerprint(), cfg.cache)
        self.tokenizer = tokenizer.to(precision.device).eval().requires_grad_(False)
        self.norm, self.num_classes, self.precision = cache.norm, cache.num_classes, precision
        cfg_scale = cfg.sampling.cfg_scale if cfg.model.class_dropout > 0 else 1.0
        self.sampling = replace(cfg.sampling, cfg_scale=cfg_scale, guide=None, guide_scale=1.0)
        _, height, width = cache.latent_shape
        self.shape = (3, height * tokenizer.f, width * tokenizer.f)

    @torch.no_grad()
    def images(self, model: DiT, indices: Sequence[int], labels: Tensor) -> Tensor:
        """Samples `indices` of the classes `labels` [n], a function of weights and index: uint8 [n, 3, H, W]."""
        device, steps = self.precision.device, self.tokenizer.config["fm_sampler"]["steps"]
        noise = indexed_noise(indices, self.shape, self.sampling.seed, "decoder")
        with self.precision.autocast():
            z = self.norm.denormalise(draw(model, indices, labels, self.sampling).to(device))
            return to_uint8(self.tokenizer.decode(z, steps=steps, noise=noise.to(device)))


class SamplePicture:
    """Sixteen samples, of classes spread over all there are."""

    def __init__(self, samples: SampleDecoder):
        self.samples = samples
        classes, indices = samples.num_classes, range(SAMPLES)
        self.labels = torch.tensor([i * classes // SAMPLES if classes >= SAMPLES else i % classes for i in indices])

    def draw(self, model: DiT) -> np.ndarray:
        """uint8 [H, W, 3]: the samples, row by row."""
        images = self.samples.images(model, range(SAMPLES), self.labels)
        return grid(images, columns=COLUMNS, scale=max(1, SMALLEST_SIDE // images.shape[-1]))
