"""SSDD shaped like diffusers' AutoencoderKL: DiT, SiT, REPA and diffusers code takes it after a one-line change.

That code multiplies latents by a constant, often the literal 0.18215, and expects unit variance from it. So the
public latent is p = (z - z_mean) / z_std / scaling_factor: normalisation is folded in on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ssdd.adapters.decoder_noise import Generators, decoder_noise
from ssdd.engine.checkpoint import SUFFIXES
from ssdd.engine.errors import UserError
from ssdd.model.latent import DiagonalGaussian, LatentNorm
from ssdd.model.tokenizer import SSDD

try:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError:
    from ssdd.adapters.diffusers_mixins import ConfigMixin, ModelMixin, apply_forward_hook, register_to_config

SD_SCALING_FACTOR = 0.18215
"""What DiT, SiT and REPA multiply latents by, written into their code."""


class NormalisedGaussian:
    """The posterior of public latents; every value is a fresh tensor [B, C, h, w] of `dtype`, free to be changed."""

    def __init__(self, raw: DiagonalGaussian, norm: LatentNorm, scaling_factor: float, dtype: torch.dtype):
        self._raw, self._norm, self._factor, self._dtype = raw, norm, scaling_factor, dtype

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self._public(self._raw.sample(generator))

    def mode(self) -> Tensor:
        return self._public(self._raw.mode())

    @property
    def mean(self) -> Tensor:
        return self.mode()

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self._logvar()).to(self._dtype)

    @property
    def var(self) -> Tensor:
        return torch.exp(self._logvar()).to(self._dtype)

    @property
    def logvar(self) -> Tensor:
        return self._logvar().to(self._dtype)

    @property
    def parameters(self) -> Tensor:
        """mean | log variance, [B, 2C, h, w]."""
        return torch.cat([self.mean, self.logvar], dim=1)

    def kl(self) -> Tensor:
        """KL to N(0, I) in nats, summed over c, h, w: float32 [B]."""
        logvar, mean = self._logvar(), self._norm.normalise(self._raw.mean) / self._factor
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)

    def _public(self, z: Tensor) -> Tensor:
        return (self._norm.normalise(z) / self._factor).to(self._dtype)

    def _logvar(self) -> Tensor:
        scale = self._norm.std.to(self._raw.logvar.device).view(-1, 1, 1) * self._factor
        return self._raw.logvar - 2 * scale.log()


class Output:
    """Named results as attributes, as items by name, and by position."""

    def __init__(self, **results: Any):
        vars(self).update(results)

    def __getitem__(self, key: str | int | slice) -> Any:
        return vars(self)[key] if isinstance(key, str) else tuple(vars(self).values())[key]


class AutoencoderSSDD(ModelMixin, ConfigMixin):
    """AutoencoderKL's interface on an SSDD tokenizer.

    encoder, decoder: as `SSDD` takes them, but for modules; checkpoint: weights for both, a reference as for `SSDD`.
    steps, t_pow_shift: the decoder's sampling; one step is for distilled decoders.
    z_mean, z_std: statistics of the raw latents, one number per channel; None for 0 and 1.
    scaling_factor: what calling code multiplies latents by.
    license: of the weights, where it is not known from `checkpoint`; kept in saved configs.
    noise_seed: noise of decodes without `noise` and `generator`, equal for all images (`ssdd.adapters.decoder_noise`).

    `config` has these and, as code for AutoencoderKL reads them: latent_channels, block_out_channels (only its length
    means something: the stride is 2 ** (length - 1)), latents_mean = 0 and latents_std = 1 (the public latents are
    normalised already), shift_factor = 0. UserError as `SSDD`, and for statistics that are not one number per channel.
    """

    config_name = "config.json"
    ignore_for_config = ["checkpoint"]

    @register_to_config
    def __init__(
        self,
        encoder: str | Mapping[str, Any] = "f8c4",
        decoder: str | Mapping[str, Any] = "M",
        steps: int = 1,
        t_pow_shift: float = 2.0,
        z_mean: list[float] | None = None,
        z_std: list[float] | None = None,
        scaling_factor: float = SD_SCALING_FACTOR,
        noise_seed: int = 0,
        license: str | None = None,
        checkpoint: str | None = None,
        # The rest follows from the networks: it is recorded so that a saved config can be read back.
        latent_channels: int | None = None,
        block_out_channels: list[int] | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        shift_factor: float = 0.0,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int | None = None,
        force_upcast: bool = False,
    ):
        super().__init__()
        sampler = {"steps": steps, "t_pow_shift": t_pow_shift}
        self.tokenizer = SSDD(encoder, decoder, checkpoint=checkpoint, fm_sampler=sampler)
        self.tokenizer.license = license or self.tokenizer.license
        channels, doublings = self.tokenizer.z_dim, self.tokenizer.f.bit_length() - 1
        z_mean = [0.0] * channels if z_mean is None else z_mean
        z_std = [1.0] * channels if z_std is None else z_std
        if not len(z_mean) == len(z_std) == channels or min(z_std) <= 0:
            raise UserError(f"z_mean={z_mean}, z_std={z_std}: expected {channels} numbers each, deviations above 0")
        self.norm = LatentNorm.of(z_mean, z_std)
        self.register_to_config(
            latent_channels=channels,
            block_out_channels=[128 * min(2**i, 4) for i in range(doublings + 1)],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            license=self.tokenizer.license,
        )

    @classmethod
    def from_ssdd(
        cls,
        model: SSDD | str | Path,
        z_stats: LatentNorm | str | Path | None = None,
        scalar: bool = False,
        steps: int = 1,
        scaling_factor: float = SD_SCALING_FACTOR,
        noise_seed: int = 0,
        ckpt_dir: str | Path = "runs",
    ) -> Self:
        """From a tokenizer or a reference to one, and its latent statistics (`z_stats.json`).

        scalar: one mean and deviation for all channels. The adapter has its own copy of the weights, on the device and
        in the dtype of the model's. UserError if the statistics are another encoder's.
        """
        model = model if isinstance(model, SSDD) else SSDD.from_pretrained(model, ckpt_dir)
        if isinstance(z_stats, str | Path):
            z_stats = LatentNorm.load(z_stats, model.encoder_fingerprint())
        elif z_stats is not None and z_stats.fingerprint:
            z_stats.check_encoder(model.encoder_fingerprint(), "z_stats")
        norm = z_stats or LatentNorm.identity(model.z_dim)
        norm = norm.scalar() if scalar else norm
        adapter = cls(
            encoder=model.config["encoder"],
            decoder=model.config["decoder"],
            steps=steps,
            t_pow_shift=model.config["fm_sampler"]["t_pow_shift"],
            z_mean=norm.mean.tolist(),
            z_std=norm.std.tolist(),
            scaling_factor=scaling_factor,
            noise_seed=noise_seed,
            license=model.license,
        )
        adapter.tokenizer.load_state_dict(model.state_dict())
        return adapter.eval().to(next(model.decoder.parameters()))

    @classmethod
    def from_pretrained(cls, reference: str | Path, **options: Any) -> Self:
        """A saved adapter (folder with config.json, or a name on the hub), else an SSDD reference for `from_ssdd`."""
        path, subfolder = Path(reference).expanduser(), options.get("subfolder") or ""
        on_hub = len(path.parts) == 2 and not path.parent.is_dir() and path.suffix not in SUFFIXES
        if not ((path / subfolder / cls.config_name).is_file() or on_hub):
            return cls.from_ssdd(reference, **options)
        loaded = super().from_pretrained(str(path), **options)
        if isinstance(loaded, cls):
            for tensor in (*loaded.parameters(), *loaded.buffers()):
                # diffusers leaves views of the file, whose odd addresses make matrix products round otherwise
                tensor.data = tensor.data.clone()
            loaded.tokenizer.to(memory_format=torch.channels_last)  # diffusers puts plain tensors into the modules
        return loaded

    @apply_forward_hook
    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> Output | tuple[NormalisedGaussian]:
        """Image [B, 3, H, W] in [-1, 1] -> `latent_dist`, the posterior of public latents [B, C, H/f, W/f]."""
        posterior = self.tokenizer.encode(x)
        latent_dist = NormalisedGaussian(posterior, self.norm, self.config.scaling_factor, self.dtype)
        return Output(latent_dist=latent_dist) if return_dict else (latent_dist,)

    @apply_forward_hook
    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: Generators | None = None,
        noise: Tensor | None = None,
        steps: int | None = None,
    ) -> Output | tuple[Tensor]:
        """Public latent [B, C, h, w] -> `sample` [B, 3, h f, w f], about [-1, 1], in the module's dtype."""
        raw = self.norm.denormalise(z.float() * self.config.scaling_factor)
        if noise is None:
            shape = (len(z), 3, z.shape[-2] * self.tokenizer.f, z.shape[-1] * self.tokenizer.f)
            noise = decoder_noise(shape, self.config.noise_seed, generator)
        steps = self.config.steps if steps is None else steps
        sample = self.tokenizer.decode(raw, steps=steps, noise=noise).to(self.dtype)
        return Output(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Output | tuple[Tensor]:
        """Encode and decode; `generator` draws the latent, if it is sampled, and the decoder's noise."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict, generator=generator)

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time."""
        self.tokenizer.enable_slicing(1)

    def disable_slicing(self) -> None:
        """Encode and decode the whole batch at once."""
        self.tokenizer.enable_slicing(None)

    def enable_tiling(self, tile: int | None = 512, overlap: int = 128) -> None:
        """Decode large images in tiles; see `SSDD.enable_tiling`."""
        self.tokenizer.enable_tiling(tile, overlap)

    def disable_tiling(self) -> None:
        """Decode images whole."""
        self.tokenizer.enable_tiling(None)
