"""One-dimensional tokenizers: learned queries read a picture's features into a sequence of tokens, of which
any prefix decodes to a picture, a smaller one where the prefix is short (DetailFlow, arXiv 2505.21473).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.layout import Layout
from arimg.nn.attention import RowIntervalAttention
from arimg.tokenizers.vqvae import VQVAE, VQVAEOutput

NEIGHBOURS = 50  # codes of which a noisy one is drawn


class Corrected(NamedTuple):
    """A sequence with a noisy group, int64 [B, N]: inputs hold the noise, targets the codes in its place.
    What stands behind the group was encoded with the noise in sight, and is the same in both.
    """

    inputs: Tensor
    targets: Tensor


class LatentTokenizer(nn.Module):
    """Pictures [B, 3, S, S] in [0, 1] <-> tokens int64 [B, N] in the steps of `layout`.

    source: its encoder makes the features and its decoder the pixels; its quantizer is not used. Queries see
    all features and, by `rule`, each other. Codes are directions in `code_dim` dimensions. power: of the
    curve from the number of tokens to the size of the picture; None: always the full size.
    """

    def __init__(
        self, source: VQVAE, layout: Layout, *, rule: str = "level-causal", vocab_size: int = 1024,
        code_dim: int = 8, width: int = 128, depth: int = 2, heads: int = 2, power: float | None = 1.5,
        beta: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__()
        self.source, self.layout, self.vocab_size, self.power, self.beta = (
            source, layout, vocab_size, power, beta,
        )  # fmt: skip
        self.side = source.scales[-1][0]
        patches, z = self.side**2, source.z_channels
        attention = RowIntervalAttention(layout, rule, prefix=patches)
        self.encoder = nn.ModuleList(_Block(width, heads, attention) for _ in range(depth))
        self.decoder = nn.ModuleList(_Block(width, heads, None) for _ in range(depth))
        self.read, self.write = nn.Linear(z, width), nn.Linear(width, z)
        self.narrow, self.widen = nn.Linear(width, code_dim), nn.Linear(code_dim, width)
        self.again = nn.Linear(code_dim, width)  # of codes that the encoder sees in place of their queries
        self.codes = nn.Parameter(F.normalize(torch.randn(vocab_size, code_dim), dim=1))
        self.queries, self.places, self.patches, self.masks = (
            nn.Parameter(0.5 * torch.randn(n, width))
            for n in (layout.length, layout.length, patches, patches)
        )

    def side_of(self, tokens: int) -> int:
        """The side of the map that a prefix of so many tokens decodes to, 1 .. the full side."""
        last = self.layout.length
        if not 1 <= tokens <= last:
            raise ValueError(f"expected 1 to {last} tokens, got {tokens}")
        if self.power is None or last == 1:
            return self.side
        size = self.source.image_size[0]
        pixels = size - (size - 1) * ((last - tokens) / (last - 1)) ** self.power
        return max(1, round(pixels * self.side / size))

    def target(self, images: Tensor, tokens: int) -> Tensor:
        """What a prefix of so many tokens stands for: the pictures, averaged down."""
        shape = self.side_of(tokens) * images.shape[-1] // self.side
        return images if shape == images.shape[-1] else F.interpolate(images, (shape, shape), mode="area")

    def directions(self) -> Tensor:
        return F.normalize(self.codes, dim=1)

    def latents(self, features: Tensor, known: Tensor | None = None) -> Tensor:
        """Features [B, z, s, s] -> directions [B, N, D]. known: codes [B, n, D] of the first n tokens, which
        the others see in place of those queries.
        """
        rows = self.read(features.flatten(2).transpose(1, 2)) + self.patches
        queries = self.queries.expand(len(rows), -1, -1)
        if known is not None:
            queries = torch.cat((self.again(known), queries[:, known.shape[1] :]), 1)
        h = torch.cat((rows, queries + self.places), 1)
        for block in self.encoder:
            h = block(h)
        return F.normalize(self.narrow(h[:, rows.shape[1] :]).float(), dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        index = ops.nearest_code(z.detach().reshape(-1, z.shape[-1]), self.directions().detach(), "dot")
        return index.reshape(z.shape[:-1])

    @torch.no_grad()
    def restart(self, images: Tensor, used: Tensor | None = None) -> None:
        """Moves codes that are not among the tokens `used` (all of them) onto latents of these pictures."""
        z = self.latents(self.source.features(images)).flatten(0, 1)
        dead = torch.ones(self.vocab_size, dtype=torch.bool, device=z.device)
        if used is not None:
            dead[used.flatten()] = False
        drawn = z[torch.randint(len(z), (int(dead.sum()),), device=z.device)]
        self.codes[dead] = F.normalize(drawn + 0.02 * torch.randn_like(drawn), dim=1)

    def pixels(self, codes: Tensor) -> Tensor:
        """Codes [B, n, D] of a prefix -> pictures of the size of `target`, not clamped. Differentiable."""
        return self.source.pixels(self.maps(codes))

    def maps(self, codes: Tensor) -> Tensor:
        """Codes [B, n, D] of a prefix -> maps for the source's decoder, [B, z, s, s] with s = side_of(n)."""
        rows, n = codes.shape[:2]
        side, width = self.side_of(n), self.masks.shape[1]
        grid = self.masks.T.reshape(1, width, self.side, self.side)
        masks = F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2).expand(rows, -1, -1)
        h = torch.cat((self.widen(codes) + self.places[:n], masks), 1)
        for block in self.decoder:
            h = block(h)
        maps: Tensor = self.write(h[:, n:]).transpose(1, 2).unflatten(2, (side, side))
        return maps

    def encode(self, images: Tensor) -> Tensor:
        return self.encode_features(self.source.features(images))

    @torch.no_grad()
    def encode_features(self, features: Tensor) -> Tensor:
        """Features [B, z, s, s] of the source -> tokens [B, N]."""
        return self.nearest(self.latents(features))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, n], all or the first ones -> pictures in [0, 1], the smaller the fewer they are."""
        return self.pixels(ops.lookup(tokens, self.directions())).clamp_(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images))"""
        return self.decode(self.encode(images))

    def preview(self, tokens: Tensor) -> Tensor:
        """As `decode`, enlarged to the full size."""
        return F.interpolate(self.decode(tokens), self.source.image_size, mode="bilinear")

    def corrected(self, images: Tensor, group: int) -> Corrected:
        """Replaces the tokens of one step of the layout by near ones and encodes what follows anew."""
        return self.correct_features(self.source.features(images), group)

    @torch.no_grad()
    def correct_features(self, features: Tensor, group: int) -> Corrected:
        """As `corrected`, of features [B, z, s, s] of the source."""
        z = self.latents(features)
        clean = self.nearest(z)
        noisy, _, tail = self._behind_noise(features, z, clean, group)
        behind = self.nearest(tail)
        targets = torch.cat((clean[:, : noisy.shape[1]], behind), 1)
        return Corrected(torch.cat((noisy, behind), 1), targets)

    def _behind_noise(
        self, features: Tensor, z: Tensor, clean: Tensor, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens up to the end of a step that has become noise, their codes, and the latents behind them."""
        noisy = self._noisy(z, clean, group)
        known = ops.lookup(noisy, self.directions()).detach()
        return noisy, known, self.latents(features, known)[:, noisy.shape[1] :]

    def _noisy(self, z: Tensor, clean: Tensor, group: int) -> Tensor:
        """Tokens up to the end of the step."""
        start, end = self.layout.segments[group]
        part = z[:, start:end].detach()
        k = min(NEIGHBOURS, self.vocab_size)
        _, near = ops.nearest_codes(part.flatten(0, 1), self.directions().detach(), k, "dot")
        drawn = near.gather(1, torch.randint(k, (len(near), 1), device=near.device))
        return torch.cat((clean[:, :start], drawn.view(part.shape[:2])), 1)

    def forward(self, images: Tensor, tokens: int | None = None, group: int | None = None) -> VQVAEOutput:
        """Training: the picture of the first `tokens` (all of them), to be compared with `target`. group: as
        of `coded`. Indices are those of the pictures and, with noise, of what is behind it.
        """
        codes, loss, indices = self.coded(self.source.features(images), group)
        return VQVAEOutput(self.pixels(codes[:, :tokens]), loss, indices)

    def coded(self, features: Tensor, group: int | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Training: codes [B, N, D] of features with the gradient of the latents, the loss that draws both
        together, and the tokens that were found. group: a step whose tokens are noise; those behind it are
        encoded with it in sight, to correct it.
        """
        z = self.latents(features)
        indices = [self.nearest(z)]
        codes, loss = self._through(z, indices[0])
        if group is not None:
            _, known, tail = self._behind_noise(features, z, indices[0], group)
            codes = known
            if tail.shape[1]:
                indices.append(self.nearest(tail))
                passed, more = self._through(tail, indices[1])
                codes, loss = torch.cat((known, passed), 1), (loss + more) / 2
        return codes, loss, indices

    def _through(self, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Codes with the gradient of z, and the loss that draws both together."""
        codes = ops.lookup(index, self.directions())
        loss = F.mse_loss(codes, z.detach()) + self.beta * F.mse_loss(z, codes.detach())
        return z + (codes - z).detach(), loss * z.shape[-1]


class _Block(nn.Module):
    """Attention and an MLP, each behind a norm and added. attention: None sees everything."""

    def __init__(self, width: int, heads: int, attention: RowIntervalAttention | None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a width that {heads} heads divide, got {width}")
        self.heads, self.attention = heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention if self.attention is None else self.attention
        x = x + self.proj(seen(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
