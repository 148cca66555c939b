"""Two processes with a part of a network each compute what one with the whole does, and gather the same tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ssdd.engine import checkpoint
from ssdd.engine.ema import Ema
from ssdd.engine.optim import averaged_weights, build_optimizer
from ssdd.engine.sharding import gathered, laid_out_as, load_whole, local, shard, whole

CPU = torch.device("cpu")


class Network(nn.Module):
    """Two blocks, a weight of the root in channels_last layout, one of fewer rows than processes, a frozen one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)) for _ in range(2))
        self.out = nn.Linear(16, 1)
        self.fixed = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fixed(self.stem(x).mean(dim=(2, 3)))
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


def trained(network: nn.Module, x: Tensor, optimizer_name: str, resume: tuple | None = None) -> tuple:
    """Seven steps on x; the gradient norms, optimizer and averages."""
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(optimizer_name, [{"params": list(parameters.values())}], 1e-3, (0.9, 0.99))
    ema, norms = Ema(parameters, 0.9), []
    if resume is not None:
        averages, count, tensors, values = resume
        ema.load(averages, count)
        checkpoint.load_optimizer(optimizer, tensors, values)
    for _ in range(7):  # schedule-free RAdam moves the weights from its fifth step on
        network(x).square().mean().backward()
        norms.append(whole(nn.utils.clip_grad_norm_(parameters.values(), 0.1)).item())
        optimizer.step()
        optimizer.zero_grad()
        ema.update(averaged_weights(optimizer, parameters))
    return norms, optimizer, ema


def fresh(seed: int) -> Network:
    torch.manual_seed(seed)
    return Network()


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    mine = x[4 * rank : 4 * rank + 4]
    for name in ("adamw", "schedulefree"):
        one, two, again = fresh(0), fresh(0), fresh(1)
        for network in (two, again):
            shard(network, [[block] for block in network.blocks], CPU, world=2)
        norms_one, optimizer_one, ema_one = trained(one, x, name)
        norms_two, optimizer_two, ema_two = trained(two, mine, name)
        assert norms_two == pytest.approx(norms_one, rel=1e-4)
        tensors_one, values_one = checkpoint.optimizer_tensors(optimizer_one)
        tensors_two, values_two = checkpoint.optimizer_tensors(optimizer_two)
        assert values_two == values_one
        pairs = [(two.state_dict(), one.state_dict()), (ema_two.tensors(), ema_one.tensors())]
        pairs += [(tensors_two, tensors_one)]
        for sharded, expected in pairs:
            assert gathered(sharded, keep=False) == {}
            torch.testing.assert_close(gathered(sharded), dict(expected), rtol=1e-3, atol=1e-5)
            large = [key for key, tensor in expected.items() if tensor.dim() and len(tensor) > 1 and "fixed" not in key]
            held = sum(local(sharded[key]).untyped_storage().nbytes() for key in large)
            assert held == sum(expected[key].nbytes for key in large) / 2
        assert local(two.fixed.weight).shape == (16, 16)

        # Onwards from the gathered tensors: sharded again, and whole in each process.
        model, state = gathered(two.state_dict()), (gathered(ema_two.tensors()), ema_two.state())
        state = (*state, gathered(tensors_two), values_two)
        load_whole(again, model)
        for key, tensor in two.state_dict().items():
            assert local(again.state_dict()[key]).equal(local(tensor))
        load_whole(one, model)
        norms_one, _, ema_one = trained(one, x, name, copy.deepcopy(state))  # an optimizer works in what it loads
        norms_two, _, ema_two = trained(again, mine, name, state)
        assert norms_two == pytest.approx(norms_one, rel=1e-3)
        torch.testing.assert_close(gathered(ema_two.tensors()), ema_one.tensors(), rtol=1e-3, atol=1e-5)
    dist.destroy_process_group()


def test_two_processes_hold_half_each_and_train_as_one_whole_network(tmp_path: Path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)


def test_one_process_alone_shards_nothing_and_plain_tensors_pass_through():
    network = fresh(0)
    before = network.state_dict()
    shard(network, [[block] for block in network.blocks], CPU, world=1)
    assert network.state_dict().keys() == before.keys()
    weight = network.out.weight
    assert local(weight) is whole(weight) is laid_out_as(torch.zeros(1), weight) is gathered({"w": weight})["w"]
