"""Generators with the names of FlexVAR, Infinity, MAR and NAR, and of what HMAR's paper describes; small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from standins import llamagen, var


class FlexVAR(nn.Module):
    """Scales chosen at each call; the next one's input is the resized map of this one's codes."""

    def __init__(self, C=32, Cvae=8, vocab=40, classes=10):
        super().__init__()
        self.word_embed, self.class_emb = nn.Linear(Cvae, C), nn.Embedding(classes + 1, C)
        self.pos_start = nn.Parameter(torch.randn(1, 1, C))
        self.pos_1LC = nn.Parameter(torch.randn(1, C, 8, 8))
        self.shared_ada_lin = nn.Identity()
        self.blocks = nn.ModuleList(var.AdaLNSelfAttn(C, 2, False, True) for _ in range(2))
        self.head_nm, self.head = var.AdaLNBeforeHead(C), nn.Linear(C, vocab)

    def autoregressive_infer_cfg(self, codes, label_B, infer_patch_nums=(1, 2, 3)):
        """Logits of the last scale. codes [V, Cvae]: the tokenizer's."""
        cond = self.class_emb(torch.cat((label_B, torch.full_like(label_B, 10))))
        places = [F.interpolate(self.pos_1LC, size=(n, n), mode="area") for n in infer_patch_nums]
        places = [p.flatten(2).transpose(1, 2) for p in places]
        x = cond[:, None] + self.pos_start + places[0]
        for block in self.blocks:
            block.attn.kv_caching(True)
        for i, n in enumerate(infer_patch_nums):
            for block in self.blocks:
                x = block(x, self.shared_ada_lin(cond), None)
            c, u = self.head(self.head_nm(x, cond)).chunk(2)
            logits = 2.5 * c - 1.5 * u
            if i + 1 < len(infer_patch_nums):
                size = (infer_patch_nums[i + 1],) * 2
                h = codes[logits.argmax(-1)].transpose(1, 2).unflatten(2, (n, n))
                h = F.interpolate(h, size=size, mode="bicubic").flatten(2).transpose(1, 2)
                x = (self.word_embed(h) + places[i + 1]).repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return logits


class HMAR(var.VAR):
    """A VAR that sees the picture so far alone, and hides some tokens of a scale to draw them again."""

    def __init__(self, vae_local):
        super().__init__(vae_local)
        self.mask_embed = nn.Parameter(torch.randn(1, 1, self.C))
        self.mask_blocks = nn.ModuleList([var.AdaLNSelfAttn(self.C, self.num_heads, False, True)])

    def autoregressive_infer_cfg(self, B, label_B, **_):
        """Logits of the second scale with half of its tokens hidden."""
        f_hat = self.class_emb.weight.new_ones(B, self.word_embed.in_features, 2, 2)
        cond = self.class_emb(label_B)
        x = self.word_embed(f_hat.flatten(2).transpose(1, 2)) + self.pos_1LC[:, 1:5]
        hidden = torch.arange(4)[None, :, None] % 2 == 0
        x = torch.where(hidden, x + self.mask_embed, x)
        for block in [*self.blocks, *self.mask_blocks]:
            x = block(x, cond, None)
        return self.head(self.head_nm(x, cond))


class _TextBlock(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, C) / C**0.5)
        self.sa, self.ca, self.ffn = var.SelfAttention(C, 2, True), nn.Module(), var.FFN(C, 4 * C)
        self.ca.mat_q, self.ca.mat_kv, self.ca.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)
        self.norm = nn.LayerNorm(C, elementwise_affine=False)

    def forward(self, x, cond, text):
        g1, g2, s1, s2, b1, b2 = (self.ada_gss + cond).unbind(2)
        x = x + self.sa(self.norm(x) * (s1 + 1) + b1, None) * g1
        q, (k, v) = self.ca.mat_q(self.norm(x)), self.ca.mat_kv(text).chunk(2, -1)
        x = x + self.ca.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.ffn(self.norm(x) * (s2 + 1) + b2) * g2


class Infinity(nn.Module):
    """Bits of a scale at once, under a text."""

    def __init__(self, C=32, text=24, bits=6):
        super().__init__()
        self.cfg_uncond = nn.Parameter(torch.randn(5, text))
        self.text_norm, self.text_proj_for_sos = nn.LayerNorm(text), nn.Linear(text, C)
        self.text_proj_for_ca = nn.Sequential(nn.Linear(text, C), nn.GELU("tanh"), nn.Linear(C, C))
        self.pos_start, self.lvl_embed = nn.Parameter(torch.randn(1, 1, C)), nn.Embedding(15, C)
        self.norm0_ve, self.word_embed = nn.Identity(), nn.Linear(bits, C)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), var.SharedAdaLin(C, 6 * C))
        self.blocks = nn.ModuleList(_TextBlock(C) for _ in range(2))
        self.head_nm, self.head = var.AdaLNBeforeHead(C), nn.Linear(C, 2 * bits)

    def forward(self, text, bits):
        text = self.text_norm(torch.cat((text, self.cfg_uncond[None])))
        cond, keys = self.text_proj_for_sos(text.mean(1)), self.text_proj_for_ca(text)
        x = self.word_embed(bits).repeat(2, 1, 1) + self.lvl_embed.weight[0]
        x = torch.cat((cond[:, None] + self.pos_start, x), 1)
        for block in self.blocks:
            x = block(x, self.shared_ada_lin(cond), keys)
        return self.head(self.head_nm(x, cond))


class _VitBlock(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.fc1, self.fc2 = nn.Linear(C, 3 * C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        x = x + F.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DiffLoss(nn.Module):
    def __init__(self, target, z):
        super().__init__()
        self.net = nn.Module()
        self.net.cond_embed, self.net.input_proj = nn.Linear(z, 32), nn.Linear(target, 32)
        self.net.final_layer = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, target))

    def sample(self, z):
        x = torch.ones(len(z), self.net.input_proj.in_features)
        for _ in range(3):
            x = x - 0.1 * self.net.final_layer(F.silu(self.net.input_proj(x) + self.net.cond_embed(z)))
        return x


class MAR(nn.Module):
    """Vectors of a masked picture, by a small diffusion for each."""

    def __init__(self, C=32, channels=4, length=9):
        super().__init__()
        self.class_emb = nn.Embedding(10, C)
        self.z_proj, self.decoder_embed = nn.Linear(channels, C), nn.Linear(C, C)
        self.mask_token = nn.Parameter(torch.randn(1, 1, C))
        self.decoder_pos_embed_learned = nn.Parameter(torch.randn(1, length, C))
        self.encoder_blocks = nn.ModuleList([_VitBlock(C)])
        self.decoder_blocks = nn.ModuleList([_VitBlock(C)])
        self.diffloss = DiffLoss(channels, C)

    def sample_tokens(self, labels, tokens, known=4):
        x = self.z_proj(tokens[:, :known]) + self.class_emb(labels)[:, None]
        x = self.decoder_embed(self.encoder_blocks[0](x))
        hidden = self.decoder_pos_embed_learned.shape[1] - known
        x = torch.cat((x, self.mask_token.expand(len(x), hidden, -1)), 1) + self.decoder_pos_embed_learned
        return self.diffloss.sample(self.decoder_blocks[0](x)[:, known : known + 3].flatten(0, 1))


class NAR(llamagen.Transformer):
    """LlamaGen with a second head, after a block of its own."""

    def __init__(self, args):
        super().__init__(args)
        self.medusa_layers = nn.ModuleList([llamagen.TransformerBlock(args)])
        self.medusa_norm = llamagen.RMSNorm(args.dim, args.norm_eps)
        self.medusa_output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, idx, cond_idx):
        """Mean of both heads' logits for the tokens after the class."""
        h = torch.cat((self.cls_embedding(cond_idx, False), self.tok_embeddings(idx)), 1)
        table = self.freqs_cis[: h.shape[1]]
        for layer in self.layers:
            h = layer(h, table, None)
        below = self.medusa_layers[0](h, table, None)
        return (self.output(self.norm(h)) + self.medusa_output(self.medusa_norm(below))) / 2
