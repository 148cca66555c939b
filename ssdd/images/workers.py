"""Worker processes that read batches, on machines with little shared memory or few open files as well.

torch's workers hand tensors over in shared memory, /dev/shm, one open file per tensor. Containers often have 64 MB of
it. A worker that runs out of either fails in a thread of its queue, and its owner would wait for the batch forever.
"""

from __future__ import annotations

import logging
import multiprocessing.queues
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.errors import UserError, first_line
from ssdd.engine.interrupt import SIGNALS

SHARED_MEMORY = "/dev/shm"
AHEAD = 2  # batches that each worker reads ahead
REMEDY = (
    "Set dataset.workers=0, or fewer workers; give a container more shared memory (docker run --shm-size=8g, or "
    "--ipc=host); raise the limit of open files (ulimit -n 4096)"
)

FAILURES = ("DataLoader worker", "Too many open files", "shared memory")
WANTED_FILES = 4096
SPARE_FILES = 16  # for checkpoints, logs and images
OF_A_WORKER = 4
TENSORS = 4  # of a batch

log = logging.getLogger(__name__)


def read_by_workers(
    reader: torch.utils.data.Dataset, keys: Iterable[Any], workers: int, bytes_of: Callable[[Any], int]
) -> Iterator[Any]:
    """`reader[key]`, a batch, for each of `keys`, in their order, read ahead by `workers` processes.

    A batch is a tensor, a tuple of tensors and other values, or any other value; bytes_of(key): about its size.
    Batches go through pipes where shared memory has no room for those ahead. UserError when a worker process ends
    before its time.
    """
    keys = iter(keys)
    first = next(keys, None)
    if first is None:
        return
    piped = not _has_room(bytes_of(first), workers)
    others = set(multiprocessing.active_children())
    try:
        loader = torch.utils.data.DataLoader(
            _Piped(reader) if piped else reader,
            batch_size=None,
            sampler=chain([first], keys),
            num_workers=workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            worker_init_fn=_prepare,
            generator=torch.Generator(),  # its own, so that the global stream stays where it is
        )
        for batch in loader:
            yield _converted(batch, np.ndarray, torch.from_numpy) if piped else batch
    except (OSError, RuntimeError) as problem:
        if not isinstance(problem, OSError) and not any(failure in str(problem) for failure in FAILURES):
            raise
        for worker in set(multiprocessing.active_children()) - others:  # they may wait for each other, and for us
            worker.kill()
        raise UserError(f"worker processes can't read images ({first_line(problem)}). {REMEDY}") from problem


def free_shared_memory() -> float:
    """Bytes; infinite on systems without a folder of it."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return float("inf")


def free_descriptors() -> float:
    """How many more files this process may open, once its limit is as high as it may set it itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft := wanted, hard))
    try:
        return float("inf") if soft == resource.RLIM_INFINITY else soft - len(os.listdir("/dev/fd"))
    except OSError:
        return soft / 2


def _has_room(batch_bytes: int, workers: int) -> bool:
    """Whether `workers` can hand over batches in shared memory; UserError where they can't do so at all."""
    needed, files = batch_bytes * (workers * AHEAD + 1), free_descriptors()
    if files < SPARE_FILES + OF_A_WORKER * workers:
        raise UserError(
            f"{workers} worker processes take {OF_A_WORKER * workers} open files, and this process may open only "
            f"{max(0, int(files))} more. {REMEDY}"
        )
    if free_shared_memory() < needed:
        lacking = f"{SHARED_MEMORY} has less than the {needed / 1e6:.1f} MB free"
    elif files < SPARE_FILES + (OF_A_WORKER + AHEAD * TENSORS) * workers:
        lacking = "the limit of open files (ulimit -n) is lower than"
    else:
        return True
    log.warning("%s that %d workers take: batches go through pipes, which is slower. %s", lacking, workers, REMEDY)
    return False


def _prepare(worker: int) -> None:
    """In each worker, at its start."""
    for number in SIGNALS:  # one to the whole process group must not end the workers: their owner still checkpoints
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(problem: Exception, batch: Any) -> None:
    """What can't be handed over is lost, so the worker ends, which its owner sees."""
    os.write(2, f"a worker can't hand over its batch: {problem}\n".encode())
    os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch


class _Piped(torch.utils.data.Dataset):
    """The batches of `reader` with arrays, which are pickled, in place of tensors."""

    def __init__(self, reader: torch.utils.data.Dataset) -> None:
        self.reader = reader

    def __getitem__(self, key: Any) -> Any:
        return _converted(self.reader[key], Tensor, Tensor.numpy)


def _converted(batch: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """The batch with what is of this kind converted."""
    if isinstance(batch, tuple):
        return tuple(_converted(part, kind, convert) for part in batch)
    return convert(batch) if isinstance(batch, kind) else batch
