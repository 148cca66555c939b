"""Task `classifier`: train the small network whose penultimate layer judges image sets (features classifier:FILE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdd.config import SSDDConfig
from ssdd.engine.classifier import train_classifier
from ssdd.engine.images import ImageDataset, eval_batches, open_source
from ssdd.engine.pictures import to_uint8
from ssdd.engine.run import RunDirectory


def run(cfg: SSDDConfig) -> dict[str, Any]:
    """Train on the real training images for `training.steps` (300 when null); writes classifier.safetensors."""
    images, labels, classes = _split(cfg, "train")
    classifier = train_classifier(images, labels, classes, cfg.seed, cfg.training.steps or 300)
    held_out, held_out_labels, _ = _split(cfg, "val")
    directory = RunDirectory(cfg.ckpt_dir, cfg.run_name)
    classifier.save(directory.path / "classifier.safetensors")
    result = {
        "task": "classifier",
        "accuracy_train": classifier.accuracy(images, labels),
        "accuracy_val": classifier.accuracy(held_out, held_out_labels),
    }
    directory.write_result(result)
    print(f"accuracy {result['accuracy_val']:.4f} on {len(held_out)} held-out images")
    return result


def _split(cfg: SSDDConfig, split: str) -> tuple[Tensor, Tensor, int]:
    """All images of a split, uint8 [n, 3, s, s], their labels [n], and the number of classes."""
    dataset = ImageDataset(open_source(cfg.dataset, split), cfg.dataset, train=False)
    batches = [(to_uint8(x), y) for x, y, _ in eval_batches(dataset, 500, workers=cfg.dataset.workers)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels, len(dataset.source.class_names)
