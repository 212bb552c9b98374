"""A model of ours over the parameters of a model of theirs with the same parameter names.

The parameters are shared, not copied: both see every change of them. A parameter that was replaced (by
`load_state_dict(assign=True)` or a move that does not work in place) is shared anew at the next use. A view
of another storage keeps copies, made anew where the original has changed.
"""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from arimg.nn.checkpoint import without_weights
from arimg.nn.packed_linear import PackedLinear, pack_weight
from arimg.reference.block_linear import QuantizedWeight

View = TypeVar("View", bound=nn.Module)
Storage = torch.dtype | str | None  # a type of all weights; "int8" or "int4" products; None: shared
_views: WeakKeyDictionary[nn.Module, dict[Storage, nn.Module]] = WeakKeyDictionary()


def view_of(module: nn.Module, build: Callable[[Any], View], storage: Storage = None) -> View:
    """The view of this module, built at the first use; raises ValueError where names or shapes differ.

    storage: the view has its own copies of this type, or its products (the view has a method `pack`) have
    codes; they are made anew when a parameter has changed.
    """
    kinds = _views.setdefault(module, {})
    if storage not in kinds:
        kinds[storage] = _without_weights(module, build, storage)
    view = kinds[storage]
    _share(view, module, storage)
    return view.train(module.training)  # type: ignore[return-value]


def forget(module: Any) -> None:
    """Gives back the memory of the module's views."""
    _views.pop(module, None)


def bytes_of_codes(module: nn.Module, build: Callable[[Any], nn.Module], storage: str) -> int:
    """What a view with codes takes beyond the module."""
    layers = _without_weights(module, build, storage).modules()
    return sum(b.nbytes for layer in layers if isinstance(layer, PackedLinear) for b in layer.buffers())


def bytes_of_code(weight: Tensor, storage: str) -> int:
    """What a copy of this weight [O, I] in codes takes."""
    packed = pack_weight(torch.empty_like(weight, device="meta"), storage)
    assert isinstance(packed, QuantizedWeight)
    return packed.codes.nbytes + packed.scales.nbytes


def misfit(module: nn.Module, build: Callable[[Any], nn.Module]) -> str:
    """Why the view does not fit the module, or nothing."""
    try:
        view_of(module, build)
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        return str(error)
    return ""


def _without_weights(module: nn.Module, build: Callable[[Any], View], storage: Storage) -> View:
    with without_weights():
        view = build(module)
        if isinstance(storage, str):
            view.pack(storage)  # type: ignore[operator]
    return view


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """By name; a replica of DataParallel has copies of them as plain attributes."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    for path, part in module.named_modules():
        for name in part.__dict__.get("_former_parameters", ()):
            found[f"{path}.{name}".lstrip(".")] = getattr(part, name)
    return found


def _share(view: nn.Module, module: nn.Module, storage: Storage) -> None:
    """Puts the parameters of `module` into `view`, name for name; buffers that the view has follow too."""
    theirs = parameters_of(module)
    theirs_buffers = dict(module.named_buffers())
    for name, own in list(view.named_parameters()):
        given = _given(theirs, name, own.shape)
        owner, _, leaf = name.rpartition(".")
        view.get_submodule(owner)._parameters[leaf] = (
            _converted(given, own, storage) if isinstance(storage, torch.dtype) else given  # type: ignore[assignment]
        )
    for name, _ in list(view.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        layer = view.get_submodule(owner)
        if name in theirs_buffers and not isinstance(layer, PackedLinear):
            layer._buffers[leaf] = theirs_buffers[name]
    if isinstance(storage, str):
        for path, layer in view.named_modules():
            if isinstance(layer, PackedLinear):
                shape = (layer.out_features, layer.in_features)
                _pack(layer, _given(theirs, f"{path}.weight", shape), storage)


def _given(theirs: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    given = theirs.get(name)
    if given is None:
        raise ValueError(f"expected a parameter {name!r} {list(shape)}, found none")
    if given.shape != shape:
        raise ValueError(f"expected {name!r} of shape {list(shape)}, got {list(given.shape)}")
    return given


def source_of(given: Tensor) -> tuple[object, ...]:
    """What a copy was made of; differs where the copy is out of date."""
    # An inference tensor has no version; it cannot change in place outside inference mode either.
    version = 0 if given.is_inference() else given._version
    return id(given), given.data_ptr(), version, given.device, given.dtype


def _converted(given: Tensor, own: nn.Parameter, dtype: torch.dtype) -> Tensor:
    if given.dtype == dtype:
        return given
    source = source_of(given)
    if getattr(own, "_arimg_source", None) == source and own.dtype == dtype:
        return own
    copy = nn.Parameter(given.detach().to(dtype), requires_grad=False)
    copy._arimg_source = source  # type: ignore[attr-defined]
    return copy


def _pack(layer: PackedLinear, given: Tensor, storage: str) -> None:
    source = source_of(given)
    if layer.__dict__.get("_arimg_source") == source:
        return
    packed = pack_weight(given.detach(), storage)
    assert isinstance(packed, QuantizedWeight)
    layer.weight, layer.scales = packed.codes, packed.scales
    layer._arimg_source = source  # type: ignore[assignment]
