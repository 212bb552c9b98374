"""Convolutional encoder and decoder of the VQGAN family (arXiv 2012.09841), with its parameter names.

Levels halve the resolution and are `ch * ch_mult[i]` wide; the coarsest level and the middle carry
self-attention.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.nn.conv import Conv3x3, norm_silu_conv, upsample_conv


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups; below 128 channels fewer, of four channels or more: alone, a channel loses its mean."""
    most = 32 if channels >= 128 else max(channels // 4, 1)
    return nn.GroupNorm(math.gcd(32, most, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where widths
    differ.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), Conv3x3(c_in, c_out)
        self.norm2, self.conv2 = group_norm(c_out), Conv3x3(c_out, c_out)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        return norm_silu_conv(self.norm2, self.conv2, h, residual=self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, as a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, 1, h * w, 3 * c)
        out = F.scaled_dot_product_attention(*qkv.split(c, dim=-1))
        return x + self.proj_out(out.reshape(b, h, w, c).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded on the right and below alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(self.conv, x)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then a change of
    resolution.
    """

    def __init__(
        self, widths: Sequence[int], attention: bool, resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairs)
        self.attn = nn.ModuleList(AttentionBlock(b) for _, b in pairs) if attention else nn.ModuleList()
        self.resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    """Two residual blocks around one attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> features [B, z, H / f, W / f] with f = 2 ** (levels - 1)."""

    def __init__(self, ch: int, ch_mult: Sequence[int], blocks: int, z_channels: int) -> None:
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = Conv3x3(3, ch)
        self.down = nn.ModuleList(
            Level(
                [widths[i - 1] if i else ch] + [width] * blocks,
                attention=i == last,
                resample=("downsample", Downsample(width)) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), Conv3x3(widths[-1], z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return norm_silu_conv(self.norm_out, self.conv_out, self.mid(h))


class Decoder(nn.Module):
    """Features [B, z, h, w] -> images [B, 3, h f, w f]. `up[0]` is the finest level, and runs last."""

    def __init__(self, ch: int, ch_mult: Sequence[int], blocks: int, z_channels: int) -> None:
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = Conv3x3(z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(
                [widths[min(i + 1, last)]] + [width] * (blocks + 1),
                attention=i == last,
                resample=("upsample", Upsample(width)) if i else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out, self.conv_out = group_norm(widths[0]), Conv3x3(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z.contiguous(memory_format=torch.channels_last)))
        for level in reversed(self.up):
            h = level(h)
        return norm_silu_conv(self.norm_out, self.conv_out, h)
