"""Perceptual distances as losses and metrics: LPIPS (Zhang et al. 2018), also on other networks, and DreamSim."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssdd.engine.errors import UserError
from ssdd.engine.pretrained import find, has, load_tensors
from ssdd.fidelity.features import LITE0, TimmStages
from ssdd.images.pixels import PEAK, to_uint8, to_unit

DREAMSIM_HUB_FILES = ("facebookresearch_dino_main/hubconf.py", "checkpoints/dino_vitbase16_pretrain.pth")
"""What the package dreamsim has torch.hub fetch into its weights' folder, and run, where it is not there yet."""

EPS = 1e-8
"""Under the root of the feature norm, as in the published SSDD training (the package's 1e-10 gives infinite slopes)."""


class Lpips(nn.Module):
    """LPIPS with VGG-16 (`net="vgg"`, for training) or AlexNet (`net="alex"`, for evaluation) features.

    The package `lpips` brings the architecture and its linear heads; the ImageNet weights come from torchvision's
    files. UserError when those are missing. With `padded`, images get zeros to the right and below up to a power of
    two, as in the published evaluation, and 32 px at least, of which AlexNet leaves one position.
    """

    def __init__(self, net: str = "vgg", padded: bool = False):
        super().__init__()
        self.padded = padded
        backbone = load_tensors(find({"vgg": "vgg16", "alex": "alexnet"}[net]))
        from lpips import LPIPS

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's renamed argument
            network = LPIPS(net=net, pnet_rand=True, verbose=False)
        _load_backbone(network.net, backbone)
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W], about [-1, 1] and not clamped."""
        return self.distance(self.features(images), self.features(originals))

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of five layers, normalised over channels; for several comparisons with the same images."""
        if self.padded:
            height, width = (max(1 << (side - 1).bit_length(), 32) - side for side in images.shape[2:])
            images = F.pad(images, (0, width, 0, height))
        return [_unit_channels(x) for x in self.network.net(self.network.scaling_layer(images.float()))]

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Distances [B] of two results of `features`."""
        heads = zip(a, b, self.network.lins, strict=True)
        with torch.autocast(a[0].device.type, enabled=False):  # the heads are convolutions, the distance is float32
            return sum(head((x - y).square()).mean(dim=(1, 2, 3)) for x, y, head in heads)

    def train(self, mode: bool = True) -> Lpips:
        """Stays in evaluation mode regardless of the surrounding module."""
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
        """Stays in evaluation mode regardless of the surrounding module."""
        return super().train(False)


class DreamSim(nn.Module):
    """DreamSim (Fu et al. 2023), the ensemble that is the package's default.

    The package `dreamsim` brings architecture and distance; its weights come from the search path. UserError when
    either is missing. The package runs the code of facebookresearch/dino, through torch.hub, which would download it:
    that code must already be in the weights' folder. Images become 224 px by Pillow's antialiased bicubic on 8-bit
    pixels, as the package has it.
    """

    SIDE = 224

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        if importlib.util.find_spec("dreamsim") is None:
            raise UserError("the metric DreamSim needs its package: pip install dreamsim")
        folder, hub = _dreamsim_folder(), torch.hub.get_dir()
        from dreamsim import dreamsim

        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            network, _ = dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
        if torch.hub.get_dir() != hub:  # the package moves it to its own folder
            torch.hub.set_dir(hub)
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W] in [-1, 1]."""
        return self.distance(self.features(images), self.features(originals))

    def features(self, images: Tensor) -> Tensor:
        """The images as the package takes them: [B, 3, 224, 224] in [0, 1]."""
        x = to_uint8(images).float()
        for size in ((x.shape[2], self.SIDE), (self.SIDE, self.SIDE)):  # Pillow rounds and clips after each direction
            if tuple(x.shape[2:]) != size:
                x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
                x = x.round().clamp(0, PEAK)
        return to_unit(x)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of two results of `features`."""
        return self.network(a, b)

    def train(self, mode: bool = True) -> DreamSim:
        """Stays in evaluation mode regardless of the surrounding module."""
        return super().train(False)


def _dreamsim_folder() -> Path:
    """The weights of DreamSim with all that the package would download else. UserError when anything is missing."""
    folder = find("dreamsim")
    if lacking := [name for name in DREAMSIM_HUB_FILES if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} lacks {' and '.join(lacking)}, which the package dreamsim fetches from the network and runs: "
            "on a connected machine `python -c \"from dreamsim import dreamsim; dreamsim(device='cpu', "
            f"cache_dir='{folder.name}')\"`, run beside that folder, adds them to it"
        )
    return folder


def _dreamsim_is_here() -> bool:
    try:
        _dreamsim_folder()
    except UserError:
        return False
    return importlib.util.find_spec("dreamsim") is not None


@dataclass(frozen=True)
class PerceptualMetric:
    """An entry of `PERCEPTUAL_METRICS`: a distance, of which less is better."""

    build: Callable[[torch.device | str], nn.Module]
    """Device -> a module with `features` of images [B, 3, H, W] in [-1, 1], and `distance` [B] of two such features."""
    is_here: Callable[[], bool]
    """Whether the weights (and package) that it needs are on this machine."""
    label: str
    """Of its column in tables."""
    network: str
    """The pretrained network that it is measured with, by its name in `PRETRAINED`."""
    decimals: int = 4


PERCEPTUAL_METRICS = {
    "LPIPS": PerceptualMetric(lambda _: Lpips("alex", padded=True), lambda: has("alexnet"), "LPIPS", "alexnet"),
    "lite0_distance": PerceptualMetric(
        lambda _: FeatureDistance(), lambda: has("efficientnet_lite0"), "Lite0 distance", "efficientnet_lite0"
    ),
    "DreamSim": PerceptualMetric(DreamSim, _dreamsim_is_here, "DreamSim", "dreamsim"),
}
"""Every perceptual distance that an evaluation can measure; one is added here alone."""


def load_metrics(names: Sequence[str], device: torch.device | str) -> dict[str, nn.Module]:
    """The perceptual metrics among `names`; "auto" stands for all whose weights (and package) are on this machine.

    UserError for one that is named and missing.
    """
    return {
        name: metric.build(device).to(device)
        for name, metric in PERCEPTUAL_METRICS.items()
        if name in names or ("auto" in names and metric.is_here())
    }


def automatic_without_weights(names: Sequence[str]) -> list[str]:
    """Perceptual metrics of "auto" among `names` whose weights are not found."""
    if "auto" not in names:
        return []
    return [name for name, metric in PERCEPTUAL_METRICS.items() if name not in names and not metric.is_here()]
