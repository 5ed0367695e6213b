"""RMSNorm: torch's own numbers and gradients, in every precision."""

import pytest
import torch
from torch import nn

from ncn.core.operations.norm import RMSNorm, normed_linear


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, grad, weight = (
        torch.randn(3, 5, 16, dtype=dtype),
        torch.randn(3, 5, 16, dtype=dtype),
        torch.randn(16, dtype=dtype),
    )
    found = []
    for norm in (RMSNorm(16, eps=1e-2, dtype=dtype), nn.RMSNorm(16, eps=1e-2, dtype=dtype)):
        norm.weight.data.copy_(weight)
        inputs = x.clone().requires_grad_()
        output = norm(inputs)
        found.append((output, *torch.autograd.grad(output, (inputs, norm.weight), grad)))
        with torch.no_grad():
            assert torch.equal(norm(x), output)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_bfloat16_is_normalised_in_float32() -> None:
    x = torch.randn(4, 64).bfloat16() * 100
    exact = RMSNorm(64, eps=1e-5)(x.float()).bfloat16()
    output = RMSNorm(64, eps=1e-5, dtype=torch.bfloat16)(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    RMSNorm(8, eps=1e-5)(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_a_product_of_normed_rows_and_its_gradients() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    plain = nn.functional.rms_norm(x, (16,), eps=1e-2) @ weight.t()
    torch.testing.assert_close(normed_linear(x, weight, 1e-2), plain, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, weight: normed_linear(x, weight, 1e-2), (x.requires_grad_(), weight.requires_grad_())
    )
    with torch.no_grad():
        without = normed_linear(x, weight, 1e-2)
    assert torch.equal(normed_linear(x, weight, 1e-2), without)


def test_a_product_of_normed_rows_in_bfloat16_has_a_float32_result() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    inputs = x.requires_grad_(), weight.requires_grad_()
    product = normed_linear(*inputs, 1e-5)
    assert product.dtype == torch.float32
    exact = [part.detach().double().requires_grad_() for part in inputs]
    expected = normed_linear(*exact, 1e-5)
    torch.testing.assert_close(product.double(), expected, rtol=0.02, atol=0.02)
    for grad, other in zip(
        torch.autograd.grad(product.sum(), inputs), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), other, rtol=0.05, atol=0.05)
