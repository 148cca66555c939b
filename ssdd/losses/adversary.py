"""The optional adversary: a discriminator of one-step predictions that sees where on the trajectory they came from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class TimedGroupNorm(nn.Module):
    """Group norm (32 groups) whose scale and shift come from the time embedding."""

    def __init__(self, channels: int, temb_channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, affine=False)
        self.linear = nn.Linear(temb_channels, 2 * channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class Discriminator(nn.Module):
    """Probability [B] that images are real, given the noisy images x_t and the times t, as in SSDD's code.

    trajectory: look at x_t together with the image. layers: convolutions of stride 2, at 64, 128, 256, 512, ...
    channels. norm: "ada" (conditioned on t) or "group".
    """

    TIME_CHANNELS = 128

    def __init__(self, layers: int = 4, trajectory: bool = True, norm: str = "ada"):
        super().__init__()
        self.trajectory = trajectory
        time = self.TIME_CHANNELS
        self.time_embedding = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        widths = [min(64 * 2**i, 512) for i in range(layers)]
        channels, strides = [6 if trajectory else 3, *widths, widths[-1]], [2] * layers + [1]
        self.convolutions = nn.ModuleList(
            spectral_norm(nn.Conv2d(c_in, c_out, 4, stride, padding=1))
            for c_in, c_out, stride in zip(channels, channels[1:], strides, strict=False)
        )
        norms = [TimedGroupNorm(c, time) if norm == "ada" else nn.GroupNorm(32, c) for c in channels[1:]]
        self.norms = nn.ModuleList(norms)
        self.out = nn.Linear(channels[-1], 1)
        for convolution in self.convolutions:
            nn.init.normal_(convolution.parametrizations.weight.original, std=0.02)

    @torch.no_grad()
    def update_norms(self) -> None:
        """One power iteration of every spectral norm, then evaluation mode: the step's losses all see one network."""
        self.train()
        for convolution in self.convolutions:
            _ = convolution.weight  # computing it iterates
        self.eval()

    def logits(self, images: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """[B] before the sigmoid; images are clamped to [-1, 1]."""
        h = images.clamp(-1, 1)
        h = torch.cat([h, x_t], dim=1) if self.trajectory else h
        half = self.TIME_CHANNELS // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
        angles = t.float().reshape(-1, 1) * frequencies
        temb = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = convolution(h)
            h = F.leaky_relu(norm(h, temb) if isinstance(norm, TimedGroupNorm) else norm(h), 0.2)
        return self.out(h.mean(dim=(2, 3)))[:, 0].float()

    def forward(self, real: Tensor, fake: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The discriminator's own loss, a scalar: mean binary cross entropy of real images as 1 and fake ones as 0."""
        real_logits, fake_logits = self.logits(real, x_t, t), self.logits(fake.detach(), x_t, t)
        return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())

    def generator_loss(self, fake: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What the decoder minimises, a scalar: binary cross entropy of its images as real ones."""
        return F.softplus(-self.logits(fake, x_t, t)).mean()
