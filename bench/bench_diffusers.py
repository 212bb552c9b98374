"""diffusers' VQModel in the sizes of aMUSEd's for 256 x 256 pixels, random weights: before and after.

Original and accelerated code take turns in one process, on one model, whose pictures must agree before.
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

    def seconds() -> float:
        start = time.perf_counter()
        run(model)
        return time.perf_counter() - start

    def accelerated() -> float:
        with arimg.accelerate(model):
            return seconds()

    group = f"VQModel, {part}, {SIDE} x {SIDE}, {str(dtype).removeprefix('torch.')}, ms a picture"
    paired(group, {"arimg": accelerated, PLAIN: seconds})
    model.float()
