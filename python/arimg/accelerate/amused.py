"""diffusers' AmusedScheduler (aMUSEd, arXiv 2401.01808): a step of MaskGIT's sampling, arXiv 2202.04200.

A scheduler is no module. It is known by its methods and settings, and by the result of one step.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arimg import ops
from arimg.accelerate import probe
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin
from arimg.commit import gumbel_confidence
from arimg.ops._common import FLOATING, kernels


class _Step(NamedTuple):
    """What a step is about: logits [B, L, V], tokens int64 [B, L], and where it stands in the schedule."""

    logits: Tensor
    tokens: Tensor
    place: int
    generator: torch.Generator | None


class _AmusedScheduler(Mixin):
    """Each row's token and its probability in one pass (arimg.ops.sample), instead of a softmax, a draw and
    a gather. Logits of 16 bits are treated as the original treats them in float32.

    output: the original's class of results.
    """

    output: type[Any]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        scheduler: Any = self
        given = _given(scheduler, model_output, timestep, sample, generator)
        if given is None or not isinstance(starting_mask_ratio, float | int):
            return super().step(  # type: ignore[misc]
                model_output, timestep, sample, starting_mask_ratio, generator, return_dict
            )
        previous, final = _step(scheduler, given, starting_mask_ratio)
        pair = previous.view(sample.shape), final.view(sample.shape)
        return self.output(*pair) if return_dict else pair


def _given(scheduler: Any, logits: Any, timestep: Any, sample: Any, generator: Any) -> _Step | None:
    """The step as rows of logits, or None where the original is to run."""
    if not isinstance(logits, Tensor) or not isinstance(sample, Tensor) or sample.dim() + 1 != logits.dim():
        return None
    if logits.dim() == 4:  # [B, V, height, width]
        logits, sample = logits.flatten(2).transpose(1, 2), sample.flatten(1)
    if logits.dim() != 3 or sample.shape != logits.shape[:2] or sample.shape[1] < 2 or not len(sample):
        return None
    if logits.dtype not in FLOATING or sample.dtype != torch.int64 or kernels(logits.detach()) is None:
        return None
    if scheduler.config.masking_schedule not in _SCHEDULES or not isinstance(scheduler.timesteps, Tensor):
        return None
    found = (scheduler.timesteps == timestep).nonzero()
    if found.numel() != 1 or not (generator is None or isinstance(generator, torch.Generator)):
        return None
    return _Step(logits, sample, int(found), generator)


def _step(scheduler: Any, given: _Step, starting_mask_ratio: float) -> tuple[Tensor, Tensor]:
    """(tokens of which the least confident are masked again, all tokens), both [B, L]."""
    logits, tokens, place, generator = given
    masked = tokens == scheduler.config.mask_token_id
    device = logits.device if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (len(tokens),), generator=generator, device=device).to(logits.device)
    drawn = ops.sample(logits, seed=seeds, return_logprob=True)
    final = torch.where(masked, drawn.token, tokens)
    if scheduler.timesteps[place] == 0:
        return final, final
    # The tokens that were there have the largest float32 number for their probability.
    logprob = torch.where(masked, drawn.logprob, math.log(torch.finfo(torch.float32).max))
    confidence = gumbel_confidence(logprob, float(scheduler.temperatures[place]), seeds)
    count = _masked_after(scheduler, masked, place, starting_mask_ratio)
    cut = confidence.sort(dim=1).values.gather(1, count)
    return torch.where(confidence < cut, scheduler.config.mask_token_id, final), final


# The share that is still masked. In float32, as the original: a product with the number of tokens is floored.
_SCHEDULES = {
    "cosine": lambda progress: torch.cos(progress * math.pi / 2),
    "linear": lambda progress: 1 - progress,
}


def _masked_after(scheduler: Any, masked: Tensor, place: int, starting_mask_ratio: float) -> Tensor:
    """How many of each row stay masked, int64 [B, 1]: the schedule's, fewer than were, one at least."""
    progress = torch.tensor(float(place + 1)) / len(scheduler.timesteps)
    share = starting_mask_ratio * _SCHEDULES[scheduler.config.masking_schedule](progress)
    wanted = int((masked.shape[1] * share).floor())
    return (masked.sum(1, keepdim=True) - 1).clamp(max=wanted).clamp(min=1)


def recognise_amused_scheduler(report: Report, path: str, scheduler: Any) -> bool:
    names = ("step", "add_noise", "set_timesteps", "temperatures", "timesteps")
    config = getattr(scheduler, "config", None)
    if not all(hasattr(scheduler, n) for n in names) or not hasattr(config, "mask_token_id"):
        return False
    output = _output_of(scheduler)
    if output is None:
        report.keep(scheduler, path, "expected a step that draws tokens and masks the least probable again")
    else:
        report.swap(scheduler, _AmusedScheduler, path, "draw and confidence in one pass", output=output)
    return True


def _output_of(scheduler: Any) -> type[Any] | None:
    """The class of a step's result where it is ours: eight tokens, two of them there, each with one likely
    successor."""
    scheduler = copy.copy(scheduler)  # whose timesteps are set
    mask = scheduler.config.mask_token_id
    tokens = torch.full((1, 8), mask)
    tokens[0, 2:4] = 0 if mask != 0 else 1
    likely = torch.tensor([[0, 3, 1, 1, 2, 0, 3, 2]])
    logits = torch.zeros(1, 8, 4).scatter_(2, likely[..., None], 200.0)
    try:
        scheduler.set_timesteps(4)
        given, ours = _given(scheduler, logits, 2, tokens, None), None
        generator = torch.Generator().manual_seed(0)
        result = scheduler.step(logits, 2, tokens, generator=generator)
        if given is not None:
            ours = _step(scheduler, given._replace(generator=generator), 1.0)
        same = ours is not None and _agree(ours, (result.prev_sample, result.pred_original_sample), mask)
    except probe.FAILURES:
        return None
    return type(result) if same else None


def _agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], mask: int) -> bool:
    """Whether the tokens are equal and as many are masked: which ones is random."""
    counts = [int((previous == mask).sum()) for previous, _ in (ours, theirs)]
    return counts[0] == counts[1] and torch.equal(ours[1], theirs[1])
