"""The tokenizers that are measured: ours and diffusers' autoencoders, with random weights.

Speed depends on weights only where they are zero: parameters that training initialises to zero are drawn like the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.settings import DTYPES
from ssdd import SSDD
from ssdd.engine.errors import UserError

OURS = "SSDD-"
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
PEERS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {  # of Stable Diffusion
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    "AutoencoderDC": {  # dc-ae-f32c32-sana-1.0
        "encoder_block_types": _DC_BLOCKS,
        "decoder_block_types": _DC_BLOCKS,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
    },
    "AutoencoderTiny": {},  # TAESD
}
"""Class of diffusers -> its options; others are the class's defaults."""
LATENTS = {"AutoencoderKL": (8, 4), "AutoencoderDC": (32, 32), "AutoencoderTiny": (8, 4)}
"""Stride and channels of their latents."""


def fill_zeros(network: nn.Module) -> None:
    """Draw parameters that are all zero from N(0, 0.02^2)."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def build(name: str, encoder: str, dtype: str, channels_last: bool, device: torch.device) -> tuple[nn.Module, int, int]:
    """The network, and stride and channels of its latents. name: SSDD-<decoder size> or a peer.

    channels_last is for the peers; our networks choose their own layout.
    """
    torch.manual_seed(0)
    diffusers = import_diffusers(required=name in PEERS)
    if name in PEERS:
        diffusers.logging.set_verbosity_error()  # it warns of every change of type
        network = getattr(diffusers, name)(**PEERS[name])
        stride, channels = LATENTS[name]
        if channels_last:
            network.to(memory_format=torch.channels_last)
    else:
        network = SSDD(encoder, name.removeprefix(OURS))
        stride, channels = network.f, network.z_dim
    fill_zeros(network)
    return network.eval().to(device, DTYPES[dtype]), stride, channels


def import_diffusers(required: bool) -> ModuleType | None:
    """For our networks, too, where it is installed: what the import takes is part of every peak of memory.

    UserError where it is required and missing.
    """
    try:
        import diffusers
    except ImportError:
        if required:
            raise UserError("the peers come from diffusers, which is not installed: pip install diffusers") from None
        return None
    return diffusers


def compile_network(network: nn.Module) -> None:
    """torch.compile both halves in place, for fixed shapes."""
    if isinstance(network, SSDD):
        network.compile()
    else:
        network.encoder.compile(dynamic=False)
        network.decoder.compile(dynamic=False)


def decoding(network: nn.Module, steps: int, noise: Tensor, channels_last: bool) -> Callable[[Tensor], Tensor]:
    """Latents [B, c, h, w] -> images; ours starts from the first rows of `noise`."""
    if isinstance(network, SSDD):
        return lambda z: network.decode(z, steps=steps, noise=noise[: len(z)])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.no_grad()(lambda z: network.decode(z.contiguous(memory_format=layout)).sample)


def encoding(network: nn.Module, channels_last: bool) -> Callable[[Tensor], Any]:
    """Images [B, 3, H, W] -> what the network makes of them: a posterior, or the latents themselves."""
    layout = torch.channels_last if channels_last and not isinstance(network, SSDD) else torch.contiguous_format
    return torch.no_grad()(lambda x: network.encode(x.contiguous(memory_format=layout)))


def parameter_count(network: nn.Module) -> int:
    """Numbers in all parameters."""
    return sum(p.numel() for p in network.parameters())
