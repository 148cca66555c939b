"""Figures of speed: FLOP in closed form, shares of a clock that the test turns itself, peaks by the device's name."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine import throughput
from ssdd.engine.throughput import Throughput, count_flop, peak_flops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_flop_are_two_a_weight_and_row_forward_and_as_many_for_every_gradient_that_is_needed():
    first, second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False)
    x, product = torch.ones(3, 8), 2 * 3 * 8 * 16
    parameters = [first.weight, second.weight]
    assert count_flop(lambda: second(first(x)).sum(), parameters) == (2 + 3) * product  # x needs no gradient
    assert count_flop(lambda: second(first(x)).sum(), [second.weight]) == (1 + 2) * product
    assert first.weight.grad is None and second.weight.grad is None


class Clock:
    """Stands for the `time` module; goes forward only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e12)
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def batches(clock: Clock, seconds: float):
    while True:
        clock.now += seconds
        yield "batch"


def test_rate_waiting_and_utilisation_are_those_since_the_last_line_without_pauses(clock):
    speed = Throughput(CPU, "no", batch_size=32, flop=10**9, world=2, start=5)
    data = batches(clock, 0.5)
    for _ in range(2):
        assert speed.next(data) == "batch"
        clock.now += 1.5  # the step
    with speed.paused():
        clock.now += 60.0
    first = speed.line(7)
    assert first["images_per_s"] == pytest.approx(2 * 32 / 4.0)
    assert first["data_wait"] == pytest.approx(1.0 / 4.0)
    assert first["mfu"] == pytest.approx(16 * 1e9 / 2e12)
    assert 0 < first["memory"] < 1024
    clock.now += 8.0
    second = speed.line(8)
    assert second["images_per_s"] == pytest.approx(32 / 8.0) and second["data_wait"] == 0.0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_the_peak_of_a_known_gpu_is_told_by_its_name_for_half_precision_only(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, "bf16") == peak_flops(CUDA, "fp16") == tflops * 1e12
    assert peak_flops(CUDA, "no") is None


def test_where_the_peak_is_not_known_utilisation_is_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Q9000")
    assert peak_flops(CUDA, "bf16") is None
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: None)
    assert "mfu" not in Throughput(CPU, "no", 1, 1).line(1)


def test_the_peak_of_a_cpu_is_measured_and_no_random_number_is_drawn():
    before = torch.get_rng_state()
    assert peak_flops(CPU, "no") > 1e8
    assert torch.equal(torch.get_rng_state(), before)
