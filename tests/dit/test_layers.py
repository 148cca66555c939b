"""The options of LightningDiT compute their published equations, and position tables follow the grid."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dit.config import DiTConfig
from dit.layers import Attention, DiTBlock, RotaryEmbedding, SwiGLU, gelu, resize_positions, sincos_position_table
from dit.model import DiT
from dit.options import SIZES
from dit.tasks.train import run as train
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from tests.golden import fill_state_dict

LIGHTNING = dict(rms_norm=True, swiglu=True, rope=True)
EVERYTHING = dict(**LIGHTNING, qk_norm=True, wo_shift=True)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with reference weights; position tables keep their own values."""
    state = module.state_dict()
    fixed = tuple(key for key in state if key == "pos_embed" or "freqs_" in key)
    module.load_state_dict(fill_state_dict(state, keep=fixed))
    return module.eval().requires_grad_(False)


def tiny(**options: object) -> DiT:
    settings = dict(input_size=(4, 6), in_channels=3, num_classes=5, learn_sigma=False) | options
    return filled(DiT.from_name("DiT-XXS/1", **settings))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Rotary embedding by complex numbers: channels 2i and 2i + 1 of x [..., T, d] are one number, turned."""
    tokens, dim = x.shape[-2:]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    frequencies = torch.tensor([10000.0 ** (-2 * i / (dim / 2)) for i in range(dim // 4)], dtype=torch.float64)
    positions = torch.arange(tokens)
    angles = [axis[:, None] * frequencies for axis in (positions // columns, positions % columns)]
    return torch.view_as_real(pairs * torch.exp(1j * torch.cat(angles, dim=1))).flatten(-2).float()


def test_rotary_embedding_turns_pairs_of_channels_by_row_then_column():
    x = torch.randn(2, 3, 24, 16)
    torch.testing.assert_close(RotaryEmbedding((4, 6), 16)(x), rotate(x, columns=6), atol=1e-5, rtol=0)


def test_rotary_scores_depend_on_the_relative_offset_only():
    rotary = RotaryEmbedding((5, 7), 8)
    q, k = torch.randn(8), torch.randn(8)
    q_at, k_at = (rotary(vector.expand(35, 8)).view(5, 7, 8) for vector in (q, k))
    scores = torch.einsum("abd,ijd->abij", q_at, k_at)
    shifted = scores[2:, 3:, 2:, 3:]  # both tokens moved by (2, 3)
    torch.testing.assert_close(shifted, scores[:-2, :-3, :-2, :-3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[0, 0, 1, 0], scores[0, 0, 0, 1])


def test_gelu_as_compiled_is_the_tanh_approximation_with_its_gradient():
    wide = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e6, -60.0, 60.0, 1e6])])
    x, exact_x = wide.clone().requires_grad_(), wide.double().requires_grad_()
    given = torch.randn(len(wide), generator=torch.Generator().manual_seed(0))
    found = torch.compile(gelu, backend="eager", fullgraph=True)(x)
    exact = F.gelu(exact_x, approximate="tanh")
    found.backward(given)
    exact.backward(given.double())
    assert not torch.equal(found, F.gelu(wide, approximate="tanh"))  # the other form
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=2e-6, atol=4e-6)


def test_swiglu_is_its_equation_with_lightningdit_s_width():
    mlp = filled(DiTBlock(48, 2, swiglu=True)).mlp
    assert isinstance(mlp, SwiGLU) and mlp.w12.weight.shape == (256, 48) and mlp.w3.weight.shape == (48, 128)
    x = torch.randn(2, 5, 48)
    a, b = (x @ mlp.w12.weight.T + mlp.w12.bias).split(128, dim=-1)
    torch.testing.assert_close(mlp(x), (a * torch.sigmoid(a) * b) @ mlp.w3.weight.T + mlp.w3.bias)


@pytest.mark.parametrize("rms_norm", [True, False])
def test_queries_and_keys_are_normalised_over_the_head_before_they_are_rotated(rms_norm):
    attention, x = filled(Attention(32, 2, qk_norm=True, rms_norm=rms_norm)), torch.randn(2, 24, 32)
    q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in attention.qkv(x).split(32, dim=-1))
    names = {key for key in attention.state_dict() if "norm" in key}
    if rms_norm:
        assert names == {"q_norm.weight", "k_norm.weight"}
        q, k = rms(q, attention.q_norm.weight), rms(k, attention.k_norm.weight)
    else:
        assert names == {"q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"}
        q = F.layer_norm(q, (16,), attention.q_norm.weight, attention.q_norm.bias)
        k = F.layer_norm(k, (16,), attention.k_norm.weight, attention.k_norm.bias)
    scores = rotate(q, 6) @ rotate(k, 6).transpose(-1, -2) / 4
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, RotaryEmbedding((4, 6), 16)), expected, atol=1e-5, rtol=1e-5)


def test_a_block_without_shifts_scales_and_gates_in_lightningdit_s_order():
    block, x, c = filled(DiTBlock(32, 2, rms_norm=True, wo_shift=True)), torch.randn(2, 6, 32), torch.randn(2, 32)
    scale_attn, gate_attn, scale_mlp, gate_mlp = block.adaLN_modulation(c).unsqueeze(1).split(32, dim=-1)
    y = x + gate_attn * block.attn(rms(x, block.norm1.weight) * (1 + scale_attn))
    expected = y + gate_mlp * block.mlp(rms(y, block.norm2.weight) * (1 + scale_mlp))
    torch.testing.assert_close(block(x, c), expected, atol=1e-5, rtol=1e-5)


def test_state_dict_with_options_is_that_of_lightningdit():
    plain = {key: tuple(value.shape) for key, value in tiny().state_dict().items()}
    expected = {key: shape for key, shape in plain.items() if ".mlp.fc" not in key}
    expected |= {
        "feat_rope.freqs_cos": (24, 64),
        "feat_rope.freqs_sin": (24, 64),
        "final_layer.norm_final.weight": (128,),
    }
    for i in range(4):
        shapes = {"norm1.weight": (128,), "norm2.weight": (128,), "attn.q_norm.weight": (64,)}
        shapes |= {"attn.k_norm.weight": (64,), "mlp.w12.weight": (682, 128), "mlp.w12.bias": (682,)}
        shapes |= {"mlp.w3.weight": (128, 341), "mlp.w3.bias": (128,)}
        shapes |= {"adaLN_modulation.1.weight": (512, 128), "adaLN_modulation.1.bias": (512,)}
        expected |= {f"blocks.{i}.{key}": shape for key, shape in shapes.items()}
    assert {key: tuple(value.shape) for key, value in tiny(**EVERYTHING).state_dict().items()} == expected


@pytest.mark.parametrize(
    ("size", "millions", "digits"),
    [("S", 33.0, 1), ("B", 130.6, 1), ("L", 458.2, 1), ("XL", 675.3, 1), ("1p0B", 1000, -2), ("1p6B", 1600, -2)],
)
def test_parameter_counts_of_lightningdit_are_the_published_ones(size, millions, digits):
    with torch.device("meta"):  # 256 tokens of VA-VAE's 32 channels
        model = DiT.from_name(f"DiT-{size}/1", 16, 32, learn_sigma=False, **LIGHTNING)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == millions
    assert len(model.blocks) == SIZES[size][0] and model.feat_rope.freqs_cos.shape[0] == 256


@pytest.mark.parametrize("option", EVERYTHING)
def test_every_option_starts_at_zero_trains_and_matters(option):
    torch.manual_seed(0)
    model = DiT.from_name("DiT-XXS/1", (4, 6), 3, 5, learn_sigma=False, **{option: True})
    x, t, y = torch.randn(2, 3, 4, 6), torch.tensor([3.0, 900.0]), torch.tensor([0, 5])
    assert torch.count_nonzero(model(x, t, y)) == 0
    model = filled(model).requires_grad_(True)
    model(x, t, y).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for key, p in model.named_parameters() if key != "pos_embed"
    )
    assert not torch.allclose(model(x, t, y), tiny()(x, t, y), atol=1e-3)


def test_all_options_in_bfloat16_autocast_stay_close_to_float32():
    model, x, t, y = tiny(**EVERYTHING), torch.randn(2, 3, 4, 6), torch.tensor([3.0, 871.0]), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    torch.testing.assert_close(out.float(), model(x, t, y), atol=0.1, rtol=0.1)


def test_a_model_with_options_trains_and_its_averaged_weights_load(settings):
    cfg = settings(steps=2)
    for option in EVERYTHING:
        setattr(cfg.model, option, True)
    train(cfg)
    model = DiT.from_pretrained(cfg.run_name, cfg.ckpt_dir)  # averages hold no buffers
    assert all(model.config[option] for option in EVERYTHING)
    torch.testing.assert_close(model.feat_rope.freqs_cos, RotaryEmbedding(model.grid, 64).freqs_cos)


def test_the_block_of_the_configs_is_lightningdit_s_network():
    cfg = parse(DiTConfig, ["+blocks=lightningdit", "model.name=DiT-B/1"], program="dit", description="")
    assert {key for key in EVERYTHING if getattr(cfg.model, key)} == set(LIGHTNING)


def test_a_head_that_rotary_pairs_do_not_divide_is_a_user_error():
    with pytest.raises(UserError, match="rope"):
        DiT(depth=1, width=12, heads=2, patch_size=1, rope=True)


@pytest.mark.parametrize("grid", [(4, 6), (8, 8), (3, 2)])
def test_the_fixed_position_table_is_computed_for_a_new_grid(grid):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        table = sincos_position_table(4, 4, 32).to(dtype)
        assert torch.equal(resize_positions(table, (4, 4), grid), sincos_position_table(*grid, 32).to(dtype))


def test_another_position_table_is_resampled_bicubically():
    table = torch.randn(1, 8 * 12, 4)
    wider = resize_positions(table, (8, 12), (8, 24)).view(8, 24, 4)

    def weight(distance: float) -> float:  # the cubic convolution kernel (Keys 1981) with a = -0.75
        if distance <= 1:
            return 1.25 * distance**3 - 2.25 * distance**2 + 1
        return -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)

    rows = table.view(8, 12, 4)
    for column in (5, 12, 17):  # its centre lies a quarter of an old column beside an old one
        centre = (column + 0.5) / 2 - 0.5
        near = [c for c in range(12) if abs(c - centre) < 2]
        expected = sum(weight(abs(c - centre)) * rows[:, c] for c in near)
        torch.testing.assert_close(wider[:, column], expected)
    assert torch.equal(resize_positions(table, (8, 12), (8, 12)), table)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["dit", "lightningdit"])
def test_a_model_loads_for_another_resolution(tmp_path, options):
    model = tiny(**options)
    model.save_pretrained(tmp_path)
    larger, fresh = DiT.from_pretrained(tmp_path, input_size=(8, 10)), tiny(**options, input_size=(8, 10))
    assert larger.config == fresh.config
    x, t, y = torch.randn(2, 3, 8, 10), torch.tensor([3.0, 900.0]), torch.tensor([0, 5])
    assert torch.equal(larger(x, t, y), fresh(x, t, y))
    assert DiT.from_pretrained(tmp_path, input_size=(4, 6)).config == model.config


def test_a_learned_position_table_is_resampled_on_loading(tmp_path):
    file = tiny().save_pretrained(tmp_path)
    weights = load_file(file) | {"pos_embed": torch.randn(1, 24, 128)}
    save_file(weights, file, {"dit": json.dumps(tiny().config)})
    loaded = DiT.from_pretrained(file, input_size=8)
    assert torch.equal(loaded.pos_embed, resize_positions(weights["pos_embed"], (4, 6), (8, 8)))
