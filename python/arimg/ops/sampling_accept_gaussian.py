"""Speculative acceptance of continuous tokens with Gaussian last steps (docs/ops/sampling_accept.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels
from arimg.ops._sampling_rows import check_integers, expect, tensor
from arimg.reference.sampling import wrap_int64
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

    Means and deviations broadcast to [R, n, d]; computed in float64, the same bits on every backend. The
    redraw tries up to max_tries draws from p and, if none is accepted, keeps the last: `tries` [R] counts
    them (0: nothing was rejected; with one step 1 / (1 - alpha) are expected). A NaN, or a deviation that is
    not positive and finite, rejects its draft; the last try stands.
    seed: int (row r uses seed + r) or int64 [R]; position: int, or int64 [1] or [R].
    No gradient, no synchronisation with the host.
    """
    expect_floating("x", x)
    if x.dim() != 3 or x.shape[2] < 1:
        raise ValueError(f"expected x [R, n, d] with d >= 1, got {list(x.shape)}")
    rows, n, _ = x.shape
    given = {"p_mean": p_mean, "p_std": p_std, "q_mean": q_mean, "q_std": q_std}
    for name, t in given.items():
        expect_like(name, t, "x", x)
        fits = t.dim() <= 3 and all(a in (1, b) for a, b in zip(t.shape[::-1], x.shape[::-1], strict=False))
        if not fits:
            raise ValueError(f"expected {name} that broadcasts to {list(x.shape)}, got {list(t.shape)}")
    expect(1 <= max_tries <= 2**16, "max_tries in [1, 65536]", max_tries)
    check_integers("seed", seed, rows, x)
    check_integers(
        "position", position, 1 if isinstance(position, Tensor) and position.numel() == 1 else rows, x
    )
    sigmas = None
    if isinstance(log_sigma, Tensor):
        _check_log_sigma(log_sigma, x)
        sigmas = log_sigma.detach().double().expand(rows, n).contiguous()
    ops = kernels(x.detach())
    if ops is None:
        return reference.gaussian_accept(
            x.detach(),
            *(t.detach() for t in given.values()),
            seed=seed,
            position=position,
            log_sigma=log_sigma,
            max_tries=max_tries,
        )
    return AcceptedValues(
        *ops.gaussian_accept(
            x.detach(),
            *(t.detach().expand(x.shape) for t in given.values()),
            tensor(seed),
            0 if isinstance(seed, Tensor) else wrap_int64(seed),
            tensor(position),
            0 if isinstance(position, Tensor) else wrap_int64(position),
            sigmas,
            0.0 if isinstance(log_sigma, Tensor) else log_sigma,
            max_tries,
        )
    )


def _check_log_sigma(log_sigma: Tensor, x: Tensor) -> None:
    if not log_sigma.is_floating_point():
        raise TypeError(f"expected log_sigma of a floating dtype, got {log_sigma.dtype}")
    expect(log_sigma.device == x.device, f"log_sigma on x's device {x.device}", log_sigma.device)
    shape = x.shape[:2]
    sizes = zip(log_sigma.shape[::-1], shape[::-1], strict=False)
    if log_sigma.dim() > 2 or not all(a in (1, b) for a, b in sizes):
        raise ValueError(f"expected log_sigma that broadcasts to {list(shape)}, got {list(log_sigma.shape)}")


@fake("gaussian_accept")
def _gaussian_accept_fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    values = x.new_empty(x.shape)
    return values, x.new_empty((rows,), dtype=torch.int64), x.new_empty((rows,), dtype=torch.int64)
