"""Linear layers of a few rows against plain torch: float and quantized weights, epilogues, gated pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import _library, ops, reference
from arimg.nn import PackedLinear
from arimg.nn.linear import linear
from arimg.ops.block_linear import MAX_ROWS
from arimg.reference.block_linear import ACTIVATIONS
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, inputs, outputs: tails of blocks and tiles, one row and the most, more than one group
SHAPES = [(1, 1, 1), (2, 7, 3), (3, 100, 17), (2, 256, 33), (5, 64, 9), (9, 288, 20), (16, 40, 70)]
QUANTIZED = [(8, None), (8, 32), (8, 64), (4, None), (4, 32), (4, 64)]


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, inputs, outputs = shape
    x = torch.randn(rows, inputs, generator=g)
    w = torch.randn(outputs, inputs, generator=g) / inputs**0.5
    bias = torch.randn(outputs, generator=g)
    residual = torch.randn(rows, outputs, generator=g)
    return [t.to(dtype).to(device) for t in (x, w, bias, residual)]


def to(weight, device):
    return weight._replace(codes=weight.codes.to(device), scales=weight.scales.to(device))


def plain(x, w, bias, residual, activation):
    return ACTIVATIONS[activation](F.linear(x, w, bias)) + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float_weights(backend, shape, dtype):
    x, w, bias, residual = make(shape, dtype, backend.device)
    got = ops.linear_rows(x, w, bias, "gelu", residual)
    assert got.dtype == dtype
    assert_close(got, plain, x, w, bias, residual, "gelu")
    assert_close(ops.linear_rows(x, w), F.linear, x, w)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(backend, activation):
    """Every activation over its whole range, with an error of rounding: the product passes x through."""
    x = torch.linspace(-12, 12, 32 * 16).view(16, 32)
    x[0, :6] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0])
    x = x.to(backend.device)
    w = torch.eye(32, device=backend.device)
    got = ops.linear_rows(x, w, activation=activation)
    assert_close(got, lambda x: ACTIVATIONS[activation](x), x, k=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activate(backend, dtype, activation):
    """Over the whole range, whole vectors and tails, from any address, with and without a factor."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat((torch.linspace(-12, 12, 500), torch.tensor([0.0, -0.0, 60.0, -60.0, 1e-30])))
    x, factor = x.to(dtype).to(backend.device), torch.randn(505, generator=g).to(dtype).to(backend.device)
    for given in (x, x[1:], x[3:10], x[:0], x[: 2 * 9].view(3, 3, 2)[..., 0], x.view(5, 101)):
        got = ops.activate(given, activation)
        assert got.dtype == dtype and got.shape == given.shape
        assert_close(got, lambda x: ACTIVATIONS[activation](x), given, k=3, floor=1e-20)
        shape = given.shape
        other = factor[: given.numel()].view(shape)
        got = ops.activate(given, activation, other)
        assert_close(got, lambda x, f: ACTIVATIONS[activation](x) * f, given, other, k=3, floor=1e-20)


def test_activate_non_finite_gradient_and_checks(backend):
    x = torch.tensor([float("nan"), float("inf"), 1.0], device=backend.device)
    for activation in ("gelu", "gelu_tanh", "silu", "relu"):
        got = ops.activate(x, activation)
        assert got[0].isnan() and got[1] == float("inf") and got[2].isfinite()
    y = torch.randn(4, 5, requires_grad=True)
    ops.activate(y, "gelu_tanh", y.detach()).sum().backward()
    want = torch.autograd.grad((F.gelu(y, approximate="tanh") * y.detach()).sum(), y)[0]
    assert torch.allclose(y.grad, want, atol=1e-6)
    with pytest.raises(ValueError, match="expected an activation of"):
        ops.activate(x, "tanh")
    with pytest.raises(ValueError, match=r"expected factor \[3\], got \[2\]"):
        ops.activate(x, "silu", x[:2])
    with pytest.raises(TypeError, match="expected factor of x's dtype"):
        ops.activate(x, "silu", x.half())


def test_activate_opcheck_and_compile():
    x, factor = torch.randn(2, 3, 37)
    torch.library.opcheck(torch.ops.arimg.activate, (x, factor, 2))
    torch.library.opcheck(torch.ops.arimg.activate, (x, None, 3))
    compiled = torch.compile(lambda x, f: ops.activate(x, "silu", f), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, factor), ops.activate(x, "silu", factor))


def exact_product(x, weight):
    return F.linear(x.double(), reference.dequantize_weight(weight).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), QUANTIZED)
def test_quantized_weights(backend, bits, group, dtype):
    """The product is that of the weights that the codes stand for, to rounding: the codes enter exactly."""
    for shape in [(2, 288, 21), (9, 100, 5), (1, 1, 1)]:
        x, w, bias, residual = make(shape, dtype, backend.device)
        weight = to(ops.quantize_weight(w.float().cpu(), bits, group), backend.device)
        dequantized = reference.dequantize_weight(weight)
        got = ops.linear_rows(x, weight, bias, "silu", residual)

        def formula(x, bias, residual, dequantized=dequantized):
            return F.silu(F.linear(x, dequantized.cpu().to(x.dtype), bias)) + residual

        assert_close(got, formula, x, bias, residual)


@pytest.mark.parametrize(("bits", "group"), QUANTIZED)
def test_error_bound_of_quantization(bits, group):
    """No weight is off by more than half its scale, so no product by more than sum |x| scale / 2."""
    x, w, _, _ = make((4, 200, 50))
    w[3] = 0
    w[4, 7] = -5.0
    weight = ops.quantize_weight(w, bits, group)
    back = ops.dequantize_weight(weight)
    scales = weight.scales.repeat_interleave(weight.group, 1)[:, :200]
    assert ((back - w).abs() <= scales / 2 * (1 + 1e-6)).all()
    assert torch.equal(back[3], torch.zeros(200))
    bound = F.linear(x.double().abs(), scales.double() / 2)
    error = (ops.linear_rows(x, weight).double() - F.linear(x.double(), w.double())).abs()
    rounding = 200 * 2**-24 * F.linear(x.double().abs(), w.double().abs())
    assert (error <= bound + rounding).all()
    # The bound says something: normal weights, 8 bits, stay within 1 % of the output's spread.
    if bits == 8:
        assert error[:, 5:].max() < 0.05 * F.linear(x, w).std()


def test_codes_are_packed_as_documented():
    w = (torch.arange(64).remainder(16) - 8).float().view(1, 64)
    weight = ops.quantize_weight(w, 4, 64)
    assert weight.codes.shape == (1, 32) and weight.scales.tolist() == [[1.0]]
    assert weight.codes[0, 3].item() == 3 + (3 << 4) and torch.equal(ops.dequantize_weight(weight), w)
    assert weight.bits == 4 and weight.shape == (1, 64)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_has_the_same_bits_in_any_number_of_rows(backend, kind):
    x, w, bias, residual = make((16, 160, 37), device=backend.device)
    if kind == "bfloat16":
        x, w, bias, residual = (t.bfloat16() for t in (x, w, bias, residual))
    if kind.startswith("int"):
        w = to(ops.quantize_weight(w.cpu(), int(kind[3:]), 32), backend.device)
    whole = ops.linear_rows(x, w, bias, "gelu_tanh", residual)
    for begin, end in [(0, 1), (3, 5), (4, 7), (2, 10), (15, 16)]:
        part = ops.linear_rows(x[begin:end], w, bias, "gelu_tanh", residual[begin:end])
        assert torch.equal(part, whole[begin:end])


def test_bits_do_not_depend_on_threads():
    x, w, _, _ = make((2, 512, 1000))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.linear_rows(x, w)
        torch.set_num_threads(2)
        assert torch.equal(ops.linear_rows(x, w), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_gated_pair(backend, kind):
    x, w, bias, _ = make((3, 96, 40), device=backend.device)
    if kind == "bfloat16":
        x, w, bias = (t.bfloat16() for t in (x, w, bias))
    gate, up = w[:18], w[18:36]
    gate_bias, up_bias = bias[:18], bias[18:36]

    def formula(x, gate, up, gate_bias, up_bias):
        return F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)

    if kind.startswith("int"):
        gate, up = (to(ops.quantize_weight(t.cpu(), int(kind[3:])), backend.device) for t in (gate, up))
        plain_gate, plain_up = reference.dequantize_weight(gate), reference.dequantize_weight(up)
    else:
        plain_gate, plain_up = gate, up
    got = ops.gated_linear_rows(x, gate, up, gate_bias, up_bias)
    assert_close(got, formula, x, plain_gate, plain_up, gate_bias, up_bias)


def test_mixed_types_views_and_leading_dimensions(backend):
    x, w, bias, _ = make((4, 64, 12), device=backend.device)
    narrow = w.bfloat16()
    got = ops.linear_rows(x, narrow, bias)
    assert_close(got, lambda x, w, b: F.linear(x, w.to(x.dtype), b), x, narrow.float(), bias)
    half = ops.linear_rows(x.half(), w, bias.half())
    assert half.dtype == torch.float16
    assert torch.equal(half, ops.linear_rows(x.half().float(), w, bias.half().float()).half())
    assert torch.equal(ops.linear_rows(x.view(2, 2, 64), w), ops.linear_rows(x, w).view(2, 2, 12))
    assert torch.equal(ops.linear_rows(x.T.contiguous().T, w.T.contiguous().T), ops.linear_rows(x, w))
    assert torch.equal(
        ops.linear_rows(x[:, 1:60], w[:, 1:60]), ops.linear_rows(x[:, 1:60], w[:, 1:60].clone())
    )
    assert ops.linear_rows(x[:0], w).shape == (0, 12)
    assert ops.linear_rows(x, w[:0]).shape == (4, 0)
    assert ops.linear_rows(x[0], w).shape == (12,)


def test_nan_and_infinity_stay_in_their_row(backend):
    x, w, _, _ = make((3, 40, 8), device=backend.device)
    x[1, 5] = float("nan")
    out = ops.linear_rows(x, w)
    assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()
    x[1, 5] = float("inf")
    assert ops.linear_rows(x, w)[1].isinf().all()
    quantized = to(ops.quantize_weight(w.cpu(), 8), backend.device)
    assert ops.linear_rows(x, quantized)[0].isfinite().all()


def test_more_rows_and_gradients_go_to_torch():
    x, w, bias, residual = make((MAX_ROWS + 1, 32, 6))
    assert torch.equal(ops.linear_rows(x, w, bias), F.linear(x, w, bias))
    quantized = ops.quantize_weight(w)
    dequantized = ops.dequantize_weight(quantized)
    assert torch.equal(ops.linear_rows(x, quantized), F.linear(x, dequantized))
    gated = ops.gated_linear_rows(x, w, w)
    assert torch.allclose(gated, F.silu(F.linear(x, w)) * F.linear(x, w), atol=1e-6)
    few = x[:2].clone().requires_grad_()
    w.requires_grad_()
    ops.linear_rows(few, w, bias, "silu", residual[:2]).sum().backward()
    grad = torch.autograd.grad((F.silu(F.linear(few, w, bias))).sum(), (few, w))
    assert torch.allclose(few.grad, grad[0]) and torch.allclose(w.grad, grad[1])
    few.grad = None
    ops.linear_rows(few, quantized).sum().backward()
    assert torch.allclose(few.grad, dequantized.sum(0).expand(2, 32), atol=1e-6)


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    x, w, bias, residual = make((2, 64, 16))
    op = getattr(torch.ops, namespace).linear_rows
    torch.library.opcheck(op, (x, w, None, bias, w, None, None, residual, 3, 64))
    codes = ops.quantize_weight(w, 4, 32)
    torch.library.opcheck(op, (x, codes.codes, codes.scales, None, None, None, None, None, 0, 32))


def test_compiles_without_graph_breaks():
    x, w, bias, _ = make((2, 64, 16))
    quantized = ops.quantize_weight(w, 4, 32)

    def step(x):
        return ops.linear_rows(x, quantized, bias, "gelu") + ops.gated_linear_rows(x, w, w)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), step(x))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8", "int4"])
@torch.no_grad()
def test_packed_linear(storage):
    torch.manual_seed(0)
    linear = torch.nn.Linear(70, 24)
    packed = PackedLinear.from_linear(linear, storage)
    x, residual = torch.randn(2, 3, 70), torch.randn(2, 3, 24)
    weight = packed.packed if storage.startswith("int") else packed.weight
    assert torch.equal(packed(x, "gelu", residual), ops.linear_rows(x, weight, linear.bias, "gelu", residual))
    again = PackedLinear.from_linear(torch.nn.Linear(70, 24), storage)
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), packed(x)) and torch.equal(
        packed.gated(again, x), ops.gated_linear_rows(x, weight, weight, linear.bias, linear.bias)
    )
    rough = {"float32": 1e-5, "bfloat16": 3e-3, "float16": 4e-4, "int8": 1e-2, "int4": 2e-1}[storage]
    error = (packed(x) - linear(x)).abs().max()
    assert error < rough * linear(x).abs().max() and list(packed.parameters()) == []
    assert packed(x.bfloat16()).dtype == torch.bfloat16


def test_packed_linear_refuses_what_it_cannot_store():
    linear = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"expected a storage of .* got 'int2'"):
        PackedLinear.from_linear(linear, "int2")
    with pytest.raises(ValueError, match="expected no group for float32, got 32"):
        PackedLinear.from_linear(linear, "float32", group=32)


W = torch.zeros(5, 4)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=[1.0]), TypeError, "expected x to be a tensor, got list"),
        (dict(x=torch.zeros(2, 4, dtype=torch.int64)), TypeError, "expected x of float32"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"expected x \[..., I > 0\], got \[2, 0\]"),
        (dict(x=torch.zeros(2, 3)), ValueError, r"expected weight \[O, 3\], got \[5, 4\]"),
        (dict(weight=W.double()), TypeError, "expected weight of float32, .* got torch.float64"),
        (dict(weight=3), TypeError, "expected weight of float32, .* got int"),
        (dict(weight=W.to("meta")), ValueError, "expected weight on x's device cpu, got meta"),
        (dict(bias=torch.zeros(4)), ValueError, r"expected bias \[5\], got \[4\]"),
        (dict(bias=torch.zeros(5).half()), TypeError, "expected bias of x's dtype"),
        (dict(residual=torch.zeros(2, 4)), ValueError, r"expected residual \[2, 5\], got \[2, 4\]"),
        (dict(activation="tanh"), ValueError, "expected an activation of .* got 'tanh'"),
        (
            dict(weight=ops.QuantizedWeight(torch.zeros(5, 4, dtype=torch.int8), torch.ones(5, 1), 4, 4)),
            ValueError,
            r"expected codes of weight \[O, 32\], got \[5, 4\]",
        ),
        (
            dict(weight=ops.QuantizedWeight(torch.zeros(5, 32, dtype=torch.int8), torch.ones(5, 2), 4, 4)),
            ValueError,
            r"expected scales of weight \[5, 1\], got \[5, 2\]",
        ),
        (
            dict(weight=ops.QuantizedWeight(torch.zeros(5, 32), torch.ones(5, 1), 4, 4)),
            TypeError,
            "expected weight of int8 or uint8 codes and float32 scales",
        ),
    ],
)
def test_bad_input_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        ops.linear_rows(**(dict(x=torch.zeros(2, 4), weight=W) | change))


def test_bad_quantization_and_gates_are_refused():
    for arguments, text in [
        ((W, 5), "expected 4 or 8 bits, got 5"),
        ((W, 4, 20), "expected a group that is a multiple of 32, got 20"),
        ((W[0],), r"expected weight \[O, I > 0\], got \[4\]"),
        ((W + float("nan"),), "expected finite weights"),
    ]:
        with pytest.raises(ValueError, match=text):
            ops.quantize_weight(*arguments)
    with pytest.raises(ValueError, match="expected gate and up of one shape and storage"):
        ops.gated_linear_rows(torch.zeros(2, 4), W, ops.quantize_weight(W))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_reads_large_weights_row_by_row_where_rows_are_few(monkeypatch, dtype):
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(512, 512, generator=g).to(dtype), torch.randn(512, generator=g).to(dtype)
    calls = []
    monkeypatch.setattr(ops, "linear_rows", lambda *a: calls.append(1) or reference.linear_rows(*a))
    for rows, wanted in ((1, True), (MAX_ROWS, True), (MAX_ROWS + 1, False)):
        x = torch.randn(1, rows, 512, generator=g).to(dtype)
        calls.clear()
        assert_close(linear(x, weight, bias), F.linear, x, weight, bias)
        assert bool(calls) == wanted
    calls.clear()
    linear(x[:, :1], weight[:64], bias[:64])  # a small weight
    linear(x[:, :1].clone().requires_grad_(), weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(x[:, :1], weight, bias)
    assert not calls
