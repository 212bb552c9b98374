"""NFIG: next-frequency prediction (arXiv 2503.07076), a VAR over a tokenizer whose scale k codes band k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arimg.data.images import Images
from arimg.generators.loop import Sampler
from arimg.guidance import BeyondConditional, Guidance, linear
from arimg.nn.band_quantizer import BandQuantizer
from arimg.systems.base import System
from arimg.systems.tokenizer import quantizer_tokenizer, scale_tokenizer
from arimg.systems.var import VarModel
from arimg.tokenizers import VQVAE


class NFIG(VarModel):
    """A VAR; what its tokens mean is the tokenizer's."""

    title = "NFIG"
    sampler = Sampler(Guidance(4.5, linear, BeyondConditional()), top_k=990)


def quantizer() -> BandQuantizer:
    """With the scales and, to start from, the codes of the bundled tokenizer."""
    source = scale_tokenizer().quantize
    made = BandQuantizer(source.vocab_size, source.channels, source.scales)
    made.embedding.load_state_dict(source.embedding.state_dict())
    return made


def tokenizer(images: Images, folder: Path) -> VQVAE:
    return quantizer_tokenizer(images, folder, quantizer())


def make(tokenizer: Any, classes: int) -> NFIG:
    return NFIG(tokenizer, classes, depth=5, width=192, heads=3, shared_adaln=True)


SYSTEM = System(
    "nfig",
    "NFIG",
    "next-frequency",
    "arXiv 2503.07076",
    "from low to high frequencies: each scale codes a band of the spectrum",
    tokenizer,
    make,
    deviations="bands are whole shells of equal radius, each non-empty, where the published rule leaves some"
    " without a frequency; no adversarial or perceptual loss and no DINOv2 encoder in the tokenizer; the"
    " formula and the schedule of guidance are assumed to be VAR's, with the published strength of 4.5",
)
