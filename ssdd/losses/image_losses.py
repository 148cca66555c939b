"""The losses between a predicted image and its target: the table of all, and the module that computes some of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ssdd.fidelity.features import LITE0
from ssdd.losses.adversary import Discriminator
from ssdd.losses.perceptual import FeatureDistance, Lpips

Terms = Collection[str] | None
"""Names of the loss terms to compute, None for all; others cost nothing and are missing in the result."""


@dataclass
class FeaturesConfig:
    """The feature loss."""

    model: str = LITE0
    """timm network whose stages are compared."""


@dataclass(frozen=True)
class LossEntry:
    """An entry of `IMAGE_LOSSES`: losses.NAME is its weight, losses_start.NAME the step at which it starts."""

    build: Callable[[Any], nn.Module]
    """Options, or None -> a module of distances [B] between images and targets [B, 3, H, W], about [-1, 1].

    UserError where the pretrained weights that it needs are missing.
    """
    weight: float
    """Default of losses.NAME; 0 disables the loss."""
    title: str
    """What the help says of losses_start.NAME and aux_losses.NAME."""
    doc: str
    """What the help says of losses.NAME."""
    options: type | None = None
    """Dataclass of the options aux_losses.NAME."""
    network: str = ""
    """Pretrained network that it needs, if any, with {key} for one of its options: no judge of the same images."""


IMAGE_LOSSES = {
    "lpips": LossEntry(
        lambda _: Lpips("vgg"),
        weight=0.5,
        title="LPIPS",
        doc="LPIPS (VGG) between target and one-step prediction; needs VGG weights in the search path.",
        network="vgg16",
    ),
    "features": LossEntry(
        lambda options: FeatureDistance(options.model),
        weight=0.0,
        title="Features",
        doc="LPIPS's form on the timm network aux_losses.features.model.",
        options=FeaturesConfig,
        network="{model}",
    ),
}
"""Every image loss, in the order of their terms; one is added here alone."""


def build_losses(weights: Any, options: Any) -> dict[str, nn.Module]:
    """The losses whose weight is not 0; weights, options: the config groups losses and aux_losses."""
    return {
        name: loss.build(getattr(options, name, None)) for name, loss in IMAGE_LOSSES.items() if getattr(weights, name)
    }


def pretrained_networks(weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Networks of the losses in a run's config, given the groups losses and aux_losses as it records them."""
    return [
        loss.network.format(**options.get(name, {}))
        for name, loss in IMAGE_LOSSES.items()
        if loss.network and weights.get(name)
    ]


class ImageLosses(nn.Module):
    """Terms between a predicted image and its target: those of `losses`, and gan_disc with a discriminator.

    losses: name -> distances [B] of images and targets. The discriminator is trained elsewhere; its parameters need no
    gradients while this is used.
    """

    def __init__(self, losses: Mapping[str, nn.Module] | None = None, discriminator: Discriminator | None = None):
        super().__init__()
        self.losses = nn.ModuleDict(losses or {})
        self.adversarial = None if discriminator is None else discriminator.generator_loss
        self.terms = [*self.losses, *["gan_disc"] * (discriminator is not None)]

    def forward(
        self, prediction: Tensor, target: Tensor, x_t: Tensor, t: Tensor, active: Terms = None
    ) -> dict[str, Tensor]:
        """float32 scalars of images [B, 3, H, W], about [-1, 1]; t is a scalar or [B]."""
        active = self.terms if active is None else active
        terms = {name: loss(prediction, target).mean() for name, loss in self.losses.items() if name in active}
        if self.adversarial is not None and "gan_disc" in active:
            terms["gan_disc"] = self.adversarial(prediction, x_t, t)
        return terms
