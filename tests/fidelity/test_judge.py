import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.fidelity.judge import SmallClassifier, train_classifier
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import DatasetConfig, open_source


def digits(split, limit=None):
    cfg = DatasetConfig(source="digits", im_size=16, limit=limit)
    images = ImageDataset(open_source(cfg, split), cfg, train=False)
    pixels, labels, _ = zip(*(images[i] for i in range(len(images))), strict=True)
    return torch.stack(pixels), torch.tensor(labels)


def test_it_learns_the_digits():
    classifier = train_classifier(*digits("train"), num_classes=10, seed=0, steps=150)
    assert classifier.accuracy(*digits("val")) >= 0.97


def test_training_is_repeatable_and_leaves_the_global_random_stream_alone():
    images, labels = digits("train", limit=50)
    torch.manual_seed(5)
    first = train_classifier(images, labels, 10, seed=1, steps=3)
    after = torch.rand(1)
    second = train_classifier(images, labels, 10, seed=1, steps=3)
    other = train_classifier(images, labels, 10, seed=2, steps=3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first(images), second(images)) and not torch.equal(first(images), other(images))
    assert not first.training


@pytest.mark.parametrize("size", [16, 28, 33, 64])
def test_it_takes_square_images_of_many_sizes(size):
    classifier = SmallClassifier(num_classes=7)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    assert classifier(images).shape == (2, 7) and classifier.features(images).shape == (2, 128)


def test_images_that_are_too_small_or_not_uint8_are_refused():
    classifier = SmallClassifier(num_classes=7)
    with pytest.raises(UserError, match="16 px"):
        classifier(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        classifier(torch.zeros(1, 3, 16, 16))


def test_a_saved_classifier_comes_back_the_same(tmp_path):
    images, labels = digits("train", limit=30)
    classifier = train_classifier(images, labels, 10, seed=0, steps=2)
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = SmallClassifier.load(tmp_path / "classifier.safetensors")
    assert torch.equal(loaded(images), classifier(images)) and loaded.num_classes == 10 and not loaded.training


def test_another_file_or_none_is_an_error(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="absent.safetensors"):
        SmallClassifier.load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="text.safetensors"):
        SmallClassifier.load(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors"):
        SmallClassifier.load(tmp_path / "model.safetensors")
