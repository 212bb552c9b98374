"""Attention under a layout's visibility, by whichever path is faster for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.layout import Layout, Visibility

PATHS = ("auto", "sparse", "dense")


class BreakEven(NamedTuple):
    """At `length`, torch's attention was faster above `density`, the share of pairs that is seen."""

    length: int
    density: float


# Measured on one thread of a Zen 4 machine, 16 heads of 64 (docs/attention.md): where the line through the
# times of two densities crosses the time of torch's attention, under a bool mask ("mask") or without one.
# Other lengths take the nearest entry. Infinite: never slower.
_NEVER = float("inf")
BREAK_EVEN: dict[tuple[str, torch.dtype], tuple[BreakEven, ...]] = {
    ("mask", torch.float32): (
        BreakEven(16, 0.0),
        BreakEven(36, 1.21),
        BreakEven(256, 1.25),
        BreakEven(1024, 1.27),
    ),
    ("full", torch.float32): (BreakEven(16, 0.0), BreakEven(36, _NEVER)),
    ("causal", torch.float32): (BreakEven(16, 0.0), BreakEven(36, _NEVER)),
    ("mask", torch.bfloat16): (BreakEven(4, _NEVER), BreakEven(256, 1.34), BreakEven(1024, 1.26)),
    ("full", torch.bfloat16): (BreakEven(4, _NEVER),),
    ("causal", torch.bfloat16): (BreakEven(4, _NEVER),),
}


def sparse_is_faster(
    visibility: Visibility, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> bool:
    """Whether `ops.row_interval_attention` beats torch's attention for these lengths and this rule.

    Torch's attention needs no mask where everything is seen or all earlier tokens are; else it takes a bool
    mask. CPU: from the measured BREAK_EVEN. Other devices, where nothing has been measured: where torch would
    need a mask.
    """
    if torch.device(device).type != "cpu":
        return visibility.kind == "mask"
    table = BREAK_EVEN.get((visibility.kind, dtype)) or BREAK_EVEN.get((visibility.kind, torch.bfloat16))
    if not table:
        return True
    entry = min(table, key=lambda e: abs(torch.tensor(e.length / max(visibility.length, 1)).log().item()))
    return visibility.density <= entry.density


class RowIntervalAttention(nn.Module):
    """Attention of q, k, v [B, H, L, D] under a rule of a layout: forward(q, k, v).

    rule, prefix, prefix_rule, sinks: see `Layout.visibility`; L is prefix + layout.length. scale defaults to
    1 / sqrt(D). heads: learn a factor of the scores per head (`head_scale`, starting at 1). path: "sparse"
    (the kernels), "dense" (torch's attention, with a mask where it needs one) or "auto", the faster of both
    by `sparse_is_faster`. k and v may have fewer heads, whose number divides H.
    """

    def __init__(
        self,
        layout: Layout,
        rule: str = "level-causal",
        *,
        prefix: int = 0,
        prefix_rule: str = "full",
        sinks: int = 0,
        scale: float | None = None,
        heads: int | None = None,
        path: str = "auto",
    ) -> None:
        super().__init__()
        if path not in PATHS:
            raise ValueError(f"expected a path of {PATHS}, got {path!r}")
        self.layout, self.rule, self.scale, self.path = layout, rule, scale, path
        self.prefix, self.prefix_rule, self.sinks = prefix, prefix_rule, sinks
        self.visibility()  # refuses what does not fit
        self.head_scale = None if heads is None else nn.Parameter(torch.ones(heads))

    def visibility(self, device: torch.device | str = "cpu") -> Visibility:
        return self.layout.visibility(
            self.rule, prefix=self.prefix, prefix_rule=self.prefix_rule, sinks=self.sinks, device=device
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        """lengths: int [B], the tokens that exist of each entry, padding at the end (of no meaning there)."""
        seen = self.visibility(q.device)
        if q.dim() != 4 or q.shape[2] != seen.length:
            raise ValueError(f"expected q [B, H, {seen.length}, D], got {list(q.shape)}")
        sparse = self.path == "sparse" or (self.path == "auto" and sparse_is_faster(seen, q.dtype, q.device))
        plan = seen.plan if sparse else None
        if lengths is not None:
            seen = seen.cut(lengths)
        if not sparse:
            return self._dense(q, k, v, seen)
        out: Tensor = ops.row_interval_attention(
            q, k, v, seen.row_start, seen.row_end, scale=self.scale, head_scale=self.head_scale,
            sinks=seen.sinks, self_key=seen.self_key, plan=plan,
        )  # fmt: skip
        return out

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, seen: Visibility) -> Tensor:
        if self.head_scale is not None:
            q = q * self.head_scale.to(q.dtype)[:, None, None]
        mask = seen.mask() if seen.kind == "mask" else None
        if mask is not None and not bool((seen.row_end > seen.row_start).all()):
            mask = mask | ~mask.any(-1, keepdim=True)  # a softmax over nothing would be NaN
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=seen.kind == "causal", scale=self.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{len(self.layout)} steps, {self.layout.length} tokens, {self.rule}, path={self.path}"
