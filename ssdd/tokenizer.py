"""SSDD, the image tokenizer: a KL encoder and a diffusion decoder that reconstructs in one or several steps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ssdd.decoder import DECODER_SIZES, DECODER_STRIDE, UViTDecoder
from ssdd.encoder import Encoder, parse_encoder_name
from ssdd.engine.checkpoint import resolve, save_tensors
from ssdd.engine.errors import UserError
from ssdd.flow import euler, time_grid
from ssdd.latent import DiagonalGaussian

WEIGHTS_NAME = "model.safetensors"
METADATA_KEY = "ssdd"
"""Every weights file of ours carries the JSON of `SSDD.config` under this key of its safetensors metadata."""


class SSDD(nn.Module):
    """Image tokenizer with a KL encoder and a U-ViT flow-matching decoder (arXiv 2510.04961).

    encoder: "f8c4" (stride 8, 4 channels), f4..f64 with any channel count, or {"name": "f8c4", "width": 64}.
    decoder: a size of `ssdd.decoder.DECODER_SIZES`.
    checkpoint: run name, `run@best`, folder or .safetensors file with both networks; `encoder_checkpoint` the same,
        of which only the encoder is read.
    encoder_train: leave the encoder trainable; otherwise it is frozen. posterior_std: deviation of z that an encoder
        to be trained from scratch starts with.
    fm_sampler: defaults of `decode`, {"steps": 8, "t_pow_shift": 2.0}.
    ckpt_dir: where run names are looked up.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any] = "f8c4",
        decoder: str = "M",
        checkpoint: str | Path | None = None,
        encoder_checkpoint: str | Path | None = None,
        encoder_train: bool = False,
        posterior_std: float = 1.0,
        fm_sampler: Mapping[str, Any] | None = None,
        ckpt_dir: str | Path = "runs",
    ):
        super().__init__()
        encoder = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
        sampler = {"steps": 8, "t_pow_shift": 2.0} | dict(fm_sampler or {})
        if decoder not in DECODER_SIZES:
            raise UserError(f"decoder size {decoder!r} is unknown; the sizes are {', '.join(DECODER_SIZES)}")
        try:
            self.f, self.z_dim = parse_encoder_name(encoder["name"])
        except ValueError as error:
            raise UserError(str(error)) from None
        width = encoder.get("width", 128)
        self.config = {
            "encoder": {"name": encoder["name"], "width": width},
            "decoder": decoder,
            "fm_sampler": sampler,
        }
        self.side_multiple = math.lcm(self.f, DECODER_STRIDE)
        self.encoder = Encoder(self.f, self.z_dim, width)
        self.decoder = UViTDecoder(decoder, self.z_dim)
        if encoder_train:
            self.encoder.initialise(posterior_std)
        self.encoder.requires_grad_(encoder_train)
        if checkpoint is not None:
            path = resolve(str(checkpoint), ckpt_dir)
            load_weights(self, read_weights(path)[0], path)
        if encoder_checkpoint is not None:
            path = resolve(str(encoder_checkpoint), ckpt_dir)
            weights = {
                k.removeprefix("encoder."): v for k, v in read_weights(path)[0].items() if k.startswith("encoder.")
            }
            load_weights(self.encoder, weights, path)
        self.to(memory_format=torch.channels_last)

    def compile(self, **options: object) -> None:
        """torch.compile the encoder and the decoder's velocity, in place; the state dict stays the same."""
        self.encoder.compile(**options)
        self.decoder.velocity = torch.compile(self.decoder.velocity, **options)

    def check_image_size(self, height: int, width: int) -> None:
        """UserError unless images of these sides can be encoded and decoded: multiples of 8 and of the stride f."""
        if height % self.side_multiple or width % self.side_multiple:
            raise UserError(f"image sides must be multiples of {self.side_multiple}, got {height}x{width}")

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Image [B, 3, H, W] in [-1, 1] -> posterior over z [B, c, H/f, W/f]. ValueError unless f divides H and W."""
        if x.shape[-2] % self.f or x.shape[-1] % self.f:
            raise ValueError(f"image sides must be multiples of {self.f}, got {x.shape[-2]}x{x.shape[-1]}")
        x = x.to(self.encoder.conv_in.weight.dtype, memory_format=torch.channels_last)
        return DiagonalGaussian(self.encoder(x).float())

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        steps: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        x0_clamp: bool = False,
    ) -> Tensor:
        """Latent [B, c, h, w] -> image [B, 3, h f, w f], float32, about [-1, 1].

        Starts from `noise` (of the image's shape), else from noise drawn with `generator`; the result is a function of
        z and that noise. `steps` defaults to fm_sampler's; `x0_clamp` clamps the result to [-1, 1].
        """
        steps = self.config["fm_sampler"]["steps"] if steps is None else steps
        height, width = z.shape[-2] * self.f, z.shape[-1] * self.f
        if noise is None:
            device = generator.device if generator is not None else z.device
            noise = torch.randn(z.shape[0], 3, height, width, generator=generator, device=device)
        noise = noise.to(z.device, torch.float32, memory_format=torch.channels_last)
        condition = self.decoder.condition(z, height, width)
        grid = time_grid(steps, self.config["fm_sampler"]["t_pow_shift"])
        x = euler(lambda x_t, t: self.decoder.velocity(x_t, t, condition), noise, grid)
        return x.clamp(-1, 1) if x0_clamp else x

    def encoder_fingerprint(self) -> str:
        """sha256 of the encoder's weights: latents and their statistics belong to exactly one of these."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata that every safetensors file with these weights carries."""
        return {METADATA_KEY: json.dumps(self.config, sort_keys=True)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write folder/model.safetensors, weights and configuration in one file (atomically)."""
        save_tensors(Path(folder) / WEIGHTS_NAME, self.state_dict(), self.metadata)

    @classmethod
    def from_pretrained(cls, reference: str | Path, ckpt_dir: str | Path = "runs", **overrides: Any) -> SSDD:
        """From a folder, a .safetensors file or a run name whose file carries its configuration.

        Keyword arguments replace entries of that configuration. A file without one (an official SSDD file) needs
        `encoder` and `decoder`.
        """
        path = resolve(str(reference), ckpt_dir)
        weights, metadata = read_weights(path)
        config = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else {}
        if not config and not {"encoder", "decoder"} <= set(overrides):
            raise UserError(
                f"{path} does not say which networks it holds: pass encoder= and decoder= (such as f8c4 and M)"
            )
        model = cls(**config | overrides)
        load_weights(model, weights, path)
        return model


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file. UserError if it cannot be read whole."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from None


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Strict load: on any difference in names or shapes nothing is loaded and one UserError says what differs."""
    expected = module.state_dict()
    problems = [f"lacks {key}" for key in expected if key not in weights]
    problems += [f"has {key}, which this network does not" for key in weights if key not in expected]
    problems += [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more differences)" if len(problems) > 5 else ""
        raise UserError(f"{source} does not fit this network: it {'; '.join(problems[:5])}{more}")
    module.load_state_dict(dict(weights))
