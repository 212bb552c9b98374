"""Speculative acceptance of continuous tokens with Gaussian last steps (docs/ops/sampling_accept.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like
from arimg.ops._sampling_rows import check_tensor as _check_tensor
from arimg.ops._sampling_rows import expect as _expect
from arimg.reference.sampling_accept_gaussian import AcceptedValues

__all__ = ["AcceptedValues", "gaussian_accept"]


def gaussian_accept(
    x: Tensor,
    p_mean: Tensor,
    p_std: Tensor,
    q_mean: Tensor,
    q_std: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    log_sigma: float | Tensor = 0.0,
    max_tries: int = 64,
) -> AcceptedValues:
    """Test drafts x [R, n, d], whose last step drew them from N(q_mean, q_std), against N(p_mean, p_std).

    Left to right, x is accepted with probability min(1, r), log r = log_sigma + log p(x) - log q(x); the
    first rejected one is drawn again from max(0, sigma p - q) normalised, and nothing behind it is final. The
    first `length` tokens (1 to n, by row) of `values` are. log_sigma (number or [R, n]): for heads of several
    steps, the sum over the earlier steps of log std of q minus log std of p (not its inverse). With one step,
    that is log_sigma = 0, the output has exactly the law p.

    Means and deviations broadcast to [R, n, d]; computed in float64. The redraw tries max_tries draws from p
    and, if none is accepted, keeps the last: `tries` [R] counts them (0: nothing was rejected; with one step
    1 / (1 - alpha) are expected).
    seed: int (row r uses seed + r) or int64 [R]; position: int, or int64 [1] or [R].
    No gradient, no synchronisation with the host.
    """
    expect_floating("x", x)
    _expect(x.dim() == 3 and x.shape[2] >= 1, "x [R, n, d] with d >= 1", list(x.shape))
    given = {"p_mean": p_mean, "p_std": p_std, "q_mean": q_mean, "q_std": q_std}
    for name, t in given.items():
        expect_like(name, t, "x", x)
        fits = t.dim() <= 3 and all(a in (1, b) for a, b in zip(t.shape[::-1], x.shape[::-1], strict=False))
        _expect(fits, f"{name} that broadcasts to {list(x.shape)}", list(t.shape))
    _expect(1 <= max_tries <= 2**16, "max_tries in [1, 65536]", max_tries)
    if isinstance(seed, Tensor):
        _check_tensor("seed", seed, torch.int64, x.shape[0], x)
    if isinstance(position, Tensor):
        count = 1 if position.numel() == 1 else x.shape[0]
        _check_tensor("position", position, torch.int64, count, x)
    return reference.gaussian_accept(
        x.detach(),
        *(t.detach() for t in given.values()),
        seed=seed,
        position=position,
        log_sigma=log_sigma,
        max_tries=max_tries,
    )
