"""The tokenizer of the small systems that want one map of tokens: the bundled one, changed to a single
scale.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from arimg import models, tokenizers
from arimg.data.images import Images
from arimg.layout import Layout
from arimg.tokenizers import VQVAE, LatentTokenizer
from arimg.train.latent import LatentTask
from arimg.train.loop import RunConfig, fit
from arimg.train.tokenizer import TokenizerSettings, TokenizerTask

Made = TypeVar("Made", VQVAE, LatentTokenizer)
SIZE = 64  # pixels of the bundled tokenizer's images


def scale_tokenizer() -> VQVAE:
    """The bundled tokenizer of VAR's kind: 64 px, scales 1, 2, 3, 5, 8, 1024 codes of 16."""
    return models.load().tokenizer


def grid_tokenizer(images: Images, folder: Path, steps: int = 600, vocab: int = 1024) -> VQVAE:
    """A plain VQ tokenizer of 8 x 8 tokens, trained on these images from the bundled weights.

    Its codes start on features of the data. Written to folder/tokenizer.safetensors, and read from there by
    the next call.
    """
    path = folder / models.TOKENIZER_FILE
    if path.exists():
        return tokenizers.load(path)
    settings = _settings(5e-4, restart_until=steps // 2)
    model = _train(TokenizerTask(_single_scale(scale_tokenizer(), vocab), images, settings), folder, steps)
    assert isinstance(model, VQVAE)
    tokenizers.save(model, path)
    return model


def quantizer_tokenizer(
    images: Images, folder: Path, quantizer: nn.Module, steps: int = 300, *, decoder_only: bool = False
) -> VQVAE:
    """The bundled encoder and decoder around another quantizer, trained on these images.

    quantizer: what `VQVAE` asks of a `ScaleQuantizer`: scales, channels, vocab_size, encode, features and the
    training forward. Its codes are not restarted. decoder_only: codes and encoder stay as they are. Written
    and read as by `grid_tokenizer`.
    """
    made, settings = around(quantizer), _settings(5e-4, decoder_only=decoder_only)
    return _kept(made, folder, steps, lambda: TokenizerTask(made, images, settings))


def latent_tokenizer(
    images: Images, folder: Path, layout: Layout, steps: int = 600, **size: Any
) -> LatentTokenizer:
    """A 1-D tokenizer between the bundled encoder, which stays, and the bundled decoder, trained on these
    images.

    size: of the `LatentTokenizer`. Written and read as by `grid_tokenizer`.
    """
    torch.manual_seed(0)
    made = LatentTokenizer(scale_tokenizer().float(), layout, **size)
    settings = _settings(2e-3, vq=0.02, restart_until=steps // 2)
    return _kept(made, folder, steps, lambda: LatentTask(made, images, settings, pixels_from=4 * steps // 5))


def _kept(model: Made, folder: Path, steps: int, task: Callable[[], TokenizerTask]) -> Made:
    """With the weights that lie in the folder, else trained by the task."""
    path = folder / models.TOKENIZER_FILE
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    trained = _train(task(), folder, steps)
    assert isinstance(trained, type(model))
    save_file({name: t.contiguous() for name, t in trained.state_dict().items()}, path)
    return trained.eval()


def around(quantizer: nn.Module) -> VQVAE:
    """The bundled encoder and decoder around another quantizer."""
    source = scale_tokenizer()
    model = VQVAE(**source.config())
    model.load_state_dict(source.state_dict())
    model.quantize = quantizer  # type: ignore[assignment]
    model._load_state_dict_pre_hooks.clear()  # which look for counts of codes
    return model.eval()


def _settings(lr: float, *, restart_until: int = 0, **settings: Any) -> TokenizerSettings:
    every = 50 if restart_until else 0
    return TokenizerSettings(lr=lr, restart_every=every, restart_until=restart_until, bf16=True, **settings)


def _train(task: TokenizerTask, folder: Path, steps: int) -> nn.Module:
    config = RunConfig(
        folder / "tokenizer", steps=steps, batch_size=16, warmup=20, ema=0.99, grid_every=steps
    )
    task.modules["model"].train()
    return fit(task, config)


def _single_scale(source: VQVAE, vocab: int) -> VQVAE:
    """The same encoder and decoder around a quantizer of one map, without a filter on its codes (ratio 0)."""
    config = source.config()
    model = VQVAE(
        **{**config, "vocab_size": vocab, "scales": config["scales"][-1:], "shared_phi": 1, "ratio": 0}
    )
    kept = {k: v for k, v in source.state_dict().items() if not k.startswith("quantize.")}
    model.load_state_dict(kept, strict=False)
    return model
