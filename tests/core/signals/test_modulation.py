"""The products with a control signal: values, gradients and precision."""

import pytest
import torch

from ncn.core.signals.modulation import UNMODULATED, add_scaled, layer_factors, scale


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("factor_shape", [(2, 3, 4, 1), (2, 3, 1, 1), (1, 3, 4, 1)])
def test_scale_multiplies_rows_and_differentiates(factor_shape: tuple[int, ...]) -> None:
    x, factor = leaf(2, 3, 4, 5), leaf(*factor_shape)
    torch.testing.assert_close(scale(x, factor), x * factor)
    assert torch.autograd.gradcheck(scale, (x, factor))


@pytest.mark.parametrize("factor_shape", [(2, 3, 1), (1, 3, 1)])
def test_add_scaled_adds_rows_and_differentiates(factor_shape: tuple[int, ...]) -> None:
    x, written, factor = leaf(2, 3, 5), leaf(2, 3, 5), leaf(*factor_shape)
    torch.testing.assert_close(add_scaled(x, written, factor), x + factor * written)
    assert torch.autograd.gradcheck(add_scaled, (x, written, factor))


def test_without_a_factor_the_written_part_is_added_as_it_is() -> None:
    x, written = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(add_scaled(x, written, None), x + written)
    assert torch.equal(add_scaled(x, written, torch.ones(2, 3, 1)), x + written)


def test_a_gain_just_above_one_is_not_rounded_away_by_a_bfloat16_sublayer() -> None:
    written = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    added = add_scaled(torch.zeros(1, 1, 4), written, torch.full((1, 1, 1), 1 + 2**-10))
    assert added.tolist() == [[[1 + 2**-10] * 4]]


def test_gradients_keep_the_precision_of_their_inputs() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    factor = torch.rand(2, 3, 1, requires_grad=True)
    scale(x, factor).float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(factor.grad, x.detach().float().sum(-1, keepdim=True), atol=0.05, rtol=0.01)


def test_factors_of_every_layer_are_products_of_its_signals() -> None:
    gain, gate = torch.rand(1, 2, 3), torch.rand(1, 2, 3)
    precision, head = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    layers = layer_factors({"gain": gain, "precision": precision, "ffn_gate": gate, "head_gate": head})
    assert len(layers) == 3
    for layer, factors in enumerate(layers):
        assert torch.equal(factors.query[..., 0], precision[:, :, layer])
        assert torch.equal(factors.head[..., 0], head[:, :, layer] * gain[:, :, layer, None])
        assert factors.attention is None
        assert torch.equal(factors.ffn[..., 0], gain[:, :, layer] * gate[:, :, layer])


def test_a_gain_of_each_sublayer_goes_to_its_own() -> None:
    gain = torch.rand(1, 2, 3, 2)
    for layer, factors in enumerate(layer_factors({"gain": gain})):
        assert torch.equal(factors.attention[..., 0], gain[:, :, layer, 0])
        assert torch.equal(factors.ffn[..., 0], gain[:, :, layer, 1])
        assert factors._replace(attention=None, ffn=None) == UNMODULATED


def test_one_precision_for_a_layer_is_for_all_its_heads() -> None:
    precision = torch.rand(1, 2, 3)
    factors = layer_factors({"precision": precision})[1]
    assert torch.equal(factors.query, precision[:, :, 1, None, None])
