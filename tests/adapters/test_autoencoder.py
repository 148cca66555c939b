"""The AutoencoderKL face: its whole surface, equal to SSDD with LatentNorm bit for bit, files, noise, precisions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ssdd import SSDD, LatentNorm
from ssdd.adapters import AutoencoderSSDD
from ssdd.engine.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_results_equal_the_tokenizer_with_its_norm_bit_for_bit(vae, tokenizer, norm, images):
    raw, public = tokenizer.encode(images), vae.encode(images).latent_dist
    s = vae.config.scaling_factor
    assert torch.equal(public.mode(), norm.normalise(raw.mode()) / s)
    assert torch.equal(public.sample(generator()), norm.normalise(raw.sample(generator())) / s)
    noise, p = torch.randn(16, 3, 32, 32), public.mode()
    expected = tokenizer.decode(norm.denormalise(p * s), steps=2, noise=noise)
    assert torch.equal(vae.decode(p, noise=noise, steps=2).sample, expected)
    assert (expected - tokenizer.decode(raw.mode(), steps=2, noise=noise)).abs().max() < 1e-5


def test_encoder_results_have_attributes_items_and_positions(vae, images):
    result = vae.encode(images)
    assert result.latent_dist is result["latent_dist"] is result[0]
    (alone,) = vae.encode(images, return_dict=False)
    p = alone.mode()
    decoded = vae.decode(p)
    assert torch.equal(decoded.sample, decoded["sample"]) and torch.equal(decoded[0], decoded.sample)
    assert torch.equal(vae.decode(p, return_dict=False)[0], decoded.sample)
    assert torch.equal(vae(images).sample, decoded.sample)


def test_the_posterior_of_public_latents_is_that_of_an_affine_map(vae, tokenizer, norm, images):
    public, raw = vae.encode(images).latent_dist, tokenizer.encode(images)
    scale = norm.std.view(-1, 1, 1) * vae.config.scaling_factor
    assert torch.allclose(public.std, raw.std / scale, rtol=1e-5)
    assert torch.allclose(public.var, public.std.square(), rtol=1e-5)
    assert torch.allclose(public.parameters, torch.cat([public.mean, public.logvar], dim=1))
    closed = torch.distributions.kl_divergence(
        torch.distributions.Normal(public.mean, public.std), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(public.kl(), closed.sum(dim=(1, 2, 3)), rtol=1e-4)


def test_results_may_be_changed_in_place_and_trained_on(vae, images):
    posterior = vae.encode(images).latent_dist
    mean = posterior.mean.clone()
    z = posterior.sample().mul_(0.18215)
    posterior.mode().mul_(0)
    assert torch.equal(posterior.mean, mean)
    weight = torch.ones(4, requires_grad=True)
    (z * weight.view(-1, 1, 1)).square().mean().backward()
    assert weight.grad is not None
    kept = z.clone()
    vae.decode(z / 0.18215)
    assert torch.equal(z, kept)


def test_the_config_reads_as_that_of_an_autoencoder_kl(vae):
    assert vae.config.scaling_factor == vae.config["scaling_factor"] == 0.18215
    assert vae.config.latent_channels == 4 and 2 ** (len(vae.config.block_out_channels) - 1) == 8
    assert vae.config.latents_mean == [0] * 4 and vae.config.latents_std == [1] * 4 and vae.config.shift_factor == 0
    assert vae.config.sample_size is None and vae.config.force_upcast is False
    assert vae.config.in_channels == vae.config.out_channels == 3 and "checkpoint" not in vae.config
    assert vae.dtype == torch.float32 and vae.device.type == "cpu"


def test_without_noise_an_image_does_not_depend_on_its_batch(vae, images):
    p = vae.encode(images).latent_dist.mode()
    together = vae.decode(p).sample
    assert (vae.decode(p[5:6]).sample - together[5:6]).abs().max() < 1e-5
    one, other = (vae.decode(p[:2], generator=generator(seed)).sample for seed in (1, 2))
    assert not torch.equal(one, other) and torch.equal(one, vae.decode(p[:2], generator=generator(1)).sample)
    each = vae.decode(p[:2], generator=[generator(1), generator(2)]).sample
    assert (each[1] - vae.decode(p[1:2], generator=generator(2)).sample[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        vae.decode(p[:3], generator=[generator(1), generator(2)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_give_their_own_dtype_and_nearly_the_same_images(vae, images, dtype):
    expected = vae(images).sample
    with torch.autocast("cpu", dtype):
        cast = vae(images).sample
    assert cast.dtype == torch.float32 and (cast - expected).abs().mean() < 0.05
    half = vae.to(dtype)
    posterior = half.encode(images.to(dtype)).latent_dist
    decoded = half.decode(posterior.mode()).sample
    assert posterior.sample().dtype == decoded.dtype == half.dtype == dtype
    assert decoded.isfinite().all() and (decoded.float() - expected).abs().mean() < 0.05


def test_slicing_and_tiling_switch_on_and_off(vae, images):
    p = vae.encode(images).latent_dist.mode()
    whole = vae.decode(p).sample
    vae.enable_slicing()
    assert (vae.decode(p).sample - whole).abs().max() < 1e-5
    vae.disable_slicing()
    vae.enable_tiling(tile=16, overlap=8)
    assert not torch.equal(vae.decode(p).sample, whole)
    vae.disable_tiling()
    assert torch.equal(vae.decode(p).sample, whole)


def test_a_saved_adapter_comes_back_bit_for_bit(vae, images, tmp_path):
    vae.save_pretrained(tmp_path)
    again = AutoencoderSSDD.from_pretrained(tmp_path)
    assert dict(again.config).items() >= {k: v for k, v in vae.config.items() if not k.startswith("_")}.items()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in again.parameters())  # not views of the file, at odd addresses
    assert torch.equal(again(images).sample, vae(images).sample)
    half = AutoencoderSSDD.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, subfolder=None)
    assert half.dtype == torch.bfloat16
    within = AutoencoderSSDD.from_pretrained(tmp_path.parent, subfolder=tmp_path.name)
    assert torch.equal(within(images).sample, vae(images).sample)


def test_it_opens_references_with_the_statistics_of_their_own_encoder_only(tokenizer, norm, vae, images, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    norm.save(tmp_path / "z_stats.json")
    opened = AutoencoderSSDD.from_pretrained(tmp_path / "tokenizer", z_stats=tmp_path / "z_stats.json", steps=1)
    assert torch.equal(opened(images).sample, vae(images).sample)
    scalar = AutoencoderSSDD.from_ssdd(tokenizer, norm, scalar=True)
    assert scalar.config.z_std == [norm.scalar().std[0].item()] * 4
    torch.manual_seed(1)
    stranger = SSDD({"name": "f8c4", "width": 8}, "XXS")
    for z_stats in (norm, tmp_path / "z_stats.json"):
        with pytest.raises(UserError, match="another encoder"):
            AutoencoderSSDD.from_ssdd(stranger, z_stats)
    for missing in ("nobody", str(tmp_path / "nobody"), "folder/nobody.safetensors"):
        with pytest.raises(UserError, match="no weights for '.*nobody"):
            AutoencoderSSDD.from_pretrained(missing)


def test_an_adapter_has_the_dtype_of_the_model_that_it_is_made_from_and_leaves_that_alone(tokenizer, images):
    before = {key: tensor.clone() for key, tensor in tokenizer.bfloat16().state_dict().items()}
    vae = AutoencoderSSDD.from_ssdd(tokenizer)
    assert vae.dtype == vae(images).sample.dtype == torch.bfloat16
    vae.float().tokenizer.decoder.conv_in.weight.data.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tokenizer.state_dict().items())


@pytest.mark.parametrize("wrong", [{"z_mean": [0.0] * 3}, {"z_std": [1.0] * 5}, {"z_std": [1.0, 1.0, 0.0, 1.0]}])
def test_statistics_that_do_not_fit_the_channels_are_refused(wrong):
    with pytest.raises(UserError, match="expected 4 numbers each, deviations above 0"):
        AutoencoderSSDD({"name": "f8c4", "width": 8}, "XXS", **wrong)


def test_no_steps_are_refused(vae):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        vae.decode(torch.zeros(1, 4, 4, 4), steps=0)


def test_a_deterministic_decoder_takes_part(images):
    vae = AutoencoderSSDD({"name": "f8c4", "width": 8}, {"size": "kl", "width": 32}).eval()
    p = vae.encode(images[:2]).latent_dist.mode()
    one, other = (vae.decode(p, generator=generator(seed)).sample for seed in (1, 2))
    assert one.shape == images[:2].shape and torch.equal(one, other)


def test_encoding_and_decoding_run_the_hooks_that_move_models_to_a_device(vae, images):
    pytest.importorskip("diffusers")
    hooks = pytest.importorskip("accelerate.hooks")
    moved = []

    class Mover(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(type(module).__name__)
            return args, kwargs

    hooks.add_hook_to_module(vae, Mover())
    vae.decode(vae.encode(images).latent_dist.mode())
    assert moved == ["AutoencoderSSDD"] * 2


def test_it_refuses_to_decode_with_weights_that_are_filled_in_layer_by_layer(vae):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="decoder as a whole"):
        vae.decode(torch.zeros(1, 4, 4, 4))


def test_the_constructor_alone_makes_one(images):
    vae = AutoencoderSSDD(encoder={"name": "f8c4", "width": 8}, decoder="XXS", steps=1)
    assert torch.equal(
        vae.encode(images).latent_dist.mode() * 0.18215, vae.tokenizer.encode(images).mode() / 0.18215 * 0.18215
    )
    assert LatentNorm.of([1.0, 2.0], [0.5, 3.0]).std.tolist() == [0.5, 3.0]


def test_it_works_and_saves_the_same_files_without_diffusers(vae, images, tmp_path):
    vae.save_pretrained(tmp_path / "with")
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import sys
for name in ("diffusers", "torchvision", "accelerate"): sys.modules[name] = None
import torch, ssdd
assert not any(name.startswith("ssdd.adapters") for name in sys.modules)
from ssdd.adapters import AutoencoderSSDD
vae = AutoencoderSSDD.from_pretrained({str(tmp_path / "with")!r})
assert vae.config.latent_channels == vae.config["latent_channels"] == 4 and vae.dtype == torch.float32
vae.save_pretrained({str(tmp_path / "without")!r})
torch.save(vae(torch.load({str(tmp_path / "images.pt")!r})).sample, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    expected = vae(images).sample
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    assert torch.equal(AutoencoderSSDD.from_pretrained(tmp_path / "without")(images).sample, expected)


def test_a_licence_travels_with_the_adapter(tokenizer, tmp_path):
    tokenizer.license = "CC-BY-NC-4.0"
    adapter = AutoencoderSSDD.from_ssdd(tokenizer)
    assert adapter.config.license == "CC-BY-NC-4.0"
    adapter.save_pretrained(tmp_path)
    assert AutoencoderSSDD.from_pretrained(tmp_path).tokenizer.license == "CC-BY-NC-4.0"
