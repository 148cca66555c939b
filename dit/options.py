"""What a DiT is: sizes, block variants and other options, for config, constructor, metadata and foreign files alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from dit.time_convention import CONVENTIONS
from ssdd.engine.errors import UserError

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


def _variant(shown: Callable[[Mapping[str, Tensor]], bool]) -> Any:
    """A field of `BlockVariants`, off by default; shown: whether a foreign network of these tensors has it."""
    return field(default=False, metadata={"shown": shown})


def _has_scales_and_gates_only(weights: Mapping[str, Tensor]) -> bool:
    modulation = weights.get("blocks.0.adaLN_modulation.1.weight")
    return modulation is not None and len(modulation) == 4 * modulation.shape[-1]


@dataclass(frozen=True)
class BlockVariants:
    """Variants of the transformer blocks, off in DiT and SiT.

    A variant is a field here and the layer that reads it in `dit.layers`; the keys of `model`, the arguments of `DiT`,
    the metadata of files and what `dit.foreign_checkpoints` infers follow from the field.
    """

    qk_norm: bool = _variant(lambda weights: "blocks.0.attn.q_norm.weight" in weights)
    """Normalise queries and keys, which keeps long training in bf16 from diverging."""
    rms_norm: bool = _variant(lambda weights: "blocks.0.norm1.weight" in weights)
    """RMSNorm with a learned scale instead of LayerNorm (LightningDiT)."""
    swiglu: bool = _variant(lambda weights: "blocks.0.mlp.w12.weight" in weights)
    """Gated MLP of as many parameters (LightningDiT)."""
    rope: bool = _variant(lambda weights: "feat_rope.freqs_cos" in weights)
    """Rotary embedding of row and column in the attention, in addition to the position table (LightningDiT)."""
    wo_shift: bool = _variant(_has_scales_and_gates_only)
    """adaLN without shifts (LightningDiT)."""

    def variants(self) -> dict[str, bool]:
        """Name -> whether it is on."""
        return {name: getattr(self, name) for name in VARIANTS}


VARIANTS = {variant.name: variant.metadata["shown"] for variant in fields(BlockVariants)}
"""Name -> whether tensors (name -> tensor) of a foreign network show it."""


@dataclass(frozen=True, kw_only=True)
class DiTOptions(BlockVariants):
    """The options of one DiT; UserError where they contradict each other."""

    name: str | None = None
    """One of `NAMES`; None for a size without a name."""
    depth: int
    """Blocks."""
    width: int
    """Channels of a token; divides by `heads` and by 4."""
    heads: int
    """Attention heads."""
    patch_size: int
    """Side of a token's patch of the latent."""
    input_size: int | tuple[int, int] = 32
    """Side of the latent, or (height, width), which the options hold; divides by the patch size."""
    in_channels: int = 4
    """C, channels of the latent."""
    num_classes: int = 1000
    """Number of classes, and the label of the null class."""
    learn_sigma: bool = True
    """Predict 2 C channels, of which a flow model uses the first C."""
    null_class: bool = True
    """Whether the label table has one more row, for unconditional prediction."""
    time_scale: float = 1000.0
    """What t in [0, 1] is multiplied by before the network sees it."""
    convention: str = "flow"
    """What time and output mean: a key of `dit.time_convention.CONVENTIONS`."""

    def __post_init__(self) -> None:
        side = self.input_size
        sides = (side, side) if isinstance(side, int) else tuple(int(s) for s in side)
        object.__setattr__(self, "input_size", sides)  # frozen from here on
        object.__setattr__(self, "time_scale", float(self.time_scale))
        (height, breadth), patch, name = self.input_size, self.patch_size, self.name or "DiT"
        if height % patch or breadth % patch:
            raise UserError(
                f"{name}: a latent of {height}x{breadth} does not divide into patches of {patch}; "
                f"choose a model whose patch size divides it (the number after the slash: {PATCH_SIZES})"
            )
        if self.width % self.heads or self.width % 4:
            raise UserError(f"{name}: width {self.width} must divide by its {self.heads} heads and by 4")
        if self.rope and self.width // self.heads % 4:
            raise UserError(f"{name}: rope needs {self.width} / {self.heads} channels per head to divide by 4")
        if self.convention not in CONVENTIONS:
            raise UserError(f"{name}: convention={self.convention!r}: expected one of {', '.join(CONVENTIONS)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return tuple(side // self.patch_size for side in self.input_size)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as the metadata of files hold them: arguments of `DiTOptions`, the variants last."""
        own = (part.name for part in fields(self) if part.name not in VARIANTS)
        return {name: getattr(self, name) for name in own} | {"input_size": list(self.input_size)} | self.variants()


def size_named(name: str) -> dict[str, Any]:
    """The options that a name such as DiT-XL/2 stands for; UserError lists the names there are."""
    if name not in NAMES:
        raise UserError(f"model.name={name!r} is not a DiT; choose one of {', '.join(NAMES)}")
    size, patch = name.removeprefix("DiT-").split("/")
    depth, width, heads = SIZES[size]
    return {"name": name, "depth": depth, "width": width, "heads": heads, "patch_size": int(patch)}
