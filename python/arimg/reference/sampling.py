"""Seeded sampling in plain torch: the oracle of `arimg.ops.sampling`, equal to the kernels to the last bit.

Probabilities are integers, so that no result depends on the order of a summation: the weight of a token is
round(exp(l - l_max) * 2^30) with one exp for all backends, cumulative sums are exact, and a draw is an
integer comparison.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ONE = 2**30  # the weight of the most likely token


# --- arithmetic: every operation rounds once, as csrc/core/math.h does -----------------------------
def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c rounded once to float32, for float32 values.

    The product is exact in float64. Its sum with c is rounded to odd (the neighbour whose last
    bit is 1), after which rounding to float32 is the rounding of the exact value.
    """
    product = a.double() * b
    addend = torch.as_tensor(c, dtype=torch.float64, device=a.device)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + away, bits).view(torch.float64).float()


def exp_weight(d: Tensor) -> Tensor:
    """round(exp(d) * 2^30) for float32 d <= 0 as int64; 0 for NaN. The polynomial of csrc/core/math.h."""
    d = torch.where(d > -22.5, d, -22.5).float()
    k = (d * float.fromhex("0x1.715476p+0")).round()
    r = _fma(k, -float.fromhex("0x1.62ep-1"), d)
    r = _fma(k, -float.fromhex("0x1.0bfbe8p-15"), r)
    q = torch.full_like(r, float.fromhex("0x1.6a2434p-10"))
    for coefficient in ("0x1.1239e2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p0", "0x1p0"):
        q = _fma(r, q.double(), float.fromhex(coefficient))
    return torch.ldexp(q.double(), k + 30).round().long()


def _values(logits: Tensor, temperature: float = 1.0, guidance: float | Tensor | None = None) -> Tensor:
    """x of the definition: logits [N, V], or guidance (a number or float32 [N / 2]) the halves mixed."""
    x = logits.float()
    if guidance is not None:
        cond, uncond = x.chunk(2)
        s = torch.as_tensor(guidance, dtype=torch.float32, device=x.device).reshape(-1, 1)
        x = _fma(cond, s.double(), uncond * (1.0 - s))
    if temperature != 1.0:
        x = x / torch.full((1, 1), temperature, dtype=torch.float32, device=x.device)
    return torch.where(x.isnan(), -torch.inf, x + 0.0)  # -0 becomes +0


# --- random numbers --------------------------------------------------------------------------------
def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): the four words; int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps both halves right
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def wrap_int64(x: int) -> int:
    """Any Python int, modulo 2^64, as an int64."""
    return (x + 2**63) % 2**64 - 2**63


def row_seeds(seed: int | Tensor, rows: int, device: torch.device | str) -> Tensor:
    """The seed of each row, int64 [rows]: an int s gives s + r to row r, a tensor is taken as it is."""
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64).reshape(rows)
    return torch.arange(rows, dtype=torch.int64, device=device) + wrap_int64(seed)


def _words(seeds: Tensor, position: int | Tensor, n: int, draw: int) -> list[Tensor]:
    """The words [R, n] of the counters (position, position + 1, ...; draw) under the rows' seeds."""
    first = position.reshape(1) if isinstance(position, Tensor) else wrap_int64(position)
    at = torch.arange(n, dtype=torch.int64, device=seeds.device) + first
    row = seeds[:, None].expand(-1, n)
    counter = [at & _MASK, (at >> 32) & _MASK, torch.full_like(at, draw), torch.zeros_like(at)]
    return _philox([c.expand_as(row) for c in counter], [row & _MASK, (row >> 32) & _MASK])


def philox_uniform(seed: int | Tensor, position: int, n: int, *, draw: int = 0) -> Tensor:
    """Uniform numbers of a counter: float32 [R, n] in (0, 1), one row per seed (an int is one row).

    Number j depends on (seed, position + j, draw) alone: Philox4x32-10 with key = seed and counter =
    (position lo, position hi, draw, 0).
    """
    seeds = seed.to(torch.int64).reshape(-1) if isinstance(seed, Tensor) else row_seeds(seed, 1, "cpu")
    word = _words(seeds, position, n, draw)[0]
    exact = ((word >> 8).double() + 0.5) * 2.0**-24
    return exact.float().clamp_(max=1 - 2**-24)  # the top value would round to 1


def _below(total: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """floor(total * (high * 2^32 + low) / 2^64) for total < 2^54, in pieces that fit into 63 bits."""
    a, b = total >> 24, total & 0xFFFFFF
    lowest = (a * low + (b * low >> 24)) >> 8
    return (a * high + (b * high + lowest >> 24)) >> 8


# --- filters ---------------------------------------------------------------------------------------
def token_weights(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    guidance: float | Tensor | None = None,
) -> Tensor:
    """Integer weights after the filters, in the order of `sample`: logits [N, V] -> int64 [N, V] (with
    guidance [N / 2, V]); 2^30 = the largest.

    A NaN never gets a weight; +inf takes it all (several share it equally); a row without any value above
    -inf gives all to index 0.
    """
    x = _values(logits, temperature, guidance)
    vocabulary = x.shape[-1]
    top = x.amax(-1, keepdim=True)
    weight = torch.where(x == top, _ONE, exp_weight(x - top))
    weight[..., 1:].masked_fill_(top == -torch.inf, 0)
    if top_k == 1:
        weight = torch.zeros_like(weight).scatter_(-1, x.argmax(-1, keepdim=True), _ONE)
    elif 0 < top_k < vocabulary:
        weight.masked_fill_(x < x.topk(top_k, dim=-1).values[..., -1:], 0)
    if top_p < 1:
        # ascending, and among equals the higher index first: it is dropped first
        order = x.sort(dim=-1, descending=True, stable=True).indices.flip(-1)
        cumulative = weight.gather(-1, order).cumsum(-1)
        total = cumulative[..., -1:]
        limit = ((1.0 - top_p) * total.double()).floor().long()
        dropped = cumulative <= torch.minimum(limit, total - 1)
        weight.masked_fill_(torch.zeros_like(dropped).scatter_(-1, order, dropped), 0)
    if min_p > 0:
        weight.masked_fill_(weight.double() < min_p * _ONE, 0)
    return weight


def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    guidance: float | Tensor | None = None,
) -> Tensor:
    """Draw one token per row: logits [R, ..., V] -> int64 [R, ...]; logits [V] -> a scalar.

    guidance s (a number, or float32 [R]): logits hold 2R leading rows, the conditional ones first, and
    l = s c + (1 - s) u. Then temperature, top-k (every tie with the k-th is kept; k = 1 is the first of the
    largest), top-p (ascending, drop while the cumulative probability <= 1 - p; of equals the lower index is
    kept), min-p (relative to the largest probability), and the draw. seed: int s (row r uses s + r) or int64
    [R]; the j-th token of a row uses position + j (position: int, or an int64 tensor of one element).
    """
    shape = logits.shape[:-1]
    if guidance is not None:
        shape = torch.Size((shape[0] // 2, *shape[1:]))
    rows = shape[0] if shape else 1
    tokens = shape.numel() // max(rows, 1)
    if shape.numel() == 0:
        return torch.empty(shape, dtype=torch.int64, device=logits.device)
    if isinstance(guidance, Tensor):
        guidance = guidance.reshape(-1).repeat_interleave(tokens)
    weight = token_weights(
        logits.reshape(-1, logits.shape[-1]),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        guidance=guidance,
    )
    cumulative = weight.cumsum(-1)
    high, low, *_ = _words(row_seeds(seed, rows, logits.device), position, tokens, 0)
    target = _below(cumulative[:, -1:], high.reshape(-1, 1), low.reshape(-1, 1))
    return torch.searchsorted(cumulative, target, right=True).reshape(shape)
