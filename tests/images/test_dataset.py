"""Images as batches: crops, mirroring, the order of samples, processes that share them, and unreadable files."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssdd.engine.errors import UserError
from ssdd.images.batches import eval_batches, steps_per_epoch, train_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import DatasetConfig, open_source
from tests.images.pictures import write_folder

DIGITS = DatasetConfig(source="digits", im_size=32, batch_size=64)


def dataset(cfg, split="train", train=None, seed=0):
    return ImageDataset(open_source(cfg, split), cfg, train=split == "train" if train is None else train, seed=seed)


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
