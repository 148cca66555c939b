import gzip
import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssdd.engine.errors import UserError
from ssdd.images import small_sets
from ssdd.images.batches import eval_batches, steps_per_epoch, train_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import DatasetConfig, balanced_order, open_source

DIGITS = DatasetConfig(source="digits", im_size=32, batch_size=64)


def write_folder(root, classes=("cat", "dog"), count=6, size=(40, 30)):
    """root/train and root/val with `count` random PNG files a class."""
    random = np.random.RandomState(0)
    for split, name, number in itertools.product(("train", "val"), classes, range(count)):
        path = root / split / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(path)
    return DatasetConfig(source="imagefolder", root=str(root), im_size=16)


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


def dataset(cfg, split="train", train=None, seed=0):
    return ImageDataset(open_source(cfg, split), cfg, train=split == "train" if train is None else train, seed=seed)


# Sources


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


# Transforms


def gradient(width, height):
    ramp = np.add.outer(np.arange(height) * 2, np.arange(width)).astype(np.uint8)
    return Image.fromarray(np.stack([ramp, ramp, ramp], axis=-1))


def folder_with(tmp_path, image, **settings):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        image.save(tmp_path / split / "only" / "0.png")
    return DatasetConfig(root=str(tmp_path), im_size=16, **settings)


@pytest.mark.parametrize("size", [(40, 30), (33, 57), (16, 16), (10, 7)])
def test_the_test_time_crop_is_that_of_torchvision(tmp_path, size):
    from torchvision.transforms import v2

    cfg = folder_with(tmp_path, gradient(*size))
    expected = v2.Compose([v2.Resize(16), v2.CenterCrop(16), v2.PILToTensor()])(gradient(*size))
    image, label, index = dataset(cfg, "val")[0]
    assert image.dtype == torch.uint8 and (label, index) == (0, 0)
    assert torch.equal(image, expected)


def test_the_adm_crop_halves_with_a_box_filter_then_goes_bicubic(tmp_path):
    cfg = folder_with(tmp_path, gradient(70, 66), crop="adm")
    image = gradient(70, 66).resize((35, 33), Image.Resampling.BOX)
    image = image.resize((17, 16), Image.Resampling.BOX).resize((17, 16), Image.Resampling.BICUBIC).crop((0, 0, 16, 16))
    assert np.array_equal(dataset(cfg, "val")[0][0].permute(1, 2, 0).numpy(), np.asarray(image))


def test_training_crops_vary_with_the_epoch_and_repeat_with_the_seed(tmp_path):
    cfg = folder_with(tmp_path, gradient(40, 30), aug_scale=2.0)
    images = dataset(cfg, seed=1)
    views = [images[epoch, 0][0] for epoch in range(20)]
    assert len({view.numpy().tobytes() for view in views}) > 15
    assert all(view.shape == (3, 16, 16) for view in views)
    again = dataset(cfg, seed=1)
    assert all(torch.equal(again[epoch, 0][0], views[epoch]) for epoch in (7, 3, 19))
    assert not torch.equal(dataset(cfg, seed=2)[0, 0][0], views[0])


def test_mirroring_happens_to_about_half_of_the_images_and_only_where_it_is_valid(tmp_path):
    cfg = folder_with(tmp_path, gradient(16, 16))
    plain = torch.from_numpy(np.array(gradient(16, 16))).permute(2, 0, 1)
    mirrored = sum(torch.equal(dataset(cfg)[epoch, 0][0], plain.flip(2)) for epoch in range(60))
    assert 15 < mirrored < 45
    never = dataset(replace(cfg, flip=False))
    assert all(torch.equal(never[epoch, 0][0], plain) for epoch in range(10))


def test_decoded_images_of_small_sets_are_kept_in_memory(tmp_path):
    images = dataset(write_folder(tmp_path), "train")
    before = [images[0, i][0] for i in range(len(images))]
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert all(torch.equal(images[0, i][0], before[i]) for i in range(len(images)))


def test_what_a_caller_does_to_an_image_does_not_reach_the_kept_one():
    images = dataset(DIGITS, "val")
    first = images[0][0].clone()
    images[0][0].zero_()
    assert torch.equal(images[0][0], first)


def test_nonsense_sizes_are_errors(tmp_path):
    cfg = write_folder(tmp_path, count=1)
    for setting in ({"im_size": 0}, {"aug_scale": 0.5}):
        with pytest.raises(UserError, match=f"dataset.{next(iter(setting))}"):
            dataset(replace(cfg, **setting))


# Batches


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_an_epoch_sees_every_image_at_most_once_and_the_next_in_another_order():
    images = dataset(replace(DIGITS, limit=100))
    assert steps_per_epoch(images, 32) == 3
    batches = take(train_batches(images, 32, seed=0), 6)
    assert [batch[3] for batch in batches] == [0, 0, 0, 1, 1, 1]
    epochs = [torch.cat([batch[2] for batch in batches[first : first + 3]]).tolist() for first in (0, 3)]
    assert all(len(set(epoch)) == 96 for epoch in epochs) and epochs[0] != epochs[1]


def test_batches_hold_images_in_minus_one_to_one_with_their_labels():
    images = dataset(DIGITS)
    pixels, labels, indices, _ = next(train_batches(images, 64, seed=0))
    assert pixels.dtype == torch.float32 and pixels.shape == (64, 3, 32, 32)
    assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.min() < -0.9
    assert labels.tolist() == [int(images.source.labels[i]) for i in indices]


def test_a_set_smaller_than_a_batch_is_repeated_to_fill_it():
    images = dataset(replace(DIGITS, limit=5))
    assert steps_per_epoch(images, 12) == 1
    first, second = take(train_batches(images, 12, seed=0), 2)
    assert sorted(np.bincount(first[2]).tolist()) == [2, 2, 2, 3, 3]
    assert (first[3], second[3]) == (0, 1)


def test_resuming_gives_the_batches_an_unbroken_run_would_have_given(tmp_path):
    cfg = replace(write_folder(tmp_path, count=8), aug_scale=1.5)
    straight = take(train_batches(dataset(cfg), 5, seed=3), 9)
    resumed = take(train_batches(dataset(cfg), 5, seed=3, start_step=7), 2)
    for expected, batch in zip(straight[7:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected[:3], batch[:3], strict=True)) and expected[3] == batch[3]


def test_resuming_decodes_nothing_of_what_it_skips(tmp_path):
    cfg = replace(write_folder(tmp_path, count=8), aug_scale=1.5)
    images = dataset(cfg)
    decoded = []
    read = images.source.pictures.read
    images.source.pictures.read = lambda index: decoded.append(index) or read(index)
    next(train_batches(images, 4, seed=0, start_step=1001))
    assert len(decoded) == 4


def test_processes_split_the_global_batch_between_them(tmp_path):
    cfg = replace(write_folder(tmp_path, count=8), aug_scale=1.5)
    whole = take(train_batches(dataset(cfg), 6, seed=0), 4)
    halves = [take(train_batches(dataset(cfg), 6, seed=0, rank=rank, world=2), 4) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch[0], torch.cat([halves[0][step][0], halves[1][step][0]]))
    with pytest.raises(UserError, match="dataset.batch_size=5"):
        next(train_batches(dataset(cfg), 5, seed=0, world=2))


def test_worker_processes_change_neither_batches_nor_the_global_random_stream(tmp_path):
    cfg = replace(write_folder(tmp_path, count=8), aug_scale=1.5)
    alone = take(train_batches(dataset(cfg), 5, seed=0), 5)
    torch.manual_seed(0)
    helped = take(train_batches(dataset(cfg), 5, seed=0, workers=2), 5)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3] == b[3]
    evaluated = [list(eval_batches(dataset(cfg, "val"), 5, workers=workers)) for workers in (0, 2)]
    for a, b in zip(*evaluated, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_exactly_once_over_all_processes(world):
    images = dataset(replace(DIGITS, limit=50), "val")
    batches = [list(eval_batches(images, 8, rank=rank, world=world)) for rank in range(world)]
    seen = [torch.cat([indices for _, _, indices in own]) for own in batches]
    assert all(torch.equal(own, torch.arange(rank, 50, world)) for rank, own in enumerate(seen))
    assert sorted(torch.cat(seen).tolist()) == list(range(50))


# Unreadable images


def corrupt(tmp_path, split="train", content=b"no image at all"):
    path = tmp_path / split / "cat" / "002.png"
    path.write_bytes(content if content is not None else path.read_bytes()[:60])
    return path


@pytest.mark.parametrize("content", [b"no image at all", b"", None], ids=["garbage", "empty", "truncated"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_an_error_with_its_path(tmp_path, content, workers):
    cfg = write_folder(tmp_path)
    path = corrupt(tmp_path, content=content)
    with pytest.raises(UserError, match=f"^can't read the image {path}.*on_corrupt=skip"):
        take(train_batches(dataset(cfg), 4, seed=0, workers=workers), 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_left_out_of_evaluation_and_counted_on_request(tmp_path, workers):
    cfg = replace(write_folder(tmp_path), on_corrupt="skip")
    path = corrupt(tmp_path, "val")
    images = dataset(cfg, "val")
    seen = torch.cat([indices for _, _, indices in eval_batches(images, 5, workers=workers)])
    assert seen.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert images.corrupt == {2: str(path)}


def test_training_replaces_an_unreadable_image_by_the_next_and_keeps_the_order(tmp_path):
    cfg = write_folder(tmp_path)
    intact = take(train_batches(dataset(cfg), 4, seed=0), 6)
    path = corrupt(tmp_path)
    images = dataset(replace(cfg, on_corrupt="skip"))
    batches = take(train_batches(images, 4, seed=0), 6)
    for whole, batch in zip(intact, batches, strict=True):
        kept = whole[2] != 2
        assert torch.equal(whole[0][kept], batch[0][kept]) and (batch[2][~kept] == 3).all()
    assert images.corrupt == {2: str(path)}


def test_a_set_without_any_readable_image_is_an_error(tmp_path):
    cfg = replace(write_folder(tmp_path, count=1), on_corrupt="skip")
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 2 images"):
        dataset(cfg)[0]
