"""LlamaGen from a text: states of a text encoder stand before the picture (arXiv 2406.06525)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.generators.llamagen import LlamaGen
from arimg.nn import checkpoint
from arimg.nn.rope import rope_2d
from arimg.reference.kv_cache import Rope

_WHAT = "TextLlamaGen"


class Captions(NamedTuple):
    """states [B, T, C] of a text encoder, of which those count where mask [B, T] is true (None: all)."""

    states: Tensor
    mask: Tensor | None = None


class _Projection(nn.Module):
    def __init__(self, c_in: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c_in, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class _CaptionEmbedding(nn.Module):
    uncond_embedding: Tensor

    def __init__(self, tokens: int, c_in: int, width: int) -> None:
        super().__init__()
        self.cap_proj = _Projection(c_in, width)
        self.register_buffer("uncond_embedding", torch.randn(tokens, c_in) * c_in**-0.5)


class TextLlamaGen(LlamaGen):
    """Next-token generator of pictures for captions; all else is as in `LlamaGen`.

    Parameter names are those of the released `t2i_*.pt`; the default arguments are the sizes of the XL model
    for 256 px. A caption stands at the end of the caption_tokens places in front of the picture; the places
    before it are padding, which no other sees, and "no caption" is as long as the caption that it stands
    beside. Queries and keys of these places are zero, as released: only their values count.
    """

    def __init__(
        self,
        vocab_size: int = 16384,
        caption_tokens: int = 120,
        caption_width: int = 2048,
        depth: int = 36,
        width: int = 1280,
        heads: int = 20,
        **options: Any,
    ) -> None:
        super().__init__(vocab_size, 0, depth, width, heads, **options)
        self.caption_tokens, self.caption_width = caption_tokens, caption_width
        embedding = _CaptionEmbedding(caption_tokens, caption_width, width)
        for product in (embedding.cap_proj.fc1, embedding.cap_proj.fc2):
            nn.init.normal_(product.weight, std=0.02)
        self.cls_embedding: Any = embedding

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values."""
        others = {n: v for n, v in super().config().items() if n != "num_classes"}
        return others | dict(caption_tokens=self.caption_tokens, caption_width=self.caption_width)

    @staticmethod
    def _condition_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
        shape = checkpoint.tensor_of(state, "cls_embedding.uncond_embedding", 2, _WHAT).shape
        return dict(zip(("caption_tokens", "caption_width"), shape))

    def rope(self) -> Rope:
        """Rotations of the caption (to zero) and of the grid."""
        head_dim, device = self.width // self.heads, self.tok_embeddings.weight.device
        prefix = self.caption_tokens
        return rope_2d(self.grid, self.grid, head_dim, self.rope_base, prefix=prefix, device=device)

    def labels(self, labels: Any) -> Captions:  # type: ignore[override]
        """Check captions and put what counts at the end of `caption_tokens` places; the others are zero.

        labels: `Captions` or their states alone.
        """
        states, mask = labels if isinstance(labels, Captions) else Captions(labels)
        places, c_in = self.caption_tokens, self.caption_width
        if states.dim() != 3 or states.shape[1] > places or states.shape[2] != c_in:
            raise ValueError(f"expected states [B, T <= {places}, {c_in}], got {list(states.shape)}")
        weight = self.tok_embeddings.weight
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=weight.device)
        if mask.shape != states.shape[:2]:
            raise ValueError(f"expected mask {list(states.shape[:2])}, got {list(mask.shape)}")
        mask = mask.to(weight.device, torch.bool)
        states = torch.where(mask[..., None], states.to(weight), 0)
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        missing = places - states.shape[1]
        states = states.gather(1, order[..., None].expand_as(states))
        return Captions(F.pad(states, (0, 0, missing, 0)), F.pad(mask.gather(1, order), (missing, 0)))

    def prefix(self, labels: Captions) -> Tensor:  # type: ignore[override]
        """What stands before the pictures of these captions, checked: [B, P, C]."""
        embedded: Tensor = self.cls_embedding.cap_proj(labels.states)
        return embedded

    def padding(self, labels: Captions) -> Tensor | None:  # type: ignore[override]
        """How many places are in front of each caption, int32 [B]; None where there are none."""
        assert labels.mask is not None
        hidden = (~labels.mask).sum(1, dtype=torch.int32)
        return hidden if hidden.any() else None

    def dropped(self, labels: Captions) -> Captions:  # type: ignore[override]
        """In training some of the checked captions become "no caption"."""
        if not self.training or self.class_dropout == 0:
            return labels
        dropped = torch.rand(len(labels.states), 1, 1, device=labels.states.device) < self.class_dropout
        nothing = self.cls_embedding.uncond_embedding
        return Captions(torch.where(dropped, nothing, labels.states), labels.mask)

    def with_unconditional(self, labels: Captions, guided: bool) -> Captions:  # type: ignore[override]
        """Captions of all rows of a generation: where guidance is on, "no caption" for each behind them, as
        long as it.
        """
        if not guided:
            return labels
        assert labels.mask is not None
        nothing = self.cls_embedding.uncond_embedding.expand_as(labels.states)
        return Captions(torch.cat((labels.states, nothing)), torch.cat((labels.mask, labels.mask)))

    def forward(self, labels: Any, indices: Tensor) -> Tensor:
        """As of `LlamaGen`, for `Captions` or their states alone."""
        return super().forward(labels, indices)

    def generate(  # type: ignore[override]
        self, states: Tensor, mask: Tensor | None = None, *, cfg: float = 7.5, **options: Any
    ) -> Tensor:
        """Tokens of pictures for captions: states [B, T, C] of a text encoder, mask [B, T] true where they
        count -> int64 [B, tokens], in raster order. Options are those of `LlamaGen.generate`.
        """
        return super().generate(Captions(states, mask), cfg=cfg, **options)  # type: ignore[arg-type]
