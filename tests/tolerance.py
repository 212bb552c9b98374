"""Derived tolerances: no hand-tuned atol.

A kernel may be off by k times what PyTorch itself is off in the same dtype, plus the rounding noise of the
reference: what adding and removing a constant does to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rounding_noise(reference: Tensor, dtype: torch.dtype) -> float:
    """The largest change of the reference when it is rounded to dtype, added to a constant and taken back."""
    rounded = reference.to(dtype)
    there_and_back = (rounded + 0.3) - 0.3
    return (there_and_back.double() - reference.double()).abs().max().item() if reference.numel() else 0.0


def assert_close(
    got: Tensor, formula: Callable[..., Tensor], *inputs: Any, k: float = 2.0, floor: float = 0.0
) -> None:
    """got must be as near to formula(inputs in float64) as k times formula(inputs as given) is.

    floor: an absolute error that is always allowed, for cases where PyTorch happens to be exact.
    """

    def cast(x: Any) -> Any:
        return x.detach().cpu().double() if isinstance(x, Tensor) and x.is_floating_point() else x

    exact = formula(*[cast(x) for x in inputs]).double()
    same_dtype = formula(*[x.detach().cpu() if isinstance(x, Tensor) else x for x in inputs]).double()
    assert got.shape == exact.shape, f"expected shape {list(exact.shape)}, got {list(got.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.detach().cpu().double().isfinite(), finite), "non-finite values differ"
    if not finite.any():
        return
    error = (got.detach().cpu().double() - exact)[finite].abs().max().item()
    peer = (same_dtype - exact)[finite].abs().max().item()
    noise = rounding_noise(exact[finite], got.dtype)
    allowed = k * peer + 2 * noise + floor
    assert error <= allowed, f"error {error:.3e} > {k} x {peer:.3e} (same dtype in PyTorch) + 2 x {noise:.3e}"
