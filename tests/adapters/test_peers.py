"""Scripts that call their tokenizer as DiT, SiT, REPA, LightningDiT and diffusers do, with one line changed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssdd.adapters import LightningDiTTokenizer
from ssdd.engine.errors import UserError


def train_ten_steps(latents) -> None:
    """Flow matching by a tiny network on what `latents()` gives, as the peers' loops do."""
    model = nn.Conv2d(4, 4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(10):
        z = latents()
        noise, t = torch.randn_like(z), torch.rand(len(z), 1, 1, 1)
        loss = (model((1 - t) * z + t * noise) - (noise - z)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert 0.9 < z.std() < 1.1


def test_dit_and_sit(vae, images):
    def latents():
        with torch.no_grad():
            return vae.encode(images).latent_dist.sample().mul_(0.18215)

    train_ten_steps(latents)
    samples = vae.decode(latents() / 0.18215).sample
    assert samples.shape == images.shape and samples.isfinite().all()


def test_repa(vae, images):
    with torch.no_grad():
        posterior = vae.encode(images)["latent_dist"]
        moments = torch.cat([posterior.mean, posterior.std], dim=1)
    scale, bias = torch.tensor([0.18215] * 4).view(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)

    def latents():
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * torch.randn_like(mean)) * scale + bias

    train_ten_steps(latents)
    samples = vae.decode((latents() - bias) / scale).sample
    assert samples.shape == images.shape and samples.isfinite().all()


def test_lightningdit(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path / "weights")
    (tmp_path / "tokenizer.yaml").write_text(f"checkpoint: {tmp_path / 'weights'}\nimg_size: 32\n")
    tokenizer = LightningDiTTokenizer(str(tmp_path / "tokenizer.yaml"))
    picture = Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3))
    x = tokenizer.img_transform(p_hflip=1.0)(picture)
    plain = tokenizer.img_transform(p_hflip=0.0, img_size=16)(picture)
    assert x.shape == (3, 32, 32) and plain.shape == (3, 16, 16) and -1 <= x.min() < x.max() <= 1

    cached = tokenizer.encode_images(images)
    mean, std = cached.mean(dim=(0, 2, 3), keepdim=True), cached.std(dim=(0, 2, 3), keepdim=True)
    train_ten_steps(lambda: (tokenizer.encode_images(images) - mean) / std)
    decoded = tokenizer.decode_to_images(cached)
    assert decoded.shape == (16, 32, 32, 3) and decoded.dtype == np.uint8
    assert np.array_equal(decoded[3:4], tokenizer.decode_to_images(cached[3:4])) and tokenizer.downsample_ratio == 8


def test_lightningdit_files_with_other_keys_are_refused(tmp_path):
    file = tmp_path / "tokenizer.yaml"
    for text in ("steps: 1", "checkpoint: a\nsize: 256"):
        file.write_text(text)
        with pytest.raises(UserError, match="expected checkpoint and perhaps steps, noise_seed, img_size"):
            LightningDiTTokenizer(file)


def test_diffusers_pipeline_runs_saves_and_reloads_elsewhere(vae, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    draw = {"class_labels": [3], "num_inference_steps": 2, "output_type": "np"}
    image = pipeline(**draw, generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all() and image.std() > 0
    pipeline.save_pretrained(tmp_path / "pipeline")
    program = f"""
import numpy as np, torch, diffusers, ssdd.adapters
pipeline = diffusers.DiTPipeline.from_pretrained({str(tmp_path / "pipeline")!r})
image = pipeline(**{draw!r}, generator=torch.Generator().manual_seed(0)).images
np.save({str(tmp_path / "image.npy")!r}, image)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert np.abs(np.load(tmp_path / "image.npy") - image).max() < 1e-6
