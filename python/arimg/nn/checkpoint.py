"""Files of weights: safetensors with the configuration in its metadata, or a plain state dict."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)
Theirs = str | tuple[str, ...]  # names of one or of several tensors
_KEY = "arimg"  # metadata entry: {"kind": class name, "config": constructor arguments}


class Configured(Protocol):
    """A module that knows its constructor arguments."""

    def config(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...


def save(module: Configured, path: str | Path, *, dtype: torch.dtype | None = None, **metadata: str) -> None:
    """Write weights and configuration as safetensors; `dtype` converts floating tensors (to ship a small
    file).

    Further keyword arguments become metadata entries.
    """
    entry = json.dumps({"kind": type(module).__name__, "config": module.config()})
    tensors = {
        k: v.detach().to(dtype if v.is_floating_point() else None).contiguous()
        for k, v in module.state_dict().items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), {"format": "pt", _KEY: entry, **metadata})


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """State dict and, where the file has one, {"kind", "config"}. Files that are not safetensors go to
    `torch.load`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a file of weights, got {str(path)!r}, which does not exist")
    if Path(path).suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
            entry = (f.metadata() or {}).get(_KEY)
        return tensors, json.loads(entry) if entry else None
    loaded = torch.load(str(path), map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(
            f"expected {str(path)!r} to hold a state dict of tensors, got {type(loaded).__name__}"
        )
    return dict(loaded), None


def tensor_of(state: Mapping[str, Tensor], key: str, dims: int, what: str) -> Tensor:
    """state[key], which must have that many dimensions."""
    if key not in state:
        raise ValueError(f"expected the state dict of a {what}, got one without {key!r}")
    if state[key].dim() != dims:
        raise ValueError(f"expected {key!r} with {dims} dimensions, got shape {list(state[key].shape)}")
    return state[key]


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of consecutive entries prefix0, prefix1, ... that the keys name."""
    numbers = {k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)}
    n = 0
    while str(n) in numbers:
        n += 1
    return n


def translated(
    state: Mapping[str, Tensor], names: Mapping[str, Theirs], what: str, without: tuple[str, ...] = (),
    suffixes: tuple[str, ...] = (),
) -> dict[str, Tensor]:  # fmt: skip
    """A state dict under other names. names: ours -> theirs, {} the number of a layer in both; where several
    of theirs are given, ours is all of them, one below the other.

    without, suffixes: beginnings and ends of their names that have no counterpart. Raises ValueError for
    other such names and for missing ones.
    """
    out: dict[str, Tensor] = {}
    left = {key for key in state if not key.startswith(without) and not key.endswith(suffixes)}
    for ours, theirs in names.items():
        parts = (theirs,) if isinstance(theirs, str) else theirs
        for n in range(count(state, parts[0].split("{}")[0]) if "{}" in ours else 1):
            keys = [part.format(n) for part in parts]
            if missing := [key for key in keys if key not in state]:
                raise ValueError(f"expected the state dict of a {what}, got one without {missing[0]!r}")
            tensors = [state[key] for key in keys]
            out[ours.format(n)] = tensors[0] if len(keys) == 1 else torch.cat(tensors)
            left.difference_update(keys)
    if left:
        raise ValueError(f"expected the state dict of a {what}, got one with {min(left)!r}")
    return out


class _NothingDrawn(TorchFunctionMode):
    """Leaves weights as they are made: to draw or scale them on "meta", where they have no values, torch
    would import its compiler and sympy (100 MB).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in (
            "normal_",
            "uniform_",
            "div_",
        ):  # of tensors, and of torch.nn.init
            weight: Tensor = args[0] if args else kwargs["tensor"]
            if weight.is_meta:
                return weight
        return func(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made here have parameters and buffers on "meta", without memory."""
    with torch.device("meta"), _NothingDrawn():
        yield


def built(
    make: Callable[[], Model], state: Mapping[str, Tensor], what: str, dtype: torch.dtype | None = None
) -> Model:
    """The model that `make` gives, in evaluation mode, with these weights; none are drawn at random first.

    dtype: of its weights, else float32. Raises ValueError where names or shapes do not fit.
    """
    with without_weights():
        model = make()
    model = model.to(dtype=dtype).to_empty(device="cpu").eval()
    load_checked(model, state, what)
    return model


def load_checked(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load all parameters strictly; the error names the keys and shapes that do not fit."""
    own = module.state_dict()
    wrong = [
        f"{k}: expected {list(own[k].shape)}, got {list(v.shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    parameters = {k for k, _ in module.named_parameters()}
    wrong += [f"{k}: missing, expected {list(own[k].shape)}" for k in sorted(parameters - state.keys())]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"expected the weights of this {what}, got others: " + "; ".join(wrong[:5]) + more)
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as e:
        raise ValueError(f"expected the weights of this {what}, got others: {e}") from e
