"""What a text-conditioned generator is told: states of a text, for cross-attention or as a prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.nn.labels import class_labels
from arimg.nn.linear import Linear, linear


class Text(NamedTuple):
    """states [B, T, C] of a text encoder, of which row b has the first lengths[b]; lengths int32 [B]."""

    states: Tensor
    lengths: Tensor

    @property
    def pooled(self) -> Tensor:
        """The mean of the states that exist, [B, C]."""
        there = torch.arange(self.states.shape[1], device=self.states.device) < self.lengths[:, None]
        kept = torch.where(there[..., None], self.states, 0.0)
        return kept.sum(1) / self.lengths[:, None].clamp(min=1)

    @property
    def last(self) -> Tensor:
        """The last state of each row, [B, C]: of CLIP's states its summary of the text."""
        return self.states[torch.arange(len(self.states), device=self.states.device), self.lengths.long() - 1]


class Conditioner(nn.Module):
    """A condition as `Text` of `width` channels: class labels become `tokens` learned vectors each, given
    states are projected. Label -1 (or num_classes) is "nothing said", which has vectors of its own.

    raw: states stay as they are, and what is projected is up to the model. as_long: of the vectors of
    "nothing said" there are as many as of the text that they stand beside.
    """

    def __init__(
        self, num_classes: int, tokens: int, width: int, text_width: int | None = None, *, raw: bool = False,
        as_long: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.tokens, self.width = num_classes, tokens, width
        self.raw, self.as_long = raw, as_long
        self.text_width = text_width or width
        self.table = nn.Parameter(torch.randn(num_classes + 1, tokens, self.text_width) * 0.5)
        self.project = Linear(self.text_width, width)

    def rows(self, condition: Any) -> int:
        return len(condition.states) if isinstance(condition, Text) else len(self._labels(condition))

    def forward(self, condition: Any) -> Text:
        """condition: labels [B], or a `Text` of text_width channels."""
        device = self.table.device
        if isinstance(condition, Text):
            states, lengths = condition
            if states.dim() != 3 or states.shape[2] != self.text_width or len(lengths) != len(states):
                raise ValueError(
                    f"expected states [B, T, {self.text_width}] and lengths [B], got "
                    f"{list(states.shape)} and {list(lengths.shape)}"
                )
            if lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= states.shape[1]:
                raise ValueError(f"expected lengths of 1..{states.shape[1]}, got {lengths.tolist()}")
            return self._text(states.to(self.table), lengths.to(device, torch.int32))
        labels = self._labels(condition)
        full = torch.full((len(labels),), self.tokens, dtype=torch.int32, device=device)
        return self._text(self.table[labels], full)

    def _text(self, states: Tensor, lengths: Tensor) -> Text:
        return Text(states if self.raw else self.project(states), lengths)

    def beside_nothing(self, condition: Any) -> Text:
        """The rows of the condition, then as many with nothing said."""
        said = self(condition)
        nothing = self(torch.full((len(said.states),), -1, device=self.table.device))
        if self.as_long:
            nothing = Text(nothing.states, torch.minimum(said.lengths, nothing.lengths))
        longest = max(said.states.shape[1], self.tokens)
        states = [
            nn.functional.pad(t.states, (0, 0, 0, longest - t.states.shape[1])) for t in (said, nothing)
        ]
        return Text(torch.cat(states), torch.cat((said.lengths, nothing.lengths)))

    def drop(self, labels: Tensor, rate: float) -> Tensor:
        """Labels of which each becomes "nothing said" with this probability."""
        dropped = torch.rand(len(labels), device=labels.device) < rate
        return torch.where(dropped, self.num_classes, labels)

    def _labels(self, labels: int | Sequence[int] | Tensor) -> Tensor:
        return class_labels(labels, self.num_classes, self.table.device)


def keys_without_bias(states: Tensor, weight: Tensor, v_bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, D] of states [B, T, C] by one product; weight [2 H D, C], v_bias [H D]."""
    return by_head(linear(states, weight, torch.cat((torch.zeros_like(v_bias), v_bias))), heads)


def by_head(kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values side by side, [B, T, 2 H D] -> [B, H, T, D] each."""
    k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return k.contiguous(), v.contiguous()


class CrossAttention(nn.Module):
    """Attention of picture tokens over the states of a text, each row over its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1 / math.sqrt(width // heads)
        self.to_q, self.to_kv = Linear(width, width), Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def keys(self, text: Text) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D]: once for a generation."""
        return by_head(self.to_kv(text.states), self.heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """x [B, L, C], keys and values as `keys` gives them, lengths int32 [B]."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        end = lengths[:, None].expand(-1, x.shape[1]).contiguous()
        out = ops.row_interval_attention(q, k, v, torch.zeros_like(end), end, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))
