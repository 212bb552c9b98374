"""VAR's released generation loop in plain PyTorch: the peer of `VAR.generate`.

Straightforward, and nothing in it is slower than it has to be in that form: keys and values grow by
`torch.cat`, a block's modulation is computed where it is used, attention is `scaled_dot_product_attention`,
top-k and top-p sort, and the decoder runs torch's modules in their default layout. It uses the weights of an
`arimg` model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # the models it takes stand above it
    from arimg.generators import VAR

Block = Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]


@dataclass
class Trace:
    """Guided logits [B, l, V] and tokens [B, l] per scale, f_hat and the picture."""

    logits: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    f_hat: Tensor | None = None
    image: Tensor | None = None


def _attention(attn: Any, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    b, l, c = x.shape
    bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
    qkv = F.linear(x, attn.mat_qkv.weight, bias).view(b, l, 3, attn.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if attn.l2_norm:
        scale = attn.scale_mul_1H11.clamp_max(math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    if cache:
        k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
    cache["k"], cache["v"] = k, v
    out = F.scaled_dot_product_attention(q, k, v, scale=attn.softmax_scale)
    return F.linear(out.transpose(1, 2).reshape(b, l, c), attn.proj.weight, attn.proj.bias)


def block(block: Any, x: Tensor, cond: Tensor, cache: dict[str, Tensor]) -> Tensor:
    """One block; what is compiled where this loop is measured under torch.compile."""
    c = x.shape[-1]
    if hasattr(block, "ada_gss"):
        six = block.ada_gss + cond.view(-1, 1, 6, c)
    else:
        ada = block.ada_lin[1]
        six = F.linear(F.silu(cond), ada.weight, ada.bias).view(-1, 1, 6, c)
    gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)
    h = F.layer_norm(x, (c,), eps=1e-6) * (1 + scale1) + shift1
    x = x + _attention(block.attn, h, cache) * gate1
    h = F.layer_norm(x, (c,), eps=1e-6) * (1 + scale2) + shift2
    h = F.gelu(F.linear(h, block.ffn.fc1.weight, block.ffn.fc1.bias), approximate="tanh")
    return x + F.linear(h, block.ffn.fc2.weight, block.ffn.fc2.bias) * gate2


def _draw(logits: Tensor, top_k: int, top_p: float, rng: torch.Generator) -> Tensor:
    b, l, vocab = logits.shape
    kth = logits.topk(min(top_k, vocab), dim=-1, sorted=False).values.amin(-1, keepdim=True)
    logits = logits.masked_fill(logits < kth, -torch.inf)
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped[..., -1] = False
    logits = logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(-1).view(-1, vocab), 1, generator=rng).view(b, l)


@torch.inference_mode()
def generate(
    var: VAR,
    labels: Tensor,
    *,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
    given: Sequence[Tensor] | None = None,
    run_block: Block = block,
) -> Trace:
    """As `VAR.generate`. given: tokens of all scales to force. run_block: `block`, as it is or compiled."""
    quantizer, trace = var.tokenizer.quantize, Trace()
    rng = torch.Generator().manual_seed(seed)
    batch, sides, dtype = len(labels), [h for h, _ in quantizer.scales], var.pos_1LC.dtype
    last, size = len(sides) - 1, sides[-1]
    cond = var.class_emb(torch.cat((labels, torch.full_like(labels, var.num_classes))))
    positions = var.lvl_embed(var.layout.level())[None] + var.pos_1LC
    x = cond[:, None] + var.pos_start + positions[:, :1]
    f_hat = torch.zeros(batch, var.tokenizer.z_channels, size, size)
    caches: list[dict[str, Tensor]] = [{} for _ in var.blocks]
    for k, side in enumerate(sides):
        shared = var.shared_ada_lin(cond)
        for layer, cache in zip(var.blocks, caches):
            x = run_block(layer, x, shared, cache)
        scale, shift = var.head_nm.ada_lin(cond).view(-1, 1, 2, var.width).unbind(2)
        h = F.layer_norm(x, (var.width,), eps=1e-6) * (1 + scale) + shift
        logits = F.linear(h, var.head.weight, var.head.bias).float()
        t = cfg * k / last
        logits = (1 + t) * logits[:batch] - t * logits[batch:]
        tokens = given[k] if given else _draw(logits, top_k, top_p, rng)
        trace.logits.append(logits)
        trace.tokens.append(tokens)
        codes = quantizer.embedding(tokens).transpose(1, 2).reshape(batch, -1, side, side)
        if k < last:
            codes = F.interpolate(codes, size=(size, size), mode="bicubic")
        weight, bias = quantizer.phi_weights(k)
        f_hat = f_hat + 0.5 * codes + 0.5 * F.conv2d(codes, weight, bias, padding=1)
        if k < last:
            start, end = var.layout.segments[k + 1]
            maps = F.interpolate(f_hat, size=(sides[k + 1],) * 2, mode="area").flatten(2).transpose(1, 2)
            embedded = F.linear(maps.to(dtype), var.word_embed.weight, var.word_embed.bias)
            x = (embedded + positions[:, start:end]).repeat(2, 1, 1)
    trace.f_hat = f_hat
    trace.image = decode(var, f_hat)
    return trace


def _resnet(block: Any, x: Tensor) -> Tensor:
    h = _conv(block.conv1, F.silu(block.norm1(x), inplace=True))
    h = _conv(block.conv2, F.silu(block.norm2(h), inplace=True))
    out: Tensor = block.nin_shortcut(x) + h
    return out


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


def _self_attention(block: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    q, k, v = block.qkv(block.norm(x)).view(b, 3, c, h * w).unbind(1)
    weights = (q.transpose(1, 2) @ k * c**-0.5).softmax(-1)
    out: Tensor = x + block.proj_out((v @ weights.transpose(1, 2)).view(b, c, h, w))
    return out


@torch.inference_mode()
def decode(var: VAR, f_hat: Tensor) -> Tensor:
    """f_hat [B, z, h, w] -> pictures [B, 3, H, W] in [0, 1]."""
    decoder: Any = var.tokenizer.decoder
    h = _conv(decoder.conv_in, _conv(var.tokenizer.post_quant_conv, f_hat))
    h = _resnet(decoder.mid.block_2, _self_attention(decoder.mid.attn_1, _resnet(decoder.mid.block_1, h)))
    for i in reversed(range(len(decoder.up))):
        level = decoder.up[i]
        for j, block in enumerate(level.block):
            h = _resnet(block, h)
            if len(level.attn):
                h = _self_attention(level.attn[j], h)
        if i:
            h = _conv(level.upsample.conv, F.interpolate(h, scale_factor=2.0, mode="nearest"))
    h = _conv(decoder.conv_out, F.silu(decoder.norm_out(h), inplace=True))
    return h.clamp(-1, 1).add(1).mul(0.5)
