"""What a training config describes: the cache, the network for its latents, the objective and its images."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from dit.config import DiTConfig
from dit.foreign_checkpoints import load_dit
from dit.model import DiT
from dit.objective import LatentObjective, step_draws
from dit.options import VARIANTS
from latent_cache import LatentDataset, StreamingLatents
from ssdd.engine.checkpoint import resolve
from ssdd.engine.errors import UserError
from ssdd.engine.precision import Precision
from ssdd.engine.throughput import count_flop
from ssdd.losses.repa import PatchTokens, RepaLoss

Cache = LatentDataset | StreamingLatents


def open_cache(cfg: DiTConfig) -> Cache:
    """The train split of `cache`. UserError where it is missing, damaged or, at a URL, has no local folder."""
    if cfg.cache is None:
        raise UserError("cache=DIR must be given: the folder that `python -m latent_cache build out=DIR` wrote")
    if "://" not in cfg.cache:
        return LatentDataset(cfg.cache, split="train")
    if cfg.cache_dir is None:
        raise UserError(f"cache={cfg.cache} is a URL: cache_dir=DIR must be given, a local folder for its shards")
    return StreamingLatents(cfg.cache, split="train", cache_dir=cfg.cache_dir)


def build_network(cfg: DiTConfig, cache: Cache) -> DiT:
    """The network that is trained, for latents and classes of the cache. UserError where they don't fit it."""
    if not 0.0 <= cfg.model.class_dropout < 1.0:
        raise UserError(f"model.class_dropout={cfg.model.class_dropout} must be in [0, 1)")
    if cfg.model.checkpoint is not None:
        return pretrained_network(cfg, cache)
    channels, height, width = cache.latent_shape
    try:
        return DiT.from_name(
            cfg.model.name,
            input_size=(height, width),
            in_channels=channels,
            num_classes=cache.num_classes,
            **architecture(cfg),
        )
    except UserError as error:
        raise UserError(f"model.name={cfg.model.name} does not fit the cache {cfg.cache}: {error}") from None


def architecture(cfg: DiTConfig) -> dict[str, Any]:
    """The options of the network that the keys of `model` stand for, as fields of `DiTOptions`."""
    model = cfg.model
    same = ("learn_sigma", "time_scale", *VARIANTS)
    return {"null_class": model.class_dropout > 0} | {name: getattr(model, name) for name in same}


def pretrained_network(cfg: DiTConfig, cache: Cache) -> DiT:
    """The network of `model.checkpoint`, ours or another repository's, for the cache's latents.

    UserError, with the keys to set, where the file holds another network than the keys of `model` describe.
    """
    channels, height, width = cache.latent_shape
    file = resolve(cfg.model.checkpoint, cfg.ckpt_dir)
    classes = None if cfg.model.reset_labels else cache.num_classes
    network = load_dit(file, cfg.model.family, input_size=(height, width), in_channels=channels, num_classes=classes)
    if network.options.convention == "ddpm":
        raise UserError(f"model.checkpoint={file} predicts noise (DiT); only velocity fields can be trained on")
    wanted = {"name": cfg.model.name, **architecture(cfg)}
    if cfg.model.reset_labels:
        labels = {"num_classes": cache.num_classes, "null_class": wanted["null_class"]}
        weights = {key: value for key, value in network.state_dict().items() if not key.startswith("y_embedder.")}
        network = DiT(replace(network.options, **labels))
        network.load_state_dict(weights, strict=False)
    found = {key: value for key, value in network.config.items() if value is not None}  # a foreign size has no name
    differing = [key for key in wanted if found.get(key, wanted[key]) != wanted[key]]
    keys = {key: f"model.{key}={found[key] if key == 'name' else json.dumps(found[key])}" for key in differing}
    if "null_class" in keys:
        keys["null_class"] = f"model.class_dropout={0.1 if found['null_class'] else 0}"
    if keys:
        raise UserError(f"model.checkpoint={file} holds another network: set {' '.join(keys.values())}")
    return network.float().train()  # files may be in half precision, which small updates vanish in


def build_objective(cfg: DiTConfig, network: DiT) -> LatentObjective:
    """Flow matching with the losses that have a weight. UserError if REPA's weights or its block do not exist."""
    repa, options = None, cfg.aux_losses.repa
    if cfg.losses.repa:
        depth = len(network.blocks)
        if not 1 <= options.i_extract <= depth:
            raise UserError(f"aux_losses.repa.i_extract={options.i_extract}: {cfg.model.name} has blocks 1 to {depth}")
        channels = network.pos_embed.shape[-1]
        teacher = PatchTokens(options.model, network.grid)
        repa = RepaLoss(channels, teacher, options.n_layers, options.hidden)
    return LatentObjective(network, cfg.losses.direction != 0, repa, options.i_extract)


def loss_weights(cfg: DiTConfig) -> dict[str, float]:
    """Term of the objective -> its weight."""
    return {"velocity": 1.0, **vars(cfg.losses)}


def flop_per_latent(cfg: DiTConfig, objective: LatentObjective, cache: Cache, precision: Precision) -> int:
    """FLOP of one training latent, forward and backward, on REPA's network too."""
    z = torch.zeros(1, *cache.latent_shape, device=precision.device)
    y, draws = torch.zeros(1, dtype=torch.int64, device=z.device), step_draws(cfg, 0, tuple(z.shape), z.device)
    images = None if objective.repa is None else torch.zeros(1, 3, 8, 8, device=z.device)  # resized for the teacher
    trained = [p for p in objective.parameters() if p.requires_grad]
    with precision.autocast():
        return count_flop(lambda: sum(objective(z, y, draws, images).values()), trained)


def trained_on(cache: Cache) -> dict[str, Any]:
    """What sampling and decoding need from the cache, so that a weights file is enough for both."""
    return {
        "cache": cache.manifest["sha256"],
        "z_stats": cache.norm.to_dict(),
        "class_names": cache.class_names,
        "images": cache.manifest["dataset"],
    }
