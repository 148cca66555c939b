"""The decoder's layers, that share, fold and overwrite, equal its plain form: values, gradients, work a decode."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import ssdd.model.layers
from ssdd import SSDD
from ssdd.engine.throughput import count_forward_flop
from ssdd.model.flow import time_grid
from tests.plain_decoder import PlainDecoder


def pair(size, z_dim):
    """Our decoder and the plain one with the same weights, none of which is zero."""
    torch.manual_seed(0)
    model = SSDD({"name": f"f8c{z_dim}", "width": 8}, size)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    plain = PlainDecoder(size, z_dim)
    plain.load_state_dict(model.decoder.state_dict())
    return model, plain


CASES = [("S", (64, 64), 1), ("XS", (72, 136), 2), ("XXS", (16, 24), 3)]
GRIDS = [(2, 2), (4, 4), (16, 16), (1, 1), (5, 7)]  # latents of 64 x 64 px, at stride 32, 16 and 4 and at no stride


@pytest.mark.parametrize("cached_values", [0, ssdd.model.layers.CACHED_VALUES])
@pytest.mark.parametrize("grid", GRIDS)
def test_latents_of_any_grid_equal_the_plain_form(grid, cached_values, monkeypatch):
    monkeypatch.setattr(ssdd.model.layers, "CACHED_VALUES", cached_values)
    model, plain = pair("XXS", 4)
    x, z = torch.randn(2, 3, 64, 64), torch.randn(2, 4, *grid)
    expected = plain(x, 0.3, z)
    with torch.no_grad():
        assert (model.decoder(x, 0.3, z) - expected).abs().max() <= 1e-4
    assert (model.decoder(x, 0.3, z) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("cached_values", [0, ssdd.model.layers.CACHED_VALUES])
@pytest.mark.parametrize("grad", [True, False])
def test_one_image_or_one_latent_stands_for_all_and_other_numbers_are_refused(grad, cached_values, monkeypatch):
    monkeypatch.setattr(ssdd.model.layers, "CACHED_VALUES", cached_values)
    model, _ = pair("XXS", 4)
    x, z, t = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 2, 2), torch.rand(2)
    with torch.set_grad_enabled(grad):
        expected = torch.cat([model.decoder(x[:1], t[i], z[i : i + 1]) for i in (0, 1)])
        assert (model.decoder(x[:1], t, z) - expected).abs().max() < 1e-5
        expected = torch.cat([model.decoder(x[i : i + 1], t[i], z[:1]) for i in (0, 1)])
        assert (model.decoder(x, t, z[:1]) - expected).abs().max() < 1e-5
        for wrong in ((x[:1], t, z[:1]), (x, torch.rand(3), z), (torch.randn(3, 3, 16, 16), 0.5, z)):
            with pytest.raises(ValueError, match="do not match"):
                model.decoder(*wrong)


@pytest.mark.parametrize("cached_values", [0, ssdd.model.layers.CACHED_VALUES])
@pytest.mark.parametrize(("size", "sides", "batch"), CASES)
def test_the_velocity_equals_the_plain_form_with_and_without_gradients(size, sides, batch, cached_values, monkeypatch):
    monkeypatch.setattr(ssdd.model.layers, "CACHED_VALUES", cached_values)  # 0: all maps are treated as large ones
    model, plain = pair(size, 4)
    x, z = torch.randn(batch, 3, *sides), torch.randn(batch, 4, *(side // 8 for side in sides))
    for t in (torch.tensor(0.7), torch.rand(batch)):
        expected = plain(x, t, z)
        assert (model.decoder(x, t, z) - expected).abs().max() <= 1e-4
        with torch.no_grad():
            kept = x.clone(), z.clone()
            assert (model.decoder(x, t, z) - expected).abs().max() <= 1e-4
            assert torch.equal(x, kept[0]) and torch.equal(z, kept[1])


@pytest.mark.parametrize(("size", "sides", "batch"), CASES)
def test_gradients_equal_the_plain_form(size, sides, batch):
    model, plain = pair(size, 4)
    x, t, z = torch.randn(batch, 3, *sides), torch.rand(batch), torch.randn(batch, 4, *(side // 8 for side in sides))
    for network in (model.decoder, plain):
        network(x, t, z).square().mean().backward()
    reference = dict(plain.named_parameters())
    for name, parameter in model.decoder.named_parameters():
        expected = reference[name].grad
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


def test_decodes_of_several_steps_equal_the_plain_form():
    model, plain = pair("XS", 4)
    z, noise = torch.randn(2, 4, 8, 6), torch.randn(2, 3, 64, 48)
    for steps in (1, 4):
        x, grid = noise, time_grid(steps)
        with torch.no_grad():
            for now, after in zip(grid, grid[1:], strict=False):
                x = x + (now - after) * plain(x, now, z)
        assert (model.decode(z, steps=steps, noise=noise) - x).abs().max() <= 1e-4


def test_bfloat16_is_as_near_to_float32_as_the_plain_form_in_bfloat16():
    model, plain = pair("S", 4)
    x, t, z = torch.randn(1, 3, 64, 64), torch.tensor(0.7), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        exact = plain(x, t, z)
        errors = [(network.bfloat16()(x, t, z) - exact).square().mean().sqrt() for network in (model.decoder, plain)]
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("steps", [1, 5])
def test_what_depends_on_z_alone_is_computed_once_a_decode(steps):
    model, _ = pair("XXS", 4)
    calls: Counter[str] = Counter()
    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.SiLU) or name.endswith("relative_position_bias"):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model.decode(torch.randn(1, 4, 2, 2), steps=steps, noise=torch.randn(1, 3, 16, 16))
    of_z = {name for name in calls if "ctx_proj" in name or "relative_position" in name}
    of_z |= {name for name in calls if "norm1.linear" in name}
    assert {calls[name] for name in of_z} == {1}
    assert {calls[name] for name in calls if name not in of_z} == {steps}
    assert len(of_z) == 3 + 20 + 2 * 2  # the context's projection, 20 residual blocks, norm and bias of 2 transformers


def test_the_products_of_z_alone_are_those_of_one_step_whatever_the_steps():
    model, _ = pair("XXS", 4)
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 2, 2)
    of_z = count_forward_flop(lambda: model.decoder.condition(z, 16, 16))
    a_step = count_forward_flop(lambda: model.decoder(x, 0.5, z)) - of_z
    for steps in (1, 5):
        found = count_forward_flop(lambda: model.decode(z, steps=steps, noise=x))  # noqa: B023
        assert of_z > 0 and found == of_z + steps * a_step
