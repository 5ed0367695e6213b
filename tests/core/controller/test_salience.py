"""Salience pooling: equation (1) for any length, any documents, and however the text is cut into calls."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ncn.core.controller.salience import CHUNK, SalienceState, pool

POOLS, VALUES = 2, 3
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def inputs(tokens: int, batch: int = 2, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(batch, tokens, POOLS, generator=generator, dtype=torch.float64)
    values = torch.randn(batch, tokens, POOLS, VALUES, generator=generator, dtype=torch.float64)
    return scores, values, torch.tensor([0.0, 0.3], dtype=torch.float64)


def by_definition(scores: Tensor, values: Tensor, decay: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-denominator and mean of equation (1), one position at a time."""
    logs, means = torch.empty_like(scores), torch.empty_like(values)
    for row in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            seen = [s for s in range(t + 1) if segments is None or segments[row, s] == segments[row, t]]
            for p in range(POOLS):
                weights = torch.stack([(scores[row, s, p] - decay[p] * (t - s)).exp() for s in seen])
                logs[row, t, p] = weights.sum().log()
                means[row, t, p] = (weights[:, None] * values[row, seen, p]).sum(0) / weights.sum()
    return logs, means


def in_calls(scores: Tensor, values: Tensor, decay: Tensor, segments: Tensor | None, cuts: list[int]) -> SalienceState:
    tokens, past, parts = scores.shape[1], None, []
    for start, end in zip([0, *cuts], [*cuts, tokens], strict=True):
        part = None if segments is None else segments[:, start:end]
        state = pool(scores[:, start:end], values[:, start:end], decay, part, past)
        parts.append(state)
        last = None if state.segment is None else state.segment[:, -1:]
        past = SalienceState(state.log_weight[:, -1:], state.mean[:, -1:], last)
    return SalienceState(
        torch.cat([part.log_weight for part in parts], 1),
        torch.cat([part.mean for part in parts], 1),
        None if segments is None else torch.cat([part.segment for part in parts], 1),
    )


@st.composite
def texts(draw: st.DrawFn) -> tuple[int, Tensor | None, list[int]]:
    """A number of tokens, the segments of two rows (or none), and where the text is cut into calls."""
    tokens = draw(st.integers(1, 3 * CHUNK + 2))
    places = st.sets(st.integers(0, tokens - 1), max_size=5)
    segments = None
    if draw(st.booleans()):
        borders = torch.zeros(2, tokens, dtype=torch.long)
        for row in range(2):
            borders[row, sorted(draw(places))] = 1
        segments = borders.cumsum(1)
    return tokens, segments, sorted(draw(places) - {0})


@settings(max_examples=60)
@given(texts())
def test_any_text_in_any_calls_is_equation_1(text: tuple[int, Tensor | None, list[int]]) -> None:
    tokens, segments, cuts = text
    scores, values, decay = inputs(tokens, seed=tokens)
    state = in_calls(scores, values, decay, segments, cuts)
    log_weight, mean = by_definition(scores, values, decay, segments)
    torch.testing.assert_close(state.log_weight, log_weight, **EXACT)
    torch.testing.assert_close(state.mean, mean, **EXACT)
    assert segments is None or torch.equal(state.segment, segments)


@pytest.mark.parametrize("tokens", [CHUNK * CHUNK, CHUNK * CHUNK + 1, 2 * CHUNK * CHUNK + 5])
def test_chunks_of_chunks(tokens: int) -> None:
    scores, values, decay = inputs(tokens, batch=1)
    segments = (torch.arange(tokens) > 200).long()[None]
    for given_segments in (None, segments):
        once = pool(scores, values, decay, given_segments)
        weights = scores - decay * -torch.arange(tokens, dtype=torch.float64)[None, :, None]
        start = 201 if given_segments is not None else 0
        kept = slice(start, tokens)
        total = torch.logsumexp(weights[:, kept], 1)
        mean = ((weights[:, kept] - total).exp()[..., None] * values[:, kept]).sum(1)
        torch.testing.assert_close(once.mean[:, -1], mean, **EXACT)


def test_a_constant_is_its_own_mean() -> None:
    scores, values, decay = inputs(40, scale=5)
    torch.testing.assert_close(pool(scores, torch.full_like(values, 3.5), decay).mean, torch.full_like(values, 3.5))


def test_without_scores_and_decay_the_mean_is_the_plain_one() -> None:
    _, values, _ = inputs(40)
    state = pool(torch.zeros(2, 40, POOLS, dtype=torch.float64), values, torch.zeros(POOLS, dtype=torch.float64))
    counts = torch.arange(1, 41, dtype=torch.float64)
    torch.testing.assert_close(state.mean, values.cumsum(1) / counts[:, None, None], **EXACT)
    torch.testing.assert_close(state.log_weight, counts.log()[None, :, None].expand(2, -1, POOLS), **EXACT)


def test_strong_decay_keeps_the_last_token_only() -> None:
    scores, values, _ = inputs(40)
    state = pool(scores, values, torch.full((POOLS,), 1e4, dtype=torch.float64))
    torch.testing.assert_close(state.mean, values, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_scores_stay_finite(dtype: torch.dtype) -> None:
    scores, values, decay = (part.to(dtype) for part in inputs(3 * CHUNK, scale=3000.0))
    scores.requires_grad_()
    values.requires_grad_()
    segments = torch.zeros(2, 3 * CHUNK, dtype=torch.long)
    segments[:, 20:] = 1
    for given_segments in (None, segments):
        state = pool(scores, values, decay, given_segments)
        assert state.mean.abs().max() <= values.abs().max() * 1.001
        gradients = torch.autograd.grad(state.mean.square().sum() + state.log_weight.sum(), (scores, values))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients() -> None:
    scores, values, decay = inputs(CHUNK + 3, batch=1)
    segments = torch.tensor([[0] * 5 + [1] * (CHUNK - 2)])
    decay = torch.tensor([0.05, 0.3], dtype=torch.float64)
    arguments = tuple(part.clone().requires_grad_() for part in (scores, values, decay))

    def both(scores: Tensor, values: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        state = pool(scores, values, decay, segments)
        return state.log_weight, state.mean

    assert torch.autograd.gradcheck(both, arguments)


def test_long_texts_in_float32_agree_with_float64() -> None:
    scores, values, decay = inputs(2000, batch=1)
    exact, rough = pool(scores, values, decay), pool(scores.float(), values.float(), decay.float())
    torch.testing.assert_close(rough.mean.double(), exact.mean, rtol=1e-4, atol=1e-5)
    assert exact.log_weight[0, -1, 0] > math.log(2000)
