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

from ncn.config.signals import SIGNALS, SITES, SignalSpec
from ncn.core.types import Signal


class Factors(NamedTuple):
    """What the signals come to at every site of one layer, each with a last axis of 1 for the row of numbers that it
    multiplies; None: nothing acts there. The names are those of `ncn.config.signals.SITES`."""

    residual: Float[Tensor, "batch tokens _"] | None = None
    """μ, of the normalised embeddings that are added to the residual stream before the layer."""
    attention_norm: Float[Tensor, "batch tokens groups _"] | None = None
    """ν, on the groups of channels of the attention's normalised input."""
    query: Float[Tensor, "batch tokens sites _"] | None = None
    """β, on the queries of every head or of all."""
    head: Float[Tensor, "batch tokens heads _"] | None = None
    """g · η, on the heads' outputs."""
    attention: Float[Tensor, "batch tokens _"] | None = None
    """g, on the attention's output where the heads' outputs do not carry it."""
    ffn_norm: Float[Tensor, "batch tokens groups _"] | None = None
    """ν, on the groups of channels of the feed-forward block's normalised input."""
    ffn: Float[Tensor, "batch tokens _"] | None = None
    """g · γ, on the feed-forward output."""


UNMODULATED = Factors()


def layer_factors(
    signals: Mapping[str, Signal], *, gain_on_heads: bool = True, dtype: torch.dtype | None = None
) -> list[Factors]:
    """The factors of every layer that the signals serve, worked out for all layers at once.

    `gain_on_heads`: let the heads' outputs carry the attention's gain where they are scaled anyway, which is the same
    if nothing but a linear projection without a bias lies between. `dtype` rounds the factors to what they multiply,
    which is otherwise done at each product, and keeps their gradients exact.
    """
    acting: dict[str, list[Tensor]] = {}
    for name, row in SIGNALS.items():
        if name in signals:
            for site, values in zip(row.sites, _values_at_sites(row, signals[name]), strict=True):
                acting.setdefault(site, []).append(values)
    factors: dict[str, Tensor] = {}
    for site in SITES:
        if site in acting:
            factor, *others = acting[site]
            for other in others:
                factor = factor + other if SITES[site].adds else factor * other
            factors[site] = factor
            if site == "attention" and gain_on_heads and "head" in factors:
                # the output projection is linear, g · W(η o) = W(g η o), which saves a pass over memory
                factors["head"] = factors["head"] * factors.pop("attention").unsqueeze(-1)
    layers = next(iter(signals.values())).shape[2]
    columns = (
        factors[site].to(dtype or factors[site].dtype).unsqueeze(-1).unbind(2) if site in factors else [None] * layers
        for site in Factors._fields
    )
    return [Factors(*row) for row in zip(*columns, strict=True)]


def _values_at_sites(row: SignalSpec, signal: Signal) -> list[Tensor]:
    """A signal as it acts at each of its sites: (batch, tokens, layers), and a last axis where a site has parts.

    One value for a layer, and values for its heads, are the same at every site; of others each site has its share.
    """
    parts = row.parts
    if signal.ndim == 3:
        return [signal.unsqueeze(-1) if part else signal for part in parts]
    if "heads" in parts:
        return [signal] * len(parts)
    return list(signal.chunk(len(parts), -1) if parts[0] else signal.unbind(-1))


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
