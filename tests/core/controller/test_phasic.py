"""The short convolution against its definition, token by token."""

import pytest
import torch
from torch import Tensor

from ncn.core.controller.phasic import convolve

ROWS, CHANNELS = 2, 3


def written_out(inputs: Tensor, filters: Tensor, segments: Tensor | None) -> Tensor:
    """φ of every token of a whole text."""
    rows = []
    for row in range(len(inputs)):
        found = []
        for t in range(inputs.shape[1]):
            total = torch.zeros_like(inputs[0, 0])
            for age in range(min(len(filters), t + 1)):
                if segments is None or segments[row, t] == segments[row, t - age]:
                    total = total + filters[age] * inputs[row, t - age]
            found.append(total)
        rows.append(torch.stack(found))
    return torch.stack(rows)


def example(tokens: int, ages: int, documents: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(tokens + ages)
    inputs = torch.randn(ROWS, tokens, CHANNELS, generator=generator, dtype=torch.float64)
    filters = torch.randn(ages, CHANNELS, generator=generator, dtype=torch.float64)
    segments = (torch.rand(ROWS, tokens, generator=generator) < 0.3).long().cumsum(1) if documents else None
    return inputs.requires_grad_(), filters.requires_grad_(), segments


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("ages", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_values_and_gradients(tokens: int, ages: int, documents: bool) -> None:
    inputs, filters, segments = example(tokens, ages, documents)
    expected, found = written_out(inputs, filters, segments), convolve(inputs, filters, segments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    wanted, got = (torch.autograd.grad((x * weights).sum(), [inputs, filters]) for x in (expected, found))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(convolve(inputs, filters, segments), found)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("ages", [1, 2, 4])
@pytest.mark.parametrize("parts", [[1] * 9, [2, 1, 6], [1, 3, 5], [5, 4]])
def test_a_text_in_parts_is_the_text_in_one(parts: list[int], ages: int, documents: bool) -> None:
    inputs, filters, segments = example(sum(parts), ages, documents)
    found, start = [], 0
    for part in parts:
        held = slice(max(start - ages + 1, 0), start)
        now = slice(start, start + part)
        past = inputs[:, held] if start else None
        places = (None, None) if segments is None else (segments[:, now], segments[:, held] if start else None)
        found.append(convolve(inputs[:, now], filters, places[0], past, places[1]))
        start += part
    whole = convolve(inputs, filters, segments)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(whole)
    got, wanted = (torch.autograd.grad((x * weights).sum(), [inputs, filters]) for x in (torch.cat(found, 1), whole))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
