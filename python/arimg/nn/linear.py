"""Linear layers. The one place that decides how a matrix product runs."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` that goes through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C], weight [N, C], bias [N] -> x weight^T + bias [..., N]."""
    return F.linear(x, weight, bias)
