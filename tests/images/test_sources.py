"""Sources of images: what all of them have in common, in one table, and what each has of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.images import small_sets
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import SOURCES, DatasetConfig, balanced_order, open_source
from tests.images.pictures import picture, write_fashion, write_folder, write_shards, write_tar

DIGITS = DatasetConfig(source="digits", im_size=32, batch_size=64)


def fashion(root: Path, seed: int) -> DatasetConfig:
    for split in ("train", "val"):
        write_fashion(root, split, count=20, seed=seed)
    return DatasetConfig(source="fashion_mnist", root=str(root))


SETS: dict[str, Callable[[Path, int], DatasetConfig]] = {
    "digits": lambda root, seed: DIGITS,
    "fashion_mnist": fashion,
    "imagefolder": lambda root, seed: write_folder(root, seed=seed),
    "webdataset": lambda root, seed: write_shards(root, seed=seed),
}
"""Source -> a small set of it, written into a folder; the seed is that of its pictures."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(params=list(SOURCES))
def cfg(request: pytest.FixtureRequest, tmp_path: Path) -> DatasetConfig:
    return SETS[request.param](tmp_path / "set", 0)


# All sources


def test_a_source_has_rgb_pictures_with_labels_of_its_classes_in_both_splits(cfg):
    for split in ("train", "val"):
        source = open_source(cfg, split)
        assert source.labels.dtype == np.int64 and len(source) == len(source.labels) > 0
        assert set(source.labels) <= set(range(len(source.class_names)))
        assert source.image(len(source) - 1).mode == "RGB" and source.where(0)


def test_a_limit_takes_the_classes_evenly_and_a_larger_limit_begins_with_the_smaller(cfg):
    classes = len(set(open_source(cfg, "train").labels))
    small, large = (open_source(replace(cfg, limit=limit), "train") for limit in (classes, classes + 3))
    assert np.bincount(small.labels).tolist() == [1] * classes and len(large) == classes + 3
    assert large.labels[:classes].tolist() == small.labels.tolist()
    assert all(small.image(i).tobytes() == large.image(i).tobytes() for i in range(classes))


def test_mirroring_is_valid_as_the_source_has_it_unless_dataset_flip_says_otherwise(cfg):
    assert open_source(cfg, "train").flip is SOURCES[cfg.source].flip is (cfg.source in ("imagefolder", "webdataset"))
    assert [open_source(replace(cfg, flip=flip), "val").flip for flip in (True, False)] == [True, False]


def test_the_fingerprint_follows_the_data_and_not_the_place(cfg, tmp_path):
    source = open_source(cfg, "train")
    found = source.fingerprint()
    source.pictures = None
    assert source.fingerprint() == found  # nothing is read again
    others = [open_source(cfg, "val"), open_source(replace(cfg, limit=3), "train")]
    again, changed = (open_source(SETS[cfg.source](tmp_path / str(seed), seed), "train") for seed in (0, 1))
    assert found == again.fingerprint() and found not in {other.fingerprint() for other in others}
    assert (found == changed.fingerprint()) == (cfg.source == "digits")


def test_unknown_splits_and_limits_are_errors(cfg):
    with pytest.raises(UserError, match="unknown split 'test'"):
        open_source(cfg, "test")
    with pytest.raises(UserError, match="dataset.limit=0"):
        open_source(replace(cfg, limit=0), "train")
    with pytest.raises(UserError, match=", ".join(SOURCES)):
        open_source(replace(cfg, source="elsewhere"), "train")


@pytest.mark.parametrize(
    ("source", "root", "message"),
    [
        ("fashion_mnist", "absent", "apt-get install dataset-fashion-mnist.*dataset.root"),
        ("imagefolder", "absent", "no image folder at .*absent: expected .*train/CLASS"),
        ("imagefolder", "without_splits", "no image folder at .*train: expected .*train/CLASS"),
        ("imagefolder", "empty", "no images in .*train: expected .*train/CLASS"),
        ("webdataset", "absent", r"no shards at .*absent/train/\*\.tar: expected .*/val/\*\.tar"),
        ("webdataset", "empty", r"no shards at .*empty/train/\*\.tar: expected .*/val/\*\.tar"),
        ("webdataset", None, "needs dataset.root=FOLDER_OR_URL"),
    ],
)
def test_a_place_without_data_is_an_error_that_says_what_is_expected_there(tmp_path, source, root, message):
    (tmp_path / "without_splits" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    place = None if root is None else str(tmp_path / root)
    with pytest.raises(UserError, match=message):
        open_source(DatasetConfig(source=source, root=place), "train")


def damaged_folder(root: Path) -> str:
    path = root / "val" / "cat" / "002.png"
    path.write_bytes(b"not a picture")
    return str(path)


def damaged_shards(root: Path) -> str:
    contents = [picture(), picture(), b"not a picture", picture()]
    members = [{f"{i}.png": content, f"{i}.cls": b"0"} for i, content in enumerate(contents)]
    path = write_tar(root / "val" / "0.tar", {name: content for member in members for name, content in member.items()})
    return f"{path}:2.png"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("source", "damage"), [("imagefolder", damaged_folder), ("webdataset", damaged_shards)])
def test_an_unreadable_picture_stops_or_is_left_out_of_evaluation_and_counted(tmp_path, source, damage, workers):
    cfg = SETS[source](tmp_path, 0)
    where = damage(tmp_path)
    with pytest.raises(UserError, match=rf"can't read the image {where}.*dataset\.on_corrupt=skip"):
        list(eval_batches(dataset(cfg, "val"), 4, workers=workers))
    images = dataset(replace(cfg, on_corrupt="skip"), "val")
    indices = torch.cat([indices for _, _, indices in eval_batches(images, 4, workers=workers)])
    assert indices.tolist() == [i for i in range(len(images)) if i != 2]
    assert images.corrupt == {2: where}


# Digits, Fashion-MNIST and folders


def dataset(cfg: DatasetConfig, split: str, train: bool = False) -> ImageDataset:
    return ImageDataset(open_source(cfg, split), cfg, train=train)


def test_digits_have_1297_training_and_500_held_out_images_of_every_class_in_proportion():
    train, val = open_source(DIGITS, "train"), open_source(DIGITS, "val")
    assert (len(train), len(val)) == (1297, 500)
    assert train.labels.dtype == np.int64 and train.class_names == [str(digit) for digit in range(10)]
    shares = np.bincount(val.labels) / (np.bincount(val.labels) + np.bincount(train.labels))
    assert np.abs(shares - 500 / 1797).max() < 0.005
    assert np.asarray(val.image(0)).shape == (32, 32, 3)
    assert train.flip is False


def test_no_held_out_digit_is_a_training_digit():
    from sklearn.datasets import load_digits

    def pictures(split):
        source = open_source(DIGITS, split)
        return [np.asarray(source.image(i)).tobytes() for i in range(len(source))]

    train, val = pictures("train"), pictures("val")
    distinct = len({image.tobytes() for image in load_digits().images})
    assert len(set(train) | set(val)) == distinct and not set(train) & set(val)


def test_digits_at_32_px_are_the_same_for_training_evaluation_and_the_adm_crop():
    evaluation = dataset(DIGITS, "val")[3][0]
    assert torch.equal(evaluation, dataset(replace(DIGITS, crop="adm"), "val")[3][0])
    assert torch.equal(evaluation, dataset(DIGITS, "val", train=True)[3][0])


def test_thirty_two_principal_components_describe_the_digits_at_about_29_db():
    def matrix(split):
        images = dataset(DIGITS, split, train=False)
        return np.stack([images[i][0][0].numpy().ravel() for i in range(len(images))]).astype(float)

    train, val = matrix("train"), matrix("val")
    mean = train.mean(axis=0)
    _, _, directions = np.linalg.svd(train - mean, full_matrices=False)
    rebuilt = mean + (val - mean) @ directions[:32].T @ directions[:32]
    psnr = 10 * np.log10(255**2 / np.square(rebuilt - val).mean())
    assert 27 < psnr < 31


def test_fashion_mnist_is_read_from_idx_files_and_bordered_to_32_px(tmp_path):
    pixels, labels = write_fashion(tmp_path / "fashion", count=5)
    source = open_source(DatasetConfig(source="fashion_mnist", root=str(tmp_path / "fashion")), "train")
    assert source.labels.tolist() == labels.tolist() and source.class_names[9] == "Ankle boot"
    image = np.asarray(source.image(4))
    assert image.shape == (32, 32, 3)
    assert np.array_equal(image[2:30, 2:30, 1], pixels[4]) and image.sum() == 3 * pixels[4].astype(int).sum()
    assert source.flip is False


def test_a_failed_download_of_fashion_mnist_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    import torchvision

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    monkeypatch.setattr(small_sets, "FASHION_MNIST_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no network.*apt-get install dataset-fashion-mnist"):
        open_source(DatasetConfig(source="fashion_mnist"), "val")


def test_a_truncated_idx_file_is_an_error_with_its_path(tmp_path):
    write_fashion(tmp_path, count=5)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=str(path)):
        open_source(DatasetConfig(source="fashion_mnist", root=str(tmp_path)), "train")


def test_an_image_folder_numbers_its_classes_in_sorted_order(tmp_path):
    cfg = write_folder(tmp_path, classes=("zebra", "ant"), count=2)
    source = open_source(cfg, "val")
    assert source.class_names == ["ant", "zebra"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.where(3).endswith("val/zebra/001.png")


def test_classes_keep_their_number_when_a_split_lacks_one(tmp_path):
    cfg = write_folder(tmp_path, classes=("ant", "bee", "cat"), count=1)
    (tmp_path / "val" / "bee" / "000.png").unlink()
    (tmp_path / "val" / "bee").rmdir()
    assert open_source(cfg, "val").labels.tolist() == [0, 2]


def test_root_wins_over_imagenet_root(tmp_path):
    cfg = write_folder(tmp_path / "here", count=1)
    assert len(open_source(replace(cfg, imagenet_root="nowhere"), "train")) == 2
    assert len(open_source(DatasetConfig(imagenet_root=str(tmp_path / "here")), "train")) == 2


def test_the_balanced_order_is_a_permutation_even_of_uneven_classes():
    labels = np.array([0] * 10 + [1] * 3 + [2])
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(14))
    assert sorted(labels[order[:3]].tolist()) == [0, 1, 2]
    assert sorted(labels[order[:7]].tolist()) == [0, 0, 0, 1, 1, 1, 2]
