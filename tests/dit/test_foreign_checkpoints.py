"""Checkpoints of other repositories load from every layout, sample, and go out again; unsafe files are refused."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit.foreign_checkpoints import FAMILIES, export_dit, load_dit
from dit.guidance import guided_velocity
from dit.main import main
from dit.model import DiT
from ssdd.engine.errors import UserError
from tests.golden import fill_tensor

X, Y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 9])


def layout(lightning: bool = False, *, learn_sigma: bool = True, h: int = 128, depth: int = 4, grid: int = 4) -> dict:
    """A state dict by the published lists of names and shapes: patch 2, 4 channels, 10 classes and null."""
    out, tokens, dim = 8 if learn_sigma else 4, grid * grid, 64
    shapes = {"x_embedder.proj.weight": (h, 4, 2, 2), "x_embedder.proj.bias": (h,)}
    shapes |= {"t_embedder.mlp.0.weight": (h, 256), "t_embedder.mlp.0.bias": (h,)}
    shapes |= {"t_embedder.mlp.2.weight": (h, h), "t_embedder.mlp.2.bias": (h,)}
    shapes |= {"y_embedder.embedding_table.weight": (11, h)}
    shapes |= {"final_layer.linear.weight": (4 * out, h), "final_layer.linear.bias": (4 * out,)}
    shapes |= {"final_layer.adaLN_modulation.1.weight": (2 * h, h), "final_layer.adaLN_modulation.1.bias": (2 * h,)}
    if lightning:
        shapes["final_layer.norm_final.weight"] = (h,)
    for i in range(depth):
        b = f"blocks.{i}."
        linears = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "adaLN_modulation.1": (6 * h, h)}
        if lightning:
            hidden = int(2 / 3 * 4 * h)
            linears |= {"mlp.w12": (2 * hidden, h), "mlp.w3": (h, hidden), "adaLN_modulation.1": (4 * h, h)}
            shapes |= {b + "norm1.weight": (h,), b + "norm2.weight": (h,)}
            shapes |= {b + "attn.q_norm.weight": (dim,), b + "attn.k_norm.weight": (dim,)}
        else:
            linears |= {"mlp.fc1": (4 * h, h), "mlp.fc2": (h, 4 * h)}
        for name, (rows, columns) in linears.items():
            shapes |= {f"{b}{name}.weight": (rows, columns), f"{b}{name}.bias": (rows,)}
    weights = {key: fill_tensor(key, shape).float() for key, shape in shapes.items()}
    # Tables by their definitions, written with loops.
    position = torch.zeros(1, tokens, h)
    rotary = torch.zeros(tokens, dim)
    for token in range(tokens):
        row, column = divmod(token, grid)
        for half, coordinate in enumerate((column, row)):
            for i in range(h // 4):
                angle = torch.tensor(coordinate / 10000 ** (i / (h / 4)), dtype=torch.float64)
                position[0, token, half * h // 2 + i] = angle.sin()
                position[0, token, half * h // 2 + h // 4 + i] = angle.cos()
        for half, coordinate in enumerate((row, column)):
            for i in range(dim // 2):
                rotary[token, half * dim // 2 + i] = coordinate * 10000 ** (-2 * (i // 2) / (dim / 2))
    weights["pos_embed"] = position
    if lightning:
        weights |= {"feat_rope.freqs_cos": rotary.cos(), "feat_rope.freqs_sin": rotary.sin()}
    return weights


def zeros(weights: dict) -> dict:
    return {key: torch.zeros_like(value) for key, value in weights.items()}


def projectors() -> dict:
    return {f"projectors.0.{i}.weight": torch.zeros(8, 8) for i in (0, 2, 4)}


def laid_down(family: str, folder: Path) -> tuple[Path, dict]:
    """A checkpoint as the repository's trainer writes it, and the weights that should come out of it."""
    path = folder / f"{family}.pt"
    weights = layout(family == "lightningdit", learn_sigma=family in ("dit", "sit"))
    if family == "lightningdit":
        record = {
            "config": {"model": {"use_rope": True}, "transport": {"path_type": "Linear", "prediction": "velocity"}}
        }
        raw = {f"module.{key}": value for key, value in zeros(weights).items()}
    elif family == "repa":
        record = {"args": argparse.Namespace(model="SiT-XL/2", path_type="linear", prediction="v"), "steps": 400000}
        weights, raw = weights | projectors(), zeros(weights)
    else:
        record = {"args": argparse.Namespace(model=f"{ {'dit': 'DiT', 'sit': 'SiT'}[family] }-XXS/2", global_seed=0)}
        raw = {f"module._orig_mod.{key}": value for key, value in zeros(weights).items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    torch.save({"model": raw, "ema": weights, "opt": optimizer, **record}, path)
    return path, weights


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainer_s_checkpoint_loads_with_its_averaged_weights(tmp_path, family, caplog):
    path, weights = laid_down(family, tmp_path)
    model = load_dit(path, num_classes=10, in_channels=4)
    assert model.config["convention"] == FAMILIES[family].convention and not model.training
    assert (model.grid, model.num_classes, model.null_class) == ((4, 4), 10, True)
    assert model.config["name"] == "DiT-XXS/2" and model.config["heads"] == 2
    assert model.learn_sigma == (family in ("dit", "sit"))
    lightning = {key: model.config[key] for key in ("qk_norm", "rms_norm", "swiglu", "rope", "wo_shift")}
    assert set(lightning.values()) == {family == "lightningdit"}
    state = model.state_dict()
    kept = {key: value for key, value in weights.items() if not key.startswith("projectors.")}
    assert state.keys() == kept.keys() and all(torch.equal(state[key], value) for key, value in kept.items())
    assert ("projector" in caplog.text) == (family == "repa")
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_bare_state_dicts_load_whatever_wrapper_named_them(tmp_path, suffix, prefix):
    path, weights = tmp_path / f"weights{suffix}", layout()
    named = {prefix + key: value.bfloat16() for key, value in weights.items()}
    save_file(named, path) if suffix == ".safetensors" else torch.save(named, path)
    state = load_dit(path, "sit").state_dict()
    assert all(torch.equal(state[key], value.bfloat16().float()) for key, value in weights.items())


def test_compiled_parts_inside_a_network_keep_their_names(tmp_path):
    weights = layout(lightning=True)
    torch.save({key.replace("mlp.", "mlp._orig_mod."): value for key, value in weights.items()}, tmp_path / "w.pt")
    assert load_dit(tmp_path / "w.pt").state_dict().keys() == weights.keys()


def test_a_bare_file_in_the_plain_layout_asks_whose_it_is(tmp_path):
    torch.save(layout(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="family=dit, sit, repa or lightningdit"):
        load_dit(tmp_path / "w.pt")
    with pytest.raises(UserError, match="expected one of dit"):
        load_dit(tmp_path / "w.pt", "ddpm")
    assert load_dit(tmp_path / "w.pt", "dit").config["convention"] == "ddpm"


def test_heads_of_unpublished_sizes_are_asked_for(tmp_path):
    torch.save(layout(depth=2), tmp_path / "w.pt")
    with pytest.raises(UserError, match="heads=N"):
        load_dit(tmp_path / "w.pt", "sit")
    assert load_dit(tmp_path / "w.pt", "sit", heads=4).config["heads"] == 4
    torch.save(layout(lightning=True, depth=2), tmp_path / "rope.pt")
    assert load_dit(tmp_path / "rope.pt").config["heads"] == 2


def test_a_grid_that_is_not_square_is_told_from_its_position_table(tmp_path):
    model = DiT.from_name("DiT-XXS/2", (4, 16), num_classes=10)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert load_dit(tmp_path / "w.pt", "sit").config["input_size"] == [4, 16]
    torch.save(model.state_dict() | {"pos_embed": torch.randn(1, 32, 128)[:, :12]}, tmp_path / "learned.pt")
    with pytest.raises(UserError, match="12 learned positions"):
        load_dit(tmp_path / "learned.pt", "sit")
    assert load_dit(tmp_path / "learned.pt", "sit", input_size=(4, 12)).grid == (2, 6)


@pytest.mark.parametrize("lightning", [False, True])
def test_a_checkpoint_is_used_at_another_resolution(tmp_path, lightning):
    torch.save(layout(lightning), tmp_path / "small.pt")
    torch.save(layout(lightning, grid=6), tmp_path / "large.pt")
    resized = load_dit(tmp_path / "small.pt", "sit", input_size=12)
    native = load_dit(tmp_path / "large.pt", "sit")
    for key, value in native.state_dict().items():
        torch.testing.assert_close(resized.state_dict()[key], value, atol=1e-5, rtol=0)
    assert resized.config == native.config


def test_wrong_expectations_name_what_the_file_has(tmp_path):
    torch.save(layout(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="in_channels=4"):
        load_dit(tmp_path / "w.pt", "sit", in_channels=16)
    with pytest.raises(UserError, match="num_classes=10"):
        load_dit(tmp_path / "w.pt", "sit", num_classes=1000)
    with pytest.raises(UserError, match="7x7"):
        load_dit(tmp_path / "w.pt", "sit", input_size=7)
    without_null = load_dit(tmp_path / "w.pt", "sit", num_classes=11)
    assert (without_null.num_classes, without_null.null_class) == (11, False)
    for change, message in (
        ({"blocks.1.attn.proj.bias": torch.zeros(3)}, "proj.bias"),
        ({"bn.running_mean": torch.zeros(4)}, "bn.running_mean"),
        ({"final_layer.linear.weight": torch.zeros(12, 128)}, "3 channels from 4"),
    ):
        torch.save(layout() | change, tmp_path / "changed.pt")
        with pytest.raises(UserError, match=message):
            load_dit(tmp_path / "changed.pt", "sit")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="lacks pos_embed"):
        load_dit(tmp_path / "other.pt", "sit")


@pytest.mark.parametrize("setting", [{"path_type": "GVP"}, {"prediction": "score"}])
def test_other_paths_and_predictions_are_refused(tmp_path, setting):
    arguments = argparse.Namespace(**{"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"} | setting)
    torch.save({"ema": layout(), "args": arguments}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=next(iter(setting.values()))):
        load_dit(tmp_path / "w.pt")


class Malice:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["top", "args"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_unrun(tmp_path, where, zipped):
    marker = tmp_path / "ran"
    payload = Malice(marker) if where == "top" else argparse.Namespace(model="DiT-XL/2", extra=Malice(marker))
    torch.save({"ema": layout(), "args": payload}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="may run code"):
        load_dit(tmp_path / "w.pt")
    assert not marker.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_damaged_and_missing_files_are_user_errors(tmp_path):
    torch.save(layout(), tmp_path / "w.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:5000])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    for name in ("torn.pt", "torn.safetensors", "missing.pt", "missing.safetensors"):
        with pytest.raises(UserError, match=name):
            load_dit(tmp_path / name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_saves_as_ours_and_keeps_its_velocity(tmp_path, family):
    model = load_dit(laid_down(family, tmp_path)[0])
    again = load_dit(model.save_pretrained(tmp_path / "ours"))
    assert again.config == DiT.from_pretrained(tmp_path / "ours").config == model.config
    t = torch.tensor(0.6)
    assert torch.equal(guided_velocity(again, Y, 2.0)(X, t), guided_velocity(model, Y, 2.0)(X, t))
    with pytest.raises(UserError, match="leave out"):
        load_dit(tmp_path / "ours" / "model.safetensors", "sit")


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_takes_a_foreign_checkpoint(tmp_path, family, capsys):
    path, _ = laid_down(family, tmp_path)
    arguments = ["task=sample", f"sampling.checkpoint={path}", "sampling.n=2", "sampling.steps=3", "sampling.shift=3.4"]
    assert main([*arguments, f"out={tmp_path / 'set'}", f"ckpt_dir={tmp_path}"]) == 0
    described = json.loads((tmp_path / "set" / "sample_set.json").read_text())
    assert described["convention"] == FAMILIES[family].convention and described["latent_shape"] == [4, 8, 8]
    bare = tmp_path / "bare.pt"
    torch.save(layout(), bare)
    arguments[1] = f"sampling.checkpoint={bare}"
    assert main([*arguments, f"out={tmp_path / 'bare'}"]) == 2 and "sampling.family" in capsys.readouterr().err
    assert main([*arguments, f"out={tmp_path / 'bare'}", f"sampling.family={family}"]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_file_is_in_the_foreign_layout_and_comes_back(tmp_path, family):
    path, weights = laid_down(family, tmp_path)
    model = load_dit(path)
    file = export_dit(model, tmp_path / "out.safetensors")
    with safe_open(file, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        assert "predicts" in handle.metadata()["convention"]
    kept = {key for key in weights if not key.startswith("projectors.")}
    assert tensors.keys() == kept and all(torch.equal(tensors[key], weights[key]) for key in kept)
    assert load_dit(file).config == model.config


@pytest.mark.parametrize("origin", ["flow", "repa", "sit"])
@torch.no_grad()
def test_a_velocity_network_of_times_in_0_1_exports_exactly_to_sit(tmp_path, origin):
    model = DiT.from_name("DiT-XXS/2", 8, num_classes=10, learn_sigma=False, time_scale=1.0, convention=origin)
    model.load_state_dict({**layout(learn_sigma=False)})
    exported = load_dit(export_dit(model.eval(), tmp_path / "sit.safetensors", layout="sit"))
    assert exported.config == model.config | {"convention": "sit"}
    for t in (0.0, 0.013, 0.5, 0.87, 1.0):
        ours = guided_velocity(model, Y)(X, torch.tensor(t))
        theirs = exported(X, torch.full((2,), 1 - t), Y)  # what SiT's sampler calls its velocity at 1 - t
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert model.state_dict()["t_embedder.mlp.0.weight"].equal(layout()["t_embedder.mlp.0.weight"])


def test_what_sit_cannot_express_is_refused(tmp_path):
    model = DiT.from_name("DiT-XXS/2", 8, num_classes=10)
    with pytest.raises(UserError, match="model.time_scale=1"):
        export_dit(model, tmp_path / "w.safetensors", layout="sit")
    with pytest.raises(UserError, match="noise predictor"):
        export_dit(load_dit(laid_down("dit", tmp_path)[0]), tmp_path / "w.safetensors", layout="sit")
    with pytest.raises(UserError, match="expected one of dit, sit"):
        export_dit(model, tmp_path / "w.safetensors", layout="mar")
    with pytest.raises(UserError, match="ends in"):
        export_dit(model, tmp_path / "w.pt")
