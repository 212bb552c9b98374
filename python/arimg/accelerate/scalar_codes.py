"""FSQ and LFQ (also spherical) of vector-quantize-pytorch, anywhere in a model, without gradients.

An FSQ is known by `_levels` and `codes_to_indices`, an LFQ by `codebook_scale` and `bits_to_codes`;
projections are called as they are. The losses of LFQ are those of training, which runs the original code.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.accelerate import probe, swap
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin
from arimg.ops._common import FLOATING
from arimg.ops.quantize_codes import MAX_LEVEL

_EXACT_LEVELS = 25  # up to here an FSQ's float32 digits are integers, beyond they are rounded
_MAX_CODES = 2**24  # and up to here so is the index it sums them to
_MAX_CODES_ROUNDED = 2**18  # with rounded digits: the sum is off by less than 0.3, and is rounded
_MAX_BITS = 31  # beyond, LFQ's int32 sum wraps


class _FSQ(Mixin):
    """Bound, rounding and index in one pass (arimg.ops.fsq), or as few of torch's as there are."""

    fsq_levels: tuple[int, ...]
    fsq_bound: str | None  # "tanh" or "clamp", of levels that are symmetric to 0; None: that of arimg.ops.fsq

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        module: Any = self
        first = module.channel_first or z.dim() >= 4
        noisy = module.training and getattr(module, "noise_dropout", 0) > 0
        if noisy or not _is_laid_out(module, z, first) or _wants_gradient(module, z):
            return super().forward(z)  # type: ignore[misc, no-any-return]
        x = _enter(module, z, first)
        # float64 has no kernel, and 16 bits that may stay are rounded between the steps.
        widened = module.force_quantization_f32 and x.dtype not in module.allowed_dtypes
        if not (x.dtype == torch.float32 or (widened and x.dtype in FLOATING)):
            return super().forward(z)  # type: ignore[misc, no-any-return]
        if self.fsq_bound is None:
            codes, indices = ops.fsq(x, self.fsq_levels)
        else:
            codes, indices = _symmetric_codes(x.float(), self.fsq_levels, self.fsq_bound)
            codes = codes.to(x.dtype)
        out = _leave(module, codes, first)
        return out, _indices_out(module, indices.int()) if module.return_indices else None

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        if self.fsq_bound is not None or indices.dtype not in (torch.int32, torch.int64):
            return super()._indices_to_codes(indices)  # type: ignore[misc, no-any-return]
        return ops.fsq_codes(indices.long(), self.fsq_levels)


def _symmetric_codes(x: Tensor, levels: tuple[int, ...], bound: str) -> tuple[Tensor, Tensor]:
    """Codes 2 / (L - 1) digit - 1 (arXiv 2411.19842, 3.2) and float32 indices of x [..., d].

    The roundings are the original's, whose straight-through sum gives the digits exactly: a residual
    quantizer meets no other near-ties than it.
    """
    alike = len(set(levels)) == 1
    steps: Any = levels[0] - 1 if alike else x.new_tensor(levels) - 1
    bounded = x.clamp(-1, 1) if bound == "clamp" else x.tanh()
    digits = bounded.add_(1).mul_(steps / 2).add_(0.5).floor_()
    columns = digits.unbind(-1)
    index = columns[-1]
    for column, level in zip(columns[-2::-1], levels[-2::-1]):
        index = torch.add(column, index, alpha=level)
    return (digits * (2.0 / steps)).sub_(1), index


class _LFQ(Mixin):
    """Signs and index in one pass (arimg.ops.sign_codes), in evaluation."""

    value: float  # of a code, after the sphere
    result: Any  # the package's named tuple

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        module: Any = self
        first = x.dim() >= 4 if module.channel_first is None else module.channel_first
        suits = _is_laid_out(module, x, first) and not module.training
        if not suits or return_loss_breakdown or _wants_gradient(module, x):
            return super().forward(x, inv_temperature, return_loss_breakdown, mask)  # type: ignore[misc]
        z = module.maybe_l2norm(_enter(module, x, first, module.soft_clamp_input_value))
        if not (z.dtype == torch.float32 or (module.force_quantization_f32 and z.dtype in FLOATING)):
            return super().forward(x, inv_temperature, return_loss_breakdown, mask)  # type: ignore[misc]
        codes, indices = ops.sign_codes(z, self.value)
        return self.result(_leave(module, codes, first), _indices_out(module, indices), module.zero * 0)

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        module: Any = self
        known = indices.dtype in (torch.int32, torch.int64) and module.codebook.dtype == torch.float32
        if not known or module.orthogonal_rotation or _wants_gradient(module, indices):
            return super().indices_to_codes(indices, project_out)  # type: ignore[misc, no-any-return]
        image = indices.dim() >= 3 + int(module.keep_num_codebooks_dim)
        first = image if module.channel_first is None else module.channel_first
        indices = indices if module.keep_num_codebooks_dim else indices[..., None]
        codes = ops.unpack_signs(indices.long(), module.codebook_dim, self.value).flatten(-2)
        codes = module.project_out(codes) if project_out else codes
        return codes.movedim(-1, 1) if first else codes


def _is_laid_out(module: Any, x: Tensor, first: bool) -> bool:
    """What the originals take: tokens, or more dimensions with the channels first."""
    return (x.dim() == 3 or (first and x.dim() > 3)) and x.shape[1 if first else -1] == module.dim


def _wants_gradient(module: Any, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for p in module.parameters())


def _enter(module: Any, x: Tensor, first: bool, clamp: float | None = None) -> Tensor:
    """x in its layout -> [B, ..., codebooks, codebook_dim], projected, clamped and rotated."""
    z = module.project_in(x.movedim(1, -1) if first else x)
    if clamp is not None:
        z = (z / clamp).tanh() * clamp
    z = z.unflatten(-1, (module.num_codebooks, module.codebook_dim))
    return z @ module.orthogonal_rot if getattr(module, "orthogonal_rotation", False) else z


def _leave(module: Any, codes: Tensor, first: bool) -> Tensor:
    if getattr(module, "orthogonal_rotation", False):
        codes = codes @ module.orthogonal_rot.t()
    out = module.project_out(codes.flatten(-2))
    return out.movedim(-1, 1) if first else out


def _indices_out(module: Any, indices: Tensor) -> Tensor:
    return indices if module.keep_num_codebooks_dim else indices[..., 0]


def recognise_scalar_codes(report: Report, path: str, module: nn.Module) -> bool:
    known = next((k for k in _KINDS if all(hasattr(module, name) for name in k[0])), None)
    if known is None:
        return False
    _, mixin, reason_of, options_of, note = known
    reason = reason_of(module)
    if not reason:
        try:
            options = options_of(module)
            if _is_ours(module, mixin, options):
                report.swap(module, mixin, path, note, **options)
                return True
        except (*probe.FAILURES, AssertionError):
            pass
    report.keep(module, path, reason or "expected the results of vector-quantize-pytorch's quantizer")
    return True


def _unsuited_fsq(module: Any) -> str:
    levels = module._levels.tolist()
    symmetric = getattr(module, "preserve_symmetry", False)
    if getattr(module, "bound_hard_clamp", False) and not symmetric:
        return "bound_hard_clamp without preserve_symmetry: its bound has no kernel"
    if max(levels) > MAX_LEVEL:
        return f"expected at most {MAX_LEVEL} levels, got {levels}"
    most = _MAX_CODES if max(levels) <= _EXACT_LEVELS and not symmetric else _MAX_CODES_ROUNDED
    if prod(levels) > most:
        return f"expected at most {most} codes, which its float32 index can tell apart, got {prod(levels)}"
    return ""


def _unsuited_lfq(module: Any) -> str:
    bits = module.codebook_dim
    return "" if bits <= _MAX_BITS else f"expected at most {_MAX_BITS} bits in an index, got {bits}"


def _fsq_options(module: Any) -> dict[str, Any]:
    bound = None
    if getattr(module, "preserve_symmetry", False):
        bound = "clamp" if getattr(module, "bound_hard_clamp", False) else "tanh"
    return {"fsq_levels": tuple(module._levels.tolist()), "fsq_bound": bound}


def _lfq_options(module: Any) -> dict[str, Any]:
    """The value of a code as the module normalises it, and the class of its results."""
    code = torch.full((module.codebook_dim,), module.codebook_scale, device=module.mask.device)
    with probe.evaluating(module):
        result = type(type(module).forward(module, _probe(module)))
    return {"value": float(module.maybe_l2norm(code)[0]), "result": result}


def _probe(module: Any) -> Tensor:
    """Tokens of the module's type, [2, 3, dim] in its layout."""
    like = next(module.parameters(), torch.zeros((), device=next(module.buffers()).device))
    x = torch.randn(2, 3, module.dim, generator=torch.Generator().manual_seed(0)).to(like)
    return x.movedim(-1, 1) if module.channel_first else x


def _is_ours(module: Any, mixin: type[Mixin], options: dict[str, Any]) -> bool:
    """Whether a module of this kind gives the same codes and indices."""
    x = _probe(module)
    with probe.evaluating(module):
        given = type(module).forward(module, x)
        try:
            swap.swap(module, mixin, **options)
            found = type(module).forward(module, x)
        finally:
            swap.restore(module)
    return type(given) is type(found) and all(_same(a, b) for a, b in zip(given, found, strict=True))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


_KINDS: tuple[tuple[set[str], type[Mixin], Any, Any, str], ...] = (
    (
        {"_levels", "_basis", "codes_to_indices", "bound", "project_in", "project_out"},
        _FSQ,
        _unsuited_fsq,
        _fsq_options,
        "bound, rounding and index in one pass, or (preserve_symmetry) in few",
    ),
    (
        {"codebook_scale", "codebook_dim", "bits_to_codes", "maybe_l2norm", "project_in", "project_out"},
        _LFQ,
        _unsuited_lfq,
        _lfq_options,
        "signs and index in one pass, in evaluation",
    ),
)
