"""Next-scale generation from a text: what Infinity, STAR and TokenFlow have in common.

A transformer over the tokens of all scales, in which every token sees its own scale and those before. The
text comes by cross-attention in each block, or stands as a causal prefix before the picture.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.cache import KVCache
from arimg.generators.loop import Session, Turn
from arimg.layout import Layout, Visibility
from arimg.nn.adaln import FeedForward, SelfAttention
from arimg.nn.conditioning import Conditioner, CrossAttention, Text
from arimg.nn.linear import Linear
from arimg.reference.kv_cache import Rope, rotate, split_qk_norm

Attend = Callable[[int, Tensor], Tensor]


class ScaleBlock(nn.Module):
    """Self-attention, cross-attention where there is some, feed-forward; norms before each."""

    def __init__(self, width: int, heads: int, hidden: int, cross: bool) -> None:
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.ffn = SelfAttention(width, heads, True), FeedForward(width, hidden)
        self.norm2 = nn.LayerNorm(width) if cross else None
        self.cross = CrossAttention(width, heads) if cross else None

    def forward(self, h: Tensor, attend: Callable[[Tensor], Tensor], text: Callable[..., Tensor]) -> Tensor:
        h = h + self.attn.proj(attend(self.attn.qkv(self.norm1(h))))
        if self.cross is not None and self.norm2 is not None:
            h = h + text(self.cross, self.norm2(h))
        return h + self.ffn(self.norm3(h))


def masked(block: ScaleBlock, qkv: Tensor, seen: Visibility, rope: Rope | None, at: Tensor) -> Tensor:
    """Self-attention of a whole sequence, without a cache. at: int64 [1, L], rows of the rope."""
    q, k, v = split_qk_norm(qkv, block.attn.q_scale(), True)
    if rope is not None:
        q, k = (rotate(t, rope, at).to(qkv.dtype) for t in (q, k))
    out = ops.row_interval_attention(
        q, k, v, seen.row_start, seen.row_end, scale=1.0, sinks=seen.sinks, self_key=seen.self_key
    )
    return out.transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


class ScaleText(nn.Module):
    """The network. cross: the text is looked at by cross-attention, and its mean is the first token's input;
    otherwise its states stand before the picture.

    channels: of the maps that a scale sees of those before it; outputs: of the head, per token. Subclasses
    choose `rope` (None: learned absolute positions).
    """

    def __init__(
        self, layout: Layout, channels: int, outputs: int, num_classes: int, *, depth: int = 6,
        width: int = 192, heads: int = 3, tokens: int = 4, text_width: int | None = None,
        cross: bool = True, class_dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads or (width // heads) % 8:
            raise ValueError(f"expected a width that {heads} heads divide into multiples of 8, got {width}")
        self.layout, self.width, self.heads = layout, width, heads
        self.cross, self.class_dropout = cross, class_dropout
        self.text = Conditioner(
            num_classes, tokens, width, text_width, raw=self.raw_text, as_long=self.nothing_as_long
        )
        self.word_embed = Linear(channels, width)
        self.pos_start = nn.Parameter(torch.randn(1, layout.sizes[0], width) * 0.02)
        self.lvl_embed = nn.Embedding(len(layout), width)
        self.blocks = nn.ModuleList(self._block() for _ in range(depth))
        self.norm = self._norm()
        self.head = Linear(width, outputs)
        self.pos_embed = nn.Parameter(torch.randn(1, layout.length, width) * 0.02) if not self.turns else None
        for table in (self.lvl_embed.weight, self.head.weight):
            nn.init.normal_(table, std=0.02)
        for block in self.layers:
            for end in (block.attn.proj, block.ffn.fc2):
                end.weight.data.div_(math.sqrt(2 * depth))

    turns = True  # positions are rotations
    raw_text = False  # the states of the text are not projected before the model sees them
    nothing_as_long = False  # unconditional rows have as many states as the text beside them

    def _block(self) -> ScaleBlock:
        return ScaleBlock(self.width, self.heads, 4 * self.width, self.cross)

    def _norm(self) -> nn.Module:
        """Before the head."""
        return nn.LayerNorm(self.width)

    @property
    def layers(self) -> list[ScaleBlock]:
        return list(self.blocks)  # type: ignore[arg-type]

    def rope(self) -> Rope | None:
        """Rotations of the layout's tokens, [L, head_dim / 2]."""
        return None

    def positions(self) -> Tensor:
        """Level, and where there are no rotations position, of each token: [1, L, C]."""
        level = self.lvl_embed(self.layout.level(self.lvl_embed.weight.device))[None]
        return level if self.pos_embed is None else level + self.pos_embed

    def told(self, text: Text) -> Any:
        """What the blocks need of a text, once for a generation: keys and values of each."""
        return [block.cross.keys(text) for block in self.layers if block.cross is not None]

    def first(self, text: Text, told: Any) -> Tensor:
        """The input of the first scale, [B, n, C]."""
        if self.cross:
            return self.pos_start + text.pooled[:, None]
        return self.pos_start.expand(len(text.states), -1, -1)

    def embed(self, maps: Tensor) -> Tensor:
        """What later scales see of those before them: [B, n, channels] -> [B, n, C]."""
        out: Tensor = self.word_embed(maps.to(self.word_embed.weight.dtype))
        return out

    def features(self, x: Tensor, text: Text, told: Any, attend: Attend) -> Tensor:
        """The blocks and the last norm, [B, L, C]."""

        def look(i: int) -> Callable[[CrossAttention, Tensor], Tensor]:
            return lambda cross, h: cross(h, *told[i], text.lengths)

        for i, block in enumerate(self.layers):
            x = block(x, lambda qkv, i=i: attend(i, qkv), look(i))
        out: Tensor = self.norm(x)
        return out

    def whole(self, x: Tensor, text: Text, told: Any, scales: int | None = None) -> Tensor:
        """Features of the first scales (all of them), from their inputs x [B, L, C], without a cache."""
        layout = Layout(self.layout.shapes[:scales])
        prefix = 0 if self.cross else text.states.shape[1]
        seen = layout.visibility("level-causal", prefix=prefix, prefix_rule="token-causal", device=x.device)
        rope, at = self.rope(), torch.arange(layout.length, device=x.device)[None]
        x = x + self.positions()[:, : layout.length]
        if prefix:
            x = torch.cat((text.states, x), 1)

        def attend(i: int, qkv: Tensor) -> Tensor:
            return masked(self.layers[i], qkv, seen, rope, at)

        return self.features(x, text, told, attend)[:, prefix:]

    def taught(self, text: Text, maps: Tensor) -> Tensor:
        """Features of all scales from what each but the first sees of those before."""
        told = self.told(text)
        return self.whole(torch.cat((self.first(text, told), self.embed(maps)), 1), text, told)

    def teacher_forced(self, condition: Any, maps: Tensor) -> Tensor:
        """Features [B, L, C]. condition: labels or `Text`; maps [B, L - first, channels]: what each scale but
        the first sees of those before.
        """
        rest = self.layout.length - self.layout.sizes[0]
        if maps.dim() != 3 or maps.shape[1:] != (rest, self.word_embed.in_features):
            raise ValueError(
                f"expected maps [B, {rest}, {self.word_embed.in_features}], got {list(maps.shape)}"
            )
        if self.text.rows(condition) != len(maps):
            raise ValueError(f"expected a condition of {len(maps)} rows, got {self.text.rows(condition)}")
        if self.training and isinstance(condition, Tensor):
            condition = self.text.drop(condition, self.class_dropout)
        text = self.text(condition)
        return self.taught(text, maps)


class ScaleSession(Session):
    """One generation: keys and values of the text and of the scales so far. Subclasses say what the next
    scale sees (`maps`) and what becomes of tokens (`feed`).

    cached=False runs all scales so far again in every pass (the plain method; the same logits).
    """

    def __init__(self, model: ScaleText, condition: Any, guided: bool, cached: bool = True) -> None:
        self.model, self.layout, self.cached = model, model.layout, cached
        self.rows, self.guided = model.text.rows(condition), guided
        self.text = model.text.beside_nothing(condition) if guided else model.text(condition)
        self.device = self.text.states.device
        self.told, self.positions, self.rope = model.told(self.text), model.positions(), model.rope()
        self.inputs: list[Tensor] = []
        if not cached:
            return
        prefix = 0 if model.cross else self.text.states.shape[1]
        if prefix and len(set(self.text.lengths.tolist())) > 1:
            raise ValueError(f"expected a prefix of one length, got {self.text.lengths.tolist()}")
        shape = (len(self.text.states), model.heads, prefix + self.layout.length, model.width // model.heads)
        self.q_scales = [block.attn.q_scale() for block in model.layers]
        self.caches = [KVCache(*shape, self.text.states.dtype, self.device) for _ in model.layers]
        if prefix:
            model.features(self.text.states, self.text, self.told, self._attend_causal)

    @abstractmethod
    def maps(self, turn: Turn) -> Tensor:
        """What the scale of this pass sees, [B, n, channels]."""

    def features(self, turn: Turn) -> Tensor:
        """The backbone's output for the scale of this pass, [B or 2B, n, C]."""
        start, end = self.layout.segments[turn.step]
        if turn.step == 0 and turn.number == 0:
            x = self.model.first(self.text, self.told)
        else:
            x = self.model.embed(self.maps(turn))
            x = x.repeat(2, 1, 1) if self.guided else x
        self.again = turn.number > 0
        if self.cached:
            x = x + self.positions[:, start:end]
            return self.model.features(x, self.text, self.told, self._attend)
        self.inputs[turn.step :] = [x]
        whole = torch.cat(self.inputs, 1)
        return self.model.whole(whole, self.text, self.told, turn.step + 1)[:, start:]

    def _attend(self, i: int, qkv: Tensor) -> Tensor:
        cache = self.caches[i]
        write = cache.overwrite_last if self.again else cache.append
        q = write(qkv, self.q_scales[i], True, rope=self.rope)
        out = ops.cached_attention(q, cache.k, cache.v, cache.length, scale=1.0)
        return out.transpose(1, 2).flatten(2)

    def _attend_causal(self, i: int, qkv: Tensor) -> Tensor:
        q = self.caches[i].append(qkv, self.q_scales[i], True)
        return self.caches[i].attend_causal(q, scale=1.0).transpose(1, 2).flatten(2)
