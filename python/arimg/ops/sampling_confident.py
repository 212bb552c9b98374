"""The most confident proposals of a step, and bits drawn from pairs of logits. See docs/ops/sampling.md."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating
from arimg.ops._sampling_rows import check_integers, check_tensor, expect
from arimg.ops.sampling import sample
from arimg.reference.sampling_confident import pack_bits

__all__ = ["keep_most_confident", "sample_bits"]


def keep_most_confident(confidence: Tensor, count: int | Tensor, candidates: Tensor | None = None) -> Tensor:
    """The `count` most confident of each row: confidence [R, L] -> bool [R, L].

    count: an int, or int64 [R], of which a negative one keeps nothing. candidates bool [R, L]: only they are
    kept, all of them where there are no more than `count`. Of equals the lower index is kept; a NaN counts as
    -inf. Composed of a stable sort and a running count of torch.
    """
    expect_floating("confidence", confidence)
    expect(confidence.dim() == 2, "confidence [R, L]", list(confidence.shape))
    check_integers("count", count, confidence.shape[0], confidence)
    if candidates is not None:
        check_tensor("candidates", candidates, torch.bool, confidence.numel(), confidence)
        expect(candidates.shape == confidence.shape, "candidates [R, L]", list(candidates.shape))
    return reference.keep_most_confident(confidence, count, candidates)


def sample_bits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    guidance: float | Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """Draw each bit from its two logits (Infinity, VAREdit, NSARM): [R, ..., d, 2] -> bool [R, ..., d].

    packed: int64 [R, ...] instead, the first bit the most significant, d <= 63. Settings as for `sample`, to
    which each pair is a row: bit b of the j-th token of a row draws at position (position + j) d + b.
    """
    expect_floating("logits", logits)
    fits = logits.dim() >= 3 and logits.shape[-1] == 2 and logits.shape[-2] >= 1
    expect(fits, "logits [R, ..., d, 2] with d >= 1", list(logits.shape))
    d = logits.shape[-2]
    expect(not packed or d <= 63, "at most 63 bits to pack", d)
    check_integers("position", position, 1, logits)
    bits = sample(
        logits.flatten(1, -2),
        seed=seed,
        position=position * d,
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        guidance=guidance,
    )
    rows = logits.shape[0] if guidance is None else logits.shape[0] // 2
    bits = bits.reshape(rows, *logits.shape[1:-1]).bool()
    return pack_bits(bits) if packed else bits
