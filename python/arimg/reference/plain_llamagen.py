"""LlamaGen's released generation loop in plain PyTorch: the peer of `LlamaGen.generate`.

As there: keys and values stand in a buffer of the full length, attention is `scaled_dot_product_attention`
over all of it under a mask, the guidance pair is one batch, top-k and top-p sort. It uses the weights of an
`arimg` model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # the models it takes stand above it
    from arimg.generators import LlamaGen

# (model, x [R, 1, C], position [1], cos and sin [T, D / 2], caches, mask [T, T]) -> logits [R, V]
Step = Callable[[Any, Tensor, Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]], Tensor], Tensor]


@dataclass
class Trace:
    """Guided logits [B, V] of each token, and the tokens [B, T]."""

    logits: list[Tensor] = field(default_factory=list)
    tokens: Tensor | None = None


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [R, 1, H, D], whose neighbouring channels are the pairs that turn."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(3).type_as(x)


def step(
    model: Any,
    x: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    caches: list[tuple[Tensor, Tensor]],
    mask: Tensor,
) -> Tensor:
    """One token of each row; what is compiled where this loop is measured under torch.compile."""
    heads, kv_heads, dim = model.heads, model.kv_heads, model.width // model.heads
    turn = cos[position], sin[position]
    seen = mask[position][None, None]
    for layer, (k_cache, v_cache) in zip(model.layers, caches):
        qkv = F.linear(_norm(x, layer.attention_norm.weight, model.eps), layer.attention.wqkv.weight)
        q, k, v = qkv.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=2)
        k_cache[:, :, position] = _rotated(k, *turn).transpose(1, 2)
        v_cache[:, :, position] = v.transpose(1, 2)
        keys, values = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k_cache, v_cache))
        out = F.scaled_dot_product_attention(_rotated(q, *turn).transpose(1, 2), keys, values, attn_mask=seen)
        x = x + F.linear(out.transpose(1, 2).flatten(2), layer.attention.wo.weight)
        h, ffn = _norm(x, layer.ffn_norm.weight, model.eps), layer.feed_forward
        x = x + F.linear(F.silu(F.linear(h, ffn.w1.weight)) * F.linear(h, ffn.w3.weight), ffn.w2.weight)
    return F.linear(_norm(x, model.norm.weight, model.eps), model.output.weight)[:, -1].float()


def _draw(logits: Tensor, top_k: int, top_p: float, rng: torch.Generator) -> Tensor:
    """logits [B, V] -> tokens [B, 1]"""
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        descending, order = logits.sort(dim=-1, descending=True)
        dropped = descending.softmax(-1).cumsum(-1) > top_p
        dropped[:, 1:], dropped[:, 0] = dropped[:, :-1].clone(), False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=rng)


@torch.inference_mode()
def generate(
    model: LlamaGen,
    labels: Tensor,
    *,
    cfg: float = 4.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    tokens: int | None = None,
    given: Tensor | None = None,
    run_step: Step = step,
) -> Trace:
    """As `LlamaGen.generate`. given: int64 [B, T], tokens to force. run_step: `step`, as it is or
    compiled.
    """
    total, trace = model.length if tokens is None else tokens, Trace()
    if not 0 < total <= model.length:
        raise ValueError(f"expected tokens from 1 to {model.length}, got {total}")
    guided = cfg > 1
    rows = torch.cat((labels, torch.full_like(labels, model.num_classes))) if guided else labels
    x = model.cls_embedding.embedding_table(rows)[:, None]
    shape = (len(rows), model.kv_heads, total, model.width // model.heads)
    caches = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in model.layers]
    rope, rng = model.rope(), torch.Generator().manual_seed(seed)
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    drawn: list[Tensor] = []
    for t in range(total):
        logits = run_step(model, x, torch.tensor([t]), rope.cos, rope.sin, caches, mask)
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + cfg * (cond - uncond)
        token = _draw(logits, top_k, top_p, rng) if given is None else given[:, t : t + 1]
        trace.logits.append(logits)
        drawn.append(token)
        x = model.tok_embeddings(torch.cat((token, token)) if guided else token)
    trace.tokens = torch.cat(drawn, dim=1)
    return trace
