"""arimg.accelerate on FSQ and LFQ of vector-quantize-pytorch (where it is installed)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import arimg

package = pytest.importorskip("vector_quantize_pytorch")

TOKENS, MAP, VIDEO = (3, 35), (3, 5, 7), (2, 3, 5, 7)
LEVELS = [8, 5, 5, 3]
FSQ = {
    "plain": (dict(), TOKENS),
    "a map": (dict(), MAP),
    "a video": (dict(), VIDEO),
    "channels first": (dict(channel_first=True), TOKENS),
    "projected": (dict(dim=16), TOKENS),
    "projected, without bias": (dict(dim=16, projection_has_bias=False), MAP),
    "codebooks": (dict(dim=24, num_codebooks=3), MAP),
    "a codebook kept": (dict(keep_num_codebooks_dim=True), TOKENS),
    "without indices": (dict(return_indices=False), TOKENS),
    "rotated": (dict(orthogonal_rotation=True), TOKENS),
    "not forced": (dict(force_quantization_f32=False), TOKENS),
    "scale": (dict(scale=2.0), TOKENS),
    "symmetric": (dict(preserve_symmetry=True), TOKENS),
    "symmetric, clamped": (dict(preserve_symmetry=True, bound_hard_clamp=True), MAP),
    "symmetric, levels alike": (dict(preserve_symmetry=True, levels=[4] * 4), TOKENS),
    "symmetric, one level": (dict(preserve_symmetry=True, levels=[7]), TOKENS),
    "symmetric, projected": (dict(preserve_symmetry=True, dim=16, noise_dropout=0.5), MAP),
}
LFQ = {
    "plain": (dict(), TOKENS),
    "a map": (dict(), MAP),
    "a video": (dict(), VIDEO),
    "channels first": (dict(channel_first=True), TOKENS),
    "channels last": (dict(channel_first=False), TOKENS),
    "projected": (dict(dim=16), TOKENS),
    "projected by cosine": (dict(dim=16, cosine_sim_project_in=True), TOKENS),
    "projected to the same": (dict(has_projections=True), TOKENS),
    "codebooks": (dict(dim=24, num_codebooks=3), MAP),
    "a codebook kept": (dict(keep_num_codebooks_dim=True), TOKENS),
    "spherical": (dict(spherical=True), TOKENS),
    "spherical, scaled": (dict(spherical=True, codebook_scale=0.7), MAP),
    "clamped": (dict(soft_clamp_input_value=1.5), TOKENS),
    "scaled": (dict(codebook_scale=0.25), TOKENS),
    "rotated": (dict(orthogonal_rotation=True), TOKENS),
    "not forced": (dict(force_quantization_f32=False), TOKENS),
    "with losses": (dict(commitment_loss_weight=0.25, frac_per_sample_entropy=0.5), TOKENS),
}
CASES = [("FSQ", name) for name in FSQ] + [("LFQ", name) for name in LFQ]


def case(kind, name):
    """The module in a tree, and its input."""
    torch.manual_seed(0)
    options, shape = (FSQ if kind == "FSQ" else LFQ)[name]
    module = (
        package.FSQ(**{"levels": LEVELS, **options})
        if kind == "FSQ"
        else package.LFQ(codebook_size=2**9, **options)
    )
    first = module.channel_first or len(shape) > 2
    x = torch.randn(*shape, module.dim)
    return nn.Sequential(nn.Identity(), module).eval(), x.movedim(-1, 1) if first else x


def same(ours, theirs):
    assert type(ours) is type(theirs) and len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("kind, name", CASES)
@torch.no_grad()
def test_codes_indices_and_the_way_back_are_equal(kind, name, monkeypatch):
    tree, x = case(kind, name)
    keys = list(tree.state_dict())
    want = tree(x)
    back = None if want[1] is None else tree[1].indices_to_codes(want[1])
    with arimg.accelerate(tree) as report:
        assert [(e.path, e.part) for e in report.replaced] == [("1", kind)], report
        with monkeypatch.context() as patch:  # the original's steps are not taken
            for step in ("codes_to_indices", "quantize", "bits_to_codes"):
                patch.delattr(getattr(package, kind), step, raising=False)
            same(tree(x), want)
            if back is not None and name != "rotated":
                assert torch.equal(tree[1].indices_to_codes(want[1]), back)
        if back is not None:
            assert torch.equal(tree[1].indices_to_codes(want[1]), back)
        assert list(tree.state_dict()) == keys
    same(tree(x), want)
    assert type(tree[1]) is getattr(package, kind)


@pytest.mark.parametrize("kind", ["FSQ", "LFQ"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits(kind, dtype):
    for name in ("projected", "plain", "not forced", "symmetric" if kind == "FSQ" else "spherical"):
        tree, x = case(kind, name)
        tree, x = tree.to(dtype), x.to(dtype)
        want = tree(x)
        back = tree[1].indices_to_codes(want[1]) if kind == "LFQ" or name != "projected" else None
        with arimg.accelerate(tree):
            same(tree(x), want)
            if back is not None:
                assert torch.equal(tree[1].indices_to_codes(want[1]), back)
    tree, x = case(kind, "projected")
    with torch.autocast("cpu", dtype=dtype):
        want = tree(x)
        with arimg.accelerate(tree):
            same(tree(x), want)
    tree, x = case(kind, "plain")
    with arimg.accelerate(tree):
        got = tree(x.double())
    same(got, tree(x.double()))


@pytest.mark.parametrize("kind", ["FSQ", "LFQ"])
@torch.no_grad()
def test_odd_values(kind):
    odd = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, torch.inf, -torch.inf])
    for name in ("plain", "spherical" if kind == "LFQ" else "symmetric, clamped"):
        tree, _ = case(kind, name)
        x = odd[torch.randint(0, len(odd), (1, 40, tree[1].dim))]
        want = tree(x)
        with arimg.accelerate(tree):
            same(tree(x), want)
    with arimg.accelerate(tree):
        assert tree(x[:, :0])[1].shape == (1, 0)


@pytest.mark.parametrize("kind", ["FSQ", "LFQ"])
def test_gradients_and_training_are_the_originals(kind):
    for name in ("projected", "plain"):
        (ours, x), (theirs, _) = case(kind, name), case(kind, name)
        grads = []
        with arimg.accelerate(ours):
            for tree in (ours.train(), theirs.train()):
                leaf = x.clone().requires_grad_()
                out = tree(leaf)
                (out[0].square().sum() + (out[2] if kind == "LFQ" else 0)).backward()
                grads.append((out[0], out[1], leaf.grad, *(p.grad for p in tree.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*grads))


@torch.no_grad()
def test_masks_and_the_breakdown_of_the_loss():
    tree, x = case("LFQ", "with losses")
    mask = torch.arange(35)[None] < torch.tensor([35, 3, 0])[:, None]
    want = tree[1](x, mask=mask), tree[1](x, return_loss_breakdown=True)
    with arimg.accelerate(tree):
        got = tree[1](x, mask=mask), tree[1](x, return_loss_breakdown=True)
        same(got[0], want[0])
        same(got[1][0], want[1][0])
        same(got[1][1], want[1][1])
        torch.manual_seed(3)
        training = tree[1].train()(x, mask=mask)
    torch.manual_seed(3)
    same(training, tree[1](x, mask=mask))


@pytest.mark.parametrize("kind", ["FSQ", "LFQ"])
def test_copies_inference_mode_and_compile(kind):
    tree, x = case(kind, "codebooks")
    with torch.inference_mode():
        want = tree(x)
    with arimg.accelerate(tree), torch.inference_mode():
        same(tree(x), want)
        same(copy.deepcopy(tree)(x), want)
        same(pickle.loads(pickle.dumps(tree))(x), want)
    with arimg.accelerate(tree), torch.no_grad():
        same(torch.compile(tree, backend="eager", fullgraph=True)(x), want)


@torch.no_grad()
def test_the_residual_quantizers():
    torch.manual_seed(0)
    x = torch.randn(2, 30, 16)
    lfq = package.ResidualLFQ(dim=16, codebook_size=2**8, num_quantizers=4).eval()
    want = lfq(x)
    with arimg.accelerate(lfq) as report:
        same(lfq(x), want)
    assert sum(e.part == "LFQ" for e in report.replaced) == 4


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("levels", [[8, 5, 5, 3], [5] * 6, [2] * 10])
@torch.no_grad()
def test_the_residual_fsq(hard, levels, monkeypatch):
    """Bit for bit, so that no residual meets another near-tie than the original's."""
    torch.manual_seed(0)
    fsq = package.ResidualFSQ(levels=levels, dim=16, num_quantizers=4, bound_hard_clamp=hard).eval()
    x = torch.randn(2, 3000, 16) * 2
    ties = torch.linspace(-1, 1, 2 * max(levels) - 1)  # codes and half-ways
    plain = package.ResidualFSQ(levels=levels, num_quantizers=4, bound_hard_clamp=hard).eval()
    y = ties[torch.randint(len(ties), (2, 500, len(levels)))]
    want = fsq(x, return_all_codes=True), plain(y, return_all_codes=True)
    with arimg.accelerate(nn.ModuleList([fsq, plain])) as report, monkeypatch.context() as patch:
        patch.delattr(package.FSQ, "quantize")
        same(fsq(x, return_all_codes=True), want[0])
        same(plain(y, return_all_codes=True), want[1])
    assert sum(e.part == "FSQ" for e in report.replaced) == 8 and not report.kept


@torch.no_grad()
def test_noise_of_training_is_the_originals():
    tree, x = case("FSQ", "symmetric, projected")
    tree.train()
    torch.manual_seed(3)
    want = tree(x)
    torch.manual_seed(3)
    with arimg.accelerate(tree):
        same(tree(x), want)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(levels=[8] * 7, preserve_symmetry=True, return_indices=False), "262144 codes"),
        (dict(levels=[8, 5], bound_hard_clamp=True), "bound_hard_clamp"),
        (dict(levels=[8] * 9, return_indices=False), "16777216 codes"),
        (dict(levels=[8, 1001]), "at most 1000 levels"),
        (dict(levels=[600, 600], return_indices=False), "262144 codes"),
    ],
)
@torch.no_grad()
def test_reasons(options, reason):
    module = package.FSQ(**options).eval()
    x = torch.randn(1, 5, module.dim)
    want = module(x)
    with arimg.accelerate(module) as report:
        assert not report.replaced and reason in report.kept[0].note
        same(module(x), want)


def test_another_quantizer_of_these_names_is_left():
    class Rounded(package.FSQ):
        def quantize(self, z):
            return super().quantize(z * 0.5)

    report = arimg.accelerate(Rounded(LEVELS))
    assert not report.replaced and "expected the results" in report.kept[0].note
