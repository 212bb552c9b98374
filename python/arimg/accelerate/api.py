"""The entry: walks a model, asks every recogniser, keeps the book."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from arimg.accelerate import swap
from arimg.accelerate.amused import recognise_amused_scheduler
from arimg.accelerate.autoencoder import recognise_autoencoder
from arimg.accelerate.families import recognise_family
from arimg.accelerate.few_rows import recognise_head
from arimg.accelerate.graphs import Backend, Graphs
from arimg.accelerate.imagegpt import recognise_imagegpt
from arimg.accelerate.llama_layer import recognise_llama_layers
from arimg.accelerate.llamagen import recognise_llamagen
from arimg.accelerate.llamagen_quantizer import recognise_llamagen_quantizer
from arimg.accelerate.report import Entry, Report
from arimg.accelerate.scalar_codes import recognise_scalar_codes
from arimg.accelerate.uvit import recognise_uvit
from arimg.accelerate.var import recognise_var, recognise_var_quantizer
from arimg.accelerate.vector_quantize import recognise_vector_quantize
from arimg.accelerate.vqvae_quantizer import recognise_vqvae_quantizer
from arimg.nn.packed_linear import CODES

# Each takes (report, path, module) and returns True where it knows the module, replaced or not. The families
# come first: two of them have all names of a VAR or a LlamaGen, and more.
RECOGNISERS: tuple[tuple[str, Callable[[Report, str, nn.Module], bool]], ...] = (
    ("generators of FlexVAR, HMAR, Infinity, MAR and NAR, by the names of their parts", recognise_family),
    ("VAR's generator (blocks with AdaLN, pos_1LC, lvl_embed, vae_proxy)", recognise_var),
    ("VAR's multi-scale quantizer (embedding, quant_resi, v_patch_nums)", recognise_var_quantizer),
    ("LlamaGen's transformer (cls_embedding, tok_embeddings, layers, setup_caches)", recognise_llamagen),
    (
        "transformers' decoder layers (layers, embed_tokens, norm, rotary_emb)",
        recognise_llama_layers,
    ),
    ("aMUSEd's UVit2DModel (down_block, transformer_layers, up_block, mlm_layer)", recognise_uvit),
    ("ImageGPT's blocks in transformers (wte, wpe, h, ln_f)", recognise_imagegpt),
    ("quantizers of transformers' and diffusers' VQVAEs (an embedding alone)", recognise_vqvae_quantizer),
    ("LlamaGen's quantizer (embedding, n_e, e_dim, l2_norm)", recognise_llamagen_quantizer),
    ("vocabulary heads (lm_head, generation_head)", recognise_head),
    ("vector-quantize-pytorch's VectorQuantize (_codebook with embed)", recognise_vector_quantize),
    (
        "vector-quantize-pytorch's FSQ (_levels, _basis) and LFQ (codebook_scale, bits_to_codes)",
        recognise_scalar_codes,
    ),
    ("a VQGAN's residual blocks and upsampling (norm1, conv1, norm2, conv2)", recognise_autoencoder),
)
# The same of what is no module.
SCHEDULERS: tuple[tuple[str, Callable[[Report, str, Any], bool]], ...] = (
    ("aMUSEd's scheduler (step, add_noise, mask_token_id)", recognise_amused_scheduler),
)


def accelerate(
    model: Any,
    *,
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    graphs: bool | Backend = False,
) -> Report:
    """Replaces the known parts of a model, in place, by faster ones with the same results.

    Parts are recognised by their structure and names; the package they come from is neither imported nor
    needed. Nothing is stored in the model: its state dict, parameters and hooks stay as they are. A part
    whose input does not suit the fast path (gradients wanted, autocast, another dtype or device) runs its
    original code.

    model: a module, a pipeline of diffusers (`components`, of which each is looked at) or a scheduler of one.
    dtype: torch.bfloat16 or torch.float16 runs a generator's transformer in this type, on a copy of its
    weights (half the original's memory on top), made anew when they change; the few-row products of
    transformers' models read such a copy on the CPU.
    weights: "int8" or "int4" lets the steps of LlamaGen's transformer, and the products of a few rows of
    other models, read such a copy of the weights (a quarter or an eighth of float32's memory on top): faster,
    and an approximation (docs/drop-in.md). Parts that do not take it are named in the report. Not together
    with dtype.
    graphs: the steps of a generator are captured as CUDA graphs, each at the second call of its shape, and
    replayed; their memory and the caches stay taken between pictures, until the model moves or is restored.
    Where that is not possible the report says why. A `graphs.Backend` captures in another way.

    Returns the report of what was replaced, what was not and why. Raises TypeError for
    something else and for another dtype, and ValueError for a model that is accelerated already or
    for other weights.
    """
    if not isinstance(model, nn.Module) and not hasattr(model, "components") and not hasattr(model, "step"):
        raise TypeError(f"expected a torch module, a pipeline or a scheduler, got {type(model).__name__}")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"expected dtype None, torch.bfloat16 or torch.float16, got {dtype}")
    if weights not in (None, *CODES):
        raise ValueError(f"expected weights None or one of {list(CODES)}, got {weights!r}")
    if weights is not None and dtype is not None:
        raise ValueError(f"expected dtype or weights, got both: {dtype} and {weights!r}")
    parts = list(_parts(model))
    if any(swap.is_swapped(module) for _, module in parts):
        raise ValueError("expected a model that is not accelerated yet; call restore() of its report first")
    shared = None
    if graphs:
        shared = Graphs() if graphs is True else Graphs(graphs)
    report = Report(type(model).__name__, dtype=dtype, weights=weights, graphs=shared)
    for path, part in parts:
        recognisers = RECOGNISERS if isinstance(part, nn.Module) else SCHEDULERS
        any(recognise(report, path, part) for _, recognise in recognisers)
    if not report.replaced and not report.kept:
        looked = "; ".join(what for what, _ in (*RECOGNISERS, *SCHEDULERS))
        report.kept.append(Entry("", type(model).__name__, f"no known part found; looked for {looked}"))
    return report


def _parts(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All modules, with those that a model holds in a tuple to keep them out of its state dict, and the
    components of a pipeline."""
    if not isinstance(model, nn.Module):
        components = getattr(model, "components", None)
        if isinstance(components, Mapping):
            for name, component in components.items():
                yield from _parts(component, name)
        else:
            yield prefix, model
        return
    for path, module in model.named_modules(prefix=prefix):
        yield path, module
        for name, value in vars(module).items():
            if name == "vae_proxy" and isinstance(value, tuple) and isinstance(value[0], nn.Module):
                yield from _parts(value[0], f"{path}.{name}[0]".lstrip("."))
