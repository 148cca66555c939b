"""Training and distillation: the loss falls, a killed run ends with the same bytes, and nobody's look changes them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssdd import SSDD
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, write_json
from ssdd.engine.run import RunDirectory
from ssdd.losses.perceptual import FeatureDistance
from ssdd.tasks.train import run
from tests.kills import AtOutput, Command
from tests.small_tokenizer import ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ("model", "model_ema", "optimizer", "aux")


def checkpoint_bytes(folder: Path, run_name: str = "tokenizer") -> dict[str, bytes]:
    last = folder / "jobs" / run_name / "checkpoints" / "last"
    return {name: (last / f"{name}.safetensors").read_bytes() for name in WEIGHTS}


def small(folder: Path, *arguments: str) -> list[str]:
    return [*ARGUMENTS, f"ckpt_dir={folder}", "run_name=tokenizer", *arguments]


def command(folder: Path, *arguments: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "ssdd.main", *small(folder, *arguments)]


def start(argv: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if f" {step}/" in line:
            return
    raise AssertionError(f"step {step} was never reported")


def test_the_loss_falls_and_the_run_directory_is_complete(config):
    cfg = config("training.steps=12", "ssdd.encoder_train=true", "training.lr=3e-3", "training.optimizer=adamw")
    result = run(cfg)
    directory = RunDirectory(cfg.ckpt_dir, "tokenizer")
    lines = directory.read_metrics()
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert sum(line["diffusion"] for line in lines[-3:]) < 0.8 * sum(line["diffusion"] for line in lines[:3])
    for line in lines:
        assert line["images_per_s"] > 0 and 0 <= line["data_wait"] < 1 and line["memory"] > 0 and line["mfu"] > 0
    assert result["steps"] == 12 and (directory.path / "config.yaml").is_file() and directory.result.is_file()


def test_a_finished_run_returns_before_anything_is_built_and_can_be_prolonged(config, tmp_path, monkeypatch):
    options = ["training.optimizer=adamw", "ssdd.encoder_train=true"]
    short, long = (config(*options, f"training.steps={steps}") for steps in (3, 5))
    result, before = run(short), checkpoint_bytes(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("ssdd.tasks.train.build_tokenizer", lambda cfg: pytest.fail("it was built"))
        assert run(short) == result and checkpoint_bytes(tmp_path) == before
    assert run(long)["steps"] == 5
    straight = tmp_path / "straight"
    run(config(*options, "training.steps=5", f"ckpt_dir={straight}"))
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(straight)
    with pytest.raises(UserError, match="is at step 5, beyond training.steps=3"):
        run(short)
    other = config(*options, "training.steps=5", "ssdd.encoder_width=16")
    with pytest.raises(UserError, match="encoder was"):
        run(other)


@pytest.mark.parametrize("optimizer", ["schedulefree", "adamw"])
def test_bytes_do_not_depend_on_logs_checkpoints_evaluations_pictures_or_recomputation(config, tmp_path, optimizer):
    shared = ["training.steps=10", f"training.optimizer={optimizer}", "ssdd.encoder_train=true"]
    run(config(*shared, "training.log_freq=10", "training.save_every=100"))
    other = tmp_path / "other"
    run(config(*shared, f"ckpt_dir={other}", "training.save_every=1", "training.eval_freq=1", "training.keep=2"))
    drawn = tmp_path / "drawn"
    run(config(*shared, f"ckpt_dir={drawn}", "training.sample_every=4", "training.grad_checkpoint=true"))
    for theirs in (other, drawn):
        ours, theirs = checkpoint_bytes(tmp_path), checkpoint_bytes(theirs)
        assert all(ours[name] == theirs[name] for name in ("model", "model_ema", "optimizer"))
    pictures = [sorted(folder.glob("jobs/tokenizer/pictures/*.png")) for folder in (tmp_path, drawn, other)]
    assert [len(found) for found in pictures] == [0, 2, 3]  # asked for after 4 and 8; with evaluations after 4, 8, 10
    assert pictures[1][0].read_bytes() == pictures[2][0].read_bytes()
    kept = {path.name for path in (other / "jobs" / "tokenizer" / "checkpoints").iterdir()}
    assert kept == {"last", "best", "step-000009", "step-000010"}
    assert SSDD.from_pretrained("tokenizer@step-000009", other).config["encoder"]["name"] == "f8c2"


@pytest.mark.parametrize(
    ("kind", "processes"),
    [
        ("train", 1),
        ("distil", 1),
        pytest.param("gan", 1, marks=pytest.mark.slow),
        pytest.param("train", 2, marks=pytest.mark.slow),
        pytest.param("distil", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(config, tmp_path, kind, processes):
    arguments = ["training.steps=12", "ssdd.encoder_train=true"]
    if kind == "gan":
        arguments += ["losses.gan_disc=0.5", "gan.start_iter=3", "dataset.im_size=32"]
    if kind == "distil":
        run(config("training.steps=2", "run_name=teacher"))
        teacher = tmp_path / "jobs" / "teacher" / "checkpoints" / "last"
        arguments = [
            "training.steps=12",
            "training.optimizer=adamw",
            f"ssdd.checkpoint={teacher}",
            "distill_teacher=true",
        ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def finish(folder: Path) -> None:
        if processes == 1:  # in this process, which computes the same and has its libraries loaded
            run(config(*arguments, f"ckpt_dir={folder}"))
            return
        process = start(command(folder, *arguments, processes=processes))
        assert process.communicate() and process.returncode == 0

    finish(straight)
    in_step_7 = AtOutput(" 7/")  # schedule-free RAdam moves the weights from its fifth step on
    Command("ssdd.main", small(killed, *arguments), processes).kill(in_step_7)
    assert not (killed / "jobs" / "tokenizer" / "task_result.json").exists()
    finish(killed)
    assert checkpoint_bytes(killed) == checkpoint_bytes(straight)
    steps = [line["step"] for line in RunDirectory(killed, "tokenizer").read_metrics()]
    assert steps == list(range(1, 13))


def test_sigterm_checkpoints_and_exits_with_status_0(tmp_path):
    process = start(command(tmp_path, "training.steps=100000", "training.save_every=100000"))
    wait_for_step(process, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "jobs" / "tokenizer" / "checkpoints" / "last" / "state.json").is_file()


def test_one_and_two_processes_compute_the_same_losses(config, tmp_path):
    arguments = ["training.steps=3", "ssdd.encoder_train=true", "training.optimizer=adamw"]
    run(config(*arguments, f"ckpt_dir={tmp_path / 'one'}"))
    process = start(command(tmp_path / "two", *arguments, processes=2))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    rows = [RunDirectory(tmp_path / name, "tokenizer").read_metrics() for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        for value in ("diffusion", "kl", "grad_norm"):
            assert one[value] == pytest.approx(two[value], rel=1e-5)


@pytest.mark.slow
def test_sharded_processes_train_as_data_parallel_ones_and_continue_alone(tmp_path):
    arguments = ["training.steps=4", "training.keep=2", "ssdd.encoder_train=true", "training.mixed_precision=no"]
    arguments += ["training.optimizer=adamw", "training.grad_accumulate=2", "training.grad_checkpoint=true"]
    arguments += ["losses.gan_disc=0.5", "gan.start_iter=1", "dataset.im_size=32"]
    whole, sharded, alone = (tmp_path / name / "jobs/tokenizer" for name in ("whole", "sharded", "alone"))

    def train(run: Path, fsdp: bool, processes: int) -> list[dict]:
        argv = command(run.parents[1], *arguments, f"training.fsdp={str(fsdp).lower()}", processes=processes)
        process = start(argv)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        rows = RunDirectory(run.parents[1], "tokenizer").read_metrics()
        return [{name: row[name] for name in values if name in row} for row in rows]

    values = ("step", "diffusion", "kl", "gan_disc", "gan_train", "grad_norm")
    rows_whole, rows_sharded = train(whole, False, 2), train(sharded, True, 2)
    for row_whole, row_sharded in zip(rows_whole, rows_sharded, strict=True):
        assert row_sharded == pytest.approx(row_whole, rel=1e-5)
    for name in (*WEIGHTS, "model_gan", "optimizer_gan"):
        first, second = (load_file(run / "checkpoints/last" / f"{name}.safetensors") for run in (whole, sharded))
        torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-3)
    shutil.copytree(sharded / "checkpoints/step-000002", alone / "checkpoints/last")
    for row_alone, row_sharded in zip(train(alone, True, 1), rows_sharded[2:], strict=True):
        assert row_alone == pytest.approx(row_sharded, rel=1e-5)


@pytest.mark.slow
def test_two_processes_follow_one_for_twenty_steps_and_evaluate_alike(tmp_path):
    losses, figures = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = ["training.steps=20", "ssdd.encoder_train=true", "training.optimizer=adamw", "training.lr=1e-3"]
        evaluation = ["task=eval", "run_name=eval", f"evaluation.decoders=[a:{tmp_path}/1/jobs/tokenizer:2]"]
        evaluation += ["evaluation.features=[efficientnet_lite0]", "evaluation.baselines=true", "dataset.limit=33"]
        for argv in (
            command(folder, *arguments, processes=processes),
            command(folder, *evaluation, processes=processes),
        ):
            process = start(argv)
            output = process.communicate()[0]
            assert process.returncode == 0, output
        losses.append([line["diffusion"] for line in RunDirectory(folder, "tokenizer").read_metrics()])
        figures.append(read_json(folder / "jobs" / "eval" / "task_result.json"))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0][19] == pytest.approx(losses[1][19], rel=1e-3)
    one, two = figures
    assert one["count"] == two["count"] == 33
    for a, b in zip(one["rows"], two["rows"], strict=True):
        for name in ("PSNR", "SSIM", "MSE", "MAE", "lite0_distance"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
        for name, value in a["distances"]["efficientnet_lite0"].items():
            assert value == pytest.approx(b["distances"]["efficientnet_lite0"][name], rel=1e-5, abs=1e-7)


def test_distillation_changes_the_decoder_only(config, tmp_path):
    run(config("training.steps=2", "run_name=teacher", "ssdd.encoder_train=true"))
    student_config = ("training.steps=3", "training.optimizer=adamw", "ssdd.encoder_train=true")
    run(config("ssdd.checkpoint=teacher", "distill_teacher=true", *student_config))
    jobs = tmp_path / "jobs"
    teacher, student = (
        load_file(jobs / name / "checkpoints" / "last" / "model_ema.safetensors") for name in ("teacher", "tokenizer")
    )
    for key, value in teacher.items():
        if key.startswith("encoder."):
            assert torch.equal(value, student[key]), key
    assert not torch.equal(teacher["decoder.conv_out.weight"], student["decoder.conv_out.weight"])


def test_what_cannot_work_is_refused_before_the_first_step(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="ssdd.checkpoint"):
        run(config("distill_teacher=true"))
    with pytest.raises(UserError, match="vgg16"):
        run(config("losses.lpips=0.5"))
    with pytest.raises(UserError, match="multiple of 3"):
        run(config("training.grad_accumulate=3"))
    run(config("training.steps=1"))
    with pytest.raises(UserError, match="seed was 0, is 1"):
        run(config("training.steps=1", "seed=1"))


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(config, tmp_path):
    run(config("training.steps=2", "training.optimizer=adamw"))
    parts = ("run_name=parts", "training.grad_accumulate=2")
    run(config("training.steps=2", "training.optimizer=adamw", *parts))
    whole, parts = (RunDirectory(tmp_path, name).read_metrics() for name in ("tokenizer", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a["diffusion"] == pytest.approx(b["diffusion"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_run_keeps_several_averages_which_stay_those_it_began_with(config, tmp_path):
    averages = "training.ema.decays=[0.9,0.5]"
    run(config("training.steps=1"))
    run(config("training.steps=2", "run_name=several", averages))
    files = {path.name for path in RunDirectory(tmp_path, "several").last.glob("model_ema*")}
    assert files == {"model_ema.safetensors", "model_ema_0.5.safetensors"}
    with pytest.raises(UserError, match="averages was None, is .*model_ema_0.5"):
        run(config("training.steps=2", averages))
    with pytest.raises(UserError, match="averages was .*model_ema_0.5.*, is None"):
        run(config("training.steps=3", "run_name=several"))


def test_the_students_file_decodes_in_one_step_and_its_run_belongs_to_its_teacher(config, tmp_path):
    run(config("training.steps=1", "run_name=teacher"))
    arguments = ("training.steps=1", "ssdd.checkpoint=teacher", "distill_teacher=true")
    run(config(*arguments))
    assert SSDD.from_pretrained("tokenizer", tmp_path).config["fm_sampler"]["steps"] == 1
    assert SSDD.from_pretrained("teacher", tmp_path).config["fm_sampler"]["steps"] == 2
    with pytest.raises(UserError, match="sampler was"):
        run(config(*arguments, "ssdd.fm_sampler.steps=3"))
    with pytest.raises(UserError, match="teacher was .*, is None"):
        run(config("training.steps=2"))


def test_a_run_goes_on_from_a_checkpoint_that_does_not_record_what_later_versions_ask(config, tmp_path):
    run(config("training.steps=1"))
    file = RunDirectory(tmp_path, "tokenizer").last / "state.json"
    state = read_json(file)
    state["identity"] = {key: value for key, value in state["identity"].items() if value is not None}
    assert not {"averages", "teacher"} & set(state["identity"])
    write_json(file, state)
    assert run(config("training.steps=2"))["steps"] == 2


def test_a_loss_is_computed_from_its_start_on_and_logged_over_the_steps_that_had_it(config, tmp_path, monkeypatch):
    calls = []
    features = FeatureDistance.features
    monkeypatch.setattr(FeatureDistance, "features", lambda self, x: calls.append(len(x)) or features(self, x))
    run(config("training.steps=4", "losses.features=0.5", "losses_start.features=2", "training.log_freq=4"))
    first, last = RunDirectory(tmp_path, "tokenizer").read_metrics()
    assert "features" not in first and last["features"] > 0
    assert len(calls) == 2 * 2 + 2  # images and originals of two steps, and once to count FLOP


def test_a_run_knows_its_objective_and_takes_other_steps_of_evaluation(config):
    run(config("training.steps=2", "training.save_every=1"))
    run(config("training.steps=2", "ssdd.fm_sampler.steps=3"))
    with pytest.raises(UserError, match="objective was flow, is direct"):
        run(config("training.steps=2", "objective=direct"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ssdd.fm_sampler.steps=0"], "ssdd.fm_sampler.steps=0 must be at least 1"),
        (["training.epochs=0"], "training.epochs=0 must be at least 1"),
        (["training.grad_clip=-1"], "must not be negative"),
        (["distill_teacher=true", "objective=direct", "ssdd.checkpoint=tokenizer"], "choose one"),
    ],
)
def test_numbers_and_options_that_contradict_themselves_are_refused(config, arguments, message):
    run(config("training.steps=1"))
    with pytest.raises(UserError, match=message):
        run(config("run_name=refused", *arguments))
