"""diffusers' UVit2DModel, the transformer of aMUSEd (arXiv 2401.01808): what lies between its products.

The whole is known by the names of its parts. Of each part one small result is compared with ours before it is
replaced. Products stay torch's, and those that see the text alone are kept from one step to the next.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.accelerate import few_rows, probe
from arimg.accelerate.few_rows import is_plain, replace_linear
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin
from arimg.accelerate.view import source_of

_NAMES = {
    "encoder_proj", "cond_embed", "embed", "down_block", "project_to_hidden", "transformer_layers",
    "project_from_hidden", "up_block", "mlm_layer",
}  # fmt: skip


def usual(x: Tensor, *weights: Tensor) -> bool:
    """On the CPU, where it was measured, and as these kernels take it."""
    return x.is_cpu and few_rows.usual(x, *weights)


# --- norms ---------------------------------------------------------------------------------------------
class _AdaNorm(Mixin):
    """Norm and modulation in one pass (arimg.ops.norm_modulate)."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        module: Any = self
        weights = (module.linear.weight, *module.norm.parameters())
        if x.dim() != 3 or not is_plain(module.norm) or not usual(x, *weights):
            return super().forward(x, conditioning_embedding)  # type: ignore[misc, no-any-return]
        return _ada_norm(module, x, conditioning_embedding)


def _ada_norm(module: Any, x: Tensor, condition: Tensor) -> Tensor:
    """x [B, L, C], condition [B, D]. The norm's own weight and bias become part of the modulation."""
    scale, shift = module.linear(module.silu(condition).to(x.dtype))[:, None].chunk(2, dim=2)
    norm = module.norm
    if norm.bias is not None:
        shift = torch.addcmul(shift, norm.bias, 1 + scale)
    if norm.weight is not None:
        scale = norm.weight * (1 + scale) - 1
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    return ops.norm_modulate(x, scale, shift, eps=norm.eps, norm=kind)


class _ResponseNorm(Mixin):
    """ConvNeXt V2's global response norm (arXiv 2301.00808) in two passes."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        # Squares of float16 overflow from 256 on.
        if x.dim() != 4 or x.dtype == torch.float16 or not usual(x, module.gamma, module.beta):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return _response_norm(module, x)


def _response_norm(module: Any, x: Tensor) -> Tensor:
    """x [B, height, width, C]."""
    size = (x * x).sum((1, 2), keepdim=True).sqrt_()
    response = size / (size.mean(-1, keepdim=True) + 1e-6)
    return torch.addcmul(module.beta, x, 1 + module.gamma * response)


# --- attention -----------------------------------------------------------------------------------------
class _Attention(Mixin):
    """Attention of the plain processor, on views of the products (arimg.ops.row_interval_attention)."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        module: Any = self
        other = attention_mask is not None or kwargs or hidden_states.dim() != 3
        if other or not _has_plain_processor(module) or not usual(hidden_states):
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, encoder_hidden_states, attention_mask, **kwargs
            )
        return _attention(module, hidden_states, encoder_hidden_states)


def _has_plain_processor(module: Any) -> bool:
    return type(module.processor).__name__ == "AttnProcessor2_0"


def _attention(module: Any, x: Tensor, text: Tensor | None) -> Tensor:
    """x [B, L, C]; text [B, K, D], or None for attention among the rows of x."""
    seen = x if text is None else text
    products = module.to_q(x), module.to_k(seen), module.to_v(seen)
    q, k, v = (p.unflatten(2, (module.heads, -1)).transpose(1, 2) for p in products)
    out = ops.row_interval_attention(q, k, v, *_every_key(x.shape[1], seen.shape[1]))
    out = out.transpose(1, 2).flatten(2)
    for layer in module.to_out:
        out = layer(out)
    return out


@cache
def _every_key(rows: int, keys: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return torch.zeros(rows, dtype=torch.int32), torch.full((rows,), keys, dtype=torch.int32)


# --- what sees the text alone --------------------------------------------------------------------------
_kept: WeakKeyDictionary[Any, tuple[Any, Tensor, Tensor]] = WeakKeyDictionary()


class _KeptLinear(Mixin):
    """Gives its last result where input and weights are the last ones, compared by their values."""

    def forward(self, input: Tensor) -> Tensor:
        module: Any = self
        weights = list(module.parameters())
        # A kept result may be an inference tensor, of which no gradient can be taken.
        if torch.is_grad_enabled() or not usual(input, *weights):
            return super().forward(input)  # type: ignore[misc, no-any-return]
        digest = [(source_of(w), _digest(w)) for w in weights]
        last = _kept.get(module)
        if last is None or last[0] != digest or not torch.equal(last[1], input):
            last = _kept[module] = (digest, input.clone(), super().forward(input))  # type: ignore[misc]
        return last[2]

    def _arimg_release(self) -> None:
        super()._arimg_release()
        _kept.pop(self, None)


def _digest(weight: Tensor) -> int:
    """The sum of a weight's bits, eight bytes at a time: read at memory speed, a twentieth of the product.

    A version counter alone would miss changes by way of `.data`, as those of merged adapters.
    """
    return int(weight.detach().reshape(-1).view(torch.int64).sum())


def _has_digest(linear: nn.Linear) -> bool:
    return all(p.nbytes % 8 == 0 for p in linear.parameters())


# --- recognition ---------------------------------------------------------------------------------------
class _Part(NamedTuple):
    """A kind of part: what takes its place, and inputs of which the results are compared."""

    mixin: type[Mixin]
    compute: Callable[..., Tensor]
    inputs: Callable[[Any], tuple[Tensor, ...]]
    note: str


def _random(weight: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)


def _norm_inputs(module: Any) -> tuple[Tensor, ...]:
    outputs, channels = module.linear.weight.shape
    return tuple(_random(module.linear.weight, *shape) for shape in ((1, 3, outputs // 2), (1, channels)))


def _attention_inputs(module: Any) -> tuple[Tensor, ...]:
    channels = (module.to_q.in_features, module.to_k.in_features)
    return tuple(_random(module.to_q.weight, 1, 3, c) for c in channels[: 1 + module.is_cross_attention])


_PARTS = {
    "AdaLayerNormContinuous": _Part(_AdaNorm, _ada_norm, _norm_inputs, "norm and modulation in one pass"),
    "GlobalResponseNorm": _Part(
        _ResponseNorm,
        _response_norm,
        lambda module: (_random(module.gamma, 1, 2, 2, module.gamma.shape[-1]),),
        "two passes",
    ),
    "Attention": _Part(
        _Attention,
        lambda module, x, text=None: _attention(module, x, text),
        _attention_inputs,
        "attention on views of the products",
    ),
}


def recognise_uvit(report: Report, path: str, module: nn.Module) -> bool:
    if not module._modules.keys() >= _NAMES:
        return False
    for name, part in module.named_modules():
        where = f"{path}.{name}".lstrip(".")
        kind = _PARTS.get(type(part).__name__)
        if kind is not None and _is_ours(part, kind):
            report.swap(part, kind.mixin, where, kind.note)
        elif kind is not None:
            report.keep(part, where, f"expected what computes the same as {type(part).__name__}, on the CPU")
        elif type(part) is nn.Linear:
            _replace_linear(report, module, name, where, part)
    return True


def _replace_linear(report: Report, model: nn.Module, name: str, path: str, linear: nn.Linear) -> None:
    owner, _, leaf = name.rpartition(".")
    of_text = leaf in ("to_k", "to_v") and getattr(model.get_submodule(owner), "is_cross_attention", False)
    if (of_text or leaf == "kv_mapper") and _has_digest(linear):
        report.swap(linear, _KeptLinear, path, "computed anew where the text or the weights have changed")
    elif leaf == "cond_embeds_mapper" or (leaf == "linear" and owner.endswith(("norm1", "norm2", "norm3"))):
        replace_linear(report, path, linear)


def _is_ours(module: Any, part: _Part) -> bool:
    """Whether ours gives the part's result for a few random tokens."""
    try:
        with probe.evaluating(module):
            inputs = part.inputs(module)
            if not usual(inputs[0]) or (part.mixin is _Attention and not _has_plain_processor(module)):
                return False
            return probe.close(part.compute(module, *inputs), type(module).forward(module, *inputs))
    except probe.FAILURES:
        return False
