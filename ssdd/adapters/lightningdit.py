"""SSDD with the methods that LightningDiT calls on its tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ssdd.adapters.decoder_noise import decoder_noise
from ssdd.engine.errors import UserError
from ssdd.model.tokenizer import SSDD

if TYPE_CHECKING:
    from PIL import Image

KEYS = {"checkpoint": None, "steps": 1, "noise_seed": 0, "img_size": 256}
"""Keys of the YAML file with their defaults."""


class LightningDiTTokenizer:
    """Raw latents in and out: LightningDiT normalises them itself, in its data set and before decoding.

    config: a YAML file with the key checkpoint (an SSDD reference) and, if wanted, steps (1), noise_seed (0) and
    img_size (256); or the reference itself, or an `SSDD`, which is frozen itself, not copied. The networks go to the
    GPU if there is one. img_size, steps: instead of the file's. UserError for other keys and references without
    weights.
    """

    def __init__(
        self,
        config: str | Path | SSDD,
        img_size: int | None = None,
        ckpt_dir: str | Path = "runs",
        steps: int | None = None,
    ):
        options = _read(Path(config)) if str(config).endswith((".yaml", ".yml")) else KEYS | {"checkpoint": config}
        checkpoint = options["checkpoint"]
        model = checkpoint if isinstance(checkpoint, SSDD) else SSDD.from_pretrained(checkpoint, ckpt_dir)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.img_size = options["img_size"] if img_size is None else img_size
        self.steps = options["steps"] if steps is None else steps
        self.noise_seed = options["noise_seed"]
        self.downsample_ratio, self.embed_dim = model.f, model.z_dim

    def img_transform(self, p_hflip: float = 0, img_size: int | None = None) -> Any:
        """torchvision transform of a PIL image: ADM centre crop, mirror with probability `p_hflip`, to [-1, 1]."""
        from torchvision import transforms

        return transforms.Compose(
            [
                CentreCrop(img_size or self.img_size),
                transforms.RandomHorizontalFlip(p_hflip),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], on any device -> sampled raw latents [B, C, H/f, W/f]."""
        return self.model.encode(images.to(self.device)).sample()

    @torch.no_grad()
    def decode_to_images(self, z: Tensor) -> np.ndarray:
        """Raw latents [B, C, h, w], on any device -> uint8 [B, h f, w f, 3]; the same noise for every image."""
        shape = (len(z), 3, z.shape[-2] * self.model.f, z.shape[-1] * self.model.f)
        noise = decoder_noise(shape, self.noise_seed)
        images = self.model.decode_uint8(z.to(self.device), steps=self.steps, noise=noise)
        return images.permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True)
class CentreCrop:
    """PIL image -> RGB, ADM centre crop to `size` pixels; a class, since data loader workers may have to pickle it."""

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        from ssdd.images.crops import adm_crop

        return adm_crop(image.convert("RGB"), self.size)


def _read(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not the YAML file of a tokenizer ({error})") from None
    if not isinstance(options, dict) or "checkpoint" not in options or set(options) - set(KEYS):
        raise UserError(f"{path}: expected checkpoint and perhaps {', '.join(list(KEYS)[1:])}; got {options}")
    return KEYS | options
