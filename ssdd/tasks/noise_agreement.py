"""Whether a student uses the noise as its teacher does, or averages it away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssdd.engine.random import indexed_noise
from ssdd.model.compared_decoders import Row


@torch.no_grad()
def noise_agreement(row: Row, reference: Row, parts: Sequence[Tensor], draws: int, seed: int) -> float:
    """R2 of the images of `row` as predictions of the images of `reference`, over noise at fixed latents.

    1 - sum (row - reference)^2 / sum (reference - its mean over the noise)^2, over `draws` draws of noise for each
    image [3, H, W] in [-1, 1], the same for both; the images come in batches. 1: equal; 0: as good as the reference's
    mean image; nan for a reference that does not depend on the noise. ValueError below two draws.
    """
    if draws < 2:
        raise ValueError(f"{draws} draws of noise have no spread")
    errors, spread, first = 0.0, 0.0, 0
    for x in parts:
        z, own = reference.tokenizer.encode(x).mode(), row.tokenizer.encode(x).mode()
        images = []
        for draw in range(draws):
            noise = indexed_noise(range(first, first + len(x)), x.shape[1:], seed, f"agreement.{draw}").to(x.device)
            images.append(reference.tokenizer.decode(z, steps=reference.steps, noise=noise).double())
            mine = row.tokenizer.decode(own, steps=row.steps, noise=noise).double()
            errors += (mine - images[-1]).square().sum().item()
        spread += torch.stack(images).var(dim=0, correction=0).sum().item() * draws
        first += len(x)
    return 1 - errors / spread if spread > 0 else float("nan")
