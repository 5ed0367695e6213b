"""What control signals do to a layer (equation 5): the factors that they come to, and the products with them.

Differentiating `x * factor` as written goes over memory more often than needed, and such products are most of what
modulation costs. Theirs is a backward pass made for one factor for a whole row of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ncn.core.types import Signal


class Factors(NamedTuple):
    """One layer's factors, each with a last axis of 1 for the row of numbers that it multiplies; None: no factor."""

    query: Float[Tensor, "batch tokens sites _"] | None
    """β, on the queries of every head or of all."""
    head: Float[Tensor, "batch tokens heads _"] | None
    """g · η, on the heads' outputs."""
    attention: Float[Tensor, "batch tokens _"] | None
    """g, on the attention's output where the heads' outputs do not carry it."""
    ffn: Float[Tensor, "batch tokens _"] | None
    """g · γ, on the feed-forward output."""
    attention_norm: Float[Tensor, "batch tokens groups _"] | None = None
    """ν, on the groups of channels of the attention's normalised input."""
    ffn_norm: Float[Tensor, "batch tokens groups _"] | None = None
    """ν, on those of the feed-forward block's."""


UNMODULATED = Factors(None, None, None, None)


def layer_factors(
    signals: Mapping[str, Signal], *, gain_on_heads: bool = True, dtype: torch.dtype | None = None
) -> list[Factors]:
    """The factors of every layer that the signals serve, worked out for all layers at once.

    `gain_on_heads`: let the heads' outputs carry the attention's gain where they are scaled anyway, which is the same
    if nothing but a linear projection without a bias lies between. `dtype` rounds the factors to what they multiply,
    which is otherwise done at each product, and keeps their gradients exact.
    """
    gain, precision = signals.get("gain"), signals.get("precision")
    head, ffn, film = signals.get("head_gate"), signals.get("ffn_gate"), signals.get("norm_film")
    attention, ffn_gain = (gain, gain) if gain is None or gain.ndim == 3 else gain.unbind(-1)
    if gain_on_heads and head is not None and attention is not None:
        # the output projection is linear, g · W(η o) = W(g η o), which saves a pass over memory
        head, attention = head * attention.unsqueeze(-1), None
    if ffn_gain is not None:
        ffn = ffn_gain if ffn is None else ffn_gain * ffn
    if precision is not None and precision.ndim == 3:
        precision = precision.unsqueeze(-1)
    norms = (None, None) if film is None else film.chunk(2, -1)
    layers = next(iter(signals.values())).shape[2]
    columns = (
        [None] * layers if factor is None else factor.to(dtype or factor.dtype).unsqueeze(-1).unbind(2)
        for factor in (precision, head, attention, ffn, *norms)
    )
    return [Factors(*row) for row in zip(*columns, strict=True)]


def scale(x: Float[Tensor, "*rows width"], factor: Float[Tensor, "*#rows #width"]) -> Float[Tensor, "*rows width"]:
    """x · factor, in the precision of `x`. (A factor as wide as the row is multiplied plainly.)"""
    if not torch.is_grad_enabled() or factor.shape[-1] != 1:
        return _scaled(x, factor)
    result: Tensor = _Scale.apply(x, factor)  # type: ignore[no-untyped-call]
    return result


def scale_groups(x: Float[Tensor, "*rows width"], factor: Tensor | None) -> Float[Tensor, "*rows width"]:
    """x with each of its groups of neighbouring channels scaled; `factor` is (*rows, groups, 1), and None is 1."""
    if factor is None:
        return x
    return scale(torch.unflatten(x, -1, (factor.shape[-2], -1)), factor).flatten(-2)


def add_scaled(
    x: Float[Tensor, "*rows width"], written: Float[Tensor, "*rows width"], factor: Float[Tensor, "*#rows 1"] | None
) -> Float[Tensor, "*rows width"]:
    """x + factor · written in one pass, in the precision of `x`; a factor of None is 1."""
    if factor is None:
        return x + written
    if not torch.is_grad_enabled():
        return _plus_scaled(x, written, factor)
    result: Tensor = _AddScaled.apply(x, written, factor)  # type: ignore[no-untyped-call]
    return result


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor.to(x.dtype)


def _plus_scaled(x: Tensor, written: Tensor, factor: Tensor) -> Tensor:
    return torch.addcmul(x, written.to(x.dtype), factor.to(x.dtype))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        rounded = factor.to(x.dtype)
        ctx.save_for_backward(x, rounded)
        ctx.exact = factor.dtype
        return x * rounded

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grad_outputs
        x, factor = ctx.saved_tensors
        return grad * factor, _factor_grad(grad, x, factor, ctx.exact)


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, written: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(written, factor.to(written.dtype))
        ctx.exact = factor.dtype
        return _plus_scaled(x, written, factor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grad_outputs
        written, factor = ctx.saved_tensors
        written_grad = grad.to(written.dtype)  # once: products of two precisions convert at every step
        return grad, written_grad * factor, _factor_grad(written_grad, written, factor, ctx.exact)


def _factor_grad(grad: Tensor, x: Tensor, factor: Tensor, exact: torch.dtype) -> Tensor:
    return (grad * x).sum(-1, keepdim=True, dtype=exact).sum_to_size(factor.shape)
