"""A model of ours over the parameters of a model of theirs with the same parameter names.

The parameters are shared, not copied: both see every change of them. A parameter that was replaced (by
`load_state_dict(assign=True)` or a move that does not work in place) is shared anew at the next use. A view
of another dtype keeps copies, made anew where the original has changed.
"""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

View = TypeVar("View", bound=nn.Module)
_views: WeakKeyDictionary[nn.Module, dict[torch.dtype | None, nn.Module]] = WeakKeyDictionary()


def view_of(module: nn.Module, build: Callable[[Any], View], dtype: torch.dtype | None = None) -> View:
    """The view of this module, built at the first use; raises ValueError where names or shapes differ.

    dtype: the view has its own copies of this type, made anew when a parameter has changed.
    """
    kinds = _views.setdefault(module, {})
    if dtype not in kinds:
        with torch.device("meta"):
            kinds[dtype] = build(module)
    view = kinds[dtype]
    _share(view, module, dtype)
    return view.train(module.training)  # type: ignore[return-value]


def misfit(module: nn.Module, build: Callable[[Any], nn.Module]) -> str:
    """Why the view does not fit the module, or nothing."""
    try:
        view_of(module, build)
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        return str(error)
    return ""


def _share(view: nn.Module, module: nn.Module, dtype: torch.dtype | None) -> None:
    """Puts the parameters of `module` into `view`, name for name; buffers that the view has follow too."""
    theirs = dict(module.named_parameters())
    theirs_buffers = dict(module.named_buffers())
    for name, own in list(view.named_parameters()):
        given = theirs.get(name)
        if given is None:
            raise ValueError(f"expected a parameter {name!r} {list(own.shape)}, found none")
        if given.shape != own.shape:
            raise ValueError(f"expected {name!r} of shape {list(own.shape)}, got {list(given.shape)}")
        owner, _, leaf = name.rpartition(".")
        view.get_submodule(owner)._parameters[leaf] = (
            given if dtype is None else _converted(given, own, dtype)
        )
    for name, _ in list(view.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name in theirs_buffers:
            view.get_submodule(owner)._buffers[leaf] = theirs_buffers[name]


def _converted(given: nn.Parameter, own: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if given.dtype == dtype:
        return given
    # An inference tensor has no version; it cannot change in place outside inference mode either.
    version = 0 if given.is_inference() else given._version
    source = (id(given), given.data_ptr(), version, given.device)
    if getattr(own, "_arimg_source", None) == source and own.dtype == dtype:
        return own
    copy = nn.Parameter(given.detach().to(dtype), requires_grad=False)
    copy._arimg_source = source  # type: ignore[attr-defined]
    return copy
