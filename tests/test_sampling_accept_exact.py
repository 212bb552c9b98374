"""Speculative decoding by exact enumeration: the joint law of whole sequences, exact rules and biased ones.

The toy of six tokens from a vocabulary of four, each drawn from a law that depends on all tokens before it; a
window of the last committed token and three drafts. All sequences (4096) are counted against their exact
probabilities. The distance of plain sampling (the floor) is known: E TV = 1/2 sum E|k_i / N - p_i|, and by
McDiarmid's inequality it is exceeded by sqrt(log(1e6) / 2N) with probability 1e-6 at most.
"""

from __future__ import annotations

import math

import pytest
import torch

from arimg import ops
from arimg.ops import Law
from arimg.reference.sampling_accept import draw_from

VOCABULARY, LENGTH, DRAFTS, ROWS = 4, 6, 3, 400_000
FIRST = [(VOCABULARY**t - 1) // (VOCABULARY - 1) for t in range(LENGTH + 1)]  # of the contexts of t tokens


@pytest.fixture(scope="module")
def target():
    """The law of the next token for every context, and the probabilities of all sequences."""
    logits = 1.5 * torch.randn(FIRST[LENGTH], VOCABULARY, generator=torch.Generator().manual_seed(0))
    law = ops.token_law(logits)
    p = law.weights.double() / law.total[:, None]
    joint = torch.ones(1, dtype=torch.float64)
    for t in range(LENGTH):
        joint = (joint[:, None] * p[FIRST[t] : FIRST[t + 1]]).reshape(-1)
    return law, joint


def distance(codes, joint):
    return (codes.bincount(minlength=len(joint)).double() / len(codes) - joint).abs().sum().item() / 2


def limit(joint, rows):
    floor = (joint * (1 - joint) * 2 / (math.pi * rows)).sqrt().sum().item() / 2
    return floor, floor + math.sqrt(math.log(1e6) / (2 * rows))


def laws_of_window(target, code, depth, draft):
    """p [R, n + 1, V] behind the committed tokens and 0, 1, ... drafts (any law beyond the end)."""
    contexts, first = [], torch.tensor(FIRST)
    for j in range(DRAFTS + 1):
        inside = depth + j < LENGTH
        contexts.append(torch.where(inside, first[(depth + j).clamp(max=LENGTH - 1)] + code, 0))
        if j < DRAFTS:
            code = torch.where(inside, code * VOCABULARY + draft[:, j], 0)
    at = torch.stack(contexts, 1)
    return Law(target.weights[at], target.total[at])


def fixed(draft):
    """The law of a draft that was fixed in advance."""
    weights = torch.nn.functional.one_hot(draft, VOCABULARY).int() << 30
    return Law(weights, torch.full(draft.shape, 2**30))


def from_p_itself(p, out, seeds, depth):
    """Lumina-mGPT 2.0 as released: a rejected draft is nearly always replaced by a draw from p itself."""
    at = out.length[:, None] - 1
    drawn = draw_from(p.weights.long(), seeds[:, None], depth[:, None] + torch.arange(DRAFTS + 1), 2)
    token = torch.where(at < DRAFTS, drawn.gather(1, at), out.tokens.gather(1, at))
    return out.tokens.scatter(1, at, token)


def decode(target, rows=ROWS, *, tail="redraw", batch=1, released=False, fresh_noise=False):
    """The codes of all sequences, and the mean number of forward passes.

    batch: groups of rows that commit as many tokens as the slowest of them; drafts that were accepted beyond
    that are tested again against the law they were drawn from. fresh_noise: other random numbers in each
    pass, as a generator with a state gives them.
    """
    code, depth = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    seeds, at = torch.arange(rows) + 10**6, torch.arange(DRAFTS + 1)
    generator = torch.Generator().manual_seed(1)
    draft = torch.randint(VOCABULARY, (rows, DRAFTS), generator=generator)
    q, passes, step = fixed(draft), 0, 0
    while (depth < LENGTH).any():
        passes, step = passes + (depth < LENGTH).sum().item(), step + 1
        p = laws_of_window(target, code, depth, draft)
        noise = seeds + (step << 40) if fresh_noise else seeds
        out = ops.speculative_accept(p, draft, q, seed=noise, position=depth, tail=tail, step=step)
        tokens = from_p_itself(p, out, noise, depth) if released else out.tokens
        length = torch.where(depth < LENGTH, out.length, DRAFTS + 1)
        length = length.reshape(-1, batch).amin(1).repeat_interleave(batch)
        # The laws of the drafts to come: q where an accepted one waits, p where it was drawn now.
        waits = (at < out.length[:, None] - 1)[:, :DRAFTS]
        new = torch.randint(VOCABULARY, (rows, DRAFTS), generator=generator)
        weights = torch.where(waits[..., None], q.weights, p.weights[:, :DRAFTS])
        weights = torch.cat((weights, p.weights[:, DRAFTS:], fixed(new).weights), 1)
        next_at = length[:, None] + at[:DRAFTS]
        weights = weights.gather(1, next_at[..., None].expand(-1, -1, VOCABULARY))
        q = Law(weights, weights.sum(-1))
        draft = torch.cat((tokens, new), 1).gather(1, next_at)
        for j in range(DRAFTS + 1):
            more = (j < length) & (depth < LENGTH)
            code = torch.where(more, code * VOCABULARY + tokens[:, j], code)
            depth = depth + more
    return code, passes / rows


@pytest.mark.parametrize("tail", ["redraw", "couple"])
def test_each_row_commits_by_itself_and_the_law_is_that_of_plain_sampling(target, tail):
    law, joint = target
    floor, bound = limit(joint, ROWS)
    codes, passes = decode(law, tail=tail)
    assert 0.5 * floor < distance(codes, joint) < bound
    assert passes < LENGTH - 1.5


def test_noise_shared_by_position_is_exact(target):
    law, joint = target
    codes, _ = decode(law, 100_000, tail="gumbel")
    assert distance(codes, joint) < limit(joint, 100_000)[1]


def test_a_commit_that_waits_for_a_batch_of_eight_is_exact_with_numbers_that_belong_to_the_position(target):
    """A draft that is tested again meets the same number, hence the same answer."""
    law, joint = target
    codes, _ = decode(law, 200_000, batch=8)
    assert distance(codes, joint) < limit(joint, 200_000)[1]


@pytest.mark.parametrize(
    "rule", [dict(released=True), dict(batch=8, fresh_noise=True)], ids=["Lumina-2", "min over batch of 8"]
)
def test_the_count_finds_the_bias_of_released_rules(target, rule):
    law, joint = target
    codes, _ = decode(law, 100_000, **rule)
    assert distance(codes, joint) > limit(joint, 100_000)[1] + 0.05
