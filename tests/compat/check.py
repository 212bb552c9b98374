"""Run with any torch >= 2.10 beside an installed wheel: runs the CPU operators, looks for the CUDA ones."""

from __future__ import annotations

import torch

import arimg
from arimg import _library, layout, ops, reference


def main() -> None:
    print(arimg.show_config())
    assert _library.problem() is None, _library.problem()
    torch.manual_seed(0)

    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("arimg::"))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cuda = [n for n in names if has(n, "CUDA")]
    assert names and all(has(n, "CPU") and has(n, "Meta") for n in names)
    assert on_cuda == (names if _library.cuda_usable() else []), set(names) - set(on_cuda)

    x, codes = torch.randn(500, 32), torch.randn(300, 32)
    assert torch.equal(ops.nearest_code(x, codes), reference.nearest_code(x, codes))
    maps = torch.randn(2, 8, 13, 16)
    assert torch.allclose(ops.area_down(maps, (5, 4)), reference.area_down(maps, (5, 4)), atol=1e-5)
    tokens, m = torch.randn(2, 7, 96), torch.randn(2, 1, 96)
    assert torch.allclose(ops.norm_modulate(tokens, m, m), reference.norm_modulate(tokens, m, m), atol=1e-4)
    rows = layout.Layout.scales((1, 2, 4)).intervals("level-causal")
    q, k, v = torch.randn(3, 2, 4, 21, 64)
    ours, oracle = (
        ops.row_interval_attention(q, k, v, *rows),
        reference.row_interval_attention(q, k, v, *rows),
    )
    assert torch.allclose(ours, oracle, atol=1e-5)
    logits = torch.randn(64, 1000)
    kept = dict(top_k=50, top_p=0.9, seed=3)
    assert torch.equal(ops.sample(logits, **kept), reference.sample(logits, **kept))
    torch.library.opcheck(torch.ops.arimg.norm_modulate, (tokens, m, m, 1e-6))
    print(f"torch {torch.__version__}: {len(names)} operators on CPU, {len(on_cuda)} for CUDA: ok")


if __name__ == "__main__":
    main()
