"""The memory of key/value caches: pages, taken once and handed out to rows, which may share them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ONE_BYTE = (torch.int8, torch.float8_e4m3fn)


class PagePool:
    """k and v [pages, heads, page_size, head_dim], with float32 factors [pages, heads, page_size] for int8
    and float8_e4m3fn, and a count of the rows that hold each page.
    """

    def __init__(
        self, pages: int, heads: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (pages, heads, page_size, head_dim)
        # Zeros: a place that is read before it is written, masked out, must hold no NaN by chance.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if dtype in ONE_BYTE:
            self.k_scale = torch.zeros(shape[:3], dtype=torch.float32, device=device)
            self.v_scale = torch.zeros(shape[:3], dtype=torch.float32, device=device)
        self.holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))  # the lowest is handed out first

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None]

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def hold(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._free.append(page)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Contents of pages onto other pages."""
        if not source:
            return
        there, here = (torch.tensor(p).to(self.k.device, non_blocking=True) for p in (target, source))
        for t in self.tensors:
            indexable(t)[there] = indexable(t)[here]

    def clear(self, pages: Sequence[int], offsets: Sequence[int]) -> None:
        """Zeros at single tokens."""
        if not pages:
            return
        page, offset = (torch.tensor(p).to(self.k.device, non_blocking=True) for p in (pages, offsets))
        for t in self.tensors:
            indexable(t)[page, :, offset] = 0


def indexable(t: Tensor) -> Tensor:
    """The same bytes under a dtype that torch can index."""
    return t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t
