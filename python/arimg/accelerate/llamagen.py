"""The released LlamaGen code (arXiv 2406.06525): the transformer behind `generate`, for classes and texts.

A text's places that `emb_masks` hides are columns of the original's `causal_mask` which no other token sees;
they are read off it once per generation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.accelerate.graphs import Graphed, GraphedStep, Graphs, tensors_of
from arimg.accelerate.report import Report
from arimg.accelerate.swap import has_hooks
from arimg.accelerate.view import Storage, bytes_of_codes, misfit, parameters_of, view_of
from arimg.generators import TextLlamaGen
from arimg.generators.llamagen import Decoder, LlamaGen
from arimg.ops._common import FLOATING
from arimg.reference.kv_cache import Rope

_GENERATOR = {"cls_embedding", "tok_embeddings", "layers", "norm", "output"}


class _Mask(NamedTuple):
    """The original's causal mask as it was looked at. Row b sees itself and, of the keys before it, those up
    to first[b] and from start[b] on, int32 [B] each; None: all.
    """

    given: Tensor
    version: int
    suits: bool
    first: Tensor | None = None
    start: Tensor | None = None

    def is_current(self, module: Any) -> bool:
        given = module.causal_mask
        return given is self.given and _version(given) == self.version


class _Plan(NamedTuple):
    """What the steps of a generation share; made anew at the first step of each, but for what graphs hold."""

    decoder: Decoder
    rope: Rope
    caches: list[Any]
    mask: _Mask
    graphed: GraphedStep | None  # (x, position [1, 1]) -> logits


_plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()


def _view(module: Any) -> LlamaGen:
    """Ours for a Transformer, without its weights."""
    first = module.layers[0].attention
    epsilons = {n.eps for layer in module.layers for n in (layer.attention_norm, layer.ffn_norm)}
    if epsilons != {module.norm.eps}:
        raise ValueError(f"expected one epsilon of all norms, got {sorted(epsilons | {module.norm.eps})}")
    vocabulary, layers = module.tok_embeddings.num_embeddings, len(module.layers)
    sizes: dict[str, Any] = dict(
        width=module.tok_embeddings.embedding_dim,
        heads=first.n_head,
        kv_heads=first.n_kv_head,
        hidden=module.layers[0].feed_forward.w1.out_features,
        eps=module.norm.eps,
    )
    if _reads_text(module):
        places, width = module.cls_embedding.uncond_embedding.shape
        return TextLlamaGen(vocabulary, places, width, layers, **sizes)
    return LlamaGen(vocabulary, len(module.cls_embedding.embedding_table.weight) - 1, layers, **sizes)


def _reads_text(module: Any) -> bool:
    return getattr(module, "model_type", "c2i") == "t2i"


class _Generator(Graphed):
    """One token for each row of a batch, from the caches that the original code allocated."""

    weights_storage: Storage

    def _arimg_release(self) -> None:
        module: Any = self
        super()._arimg_release()
        _plans.pop(module, None)

    def setup_caches(self, max_batch_size: int, max_seq_length: int, dtype: torch.dtype) -> None:
        module: Any = self
        super().setup_caches(max_batch_size, max_seq_length, dtype)  # type: ignore[misc]
        _plans.pop(module, None)
        if module.graphs is not None:
            _put_back(module, module.graphs)

    def forward(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = self
        others = targets is not None or mask is not None or valid is not None
        if others or input_pos is None or not _is_step(module, idx, cond_idx, input_pos):
            return super().forward(idx, cond_idx, input_pos, targets, mask, valid)  # type: ignore[misc, no-any-return]
        x = module.tok_embeddings(idx) if cond_idx is None else module.cls_embedding(cond_idx, train=False)
        plan = _plans.get(module) if cond_idx is None else None
        caches = [layer.attention.kv_cache for layer in module.layers]
        if plan is None and has_hooks(module):  # as of the first step of a picture: they are many to ask
            return super().forward(idx, cond_idx, input_pos)  # type: ignore[misc, no-any-return]
        same = plan is not None and plan.mask.is_current(module)
        if plan is None or not same or any(a is not b for a, b in zip(caches, plan.caches)):
            plan = _new_plan(module)
        if not plan.mask.suits or not _fits(x, caches[0].k_cache, plan):
            return super().forward(idx, cond_idx, input_pos)  # type: ignore[misc, no-any-return]
        if plan.graphed is not None:
            return plan.graphed(x, input_pos.to(x.device, torch.int32).view(1, 1))[0], None
        return _step(plan, x, *_place(input_pos, len(x))), None


def _step(plan: _Plan, x: Tensor, start: int, positions: Tensor | None, length: int | Tensor) -> Tensor:
    """Logits of the next token, whose keys and values join the caches."""
    at, seen = (start, length) if positions is None else (positions.flatten(), None)
    first, new = plan.mask.first, None
    if plan.mask.start is not None:
        begin = plan.mask.start.clamp(max=at)[:, None]
        new = begin, torch.zeros_like(begin) + (at + 1)
        first = None if first is None else first.clamp(max=at)

    def attend(i: int, qkv: Tensor) -> Tensor:
        k, v = plan.caches[i].k_cache, plan.caches[i].v_cache
        q = ops.append_(k, v, qkv, start, positions=positions, rope=plan.rope)
        if new is None:
            return ops.cached_attention(q, k, v, length)
        before = (k[:, :, :0], v[:, :, :0], 0) if first is None else (k, v, first)
        own = k[:, :, :seen], v[:, :, :seen]
        return ops.cached_attention(q, *before, k_new=own[0], v_new=own[1], new_intervals=new)

    return plan.decoder.run(x, attend)


def _with_graphs(plan: _Plan, module: Any) -> _Plan:
    """The plan with the graphs of the picture before, where these read the same memory, or with new ones."""
    kept: _Plan | None = module.graphs.kept.get(module)
    if kept is not None and _continues(kept, plan):
        torch._foreach_copy_(_constants(kept), _constants(plan))
        mask = plan.mask._replace(first=kept.mask.first, start=kept.mask.start)
        plan = kept._replace(mask=mask)
    else:
        plan = plan._replace(graphed=_graphed(plan, module.graphs))
    module.graphs.kept[module] = plan
    return plan


def _graphed(plan: _Plan, graphs: Graphs) -> GraphedStep:
    """The step with its position on the device."""
    weights = _weights(plan.decoder)

    def step(x: Tensor, position: Tensor) -> tuple[Tensor]:
        return (_step(plan, x, 0, position, (position + 1).flatten().expand(len(x))),)

    return graphs.step(step, lambda: weights + _stored(plan.caches))


def _weights(decoder: Decoder) -> list[Tensor]:
    """The matrices that products read."""
    return tensors_of([w[1:3] + w[4:] for w in decoder.layers] + [decoder.output])


def _constants(plan: _Plan) -> list[Tensor]:
    """What each picture computes anew, for graphs at one place."""
    norms = [(w.norm1, w.norm2) for w in plan.decoder.layers]
    return tensors_of([norms, plan.decoder.norm, plan.rope, plan.mask.first, plan.mask.start])


def _stored(caches: Sequence[Any]) -> list[Tensor]:
    return [t for cache in caches for t in (cache.k_cache, cache.v_cache)]


def _continues(kept: _Plan, plan: _Plan) -> bool:
    """Whether the kept plan's graphs, given the constants of the other, do its steps."""
    theirs, ours = [*kept.caches, *_weights(kept.decoder)], [*plan.caches, *_weights(plan.decoder)]
    same = len(theirs) == len(ours) and all(a is b for a, b in zip(theirs, ours))
    return same and _kinds(_constants(kept)) == _kinds(_constants(plan))


def _kinds(tensors: list[Tensor]) -> list[Any]:
    return [(t.shape, t.dtype, t.device, t.is_inference()) for t in tensors]


def _put_back(module: Any, graphs: Graphs) -> None:
    """The caches that the graphs hold, emptied, in the place of new ones of their kind; or no graphs."""
    kept: _Plan | None = graphs.kept.get(module)
    if kept is None:
        return
    layers = [layer.attention for layer in module.layers]
    if _kinds(_stored([layer.kv_cache for layer in layers])) != _kinds(_stored(kept.caches)):
        del graphs.kept[module]
        return
    torch._foreach_zero_(_stored(kept.caches))
    for layer, cache in zip(layers, kept.caches):
        layer.kv_cache = cache


def _is_step(module: Any, idx: Tensor | None, cond_idx: Tensor | None, input_pos: Tensor) -> bool:
    """Whether this is one token for each row, on caches that are there."""
    given = cond_idx if idx is None else idx
    if cond_idx is not None and _reads_text(module):  # the text: many rows, once
        return False
    if given is None or (idx is not None and cond_idx is not None) or input_pos.numel() != 1:
        return False
    if module.training or torch.compiler.is_compiling() or torch.is_autocast_enabled(given.device.type):
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters_of(module).values()):
        return False
    return getattr(module, "causal_mask", None) is not None


def _place(input_pos: Tensor, batch: int) -> tuple[int, Tensor | None, int | Tensor]:
    """Start and positions for `append_`, and the length then; nothing waits for a GPU."""
    if input_pos.device.type == "cpu":
        at = int(input_pos)
        return at, None, at + 1
    return 0, input_pos.int().view(1, 1), (input_pos + 1).int().expand(batch)


def _version(t: Tensor) -> int:
    """Counts the changes of a tensor in place; an inference tensor has no such count."""
    return 0 if t.is_inference() else t._version


def _new_plan(module: Any) -> _Plan:
    storage, table = module.weights_storage, module.freqs_cis
    if isinstance(storage, torch.dtype) and module.output.weight.dtype != torch.float32:
        storage = None
    view = view_of(module, _view, storage)
    rope = Rope(table[..., 0].contiguous(), table[..., 1].contiguous())
    caches = [layer.attention.kv_cache for layer in module.layers]
    plan = _Plan(Decoder(view), rope, caches, _look_at(module.causal_mask), None)
    if plan.mask.suits and module.graphs is not None and module.graphs.usable(plan.decoder.norm.device):
        plan = _with_graphs(plan, module)
    _plans[module] = plan
    return plan


def _look_at(mask: Tensor) -> _Mask:
    """bool [B, L, L], expected to be causal but for hidden columns, one run of them in each row of the batch,
    and to have its diagonal.
    """
    refused = _Mask(mask, _version(mask), False)
    if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[1] != mask.shape[2]:
        return refused
    length = mask.shape[1]
    last, itself = mask[:, -1], torch.eye(length, dtype=torch.bool, device=mask.device)
    if not torch.equal(mask, (last[:, None] & torch.ones_like(itself).tril()) | itself):
        return refused
    hidden = (~last).int()
    number = hidden.sum(1)
    if not bool(number.any()):
        return refused._replace(suits=True)
    first, start = hidden.argmax(1), length - hidden.flip(1).argmax(1)
    start = torch.where(number > 0, start, 0)
    if not torch.equal(number, start - first):
        return refused
    some = first.int() if bool(first.any()) else None
    return _Mask(mask, refused.version, True, some, start.int())


def _fits(x: Tensor, k_cache: Tensor, plan: _Plan) -> bool:
    layer = plan.decoder.layers[0]
    heads = (layer.wqkv.shape[0] - layer.wo.shape[0]) // plan.decoder.head_dim // 2
    return (
        x.dim() == 3
        and x.shape[1] == 1
        and k_cache.shape[:2] == (len(x), heads)
        and len(plan.mask.given) == len(x)
        and k_cache.dtype == x.dtype in FLOATING
        and k_cache.device == x.device == plan.decoder.norm.device == plan.rope.cos.device
    )


def recognise_llamagen(report: Report, path: str, module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    if not (children >= _GENERATOR and hasattr(module, "setup_caches") and hasattr(module, "freqs_cis")):
        return False
    reason = _unsuited(module)
    if reason:
        report.keep(module, path, reason)
    else:
        note = "steps of one token: fused norms, products at the speed of reading their weights"
        if _reads_text(module):
            note += "; the original for the text, and for masks not causal minus one run of places a row"
        report.swap_generator(
            module, _Generator, path, note, lambda kind: bytes_of_codes(module, _view, kind)
        )
    return True


def _unsuited(module: Any) -> str:
    """Why our composition does not fit the module, or nothing."""
    if getattr(module, "model_type", "c2i") not in ("c2i", "t2i"):
        return f"expected a model for classes (c2i) or texts (t2i), got {module.model_type}"
    reason = misfit(module, _view)
    if reason:
        return reason
    extra = dict(module.named_parameters()).keys() - dict(view_of(module, _view).named_parameters()).keys()
    return f"unknown parameters {', '.join(sorted(extra)[:3])}" if extra else ""
