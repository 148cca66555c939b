"""Moving averages of parameters."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine.ema import Ema
from ssdd.engine.errors import UserError


def parameters(value: float, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), value, dtype=dtype), "b": torch.full((), 2 * value, dtype=dtype)}


def test_before_the_start_it_is_a_copy():
    ema = Ema(parameters(0.0), decay=0.9, start_iter=3)
    for step in range(3):
        ema.update(parameters(float(step)))
        assert torch.equal(ema.tensors()["a"], torch.full((2, 3), float(step)))


def test_after_the_start_the_decay_warms_up_to_its_limit():
    ema = Ema(parameters(0.0), decay=0.3, start_iter=1)
    ema.update(parameters(5.0))
    expected = 5.0
    for k in range(8):
        value = float(k * k)
        decay = min(0.3, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * value
        ema.update(parameters(value))
        assert ema.tensors()["a"][0, 0].item() == pytest.approx(expected, rel=1e-6)
        assert ema.tensors()["b"].item() == pytest.approx(2 * expected, rel=1e-6)


def test_averages_are_float32_and_do_not_follow_the_parameters_in_place():
    source = parameters(1.0, torch.bfloat16)
    ema = Ema(source, decay=0.999)
    source["a"].zero_()
    assert ema.tensors()["a"].dtype == torch.float32
    assert torch.equal(ema.tensors()["a"], torch.ones(2, 3))
    ema.update(parameters(1.0, torch.bfloat16))
    assert ema.tensors()["a"].dtype == torch.float32


def test_a_loaded_average_continues_with_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    steps = [{"a": torch.randn(4, 4, generator=generator)} for _ in range(12)]
    whole = Ema(steps[0], decay=0.9, start_iter=2)
    for step in steps[:6]:
        whole.update(step)
    resumed = Ema(steps[0], decay=0.9, start_iter=2)
    resumed.load({name: tensor.clone() for name, tensor in whole.tensors().items()}, whole.state())
    for step in steps[6:]:
        whole.update(step)
        resumed.update(step)
    assert torch.equal(whole.tensors()["a"], resumed.tensors()["a"])
    assert whole.state() == resumed.state() == {"updates": 12, "start_iter": 2}


def test_other_names_or_shapes_are_refused():
    ema = Ema(parameters(0.0), decay=0.9)
    with pytest.raises(UserError, match="other parameters.*: b"):
        ema.load({"a": torch.zeros(2, 3)}, {"updates": 1})
    with pytest.raises(UserError, match=r"of a has shape \(3,\), in the model \(2, 3\)"):
        ema.load({"a": torch.zeros(3), "b": torch.zeros(())}, {"updates": 1})
    with pytest.raises(ValueError, match="other parameters"):
        ema.update({"a": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=r"ema\.decay"):
        Ema(parameters(0.0), decay=1.0)
