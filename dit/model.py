"""The DiT network (Peebles & Xie, "Scalable Diffusion Models with Transformers"): sizes, options, state dict, files.

Keys and shapes of the state dict are those of facebookresearch/DiT and SiT, and with the options of LightningDiT those
of LightningDiT. The network is raw: `t` is what its checkpoint expects (0..999 for DiT, [0, 1] for SiT, 1000 t for
ours); the integrator uses its `convention`. Label dropout is left to the trainer: the null class is simply label
`num_classes`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dit.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    RotaryEmbedding,
    TimestepEmbedder,
    resize_positions,
    sincos_position_table,
)
from dit.time_convention import NAMES as CONVENTIONS
from dit.time_convention import convention as convention_named
from ssdd.engine.checkpoint import load_tensors, resolve, save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.recompute import run_block

# name: (depth, width, heads). S to XL are the paper's (table 1), 1p0B and 1p6B LightningDiT's (1.0 and 1.6 billion
# parameters); XXS and XS are additions, for digits on a laptop.
SIZES = {
    "XXS": (4, 128, 2),
    "XS": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}
PATCH_SIZES = (1, 2, 4, 8)
NAMES = tuple(f"DiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)


class DiT(nn.Module):
    """Diffusion transformer on latents [B, C, H, W].

    `input_size` is the latent's side or (height, width) and divides by the patch size. With `learn_sigma` the output
    has 2 C channels, of which a flow model uses the first C. `null_class` adds a row `num_classes` to the label table
    for unconditional prediction. `config` holds the constructor's arguments, as JSON values.

    Options, off in DiT: `qk_norm` (normalised queries and keys, against divergence in bfloat16), `rms_norm`, `swiglu`
    and `rope` (LightningDiT has these three on; the additive position table stays beside `rope`), `wo_shift` (adaLN
    without shifts). `convention` says what times and outputs mean, `time_scale` what t in [0, 1] is multiplied by.
    """

    recompute = False  # activations of the blocks in the backward pass; see ssdd.engine.recompute

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
        convention: str = "flow",
        qk_norm: bool = False,
        rms_norm: bool = False,
        swiglu: bool = False,
        rope: bool = False,
        wo_shift: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        height, breadth = (input_size, input_size) if isinstance(input_size, int) else (int(s) for s in input_size)
        if height % patch_size or breadth % patch_size:
            raise UserError(
                f"{name or 'DiT'}: a latent of {height}x{breadth} does not divide into patches of {patch_size}; "
                f"choose a model whose patch size divides it (the number after the slash: {PATCH_SIZES})"
            )
        if width % heads or width % 4:
            raise UserError(f"{name or 'DiT'}: width {width} must divide by its {heads} heads and by 4")
        if rope and width // heads % 4:
            raise UserError(f"{name or 'DiT'}: rope needs {width} / {heads} channels per head to divide by 4")
        if convention not in CONVENTIONS:
            raise UserError(f"{name or 'DiT'}: convention={convention!r}: expected one of {', '.join(CONVENTIONS)}")
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
            "convention": convention,
            "qk_norm": qk_norm,
            "rms_norm": rms_norm,
            "swiglu": swiglu,
            "rope": rope,
            "wo_shift": wo_shift,
        }
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.learn_sigma, self.null_class, self.time_scale = learn_sigma, null_class, float(time_scale)
        self.convention = convention_named(convention, self.time_scale)
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (height // patch_size, breadth // patch_size)

        self.x_embedder = PatchEmbed(in_channels, width, patch_size)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes + null_class, width)
        self.pos_embed = nn.Parameter(sincos_position_table(*self.grid, width), requires_grad=False)
        self.feat_rope = RotaryEmbedding(self.grid, width // heads) if rope else None
        options = {"qk_norm": qk_norm, "rms_norm": rms_norm, "swiglu": swiglu, "wo_shift": wo_shift}
        self.blocks = nn.ModuleList(DiTBlock(width, heads, **options) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size, self.out_channels, rms_norm)
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

    def forward(self, x: Tensor, t: Tensor, y: Tensor, keep: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The raw network: x [B, C, H, W], t [B] in its checkpoint's units, y [B] integers -> [B, 2C or C, H, W].

        keep: a pair of that and the tokens [B, T, h] after the first `keep` blocks.
        """
        tokens = self.x_embedder(x) + self.pos_embed  # [B, T, h]
        c = self.t_embedder(t) + self.y_embedder(y)  # [B, h]
        kept = None
        for number, block in enumerate(self.blocks, start=1):
            tokens = run_block(block, tokens, c, self.feat_rope, recompute=self.recompute)
            kept = tokens if number == keep else kept
        out = self.unpatchify(self.final_layer(tokens, c))
        return out if keep is None else (out, kept)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | None = None
    ) -> Tensor:
        """Classifier-free guidance on a batch that the caller has doubled, as in facebookresearch/DiT.

        y holds the classes in its first half and the null class in its second; only the first half of x is read. The
        first `cfg_channels` channels (None: all C of the latent) become u + cfg_scale (c - u) in both halves; the
        others stay as predicted. `cfg_channels=3` reproduces what DiT, SiT and LightningDiT do. Public for the sampling
        code of those repositories, which calls it; `dit.guidance` does not.
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
        return rearrange(patches, "b (i j) (p q c) -> b c (i p) (j q)", i=rows, j=columns, p=p, q=p)

    @classmethod
    def from_name(
        cls,
        name: str,
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        **options: Any,
    ) -> DiT:
        """A freshly initialised model of a named size, e.g. "DiT-XL/2"; UserError lists the names there are.

        `options` are further arguments of the constructor, such as null_class, time_scale or rope.
        """
        if name not in NAMES:
            raise UserError(f"model.name={name!r} is not a DiT; choose one of {', '.join(NAMES)}")
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
            name=name,
            **options,
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
    def from_pretrained(
        cls, reference: str | Path, ckpt_dir: str | Path = "runs", input_size: int | tuple[int, int] | None = None
    ) -> DiT:
        """Load a model of ours, in eval mode on the CPU, from a file, a folder (EMA weights preferred) or a run name.

        `input_size` sets another latent size than it was trained on: its position tables are made for the new
        grid (`resize_positions`; rotary ones are computed). `dit.foreign_checkpoints.load_dit` reads other people's
        files.
        UserError when there is no such file, it carries no DiT config, or its weights are not those of its config.
        """
        file = resolve(str(reference), ckpt_dir)
        config = read_config(file)
        if config is None:
            raise UserError(
                f"{file} has no DiT config in its metadata: this project's DiT trainer did not write it. Checkpoints "
                "of DiT, SiT, REPA and LightningDiT are read by dit.foreign_checkpoints.load_dit, and by task=sample"
            )
        return cls.from_weights(config, load_tensors(file), file, input_size)

    @classmethod
    def from_weights(
        cls,
        config: dict[str, Any],
        weights: dict[str, Tensor],
        source: str | Path,
        input_size: int | tuple[int, int] | None = None,
    ) -> DiT:
        """A model of the constructor's arguments `config` that holds `weights`, in eval mode; see `from_pretrained`.

        UserError, naming `source`, when the weights are not those of the config.
        """
        with torch.device("meta"):
            model = trained = cls(**config)
            if input_size is not None:
                model = cls(**{**config, "input_size": input_size})
        # Averaged weights are without buffers, and those of another grid don't fit: both take the computed ones.
        rotary = {key: value for key, value in model.state_dict().items() if key.startswith("feat_rope.")}
        if model.grid == trained.grid:
            weights = {**rotary, **weights}
        elif "pos_embed" in weights and weights["pos_embed"].shape == trained.pos_embed.shape:
            weights = {**weights, **rotary}
            weights["pos_embed"] = resize_positions(weights["pos_embed"], trained.grid, model.grid)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UserError(f"{source} does not hold the weights that its own config describes: {error}") from error
        model.pos_embed.requires_grad_(False)
        return model.eval()


def read_config(file: Path) -> dict[str, Any] | None:
    """The constructor's arguments in the metadata of a safetensors file of ours, None in any other weights file."""
    if file.suffix != ".safetensors":
        return None
    check_regular(file)
    try:
        with safe_open(file, framework="pt") as handle:
            config = (handle.metadata() or {}).get("dit")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); copy or train it again") from None
    return None if config is None else json.loads(config)
