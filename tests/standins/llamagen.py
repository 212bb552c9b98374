"""LlamaGen with the names, signatures and results of the released code, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class ModelArgs:
    dim: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_kv_head: int | None = None
    norm_eps: float = 1e-5
    rope_base: float = 10000
    num_classes: int = 7
    vocab_size: int = 50
    block_size: int = 25
    hidden: int = 96
    dropout: float = 0.1
    model_type: str = "c2i"
    cls_token_num: int = 1
    caption_dim: int = 12


class LabelEmbedder(nn.Module):
    def __init__(self, classes, dim):
        super().__init__()
        self.embedding_table, self.num_classes = nn.Embedding(classes + 1, dim), classes

    def forward(self, labels, train):
        if train:
            dropped = torch.rand(len(labels), device=labels.device) < 0.1
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]


class MLP(nn.Module):
    def __init__(self, c_in, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c_in, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    def __init__(self, c_in, dim, tokens):
        super().__init__()
        self.cap_proj = MLP(c_in, dim)
        self.register_buffer("uncond_embedding", torch.randn(tokens, c_in) / c_in**0.5)

    def forward(self, captions, train):
        if train:
            dropped = torch.rand(len(captions), 1, 1, device=captions.device) < 0.1
            captions = torch.where(dropped, self.uncond_embedding, captions)
        return self.cap_proj(captions)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).type_as(x) * self.weight


class FeedForward(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.w1, self.w3, self.w2 = (
            nn.Linear(a, b, bias=False)
            for a, b in ((args.dim, args.hidden), (args.dim, args.hidden), (args.hidden, args.dim))
        )
        self.ffn_dropout = nn.Dropout(args.dropout)

    def forward(self, x):
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class KVCache(nn.Module):
    def __init__(self, batch, length, heads, head_dim, dtype):
        super().__init__()
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch, heads, length, head_dim, dtype=dtype))

    def update(self, input_pos, k, v):
        self.k_cache[:, :, input_pos], self.v_cache[:, :, input_pos] = k, v
        return self.k_cache, self.v_cache


def rotated(x, table):
    """x [B, L, H, D], table [L, D / 2, 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (t[None, :, None] for t in table.unbind(-1))
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(3).type_as(x)


def rope_table(grid, head_dim, base, prefix):
    frequency = base ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angle = torch.cat([axis.flatten()[:, None] * frequency for axis in (row, column)], -1)
    table = torch.stack((angle.cos(), angle.sin()), -1)
    return torch.cat((table.new_zeros(prefix, head_dim // 2, 2), table))


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_head, self.n_kv_head = args.n_head, args.n_kv_head or args.n_head
        self.dim, self.head_dim = args.dim, args.dim // args.n_head
        self.wqkv = nn.Linear(args.dim, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.kv_cache, self.resid_dropout = None, nn.Dropout(args.dropout)

    def forward(self, x, freqs_cis=None, input_pos=None, mask=None):
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (rotated(q, freqs_cis), rotated(k, freqs_cis), v))
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention, self.feed_forward = Attention(args), FeedForward(args)
        self.attention_norm, self.ffn_norm = (
            RMSNorm(args.dim, args.norm_eps),
            RMSNorm(args.dim, args.norm_eps),
        )

    def forward(self, x, freqs_cis, input_pos, mask=None):
        x = x + self.attention(self.attention_norm(x), freqs_cis, input_pos, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.config, self.num_classes, self.model_type = args, args.num_classes, args.model_type
        self.cls_token_num = args.cls_token_num
        if args.model_type == "c2i":
            self.cls_embedding = LabelEmbedder(args.num_classes, args.dim)
        else:
            self.cls_embedding = CaptionEmbedder(args.caption_dim, args.dim, args.cls_token_num)
        self.tok_embeddings, self.tok_dropout = (
            nn.Embedding(args.vocab_size, args.dim),
            nn.Dropout(args.dropout),
        )
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.freqs_cis = self._table()
        self.max_batch_size = self.max_seq_length = -1

    def _table(self):
        args = self.config
        return rope_table(
            int(args.block_size**0.5), args.dim // args.n_head, args.rope_base, self.cls_token_num
        )

    def setup_caches(self, max_batch_size, max_seq_length, dtype):
        length = -(-max_seq_length // 8) * 8
        self.max_batch_size, self.max_seq_length = max_batch_size, length
        for layer in self.layers:
            a = layer.attention
            a.kv_cache = KVCache(max_batch_size, length, a.n_head, a.head_dim, dtype)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        self.causal_mask = mask[None].repeat(max_batch_size, 1, 1)
        self.freqs_cis = self._table()

    def _condition(self, cond_idx):
        return self.cls_embedding(cond_idx, self.training)[:, : self.cls_token_num]

    def forward(self, idx, cond_idx, input_pos=None, targets=None, mask=None, valid=None):
        if idx is not None and cond_idx is not None:
            h = torch.cat((self._condition(cond_idx), self.tok_embeddings(idx)), dim=1)
        else:
            h = self.tok_embeddings(idx) if cond_idx is None else self._condition(cond_idx)
            mask = self.causal_mask[: len(h), None, input_pos]
        h = self.tok_dropout(h)
        table = self.freqs_cis[: h.shape[1]] if self.training else self.freqs_cis[input_pos]
        for layer in self.layers:
            h = layer(h, table, input_pos, mask)
        logits = self.output(self.norm(h)).float()
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def hide(model, mask):
    """Columns of the causal mask where mask [B, T] is 0, but for the diagonal."""
    model.causal_mask[:, :, : mask.shape[1]] &= mask.bool()[:, None]
    model.causal_mask |= torch.eye(model.causal_mask.shape[1], dtype=torch.bool, device=mask.device)


@torch.no_grad()
def generate(model, cond, max_new_tokens, cfg_scale=1.0, cfg_interval=-1, emb_masks=None):
    """The most likely tokens, through the calls that the released function makes."""
    guided, text = cfg_scale > 1.0, model.model_type == "t2i"
    T = cond.shape[1] if text else 1
    rows = cond
    if guided:
        nothing = model.cls_embedding.uncond_embedding.expand_as(cond) if text else None
        rows = torch.cat([cond, torch.full_like(cond, model.num_classes) if nothing is None else nothing])
    with torch.device(cond.device):
        model.setup_caches(
            max_batch_size=len(rows),
            max_seq_length=T + max_new_tokens,
            dtype=model.tok_embeddings.weight.dtype,
        )
    if emb_masks is not None:
        hide(model, torch.cat([emb_masks, emb_masks]) if guided else emb_masks)

    def pick(logits, guide):
        if guided:
            c, u = logits[:, -1].chunk(2)
            return (u + (c - u) * cfg_scale if guide else c).argmax(-1, keepdim=True)
        return logits[:, -1].argmax(-1, keepdim=True)

    token = pick(model(None, rows, torch.arange(0, T, device=cond.device))[0], True)
    tokens, input_pos = [token], torch.tensor([T], device=cond.device, dtype=torch.int)
    for i in range(max_new_tokens - 1):
        logits, _ = model(torch.cat([token, token]) if guided else token, cond_idx=None, input_pos=input_pos)
        token = pick(logits, cfg_interval < 0 or i <= cfg_interval)
        input_pos += 1
        tokens.append(token)
    return torch.cat(tokens, dim=1)
