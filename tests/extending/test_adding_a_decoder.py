"""An architecture of the decoder is one entry of a table: config, training, files, evaluation and bench follow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.tokenizer import TokenizerSettings
from ssdd import SSDD
from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.run import RunDirectory
from ssdd.engine.schema_help import help_text
from ssdd.model.decoder_families import DECODERS, DecoderFamily
from ssdd.model.flow import expand_time
from ssdd.tasks.evaluate import run as evaluate
from ssdd.tasks.train import run as train
from tests.small_tokenizer import ARGUMENTS


@dataclass(frozen=True)
class PointSize:
    kernel: int = 3

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even")


class PointDecoder(nn.Module):
    """Predicts the image by one convolution of the noisy image and the enlarged latent."""

    pixel_multiple, token_blocks, token_width = 1, 0, 0

    def __init__(self, size: PointSize, stride: int, z_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(3 + z_dim, 3, size.kernel, padding=size.kernel // 2)

    def condition(self, z: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(z.to(self.conv.weight.dtype), size=(height, width))

    def velocity(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        x = self.conv(torch.cat([x_t.to(condition.dtype), condition], dim=1)).float()
        return (x - x_t) / expand_time(t, x_t).clamp(min=0.05)


def size_of_weights(weights: Mapping[str, Tensor]) -> dict | None:
    known = set(weights) == {"conv.weight", "conv.bias"}
    return {"size": "P-S", "kernel": weights["conv.weight"].shape[-1]} if known else None


POINT = DecoderFamily({"P-S": PointSize(), "P-L": PointSize(kernel=7)}, PointDecoder, size_of_weights)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Makes a config of the small tokenizer with the decoder P-S."""
    monkeypatch.setitem(DECODERS, "point", POINT)

    def make(*arguments: str) -> SSDDConfig:
        own = [f"ckpt_dir={tmp_path}", "run_name=run", "ssdd.decoder=P-S", "training.steps=2", *arguments]
        return parse(SSDDConfig, [*ARGUMENTS, *own], program="ssdd", description="")

    return make


def test_the_help_lists_it_and_a_name_near_it_is_an_error_that_says_so(config):
    for schema, key in ((SSDDConfig, "ssdd.decoder  ("), (TokenizerSettings, "decoder  (")):
        entry = " ".join(help_text(schema, "program", "").split(key)[1].split(";")[0].split())
        assert entry.endswith("P-S | P-L")
    with pytest.raises(UserError, match="did you mean P-S"):
        config("ssdd.decoder=P-X")


def test_it_trains_is_recorded_and_comes_back_from_its_file(config, tmp_path):
    cfg = config("ssdd.encoder_train=true")
    result = train(cfg)
    assert result["tokenizer"]["decoder"] == "P-S"
    assert [line["diffusion"] > 0 for line in RunDirectory(tmp_path, "run").read_metrics()] == [True, True]
    model = SSDD.from_pretrained("run", tmp_path)
    assert isinstance(model.decoder, PointDecoder) and json.loads(model.metadata["ssdd"])["decoder"] == "P-S"
    z, noise = torch.randn(2, 2, 2, 2), torch.randn(2, 3, 16, 16)
    assert model.decode(z, steps=3, noise=noise).shape == noise.shape
    row = evaluate(config("task=eval", "run_name=eval", "evaluation.decoders=[point:run:2]"))["rows"][0]
    assert row["steps"] == 2 and row["PSNR"] > 0
    assert train(config("run_name=student", "ssdd.checkpoint=run", "distill_teacher=true"))["diffusion"] > 0


def test_a_file_without_configuration_is_recognised_by_its_tensors(config, tmp_path):
    model = SSDD({"name": "f8c2", "width": 8}, {"size": "P-L", "kernel": 5})
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    assert SSDD.from_pretrained(path).config["decoder"] == {"size": "P-S", "kernel": 5}
    with pytest.raises(UserError, match="These weights fit .*decoder={'size': 'P-S', 'kernel': 5}"):
        SSDD({"name": "f8c2", "width": 8}, "P-L", checkpoint=path)


def test_what_it_cannot_do_is_said_before_it_is_tried(config):
    with pytest.raises(UserError, match="kernel 4 is even"):
        SSDD("f8c2", {"size": "P-S", "kernel": 4})
    with pytest.raises(UserError, match="unknown keys window; expected some of the keys size, kernel"):
        SSDD("f8c2", {"size": "P-S", "window": 4})
    with pytest.raises(UserError, match="P-S has none: losses.repa=0"):
        train(config("losses.repa=0.5"))


def test_one_that_takes_one_step_is_trained_and_used_so(config, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(DECODERS, "point", replace(POINT, most_steps=1))
    assert train(config("ssdd.fm_sampler.steps=4"))["tokenizer"]["fm_sampler"]["steps"] == 1
    model = SSDD.from_pretrained("run", tmp_path)
    z, noise = torch.randn(2, 2, 2, 2), torch.randn(2, 3, 16, 16)
    assert torch.equal(model.decode(z, noise=noise), model.decode(z, steps=1, noise=noise))
    with pytest.raises(UserError, match="2 steps: decoder P-S takes 1"):
        model.decode(z, steps=2, noise=noise)
    with pytest.raises(UserError, match="in one step already"):
        train(config("run_name=student", "ssdd.checkpoint=run", "distill_teacher=true"))
