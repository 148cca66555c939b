"""The benchmarks measure what they say: every network, known parameters and FLOP, ratios that follow from seconds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import pipeline as bench_pipeline
from bench import tokenizer_job as bench_tokenizer_job
from bench.ceilings import ceilings
from bench.main import main
from bench.networks import LATENTS, PEERS, build, decoding, encoding, fill_zeros
from bench.processes import measure_in_turn
from ssdd import SSDD
from ssdd.engine.errors import UserError
from ssdd.engine.throughput import count_forward_flop

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
XXS_DECODER = 1_415_271
XS_DECODER = 4_996_611
LAYOUTS = ("contiguous", "channels_last")


def results(text: str) -> dict:
    """The line of JSON at the end of a report."""
    return json.loads(text.splitlines()[-1])


def check_rates(row: dict, rounds: int) -> None:
    """A row's figures follow from its seconds."""
    assert len(row["seconds"]) == rounds
    assert row["median"] == pytest.approx(statistics.median(row["seconds"]))
    assert (row["min"], row["max"]) == (min(row["seconds"]), max(row["seconds"]))
    assert row["images_per_s"] == pytest.approx(row["batch"] / row["median"])


def median_ratio(theirs: dict, ours: dict) -> float:
    pairs = zip(theirs["seconds"], ours["seconds"], strict=True)
    return pytest.approx(statistics.median(their / our for their, our in pairs))


def test_networks_in_processes_of_their_own_are_reported_in_a_table_and_as_json(capfd, tmp_path):
    file = tmp_path / "new" / "speed.json"
    assert main(["tokenizer", "decoder=[XXS,XS]", "peers=[]", "side=[32]", "rounds=2", f"json={file}"]) == 0
    out = capfd.readouterr().out
    found = results(out)
    assert json.loads(file.read_text()) == found
    assert found["command"].startswith("python scripts/bench.py tokenizer 'decoder=[XXS,XS]'")
    rows, names = found["rows"], ["SSDD-XXS", "SSDD-XS"]
    assert [row["network"] for row in rows] == [line.split()[0] for line in out.splitlines()[-3:-1]] == names
    assert [row["parameters"] for row in rows] == [XXS_DECODER, XS_DECODER]
    peak = max(found["ceilings"]["float32"].values())
    for row in rows:
        check_rates(row, rounds=2)
        assert row["share_of_peak"] == pytest.approx(row["gflop"] * 1e9 * row["batch"] / row["min"] / peak)
        assert 100e6 < row["peak_memory_bytes"] < 10e9


def test_peers_are_measured_in_both_memory_formats_and_ratios_are_to_the_better(capsys, in_process):
    wanted = ["decoder=XXS", "peers=[AutoencoderTiny,AutoencoderKL]", "side=[32]", "batch=[2]", "rounds=3"]
    assert main(["tokenizer", *wanted]) == 0
    rows = results(capsys.readouterr().out)["rows"]
    peers = [(peer, layout) for peer in ("AutoencoderTiny", "AutoencoderKL") for layout in LAYOUTS]
    assert [(row["network"], row["layout"]) for row in rows] == [("SSDD-XXS", "own"), *peers]
    better = {pair[0]["network"]: min(pair, key=lambda row: row["median"]) for pair in (rows[1:3], rows[3:])}
    for row in rows:
        check_rates(row, rounds=3)
        assert row["ratios"] == {name: median_ratio(peer, row) for name, peer in better.items()}


def test_all_combinations_are_measured_one_table_each(capsys, in_process):
    axes = ["decoder=[XXS]", "peers=[]", "side=[16,32]", "dtype=[float32,bfloat16]", "batch=[1,2]", "rounds=1"]
    assert main(["tokenizer", *axes]) == 0
    out = capsys.readouterr().out
    rows = results(out)["rows"]
    assert len({(row["side"], row["dtype"], row["batch"]) for row in rows}) == len(rows) == 8
    assert out.count("\ndecode, ") == 8
    assert [row["ratios"] for row in rows] == [{}] * 8
    flop = {row["side"]: row["gflop"] for row in rows}  # of an image, whatever the batch and dtype
    assert [row["gflop"] for row in rows] == [flop[row["side"]] for row in rows]
    for row in rows:
        check_rates(row, rounds=1)


def test_decoding_counts_what_a_decode_computes_and_each_step_of_it(capsys, in_process):
    model = SSDD("f8c4", "XXS")
    z, noise = torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 32, 32)
    assert main(["tokenizer", "decoder=XXS", "peers=[]", "side=[32]", "rounds=1", "steps=[1,3]"]) == 0
    one, three = results(capsys.readouterr().out)["rows"]
    for row, steps in ((one, 1), (three, 3)):
        assert row["steps"] == steps
        assert row["gflop"] * 1e9 == count_forward_flop(lambda: model.decode(z, steps=steps, noise=noise))  # noqa: B023
    assert 2 * one["gflop"] < three["gflop"] < 3 * one["gflop"]  # what depends on z alone is done once


def test_encoding_measures_one_encoder_of_ours_beside_the_peers(capsys, in_process):
    assert main(["tokenizer", "task=encode", "peers=AutoencoderTiny", "side=[32]", "rounds=1"]) == 0
    ours, *theirs = results(capsys.readouterr().out)["rows"]
    assert ours["network"] == "SSDD-f8c4"
    assert ours["parameters"] == sum(p.numel() for p in SSDD("f8c4", "XXS").encoder.parameters())
    assert [row["parameters"] for row in theirs] == [1_222_532] * 2


def test_a_training_step_of_each_decoder_is_held_against_its_plain_form(capsys, in_process):
    pytest.importorskip("tests.plain_decoder")
    wanted = ["task=train", "decoder=[XXS]", "side=[16]", "dtype=[float32,bfloat16]", "rounds=1", "batch=[2]"]
    assert main(["tokenizer", *wanted]) == 0
    rows = results(capsys.readouterr().out)["rows"]
    assert [row["network"] for row in rows] == ["SSDD-XXS", "plain-XXS"] * 2
    for ours, plain in (rows[:2], rows[2:]):
        assert ours["parameters"] == plain["parameters"] == XXS_DECODER
        assert ours["gflop"] == pytest.approx(plain["gflop"], rel=0.2)
        assert ours["ratios"] == {"plain-XXS": median_ratio(plain, ours)}


def test_training_without_the_plain_form_is_refused(capsys, in_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "tests.plain_decoder", None)
    assert main(["tokenizer", "task=train", "decoder=XXS", "side=[16]", "rounds=1"]) == 2
    assert "checkout of the repository" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("peer", "halves", "gflop"),
    [
        ("AutoencoderKL", (34_163_592, 49_490_179), (272.7, 622.2)),
        ("AutoencoderDC", (153_027_104, 159_223_171), (None, None)),
        ("AutoencoderTiny", (1_222_532, 1_222_531), (30.6, 35.3)),
    ],
)
def test_peers_have_the_published_layouts(peer, halves, gflop):
    """Parameters and GFLOP of encoder and decoder at 256 px, as their authors and others count them."""
    import diffusers

    with torch.device("meta"):
        network = getattr(diffusers, peer)(**PEERS[peer])
        assert tuple(sum(p.numel() for p in half.parameters()) for half in (network.encoder, network.decoder)) == halves
        stride, channels = LATENTS[peer]
        x, z = torch.empty(1, 3, 256, 256), torch.empty(1, channels, 256 // stride, 256 // stride)
        decode, encode = decoding(network, 1, x, False), encoding(network, False)
        if gflop != (None, None):
            found = count_forward_flop(lambda: encode(x)), count_forward_flop(lambda: decode(z))
            assert [flop / 1e9 for flop in found] == pytest.approx(gflop, abs=0.06)
        assert decode(z).shape == x.shape


def test_no_parameter_is_all_zero_and_the_others_stay():
    model = SSDD("f8c4", "XXS")
    before = {name: p.clone() for name, p in model.named_parameters()}
    fill_zeros(model)
    for name, p in model.named_parameters():
        assert p.any()
        assert torch.equal(p, before[name]) or not before[name].any()


def test_a_peer_is_laid_out_as_asked_and_gives_the_same_image():
    z, images = torch.randn(1, 4, 4, 4), []
    for last in (False, True):
        network, stride, channels = build("AutoencoderTiny", "f8c4", "float32", last, CPU)
        assert (stride, channels) == (8, 4)
        weight = max(network.decoder.parameters(), key=torch.Tensor.numel)
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
        images.append(decoding(network, 1, z, last)(z))
    torch.testing.assert_close(*images, atol=1e-4, rtol=1e-4)


def test_both_chains_of_sampling_are_measured_with_their_parts(capsys, in_process):
    wanted = ["model=DiT-XXS/2", "decoder=XXS", "side=32", "steps=2", "batch=2", "rounds=2", "dtype=bfloat16"]
    assert main(["pipeline", *wanted]) == 0
    out = capsys.readouterr().out
    assert "speed alone, not at equal quality" in out
    found = results(out)
    assert (found["settings"]["model"], found["settings"]["steps"]) == ("DiT-XXS/2", 2)
    rows = found["rows"]
    names = [("SSDD-XXS", "own"), ("AutoencoderKL", "contiguous"), ("AutoencoderKL", "channels_last")]
    assert [(row["network"], row["layout"]) for row in rows] == names
    better = min(rows[1:], key=lambda row: row["median"])
    for row in rows:
        check_rates(row, rounds=2)
        assert row["seconds"] == pytest.approx([sum(both) for both in zip(*row["stages"].values(), strict=True)])
        assert row["sample_seconds"] == pytest.approx(statistics.median(row["stages"]["sample"]))
        assert row["decode_seconds"] == pytest.approx(statistics.median(row["stages"]["decode"]))
        assert row["ratio"] == median_ratio(better, row)


def test_f16_latents_are_a_quarter_of_the_tokens_for_the_same_generator():
    job = {"model": "DiT-XXS/1", "side": 64, "steps": 1, "batch": 1, "cfg_scale": 1.0, "dtype": "float32"}
    job |= {"compile": False, "channels_last": True, "network": "SSDD-XXS"}
    flop = bench_pipeline.prepare(job, CPU).flop, bench_pipeline.prepare(job | {"cfg_scale": 2.0}, CPU).flop
    more = bench_pipeline.prepare(job | {"cfg_scale": 2.0, "steps": 3}, CPU).flop
    sampling = flop[1] - flop[0]  # a guided step is two evaluations
    assert more - flop[1] == 4 * sampling
    assert sampling > 0


def test_ceilings_are_rates_of_this_machine():
    found = ceilings(CPU, "float32")
    assert set(found) == {"matmul", "conv", "thin_conv"}
    assert all(1e8 < flops < 1e15 for flops in found.values())


def test_an_error_in_a_child_is_the_parents_error():
    job = {"module": "tokenizer_job", "network": "SSDD-S", "channels_last": True, "task": "decode"}
    job |= {"encoder": "f8", "side": 32, "dtype": "float32", "compile": False, "batch": 1, "steps": 1}
    with pytest.raises(UserError, match="f8"):
        measure_in_turn([job], 1)


def test_help_lists_the_commands_and_the_keys_of_each(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().err
    for command in ("tokenizer", "dit", "pipeline"):
        assert f"\n{command}: " in told
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert "\n  json  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["tokenizer", "decoders=S"], "did you mean decoder?"),
        (["tokenizer", "decoder=[]"], "decoder=[]"),
        (["tokenizer", "decoder=Q"], "must be one of"),
        (["tokenizer", "encoder=f9c4"], "f9c4"),
        (["tokenizer", "side=[48]"], "multiples of 32"),  # AutoencoderDC's stride
        (["tokenizer", "batch=[0]"], "batch=[0]"),
        (["tokenizer", "compile=maybe"], "compile expects list[bool]; got 'maybe'"),
        (["pipeline", "side=40", "model=DiT-XXS/4"], "multiples of 64"),
        (["pipeline", "rounds=0"], "rounds=0"),
        (["pipeline", "dtype=float16"], "must be one of float32, bfloat16"),
    ],
)
def test_a_wrong_setting_is_one_line_of_error(argv, told, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.slow
def test_compiled_networks_compute_what_eager_ones_do():
    job = bench_tokenizer_job.TokenizerJob("SSDD-XXS", True, "decode", "f8c4", 16, "float32", True, 1, 1)
    compiled = bench_tokenizer_job.inference(job, CPU).stages["decode"]()
    eager = bench_tokenizer_job.inference(replace(job, compile=False), CPU).stages["decode"]()
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_commands_for_a_gpu_run_here_at_tiny_sizes_and_write_nothing():
    before = sorted((ROOT / "docs/results").iterdir())
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(ROOT / "scripts/bench_gpu"), "--tiny"]
    ran = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [one["command"].split()[2] for one in found] == ["tokenizer", "dit", "pipeline"]
    assert all(one["rows"] for one in found)
    assert sorted((ROOT / "docs/results").iterdir()) == before
    assert not Path(found[0]["command"].rpartition("json=")[2]).parent.exists()


def test_an_unknown_part_for_a_gpu_is_refused():
    ran = subprocess.run([str(ROOT / "scripts/bench_gpu"), "everything"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "unknown part everything" in ran.stderr


def test_the_builder_is_held_against_the_encoder_alone(capsys):
    assert main(["builder", "images=6", "side=16", "batch=4", "rounds=2", "threads=1", "encoder=f8c4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["round"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert row["overhead"] == pytest.approx(row["build"] / row["encoder"] - 1)
        assert row["images_per_s"] == pytest.approx(6 / row["build"])
