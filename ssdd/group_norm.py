"""Group norm with float32 statistics and arithmetic, whatever the dtype of its input.

torch.compile takes group norm apart; on CPUs the parts take three times as long on channels_last maps as the kernel
that they replace. Compiled code calls that kernel here, as an operator that is not looked into.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with float32 statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """x [B, C, H, W], normalised over `groups` groups of channels, times weight [C] plus bias [C]; of x's dtype."""
    if x.device.type == "cpu":  # its kernel computes in float32 inside
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return _normalise(x, weight, bias, groups, eps)[0]
        return F.group_norm(x, groups, weight, bias, eps)
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)


@torch.library.custom_op("ssdd::group_norm", mutates_args=())
def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised map, and mean and 1 / deviation [B, groups]."""
    sizes = len(x), x.shape[1], x[0, 0].numel()
    return torch.ops.aten.native_group_norm(x, weight, bias, *sizes, groups, eps)


@_normalise.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if weight is None else weight.dtype
    return torch.empty_like(x), x.new_empty(len(x), groups, dtype=dtype), x.new_empty(len(x), groups, dtype=dtype)


@torch.library.custom_op("ssdd::group_norm_backward", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the latter two are empty where there is no weight."""
    sizes, affine = (len(x), x.shape[1], x[0, 0].numel()), weight is not None
    found = torch.ops.aten.native_group_norm_backward(
        grad, x, mean, rstd, weight, *sizes, groups, [True, affine, affine]
    )
    return tuple(x.new_empty(0) if one is None else one for one in found)


@_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *(x.new_empty(0) if weight is None else torch.empty_like(weight) for _ in range(2))


def _keep(ctx, inputs, output) -> None:
    x, weight, _, ctx.groups, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight)


def _backward(ctx, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight = ctx.saved_tensors
    grads = _gradients(grad, x, mean, rstd, weight, ctx.groups)
    return *(grads if weight is not None else (grads[0], None, None)), None, None


_normalise.register_autograd(_backward, setup_context=_keep)
