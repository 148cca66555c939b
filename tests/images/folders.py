"""Digits, and folders of random image files, as the data sets of tests."""

import itertools

import numpy as np
from PIL import Image

from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import DatasetConfig, open_source

DIGITS = DatasetConfig(source="digits", im_size=32, batch_size=64)


def write_folder(root, classes=("cat", "dog"), count=6, size=(40, 30)):
    """root/train and root/val with `count` random PNG files a class."""
    random = np.random.RandomState(0)
    for split, name, number in itertools.product(("train", "val"), classes, range(count)):
        path = root / split / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(path)
    return DatasetConfig(source="imagefolder", root=str(root), im_size=16)


def dataset(cfg, split="train", train=None, seed=0):
    return ImageDataset(open_source(cfg, split), cfg, train=split == "train" if train is None else train, seed=seed)
