"""3x3 convolutions with the group norm and SiLU before them, fast on the CPU where no gradient is needed.

Winograd's F(4x4, 3x3) (Lavin & Gray, arXiv 1509.09308) takes 36 products per 16 outputs where the direct form
takes 144. An image is worked through in strips, so that the normalised input, the transformed tiles and their
products stay in the cache, and no tensor of the image's size is written but the result. Each image of a batch
is worked alone: its result does not depend on the others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INPUT = [
    [4.0, 0.0, -5.0, 0.0, 1.0, 0.0],
    [0.0, -4.0, -4.0, 1.0, 1.0, 0.0],
    [0.0, 4.0, -4.0, -1.0, 1.0, 0.0],
    [0.0, -2.0, -1.0, 2.0, 1.0, 0.0],
    [0.0, 2.0, -1.0, -2.0, 1.0, 0.0],
    [0.0, 4.0, 0.0, -5.0, 0.0, 1.0],
]
_FILTER = [
    [1 / 4, 0.0, 0.0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0.0, 0.0, 1.0],
]
_OUTPUT = [
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
    [0.0, 1.0, -1.0, 2.0, -2.0, 0.0],
    [0.0, 1.0, 1.0, 4.0, 4.0, 0.0],
    [0.0, 1.0, -1.0, 8.0, -8.0, 1.0],
]
_STRIP_TILES = 256  # of 4x4 outputs at a time: enough rows for an efficient product, few enough for the cache
_MIN_PIXELS = 64 * 64  # below, the transformed filter, four times as large, costs what it saves


class Conv3x3(nn.Conv2d):
    """3x3 convolution of stride 1 and padding 1. fast: may take Winograd's form (errors of a few 1e-6)."""

    def __init__(self, c_in: int, c_out: int, fast: bool = False) -> None:
        super().__init__(c_in, c_out, 3, padding=1)
        self.fast = fast

    def forward(self, x: Tensor) -> Tensor:
        return _winograd(self, x, None, None) if self._suits(x) else super().forward(x)

    def _suits(self, x: Tensor, scale: int = 1) -> bool:
        h, w = x.shape[-2] * scale, x.shape[-1] * scale
        return (
            self.fast
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
            and h % 4 == 0
            and w % 4 == 0
            and h * w >= _MIN_PIXELS
            and min(self.in_channels, self.out_channels) >= 32
        )

    def transformed(self) -> Tensor:
        """The filter in Winograd's domain, [36, C_in, C_out]: a hundredth of the work, so it is not kept."""
        g = torch.tensor(_FILTER)
        taps = self.weight.permute(2, 3, 1, 0).reshape(9, -1)
        return (torch.kron(g, g) @ taps).view(36, self.in_channels, self.out_channels)


def norm_silu_conv(norm: nn.GroupNorm, conv: Conv3x3, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))) + residual, x and the result [B, C, H, W]."""
    if conv._suits(x):
        return _winograd(conv, x, norm, residual)
    out = conv(F.silu(norm(x), inplace=True))
    return out if residual is None else out + residual


def upsample_conv(conv: Conv3x3, x: Tensor) -> Tensor:
    """conv(x at twice the size by nearest neighbour): [B, C, H, W] -> [B, N, 2H, 2W]."""
    if conv._suits(x, scale=2):  # no tensor of the larger size is written but the result
        return _winograd(conv, x, None, None, scale=2)
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _winograd(
    conv: Conv3x3, x: Tensor, norm: nn.GroupNorm | None, residual: Tensor | None, scale: int = 1
) -> Tensor:
    x = x.permute(0, 2, 3, 1).contiguous()
    batch, h, w, _ = x.shape
    out = x.new_empty(batch, h * scale, w * scale, conv.out_channels)
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    filters = conv.transformed()
    for b in range(batch):
        affine = None if norm is None else _norm_as_affine(norm, x[b])
        _convolve(x[b], affine, filters, conv.bias, None if residual is None else residual[b], out[b])
    return out.permute(0, 3, 1, 2)


def _norm_as_affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Group norm of one image [H, W, C] as scale and shift per channel."""
    rows = x.flatten(0, 1)
    groups = (norm.num_groups, -1)
    mean = rows.mean(0).view(groups).mean(1, keepdim=True)
    centre = mean.expand(groups[0], rows.shape[1] // groups[0]).flatten()
    squares = torch.zeros_like(centre, dtype=torch.float64)
    for strip in rows.split(8192):
        squares += (strip - centre).square_().sum(0)
    variance = squares.view(groups).sum(1, keepdim=True) / (rows.numel() / groups[0])
    scale = ((variance + norm.eps).rsqrt().float() * norm.weight.view(groups)).flatten()
    return scale, norm.bias - centre * scale


def _convolve(
    x: Tensor,
    affine: tuple[Tensor, Tensor] | None,
    filters: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """One image: filters [36, C, N]; residual and out [H, W, N]; x [H, W, C] or a factor smaller."""
    (h, w, n), c = out.shape, x.shape[-1]
    scale = h // x.shape[0]
    into, back = (torch.tensor(t) for t in (_INPUT, _OUTPUT))
    into, back = torch.kron(into, into), torch.kron(back, back)
    height = min(h, 4 * max(1, _STRIP_TILES // (w // 4)))
    padded = x.new_zeros(height + 2, w + 2, c)
    for top in range(0, h, height):
        rows = min(height, h - top)
        tiles = rows * w // 16
        first, last = max(top - 1, 0), min(top + rows + 1, h)
        inner = padded[first - top + 1 : last - top + 1, 1:-1]
        if affine is None:
            repeated = x[torch.arange(first, last) // scale] if scale > 1 else x[first:last]
            inner.unflatten(1, (-1, scale)).copy_(repeated[:, :, None])
        else:
            F.silu(torch.addcmul(affine[1], x[first:last], affine[0], out=inner), inplace=True)
        if last == h:
            padded[h - top + 1 :] = 0
        gathered = padded[: rows + 2].unfold(0, 6, 4).unfold(1, 6, 4).permute(3, 4, 0, 1, 2)
        v = into @ gathered.reshape(36, tiles * c)
        m = torch.bmm(v.view(36, tiles, c), filters)
        y = (back @ m.view(36, tiles * n)).view(16, tiles, n)
        if bias is not None:
            y += bias
        strip = y.view(4, 4, rows // 4, w // 4, n).permute(2, 0, 3, 1, 4)
        target = out[top : top + rows].view(rows // 4, 4, w // 4, 4, n)
        if residual is None:
            target.copy_(strip)
        else:
            torch.add(strip, residual[top : top + rows].reshape(target.shape), out=target)
