"""Quantizers of the VQVAEs in the packages transformers (Janus, Chameleon, Emu3) and diffusers (VQModel).

Known by an embedding as the only part and by their results: (quantized, loss, indices) of a map [B, C, H, W],
or the indices of frames [B, T, C, H, W]. Diffusers' is the VQGAN's (arXiv 2012.09841), whose indices stand in
a tuple. Only the search is ours: losses and gradients stay as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.accelerate import probe
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin


def _nearest(module: Any, x: Tensor) -> Tensor:
    """Indices of the rows of x [..., C]."""
    return ops.nearest_code(x.detach().reshape(-1, x.shape[-1]), module.embedding.weight.detach())


def _suits(module: Any, x: Tensor, dim: int) -> bool:
    """float32 alone: the originals' distances in 16 bits are rounded so far that other codes win."""
    weight = module.embedding.weight
    usual = not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type))
    return usual and x.dim() == dim and x.dtype == weight.dtype == torch.float32 and x.device == weight.device


class _MapQuantizer(Mixin):
    """The search without a matrix of distances (arimg.ops.nearest_code)."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module: Any = self
        if not _suits(module, hidden_state, 4):
            return super().forward(hidden_state)  # type: ignore[misc, no-any-return]
        return _quantized(module, hidden_state, 1.0, module.beta)


class _TupleQuantizer(Mixin):
    """The search without a matrix of distances (arimg.ops.nearest_code)."""

    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        if args or kwargs or module.remap is not None or not _suits(module, z, 4):
            return super().forward(z, *args, **kwargs)  # type: ignore[misc]
        weights = (1.0, module.beta) if module.legacy else (module.beta, 1.0)
        out, loss, index = _quantized(module, z, *weights)
        return out, loss, (None, None, index.view(-1, *z.shape[2:]) if module.sane_index_shape else index)


def _quantized(module: Any, z: Tensor, commitment: float, codes: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a map with the gradient of z, the loss of these two weights, and the indices."""
    x = z.permute(0, 2, 3, 1).contiguous()
    index = _nearest(module, x)
    found = module.embedding(index).view(x.shape)
    loss = commitment * (found.detach() - x).square().mean() + codes * (found - x.detach()).square().mean()
    out = x + (found - x).detach()
    return out.permute(0, 3, 1, 2).contiguous(), loss, index


class _FrameQuantizer(Mixin):
    """The search without a matrix of distances (arimg.ops.nearest_code)."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        module: Any = self
        if not _suits(module, hidden_state, 5):
            return super().forward(hidden_state)  # type: ignore[misc, no-any-return]
        x = hidden_state.permute(0, 1, 3, 4, 2)
        return _nearest(module, x).view(x.shape[:-1])


def recognise_vqvae_quantizer(report: Report, path: str, module: nn.Module) -> bool:
    if [name for name, _ in module.named_children()] != ["embedding"]:
        return False
    if type(module).__name__.endswith("VQVAEVectorQuantizer"):
        kinds: tuple[type[Mixin], ...] = (_MapQuantizer, _FrameQuantizer)
    elif all(hasattr(module, name) for name in ("n_e", "beta", "legacy", "remap", "sane_index_shape")):
        kinds = (_TupleQuantizer,)
    else:
        return False
    mixin = next((m for m in kinds if _is_ours(module, m)), None)
    if mixin is None:
        report.keep(module, path, "expected the nearest codes, of float32, of a map or of frames")
    else:
        report.swap(module, mixin, path, "nearest codes without a matrix of distances")
    return True


def _is_ours(module: Any, mixin: Any) -> bool:
    """Whether the mixin gives the module's results: a few codes, a little off."""
    codes = module.embedding.weight.detach()[:4]
    x = codes.t().reshape(1, -1, 2, len(codes) // 2).mul(1.001)
    x = x[:, None] if mixin is _FrameQuantizer else x
    try:
        with probe.evaluating(module):
            given, ours = (c.forward(module, x) for c in (type(module), mixin))
    except (*probe.FAILURES, AssertionError):
        return False
    given, ours = _tensors(given), _tensors(ours)
    if len(given) != len(ours):
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(given, ours))


def _tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, those of tuples in it too."""
    if isinstance(result, tuple):
        return [t for part in result for t in _tensors(part)]
    return [] if result is None else [result]
