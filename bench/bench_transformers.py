"""Models of the package transformers, about 300 M random parameters: their `generate` before and after.

Original and accelerated code take turns in one process, on one model, whose logits must agree before.
Milliseconds are those of one token: batch 1, for Janus with its guidance pair. Janus has the static cache of
a whole picture (576 tokens after the prompt), the others a growing one; TOKENS of them are generated.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import arimg
from arimg.benchmark import peak_kib

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.set_verbosity_error()

SMOKE = os.environ.get("ARIMG_BENCH_SMOKE") == "1"
TOKENS = 4 if SMOKE else 64
WIDTH, INNER, HEADS = (64, 96, 4) if SMOKE else (1024, 2816, 16)
PROMPT = torch.arange(10, 26)[None]
PLAIN = "transformers"
VQ: dict[str, Any] = {"embed_dim": 8, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1}
VQ["channel_multiplier"] = [1, 2]


def text(layers: int) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2 if SMOKE else layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def janus() -> Any:
    """Llama with the generation head of Janus over 16384 codes."""
    vision = transformers.JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4, depth=1,
        projection_dim=WIDTH, num_image_tokens=TOKENS,
    )  # fmt: skip
    vq = {**VQ, "num_embeddings": 16384, "projection_dim": WIDTH, "image_token_embed_dim": WIDTH}
    config = transformers.JanusConfig(
        text_config=transformers.LlamaConfig(vocab_size=1000, **text(21)),
        vision_config=vision,
        vq_config=transformers.JanusVQVAEConfig(**vq),
        image_token_id=5,
    )
    model = transformers.JanusForConditionalGeneration(config)
    settings = model.generation_config
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = 0, 1, 2
    settings.generation_kwargs = {"boi_token_id": 3}
    return model


def chameleon() -> Any:
    """Its own vocabulary of 65536, queries and keys normed per head."""
    vq = {**VQ, "num_embeddings": 64}
    config = transformers.ChameleonConfig(
        vocab_size=1000 if SMOKE else 65536, vocabulary_map={"<image>": 4}, vq_config=vq, **text(14)
    )
    return transformers.ChameleonForConditionalGeneration(config)


def emu3() -> Any:
    """A vocabulary of 32768; four query heads share a key head."""
    shared = {**text(20), "num_key_value_heads": HEADS // 4}
    vq = {**VQ, "embed_dim": 4, "latent_channels": 4, "hidden_size": 64, "num_attention_heads": 4}
    config = transformers.Emu3Config(
        text_config=transformers.Emu3TextConfig(vocab_size=1000 if SMOKE else 32768, **shared),
        vq_config=transformers.Emu3VQVAEConfig(**vq, codebook_size=64, attn_resolutions=[1]),
        vocabulary_map={"<image>": 4},
    )
    return transformers.Emu3ForConditionalGeneration(config)


def imagegpt() -> Any:
    """Colours of 512, pictures of up to 1024 of them."""
    layers = 2 if SMOKE else 24
    config = transformers.ImageGPTConfig(vocab_size=513, n_embd=WIDTH, n_layer=layers, n_head=HEADS)
    return transformers.ImageGPTForCausalImageModeling(config)


MODELS: dict[str, Callable[[], Any]] = {
    "janus": janus,
    "chameleon": chameleon,
    "emu3": emu3,
    "imagegpt": imagegpt,
}


@cache
def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def generate(model: Any) -> torch.Tensor:
    mask = torch.ones_like(PROMPT)
    if isinstance(model, transformers.JanusForConditionalGeneration):
        capacity = PROMPT.shape[1] + (TOKENS if SMOKE else 576)
        options = {"generation_mode": "image", "guidance_scale": 5.0, "max_length": capacity}
        return model.generate(PROMPT, attention_mask=mask, do_sample=False, **options)
    lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    return model.generate(input_ids=PROMPT, attention_mask=mask, do_sample=False, **lengths)


def seconds(model: Any) -> float:
    start = time.perf_counter()
    generate(model)
    return (time.perf_counter() - start) / TOKENS


def accelerated(model: Any, **options: Any) -> Callable[[], float]:
    def run() -> float:
        with arimg.accelerate(model, **options):
            if options:  # makes the copies
                generate_one(model)
            return seconds(model)

    return run


@torch.no_grad()
def generate_one(model: Any) -> torch.Tensor:
    """Logits of one token after the prompt."""
    janus = isinstance(model, transformers.JanusForConditionalGeneration)
    language = model.model.language_model if janus else model
    store = language(input_ids=PROMPT, use_cache=True).cache
    out = language(input_ids=PROMPT[:, :1], cache=store, use_cache=True)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def check_agreement(model: Any) -> None:
    want = generate_one(model).float()
    with arimg.accelerate(model):
        error = (generate_one(model).float() - want).norm() / want.norm()
    assert error < (1e-5 if model.dtype == torch.float32 else 2e-2), f"logits differ by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, dtype: torch.dtype, paired) -> None:
    model = model_of(name).to(dtype)
    check_agreement(model)
    million = sum(p.numel() for p in model.parameters()) / 1e6
    group = f"{name}, {million:.0f} M parameters, {str(dtype).removeprefix('torch.')}, ms a token"
    functions = {"arimg": accelerated(model), PLAIN: lambda: seconds(model)}
    if dtype == torch.float32:
        functions["arimg, dtype=torch.bfloat16"] = accelerated(model, dtype=torch.bfloat16)
    functions["arimg, weights='int8'"] = accelerated(model, weights="int8")
    paired(group, functions)
    model.float()


@pytest.mark.parametrize("name", ["janus", "chameleon"])
def test_memory(name: str, peaks) -> None:
    peaks(__file__, name, PLAIN)


if __name__ == "__main__":
    model = model_of(sys.argv[1])
    if sys.argv[2] == "arimg":
        arimg.accelerate(model)
    generate(model)
    print(peak_kib())
