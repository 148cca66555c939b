"""The training objectives of the tokenizer: SSDD's flow matching with image losses, REPA and KL, and baselines.

An objective is a module that holds the networks and maps (images, draws) to loss terms, so that wrappers for several
devices see one forward pass.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssdd.engine.random import batch_generator
from ssdd.losses.adversary import Discriminator
from ssdd.losses.repa import RepaLoss
from ssdd.model.flow import interpolate, logit_normal_t, predict_data, velocity_target
from ssdd.model.tokenizer import SSDD

Terms = Collection[str] | None
"""Names of the loss terms to compute, None for all; others cost nothing and are missing in the result."""


@dataclass
class Draws:
    """The random numbers of one training step, for the whole global batch of B images."""

    t: Tensor  # float32 [B] in [0, 1]
    eps: Tensor  # float32 [B, 3, H, W]
    z_eps: Tensor  # float32 [B, c, h, w], noise of the posterior sample
    level: Tensor  # float32 [B] in [0, 1), share of the largest latent noise in distillation

    def rows(self, part: slice) -> Draws:
        return Draws(self.t[part], self.eps[part], self.z_eps[part], self.level[part])


def step_draws(
    seed: int,
    step: int,
    image_shape: tuple[int, ...],
    latent_shape: tuple[int, ...],
    device: torch.device,
    t_mean: float = 0.0,
    t_std: float = 1.0,
) -> Draws:
    """The draws of step `step` for images [B, 3, H, W] and latents [B, c, h, w]; a function of seed and step alone."""
    generator = batch_generator(device, seed, "ssdd.train", step)
    return Draws(
        logit_normal_t(image_shape[0], generator, t_mean, t_std),
        torch.randn(image_shape, generator=generator, device=device),
        torch.randn(latent_shape, generator=generator, device=device),
        torch.rand(image_shape[0], generator=generator, device=device),
    )


class ImageLosses(nn.Module):
    """Terms between a predicted image and its target: lpips, features and gan_disc, each where its network is given.

    The discriminator is trained elsewhere and is not a submodule; its parameters need no gradients while this is used.
    """

    def __init__(
        self,
        lpips: nn.Module | None = None,
        features: nn.Module | None = None,
        discriminator: Discriminator | None = None,
    ):
        super().__init__()
        self.lpips, self.features = lpips, features
        object.__setattr__(self, "discriminator", discriminator)
        given = {"lpips": lpips, "features": features, "gan_disc": discriminator}
        self.terms = [name for name, network in given.items() if network is not None]
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None
        """Prediction, x_t and t of the last call, without gradients: what the discriminator is trained on."""

    def forward(
        self, prediction: Tensor, target: Tensor, x_t: Tensor, t: Tensor, active: Terms = None
    ) -> dict[str, Tensor]:
        """float32 scalars of images [B, 3, H, W], about [-1, 1]; t is a scalar or [B]."""
        terms, active = {}, self.terms if active is None else active
        if self.lpips is not None and "lpips" in active:
            terms["lpips"] = self.lpips(prediction, target).mean()
        if self.features is not None and "features" in active:
            terms["features"] = self.features(prediction, target).mean()
        if self.discriminator is not None and "gan_disc" in active:
            self.seen = prediction.detach(), x_t, t
            terms["gan_disc"] = self.discriminator.generator_loss(prediction, x_t, t)
        return terms


class FlowObjective(nn.Module):
    """Flow matching in pixel space given a sampled latent; trains the decoder, and the encoder unless it is frozen.

    direct: only at t = 1, where one step must reach the image: what distillation is compared with.
    repa: tokens after block `repa_block` are drawn towards its teacher's. with_kl: the KL of the posterior, if the
    encoder is trained. `terms` lists the names of what is computed.
    """

    def __init__(
        self,
        tokenizer: SSDD,
        images: ImageLosses | None = None,
        repa: RepaLoss | None = None,
        repa_block: int = 0,
        with_kl: bool = True,
        direct: bool = False,
    ):
        super().__init__()
        self.tokenizer, self.images, self.repa = tokenizer, images or ImageLosses(), repa
        self.repa_block, self.direct = repa_block, direct
        self.encoder_trains = any(p.requires_grad for p in tokenizer.encoder.parameters())
        self.with_kl = with_kl and self.encoder_trains
        self.terms = ["diffusion", *self.images.terms, *["repa"] * (repa is not None), *["kl"] * self.with_kl]

    def forward(self, x: Tensor, draws: Draws, active: Terms = None) -> dict[str, Tensor]:
        """Unweighted loss terms, float32 scalars, of images x [B, 3, H, W] in [-1, 1]."""
        with torch.set_grad_enabled(self.encoder_trains and torch.is_grad_enabled()):
            posterior = self.tokenizer.encode(x)
            z = posterior.sample(noise=draws.z_eps)
        t = torch.ones_like(draws.t) if self.direct else draws.t
        x_t = interpolate(x, draws.eps, t)
        v, tokens = velocity_and_tokens(self.tokenizer, x_t, t, z, None if self.repa is None else self.repa_block)
        terms = {"diffusion": (v - velocity_target(x, draws.eps)).square().mean()}
        terms |= self.images(predict_data(x_t, v, t), x, x_t, t, active)
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, x) if active is None or "repa" in active else self.repa.idle()
        if self.with_kl:
            terms["kl"] = posterior.kl().mean()
        return terms


class AutoencoderObjective(nn.Module):
    """The KL-VAE baseline: mean absolute error, image losses and KL of a deterministic decoder."""

    def __init__(self, tokenizer: SSDD, images: ImageLosses | None = None, with_kl: bool = True):
        super().__init__()
        self.tokenizer, self.images = tokenizer, images or ImageLosses()
        self.encoder_trains = any(p.requires_grad for p in tokenizer.encoder.parameters())
        self.with_kl = with_kl and self.encoder_trains
        self.terms = ["l1", *self.images.terms, *["kl"] * self.with_kl]

    def forward(self, x: Tensor, draws: Draws, active: Terms = None) -> dict[str, Tensor]:
        """Unweighted loss terms, float32 scalars, of images x [B, 3, H, W] in [-1, 1]; only `draws.z_eps` is used."""
        with torch.set_grad_enabled(self.encoder_trains and torch.is_grad_enabled()):
            posterior = self.tokenizer.encode(x)
            z = posterior.sample(noise=draws.z_eps)
        y = self.tokenizer.decoder(z)
        terms = {"l1": (y - x).abs().mean()} | self.images(y, x, x, torch.zeros((), device=x.device), active)
        if self.with_kl:
            terms["kl"] = posterior.kl().mean()
        return terms


def velocity_and_tokens(
    tokenizer: SSDD, x_t: Tensor, t: Tensor, z: Tensor, keep: int | None
) -> tuple[Tensor, Tensor | None]:
    """The decoder's velocity at x_t [B, 3, H, W], and its tokens after transformer block `keep`."""
    condition = tokenizer.decoder.condition(z, *x_t.shape[-2:])
    return tokenizer.decoder.velocity_and_tokens(x_t, t, condition, keep)


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The loss: every term times its weight."""
    return sum(weights[name] * value for name, value in terms.items())
