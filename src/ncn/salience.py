"""Causal salience pooling (equation 1): a learned, decaying average of the prefix, one for each pooling head.

The state of a head after a token is the pair (log-denominator L, mean c). It says the same as (running max,
denominator, weighted sum) and is shorter, because the mean is what is wanted and L is stable by itself. Two facts make
the whole module one page:

- *merging* two stretches of text is a weighted mean of their means, with weights exp L;
- a stretch therefore behaves like *one token* whose score is its L and whose value is its mean.

So a long sequence is cut into chunks, every chunk is pooled on its own, the chunks are pooled as if they were tokens,
and each position merges its own chunk's prefix with what came before. One token is the shortest sequence: decoding
runs the same function as training.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK = 16
"""Tokens pooled by one small matrix. Work grows with it, the number of merges falls: 16 measured best on CPU."""


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
    batch, tokens, pools = scores.shape
    if tokens == 1:
        local = SalienceState(scores, values, segments)
        return local if past is None else _merge(past, local, decay)

    size = min(CHUNK, tokens)
    chunks = -(-tokens // size)
    padding = chunks * size - tokens
    if padding:  # the padded tail lies after every real token: nothing real ever sees it
        scores, values = F.pad(scores, (0, 0, 0, padding)), F.pad(values, (0, 0, 0, 0, 0, padding))
        segments = None if segments is None else F.pad(segments, (0, padding))
    scores = scores.reshape(batch * chunks, size, pools)
    values = values.reshape(batch * chunks, size, pools, -1)
    chunk_segments = None if segments is None else segments.reshape(batch * chunks, size)
    inside = _pool_chunk(scores, values, decay, chunk_segments)

    def whole(x: Tensor) -> Tensor:
        return x.reshape(batch, chunks * size, *x.shape[2:])[:, :tokens]

    if chunks == 1:
        before = past
    else:
        last = SalienceState(
            inside.log_weight[:, -1].reshape(batch, chunks, pools),
            inside.mean[:, -1].reshape(batch, chunks, pools, -1),
            None if chunk_segments is None else chunk_segments[:, -1].reshape(batch, chunks),
        )
        carried = pool(last.log_weight, last.mean, decay * size, last.segment, past)
        before = _shift(carried, past)
    if before is None:
        return SalienceState(
            whole(inside.log_weight), whole(inside.mean), None if segments is None else segments[:, :tokens]
        )
    steps = torch.arange(1, size + 1, device=scores.device, dtype=scores.dtype)
    before = SalienceState(
        before.log_weight.reshape(-1, 1, pools),
        before.mean.reshape(-1, 1, *before.mean.shape[2:]),
        None if before.segment is None else before.segment.reshape(-1, 1),
    )
    merged = _merge(before, inside, steps[None, :, None] * decay)
    return SalienceState(
        whole(merged.log_weight), whole(merged.mean), None if merged.segment is None else whole(merged.segment)
    )


def _pool_chunk(scores: Tensor, values: Tensor, decay: Tensor, segments: Tensor | None) -> SalienceState:
    """Pool short sequences directly: the weights of all pairs (t, s) as one matrix per head."""
    size = scores.shape[1]
    age = torch.arange(size, device=scores.device)[:, None] - torch.arange(size, device=scores.device)
    hidden = age < 0
    # (batch, pools, t, s); an infinite age is an age that weighs nothing
    penalty = (decay[:, None, None] * age).masked_fill(hidden, math.inf)
    log_weights = scores.transpose(1, 2)[:, :, None, :] - penalty
    if segments is not None:
        log_weights = log_weights.masked_fill((segments[:, :, None] != segments[:, None, :])[:, None], -math.inf)
    log_shares = torch.log_softmax(log_weights, dim=-1)
    mean = log_shares.exp() @ values.transpose(1, 2)
    # a position's own share is exp(a_t − L_t), so the denominators need no second reduction
    own = log_shares.diagonal(dim1=-2, dim2=-1).transpose(1, 2)
    return SalienceState(scores - own, mean.transpose(1, 2), segments)


def _merge(before: SalienceState, inside: SalienceState, fading: Tensor) -> SalienceState:
    """Join what came before (the same for all positions) with each position's own part; `fading` is ρ times the age."""
    old = before.log_weight - fading
    if inside.segment is not None and before.segment is not None:
        old = old.masked_fill((inside.segment != before.segment)[..., None], -math.inf)
    # sigmoid(L_old - L_new) is the old part's share of the joint weight
    share = torch.sigmoid(old - inside.log_weight)[..., None]
    return SalienceState(
        torch.logaddexp(old, inside.log_weight),
        torch.lerp(inside.mean, before.mean.expand_as(inside.mean), share),
        inside.segment,
    )


def _shift(carried: SalienceState, past: SalienceState | None) -> SalienceState:
    """The state before each chunk: the one after the chunk before it; `past`, or nothing at all, before the first."""
    weight, mean, segment = carried
    first_weight = torch.full_like(weight[:, :1], -math.inf) if past is None else past.log_weight
    first_mean = torch.zeros_like(mean[:, :1]) if past is None else past.mean
    if segment is not None:
        assert past is None or past.segment is not None
        first = torch.zeros_like(segment[:, :1]) if past is None or past.segment is None else past.segment
        segment = torch.cat([first, segment[:, :-1]], 1)
    return SalienceState(
        torch.cat([first_weight, weight[:, :-1]], 1), torch.cat([first_mean, mean[:, :-1]], 1), segment
    )
