"""diffusers' aMUSEd in the sizes of its model for 256 x 256 pixels, random weights: before and after.

Original and accelerated code take turns in one process, on one model, whose results must agree before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import arimg

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SMOKE = os.environ.get("ARIMG_BENCH_SMOKE") == "1"
CHANNELS = (16, 16, 16, 32, 32) if SMOKE else (128, 256, 256, 512, 768)
SIDE = 32 if SMOKE else 256
PLAIN = "diffusers"


@cache
def model_of() -> Any:
    torch.manual_seed(0)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=CHANNELS, layers_per_block=2, latent_channels=64, num_vq_embeddings=8192,
        norm_num_groups=16 if SMOKE else 32, mid_block_add_attention=False, lookup_from_codebook=True,
    )  # fmt: skip
    model.quantize.embedding.weight.data.normal_()
    return model.eval().requires_grad_(False)


def decode(model: Any) -> torch.Tensor:
    n = SIDE // 16
    codes = torch.arange(n * n).view(1, n, n)
    return model.decode(codes, force_not_quantize=True, shape=(1, n, n, 64)).sample


def encode(model: Any) -> torch.Tensor:
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return model.encode(pixels.to(model.dtype)).latents


PARTS: dict[str, Callable[[Any], torch.Tensor]] = {"decode": decode, "encode": encode}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_vqmodel(part: str, dtype: torch.dtype, paired) -> None:
    model, run = model_of().to(dtype), PARTS[part]
    want = run(model).float()
    with arimg.accelerate(model):
        error = (run(model).float() - want).norm() / want.norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.1), f"results differ by {error:.1e}"

    turns(
        paired, f"VQModel, {part}, {SIDE} x {SIDE}, {name_of(dtype)}, ms a picture", model, lambda: run(model)
    )
    model.float()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def turns(
    paired: Any, group: str, model: Any, run: Callable[[], object], rounds: int = 3, warm: bool = False
) -> None:
    """warm: what is accelerated runs once before it is timed, as in the steps after the first."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def accelerated() -> float:
        with arimg.accelerate(model):
            if warm:
                run()
            return seconds()

    paired(group, {"arimg": accelerated, PLAIN: seconds}, rounds)


# --- the generator -------------------------------------------------------------------------------------
N, CODES, WIDTH, TEXT = (2, 32, 48, 5) if SMOKE else (16, 8192, 1024, 77)
MASK = CODES + 63 if not SMOKE else CODES


@cache
def transformer_of() -> Any:
    torch.manual_seed(0)
    small = {
        "hidden_size": WIDTH, "cond_embed_dim": 32, "micro_cond_encode_dim": 16, "micro_cond_embed_dim": 80,
        "encoder_hidden_size": 32, "vocab_size": CODES + 1, "codebook_size": CODES, "in_channels": 32,
        "block_out_channels": 32, "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48,
    }  # fmt: skip
    model = diffusers.UVit2DModel(**(small if SMOKE else {}), sample_size=N)
    return model.eval().requires_grad_(False)


def texts(dtype: torch.dtype, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States and summary, as of a text encoder."""
    width, generator = 32 if SMOKE else 768, torch.Generator().manual_seed(2)
    states, summary = (torch.randn(batch, *s, width, generator=generator) for s in ((TEXT,), ()))
    return states.to(dtype), summary.to(dtype)


def scheduler_of(steps: int) -> Any:
    scheduler = diffusers.AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amused_step(dtype: torch.dtype, paired) -> None:
    scheduler, tokens = scheduler_of(12), torch.full((1, N, N), MASK)
    logits = torch.randn(1, N, N, CODES, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits = logits.permute(0, 3, 1, 2)  # as the transformer's last convolution leaves them

    def masked() -> int:
        return int((scheduler.step(logits, 6, tokens).prev_sample == MASK).sum())

    want = masked()
    with arimg.accelerate(scheduler):
        got = masked()
    # Equal confidences in 16 bits: the original masks fewer than its schedule says.
    assert got == want or (dtype != torch.float32 and got > want), f"masked {got}, the original {want}"
    group = f"AmusedScheduler.step, {N * N} tokens of {CODES} codes, {name_of(dtype)}"
    turns(paired, group, scheduler, lambda: scheduler.step(logits, 6, tokens), rounds=9, warm=True)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amused_transformer(dtype: torch.dtype, paired) -> None:
    model = transformer_of().to(dtype)
    tokens, micro = torch.full((2, N, N), MASK), torch.tensor([[256.0, 256.0, 0.0, 0.0, 6.0]] * 2)

    def run() -> torch.Tensor:
        return model(tokens, *texts(dtype, 2), micro)

    want = run().float()
    with arimg.accelerate(model):
        for _ in range(2):
            error = (run().float() - want).norm() / want.norm()
            assert error < (1e-4 if dtype == torch.float32 else 0.1), f"results differ by {error:.1e}"
    group = f"UVit2DModel, a step after the first, guidance, {N * N} tokens, {name_of(dtype)}"
    turns(paired, group, model, run, warm=True)
    model.float()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amused_pipeline(dtype: torch.dtype, paired) -> None:
    parts = {"vqvae": model_of(), "transformer": transformer_of(), "scheduler": scheduler_of(12)}
    pipe = diffusers.AmusedPipeline(**parts, tokenizer=None, text_encoder=None).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    states, summary = texts(dtype, 1)
    given = {"encoder_hidden_states": states, "prompt_embeds": summary, "output_type": "pt"}
    given |= {f"negative_{n}": given[n].mul(0) for n in ("encoder_hidden_states", "prompt_embeds")}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        picture = pipe(
            height=N * 16, width=N * 16, num_inference_steps=12, generator=generator, **given
        ).images
        assert picture.shape == (1, 3, N * 16, N * 16)  # random ones: what they are made of is compared above
        return picture

    group = f"AmusedPipeline, 12 steps and the picture, {name_of(dtype)}, ms a picture"
    turns(paired, group, pipe, run, rounds=1)
    pipe.to(torch.float32)
