"""VF prompt: tokens of a whole picture stand in front of the one to be drawn (arXiv 2502.16965).

"class": k tokens of another picture of the same class, spread over it; "universal": k tokens drawn from the
codebook. They follow the class token and are computed in one pass with it. There is no released code; the
length of the prompt and its order with the class are not stated in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import ops
from arimg.generators.llamagen import LlamaSession
from arimg.generators.loop import Turn
from arimg.reference.kv_cache import Rope
from arimg.systems.base import System
from arimg.systems.llamagen import SIZE, GridModel
from arimg.systems.tokenizer import grid_tokenizer
from arimg.tokenizers import VQVAE

KINDS = ("class", "universal")
PICTURES = 16  # kept of each class, as prompts for it
PROMPT_DRAW = 2**32 - 3  # draw of docs/random-numbers.md, apart from the tokens'


class VfPromptModel(GridModel):
    """A LlamaGen with a prompt. bank int64 [classes + 1, PICTURES, k]: tokens of the last pictures of each
    class that training saw, any class in the last row (for "no class"); seen: how many there were.
    """

    title = "VF prompt"
    plain = "prompt token by token", {"chunk": 1}
    bank: Tensor
    seen: Tensor

    def __init__(
        self, tokenizer: VQVAE, num_classes: int, *, kind: str = "class", prompt: int = 16, **size: Any
    ) -> None:
        super().__init__(tokenizer, num_classes, **size)
        if kind not in KINDS:
            raise ValueError(f"expected a kind of {KINDS}, got {kind!r}")
        if not 0 < prompt <= self.length:
            raise ValueError(f"expected a prompt of 1 to {self.length} tokens, got {prompt}")
        self.kind, self.prompt = kind, prompt
        self.places = torch.arange(prompt) * self.length // prompt  # of the prompt's tokens in their picture
        self.register_buffer("bank", torch.zeros(num_classes + 1, PICTURES, prompt, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(num_classes + 1, dtype=torch.int64))

    def rope(self) -> Rope:
        """The class as released, then the prompt, which is turned by its places, then the picture."""
        grid = super().rope()
        rows = torch.cat((torch.zeros(1, dtype=torch.int64), self.places + 1, torch.arange(self.length) + 1))
        rows = rows.to(grid.cos.device)
        return Rope(grid.cos[rows], grid.sin[rows], grid.interleaved)

    def prompts(self, labels: Tensor, seed: int = 0) -> Tensor:
        """A prompt for each checked label, int64 [B, k], chosen by the seed alone: rows of a class share it.

        Classes that training has not seen yet take codes at random, as "universal" does.
        """
        device = self.bank.device
        u = ops.philox_uniform(torch.tensor([seed], device=device), 0, self.prompt + 1, draw=PROMPT_DRAW)[0]
        codes = (u[1:] * self.vocab_size).long().clamp(max=self.vocab_size - 1).expand(len(labels), -1)
        if self.kind == "universal":
            return codes
        known = self.seen[labels].clamp(max=PICTURES)
        pictures = self.bank[labels, (u[0] * known).long().clamp(max=PICTURES - 1)]
        return torch.where(known[:, None] > 0, pictures, codes)

    def remember(self, examples: Tensor, labels: Tensor) -> None:
        """Puts pictures [B, n] of checked labels into the bank, over the oldest ones."""
        none = torch.full_like(labels, self.num_classes)
        for row, label in zip(examples.repeat(2, 1)[:, self.places], torch.cat((labels, none)).tolist()):
            self.bank[label, self.seen[label] % PICTURES] = row
            self.seen[label] += 1

    def forward(self, labels: Tensor, indices: Tensor, prompts: Tensor | None = None) -> Tensor:
        """As of LlamaGen; prompts [B, k], `self.prompts(labels)` unless given."""
        labels = self.labels(labels)
        prompts = self.prompts(labels) if prompts is None else prompts
        inputs = (self.prefix(labels), self.embed(prompts), self.embed(indices))
        return self.teach(torch.cat(inputs, 1))[:, self.prompt :]

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Of the picture alone. The prompts are pictures of batches before, so never the one to be drawn."""
        true, labels = self.labels(labels), self.dropped(self.labels(labels))
        prompts = self.prompts(labels, int(torch.randint(2**31, ())))
        if self.training:
            self.remember(examples, true)
        logits = self(labels, examples[:, :-1], prompts)
        return F.cross_entropy(logits.flatten(0, 1), examples.flatten())

    def begin(self, condition: Any, guided: bool, **options: Any) -> VfSession:
        """Options: prompts [B, k]; prompt_seed chooses them otherwise; chunk, the most inputs of the prefix
        in one pass (default all).
        """
        labels = self.labels(condition)
        prompts, seed = options.pop("prompts", None), options.pop("prompt_seed", 0)
        rows = self.with_unconditional(labels, guided)
        if prompts is None:
            prompts = self.prompts(rows, seed)
        elif prompts.shape != (len(labels), self.prompt):
            raise ValueError(f"expected prompts {[len(labels), self.prompt]}, got {list(prompts.shape)}")
        else:
            prompts = prompts.repeat(len(rows) // len(labels), 1)
        prefix = torch.cat((self.prefix(rows), self.embed(prompts)), 1)
        return VfSession(self, prefix, len(labels), **options)


class VfSession(LlamaSession):
    """As of LlamaGen, with a prefix that may be read in pieces."""

    def __init__(self, *arguments: Any, chunk: int | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.chunk = chunk or self.pending.shape[1]

    def logits(self, turn: Turn) -> Tensor:
        while self.pending.shape[1] > self.chunk:
            prefix = self.pending
            self.pending = prefix[:, : self.chunk].contiguous()
            self.run(turn)
            self.pending = prefix[: len(self.pending), self.chunk :].contiguous()
        return super().logits(turn)


def make(tokenizer: Any, classes: int) -> VfPromptModel:
    return VfPromptModel(tokenizer, classes, **SIZE)


SYSTEM = System(
    "vf-prompt",
    "VF prompt",
    "raster",
    "arXiv 2502.16965",
    "tokens of another picture of the class, or random ones, in front of the picture",
    grid_tokenizer,
    make,
    "16 tokens of the other picture, spread over it, behind the class; the loss is of the picture alone; "
    "prompts at sampling come from the last 16 training pictures of each class",
)
