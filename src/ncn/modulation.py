"""Products with a control signal: one factor for a whole row of numbers, with a backward pass made for that shape.

Differentiating `x * factor[..., None]` as written goes over memory more often than needed, and four such products a
layer are most of what modulation costs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def scale(x: Float[Tensor, "*rows width"], factor: Float[Tensor, "*#rows"]) -> Float[Tensor, "*rows width"]:
    """x · factor, in the precision of `x`."""
    result: Tensor = _Scale.apply(x, factor)  # type: ignore[no-untyped-call]
    return result


def add_scaled(
    x: Float[Tensor, "*rows width"], written: Float[Tensor, "*rows width"], factor: Float[Tensor, "*#rows"] | None
) -> Float[Tensor, "*rows width"]:
    """x + factor · written in one pass, in the precision of `x`; a factor of None is 1."""
    if factor is None:
        return x + written
    result: Tensor = _AddScaled.apply(x, written, factor)  # type: ignore[no-untyped-call]
    return result


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor.unsqueeze(-1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grad_outputs
        x, factor = ctx.saved_tensors
        return grad * factor.unsqueeze(-1).to(grad.dtype), _factor_grad(grad, x, factor)


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, written: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(written, factor)
        return torch.addcmul(x, written.to(x.dtype), factor.unsqueeze(-1).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grad_outputs
        written, factor = ctx.saved_tensors
        written_grad = (grad * factor.unsqueeze(-1).to(grad.dtype)).to(written.dtype)
        return grad, written_grad, _factor_grad(grad, written, factor)


def _factor_grad(grad: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (grad * x).sum(-1, dtype=factor.dtype).sum_to_size(factor.shape)
