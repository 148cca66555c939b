"""An untrained Inception v3 of torch-fidelity: weights from a fixed seed, in place of those that need a download."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def write_random_inception(path: Path, images: torch.Tensor) -> None:
    """Write its state dict to `path`, He's initialisation, batch norms fitted to `images` (uint8 [n, 3, h, w]).

    Left as PyTorch draws it, the network maps all images to nearly the same features, and every metric to rounding.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as upstream

    cls = upstream.FeatureExtractorInceptionV3
    original = upstream.load_state_dict_from_url, cls.load_state_dict
    upstream.load_state_dict_from_url, cls.load_state_dict = (lambda *args, **kwargs: {}), (lambda self, tensors: None)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = cls("inception-v3-compat", ["logits_unbiased"])
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
                elif isinstance(module, nn.BatchNorm2d):
                    module.momentum = None  # running statistics become those of the batch below
            nn.init.normal_(network.fc.weight, std=0.1)
            network.train()
            with torch.no_grad():
                network(images)
            torch.save(network.state_dict(), path)
    finally:
        upstream.load_state_dict_from_url, cls.load_state_dict = original
