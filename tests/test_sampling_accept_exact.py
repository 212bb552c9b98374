"""Speculative decoding by exact enumeration: the joint law of whole sequences, exact rules and biased ones.

The toy of six tokens from a vocabulary of four, each drawn from a law that depends on all tokens before it; a
window of the last committed token and three drafts. All sequences (4096) are counted against their exact
probabilities. The distance of plain sampling (the floor) is known: E TV = 1/2 sum E|k_i / N - p_i|, and by
McDiarmid's inequality it is exceeded by sqrt(log(1e6) / 2N) with probability 1e-6 at most.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from arimg import ops
from arimg.ops import Accepted, Law
from arimg.reference.sampling_accept import draw_from

VOCABULARY, LENGTH, DRAFTS, ROWS, SEED = 4, 6, 3, 400_000, 10**6
PARTS = torch.tensor([0, 1, 0, 1])
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


def grouped(p, draft, q, *, tail="redraw", published, groups=None, seed, position, step):
    """Grouped acceptance; behind the exact rule, which has no tail, drafts are drawn from p like its tail."""
    if published:
        return ops.grouped_accept(
            p, draft, q, groups, published=True, ranks=2, delta=1.0, seed=seed, position=position, tail=tail
        )
    out = ops.grouped_accept(p, draft, q, groups, published=False, seed=seed, position=position)
    at = torch.arange(DRAFTS + 1)
    drawn = draw_from(p.weights.long(), seed[:, None], position[:, None] + at, 0)
    return Accepted(torch.where(at < out.length[:, None], out.tokens, drawn), out.length)


def plain(p, draft, q, **keywords):
    return ops.speculative_accept(p, draft, q, **keywords)


def fresh_drafts(rows):
    """Drafts that have not seen any law, for each step: every pass commits one token or more."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (LENGTH + 1, rows, DRAFTS), generator=generator)


def decode(target, rows=ROWS, *, rule=plain, tail="redraw", batch=1, released=False, fresh_noise=False):
    """The codes of all sequences, and the mean number of forward passes.

    batch: groups of rows that commit as many tokens as the slowest of them; drafts that were accepted beyond
    that are tested again against the law they were drawn from. fresh_noise: other random numbers in each
    pass, as a generator with a state gives them.
    """
    code, depth = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    seeds, at = torch.arange(rows) + SEED, torch.arange(DRAFTS + 1)
    fresh = fresh_drafts(rows)
    draft = fresh[0]
    q, passes, step = fixed(draft), 0, 0
    while (depth < LENGTH).any():
        passes, step = passes + (depth < LENGTH).sum().item(), step + 1
        p = laws_of_window(target, code, depth, draft)
        noise = seeds + (step << 40) if fresh_noise else seeds
        out = rule(p, draft, q, seed=noise, position=depth, tail=tail, step=step)
        tokens = from_p_itself(p, out, noise, depth) if released else out.tokens
        length = torch.where(depth < LENGTH, out.length, DRAFTS + 1)
        length = length.reshape(-1, batch).amin(1).repeat_interleave(batch)
        # The laws of the drafts to come: q where an accepted one waits, p where it was drawn now.
        waits = (at < out.length[:, None] - 1)[:, :DRAFTS]
        new = fresh[step]
        weights = torch.where(waits[..., None], q.weights, p.weights[:, :DRAFTS])
        weights = torch.cat((weights, p.weights[:, DRAFTS:], fixed(new).weights), 1)
        next_at = length[:, None] + at[:DRAFTS]
        weights = weights.gather(1, next_at[..., None].expand(-1, -1, VOCABULARY))
        q = Law(weights, weights.sum(-1))
        draft = torch.cat((tokens, new), 1).gather(1, next_at)
        code, depth = commit(code, depth, tokens, length)
    return code, passes / rows


def commit(code, depth, tokens, length):
    for j in range(DRAFTS + 1):
        more = (j < length) & (depth < LENGTH)
        code = torch.where(more, code * VOCABULARY + tokens[:, j], code)
        depth = depth + more
    return code, depth


def decode_batch(target, fresh, first, size, tail):
    """A batch of `size` sequences, decoded by the loop of the documentation: a call per step, one int seed,
    rows at positions of their own, the p of the call before as q. Plain numbers: so few need no tensors."""
    weights, totals = target
    code, depth = [0] * size, [0] * size
    draft = fresh[0][first : first + size]
    q = start = None
    step = 0
    while min(depth) < LENGTH:
        step += 1
        contexts = []
        for r in range(size):
            at, inside = code[r], []
            for j in range(DRAFTS + 1):
                inside.append(FIRST[depth[r] + j] + at if depth[r] + j < LENGTH else 0)
                at = at * VOCABULARY + draft[r][j] if j < DRAFTS and depth[r] + j < LENGTH else 0
            contexts.append(inside)
        index = torch.tensor(contexts)
        p = Law(weights[index], totals[index])
        out = ops.speculative_accept(
            p, torch.tensor(draft), q, q_start=start, seed=SEED + first, position=torch.tensor(depth),
            tail=tail, step=step,
        )  # fmt: skip
        q, start = p, out.length
        tokens, lengths = out.tokens.tolist(), out.length.tolist()
        new = fresh[step][first : first + size]
        for r in range(size):
            for token in tokens[r][: min(lengths[r], LENGTH - depth[r])]:
                code[r], depth[r] = code[r] * VOCABULARY + token, depth[r] + 1
        draft = [tokens[r][lengths[r] :] + new[r][: lengths[r] - 1] for r in range(size)]
    return code


RULES = {
    "tail redrawn": dict(tail="redraw"),
    "tail coupled": dict(tail="couple"),
    "noise shared by position": dict(tail="gumbel"),
    "groups, drawn again within": dict(rule=partial(grouped, published=False, groups=PARTS)),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_row_commits_by_itself_and_the_law_is_that_of_plain_sampling(target, rule):
    law, joint = target
    rows = ROWS if rule == "tail redrawn" else ROWS // 4
    floor, bound = limit(joint, rows)
    codes, passes = decode(law, rows, **RULES[rule])
    assert 0.5 * floor < distance(codes, joint) < bound
    assert passes < LENGTH - 1


@pytest.mark.parametrize("tail", ["redraw", "couple", "gumbel"])
def test_batches_of_eight_give_the_sequences_of_rows_alone(target, tail):
    """Real calls of eight rows that advance and end by themselves: each sequence is the one that it is among
    400,000, so the law is the same; and their joint law by itself is at the floor."""
    law, joint = target
    rows = 40_000
    fresh = fresh_drafts(rows).tolist()
    codes = [code for first in range(0, rows, 8) for code in decode_batch(law, fresh, first, 8, tail)]
    codes = torch.tensor(codes)
    assert distance(codes, joint) < limit(joint, rows)[1]
    assert torch.equal(codes, decode(law, rows, tail=tail)[0])
    alone = torch.tensor([decode_batch(law, fresh, first, 1, tail)[0] for first in range(200)])
    assert torch.equal(alone, codes[:200])


def test_a_commit_that_waits_for_a_batch_of_eight_is_exact_with_numbers_that_belong_to_the_position(target):
    """A draft that is tested again meets the same number, hence the same answer."""
    law, joint = target
    codes, _ = decode(law, 200_000, batch=8)
    assert distance(codes, joint) < limit(joint, 200_000)[1]


@pytest.mark.parametrize(
    "rule",
    [
        dict(released=True),
        dict(batch=8, fresh_noise=True),
        dict(rule=partial(grouped, published=True, groups=PARTS)),
        dict(rule=partial(grouped, published=True)),
    ],
    ids=["Lumina-2", "min over batch of 8", "published groups", "published windows of ranks"],
)
def test_the_count_finds_the_bias_of_released_rules(target, rule):
    law, joint = target
    codes, _ = decode(law, 100_000, **rule)
    assert distance(codes, joint) > limit(joint, 100_000)[1] + 0.05
