"""Training of any system of `arimg.systems` on the examples that it makes of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from arimg.data.images import Images
from arimg.systems.base import SystemModel
from arimg.train.files import kept
from arimg.train.grid import make_grid
from arimg.train.loop import bfloat16, descend


@dataclass(frozen=True)
class SystemSettings:
    """AdamW's rate and weight decay; bf16: matrix products in bfloat16."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    bf16: bool = False


class SystemTask:
    """The loss of the system, by AdamW. shown: the classes of the grid."""

    def __init__(
        self,
        model: SystemModel,
        examples: Tensor,
        labels: Tensor,
        settings: SystemSettings,
        shown: Sequence[int],
    ) -> None:
        self.examples, self.labels, self.settings = examples, labels, settings
        self.shown = torch.tensor(shown)
        self.modules: dict[str, nn.Module] = {"model": model}
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95))
        }

    def __len__(self) -> int:
        return len(self.labels)

    def weights(self) -> Tensor | None:
        return None

    def step(self, indices: Tensor, step: int) -> dict[str, float]:
        model = self.modules["model"]
        assert isinstance(model, SystemModel)
        with bfloat16(self.settings.bf16):
            loss = model.loss(self.examples[indices], self.labels[indices])
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        descend(self.optimizers.values())
        return {"loss": float(loss.detach())}

    def grid(self, model: nn.Module) -> Tensor:
        assert isinstance(model, SystemModel)
        return make_grid(model.pictures(self.shown), 8)


@torch.no_grad()
def examples_of(model: SystemModel, images: Images, path: Path) -> Tensor:
    """`model.examples` of all images, kept in a file for runs that continue with the same images and
    tokenizer.
    """
    digest = hashlib.sha256(repr(images.names).encode() + images.pixels.tobytes())
    labels, few = torch.from_numpy(images.labels), range(min(4, len(images)))
    digest.update(model.examples(images.batch(few), labels[list(few)]).numpy().tobytes())

    def make() -> dict[str, Tensor]:
        parts = tqdm(torch.arange(len(images)).split(64), desc="encode", mininterval=5.0)
        return {"examples": torch.cat([model.examples(images.batch(i.numpy()), labels[i]) for i in parts])}

    examples: Tensor = kept(path, digest.hexdigest(), make)["examples"]
    return examples
