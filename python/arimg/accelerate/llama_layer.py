"""Decoder layers of the Llama kind in the package transformers: Llama (in Janus), Chameleon, Emu3.

A model is known by layers, embed_tokens, norm and rotary_emb; a layer by self_attn (q_proj, k_proj, v_proj,
o_proj), mlp (gate_proj, up_proj, down_proj), input_layernorm and post_attention_layernorm. Names do not tell
all (scaled residuals, other norms): the first layer's result is compared with ours before any is replaced.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arimg.accelerate import probe
from arimg.accelerate.decode_step import Slot, Step, attend, find_slot, find_step
from arimg.accelerate.few_rows import (
    activation_name,
    copies,
    fits,
    is_plain,
    layer_norm,
    product,
    release,
    rms_norm,
    weight_of,
)
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin
from arimg.accelerate.view import Storage

_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LAYER = {"self_attn", "mlp", *_NORMS}
# Arguments without a say in a layer's result; others count where they are given.
_IGNORED = {"position_ids", "use_cache", "guidance_scale", "output_hidden_states", "logits_to_keep"}
STEPS_NOTE = (
    "steps of a few tokens: fused norms, products at the speed of reading their weights, "
    "attention over the keys that are there"
)
GPU_NOTE = "steps of a few tokens: fused norms, attention over the keys that are there; products are torch's"

Attend = Callable[[Tensor], Tensor]  # queries, keys and values of rows [M, Hq + 2 Hkv, D] -> [M, Hq D]


class _Parts(NamedTuple):
    attn: Any
    q: Any
    k: Any
    v: Any
    o: Any
    gate: Any
    up: Any
    down: Any
    norm1: Any
    norm2: Any
    mlp: Any

    @property
    def products(self) -> tuple[Any, ...]:
        return self[1:8]


def _parts(layer: Any) -> _Parts:
    children = layer._modules  # plain look-ups: those through the module take as long as a small product
    attn, mlp = children["self_attn"], children["mlp"]
    products = [attn._modules[name] for name in _PRODUCTS] + [mlp._modules[name] for name in _MLP]
    return _Parts._make((attn, *products, *(children[name] for name in _NORMS), mlp))


def _run(p: _Parts, x: Tensor, attention: Attend, storage: Storage, post_norm: bool) -> Tensor:
    """Rows x [M, C] -> [M, C]. post_norm: norms at the end of the branches instead of their beginning."""
    if post_norm:
        a = attention(_qkv(p, x, storage))
        h = _norm(p.norm1, _product(p.o, a, storage)).add_(x)
        return _norm(p.norm2, _product(p.down, _gated(p, h, storage), storage)).add_(h)
    a = attention(_qkv(p, _norm(p.norm1, x), storage))
    h = _product(p.o, a, storage, x)
    return _product(p.down, _gated(p, _norm(p.norm2, h), storage), storage, h)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm._parameters["weight"], norm.variance_epsilon)


def _product(linear: Any, x: Tensor, storage: Storage, residual: Tensor | None = None) -> Tensor:
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    return product(x, weight_of(linear, storage, weight), bias, residual=residual)


def _gated(p: _Parts, x: Tensor, storage: Storage) -> Tensor:
    gate, up = p.gate._parameters, p.up._parameters
    return product(
        x, weight_of(p.gate, storage, gate["weight"]), gate["bias"],
        factor=weight_of(p.up, storage, up["weight"]), factor_bias=up["bias"], activation="silu",
    )  # fmt: skip


def _qkv(p: _Parts, x: Tensor, storage: Storage) -> Tensor:
    """Queries, keys and values [M, Hq + 2 Hkv, D]: one product of a copy, three of shared weights."""
    linears = (p.q, p.k, p.v)
    if copies(storage, x):
        weight = weight_of(p.attn, storage, *(linear.weight for linear in linears))
        biases = [linear.bias for linear in linears]
        flat = product(x, weight, None if biases[0] is None else torch.cat(biases))
    else:
        flat = torch.cat([_product(linear, x, None) for linear in linears], -1)
    qkv = flat.view(len(x), -1, p.attn.head_dim)
    norms = p.attn._modules
    if "q_norm" not in norms:
        return qkv
    q, k = norms["q_norm"], norms["k_norm"]
    parts = qkv.split((len(q.weight), len(k.weight), len(k.weight)), 1)
    return torch.cat((_head_norm(q, parts[0]), _head_norm(k, parts[1]), parts[2]), 1)


def _head_norm(norm: Any, x: Tensor) -> Tensor:
    """Norm of each head [M, H, D] with weights of its own [H, D]."""
    return layer_norm(x, norm.weight, norm.bias, 1e-5)


class _DecoderLayer(Mixin):
    """A few new tokens on a cache of transformers. All else is the original's."""

    weights_storage: Storage
    post_norm: bool
    gives_tuple: bool

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = None if args else _place(self, hidden_states, **kwargs)
        if place is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        parts, slot, step = place
        batch, tokens, channels = hidden_states.shape

        def attention(qkv: Tensor) -> Tensor:
            out = attend(qkv.view(batch, tokens, *qkv.shape[1:]), slot, step, parts.attn.scaling)
            return out.view(batch * tokens, -1)

        rows = hidden_states.reshape(-1, channels).contiguous()
        out = _run(parts, rows, attention, self.weights_storage, self.post_norm).view(batch, tokens, channels)
        return (out,) if self.gives_tuple else out

    def _arimg_release(self) -> None:
        super()._arimg_release()
        release(self)  # type: ignore[arg-type]


def _place(
    layer: Any,
    x: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    position_embeddings: Any = None,
    **others: Any,
) -> tuple[_Parts, Slot, Step] | None:
    """Where this step's keys go and what they are rotated by, or None for the original."""
    if x.dim() != 3 or layer.training or not isinstance(position_embeddings, tuple):
        return None
    if any(others[name] is not None and others[name] is not False for name in others.keys() - _IGNORED):
        return None
    parts = _parts(layer)
    if not _untouched(layer, parts, x):
        return None
    (batch, tokens, _), attn = x.shape, parts.attn
    heads = len(parts.k._parameters["weight"]) // attn.head_dim
    shape = (batch, heads, tokens, attn.head_dim)
    slot = find_slot(cache, attn.layer_idx, shape, x, position_embeddings[0])
    step = slot and find_step(slot, batch, tokens, attention_mask, position_embeddings)
    return None if slot is None or step is None else (parts, slot, step)


def _untouched(layer: nn.Module, p: _Parts, x: Tensor) -> bool:
    """Whether the parts are still those that were recognised and suit x, and nobody listens to them."""
    if "_is_replica" in layer.__dict__:  # of DataParallel: its weights are no parameters
        return False
    if not all(type(linear) is nn.Linear and is_plain(linear) for linear in p.products):
        return False
    weights = [m._parameters["weight"] for m in (*p.products, p.norm1, p.norm2)]
    if not (is_plain(p.norm1) and is_plain(p.norm2) and is_plain(p.mlp) and fits(x, *weights)):
        return False
    if torch.is_grad_enabled() and any(w.requires_grad for w in layer.parameters()):
        return False
    kind, attn = p.attn.config._attn_implementation, p.attn
    if is_plain(attn):
        return kind in ("sdpa", "eager")
    # transformers records attentions by hooks of its own, which stay; with SDPA there are none to record.
    recorders = all(map(_records, attn._forward_hooks.values()))
    return kind == "sdpa" and recorders and not attn._forward_pre_hooks and "forward" not in attn.__dict__


def _records(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def recognise_llama_layers(report: Report, path: str, module: nn.Module) -> bool:
    children = dict(module.named_children())
    layers = children.get("layers")
    if not {"embed_tokens", "norm", "rotary_emb"} <= children.keys() or not isinstance(layers, nn.ModuleList):
        return False
    if not len(layers) or not all({n for n, _ in layer.named_children()} >= _LAYER for layer in layers):
        return False
    reason = _unsuited(layers)
    found = None if reason else _arrangement(layers[0])
    if found is None:
        reason = reason or "expected the arithmetic of a Llama layer, with norms before or after"
        report.keep(module, path, reason)
        return True
    post_norm, gives_tuple = found
    for i, layer in enumerate(layers):
        weights = [linear.weight for linear in _parts(layer).products]
        note = STEPS_NOTE if weights[0].device.type == "cpu" else GPU_NOTE
        report.swap_copied(
            layer, _DecoderLayer, f"{path}.layers.{i}".lstrip("."), note, weights,
            post_norm=post_norm, gives_tuple=gives_tuple,
        )  # fmt: skip
    return True


def _unsuited(layers: nn.ModuleList) -> str:
    """Why the layers are not of the kind, or nothing."""
    for i, layer in enumerate(layers):
        same = type(layer) is type(layers[0])
        reason = _unsuited_layer(layer) if same else f"expected a {type(layers[0]).__name__}"
        if reason:
            return f"layer {i}: {reason}"
    return ""


def _unsuited_layer(layer: Any) -> str:
    attn, mlp = layer.self_attn, layer.mlp
    known = (
        (layer, _LAYER | {"dropout"}),
        (attn, {*_PRODUCTS, "q_norm", "k_norm"}),
        (mlp, {*_MLP, "act_fn"}),
    )
    unknown = {name for owner, names in known for name, _ in owner.named_children() if name not in names}
    if unknown:
        return f"unknown parts {', '.join(sorted(unknown))}"
    for owner, name in [(attn, n) for n in _PRODUCTS] + [(mlp, n) for n in _MLP]:
        linear = getattr(owner, name, None)
        if type(linear) is not nn.Linear:
            return f"expected {name} to be a linear layer, got {type(linear).__name__}"
    if activation_name(getattr(mlp, "act_fn", None)) != "silu":
        return "expected SiLU in the MLP"
    if not all(hasattr(getattr(layer, name), "variance_epsilon") for name in _NORMS):
        return f"expected {' and '.join(_NORMS)} to be RMSNorms"
    if not all(hasattr(attn, name) for name in ("head_dim", "scaling", "layer_idx", "config")):
        return "expected an attention with head_dim, scaling, layer_idx and config"
    return probe.unsuited_attention(attn.q_proj.weight, attn.config, attn.head_dim)


def _arrangement(layer: Any) -> tuple[bool, bool] | None:
    """Whether norms come after the branches, and whether a tuple is given, as the layer's result tells."""
    weight, dim = layer.self_attn.q_proj.weight, layer.self_attn.head_dim
    x, mask = probe.tokens(weight, weight.shape[1])
    angle = torch.rand(1, 3, dim // 2, generator=torch.Generator().manual_seed(1)).mul(3).repeat(1, 1, 2)
    rotations = (angle.cos().to(weight), angle.sin().to(weight))
    try:
        with probe.evaluating(layer):
            theirs = type(layer).forward(layer, x, attention_mask=mask, position_embeddings=rotations)
            given = theirs[0] if isinstance(theirs, tuple) else theirs
            for post_norm in (False, True):
                if probe.equal(_alone(layer, x, mask, rotations, post_norm), given, x):
                    return post_norm, isinstance(theirs, tuple)
    except probe.FAILURES:
        pass
    return None


def _alone(layer: Any, x: Tensor, mask: Tensor, rotations: tuple[Tensor, Tensor], post_norm: bool) -> Tensor:
    """Our result for tokens x [1, L, C] without a cache of the caller's."""
    attn = layer.self_attn
    slot = probe.empty_slot(x, len(attn.k_proj.weight) // attn.head_dim, attn.head_dim)
    step = find_step(slot, 1, x.shape[1], mask, rotations)
    assert step is not None

    def attention(qkv: Tensor) -> Tensor:
        return attend(qkv[None], slot, step, attn.scaling)[0].flatten(1)

    return _run(_parts(layer), x[0], attention, None, post_norm)[None]
