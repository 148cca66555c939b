"""The figures of `stats` against latents whose answers are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from latent_cache import LatentDataset
from latent_cache.__main__ import main
from latent_cache.config import StatsConfig
from latent_cache.diagnose import stats
from latent_cache.read.stored_rows import spread
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json
from tests.latent_cache.synthetic import make_cache, normal


def figures(folder, **keys):
    return stats(StatsConfig(str(folder), **keys))


def autoregressive(rho, n, channels, side, seed=0):
    """Periodic fields [n, channels, side, side] with power 1/|1 - rho exp(-2 pi i f)|^2 along each axis, and that power
    [side, side]."""
    axis = 1 / np.abs(1 - rho * np.exp(-2j * np.pi * np.fft.fftfreq(side))) ** 2
    power = axis[:, None] * axis
    noise = np.fft.fft2(normal(n, channels, side, side, seed=seed))
    return np.fft.ifft2(noise * np.sqrt(power)).real, power / power.mean()


def test_white_noise_has_a_flat_spectrum_gaussian_tails_and_one_warning(tmp_path):
    result = figures(make_cache(tmp_path / "c", normal(1000, 3, 8, 8) * [[[2.0]], [[1.0]], [[0.5]]] + 0.7))
    channels = result["channels"]
    assert np.allclose(channels["raw_mean"], 0.7, atol=0.03)
    assert np.allclose(channels["raw_std"], [2, 1, 0.5], rtol=0.02)
    assert np.allclose(channels["mean"], 0, atol=1e-3) and np.allclose(channels["std"], 1, atol=1e-3)
    assert np.allclose(channels["excess_kurtosis"], 0, atol=0.06)
    assert np.mean(channels["beyond_4"]) == pytest.approx(2 * scipy.stats.norm.sf(4), rel=0.6)
    assert result["spectrum"]["flatness"] > 0.99
    assert np.allclose(result["spectrum"]["density"], 1, atol=0.05)
    assert abs(result["largest_correlation"]["r"]) < 0.02
    (warning,) = result["warnings"]
    assert warning.startswith("near-white spectrum") and "scale equivariance" in warning


def test_the_spectrum_of_an_autoregressive_field_is_the_known_one(tmp_path):
    field, power = autoregressive(0.8, 600, 2, 16)
    result = figures(make_cache(tmp_path / "c", field))
    frequencies = np.fft.fftfreq(16)
    radius = np.hypot(frequencies[:, None], frequencies)
    bins = np.round(radius * 16).astype(int)
    expected = [power[bins == k].mean() for k in range(bins.max() + 1)]
    assert np.allclose(result["spectrum"]["density"], expected, rtol=0.06)
    assert np.allclose(result["spectrum"]["frequency"], [radius[bins == k].mean() for k in range(bins.max() + 1)])
    assert sum(result["spectrum"]["share"]) == pytest.approx(1)
    assert result["spectrum"]["flatness"] == pytest.approx(math.exp(np.log(power).mean()), rel=0.03)
    assert result["warnings"] == []


def test_a_dead_channel_is_named(tmp_path):
    field = autoregressive(0.8, 300, 4, 8)[0]
    field[:, 2] *= 1e-3
    (warning,) = figures(make_cache(tmp_path / "c", field))["warnings"]
    assert warning.startswith("dead channels 2:") and "fewer channels" in warning and "train it longer" in warning


def test_a_channel_whose_posterior_is_the_prior_is_dead_however_large_its_samples_are(tmp_path):
    means = autoregressive(0.8, 300, 3, 8)[0]
    means[:, 1] *= 0.01
    logvars = np.broadcast_to(np.array([-4.0, 0.0, -4.0])[:, None, None], means.shape)
    result = figures(make_cache(tmp_path / "c", np.concatenate([means, logvars], 1), content="moments"))
    assert any(warning.startswith("dead channels 1:") for warning in result["warnings"])
    assert result["channels"]["raw_std"][1] == pytest.approx(1, rel=0.01)


def test_students_tails_are_measured_and_warned_of(tmp_path):
    draw = np.random.default_rng(1)
    values = np.stack([draw.standard_t(5, (3000, 8, 8)), draw.standard_t(12, (3000, 8, 8))], 1)
    result = figures(make_cache(tmp_path / "c", values))
    for limit in (4, 6):
        expected = 2 * scipy.stats.t.sf(limit * math.sqrt(5 / 3), 5)
        assert result["channels"][f"beyond_{limit}"][0] == pytest.approx(expected, rel=0.2)
    assert result["channels"]["excess_kurtosis"][1] == pytest.approx(6 / (12 - 4), rel=0.15)
    assert any(warning.startswith("heavy tails in channels 0") for warning in result["warnings"])


def test_signal_to_noise_capacity_and_kl_are_the_closed_forms(tmp_path):
    spread_, sigma = np.array([2.0, 1.0, 0.3]), np.array([0.5, 1.0, 0.6])
    means = normal(2000, 3, 4, 4) * spread_[:, None, None] + 0.25
    means = (means - means.mean((0, 2, 3), keepdims=True)) / means.std((0, 2, 3), keepdims=True)
    means = means * spread_[:, None, None] + 0.25  # these moments exactly
    logvars = np.broadcast_to(2 * np.log(sigma)[:, None, None], means.shape)
    result = figures(make_cache(tmp_path / "c", np.concatenate([means, logvars], 1), content="moments"))
    posterior, snr = result["posterior"], (spread_ / sigma) ** 2
    assert np.allclose(posterior["snr"], snr, rtol=3e-3)
    assert np.allclose(posterior["bits"], 16 * 0.5 * np.log2(1 + snr), rtol=3e-3)
    kl = 16 * 0.5 * (spread_**2 + 0.25**2 + sigma**2 - 1 - 2 * np.log(sigma))
    assert np.allclose(posterior["kl_nats"], kl, rtol=3e-3)
    assert posterior["bits_a_latent"] == pytest.approx(sum(posterior["bits"]))
    assert posterior["kl_nats_a_latent"] == pytest.approx(sum(posterior["kl_nats"]))
    assert np.allclose(result["channels"]["std"], 1, atol=2e-3)
    assert any(warning.startswith("channels 2: the posterior's noise") for warning in result["warnings"])


def test_figures_of_moments_are_those_of_latents_that_the_reader_draws(tmp_path):
    means = np.random.default_rng(2).laplace(size=(4000, 2, 4, 4))
    logvars = normal(4000, 2, 4, 4, seed=3) - 1
    folder = make_cache(tmp_path / "c", np.concatenate([means, logvars], 1), content="moments")
    channels = figures(folder)["channels"]
    cache = LatentDataset(folder)
    drawn = torch.cat([cache.gather(range(4000), torch.Generator().manual_seed(k))[0] for k in range(5)]).double()
    flat = drawn.transpose(0, 1).flatten(1).numpy()
    assert np.allclose(channels["std"], flat.std(1), rtol=0.01)
    assert np.allclose(channels["excess_kurtosis"], scipy.stats.kurtosis(flat, axis=1), rtol=0.1)
    assert np.allclose(channels["beyond_4"], (np.abs(flat) > 4).mean(1), rtol=0.15)


def test_two_channels_that_hold_the_same_are_named(tmp_path):
    field = autoregressive(0.8, 500, 3, 8)[0]
    field[:, 2] = -0.95 * field[:, 0] + math.sqrt(1 - 0.95**2) * field[:, 2]
    result = figures(make_cache(tmp_path / "c", field))
    assert result["largest_correlation"]["channels"] == [0, 2]
    assert result["largest_correlation"]["r"] == pytest.approx(-0.95, abs=0.02)
    assert any(warning.startswith("channels 0 and 2 correlate") for warning in result["warnings"])


def test_a_latent_of_one_number_has_figures_too(tmp_path):
    result = figures(make_cache(tmp_path / "c", normal(100, 1, 1, 1)))
    assert result["spectrum"]["share"] == [1.0] and result["largest_correlation"]["channels"] == []
    assert result["warnings"] == []


def test_a_limit_spreads_over_the_set_and_reads_no_more(tmp_path):
    assert spread(10, 4).tolist() == [0, 2, 5, 7] and spread(3, 9).tolist() == [0, 1, 2]
    rows = np.repeat(np.arange(10.0), 20)[:, None, None, None] + normal(200, 1, 2, 2) * 0.01
    folder = make_cache(tmp_path / "c", rows, shard=30)
    result = figures(folder, limit=10)
    assert result["samples"] == 10
    assert result["channels"]["raw_mean"][0] == pytest.approx(4.5, abs=0.02)
    with pytest.raises(UserError, match="limit=0"):
        figures(folder, limit=0)


def test_the_command_prints_a_table_and_writes_the_same_figures(moments, tmp_path, capsys):
    assert main(["stats", f"cache={moments}", "split=val", f"out={tmp_path / 'stats.json'}"]) == 0
    page = capsys.readouterr().out
    written = read_json(tmp_path / "stats.json")
    assert written == json.loads(json.dumps(figures(moments, split="val")))
    assert "60 latents of val, 2 x 2 x 2, moments" in page
    assert f"{written['posterior']['bits_a_latent']:.5g} bits per latent" in page
    assert all(warning in page for warning in written["warnings"])


def test_a_cache_of_means_says_that_information_needs_moments(means, capsys):
    assert main(["stats", f"cache={means}"]) == 0
    assert "build with content=moments" in capsys.readouterr().out
    assert figures(means)["posterior"] is None
