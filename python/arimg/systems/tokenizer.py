"""The tokenizer of the small systems that want one map of tokens: the bundled one, changed to a single
scale.
"""

from __future__ import annotations

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
    model = _train(_single_scale(scale_tokenizer(), vocab), images, folder, steps, steps // 2)
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
    return _kept(around(quantizer), images, folder, steps, 0, decoder_only)


def latent_tokenizer(
    images: Images, folder: Path, layout: Layout, steps: int = 600, **size: Any
) -> LatentTokenizer:
    """A 1-D tokenizer between the bundled encoder, which stays, and the bundled decoder, trained on these
    images.

    size: of the `LatentTokenizer`. Written and read as by `grid_tokenizer`.
    """
    torch.manual_seed(0)
    made = LatentTokenizer(scale_tokenizer().float(), layout, **size)
    return _kept(made, images, folder, steps, steps // 2)


def _kept(model: Made, images: Images, folder: Path, *training: Any) -> Made:
    """With the weights that lie in the folder, else trained."""
    path = folder / models.TOKENIZER_FILE
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    model = _train(model, images, folder, *training)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
    return model.eval()


def around(quantizer: nn.Module) -> VQVAE:
    """The bundled encoder and decoder around another quantizer."""
    source = scale_tokenizer()
    model = VQVAE(**source.config())
    model.load_state_dict(source.state_dict())
    model.quantize = quantizer  # type: ignore[assignment]
    model._load_state_dict_pre_hooks.clear()  # which look for counts of codes
    return model.eval()


def _train(
    model: Made, images: Images, folder: Path, steps: int, restart_until: int, decoder_only: bool = False
) -> Made:
    latent = isinstance(model, LatentTokenizer)
    settings = TokenizerSettings(
        lr=2e-3 if latent else 5e-4, vq=0.02 if latent else 1.0, restart_every=50 if restart_until else 0,
        restart_until=restart_until, bf16=True, decoder_only=decoder_only,
    )  # fmt: skip
    config = RunConfig(
        folder / "tokenizer", steps=steps, batch_size=16, warmup=20, ema=0.99, grid_every=steps
    )
    model.train()
    if isinstance(model, LatentTokenizer):
        task = LatentTask(model, images, settings, pixels_from=4 * steps // 5)
    else:
        task = TokenizerTask(model, images, settings)
    trained = fit(task, config)
    assert isinstance(trained, type(model))
    return trained


def _single_scale(source: VQVAE, vocab: int) -> VQVAE:
    """The same encoder and decoder around a quantizer of one map, without a filter on its codes (ratio 0)."""
    config = source.config()
    model = VQVAE(
        **{**config, "vocab_size": vocab, "scales": config["scales"][-1:], "shared_phi": 1, "ratio": 0}
    )
    kept = {k: v for k, v in source.state_dict().items() if not k.startswith("quantize.")}
    model.load_state_dict(kept, strict=False)
    return model
