"""Networks that map images to feature vectors for Frechet distance, KID, precision, recall and Inception Score."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssdd.engine.devices import without_tf32
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file
from ssdd.engine.pretrained import TIMM_PREFIX, find, has, load_tensors
from ssdd.fidelity.judge import FEATURE_DIM, SmallClassifier
from ssdd.images.pixels import from_uint8, to_unit

CLASSIFIER_PREFIX = "classifier:"
LITE0 = "tf_efficientnet_lite0"
LITE0_SMALLEST_SIDE = 64  # smaller images leave its last stages less than 2 x 2 positions
# The networks of FD-DINOv2 (Stein et al. 2023) and FD-CLIP (Kynkaanniemi et al. 2022), under timm's names.
TIMM_ALIASES = {
    "dinov2": "vit_large_patch14_dinov2.lvd142m",
    "clip": "vit_base_patch32_clip_quickgelu_224.openai",
}
DINOV2_SIDE = 224  # what distances on DINOv2 are measured at; timm's own default is 518
NETWORKS = ("inception", "efficientnet_lite0", *TIMM_ALIASES)
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17


class Outputs(NamedTuple):
    """Outputs of a feature network for n images, float32."""

    features: Tensor  # [n, dim]
    logits: Tensor | None = None  # [n, classes], for the Inception Score
    spatial: Tensor | None = None  # [n, spatial_dim], for sFID


class FeatureNetwork(nn.Module):
    """uint8 RGB images [n, 3, h, w] to float32 features [n, dim].

    name: as given to `load_features`, part of every result made with it; checksum: sha256 of the weights file;
    network: gives a tensor [n, dim] or `Outputs`; classes, spatial_dim: widths of its logits and spatial features, 0
    without; resize: what it does to images of another size, in words.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        checksum: str,
        network: nn.Module,
        classes: int = 0,
        spatial_dim: int = 0,
        resize: str = "none",
    ) -> None:
        super().__init__()
        self.name = name
        self.dim = dim
        self.checksum = checksum
        self.network = network.eval().requires_grad_(False)
        self.classes = classes
        self.spatial_dim = spatial_dim
        self.resize = resize

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images).features

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Outputs:
        """Features of uint8 images [n, 3, h, w], with logits and spatial features where the network has them.

        Without TF32 whatever the caller computes with: statistics that a training run stores serve every evaluation.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images [n, 3, h, w], got {images.dtype} {tuple(images.shape)}")
        with without_tf32():
            found = self.network(images)
        found = found if isinstance(found, Outputs) else Outputs(found)
        return Outputs(*(None if part is None else part.float() for part in found))

    def provenance(self) -> dict[str, Any]:
        """What a result must record of the network: name, dimensions, sha256 of the weights, resize."""
        return {"network": self.name, "dim": self.dim, "checksum": self.checksum, "resize": self.resize}

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode regardless of the surrounding module."""
        return super().train(False)


def load_features(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Load a feature network onto `device`.

    name: "inception" (Inception v3 of the FID papers as in torch-fidelity, 2048 numbers), "efficientnet_lite0"
    (ImageNet network, 1280 numbers), "dinov2" (ViT-L/14, 1024), "clip" (image tower of ViT-B/32, 512), "timm/MODEL"
    (any timm model) or "classifier:FILE.safetensors" (a `SmallClassifier`, 128 numbers).
    UserError for another name, or when the weights are missing.
    """
    if name == "inception":
        path = find(name)
        network: nn.Module = Inception(load_tensors(path))
        return FeatureNetwork(
            name, 2048, sha256_file(path), network,
            classes=1008, spatial_dim=SPATIAL_SIDE**2 * SPATIAL_CHANNELS,
            resize=f"bilinear as in TensorFlow 1, no antialiasing, to {network.extractor.INPUT_IMAGE_SIZE}",
        ).to(device)  # fmt: skip
    if name == "efficientnet_lite0":
        path = find(name)
        return FeatureNetwork(
            name, 1280, sha256_file(path), EfficientNetLite0(load_tensors(path)), classes=1000,
            resize=f"none; bilinear to {LITE0_SMALLEST_SIDE} below that",
        ).to(device)  # fmt: skip
    if name.startswith(CLASSIFIER_PREFIX):
        path = Path(name.removeprefix(CLASSIFIER_PREFIX))
        network = ClassifierFeatures(SmallClassifier.load(path))
        return FeatureNetwork(name, FEATURE_DIM, sha256_file(path), network).to(device)
    if name in TIMM_ALIASES or name.startswith(TIMM_PREFIX):
        model = TIMM_ALIASES.get(name, name.removeprefix(TIMM_PREFIX))
        path = find(TIMM_PREFIX + model)
        network = TimmFeatures(model, load_tensors(path))
        resize = f"bicubic, antialiased, to {'x'.join(str(side) for side in network.size)}"
        return FeatureNetwork(name, network.dim, sha256_file(path), network, network.classes, 0, resize).to(device)
    raise UserError(
        f"unknown feature network {name!r}: expected {', '.join(NETWORKS)}, {TIMM_PREFIX}MODEL or "
        f"{CLASSIFIER_PREFIX}FILE"
    )


class Inception(nn.Module):
    """Inception v3 (2015, ported from TensorFlow) of torch-fidelity, with its TensorFlow-like resize.

    features: layer 2048 (`pool_3`). logits: 1008 classes without the bias, as in ADM's evaluator and torch-fidelity
    for the Inception Score. spatial: the first 7 channels of `mixed_6/conv` (17 x 17, flattened as height, width,
    channel) for sFID: the 1 x 1 branch, after its ReLU, of the block that is Mixed_6d here (mixed_3 is Mixed_6a).
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles its file with code allowed, so it gets a copy that we wrote from plain tensors.
        file = io.BytesIO()
        torch.save(tensors, file)
        file.seek(0)
        with torch.random.fork_rng(devices=[]):
            self.extractor = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
            )
        self._spatial = torch.empty(0)
        self.extractor.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def forward(self, images: Tensor) -> Outputs:
        features, logits = self.extractor(images)
        return Outputs(features, logits, self._spatial.permute(0, 2, 3, 1).flatten(1))

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]


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

    def forward(self, images: Tensor) -> Outputs:
        features = self.model.forward_head(self.model.forward_features(_prepare(from_uint8(images))), pre_logits=True)
        return Outputs(features, self.model.classifier(features))

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet class logits [n, 1000] of uint8 images [n, 3, h, w]."""
        return self(images).logits


class TimmFeatures(nn.Module):
    """Any timm model by name: its pooled features, and its class logits where it is an ImageNet-1k classifier.

    CLIP towers give the embedding that they share with texts, DINOv2 its class token at 224 px (position table
    resampled). Images are resized to the model's own size by an antialiased bicubic, without a crop, and normalised
    as the model's configuration says.
    """

    def __init__(self, name: str, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        import timm

        options: dict[str, Any] = {}
        if "dinov2" in name:
            options = {"img_size": DINOV2_SIDE, "dynamic_img_size": True}
            tensors = tensors | {"pos_embed": _resampled(tensors.get("pos_embed"), DINOV2_SIDE // 14, name)}
        self.model = _timm_model(name, tensors, **options)
        config = timm.data.resolve_model_data_config(self.model)
        self.size = (DINOV2_SIDE, DINOV2_SIDE) if options else tuple(config["input_size"][1:])
        self.embeds = "clip" in name and self.model.num_classes not in (0, 1000)
        self.classes = self.model.num_classes if self.model.num_classes == 1000 else 0
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)
        self.dim = self.model.num_classes if self.embeds else self.model.head_hidden_size

    def forward(self, images: Tensor) -> Outputs:
        x = to_unit(images.float())
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, size=self.size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        x = self.model.forward_features((x - self.mean) / self.std)
        if self.embeds:
            return Outputs(self.model.forward_head(x))
        return Outputs(
            self.model.forward_head(x, pre_logits=True), self.model.forward_head(x) if self.classes else None
        )


def _timm_model(name: str, tensors: dict[str, Tensor], **options: Any) -> nn.Module:
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name}: timm has no such model ({error})") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"the weights of {name} do not fit it: {str(error).splitlines()[1].strip()}") from None
    return model


def _resampled(positions: Tensor | None, side: int, name: str) -> Tensor:
    """A position table [1, 1 + n^2, dim] for side x side patches."""
    if positions is None or positions.ndim != 3:
        raise UserError(f"the weights of {name} have no position table pos_embed: they are not those of DINOv2")
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=1)


class TimmStages(nn.Module):
    """Feature maps of the stages of a timm network, finest first, of images [n, 3, h, w] in [-1, 1]."""

    def __init__(self, name: str, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        import timm

        if name == LITE0:
            self.model, mean, std = EfficientNetLite0(tensors).model, [0.5] * 3, [0.5] * 3
        else:
            self.model = _timm_model(name, tensors)
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


AUTOMATIC = ("inception", "efficientnet_lite0")


def load_networks(names: Sequence[str], device: Any) -> list[FeatureNetwork]:
    """Feature networks by name; "auto" stands for those of `AUTOMATIC` whose weights are on this machine.

    UserError for a network that is named and has no weights.
    """
    chosen: list[str] = []
    for name in names:
        chosen += [n for n in AUTOMATIC if has(n)] if name == "auto" else [name]
    return [load_features(name, device) for name in dict.fromkeys(chosen)]


def automatic_without_weights(names: Sequence[str]) -> list[str]:
    """Networks of "auto" among `names` whose weights are not found."""
    return [name for name in AUTOMATIC if "auto" in names and name not in names and not has(name)]
