"""Commit rules of the loop that check drafts: joint laws of whole sequences, rows by themselves, caches."""

import math
from dataclasses import replace

import pytest
import torch

from arimg import _library, ops
from arimg.generators import LlamaGen
from arimg.generators.loop import ALWAYS, Sampler, Session, final_tokens, generate
from arimg.generators.speculative import BiasedGrouped, Draft, Grouped, Jacobi
from arimg.guidance import Guidance, linear
from arimg.layout import Layout
from arimg.reference.sampling_accept import draw_from
from system_checks import check_apart

VOCABULARY, LENGTH, DRAFTS, ROWS = 4, 6, 3, 60_000
FIRST = torch.tensor([(VOCABULARY**t - 1) // (VOCABULARY - 1) for t in range(LENGTH + 1)])
PARTS = torch.tensor([0, 1, 0, 1])


class Toy:
    """Six tokens of four, each from a law that depends on all tokens before it: 4096 sequences."""

    sampler = Sampler()

    def __init__(self, sharpness=1.5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = sharpness * torch.randn(int(FIRST[-1]), VOCABULARY, generator=generator)

    def begin(self, condition, guided, window=0):
        return ToySession(self, condition)

    def joint(self):
        p, joint = self.logits.double().softmax(-1), torch.ones(1, dtype=torch.float64)
        for t in range(LENGTH):
            joint = (joint[:, None] * p[FIRST[t] : FIRST[t + 1]]).reshape(-1)
        return joint


class ToySession(Session):
    def __init__(self, toy, rows):
        self.toy, self.rows, self.vocabulary = toy, rows, VOCABULARY
        self.layout = Layout.groups([1] * LENGTH)
        self.kept = torch.zeros(rows, LENGTH + DRAFTS + 4, dtype=torch.int64)
        self.depth = torch.zeros(rows, dtype=torch.int64)

    def logits(self, turn):
        n = 0 if turn.drafts is None else turn.drafts.shape[1]
        line = self.kept.clone()
        at = self.depth[:, None] + torch.arange(n)
        if n:
            line.scatter_(1, at, turn.drafts)
        out = []
        for j in range(n + 1):
            depth = (self.depth + j).clamp(max=LENGTH - 1)
            code = torch.zeros_like(depth)
            for t in range(LENGTH):
                code = torch.where(t < depth, code * VOCABULARY + line[:, t], code)
            out.append(self.toy.logits[FIRST[depth] + code])
        return torch.stack(out, 1)

    def feed(self, turn):
        n = turn.drawn.shape[1]
        length = torch.full_like(self.depth, n) if turn.length is None else turn.length
        for j in range(n):
            at = (self.depth + j)[:, None].clamp(max=self.kept.shape[1] - 1)
            token = torch.where(j < length, turn.drawn[:, j], self.kept.gather(1, at)[:, 0])
            self.kept.scatter_(1, at, token[:, None])
        self.depth = self.depth + length

    def rewind(self, counts, last):
        """Inputs that were written are one fewer than the tokens that are known."""
        self.depth = self.depth - torch.tensor(counts)
        where = (self.depth - 1).clamp_min(0)[:, None]
        self.kept.scatter_(1, where, torch.where(self.depth > 0, last, self.kept[:, 0])[:, None])


class PendingToy(Toy):
    """As a draft model: like a network it counts a token as written when it predicts what follows."""

    def begin(self, condition, guided, window=0):
        session = super().begin(condition, guided)
        session.rewind = lambda counts, last: PendingToy._rewind(session, counts, last)
        session.written = torch.full((condition,), -1)
        logits = session.logits

        def written(turn):
            session.written = session.written + 1
            return logits(turn)

        session.logits = written
        return session

    @staticmethod
    def _rewind(session, counts, last):
        session.written = session.written - torch.tensor(counts)
        session.depth = session.written + 1
        session.kept.scatter_(1, session.written.clamp_min(0)[:, None], last[:, None])


def run(model, rule, rows=ROWS, seed=10**6):
    turns = list(generate(model, rows, commit=rule, seed=seed))
    (tokens,) = final_tokens(iter(turns))
    passes = sum((turn.length > 0).sum().item() for turn in turns) / rows
    return tokens, passes


def distance(tokens, joint):
    code = (tokens * VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    return (code.bincount(minlength=len(joint)).double() / len(code) - joint).abs().sum().item() / 2


def limit(joint, rows=ROWS):
    """What plain sampling exceeds once in a million (McDiarmid), and its mean."""
    floor = (joint * (1 - joint) * 2 / (math.pi * rows)).sqrt().sum().item() / 2
    return floor, floor + math.sqrt(math.log(1e6) / (2 * rows))


class MinimumOfBatch(Jacobi):
    """As both SJD repositories commit: eight rows as many as the slowest of them.

    An accepted draft that waits is tested again, against the law that it was drawn from, with another random
    number: a generator with a state has no number that belongs to a place, which would accept it again.
    """

    def _test(self, turn, law):
        return ops.speculative_accept(
            law, turn.drafts, turn.before, q_start=turn.from_law, position=turn.place,
            seed=turn.run.seeds + (turn.number << 40), tail="redraw",
        )  # fmt: skip

    def settle(self, turn):
        super().settle(turn)
        accepted = turn.length - 1
        turn.length = turn.length.reshape(-1, 8).amin(1).repeat_interleave(8)
        at = torch.arange(DRAFTS + 1)
        waits = (at >= turn.length[:, None]) & (at < accepted[:, None])
        weights = torch.nn.functional.one_hot(turn.drawn.clamp_min(0), VOCABULARY).int() << 30
        if turn.before is not None:
            source = turn.from_law[:, None] + at
            old = turn.before.weights.gather(
                1, source.clamp(max=DRAFTS)[..., None].expand(-1, -1, VOCABULARY)
            )
            weights = torch.where((source <= DRAFTS)[..., None], old, weights)
        weights = torch.where(waits[..., None], weights, turn.law.weights)
        turn.law = ops.Law(weights, weights.sum(-1))
        turn.done = bool((turn.place + turn.length == LENGTH).all())


class FromTarget(Jacobi):
    """As Lumina-mGPT 2.0 is released: a rejected draft is replaced by a draw from p."""

    def _test(self, turn, law):
        found = super()._test(turn, law)
        at = found.length[:, None] - 1
        places = turn.place[:, None] + torch.arange(DRAFTS + 1)
        drawn = draw_from(law.weights.long(), turn.run.seeds[:, None], places, 2)
        token = torch.where(at < DRAFTS, drawn.gather(1, at), found.tokens.gather(1, at))
        return ops.Accepted(found.tokens.scatter(1, at, token), found.length)


EXACT = {
    "redraw": Jacobi(DRAFTS),
    "last token": Jacobi(DRAFTS, start="last"),
    "couple": Jacobi(DRAFTS, "couple"),
    "gumbel": Jacobi(DRAFTS, "gumbel"),
    "grouped": Grouped(DRAFTS, PARTS),
    "draft model": Draft(PendingToy(1.0, seed=0), DRAFTS),
    "groups of one": BiasedGrouped(DRAFTS, torch.arange(VOCABULARY)),
}
BIASED = {
    "minimum of the batch": MinimumOfBatch(DRAFTS),
    "residual from p": FromTarget(DRAFTS),
    "groups as published": BiasedGrouped(DRAFTS, PARTS),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_give_the_joint_law_of_plain_sampling(name):
    toy = Toy()
    joint = toy.joint()
    tokens, passes = run(toy, EXACT[name])
    floor, bound = limit(joint)
    assert 0.5 * floor < distance(tokens, joint) < bound
    assert passes < LENGTH - 1
    for size, batches in ((1, 40), (8, 20)):
        for b in range(batches):
            alone, _ = run(toy, EXACT[name], size, 10**6 + b * size)
            assert torch.equal(alone, tokens[b * size : b * size + size])


@pytest.mark.parametrize("name", BIASED)
def test_biased_rules_are_found_out_by_the_same_test(name):
    toy = Toy()
    tokens, _ = run(toy, BIASED[name])
    assert distance(tokens, toy.joint()) > limit(toy.joint())[1]


@pytest.mark.parametrize("rule", [Jacobi(0), Draft(PendingToy(), 0), Grouped(0, PARTS), BiasedGrouped(0)])
def test_without_drafts_the_tokens_are_those_of_plain_sampling(rule):
    toy = Toy()
    tokens, passes = run(toy, rule, 200)
    assert passes == LENGTH
    assert torch.equal(tokens, torch.cat(final_tokens(generate(toy, 200, seed=10**6)), 1))


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_cuda_kernels_give_the_same_tokens(name):
    toy = Toy()
    on_cpu, _ = run(toy, EXACT[name], 5)
    _library.load_emulated()
    with _library.emulated_cuda():
        emulated, _ = run(toy, EXACT[name], 5)
    assert torch.equal(on_cpu, emulated)


def test_groups_and_likeness_save_passes():
    toy = Toy()
    passes = {name: run(toy, rule)[1] for name, rule in (EXACT | BIASED).items()}
    assert passes["groups as published"] < passes["redraw"] - 0.1
    twin, _ = run(toy, Draft(PendingToy(), DRAFTS), 400)
    assert run(toy, Draft(PendingToy(), DRAFTS), 400)[1] == math.ceil(LENGTH / (DRAFTS + 1))
    assert twin.shape == (400, LENGTH)


# --- on a network with caches ----------------------------------------------------------------------------
def network(seed=0, depth=2, sharp=8.0):
    torch.manual_seed(seed)
    model = LlamaGen(32, 3, depth=depth, width=32, heads=2, grid=4, dropout=0.0)
    torch.nn.init.normal_(model.output.weight, std=0.02 * sharp)
    return model.eval()


SAMPLER = Sampler(Guidance(2.0), top_k=12, top_p=0.95)
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    "rule",
    [
        Jacobi(5), Jacobi(5, "couple"), Jacobi(5, "gumbel", "last"), Draft(network(1, depth=1), 3),
        BiasedGrouped(5), Grouped(5, torch.arange(32) // 4),
    ],
    ids=["redraw", "couple", "gumbel", "draft", "groups as published", "grouped"],
)  # fmt: skip
@pytest.mark.parametrize("sampler", [SAMPLER, Sampler(top_p=0.9)], ids=["guided", "unguided"])
def test_caches_after_rollback_are_those_of_a_recomputation(rule, sampler):
    """Each pass's logits of every row, teacher forced over the tokens that it kept and its drafts."""
    model = network()
    turns = list(generate(model, LABELS, commit=rule, sampler=sampler, seed=3))
    (tokens,) = final_tokens(iter(turns))
    assert tokens.shape == (4, 16) and len(turns) <= 16
    plain = torch.full_like(LABELS, 3)
    for turn in turns:
        for r in range(len(LABELS)):
            depth = int(turn.place[r])
            if depth >= 16:
                continue
            line = torch.cat((tokens[r, :depth], turn.drafts[r]))[None, :15]
            for row, label in ((r, LABELS[r : r + 1]), (r + 4, plain[:1])):
                if row < len(turn.logits):
                    full = model(label, line)[0, depth:]
                    assert torch.allclose(turn.logits[row, : len(full)], full, atol=2e-5, rtol=1e-4)
    again = final_tokens(generate(model, LABELS, commit=rule, sampler=sampler, seed=3))[0]
    assert torch.equal(again, tokens)
    alone = final_tokens(generate(model, LABELS[2:3], commit=rule, sampler=sampler, seed=5))[0]
    assert torch.equal(alone[0], tokens[2])


def mean_passes(rule, seed):
    """Of 256 pictures of 16 tokens."""
    labels = torch.arange(256) % 3
    turns = generate(network(), labels, commit=rule, sampler=SAMPLER, seed=seed)
    return sum(int((turn.length > 0).sum()) for turn in turns) / 256


def test_coupled_drafts_settle_in_fewer_passes_and_groups_in_fewer_still():
    """The mean over pictures, none of which has the seed of another."""
    redraw, couple, gumbel, groups = (
        [mean_passes(rule, seed) for seed in (0, 1000, 2000)]
        for rule in (Jacobi(10), Jacobi(10, "couple"), Jacobi(10, "gumbel"), BiasedGrouped(10))
    )
    assert max(redraw) < 12
    check_apart(couple, redraw)
    check_apart(gumbel, redraw)
    check_apart(groups, couple)


def test_a_network_without_drafts_and_its_own_twin():
    model = network()
    (tokens,) = final_tokens(generate(model, LABELS, commit=Jacobi(0), sampler=SAMPLER, seed=3))
    plain = torch.cat(final_tokens(generate(model, LABELS, commit=ALWAYS, sampler=SAMPLER, seed=3)), 1)
    assert torch.equal(tokens, plain)
    turns = list(generate(model, LABELS, commit=Draft(model, 3), sampler=SAMPLER, seed=3))
    assert len(turns) <= 5 and final_tokens(iter(turns))[0].shape == (4, 16)


def test_what_drafts_cannot_serve_is_refused():
    model = network()
    with pytest.raises(ValueError, match="expected a window of 0 or more drafts, got -1"):
        Jacobi(-1)
    with pytest.raises(ValueError, match="expected a tail of"):
        Jacobi(3, "none")
    with pytest.raises(ValueError, match="expected guidance that is the same"):
        next(generate(model, LABELS, commit=Jacobi(3), sampler=Sampler(Guidance(2.0, linear))))
    with pytest.raises(ValueError, match="expected top_k to be a number"):
        next(generate(model, LABELS, commit=Jacobi(3), sampler=replace(SAMPLER, top_k=lambda turn: 3)))
    with pytest.raises(ValueError, match="expected no given tokens"):
        next(generate(model, LABELS, commit=Jacobi(3), given=[LABELS[:, None]]))
    other = LlamaGen(16, 3, depth=1, width=32, heads=2, grid=4).eval()
    with pytest.raises(ValueError, match="expected a draft model with 32 tokens, got 16"):
        next(generate(model, LABELS, commit=Draft(other, 3)))


# --- groups, in numbers -----------------------------------------------------------------------------------
def one_token(rule, p, q, rows=40_000):
    """Tests drafts from q against p: the share that is accepted, and the counts of the resulting tokens."""
    law = ops.token_law(torch.stack((p, p)).log().float().expand(rows, 2, -1))
    before = ops.token_law(q.log().float().expand(rows, 1, -1))
    seeds = torch.arange(rows)
    draft = torch.multinomial(q, rows, True, generator=torch.Generator().manual_seed(1))[:, None]
    window = {"draft": draft, "q": before, "seed": seeds, "position": 0}
    found = rule(law, window)
    return (found.length > 1).double().mean().item(), found.tokens[:, 0].bincount(minlength=len(p))


def test_groups_accept_more_and_what_they_bias_is_the_formula():
    """alpha = 1 - TV of the laws of groups; published law q min(1, p' / q') + (1 - alpha) [p - q]+ / Z."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(16, generator=generator).mul(1.5).softmax(0).double() for _ in range(2))
    groups, rows = torch.arange(16) % 5, 40_000
    p_of, q_of = (torch.zeros(5).double().index_add(0, groups, x)[groups] for x in (p, q))
    spread = 5 / math.sqrt(rows)

    plain, counts = one_token(lambda law, w: ops.speculative_accept(law, **w), p, q, rows)
    assert abs(plain - (1 - (p - q).abs().sum().item() / 2)) < spread
    assert _chi_square(counts, p * rows) < _chi_square_limit(16)

    how = {"groups": groups, "published": True}
    alpha, counts = one_token(lambda law, w: ops.grouped_accept(law, **how, **w), p, q, rows)
    assert alpha > plain + spread
    kept = q * (p_of / q_of).clamp(max=1)
    residual = (p - q).clamp(min=0)
    law = kept + (1 - kept.sum()) * residual / residual.sum()
    assert abs(alpha - kept.sum().item()) < spread
    assert _chi_square(counts, law * rows) < _chi_square_limit(16) < _chi_square(counts, p * rows)

    how = {"groups": torch.arange(16), "published": True}
    alone, counts = one_token(lambda law, w: ops.grouped_accept(law, **how, **w), p, q, rows)
    assert alone == plain and _chi_square(counts, p * rows) < _chi_square_limit(16)


def _chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum().item()


def _chi_square_limit(n):
    """Exceeded once in a million or so (Laurent and Massart)."""
    t = math.log(1e6)
    return n - 1 + 2 * math.sqrt((n - 1) * t) + 2 * t
