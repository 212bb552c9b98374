"""The released code of LlamaGen-B and VAR d16, random weights, before and after `arimg.accelerate`.

ARIMG_LLAMAGEN and ARIMG_VAR are folders with the authors' code. Without one, the tests' stand-in, which
makes the same calls, runs at the same size. Original and accelerated code take turns on one model, whose
greedy tokens (LlamaGen) or pictures (VAR) must agree before. The share of "read" is that of the weights and
the cache a token reads.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

import arimg
from arimg.benchmark import peak_kib

SMOKE = os.environ.get("ARIMG_BENCH_SMOKE") == "1"
TOKENS = 16 if SMOKE else 256
STANDINS = Path(__file__).resolve().parents[1] / "tests"
LLAMAGEN, VAR = (None if SMOKE else os.environ.get(name) for name in ("ARIMG_LLAMAGEN", "ARIMG_VAR"))
B: dict[str, Any] = {
    "dim": 768,
    "n_layer": 12,
    "n_head": 12,
    "hidden": 2048,
    "vocab_size": 16384,
    "block_size": 256,
}
TINY: dict[str, Any] = {"block_size": 16}


@contextmanager
def importing(folder: str | Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@cache
def llamagen() -> tuple[Any, Callable[[Any, float], torch.Tensor]]:
    """A model and (model, guidance) -> its greedy tokens."""
    torch.manual_seed(0)
    if LLAMAGEN:
        with importing(LLAMAGEN):
            from autoregressive.models.generate import generate  # type: ignore[import-not-found]
            from autoregressive.models.gpt import GPT_models  # type: ignore[import-not-found]
        model = GPT_models["GPT-B"](vocab_size=B["vocab_size"], block_size=B["block_size"])
        greedy = {"top_k": 1, "sample_logits": False}
    else:
        with importing(STANDINS):
            from standins.llamagen import ModelArgs, Transformer, generate
        model, greedy = Transformer(ModelArgs(**(TINY if SMOKE else B))), {}
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[1] ** -0.5)

    def draw(model: Any, guidance: float = 4.0) -> torch.Tensor:
        with torch.no_grad():
            return generate(model, torch.tensor([3]), TOKENS, cfg_scale=guidance, **greedy)

    return model.eval().requires_grad_(False), draw


@cache
def var() -> tuple[Any, Callable[..., torch.Tensor]]:
    """A model and (model, top_k) -> its picture."""
    torch.manual_seed(0)
    if VAR:
        with importing(VAR):
            from models import build_vae_var  # type: ignore[import-not-found]
        vae, model = build_vae_var(device="cpu", depth=16)
    else:
        with importing(STANDINS):
            from standins.var import VAR as Model
            from standins.var import VQVAE
        if SMOKE:
            vae = VQVAE()
            model = Model(vae)
        else:
            scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
            vae = VQVAE(4096, 32, ch=160, levels=5, v_patch_nums=scales)
            model = Model(vae, depth=16, embed_dim=1024, num_heads=16)
    with torch.no_grad():
        for p in [*model.parameters(), *vae.parameters()]:
            p.normal_(std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
        vae.quantize.embedding.weight.normal_()

    def draw(model: Any, top_k: int = 9 if SMOKE else 900) -> torch.Tensor:
        return model.autoregressive_infer_cfg(1, 7, g_seed=0, cfg=1.5, top_k=top_k)

    vae.eval().requires_grad_(False)
    return model.eval().requires_grad_(False), draw


def seconds(draw: Callable[[], object], part: int = 1) -> float:
    start = time.perf_counter()
    draw()
    return (time.perf_counter() - start) / part


def accelerated(model: Any, draw: Callable[[], object], part: int = 1, **options: Any) -> Callable[[], float]:
    def run() -> float:
        with arimg.accelerate(model, **options):
            if options:  # makes the copies
                draw()
            return seconds(draw, part)

    return run


def bytes_of_token(model: Any, itemsize: float) -> float:
    """Weights that a token's products read, and keys and values of its guidance pair on average."""
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embedding" not in n)
    config = model.config
    cache = 2 * 2 * config.n_layer * config.dim * TOKENS / 2
    return weights * itemsize + cache * model.output.weight.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llamagen(dtype: torch.dtype, paired) -> None:
    model, draw = llamagen()
    model.to(dtype)
    plain = draw(model)
    with arimg.accelerate(model):
        ours = draw(model)
    # bfloat16 may part at a near-tie; what follows is another picture.
    assert torch.equal(plain, ours) or (dtype == torch.bfloat16 and plain[0, 0] == ours[0, 0])
    run = partial(draw, model)
    functions = {
        "arimg": accelerated(model, run, TOKENS),
        "original": lambda: seconds(run, TOKENS),
        "arimg, weights='int8'": accelerated(model, run, TOKENS, weights="int8"),
    }
    size = model.output.weight.element_size()
    reads = {"arimg": size, "original": size, "arimg, weights='int8'": 1.0}
    paired(
        f"{source(LLAMAGEN)} LlamaGen-B, {TOKENS} tokens, guidance 4, {name_of(dtype)}, ms a token",
        functions,
        bytes={name: bytes_of_token(model, size) for name, size in reads.items()},
    )
    model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_var(dtype: torch.dtype, paired) -> None:
    model, draw = var()
    plain = draw(model, 1)
    with arimg.accelerate(model):
        error = (draw(model, 1) - plain).abs().max().item()
    assert error < 1e-3, f"greedy pictures differ by {error:.1e}"
    narrow = dtype == torch.bfloat16
    context = partial(torch.autocast, "cpu", dtype=dtype) if narrow else nullcontext

    def run() -> torch.Tensor:
        with context():
            return draw(model)

    functions = {"arimg": accelerated(model, run), "original": lambda: seconds(run)}
    if narrow:
        functions["arimg, dtype=torch.bfloat16"] = accelerated(model, partial(draw, model), dtype=dtype)
    how = "bfloat16 autocast" if narrow else "float32"
    paired(f"{source(VAR)} VAR d16, 256 px, batch 1, {how}", functions)


def source(folder: str | None) -> str:
    return "released" if folder else "stand-in of"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


MODELS: dict[str, Callable[[], tuple[Any, Callable[..., torch.Tensor]]]] = {"llamagen": llamagen, "var": var}


@pytest.mark.parametrize("name", MODELS)
def test_memory(name: str, peaks) -> None:
    peaks(__file__, name, "original")


if __name__ == "__main__":
    model, draw = MODELS[sys.argv[1]]()
    if sys.argv[2] == "arimg":
        arimg.accelerate(model)
    draw(model)
    print(peak_kib())
