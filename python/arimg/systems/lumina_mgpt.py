"""Lumina-mGPT (github.com/Alpha-VLLM/Lumina-mGPT, arXiv 2408.02657): text and pictures of any shape in one
sequence.

<text> <start> <h> <w>, then rows of tokens each closed by <eol>, then <end>: a 1-D causal model that is told
a picture's shape by two tokens and so can draw any. What must stand at a place by this grammar is forced. The
unconditional rows of guidance have no text: they begin at <start>, so the caches of a pair differ in length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.generators.chameleon_parts import NAMES, HeadNorm, NormedHeads
from arimg.generators.llamagen import Decoder, Layer, LlamaGen, LlamaSession
from arimg.generators.loop import Sampler, Session, Turn
from arimg.guidance import Guidance
from arimg.layout import Layout
from arimg.nn import checkpoint
from arimg.nn.conditioning import Conditioner, Text
from arimg.nn.rope import rope_1d
from arimg.reference.kv_cache import Rope
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.llamagen import GridModel
from arimg.systems.tokenizer import grid_tokenizer
from arimg.tokenizers import VQVAE

Z_LOSS = 1e-5
CROPS = ((8, 8), (4, 8), (8, 4))  # shapes in training; a crop in a quarter of the steps


class LuminaModel(LlamaGen, SystemModel):
    """A Chameleon: a Llama with a layer norm of queries and keys.

    Tokens: those of the tokenizer, then <start>, <eol>, <end> and the numbers 1 .. side of <h> and <w>.
    """

    title = "Lumina-mGPT"
    plain = "a pass for each condition", {"apart": True}
    tokenizer = Hidden()
    sampler = Sampler(Guidance(4.0), top_k=2000)

    def __init__(self, tokenizer: VQVAE, num_classes: int, text_tokens: int = 4, **size: Any) -> None:
        side = tokenizer.scales[-1][0]
        self.image_vocab, self.side, self.text_tokens = tokenizer.vocab_size, side, text_tokens
        super().__init__(tokenizer.vocab_size + 3 + side, num_classes, grid=side, **size)
        self.tokenizer = tokenizer
        self.start, self.eol, self.end = (self.image_vocab + i for i in range(3))
        self.conditioner = Conditioner(num_classes, text_tokens, self.width)
        del self.cls_embedding
        for layer in cast("list[Layer]", list(self.layers)):
            layer.attention.q_norm = HeadNorm(self.heads, self.width // self.heads)
            layer.attention.k_norm = HeadNorm(self.kv_heads, self.width // self.heads)

    @classmethod
    def from_state_dict(  # type: ignore[override]
        cls, state: Mapping[str, Tensor], *, tokenizer: VQVAE, rows: Tensor, heads: int | None = None,
        **options: Any,
    ) -> LuminaModel:  # fmt: skip
        """The model of a Chameleon's weights, by the names that the package transformers gives them.

        rows: int64 [tokens], which tokens of its vocabulary ours are, in our order; the others are left out,
        which changes no picture under the grammar. heads: where they are not 128 wide. A text is then the
        `Text` of its words' rows of `model.embed_tokens.weight`.
        """
        ours = checkpoint.translated(state, NAMES, "Chameleon", ("model.vqmodel.",))
        words = checkpoint.tensor_of(ours, "tok_embeddings.weight", 2, "Chameleon")
        for name in ("tok_embeddings.weight", "output.weight"):
            ours[name] = ours[name][rows.to(words.device)]
        width = words.shape[1]
        ours["conditioner.table"] = words.new_zeros(2, 1, width)
        ours["conditioner.project.weight"] = torch.eye(width, dtype=words.dtype, device=words.device)
        ours["conditioner.project.bias"] = words.new_zeros(width)
        model = super().from_state_dict(
            ours, heads=heads or width // 128, tokenizer=tokenizer, text_tokens=1, **options
        )
        return cast(LuminaModel, model)

    @staticmethod
    def _sizes(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
        return GridModel._sizes(state, heads)

    @staticmethod
    def _condition_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"num_classes": len(state["conditioner.table"]) - 1}

    @property
    def layout(self) -> Layout:
        """The largest picture: <h> <w>, rows with <eol>, <end>."""
        return Layout.groups([1] * self.tokens_of(self.side, self.side))

    def tokens_of(self, h: int, w: int) -> int:
        return 3 + h * (w + 1)

    def rope(self) -> Rope:
        """Of places in the sequence, with room for a text of 4 times the usual length."""
        longest = self.length + 4 * self.text_tokens + 1
        device, head_dim = self.tok_embeddings.weight.device, self.width // self.heads
        return rope_1d(longest, head_dim, self.rope_base, interleaved=False, device=device)

    def decoder(self) -> Decoder:
        return NormedHeads(self)

    def sequence(self, tokens: Tensor) -> Tensor:
        """Tokens of a map [B, h, w] as they follow <start>: int64 [B, 3 + h (w + 1)]."""
        rows, h, w = tokens.shape
        shape = tokens.new_tensor([self.number(h), self.number(w)]).expand(rows, 2)
        lines = F.pad(tokens, (0, 1), value=self.eol).flatten(1)
        return torch.cat((shape, lines, tokens.new_full((rows, 1), self.end)), 1)

    def number(self, n: int) -> int:
        """The token that says n."""
        if not 1 <= n <= self.side:
            raise ValueError(f"expected sides of 1..{self.side}, got {n}")
        return self.image_vocab + 2 + n

    def map(self, sequence: Tensor) -> Tensor:
        """The tokens of a map [h, w] of one sequence [L]. Raises ValueError where it breaks the grammar."""
        h, w = (int(n) - self.image_vocab - 2 for n in sequence[:2])
        if not (1 <= h <= self.side and 1 <= w <= self.side) or len(sequence) != self.tokens_of(h, w):
            raise ValueError(f"expected <h> <w> and their tokens, got {h} x {w} for {len(sequence)} tokens")
        lines = sequence[2:-1].view(h, w + 1)
        inside = (lines[:, :-1] < self.image_vocab).all()
        if not inside or (lines[:, -1] != self.eol).any() or sequence[-1] != self.end:
            raise ValueError(f"expected {h} rows of {w} tokens and <eol>, then <end>, got another order")
        return lines[:, :-1]

    def encode(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.tokenizer.encode(pixels)[-1]
        return tokens

    def predict(self, condition: Any, sequence: Tensor) -> Tensor:
        """Logits of all tokens behind <start>, [B, n + 1, V]; condition None: no text."""
        begun = F.pad(sequence, (1, 0), value=self.start)
        h, text = self.embed(begun), 0
        if condition is not None:
            states = self.conditioner(condition).states
            h, text = torch.cat((states, h), 1), states.shape[1]
        return self.teach(h)[:, text:]

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Of one shape per step, with the z-loss; in training without text in a tenth of the steps."""
        tokens = examples.view(-1, self.side, self.side)
        condition: Tensor | None = labels
        if self.training:
            chance = torch.rand(2).tolist()
            condition = None if chance[0] < self.class_dropout else labels
            tokens = self._crop(tokens) if chance[1] < 0.25 else tokens
        sequence = self.sequence(tokens)
        logits = self.predict(condition, sequence[:, :-1])
        z = logits.logsumexp(-1).square().mean()
        return F.cross_entropy(logits.flatten(0, 1), sequence.flatten()) + Z_LOSS * z

    def _crop(self, tokens: Tensor) -> Tensor:
        h, w = CROPS[int(torch.randint(len(CROPS), (1,)))]
        y, x = (int(torch.randint(self.side - n + 1, (1,))) for n in (h, w))
        return tokens[:, y : y + h, x : x + w]

    def begin(
        self, condition: Any, guided: bool, size: tuple[int, int] | None = None, constrained: bool = True,
        apart: bool = False, **options: Any,
    ) -> LuminaSession:  # fmt: skip
        """condition: labels [B] or a `Text`. size: (h, w) of the map. constrained: by the grammar; without
        it only <h> and <w> are forced. apart: unconditional rows have passes of their own.
        """
        text, size = self.conditioner(condition), size or (self.side, self.side)
        if guided and apart:
            return PairSession(self, text, False, size, constrained, **options)
        return LuminaSession(self, text, guided, size, constrained, **options)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        maps = torch.stack([self.map(row) for row in torch.cat(tokens, 1)])
        if tuple(maps.shape[1:]) != (self.side, self.side):
            raise ValueError(f"expected maps of {self.side} x {self.side}, got {list(maps.shape[1:])}")
        pictures: Tensor = self.tokenizer.decode([maps.flatten(1)])
        return pictures


class LuminaSession(LlamaSession):
    """Rows of text and <start> first, of which each has its own number; then a token of every row."""

    model: LuminaModel

    def __init__(
        self, model: LuminaModel, text: Text, guided: bool, size: tuple[int, int], constrained: bool,
        window: int = 0,
    ) -> None:  # fmt: skip
        rows = len(text.states)
        start = model.embed(torch.full((rows, 1), model.start, device=text.states.device))
        self.counts = [n + 1 for n in text.lengths.tolist()]
        prefix = torch.cat((text.states, torch.zeros_like(start)), 1)
        at = text.lengths.long()[:, None, None].expand(rows, 1, prefix.shape[2])
        prefix = prefix.scatter(1, at, start)
        if guided:
            alone = F.pad(start, (0, 0, 0, prefix.shape[1] - 1))
            prefix, self.counts = torch.cat((prefix, alone)), self.counts + [1] * rows
        h, w = size
        shape = torch.tensor([model.number(h), model.number(w)])
        super().__init__(model, prefix, rows, model.tokens_of(h, w), window)
        self.size, self.constrained, self.begun = size, constrained, False
        self.shape = shape.to(self.device)

    def logits(self, turn: Turn) -> Tensor:
        if self.begun:
            return super().logits(turn)
        if turn.drafts is not None:
            raise ValueError("expected no drafts, got some")
        self.begun, starts = True, [0] * len(self.pending)

        def attend(i: int, qkv: Tensor) -> Tensor:
            cache = self.caches[i]
            return cache.attend_causal(cache.append(qkv, counts=self.counts, rope=self.rope), starts)

        logits = self.decoder.run(self.pending, attend)
        last = torch.tensor(self.counts, device=logits.device) - 1
        return logits[torch.arange(len(logits), device=logits.device), last][:, None]

    def processors(self, turn: Turn) -> dict[str, Any]:
        """What the grammar forces, else the tokens of the picture alone."""
        at, model = turn.step, self.model
        if at < 2:
            return {"forced": self.shape[at].expand(self.rows, 1).contiguous()}
        if not self.constrained:
            return {}
        w = self.size[1]
        closes, ends = (at - 2) % (w + 1) == w, at == len(self.layout) - 1
        if closes or ends:
            token = model.end if ends else model.eol
            return {"forced": self.shape.new_full((self.rows, 1), token)}
        return {"allowed": torch.arange(model.vocab_size, device=self.device) < model.image_vocab}


class PairSession(LuminaSession):
    """The plain method of guidance: a session for the text, and one without it."""

    def __init__(self, model: LuminaModel, text: Text, *arguments: Any, **options: Any) -> None:
        super().__init__(model, text, *arguments, **options)
        nothing = Text(text.states[:, :0], torch.zeros_like(text.lengths))
        self.alone = LuminaSession(model, nothing, *arguments, **options)

    def logits(self, turn: Turn) -> Tensor:
        said = super().logits(turn)
        return said if turn.guidance is None else torch.cat((said, self.alone.logits(turn)))

    def feed(self, turn: Turn) -> None:
        super().feed(turn)
        self.alone.feed(turn)


def make(tokenizer: Any, classes: int) -> LuminaModel:
    return LuminaModel(tokenizer, classes, depth=6, width=192, heads=3, dropout=0.05)


SYSTEM = System(
    "lumina-mgpt",
    "Lumina-mGPT",
    "raster",
    "arXiv 2408.02657",
    "any shape by <h> <w>, <eol> and <end> in one causal sequence; guidance with caches of two lengths",
    grid_tokenizer,
    make,
    deviations="the text is four learned vectors per class; shapes in training are crops of token maps; "
    "weights load by the names of Chameleon in the package transformers, whose vocabulary is cut to what a "
    "picture needs",
    released=True,
)
