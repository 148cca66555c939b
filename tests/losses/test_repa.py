"""REPA: the teacher equals Hugging Face's DINOv2 on equal weights, closed cases, and whom the gradient reaches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssdd.engine.errors import UserError
from ssdd.losses.objective import TokenizerFlowObjective
from ssdd.losses.repa import DINOV2_BASE, PatchTokens, RepaLoss, resample_positions
from tests.losses.test_distillation import draws, images


class Teacher(nn.Module):
    """Stands for a vision transformer: constant tokens."""

    dim = 3

    def forward(self, x):
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 2, 2, 3)


def meta_names(weights):
    """Hugging Face's names -> those of Meta's file."""
    plain = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"}
    plain |= {f"embeddings.patch_embeddings.projection.{p}": f"patch_embed.proj.{p}" for p in ("weight", "bias")}
    plain |= {f"layernorm.{p}": f"norm.{p}" for p in ("weight", "bias")}
    found = {theirs: weights[ours] for ours, theirs in plain.items()}
    for i in range(12):
        layer, block = f"encoder.layer.{i}.", f"blocks.{i}."
        for p in ("weight", "bias"):
            found[f"{block}attn.qkv.{p}"] = torch.cat([weights[f"{layer}attention.{n}_proj.{p}"] for n in "qkv"])
            found[f"{block}attn.proj.{p}"] = weights[f"{layer}attention.o_proj.{p}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{block}{name}.{p}"] = weights[f"{layer}{name}.{p}"]
        for n in (1, 2):
            found[f"{block}ls{n}.gamma"] = weights[f"{layer}layer_scale{n}.lambda1"]
    return found | {"mask_token": torch.zeros(1, 768)}


def test_the_teacher_equals_hugging_faces_dinov2_of_the_same_weights(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    torch.save(meta_names(reference.state_dict()), tmp_path / "dinov2_vitb14_pretrain.pth")
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)
    for side in (56, 112):
        x = torch.rand(1, 3, side, side) * 2 - 1
        teacher = PatchTokens(DINOV2_BASE, (side // 14, side // 14))
        with torch.no_grad():
            expected = reference((x * 0.5 + 0.5 - mean) / std).last_hidden_state[:, 1:]
        assert (teacher(x).flatten(1, 2) - expected).abs().max() < 1e-3
        assert teacher(torch.rand(1, 3, 64, 64)).shape == (1, side // 14, side // 14, 768)


def test_missing_weights_of_any_timm_model_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224\.safetensors.*curl"):
        PatchTokens("vit_tiny_patch16_224", (4, 4))


def test_a_position_table_keeps_its_prefix_and_its_own_grid_exactly():
    table = torch.randn(1, 1 + 25, 4)
    assert torch.equal(resample_positions(table, 1, (5, 5)), table)
    other = resample_positions(table, 1, (7, 3))
    assert other.shape == (1, 22, 4) and torch.equal(other[:, :1], table[:, :1])


def test_the_loss_is_zero_along_the_teachers_tokens_and_two_against_them():
    loss = RepaLoss(3, Teacher(), layers=1)
    with torch.no_grad():
        loss.repa_mlp[0].weight.copy_(torch.eye(3))
    along = torch.tensor([2.0, 0.0, 0.0]).expand(1, 2, 2, 3)
    x = torch.zeros(1, 3, 16, 16)
    for tokens, value in ((along, 0.0), (-along, 2.0), (along.roll(1, -1), 1.0)):
        assert loss(tokens, x).item() == pytest.approx(value, abs=1e-6)


def test_it_reaches_its_head_and_the_decoder_up_to_its_block_only(tokenizer):
    objective = TokenizerFlowObjective(tokenizer, repa=RepaLoss(64, Teacher()), repa_block=0, with_kl=False)
    assert objective.terms == ["diffusion", "repa"]
    objective(images(), draws()).terms["repa"].backward()
    first, second = tokenizer.decoder.mid_block.transformer_blocks
    assert all(p.grad.any() for p in objective.repa.repa_mlp.parameters())
    assert first.attn1.to_q.weight.grad.any() and second.attn1.to_q.weight.grad is None
    assert tokenizer.decoder.conv_in.weight.grad.any() and tokenizer.decoder.conv_out.weight.grad is None


def test_before_its_start_it_costs_no_teacher_and_gives_its_head_a_gradient_of_zero(tokenizer):
    class Forbidden(Teacher):
        def forward(self, images):
            raise AssertionError("the teacher was asked")

    objective = TokenizerFlowObjective(tokenizer, repa=RepaLoss(64, Forbidden()), repa_block=0, with_kl=False)
    terms = objective(images(), draws(), active=["diffusion"]).terms
    assert terms["repa"].item() == 0
    sum(terms.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.repa.repa_mlp.parameters())
    assert tokenizer.decoder.conv_out.weight.grad.any()
