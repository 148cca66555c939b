"""Fully sharded training (FSDP2): every process keeps its part of each trained tensor, its average and optimizer state.

A trainer shards its network before it makes optimizer and averages, whose tensors are then sharded too (DTensors).
Files hold whole tensors, the same as without sharding, and continue on any number of processes: `gathered` and
`laid_out_as` translate, and leave plain tensors alone, so that a page has one path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(root: nn.Module, blocks: Iterable[Sequence[nn.Module]], device: torch.device, world: int) -> None:
    """Shard what `root` trains, in place; frozen parameters and buffers stay whole in every process.

    blocks: the weights of each are fetched together when the first of its modules runs forward, and let go after the
    last; all other weights while `root` does. No weight may be used at other times. The processes must hold equal
    weights. One process alone keeps everything.
    """
    if world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    frozen = {p for p in root.parameters() if not p.requires_grad}
    for parameter in root.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.contiguous()  # FSDP takes no channels_last
    for block in blocks:
        if any(p.requires_grad for module in block for p in module.parameters()):
            fully_shard(list(block), mesh=mesh, ignored_params=frozen)
    fully_shard(root, mesh=mesh, ignored_params=frozen)


def sharded_blocks(network: nn.Module) -> list[list[nn.Module]]:
    """What `shard` takes as blocks: of every block of `network`, the modules that its method `sharded` names.

    A block leaves out what runs before and outside of its own forward pass.
    """
    return [module.sharded() for module in network.modules() if hasattr(module, "sharded")]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; every process must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The tensors, sharded ones whole and on the CPU; every process must call, and those with keep=False get {}."""
    result = {}
    for name, tensor in tensors.items():
        full = whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor  # one at a time: the device has no room
        if keep:
            result[name] = full
    return result


def laid_out_as(like: Tensor, full: Tensor) -> Tensor:
    """A whole tensor that every process holds, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`network.load_state_dict` of whole tensors, into a sharded network too."""
    here = network.state_dict()
    network.load_state_dict({name: laid_out_as(here.get(name, full), full) for name, full in weights.items()})
