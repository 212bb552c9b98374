"""Nearest code against torch's distance matrix and faiss, on the codebooks of released tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from arimg import ops, reference
from conftest import OURS, SMOKE

# rows, codes, dimensions
SHAPES = {
    "LlamaGen 16384x8, N=4096": (4096, 16384, 8),
    "LlamaGen 16384x8, N=256": (256, 16384, 8),
    "16384x4, N=4096": (4096, 16384, 4),
    "16384x16, N=4096": (4096, 16384, 16),
    "VAR 4096x32, N=5440": (5440, 4096, 32),
    "VAR 4096x32, N=680": (680, 4096, 32),
    "VAR 4096x32, N=8": (8, 4096, 32),
    "4096x64, N=1024": (1024, 4096, 64),
    "VQGAN 1024x256, N=4096": (4096, 1024, 256),
    "8192x256, N=1024": (1024, 8192, 256),
    "262144x256, N=64": (64, 262144, 256),
    "X-Omni 16384x2048, N=256": (256, 16384, 2048),
}


def addmm_argmin(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.addmm(codebook.square().sum(-1), x, codebook.T, alpha=-2).argmin(-1)


def faiss_search(codebook: torch.Tensor, fused: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    faiss: Any = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    # Below this many values per query faiss scans codes one by one; 1 forces its blocked (fused) kernel.
    faiss.cvar.distance_compute_blas_threshold = 1 if fused else 20
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda x: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def assert_same_codes(
    got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, codebook: torch.Tensor
) -> None:
    """Indices may differ only where the two distances agree within float32 rounding."""
    rows = (got != expected).nonzero()[:, 0]
    distance = [(x[rows].double() - codebook[i[rows]].double()).square().sum(-1) for i in (got, expected)]
    scale = x[rows].double().square().sum(-1) + codebook.double().square().sum(-1).max()
    assert ((distance[0] - distance[1]).abs() <= codebook.shape[1] * 2.0**-23 * scale).all()
    assert len(rows) <= 2 + len(x) // 1000, f"{len(rows)} of {len(x)} indices differ"


@pytest.mark.parametrize("peer", [OURS, "torch addmm + argmin", "faiss", "faiss, fused kernel forced"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_code(shape: str, peer: str, measure: Callable[..., float]) -> None:
    rows, codes, dim = SHAPES[shape]
    if SMOKE:
        rows, codes = min(rows, 64), min(codes, 512)
    g = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(rows, dim, generator=g), torch.randn(codes, dim, generator=g)
    if peer.startswith("faiss"):
        search = faiss_search(codebook, fused="forced" in peer)
        function = lambda: search(x)  # noqa: E731
    elif peer == OURS:
        function = lambda: ops.nearest_code(x, codebook)  # noqa: E731
    else:
        function = lambda: addmm_argmin(x, codebook)  # noqa: E731
    assert_same_codes(function(), ops.nearest_code(x, codebook), x, codebook)
    measure(f"nearest code, {shape}", peer, function, flops=2 * rows * codes * dim)


@pytest.mark.parametrize("peer", [OURS, "torch addmm + topk", "faiss"])
@pytest.mark.parametrize("k", [8, 50])
def test_nearest_codes(k: int, peer: str, measure: Callable[..., float]) -> None:
    rows, codes, dim = (64, 512, 8) if SMOKE else (4096, 16384, 8)
    g = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(rows, dim, generator=g), torch.randn(codes, dim, generator=g)

    def by_topk() -> tuple[torch.Tensor, torch.Tensor]:
        distances = torch.addmm(codebook.square().sum(-1), x, codebook.T, alpha=-2)
        values, indices = distances.topk(k, largest=False)
        return values + x.square().sum(-1, keepdim=True), indices

    def by_faiss() -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = index.search(x.numpy(), k)
        return torch.from_numpy(values), torch.from_numpy(indices)

    if peer == "faiss":
        faiss: Any = pytest.importorskip("faiss")
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(dim)
        index.add(codebook.numpy())
    peers = {
        OURS: lambda: ops.nearest_codes(x, codebook, k),
        "torch addmm + topk": by_topk,
        "faiss": by_faiss,
    }
    values, indices = peers[peer]()
    expected, _ = ops.nearest_codes(x, codebook, k)
    assert torch.allclose(values, expected, atol=1e-4)
    exact = (x.double()[:, None] - codebook.double()[indices]).square().sum(-1)
    assert torch.allclose(exact, expected.double(), atol=1e-4)
    measure(f"{k} nearest codes, {codes}x{dim}, N={rows}", peer, peers[peer], flops=2 * rows * codes * dim)


@pytest.mark.parametrize("peer", [OURS, "torch embedding_dense_backward"])
def test_lookup_backward(peer: str, measure: Callable[..., float]) -> None:
    rows, codes, dim = 5440, 4096, 32
    g = torch.Generator().manual_seed(0)
    indices = torch.randint(0, codes, (rows,), generator=g)
    grad = torch.randn(rows, dim, generator=g)
    peers = {
        OURS: lambda: torch.ops.arimg.lookup_backward(grad, indices, codes),
        "torch embedding_dense_backward": lambda: torch.ops.aten.embedding_dense_backward(
            grad, indices, codes, -1, False
        ),
    }
    assert torch.equal(peers[peer](), peers[OURS]())
    measure(
        "gradient of a lookup, 5440 rows of 4096x32", peer, peers[peer], bytes=4 * dim * (2 * rows + codes)
    )


@pytest.mark.parametrize("peer", [OURS, "torch softmax of an N x K matrix"])
def test_codebook_softmax_mean(peer: str, measure: Callable[..., float]) -> None:
    rows, codes, dim = (64, 512, 32) if SMOKE else (680, 4096, 32)
    g = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(rows, dim, generator=g), torch.randn(codes, dim, generator=g)
    logits, scale, sigma = 2 * torch.randn(rows, codes, generator=g), torch.rand(rows), 0.5 + torch.rand(rows)
    inputs = (x, codebook, logits, scale, sigma)
    peers = {
        OURS: lambda: ops.codebook_softmax_mean(*inputs),
        "torch softmax of an N x K matrix": lambda: reference.codebook_softmax_mean(*inputs),
    }
    assert torch.allclose(peers[peer](), peers[OURS](), atol=1e-4)
    group = f"mean of the codes under a softmax, {codes}x{dim}, N={rows}"
    measure(group, peer, peers[peer], flops=4 * rows * codes * dim)
