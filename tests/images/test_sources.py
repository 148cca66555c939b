"""Where images come from: splits, classes, limits and fingerprints of every source."""

import gzip
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.images import small_sets
from ssdd.images.sources import DatasetConfig, balanced_order, open_source
from tests.images.folders import DIGITS, dataset, write_folder


def write_fashion(folder, split="train", count=5):
    folder.mkdir(exist_ok=True)
    pixels = np.random.RandomState(1).randint(0, 256, (count, 28, 28)).astype(np.uint8)
    labels = np.arange(count, dtype=np.uint8)
    stem = "train" if split == "train" else "t10k"
    header = struct.pack(">4I", 0x803, count, 28, 28)
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    header = struct.pack(">2I", 0x801, count)
    (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return pixels, labels


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


def test_missing_fashion_mnist_files_are_an_error_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist.*dataset.root"):
        open_source(DatasetConfig(source="fashion_mnist", root=str(tmp_path)), "train")


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
    assert source.flip is True and open_source(replace(cfg, flip=False), "val").flip is False


def test_classes_keep_their_number_when_a_split_lacks_one(tmp_path):
    cfg = write_folder(tmp_path, classes=("ant", "bee", "cat"), count=1)
    (tmp_path / "val" / "bee" / "000.png").unlink()
    (tmp_path / "val" / "bee").rmdir()
    assert open_source(cfg, "val").labels.tolist() == [0, 2]


def test_root_wins_over_imagenet_root(tmp_path):
    cfg = write_folder(tmp_path / "here", count=1)
    assert len(open_source(replace(cfg, imagenet_root="nowhere"), "train")) == 2
    assert len(open_source(DatasetConfig(imagenet_root=str(tmp_path / "here")), "train")) == 2


@pytest.mark.parametrize("place", ["absent", "without_splits", "empty"])
def test_a_folder_without_images_in_the_right_layout_is_an_error_that_says_the_layout(tmp_path, place):
    (tmp_path / "without_splits" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="train/CLASS"):
        open_source(DatasetConfig(root=str(tmp_path / place)), "train")


def test_unknown_splits_and_limits_are_errors():
    with pytest.raises(UserError, match="test"):
        open_source(DIGITS, "test")
    with pytest.raises(UserError, match="dataset.limit=0"):
        open_source(replace(DIGITS, limit=0), "train")


def test_a_limit_takes_the_classes_evenly_and_a_larger_limit_begins_with_the_smaller():
    small, large = open_source(replace(DIGITS, limit=20), "train"), open_source(replace(DIGITS, limit=45), "train")
    assert np.bincount(small.labels).tolist() == [2] * 10
    assert large.labels[:20].tolist() == small.labels.tolist()
    assert all(small.image(i).tobytes() == large.image(i).tobytes() for i in range(20))


def test_the_balanced_order_is_a_permutation_even_of_uneven_classes():
    labels = np.array([0] * 10 + [1] * 3 + [2])
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(14))
    assert sorted(labels[order[:3]].tolist()) == [0, 1, 2]
    assert sorted(labels[order[:7]].tolist()) == [0, 0, 0, 1, 1, 1, 2]


def test_the_fingerprint_follows_the_data_and_not_the_place(tmp_path):
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    print_of = open_source(first, "train").fingerprint()
    assert print_of == open_source(second, "train").fingerprint()
    assert print_of != open_source(first, "val").fingerprint()
    assert print_of != open_source(replace(first, limit=3), "train").fingerprint()
    path = tmp_path / "b" / "train" / "cat" / "000.png"
    changed = bytearray(path.read_bytes())
    changed[-20] ^= 1
    path.write_bytes(changed)
    assert print_of != open_source(second, "train").fingerprint()
