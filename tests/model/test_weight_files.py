"""Weights from elsewhere: official and accelerate files, KL encoders under LDM's and diffusers' names, misfits."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from ssdd import SSDD
from ssdd.engine.errors import UserError
from ssdd.model.decoder import DECODER_SIZES
from ssdd.model.weight_files import DIFFUSERS_NAMES, encoder_weights, options_of, read_weights

diffusers = pytest.importorskip("diffusers")
WIDTH = 16


@pytest.fixture(scope="module")
def vae():
    """diffusers' KL-VAE in the layout of an f8c4 encoder of width 16, random weights."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def ldm_names(weights):
    """diffusers' names -> LDM's, written independently of the loader: by walking the structure."""
    pairs = {"conv_norm_out": "norm_out", "mid_block.attentions.0.group_norm": "mid.attn_1.norm"}
    pairs |= {f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in range(2)}
    pairs |= {f"mid_block.attentions.0.to_{n}": f"mid.attn_1.{n}" for n in "qkv"}
    pairs["mid_block.attentions.0.to_out.0"] = "mid.attn_1.proj_out"
    for i in range(4):
        pairs |= {f"down_blocks.{i}.resnets.{j}": f"down.{i}.block.{j}" for j in range(2)}
        pairs[f"down_blocks.{i}.downsamplers.0"] = f"down.{i}.downsample"
    renamed = {}
    for key, value in weights.items():
        name = key.removeprefix("encoder.")
        for theirs, ours in pairs.items():
            if name.startswith(f"{theirs}."):
                name = ours + name[len(theirs) :]
        name = name.replace("conv_shortcut", "nin_shortcut")
        square = re.match(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", name)
        renamed[f"encoder.{name}" if key.startswith("encoder.") else key] = value[..., None, None] if square else value
    return renamed


@pytest.mark.parametrize("layout", ["diffusers folder", "ldm safetensors", "ldm checkpoint"])
def test_kl_encoders_load_under_either_name_and_encode_as_they_did(vae, layout, tmp_path):
    if layout == "diffusers folder":
        vae.save_pretrained(tmp_path / "vae")
        path = tmp_path / "vae"
    elif layout == "ldm safetensors":
        path = tmp_path / "vae.safetensors"
        weights = {key: value.contiguous() for key, value in ldm_names(vae.state_dict()).items()}
        save_file({f"first_stage_model.{key}": value for key, value in weights.items()}, path)
    else:
        path = tmp_path / "vae.ckpt"
        torch.save({"state_dict": ldm_names(vae.state_dict())}, path)
    model = SSDD({"name": "f8c4", "width": WIDTH}, "XXS", encoder_checkpoint=path)
    x = torch.rand(2, 3, 32, 40) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent_dist
        found = model.encode(x)
    assert (found.mean - expected.mean).abs().max() < 1e-5
    assert (found.logvar - expected.logvar).abs().max() < 1e-5


def test_a_vae_without_quant_conv_gets_the_identity(vae, tmp_path):
    weights = {key: value for key, value in vae.state_dict().items() if "quant_conv" not in key}
    ours = encoder_weights(weights, tmp_path)
    assert torch.equal(ours["out_proj.weight"][:, :, 0, 0], torch.eye(8)) and not ours["out_proj.bias"].any()


def test_the_old_names_of_diffusers_attention_are_known():
    names = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
    for theirs, ours in names.items():
        name = f"mid_block.attentions.0.{theirs}.weight"
        for pattern, replacement in DIFFUSERS_NAMES:
            name = re.sub(pattern, replacement, name)
        assert name == f"mid.attn_1.{ours}.weight"


def test_an_accelerate_folder_gives_its_averaged_weights(tokenizer, tmp_path):
    moved = {key: value + 1 for key, value in tokenizer.state_dict().items()}
    save_file(
        {key: value.contiguous() for key, value in tokenizer.state_dict().items()}, tmp_path / "model.safetensors"
    )
    save_file({key: value.contiguous() for key, value in moved.items()}, tmp_path / "model_1.safetensors")
    model = SSDD.from_pretrained(tmp_path)
    assert all(torch.equal(value, moved[key]) for key, value in model.state_dict().items())
    encoder = SSDD({"name": "f8c2", "width": 8}, "XS", encoder_checkpoint=tmp_path).encoder
    assert torch.equal(encoder.conv_in.weight, moved["encoder.conv_in.weight"])


@pytest.mark.parametrize("size", [*DECODER_SIZES])
def test_the_networks_of_a_file_without_configuration_are_told_from_its_tensors(size):
    with torch.device("meta"):
        weights = SSDD("f16c3", size).state_dict()
    assert options_of(weights) == {"encoder": "f16c3", "decoder": size}


def test_wrong_networks_are_refused_with_those_that_would_fit(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    fitting = re.escape("These weights fit encoder={'name': 'f8c2', 'width': 8}, decoder='XXS'")
    for encoder, decoder in (
        ("f8c4", "XXS"),
        ({"name": "f8c2", "width": 8}, "XS"),
        ({"name": "f16c2", "width": 8}, "XXS"),
    ):
        with pytest.raises(UserError, match=fitting):
            SSDD(encoder, decoder, checkpoint=path)
    with pytest.raises(UserError, match="holds no encoder"):
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        SSDD("f8c4", "XXS", encoder_checkpoint=tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="pass encoder= and decoder="):
        SSDD.from_pretrained(tmp_path / "other.safetensors")


def test_what_fits_is_loaded_when_asked_for_and_the_rest_is_told(tokenizer, tmp_path, caplog):
    tensors = {key: value.contiguous() for key, value in tokenizer.state_dict().items()}
    tensors["decoder.conv_out.bias"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata=tokenizer.metadata)
    model = SSDD.from_pretrained(tmp_path, strict=False)
    assert torch.equal(model.decoder.conv_out.weight, tokenizer.decoder.conv_out.weight)
    assert "decoder.conv_out.bias is (4,) instead of (3,)" in caplog.text


def test_what_comes_from_official_files_keeps_their_licence(tokenizer, tmp_path):
    save_file(
        {key: value.contiguous() for key, value in tokenizer.state_dict().items()}, tmp_path / "official.safetensors"
    )
    model = SSDD.from_pretrained(tmp_path / "official.safetensors")
    model.save_pretrained(tmp_path)
    derived = SSDD({"name": "f8c2", "width": 8}, "XS", encoder_checkpoint=tmp_path)
    assert model.license == derived.license == SSDD.from_pretrained(tmp_path).license == "CC-BY-NC-4.0"
    assert derived.metadata["license"] == "CC-BY-NC-4.0"
    assert tokenizer.license is None and "license" not in tokenizer.metadata


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save({"encoder.conv_in.weight": Code()}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        SSDD("f8c4", "XXS", encoder_checkpoint=tmp_path / "model.ckpt")


def test_decoders_are_given_by_mappings_too():
    named = SSDD({"name": "f8c2", "width": 8}, {"size": "XXS", "layers": 1, "window": 4})
    assert len(named.decoder.mid_block.transformer_blocks) == 1
    assert named.decoder.mid_block.transformer_blocks[0].relative_position_bias.relative_bias_table.shape[0] == 7
    own = SSDD({"name": "f8c2", "width": 8}, {"base": 32, "multiples": [1, 1, 1, 1], "layers": 1, "groups": 8})
    assert own.decode(torch.zeros(1, 2, 2, 2), steps=1).shape == (1, 3, 16, 16)
    for wrong in ({"size": "XXS", "depth": 3}, {"base": 32}):
        with pytest.raises(UserError, match="expected some of the keys size, window, base"):
            SSDD({"name": "f8c2", "width": 8}, wrong)
    with pytest.raises(UserError, match="64 channels do not divide into 5 heads"):
        SSDD({"name": "f8c2", "width": 8}, {"size": "XXS", "heads": 5})


def test_the_window_of_a_decoder_is_told_from_its_tensors():
    weights = SSDD({"name": "f8c2", "width": 8}, {"size": "XXS", "window": 5}).state_dict()
    assert options_of(weights)["decoder"] == {"size": "XXS", "window": 5}


def test_errors_without_a_message_are_told_by_their_type(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(EOFError()))
    with pytest.raises(UserError, match="EOFError"):
        read_weights(path)


def test_keys_that_a_kl_decoder_does_not_have_are_refused():
    with pytest.raises(UserError, match="unknown keys window"):
        SSDD("f8c4", {"size": "kl", "window": 4})
