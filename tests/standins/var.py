"""A VAR and its VQVAE with the names, signatures and results of the released code, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from arimg.nn.scale_quantizer import nearest_tick


def _norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.dropout = _norm(c_out), nn.Identity()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Upsample2x(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample2x(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _middle(channels):
    mid = nn.Module()
    mid.block_1, mid.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
    mid.block_2 = ResnetBlock(channels, channels)
    return mid


class Encoder(nn.Module):
    def __init__(self, ch, levels, z):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(levels):
            level = nn.Module()
            level.block = nn.ModuleList([ResnetBlock(ch, ch)])
            level.attn = nn.ModuleList([AttnBlock(ch)] if i == levels - 1 else [])
            if i < levels - 1:
                level.downsample = Downsample2x(ch)
            self.down.append(level)
        self.mid, self.norm_out = _middle(ch), _norm(ch)
        self.conv_out = nn.Conv2d(ch, z, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level.block[0](h)
            h = level.attn[0](h) if len(level.attn) else level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, ch, levels, z):
        super().__init__()
        self.conv_in, self.mid = nn.Conv2d(z, ch, 3, padding=1), _middle(ch)
        self.up = nn.ModuleList()
        for i in range(levels):
            level = nn.Module()
            level.block = nn.ModuleList([ResnetBlock(ch, ch), ResnetBlock(ch, ch)])
            if i > 0:
                level.upsample = Upsample2x(ch)
            self.up.append(level)
        self.norm_out, self.conv_out = _norm(ch), nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for i in reversed(range(len(self.up))):
            for block in self.up[i].block:
                h = block(h)
            if i > 0:
                h = self.up[i].upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Phi(nn.Conv2d):
    def forward(self, x):
        return 0.5 * x + 0.5 * super().forward(x)


class PhiPartiallyShared(nn.Module):
    def __init__(self, convs):
        super().__init__()
        self.qresi_ls = nn.ModuleList(convs)


class VectorQuantizer2(nn.Module):
    def __init__(self, vocab_size, Cvae, v_patch_nums):
        super().__init__()
        self.vocab_size, self.Cvae, self.v_patch_nums = vocab_size, Cvae, v_patch_nums
        self.using_znorm, self.quant_resi_ratio, self.beta, self.prog_si = False, 0.5, 0.25, -1
        self.quant_resi = PhiPartiallyShared([Phi(Cvae, Cvae, 3, padding=1) for _ in range(4)])
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(v_patch_nums), vocab_size))
        self.embedding = nn.Embedding(vocab_size, Cvae)

    def phi(self, si):
        return self.quant_resi.qresi_ls[nearest_tick(si, len(self.v_patch_nums), 4)]

    def _nearest(self, rows):
        w = self.embedding.weight.data
        return (rows.square().sum(1, keepdim=True) + w.square().sum(1) - 2 * rows @ w.T).argmin(1)

    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        rest, out = f_BChw.detach().clone(), []
        B, C, H, W = rest.shape
        f_hat, last = torch.zeros_like(rest), len(self.v_patch_nums) - 1
        for si, pn in enumerate(self.v_patch_nums):
            small = rest if si == last else F.interpolate(rest, size=(pn, pn), mode="area")
            index = self._nearest(small.permute(0, 2, 3, 1).reshape(-1, C)).view(B, pn, pn)
            h = self.embedding(index).permute(0, 3, 1, 2)
            h = self.phi(si)(h if si == last else F.interpolate(h, size=(H, W), mode="bicubic"))
            f_hat, rest = f_hat + h, rest - h
            out.append(f_hat.clone() if to_fhat else index.flatten(1))
        return out

    def idxBl_to_var_input(self, gt_ms_idx_Bl):
        side, maps, f_hat = self.v_patch_nums[-1], [], 0
        for si, pn in enumerate(self.v_patch_nums[:-1]):
            h = self.embedding(gt_ms_idx_Bl[si]).transpose(1, 2).unflatten(2, (pn, pn))
            f_hat = f_hat + self.phi(si)(F.interpolate(h, size=(side, side), mode="bicubic"))
            then = self.v_patch_nums[si + 1]
            maps.append(F.interpolate(f_hat, size=(then, then), mode="area").flatten(2).transpose(1, 2))
        return torch.cat(maps, dim=1) if maps else None

    def get_next_autoregressive_input(self, si, SN, f_hat, h_BChw):
        if si == SN - 1:
            f_hat.add_(self.phi(si)(h_BChw))
            return f_hat, f_hat
        side, then = self.v_patch_nums[-1], self.v_patch_nums[si + 1]
        f_hat.add_(self.phi(si)(F.interpolate(h_BChw, size=(side, side), mode="bicubic")))
        return f_hat, F.interpolate(f_hat, size=(then, then), mode="area")


class VQVAE(nn.Module):
    def __init__(self, vocab_size=64, z_channels=8, ch=32, levels=3, v_patch_nums=(1, 2, 3, 4)):
        super().__init__()
        self.vocab_size, self.Cvae, self.V = vocab_size, z_channels, vocab_size
        self.encoder, self.decoder = Encoder(ch, levels, z_channels), Decoder(ch, levels, z_channels)
        self.quantize = VectorQuantizer2(vocab_size, z_channels, v_patch_nums)
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)

    def img_to_idxBl(self, inp_img_no_grad):
        return self.quantize.f_to_idxBl_or_fhat(self.quant_conv(self.encoder(inp_img_no_grad)), to_fhat=False)

    def fhat_to_img(self, f_hat):
        return self.decoder(self.post_quant_conv(f_hat)).clamp_(-1, 1)


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob).div_(1 - self.drop_prob)


class SelfAttention(nn.Module):
    def __init__(self, embed_dim, num_heads, attn_l2_norm, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop, inplace=True) if proj_drop > 0 else nn.Identity()
        self.num_heads, self.head_dim, self.attn_l2_norm = num_heads, embed_dim // num_heads, attn_l2_norm
        self.scale = 1 if attn_l2_norm else 0.25 / math.sqrt(self.head_dim)
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(embed_dim)), nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.cache = None

    def kv_caching(self, enable):
        self.cache = {} if enable else None

    def forward(self, x, attn_bias):
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(math.log(100)).exp()
            k = F.normalize(k, dim=-1)
        if self.cache is not None:
            k = torch.cat((self.cache["k"], k), dim=2) if self.cache else k
            v = torch.cat((self.cache["v"], v), dim=2) if self.cache else v
            self.cache = {"k": k, "v": v}
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_bias, scale=self.scale, dropout_p=dropout
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class FFN(nn.Module):
    def __init__(self, width, hidden, drop=0.0):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
        self.drop = nn.Dropout(drop, inplace=True) if drop > 0 else nn.Identity()

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


class AdaLNSelfAttn(nn.Module):
    def __init__(self, C, num_heads, shared_aln, attn_l2_norm, drop=0.0, attn_drop=0.0, drop_path=0.0):
        super().__init__()
        self.C, self.shared_aln = C, shared_aln
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.attn = SelfAttention(C, num_heads, attn_l2_norm, attn_drop, drop)
        self.ffn = FFN(C, 4 * C, drop)
        self.ln_wo_grad = nn.LayerNorm(C, eps=1e-6, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, C) / C**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))

    def forward(self, x, cond_BD, attn_bias):
        six = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
        x = x + self.drop_path(self.attn(self.ln_wo_grad(x) * (scale1 + 1) + shift1, attn_bias) * gamma1)
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x) * (scale2 + 1) + shift2) * gamma2)


class AdaLNBeforeHead(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.C, self.ln_wo_grad = C, nn.LayerNorm(C, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(C, 2 * C))

    def forward(self, x, cond_BD):
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x) * (scale + 1) + shift


class SharedAdaLin(nn.Linear):
    def forward(self, cond_BD):
        return super().forward(cond_BD).view(-1, 1, 6, self.out_features // 6)


class VAR(nn.Module):
    def __init__(
        self, vae_local, depth=2, embed_dim=32, num_heads=2, shared_aln=False, attn_l2_norm=True, **dropouts
    ):
        super().__init__()
        self.C, self.num_heads, self.num_classes, self.cond_drop_rate = embed_dim, num_heads, 10, 0.1
        self.patch_nums, self.prog_si = vae_local.quantize.v_patch_nums, -1
        sizes = [pn * pn for pn in self.patch_nums]
        self.L, self.first_l = sum(sizes), sizes[0]
        self.rng = torch.Generator()
        self.vae_proxy, self.vae_quant_proxy = (vae_local,), (vae_local.quantize,)
        self.word_embed = nn.Linear(vae_local.Cvae, embed_dim)
        self.uniform_prob = torch.full((1, self.num_classes), 1.0 / self.num_classes)
        self.class_emb = nn.Embedding(self.num_classes + 1, embed_dim)
        self.pos_start = nn.Parameter(torch.randn(1, self.first_l, embed_dim))
        self.pos_1LC = nn.Parameter(torch.randn(1, self.L, embed_dim))
        self.lvl_embed = nn.Embedding(len(sizes), embed_dim)
        adaln = nn.Sequential(nn.SiLU(), SharedAdaLin(embed_dim, 6 * embed_dim))
        self.shared_ada_lin = adaln if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(embed_dim, num_heads, shared_aln, attn_l2_norm, **dropouts) for _ in range(depth)
        )
        level = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.register_buffer("lvl_1L", level[None])
        mask = torch.where(level[:, None] >= level[None], 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])
        self.head_nm, self.head = AdaLNBeforeHead(embed_dim), nn.Linear(embed_dim, vae_local.vocab_size)

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False
    ):
        assert not more_smooth and top_p == 0.0
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        if label_B is None:
            label_B = torch.multinomial(self.uniform_prob, B, replacement=True, generator=rng).reshape(B)
        elif isinstance(label_B, int):
            label_B = torch.full((B,), self.num_classes if label_B < 0 else label_B)
        quantizer, last = self.vae_quant_proxy[0], len(self.patch_nums) - 1
        cond = self.class_emb(torch.cat((label_B, torch.full_like(label_B, self.num_classes))))
        positions = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x = cond[:, None] + self.pos_start + positions[:, : self.first_l]
        f_hat = cond.new_zeros(B, quantizer.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        for block in self.blocks:
            block.attn.kv_caching(True)
        end = 0
        for si, pn in enumerate(self.patch_nums):
            end += pn * pn
            shared = self.shared_ada_lin(cond)
            for block in self.blocks:
                x = block(x, shared, None)
            logits = self.head(self.head_nm(x, cond))
            t = cfg * si / last
            logits = (1 + t) * logits[:B] - t * logits[B:]
            if top_k > 0:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
            index = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=rng).view(B, -1)
            h = quantizer.embedding(index).transpose(1, 2).unflatten(2, (pn, pn))
            f_hat, x = quantizer.get_next_autoregressive_input(si, last + 1, f_hat, h)
            if si < last:
                x = self.word_embed(x.flatten(2).transpose(1, 2))
                x = (x + positions[:, end : end + self.patch_nums[si + 1] ** 2]).repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return self.vae_proxy[0].fhat_to_img(f_hat).add(1).mul(0.5)

    def forward(self, label_B, x_BLCv_wo_first_l):
        end = sum(pn * pn for pn in self.patch_nums[: self.prog_si + 1]) if self.prog_si >= 0 else self.L
        dropped = torch.rand(len(label_B)) < self.cond_drop_rate
        cond = self.class_emb(torch.where(dropped, self.num_classes, label_B))
        x = cond[:, None] + self.pos_start
        if self.prog_si != 0:
            x = torch.cat((x, self.word_embed(x_BLCv_wo_first_l)), dim=1)
        x = x + self.lvl_embed(self.lvl_1L[:, :end]) + self.pos_1LC[:, :end]
        shared = self.shared_ada_lin(cond)
        for block in self.blocks:
            x = block(x, shared, self.attn_bias_for_masking[:, :, :end, :end])
        logits = self.head(self.head_nm(x, cond))
        if self.prog_si == 0:
            logits[0, 0, 0] += self.word_embed.weight[0, 0] * 0 + self.word_embed.bias[0] * 0
        return logits
