"""SSDD, the image tokenizer: a KL encoder and a diffusion decoder that reconstructs in one or several steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssdd.engine.checkpoint import resolve, save_tensors
from ssdd.engine.errors import UserError
from ssdd.images.pixels import to_uint8
from ssdd.model.decoder_families import parse_decoder
from ssdd.model.encoder import Encoder, parse_encoder_name
from ssdd.model.flow import Velocity, at_least_float32, euler, time_grid
from ssdd.model.foreign_encoders import SD_VAE, ForeignEncoder, adopt, encoder_fingerprint
from ssdd.model.latent import DiagonalGaussian
from ssdd.model.tiling import Tile, blend, tile_image, tile_with_halo
from ssdd.model.weight_files import encoder_weights, license_of, load_weights, options_of, read_weights

WEIGHTS_NAME = "model.safetensors"
HALF = (torch.float16, torch.bfloat16)
CONFIG_KEYS = ("encoder", "decoder", "fm_sampler")
METADATA_KEY = "ssdd"
"""Every weights file of ours carries the JSON of `SSDD.config` under this key of its safetensors metadata."""


class SSDD(nn.Module):
    """Image tokenizer with a KL encoder and a flow-matching decoder, by default a U-ViT (arXiv 2510.04961).

    encoder: "f8c4" (stride 8, 4 channels), f4..f64 with any channel count, or {"name": "f8c4", "width": 64}; "sdvae" or
        {"name": "diffusers", "path": FOLDER} for a frozen autoencoder (see `ssdd.model.foreign_encoders`); or a
        frozen module. Frozen encoders from elsewhere are neither parameters of the tokenizer nor part of its files.
    decoder: a size of the families in `ssdd.model.decoder_families`, or a mapping (see `parse_decoder` there); "kl" or
        {"size": "kl", "width": 128} is the deterministic decoder of a KL-VAE, as a baseline.
    checkpoint: run name, `run@best`, folder or weights file with both networks; `encoder_checkpoint` the same, or a
        KL-VAE under LDM's or diffusers' names, of which only the encoder is read.
    encoder_train: leave the encoder trainable; otherwise it is frozen. posterior_std: deviation of z that an encoder
        to be trained from scratch starts with.
    fm_sampler: defaults of `decode`, {"steps": 8, "t_pow_shift": 2.0}.
    ckpt_dir: where run names are looked up.

    UserError for unknown names and weights that do not fit.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | nn.Module = "f8c4",
        decoder: str | Mapping[str, Any] = "M",
        checkpoint: str | Path | None = None,
        encoder_checkpoint: str | Path | None = None,
        encoder_train: bool = False,
        posterior_std: float = 1.0,
        fm_sampler: Mapping[str, Any] | None = None,
        ckpt_dir: str | Path = "runs",
    ):
        super().__init__()
        network, described = _build_encoder(encoder)
        self.config = {
            "encoder": described,
            "decoder": decoder if isinstance(decoder, str) else dict(decoder),
            "fm_sampler": {"steps": 8, "t_pow_shift": 2.0} | dict(fm_sampler or {}),
        }
        self.f, self.z_dim = network.f, network.z_dim
        # In a tuple an encoder is not a submodule: files and optimizers leave it out.
        self._borrowed: tuple[nn.Module, ...] = ()
        if isinstance(network, Encoder):
            self.encoder = network  # a submodule
            if encoder_train:
                network.initialise(posterior_std)
            network.requires_grad_(encoder_train)
        elif encoder_train or encoder_checkpoint is not None:
            raise UserError(f"the encoder {described} comes with its weights and stays frozen")
        else:
            self._borrowed = (network,)
        family, size = parse_decoder(decoder)
        self.decoder = family.build(size, self.f, self.z_dim)
        self.most_steps = family.most_steps
        """Steps that decoding can take at most: None for any number, 0 where it takes neither noise nor steps."""
        if self.most_steps == 1:
            self.config["fm_sampler"]["steps"] = 1
        self.side_multiple = math.lcm(self.f, self.decoder.pixel_multiple)
        self.license: str | None = None
        """Of weights that were loaded; saved with what is trained from them."""
        self._rows: int | None = None
        self._tiling: tuple[int, int] | None = None
        self._progress = False
        self._exact_fingerprint: str | None = None
        if checkpoint is not None:
            path = resolve(str(checkpoint), ckpt_dir)
            weights, metadata = read_weights(path)
            load_weights(self, weights, path)
            self.license = license_of(weights, metadata, METADATA_KEY in metadata)
        if encoder_checkpoint is not None:
            path = resolve(str(encoder_checkpoint), ckpt_dir)
            weights, metadata = read_weights(path)
            load_weights(self.encoder, encoder_weights(weights, path), path)
            self.license = self.license or license_of(weights, metadata, METADATA_KEY in metadata)
        self.to(memory_format=torch.channels_last)

    @property
    def encoder(self) -> nn.Module:
        """Images to the parameters of the posterior."""
        return self._borrowed[0] if self._borrowed else self._modules["encoder"]

    @property
    def deterministic(self) -> bool:
        """Whether decoding takes neither noise nor steps."""
        return self.most_steps == 0

    def compile(self, **options: object) -> None:
        """torch.compile encoder and decoder in place; the state dict stays the same, copies are not compiled.

        Every image and batch size gets kernels of its own, which is faster than sizes kept symbolic, to compile as well
        as to run; `dynamic=None` leaves that to torch.
        """
        options = {"dynamic": False} | options
        self.encoder.compile(**options)
        self.decoder.compile(**options)

    def check_image_size(self, height: int, width: int) -> None:
        """UserError unless images of these sides can be encoded and decoded: multiples of 8 and of the stride f."""
        if height % self.side_multiple or width % self.side_multiple:
            raise UserError(f"image sides must be multiples of {self.side_multiple}, got {height}x{width}")

    def enable_slicing(self, rows: int | None = 1) -> None:
        """Encode and decode this many images at once, to save memory; None: the whole batch."""
        self._rows = rows

    def enable_tiling(self, tile: int | None = 512, overlap: int = 128, progress: bool = False) -> None:
        """Decode images with a side above `tile` pixels in tiles, which bounds the memory; None: whole.

        A decoder with a finite halo (family F) decodes every tile with its halo: the result is the whole image's up to
        rounding, and `overlap` is not used. With others, tiles overlap and are blended; they see neither each other's
        group norm statistics nor tokens further than their edges, so results differ slightly from a whole decode.
        Where the output depends on the image within overlap / 4 pixels only, there is no difference. progress: show a
        bar. ValueError if `overlap` is not below `tile`.
        """
        self._tiling, self._progress = None if tile is None else (tile, overlap), progress
        if tile is not None:
            self._tiles(2 * tile, 2 * tile)  # raises what is wrong

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Image [B, 3, H, W] in [-1, 1] -> posterior over z [B, c, H/f, W/f]. ValueError unless f divides H and W."""
        if x.shape[-2] % self.f or x.shape[-1] % self.f:
            raise ValueError(f"image sides must be multiples of {self.f}, got {x.shape[-2]}x{x.shape[-1]}")
        dtype = next((p.dtype for p in self.encoder.parameters()), x.dtype)
        x = x.to(dtype, memory_format=torch.channels_last)
        return DiagonalGaussian(torch.cat([self.encoder(part).float() for part in x.split(self._rows or len(x))]))

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        steps: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        x0_clamp: bool = False,
    ) -> Tensor:
        """Latent [B, c, h, w] -> image [B, 3, h f, w f], float32 (float64 from such noise), about [-1, 1].

        Starts from `noise` (of the image's shape), else from noise drawn with `generator`; the result is a function of
        z and that noise. `steps` defaults to fm_sampler's; `x0_clamp` clamps the result to [-1, 1]. UserError for more
        steps than the decoder was made for.
        """
        steps = self.config["fm_sampler"]["steps"] if steps is None else steps
        height, width = z.shape[-2] * self.f, z.shape[-1] * self.f
        if self.deterministic:
            y = torch.cat([self._decode_deterministic(part, height, width) for part in z.split(self._rows or len(z))])
            return y.clamp(-1, 1) if x0_clamp else y
        if self.most_steps is not None and steps > self.most_steps:
            decoder = self.config["decoder"]
            raise UserError(f"{steps} steps: decoder {decoder} takes {self.most_steps}; set steps={self.most_steps}")
        if noise is None:
            device = generator.device if generator is not None else z.device
            noise = torch.randn(z.shape[0], 3, height, width, generator=generator, device=device)
        noise = at_least_float32(noise.to(z.device, memory_format=torch.channels_last))
        grid, rows = time_grid(steps, self.config["fm_sampler"]["t_pow_shift"]), self._rows or len(z)
        parts = zip(z.split(rows), noise.split(rows), strict=True)
        x = torch.cat([euler(self._velocity_of(z_part, height, width), part, grid) for z_part, part in parts])
        return x.clamp(-1, 1) if x0_clamp else x

    def decode_uint8(
        self,
        z: Tensor,
        steps: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`decode`, as pixels: uint8 [B, 3, h f, w f] on the device of z, clamped and rounded as everywhere here."""
        return to_uint8(self.decode(z, steps, noise, generator))

    def _velocity_of(self, z: Tensor, height: int, width: int) -> Velocity:
        """(x_t, t) -> v for a fixed z; what depends on z alone is done here, once, but for tiles: it is large."""
        tiles = self._tiles(height, width)
        if not tiles:
            condition = self.decoder.condition(z, height, width)
            return lambda x_t, t: self.decoder.velocity(x_t, t, condition)

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            def of_tile(tile: Tile) -> Tensor:
                condition = self.decoder.condition(self._latent_of(z, tile), *tile.weight.shape, whole=z)
                return self.decoder.velocity(x_t[..., tile.rows, tile.columns], t, condition)

            return blend(tiles, of_tile, x_t, self._progress)

        return velocity

    def _decode_deterministic(self, z: Tensor, height: int, width: int) -> Tensor:
        tiles = self._tiles(height, width)
        if not tiles:
            return self.decoder(z)
        like = torch.empty(len(z), 3, height, width, device=z.device)
        return blend(tiles, lambda tile: self.decoder(self._latent_of(z, tile)), like, self._progress)

    def _tiles(self, height: int, width: int) -> list[Tile]:
        """Empty where an image of this size is decoded whole."""
        if self._tiling is None or max(height, width) <= self._tiling[0]:
            return []
        tile, overlap = self._tiling
        if self.decoder.halo is not None:
            return tile_with_halo(height, width, tile, self.decoder.halo * self.f, self.side_multiple)
        return tile_image(height, width, tile, overlap, self.side_multiple)

    def _latent_of(self, z: Tensor, tile: Tile) -> Tensor:
        rows, columns = (slice(s.start // self.f, s.stop // self.f) for s in (tile.rows, tile.columns))
        return z[..., rows, columns]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SSDD:
        own = next(self.encoder.parameters(), None)
        exact = own is not None and own.dtype == torch.float32 and own.device.type != "meta"
        if exact and fn(torch.zeros(1)).dtype in HALF:
            self._exact_fingerprint = self.encoder_fingerprint()  # the last chance to see the weights as they are
        super()._apply(fn, recurse)
        for network in self._borrowed:  # a frozen encoder from elsewhere moves along
            network._apply(fn)
        return self

    def encoder_fingerprint(self) -> str:
        """sha256 of the encoder's weights: latents and their statistics belong to exactly one of these.

        A model that was cast to half precision keeps the fingerprint that it had before.
        """
        if self._exact_fingerprint and next(self.encoder.parameters()).dtype in HALF:
            return self._exact_fingerprint
        return encoder_fingerprint(self.encoder)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata that every safetensors file with these weights carries."""
        license = {} if self.license is None else {"license": self.license}
        return {METADATA_KEY: json.dumps(self.config, sort_keys=True), **license}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write folder/model.safetensors atomically: weights in the official layout, configuration as metadata."""
        save_tensors(Path(folder) / WEIGHTS_NAME, self.state_dict(), self.metadata)

    @classmethod
    def from_pretrained(
        cls, reference: str | Path, ckpt_dir: str | Path = "runs", strict: bool = True, **overrides: Any
    ) -> SSDD:
        """From a folder, a weights file or a run name; files of ours carry their configuration.

        Keyword arguments replace entries of that configuration, those of fm_sampler one by one. Without one, as in an
        official SSDD file, encoder and decoder are inferred from names and shapes. strict=False loads the tensors that
        fit and logs the rest.
        """
        if unknown := set(overrides) - set(CONFIG_KEYS) - {"encoder_train", "posterior_std"}:
            raise UserError(
                f"from_pretrained: {', '.join(sorted(unknown))}: unknown option of a tokenizer with weights"
            )
        path = resolve(str(reference), ckpt_dir)
        weights, metadata = read_weights(path)
        config = _stored_config(metadata, path) if METADATA_KEY in metadata else options_of(weights)
        sampler = {**config.get("fm_sampler", {}), **overrides.get("fm_sampler", {})}
        config |= overrides | {"fm_sampler": sampler}
        if not {"encoder", "decoder"} <= set(config):
            raise UserError(f"{path} records no architecture: pass encoder= and decoder=, such as f8c4 and M")
        model = cls(**config)
        load_weights(model, weights, path, strict)
        model.license = license_of(weights, metadata, METADATA_KEY in metadata)
        return model


def _stored_config(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The configuration that a file of ours carries, known keys only; a file may come from anywhere."""
    try:
        config = json.loads(metadata[METADATA_KEY])
        assert isinstance(config, dict)
    except (json.JSONDecodeError, AssertionError):
        raise UserError(f"{path}: its metadata {METADATA_KEY!r} is not the JSON object of a tokenizer") from None
    return {key: config[key] for key in CONFIG_KEYS if key in config}


def _build_encoder(encoder: str | Mapping[str, Any] | nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder, and its description in the tokenizer's config."""
    if isinstance(encoder, nn.Module):
        network = adopt(encoder)
        return network, {"name": "module", "f": network.f, "z_dim": network.z_dim}
    options = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
    name = options.pop("name", None)
    if name in ("sdvae", "diffusers"):
        described = {"name": "diffusers", "path": str(options.pop("path", SD_VAE))}
        network = ForeignEncoder.from_pretrained(described["path"])
    elif name == "module":
        raise UserError("the encoder was a module, which is not in the file: pass it again as encoder=")
    else:
        described = {"name": name, "width": options.pop("width", 128)}
        try:
            stride, channels = parse_encoder_name(str(name))
        except ValueError as error:
            raise UserError(str(error)) from None
        network = Encoder(stride, channels, described["width"])
    if options:
        raise UserError(f"encoder {encoder}: unknown keys {', '.join(options)}; expected name, width or path")
    return network, described
