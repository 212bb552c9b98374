"""Training of the next-scale generator VAR (arXiv 2404.02905) on the tokens of a frozen tokenizer."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from arimg.data.images import Images, augment
from arimg.generators import VAR
from arimg.tokenizers import VQVAE
from arimg.train.files import kept
from arimg.train.grid import make_grid
from arimg.train.loop import bfloat16, descend
from arimg.train.muon import Muon


@dataclass(frozen=True)
class VarSettings:
    """Optimizer and loss. The optimizer `muon` updates the matrices of the blocks by Muon, the rest by AdamW.

    copies: differently shifted versions of each image among the cached tokens.
    bf16: matrix products in bfloat16 (half the time where the CPU has the instructions).
    """

    lr: float = 1e-3
    optimizer: str = "muon"
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    copies: int = 1
    shift: int = 0
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class Tokens:
    """Tokenized images: `indices` int64 [N, L] over all scales, `labels` int64 [N], sizes of the scales."""

    indices: Tensor
    labels: Tensor
    sizes: tuple[int, ...]

    def scales(self, rows: Tensor) -> list[Tensor]:
        return list(self.indices[rows].split(self.sizes, dim=1))


@torch.no_grad()
def tokenize(tokenizer: VQVAE, images: Images, copies: int = 1, shift: int = 0, seed: int = 0) -> Tokens:
    """Encodes every image `copies` times: first as it is, then shifted by up to `shift` pixels."""
    generator = torch.Generator().manual_seed(seed)
    rows, batch = [], 64
    for copy in range(copies):
        for start in tqdm(range(0, len(images), batch), desc=f"tokens {copy + 1}/{copies}", mininterval=5.0):
            pixels = images.batch(range(start, min(start + batch, len(images))))
            pixels = augment(pixels, generator, shift if copy else 0)
            rows.append(torch.cat(tokenizer.encode(pixels), dim=1))
    sizes = tuple(h * w for h, w in tokenizer.scales)
    return Tokens(torch.cat(rows), torch.from_numpy(images.labels).repeat(copies), sizes)


def cached_tokens(path: Path, tokenizer: VQVAE, images: Images, settings: VarSettings) -> Tokens:
    """`tokenize`, kept in a file for runs that continue; done anew where codes, images or settings differ."""
    digest = hashlib.sha256(repr((images.names, settings.copies, settings.shift, settings.seed)).encode())
    digest.update(images.pixels.tobytes())
    for part in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize):
        for tensor in part.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())

    def make() -> dict[str, object]:
        tokens = tokenize(tokenizer, images, settings.copies, settings.shift, settings.seed)
        indices = tokens.indices.to(torch.int32)
        return {"indices": indices, "labels": tokens.labels, "sizes": list(tokens.sizes)}

    found = kept(path, digest.hexdigest(), make)
    return Tokens(found["indices"].long(), found["labels"], tuple(found["sizes"]))


def class_weights(labels: Tensor, classes: tuple[str, ...], factors: Mapping[str, float]) -> Tensor | None:
    """Sampling weight per example: the factor of the first pattern that its class name matches, else 1."""
    if not factors:
        return None
    unmatched = [p for p in factors if not any(fnmatch.fnmatch(c, p) for c in classes)]
    if unmatched:
        raise ValueError(f"expected patterns of class names, got {unmatched[0]!r}, which matches none")
    per_class = [next((f for p, f in factors.items() if fnmatch.fnmatch(c, p)), 1.0) for c in classes]
    return torch.tensor(per_class)[labels]


class VarTask:
    """Mean cross entropy of all tokens under teacher forcing, with class dropout (in the model)."""

    def __init__(
        self,
        model: VAR,
        tokens: Tokens,
        settings: VarSettings,
        weights: Tensor | None = None,
        shown: Tensor | None = None,
    ) -> None:
        self.tokens, self.settings, self._weights = tokens, settings, weights
        self.modules: dict[str, nn.Module] = {"model": model}
        self.optimizers = _optimizers(model, settings)
        self.shown = shown if shown is not None else torch.arange(32) % model.num_classes

    def __len__(self) -> int:
        return len(self.tokens.labels)

    def weights(self) -> Tensor | None:
        return self._weights

    def step(self, indices: Tensor, step: int) -> dict[str, float]:
        model = self.modules["model"]
        assert isinstance(model, VAR)
        x = model.tokenizer.quantize.generator_input(self.tokens.scales(indices))
        with bfloat16(self.settings.bf16):
            logits = model(self.tokens.labels[indices], x)
        target = self.tokens.indices[indices]
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), target.flatten(), label_smoothing=self.settings.label_smoothing
        )
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        descend(self.optimizers.values())
        last = logits.detach()[:, -self.tokens.sizes[-1] :].argmax(-1) == target[:, -self.tokens.sizes[-1] :]
        return {"loss": float(loss.detach()), "acc": float(last.float().mean())}

    def grid(self, model: nn.Module) -> Tensor:
        assert isinstance(model, VAR)
        return make_grid(model.generate(self.shown, cfg=2.0, top_k=100, top_p=0.95, seed=0), 8)


def _optimizers(model: VAR, settings: VarSettings) -> dict[str, torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and min(p.shape) > 1]
    if settings.optimizer not in ("muon", "adamw"):
        raise ValueError(f"expected the optimizer muon or adamw, got {settings.optimizer!r}")
    chosen = {id(p) for p in matrices} if settings.optimizer == "muon" else set()
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in others if p.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in others if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95))
    }
    if chosen:
        optimizers["muon"] = Muon(matrices, settings.lr, weight_decay=settings.weight_decay)
    return optimizers
