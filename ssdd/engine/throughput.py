"""How fast a training loop goes and how well it uses the machine, figured out at log points only."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssdd.engine.devices import peak_memory, synchronize
from ssdd.engine.precision import DTYPES

Batch = TypeVar("Batch")

HALF_PRECISION_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "A10": 125,
    "A40": 150,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bf16 and fp16 peak with float32 accumulation, from the makers' data sheets, by words of the device's name."""


def count_flop(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """FLOP (two per multiply-add) of the matrix products, convolutions and attentions of `loss` and its gradient.

    Computes both once, leaving `.grad` alone; before the network is compiled or wrapped.
    """
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss(), list(parameters), allow_unused=True)
    return counter.get_total_flops()


@torch.no_grad()
def count_forward_flop(forward: Callable[[], object]) -> int:
    """The same of a call without gradients; before the network is compiled."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def peak_flops(device: torch.device, precision: str, calls: int = 3) -> float | None:
    """FLOP per second that the device can do in `precision` (no, bf16, fp16), or None where that is not known.

    GPUs: data sheets, for half precision only, since float32 training mixes units (TF32 and others) of different peaks.
    CPUs: what a matrix product of 1024 rows reaches now, the best of some calls.
    """
    if device.type == "cuda":
        words = set(re.split(r"[ -]", torch.cuda.get_device_name(device)))
        known = (peak for name, peak in HALF_PRECISION_TFLOPS.items() if set(name.split()) <= words)
        tflops = None if precision == "no" else next(known, None)
        return None if tflops is None else 1e12 * tflops
    return matmul_flops(device, DTYPES[precision], calls=calls) if device.type == "cpu" else None


def matmul_flops(device: torch.device, dtype: torch.dtype, side: int = 1024, calls: int = 3) -> float:
    """FLOP per second of a product of two square matrices; not of zeros or ones, which cost a GPU less power."""
    matrix = torch.linspace(-1, 1, side * side, device=device).to(dtype).view(side, side)
    return 2 * side**3 / seconds_a_call(device, lambda: matrix @ matrix, calls)


def seconds_a_call(device: torch.device, work: Callable[[], object], calls: int = 3) -> float:
    """The shortest of some calls of `work`, after one that compiles and chooses kernels."""
    seconds = []
    for _ in range(1 + calls):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


class Throughput:
    """Speed since the last line of the log; nothing here waits for the device but `paused`.

    batch_size: images per step, of all processes together. flop: of one image, forward and backward; recomputed
    activations are not counted, as usual for model FLOP utilisation (Chowdhery et al. 2022, appendix B).
    """

    def __init__(
        self, device: torch.device, precision: str, batch_size: int, flop: int, world: int = 1, start: int = 0
    ) -> None:
        self.device, self.batch_size, self.flop = device, batch_size, flop
        peak = peak_flops(device, precision)
        self.peak = None if peak is None else peak * world
        self._start(start)

    def _start(self, done: int) -> None:
        self._done, self._since, self._waited = done, time.perf_counter(), 0.0

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time it takes counts as waiting for data."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work that is not training (evaluations, pictures, checkpoints) and does not count."""
        synchronize(self.device)
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def line(self, done: int) -> dict[str, float]:
        """Figures of the steps since the last call, `done` counted from the beginning of the run.

        images_per_s; data_wait: share of the time that this process waited for its batches; memory: peak in GiB, of the
        device on CUDA, else of the process; mfu: model FLOP utilisation, where the machine's peak is known.
        """
        seconds = time.perf_counter() - self._since
        rate = (done - self._done) * self.batch_size / seconds
        values = {"images_per_s": rate, "data_wait": self._waited / seconds}
        values["memory"] = peak_memory(self.device) / 2**30
        if self.peak is not None:
            values["mfu"] = rate * self.flop / self.peak
        self._start(done)
        return values
