from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssdd.engine import weights
from ssdd.engine.classifier import train_classifier
from ssdd.engine.errors import UserError
from ssdd.engine.features import load_features
from ssdd.engine.pictures import from_uint8

PALACE, MONASTERY, DAISY = 698, 663, 985  # ImageNet classes


@pytest.fixture(scope="module")
def lite0():
    return load_features("efficientnet_lite0")


def noise(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def photograph(name, size=224):
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image(name))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    "name, classes", [("china.jpg", {PALACE, MONASTERY}), ("flower.jpg", {DAISY})], ids=["palace", "daisy"]
)
def test_lite0_is_a_trained_imagenet_network(lite0, name, classes):
    top = lite0.network.logits(photograph(name)).topk(5).indices[0].tolist()
    assert classes <= set(top) and top[0] in classes


def test_lite0_gives_1280_numbers_an_image_and_says_who_it_is(lite0):
    features = lite0(noise(3, 64))
    assert features.shape == (3, 1280) and features.dtype == torch.float32 and features.std() > 0
    assert (lite0.name, lite0.dim) == ("efficientnet_lite0", 1280)
    assert lite0.checksum.startswith("57934424")


def test_lite0_enlarges_small_images_to_64_px(lite0):
    small = noise(2, 32)
    enlarged = torch.nn.functional.interpolate(from_uint8(small), size=64, mode="bilinear", align_corners=False)
    expected = lite0.network.model.forward_features(enlarged).mean(dim=(2, 3))
    assert torch.allclose(lite0(small), expected, atol=1e-4)


def test_features_do_not_depend_on_the_batch(lite0):
    images = noise(5, 64)
    alone = torch.cat([lite0(image[None]) for image in images])
    assert torch.allclose(lite0(images), alone, atol=1e-4)


def test_a_feature_network_never_trains(lite0):
    lite0.train()
    assert not any(module.training for module in lite0.modules())
    assert not any(parameter.requires_grad for parameter in lite0.parameters())


def test_loading_leaves_the_global_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_features("efficientnet_lite0")
    assert torch.equal(torch.rand(1), expected)


def test_float_images_are_refused(lite0):
    with pytest.raises(ValueError, match="uint8"):
        lite0(torch.zeros(1, 3, 64, 64))


def test_classifier_features_are_its_penultimate_layer(tmp_path):
    images = noise(20, 16)
    classifier = train_classifier(images, torch.arange(20) % 2, 2, steps=2)
    path = tmp_path / "classifier.safetensors"
    classifier.save(path)
    network = load_features(f"classifier:{path}")
    assert network.dim == 128 and torch.equal(network(images), classifier.features(images))
    assert network.checksum == weights.sha256_file(path)


def test_an_unknown_network_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match="inception, efficientnet_lite0, dinov2, clip, timm/MODEL or classifier:FILE"):
        load_features("resnet")


def test_inception_without_its_weights_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match="weights-inception-2015-12-05-6726825d.pth"):
        load_features("inception")


def test_inception_with_weights_gives_the_2048_numbers_of_torch_fidelity(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as upstream

    extractor_class = upstream.FeatureExtractorInceptionV3
    with monkeypatch.context() as without_weights:
        without_weights.setattr(upstream, "load_state_dict_from_url", lambda *args, **kwargs: {})
        without_weights.setattr(extractor_class, "load_state_dict", lambda self, tensors: None)
        untrained = extractor_class("inception-v3-compat", ["2048"])
    torch.save(untrained.state_dict(), tmp_path / weights.PRETRAINED["inception"].filename)
    monkeypatch.setitem(weights.PRETRAINED, "inception", replace(weights.PRETRAINED["inception"], sha256=""))
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    network = load_features("inception")
    images = noise(2, 32)
    features = network(images)
    assert features.shape == (2, network.dim) == (2, 2048)
    assert torch.equal(features, untrained(images)[0])
