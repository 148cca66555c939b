"""REPA (arXiv 2410.06940): the transformer's tokens are drawn towards those of a frozen vision transformer."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssdd.engine.errors import UserError
from ssdd.engine.pretrained import find, load_tensors

DINOV2_BASE = "vit_base_patch14_dinov2.lvd142m"


class PatchTokens(nn.Module):
    """The normalised patch tokens of a frozen timm vision transformer, on a grid of the caller's choice.

    Images are resized (bicubic, no antialiasing) to `grid` patches, and the position table likewise, as DINOv2's own
    code and Hugging Face's do it. Weights: DINOv2-base from Meta's file, others from `<name>.safetensors` in the search
    path. UserError if the model is not a plain vision transformer, or its weights are missing or do not fit.
    """

    def __init__(self, name: str, grid: tuple[int, int]):
        super().__init__()
        import timm

        weights = load_tensors(find("dinov2_vitb14" if name == DINOV2_BASE else f"timm/{name}"))
        patch = weights["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in weights else 0
        if not patch or "pos_embed" not in weights:
            raise UserError(f"REPA with {name}: its weights are not those of a vision transformer")
        self.grid, self.size = grid, (grid[0] * patch, grid[1] * patch)
        with torch.random.fork_rng(devices=[]):
            self.model = timm.create_model(name, pretrained=False, num_classes=0, img_size=self.size)
        weights["pos_embed"] = resample_positions(weights["pos_embed"], self.model.num_prefix_tokens, grid)
        expected = self.model.state_dict()
        misfits = [key for key, value in expected.items() if key not in weights or weights[key].shape != value.shape]
        if misfits:
            raise UserError(f"REPA with {name}: its weights do not fit at {', '.join(misfits[:3])}")
        self.model.load_state_dict({key: weights[key] for key in expected})
        statistics = timm.data.resolve_model_data_config(self.model)
        self.register_buffer("mean", torch.tensor(statistics["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics["std"]).view(-1, 1, 1), persistent=False)
        self.dim = self.model.num_features
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> tokens [B, grid height, grid width, dim]."""
        x = F.interpolate(images.float(), size=self.size, mode="bicubic", align_corners=False)
        tokens = self.model.forward_features((x * 0.5 + 0.5 - self.mean) / self.std)
        rows, columns = self.grid
        return rearrange(tokens[:, self.model.num_prefix_tokens :], "b (i j) d -> b i j d", i=rows, j=columns)

    def train(self, mode: bool = True) -> PatchTokens:
        """Stays in evaluation mode regardless of the surrounding module."""
        return super().train(False)


class RepaLoss(nn.Module):
    """1 - mean cosine between a transformer's tokens, through a small network, and the teacher's tokens of the image.

    layers: linear layers of that network; hidden: their width, by default that of the tokens.
    """

    def __init__(self, channels: int, teacher: PatchTokens, layers: int = 2, hidden: int | None = None):
        super().__init__()
        self.teacher = teacher
        widths = [channels, *[hidden or channels] * (layers - 1)]
        modules: list[nn.Module] = []
        for width, following in pairwise(widths):
            modules += [nn.Linear(width, following), nn.SiLU()]
        self.repa_mlp = nn.Sequential(*modules, nn.Linear(widths[-1], teacher.dim))
        for module in self.repa_mlp:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="leaky_relu")
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        """tokens [B, h, w, D], real images [B, 3, H, W] in [-1, 1] -> float32 scalar in [0, 2]."""
        projected = self.repa_mlp(tokens).float()
        return 1 - F.cosine_similarity(projected, self.teacher(images).float(), dim=-1, eps=1e-5).mean()

    def idle(self) -> Tensor:
        """0, with a gradient of 0 for every parameter: data-parallel wrappers wait for all of them."""
        return sum(0.0 * parameter.sum() for parameter in self.repa_mlp.parameters())


def trained_heads(repa: RepaLoss | None) -> dict[str, nn.Parameter]:
    """What of REPA is trained, under its names in checkpoints; none without it."""
    named = () if repa is None else repa.named_parameters(prefix="repa_loss")
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def resample_positions(table: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Position table [1, prefix + n n, C] for another grid of patches: bicubic, without antialiasing."""
    fixed, square = table[:, :prefix], table[:, prefix:]
    side = round(square.shape[1] ** 0.5)
    square = rearrange(square, "1 (i j) d -> 1 d i j", i=side)
    if (side, side) != grid:
        square = F.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False)
    return torch.cat([fixed, rearrange(square, "1 d i j -> 1 (i j) d")], dim=1)
