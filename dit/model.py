"""The DiT network (Peebles & Xie, "Scalable Diffusion Models with Transformers"): sizes, layers, state dict, files.

Keys and shapes of the state dict are those of facebookresearch/DiT and SiT. The network is raw: `t` is what its
checkpoint expects (0..999 for DiT, [0, 1] for SiT, 1000 t for ours); whoever integrates multiplies by `time_scale`.
Label dropout is the trainer's business: the null class is simply label `num_classes`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ssdd.engine.checkpoint import load_tensors, resolve, save_tensors
from ssdd.engine.errors import UserError

# name: (depth, width, heads). S to XL are the paper's (table 1); XXS and XS are ours, for digits on a laptop.
SIZES = {
    "XXS": (4, 128, 2),
    "XS": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (1, 2, 4, 8)
NAMES = tuple(f"DiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)


def sincos_position_table(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine position table, float32 [1, height * width, dim], tokens row by row.

    The first half of the channels encodes the column, the second the row; each half is [sin, cos]. `dim` divides by 4.
    """
    frequencies = 10000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim // 4))

    def axis(positions: np.ndarray) -> np.ndarray:  # [T] -> [T, dim / 2]
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    table = np.concatenate([axis(column.astype(np.float64)), axis(row.astype(np.float64))], axis=1)
    return torch.from_numpy(table.astype(np.float32)).unsqueeze(0)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift for tokens x [B, T, h] and one shift and scale [B, h] a sample."""
    return torch.addcmul(shift.unsqueeze(1), x, (1 + scale).unsqueeze(1))


class PatchEmbed(nn.Module):
    """Latent [B, C, H, W] to tokens [B, (H/p) (W/p), h], row by row."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times [B] to [B, h]: 256 sinusoids (cosines first, periods up to 10000) and a two-layer MLP."""

    def __init__(self, width: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_dim // 2
        # float32 whatever the module's dtype: bfloat16 cannot tell 871 from 872.
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000.0) / half))
        angles = t.float().unsqueeze(1) * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels [B] to [B, h]; the last row, if there is one more than classes, is the null class."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, T, h / heads]
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = torch.addcmul(x, gate_attn.unsqueeze(1), self.attn(modulate(self.norm1(x), shift_attn, scale_attn)))
        return torch.addcmul(x, gate_mlp.unsqueeze(1), self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Tokens [B, T, h] to output patches [B, T, p p O], channels fastest."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer on latents [B, C, H, W].

    `input_size` is the latent's side or (height, width) and divides by the patch size. With `learn_sigma` the output
    has 2 C channels, of which a flow model uses the first C. `null_class` adds a row `num_classes` to the label table
    for unconditional prediction. `config` holds the constructor's arguments, as JSON values.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        patch_size: int,
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        null_class: bool = True,
        time_scale: float = 1000.0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        height, breadth = (input_size, input_size) if isinstance(input_size, int) else (int(s) for s in input_size)
        if height % patch_size or breadth % patch_size:
            raise UserError(
                f"{name or 'DiT'}: a latent of {height}x{breadth} does not divide into patches of {patch_size}; "
                f"choose a model whose patch size divides it (the number after the slash: {PATCH_SIZES})."
            )
        if width % heads or width % 4:
            raise UserError(f"{name or 'DiT'}: width {width} must divide by its {heads} heads and by 4.")
        self.config = {
            "name": name,
            "depth": depth,
            "width": width,
            "heads": heads,
            "patch_size": patch_size,
            "input_size": [height, breadth],
            "in_channels": in_channels,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "null_class": null_class,
            "time_scale": float(time_scale),
        }
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.learn_sigma, self.null_class, self.time_scale = learn_sigma, null_class, float(time_scale)
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (height // patch_size, breadth // patch_size)

        self.x_embedder = PatchEmbed(in_channels, width, patch_size)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes + null_class, width)
        self.pos_embed = nn.Parameter(sincos_position_table(*self.grid, width), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size, self.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """Draw fresh weights from torch's global generator; a fresh network's output is exactly zero (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # the patch convolution counts as a Linear
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        modulations = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in (*modulations, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The raw network: x [B, C, H, W], t [B] in its checkpoint's units, y [B] integers -> [B, 2C or C, H, W]."""
        tokens = self.x_embedder(x) + self.pos_embed  # [B, T, h]
        c = self.t_embedder(t) + self.y_embedder(y)  # [B, h]
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | None = None
    ) -> Tensor:
        """Classifier-free guidance on a batch that the caller has doubled, as in facebookresearch/DiT.

        y holds the classes in its first half and the null class in its second; only the first half of x is read. The
        first `cfg_channels` channels (None: all C of the latent) become u + cfg_scale (c - u) in both halves; the
        others stay as predicted. `cfg_channels=3` reproduces what DiT, SiT and LightningDiT do.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        guided, rest = out.tensor_split([self.in_channels if cfg_channels is None else cfg_channels], dim=1)
        conditional, unconditional = guided.chunk(2)
        guided = torch.lerp(unconditional, conditional, cfg_scale)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """[B, T, p p O] with the channel fastest -> [B, O, H, W]."""
        (rows, columns), p = self.grid, self.patch_size
        x = patches.view(-1, rows, columns, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, rows * p, columns * p)

    @classmethod
    def from_name(
        cls,
        name: str,
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        null_class: bool = True,
        time_scale: float = 1000.0,
    ) -> DiT:
        """A freshly initialised model of a named size, e.g. "DiT-XL/2"; UserError lists the names there are."""
        if name not in NAMES:
            raise UserError(f"model.name={name!r} is not a DiT; choose one of {', '.join(NAMES)}.")
        size, patch = name.removeprefix("DiT-").split("/")
        depth, width, heads = SIZES[size]
        return cls(
            depth=depth,
            width=width,
            heads=heads,
            patch_size=int(patch),
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            null_class=null_class,
            time_scale=time_scale,
            name=name,
        )

    def metadata(self) -> dict[str, str]:
        """What a safetensors file of these weights carries, so that `from_pretrained` can rebuild the network."""
        return {"dit": json.dumps(self.config)}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `folder`/model.safetensors with the config in its metadata, and return the file's path."""
        path = Path(folder) / "model.safetensors"
        save_tensors(path, self.state_dict(), self.metadata())
        return path

    @classmethod
    def from_pretrained(cls, reference: str | Path, ckpt_dir: str | Path = "runs") -> DiT:
        """Load a model of ours, in eval mode on the CPU, from a file, a folder (EMA weights preferred) or a run name.

        UserError when there is no such file, it carries no DiT config, or its weights are not those of its config.
        """
        file = resolve(str(reference), ckpt_dir)
        weights = load_tensors(file)
        with safe_open(file, framework="pt") as handle:
            config = (handle.metadata() or {}).get("dit")
        if config is None:
            raise UserError(f"{file} has no DiT config in its metadata: this project's DiT trainer did not write it.")
        with torch.device("meta"):
            model = cls(**json.loads(config))
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UserError(f"{file} does not hold the weights that its own config describes: {error}") from error
        model.pos_embed.requires_grad_(False)
        return model.eval()
