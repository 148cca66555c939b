"""The decoder in its plain form: what the layers of `ssdd` are equal to, and what their speed is measured against.

Contiguous maps, modulation enlarged to pixel size, an N x N mask for the attention, everything anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.model.attention import RelativePositionBias, WindowAttention
from ssdd.model.decoder import TransformerBlock, UViTDecoder
from ssdd.model.layers import ResnetBlock
from ssdd.model.norms import AdaGroupNorm, AdaLayerNorm


class PlainDecoder(UViTDecoder):
    """`UViTDecoder` with the same weights; `forward` is the plain form, and all that may be called."""

    def compile(self, **options: object) -> None:
        nn.Module.compile(self, **options)

    def forward(self, x_t: Tensor, t: Tensor | float, z: Tensor) -> Tensor:
        """v, float32 [B, 3, H, W], at x_t of that shape, t in [0, 1] (scalar or [B]), z [B, z_dim, h, w]."""
        dtype, size = self.conv_in.weight.dtype, x_t.shape[-2:]
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device)
        z = z.to(dtype).contiguous()
        ctx, temb = self.ada_ctx_proj(z), F.silu(self.time_embedding(t))
        h = self.conv_in(torch.cat([x_t.to(dtype).contiguous(), F.interpolate(z, size=size)], dim=1))
        skips = [h]
        for block in self.down_blocks:
            for resnet in block.resnets:
                h = residual(resnet, h, temb, ctx)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0].conv(h)
                skips.append(h)
        h = h + self._middle(h, ctx)
        for block in self.up_blocks:
            for resnet in block.resnets:
                h = residual(resnet, torch.cat([h, skips.pop()], dim=1), temb, ctx)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0].conv(F.interpolate(h, scale_factor=2.0))
        return self.conv_out(F.silu(norm(self.conv_norm_out, h))).float()

    def _middle(self, x: Tensor, ctx: Tensor) -> Tensor:
        middle, size = self.mid_block, x.shape[-2:]
        tokens = middle.proj_in(norm(middle.norm, x).flatten(2).mT)  # [B, N, D]
        ctx = F.interpolate(ctx, size=size).flatten(2).mT
        for block in middle.transformer_blocks:
            y = modulated_layer_norm(block.norm1, tokens, ctx)
            tokens = tokens + masked_attention(block.attn1, block.relative_position_bias, y, size)
            tokens = tokens + feed_forward(block, tokens)
        return middle.proj_out(tokens).mT.unflatten(2, size)


def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    weight, bias = layer.weight.float(), layer.bias.float()
    return F.group_norm(x.float(), layer.num_groups, weight, bias, layer.eps).to(x.dtype)


def modulated_group_norm(layer: AdaGroupNorm, x: Tensor, ctx: Tensor) -> Tensor:
    scale, shift = layer.ctx_proj(F.interpolate(ctx, size=x.shape[-2:])).chunk(2, dim=1)
    return F.group_norm(x.float(), layer.groups, eps=layer.eps).to(x.dtype) * (1 + scale) + shift


def modulated_layer_norm(layer: AdaLayerNorm, x: Tensor, ctx: Tensor) -> Tensor:
    shift, scale = layer.linear(F.silu(ctx)).chunk(2, dim=-1)
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype) * (1 + scale) + shift


def residual(block: ResnetBlock, x: Tensor, temb: Tensor, ctx: Tensor) -> Tensor:
    h = block.conv1(F.silu(modulated_group_norm(block.norm1, x, ctx)))
    scale, shift = block.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
    h = block.conv2(F.silu(norm(block.norm2, h) * (1 + scale) + shift))
    return h + (block.conv_shortcut(x) if hasattr(block, "conv_shortcut") else x)


def feed_forward(block: TransformerBlock, x: Tensor) -> Tensor:
    value, gate = block.ff.proj_in_act.proj(block.norm2(x)).chunk(2, dim=-1)
    return block.ff.proj_out(value * F.gelu(gate))


def masked_attention(
    attention: WindowAttention, position: RelativePositionBias, x: Tensor, size: tuple[int, int]
) -> Tensor:
    """Attention of tokens x [B, N, D] on a grid of `size` under a mask [heads, N, N]: the definition."""
    table = position.relative_bias_table
    reach = (len(table) - 1) // 2
    y_x = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in size))
    dy, dx = (y_x[:, None] - y_x[None]).unbind(2)  # query minus key, [N, N]
    mask = table[dy.clamp(-reach, reach) + reach, dx.clamp(-reach, reach) + reach].permute(2, 0, 1)
    mask = mask.masked_fill((dy.abs() > reach) | (dx.abs() > reach), float("-inf"))

    def heads(linear: Callable[[Tensor], Tensor]) -> Tensor:
        return linear(x).unflatten(2, (attention.heads, -1)).transpose(1, 2)

    q, k, v = (heads(linear) for linear in (attention.to_q, attention.to_k, attention.to_v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None].to(q.dtype))
    return attention.out_proj(y.transpose(1, 2).flatten(2))
