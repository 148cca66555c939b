"""The adversary: losses of closed cases, who learns from which, and when it starts."""

from __future__ import annotations

import math

import pytest
import torch

from ssdd.engine.checkpoint import load
from ssdd.engine.errors import UserError
from ssdd.engine.optim import parameter_groups
from ssdd.engine.precision import Precision
from ssdd.engine.run import RunDirectory
from ssdd.losses.adversary import Discriminator
from ssdd.losses.image_losses import ImageLosses
from ssdd.losses.objective import TokenizerFlowObjective
from ssdd.tasks.build import build_discriminator
from ssdd.tasks.train import run
from tests.losses.test_distillation import draws, images

GAN = ("dataset.im_size=32", "losses.gan_disc=0.5", "training.optimizer=adamw", "training.lr=1e-3")


@pytest.fixture
def discriminator() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(layers=2)


def test_an_undecided_discriminator_loses_ln_2_on_everything(discriminator):
    with torch.no_grad():
        discriminator.out.weight.zero_()
        discriminator.out.bias.zero_()
    x, t = images(), torch.rand(3)
    assert discriminator(x, -x, x, t).item() == pytest.approx(math.log(2))
    assert discriminator.generator_loss(x, x, t).item() == pytest.approx(math.log(2))
    with torch.no_grad():
        discriminator.out.bias.fill_(3.0)  # takes all for real
    assert discriminator.generator_loss(x, x, t).item() == pytest.approx(math.log(1 + math.exp(-3)))
    real, fake = math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))
    assert discriminator(x, -x, x, t).item() == pytest.approx((real + fake) / 2)


def test_it_sees_the_time_the_trajectory_and_images_clamped(discriminator):
    x, x_t, t = images(), torch.randn(3, 3, 16, 16), torch.full((3,), 0.2)
    logits = discriminator.eval().logits(x, x_t, t)
    assert not torch.allclose(logits, discriminator.logits(x, x_t, t + 0.5))
    assert not torch.allclose(logits, discriminator.logits(x, -x_t, t))
    assert torch.equal(discriminator.logits(3 * x, x_t, t), discriminator.logits((3 * x).clamp(-1, 1), x_t, t))


def test_the_decoder_learns_from_its_term_and_the_discriminator_from_its_own(tokenizer, discriminator):
    discriminator.requires_grad_(False)
    objective = TokenizerFlowObjective(tokenizer, ImageLosses(discriminator=discriminator), with_kl=False)
    assert objective.terms == ["diffusion", "gan_disc"]
    assert not any("discriminator" in name for name, _ in objective.named_parameters())
    x = images()
    terms, predicted = objective(x, draws())
    terms["gan_disc"].backward()
    assert tokenizer.decoder.conv_out.weight.grad.any()
    assert all(p.grad is None for p in discriminator.parameters())
    tokenizer.zero_grad()
    discriminator.requires_grad_(True)
    discriminator(x, *predicted).backward()
    assert tokenizer.decoder.conv_out.weight.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())
    assert set(objective(x, draws(), active=["diffusion"]).terms) == {"diffusion"}


def test_it_starts_at_its_step_and_not_before(config, tmp_path):
    def weights(name: str, *arguments: str) -> dict:
        run(config(*GAN, f"run_name={name}", *arguments))
        return load(tmp_path / "jobs" / name / "checkpoints" / "last")[0]

    before = weights("before", "training.steps=2", "gan.start_iter=5")
    later = weights("later", "training.steps=4", "gan.start_iter=5")
    after = weights("after", "training.steps=4", "gan.start_iter=2")
    name = "out.weight"
    assert torch.equal(before["model_gan"][name], later["model_gan"][name])
    assert not torch.equal(after["model_gan"][name], later["model_gan"][name])
    assert not torch.equal(after["model"]["decoder.conv_out.weight"], later["model"]["decoder.conv_out.weight"])


def test_images_that_are_too_small_for_it_are_refused(config):
    with pytest.raises(UserError, match="needs images of 32 px"):
        run(config("losses.gan_disc=0.5"))


def test_a_discriminator_that_is_not_finite_stops_the_run_before_it_is_saved(config, tmp_path, monkeypatch):
    forward = Discriminator.forward
    monkeypatch.setattr(Discriminator, "forward", lambda *arguments: forward(*arguments) * float("nan"))
    with pytest.raises(UserError, match="not finite at step 1; training stopped before the first checkpoint"):
        run(config(*GAN, "training.steps=2", "gan.start_iter=0"))
    assert not (tmp_path / "jobs" / "tokenizer" / "checkpoints" / "last").exists()
    with pytest.raises(UserError, match="one loss scale"):
        build_discriminator(config(*GAN), Precision("fp16", "auto: fp16, SSDD_PRECISION", torch.device("cuda")))


def test_accumulated_parts_see_the_same_discriminator(config, tmp_path):
    lines = []
    for parts in (1, 2):
        run(config(*GAN, "training.steps=2", "gan.start_iter=0", f"run_name=parts{parts}",
                   f"training.grad_accumulate={parts}"))  # fmt: skip
        lines.append(RunDirectory(tmp_path, f"parts{parts}").read_metrics())
    for whole, accumulated, close in zip(*lines, (1e-5, 1e-3), strict=True):
        for name in ("gan_disc", "gan_train", "diffusion", "grad_norm"):
            assert accumulated[name] == pytest.approx(whole[name], rel=close)


def test_its_convolutions_are_decayed(discriminator):
    decayed = parameter_groups(dict(discriminator.named_parameters()), discriminator, 0.1)[0]["params"]
    for convolution in discriminator.convolutions:
        assert any(p is convolution.parametrizations.weight.original for p in decayed)
