"""The processes of a run: which one this is, where it computes, and how all of them agree.

Any launcher that accelerate knows starts them (accelerate launch, torchrun, mpirun). Of accelerate only what finds them
is used, which keeps nothing but ranks and devices for the process: precision is a value of its own (`precision.py`).
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssdd.engine.errors import UserError

PATIENCE = timedelta(days=7)
"""How long a process waits for the others. All wait for the slowest one, or for what one of them does alone, such as a
shard of a cache, distances of an evaluation, a checkpoint: hours on large data, where torch gives up after minutes.
"""
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
SHARDING_LAUNCHERS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `world`; its networks run on `device`. group: None for torch's default one."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """Meet the other processes that a launcher started, if any; to be called by all of them.

        device: auto (the accelerator that torch finds, else the CPU), cpu or cuda. UserError where there is no such
        device, or accelerate is configured to shard parameters, which the trainers do themselves.
        """
        for name in SHARDING_LAUNCHERS:
            if _flag(f"ACCELERATE_USE_{name}"):
                raise UserError(
                    f"accelerate is configured for {name}, which is not supported: run `accelerate config` again "
                    "without it, or launch with torchrun, and set training.fsdp=true to shard parameters"
                )
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda, but this machine has no usable GPU: use device=cpu or device=auto")
        without_gpu = _flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        on_cpu = device == "cpu" or without_gpu
        if all(int(os.environ.get(name) or 1) == 1 for name in WORLD_SIZES):
            return cls(0, 1, torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator())
        from accelerate import PartialState

        state = PartialState(cpu=without_gpu, timeout=PATIENCE)
        if state.num_processes == 1:
            raise UserError("several processes were started, but they do not find each other: start them with torchrun")
        atexit.unregister(_leave)  # once, however often they join
        atexit.register(_leave)
        beside_gpu = on_cpu and not without_gpu  # where the default group exchanges what lies on GPUs only
        own, group = torch.device("cpu") if on_cpu else state.device, _cpu_group() if beside_gpu else None
        return cls(state.process_index, state.num_processes, own, group)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all have made."""
        return self.rank == 0

    def own(self, rows: int) -> slice:
        """This process's rows of a batch of which each process gets `rows`."""
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier(group=self.group)

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What `decide` returns in process 0, in all of them; a UserError that it raises is raised in all of them."""
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = decide()
            except UserError as problem:
                answer[1] = str(problem)
        if self.world > 1:
            dist.broadcast_object_list(answer, src=0, group=self.group)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] of all processes in the order of their ranks; each may have another number of them."""
        if self.world == 1:
            return rows
        own = self._exchanged(rows)
        counts = self.gather_objects(len(own))
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return tensor
        total = self._exchanged(tensor).clone()
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        return tensor if self.world == 1 else self.sum(tensor) / self.world

    def _exchanged(self, tensor: Tensor) -> Tensor:
        """The tensor where the processes' backend takes it: NCCL has GPUs only, gloo the CPU."""
        return tensor.to({"nccl": "cuda", "gloo": "cpu"}.get(dist.get_backend(self.group), tensor.device))

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over the processes where there are several (DDP)."""
        if self.world == 1:
            return module
        devices = None if self.device.type == "cpu" else [self.device]
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def print(self, text: str) -> None:
        """Print a line once."""
        if self.is_main:
            print(text, flush=True)


def gradients_kept(module: nn.Module, keep: bool) -> AbstractContextManager[None]:
    """Forward and backward passes inside keep their gradients to this process: for all but the last accumulated part.

    Only DDP can; others, FSDP among them, exchange every time.
    """
    return module.no_sync() if keep and isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()


@functools.cache
def _cpu_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")
