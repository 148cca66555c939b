"""The network computes what facebookresearch/DiT computes, under the same state-dict keys, for any size."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit.model import DiT
from dit.options import NAMES, SIZES
from ssdd.engine.errors import UserError
from tests.golden import fill_state_dict, load_case

GOLDEN = {
    "dit_S2_8": dict(name="DiT-S/2", input_size=8, in_channels=4, num_classes=10),
    "dit_B4_16": dict(name="DiT-B/4", input_size=16, in_channels=4, num_classes=1000),
}


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request: pytest.FixtureRequest) -> tuple[DiT, dict[str, torch.Tensor]]:
    with torch.device("meta"):
        model = DiT.from_name(**GOLDEN[request.param], learn_sigma=True).eval()
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)), assign=True)
    return model, load_case(request.param)


@torch.no_grad()
def test_outputs_agree_with_the_reference_cases(golden):
    model, case = golden
    x, y = case["in.x"], case["in.y"]
    torch.testing.assert_close(model(x, case["in.t_dit"], y), case["out.dit"], atol=2e-4, rtol=0)
    torch.testing.assert_close(model(x, case["in.t_sit"], y)[:, :4], case["out.sit"], atol=2e-4, rtol=0)
    torch.testing.assert_close(model.pos_embed, case["out.pos_embed"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_guidance_on_three_channels_agrees_with_the_reference_cases(golden):
    model, case = golden
    x, t, y = case["in.x"].repeat(2, 1, 1, 1), case["in.t_dit"].repeat(2), case["in.y"]
    labels = torch.cat([y, torch.full_like(y, model.num_classes)])
    guided = model.forward_with_cfg(x, t, labels, cfg_scale=4.0, cfg_channels=3)
    torch.testing.assert_close(guided, case["out.dit_cfg4_first3"], atol=2e-4, rtol=0)


@torch.no_grad()
def test_guidance_covers_all_latent_channels_and_no_sigma_by_default(golden):
    model, case = golden
    x, t, y = case["in.x"].repeat(2, 1, 1, 1), case["in.t_dit"].repeat(2), case["in.y"]
    labels = torch.cat([y, torch.full_like(y, model.num_classes)])
    plain = model(x, t, labels)
    conditional, unconditional = plain[:, :4].chunk(2)
    guided = model.forward_with_cfg(x, t, labels, cfg_scale=4.0)
    expected = unconditional + 4.0 * (conditional - unconditional)
    torch.testing.assert_close(guided[:, :4], expected.repeat(2, 1, 1, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided[:, 4:], plain[:, 4:])


PARAMETERS = {  # millions, learn_sigma, 4 channels, 1000 classes + null, 256 px: latents of 32 x 32
    "S": (32.96, 32.95, 33.15),
    "B": (130.51, 130.48, 130.88),
    "L": (458.10, 458.05, 458.59),
    "XL": (675.13, 675.07, 675.68),
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_are_the_published_ones(size):
    for patch, millions in zip((2, 4, 8), PARAMETERS[size], strict=True):
        with torch.device("meta"):
            model = DiT.from_name(f"DiT-{size}/{patch}", input_size=32)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_state_dict_keys_and_shapes_are_those_of_the_official_repository():
    with torch.device("meta"):
        model = DiT.from_name("DiT-S/2", input_size=8, in_channels=4, num_classes=10)
    h, p, channels, out, tokens = 384, 2, 4, 8, 16
    expected = {
        "pos_embed": (1, tokens, h),
        "x_embedder.proj.weight": (h, channels, p, p),
        "x_embedder.proj.bias": (h,),
        "t_embedder.mlp.0.weight": (h, 256),
        "t_embedder.mlp.0.bias": (h,),
        "t_embedder.mlp.2.weight": (h, h),
        "t_embedder.mlp.2.bias": (h,),
        "y_embedder.embedding_table.weight": (11, h),
        "final_layer.linear.weight": (p * p * out, h),
        "final_layer.linear.bias": (p * p * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * h, h),
        "final_layer.adaLN_modulation.1.bias": (2 * h,),
    }
    linears = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "mlp.fc1": (4 * h, h), "mlp.fc2": (h, 4 * h)}
    linears["adaLN_modulation.1"] = (6 * h, h)
    for i in range(12):
        for key, (rows, columns) in linears.items():
            expected[f"blocks.{i}.{key}.weight"] = (rows, columns)
            expected[f"blocks.{i}.{key}.bias"] = (rows,)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_a_fresh_network_outputs_exactly_zero():
    model = DiT.from_name("DiT-XXS/1", input_size=4, in_channels=3, num_classes=5)
    assert torch.count_nonzero(model(torch.randn(2, 3, 4, 4), torch.tensor([3.0, 900.0]), torch.tensor([0, 5]))) == 0


def test_initial_weights_follow_the_paper():
    torch.manual_seed(0)
    model = DiT.from_name("DiT-XS/2", input_size=8)
    qkv, patch = model.blocks[0].attn.qkv, model.x_embedder.proj.weight
    assert math.isclose(qkv.weight.std().item(), math.sqrt(2 / (192 + 576)), rel_tol=0.02)  # Xavier
    assert math.isclose(patch.std().item(), math.sqrt(2 / (16 + 192)), rel_tol=0.1)
    assert math.isclose(model.y_embedder.embedding_table.weight.std().item(), 0.02, rel_tol=0.02)
    assert math.isclose(model.t_embedder.mlp[2].weight.std().item(), 0.02, rel_tol=0.02)
    assert torch.count_nonzero(qkv.bias) == 0
    assert not model.pos_embed.requires_grad


def test_latents_need_not_be_square():
    model = DiT.from_name("DiT-XXS/2", input_size=(4, 8), in_channels=2, num_classes=3, learn_sigma=False)
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)))
    x = torch.randn(2, 2, 4, 8)
    assert model(x, torch.rand(2), torch.tensor([0, 3])).shape == x.shape
    square = DiT.from_name("DiT-XXS/2", input_size=8, in_channels=2)  # rows 0 and 1 of the square grid's table
    torch.testing.assert_close(model.pos_embed, square.pos_embed[:, :8])


def test_a_patch_lands_where_it_came_from():
    """With the last layer copying one token's index, every output pixel carries the index of its own patch."""
    model = DiT.from_name("DiT-XXS/2", input_size=(4, 6), in_channels=1, num_classes=1, learn_sigma=False)
    patches = torch.arange(6.0).view(1, 6, 1).expand(1, 6, 4) * 10 + torch.arange(4.0)
    image = model.unpatchify(patches)[0, 0]
    assert image[:2, :2].tolist() == [[0, 1], [2, 3]]
    assert image[:2, 2:4].tolist() == [[10, 11], [12, 13]]
    assert image[2:, :2].tolist() == [[30, 31], [32, 33]]


def test_every_size_exists_with_every_patch():
    assert len(NAMES) == 4 * len(SIZES)
    assert {"DiT-S/2", "DiT-XL/8", "DiT-XS/1", "DiT-XXS/1"} <= set(NAMES)


def test_a_model_without_null_class_has_one_row_a_class():
    assert DiT.from_name("DiT-XXS/1", 4, num_classes=7, null_class=False).y_embedder.embedding_table.num_embeddings == 7


def test_unknown_names_and_undividable_latents_are_user_errors():
    with pytest.raises(UserError, match="DiT-S/2"):
        DiT.from_name("DiT-M/2")
    with pytest.raises(UserError, match="5x5"):
        DiT.from_name("DiT-S/2", input_size=5)


def test_a_saved_model_loads_with_its_config(tmp_path):
    model = DiT.from_name(
        "DiT-XXS/2", input_size=(4, 8), in_channels=3, num_classes=6, learn_sigma=False, time_scale=1.0
    )
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)))
    file = model.save_pretrained(tmp_path)
    with safe_open(file, framework="pt") as handle:
        assert json.loads(handle.metadata()["dit"])["name"] == "DiT-XXS/2"
    for reference in (file, tmp_path):
        loaded = DiT.from_pretrained(reference)
        assert loaded.config == model.config
        assert not loaded.training and not loaded.pos_embed.requires_grad
        for key, value in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


def test_files_that_are_no_dit_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="looked for"):
        DiT.from_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no DiT config"):
        DiT.from_pretrained(tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="not a readable"):
        DiT.from_pretrained(tmp_path / "torn.safetensors")
    config = json.dumps(DiT.from_name("DiT-XXS/1", 4).config)
    save_file({"a": torch.zeros(1)}, tmp_path / "short.safetensors", {"dit": config})
    with pytest.raises(UserError, match="its own config"):
        DiT.from_pretrained(tmp_path / "short.safetensors")


def test_bfloat16_autocast_keeps_the_result_close():
    model = DiT.from_name("DiT-XXS/1", input_size=4)
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)))
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 871.0]), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    torch.testing.assert_close(out.float(), model(x, t, y), atol=0.1, rtol=0.1)
