"""arimg.accelerate on the quantizers of vector-quantize-pytorch (where it is installed)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import arimg

package = pytest.importorskip("vector_quantize_pytorch")

CASES = {
    "plain": dict(dim=16, codebook_size=50),
    "cosine": dict(dim=16, codebook_size=50, use_cosine_sim=True),
    "projected": dict(dim=16, codebook_size=50, codebook_dim=4),
    "heads, one codebook": dict(dim=16, codebook_size=50, heads=4, codebook_dim=4),
    "heads, own codebooks": dict(
        dim=16, codebook_size=50, heads=4, codebook_dim=4, separate_codebook_per_head=True
    ),
    "maps": dict(dim=16, codebook_size=50, accept_image_fmap=True),
    "affine": dict(dim=16, codebook_size=50, affine_param=True),
    "learnable": dict(dim=16, codebook_size=50, learnable_codebook=True, ema_update=False),
}


def case(name):
    torch.manual_seed(0)
    module = package.VectorQuantize(**CASES[name])
    module._codebook.embed.data.normal_()
    if CASES[name].get("use_cosine_sim"):
        module._codebook.embed.data = nn.functional.normalize(module._codebook.embed.data, dim=-1)
    x = torch.randn(3, 16, 5, 7) if name == "maps" else torch.randn(3, 35, 16)
    return module, x


@pytest.mark.parametrize("name", CASES)
def test_evaluation_gives_the_same(name):
    module, x = case(name)
    tree = nn.Sequential(nn.Identity(), module).eval()
    with torch.no_grad():
        want = tree(x)
        with arimg.accelerate(tree) as report:
            got = tree(x)
            assert {e.path for e in report.replaced} == {"1", "1._codebook"}
    assert torch.equal(got[1], want[1])
    assert torch.allclose(got[0], want[0], atol=1e-6) and torch.equal(got[2], want[2])


def test_one_token_a_mask_and_the_loss_of_given_indices():
    module, x = case("plain")
    module.eval()
    mask = torch.arange(35)[None] < torch.tensor([35, 3, 0])[:, None]
    with torch.no_grad():
        want = module(x[:, 0]), module(x, mask=mask), module(x, indices=torch.zeros(3, 35, dtype=torch.long))
        with arimg.accelerate(module):
            got = module(x[:, 0]), module(x, mask=mask), module(x, torch.zeros(3, 35, dtype=torch.long))
    for ours, theirs in zip(got[0] + got[1] + got[2], want[0] + want[1] + want[2]):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_no_matrix_of_distances_is_made():
    module, x = case("plain")
    module.eval()
    with torch.no_grad(), arimg.accelerate(module):
        assert module._codebook(x)[2] is None  # the original returns all distances here


def test_training_is_the_original():
    torch.manual_seed(1)
    ours, x = case("plain")
    theirs, _ = case("plain")
    with arimg.accelerate(ours):
        ours.train(), theirs.train()
        for _ in range(3):
            a, b = ours(x), theirs(x)
            assert all(torch.equal(m, n) for m, n in zip(a, b))
        assert torch.equal(ours._codebook.embed, theirs._codebook.embed)
    ours, _ = case("learnable")
    ours.eval()
    with arimg.accelerate(ours):
        ours(x)[0].sum().backward()
        assert ours._codebook.embed.grad is not None


def test_the_residual_quantizer():
    torch.manual_seed(0)
    module = package.ResidualVQ(dim=16, num_quantizers=4, codebook_size=50).eval()
    for layer in module.layers:
        layer._codebook.embed.data.normal_(std=0.5)
    x = torch.randn(3, 35, 16)
    with torch.no_grad():
        want = module(x)
        with arimg.accelerate(module) as report:
            got = module(x)
    assert torch.equal(got[1], want[1]) and torch.allclose(got[0], want[0], atol=1e-5)
    assert sum(e.part == "VectorQuantize" for e in report.replaced) == 4
