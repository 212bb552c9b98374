"""Models of the package transformers in tiny sizes with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.set_verbosity_error()

VQ = {
    "embed_dim": 8,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def spread(model: Any) -> Any:
    """Weights that make tokens differ, in evaluation and without gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "conv" in name or "vq" in name or "vision" in name:
                continue
            if p.dim() > 1:
                p.normal_(std=1.5 * p.shape[1] ** -0.5, generator=generator)
            else:
                p.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


def janus(**options: Any) -> Any:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(vocab_size=60, num_key_value_heads=2, **TEXT, **options)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1}
    picture = {"image_size": 16, "patch_size": 4, "num_image_tokens": 16, "projection_dim": 64}
    vq = {**VQ, "num_embeddings": 64, "num_patches": 4, "projection_dim": 64, "image_token_embed_dim": 64}
    config = transformers.JanusConfig(
        text_config=text,
        vision_config=transformers.JanusVisionConfig(**vision, **picture),
        vq_config=transformers.JanusVQVAEConfig(**vq),
        image_token_id=5,
    )
    model = transformers.JanusForConditionalGeneration(config)
    settings = model.generation_config
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = 0, 1, 2
    settings.generation_kwargs = {"boi_token_id": 3}
    return spread(model)


def chameleon(**options: Any) -> Any:
    torch.manual_seed(0)
    text = {"vocab_size": 60, "num_key_value_heads": 4, "vocabulary_map": {"<image>": 4}, **TEXT}
    config = transformers.ChameleonConfig(**text, vq_config={**VQ, "num_embeddings": 32}, **options)
    return spread(transformers.ChameleonForConditionalGeneration(config))


def emu3(**options: Any) -> Any:
    torch.manual_seed(0)
    text = transformers.Emu3TextConfig(vocab_size=60, num_key_value_heads=2, **TEXT, **options)
    sizes = {"embed_dim": 4, "latent_channels": 4, "hidden_size": 64, "num_attention_heads": 4}
    vq = transformers.Emu3VQVAEConfig(**{**VQ, **sizes}, codebook_size=32, attn_resolutions=[1])
    config = transformers.Emu3Config(text_config=text, vq_config=vq, vocabulary_map={"<image>": 4})
    return spread(transformers.Emu3ForConditionalGeneration(config))


def imagegpt(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4}
    config = transformers.ImageGPTConfig(**sizes, **options)
    return spread(transformers.ImageGPTForCausalImageModeling(config))
