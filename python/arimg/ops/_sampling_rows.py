"""What the operations on rows of logits share: checks of their settings, shapes of their processors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg.ops._common import FLOATING
from arimg.reference.sampling import token_set

MAX_VOCABULARY = 2**24
_SMALLEST, _LARGEST = 2.0**-126, 3.4028234663852886e38  # normal float32 numbers


def expect(condition: bool, wanted: str, got: object) -> None:
    if not condition:
        raise ValueError(f"expected {wanted}, got {got}")


def check_tensor(name: str, x: Tensor, dtype: torch.dtype, count: int, logits: Tensor) -> None:
    if x.dtype != dtype:
        raise TypeError(f"expected {name} of {dtype}, got {x.dtype}")
    expect(x.device == logits.device, f"{name} on {logits.device}", x.device)
    if x.numel() != count:  # text with a symbolic size is made only when needed: it would fix the size
        raise ValueError(f"expected {name} [{count}], one per row, got {list(x.shape)}")


def check_integers(name: str, x: int | Tensor, count: int, logits: Tensor) -> None:
    if isinstance(x, Tensor):
        check_tensor(name, x, torch.int64, count, logits)
    elif not isinstance(x, int):
        raise TypeError(f"expected {name} to be an int or an int64 tensor, got {type(x).__name__}")


def check_guidance(guidance: float | Tensor | None, logits: Tensor, rows: int) -> None:
    if isinstance(guidance, Tensor):
        check_tensor("guidance", guidance, torch.float32, rows, logits)
    elif guidance is not None:
        expect(math.isfinite(guidance), "a finite guidance", guidance)


def check_filters(
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    rows: int,
    logits: Tensor,
) -> None:
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, torch.float32, rows, logits)
    else:
        expect(_SMALLEST <= temperature <= _LARGEST, "temperature > 0 (a normal float32 number)", temperature)
    if isinstance(top_k, Tensor):
        check_tensor("top_k", top_k, torch.int64, rows, logits)
    else:
        expect(top_k >= 0, "top_k >= 0", top_k)
    if isinstance(top_p, Tensor):
        check_tensor("top_p", top_p, torch.float32, rows, logits)
    else:
        expect(0.0 < top_p <= 1.0, "top_p in (0, 1]", top_p)
    if isinstance(min_p, Tensor):
        check_tensor("min_p", min_p, torch.float32, rows, logits)
    else:
        expect(0.0 <= min_p <= 1.0, "min_p in [0, 1]", min_p)


def number(x: float | Tensor, otherwise: float) -> float:
    return otherwise if isinstance(x, Tensor) else x


def tensor(x: float | Tensor | None) -> Tensor | None:
    return x.contiguous() if isinstance(x, Tensor) else None


def check_penalty(penalty: float, seen: Tensor | None) -> None:
    expect(_SMALLEST <= penalty <= _LARGEST, "repetition_penalty > 0 (a normal float32 number)", penalty)
    expect(penalty == 1.0 or seen is not None, "seen with a repetition_penalty", None)


def per_token(name: str, x: Tensor, shape: torch.Size, width: int, logits: Tensor) -> Tensor:
    """x [width], [R, width] or [R, ..., width] as [R, tokens, width], without a copy where strides allow."""
    expect(x.device == logits.device, f"{name} on the logits' device {logits.device}", x.device)
    rows = shape[0] if shape else 1
    tokens = math.prod(shape[1:])
    if x.dim() >= 1 and x.shape[-1] != 1 and x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 1 and x.shape[0] == width:
        return x.expand(rows, tokens, width)
    if x.shape == (rows, width):
        return x[:, None].expand(rows, tokens, width)
    if x.shape == (*shape, width):
        return x.reshape(rows, tokens, width)
    wanted = f"[{width}], {[rows, width]} or {[*shape, width]}"
    raise ValueError(f"expected {name} {wanted}, got {list(x.shape)}")


def per_token_float(name: str, x: Tensor | None, shape: torch.Size, logits: Tensor) -> Tensor | None:
    if x is None:
        return None
    if x.dtype not in FLOATING:
        raise TypeError(f"expected {name} of float32, bfloat16 or float16, got {x.dtype}")
    return per_token(name, x.detach().float(), shape, logits.shape[-1], logits)


def per_token_set(name: str, x: Tensor | None, shape: torch.Size, logits: Tensor) -> Tensor | None:
    """bool [..., V], bits uint8 [..., ceil(V / 8)], or for `seen` the tokens themselves, int64 [R, n]."""
    if x is None:
        return None
    vocabulary = logits.shape[-1]
    if x.dtype == torch.int64 and name == "seen":
        rows = shape[0] if shape else 1
        expect(x.dim() == 2 and x.shape[0] == rows, f"seen tokens [{rows}, n]", list(x.shape))
        x = token_set(x, vocabulary)
    if x.dtype == torch.bool:
        return per_token(name, x, shape, vocabulary, logits)
    if x.dtype == torch.uint8:
        return per_token(name, x, shape, (vocabulary + 7) // 8, logits)
    raise TypeError(f"expected {name} of bool, or bits of uint8, got {x.dtype}")
