"""Quantizer modules, scalar codes, bits and code statistics against torch, faiss, vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from arimg import nn, ops
from conftest import OURS, SMOKE

ROWS = 64 if SMOKE else 16384
LEVELS = [8, 8, 8, 5, 5, 5]
PACKAGE = "vector-quantize-pytorch"


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("peer", [OURS, PACKAGE])
@pytest.mark.parametrize("mode", ["eval", "training forward"])
@pytest.mark.parametrize("tokens", [256, 1024])
def test_vector_quantize(tokens: int, mode: str, peer: str, measure: Callable[..., float]) -> None:
    package: Any = pytest.importorskip("vector_quantize_pytorch")
    size = 512 if SMOKE else 16384
    made: dict[str, Any] = {}
    for name, module in ((OURS, nn), (PACKAGE, package)):
        torch.manual_seed(0)
        made[name] = module.VectorQuantize(dim=8, codebook_size=size).train(mode != "eval")
    x = rows(4, tokens // 4, 8)
    with torch.no_grad():
        outs = [made[name](x) for name in (OURS, PACKAGE)]
        assert (outs[0][1] != outs[1][1]).sum() <= 1  # equally near within rounding
        torch.testing.assert_close(outs[0][2], outs[1][2], atol=1e-6, rtol=1e-4)
        measure(f"VectorQuantize {size}x8, {mode}, N={tokens}", peer, lambda: made[peer](x))


@pytest.mark.parametrize("peer", [OURS, "a loop of nearest_code", PACKAGE])
@pytest.mark.parametrize(
    "tokens, size, dim, depth", [(256, 2048, 64, 8), (1024, 1024, 8, 8), (64, 16384, 256, 4)]
)
def test_residual_vq(
    tokens: int, size: int, dim: int, depth: int, peer: str, measure: Callable[..., float]
) -> None:
    package: Any = pytest.importorskip("vector_quantize_pytorch")
    tokens, size = (16, 64) if SMOKE else (tokens, size)
    torch.manual_seed(0)
    theirs = package.ResidualVQ(dim=dim, num_quantizers=depth, codebook_size=size).eval()
    ours = nn.ResidualVQ(dim=dim, num_quantizers=depth, codebook_size=size).eval()
    scale = 0.7 ** torch.arange(depth)  # as trained ones: finer from depth to depth
    for q, layer in enumerate(theirs.layers):
        layer._codebook.embed.copy_(rows(1, size, dim, seed=q) * scale[q])
    ours.load_state_dict(theirs.state_dict())
    x, books = rows(1, tokens, dim, seed=99), ours.codebooks

    def loop() -> tuple[torch.Tensor, torch.Tensor]:
        residual, indices = x[0], []
        total = torch.zeros_like(residual)
        for book in books:
            index = ops.nearest_code(residual, book)
            chosen = ops.lookup(index, book)
            residual, total = residual - chosen, total + chosen
            indices.append(index)
        return total[None], torch.stack(indices, -1)[None]

    peers: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours(x),
        "a loop of nearest_code": loop,
        PACKAGE: lambda: theirs(x),
    }
    with torch.no_grad():
        different = (peers[peer]()[1] != ours(x)[1]).any(-1).sum()
        assert different <= 1 + tokens // 200  # equally near within rounding, and what follows from it
        work = 2 * tokens * size * dim * depth
        measure(f"ResidualVQ, {depth} x {size}x{dim}, eval, N={tokens}", peer, peers[peer], flops=work)


def fsq_formula(z: torch.Tensor, c: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    k = (torch.tanh(z + c["shift"]) * c["half"] - c["offset"]).round()
    return k / c["width"], ((k + c["width"]) * c["basis"]).sum(-1).long()


@pytest.mark.parametrize("peer", [OURS, "torch, the formula", PACKAGE])
def test_fsq(peer: str, measure: Callable[..., float]) -> None:
    package: Any = pytest.importorskip("vector_quantize_pytorch")
    L = torch.tensor(LEVELS)
    half, offset = (L - 1) * (1 + 1e-3) / 2, torch.where(L % 2 == 0, 0.5, 0.0)
    c = dict(shift=torch.atanh(offset / half), half=half, offset=offset, width=L // 2)
    c["basis"] = torch.cumprod(torch.tensor([1, *LEVELS[:-1]]), 0)
    z, module = rows(ROWS, 6), package.FSQ(LEVELS)
    peers: dict[str, Callable[[], Any]] = {
        OURS: lambda: ops.fsq(z, LEVELS),
        "torch, the formula": lambda: fsq_formula(z, c),
        PACKAGE: lambda: module(z[None]),
    }
    with torch.no_grad():
        different = (peers[peer]()[1].reshape(-1) != peers[OURS]()[1]).sum()
        assert different <= 1 + ROWS // 10000  # within rounding of a half
        measure(f"FSQ of 6 levels, N={ROWS}", peer, peers[peer], bytes=ROWS * (48 + 8))


@pytest.mark.parametrize("peer", [OURS, "torch, the codebook's rows"])
def test_fsq_codes(peer: str, measure: Callable[..., float]) -> None:
    indices = torch.randint(0, 64000, (ROWS,), generator=torch.Generator().manual_seed(0))
    codebook = ops.fsq_codes(torch.arange(64000), LEVELS)
    peers: dict[str, Callable[[], Any]] = {
        OURS: lambda: ops.fsq_codes(indices, LEVELS),
        "torch, the codebook's rows": lambda: torch.nn.functional.embedding(indices, codebook),
    }
    assert torch.equal(peers[peer](), peers[OURS]())
    measure(f"FSQ codes of indices, N={ROWS}", peer, peers[peer], bytes=ROWS * (8 + 24))


@pytest.mark.parametrize("peer", [OURS, "torch, where and a sum"])
@pytest.mark.parametrize("d", [18, 56])
def test_sign_codes(d: int, peer: str, measure: Callable[..., float]) -> None:
    z, place = rows(ROWS, d), 2 ** torch.arange(d - 1, -1, -1)

    def formula() -> tuple[torch.Tensor, torch.Tensor]:
        set_ = z > 0
        return torch.where(set_, d**-0.5, -(d**-0.5)), (set_ * place).sum(-1)

    peers: dict[str, Callable[[], Any]] = {OURS: lambda: ops.sign_codes(z), "torch, where and a sum": formula}
    assert all(torch.equal(a, b) for a, b in zip(peers[peer](), peers[OURS]()))
    measure(f"sign codes of {d} bits, N={ROWS}", peer, peers[peer], bytes=ROWS * (8 * d + 8))


@pytest.mark.parametrize("peer", [OURS, "torch, shifts"])
@pytest.mark.parametrize("way", ["pack", "unpack"])
def test_bits(way: str, peer: str, measure: Callable[..., float]) -> None:
    d = 24
    bits, places = rows(ROWS, d) > 0, torch.arange(d - 1, -1, -1)
    indices = ops.pack_bits(bits)
    peers: dict[tuple[str, str], Callable[[], Any]] = {
        ("pack", OURS): lambda: ops.pack_bits(bits),
        ("pack", "torch, shifts"): lambda: (bits.long() << places).sum(-1),
        ("unpack", OURS): lambda: ops.unpack_bits(indices, d),
        ("unpack", "torch, shifts"): lambda: (indices[:, None] >> places & 1).bool(),
    }
    assert torch.equal(peers[way, peer](), indices if way == "pack" else bits)
    measure(f"{way} {d} bits, N={ROWS}", peer, peers[way, peer], bytes=ROWS * (d + 8))


@pytest.mark.parametrize("peer", [OURS, "torch index_add_ and bincount", "torch one-hot product"])
@pytest.mark.parametrize("codes, dim, count", [(16384, 8, 16384), (1024, 256, 16384), (8192, 768, 16384)])
def test_code_statistics(codes: int, dim: int, count: int, peer: str, measure: Callable[..., float]) -> None:
    if SMOKE:
        codes, count = 64, 128
    x = rows(count, dim)
    indices = torch.randint(0, codes, (count,), generator=torch.Generator().manual_seed(0))

    def one_hot() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.nn.functional.one_hot(indices, codes).float()
        return chosen.sum(0), chosen.T @ x

    peers: dict[str, Callable[[], Any]] = {
        OURS: lambda: ops.code_statistics(x, indices, codes),
        "torch index_add_ and bincount": lambda: (
            indices.bincount(minlength=codes),
            torch.zeros(codes, dim).index_add_(0, indices, x),
        ),
        "torch one-hot product": one_hot,
    }
    if peer == "torch one-hot product" and codes * dim * count > 2**33:
        pytest.skip("seconds per call")
    counts, sums = peers[peer]()
    assert torch.equal(counts.long(), peers[OURS]()[0])
    torch.testing.assert_close(sums, peers[OURS]()[1], atol=1e-4, rtol=1e-4)
    moved = count * (4 * dim + 8) + codes * (4 * dim + 8)
    measure(f"statistics of {codes}x{dim}, N={count}", peer, peers[peer], bytes=moved)


@pytest.mark.parametrize("peer", [OURS, "faiss"])
def test_kmeans(peer: str, measure: Callable[..., float]) -> None:
    faiss: Any = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    count, k, dim, steps = (512, 16, 8, 3) if SMOKE else (8192, 512, 64, 5)
    x = rows(count, dim)
    init = x[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:k]].clone()

    def by_faiss() -> torch.Tensor:
        run = faiss.Kmeans(dim, k, niter=steps, max_points_per_centroid=count, min_points_per_centroid=1)
        run.train(x.numpy(), init_centroids=init.numpy())
        return torch.from_numpy(run.centroids)

    peers: dict[str, Callable[[], torch.Tensor]] = {
        OURS: lambda: ops.kmeans(x, k, steps, init=init).centres,
        "faiss": by_faiss,
    }
    # A row between two centres may go to either: the means differ a little, the error hardly.
    nearest = [torch.cdist(x, peers[p]()).min(-1).values for p in (OURS, peer)]
    errors = [distance.double().square().mean().item() for distance in nearest]
    assert abs(errors[1] / errors[0] - 1) < 1e-3, errors
    work = 2 * count * k * dim * steps
    measure(f"k-means, {count} rows, {k}x{dim}, {steps} steps", peer, peers[peer], flops=work)
