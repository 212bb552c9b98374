"""VAR, depth 16, 256 px, batch 1, random weights: `VAR.generate` against the released loop in plain PyTorch.

Before anything is timed, both run on the same forced tokens and must agree in logits, f_hat and picture. In
bfloat16 the transformer is bfloat16 and the tokenizer float32, in `arimg` and in the plain loop; as the
released code does it, the whole plain loop also runs in float32 weights under bfloat16 autocast.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch

from arimg.benchmark import var_difference
from arimg.generators import VAR
from arimg.reference import plain_var
from arimg.tokenizers import VQVAE

LABELS = torch.tensor([207])
DEPTH = 2 if os.environ.get("ARIMG_BENCH_SMOKE") == "1" else 16


@cache
def models() -> VAR:
    torch.manual_seed(0)
    tokenizer = VQVAE(ch=160 if DEPTH == 16 else 32).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    var = VAR(tokenizer, depth=DEPTH).eval()
    with torch.no_grad():  # open the gates and the head, which the training recipe starts near 0
        var.head.weight.normal_(std=var.width**-0.5)
        for block in var.blocks:
            block.ada_lin[1].weight.normal_(std=0.3 * var.width**-0.5)
    check_agreement(var)
    return var


def check_agreement(var: VAR) -> None:
    """Same tokens -> same logits, f_hat and picture, to float32 rounding through all layers."""
    trace = plain_var.generate(var, LABELS)
    error = var_difference(var, LABELS, trace)
    assert error < 1e-4, f"logits differ by {error:.1e} standard deviations"
    steps = list(var.stream(LABELS, given=trace.tokens))
    assert torch.allclose(steps[-1].f_hat, trace.f_hat, atol=1e-5 * trace.f_hat.abs().max().item())
    assert torch.allclose(steps[-1].image, trace.image, atol=1e-4)


CASES = [
    (torch.float32, "arimg"),
    (torch.float32, "plain PyTorch loop"),
    (torch.bfloat16, "arimg"),
    (torch.bfloat16, "plain PyTorch loop"),
    (torch.bfloat16, "plain, autocast"),
]


@pytest.mark.parametrize(("dtype", "peer"), CASES)
def test_generate(dtype: torch.dtype, peer: str, measure) -> None:
    var = models()
    if peer != "plain, autocast":
        var.to(dtype)

    def autocast() -> plain_var.Trace:
        with torch.autocast("cpu", dtype=dtype):
            return plain_var.generate(var, LABELS, seed=1)

    functions = {
        "arimg": lambda: var.generate(LABELS, seed=1),
        "plain PyTorch loop": lambda: plain_var.generate(var, LABELS, seed=1),
        "plain, autocast": autocast,
    }
    name = str(dtype).removeprefix("torch.")
    measure(f"VAR.generate, depth {DEPTH}, 256 px, batch 1, {name}", peer, functions[peer], rounds=2)
    var.float()


@pytest.mark.parametrize("peer", ["arimg", "plain PyTorch loop"])
def test_decode(peer: str, measure) -> None:
    var = models()
    f_hat = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    functions = {
        "arimg": lambda: var.tokenizer.decode_features(f_hat),
        "plain PyTorch loop": lambda: plain_var.decode(var, f_hat),
    }
    measure("VQVAE decoder, 256 px, batch 1, float32", peer, functions[peer], rounds=3)
