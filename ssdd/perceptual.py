"""Perceptual distances: LPIPS (Zhang et al. 2018) and its form on a network that installs without a download."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ssdd.engine.features import EfficientNetLite0
from ssdd.engine.weights import find, load_tensors

EPS = 1e-8
"""Under the root of the feature norm, as in the published SSDD training (the package's 1e-10 gives infinite slopes)."""


class Lpips(nn.Module):
    """LPIPS with VGG-16 (`net="vgg"`, for training) or AlexNet (`net="alex"`, for evaluation) features.

    The package `lpips` brings the architecture and its linear heads; the ImageNet weights come from torchvision's
    files. UserError when those are missing.
    """

    def __init__(self, net: str = "vgg"):
        super().__init__()
        backbone = load_tensors(find({"vgg": "vgg16", "alex": "alexnet"}[net]))
        from lpips import LPIPS

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's renamed argument
            network = LPIPS(net=net, pnet_rand=True, verbose=False)
        _load_backbone(network.net, backbone)
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W], about [-1, 1] and not clamped."""
        distance = 0.0
        features = zip(self._features(images), self._features(originals), self.network.lins, strict=True)
        for a, b, head in features:
            difference = (_unit_channels(a) - _unit_channels(b)).square()
            distance = distance + head(difference).mean(dim=(1, 2, 3))
        return distance

    def train(self, mode: bool = True) -> Lpips:
        """Stays in evaluation mode whatever a surrounding module does."""
        return super().train(False)

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network.net(self.network.scaling_layer(images.float()))


def _unit_channels(features: Tensor) -> Tensor:
    features = features.float()
    return features / torch.sqrt(features.square().sum(dim=1, keepdim=True) + EPS)


def _load_backbone(slices: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy torchvision's `features.<i>.{weight,bias}` into the package's slices, which keep the number i."""
    state = {key: weights[f"features.{key.split('.', 1)[1]}"] for key in slices.state_dict()}
    slices.load_state_dict(state)


class Lite0Distance(nn.Module):
    """LPIPS's form on EfficientNet-Lite0, for machines without its weights; an evaluation figure of its own name.

    Squared difference of the channel-normalised maps of five stages, averaged over positions and stages: [0, 2].
    """

    name = "lite0_distance"

    def __init__(self):
        super().__init__()
        self.network = EfficientNetLite0(load_tensors(find("efficientnet_lite0"))).eval().requires_grad_(False)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Distances [B] of uint8 images [B, 3, H, W]."""
        pairs = list(zip(self.network.stages(images), self.network.stages(originals), strict=True))
        return sum(
            (_unit_channels(a) - _unit_channels(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs
        ) / len(pairs)
