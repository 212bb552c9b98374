"""Key/value cache writes in plain torch: the oracle of `arimg.ops.kv_cache`."""

import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide


def split_qk_norm(qkv: Tensor, q_scale: Tensor | None, l2_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, L, 3, H, D] -> q, k, v [B, H, L, D]; with l2_norm q and k have length 1 per head and q is
    scaled.

    q_scale [H] multiplies the normalised queries. Differentiable.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if l2_norm:
        q, k = (F.normalize(wide(t), dim=-1, eps=1e-12) for t in (q, k))
        if q_scale is not None:
            q = q * wide(q_scale)[:, None, None]
    return q.to(qkv.dtype), k.to(qkv.dtype), v


def append_qk_norm_(
    k_cache: Tensor, v_cache: Tensor, qkv: Tensor, start: int, q_scale: Tensor | None, l2_norm: bool
) -> Tensor:
    """Write the keys and values of new tokens at positions [start, start + L) and return their queries.

    k_cache, v_cache [B, H, Lmax, D], qkv [B, L, 3, H, D] -> q [B, H, L, D]; see `split_qk_norm`.
    """
    q, k, v = split_qk_norm(qkv, q_scale, l2_norm)
    k_cache[:, :, start : start + qkv.shape[1]] = k
    v_cache[:, :, start : start + qkv.shape[1]] = v
    return q.contiguous()
