"""The training objectives of the tokenizer: SSDD's flow matching with image losses, REPA and KL, and baselines.

An objective is a module that holds the networks and maps (images, draws) to loss terms, so that wrappers for several
devices see one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssdd.engine.random import batch_generator
from ssdd.losses.image_losses import ImageLosses, Terms
from ssdd.losses.repa import RepaLoss
from ssdd.model.flow import interpolate, logit_normal_t, predict_data, velocity_target
from ssdd.model.tokenizer import SSDD


@dataclass(frozen=True)
class TokenizerDraws:
    """The random numbers of one training step, for the whole global batch of B images."""

    t: Tensor  # float32 [B] in [0, 1]
    eps: Tensor  # float32 [B, 3, H, W]
    z_eps: Tensor  # float32 [B, c, h, w], noise of the posterior sample
    level: Tensor  # float32 [B] in [0, 1), share of the largest latent noise in distillation

    def rows(self, part: slice) -> TokenizerDraws:
        return TokenizerDraws(self.t[part], self.eps[part], self.z_eps[part], self.level[part])


def step_draws(
    seed: int,
    step: int,
    image_shape: tuple[int, ...],
    latent_shape: tuple[int, ...],
    device: torch.device,
    t_mean: float = 0.0,
    t_std: float = 1.0,
) -> TokenizerDraws:
    """The draws of step `step` for images [B, 3, H, W] and latents [B, c, h, w]; a function of seed and step alone."""
    generator = batch_generator(device, seed, "ssdd.train", step)
    return TokenizerDraws(
        logit_normal_t(image_shape[0], generator, t_mean, t_std),
        torch.randn(image_shape, generator=generator, device=device),
        torch.randn(latent_shape, generator=generator, device=device),
        torch.rand(image_shape[0], generator=generator, device=device),
    )


class Predicted(NamedTuple):
    """An image that a decoder made in one step, without gradients, and from what: the discriminator is shown it."""

    image: Tensor  # [B, 3, H, W]
    x_t: Tensor  # [B, 3, H, W]
    t: Tensor  # a scalar or [B]


class Losses(NamedTuple):
    """What an objective makes of a batch."""

    terms: dict[str, Tensor]
    """Unweighted loss terms, float32 scalars."""
    predicted: Predicted


class TokenizerFlowObjective(nn.Module):
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

    def forward(self, x: Tensor, draws: TokenizerDraws, active: Terms = None) -> Losses:
        """The losses of images x [B, 3, H, W] in [-1, 1]."""
        with torch.set_grad_enabled(self.encoder_trains and torch.is_grad_enabled()):
            posterior = self.tokenizer.encode(x)
            z = posterior.sample(noise=draws.z_eps)
        t = torch.ones_like(draws.t) if self.direct else draws.t
        x_t = interpolate(x, draws.eps, t)
        v, tokens = velocity_and_tokens(self.tokenizer, x_t, t, z, None if self.repa is None else self.repa_block)
        terms = {"diffusion": (v - velocity_target(x, draws.eps)).square().mean()}
        prediction = predict_data(x_t, v, t)
        terms |= self.images(prediction, x, x_t, t, active)
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, x) if active is None or "repa" in active else self.repa.idle()
        if self.with_kl:
            terms["kl"] = posterior.kl().mean()
        return Losses(terms, Predicted(prediction.detach(), x_t, t))


class AutoencoderObjective(nn.Module):
    """The KL-VAE baseline: mean absolute error, image losses and KL of a deterministic decoder."""

    def __init__(self, tokenizer: SSDD, images: ImageLosses | None = None, with_kl: bool = True):
        super().__init__()
        self.tokenizer, self.images = tokenizer, images or ImageLosses()
        self.encoder_trains = any(p.requires_grad for p in tokenizer.encoder.parameters())
        self.with_kl = with_kl and self.encoder_trains
        self.terms = ["l1", *self.images.terms, *["kl"] * self.with_kl]

    def forward(self, x: Tensor, draws: TokenizerDraws, active: Terms = None) -> Losses:
        """The losses of images x [B, 3, H, W] in [-1, 1]; of the draws, only `z_eps` is used."""
        with torch.set_grad_enabled(self.encoder_trains and torch.is_grad_enabled()):
            posterior = self.tokenizer.encode(x)
            z = posterior.sample(noise=draws.z_eps)
        y, t = self.tokenizer.decoder(z), torch.zeros((), device=x.device)
        terms = {"l1": (y - x).abs().mean()} | self.images(y, x, x, t, active)
        if self.with_kl:
            terms["kl"] = posterior.kl().mean()
        return Losses(terms, Predicted(y.detach(), x, t))


def velocity_and_tokens(
    tokenizer: SSDD, x_t: Tensor, t: Tensor, z: Tensor, keep: int | None
) -> tuple[Tensor, Tensor | None]:
    """The decoder's velocity at x_t [B, 3, H, W], and its tokens after block number `keep`, if any."""
    decoder = tokenizer.decoder
    condition = decoder.condition(z, *x_t.shape[-2:])
    if keep is None:
        return decoder.velocity(x_t, t, condition), None
    return decoder.velocity_and_tokens(x_t, t, condition, keep)


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The loss: every term times its weight."""
    return sum(weights[name] * value for name, value in terms.items())
