"""Posterior and normalisation of latents against closed forms."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.model.latent import DiagonalGaussian, LatentNorm


def test_the_posterior_splits_clamps_samples_and_measures_itself():
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    q = DiagonalGaussian(torch.cat([mean, logvar], dim=1))
    assert torch.equal(q.mode(), mean) and torch.allclose(q.std**2, q.var)
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, q.std), prior)
    assert torch.allclose(q.kl(), kl.sum(dim=(1, 2, 3)), rtol=1e-5)
    noise = torch.randn_like(mean)
    assert torch.equal(q.sample(noise=noise), mean + q.std * noise)
    draws = [q.sample(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    extreme = DiagonalGaussian(torch.cat([mean, logvar * 1e4], dim=1))
    assert extreme.logvar.min() >= -30 and extreme.logvar.max() <= 20 and extreme.sample().isfinite().all()


def test_normalised_latents_have_unit_moments_and_return(tmp_path):
    z = torch.randn(500, 2, 4, 4) * torch.tensor([3.0, 0.2]).view(-1, 1, 1) + torch.tensor([5.0, -1.0]).view(-1, 1, 1)
    channels = z.double().transpose(0, 1).flatten(1)
    norm = LatentNorm.from_moments(channels.mean(1), channels.var(1, correction=0), len(z), "weights")
    z_n = norm.normalise(z)
    assert torch.allclose(z_n.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(z_n.std(dim=(0, 2, 3)), torch.ones(2), atol=1e-3)
    assert torch.allclose(norm.denormalise(z_n), z, atol=1e-5)
    assert norm.z_mean == pytest.approx(z.double().mean().item())
    assert norm.z_std == pytest.approx(z.double().std(correction=0).item())
    assert norm.scalar().std.unique().item() == pytest.approx(norm.z_std)

    norm.save(tmp_path / "z_stats.json")
    loaded = LatentNorm.load(tmp_path / "z_stats.json", "weights")
    assert torch.equal(loaded.mean, norm.mean) and torch.equal(loaded.std, norm.std) and loaded.count == 500
    with pytest.raises(UserError, match="another encoder"):
        LatentNorm.load(tmp_path / "z_stats.json", "other weights")


def test_other_channel_counts_and_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="latent has 3 channels, the statistics have 2"):
        LatentNorm.identity(2).normalise(torch.zeros(1, 3, 2, 2))
    (tmp_path / "z_stats.json").write_text('{"mean": [0]}')
    with pytest.raises(UserError, match="lacks count"):
        LatentNorm.load(tmp_path / "z_stats.json")
