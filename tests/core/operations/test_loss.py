"""The chunked loss is the plain cross-entropy, in value and in both gradients, whatever the chunk."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ncn.config.training import IGNORED
from ncn.core.operations.loss import chunked_cross_entropy, token_losses

POSITIONS, WIDTH, VOCABULARY = 37, 8, 29


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(POSITIONS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,))
    targets[[0, 5, 6, 36]] = IGNORED
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 5, 7, POSITIONS - 1, POSITIONS, 10**6])
def test_value_and_gradients(chunk: int) -> None:
    hidden, weight, targets = inputs()
    loss, expected = chunked_cross_entropy(hidden, weight, targets, chunk), plain(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    got, wanted = (torch.autograd.grad(total / 7, (hidden, weight)) for total in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_capped_logits() -> None:
    hidden, weight, targets = inputs()
    expected = F.cross_entropy(2.5 * torch.tanh(hidden @ weight.T / 2.5), targets, ignore_index=-100, reduction="sum")
    loss = chunked_cross_entropy(hidden, weight, targets, 5, cap=2.5)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    got, wanted = (torch.autograd.grad(total, (hidden, weight)) for total in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    each = token_losses(hidden.detach(), weight.detach(), targets, 5, cap=2.5)
    torch.testing.assert_close(each.sum(), loss.detach())


def test_shares() -> None:
    hidden, weight, targets = inputs()
    shares = torch.rand(POSITIONS, dtype=torch.float64) * 3
    each = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    expected = (each * shares).sum()
    loss = chunked_cross_entropy(hidden, weight, targets, 5, shares=shares)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    got, wanted = (torch.autograd.grad(total, (hidden, weight)) for total in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("asked", ["hidden", "weight"])
def test_one_gradient_alone(asked: str) -> None:
    hidden, weight, targets = inputs()
    leaf, other = (hidden, weight) if asked == "hidden" else (weight, hidden)
    other.requires_grad_(False)
    (got,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets, 5), leaf)
    (wanted,) = torch.autograd.grad(plain(hidden, weight, targets), leaf)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_without_gradients() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets, 5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets).detach(), rtol=1e-13, atol=0)


def test_no_target_at_all() -> None:
    hidden, weight, targets = inputs()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED), 5)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_no_position_at_all() -> None:
    hidden, weight, targets = inputs()
    loss = chunked_cross_entropy(hidden[:0], weight, targets[:0])
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, weight)[0] == 0).all()


def test_huge_logits_stay_exact() -> None:
    hidden, weight, targets = inputs(torch.float32)
    big = (1e4 * hidden).detach().requires_grad_()
    loss = chunked_cross_entropy(big, weight, targets, 5)
    torch.testing.assert_close(loss, plain(big, weight, targets), rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, big)[0].isfinite().all()


def test_autocast_is_close_and_keeps_the_dtypes() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 5)
    got = torch.autograd.grad(loss, (hidden, weight))
    expected = plain(hidden, weight, targets)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert loss.item() != expected.item()
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_token_losses(chunk: int) -> None:
    hidden, weight, targets = inputs()
    losses = token_losses(hidden, weight, targets, chunk)
    assert not losses.requires_grad
    assert (losses[targets == IGNORED] == 0).all()
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-6)
