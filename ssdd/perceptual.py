"""Perceptual distances: LPIPS (Zhang et al. 2018), and its form on networks that need no download."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssdd.engine.features import LITE0, TimmStages
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
        return self.distance(self.features(images), self.features(originals))

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of five layers, normalised over channels; for several comparisons with the same images."""
        return [_unit_channels(x) for x in self.network.net(self.network.scaling_layer(images.float()))]

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Distances [B] of two results of `features`."""
        heads = zip(a, b, self.network.lins, strict=True)
        with torch.autocast(a[0].device.type, enabled=False):  # the heads are convolutions, the distance is float32
            return sum(head((x - y).square()).mean(dim=(1, 2, 3)) for x, y, head in heads)

    def train(self, mode: bool = True) -> Lpips:
        """Stays in evaluation mode whatever a surrounding module does."""
        return super().train(False)


def _unit_channels(features: Tensor) -> Tensor:
    features = features.float()
    return features / torch.sqrt(features.square().sum(dim=1, keepdim=True) + EPS)


def _load_backbone(slices: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy torchvision's `features.<i>.{weight,bias}` into the package's slices, which keep the number i."""
    state = {key: weights[f"features.{key.split('.', 1)[1]}"] for key in slices.state_dict()}
    slices.load_state_dict(state)


class FeatureDistance(nn.Module):
    """LPIPS's form on the stages of any timm network, without learned heads; for machines without VGG.

    Squared difference of the channel-normalised maps of all stages, averaged over positions and stages: [0, 2].
    Images below 64 px are enlarged to 64. Weights: EfficientNet-Lite0 from its package, others from
    `<name>.safetensors` in the search path; UserError if they are missing.
    """

    def __init__(self, name: str = LITE0):
        super().__init__()
        weights = load_tensors(find("efficientnet_lite0" if name == LITE0 else f"timm/{name}"))
        self.network = TimmStages(name, weights).eval().requires_grad_(False)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W] in [-1, 1]."""
        return self.distance(self.features(images), self.features(originals))

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of all stages, normalised over channels; for several comparisons with the same images."""
        return [_unit_channels(x) for x in self.network(images)]

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Distances [B] of two results of `features`."""
        stages = [(x - y).square().sum(dim=1).mean(dim=(1, 2)) for x, y in zip(a, b, strict=True)]
        return sum(stages) / len(stages)

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in evaluation mode whatever a surrounding module does."""
        return super().train(False)
