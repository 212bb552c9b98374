"""A small transformer gives the logits of one masked pass, step by step with a cache, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import reference
from arimg.cache import KVCache
from arimg.layout import Layout
from arimg.nn.rope import rope_1d, rope_2d, rope_normalised, rope_scales

WIDTH, HEADS, KV_HEADS, DIM, VOCAB, BATCH = 24, 3, 1, 8, 11, 2
SCALES = (1, 2, (2, 3), 4)
LAYOUTS = {
    "scales": (Layout.scales(SCALES), rope_scales(SCALES, DIM)),
    "scales, normalised": (Layout.scales(SCALES), rope_normalised(SCALES, DIM)),
    "raster": (Layout.scales([1] * 13), rope_2d(3, 4, DIM, prefix=1)),
    "rows": (Layout.scales([(1, 5)] * 4), rope_1d(20, DIM, interleaved=False)),
    "diagonals": (Layout.scales([(1, n) for n in (1, 2, 3, 2, 1)]), rope_1d(9, DIM)),
}
RULES = ["level-causal", "token-causal", "level-diagonal"]
NORM = dict(norm="rms", q_weight=torch.linspace(0.5, 2, DIM), k_weight=torch.linspace(2, 0.5, DIM))


class Small(nn.Module):
    """Two blocks of attention with grouped heads and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(HEADS * DIM, WIDTH) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, attend) -> Tensor:
        h = self.embed(tokens)
        for i in range(2):
            qkv = self.qkv[i](h).unflatten(-1, (HEADS + 2 * KV_HEADS, DIM))
            h = h + self.out[i](attend(i, qkv).transpose(1, 2).flatten(2))
            h = h + F.gelu(self.mlp[i](F.layer_norm(h, (WIDTH,))))
        return self.head(F.layer_norm(h, (WIDTH,)))


def masked(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    return reference.row_interval_attention(q, k, v, start, end)


@torch.no_grad()
def uncached(model: Small, tokens: Tensor, rope, start: Tensor, end: Tensor) -> Tensor:
    """One pass over all tokens; keys and values pass through plain torch."""

    def attend(i: int, qkv: Tensor) -> Tensor:
        k, v = torch.zeros(2, len(qkv), KV_HEADS, qkv.shape[1], DIM, dtype=qkv.dtype)
        q = reference.append_(k, v, qkv, rope=rope, **NORM)
        return masked(q, k, v, start, end)

    return model(tokens, attend)


def caches_of(page_size: int | None, dtype: torch.dtype, length: int, batch: int = BATCH) -> list[KVCache]:
    return [KVCache(batch, KV_HEADS, length, DIM, dtype, page_size=page_size) for _ in range(2)]


@pytest.fixture(scope="module")
def model() -> Small:
    return Small()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("page_size", [None, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(model, name, rule, page_size, dtype):
    layout, rope = LAYOUTS[name]
    tokens = torch.randint(VOCAB, (BATCH, layout.length), generator=torch.Generator().manual_seed(1))
    row_start, row_end = layout.intervals(rule)
    want = uncached(model, tokens, rope, row_start, row_end)
    caches = caches_of(page_size, dtype, layout.length)
    got = []
    for start, end in layout.segments:

        def attend(i: int, qkv: Tensor, start: int = start, end: int = end) -> Tensor:
            q = caches[i].append(qkv, rope=rope, **NORM)
            if rule == "level-causal":
                return caches[i].attend(q)
            return masked(q, *caches[i].read(), row_start[start:end], row_end[start:end])

        got.append(model(tokens[:, start:end], attend))
    error = (torch.cat(got, 1) - want).abs().max()
    # float32: rounding only; one byte: a vector is off by 1/254 or 1/16 of itself
    assert error < {torch.float32: 2e-5, torch.int8: 0.02, torch.float8_e4m3fn: 0.1}[dtype] * want.abs().max()


@pytest.mark.parametrize("page_size", [None, 3])
@torch.no_grad()
def test_ragged_rows_give_the_logits_of_each_row_alone(model, page_size):
    """Prompts of different lengths in one batch, then tokens one by one."""
    rope, prompts, steps = rope_1d(16, DIM), (5, 2), 4
    tokens = torch.randint(VOCAB, (BATCH, 9), generator=torch.Generator().manual_seed(2))
    caches = caches_of(page_size, torch.float32, 16)
    logits: list[list[Tensor]] = [[], []]

    def attend(i: int, qkv: Tensor) -> Tensor:
        cache, before = caches[i], caches[i].row_lengths
        counts = prompts if qkv.shape[1] > 1 else None
        q = cache.append(qkv, counts=counts, rope=rope, **NORM)
        return cache.attend_causal(q, before if counts else None)

    first = model(tokens[:, :5], attend)
    for b, n in enumerate(prompts):
        logits[b].append(first[b, :n])
    for t in range(steps):
        step = model(torch.stack([tokens[b, n + t] for b, n in enumerate(prompts)])[:, None], attend)
        for b in range(BATCH):
            logits[b].append(step[b])
    for b, n in enumerate(prompts):
        start, end = Layout.scales([1] * (n + steps)).intervals("token-causal")
        want = uncached(model, tokens[b : b + 1, : n + steps], rope, start, end)[0]
        torch.testing.assert_close(torch.cat(logits[b]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("page_size", [None, 3])
@torch.no_grad()
def test_drafts_that_are_peeked_committed_and_rewound_leave_the_logits_alone(model, page_size, dtype):
    """A window of drafts as in speculative decoding: each row keeps a prefix of its own."""
    rope = rope_1d(16, DIM)
    tokens = torch.randint(VOCAB, (BATCH, 9), generator=torch.Generator().manual_seed(3))
    drafts = torch.randint(VOCAB, (BATCH, 4), generator=torch.Generator().manual_seed(4))
    drafts[0, :1], drafts[1, :3] = tokens[0, 4:5], tokens[1, 4:7]
    caches = caches_of(page_size, dtype, 16)

    def attend(peek: bool):
        def run(i: int, qkv: Tensor) -> Tensor:
            q = (caches[i].peek if peek else caches[i].append)(qkv, rope=rope, **NORM)
            return caches[i].attend_causal(q)

        return run

    model(tokens[:, :4], attend(False))
    seen = model(drafts, attend(True))
    for cache in caches:
        cache.commit((1, 3))
        cache.rewind((0, 1))
    after = model(torch.stack((tokens[0, 5:7], tokens[1, 6:8])), attend(False))
    start, end = Layout.scales([1] * 9).intervals("token-causal")
    want = uncached(model, tokens, rope, start, end)
    close = dict(rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 0.02 * want.abs().max().item())
    for b, n in enumerate((1, 3)):
        torch.testing.assert_close(seen[b, :n], want[b, 4 : 4 + n], **close)
    torch.testing.assert_close(after[0], want[0, 5:7], **close)
    torch.testing.assert_close(after[1], want[1, 6:8], **close)
