"""Guidance equals its closed form, on the channels asked for, and costs nothing where it is off."""

from __future__ import annotations

import pytest
import torch

from dit.guidance import guided_velocity
from dit.model import DiT
from ssdd.engine.errors import UserError
from tests.golden import fill_state_dict

X = torch.randn(3, 4, 2, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 4, 2])
T = torch.tensor(0.6)


@pytest.fixture(scope="module", params=[True, False], ids=["sigma", "no-sigma"])
def model(request: pytest.FixtureRequest) -> DiT:
    model = DiT.from_name("DiT-XXS/1", input_size=(2, 4), in_channels=4, num_classes=5, learn_sigma=request.param)
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)))
    return model.eval().requires_grad_(False)


def predictions(model: DiT) -> tuple[torch.Tensor, torch.Tensor]:
    times = torch.full((3,), 600.0)  # our models see 1000 t
    return model(X, times, Y)[:, :4], model(X, times, torch.full((3,), 5))[:, :4]


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guided_velocity_is_its_closed_form_on_all_channels(model, scale):
    conditional, unconditional = predictions(model)
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(guided_velocity(model, Y, scale)(X, T), expected, atol=1e-5, rtol=1e-5)


def test_guidance_can_be_limited_to_the_first_channels(model):
    conditional, unconditional = predictions(model)
    v = guided_velocity(model, Y, 4.0, cfg_channels=3)(X, T)
    expected = unconditional + 4.0 * (conditional - unconditional)
    torch.testing.assert_close(v[:, :3], expected[:, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v[:, 3:], conditional[:, 3:], atol=1e-5, rtol=1e-5)


def test_scale_one_is_the_conditional_velocity(model):
    torch.testing.assert_close(guided_velocity(model, Y)(X, T), predictions(model)[0], atol=1e-5, rtol=1e-5)


def test_the_unconditional_half_is_computed_inside_the_interval_only(model):
    rows = []
    hook = model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    velocity = guided_velocity(model, Y, 4.0, interval=(0.25, 0.75))
    outside = [velocity(X, torch.tensor(t)) for t in (1.0, 0.8, 0.2, 0.0)]
    assert rows == [3, 3, 3, 3]
    for t in (0.25, 0.5, 0.75):
        velocity(X, torch.tensor(t))
    assert rows[4:] == [6, 6, 6]
    guided_velocity(model, Y, 1.0)(X, T)
    guided_velocity(model, Y, 4.0)(X, torch.tensor(0.0))
    assert rows[7:] == [3, 6]
    hook.remove()
    torch.testing.assert_close(outside[0], model(X, torch.full((3,), 1000.0), Y)[:, :4])


def test_impossible_guidance_is_a_user_error(model):
    with pytest.raises(UserError, match="cfg_interval"):
        guided_velocity(model, Y, 2.0, interval=(0.8, 0.2))
    plain = DiT.from_name("DiT-XXS/1", input_size=2, num_classes=5, null_class=False)
    guided_velocity(plain, Y, 1.0)
    with pytest.raises(UserError, match="null class"):
        guided_velocity(plain, Y, 2.0)
