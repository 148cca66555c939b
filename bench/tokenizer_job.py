"""One tokenizer at work, in the process that `bench/tokenizer.py` gives it: decoding, encoding, training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.networks import OURS, build, compile_network, decoding, encoding, fill_zeros, parameter_count
from bench.processes import Work
from bench.settings import DTYPES
from ssdd.config import SSDDConfig
from ssdd.engine.errors import UserError
from ssdd.engine.optim import build_optimizer, parameter_groups
from ssdd.engine.throughput import count_flop, count_forward_flop
from ssdd.losses.objective import step_draws
from ssdd.model.decoder_families import parse_decoder
from ssdd.model.encoder import parse_encoder_name
from ssdd.model.flow import interpolate, velocity_target

PLAIN = "plain-"
"""How the plain form of one of our decoders is called, as plain-S."""


@dataclass(frozen=True)
class TokenizerJob:
    """One network under one set of conditions."""

    network: str
    channels_last: bool
    task: str
    encoder: str
    side: int
    dtype: str
    compile: bool
    batch: int
    steps: int
    module: str = "tokenizer_job"

    @property
    def layout(self) -> str:
        """How the table names its memory format."""
        if self.network.startswith(OURS):
            return "own"
        return "channels_last" if self.channels_last else "contiguous"


def prepare(job: dict[str, Any], device: torch.device) -> Work:
    """The work of one job, in the process that measures it."""
    one = TokenizerJob(**job)
    return training(one, device) if one.task == "train" else inference(one, device)


def inference(job: TokenizerJob, device: torch.device) -> Work:
    """Decoding or encoding random tensors, noise given."""
    name = OURS + "XXS" if job.task == "encode" and job.network.startswith(OURS) else job.network
    network, stride, channels = build(name, job.encoder, job.dtype, job.channels_last, device)
    images = torch.randn(job.batch, 3, job.side, job.side, device=device)
    if job.task == "encode":
        given, run, half = images, encoding(network, job.channels_last), network.encoder
    else:
        grid = job.side // stride
        given = torch.randn(job.batch, channels, grid, grid, device=device)
        run, half = decoding(network, job.steps, images, job.channels_last), network.decoder
    given = given.to(DTYPES[job.dtype])
    flop = count_forward_flop(lambda: run(given[:1]))
    if job.compile:
        compile_network(network)
    return Work({job.task: lambda: run(given)}, parameter_count(half), flop)


def training(job: TokenizerJob, device: torch.device) -> Work:
    """A step of flow matching on the decoder alone, given latents; the optimizer is the trainer's."""
    torch.manual_seed(0)
    family, size = parse_decoder(job.network.removeprefix(OURS).removeprefix(PLAIN))
    stride, channels = parse_encoder_name(job.encoder)
    plain = job.network.startswith(PLAIN)
    decoder = plain_decoder()(size, channels) if plain else family.build(size, stride, channels)
    fill_zeros(decoder)
    layout = torch.channels_last if job.channels_last else torch.contiguous_format
    decoder = decoder.to(device, memory_format=layout)
    cfg = SSDDConfig().training
    groups = parameter_groups(dict(decoder.named_parameters()), decoder, cfg.weight_decay)
    optimizer = build_optimizer(cfg.optimizer, groups, cfg.lr, cfg.betas)
    shape = (job.batch, 3, job.side, job.side)
    latent = (job.batch, channels, job.side // stride, job.side // stride)
    x, z = torch.randn(shape, device=device).to(memory_format=layout), torch.randn(latent, device=device)
    draws = step_draws(0, 0, shape, latent, device)

    def loss(images: int) -> Tensor:
        eps = draws.eps[:images]
        x_t = interpolate(x[:images], eps, draws.t[:images])
        with torch.autocast(device.type, DTYPES[job.dtype], enabled=job.dtype != "float32"):
            v = decoder(x_t, draws.t[:images], z[:images])
        return (v - velocity_target(x[:images], eps)).square().mean()

    def step() -> None:
        loss(job.batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    flop = count_flop(lambda: loss(1), decoder.parameters())
    if job.compile:
        decoder.compile(dynamic=False)
    return Work({job.task: step}, parameter_count(decoder), flop)


def plain_decoder() -> type[torch.nn.Module]:
    """The plain form of our decoder, which tests compare it with. UserError outside of a checkout."""
    try:
        from tests.plain_decoder import PlainDecoder
    except ImportError:
        raise UserError(
            "task=train compares with tests/plain_decoder.py: run it in a checkout of the repository"
        ) from None
    return PlainDecoder
