"""CTF: coarse labels token by token, then all tokens in one pass (arXiv 2503.16194).

The codes of a codebook are clustered by k-means. A causal LlamaGen draws the cluster of each token; a second
one without causality sees all of them and draws every token among the members of its cluster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.generators import LlamaGen
from arimg.generators.llamagen import LlamaSession
from arimg.generators.loop import Turn
from arimg.layout import Layout
from arimg.systems.base import System, Way, way
from arimg.systems.llamagen import SIZE, GridModel
from arimg.systems.tokenizer import grid_tokenizer
from arimg.tokenizers import VQVAE


class FineModel(LlamaGen):
    """Sees the class and all coarse labels at once and says the token of each."""

    def __init__(self, clusters: int, vocab_size: int, num_classes: int, **size: Any) -> None:
        super().__init__(clusters, num_classes, **size)
        self.output = nn.Linear(self.width, vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def intervals(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        start = torch.zeros(length, dtype=torch.int32, device=device)
        return start, torch.full_like(start, length)

    def forward(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Checked labels [B], all coarse labels [B, n] -> [B, n, V]."""
        return self.teach(torch.cat((self.prefix(labels), self.embed(indices)), 1))[:, 1:]


class CtfModel(GridModel):
    """The coarse stage, whose vocabulary are the clusters; `fine` is the second one."""

    title = "CTF"
    cluster: Tensor

    def __init__(self, tokenizer: VQVAE, num_classes: int, clusters: int = 64, **size: Any) -> None:
        super().__init__(tokenizer, num_classes, **size)
        codes = tokenizer.quantize.embedding.weight.detach()
        if not 1 < clusters <= len(codes):
            raise ValueError(f"expected 2 to {len(codes)} clusters, got {clusters}")
        self.fine_size, self.vocab_size = len(codes), clusters
        self.tok_embeddings = nn.Embedding(clusters, self.width)
        self.output = nn.Linear(self.width, clusters, bias=False)
        self._initialise()
        self.fine = FineModel(clusters, len(codes), num_classes, grid=self.grid, **size)
        self.register_buffer("cluster", clusters_of(codes, clusters))

    @property
    def layout(self) -> Layout:
        return Layout(((1, 1),) * self.grid**2 + ((self.grid, self.grid),))

    def members(self, coarse: Tensor) -> Tensor:
        """Which tokens belong to each coarse label: [B, n] -> bool [B, n, V]."""
        return self.cluster == coarse[..., None]

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        labels = self.dropped(self.labels(labels))
        coarse = self.cluster[examples]
        first = self.teach(torch.cat((self.prefix(labels), self.embed(coarse[:, :-1])), 1))
        second = self.fine(labels, coarse).masked_fill(~self.members(coarse), -torch.inf)
        return F.cross_entropy(first.flatten(0, 1), coarse.flatten()) + F.cross_entropy(
            second.flatten(0, 1), examples.flatten()
        )

    def decode(self, session: Any, tokens: list[Tensor]) -> Tensor:
        return super().decode(session, tokens[-1:])

    def begin(self, condition: Any, guided: bool, **options: Any) -> CtfSession:
        return CtfSession(self, self.labels(condition), guided)

    def ways(self) -> dict[str, Way]:
        """Its own, and the tokens themselves one by one: a network of the coarse stage's size, untrained."""
        taken = ("vocab_size", "num_classes", "grid")
        size: dict[str, Any] = {n: v for n, v in self.config().items() if n not in taken}
        plain = GridModel(self.tokenizer, self.num_classes, **size).eval()
        return {self.title: way(self), "token by token (untrained)": way(plain)}


class CtfSession(LlamaSession):
    """Of LlamaGen over the coarse labels, with one last step that needs no cache."""

    def __init__(self, model: CtfModel, labels: Tensor, guided: bool) -> None:
        self.labels = model.with_unconditional(labels, guided)
        super().__init__(model, model.prefix(self.labels), len(labels))
        self.ctf, self.coarse = model, labels.new_empty(len(labels), 0)

    def is_fine(self, turn: Turn) -> bool:
        return turn.step == len(self.layout) - 1

    def logits(self, turn: Turn) -> Tensor:
        if not self.is_fine(turn):
            return super().logits(turn)
        rows = self.labels if turn.guidance is not None else self.labels[: self.rows]
        out: Tensor = self.ctf.fine(rows, self.coarse.repeat(len(rows) // self.rows, 1))
        return out

    def processors(self, turn: Turn) -> dict[str, Any]:
        return {"allowed": self.ctf.members(self.coarse)} if self.is_fine(turn) else {}

    def feed(self, turn: Turn) -> None:
        if not self.is_fine(turn):
            self.coarse = torch.cat((self.coarse, turn.drawn), 1)
            super().feed(turn)


@torch.no_grad()
def clusters_of(codes: Tensor, clusters: int, steps: int = 20) -> Tensor:
    """The cluster of each code [V, C] by k-means from evenly spaced codes: int64 [V]."""
    first = codes[torch.linspace(0, len(codes) - 1, clusters).long()]
    centres = ops.kmeans(codes, clusters, steps, init=first, empty="keep").centres
    return ops.nearest_code(codes, centres)


def make(tokenizer: Any, classes: int) -> CtfModel:
    return CtfModel(tokenizer, classes, **SIZE)


SYSTEM = System(
    "ctf",
    "CTF",
    "raster",
    "arXiv 2503.16194",
    "clusters of codes token by token, then all tokens in one pass, each within its cluster",
    grid_tokenizer,
    make,
    "64 clusters of 1024 codes (512 of 16384 in the paper); both stages are trained together and have one "
    "size; the plain method is an untrained network, for its time alone",
)
