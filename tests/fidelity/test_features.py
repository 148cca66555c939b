from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssdd.engine import pretrained as weights
from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.errors import UserError
from ssdd.fidelity import features
from ssdd.fidelity.features import load_features
from ssdd.fidelity.judge import train_classifier
from ssdd.images.pixels import from_uint8
from tests.fidelity.inception import write_random_inception

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


def test_figures_are_without_tf32_also_where_a_training_run_measures(monkeypatch):
    cudnn, seen = torch.backends.cudnn, []

    class Network(torch.nn.Module):
        def forward(self, images):
            seen.append(cudnn.allow_tf32)
            return images.float().mean(dim=(2, 3))

    monkeypatch.setattr(cudnn, "allow_tf32", True)
    features.FeatureNetwork("means", 3, "", Network())(noise(2, 8))
    assert seen == [False] and cudnn.allow_tf32


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


def test_inception_gives_the_features_and_logits_of_torch_fidelity_and_adms_spatial_features(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / weights.PRETRAINED["inception"].filename
    images = noise(2, 32)
    write_random_inception(path, images)
    upstream = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    monkeypatch.setitem(weights.PRETRAINED, "inception", replace(weights.PRETRAINED["inception"], sha256=""))
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    network = load_features("inception")
    found, kept = network.outputs(images), []
    upstream.Mixed_6d.branch1x1.bn.register_forward_hook(lambda module, inputs, output: kept.append(output.clone()))
    pooled, logits = upstream(images)
    assert torch.equal(network(images), pooled) and torch.equal(found.features, pooled)
    assert torch.equal(found.logits, logits) and found.logits.shape == (2, network.classes)
    height_width_channel = kept[0].relu()[:, :7].movedim(1, 3)  # [2, 17, 17, 7]
    assert torch.equal(found.spatial, height_width_channel.reshape(2, network.spatial_dim))
    assert network.spatial_dim == 2023 and found.spatial.std() > 0
    assert network.provenance() == {
        "network": "inception",
        "dim": 2048,
        "checksum": weights.sha256_file(path),
        "resize": "bilinear as in TensorFlow 1, no antialiasing, to 299",
    }


def write_timm(folder, name, monkeypatch):
    """Untrained weights of a timm model in the search path; the model."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    save_tensors(folder / f"{name}.safetensors", model.state_dict())
    monkeypatch.setenv("SSDD_WEIGHTS", str(folder))
    return model


@torch.no_grad()
def test_any_timm_classifier_gives_its_pooled_features_and_its_logits(tmp_path, monkeypatch):
    model = write_timm(tmp_path, "test_vit", monkeypatch)
    network = load_features("timm/test_vit")
    images = noise(2, 160)
    x = (images.float() / 255 - 0.5) / 0.5
    found = network.outputs(images)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.allclose(found.features, expected, atol=1e-5) and network.dim == expected.shape[1]
    assert torch.allclose(found.logits, model(x), atol=1e-5) and network.classes == 1000
    assert network.resize == "bicubic, antialiased, to 160x160"
    assert network(noise(1, 40)).shape == (1, network.dim)


@torch.no_grad()
def test_clip_gives_the_embedding_that_it_shares_with_texts(tmp_path, monkeypatch):
    name = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
    model = write_timm(tmp_path, name, monkeypatch)
    monkeypatch.setitem(features.TIMM_ALIASES, "clip", name)
    network = load_features("clip")
    images = noise(1, 224)
    x = (images.float() / 255 - network.network.mean) / network.network.std
    assert torch.allclose(network(images), model(x), atol=1e-5)
    assert (network.dim, network.classes, network.name) == (model.num_classes, 0, "clip")
    assert network.network.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])


@torch.no_grad()
def test_dinov2_gives_its_class_token_at_224_px(tmp_path, monkeypatch):
    import timm

    name = "vit_small_patch14_dinov2.lvd142m"
    model = write_timm(tmp_path, name, monkeypatch)
    monkeypatch.setitem(features.TIMM_ALIASES, "dinov2", name)
    network = load_features("dinov2")
    images = noise(1, 224)
    any_size = timm.create_model(name, dynamic_img_size=True).eval()
    any_size.load_state_dict(model.state_dict())
    x = (images.float() / 255 - network.network.mean) / network.network.std
    token = any_size.forward_features(x)[:, 0]
    assert torch.allclose(network(images), token, atol=1e-5) and network.dim == 384
    assert network.resize.endswith("224x224")


def test_timm_weights_of_another_model_are_an_error(tmp_path, monkeypatch):
    write_timm(tmp_path, "test_vit", monkeypatch)
    (tmp_path / "test_vit.safetensors").rename(tmp_path / "test_vit2.safetensors")
    with pytest.raises(UserError, match="the weights of test_vit2 do not fit"):
        load_features("timm/test_vit2")
    (tmp_path / "test_vit2.safetensors").rename(tmp_path / "no_such_model.safetensors")
    with pytest.raises(UserError, match="no_such_model"):
        load_features("timm/no_such_model")
