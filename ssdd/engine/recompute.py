"""Gradient checkpointing: activations inside a block are computed again in the backward pass instead of kept.

A network that has blocks calls them through `run_block`, and carries a class attribute `recompute = False`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """block(*inputs); with `recompute`, only the inputs are kept for the backward pass. The block draws no numbers."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def recompute_activations(network: nn.Module) -> None:
    """Switch it on in every part of `network` that can."""
    for module in network.modules():
        if hasattr(module, "recompute"):
            module.recompute = True
