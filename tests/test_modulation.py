"""The products with a control signal: values, gradients and precision."""

import pytest
import torch

from ncn.modulation import add_scaled, scale


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("factor_shape", [(2, 3, 4), (2, 3, 1), (1, 3, 4)])
def test_scale_multiplies_rows_and_differentiates(factor_shape: tuple[int, ...]) -> None:
    x, factor = leaf(2, 3, 4, 5), leaf(*factor_shape)
    torch.testing.assert_close(scale(x, factor), x * factor[..., None])
    assert torch.autograd.gradcheck(scale, (x, factor))


@pytest.mark.parametrize("factor_shape", [(2, 3), (1, 3)])
def test_add_scaled_adds_rows_and_differentiates(factor_shape: tuple[int, ...]) -> None:
    x, written, factor = leaf(2, 3, 5), leaf(2, 3, 5), leaf(*factor_shape)
    torch.testing.assert_close(add_scaled(x, written, factor), x + factor[..., None] * written)
    assert torch.autograd.gradcheck(add_scaled, (x, written, factor))


def test_without_a_factor_the_written_part_is_added_as_it_is() -> None:
    x, written = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(add_scaled(x, written, None), x + written)
    assert torch.equal(add_scaled(x, written, torch.ones(2, 3)), x + written)


def test_a_gain_just_above_one_is_not_rounded_away_by_a_bfloat16_sublayer() -> None:
    written = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    added = add_scaled(torch.zeros(1, 1, 4), written, torch.full((1, 1), 1 + 2**-10))
    assert added.tolist() == [[[1 + 2**-10] * 4]]


def test_gradients_keep_the_precision_of_their_inputs() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    factor = torch.rand(2, 3, requires_grad=True)
    scale(x, factor).float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(factor.grad, x.detach().float().sum(-1), atol=0.05, rtol=0.01)
