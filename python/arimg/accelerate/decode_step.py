"""A step of a few new tokens on the caches of the package transformers, which stay the caller's.

`Step` is what the layers of one forward pass share: rotations, and the keys that are seen. `Slot` is where
one layer's keys and values lie: in a StaticLayer's own tensors, or for a DynamicLayer in tensors with room,
of which its `keys` and `values` are the filled part, instead of new tensors for each token.
"""

import threading
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from arimg import _library
from arimg.reference.kv_cache import Rope

_ROOM = 32  # tokens that a grown cache has place for


@dataclass
class _Buffer:
    """Keys and values [B, H, capacity, D] with `filled` tokens that will not be written again."""

    k: Tensor
    v: Tensor
    filled: int


_buffers: WeakKeyDictionary[Any, _Buffer] = WeakKeyDictionary()


class Slot(NamedTuple):
    """k, v [B, H, capacity, D] with `start` tokens; `layer` is the cache's own object for them."""

    k: Tensor
    v: Tensor
    start: int
    capacity: int  # of the cache as its owner sees it: the number of keys in a mask; 0 if it grows
    layer: Any


def find_slot(
    store: Any, index: int, shape: tuple[int, int, int, int], x: Tensor, of_pass: Tensor | None = None
) -> Slot | None:
    """The place for new keys of shape [B, H, L, D] and x's type in layer `index`, or None.

    None: a cache that is not known, or one that holds nothing yet, whose first tokens are the original's.
    of_pass: a tensor that is made anew for each forward pass and given to all its layers; without one a
    StaticCache on a GPU is not known.
    """
    if _kind(store.__class__) not in ("DynamicCache", "StaticCache") or store.offloading:
        return None
    if not 0 <= index < len(store.layers):
        return None
    layer = store.layers[index]
    keys = getattr(layer, "keys", None)
    batch, heads, tokens, dim = shape
    if not isinstance(keys, Tensor) or keys.dim() != 4 or layer.values.shape != keys.shape:
        return None
    if (
        keys.shape[:2] != (batch, heads)
        or keys.shape[3] != dim
        or keys.dtype != x.dtype
        or keys.device != x.device
    ):
        return None
    if keys.requires_grad or (keys.is_inference() and not torch.is_inference_mode_enabled()):
        return None
    kind = _kind(layer.__class__)
    if kind == "DynamicLayer":
        return _dynamic_slot(layer, tokens)
    if kind == "StaticLayer" and isinstance(getattr(layer, "cumulative_length", None), Tensor):
        start, capacity = _length_of(store, index, layer.cumulative_length, of_pass), keys.shape[2]
        ready = start is not None and start + tokens <= capacity
        ready = ready and keys.is_contiguous() and layer.values.is_contiguous()
        return Slot(keys, layer.values, cast(int, start), capacity, layer) if ready else None
    return None


class _Length(threading.local):
    """How many tokens all layers of a StaticCache held before the newest pass over it, read once for all of
    them (as transformers does): each reading waits for the GPU. given: weak references to the cache and to
    a tensor of the pass; asked: the layers that know it.
    """

    given: tuple[Any, ...] = ()
    asked: tuple[int, ...] = ()
    value: int = 0


_length = _Length()


def _length_of(store: Any, index: int, length: Tensor, of_pass: Tensor | None) -> int | None:
    if length.is_cpu:
        return int(length)
    if of_pass is None:
        return None
    same = bool(_length.given) and all(ref() is t for ref, t in zip(_length.given, (store, of_pass)))
    if not same or index in _length.asked:
        _length.given, _length.asked = (weakref.ref(store), weakref.ref(of_pass)), ()
        _length.value = int(length)
    _length.asked += (index,)
    return _length.value


@cache
def _kind(cls: Any) -> str:
    """The name of a class of transformers' caches."""
    return cls.__name__ if cls.__module__ == "transformers.cache_utils" else ""


def _dynamic_slot(layer: Any, tokens: int) -> Slot:
    """The tensors behind a growing layer, with room for the tokens.

    They are used on only where the layer's keys are all that was ever written to them: a cache that was
    cropped, reordered, copied or written by the original code gets new ones.
    """
    start = layer.keys.shape[2]
    buffer = _buffers.get(layer)
    if not (
        buffer is not None
        and buffer.filled == start
        and start + tokens <= buffer.k.shape[2]
        and _is_part(layer.keys, buffer.k)
        and _is_part(layer.values, buffer.v)
    ):
        buffer = _Buffer(_grown(layer.keys, tokens), _grown(layer.values, tokens), start)
    return Slot(buffer.k, buffer.v, start, 0, layer)


def _is_part(keys: Tensor, whole: Tensor) -> bool:
    return keys.data_ptr() == whole.data_ptr() and keys.stride() == whole.stride() and len(keys) == len(whole)


def _grown(keys: Tensor, tokens: int) -> Tensor:
    batch, heads, length, dim = keys.shape
    out = keys.new_empty(batch, heads, length + tokens + _ROOM, dim)
    out[:, :, :length] = keys
    return out


def _store(slot: Slot, tokens: int) -> None:
    """Tells the cache of the tokens that are in its tensors now."""
    if slot.capacity:
        slot.layer.cumulative_length.add_(tokens)
        return
    filled = slot.start + tokens
    _buffers[slot.layer] = _Buffer(slot.k, slot.v, filled)
    slot.layer.keys, slot.layer.values = slot.k[:, :, :filled], slot.v[:, :, :filled]


class Step(NamedTuple):
    """rope: rotations of row rope_index[b, t], if any. intervals: the keys that query [b, t] sees, int32
    [B, L] each, or None: all of them.
    """

    rope: Rope | None
    rope_index: Tensor | None
    intervals: tuple[Tensor, Tensor] | None


def attend(qkv: Tensor, slot: Slot, step: Step, scale: float) -> Tensor:
    """Appends to the cache and attends to it: qkv [B, L, Hq + 2 Hkv, D] contiguous -> [B, L, Hq, D].

    The operators behind `arimg.ops.append_` and `cached_attention` without their checks, which take as long.
    """
    operators: Any = _library.ops()
    k, v, start, tokens = slot.k, slot.v, slot.start, qkv.shape[1]
    cos, sin = (None, None) if step.rope is None else step.rope[:2]
    q = operators.append_(
        k, v, None, None, qkv, start, None, None, 0, None, None, 0.0, cos, sin, step.rope_index, False
    )
    seen = start + tokens
    if step.intervals is None:
        out = operators.cached_attention(q, k, v, seen, *[None] * 7, scale)
    else:
        none, new = (k[:, :, :0], v[:, :, :0]), (k[:, :, :seen], v[:, :, :seen])
        out = operators.cached_attention(q, *none, 0, None, None, *new, *step.intervals, None, scale)
    _store(slot, tokens)
    return cast(Tensor, out)


class _Memo(threading.local):
    """The last step, which the next layer asks for again."""

    key: tuple[Any, ...] = ()
    tensors: tuple[Any, ...] = ()
    step: Step | None = None


_memo = _Memo()


def find_step(
    slot: Slot, batch: int, tokens: int, mask: Tensor | None, rotations: tuple[Tensor, Tensor] | None
) -> Step | None:
    """What the layers share; None where the mask or the rotations are something else than expected."""
    given = (mask, None, None) if rotations is None else (mask, *rotations)
    key = (slot.start, slot.capacity, batch, tokens, *(_version(t) for t in given))
    same = key == _memo.key and all(ref() is t for ref, t in zip(_memo.tensors, given))
    if not same:
        step = _new_step(slot, batch, tokens, mask, rotations)
        _memo.key, _memo.tensors, _memo.step = key, tuple(_reference(t) for t in given), step
    return _memo.step


def _reference(t: Tensor | None) -> Any:
    return weakref.ref(t) if t is not None else lambda: None


def _version(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version


def _new_step(
    slot: Slot, batch: int, tokens: int, mask: Tensor | None, rotations: tuple[Tensor, Tensor] | None
) -> Step | None:
    rope = index = intervals = None
    if rotations is not None:
        found = _rope(rotations, batch, tokens, slot.k.shape[3])
        if found is None:
            return None
        rope, index = found
    if mask is not None:
        seen = _seen_keys(mask, batch, tokens, slot.start + tokens, slot.capacity or slot.start + tokens)
        if seen is None:
            return None
        if not (tokens == 1 and seen.all_of_them):
            intervals = seen[:2]
    elif tokens > 1 or slot.capacity:  # no mask means causal in some places and all keys in others
        return None
    return Step(rope, index, intervals)


def _rope(rotations: tuple[Tensor, Tensor], batch: int, tokens: int, dim: int) -> tuple[Rope, Tensor] | None:
    """Tables and rows of the cosines and sines of each token, [B or 1, L, D] with two equal halves."""
    half = dim // 2
    for t in rotations:
        if t.dim() != 3 or t.shape[0] not in (1, batch) or t.shape[1:] != (tokens, dim):
            return None
    both = torch.cat([t.reshape(-1, dim) for t in rotations])
    if not torch.equal(both[:, :half], both[:, half:]):
        return None
    cos, sin = (t[..., :half].reshape(-1, half).float().contiguous() for t in rotations)
    index = torch.arange(len(cos), dtype=torch.int32, device=cos.device).view(-1, tokens)
    return Rope(cos, sin, interleaved=False), index


class _Seen(NamedTuple):
    """The first and the last + 1 of the keys that each query sees, int32 [B, L]; all_of_them: every query
    sees every key.
    """

    first: Tensor
    last: Tensor
    all_of_them: bool


def _seen_keys(mask: Tensor, batch: int, tokens: int, end: int, keys: int) -> _Seen | None:
    """Which of the first `end` keys are seen, or None unless they are one run for each query.

    mask [B or 1, 1, L, keys]: bool, or a number to add that is 0 or the lowest there is.
    """
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, tokens, keys):
        return None
    rows = mask[:, 0]
    if rows.dtype == torch.bool:
        seen, known = rows, torch.ones_like(rows)
    elif rows.is_floating_point():
        seen = rows == 0
        known = seen | (rows <= torch.finfo(rows.dtype).min)
    else:
        return None
    number = seen.int()
    first, last = number.argmax(-1), keys - number.flip(-1).argmax(-1)
    runs = (number.sum(-1) == last - first) & (last <= end) & seen.any(-1) & known.all(-1)
    fine, latest, earliest = torch.stack((runs.all().long(), first.max(), last.min())).tolist()  # one wait
    if not fine:
        return None
    first, last = (t.int().expand(batch, tokens).contiguous() for t in (first, last))
    return _Seen(first, last, latest == 0 and earliest == end)
