"""The quantizer modules beside vector-quantize-pytorch, on the same weights, and what they add to it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from arimg import nn, ops
from arimg.nn.scalar_quantize import code_entropies
from arimg.ops.quantize_search import residual_codes


@pytest.fixture
def package():
    return pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")


def pair(package, name, seed=0, **arguments):
    """Ours and the package's module, each made from the same state of the generator."""
    made = []
    for module in (nn, package):
        torch.manual_seed(seed)
        made.append(getattr(module, name)(**arguments))
    ours, theirs = made
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        mine = ours.state_dict()[key]
        assert mine.shape == value.shape and mine.dtype == value.dtype, key
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tokens(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_states(ours, theirs):
    for key, value in theirs.state_dict().items():
        error = (ours.state_dict()[key].float() - value.float()).abs().max().item()
        assert error <= 2e-5 + 1e-4 * value.float().abs().max().item(), f"{key}: off by {error}"


def same_steps(ours, theirs, inputs, **forward):
    """Outputs, gradients of x and of the parameters, and the state after each training step."""
    for step, x in enumerate(inputs):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = []
        for module, leaf in zip((ours, theirs), leaves):
            torch.manual_seed(100 + step)  # dead codes and dropout draw from the generator
            out = module(leaf, **forward)
            (out[0].square().sum() / 2 + out[2].sum() * 3).backward()
            outs.append(out)
        assert torch.equal(outs[0][1], outs[1][1])
        torch.testing.assert_close(outs[0][0], outs[1][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outs[0][2], outs[1][2], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-4, rtol=1e-3)
        same_states(ours, theirs)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    ours.eval(), theirs.eval()
    with torch.no_grad():
        a, b = ours(inputs[0], **forward), theirs(inputs[0], **forward)
    assert torch.equal(a[1], b[1])
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-4)
    return a


VQ = {
    "plain": dict(),
    "straight-through": dict(rotation_trick=False, commitment_weight=0.25),
    "cosine": dict(use_cosine_sim=True, decay=0.9),
    "projected": dict(codebook_dim=4),
    "layer norm": dict(codebook_dim=4, use_cosine_sim=True, layernorm_after_project_in=True),
    "k-means": dict(kmeans_init=True, kmeans_iters=4),
    "k-means, cosine": dict(kmeans_init=True, use_cosine_sim=True),
    "dead codes": dict(threshold_ema_dead_code=2, decay=0.5),
    "dead codes, cosine": dict(threshold_ema_dead_code=1, use_cosine_sim=True, decay=0.5),
    "frozen": dict(freeze_codebook=True),
    "learnable": dict(learnable_codebook=True, ema_update=False),
    "heads": dict(heads=2, codebook_dim=4),
    "separate heads": dict(heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "no commitment": dict(commitment_weight=0.0),
}


@pytest.mark.parametrize("case", VQ)
def test_vector_quantize(package, case):
    ours, theirs = pair(package, "VectorQuantize", dim=8, codebook_size=20, **VQ[case])
    _, indices, _ = same_steps(ours, theirs, [tokens(3, 30, 8, seed=s) for s in range(3)])
    with torch.no_grad():
        output = ours(tokens(3, 30, 8, seed=0))[0]
    torch.testing.assert_close(ours.get_output_from_indices(indices), output)
    if case != "heads":  # there the package gives [..., heads, D], which its projection does not take
        codes = theirs.get_codes_from_indices(indices)
        torch.testing.assert_close(ours.get_codes_from_indices(indices), codes)


@pytest.mark.parametrize(
    "layout, shape",
    [
        (dict(channel_last=False), (3, 8, 20)),
        (dict(accept_image_fmap=True), (3, 8, 4, 5)),
        (dict(accept_3d_fmap=True), (2, 8, 3, 4, 5)),
        (dict(), (30, 8)),
    ],
)
def test_layouts_of_vector_quantize(package, layout, shape):
    ours, theirs = pair(package, "VectorQuantize", dim=8, codebook_size=20, codebook_dim=4, **layout)
    same_steps(ours, theirs, [tokens(*shape)])


def test_masked_tokens_are_not_learnt_from(package):
    for arguments in (dict(), dict(return_zeros_for_masked_padding=False), dict(threshold_ema_dead_code=1)):
        ours, theirs = pair(package, "VectorQuantize", dim=8, codebook_size=20, **arguments)
        mask = tokens(3, 30) > 0
        same_steps(ours, theirs, [tokens(3, 30, 8, seed=s) for s in range(2)], mask=mask)
        indices = ours(tokens(3, 30, 8), mask=mask)[1]
        assert (indices[~mask] == -1).all() and (indices[mask] >= 0).all()
    lens = torch.tensor([3, 0, 30])
    by_lens = ours.eval()(tokens(3, 30, 8), lens=lens)[1]
    assert torch.equal(by_lens >= 0, torch.arange(30) < lens[:, None])


def test_rotation_gradient_is_that_of_the_rotation():
    torch.manual_seed(0)
    vq = nn.VectorQuantize(5, 7, decay=1.0, commitment_weight=0.0)
    x = tokens(1, 6, 5).requires_grad_()
    slope = tokens(1, 6, 5, seed=2)
    quantized, index, _ = vq(x)
    (quantized * slope).sum().backward()
    q = vq.codebook[index].detach()
    for n in range(6):
        a, b = x.detach()[0, n], q[0, n]
        u, v = a / a.norm(), b / b.norm()
        w = (u + v) / (u + v).norm()
        turn = torch.eye(5) - 2 * torch.outer(w, w) + 2 * torch.outer(v, u)
        torch.testing.assert_close(turn @ u, v)
        torch.testing.assert_close(turn @ turn.T, torch.eye(5))
        torch.testing.assert_close(x.grad[0, n], (b.norm() / a.norm()) * turn.T @ slope[0, n])


def test_outputs_are_the_codes_to_the_last_bit():
    torch.manual_seed(0)
    for rotation_trick in (False, True):
        vq = nn.VectorQuantize(8, 50, rotation_trick=rotation_trick)
        codebook = vq.codebook.clone()
        quantized, index, _ = vq(tokens(2, 9, 8).requires_grad_())
        assert torch.equal(quantized.detach(), codebook[index])


def test_replacing_dead_codes_fills_the_codebook():
    used = []
    for threshold in (0, 1):
        torch.manual_seed(0)
        vq = nn.VectorQuantize(4, 64, decay=0.5, threshold_ema_dead_code=threshold)
        for step in range(10):
            indices = vq(tokens(1, 512, 4, seed=step) + 20)[1]  # far from all codes
        used.append(ops.code_usage(indices, 64).perplexity.item())
    assert used[0] < 8 and used[1] > 40


def test_a_loaded_codebook_starts_as_it_says():
    trained = nn.VectorQuantize(8, 20, kmeans_init=True)
    fresh = nn.VectorQuantize(8, 20)
    fresh.load_state_dict(trained.state_dict())
    fresh.eval()(tokens(2, 30, 8))  # not started yet: by k-means, now
    assert fresh._codebook.initted and fresh.codebook.abs().sum() > 0
    again = nn.VectorQuantize(8, 20, kmeans_init=True)
    again.load_state_dict(fresh.state_dict())
    again.eval()(tokens(2, 30, 8, seed=5))
    assert torch.equal(again.codebook, fresh.codebook)


def test_half_precision_inputs_keep_their_dtype():
    vq = nn.VectorQuantize(8, 50)
    x = tokens(2, 9, 8).bfloat16()
    quantized, index, loss = vq.eval()(x)
    assert quantized.dtype == torch.bfloat16 and torch.equal(index, vq(x.float())[1]) and loss == 0


def test_a_step_compiles_without_graph_breaks():
    torch.manual_seed(0)
    vq = nn.VectorQuantize(8, 50, codebook_dim=4)
    again = nn.VectorQuantize(8, 50, codebook_dim=4)
    again.load_state_dict(vq.state_dict())

    def step(module, x):
        quantized, _, loss = module(x)
        return quantized.square().sum() + loss

    x, grads = tokens(2, 9, 8), []
    for module, function in ((vq, step), (again, torch.compile(step, fullgraph=True, backend="aot_eager"))):
        leaf = x.clone().requires_grad_()
        function(module, leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    same_states(vq, again)


# --- residual ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(codebook_dim=4, use_cosine_sim=True),
        dict(shared_codebook=True),
        dict(quantize_dropout=True, quantize_dropout_cutoff_index=1),
        dict(quantize_dropout=True, quantize_dropout_multiple_of=2),
        dict(quant_grad_frac=0.5, rotation_trick=False),
        dict(kmeans_init=True, kmeans_iters=3, rotation_trick=False),
    ],
    ids=str,
)
def test_residual_vq(package, arguments):
    ours, theirs = pair(package, "ResidualVQ", dim=8, num_quantizers=4, codebook_size=20, **arguments)
    # Rows enough that no code has one alone: such a residual would be 0 here and rounding there.
    _, indices, losses = same_steps(ours, theirs, [tokens(3, 200, 8, seed=s) for s in range(3)])
    assert indices.shape == (3, 200, 4) and losses.shape == (4,)
    torch.testing.assert_close(ours.codebooks, theirs.codebooks)
    torch.testing.assert_close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))
    codes = ours(tokens(3, 30, 8), return_all_codes=True)[3]
    torch.testing.assert_close(codes, theirs(tokens(3, 30, 8), return_all_codes=True)[3])


def test_residual_vq_of_different_sizes_and_with_a_mask(package):
    ours, theirs = pair(package, "ResidualVQ", dim=8, codebook_size=(5, 9, 3))
    same_steps(ours, theirs, [tokens(2, 20, 8)], mask=tokens(2, 20) > 0)
    assert [book.shape[0] for book in ours.codebooks] == [5, 9, 3]


def test_residual_vq_on_images():
    torch.manual_seed(0)
    rvq = nn.ResidualVQ(dim=8, num_quantizers=3, codebook_size=20, accept_image_fmap=True)
    flat = nn.ResidualVQ(dim=8, num_quantizers=3, codebook_size=20)
    flat.load_state_dict(rvq.state_dict())
    x = tokens(2, 8, 3, 5)
    out, indices, losses = rvq.eval()(x)
    rows, row_indices, _ = flat.eval()(x.flatten(2).transpose(1, 2))
    assert torch.equal(out.flatten(2).transpose(1, 2), rows)
    assert torch.equal(indices.flatten(1, 2), row_indices)
    assert indices.shape == (2, 3, 5, 3) and losses.shape == (3,)


@pytest.mark.parametrize("arguments", [dict(), dict(shared_codebook=True), dict(codebook_dim=4)], ids=str)
def test_residual_vq_searches_all_depths_at_once_in_eval(package, arguments, monkeypatch):
    ours, theirs = pair(package, "ResidualVQ", dim=8, num_quantizers=4, codebook_size=20, **arguments)
    ours.eval(), theirs.eval()
    x = tokens(2, 30, 8)
    calls, search = [], residual_codes
    monkeypatch.setattr(
        "arimg.nn.residual_vq.residual_codes", lambda *given: calls.append(1) or search(*given)
    )
    at_once = ours(x)
    assert calls == [1]
    one_by_one = ours(x, return_all_codes=True)[:3]
    for got, other, expected in zip(at_once, one_by_one, theirs(x)):
        assert torch.equal(got, other) and got.dtype == other.dtype
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    ours(x, mask=torch.ones(2, 30, dtype=torch.bool))
    ours.train()(x)
    assert calls == [1]


def test_fewer_quantizers_give_the_coarse_sum():
    torch.manual_seed(0)
    rvq = nn.ResidualVQ(dim=8, num_quantizers=3, codebook_size=20, quantize_dropout=True).eval()
    indices = rvq(tokens(2, 9, 8))[1]
    two = rvq.get_output_from_indices(indices[..., :2])
    assert torch.equal(two, rvq.get_codes_from_indices(indices)[:2].sum(0))
    dropped = torch.cat([indices[..., :2], torch.full((2, 9, 1), -1)], -1)
    assert torch.equal(rvq.get_output_from_indices(dropped), two)


# --- FSQ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, shape",
    [
        (dict(), (3, 30, 4)),
        (dict(dim=10), (3, 30, 10)),
        (dict(dim=10), (3, 10, 4, 5)),
        (dict(channel_first=True), (3, 4, 20)),
        (dict(num_codebooks=2), (3, 30, 8)),
        (dict(keep_num_codebooks_dim=True, dim=5, projection_has_bias=False), (3, 30, 5)),
        (dict(num_codebooks=2, dim=6), (2, 6, 3, 4)),
    ],
)
def test_fsq(package, arguments, shape):
    ours, theirs = pair(package, "FSQ", levels=[8, 5, 7, 4], **arguments)
    leaves = [tokens(*shape).requires_grad_() for _ in range(2)]
    outs = [module(x) for module, x in zip((ours, theirs), leaves)]
    for out in outs:
        out[0].square().sum().backward()
    assert torch.equal(outs[0][1], outs[1][1].long()) and outs[0][1].dtype == torch.int64
    torch.testing.assert_close(outs[0][0], outs[1][0])
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.indices_to_codes(outs[0][1]), theirs.indices_to_codes(outs[1][1]))
    torch.testing.assert_close(ours.implicit_codebook, theirs.implicit_codebook)
    every = torch.arange(ours.codebook_size)
    assert ours.codebook_size == theirs.codebook_size == 1120
    assert torch.equal(ours.codes_to_indices(ours.implicit_codebook), every)


# --- LFQ and BSQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, shape",
    [
        (dict(codebook_size=2**6), (3, 30, 6)),
        (dict(codebook_size=2**6, spherical=True, entropy_loss_weight=0.02), (3, 30, 6)),
        (dict(codebook_size=2**6, dim=9, commitment_loss_weight=0.25), (3, 9, 4, 5)),
        (dict(dim=6, codebook_scale=0.5, diversity_gamma=2.0, commitment_loss_weight=1.0), (3, 30, 6)),
        (dict(codebook_size=2**3, num_codebooks=2, dim=6), (3, 30, 6)),
        (dict(codebook_size=2**5, dim=7, soft_clamp_input_value=2.0, projection_has_bias=False), (3, 30, 7)),
    ],
)
def test_lfq(package, arguments, shape):
    ours, theirs = pair(package, "LFQ", **arguments)
    for inv_temperature in (100.0, 1.0):
        leaves = [tokens(*shape).requires_grad_() for _ in range(2)]
        outs = []
        for module, x in zip((ours.train(), theirs.train()), leaves):
            out, parts = module(x, inv_temperature=inv_temperature, return_loss_breakdown=True)
            (out.quantized.square().sum() + 5 * out.entropy_aux_loss).backward()
            outs.append((out, parts))
        (mine, my_parts), (other, other_parts) = outs
        assert torch.equal(mine.indices, other.indices.long()) and mine._fields == other._fields
        torch.testing.assert_close(mine.quantized, other.quantized)
        # The package bounds log p from below at log 1e-5: p log(1e-5 / p) per code, at most 1e-5 / e.
        slack = 2 * ours.codebook_size * 1e-5 / math.e
        for field in ("per_sample_entropy", "batch_entropy", "commitment"):
            a, b = getattr(my_parts, field), getattr(other_parts, field)
            assert (a - b).abs() <= slack + 1e-5 * b.abs(), field
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-2, rtol=1e-3)
    a, b = ours.eval()(tokens(*shape)), theirs.eval()(tokens(*shape))
    torch.testing.assert_close(a.quantized, b.quantized)
    assert a.entropy_aux_loss == 0 and torch.equal(a.indices, b.indices.long())
    torch.testing.assert_close(ours.indices_to_codes(a.indices), theirs.indices_to_codes(b.indices))


def test_losses_of_masked_tokens():
    # Not beside the package: with a mask it does not average over the tokens before the second entropy.
    lfq = nn.LFQ(dim=6, commitment_loss_weight=0.5)
    x, mask = tokens(3, 30, 6), tokens(3, 30) > 0
    torch.testing.assert_close(lfq(x, mask=mask).entropy_aux_loss, lfq(x[mask][None]).entropy_aux_loss)


def test_entropies_by_halves_are_those_of_all_codes():
    z = tokens(50, 2, 7).double() * 0.3
    sample, batch = code_entropies(z, 3.0)
    codes = ops.unpack_signs(torch.arange(2**7), 7, 1.0).double()
    p = (z @ codes.T * 1.5).softmax(-1)  # sigmoid(3 z) is the softmax of +-1.5 z
    torch.testing.assert_close(sample, -(p * p.log()).sum(-1).mean())
    mean = p.mean(0)
    torch.testing.assert_close(batch, -(mean * mean.clamp(min=1e-5).log()).sum(-1).mean())


def test_bsq_is_spherical():
    bsq = nn.BSQ(dim=16, entropy_loss_weight=0.0)
    x = tokens(2, 9, 16).requires_grad_()
    out = bsq(x)
    assert torch.equal(out.quantized.detach(), torch.where(x > 0, 0.25, -0.25))
    out.quantized.sum().backward()
    torch.testing.assert_close((x.grad * x).sum(-1), torch.zeros(2, 9), atol=1e-5, rtol=0)  # along the sphere


def test_sixty_four_bits():
    bsq = nn.BSQ(dim=64, entropy_loss_weight=0.0).eval()
    x = tokens(2, 9, 64)
    out = bsq(x)
    assert torch.equal(bsq.indices_to_codes(out.indices), out.quantized) and (out.indices < 0).any()
    assert bsq.mask[0].item() == -(2**63) and bsq.codebook_size == 2**64
    torch.testing.assert_close(F.normalize(out.quantized, dim=-1), out.quantized)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: nn.VectorQuantize(8, 20, stochastic_sample_codes=True),
            ValueError,
            "VectorQuantize does not offer stochastic_sample_codes: expected False, got True",
        ),
        (lambda: nn.VectorQuantize(8, 20, sync_update_v=0.1), ValueError, "does not offer sync_update_v"),
        (lambda: nn.VectorQuantize(8, 20, route_gradients_to_input=False), ValueError, "got False"),
        (lambda: nn.VectorQuantize(8, 20, colour=1), TypeError, "VectorQuantize has no argument 'colour'"),
        (lambda: nn.VectorQuantize(8, 20, learnable_codebook=True), ValueError, "expected ema_update=False"),
        (lambda: nn.VectorQuantize(8, 20)(torch.zeros(2, 3, 7)), ValueError, r"expected x \[B, N, 8\]"),
        (
            lambda: nn.VectorQuantize(8, 20)(torch.zeros(2, 3, 8), torch.zeros(2, 3)),
            ValueError,
            "does not offer a cross entropy",
        ),
        (lambda: nn.ResidualVQ(dim=8, codebook_size=(9, 9), beam_size=2), ValueError, "beam_size"),
        (lambda: nn.ResidualVQ(dim=8, codebook_size=9), ValueError, "expected num_quantizers or a tuple"),
        (lambda: nn.ResidualVQ(dim=8, num_quantizers=3, codebook_size=(1, 2)), ValueError, "expected 3"),
        (lambda: nn.FSQ([5, 5], preserve_symmetry=True), ValueError, "FSQ does not offer preserve_symmetry"),
        (lambda: nn.FSQ([2, 5]), ValueError, "expected levels of 3 or more"),
        (lambda: nn.FSQ([5, 5])(torch.zeros(2, 3)), ValueError, r"expected 2 channels, got x \[2, 3\]"),
        (lambda: nn.LFQ(codebook_size=12), ValueError, "a power of 2, got 12"),
        (lambda: nn.LFQ(dim=30), ValueError, "expected entropy_loss_weight=0 beyond 24 bits"),
        (lambda: nn.LFQ(dim=6, frac_per_sample_entropy=0.5), ValueError, "frac_per_sample_entropy"),
        (lambda: nn.BSQ(dim=6, orthogonal_rotation=True), ValueError, "BSQ does not offer ortho"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()
