"""Causal salience pooling (equation 1): a learned, decaying average of the prefix, one for each pooling head.

The state of a head after a token is the pair (log-denominator L, mean c). It says the same as (running max,
denominator, weighted sum) and is shorter, because the mean is what is wanted and L is stable by itself. A token of
score a and value v changes it by

    L' = log(exp(L − ρ) + exp a)        c' = f c + (1 − f) v        f = exp(L − ρ − L'), the share that is kept

and a document that begins forgets all before it: ρ is infinite there, and f is 0. Both are recurrences of the form
y' = x + f y, the first one in logarithms; the backward pass is two more, from the end to the beginning. `_scan` runs
them all, at many places of a text at once. Decoding makes the two steps of one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK = 16
"""Steps that a scan makes one after the other, in all chunks of a text at once. On CPU 8 to 32 take equally long."""


class SalienceState(NamedTuple):
    """What the pooling knows of a prefix. Given for every position, so that a cache can be cropped to any of them."""

    log_weight: Float[Tensor, "batch tokens pools"]
    mean: Float[Tensor, "batch tokens pools values"]
    segment: Int[Tensor, "batch tokens"] | None


def pool(
    scores: Float[Tensor, "batch tokens pools"],
    values: Float[Tensor, "batch tokens pools values"],
    decay: Float[Tensor, " pools"],
    segments: Int[Tensor, "batch tokens"] | None = None,
    past: SalienceState | None = None,
) -> SalienceState:
    """Equation (1) at every position.

    `scores` are the a of the equation, `decay` the ρ (per token). Where `segments` is given, a position pools over its
    own segment only, so each document starts with a fresh state. `past` is the state just before the first position
    (one position long) and continues it.
    """
    single = scores.shape[1] == 1
    if past is None:
        if single:
            return SalienceState(scores, values, segments)
        nothing = torch.full_like(scores[:, :1], -math.inf)
        past = SalienceState(nothing, torch.zeros_like(values[:, :1]), None if segments is None else segments[:, :1])
    fading = decay.expand_as(scores)
    if segments is not None:
        assert past.segment is not None
        goes_on = segments == (past.segment if single else _delayed(segments, past.segment))
        fading = torch.where(goes_on[..., None], fading, math.inf)
    if single:  # the recurrences as they are, in few operations
        old = past.log_weight - fading
        mean = torch.lerp(values, past.mean, torch.sigmoid(old - scores)[..., None])
        return SalienceState(torch.logaddexp(old, scores), mean, segments)
    arguments = scores, values, fading, past.log_weight, past.mean
    if torch.is_grad_enabled():
        log_weight, mean = _Pool.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        log_weight, mean, _, _ = _pool(*arguments)
    return SalienceState(log_weight, mean, segments)


def _pool(
    scores: Tensor, values: Tensor, fading: Tensor, past_weight: Tensor, past_mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L and c, and the shares of either that are kept and new, which add up to 1."""
    log_weight = _scan(_LOGARITHMIC, -fading, scores, past_weight)
    old = _delayed(log_weight, past_weight) - fading
    kept, new = torch.sigmoid(old - scores)[..., None], torch.sigmoid(scores - old)[..., None]
    return log_weight, _scan(_PLAIN, kept, new * values, past_mean), kept, new


class _Pool(torch.autograd.Function):
    """Differentiated as written, a scan would go over its steps one by one, and keep them all."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        log_weight, mean, kept, new = _pool(*arguments)
        ctx.save_for_backward(arguments[1], mean, kept, new)
        return log_weight, mean

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        weight_grad, mean_grad = grad_outputs
        values, mean, kept, new = ctx.saved_tensors
        # what comes after a state hands back to it the share that it kept
        mean_grad = _scan_back(kept, mean_grad)
        products = mean_grad * (values - mean)
        turned = new * torch.mv(products.flatten(0, -2), products.new_ones(products.shape[-1])).view(new.shape)
        weight_grad = _scan_back(kept, weight_grad[..., None] - _advanced(turned))
        score_grad, old_grad = new * weight_grad + turned, kept * weight_grad - turned
        return (
            score_grad.squeeze(-1),
            new * mean_grad,
            -old_grad.squeeze(-1),
            old_grad[:, :1].squeeze(-1),
            kept[:, :1] * mean_grad[:, :1],
        )


class _Arithmetic(NamedTuple):
    """How a scan calculates."""

    step: Callable[[Tensor, Tensor, Tensor], object]
    """Adds to the first tensor, in place, what the third one carries over with the factor of the second."""
    multiply: Callable[[Tensor, Tensor], object]
    """Multiplies the first factor, in place, by the second."""


_PLAIN = _Arithmetic(lambda states, factor, before: states.addcmul_(factor, before), Tensor.mul_)
_LOGARITHMIC = _Arithmetic(
    lambda states, factor, before: torch.logaddexp(states, factor + before, out=states), Tensor.add_
)


def _scan(arithmetic: _Arithmetic, carried: Tensor, added: Tensor, first: Tensor) -> Tensor:
    """y of y[t] = added[t] + carried[t] · y[t−1] along axis 1, y[−1] being `first`; in logarithms, of its logarithm.

    A chunk's steps are made from nothing, one after the other and in all chunks at once; then the last states of the
    chunks are scanned in the same way, and what each chunk began with is added to all its states.
    """
    tokens = added.shape[1]
    size = min(CHUNK, tokens)
    chunks = -(-tokens // size)

    def cut(x: Tensor) -> Tensor:  # a copy, (size, batch, chunks, ...); what pads the end lies after all that is real
        if padding := chunks * size - tokens:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
        return torch.unflatten(x, 1, (chunks, size)).movedim(2, 0).clone(memory_format=torch.contiguous_format)

    states, products = cut(added), cut(carried)
    rows, factors = states.unbind(0), products.unbind(0)
    for index in range(1, size):
        arithmetic.step(rows[index], factors[index], rows[index - 1])
        arithmetic.multiply(factors[index], factors[index - 1])
    before = first if chunks == 1 else _delayed(_scan(arithmetic, factors[-1], rows[-1], first), first)
    arithmetic.step(states, products, before)
    return states.movedim(0, 2).flatten(1, 2)[:, :tokens]


def _scan_back(kept: Tensor, grad: Tensor) -> Tensor:
    """y of y[t] = grad[t] + kept[t+1] · y[t+1]."""
    return _scan(_PLAIN, _advanced(kept).flip(1), grad.flip(1), torch.zeros_like(grad[:, :1])).flip(1)


def _delayed(x: Tensor, first: Tensor) -> Tensor:
    """At each position what stands one before it, and `first` at the first."""
    return torch.cat([first, x[:, :-1]], 1)


def _advanced(x: Tensor) -> Tensor:
    """At each position what stands one after it, and 0 at the last."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
