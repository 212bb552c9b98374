"""LlamaGen: released names and shapes, teacher forcing against cached generation, a plain torch loop,
determinism, guidance, error messages.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import released
from arimg import ops
from arimg.generators import LlamaGen
from arimg.generators.llamagen import Decoder
from arimg.nn.linear import narrow_linear, narrow_swiglu

GRID = 5


def model(*, kv_heads: int | None = None, dtype: torch.dtype = torch.float32) -> LlamaGen:
    """A small model at which every part matters: the released recipe starts with a head of zero."""
    m = LlamaGen(50, 7, 2, 64, 4, kv_heads=kv_heads, hidden=96, grid=GRID, dropout=0.0, class_dropout=0.0)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in m.parameters():
            if p.dim() == 2:
                p.normal_(std=1.5 * p.shape[1] ** -0.5, generator=g)
            else:
                p.normal_(mean=1.0, std=0.5, generator=g)
    return m.eval().to(dtype)


def plain_rope(x: Tensor) -> Tensor:
    """x [B, H, L, D]: token 0 becomes zero, token 1 + i turns by its row and, in the second half, column."""
    x = x.double()
    L, D = x.shape[2:]
    i = torch.arange(L - 1, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(0, D // 2, 2, dtype=torch.float64) / (D // 2))
    angle = torch.cat([(i // GRID)[:, None] * frequency, (i % GRID)[:, None] * frequency], 1)
    turn = torch.cat(
        [torch.zeros(1, D // 2, dtype=torch.complex128), torch.polar(torch.ones_like(angle), angle)]
    )
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(3)


def plain_logits(m: LlamaGen, labels: Tensor, indices: Tensor) -> Tensor:
    """The model written out in float64, without a cache."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + m.eps).sqrt() * weight

    p = {k: v.double() for k, v in m.named_parameters()}
    h = torch.cat(
        [p["cls_embedding.embedding_table.weight"][labels][:, None], p["tok_embeddings.weight"][indices]], 1
    )
    for i in range(m.depth):
        w = {k.removeprefix(f"layers.{i}."): v for k, v in p.items() if k.startswith(f"layers.{i}.")}
        qkv = norm(h, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T
        heads = qkv.unflatten(-1, (-1, m.width // m.heads)).transpose(1, 2)
        q, k, v = heads.split((m.heads, m.kv_heads, m.kv_heads), 1)
        k, v = (t.repeat_interleave(m.heads // m.kv_heads, 1) for t in (k, v))
        scores = plain_rope(q) @ plain_rope(k).mT / (m.width // m.heads) ** 0.5
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        a = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        h = h + a.transpose(1, 2).flatten(2) @ w["attention.wo.weight"].T
        n = norm(h, w["ffn_norm.weight"])
        gate = F.silu(n @ w["feed_forward.w1.weight"].T) * (n @ w["feed_forward.w3.weight"].T)
        h = h + gate @ w["feed_forward.w2.weight"].T
    return norm(h, p["norm.weight"]) @ p["output.weight"].T


def indices(batch: int, n: int) -> Tensor:
    return torch.randint(50, (batch, n), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("depth", "width", "hidden", "millions"),
    [(12, 768, 2048, 111), (24, 1024, 2816, 343), (36, 1280, 3584, 775), (48, 1536, 4096, 1411)],
)
def test_names_shapes_and_sizes_are_the_released_ones(
    depth: int, width: int, hidden: int, millions: int
) -> None:
    with torch.device("meta"):
        m = LlamaGen(depth=depth, width=width, heads=width // 64)
    assert released.shapes_of(m) == released.llamagen(depth, width, hidden)
    assert round(sum(p.numel() for p in m.parameters()) / 1e6) == millions


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_state_dict_reads_the_sizes(kv_heads: int, dtype: torch.dtype) -> None:
    m = model(kv_heads=kv_heads, dtype=dtype)
    options = {"grid": GRID, "dropout": 0.0, "class_dropout": 0.0}
    twin = LlamaGen.from_state_dict(m.state_dict(), heads=4, **options)
    assert twin.config() == m.config() and not twin.training
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), m.state_dict().values()))
    assert twin.tok_embeddings.weight.dtype == dtype


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_and_gradients_follow_the_formula(kv_heads: int) -> None:
    m, labels, x = model(kv_heads=kv_heads), torch.tensor([2, 7]), indices(2, GRID * GRID - 1)
    got, expected = m(labels, x), plain_logits(m, labels, x)
    assert expected.std() > 0.5 and got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(m.parameters())
    ours = torch.autograd.grad((got * probe).sum(), parameters)
    plain = torch.autograd.grad((expected * probe).sum(), parameters)
    for a, b in zip(ours, plain):
        assert torch.allclose(a, b, atol=2e-5 * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cached_logits_equal_teacher_forced_ones(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m, labels = model(kv_heads=kv_heads), torch.tensor([2, -1])
    steps: list[Tensor] = []
    run = Decoder.run

    def spy(self: Decoder, *arguments: object) -> Tensor:
        steps.append(run(self, *arguments))  # type: ignore[arg-type]
        return steps[-1]

    monkeypatch.setattr(Decoder, "run", spy)
    drawn = m.generate(labels, cfg=3.0, seed=5)
    cached = torch.cat(steps, 1)
    with torch.no_grad():
        forced = m(torch.tensor([2, -1, -1, -1]), drawn[:, :-1].repeat(2, 1))
    assert torch.allclose(cached, forced, atol=1e-5 * forced.abs().max().item(), rtol=0)


@pytest.mark.parametrize("cfg_interval", [-1, 0, 6])
def test_greedy_tokens_equal_a_plain_loop(cfg_interval: int) -> None:
    m, labels, cfg = model(), torch.tensor([2, 5]), 3.0
    got = m.generate(labels, cfg=cfg, cfg_interval=cfg_interval, top_k=1)
    tokens = torch.empty(2, 0, dtype=torch.int64)
    for t in range(GRID * GRID):
        with torch.no_grad():
            cond = plain_logits(m, labels, tokens)[:, -1]
            uncond = plain_logits(m, torch.full_like(labels, 7), tokens)[:, -1]
        guided = cfg_interval < 0 or t - 1 <= cfg_interval
        logits = uncond + cfg * (cond - uncond) if guided else cond
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, tokens) and len(tokens.unique()) > 5


def test_without_guidance_the_condition_alone_counts() -> None:
    m, labels = model(), torch.tensor([2, 5])
    got = m.generate(labels, cfg=1.0, top_k=1)
    assert torch.equal(m(labels, got[:, :-1]).argmax(-1), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_its_label_and_seed_alone(dtype: torch.dtype) -> None:
    m, options = model(dtype=dtype), {"cfg": 2.0, "top_k": 20, "top_p": 0.95, "temperature": 0.9}
    together = m.generate([1, 4, 6], seed=torch.tensor([9, 3, 8]), **options)
    assert together.dtype == torch.int64 and together.shape == (3, GRID * GRID)
    for row, label, seed in zip(together, (1, 4, 6), (9, 3, 8)):
        assert torch.equal(m.generate(label, seed=seed, **options)[0], row)
    assert torch.equal(m.generate([1, 4, 6], seed=torch.tensor([9, 3, 8]), **options), together)
    assert torch.equal(m.generate([4, 4], seed=3, **options)[0], together[1])
    assert not torch.equal(m.generate(4, seed=4, **options)[0], together[1])
    assert torch.equal(m.generate([4], seed=3, tokens=6, **options)[0], together[1, :6])


def test_bfloat16_weights_keep_float32_activations() -> None:
    """As the same weights in float32 but for the rounding of queries, keys and values."""
    narrow = model(dtype=torch.bfloat16)
    wide = LlamaGen(**narrow.config()).eval()
    wide.load_state_dict(narrow.state_dict())
    labels, x = torch.tensor([3]), indices(1, 10)
    with torch.no_grad():
        expected = wide(labels, x)
        assert (narrow(labels, x) - expected).abs().max() < 4 * 2**-8 * expected.abs().max()


def test_many_rows_and_few_rows_agree() -> None:
    g = torch.Generator().manual_seed(0)
    x, r = torch.randn(2, 9, 64, generator=g), torch.randn(2, 9, 32, generator=g)
    w, u = torch.randn(32, 64, generator=g), torch.randn(32, 64, generator=g)
    many, few = narrow_linear(x, w, r), narrow_linear(x[:, :4], w, r[:, :4])
    assert torch.allclose(many[:, :4], few, atol=1e-4) and torch.allclose(many, x @ w.T + r, atol=1e-4)
    gated = F.silu(x @ w.T) * (x @ u.T)
    assert torch.allclose(narrow_swiglu(x, w, u), gated, atol=1e-3)
    assert torch.allclose(narrow_swiglu(x[:, :4], w, u), gated[:, :4], atol=1e-3)
    leaf = w.clone().requires_grad_()
    narrow_linear(x[:1, :1], leaf).sum().backward()
    assert leaf.grad is not None and torch.allclose(leaf.grad, x[0, 0].expand(32, 64), atol=1e-5)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_packed_weights(storage: str) -> None:
    """As the weights that the codes stand for; rows do not depend on their number; sizes are as stored."""
    plain, packed = model(), model().pack(storage)
    with torch.no_grad():
        for linear in (m for m in plain.modules() if isinstance(m, nn.Linear)):
            linear.weight.copy_(ops.dequantize_weight(ops.quantize_weight(linear.weight, int(storage[3:]))))
        labels, x = torch.tensor([2, 5, 1]), indices(3, 10)
        got = packed(labels, x)
        assert torch.allclose(got, plain(labels, x), atol=1e-4)
        assert torch.equal(packed(labels[:1], x[:1]), got[:1])
    tokens = packed.generate([1, 4, 6], cfg=2.0, top_k=1)
    assert torch.equal(tokens, plain.generate([1, 4, 6], cfg=2.0, top_k=1))
    names = {n for n, _ in packed.named_parameters()}
    assert not any("attention.w" in n or "feed_forward" in n or "output" in n for n in names)
    many = packed.generate([3] * 9, cfg=2.0, seed=0)  # 18 rows: two passes over the codes
    assert torch.equal(packed.generate([3], cfg=2.0, seed=8)[0], many[8])
    with pytest.raises(ValueError, match=r"expected a storage of \['int8', 'int4'\], got 'float16'"):
        model().pack("float16")


def test_dropout_acts_in_training_alone() -> None:
    m = LlamaGen(**model().config() | {"dropout": 0.5, "class_dropout": 1.0})
    m.load_state_dict(model().state_dict())
    labels, x = torch.tensor([2, 5]), indices(2, 4)
    torch.manual_seed(0)
    assert not torch.equal(m(labels, x), m(labels, x))
    assert torch.equal(m.eval()(labels, x), m(labels, x))
    m.dropout = 0.0
    assert torch.equal(m.train()(labels, x)[0, 0], m.eval()(torch.tensor([-1, -1]), x)[0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([8]), "expected labels from 0 to 6"),
        (lambda m: m.generate(0, tokens=26), "expected tokens from 1 to 25, got 26"),
        (lambda m: m(torch.tensor([1]), indices(1, 25)), r"expected indices \[1, n < 25\], got \[1, 25\]"),
        (lambda m: LlamaGen(width=60, heads=8), "expected a width that 8 heads divide"),
        (lambda m: LlamaGen(width=64, heads=4, kv_heads=3), "expected kv_heads that divide 4, got 3"),
        (lambda m: LlamaGen.from_state_dict({}), "expected the state dict of a LlamaGen"),
        (
            lambda m: LlamaGen.from_state_dict(
                {k: v for k, v in m.state_dict().items() if k != "norm.weight"}, heads=4
            ),
            "norm.weight: missing",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(model())


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs/drop-in.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "import LlamaGen" in b]
    monkeypatch.chdir(tmp_path)
    torch.save({"model": LlamaGen(depth=1, width=128, heads=2).state_dict()}, "c2i_B_256.pt")
    names: dict[str, Tensor] = {}
    exec(block, names)
    assert names["tokens"].shape == (2, 256)
