"""Optimizers in a checkpoint: a resumed one takes the same steps, the state of another model is refused."""

from __future__ import annotations

import pytest
import torch
from schedulefree import RAdamScheduleFree

from ssdd.engine import checkpoint
from ssdd.engine.errors import UserError


def network(channels_last: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 4, 2))
    return net.to(memory_format=torch.channels_last) if channels_last else net


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()


def adamw(net: torch.nn.Module) -> torch.optim.Optimizer:
    first, *others = net.parameters()
    groups = [{"params": [first], "weight_decay": 0.0}, {"params": others, "lr": torch.tensor(3e-3)}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), foreach=False)


def adamw_plain(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3, amsgrad=True)


def schedule_free(net: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = RAdamScheduleFree(net.parameters(), lr=2.5e-3, weight_decay=1e-2)
    optimizer.train()
    return optimizer


def assert_same(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("build", [adamw, adamw_plain, schedule_free])
def test_a_resumed_optimizer_takes_the_same_steps_bit_for_bit(tmp_path, build, channels_last):
    net = network(channels_last)
    optimizer = build(net)
    train(net, optimizer, range(8))
    tensors, values = checkpoint.optimizer_tensors(optimizer)
    checkpoint.save(tmp_path / "c", {"model": net.state_dict(), "optimizer": tensors}, {"optimizer": values})

    resumed = network(channels_last)
    resumed_optimizer = build(resumed)
    saved, state = checkpoint.load(tmp_path / "c")
    resumed.load_state_dict(saved["model"])
    checkpoint.load_optimizer(resumed_optimizer, saved["optimizer"], state["optimizer"])
    assert_same(resumed_optimizer.state_dict(), optimizer.state_dict())

    train(net, optimizer, range(8, 14))
    train(resumed, resumed_optimizer, range(8, 14))
    assert_same(dict(resumed.state_dict()), dict(net.state_dict()))
    assert_same(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_an_optimizer_that_made_no_step_or_skipped_a_parameter_round_trips():
    net = network()
    optimizer = schedule_free(net)
    fresh = schedule_free(network())
    checkpoint.load_optimizer(fresh, *checkpoint.optimizer_tensors(optimizer))
    assert_same(fresh.state_dict(), optimizer.state_dict())
    net[0].requires_grad_(False)
    train(net, optimizer, range(2))
    checkpoint.load_optimizer(fresh, *checkpoint.optimizer_tensors(optimizer))
    assert_same(fresh.state_dict(), optimizer.state_dict())


def test_state_of_another_dtype_than_its_parameter_and_python_scalars_are_kept():
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter] = {
        "momentum_buffer": torch.randn(5) / 3,
        "count": 4,
        "scale": 0.1,
        "factor": torch.ones(2),
    }
    other = torch.optim.SGD([parameter], lr=0.2, momentum=0.5)
    checkpoint.load_optimizer(other, *checkpoint.optimizer_tensors(optimizer))
    assert_same(other.state_dict(), optimizer.state_dict())


def test_the_state_of_another_model_is_refused():
    saved = checkpoint.optimizer_tensors(adamw_plain(network()))
    with pytest.raises(UserError, match=r"groups of \[4\] tensors.*groups of \[1, 3\]"):
        checkpoint.load_optimizer(adamw(network()), *saved)
    net = torch.nn.Linear(2, 3)
    optimizer = adamw_plain(net)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for other in (torch.nn.Linear(3, 2), torch.nn.Linear(2, 4)):
        with pytest.raises(UserError, match="belongs to another model"):
            checkpoint.load_optimizer(adamw_plain(other), *checkpoint.optimizer_tensors(optimizer))
