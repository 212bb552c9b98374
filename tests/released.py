"""Names and shapes of the checkpoints that authors have released, and state dicts of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def random_state(shapes: Mapping[str, tuple[int, ...]], std: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * std for name, shape in shapes.items()}


def layers(prefix: str, depth: int, each: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(depth) for name, shape in each.items()}


def linear(name: str, rows: int, columns: int) -> Shapes:
    """A product with a bias."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def var(
    depth: int, shared: bool, l2: bool, length: int, *, c: int = 0, heads: int = 0, classes: int = 1000,
    vocab: int = 4096, z: int = 32, scales: int = 10,
) -> Shapes:  # fmt: skip
    """var_d{depth}.pth without its constants (`var_constants`)."""
    c, heads = c or 64 * depth, heads or depth
    block = {
        **linear("attn.proj", c, c),
        **linear("ffn.fc1", 4 * c, c),
        **linear("ffn.fc2", c, 4 * c),
        "attn.mat_qkv.weight": (3 * c, c),
        "attn.q_bias": (c,),
        "attn.v_bias": (c,),
    }
    block |= {"attn.scale_mul_1H11": (1, heads, 1, 1)} if l2 else {}
    block |= {"ada_gss": (1, 1, 6, c)} if shared else linear("ada_lin.1", 6 * c, c)
    return {
        "pos_start": (1, 1, c),
        "pos_1LC": (1, length, c),
        "lvl_embed.weight": (scales, c),
        "class_emb.weight": (classes + 1, c),
        **linear("word_embed", c, z),
        **linear("head_nm.ada_lin.1", 2 * c, c),
        **linear("head", vocab, c),
        **(linear("shared_ada_lin.1", 6 * c, c) if shared else {}),
        **layers("blocks", depth, block),
    }


def var_constants(depth: int, c: int, length: int) -> Shapes:
    """Buffers that released checkpoints hold besides."""
    zeros = layers("blocks", depth, {"attn.zero_k_bias": (c,)})
    return {"lvl_1L": (1, length), "attn_bias_for_masking": (1, 1, length, length), **zeros}


def flexvar(depth: int, length: int = 680, grid: int = 32, vocab: int = 8912, **size: Any) -> Shapes:
    """FlexVAR: of VAR's names without an embedding of the level, positions as a grid; and its constants."""
    shapes = var(depth, False, True, length, vocab=vocab, **size)
    c = shapes["word_embed.bias"][0]
    constants = {k: v for k, v in var_constants(depth, c, length).items() if k != "lvl_1L"}
    del shapes["lvl_embed.weight"]
    return {**shapes, "pos_1LC": (1, c, grid, grid), **constants}


def star(
    depth: int, *, c: int = 0, heads: int = 0, text: int = 1024, vocab: int = 4096, z: int = 32,
    scales: int = 10,
) -> Shapes:  # fmt: skip
    """STAR with its refiner, and its constants."""
    c, heads = c or 64 * depth, heads or depth
    attention = {
        "scale_mul_1H11": (1, heads, 1, 1), "q_bias": (c,), "v_bias": (c,), "zero_k_bias": (c,),
        **linear("proj", c, c),
    }  # fmt: skip
    own = {**attention, "mat_qkv.weight": (3 * c, c)}
    cross = {**attention, "mat_q.weight": (c, c), "mat_kv.weight": (2 * c, text)}
    block = {
        **{f"attn.{k}": v for k, v in own.items()},
        **linear("ffn.fc1", 4 * c, c),
        **linear("ffn.fc2", c, 4 * c),
    }
    return {
        "pos_start": (1, 1, c),
        "pos_start_last": (1, 1, c),
        "class_emb.weight": (1001, c),
        "lvl_embed.weight": (scales, c),
        "lvl_embed_2.weight": (scales, c),
        **linear("word_embed", c, z),
        **linear("word_embed_head", c, z),
        **linear("encoder_proj", c, text),
        **linear("encoder_proj2", c, text),
        **linear("head_proj", c, 2 * c),
        **linear("head_logits", vocab, c),
        **linear("head_logits2", vocab, c),
        **layers("blocks", depth, block | {f"cross_attn.{k}": v for k, v in cross.items()}),
        **layers("feat_extract_blocks", 3, block),
    }


def infinity(
    depth: int, c: int, heads: int, *, text: int = 2048, pool: int = 16, tokens: int = 512, bits: int = 32,
    chunks: int = 8,
) -> Shapes:  # fmt: skip
    """infinity_2b_reg.pth: blocks in chunks of equal size; and its constants."""
    block = {
        "sa.scale_mul_1H11": (1, heads, 1, 1), "sa.mat_qkv.weight": (3 * c, c), "sa.q_bias": (c,),
        "sa.v_bias": (c,), "sa.zero_k_bias": (c,), **linear("sa.proj", c, c), **linear("ca.mat_q", c, c),
        "ca.mat_kv.weight": (2 * c, c), "ca.v_bias": (c,), "ca.zero_k_bias": (c,), **linear("ca.proj", c, c),
        "ca_norm.weight": (c,), "ca_norm.bias": (c,), "ada_gss": (1, 1, 6, c),
        **linear("ffn.fc1", 4 * c, c), **linear("ffn.fc2", c, 4 * c),
    }  # fmt: skip
    shapes = {
        "cfg_uncond": (tokens, text),
        "pos_start": (1, 1, c),
        "text_norm.weight": (text,),
        "text_proj_for_sos.ca.mat_q": (1, pool, c // pool),
        "text_proj_for_sos.ca.mat_kv.weight": (2 * c, text),
        "text_proj_for_sos.ca.v_bias": (c,),
        "text_proj_for_sos.ca.zero_k_bias": (c,),
        **linear("text_proj_for_sos.ca.proj", c, c),
        **linear("text_proj_for_ca.0", c, text),
        **linear("text_proj_for_ca.2", c, c),
        "lvl_embed.weight": (15, c),
        **linear("word_embed", c, bits),
        **linear("shared_ada_lin.1", 6 * c, c),
        **linear("head_nm.ada_lin.1", 2 * c, c),
        **linear("head", 2 * bits, c),
    }
    for i in range(chunks):
        shapes |= layers(f"block_chunks.{i}.module", depth // chunks, block)
    return shapes


def meissonic(
    joint: int, single: int, c: int, head_dim: int, *, text: int = 1024, rows: int = 8256, vocab: int = 8192,
    compress: bool = True,
) -> Shapes:  # fmt: skip
    """The transformer of Meissonic."""
    norms = {f"attn.{n}.weight": (head_dim,) for n in ("norm_q", "norm_k")}
    added = {f"attn.{n}.weight": (head_dim,) for n in ("norm_added_q", "norm_added_k")}
    both: Shapes = {**norms, **added}
    for suffix in ("", "_context"):
        both |= linear(f"norm1{suffix}.linear", 6 * c, c)
        both |= linear(f"ff{suffix}.net.0.proj", 4 * c, c) | linear(f"ff{suffix}.net.2", c, 4 * c)
    to = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for name in to:
        both |= linear(f"attn.{name}", c, c)
    one: Shapes = {**norms, **linear("norm.linear", 3 * c, c), **linear("proj_mlp", 4 * c, c)}
    one |= linear("proj_out", c, 5 * c)
    for name in to[:3]:
        one |= linear(f"attn.{name}", c, c)
    samples = {
        f"{block}.{part}.weight": shape
        for block in ("down_block.downsample", "up_block.upsample")
        for part, shape in (("norm", (c,)), ("conv", (c, c, 2, 2)))
    }
    time = "time_text_embed"
    return {
        **linear("context_embedder", c, text),
        **linear(f"{time}.timestep_embedder.linear_1", c, 256),
        **linear(f"{time}.timestep_embedder.linear_2", c, c),
        **linear(f"{time}.text_embedder.linear_1", c, c),
        **linear(f"{time}.text_embedder.linear_2", c, c),
        "cond_embed.linear_1.weight": (c, 1280 + text),
        "cond_embed.linear_2.weight": (c, c),
        "encoder_proj_layer_norm.weight": (c,),
        "embed.embeddings.weight": (rows, c),
        "embed.layer_norm.weight": (c,),
        "embed.conv.weight": (c, c, 1, 1),
        "project_to_hidden_norm.weight": (c,),
        "project_to_hidden.weight": (c, c),
        "project_from_hidden_norm.weight": (c,),
        "project_from_hidden.weight": (c, c),
        "mlm_layer.conv1.weight": (c, c, 1, 1),
        "mlm_layer.layer_norm.weight": (c,),
        "mlm_layer.conv2.weight": (vocab, c, 1, 1),
        **(samples if compress else {}),
        **layers("transformer_blocks", joint, both),
        **layers("single_transformer_blocks", single, one),
    }


def llamagen(depth: int, c: int, hidden: int, vocab: int = 16384, classes: int = 1000) -> Shapes:
    """c2i_*.pt"""
    layer: Shapes = {
        "attention.wqkv.weight": (3 * c, c),
        "attention.wo.weight": (c, c),
        "feed_forward.w1.weight": (hidden, c),
        "feed_forward.w3.weight": (hidden, c),
        "feed_forward.w2.weight": (c, hidden),
        "attention_norm.weight": (c,),
        "ffn_norm.weight": (c,),
    }
    return {
        "cls_embedding.embedding_table.weight": (classes + 1, c),
        "tok_embeddings.weight": (vocab, c),
        "norm.weight": (c,),
        "output.weight": (vocab, c),
        **layers("layers", depth, layer),
    }


def nar(depth: int, c: int, hidden: int, vocab: int = 16384, classes: int = 1000) -> Shapes:
    """LlamaGen's names, one more layer and a second head."""
    return {
        **llamagen(depth + 1, c, hidden, vocab, classes),
        "medusa_norm.weight": (c,),
        "medusa_output.weight": (vocab, c),
    }


def detailflow(
    depth: int, c: int, hidden: int, vocab: int = 8192, classes: int = 1000, group: int = 8
) -> Shapes:
    """LlamaGen's names, and the slots behind the first group."""
    return {
        **llamagen(depth, c, hidden, vocab, classes),
        "spe_tok_embeddings.special_embeddings.weight": (group - 1, c),
    }
