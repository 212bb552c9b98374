"""What a system is: facts for the list, a tokenizer, a model that trains and samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arimg.data.images import Images
from arimg.generators.loop import Model, Sampler, Session, Turn, final_tokens, generate
from arimg.nn.follow import follow

Way = Callable[[Tensor, int], Iterator[Turn]]  # to generate from (labels, seed)
FAMILIES = ("next-scale", "next-frequency", "raster", "any-order", "speculative")


class SystemModel(nn.Module, ABC):
    """A generator of one system at any size. Subclasses define encode (or `examples`), loss, begin and
    decode.

    title: names its own way to generate. plain: name of the plain one and its options of `generate`.
    sampler: its defaults for `generate`. A `commit` attribute is its rule; without one every token is final
    at once. The tokenizer is not a submodule (`hidden`): it is saved beside the model.
    """

    title: str
    plain: tuple[str, Mapping[str, Any]]
    sampler: Sampler

    def __setattr__(self, name: str, value: Any) -> None:
        hidden = getattr(type(self), name, None)
        if isinstance(hidden, Hidden):  # nn.Module would register it before it asks the attribute
            hidden.__set__(self, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to(device)` takes the hidden modules along."""
        moved = super()._apply(fn, recurse)
        hidden = {n for c in type(self).__mro__ for n, v in vars(c).items() if isinstance(v, Hidden)}
        for module in (getattr(self, name) for name in sorted(hidden)):
            follow(module, next(self.parameters()).device)
        return moved

    def encode(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] -> what training sees of them, [B, ...] (tokens, mostly)."""
        raise NotImplementedError(f"{type(self).__name__} makes its examples from a teacher")

    def examples(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """What training sees of images and their classes; `encode` unless a system learns from a teacher."""
        return self.encode(pixels)

    @abstractmethod
    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Of encoded images and their classes int64 [B], a scalar. In training mode classes may be
        dropped.
        """

    @abstractmethod
    def begin(self, condition: Any, guided: bool, **options: Any) -> Session:
        """Opens a generation for class labels [B]."""

    @abstractmethod
    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        """The pictures of a finished generation: [B, 3, S, S] in [0, 1]. tokens: of the steps that are
        over.
        """

    def ways(self) -> dict[str, Way]:
        """Ways to generate from (labels, seed): the system's own first, the plain method of the same network
        last.
        """
        name, options = self.plain
        return {self.title: way(self), name: way(self, **options)}

    def pictures(self, labels: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
        """Pictures of the given classes, [B, 3, S, S]; options are those of `generate`."""
        return self.decode(*self._drawn(labels, seed, options))

    def preview(self, session: Session, tokens: list[Tensor]) -> Tensor:
        """As `decode`, with the tokens of the first steps alone."""
        raise ValueError(f"expected a system whose first tokens decode alone, got {type(self).__name__}")

    def previews(self, labels: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
        """Pictures of the given classes when the first 1, 2, 4, ... tokens are drawn (and the rest of their
        steps), and when all are, [B, k, 3, S, S].
        """
        session, tokens = self._drawn(labels, seed, options)
        ends = list(accumulate(t.shape[1] for t in tokens))
        counts = {bisect_left(ends, 2**i) + 1 for i in range(ends[-1].bit_length())} | {len(tokens)}
        return torch.stack([self.preview(session, tokens[:n]) for n in sorted(counts)], 1)

    def _drawn(self, labels: Tensor, seed: int, options: dict[str, Any]) -> tuple[Session, list[Tensor]]:
        """A finished generation and the tokens of its steps."""
        turns = generate(self, labels, seed=seed, **options)
        first = next(turns)  # the others are not kept, nor their logits
        return first.run.session, final_tokens(chain([first], turns))


def way(model: Model, **options: Any) -> Way:
    """Generates by this model with these options."""
    return lambda labels, seed: generate(model, labels, seed=seed, **options)


class Hidden:
    """An attribute that holds a module without making it a submodule: its weights are saved elsewhere."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = "_hidden_" + name

    def __get__(self, model: Any, owner: type) -> Any:
        return self if model is None else getattr(model, self.name)[0]

    def __set__(self, model: Any, value: nn.Module) -> None:
        object.__setattr__(model, self.name, (value,))


@dataclass(frozen=True)
class System:
    """Facts of a system and how its small version is made.

    tokenizer(images, folder): makes the tokenizer, or reads the one that it left in this folder; None: there
    is none. make(tokenizer, classes): the model at its small size. paper: where it is published. deviations:
    from the paper, and of released code from the paper. released: weights under their published names load
    (`from_state_dict` of the model's class).
    """

    name: str
    title: str
    family: str
    paper: str
    mechanism: str
    tokenizer: Callable[[Images, Path], nn.Module | None]
    make: Callable[[Any, int], SystemModel]
    deviations: str = ""
    image_size: int = 64
    lr: float = 1e-3
    batch_size: int = 32
    steps: int = 600  # of training, until pictures are worth a look
    released: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"expected a family of {FAMILIES}, got {self.family!r}")

    @property
    def status(self) -> str:
        """What can be done with it."""
        return "trains, samples" + (", loads released weights" if self.released else "")
