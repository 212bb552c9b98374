"""LlamaGen's tokenizer with the names, signatures and results of the released code, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def norm(c):
    return nn.GroupNorm(32, c, eps=1e-6)


def conv(a, b, k=3, **options):
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


class ResnetBlock(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1, self.norm2 = norm(a), conv(a, b), norm(b)
        self.dropout, self.conv2 = nn.Dropout(0.0), conv(b, b)
        if a != b:
            self.nin_shortcut = conv(a, b, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (conv(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        scores = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out((v @ scores.transpose(1, 2)).view(x.shape))


class Resample(nn.Module):
    def __init__(self, c, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(c, c, 3, stride=2) if down else conv(c, c)

    def forward(self, x):
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Level(nn.Module):
    def __init__(self, a, b, blocks, attention, resample):
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(b if i else a, b) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(b) for _ in range(blocks if attention else 0))
        self.name = resample
        if resample:
            self.add_module(resample, Resample(b, resample == "downsample"))

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self.name)(x) if self.name else x


class Half(nn.Module):
    """Encoder or decoder."""

    def __init__(self, c_in, c_out, widths, blocks, encodes):
        super().__init__()
        last = len(widths) - 1
        order = range(last + 1) if encodes else range(last, -1, -1)
        before = widths[0] if encodes else widths[last]
        self.encodes, self.conv_in, levels = encodes, conv(c_in, before), []
        for n, i in enumerate(order):
            resample = ("downsample" if encodes else "upsample") if n < last else None
            levels.append(Level(before, widths[i], blocks, i == last, resample))
            before = widths[i]
        self.conv_blocks, top = nn.ModuleList(levels), widths[last]
        self.mid = nn.ModuleList((ResnetBlock(top, top), AttnBlock(top), ResnetBlock(top, top)))
        self.norm_out, self.conv_out = norm(before), conv(before, c_out)

    def forward(self, x):
        h = self.conv_in(x)
        parts = (*self.conv_blocks, *self.mid) if self.encodes else (*self.mid, *self.conv_blocks)
        for part in parts:
            h = part(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VectorQuantizer(nn.Module):
    def __init__(self, n_e, e_dim, beta=0.25, l2_norm=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.l2_norm = n_e, e_dim, beta, l2_norm
        self.embedding = nn.Embedding(n_e, e_dim)
        self.register_buffer("codebook_used", torch.zeros(65536))

    def codes(self):
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    def forward(self, z):
        z = z.permute(0, 2, 3, 1).contiguous()
        if self.l2_norm:
            z = F.normalize(z, dim=-1)
        rows, codes = z.view(-1, self.e_dim), self.codes()
        distance = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.t()
        index = distance.argmin(1)
        z_q, losses = codes[index].view(z.shape), (None, None, None, 0)
        if self.training:
            codebook = (z_q - z.detach()).square().mean()
            losses = (codebook, self.beta * (z_q.detach() - z).square().mean(), 0.0, 0)
        z_q = z + (z_q - z).detach()
        return z_q.permute(0, 3, 1, 2), losses, (None, None, index)


class VQModel(nn.Module):
    def __init__(self, vocab=16384, dim=8, z=256, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=2):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.encoder = Half(3, z, widths, blocks, True)
        self.decoder = Half(z, 3, widths, blocks + 1, False)
        self.quantize = VectorQuantizer(vocab, dim)
        self.quant_conv, self.post_quant_conv = conv(z, dim, 1), conv(dim, z, 1)

    def encode(self, x):
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant):
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, index, shape):
        b, c, h, w = shape
        return self.decode(self.quantize.codes()[index].reshape(b, h, w, c).permute(0, 3, 1, 2))
