"""Guidance equals its closed form, on the channels asked for, and costs nothing where it is off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit.config import SamplingConfig
from dit.guidance import guided_velocity, interval_grid, split_by_interval
from dit.model import DiT
from dit.samplers import heun
from dit.tasks.sample import draw
from dit.time_convention import FlowConvention
from ssdd.engine.errors import UserError
from ssdd.model.flow import time_grid
from tests.dit.closed_forms import Gaussian
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
    cfg = SamplingConfig(steps=8, cfg_scale=4.0, cfg_interval=(0.25, 0.75))
    draw(model, range(3), Y, cfg)  # steps begin at 1, 0.875, ..., 0.125; guided are those in (0.25, 0.75]
    assert rows == [3, 3, 6, 6, 6, 6, 3, 3]
    del rows[:]
    draw(model, range(3), Y, replace(cfg, sampler="heun"))
    assert rows == [3] * 4 + [6] * 8 + [3] * 3  # both evaluations of a step are of one kind
    del rows[:]
    draw(model, range(3), Y, replace(cfg, sampler="sde", steps=4))  # 1, 0.68, 0.36, 0.04
    assert rows == [3, 6, 6, 3]
    del rows[:]
    draw(model, range(3), Y, replace(cfg, sampler="adaptive", rtol=0.1, atol=0.1))
    outside, inside = rows.index(6), len(rows) - rows[::-1].index(6)
    assert set(rows[:outside]) == set(rows[inside:]) == {3} and set(rows[outside:inside]) == {6}
    del rows[:]
    draw(model, range(3), Y, replace(cfg, steps=2, cfg_interval=(0.0, 1.0)))
    draw(model, range(3), Y, replace(cfg, steps=2, cfg_scale=1.0))
    assert rows == [6, 6, 3, 3]
    hook.remove()


def test_intervals_cut_the_grid_into_pieces():
    grid = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert split_by_interval(grid) == [(True, grid)]
    assert split_by_interval(grid, (0.25, 0.75)) == [(False, grid[:2]), (True, grid[1:4]), (False, grid[3:])]
    assert split_by_interval(grid, (0.3, 0.3)) == [(False, grid)]
    tenths = time_grid(10, power=1.0)  # float32 numbers: 0.7 is a little below 0.7, 0.3 a little above 0.3
    assert split_by_interval(tenths, (0.3, 0.7)) == [(False, tenths[:4]), (True, tenths[3:8]), (False, tenths[7:])]
    for interval in ((0.0, 1.0), (0.3, 0.7), (0.0, 0.7), (0.5, 0.5)):
        pieces = split_by_interval(interval_grid(interval), interval)
        guided = [piece for inside, piece in pieces if inside]
        assert len(guided) == (interval[0] < interval[1])
        assert all(piece == pytest.approx([interval[1], interval[0]]) for piece in guided)


def test_impossible_guidance_is_a_user_error(model):
    for interval in ((0.8, 0.2), (0.0, 1.5)):
        with pytest.raises(UserError, match="cfg_interval"):
            split_by_interval([1.0, 0.0], interval)
    plain = DiT.from_name("DiT-XXS/1", input_size=2, num_classes=5, null_class=False)
    guided_velocity(plain, Y, 1.0)
    with pytest.raises(UserError, match="null class"):
        guided_velocity(plain, Y, 2.0)
    with pytest.raises(UserError, match=r"sampling\.guide, a checkpoint"):
        guided_velocity(model, Y, guide_scale=2.0)
    for other in ({"in_channels": 3}, {"num_classes": 4}):
        guide = DiT.from_name("DiT-XXS/1", **{"input_size": (2, 4), "in_channels": 4, "num_classes": 5, **other})
        with pytest.raises(UserError, match=r"sampling\.guide has"):
            guided_velocity(model, Y, guide=guide, guide_scale=2.0)


def test_autoguidance_leads_away_from_the_guides_conditional_prediction_and_adds_to_the_other_guidance(model):
    guide = DiT.from_name("DiT-XXS/2", input_size=(2, 4), in_channels=4, num_classes=5, time_scale=1.0)
    guide.load_state_dict(fill_state_dict(guide.state_dict(), keep=("pos_embed",)))
    weak = guide.eval().requires_grad_(False)(X, torch.full((3,), 0.6), Y)[:, :4]
    conditional, unconditional = predictions(model)
    rows = []
    hooks = [m.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))) for m in (model, guide)]
    v = guided_velocity(model, Y, guide=guide, guide_scale=2.5)(X, T)
    torch.testing.assert_close(v, weak + 2.5 * (conditional - weak), atol=1e-5, rtol=1e-5)
    both = guided_velocity(model, Y, 1.8, guide=guide, guide_scale=2.5, cfg_channels=3)(X, T)
    expected = conditional + 1.5 * (conditional - weak)
    expected[:, :3] += 0.8 * (conditional - unconditional)[:, :3]
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)
    guided_velocity(model, Y, guide=guide, guide_scale=1.0)(X, T)
    assert rows == [3, 3, 6, 3, 3]
    for hook in hooks:
        hook.remove()


class Gaussians:
    """A generator whose class y is N(means[y], diag(std^2)), the null class last; latents are [B, D, 1, 1]."""

    in_channels, num_classes, null_class, convention = 2, 2, True, FlowConvention(time_scale=1000.0)
    std = torch.tensor([0.5, 0.3], dtype=torch.float64)

    def __init__(self, *means: tuple[float, float]) -> None:
        self.classes = [Gaussian(torch.tensor(mean, dtype=torch.float64), self.std) for mean in means]

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        points = zip(x.flatten(1), t / self.convention.time_scale, y.tolist(), strict=True)
        return torch.cat([self.classes[label].velocity(point[None], time) for point, time, label in points])[
            ..., None, None
        ]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize(("cfg_scale", "guide_scale"), [(3.0, 1.0), (1.0, 2.0), (1.5, 2.0)])
def test_guided_sampling_of_gaussians_is_the_closed_form(cfg_scale, guide_scale, interval):
    # With equal covariances v is affine in the mean, so guidance is the ODE of a Gaussian with an extrapolated mean.
    main = Gaussians((1.0, 0.0), (-1.0, 0.5), (0.2, 0.1))
    weak = Gaussians((0.5, 0.1), (-0.4, 0.2), (0.0, 0.0))
    y = torch.tensor([0, 1, 0])
    start = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    plain = guided_velocity(main, y)
    guided = guided_velocity(main, y, cfg_scale, guide=weak, guide_scale=guide_scale)
    x, expected = start, start.flatten(1)
    for inside, piece in split_by_interval(time_grid(64, power=1.0), interval):
        x = heun(guided if inside else plain, x, piece)
        ends = []
        for point, label in zip(expected, y.tolist(), strict=True):
            own, null, other = main.classes[label].mean, main.classes[2].mean, weak.classes[label].mean
            shift = (cfg_scale - 1) * (own - null) + (guide_scale - 1) * (own - other)
            target = Gaussian(own + shift * inside, Gaussians.std)
            ends.append(target.transport(point, piece[0], piece[-1]))
        expected = torch.stack(ends)
    torch.testing.assert_close(x.flatten(1).double(), expected, atol=2e-3, rtol=0)
    assert (expected - main.classes[0].transport(start.flatten(1), 1.0, 0.0))[0].abs().max() > 0.1  # guidance matters


def test_guided_velocity_never_reads_the_device():
    # Tensors on the meta device have no values, so that any reading of one raises.
    model = DiT.from_name("DiT-XXS/1", input_size=(2, 4), in_channels=4, num_classes=5).to("meta")
    x, y = X.to("meta"), Y.to("meta")
    velocity = guided_velocity(model, y, 2.0, guide=model, guide_scale=2.0)
    assert heun(velocity, x, time_grid(3, power=1.0)).is_meta
