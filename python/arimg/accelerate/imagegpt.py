"""Blocks of ImageGPT in the package transformers: GPT-2 with norms that take no mean away and weights [I, O].

A model is known by wte, wpe, h and ln_f; a block by ln_1, attn (c_attn, c_proj), ln_2 and mlp (c_fc, act,
c_proj). The weights lie in the order of inputs, in which torch reads those of float32 for one row at nearly
full speed: products are its own, but for copies (`dtype`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arimg.accelerate import probe
from arimg.accelerate.decode_step import Slot, Step, attend, find_slot, find_step
from arimg.accelerate.few_rows import copies, fits, is_plain, product, release, rms_norm, weight_of
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin
from arimg.accelerate.view import Storage

_BLOCK = {"ln_1", "attn", "ln_2", "mlp"}
_NOTE = "steps of a token: fused norms, attention over the keys that are there; products on copies only"


class _Parts(NamedTuple):
    attn: Any
    qkv: Any
    out: Any
    up: Any
    down: Any
    norm1: Any
    norm2: Any
    mlp: Any

    @property
    def products(self) -> tuple[Any, ...]:
        return self[1:5]


def _parts(block: Any) -> _Parts:
    children = block._modules
    attn, mlp = children["attn"], children["mlp"]
    a, m = attn._modules, mlp._modules
    return _Parts(
        attn, a["c_attn"], a["c_proj"], m["c_fc"], m["c_proj"], children["ln_1"], children["ln_2"], mlp
    )


def _run(p: _Parts, x: Tensor, attention: Callable[[Tensor], Tensor], storage: Storage) -> Tensor:
    """Rows x [M, C] -> [M, C]; attention takes [M, 3 H, D] and gives [M, C]."""
    qkv = _product(p.qkv, rms_norm(x, p.norm1.weight, p.norm1.eps), storage)
    a = attention(qkv.view(len(x), -1, p.attn.head_dim))
    h = _product(p.out, a, storage, x)
    y = p.mlp.act(_product(p.up, rms_norm(h, p.norm2.weight, p.norm2.eps), storage))
    return _product(p.down, y, storage, h)


def _product(conv: Any, x: Tensor, storage: Storage, residual: Tensor | None = None) -> Tensor:
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    if copies(storage, x):
        return product(x, weight_of(conv, storage, weight, turned=True), bias, residual=residual)
    y = torch.addmm(bias, x, weight)
    return y if residual is None else y.add_(residual)


class _Block(Mixin):
    """One new token for each row on a cache of transformers. All else is the original's."""

    weights_storage: Storage

    def forward(
        self, hidden_states: Tensor, layer_past: Any = None, attention_mask: Tensor | None = None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        others = any(a is not None for a in args) or any(
            value is not None and value is not False for name, value in kwargs.items() if name != "use_cache"
        )
        place = None if others else _place(self, hidden_states, layer_past, attention_mask)
        if place is None:
            return super().forward(hidden_states, layer_past, attention_mask, *args, **kwargs)  # type: ignore[misc]
        parts, slot, step = place
        scale = _scale(parts.attn)

        def attention(qkv: Tensor) -> Tensor:
            return attend(qkv[:, None], slot, step, scale).view(len(qkv), -1)

        out = _run(parts, hidden_states.flatten(1).contiguous(), attention, self.weights_storage)
        return out[:, None], None

    def _arimg_release(self) -> None:
        super()._arimg_release()
        release(self)  # type: ignore[arg-type]


def _scale(attn: Any) -> float:
    scale = attn.head_dim**-0.5 if attn.scale_attn_weights else 1.0
    return scale / (attn.layer_idx + 1) if attn.scale_attn_by_inverse_layer_idx else scale


def _place(block: Any, x: Tensor, store: Any, mask: Tensor | None) -> tuple[_Parts, Slot, Step] | None:
    if x.dim() != 3 or x.shape[1] != 1 or block.training:
        return None
    p, batch = _parts(block), len(x)
    attn, parts = p.attn, (p.attn, *p.products, p.norm1, p.norm2, p.mlp, p.mlp.act)
    if not all(map(is_plain, parts)) or not all(_is_product(conv) for conv in p.products):
        return None
    if not fits(x, *(m._parameters["weight"] for m in (*p.products, p.norm1, p.norm2))):
        return None
    if torch.is_grad_enabled() and any(w.requires_grad for w in block.parameters()):
        return None
    slot = find_slot(store, attn.layer_idx, (batch, attn.num_heads, 1, attn.head_dim), x)
    if slot is None or slot.start >= attn.bias.shape[-1]:
        return None
    step = find_step(slot, batch, 1, mask, None)
    return None if step is None else (p, slot, step)


def _is_product(module: Any) -> bool:
    parameters = module._parameters
    return type(module).__name__ == "Conv1D" and parameters.keys() == {"weight", "bias"}


def recognise_imagegpt(report: Report, path: str, module: nn.Module) -> bool:
    children = dict(module.named_children())
    blocks = children.get("h")
    if not {"wte", "wpe", "ln_f"} <= children.keys() or not isinstance(blocks, nn.ModuleList):
        return False
    reason = next((f"block {i}: {r}" for i, block in enumerate(blocks) if (r := _unsuited(block))), "")
    if not reason and not (len(blocks) and _is_ours(blocks[0])):
        reason = "expected the arithmetic of an ImageGPT block"
    if reason:
        report.keep(module, path, reason)
        return True
    for i, block in enumerate(blocks):
        weights = [conv.weight for conv in _parts(block).products]
        report.swap_copied(block, _Block, f"{path}.h.{i}".lstrip("."), _NOTE, weights, turned=True)
    return True


def _unsuited(block: Any) -> str:
    """Why the block is not of the kind, or nothing."""
    names = {name for name, _ in block.named_children()}
    if names != _BLOCK:
        return f"expected {', '.join(sorted(_BLOCK))}, got {', '.join(sorted(names))}"
    for norm in (block.ln_1, block.ln_2):
        if [name for name, _ in norm.named_parameters()] != ["weight"] or not hasattr(norm, "eps"):
            return "expected norms with a weight alone"
    if not all(_is_product(conv) for conv in _parts(block).products):
        return "expected products of Conv1D"
    attn, needed = block.attn, ("head_dim", "num_heads", "layer_idx", "config", "scale_attn_weights", "bias")
    if not all(hasattr(attn, name) for name in (*needed, "scale_attn_by_inverse_layer_idx")):
        return f"expected an attention with {', '.join(needed)}"
    return probe.unsuited_attention(attn.c_attn.weight, attn.config, attn.head_dim)


def _is_ours(block: Any) -> bool:
    """Whether ours gives the block's result for three tokens without a cache."""
    attn = block.attn
    x, mask = probe.tokens(attn.c_attn.weight, len(attn.c_attn.weight))
    slot = probe.empty_slot(x, attn.num_heads, attn.head_dim)
    step = find_step(slot, 1, x.shape[1], mask, None)
    assert step is not None

    def attention(qkv: Tensor) -> Tensor:
        return attend(qkv[None], slot, step, _scale(attn))[0].flatten(1)

    try:
        with probe.evaluating(block):
            given = type(block).forward(block, x)[0]
            return probe.equal(_run(_parts(block), x[0], attention, None)[None], given, x)
    except probe.FAILURES:
        return False
