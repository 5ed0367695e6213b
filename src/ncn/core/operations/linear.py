"""Linear maps that read their matrix at the memory's speed when there are only a few rows to multiply: in decoding.

The library behind a matrix product reads a matrix from memory at a third of the possible speed on AMD's processors
(float32, one to three rows), unless it is handed over as a batch of smaller ones. On Intel's it reads at full speed,
and such a batch at half of that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncn.machine.devices import MADE_BY_AMD

FEW_ROWS = 3
_SMALL = 3 << 14
"""Numbers of a matrix that is in the processor's cache soon enough either way."""


class Linear(nn.Linear):
    """As torch's own; the numbers may differ in the last bits between few rows and many."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def exact_dtype(weight: Tensor) -> torch.dtype:
    """Float32, or float64 for a weight of that."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def linear_like(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer's map in the precision of x, whatever that of its weights."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over the last axis, as `torch.nn.functional.linear`."""
    rows, columns = weight.shape
    if (
        torch.is_grad_enabled()
        or x.numel() > FEW_ROWS * columns
        or weight.numel() < _SMALL
        or weight.dtype != torch.float32
        or x.dtype != torch.float32
        or not weight.is_cpu
        or torch.is_autocast_enabled("cpu")
        or not MADE_BY_AMD
        or (blocks := _blocks(rows)) == 1
    ):
        return F.linear(x, weight, bias)
    # Seen as a transposed matrix, the few rows need not be copied for the product.
    few = x.reshape(-1, columns).t().expand(blocks, columns, -1)
    product = torch.bmm(torch.unflatten(weight, 0, (blocks, -1)), few).view(rows, -1).t().reshape(*x.shape[:-1], rows)
    return product if bias is None else product + bias


def _blocks(rows: int) -> int:
    """Into how many equal parts to cut that many rows: a few, if they can be cut at all."""
    return next((parts for parts in range(4, 64) if rows % parts == 0), 1)
