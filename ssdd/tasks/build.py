"""The networks that a training config describes: tokenizer, objective with its losses, discriminator."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ssdd.config import SSDDConfig
from ssdd.engine.checkpoint import resolve
from ssdd.engine.errors import UserError
from ssdd.engine.precision import Precision
from ssdd.engine.throughput import count_flop
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.images.sources import open_source
from ssdd.losses.adversary import Discriminator
from ssdd.losses.distillation import DistillationObjective, DistilledLatent
from ssdd.losses.image_losses import ImageLosses, build_losses
from ssdd.losses.objective import AutoencoderObjective, TokenizerFlowObjective, step_draws
from ssdd.losses.repa import PatchTokens, RepaLoss
from ssdd.model.decoder_families import TOKEN_STRIDE, family_of
from ssdd.model.encoder import ENCODER_NAME
from ssdd.model.tokenizer import METADATA_KEY, SSDD
from ssdd.model.weight_files import encoder_weights, options_of, read_weights

IMAGES_FOR_DEVIATION = 256


def encoder_option(cfg: SSDDConfig) -> str | dict[str, Any]:
    """`ssdd.encoder` as the tokenizer takes it: a stride and channels, sdvae, or the folder of a diffusers VAE."""
    name = cfg.ssdd.encoder
    if "/" in name:
        return {"name": "diffusers", "path": name}
    return {"name": name, "width": cfg.ssdd.encoder_width} if ENCODER_NAME.fullmatch(name) else name


def foreign_encoder(option: str | dict[str, Any]) -> bool:
    """Whether an `encoder_option` is one that is not part of the tokenizer's own files."""
    return option == "sdvae" or (isinstance(option, dict) and option["name"] == "diffusers")


def build_tokenizer(cfg: SSDDConfig) -> SSDD:
    """The network that is trained: from `ssdd.checkpoint` where given, with its encoder frozen or not.

    Its file records for how many steps the decoder is trained: one in distillation and objective=direct. UserError if
    images of `dataset.im_size` do not fit it.
    """
    decoder, one_step = cfg.ssdd.decoder, cfg.distill_teacher or cfg.objective == "direct"
    if family_of(decoder).of_encoder_width:
        decoder = {"size": decoder, "width": cfg.ssdd.encoder_width}
    network = SSDD(
        encoder=encoder_option(cfg),
        decoder=decoder,
        checkpoint=cfg.ssdd.checkpoint,
        encoder_checkpoint=cfg.ssdd.encoder_checkpoint,
        encoder_train=cfg.ssdd.encoder_train and not cfg.distill_teacher,
        posterior_std=cfg.ssdd.posterior_std,
        fm_sampler=vars(cfg.ssdd.fm_sampler) | ({"steps": 1} if one_step else {}),
        ckpt_dir=cfg.ckpt_dir,
    )
    network.check_image_size(cfg.dataset.im_size, cfg.dataset.im_size)
    return network


def build_encoder(cfg: SSDDConfig) -> SSDD:
    """A tokenizer of which only the encoder counts: of `ssdd.encoder_checkpoint`, `ssdd.checkpoint`, or from elsewhere.

    The file may hold an encoder alone, under our names, LDM's or diffusers'. UserError if there is none.
    """
    option = encoder_option(cfg)
    if foreign_encoder(option):
        return SSDD(option, "XXS")
    reference = cfg.ssdd.encoder_checkpoint or cfg.ssdd.checkpoint
    if reference is None:
        raise UserError("task=z_stats needs ssdd.encoder_checkpoint=<run or file>")
    path = resolve(str(reference), cfg.ckpt_dir)
    weights, metadata = read_weights(path)
    if METADATA_KEY in metadata:
        return SSDD.from_pretrained(path)
    found = options_of(encoder_weights(weights, path)).get("encoder", option)
    return SSDD(found, "XXS", encoder_checkpoint=path)


def build_discriminator(cfg: SSDDConfig, precision: Precision) -> Discriminator | None:
    """The adversary, where `losses.gan_disc` asks for one. UserError if the images are too small for it."""
    if not cfg.losses.gan_disc:
        return None
    options = cfg.gan.discriminator
    if precision.name == "fp16":
        raise UserError(
            "losses.gan_disc needs training.mixed_precision=bf16 or no: one loss scale can't serve two losses"
        )
    if cfg.dataset.im_size < 2 ** (options.n_layers + 1):
        raise UserError(
            f"gan.discriminator.n_layers={options.n_layers} needs images of {2 ** (options.n_layers + 1)} px or more"
        )
    takes_noise = family_of(cfg.ssdd.decoder).most_steps != 0
    return Discriminator(options.n_layers, options.trajectory and takes_noise, options.norm_fn)


def build_objective(cfg: SSDDConfig, network: SSDD, discriminator: Discriminator | None) -> nn.Module:
    """Flow matching, one of its baselines, or distillation from a frozen copy of the starting weights.

    UserError if a loss network's weights are missing, or the options contradict each other.
    """
    images, with_kl = ImageLosses(build_losses(cfg.losses, cfg.aux_losses), discriminator), cfg.losses.kl != 0
    direct, decoder = cfg.objective == "direct", network.decoder
    if cfg.distill_teacher and direct:
        raise UserError("distill_teacher=true learns from a teacher, objective=direct from real images: choose one")
    if network.most_steps is not None and (cfg.distill_teacher or (direct and network.deterministic)):
        refused = "no distill_teacher, no objective=direct" if network.deterministic else "no distill_teacher"
        raise UserError(f"ssdd.decoder={cfg.ssdd.decoder} decodes in one step already: {refused}")
    if network.deterministic:
        return AutoencoderObjective(network, images, with_kl)
    repa, block = None, min(cfg.aux_losses.repa.i_extract, decoder.token_blocks // 2)
    if cfg.losses.repa:
        if decoder.token_blocks == 0:
            raise UserError(f"losses.repa compares tokens, and ssdd.decoder={cfg.ssdd.decoder} has none: losses.repa=0")
        teacher = PatchTokens(cfg.aux_losses.repa.model, (cfg.dataset.im_size // TOKEN_STRIDE,) * 2)
        repa = RepaLoss(decoder.token_width, teacher, cfg.aux_losses.repa.n_layers)
    if not cfg.distill_teacher:
        return TokenizerFlowObjective(network, images, repa, block, with_kl, direct or network.most_steps == 1)
    if cfg.ssdd.checkpoint is None:
        raise UserError("distill_teacher=true needs ssdd.checkpoint=<run or file>: the teacher's weights")
    z_std = latent_deviation(cfg, network) if cfg.distill.z == "noisy" else None
    latent = DistilledLatent(cfg.distill.z, cfg.distill.tau_max, z_std)
    teacher_steps = cfg.ssdd.fm_sampler.steps
    return DistillationObjective(network, copy.deepcopy(network), teacher_steps, images, repa, block, latent)


@torch.no_grad()
def latent_deviation(cfg: SSDDConfig, network: SSDD) -> Tensor:
    """Deviation [c] of the posterior means of the first training images."""
    dataset = ImageDataset(open_source(cfg.dataset, "train"), cfg.dataset, train=False)
    pixels, _, _ = next(eval_batches(dataset, min(len(dataset), IMAGES_FOR_DEVIATION)))
    device = next(network.decoder.parameters()).device
    means = torch.cat([network.encode(from_uint8(part).to(device)).mode() for part in pixels.split(32)])
    return means.std(dim=(0, 2, 3), correction=0)


def flop_per_image(cfg: SSDDConfig, objective: nn.Module, precision: Precision) -> int:
    """FLOP of one training image, forward and backward, on losses and teacher too; without the adversary."""
    network, side, device = objective.tokenizer, cfg.dataset.im_size, precision.device
    image, latent = (1, 3, side, side), (1, network.z_dim, side // network.f, side // network.f)
    x, draws = torch.zeros(image, device=device), step_draws(cfg.seed, 0, image, latent, device)
    stored = cfg.distill_teacher and cfg.distill.targets == "cache"
    given = [(torch.zeros(latent, device=device), x)] if stored else []
    active = [name for name in objective.terms if name != "gan_disc"]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    with precision.autocast():
        return count_flop(lambda: sum(objective(x, draws, active, *given).terms.values()), parameters)
