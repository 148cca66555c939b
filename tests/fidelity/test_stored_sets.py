import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ssdd.engine.errors import UserError
from ssdd.fidelity.stored_sets import Treatment, check_comparable, open_set
from ssdd.images.crops import adm_crop


def pixels(n, height=8, width=8, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, height, width, 3), dtype=np.uint8)


def read(images, batch_size=3, **ranks):
    found = {}
    for batch, indices in images.batches(batch_size, **ranks):
        assert batch.dtype == torch.uint8 and 1 <= len(batch) <= batch_size
        found |= dict(zip(indices.tolist(), batch.permute(0, 2, 3, 1).numpy(), strict=True))
    return found


@pytest.fixture
def mixed(tmp_path):
    """PNG and JPEG files of two sizes, one of them grey, in a folder and one below it."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    for name, image in (("b.png", pixels(1)[0]), ("a.PNG", pixels(1, seed=1)[0]), ("deep/c.jpg", pixels(1, 20, 30)[0])):
        Image.fromarray(image).save(folder / name)
    Image.fromarray(pixels(1)[0, :, :, 0]).save(folder / "deep" / "d.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_is_read_in_the_order_of_paths_and_says_what_is_in_it(mixed):
    images = open_set(mixed)
    found = read(images)
    assert len(images) == 4 and [found[i].shape for i in range(4)] == [(8, 8, 3), (8, 8, 3), (20, 30, 3), (8, 8, 3)]
    assert np.array_equal(found[0], pixels(1, seed=1)[0]) and np.array_equal(found[1], pixels(1)[0])
    described = images.describe()
    assert described["stored"] == {"PNG RGB 8x8": 2, "JPEG RGB 30x20": 1, "PNG L 8x8": 1}
    assert (described["count"], described["crop"], described["size"]) == (4, "none", None)


def test_a_crop_makes_all_images_squares_of_one_size(mixed):
    images = open_set(mixed, im_size=6)
    found = read(images)
    with Image.open(mixed / "deep" / "c.jpg") as image:
        assert np.array_equal(found[2], np.asarray(adm_crop(image, 6)))
    assert images.treatment == Treatment("adm", (6, 6)) and all(image.shape == (6, 6, 3) for image in found.values())
    other = read(open_set(mixed, im_size=6, crop="resize"))
    assert not np.array_equal(other[2], found[2])


def test_processes_share_a_set_without_dropping_or_doubling(mixed):
    whole, parts = read(open_set(mixed)), [read(open_set(mixed), rank=rank, world=3) for rank in range(3)]
    assert sorted(index for part in parts for index in part) == [0, 1, 2, 3]
    assert all(np.array_equal(image, whole[index]) for part in parts for index, image in part.items())


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_has_the_same_pixels_and_treatment_as_the_files(tmp_path, write):
    stored = pixels(5)
    write(tmp_path / "samples.npz", stored, np.array([0, 1, 0, 1, 0]))
    images = open_set(tmp_path / "samples.npz")
    assert np.array_equal(np.stack([image for _, image in sorted(read(images, 2).items())]), stored)
    assert images.treatment == Treatment("none", (8, 8))
    assert images.describe()["labels"] == "2 classes, random or unbalanced"
    assert set(read(images, rank=1, world=2)) == {1, 3}


def test_shards_have_the_same_pixels_and_treatment_as_the_files_with_or_without_labels(tmp_path, mixed):
    (tmp_path / "shards").mkdir()
    files = ["a.PNG", "b.png", "deep/c.jpg", "deep/d.png"]
    for i, members in enumerate((files[:3], files[3:])):
        with tarfile.open(tmp_path / "shards" / f"{i}.tar", "w") as tar:
            for name in members:
                tar.add(mixed / name, arcname=name)
    shards, folder = (open_set(tmp_path / name, im_size=6) for name in ("shards", "mixed"))
    a, b = (read(images) for images in (shards, folder))
    assert len(a) == 4 and all(np.array_equal(a[i], b[i]) for i in range(4))
    assert shards.treatment == folder.treatment and shards.describe()["stored"] == folder.describe()["stored"]
    assert shards.fingerprint() == folder.fingerprint()
    assert len(open_set(tmp_path / "shards" / "1.tar")) == 1
    (tmp_path / "1.json").write_text('{"caption": "no label"}')
    with tarfile.open(tmp_path / "shards" / "1.tar", "a") as tar:
        tar.add(tmp_path / "1.json", arcname="deep/d.json")
    assert len(open_set(tmp_path / "shards")) == 4
    with tarfile.open(tmp_path / "shards" / "0.tar", "a") as tar:
        tar.add(mixed / "b.png", arcname="b.pkl")
    with pytest.raises(UserError, match="can run code"):
        open_set(tmp_path / "shards")


def test_a_fingerprint_follows_content_not_place(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(1, seed=seed)[0]).save(tmp_path / name / "0.png")
        np.savez(tmp_path / f"{name}.npz", pixels(1, seed=seed))
    for suffix in ("", ".npz"):
        a, b, c = (open_set(tmp_path / f"{name}{suffix}").fingerprint() for name in "abc")
        assert a == b != c


def test_what_is_no_set_of_images_is_an_error(tmp_path, mixed):
    np.savez(tmp_path / "floats.npz", np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("floats.npz", "float64"), ("other.npz", "no array arr_0"), ("broken.npz", "not a complete npz"),
        ("empty", "no images"), ("absent", "no such file"), ("objects.npy", "expected a folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            open_set(tmp_path / name)
    (mixed / "a.PNG").write_bytes(b"no picture")
    with pytest.raises(UserError, match="a.PNG"):
        open_set(mixed)


@pytest.mark.parametrize(
    "a, b, problem",
    [
        (Treatment("adm", (8, 8)), Treatment("adm", (8, 8)), None),
        (Treatment("adm", (8, 8)), Treatment("none", (8, 8)), None),
        (Treatment("unknown", (8, 8)), Treatment("adm", (8, 8)), None),
        (Treatment("unknown", None), Treatment("none", (8, 8)), None),
        (Treatment("adm", (8, 8)), Treatment("resize", (8, 8)), "the crops differ"),
        (Treatment("adm", (8, 8)), Treatment("adm", (16, 16)), "differ in size"),
        (Treatment("unknown", (8, 8)), Treatment("none", (16, 16)), "differ in size"),
        (Treatment("none", None), Treatment("adm", (8, 8)), "different sizes"),
    ],
)
def test_sets_that_were_treated_differently_are_refused_unless_allowed(a, b, problem):
    if problem is None:
        assert check_comparable(a, b, ("x", "y"), allow_mismatch=False) is None
        return
    with pytest.raises(UserError, match=f"{problem}.*allow_mismatch=true"):
        check_comparable(a, b, ("x", "y"), allow_mismatch=False)
    assert problem in check_comparable(a, b, ("x", "y"), allow_mismatch=True)
