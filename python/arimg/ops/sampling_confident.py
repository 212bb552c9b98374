"""The most confident proposals of a step. See docs/ops/sampling.md; schedules are in `arimg.commit`."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, fake, kernels
from arimg.ops._sampling_rows import MAX_VOCABULARY, check_integers, check_tensor, expect, tensor

__all__ = ["keep_most_confident"]


def keep_most_confident(confidence: Tensor, count: int | Tensor, candidates: Tensor | None = None) -> Tensor:
    """The `count` most confident of each row: confidence [R, L] -> bool [R, L].

    count: an int, or int64 [R] on the confidences' device; a negative one keeps nothing. candidates bool
    [R, L]: only they are kept, all of them where there are no more than `count`. Of equals the lower index is
    kept, so that each row keeps exactly its count; a NaN counts as -inf. L is at most 2^24. No gradient.
    """
    expect_floating("confidence", confidence)
    expect(confidence.dim() == 2, "confidence [R, L]", list(confidence.shape))
    expect(
        confidence.shape[1] <= MAX_VOCABULARY,
        f"at most {MAX_VOCABULARY} entries per row",
        confidence.shape[1],
    )
    check_integers("count", count, confidence.shape[0], confidence)
    if candidates is not None:
        check_tensor("candidates", candidates, torch.bool, confidence.numel(), confidence)
        expect(candidates.shape == confidence.shape, "candidates [R, L]", list(candidates.shape))
        candidates = _contiguous_rows(candidates)
    confidence = _contiguous_rows(confidence.detach())
    ops = kernels(confidence)
    if ops is None:
        return reference.keep_most_confident(confidence, count, candidates)
    number = 0 if isinstance(count, Tensor) else max(0, min(count, MAX_VOCABULARY))
    kept: Tensor = ops.keep_confident(confidence, tensor(count), number, candidates)
    return kept


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


@fake("keep_confident")
def _keep_confident_fake(
    confidence: Tensor, counts: Tensor | None, count: int, candidates: Tensor | None
) -> Tensor:
    return confidence.new_empty(confidence.shape, dtype=torch.bool)
