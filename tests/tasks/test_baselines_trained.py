"""Baselines under the same trainer: the KL-VAE's decoder, one direct step, frozen encoders of diffusers."""

from __future__ import annotations

import pytest
import torch

from ssdd import SSDD
from ssdd.engine.errors import UserError
from ssdd.engine.run import RunDirectory
from ssdd.model.kl_decoder import KLDecoder
from ssdd.tasks.evaluate import run as evaluate
from ssdd.tasks.train import run
from tests.kills import Command
from tests.small_tokenizer import ARGUMENTS, random_vae

diffusers = pytest.importorskip("diffusers")
LEARN = ("training.steps=8", "training.optimizer=adamw", "training.lr=3e-3")


def falls(folder, term: str, run_name: str = "tokenizer") -> bool:
    values = [line[term] for line in RunDirectory(folder, run_name).read_metrics()]
    return sum(values[-2:]) < sum(values[:2])


def test_the_kl_decoder_has_the_layout_of_ldms():
    with torch.device("meta"):
        ours = KLDecoder(8, 4)
        theirs = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    expected = [*theirs.decoder.parameters(), *theirs.post_quant_conv.parameters()]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in expected) == 49_490_199
    names = set(ours.state_dict())
    assert {"up.0.block.2.conv2.weight", "up.1.upsample.conv.weight", "mid.attn_1.q.weight"} <= names


def test_a_kl_vae_trains_evaluates_and_comes_back_from_its_file(config, tmp_path):
    run(config(*LEARN, "ssdd.decoder=kl", "ssdd.encoder_train=true"))
    assert falls(tmp_path, "l1")
    model = SSDD.from_pretrained("tokenizer", tmp_path)
    z = torch.randn(3, 2, 2, 2)
    assert model.deterministic and torch.equal(model.decode(z, noise=torch.randn(3, 3, 16, 16)), model.decode(z))
    cfg = config("task=eval", "run_name=eval", "evaluation.decoders=[kl:tokenizer:1]")
    assert evaluate(cfg)["rows"][0]["PSNR"] > 0
    with pytest.raises(UserError, match="in one step already"):
        run(config(*LEARN, "run_name=other", "ssdd.decoder=kl", "objective=direct"))


def test_the_direct_objective_learns_one_step_from_noise_to_real_images(config, tmp_path):
    run(config(*LEARN, "objective=direct"))
    assert falls(tmp_path, "diffusion")
    assert SSDD.from_pretrained("tokenizer", tmp_path).config["fm_sampler"]["steps"] == 1


def test_all_stages_run_on_the_latents_of_a_frozen_vae(config, tmp_path):
    random_vae(scaling_factor=0.3).save_pretrained(tmp_path / "vae")
    encoder = f"ssdd.encoder={tmp_path / 'vae'}"
    run(config(*LEARN, encoder))
    run(config(*LEARN, encoder, "run_name=student", "ssdd.checkpoint=tokenizer", "distill_teacher=true"))
    assert falls(tmp_path, "diffusion")
    student = SSDD.from_pretrained("student", tmp_path)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert student.z_dim == 16 and student.decode(student.encode(x).mode(), steps=1).shape == x.shape


@pytest.mark.parametrize("latents", ["sample", "noisy"])
def test_distillation_on_other_latents_than_the_mean(config, tmp_path, latents):
    run(config("training.steps=1", "run_name=teacher"))
    arguments = ("ssdd.checkpoint=teacher", "distill_teacher=true", "training.steps=2", "training.optimizer=adamw")
    run(config(*arguments, "run_name=mean"))
    run(config(*arguments, f"distill.z={latents}", "distill.tau_max=0.5"))
    losses = [RunDirectory(tmp_path, name).read_metrics()[-1]["diffusion"] for name in ("mean", "tokenizer")]
    assert losses[0] != losses[1]


def test_a_dry_run_counts_and_measures_without_writing(config, tmp_path, capsys):
    result = run(config("dry_run=true", "training.steps=100", "ssdd.encoder_train=true"))
    model = SSDD({"name": "f8c2", "width": 8}, "XXS")
    assert result["parameters"]["decoder"] == sum(p.numel() for p in model.decoder.parameters())
    assert result["hours"] == pytest.approx(100 * result["seconds_a_step"] / 3600)
    assert result["gflop_decode_step"] > result["gflop_encode"] > 0
    assert "GFLOP" in capsys.readouterr().out and not (tmp_path / "jobs").exists()


@pytest.mark.slow
def test_a_dry_run_measures_sharded_processes(tmp_path):
    arguments = ["dry_run=true", "training.steps=100", "training.fsdp=true", "ssdd.encoder_train=true"]
    output = Command("ssdd.main", [*ARGUMENTS, f"ckpt_dir={tmp_path}", "run_name=dry", *arguments], 2).run().output
    assert "4 images per process and part" in output and "100 steps" in output and not (tmp_path / "jobs").exists()


def test_a_dry_run_refuses_what_training_refuses(config):
    for wrong, message in (
        ("training.grad_accumulate=7", "does not divide"),
        ("training.log_freq=0", "log_freq=0 must"),
    ):
        with pytest.raises(UserError, match=message):
            run(config("dry_run=true", wrong))


def test_a_dry_run_of_a_distillation_on_stored_targets_stores_none(config, tmp_path):
    run(config("training.steps=1", "run_name=teacher"))
    before = sorted(tmp_path.rglob("*"))
    keys = ["ssdd.checkpoint=teacher", "distill_teacher=true", "distill.targets=cache", "losses.gan_disc=0.1"]
    keys += ["gan.discriminator.n_layers=3"]
    assert run(config(*keys, "training.steps=2", "run_name=student", "dry_run=true"))["hours"] > 0
    assert sorted(tmp_path.rglob("*")) == before
