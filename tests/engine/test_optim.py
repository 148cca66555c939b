"""Parameter groups, learning rates, and averaged weights that nobody has to swap in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dit.model import DiT
from ssdd.engine.optim import averaged_weights, build_optimizer, learning_rate, parameter_groups
from ssdd.model.attention import RelativePositionBias
from ssdd.model.decoder import UViTDecoder


def trained(name: str, steps: int, seed: int = 0, betas: tuple[float, float] = (0.9, 0.999)):
    """A small network after `steps` steps on random targets, with its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
    optimizer = build_optimizer(name, parameter_groups(dict(model.named_parameters()), model, 0.1), 1e-2, betas)
    for _ in range(steps):
        model(torch.randn(16, 4)).sub(torch.randn(16, 2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_matrices_and_convolutions_are_decayed_and_biases_norms_and_relative_tables_are_not():
    decoder = UViTDecoder("XXS", z_dim=2)
    named = dict(decoder.named_parameters())
    names = {id(p): name for name, p in named.items()}
    decayed, rest = parameter_groups(named, decoder, weight_decay=0.05)
    assert decayed["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    decayed, rest = ([names[id(p)] for p in group["params"]] for group in (decayed, rest))
    assert sorted(decayed + rest) == sorted(named)
    assert all(name.endswith(".weight") and named[name].ndim in (2, 4) for name in decayed)
    assert all(name.endswith((".bias", ".relative_bias_table")) or named[name].ndim == 1 for name in rest)
    tables = sum(isinstance(module, RelativePositionBias) for module in decoder.modules())
    assert tables == 2 and sum(name.endswith("table") for name in rest) == tables


def test_of_a_generator_neither_label_table_nor_position_table_nor_norms_are_decayed():
    model = DiT.from_name("DiT-XXS/1", input_size=4, in_channels=2, num_classes=3, qk_norm=True, rms_norm=True)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in named.items()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in parameter_groups(named, model, 0.1))
    assert decayed | rest == set(named) and "y_embedder.embedding_table.weight" in rest
    assert {"x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "t_embedder.mlp.0.weight"} <= decayed
    assert all(named[name].ndim > 1 for name in decayed)
    assert all(named[name].ndim == 1 or name.startswith("y_embedder") for name in rest)


def test_only_named_parameters_are_grouped_and_empty_groups_are_left_out():
    model = nn.Linear(2, 2)
    (group,) = parameter_groups({"bias": model.bias}, model, 0.1)
    assert group["weight_decay"] == 0 and [id(p) for p in group["params"]] == [id(model.bias)]
    assert len(parameter_groups(dict(model.named_parameters()), nn.LayerNorm(2, elementwise_affine=False), 0.1)) == 1


def test_weight_decay_alone_shrinks_weights_and_leaves_biases():
    model = nn.Linear(2, 2)
    before = snapshot(model)
    optimizer = build_optimizer("adamw", parameter_groups(dict(model.named_parameters()), model, 0.5), 0.1, (0.9, 0.99))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before["bias"])


@pytest.mark.parametrize(
    ("schedule", "warmup", "values"),
    [
        ("constant", 0, {0: 1, 5: 1, 99: 1}),
        ("constant", 4, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 99: 1}),
        ("cosine", 0, {0: 1, 25: 0.8535534, 50: 0.5, 75: 0.1464466, 100: 0}),
        ("cosine", 20, {0: 0.05, 19: 1, 20: 1, 60: 0.5, 100: 0}),
        ("cosine", 100, {99: 1, 100: 1}),
    ],
)
def test_learning_rate_warms_up_linearly_then_stays_or_falls_as_a_cosine(schedule, warmup, values):
    for step, share in values.items():
        assert learning_rate(2e-3, step, 100, warmup, schedule) == pytest.approx(2e-3 * share, abs=1e-10)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_averaged_weights_are_those_that_a_schedule_free_optimizer_would_swap_in(betas):
    model, optimizer = trained("schedulefree", 20, betas=betas)
    averages = averaged_weights(optimizer, dict(model.named_parameters()))
    in_training = snapshot(model)
    optimizer.eval()
    swapped_in = snapshot(model)
    assert list(averages) == list(swapped_in)
    for name, average in averages.items():
        assert torch.allclose(average, swapped_in[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(average, in_training[name])


def test_looking_at_averaged_weights_changes_neither_parameters_nor_training():
    models = []
    for looks in (False, True):
        model, optimizer = trained("schedulefree", 10)
        if looks:
            before, state = snapshot(model), [s["z"].clone() for s in optimizer.state.values()]
            averages = averaged_weights(optimizer, dict(model.named_parameters()))
            assert not any(average.requires_grad for average in averages.values())
            for average in averages.values():
                average.zero_()
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            assert all(torch.equal(s["z"], z) for s, z in zip(optimizer.state.values(), state, strict=True))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        models.append(snapshot(model))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(("name", "steps"), [("adamw", 3), ("schedulefree", 0)])
def test_without_averages_the_trained_weights_are_given(name, steps):
    model, optimizer = trained(name, steps)
    averages = averaged_weights(optimizer, dict(model.named_parameters()))
    assert all(averages[key] is parameter for key, parameter in model.named_parameters())


def test_parameters_that_are_not_optimised_keep_their_own_weights_among_the_averages():
    model, optimizer = trained("schedulefree", 10)
    frozen = torch.randn(3)
    averages = averaged_weights(optimizer, {"frozen": frozen, **dict(model.named_parameters())})
    assert averages["frozen"] is frozen and averages["0.weight"] is not model[0].weight
