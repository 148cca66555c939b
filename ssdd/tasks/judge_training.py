"""Task `classifier`: train the small network whose penultimate layer judges image sets (features classifier:FILE)."""

from __future__ import annotations

from typing import Any

from ssdd.config import SSDDConfig
from ssdd.engine.precision import Precision
from ssdd.engine.run import RunDirectory
from ssdd.fidelity.judge import train_classifier
from ssdd.images.batches import read_split


def run(cfg: SSDDConfig) -> dict[str, Any]:
    """Train on the real training images for `training.steps` (300 when null); writes classifier.safetensors."""
    images, labels, classes = read_split(cfg.dataset, "train")
    precision = Precision.float32(images.device)
    with precision.autocast():
        classifier = train_classifier(images, labels, classes, cfg.seed, cfg.training.steps or 300)
    held_out, held_out_labels, _ = read_split(cfg.dataset, "val")
    directory = RunDirectory(cfg.ckpt_dir, cfg.run_name)
    classifier.save(directory.path / "classifier.safetensors")
    result = {
        "task": "classifier",
        "accuracy_train": classifier.accuracy(images, labels),
        "accuracy_val": classifier.accuracy(held_out, held_out_labels),
        "precision": precision.record(),
    }
    directory.write_result(result)
    print(f"accuracy {result['accuracy_val']:.4f} on {len(held_out)} held-out images")
    return result
