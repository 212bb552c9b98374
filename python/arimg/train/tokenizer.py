"""Training of the multi-scale VQ tokenizer (VAR, arXiv 2404.02905)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arimg import ops
from arimg.data.images import Images, augment
from arimg.reference.pyramid import residual_map
from arimg.tokenizers import VQVAE, LatentTokenizer
from arimg.train.grid import make_grid
from arimg.train.loop import bfloat16, descend
from arimg.train.losses import (
    FeatureLoss,
    PatchDiscriminator,
    chroma_loss,
    discriminator_loss,
    gradient_loss,
)


@dataclass(frozen=True)
class TokenizerSettings:
    """Weights of the losses, and how the codebook is kept alive.

    restart_every: after so many steps, codes that were not used since then are moved onto random residuals of
    the batch, until step `restart_until`.
    decoder_only: the encoder and the codes stay, so that tokens keep their meaning; only the decoder learns.
    bf16: convolutions in bfloat16 (half the time where the CPU has the instructions); the codes stay float32.
    """

    lr: float = 1e-3
    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 1.0
    chroma: float = 0.5
    feature: float = 0.0
    vq: float = 1.0
    adversarial: float = 0.0
    adversarial_from: int = 0
    shift: int = 3
    flip: bool = True
    restart_every: int = 50
    restart_until: int = 4000
    decoder_only: bool = False
    bf16: bool = False


@torch.no_grad()
def scale_residuals(tokenizer: VQVAE, images: Tensor) -> Tensor:
    """What the quantizer looks up, of all scales: rows [N, C]."""
    quantizer = tokenizer.quantize
    f = tokenizer.features(images)
    f_hat, rows = torch.zeros_like(f), []
    size = (f.shape[-2], f.shape[-1])
    for k, scale in enumerate(quantizer.scales):
        small = (
            ops.area_down((f - f_hat).contiguous(), scale).permute(0, 2, 3, 1).reshape(-1, quantizer.channels)
        )
        rows.append(small)
        index = ops.nearest_code(small, quantizer.embedding.weight).reshape(len(f), -1)
        codes = quantizer.code_map(index, k)
        f_hat = f_hat + residual_map(codes, size, *quantizer.phi_weights(k), quantizer.ratio)
    return torch.cat(rows)


class _Usage(nn.Module):
    """Which codes were used since the last restart: a module, so that a run continues with it."""

    used: Tensor

    def __init__(self, codes: int) -> None:
        super().__init__()
        if codes > 2**24:
            raise ValueError(f"expected at most 2^24 codes, whose usage is counted, got {codes}")
        self.register_buffer("used", torch.zeros(codes, dtype=torch.uint8))

    def add(self, tokens: list[Tensor]) -> None:
        self.used[torch.cat([index.flatten() for index in tokens])] = 1
        if dist.is_initialized():
            dist.all_reduce(self.used, dist.ReduceOp.MAX)


class Reconstruction(NamedTuple):
    """images: of a batch, not clamped, float32; target: what they should be; loss: the quantizer's; tokens:
    those that were used.
    """

    images: Tensor
    target: Tensor
    loss: Tensor
    tokens: list[Tensor]


class TokenizerTask:
    """Reconstruction (L1, L2, multi-scale gradients, features), VQ and optional patch-adversarial losses."""

    def __init__(
        self, tokenizer: VQVAE | LatentTokenizer, images: Images, settings: TokenizerSettings
    ) -> None:
        self.images, self.settings = images, settings
        self.modules: dict[str, nn.Module] = {"model": tokenizer}
        # Adam with a short memory of squares: restarts and the growing features change gradients quickly.
        self._choose()
        learnt = [p for p in tokenizer.parameters() if p.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "model": torch.optim.Adam(learnt, settings.lr, betas=(0.9, 0.97))
        }
        self.feature = FeatureLoss(stages=3) if settings.feature else None
        if settings.adversarial:
            self.modules["critic"] = PatchDiscriminator()
            self.optimizers["critic"] = torch.optim.Adam(
                self.modules["critic"].parameters(), settings.lr, (0.5, 0.9)
            )
        self.modules["usage"] = _Usage(tokenizer.vocab_size)
        self.shown = images.batch(torch.linspace(0, len(images) - 1, min(24, len(images))).long().numpy())

    @property
    def tokenizer(self) -> VQVAE:
        model = self.modules["model"]
        assert isinstance(model, VQVAE)
        return model

    @property
    def _usage(self) -> _Usage:
        usage = self.modules["usage"]
        assert isinstance(usage, _Usage)
        return usage

    def _choose(self) -> None:
        """Which weights learn."""
        if self.settings.decoder_only:
            self.tokenizer.requires_grad_(False)
            for part in (self.tokenizer.post_quant_conv, self.tokenizer.decoder):
                part.requires_grad_(True)

    def __len__(self) -> int:
        return len(self.images)

    def weights(self) -> Tensor | None:
        return None

    def step(self, indices: Tensor, step: int) -> dict[str, float]:
        s = self.settings
        fake, real, vq, tokens = self._reconstruct(self._batch(indices, step))
        parts = {
            "l1": s.l1 * (fake - real).abs().mean(),
            "l2": s.l2 * (fake - real).square().mean(),
            "grad": s.gradient * gradient_loss(fake, real),
            "chroma": s.chroma * chroma_loss(fake, real),
            "vq": s.vq * vq,
        }
        if self.feature is not None:
            parts["feat"] = s.feature * self.feature(fake, real)
        adversarial = bool(s.adversarial) and step >= s.adversarial_from
        if adversarial:
            parts["adv"] = -s.adversarial * self.modules["critic"](fake).mean()
        loss = torch.stack(list(parts.values())).sum()
        self._descend("model", loss)
        if adversarial:
            critic = self.modules["critic"]
            self._descend("critic", discriminator_loss(critic(real), critic(fake.detach())))
        self._usage.add(tokens)
        psnr = -10 * (fake.detach().clamp(0, 1) - real).square().mean((1, 2, 3)).log10().mean()
        return {
            "loss": float(loss.detach()),
            **{k: float(v.detach()) for k, v in parts.items()},
            "psnr": float(psnr),
        }

    def _batch(self, indices: Tensor, step: int) -> Tensor:
        """The pictures of this step; unused codes move onto them when it is time."""
        s = self.settings
        real = augment(self.images.batch(indices.numpy()), torch.default_generator, s.shift, s.flip)
        restarts = s.restart_every and not s.decoder_only
        if restarts and step % s.restart_every == 0 and step <= s.restart_until:
            self._restart(real)
        return real

    def _reconstruct(self, images: Tensor) -> Reconstruction:
        s = self.settings
        with torch.set_grad_enabled(not s.decoder_only):
            with bfloat16(s.bf16):
                f = self.tokenizer.features(images)
            f_hat, vq, tokens = self.tokenizer.quantize(f.float())
        with bfloat16(s.bf16):
            fake = self.tokenizer.pixels(f_hat)
        return Reconstruction(fake.float(), images, vq, tokens)

    def _descend(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        descend([self.optimizers[name]])

    @torch.no_grad()
    def _restart(self, images: Tensor) -> None:
        """Moves codes unused since the last call (all of them on the first)."""
        dead = (self._usage.used == 0).nonzero().flatten()
        self._usage.used.zero_()
        if not len(dead):
            return
        weight = self._move(dead, images)
        if dist.is_initialized():
            dist.broadcast(weight, 0)
        for moment in self.optimizers["model"].state.get(weight, {}).values():
            if isinstance(moment, Tensor) and moment.shape == weight.shape:
                moment[dead] = 0

    def _move(self, dead: Tensor, images: Tensor) -> Tensor:
        """Puts these codes onto residuals of the batch; returns all codes."""
        rows = scale_residuals(self.tokenizer, images)
        weight = self.tokenizer.quantize.embedding.weight
        weight[dead] = rows[torch.randint(len(rows), (len(dead),))] + 0.01 * torch.randn(
            len(dead), rows.shape[1]
        )
        return weight

    @torch.no_grad()
    def grid(self, model: nn.Module) -> Tensor:
        assert isinstance(model, VQVAE | LatentTokenizer)
        pairs = torch.cat([part for rows in self.shown.split(8) for part in (rows, model.reconstruct(rows))])
        return make_grid(pairs, 8)
