"""Fashion-MNIST as a cache, at full length: the same bytes whatever happens, and every image once.

2000 images a split, or as many as SSDD_TEST_IMAGES says: 60000 takes the whole data set, about 15 minutes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_cache import LatentDataset
from latent_cache.config import adm_images
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.images.small_sets import FASHION_MNIST_FOLDER
from ssdd.images.sources import open_source
from ssdd.model.tokenizer import SSDD
from tests.kills import Command, Outcome, files, random_times

IMAGES = int(os.environ.get("SSDD_TEST_IMAGES", "2000"))
BATCH, SAMPLES_PER_SHARD = 32, max(320, IMAGES // 480 * 32)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist"),
]


def build(tokenizer: Path, out: Path, processes: int = 1) -> Command:
    arguments = [f"tokenizer={tokenizer}", f"out={out}", "dataset.source=fashion_mnist", "dataset.im_size=32"]
    arguments += [f"dataset.limit={IMAGES}", f"samples_per_shard={SAMPLES_PER_SHARD}", f"batch_size={BATCH}"]
    return Command("latent_cache", ["build", *arguments, "device=cpu"], processes, ("latent_cache.write.build",))


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory) -> tuple[Path, Outcome]:
    """The cache of an undisturbed build by one process, and how that went."""
    out = tmp_path_factory.mktemp("fashion") / "cache"
    return out, build(tokenizer, out).run()


def test_two_processes_write_the_same_directory_as_one(whole, tokenizer, tmp_path):
    build(tokenizer, tmp_path / "cache", processes=2).run()
    assert files(tmp_path / "cache") == files(whole[0])


def test_a_build_killed_at_three_random_moments_writes_the_same_directory(whole, tokenizer, tmp_path):
    out, straight = whole
    killed = build(tokenizer, tmp_path / "cache").run(random_times(0, 3, straight.seconds))
    assert killed.kills == 3
    assert files(tmp_path / "cache") == files(out)


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_label_and_the_hash_of_every_row_are_those_of_a_loop_over_the_data(whole, tokenizer, split):
    cache = LatentDataset(whole[0], split, verify="full")
    cfg = replace(adm_images(), source="fashion_mnist", im_size=32, limit=IMAGES)
    images = ImageDataset(open_source(cfg, split), cfg, train=False)
    assert len(cache) == len(images) == min(IMAGES, 60000 if split == "train" else 10000)
    model = SSDD.from_pretrained(tokenizer).eval()
    seen = set()
    for first in range(0, len(images), BATCH):
        numbers = range(first, min(first + BATCH, len(images)))
        pixels, labels, _ = zip(*(images[number] for number in numbers), strict=True)
        filled = [*pixels, *pixels[-1:] * (BATCH - len(pixels))]
        with torch.no_grad():
            rows = cache.norm.normalise(model.encode(from_uint8(torch.stack(filled))).mean).half()[: len(pixels)]
        found, classes = cache.gather(numbers)
        assert classes.tolist() == list(labels)
        assert hashes(found.half().numpy()) == hashes(rows.numpy())
        seen.update(hashes(rows.numpy()))
    assert len(seen) > 0.99 * len(images)  # so that a doubled image would have been noticed


def hashes(rows: np.ndarray) -> list[str]:
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
