"""Frozen encoders from elsewhere: diffusers' KL-VAE with its factors honoured, and modules of the user's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ssdd import SSDD
from ssdd.engine.errors import UserError
from ssdd.model.compared_decoders import open_rows
from ssdd.model.foreign_encoders import ForeignAutoencoder, ForeignEncoder
from tests.small_tokenizer import random_vae

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    random_vae(scaling_factor=0.4, shift_factor=0.1).save_pretrained(folder)
    return folder


def test_latents_are_those_of_the_generators_trained_on_the_vae(vae_folder):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    model = SSDD({"name": "diffusers", "path": str(vae_folder)}, "XXS")
    assert (model.f, model.z_dim) == (2, 16)
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    posterior, expected = model.encode(x), vae.encode(x).latent_dist
    assert torch.allclose(posterior.mean, (expected.mean - 0.1) * 0.4, atol=1e-6)
    assert torch.allclose(posterior.std, expected.std * 0.4, rtol=1e-4)
    assert model.decode(posterior.mode(), steps=1).shape == x.shape


def test_it_is_frozen_outside_the_files_and_moves_with_the_tokenizer(vae_folder, tmp_path):
    model = SSDD({"name": "diffusers", "path": str(vae_folder)}, "XXS")
    assert not any("encoder" in name for name, _ in model.named_parameters())
    assert all(key.startswith("decoder.") for key in model.state_dict())
    model.save_pretrained(tmp_path)
    again = SSDD.from_pretrained(tmp_path)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(again.encode(x).mean, model.encode(x).mean)
    assert again.encoder_fingerprint() == model.encoder_fingerprint()
    half = copy.deepcopy(again).bfloat16()
    assert next(half.encoder.parameters()).dtype == torch.bfloat16
    assert (half.encode(x).mean - model.encode(x).mean).abs().max() < 0.1
    assert next(again.encoder.parameters()).dtype == torch.float32


def test_a_vae_object_or_any_module_with_stride_and_channels_serves(vae_folder, tmp_path):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    assert SSDD(vae, "XXS").z_dim == 16

    class Patches(nn.Module):
        f, z_dim = 8, 192

        def forward(self, x):
            mean = nn.functional.pixel_unshuffle(x, 8)
            return torch.cat([mean, torch.full_like(mean, -30)], dim=1)

    model = SSDD(Patches(), "XXS")
    assert model.encode(torch.zeros(1, 3, 16, 16)).mode().shape == (1, 192, 2, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="pass it again as encoder="):
        SSDD.from_pretrained(tmp_path)
    assert SSDD.from_pretrained(tmp_path, encoder=Patches()).z_dim == 192
    with pytest.raises(UserError, match="integers f"):
        SSDD(nn.Identity(), "XXS")


def test_what_cannot_be_is_said(vae_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="none of AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC there"):
        SSDD({"name": "diffusers", "path": str(tmp_path / "nothing")}, "XXS")
    with pytest.raises(UserError, match="stays frozen"):
        SSDD({"name": "diffusers", "path": str(vae_folder)}, "XXS", encoder_train=True)
    with pytest.raises(UserError, match="unknown keys depth"):
        SSDD({"name": "f8c4", "depth": 3}, "XXS")


def test_the_vae_that_was_given_stays_whole(vae_folder):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    before = vae(x).sample
    SSDD(vae, "XXS").encode(x)
    assert torch.allclose(vae(x).sample, before, atol=1e-4)  # in another memory format
    assert all(parameter.requires_grad for parameter in vae.decoder.parameters())


def flux2_vae():
    """With statistics as after training."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval()


def dc_autoencoder():
    torch.manual_seed(0)
    return diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    ).eval()


def test_flux2_latents_are_packed_and_normalised_as_its_pipeline_does(tmp_path):
    vae = flux2_vae()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    model = SSDD({"name": "diffusers", "path": str(tmp_path / "pipeline")}, "XXS")
    assert (model.f, model.z_dim) == (4, 16)
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        own = vae.encode(x).latent_dist
        packed = diffusers.Flux2Pipeline._patchify_latents(own.mean)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()[:, None, None]
        posterior = model.encode(x)
        torch.testing.assert_close(posterior.mean, (packed - vae.bn.running_mean[:, None, None]) / std)
        packed_std = diffusers.Flux2Pipeline._patchify_latents(own.std)
        torch.testing.assert_close(posterior.std, packed_std / std, rtol=1e-4, atol=1e-6)
        whole = ForeignAutoencoder(vae)
        torch.testing.assert_close(whole.decode(posterior.mean), vae.decode(own.mean).sample, rtol=1e-4, atol=1e-4)
    fingerprint = model.encoder_fingerprint()
    vae.bn.running_var.mul_(2)
    assert SSDD(vae, "XXS").encoder_fingerprint() != fingerprint


def test_the_latent_of_dc_ae_is_deterministic_and_scaled(tmp_path):
    vae = dc_autoencoder()
    vae.save_pretrained(tmp_path)
    model = SSDD({"name": "diffusers", "path": str(tmp_path)}, "XXS")
    assert (model.f, model.z_dim) == (2, 4)
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior, latent = model.encode(x), vae.encode(x).latent
        torch.testing.assert_close(posterior.mean, latent * 0.41407)
        torch.testing.assert_close(posterior.sample(noise=torch.randn_like(latent)), posterior.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(ForeignAutoencoder(vae).decode(posterior.mean), vae.decode(latent).sample)


def test_other_classes_of_diffusers_are_refused():
    with pytest.raises(UserError, match="latents of AutoencoderTiny are unknown here"):
        ForeignEncoder(diffusers.AutoencoderTiny())


def test_a_subclass_is_taken_for_its_class(vae_folder):
    class Renamed(diffusers.AutoencoderKL):
        pass

    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    expected = SSDD(vae, "XXS").encoder_fingerprint()
    assert SSDD(Renamed.from_pretrained(vae_folder), "XXS").encoder_fingerprint() == expected


def test_latents_of_other_factors_have_another_fingerprint(vae_folder):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    fingerprint = SSDD(vae, "XXS").encoder_fingerprint()
    vae.register_to_config(scaling_factor=0.5)
    assert SSDD(vae, "XXS").encoder_fingerprint() != fingerprint


def test_a_whole_vae_is_a_row_beside_tokenizers_with_its_encoder(vae_folder, tmp_path):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    (row,) = open_rows([f"kl:diffusers:{vae_folder}"], tmp_path, torch.device("cpu"))
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    z = row.tokenizer.encode(x).mode()
    with torch.no_grad():
        expected = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert torch.allclose(row.tokenizer.decode(z, row.steps, noise=None), expected, atol=1e-5)
    tokenizer = SSDD({"name": "diffusers", "path": str(vae_folder)}, "XXS")
    assert row.tokenizer.encoder_fingerprint() == tokenizer.encoder_fingerprint()
    assert row.provenance()["decoder"] == "AutoencoderKL" and len(row.checksum) == 64
