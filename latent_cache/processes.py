"""The processes of one build: who this one is, where it computes, and how all of them agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ssdd.engine.errors import UserError

PATIENCE = timedelta(days=7)  # processes wait for the slowest one, and a shard may take hours


@dataclass
class Processes:
    """This process is number `rank` of `world`; its encoder runs on `device`."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Processes:
        """Meet the other processes that torchrun or accelerate started, if any; device: auto, cpu or cuda."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda, but this machine has no usable GPU: take device=cpu or device=auto")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
            return cls(0, 1, torch.device(kind))
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device)

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What `decide` returns in process 0, in all of them; a UserError that it raises is raised in all of them."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = decide()
            except UserError as problem:
                answer[1] = str(problem)
        if self.world > 1:
            torch.distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()


def leave() -> int:
    """Part from the other processes, if any; returns this one's rank."""
    rank = int(os.environ.get("RANK", "0"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return rank


@contextmanager
def exact_arithmetic(threads: int) -> Iterator[None]:
    """Full float32 and a fixed order of summation: `threads` on the CPU, no autotuning and no TF32 on the GPU."""
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
