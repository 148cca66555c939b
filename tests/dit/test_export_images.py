"""Exports of decoded images: ADM's npz as a stream, PNG files, and both with the same pixels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.evaluation.export_images import write_npz, write_pngs
from ssdd.fidelity.stored_sets import open_set

ROOT = Path(__file__).resolve().parents[2]
MEMORY = """
import sys, torch
from pathlib import Path
from dit.evaluation.export_images import write_npz
from ssdd.engine.devices import peak_memory
cpu = torch.device("cpu")
before = peak_memory(cpu)
batch = torch.randint(256, (250, 3, 64, 64), dtype=torch.uint8)
write_npz(Path(sys.argv[1]), (batch + i for i in range(400)), 100_000, torch.arange(100_000) % 10)
print((peak_memory(cpu) - before) / 2**20)
"""


def images(n: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_numpy_reads_the_images_and_labels_and_they_are_those_of_the_png_files(tmp_path):
    pixels, labels = images(7), torch.arange(7) % 3
    write_npz(tmp_path / "a.npz", pixels.split(3), 7, labels)
    write_pngs(tmp_path / "png", pixels, range(7))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].tolist() == labels.tolist()
        assert np.array_equal(file["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
        files = sorted((tmp_path / "png").iterdir())
        assert [path.name for path in files] == [f"{i:06d}.png" for i in range(7)]
        assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), file["arr_0"])


def test_equal_images_give_equal_bytes_whatever_the_batches(tmp_path):
    for name, size in (("a", 7), ("b", 2)):
        write_npz(tmp_path / f"{name}.npz", images(7).split(size), 7, torch.zeros(7, dtype=torch.int64))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_wrong_number_of_images_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="expected 8 images, got 7"):
        write_npz(tmp_path / "a.npz", images(7).split(3), 8, torch.zeros(8, dtype=torch.int64))
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.slow
def test_a_hundred_thousand_images_take_less_than_200_mib_of_memory(tmp_path):
    file = tmp_path / "large.npz"
    command = [sys.executable, "-c", MEMORY, str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0 < float(result.stdout) < 200
    stored = open_set(file)
    assert (len(stored), stored.treatment.size) == (100_000, (64, 64))
    file.unlink()
