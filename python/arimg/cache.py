"""State that a generator carries from step to step."""

import torch
from torch import Tensor

from arimg import ops


class KVCache:
    """Keys and values of all tokens so far, [batch, heads, capacity, head_dim], filled from the front.

    Memory is taken once. `append` writes a block of tokens and returns its queries; `truncate` forgets the
    newest.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, heads, capacity, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, qkv: Tensor, q_scale: Tensor | None = None, l2_norm: bool = False) -> Tensor:
        """Store the keys and values of qkv [B, L, 3, H, D] and return its queries [B, H, L, D].

        l2_norm: queries and keys get length 1 per head, and the queries are then scaled by q_scale [H].
        """
        end = self.length + qkv.shape[1]
        if end > self.capacity:
            raise ValueError(
                f"expected at most {self.capacity - self.length} more tokens in a cache of {self.capacity}, "
                f"got {qkv.shape[1]}"
            )
        q = ops.append_qk_norm_(self.k, self.v, qkv, self.length, q_scale, l2_norm)
        self.length = end
        return q

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"expected a length of 0..{self.length}, got {length}")
        self.length = length
