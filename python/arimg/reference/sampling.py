"""Seeded sampling in plain torch: the oracle of `arimg.ops.sampling`.

Probabilities are integers, so that no result depends on the order of a summation: the weight of a token is
round(exp(l - l_max) * 2^30), cumulative sums are exact, and a draw is an integer comparison.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ONE = 2**30  # the weight of the most likely token


def _philox(counter: list[Tensor], key: list[Tensor]) -> Tensor:
    """Word 0 of Philox4x32-10 (Salmon et al., 2011); int64 tensors that hold 32-bit words."""
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
    return c0


def row_seeds(seed: int | Tensor, rows: int, device: torch.device | str) -> Tensor:
    """The seed of each row, int64 [rows]: an int s gives s + r to row r, a tensor is taken as it is."""
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64).reshape(rows)
    first = (seed + 2**63) % 2**64 - 2**63  # any Python int, modulo 2^64
    return torch.arange(rows, dtype=torch.int64, device=device) + first


def _uniform(seeds: Tensor, position: int, n: int, draw: int) -> Tensor:
    """Exact float64 [R, n]: u = ((word >> 8) + 0.5) * 2^-24 at the positions position, position + 1, ..."""
    at = torch.arange(n, dtype=torch.int64, device=seeds.device) + position
    row = seeds[:, None].expand(-1, n)
    counter = [at & _MASK, (at >> 32) & _MASK, torch.full_like(at, draw), torch.zeros_like(at)]
    word = _philox([c.expand_as(row) for c in counter], [row & _MASK, (row >> 32) & _MASK])
    return ((word >> 8).double() + 0.5) * 2.0**-24


def philox_uniform(seed: int | Tensor, position: int, n: int, *, draw: int = 0) -> Tensor:
    """Uniform numbers of a counter: float32 [R, n] in (0, 1), one row per seed (an int is one row).

    Number j depends on (seed, position + j, draw) alone: Philox4x32-10 with key = seed and counter =
    (position lo, position hi, draw, 0).
    """
    seeds = seed.to(torch.int64).reshape(-1) if isinstance(seed, Tensor) else row_seeds(seed, 1, "cpu")
    return _uniform(seeds, position, n, draw).float().clamp_(max=1 - 2**-24)  # the top value would round to 1


def token_weights(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Integer weights after the filters, in the order of `sample`: logits [N, V] -> int64 [N, V]; 2^30 = the
    largest.

    A NaN never gets a weight; +inf takes it all; a row without any finite or infinite maximum prefers index
    0.
    """
    x = logits.float() / temperature if temperature != 1.0 else logits.float()
    x = x.masked_fill(x.isnan(), -torch.inf)
    top = x.amax(-1, keepdim=True)
    weight = ((x - top).double().exp() * _ONE).round().nan_to_num_(0.0).long()
    weight = torch.where(x == top, _ONE, weight)
    weight[..., 1:].masked_fill_(top == -torch.inf, 0)
    if 0 < top_k < x.shape[-1]:
        weight.masked_fill_(x < x.topk(top_k, dim=-1).values[..., -1:], 0)
    if top_p < 1:
        # ascending, and among equals the higher index first: it is dropped first
        order = x.sort(dim=-1, descending=True, stable=True).indices.flip(-1)
        cumulative = weight.gather(-1, order).cumsum(-1)
        limit = ((1.0 - top_p) * cumulative[..., -1:].double()).floor().long()
        dropped = cumulative <= limit
        dropped[..., -1] = False
        weight.masked_fill_(torch.zeros_like(dropped).scatter_(-1, order, dropped), 0)
    if min_p > 0:
        weight.masked_fill_(weight.double() < min_p * _ONE, 0)
    return weight


def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    guidance: float | None = None,
) -> Tensor:
    """Draw one token per row: logits [R, ..., V] -> int64 [R, ...]; logits [V] -> a scalar.

    guidance s: logits hold 2R leading rows, the conditional ones first, and l = s c + (1 - s) u. Then
    temperature, top-k (every tie with the k-th is kept), top-p (ascending, drop while the cumulative
    probability <= 1 - p; of equals the lower index is kept), min-p (relative to the largest probability), and
    the draw. seed: int s (row r uses s + r) or int64 [R]; the j-th token of a row uses position + j.
    """
    if guidance is not None:
        cond, uncond = logits.float().chunk(2)
        logits = guidance * cond + (1.0 - guidance) * uncond
    shape = logits.shape[:-1]
    rows = shape[0] if shape else 1
    flat = logits.reshape(-1, logits.shape[-1])
    weight = token_weights(flat, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    cumulative = weight.cumsum(-1)
    u = _uniform(row_seeds(seed, rows, logits.device), position, len(flat) // max(rows, 1), 0).reshape(-1, 1)
    target = (u * cumulative[:, -1:].double()).floor().long()  # < the total, since u <= 1 - 2^-25
    return torch.searchsorted(cumulative, target, right=True).reshape(shape)
