"""Task `z_stats`: mean and deviation of the latents of the training split, which generators are normalised with."""

from __future__ import annotations

from typing import Any

import torch

from ssdd.config import SSDDConfig
from ssdd.engine.devices import choose_kernels
from ssdd.engine.errors import UserError
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.run import RunDirectory
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.images.sources import open_source
from ssdd.model.channel_statistics import ChannelStatistics
from ssdd.tasks.build import build_encoder


@torch.no_grad()
def run(cfg: SSDDConfig) -> dict[str, Any]:
    """Statistics of posterior means at the test-time crop, float64, population deviation.

    Writes z_stats.json (per channel and scalar, with the encoder's fingerprint) and task_result.json {z_mean, z_std}.
    One process: the parts are merged in the order of the images.
    """
    processes = Processes.join()
    if processes.world > 1:
        raise UserError("task=z_stats runs in one process: accelerate launch --num_processes 1 ssdd/main.py ...")
    choose_kernels(tf32=False)
    precision = Precision.float32(processes.device)
    tokenizer = build_encoder(cfg).to(processes.device).eval()
    dataset = ImageDataset(open_source(cfg.dataset, "train"), cfg.dataset, train=False)
    parts = []
    for pixels, _, _ in eval_batches(dataset, cfg.evaluation.batch_size, workers=cfg.dataset.reading_processes):
        with precision.autocast():
            z = tokenizer.encode(from_uint8(pixels).to(processes.device)).mode()  # [B, c, h, w]
        parts.append(ChannelStatistics.of(z.float().cpu().numpy()))
    norm = ChannelStatistics.merged(parts).norm(tokenizer.encoder_fingerprint())
    directory = RunDirectory(cfg.ckpt_dir, cfg.run_name)
    directory.save_config(cfg)
    norm.save(directory.path / "z_stats.json")
    result = {"z_mean": norm.z_mean, "z_std": norm.z_std, "precision": precision.record()}
    directory.write_result(result)
    print(f"z_mean {norm.z_mean:.5f}  z_std {norm.z_std:.5f}  ({norm.count} images)")
    return result
