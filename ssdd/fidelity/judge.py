"""A small image classifier, trained in seconds on the real training images: a feature network used in no loss."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import write_atomic
from ssdd.engine.random import batch_generator, seed_of
from ssdd.images.pixels import from_uint8

FEATURE_DIM = 128
METADATA_KEY = "classifier"
SMALLEST_SIDE = 16


class SmallClassifier(nn.Module):
    """Four 3x3 convolutions and two linear layers, about 100 k parameters, for square images of 16 px and more."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = (3, 16, 32, 64, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if level == 1 else 2, padding=1)
            for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths[1:])
        self.penultimate = nn.Linear(4 * widths[-1], FEATURE_DIM)
        self.last = nn.Linear(FEATURE_DIM, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits float32 [n, num_classes] of uint8 RGB images [n, 3, s, s]."""
        return self.last(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Activations of the layer before the last, float32 [n, 128], of uint8 RGB images [n, 3, s, s]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images [n, 3, h, w], got {images.dtype} {tuple(images.shape)}")
        if min(images.shape[2:]) < SMALLEST_SIDE:
            raise UserError(f"the classifier needs images of {SMALLEST_SIDE} px or more, got {images.shape[2]} px")
        hidden = from_uint8(images)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = F.silu(norm(convolution(hidden)))
        quarters = [quarter for half in hidden.chunk(2, dim=2) for quarter in half.chunk(2, dim=3)]
        pooled = torch.cat([quarter.mean(dim=(2, 3)) for quarter in quarters], dim=1)  # [n, 4 * 64]
        return F.silu(self.penultimate(pooled))

    @torch.no_grad()
    def correct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether the most likely class of each uint8 image [n, 3, s, s] is its label (int64 [n]): bool [n], CPU."""
        device = self.last.weight.device
        return self(images.to(device)).argmax(dim=1).cpu() == labels.cpu()

    def accuracy(self, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
        """Share of uint8 images [n, 3, s, s] whose most likely class is their label (int64 [n])."""
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        return torch.cat([self.correct(x, y) for x, y in batches]).double().mean().item()

    def save(self, path: str | Path) -> None:
        """Write weights and configuration into one safetensors file."""
        config = json.dumps({"num_classes": self.num_classes})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(path, save(tensors, metadata={METADATA_KEY: config}))

    @classmethod
    def load(cls, path: str | Path) -> SmallClassifier:
        """Read a file written by `save`, in evaluation mode. UserError when it is missing or something else."""
        check_regular(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                config = json.loads((file.metadata() or {})[METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            classifier = _initialised(config["num_classes"], seed=0)
            classifier.load_state_dict(tensors)
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as problem:
            raise UserError(f"{path} holds no classifier of this project ({problem}): train one first") from problem
        return classifier.eval()


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, seed: int = 0, steps: int = 300, batch_size: int = 64
) -> SmallClassifier:
    """Train on uint8 RGB images [n, 3, s, s] and int64 labels [n], on their device; the result is in evaluation mode.

    AdamW with a linear decay; images are shifted by up to s / 16 pixels. Draws come from (seed, step) alone and leave
    the global random stream untouched.
    """
    classifier = _initialised(num_classes, seed).to(images.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
    reach = images.shape[-1] // 16
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        generator = batch_generator("cpu", seed, "classifier batch", step)
        rows = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)
        down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        batch = images[rows].roll((down, right), dims=(2, 3))
        loss = F.cross_entropy(classifier(batch), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return classifier.eval()


def _initialised(num_classes: int, seed: int) -> SmallClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "classifier init"))
        return SmallClassifier(num_classes)
