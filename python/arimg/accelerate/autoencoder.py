"""The convolutional autoencoders of the VQGAN family (arXiv 2012.09841): of VAR, LlamaGen, diffusers.

A residual block is known by norm1, conv1, norm2, conv2; an upsampling by one 3x3 convolution named conv, and
nothing else, beside residual blocks. Each is compared with ours on a few pixels before it is replaced.
"""

from typing import Any

import torch
from torch import Tensor, nn

from arimg.accelerate import probe
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin, has_hooks
from arimg.nn.conv import norm_silu_conv, suits, upsample_conv

_SHORTCUTS = ("nin_shortcut", "conv_shortcut")


class _ResidualBlock(Mixin):
    """Group norm, SiLU, convolution and residual in one pass each (arimg.ops.conv3x3)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module: Any = self
        dropout = getattr(module, "dropout", None)
        drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and module.training
        given = any(a is not None for a in (*args, *kwargs.values()))
        if drops or given or not _intact(module, module.conv1, module.conv2) or not suits(module.conv1, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        return _residual_block(module, x)


def _residual_block(module: Any, x: Tensor) -> Tensor:
    shortcut = next((s for name in _SHORTCUTS if (s := getattr(module, name, None)) is not None), None)
    h = norm_silu_conv(module.norm1, module.conv1, x)
    return norm_silu_conv(module.norm2, module.conv2, h, residual=x if shortcut is None else shortcut(x))


class _Upsample(Mixin):
    """Nearest neighbour and convolution in one pass (arimg.ops.conv3x3)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module: Any = self
        sized = any(a is not None for a in (*args, *kwargs.values()))
        if sized or not _intact(module, module.conv) or not suits(module.conv, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        return upsample_conv(module.conv, x)


def _intact(module: nn.Module, *convs: nn.Module) -> bool:
    """Whether the convolutions are still plain ones (adapters take their place) and no part has a hook."""
    return all(map(_is_plain, convs)) and not has_hooks(module)


def recognise_autoencoder(report: Report, path: str, module: nn.Module) -> bool:
    children = dict(module.named_children())
    if {"norm1", "conv1", "norm2", "conv2"} <= children.keys():
        reason = _unsuited_block(children)
        if not reason and not _is_ours(module):
            reason = "expected conv(silu(norm)) twice and the shortcut, as they are"
        if reason:
            report.keep(module, path, reason)
        else:
            report.swap(module, _ResidualBlock, path, "norm, SiLU and 3x3 in one pass")
        return True
    if _is_upsampling(path, module, children):
        reason = _elsewhere(children["conv"])
        if reason:
            report.keep(module, path, reason)
        else:
            report.swap(module, _Upsample, path, "doubling and 3x3 in one pass")
        return True
    return False


def _elsewhere(conv: Any) -> str:
    """Why there is no kernel where the weights are, or nothing."""
    kind = conv.weight.device.type
    return "" if kind == "cpu" else f"expected weights on the CPU, got {kind}: torch's convolution"


def _unsuited_block(children: dict[str, nn.Module]) -> str:
    """Why the block is not norm-SiLU-conv twice with a shortcut, or nothing."""
    for name in ("norm1", "norm2"):
        if not isinstance(children[name], nn.GroupNorm):
            return f"expected {name} to be a GroupNorm, got {type(children[name]).__name__}"
    for name in ("conv1", "conv2"):
        if not _is_plain(children[name]):
            return f"expected {name} to be a 3x3 convolution of stride 1 and padding 1"
        if reason := _elsewhere(children[name]):
            return reason
    known = {"norm1", "conv1", "norm2", "conv2", "dropout", "nonlinearity", *_SHORTCUTS}
    extra = children.keys() - known
    if extra:
        return f"unknown parts {', '.join(sorted(extra))}"
    if not isinstance(children.get("dropout", nn.Identity()), nn.Dropout | nn.Identity):
        return "unknown dropout"
    act = children.get("nonlinearity")
    return "" if act is None or isinstance(act, nn.SiLU) else f"expected SiLU, got {type(act).__name__}"


def _is_ours(module: Any) -> bool:
    """Whether ours gives the block's result for a few pixels: names do not tell of factors or resizing."""
    conv = module.conv1
    x = torch.randn(1, conv.in_channels, 4, 4, generator=torch.Generator().manual_seed(0)).to(conv.weight)
    try:
        with probe.evaluating(module):
            ours = _residual_block(module, x)
            try:
                given = type(module).forward(module, x)
            except TypeError:  # diffusers' wants the embedding of a time, which may be None
                given = type(module).forward(module, x, None)
            return probe.close(ours, given)
    except probe.FAILURES:
        return False


def _is_plain(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def _is_upsampling(path: str, module: nn.Module, children: dict[str, nn.Module]) -> bool:
    """One plain convolution named conv, in a place named for upsampling, that doubles what it is given."""
    if list(children) != ["conv"] or not _is_plain(children["conv"]) or "upsample" not in path.lower():
        return False
    conv = children["conv"]
    assert isinstance(conv, nn.Conv2d)
    probe = torch.zeros(1, conv.in_channels, 2, 2, dtype=conv.weight.dtype, device=conv.weight.device)
    with torch.no_grad():
        probe[..., 0, 1] = 1
        try:
            return torch.allclose(module(probe), upsample_conv(conv, probe), atol=1e-2)
        except (RuntimeError, TypeError):
            return False
