"""Seeded sampling in plain torch: the oracle of `arimg.ops.sampling`, equal to the kernels to the last bit.

Probabilities are integers, so that no result depends on the order of a summation: the weight of a token is
round(exp(l - l_max) * 2^30) with one exp for all backends, cumulative sums are exact, and a draw is an
integer comparison.
"""

from typing import NamedTuple

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


def exponential(words: Tensor) -> Tensor:
    """-log(1 - v) as float32, v of 31 bits of each 32-bit word. The polynomial of csrc/core/math.h."""
    v = (((words >> 1) & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    v = v.clamp(max=1 - 2**-24)
    y = (1 - v).view(torch.int32)
    e = (y - 0x3F3504F3) >> 23
    m = (y - (e << 23)).view(torch.float32)
    s = torch.where(e == 0, -v, m - 1) / torch.where(e == 0, 2 - v, m + 1)
    u = s * s
    series = _fma(u, torch.full_like(u, float.fromhex("0x1.c71c72p-4")), float.fromhex("0x1.24924ap-3"))
    for coefficient in ("0x1.99999ap-3", "0x1.555556p-2"):
        series = _fma(u, series.double(), float.fromhex(coefficient))
    log_m = _fma((s + s) * u, series.double(), s + s)
    return _fma(e.float(), -float.fromhex("0x1.62e43p-1"), -log_m)


def _values(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    guidance: float | Tensor | None = None,
    *,
    seen: Tensor | None = None,
    repetition_penalty: float = 1.0,
    factor: Tensor | None = None,
    multiply_negative: bool = False,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """x of the definition: logits [N, V], or guidance (a number or float32 [N / 2]) the halves mixed; the
    processors broadcast to the result, a temperature may be float32 [N]."""
    x = logits.float()
    if guidance is not None:
        cond, uncond = x.chunk(2)
        s = torch.as_tensor(guidance, dtype=torch.float32, device=x.device).reshape(-1, 1)
        x = _fma(cond, s.double(), uncond * (1.0 - s))
    x = torch.where(x.isnan(), -torch.inf, x)
    if seen is not None:
        penalty = torch.full((1, 1), repetition_penalty, dtype=torch.float32, device=x.device)
        x = torch.where(seen, torch.where(x < 0, x * penalty, x / penalty), x)
    if factor is not None:
        x = x * factor if multiply_negative else torch.where(x < 0, x / factor, x * factor)
    if bias is not None:
        x = x + bias
    if allowed is not None:
        x = torch.where(allowed, x, -torch.inf)
    if isinstance(temperature, Tensor):
        x = x / torch.where(temperature > 0, temperature, 1.0).reshape(-1, 1)
    elif temperature != 1.0:
        x = x / torch.full((1, 1), temperature, dtype=torch.float32, device=x.device)
    return torch.where(x.isnan(), -torch.inf, x + 0.0)  # -0 becomes +0


# --- sets and factors of tokens --------------------------------------------------------------------
def token_set(tokens: Tensor, vocabulary: int) -> Tensor:
    """bool [R, V], true at the tokens int64 [R, n]; tokens outside of [0, V) are ignored."""
    place = torch.where((tokens >= 0) & (tokens < vocabulary), tokens, vocabulary)
    marks = torch.zeros(tokens.shape[0], vocabulary + 1, dtype=torch.bool, device=tokens.device)
    return marks.scatter_(1, place, True)[:, :vocabulary]


def frequency_factor(frequency: Tensor, rate: float, threshold: float) -> Tensor:
    """CoTyle's suppression of frequent codes, for `sample(factor=...)`: exp(-rate (f - threshold)) where
    f >= threshold, else 1; frequency [..., V] of any dtype -> float32."""
    excess = (frequency.double() - threshold).clamp(min=0.0)
    return torch.exp(-rate * excess).float()


def _membership(tokens: Tensor, vocabulary: int) -> Tensor:
    """bool [..., V] from itself, or from bits uint8 [..., ceil(V / 8)]."""
    if tokens.dtype == torch.bool:
        return tokens
    bits = tokens[..., None] >> torch.arange(8, dtype=torch.uint8, device=tokens.device) & 1
    return bits.flatten(-2)[..., :vocabulary].bool()


def _per_row(x: Tensor | None, shape: torch.Size, rows: int) -> Tensor | None:
    """[V], [R, V] or [R, ..., V] as what broadcasts to [rows of the logits, V]."""
    if x is None or x.dim() == 1:
        return x
    if x.shape[:-1] != shape:
        x = x.reshape(rows, 1, -1).expand(-1, shape.numel() // max(rows, 1), -1)
    return x.reshape(shape.numel(), -1)


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


def _counters(seeds: Tensor, position: int | Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Positions and seeds [R, n]."""
    first = position.reshape(-1, 1) if isinstance(position, Tensor) else wrap_int64(position)
    at = torch.arange(n, dtype=torch.int64, device=seeds.device) + first
    return torch.broadcast_tensors(at, seeds[:, None])


def _words(seeds: Tensor, position: int | Tensor, n: int, draw: int) -> list[Tensor]:
    """The words [R, n] of the counters (position, position + 1, ...; draw) under the rows' seeds."""
    at, row = _counters(seeds, position, n)
    counter = [at & _MASK, (at >> 32) & _MASK, torch.full_like(at, draw), torch.zeros_like(at)]
    return _philox(counter, [row & _MASK, (row >> 32) & _MASK])


def numbers(seeds: Tensor, position: int | Tensor, n: int, draw: int, count: int) -> Tensor:
    """The 32-bit numbers [R, n, count] of positions that have many: number i is word i % 64 / 16 of the
    counter (position, draw, 1 + i / 64 * 16 + i % 16)."""
    at, row = (x[..., None] for x in _counters(seeds, position, n))
    i = torch.arange(count, device=seeds.device)
    block = 1 + i // 64 * 16 + i % 16
    counter = [at & _MASK, (at >> 32) & _MASK, torch.full_like(at, draw), block]
    shape = torch.broadcast_shapes(at.shape, block.shape)
    words = _philox([c.expand(shape) for c in counter], [row & _MASK, (row >> 32) & _MASK])
    return torch.stack(words).gather(0, (i % 64 // 16).expand(1, *shape))[0]


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
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    guidance: float | Tensor | None = None,
    seen: Tensor | None = None,
    repetition_penalty: float = 1.0,
    factor: Tensor | None = None,
    multiply_negative: bool = False,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Integer weights after the filters, in the order of `sample`: logits [N, V] -> int64 [N, V] (with
    guidance [N / 2, V]); 2^30 = the largest. Settings are numbers or [rows of the result].

    A NaN never gets a weight; +inf takes it all (several share it equally); a row without any value above
    -inf gives all to index 0.
    """
    x = _values(
        logits,
        temperature,
        guidance,
        seen=seen,
        repetition_penalty=repetition_penalty,
        factor=factor,
        multiply_negative=multiply_negative,
        bias=bias,
        allowed=allowed,
    )
    return _weights(x, temperature, top_k, top_p, min_p)


def _weights(
    x: Tensor,
    temperature: float | Tensor,
    top_k: float | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
) -> Tensor:
    def column(setting: float | Tensor, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(setting, device=x.device).to(dtype).reshape(-1, 1)

    vocabulary = x.shape[-1]
    top = x.amax(-1, keepdim=True)
    weight = torch.where(x == top, _ONE, exp_weight(x - top))
    weight[..., 1:].masked_fill_(top == -torch.inf, 0)
    k = column(top_k, torch.int64)
    if isinstance(temperature, Tensor):
        k = torch.where(temperature.reshape(-1, 1) > 0, k, 1)
    kth = x.sort(-1, descending=True).values.gather(-1, k.expand(len(x), 1).clamp(1, vocabulary) - 1)
    weight.masked_fill_((k > 0) & (k < vocabulary) & (x < kth), 0)
    first = torch.zeros_like(weight).scatter_(-1, x.argmax(-1, keepdim=True), _ONE)
    weight = torch.where(k == 1, first, weight)

    p = column(top_p, torch.float64)
    dropping = torch.where(p < 1, 1.0 - p.clamp(min=0.0), 0.0)
    # ascending, and among equals the higher index first: it is dropped first
    order = x.sort(dim=-1, descending=True, stable=True).indices.flip(-1)
    cumulative = weight.gather(-1, order).cumsum(-1)
    total = cumulative[..., -1:]
    limit = (dropping * total.double()).floor().long()
    dropped = (cumulative <= torch.minimum(limit, total - 1)) & (dropping > 0)
    weight.masked_fill_(torch.zeros_like(dropped).scatter_(-1, order, dropped), 0)
    least = column(min_p, torch.float64).nan_to_num(0.0).clamp(0.0, 1.0)
    return weight.masked_fill_(weight.double() < least * _ONE, 0)


class Drawn(NamedTuple):
    """Tokens, the log-probability of each and the entropy of its distribution, both after the filters."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor


def drawn(token: Tensor, facts: Tensor) -> Drawn:
    """facts int64 [..., 3]: the token's kept weight w, the sum W of the kept weights, and the sum of
    round(w d), d = max x - x. log p = log(w / W); the entropy is log(W / 2^30) + sum(w d) / W."""
    weight, total, spread = facts.double().unbind(-1)
    return Drawn(token, (weight / total).log().float(), ((total / _ONE).log() + spread / total).float())


def _facts(x: Tensor, weight: Tensor, token: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True)
    spread = torch.where((weight > 0) & (x != top), (weight.float() * (top - x)).round(), 0.0).long()
    known = token.clamp(max=x.shape[-1] - 1)
    own = torch.where(token == known, weight.gather(-1, known[:, None])[:, 0], 0)
    return torch.stack((own, weight.sum(-1), spread.sum(-1)), -1)


def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    guidance: float | Tensor | None = None,
    seen: Tensor | None = None,
    repetition_penalty: float = 1.0,
    factor: Tensor | None = None,
    multiply_negative: bool = False,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    forced: Tensor | None = None,
    method: str = "draw",
    return_logprob: bool = False,
) -> Tensor | Drawn:
    """Draw one token per row: logits [R, ..., V] -> int64 [R, ...]; logits [V] -> a scalar.

    guidance s (a number, or float32 [R]): logits hold 2R leading rows, the conditional ones first, and
    l = s c + (1 - s) u. Then the repetition penalty of the tokens seen, factor, bias, allowed tokens,
    temperature, top-k (every tie with the k-th is kept; k = 1 is the first of the largest), top-p (ascending,
    drop while the cumulative probability <= 1 - p; of equals the lower index is kept), min-p (relative to the
    largest probability), and the draw, by inversion or by Gumbel noise. seed: int s (row r uses s + r) or
    int64 [R]; the j-th token of a row uses position + j (position: int, or an int64 tensor of one element).
    See `arimg.ops.sample` for the rest.
    """
    shape = logits.shape[:-1]
    if guidance is not None:
        shape = torch.Size((shape[0] // 2, *shape[1:]))
    rows = shape[0] if shape else 1
    tokens = shape.numel() // max(rows, 1)
    if shape.numel() == 0:
        token = torch.empty(shape, dtype=torch.int64, device=logits.device)
        return Drawn(token, token.float(), token.float()) if return_logprob else token

    def repeated(setting: float | Tensor) -> float | Tensor:
        return setting.reshape(-1).repeat_interleave(tokens) if isinstance(setting, Tensor) else setting

    def members(given: Tensor | None) -> Tensor | None:
        return None if given is None else _per_row(_membership(given, vocabulary), shape, rows)

    vocabulary = logits.shape[-1]
    if seen is not None and seen.dtype == torch.int64:
        seen = token_set(seen, vocabulary)
    x = _values(
        logits.reshape(-1, vocabulary),
        repeated(temperature),
        None if guidance is None else repeated(guidance),
        seen=members(seen),
        repetition_penalty=repetition_penalty,
        factor=_per_row(factor, shape, rows),
        multiply_negative=multiply_negative,
        bias=_per_row(bias, shape, rows),
        allowed=members(allowed),
    )
    weight = _weights(x, repeated(temperature), repeated(top_k), repeated(top_p), repeated(min_p))
    seeds = row_seeds(seed, rows, logits.device)
    if method == "gumbel":
        words = numbers(seeds, position, tokens, 0, vocabulary).reshape(-1, vocabulary)
        time = torch.where(weight > 0, exponential(words) / weight.float(), torch.inf)
        token = time.argmin(-1)
    else:
        cumulative = weight.cumsum(-1)
        high, low, *_ = _words(seeds, position, tokens, 0)
        target = _below(cumulative[:, -1:], high.reshape(-1, 1), low.reshape(-1, 1))
        token = torch.searchsorted(cumulative, target, right=True)[:, 0]
    if forced is not None:
        token = torch.where(forced.reshape(-1) >= 0, forced.reshape(-1), token)
    if return_logprob:
        return drawn(token.reshape(shape), _facts(x, weight, token).reshape(*shape, 3))
    return token.reshape(shape)
