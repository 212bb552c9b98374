"""Generators known as a whole: FlexVAR, HMAR, Infinity, MAR, NAR. One table says what becomes of each part.

Their loops are their own and stay. What they share with known parts is replaced: linear layers that see a few
rows (AdaLN's, one row a picture; those of a token's diffusion head; those of a short diagonal) read their
weights once. Residual blocks and quantizers inside have recognisers of their own. The names of FlexVAR,
Infinity, MAR and NAR are those of their public code, HMAR's follow its paper: VAR's and a mask embedding.
"""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from arimg.accelerate.few_rows import replace_linear
from arimg.accelerate.report import Entry, Report

_LOOP = "inside the model's sampling loop, which stays"
_VAR = {"word_embed", "class_emb", "blocks", "head_nm", "head"}
_LLAMAGEN = {"cls_embedding", "tok_embeddings", "layers", "norm", "output"}
# Not mat_qkv: its weight is read without a call of the layer.
_VAR_PRODUCTS = ("*.ada_lin.*", "*.attn.proj", "*.ffn.*", "word_embed", "head")
_PARTS = ("attention", "cache", "quantizer", "pyramid", "sampler")


class Family(NamedTuple):
    """children, names: what such a model has; matches: what else; products: its linear layers of a few rows
    (patterns of paths); kept: why each of the parts stays, in the order of `_PARTS`.
    """

    name: str
    children: set[str]
    names: tuple[str, ...]
    matches: Callable[[Any], bool]
    products: tuple[str, ...]
    kept: tuple[str, str, str, str, str]


def _own_names(module: nn.Module) -> Iterator[str]:
    yield from module._modules
    yield from module._parameters


def _has_adaln(module: Any) -> bool:
    blocks = list(module.blocks.children())
    return bool(blocks) and all(hasattr(b, "ada_lin") or hasattr(b, "ada_gss") for b in blocks)


def _has_mask_embedding(module: Any) -> bool:
    return _has_adaln(module) and any("mask" in name for name in _own_names(module))


def _is_flexible(module: Any) -> bool:
    """Positions on a grid of their own and no level embedding."""
    places = module.pos_1LC
    on_a_grid = isinstance(places, torch.Tensor) and places.dim() == 4
    return on_a_grid and not hasattr(module, "lvl_embed") and _has_adaln(module)


def _has_text_blocks(module: Any) -> bool:
    blocks = [m for m in module.modules() if {"sa", "ca", "ffn"} <= m._modules.keys()]
    return bool(blocks) and ("blocks" in module._modules or "block_chunks" in module._modules)


def _has_second_head(module: Any) -> bool:
    return any(name.startswith("medusa_") for name in _own_names(module))


FAMILIES = (
    Family(
        "FlexVAR",
        _VAR,
        ("pos_start", "pos_1LC"),
        _is_flexible,
        _VAR_PRODUCTS,
        (
            "scales are chosen at each call; VAR's composition has a list of them",
            "grows by concatenation, for its length is not known before a call",
            "look-ups of normalised codes in the sampling loop; the tokenizer is accelerated on its own",
            "one bicubic resize of a scale's own map: no residual sum to fuse",
            f"{_LOOP}; greedy at scales without training",
        ),
    ),
    Family(
        "HMAR",
        _VAR,
        ("pos_start",),
        _has_mask_embedding,
        _VAR_PRODUCTS,
        (
            "one scale at a time, dense: what torch's attention does",
            "there is none: a scale sees the picture so far and no earlier scale",
            "VAR's, replaced where the model holds it (vae_proxy)",
            "area-resized sum of scales, by the quantizer's own method",
            f"{_LOOP}; the most probable tokens of a scale are kept and the others masked again",
        ),
    ),
    Family(
        "Infinity",
        {"text_norm", "text_proj_for_sos", "text_proj_for_ca", "word_embed", "lvl_embed", "head"},
        ("pos_start", "cfg_uncond"),
        _has_text_blocks,
        (*_VAR_PRODUCTS, "*.proj", "*.mat_q", "text_proj_for_ca.*", "head.*"),
        (
            "attention to the text between attention and MLP: no composition of ours has that block",
            "grows by concatenation, for its length is not known before a call",
            "signs of normalised bits (BSQ), inside the tokenizer that is passed to each call",
            "sums of trilinear resizes over a schedule given with each call",
            f"{_LOOP}; each bit has a draw of its own",
        ),
    ),
    Family(
        "MAR",
        {"encoder_blocks", "decoder_blocks", "diffloss", "z_proj", "decoder_embed"},
        ("mask_token",),
        lambda module: True,
        ("diffloss.*",),
        (
            "among the tokens that are known, in no order: what torch's attention does",
            "there is none: every step runs over the whole picture",
            "there is none: tokens are vectors of a KL autoencoder, accelerated on its own",
            "there is none: one resolution",
            "the diffusion's loop stays; its network's products are replaced",
        ),
    ),
    Family(
        "NAR",
        _LLAMAGEN,
        ("setup_caches",),
        _has_second_head,
        ("*",),
        (
            "a diagonal at a time: LlamaGen's steps here are of one token",
            "written at the positions of a diagonal, by the original",
            "there is none in the generator: tokens come from LlamaGen's tokenizer",
            "there is none: one resolution",
            f"{_LOOP}; the mean of two heads' logits",
        ),
    ),
)


def recognise_family(report: Report, path: str, module: nn.Module) -> bool:
    for family in FAMILIES:
        named = module._modules.keys() >= family.children and all(hasattr(module, n) for n in family.names)
        if named and family.matches(module):
            _replace(report, path, module, family)
            return True
    return False


def _replace(report: Report, path: str, module: nn.Module, family: Family) -> None:
    linears = [
        (name, part)
        for name, part in module.named_modules()
        if type(part) is nn.Linear and any(fnmatchcase(name, pattern) for pattern in family.products)
    ]
    for name, linear in linears:
        replace_linear(report, f"{path}.{name}".lstrip("."), linear)
    if not linears:
        report.kept.append(Entry(path, f"{family.name}'s products", "expected linear layers, found none"))
    for part, reason in zip(_PARTS, family.kept):
        report.kept.append(Entry(path, f"{family.name}'s {part}", reason))
