"""What the tests of the small systems share: a tokenizer, weights at which every part matters, and the checks
that every system passes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from arimg import ops, reference
from arimg.generators.loop import ALWAYS, Turn, final_tokens, generate
from arimg.tokenizers import VQVAE
from conftest import Backend
from pretend_cuda import CUDA, pretend_cuda

LABELS, SEEDS = (1, 0, 2), (9, 3, 8)


def tokenizer(side: int = 4, vocab: int = 40) -> VQVAE:
    """One map of side x side tokens of pictures of 8 side pixels, untrained. It sets the seed."""
    torch.manual_seed(0)
    return VQVAE(vocab, 8, 8, (1, 1, 1, 1), [side], blocks=1, shared_phi=1, ratio=0.0).eval()


def spread(model: nn.Module) -> Any:
    """Weights of order one, so that logits differ and depend on everything; in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=1.5 * p.shape[1] ** -0.5, generator=generator)
            else:
                p.normal_(mean=1.0, std=0.5, generator=generator)
    return model.eval()


def turns_of(model: Any, labels: Sequence[int] = LABELS, **options: Any) -> list[Turn]:
    options = {"seed": torch.tensor(SEEDS[: len(labels)]), **options}
    return list(generate(model, torch.tensor(labels), **options))


def tokens_of(turns: Sequence[Turn]) -> Tensor:
    return torch.cat([turn.drawn for turn in turns], 1)


def close(got: Tensor, expected: Tensor, rtol: float = 1e-5) -> bool:
    """Within rounding of float32 sums, relative to the largest logit."""
    assert got.shape == expected.shape
    return bool((got - expected).abs().max() <= rtol * expected.abs().max()) and bool(expected.std() > 0.1)


def check_loads(model: Any, state: dict[str, Tensor], **options: Any) -> None:
    """The structure comes from a state dict, all its tensors are taken, and the model draws as its twin."""
    twin = type(model).from_state_dict(state, tokenizer=model.tokenizer, **options)
    assert type(twin) is type(model) and twin.config() == model.config() and not twin.training
    assert all(torch.equal(t, state[name]) for name, t in twin.state_dict().items())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(tokens_of(turns_of(twin)), tokens_of(turns_of(model)))


def check_ways(model: Any, rtol: float = 2e-5) -> None:
    """The plain method is listed last and draws what the system's own does, from the same logits."""
    (name, own), (plain_name, plain) = model.ways().items()
    assert name != plain_name
    ours, theirs = (list(way(torch.tensor(LABELS), 5)) for way in (own, plain))
    assert torch.equal(tokens_of(ours), tokens_of(theirs))
    assert all(close(a.logits, b.logits, rtol) for a, b in zip(ours, theirs, strict=True))


def check_draws(turns: Sequence[Turn], backend: Backend, **extra: Any) -> None:
    """Every pass of a picture of seed SEEDS[0] draws on this backend what the oracle does."""
    seed = torch.tensor(SEEDS[:1])
    for turn in turns:
        settings = {**turn.run.sampler.settings(turn), **turn.run.session.processors(turn), **extra}
        moved = {k: v.to(backend.device) if torch.is_tensor(v) else v for k, v in settings.items()}
        logits = turn.logits.to(backend.device)
        drawn = ops.sample(logits, seed=seed.to(backend.device), position=turn.position, **moved)
        again = reference.sample(turn.logits, seed=seed, position=turn.position, **settings)
        assert torch.equal(drawn.cpu(), again) and torch.equal(again, turn.drawn)


def check_learns(model: Any, examples: Tensor, labels: Tensor, steps: int = 30, lr: float = 1e-2) -> None:
    """The loss of these examples falls by a fifth."""
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr), []
    for _ in range(steps):
        loss = model.loss(examples, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def check_apart(low: Sequence[float], high: Sequence[float]) -> None:
    """What two methods reach with several seeds: each of `low` is below each of `high`, and the gap is wider
    than the seeds of either method lie apart, so that no choice of the seed closes it.
    """
    assert len(low) > 2 and len(high) > 2
    spreads = [max(reached) - min(reached) for reached in (low, high)]
    assert min(spreads) > 0, "expected seeds that change something"
    assert min(high) - max(low) > max(spreads), (low, high)


def check_rows_alone(model: Any, **options: Any) -> Tensor:
    """Row b alone draws what it draws in the batch, and again; rows differ. Returns the batch's tokens."""
    together = tokens_of(turns_of(model, **options))
    assert torch.equal(tokens_of(turns_of(model, **options)), together)
    for b, (label, seed) in enumerate(zip(LABELS, SEEDS)):
        alone = tokens_of(turns_of(model, [label], seed=torch.tensor([seed]), **options))
        assert torch.equal(alone[0], together[b])
    assert not torch.equal(together[0], together[1])
    return together


def same_tokens_emulated(
    model: Any, labels: Sequence[int] = LABELS, rtol: float = 5e-5, **options: Any
) -> None:
    """The whole model on the emulated CUDA kernels draws what it draws on the CPU, and decodes it to the same
    picture. Every operator of arimg that draws it on the CPU runs as a CUDA kernel, and none on host tensors.

    Each pass goes on from the tokens of the CPU, so that logits compare all the way. A token may differ only
    where the rounding of logits decided: from the CPU's logits the kernels draw the CPU's tokens, and no more
    than one of a hundred differs.
    """
    with _Operators() as on_cpu:
        turns = turns_of(model, labels, **options)
    recorded = iter(turns)
    rule = options.get("commit") or getattr(model, "commit", ALWAYS)
    settle, flips, count = type(rule).settle, 0, 0

    def drawn(of: Turn, kept: Turn) -> Tensor:
        """Its tokens; of drafts only those that are kept."""
        tokens = of.drawn.cpu()
        return tokens if kept.length is None else tokens.where(kept.final.cpu(), -1)  # type: ignore[union-attr]

    def replayed(self: Any, turn: Turn) -> None:
        nonlocal flips, count
        expected = next(recorded)
        if turn.drafts is not None and expected.drafts is not None:
            assert torch.equal(turn.drafts.cpu(), expected.drafts)
        assert turn.logits.device == CUDA and close(turn.logits.cpu(), expected.logits, rtol)
        before = turn.tokens, turn.final
        settle(self, turn)
        assert turn.drawn.device == CUDA
        differs = int((drawn(turn, expected) != drawn(expected, expected)).sum())
        if differs:
            turn.tokens, turn.final = before
            turn.logits = expected.logits.to(CUDA)
            settle(self, turn)
            assert torch.equal(drawn(turn, expected), drawn(expected, expected))
        flips, count = flips + differs, count + expected.drawn.numel()
        for name in ("tokens", "final", "length"):
            kept = getattr(expected, name)
            setattr(turn, name, None if kept is None else kept.to(CUDA))
        turn.done = expected.done

    with pretend_cuda() as mode, mock.patch.object(type(rule), "settle", replayed):
        moved = copy.deepcopy(model).to(CUDA)
        seed = torch.tensor(SEEDS[: len(labels)], device=CUDA)
        again = turns_of(moved, labels, **{"seed": seed, **options})
        ran = set(mode.kernels)
        picture = _picture(moved, again).cpu()
    assert next(recorded, None) is None and count > 0 and flips <= count // 100
    assert ran and ran == on_cpu.names and not mode.on_host
    assert torch.allclose(picture, _picture(model, turns), atol=1e-4)


@torch.no_grad()
def _picture(model: Any, turns: Sequence[Turn]) -> Tensor:
    """Of a finished generation, [B, 3, S, S]."""
    pixels: Tensor = model.decode(turns[0].run.session, final_tokens(iter(turns)))
    return pixels


class _Operators(TorchDispatchMode):
    """names: of the operators of arimg that ran within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "arimg":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))
