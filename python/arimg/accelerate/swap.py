"""How a module, or a pipeline's scheduler, gets other methods: its class becomes a subclass of its own.

The subclass is `(mixin, original class)`, so a mixin overrides methods and reaches the original ones by
`super()`, and every check by `isinstance` still holds. Nothing is stored in the module: parameters, buffers,
hooks and the state dict are as before, `restore` leaves nothing behind, and copies (deepcopy, pickle,
DataParallel's replicas) are accelerated too.
"""

from typing import Any

from torch import nn

from arimg.accelerate.view import forget


class Mixin:
    """Base of all replacements. options: what `accelerate` was asked for, as attributes of the class."""

    _arimg: "tuple[type[Any], type[Mixin], tuple[tuple[str, Any], ...]]"

    def _arimg_release(self) -> None:
        """Gives back what is kept for the module elsewhere."""
        forget(self)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        """Where the weights move (`.to(...)`), what was kept of them is given back at once."""
        module: Any = self
        before = [p.data_ptr() for p in module.parameters()]
        moved = super()._apply(*arguments, **options)  # type: ignore[misc]
        if [p.data_ptr() for p in module.parameters()] != before:
            self._arimg_release()
        return moved


_subclasses: dict[Any, Any] = {}


def _subclass(original: type[Any], mixin: type[Mixin], options: tuple[tuple[str, Any], ...]) -> Any:
    key = (original, mixin, options)
    if key not in _subclasses:
        names = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _reduce,
            "_arimg": key,
            **dict(options),
        }
        _subclasses[key] = type(original.__name__, (mixin, original), names)
    return _subclasses[key]


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """A class made at run time has no name to be found by: copies are made from the parts that have."""
    original = self._arimg[0]
    _, (_, *arguments), *state = original.__reduce_ex__(self, max(protocol, 2))
    return (_new, (self._arimg, *arguments), *state)


def _new(parts: Any, *arguments: Any) -> Any:
    cls = _subclass(*parts)
    return cls.__new__(cls, *arguments)


def is_swapped(module: Any) -> bool:
    return isinstance(module, Mixin)


def swap(module: Any, mixin: type[Mixin], **options: Any) -> None:
    """Gives the module the methods of the mixin, and the options as attributes."""
    module.__class__ = _subclass(type(module), mixin, tuple(sorted(options.items())))


def restore(module: Any) -> None:
    """Gives the module its own class back; does nothing to one that has it."""
    if is_swapped(module):
        module._arimg_release()
        module.__class__ = module._arimg[0]


def has_hooks(module: nn.Module) -> bool:
    """Whether a part of the module has a hook that a composition around the part would not call."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in module.modules()
        if m is not module
    )
