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
from ssdd.losses.distillation import DistillationObjective
from ssdd.losses.objective import AutoencoderObjective, FlowObjective, ImageLosses, step_draws
from ssdd.losses.perceptual import FeatureDistance, Lpips
from ssdd.losses.repa import PatchTokens, RepaLoss
from ssdd.model.decoder import TransformerBlock
from ssdd.model.encoder import ENCODER_NAME, EncoderAttention, EncoderBlock
from ssdd.model.layers import ResnetBlock
from ssdd.model.tokenizer import KL, METADATA_KEY, SSDD
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
    network = SSDD(
        encoder=encoder_option(cfg),
        decoder={"size": KL, "width": cfg.ssdd.encoder_width} if decoder == KL else decoder,
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
    return Discriminator(options.n_layers, options.trajectory and cfg.ssdd.decoder != KL, options.norm_fn)


def build_objective(cfg: SSDDConfig, network: SSDD, discriminator: Discriminator | None) -> nn.Module:
    """Flow matching, one of its baselines, or distillation from a frozen copy of the starting weights.

    UserError if a loss network's weights are missing, or the options contradict each other.
    """
    weights = cfg.losses
    images = ImageLosses(
        Lpips("vgg") if weights.lpips else None,
        FeatureDistance(cfg.aux_losses.features.model) if weights.features else None,
        discriminator,
    )
    if cfg.distill_teacher and cfg.objective == "direct":
        raise UserError("distill_teacher=true learns from a teacher, objective=direct from real images: choose one")
    if network.deterministic:
        if cfg.distill_teacher or cfg.objective == "direct":
            raise UserError("ssdd.decoder=kl decodes in one step already: no distill_teacher, no objective=direct")
        return AutoencoderObjective(network, images, with_kl=weights.kl != 0)
    repa, block = None, min(cfg.aux_losses.repa.i_extract, len(network.decoder.mid_block.transformer_blocks) // 2)
    if weights.repa:
        grid = (cfg.dataset.im_size // 8,) * 2
        teacher = PatchTokens(cfg.aux_losses.repa.model, grid)
        channels = network.decoder.mid_block.proj_in.in_features
        repa = RepaLoss(channels, teacher, cfg.aux_losses.repa.n_layers)
    if not cfg.distill_teacher:
        return FlowObjective(network, images, repa, block, weights.kl != 0, direct=cfg.objective == "direct")
    if cfg.ssdd.checkpoint is None:
        raise UserError("distill_teacher=true needs ssdd.checkpoint=<run or file>: the teacher's weights")
    return DistillationObjective(
        network,
        copy.deepcopy(network),
        cfg.ssdd.fm_sampler.steps,
        images,
        repa,
        block,
        latents=cfg.distill.z,
        tau_max=cfg.distill.tau_max,
        z_std=latent_deviation(cfg, network) if cfg.distill.z == "noisy" else None,
    )


def sharded_blocks(network: SSDD) -> list[list[nn.Module]]:
    """What `ssdd.engine.sharding.shard` takes as blocks: those of both networks, less what makes the decoder's
    `Condition`, which runs before and outside of them.
    """
    blocks: list[list[nn.Module]] = []
    for module in network.modules():
        if isinstance(module, EncoderBlock | EncoderAttention):
            blocks.append([module])
        elif isinstance(module, TransformerBlock):
            blocks.append([module.attn1, module.norm2, module.ff])
        elif isinstance(module, ResnetBlock):
            blocks.append([part for part in module.children() if part is not module.norm1])
    return blocks


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
    trained = [p for p in objective.parameters() if p.requires_grad]
    with precision.autocast():
        return count_flop(lambda: sum(objective(x, draws, active, *given).values()), trained)
