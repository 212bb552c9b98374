"""Quantizers of vector-quantize-pytorch, anywhere in a model: the search of the nearest code in evaluation.

`VectorQuantize` is known by its `_codebook`, a codebook by `embed` [H, K, D], `cluster_size` and
`transform_input`. Training, and whatever needs all distances, runs the original code.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin

_distances_wanted: ContextVar[bool] = ContextVar("distances_wanted", default=False)


class _VectorQuantize(Mixin):
    """Says to its codebook whether the distances to all codes are wanted."""

    def forward(self, x: Tensor, indices: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        token = _distances_wanted.set(indices is not None)
        try:
            return super().forward(x, indices, *args, **kwargs)  # type: ignore[misc]
        finally:
            _distances_wanted.reset(token)


class _Codebook(Mixin):
    """Nearest codes without a matrix of distances (arimg.ops.nearest_code)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        if args or self._needs_the_original(kwargs):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        embed = module.embed.detach().float()
        x = x.float()
        given = x if x.dim() >= 4 else x[None]
        rows = given.flatten(1, -2)
        metric = "dot" if module.use_cosine_sim else "l2"
        found = [ops.nearest_code(r, codes, metric) for r, codes in zip(rows, embed)]
        index = torch.stack(found).view(given.shape[:-1])
        quantized = torch.stack([ops.lookup(i, codes) for i, codes in zip(index, embed)])
        return (quantized, index, None) if x.dim() >= 4 else (quantized[0], index[0], None)

    def _needs_the_original(self, kwargs: dict[str, Any]) -> bool:
        module: Any = self
        return (
            module.training
            or _distances_wanted.get()
            or not bool(module.initted)
            or module.affine_param
            or getattr(module, "vq_bridge", None) is not None
            or (module.learnable_codebook and torch.is_grad_enabled())
            or any(kwargs.get(name) is not None for name in ("codebook_transform_fn", "topk"))
        )


def recognise_vector_quantize(report: Report, path: str, module: nn.Module) -> bool:
    codebook = getattr(module, "_codebook", None)
    if not isinstance(codebook, nn.Module) or not all(
        hasattr(codebook, name) for name in ("embed", "cluster_size", "transform_input", "initted")
    ):
        return False
    if not hasattr(codebook, "affine_param") or not hasattr(codebook, "use_cosine_sim"):
        report.keep(module, path, "expected a codebook with affine_param and use_cosine_sim")
        return True
    report.swap(module, _VectorQuantize, path, "search without a matrix of distances, in evaluation")
    report.swap(codebook, _Codebook, f"{path}._codebook".lstrip("."), "nearest codes in one pass")
    return True
