"""The same pipeline on Fashion-MNIST, from IDX files as the data set comes."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.slow
def test_the_same_pipeline_runs_on_fashion_mnist_by_config_alone(pipeline, tmp_path):
    rng = np.random.RandomState(0)
    for prefix, n in (("train", 60), ("t10k", 60)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = (rng.rand(n, 28, 28) * 80 + labels[:, None, None] * 15).astype(np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    chain = pipeline("fashion", "dataset.source=fashion_mnist", f"dataset.root={tmp_path}", "dataset.im_size=32")
    output = chain.run()
    assert "student-1" in output
