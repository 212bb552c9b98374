"""FlexVAR: next-scale prediction without residuals (arXiv 2502.20313).

Scale k codes the whole map of features averaged down to its size, from one codebook, so it can be decoded
alone, and the next scale sees it upsampled and nothing else but what attention remembers. Positions are a
learned grid averaged to any (h, w), and there is no embedding of the level. Training draws a schedule for
each step; one model then generates by any schedule and aspect: begin(..., scales=(1, 2, (3, 5), (5, 8))).
Sizes that training cannot have seen are sampled greedily.

As published, on ImageNet at 256 x 256: FID 3.05, 2.41, 2.21 at depths 16, 20, 24 in 10 steps, 2.08 in 13
steps (981 tokens); without training for it, 4.43 at 512 x 512.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import models, ops
from arimg.data.images import Images
from arimg.generators.loop import Sampler, Session, Turn
from arimg.generators.var import VarSession, uncached
from arimg.guidance import BeyondConditional, Guidance, linear_until
from arimg.layout import Layout
from arimg.nn import checkpoint
from arimg.nn.adaln import run_blocks
from arimg.nn.map_quantizer import MapQuantizer
from arimg.systems.base import System, Way, way
from arimg.systems.tokenizer import around, quantizer_tokenizer, scale_tokenizer
from arimg.systems.var import VarModel
from arimg.tokenizers import VQVAE

Scales = Sequence[int | Sequence[int]]


def few_where_trained(turn: Turn) -> float:
    """The 900 most probable codes; the most probable one at sizes that were never trained."""
    session = turn.run.session
    assert isinstance(session, FlexSession)
    return 900 if session.flex.trained(turn.shape) else 1


class FlexVAR(VarModel):
    """A VAR over a `MapQuantizer`. grid: side of the learned positions, parameter `pos_1LC` [1, C, g, g].

    The scales of the tokenizer are the default schedule, its length the most that training takes at once.
    """

    title = "FlexVAR"
    grid: int
    sampler = Sampler(
        Guidance(1.5, linear_until(9), BeyondConditional()), top_k=few_where_trained, top_p=0.95
    )

    def __init__(
        self, tokenizer: VQVAE, num_classes: int = 1000, *size: Any, grid: int = 32, **more: Any
    ) -> None:
        if not isinstance(tokenizer.quantize, MapQuantizer):
            kind = type(tokenizer.quantize).__name__
            raise ValueError(f"expected a tokenizer around a MapQuantizer, got one around {kind}")
        _expect_one_first(Layout.scales(tokenizer.scales))
        super().__init__(tokenizer, num_classes, *size, **more)
        if self.width % 4:
            raise ValueError(f"expected a width that 4 divides, got {self.width}")
        del self.lvl_embed
        self.grid = grid
        self.pos_1LC = nn.Parameter(sines(grid, self.width) * math.sqrt(2 / 3 / self.width))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "grid": self.grid}

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
        grid = checkpoint.tensor_of(state, "pos_1LC", 4, "FlexVAR").shape[-1]
        return {**super()._sizes(state, heads), "grid": grid}

    @classmethod
    def _fitted(cls, tokenizer: VQVAE, state: Mapping[str, Tensor]) -> VQVAE:
        """As it is: the weights say nothing about scales."""
        return tokenizer

    @property
    def maps(self) -> MapQuantizer:
        return cast(MapQuantizer, self.tokenizer.quantize)

    def trained(self, shape: tuple[int, int]) -> bool:
        """Whether training draws maps of this size."""
        side = max(shape)
        return side <= self.maps.side and shape == self.maps.shape_of(side)

    def positions(self, layout: Layout) -> Tensor:
        """Of each token, [1, L, C]."""
        each = [ops.resize(self.pos_1LC, shape, "area").flatten(2) for shape in layout.shapes]
        return torch.cat(each, 2).transpose(1, 2)

    def _positions(self) -> Tensor:
        return self.positions(self.layout)

    def forward(self, labels: Tensor, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Teacher forcing by any layout: labels [B], x [B, L - 1, Cvae] of `MapQuantizer.generator_input` ->
        logits [B, L, V], float32.
        """
        layout = self.layout if layout is None else layout
        _expect_one_first(layout)
        wanted = (len(labels), layout.length - 1, self.word_embed.in_features)
        if tuple(x.shape) != wanted:
            raise ValueError(f"expected x {list(wanted)}, got {list(x.shape)}")
        condition = self._condition(self.dropped(self.labels(labels)))
        embedded = torch.cat((condition.first, self.word_embed(x.to(self.word_embed.weight.dtype))), 1)
        attend = uncached(self._blocks, layout.visibility(self.rule, device=x.device))
        h = embedded + self.positions(layout)
        return self.head(run_blocks(self._blocks, h, condition.blocks, condition.head, attend)).float()

    def encode(self, pixels: Tensor) -> Tensor:
        """The features, [B, z, H, W]: which maps of them are wanted is drawn for each step."""
        return self.tokenizer.features(pixels).float()

    def schedule(self) -> Layout:
        """Of a training step: the default one in 5 % of the cases, else sides drawn (`random_sides`)."""
        if float(torch.rand(())) < 0.05:
            return self.layout
        sides = random_sides(self.maps.side)
        while True:
            layout = Layout(tuple(self.maps.shape_of(s) for s in sides))
            if layout.length <= self.layout.length or len(sides) == 2:
                return layout
            del sides[1 + int(torch.randint(len(sides) - 2, ()))]

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        layout = self.schedule()
        indices = self.maps.encode_at(examples, layout.shapes)
        logits = self(labels, self.maps.generator_input(indices, layout.shapes), layout)
        return F.cross_entropy(logits.flatten(0, 1), torch.cat(indices, 1).flatten())

    def begin(self, condition: Any, guided: bool, **options: Any) -> FlexSession:
        """Opens a generation for class labels [B]; options: scales, sides or (h, w), the first 1."""
        return FlexSession(self, self.labels(condition), guided, **options)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        """The last map alone, of whatever size and aspect it is."""
        return self.tokenizer.decode_features(self.maps.code_map(tokens[-1], session.layout.shapes[-1]))

    def ways(self) -> dict[str, Way]:
        every = [self.maps.shape_of(k + 1) for k in range(self.maps.side)]
        return {self.title: way(self), "all sizes": way(self, scales=every)}


class FlexSession(VarSession):
    """One generation: keys and values of the scales so far, and the map of the last one."""

    def __init__(self, model: FlexVAR, labels: Tensor, guided: bool, scales: Scales | None = None) -> None:
        self.flex, layout = model, None if scales is None else Layout.scales(scales)
        _expect_one_first(layout or model.layout)
        super().__init__(model, labels, guided, layout=layout)

    def _start(self, labels: Tensor) -> None:
        super()._start(labels)
        self.positions = self.flex.positions(self.layout)

    def _next_map(self, k: int, f_hat: Tensor) -> Tensor:
        return self.flex.maps.next_map(f_hat, self.layout.shapes[k])

    def feed(self, turn: Turn) -> None:
        self.f_hat = self.flex.maps.code_map(turn.drawn, turn.shape)


def _expect_one_first(layout: Layout) -> None:
    if layout.sizes[0] != 1:
        raise ValueError(f"expected a first scale of 1 token, got {layout.sizes[0]}")


def random_sides(side: int) -> list[int]:
    """Sides of a training schedule, as published for 16: 1, 2, five of 3..10, two of 11..15, 16; for other
    sides as many in proportion.
    """
    middle = max(5 * side // 8, 2)
    low = torch.randperm(middle - 2)[: 5 * side // 16] + 3
    high = torch.randperm(max(side - 1 - middle, 0))[: side // 8] + middle + 1
    return sorted({1, min(2, side), *low.tolist(), *high.tolist(), side})


def sines(side: int, width: int) -> Tensor:
    """[1, C, side, side]: sines and cosines of the row, then of the column, at C / 4 frequencies."""
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angle = frequency[:, None] * torch.arange(side)
    waves = torch.cat((angle.sin(), angle.cos()))  # [C / 2, side]
    rows, columns = waves[:, :, None].expand(-1, -1, side), waves[:, None].expand(-1, side, -1)
    return torch.cat((rows, columns))[None].contiguous()


def start_codes(quantizer: MapQuantizer, images: Images) -> None:
    """Codes at the centres of the features of some images, at the sizes of the default schedule."""
    some = torch.linspace(0, len(images) - 1, min(256, len(images))).long().numpy()
    with torch.no_grad():
        f = around(quantizer).features(images.batch(some)).float()
        maps = [ops.resize(f, shape, "area") for shape in quantizer.scales]
        rows = torch.cat([m.permute(0, 2, 3, 1).reshape(-1, quantizer.channels) for m in maps])
        codes = quantizer.vocab_size
        if len(rows) >= codes:
            quantizer.embedding.weight.copy_(ops.kmeans(rows, codes, 10).centres)


def tokenizer(images: Images, folder: Path) -> VQVAE:
    source = scale_tokenizer().quantize
    quantizer = MapQuantizer(source.vocab_size, source.channels, source.scales)
    if not (folder / models.TOKENIZER_FILE).exists():
        start_codes(quantizer, images)
    return quantizer_tokenizer(images, folder, quantizer, steps=120, decoder_only=True)


def make(tokenizer: Any, classes: int) -> FlexVAR:
    return FlexVAR(tokenizer, classes, depth=5, width=192, heads=3, grid=16, shared_adaln=True)


SYSTEM = System(
    "flexvar",
    "FlexVAR",
    "next-scale",
    "arXiv 2502.20313",
    "each scale codes the whole map and no residual, so one model runs any schedule and aspect",
    tokenizer,
    make,
    "the small tokenizer keeps the bundled encoder, its codes are centres of those features (by distance; the"
    " published one compares angles in 32 dimensions), and its decoder learns on upsampled maps; the initial"
    " waves of the positions are as small as the other embeddings; no adversarial or perceptual loss in the"
    " tokenizer; a schedule whose maps are too large loses random scales until it fits; greedy are sizes"
    " beyond the training's and other aspects, in released code also those outside of a list; the strength of"
    " guidance goes on rising at sizes beyond the training's (released: the full strength)",
    released=True,
)
