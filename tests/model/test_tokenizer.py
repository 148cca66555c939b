"""The public tokenizer: decoding is a function of latent and noise, files round-trip, errors are readable."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssdd import SSDD
from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.errors import UserError
from ssdd.model.flow import interpolate
from ssdd.model.weight_files import load_weights, read_weights


def test_decode_depends_on_latent_and_noise_alone(tokenizer):
    z, noise = torch.randn(3, 2, 2, 2), torch.randn(3, 3, 16, 16)
    together = tokenizer.decode(z, steps=2, noise=noise)
    alone = torch.cat([tokenizer.decode(z[i : i + 1], steps=2, noise=noise[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5
    drawn = [tokenizer.decode(z, steps=2, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], together)


def test_decode_is_float32_may_be_clamped_and_takes_its_default_steps(tokenizer):
    z, noise = 10 * torch.randn(1, 2, 3, 2), 3 * torch.randn(1, 3, 24, 16)
    y = tokenizer.decode(z, noise=noise)
    assert y.dtype == torch.float32 and y.shape == (1, 3, 24, 16) and y.abs().max() > 1
    assert torch.equal(y, tokenizer.decode(z, steps=8, noise=noise))
    assert torch.equal(tokenizer.decode(z, noise=noise, x0_clamp=True), y.clamp(-1, 1))
    pixels = tokenizer.decode_uint8(z, noise=noise)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels.float(), ((y.clamp(-1, 1) + 1) * 127.5).round())


@pytest.mark.parametrize(
    ("encoder", "sides"), [("f4c3", (16, 24)), ("f8c16", (32, 16)), ("f16c16", (32, 48)), ("f32c64", (32, 64))]
)
def test_any_stride_channels_and_shape_trains_and_round_trips_through_files(encoder, sides, tmp_path):
    torch.manual_seed(0)
    model = SSDD({"name": encoder, "width": 8}, "XXS", encoder_train=True)
    x = torch.rand(1, 3, *sides) * 2 - 1
    noise, before = torch.randn(1, 3, *sides), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    posterior = model.encode(x)
    z = posterior.sample(torch.Generator().manual_seed(0))
    assert z.shape == (1, model.z_dim, sides[0] // model.f, sides[1] // model.f)
    loss = (model.decoder(interpolate(x, noise, torch.tensor(0.5)), 0.5, z) - (x - noise)).square().mean()
    (loss + 1e-3 * posterior.kl().mean()).backward()
    optimizer.step()
    assert loss.isfinite() and not torch.equal(model.encoder.conv_in.weight, before["encoder.conv_in.weight"])
    assert not torch.equal(model.decoder.conv_in.weight, before["decoder.conv_in.weight"])

    model.save_pretrained(tmp_path)
    again = SSDD.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(again.decode(z, steps=1, noise=noise), model.decode(z, steps=1, noise=noise))
    assert again.encoder_fingerprint() == model.encoder_fingerprint()


def test_a_bias_changed_after_a_forward_changes_the_next_one(tokenizer):
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 2, 2)
    with torch.no_grad():
        before = tokenizer.decoder(x, 0.5, z)
        block = tokenizer.decoder.mid_block.transformer_blocks[0]
        block.relative_position_bias.relative_bias_table[8, 7] += 5
        assert (tokenizer.decoder(x, 0.5, z) - before).abs().max() > 1e-6


def test_the_encoder_is_frozen_unless_asked_for():
    assert not any(p.requires_grad for p in SSDD({"name": "f8c2", "width": 8}, "XXS").encoder.parameters())
    trained = SSDD({"name": "f8c2", "width": 8}, "XXS", encoder_train=True, posterior_std=0.1)
    assert all(p.requires_grad for p in trained.encoder.parameters())
    assert trained.encode(torch.zeros(1, 3, 16, 16)).std.mean().item() == pytest.approx(0.1, rel=0.5)


@pytest.mark.parametrize("damage", ["missing", "shape", "extra", "truncated"])
def test_a_file_that_does_not_fit_gives_one_error_and_loads_nothing(tokenizer, tmp_path, damage):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors["decoder.conv_out.bias"]
    elif damage == "shape":
        tensors["decoder.conv_out.bias"] = torch.zeros(4)
    elif damage == "extra":
        tensors["decoder.other"] = torch.zeros(4)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file(tensors, path, metadata=tokenizer.metadata)
    expected = {
        "missing": "lacks decoder.conv_out.bias",
        "shape": r"\(4,\) instead of \(3,\)",
        "extra": "has decoder.other",
        "truncated": "not a complete safetensors file",
    }
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    with pytest.raises(UserError, match=expected[damage]):
        SSDD.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=expected[damage]):
        load_weights(tokenizer, {k: v + 1 for k, v in read_weights(path)[0].items()}, path)
    assert all(torch.equal(value, before[key]) for key, value in tokenizer.state_dict().items())


def test_names_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="f8c4"):
        SSDD("f7c4", "XXS")
    with pytest.raises(UserError, match="XXS"):
        SSDD("f8c4", "tiny")
    with pytest.raises(UserError, match="no weights"):
        SSDD("f8c4", "XXS", checkpoint="never_trained")


def test_sides_and_channels_that_do_not_fit_are_named(tokenizer):
    with pytest.raises(ValueError, match="multiples of 8, got 12x16"):
        tokenizer.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match="2 channels, got 3"):
        tokenizer.decode(torch.zeros(1, 3, 2, 2))


def test_a_copy_of_a_compiled_tokenizer_runs_its_own_weights_and_compiling_twice_does_not_nest(tokenizer):
    z, noise = torch.randn(1, 2, 2, 2), torch.randn(1, 3, 16, 16)
    tokenizer.compile(backend="eager")
    tokenizer.compile(backend="eager")
    before = tokenizer.decode(z, steps=1, noise=noise)
    other = copy.deepcopy(tokenizer)
    with torch.no_grad():
        other.decoder.conv_out.weight.zero_()
        other.decoder.conv_out.bias.zero_()
    assert torch.equal(other.decode(z, steps=1, noise=noise), noise)
    assert torch.equal(tokenizer.decode(z, steps=1, noise=noise), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_encoder_keeps_its_fingerprint_in_half_precision(tokenizer, dtype):
    fingerprint = tokenizer.encoder_fingerprint()
    assert copy.deepcopy(tokenizer).to(dtype).encoder_fingerprint() == fingerprint
    assert tokenizer.double().encoder_fingerprint() == fingerprint


def test_what_a_file_says_of_itself_is_not_trusted_further_than_its_networks(tokenizer, tmp_path):
    path = tmp_path / "model.safetensors"
    said = json.dumps(tokenizer.config | {"checkpoint": "/etc/passwd", "ckpt_dir": "/"})
    save_tensors(path, tokenizer.state_dict(), {"ssdd": said})
    assert SSDD.from_pretrained(path).config == tokenizer.config
    for damaged in ("{", "[1]"):
        save_tensors(path, tokenizer.state_dict(), {"ssdd": damaged})
        with pytest.raises(UserError, match="not the JSON object"):
            SSDD.from_pretrained(path)
    with pytest.raises(UserError, match="checkpoint: unknown option"):
        SSDD.from_pretrained(path, checkpoint="elsewhere")
