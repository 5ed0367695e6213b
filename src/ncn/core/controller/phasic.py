"""The local state (φ of equation 2): a causal convolution over the last few tokens, with a filter for each channel.

φ_t = Σ_age filter[age] · x[t − age]        over the ages that reach no further back than the token's document
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def convolve(
    inputs: Float[Tensor, "batch tokens channels"],
    filters: Float[Tensor, "ages channels"],
    segments: Int[Tensor, "batch tokens"] | None = None,
    past: Float[Tensor, "batch before channels"] | None = None,
    past_segments: Int[Tensor, "batch before"] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """φ at every position.

    `past` are the last inputs before the first one: all that there are, or at least as many as the filters reach back.
    Where `segments` are given, nothing reaches beyond its own, and those of `past` are needed as well.
    """
    tokens, ages = inputs.shape[1], filters.shape[0]
    known = inputs if past is None else torch.cat([past, inputs], 1)
    if segments is not None:
        known_segments = segments if past_segments is None else torch.cat([past_segments, segments], 1)
    if tokens == 1:  # in decoding, one product for all ages
        window = known[:, -ages:]
        if segments is not None:
            window = window * torch.eq(known_segments[:, -ages:], segments).unsqueeze(-1)
        return (window * filters[: window.shape[1]].flip(0)).sum(1, keepdim=True)
    masks = []
    if segments is not None:
        for _, now, old in _reaches(known.shape[1], tokens, ages):
            masks.append(torch.eq(known_segments[:, old], segments[:, now]).unsqueeze(-1).to(inputs.dtype))
    if not torch.is_grad_enabled():
        return _convolve(known, filters, tokens, masks)
    result: Tensor = _Convolution.apply(known, filters, tokens, *masks)  # type: ignore[no-untyped-call]
    return result


def _reaches(known: int, tokens: int, ages: int) -> Iterator[tuple[int, slice, slice]]:
    """For every age but 0: the positions that have something as old as that, and where among the `known` it lies."""
    before = known - tokens
    for age in range(1, min(ages, known)):
        first = max(age - before, 0)
        yield age, slice(first, tokens), slice(before + first - age, known - age)


def _convolve(known: Tensor, filters: Tensor, tokens: int, masks: list[Tensor]) -> Tensor:
    result = known[:, known.shape[1] - tokens :] * filters[0]
    for age, now, old in _reaches(known.shape[1], tokens, len(filters)):
        reached = known[:, old] * masks[age - 1] if masks else known[:, old]
        result[:, now].addcmul_(reached, filters[age])
    return result


class _Convolution(torch.autograd.Function):
    """Differentiated as written, every age would have a full gradient of its own, made of zeros and copied."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, filters: Tensor, tokens: int, *masks: Tensor) -> Tensor:
        ctx.save_for_backward(known, filters, *masks)
        ctx.tokens = tokens
        return _convolve(known, filters, tokens, list(masks))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        known, filters, *masks = ctx.saved_tensors
        length, tokens = known.shape[1], ctx.tokens
        before = length - tokens
        newest = grad * filters[0]
        known_grad = newest if not before else torch.cat([torch.zeros_like(known[:, :before]), newest], 1)
        filter_grads = [(grad * known[:, before:]).sum((0, 1))]
        for age, now, old in _reaches(length, tokens, len(filters)):
            reaching = grad[:, now] * masks[age - 1] if masks else grad[:, now]
            known_grad[:, old].addcmul_(reaching, filters[age])
            filter_grads.append((reaching * known[:, old]).sum((0, 1)))
        filter_grads += [torch.zeros_like(filters[0])] * (len(filters) - len(filter_grads))
        return known_grad, torch.stack(filter_grads), None, *[None] * len(masks)
