"""The DiT network (Peebles & Xie, "Scalable Diffusion Models with Transformers"): sizes, options, state dict, files.

Keys and shapes of the state dict are those of facebookresearch/DiT and SiT, and with the options of LightningDiT those
of LightningDiT. The network is raw: `t` is what its checkpoint expects (0..999 for DiT, [0, 1] for SiT, 1000 t for
ours); the integrator uses its `convention`. Label dropout is left to the trainer: the null class is simply label
`num_classes`.
"""

from __future__ import annotations

import json
from dataclasses import replace
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
from dit.options import DiTOptions, size_named
from dit.time_convention import convention
from ssdd.engine.checkpoint import load_tensors, resolve, save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.recompute import run_block


class DiT(nn.Module):
    """Diffusion transformer on latents [B, C, H, W].

    Made of `DiTOptions`, or of their fields as keywords; `config` has them as JSON values.
    """

    recompute = False  # activations of the blocks in the backward pass; see ssdd.engine.recompute

    def __init__(self, options: DiTOptions | None = None, **fields: Any) -> None:
        super().__init__()
        self.options = options = options or DiTOptions(**fields)
        self.in_channels, self.learn_sigma = options.in_channels, options.learn_sigma
        self.num_classes, self.null_class = options.num_classes, options.null_class
        self.time_scale, self.convention = options.time_scale, convention(options.convention, options.time_scale)
        self.grid, self.patch_size = options.grid, options.patch_size
        self.out_channels = 2 * self.in_channels if self.learn_sigma else self.in_channels
        width, heads = options.width, options.heads

        self.x_embedder = PatchEmbed(options.in_channels, width, self.patch_size)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(options.num_classes + options.null_class, width)
        self.pos_embed = nn.Parameter(sincos_position_table(*self.grid, width), requires_grad=False)
        self.feat_rope = RotaryEmbedding(self.grid, width // heads) if options.rope else None
        self.blocks = nn.ModuleList(DiTBlock(width, heads, **options.variants()) for _ in range(options.depth))
        self.final_layer = FinalLayer(width, self.patch_size, self.out_channels, options.rms_norm)
        self.initialise()

    @property
    def config(self) -> dict[str, Any]:
        """The options as JSON values: keywords of the constructor."""
        return self.options.to_dict()

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

        `options` are further fields of `DiTOptions`, such as null_class, time_scale or rope.
        """
        options |= {"input_size": input_size, "in_channels": in_channels, "num_classes": num_classes}
        return cls(**size_named(name), learn_sigma=learn_sigma, **options)

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

        `input_size` sets another latent size than it was trained on: its position tables are made for the new grid
        (`resize_positions`; rotary ones are computed). `dit.foreign_checkpoints.load_dit` reads other people's files.
        UserError when there is no such file, it carries no DiT config, or its weights are not those of its config.
        """
        file = resolve(str(reference), ckpt_dir)
        options = read_options(file)
        if options is None:
            raise UserError(
                f"{file} has no DiT config in its metadata: this project's DiT trainer did not write it. Checkpoints "
                "of DiT, SiT, REPA and LightningDiT are read by dit.foreign_checkpoints.load_dit, and by task=sample"
            )
        return cls.from_weights(options, load_tensors(file), file, input_size)

    @classmethod
    def from_weights(
        cls,
        options: DiTOptions,
        weights: dict[str, Tensor],
        source: str | Path,
        input_size: int | tuple[int, int] | None = None,
    ) -> DiT:
        """A model of these options that holds `weights`, in eval mode; see `from_pretrained`.

        UserError, naming `source`, when the weights are not those of the options.
        """
        with torch.device("meta"):
            model = trained = cls(options)
            if input_size is not None:
                model = cls(replace(options, input_size=input_size))
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


def read_options(file: Path) -> DiTOptions | None:
    """The options in the metadata of a safetensors file of ours, None in any other weights file."""
    if file.suffix != ".safetensors":
        return None
    check_regular(file)
    try:
        with safe_open(file, framework="pt") as handle:
            config = (handle.metadata() or {}).get("dit")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); copy or train it again") from None
    return None if config is None else DiTOptions(**json.loads(config))
