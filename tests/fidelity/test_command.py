"""scripts/fidelity.py on small folders, EfficientNet-Lite0 as judge."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssdd.engine.processes import Processes
from ssdd.fidelity import set_metrics as metrics_module
from ssdd.fidelity.command import decide, main
from ssdd.fidelity.features import load_features
from ssdd.fidelity.kid import KernelEstimate
from ssdd.fidelity.set_to_measure import SetToMeasure

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Digits as PNG and JPEG of two sizes: two sets alike, and one with black and white exchanged."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("sets")
    digits = (load_digits().images * (255 / 16)).astype(np.uint8)
    for name, images in (("good", digits[:24]), ("inverted", 255 - digits[24:48]), ("real", digits[48:108])):
        (root / name).mkdir()
        for i, digit in enumerate(images):
            size, suffix = ((32, 32), "png") if i % 2 else ((48, 40), "jpg")
            Image.fromarray(digit).resize(size).save(root / name / f"{i:03d}.{suffix}")
    return root


def compare(folders, tmp_path, *arguments):
    sets = [str(folders / name) for name in ("good", "inverted", "real")]
    out = tmp_path / "metrics.json"
    options = ["features=efficientnet_lite0", f"out={out}", f"cache={tmp_path / 'cache'}", "kid_subset_size=20"]
    return main([*sets, *options, *arguments]), out


def test_mixed_folders_are_compared_and_the_result_says_how_each_was_treated(folders, tmp_path, capsys):
    status, out = compare(folders, tmp_path, "im_size=32", "decide=kid")
    assert status == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    good, inverted = (str(folders / name) for name in ("good", "inverted"))
    assert result["sets"][good]["stored"] == {"JPEG L 48x40": 12, "PNG L 32x32": 12}
    assert (result["sets"][good]["crop"], result["sets"][good]["size"]) == ("adm", [32, 32])
    assert result["networks"]["efficientnet_lite0"]["checksum"].startswith("57934424")
    rows = result["metrics"]["efficientnet_lite0"]
    assert rows[good]["kid"] < rows[inverted]["kid_low"] and rows[good]["precision"] > rows[inverted]["precision"]
    assert rows[good]["counts"] == [24, 60] and rows[good]["frechet_floor_counts"] == [24, 36]
    ratio = rows[good]["frechet"] / rows[good]["frechet_floor"]
    assert rows[good]["frechet_ratio"] == pytest.approx(ratio) and 0.5 < ratio < 2 < rows[inverted]["frechet_ratio"]
    assert rows[good]["kid_of_subsets_deviation"] > 0
    assert result["decision"]["efficientnet_lite0"]["closest"] == good
    assert "24 images are fewer than 10 per dimension" in printed and "crop adm" in printed and "FID" not in printed


def test_names_with_a_dash_between_spaces_decide_nothing_that_the_interval_leaves_open():
    names = ["runs - a", "runs - b"]
    kids = dict(zip(names, (1, 1.1), strict=True))
    kernels = {name: KernelEstimate(kid, 0, 2, 1, np.array([-1.0, 0, 1]) + kid) for name, kid in kids.items()}
    found = {name: {"kid": kernel.value} for name, kernel in kernels.items()}
    assert decide("kid", names, found, kernels)["closest"] == "runs - a"  # every resample says so
    kernels["runs - a"] = KernelEstimate(1, 0, 2, 1, np.array([1.0, 0, -1]))
    assert decide("kid", names, found, kernels)["closest"] is None


def test_statistics_of_another_network_are_refused_before_any_image_is_read(folders, tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setattr(SetToMeasure, "statistics", None)
    sets = [str(folders / "good"), str(tmp_path / "adm.npz"), "im_size=32"]
    assert main([*sets, "features=efficientnet_lite0", f"out={tmp_path / 'no.json'}"]) == 2
    assert "was measured with inception" in capsys.readouterr().err


def test_different_sizes_are_refused_unless_allowed(folders, tmp_path, capsys):
    assert compare(folders, tmp_path)[0] == 2
    assert "im_size=N" in capsys.readouterr().err
    status, out = compare(folders, tmp_path, "allow_mismatch=true")
    assert status == 0 and "different sizes" in json.loads(out.read_text())["notes"][0]


def test_a_decision_on_raw_frechet_distances_of_few_images_is_refused(folders, tmp_path, capsys):
    assert compare(folders, tmp_path, "im_size=32", "decide=frechet")[0] == 2
    assert "Use decide=kid" in capsys.readouterr().err


def test_what_can_not_be_compared_is_an_error(folders, tmp_path, capsys):
    for arguments in ([str(folders / "good")], [str(folders / "good")] * 2, [str(folders / "good"), "absent"]):
        assert main([*arguments, f"out={tmp_path / 'no.json'}"]) == 2
    assert "no such file" in capsys.readouterr().err and not (tmp_path / "no.json").exists()


def test_every_metric_through_the_network_agrees_for_any_batch_size(folders):
    network = load_features("efficientnet_lite0")
    rows = []
    for batch_size in (1, 7, 64):
        sets = {
            name: SetToMeasure(folders / name, 32).statistics([network], ALONE, batch_size=batch_size)[network.name]
            for name in ("inverted", "real")
        }
        rows.append(metrics_module.compare(sets, ["inverted"], "real", "real", resamples=10, seed=0)[0]["inverted"])
    assert len(rows[0]) == 9
    assert rows[1] == pytest.approx(rows[0], rel=1e-4) and rows[2] == pytest.approx(rows[0], rel=1e-4)
