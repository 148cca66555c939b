"""Latents that every decoder decodes alike: drawn sample sets, and encoded held-out images with or without noise.

Decoder noise comes from one generator per sample index, so that figures depend on neither batch size nor processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dit.config import DiTConfig
from dit.evaluation.measured_sets import MadeImages, Measuring, Recipe
from dit.foreign_checkpoints import load_dit
from dit.tasks import sample
from ssdd.engine.checkpoint import resolve
from ssdd.engine.devices import synchronize
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, sha256_file
from ssdd.engine.precision import Precision
from ssdd.engine.random import indexed_noise
from ssdd.engine.resumable import Chunks
from ssdd.images.batches import read_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8, to_uint8
from ssdd.model.compared_decoders import Row
from ssdd.model.foreign_encoders import ForeignEncoder
from ssdd.model.latent import LatentNorm

Rows = Callable[[range], tuple[Tensor, Tensor]]
"""Sample indices -> normalised latents float32 [n, C, h, w], image indices int64 [n]."""


class SampleSet:
    """A folder that `task=sample` wrote. Latents are read from the file chunk by chunk.

    request: what they depend on, as of `HeldOutLatents`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.description = read_json(folder / "sample_set.json")
        self._file = folder / "latents.safetensors"
        if not self._file.is_file():
            raise UserError(f"{folder} holds no latents.safetensors: draw it again with task=sample")
        with safe_open(self._file, framework="pt") as file:
            self.shape = tuple(file.get_slice("z_n").get_shape())  # [n, C, h, w]
            self.labels = file.get_tensor("labels")
        self.request = sha256_file(self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, indices: range) -> tuple[Tensor, Tensor]:
        with safe_open(self._file, framework="pt") as file:
            return file.get_slice("z_n")[indices.start : indices.stop], torch.tensor(indices)

    def label_scheme(self) -> str:
        """How labels were chosen, in words."""
        counts = self.labels.unique(return_counts=True)[1]
        scheme = "balanced: index modulo classes" if self.description.get("balanced", True) else "random per sample"
        return f"{scheme}; {len(counts)} classes, {int(counts.min())} to {int(counts.max())} samples each"

    def samples_per_s(self) -> float | None:
        """How fast it was drawn, by all processes together; None for a set that does not record it."""
        file = self.folder / "speed.json"
        return read_json(file)["samples_per_s"] if file.is_file() else None

    def norm(self, row: Row) -> LatentNorm:
        """UserError when a decoder's encoder did not make the latents that the generator was trained on.

        Foreign generators on a KL-VAE bring no statistics: they draw in the VAE's own space (`ForeignEncoder`).
        """
        fingerprint = row.tokenizer.encoder_fingerprint()
        known = self.description.get("z_stats", "z_stats.json") is not None
        if not known and isinstance(row.tokenizer.encoder, ForeignEncoder):
            return LatentNorm.identity(row.tokenizer.z_dim, fingerprint)
        return LatentNorm.load(self.folder / "z_stats.json", fingerprint)


def open_samples(cfg: DiTConfig, rows: Sequence[Row]) -> SampleSet:
    """The set `samples`, or the one that the generator draws now, or drew before, with the keys of `sampling`.

    UserError when a decoder does not fit the latents, before they are drawn.
    """
    if cfg.samples is not None:
        samples = SampleSet(Path(cfg.samples))
        _check_sizes(rows, samples.shape[1:], cfg.dataset.im_size)
        return samples
    weights = generator_of(cfg)
    _check_sizes(rows, sample.latent_shape(load_dit(weights, cfg.sampling.family)), cfg.dataset.im_size)
    if recorded := sample.trained_on(weights).get("z_stats"):
        norm = replace(LatentNorm.of(recorded["mean"], recorded["std"]), fingerprint=recorded["fingerprint"])
        for row in rows:
            norm.check_encoder(row.tokenizer.encoder_fingerprint(), weights)
    return SampleSet(sample.run(replace(cfg, out=None)))


def images_behind(cfg: DiTConfig) -> dict | None:
    """The record of the images in the cache that the generator was trained on; None for files without one."""
    if cfg.samples is not None:
        return read_json(Path(cfg.samples) / "sample_set.json").get("images")
    return sample.trained_on(generator_of(cfg)).get("images")


def generator_of(cfg: DiTConfig) -> Path:
    """Its weights. UserError when there are none."""
    return resolve(cfg.sampling.checkpoint or cfg.run_name, cfg.ckpt_dir)


def _check_sizes(rows: Sequence[Row], shape: Sequence[int], im_size: int) -> None:
    """UserError unless every decoder makes images of that side from latents of that shape [C, h, w]."""
    for row in rows:
        side = shape[-1] * row.tokenizer.f
        if side != im_size or row.tokenizer.z_dim != shape[0]:
            raise UserError(
                f"decoder {row.name} makes images of {side} px from latents {tuple(shape)}, the reference "
                f"has dataset.im_size={im_size}: give the size that the latents were cached at"
            )


class HeldOutLatents:
    """Normalised posterior means of held-out images, encoded once, chunk by chunk, in all processes."""

    def __init__(self, folder: Path, dataset: ImageDataset, row: Row, norm: LatentNorm, measuring: Measuring):
        self.dataset, self.tokenizer, self.norm, self.measuring = dataset, row.tokenizer, norm, measuring
        self.request = {
            "data": dataset.source.fingerprint(),
            "crop": dataset.cfg.crop,
            "im_size": dataset.cfg.im_size,
            "z_stats": norm.to_dict(),
            "batch_size": measuring.batch_size,
            "precision": measuring.precision.name,
            "count": len(dataset),
        }
        self.chunks = Chunks(folder, self.request, len(dataset), measuring.batch_size)

    def __len__(self) -> int:
        return len(self.dataset)

    @torch.no_grad()
    def encode(self) -> None:
        """Encode what is missing; returns when all is there."""
        processes = self.measuring.processes
        if processes.is_main:
            self.chunks.prepare()
        processes.wait()
        missing = list(self.chunks.missing(processes.rank, processes.world))
        keys = ([(0, index) for index in chunk] for chunk in missing)
        read = read_batches(self.dataset, keys, self.dataset.cfg.reading_processes)
        for chunk, (_, pixels, _, indices) in zip(missing, read, strict=True):
            began = time.perf_counter()
            x = from_uint8(pixels.to(processes.device))
            with self.measuring.precision.autocast():
                z_n = self.norm.normalise(self.tokenizer.encode(x).mode()).cpu()
            self.chunks.save(chunk, {"z_n": z_n, "indices": indices}, time.perf_counter() - began)
        processes.wait()

    def rows(self, indices: range) -> tuple[Tensor, Tensor]:
        tensors = self.chunks.load(indices)
        return tensors["z_n"], tensors["indices"]


def with_noise(rows: Rows, deviation: float, seed: int) -> Rows:
    """The same latents plus normal noise of `deviation` standard deviations of the latents."""

    def noisy(indices: range) -> tuple[Tensor, Tensor]:
        z_n, images = rows(indices)
        return z_n + deviation * indexed_noise(images, z_n.shape[1:], seed, "latent noise"), images

    return rows if deviation == 0 else noisy


def decoded(
    row: Row,
    norm: LatentNorm,
    latents: SampleSet | HeldOutLatents,
    seed: int,
    precision: Precision,
    noise: float | None = None,
) -> Recipe:
    """What a decoder makes of latents; only its own time is counted. noise: as of `with_noise`, None for none."""
    rows = latents.rows if noise is None else with_noise(latents.rows, noise, seed)

    @torch.no_grad()
    def make(indices: range) -> MadeImages:
        z_n, images = rows(indices)
        device = precision.device
        z = norm.denormalise(z_n.to(device))
        shape = (3, z.shape[-2] * row.tokenizer.f, z.shape[-1] * row.tokenizer.f)
        start = None if row.tokenizer.deterministic else indexed_noise(images, shape, seed, "decoder").to(device)
        synchronize(device)
        began = time.perf_counter()
        with precision.autocast():
            pixels = to_uint8(row.tokenizer.decode(z, steps=row.steps, noise=start))
        synchronize(device)
        return MadeImages(pixels, images, time.perf_counter() - began)

    request = {
        "decoder": row.provenance(),
        "z_stats": norm.to_dict(),
        "latents": latents.request if noise is None else {**latents.request, "noise": noise},
        "decoder_noise_seed": seed,
    }
    return Recipe(len(latents), request, make)
