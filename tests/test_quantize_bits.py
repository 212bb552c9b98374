"""Sign codes and packed bits against Python's integers; drawn bits against their probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from arimg.reference.sampling import numbers
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [1, 2, 7, 8, 14, 16, 18, 24, 31, 32, 33, 56, 63, 64]


def make(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def packed(bits, msb_first=True) -> list[int]:
    """By Python's integers, as two's complement of 64 bits."""
    values = []
    for row in bits.cpu().bool().tolist():
        text = "".join("01"[b] for b in (row if msb_first else row[::-1]))
        value = int(text, 2)
        values.append(value - 2**64 if value >= 2**63 else value)
    return values


@pytest.mark.parametrize("msb_first", [True, False])
@pytest.mark.parametrize("d", DIMS)
def test_pack_and_unpack(backend, d, msb_first):
    for rows in (1, 5, 67):
        bits = make(rows, d, device=backend.device, seed=rows) > 0
        indices = ops.pack_bits(bits, msb_first=msb_first)
        assert indices.dtype == torch.int64 and indices.tolist() == packed(bits, msb_first)
        assert torch.equal(ops.unpack_bits(indices, d, msb_first=msb_first), bits)


def test_the_order_of_the_bits(backend):
    bits = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0]], dtype=torch.bool, device=backend.device)
    assert ops.pack_bits(bits).tolist() == [8, 1, 12]
    assert ops.pack_bits(bits, msb_first=False).tolist() == [1, 8, 3]


def test_the_highest_of_64_bits_is_the_sign(backend):
    first = torch.zeros(1, 64, dtype=torch.bool, device=backend.device)
    first[0, 0] = True
    assert ops.pack_bits(first).item() == -(2**63) and ops.pack_bits(first, msb_first=False).item() == 1
    assert ops.pack_bits(torch.ones_like(first)).item() == -1
    assert ops.unpack_bits(torch.tensor([-1], device=backend.device), 64).all()
    assert torch.equal(ops.unpack_bits(torch.tensor([-(2**63)], device=backend.device), 64), first)


@pytest.mark.parametrize("d", [3, 16, 20, 64])
def test_any_byte_but_zero_is_a_set_bit(backend, d):
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (50, d), generator=g).to(torch.uint8)
    bits[torch.rand(50, d, generator=g) < 0.5] = 0
    bits[0] = torch.tensor([0x80, 1, 0x7F, 0]).repeat(16)[:d]
    assert ops.pack_bits(bits.to(backend.device)).tolist() == packed(bits)


def test_bits_above_d_are_ignored(backend):
    indices = torch.tensor([-1, 2**40 + 5], device=backend.device)
    assert ops.unpack_bits(indices, 3).tolist() == [[True] * 3, [True, False, True]]
    assert ops.unpack_bits(indices, 3, msb_first=False).tolist() == [[True] * 3, [True, False, True]]
    assert ops.unpack_bits(indices, 2).tolist() == [[True] * 2, [False, True]]


@pytest.mark.parametrize("msb_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", DIMS)
def test_sign_codes(backend, d, dtype, msb_first):
    for rows in (1, 6, 65):
        for scale in (None, 1.0, 0.3):
            z = make(rows, d, dtype=dtype, device=backend.device, seed=rows)
            codes, indices = ops.sign_codes(z, scale, msb_first=msb_first)
            value = d**-0.5 if scale is None else scale
            assert codes.dtype == dtype
            assert torch.equal(codes, torch.where(z > 0, value, -value).to(dtype))
            assert indices.tolist() == packed(z > 0, msb_first)
            again = ops.unpack_signs(indices, d, scale, dtype=dtype, msb_first=msb_first)
            assert torch.equal(again, codes)


def test_sign_codes_of_more_rows_than_a_block(backend):
    for d in (5, 64):
        z = make(3, 201, d, device=backend.device)
        codes, indices = ops.sign_codes(z)
        assert indices.shape == (3, 201) and indices.flatten().tolist() == packed(z.flatten(0, 1) > 0)
        flat = z.view(603, d)
        for rows in (slice(0, 1), slice(255, 258), slice(600, 603)):  # bit for bit
            alone = ops.sign_codes(flat[rows])
            assert torch.equal(alone[0], codes.view(603, d)[rows])
            assert torch.equal(alone[1], indices.view(603)[rows])
        bits = ops.unpack_bits(indices, d)
        assert torch.equal(bits, z > 0) and torch.equal(ops.pack_bits(bits), indices)


def test_zero_and_nan_give_no_bit(backend):
    rows = [[0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, -math.nan]]
    z = torch.tensor(rows * 5, device=backend.device)
    codes, indices = ops.sign_codes(z, 1.0)
    assert indices.tolist() == [0b00010100] * 5 and codes[0].tolist() == [-1, -1, -1, 1, -1, 1, -1, -1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_sign_codes(backend, dtype):
    z = make(20, 18, dtype=dtype, device=backend.device).requires_grad_()
    slope = make(20, 18, dtype=dtype, device=backend.device, seed=1)
    ops.sign_codes(z, 1.0)[0].backward(slope)  # LFQ: unchanged
    assert torch.equal(z.grad, slope)
    z.grad = None
    ops.sign_codes(z)[0].backward(slope)  # BSQ: that of z / |z|

    def formula(z, slope):
        length = z.norm(dim=-1, keepdim=True)
        u = z / length
        return (slope - u * (slope * u).sum(-1, keepdim=True)) / length

    assert z.grad.dtype == dtype
    assert_close(z.grad, formula, z, slope)


def test_layouts_and_empty(backend):
    z = make(24, 36, device=backend.device)
    expected = ops.sign_codes(z[::2, ::2].contiguous())
    got = ops.sign_codes(z[::2, ::2])
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    bits = z > 0
    assert torch.equal(ops.pack_bits(bits[::2, ::2]), expected[1])
    odd = bits.flatten()[1:829].view(46, 18)
    assert torch.equal(ops.pack_bits(odd), ops.pack_bits(odd.clone()))
    unaligned = torch.cat([torch.zeros(1, device=z.device), z.flatten()])[1:].view_as(z)
    assert torch.equal(ops.sign_codes(unaligned)[1], ops.sign_codes(z)[1])
    assert torch.equal(ops.unpack_bits(expected[1][::3], 18), bits[::2, ::2][::3])
    codes, indices = ops.sign_codes(z[:0])
    assert codes.shape == (0, 36) and indices.shape == (0,)
    assert ops.unpack_bits(indices, 5).shape == (0, 5) and ops.pack_bits(bits[:0]).shape == (0,)
    assert ops.pack_bits(bits[0]).shape == () and ops.unpack_signs(indices, 5).shape == (0, 5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 70), d=st.integers(1, 64), msb_first=st.booleans(), seed=st.integers(0, 99))
def test_random_shapes(backend, rows, d, msb_first, seed):
    z = make(rows, d, device=backend.device, seed=seed)
    codes, indices = ops.sign_codes(z, 2.0, msb_first=msb_first)
    assert indices.tolist() == packed(z > 0, msb_first)
    assert torch.equal(codes, reference.sign_codes(z, 2.0)[0])
    assert torch.equal(ops.unpack_bits(indices, d, msb_first=msb_first), z > 0)
    assert torch.equal(reference.unpack_bits(indices, d, msb_first=msb_first), z > 0)
    assert torch.equal(reference.pack_bits(z > 0, msb_first=msb_first), indices)


# --- drawn bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_without_a_seed_are_the_more_likely_ones(backend, dtype):
    x = make(2, 9, 24, dtype=dtype, device=backend.device).requires_grad_()
    bits = ops.bernoulli_bits(x)
    assert bits.dtype == dtype and torch.equal(bits.detach(), (x > 0).to(dtype))
    slope = make(2, 9, 24, dtype=dtype, device=backend.device, seed=1)
    bits.backward(slope)
    assert_close(x.grad, lambda x, s: s * torch.sigmoid(x) * (1 - torch.sigmoid(x)), x, slope)


def test_drawn_bits_are_those_of_the_counters(backend):
    x = make(3, 5, 20, device=backend.device)
    got = ops.bernoulli_bits(x, seed=7, position=11)
    assert torch.equal(got.cpu(), reference.bernoulli_bits(x.cpu(), seed=7, position=11))
    pairs = torch.stack((torch.zeros_like(x), x), -1)
    assert torch.equal(got, ops.sample_bits(pairs, seed=7, position=11).to(x.dtype))
    u = numbers(torch.arange(7, 10), 11, 5, 0, 20).double() / 2**32
    assert torch.equal(got.cpu() == 1, u >= 1 - torch.sigmoid(x.cpu().double()))
    # a row, a token alone
    seeds = torch.tensor([8, 9], device=x.device)
    assert torch.equal(ops.bernoulli_bits(x[1:], seed=seeds, position=11), got[1:])
    assert torch.equal(ops.bernoulli_bits(x[1:, 2:], seed=seeds, position=13), got[1:, 2:])


def test_drawn_bits_have_the_right_frequencies():
    logits = torch.linspace(-4, 4, 9)
    n = 20_000
    p = torch.sigmoid(logits)
    mean = ops.bernoulli_bits(logits.expand(1, n, 9), seed=3).mean((0, 1))
    assert ((mean - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_binary_autoencoder_codes_are_sums_of_embeddings(backend):
    x, embedding = make(2, 6, 16, device=backend.device), make(16, 8, device=backend.device, seed=1)
    bits = ops.bernoulli_bits(x)
    expected = torch.stack([embedding[row > 0].sum(0) for row in x.view(12, 16)]).view(2, 6, 8)
    torch.testing.assert_close(bits @ embedding, expected)
    assert torch.equal(ops.unpack_bits(ops.pack_bits(bits > 0), 16), x > 0)


@pytest.mark.parametrize(
    "name, arguments", [("sign_codes", {}), ("sign_codes", {"scale": 0.5}), ("bernoulli_bits", {"seed": 3})]
)
def test_the_reference_has_the_same_gradient(name, arguments):
    grads = []
    for package in (ops, reference):
        z = make(4, 7, 12).requires_grad_()
        out = getattr(package, name)(z, **arguments)
        codes = out[0] if isinstance(out, tuple) else out
        codes.backward(make(4, 7, 12, seed=1))
        grads.append((z.grad, codes.detach()))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


# --- registration and refusals ----------------------------------------------------------------------------


def emulated_or_skip():
    try:
        _library.load_emulated()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        emulated_or_skip()
    packet = getattr(torch.ops, namespace)
    z = make(9, 6)
    torch.library.opcheck(packet.sign_codes, (z, 0.5, True))
    torch.library.opcheck(packet.pack_bits, (z > 0, False))
    torch.library.opcheck(packet.unpack_bits, (torch.arange(9), 6, -1.0, 1.0, True, torch.float16))
    torch.library.opcheck(packet.unpack_bits, (torch.arange(9), 6, 0.0, 1.0, True, torch.bool))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(z):
        codes, indices = ops.sign_codes(z)
        bits = ops.unpack_bits(indices, 12)
        return codes, ops.pack_bits(bits), ops.unpack_signs(indices, 12), ops.bernoulli_bits(z[None])

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 9):
        z = make(rows, 12)
        for got, expected in zip(compiled(z), step(z)):
            assert torch.equal(got, expected)
    assert len(graphs) == 1


def test_training_step_compiles():
    def loss(z):
        drawn = ops.bernoulli_bits(z[None], seed=5)
        return ((ops.sign_codes(z)[0] + ops.sign_codes(z, 1.0)[0] - drawn[0]) * z.detach()).sum()

    z, grads = make(6, 12), []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = z.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].any()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.sign_codes(torch.zeros(3, 65)), ValueError, r"with d of 1 to 64, got \[3, 65\]"),
        (lambda: ops.sign_codes(torch.zeros(3, 0)), ValueError, r"with d of 1 to 64, got \[3, 0\]"),
        (lambda: ops.sign_codes(torch.zeros(3).int()), TypeError, "expected z of float32"),
        (lambda: ops.pack_bits(torch.zeros(3)), TypeError, "expected bits of bool or uint8"),
        (lambda: ops.pack_bits([True]), TypeError, "expected bits to be a tensor, got list"),
        (lambda: ops.pack_bits(torch.zeros(3, 65).bool()), ValueError, "with d of 1 to 64"),
        (lambda: ops.unpack_bits(torch.zeros(3), 4), TypeError, "expected indices to be an int64 tensor"),
        (lambda: ops.unpack_bits(torch.zeros(3).long(), 65), ValueError, "expected d of 1 to 64, got 65"),
        (lambda: ops.unpack_signs(torch.zeros(3).long(), 0), ValueError, "expected d of 1 to 64, got 0"),
        (
            lambda: ops.unpack_signs(torch.zeros(3).long(), 4, dtype=torch.int8),
            TypeError,
            "expected dtype float32, bfloat16 or float16, got torch.int8",
        ),
        (lambda: ops.bernoulli_bits(torch.zeros(3)), ValueError, r"expected x \[R, ..., d\], got \[3\]"),
        (
            lambda: ops.bernoulli_bits(torch.zeros(3, 4), seed=torch.zeros(2).long()),
            ValueError,
            r"expected seed \[3\], one per row, got \[2\]",
        ),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()
