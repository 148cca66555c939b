"""Tests run in random order: each starts from the same torch seed, and none leaves process-wide state to the next.

pytest-randomly shuffles and seeds random and numpy; `--randomly-seed=N`, printed below the results, repeats an order.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.small_tokenizer import config, tokenizer

__all__ = ["config", "tokenizer"]  # fixtures of many folders

torch.set_num_threads(1)  # tests compare bits: the order of a sum must not depend on the machine

CACHE = tempfile.TemporaryDirectory(prefix="ssdd-tests-")
"""In place of the home's: tests neither find statistics of real images that others measured, nor leave any."""
homes = {"TORCH_HOME": torch.hub._get_torch_home(), "HF_HOME": os.path.expanduser("~/.cache/huggingface")}
os.environ.update({**homes, **os.environ, "XDG_CACHE_HOME": CACHE.name})

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Put back what a block changes for the whole process: torch's modes and random stream, environment, signals."""
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul, stream = torch.get_float32_matmul_precision(), torch.get_rng_state()
    environment, path, folder = dict(os.environ), list(sys.path), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    root = logging.getLogger()
    level, sinks = root.level, list(root.handlers)
    try:
        with torch.backends.cudnn.flags(**cudnn_flags()):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_float32_matmul_precision(matmul)
        torch.set_rng_state(stream)
        if "torch._dynamo" in sys.modules:  # a function recompiled too often runs eagerly ever after
            torch._dynamo.reset()
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
        sys.path[:] = path
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.setLevel(level)
        root.handlers[:] = sinks


def cudnn_flags() -> dict[str, bool | int | str]:
    cudnn = torch.backends.cudnn
    return {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Around set-up, call and tear-down: fixtures of wider scopes too draw from a known stream."""
    with process_state_kept():
        torch.manual_seed(0)
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The seed of the order, also with -q, which hides the header."""
    seed = config.getoption("randomly_seed", None)
    if seed is not None:
        terminalreporter.write_line(f"random order: --randomly-seed={seed}")
