"""Recomputed activations: the same losses and gradients, bit for bit, from fewer saved bytes, also when compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit.model import DiT
from ssdd.engine.recompute import recompute_activations
from ssdd.losses.objective import AutoencoderObjective, TokenizerFlowObjective, step_draws, weighted_sum
from ssdd.model.tokenizer import SSDD
from tests.small_tokenizer import filled

Loss = Callable[[], Tensor]


def tokenizer(decoder: str | dict) -> tuple[SSDD, Loss]:
    torch.manual_seed(0)
    network = filled(SSDD({"name": "f8c2", "width": 8}, decoder, encoder_train=True))
    objective = (AutoencoderObjective if network.deterministic else TokenizerFlowObjective)(network)
    x = torch.randn(2, 3, 32, 32).clamp(-1, 1)
    draws = step_draws(0, 0, tuple(x.shape), (2, 2, 4, 4), x.device)
    return network, lambda: weighted_sum(objective(x, draws).terms, {"diffusion": 1.0, "l1": 1.0, "kl": 1e-3})


def generator() -> tuple[DiT, Loss]:
    torch.manual_seed(0)
    network = filled(DiT.from_name("DiT-XXS/1", 4, in_channels=2, num_classes=10))
    x, t, y = torch.randn(3, 2, 4, 4), torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 5, 10])
    return network, lambda: network(x, t, y).square().mean()


def step(network: nn.Module, loss: Loss) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss, its gradients, and the bytes that the forward pass keeps for the backward pass, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    value.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return value.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize(
    ("build", "share"),
    [(lambda: tokenizer("XXS"), 0.3), (lambda: tokenizer({"size": "kl", "width": 8}), 0.35), (generator, 0.15)],
    ids=["tokenizer", "kl", "dit"],
)
def test_gradients_are_equal_to_the_bit_and_fewer_bytes_are_kept(build, share):
    network, loss = build()
    value, gradients, kept = step(network, loss)
    recompute_activations(network)
    again, regradients, rekept = step(network, loss)
    assert torch.equal(value, again) and gradients.keys() == regradients.keys()
    assert all(torch.equal(gradient, regradients[name]) for name, gradient in gradients.items())
    assert rekept < share * kept


@pytest.mark.parametrize(
    "build", [lambda: tokenizer({"size": "XXS", "layers": 1}), generator], ids=["tokenizer", "dit"]
)
def test_compiled_networks_recompute_too(build):
    network, loss = build()
    value, gradients, _ = step(network, loss)
    recompute_activations(network)
    network.compile(backend="aot_eager")  # traces forward and backward as inductor does, without its minutes of C++
    again, regradients, _ = step(network, loss)
    torch.testing.assert_close(again, value, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(regradients[name], gradient, rtol=1e-3, atol=1e-5)
