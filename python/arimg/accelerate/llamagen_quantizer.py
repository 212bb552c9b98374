"""The quantizer of LlamaGen's released tokenizer: an embedding, `l2_norm`, nested results."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.accelerate import probe
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin


class _Quantizer(Mixin):
    """The search without a matrix of distances (arimg.ops.nearest_code)."""

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]:
        module: Any = self
        weight = module.embedding.weight
        # float32 alone: the original's distances in 16 bits are rounded so far that other codes win.
        usual = not (torch.compiler.is_compiling() or torch.is_autocast_enabled(z.device.type))
        suits = z.dim() == 4 and z.dtype == weight.dtype == torch.float32 and z.device == weight.device
        if module.training or not usual or not suits:
            return super().forward(z)  # type: ignore[misc, no-any-return]
        x = z.permute(0, 2, 3, 1).contiguous()
        if module.l2_norm:
            x, weight = F.normalize(x, dim=-1), F.normalize(weight, dim=-1)
        index = ops.nearest_code(x.detach().view(-1, x.shape[-1]), weight.detach())
        out = x + (weight[index].view(x.shape) - x).detach()
        return out.permute(0, 3, 1, 2), (None, None, None, 0), (None, None, index)


def recognise_llamagen_quantizer(report: Report, path: str, module: nn.Module) -> bool:
    if [name for name, _ in module.named_children()] != ["embedding"]:
        return False
    if not all(hasattr(module, name) for name in ("n_e", "e_dim", "beta", "l2_norm")):
        return False
    if _is_ours(module):
        report.swap(module, _Quantizer, path, "nearest codes without a matrix of distances")
    else:
        report.keep(module, path, "expected the nearest codes, of float32, of a map")
    return True


def _is_ours(module: Any) -> bool:
    """Whether the mixin gives the module's results: a few codes, a little off."""
    codes = module.embedding.weight.detach()[:4]
    x = codes.t().reshape(1, -1, 1, len(codes)).mul(1.001).add(1e-3 * codes.std())
    try:
        with probe.evaluating(module):
            given, ours = (list(_leaves(c.forward(module, x))) for c in (type(module), _Quantizer))
    except (*probe.FAILURES, AssertionError):
        return False
    return len(given) == len(ours) and all(_same(a, b) for a, b in zip(given, ours))


def _leaves(result: Any) -> Iterator[Any]:
    if isinstance(result, tuple):
        for part in result:
            yield from _leaves(part)
    else:
        yield result


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
