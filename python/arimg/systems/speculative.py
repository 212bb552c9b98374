"""Systems that check guesses: speculative Jacobi decoding of Lumina-mGPT 2.0 (arXiv 2507.17801), coupled
drafts (SCD, arXiv 2510.24211), groups (GSD, arXiv 2508.07747), and a smaller model that drafts.

The network is that of LlamaGen, and only the commit rule differs: a training of one serves them all. Against
released code: each row commits by itself instead of as many tokens as the slowest row of the batch, and the
replacement of a rejected draft comes from max(0, p - q); the releases deviate there, and their samples do not
have the law of the model. GSD is not exact as published; the exact rule is the second of its ways.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from arimg import ops
from arimg.generators.loop import ALWAYS, Commit
from arimg.generators.speculative import BiasedGrouped, Draft, Grouped, Jacobi
from arimg.systems.base import System, Way, way
from arimg.systems.llamagen import SIZE, GridModel
from arimg.systems.tokenizer import grid_tokenizer
from arimg.tokenizers import VQVAE

WINDOW = 15  # drafts behind the last token, 16 places in all, as published
SMALL = {"depth": 2, "width": 128, "heads": 2, "dropout": 0.0}


class SpeculativeModel(GridModel):
    """A raster generator with commit rules by name; the first is its own."""

    def __init__(self, tokenizer: VQVAE, num_classes: int, rules: dict[str, Commit], **size: Any) -> None:
        super().__init__(tokenizer, num_classes, **size)
        self.rules = rules

    @property
    def commit(self) -> Commit:
        return next(iter(self.rules.values()))

    def ways(self) -> dict[str, Way]:
        rules = {**self.rules, "token by token": ALWAYS}
        return {name: way(self, commit=rule) for name, rule in rules.items()}


class DraftedModel(SpeculativeModel):
    """A raster generator with a smaller one beside it that drafts; they train together."""

    def __init__(self, tokenizer: VQVAE, num_classes: int, **size: Any) -> None:
        super().__init__(tokenizer, num_classes, {}, **size)
        self.small = GridModel(tokenizer, num_classes, **SMALL)
        self.rules = {"draft model": Draft(self.small, 4)}

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        return super().loss(examples, labels) + self.small.loss(examples, labels)


def make_sjd(tokenizer: Any, classes: int) -> SpeculativeModel:
    return SpeculativeModel(tokenizer, classes, {"SJD": Jacobi(WINDOW)}, **SIZE)


def make_scd(tokenizer: Any, classes: int) -> SpeculativeModel:
    rules: dict[str, Commit] = {
        "SCD": Jacobi(WINDOW, "couple"),
        "SCD, shared noise": Jacobi(WINDOW, "gumbel"),
        "SJD": Jacobi(WINDOW),
    }
    return SpeculativeModel(tokenizer, classes, rules, **SIZE)


def make_gsd(tokenizer: Any, classes: int) -> SpeculativeModel:
    codes = tokenizer.quantize.embedding.weight
    rules: dict[str, Commit] = {
        "GSD as published (biased)": BiasedGrouped(WINDOW),
        "GSD, exact": Grouped(WINDOW, ops.codebook_groups(codes, 8)),
        "SJD": Jacobi(WINDOW),
    }
    return SpeculativeModel(tokenizer, classes, rules, **SIZE)


def make_drafted(tokenizer: Any, classes: int) -> DraftedModel:
    return DraftedModel(tokenizer, classes, **SIZE)


def _system(name: str, title: str, paper: str, mechanism: str, make: Any, deviations: str) -> System:
    return System(
        name, title, "speculative", paper, mechanism, grid_tokenizer, make, deviations=deviations
    )  # fmt: skip


SYSTEMS = (
    _system(
        "sjd",
        "Lumina-mGPT 2.0 (speculative Jacobi decoding)",
        "arXiv 2507.17801",
        "a window of 15 drafts from the pass before, tested by the new laws; exact",
        make_sjd,
        "each row commits by itself (released: the minimum of the batch); rejected drafts are replaced from "
        "max(0, p - q) (released: almost always from p); on LlamaGen's network",
    ),
    _system(
        "scd",
        "SCD (speculative coupled decoding)",
        "arXiv 2510.24211",
        "Jacobi drafts that are coupled from pass to pass, so that they settle earlier; exact",
        make_scd,
        "on LlamaGen's network",
    ),
    _system(
        "gsd",
        "GSD (grouped speculative decoding)",
        "arXiv 2508.07747",
        "Jacobi drafts are accepted by the mass of tokens with similar probability; not exact as published",
        make_gsd,
        "each row commits by itself; no bound on distances of embeddings; on LlamaGen's network",
    ),
    _system(
        "speculative-draft",
        "Speculative decoding with a draft model",
        "arXiv 2211.17192",
        "a small network writes 4 tokens, the large one checks them in one pass; exact",
        make_drafted,
        "the method of language models, on LlamaGen's network",
    ),
)
