"""Networks that turn images into feature vectors for Frechet distance, KID, precision and recall."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssdd.engine.classifier import FEATURE_DIM, SmallClassifier
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file
from ssdd.engine.pictures import from_uint8
from ssdd.engine.weights import find, load_tensors

CLASSIFIER_PREFIX = "classifier:"
LITE0 = "tf_efficientnet_lite0"
LITE0_SMALLEST_SIDE = 64  # smaller images leave its last stages less than 2 x 2 positions
NETWORKS = ("inception", "efficientnet_lite0")


class FeatureNetwork(nn.Module):
    """uint8 RGB images [n, 3, h, w] to float32 features [n, dim].

    name: as given to `load_features`, part of every result made with it; checksum: sha256 of the weights file.
    """

    def __init__(self, name: str, dim: int, checksum: str, network: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.dim = dim
        self.checksum = checksum
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images [n, 3, h, w], got {images.dtype} {tuple(images.shape)}")
        return self.network(images).float()

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode whatever a surrounding module does."""
        return super().train(False)


def load_features(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Load a feature network onto `device`.

    name: "inception" (Inception v3 of the FID papers as in torch-fidelity, 2048 numbers), "efficientnet_lite0"
    (ImageNet network, 1280 numbers) or "classifier:FILE.safetensors" (a `SmallClassifier`, 128 numbers).
    UserError for another name, or when the weights are missing.
    """
    if name == "inception":
        path = find(name)
        network: nn.Module = Inception(load_tensors(path))
        dim = 2048
    elif name == "efficientnet_lite0":
        path = find(name)
        network = EfficientNetLite0(load_tensors(path))
        dim = 1280
    elif name.startswith(CLASSIFIER_PREFIX):
        path = Path(name.removeprefix(CLASSIFIER_PREFIX))
        network = ClassifierFeatures(SmallClassifier.load(path))
        dim = FEATURE_DIM
    else:
        raise UserError(f"unknown feature network {name!r}: expected {', '.join(NETWORKS)} or {CLASSIFIER_PREFIX}FILE")
    return FeatureNetwork(name, dim, sha256_file(path), network).to(device)


class Inception(nn.Module):
    """Inception v3 (2015, ported from TensorFlow) of torch-fidelity, layer 2048, with its TensorFlow-like resize."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles its file with code allowed, so it gets a copy that we wrote from plain tensors.
        file = io.BytesIO()
        torch.save(tensors, file)
        file.seek(0)
        with torch.random.fork_rng(devices=[]):
            self.extractor = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=file
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(images)[0]


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (ImageNet, inputs with mean and deviation 0.5), the pooled layer before its classifier.

    Images below 64 px are enlarged to 64 (bilinear); larger ones are taken as they are.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        import timm

        with torch.random.fork_rng(devices=[]):
            self.model = timm.create_model(LITE0, pretrained=False)
        names = list(self.model.state_dict())  # same tensors in the same order, under timm's names
        if len(names) != len(tensors):
            raise UserError(f"the EfficientNet-Lite0 file holds {len(tensors)} tensors instead of {len(names)}")
        self.model.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
        self.model.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(_prepare(from_uint8(images))), pre_logits=True)

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet class logits [n, 1000] of uint8 images [n, 3, h, w]."""
        return self.model(_prepare(from_uint8(images)))


class TimmStages(nn.Module):
    """Feature maps of the stages of a timm network, finest first, of images [n, 3, h, w] in [-1, 1]."""

    def __init__(self, name: str, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        import timm

        if name == LITE0:
            self.model, mean, std = EfficientNetLite0(tensors).model, [0.5] * 3, [0.5] * 3
        else:
            with torch.random.fork_rng(devices=[]):
                self.model = timm.create_model(name, pretrained=False)
            try:
                self.model.load_state_dict(tensors)
            except RuntimeError as error:
                raise UserError(f"the weights of {name} do not fit it: {str(error).splitlines()[1].strip()}") from None
            config = timm.data.resolve_model_data_config(self.model)
            mean, std = config["mean"], config["std"]
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        inputs = _prepare((images.float() * 0.5 + 0.5 - self.mean) / self.std)
        return self.model.forward_intermediates(inputs, intermediates_only=True)


def _prepare(images: Tensor) -> Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    if min(images.shape[2:]) < LITE0_SMALLEST_SIDE:
        enlarged = [max(side, LITE0_SMALLEST_SIDE) for side in images.shape[2:]]
        images = F.interpolate(images, size=enlarged, mode="bilinear", align_corners=False)
    return images


class ClassifierFeatures(nn.Module):
    """The layer before the last of a `SmallClassifier`."""

    def __init__(self, classifier: SmallClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)
