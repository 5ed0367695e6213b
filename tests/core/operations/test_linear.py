"""The product for few rows is the same map, and is taken where it should be."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ncn.core.operations import linear as module
from ncn.core.operations.linear import FEW_ROWS, Linear, linear


@pytest.fixture(params=[True, False])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is one that reads in blocks; a test that asks for it runs as on either."""
    monkeypatch.setattr(module, "MADE_BY_AMD", request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", [(1, 1), (FEW_ROWS, 1), (1, FEW_ROWS), (2, 5)])
@pytest.mark.parametrize("size", [(256, 192), (50257, 8), (50021, 3), (7, 5)])  # blocks of 4, of 29, a prime, tiny
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_it_is_the_linear_map(blocks: bool, shape: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*size, generator=generator).to(dtype)
    bias = torch.randn(size[0], generator=generator).to(dtype)
    x = torch.randn(*shape, size[1], generator=generator).to(dtype)
    close = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 0.2}[dtype]
    for added in (None, bias):
        found = linear(x, weight, added)
        assert found.shape == (*shape, size[0])
        assert found.dtype == dtype
        assert torch.allclose(found, F.linear(x, weight, added), atol=close)
    transposed = torch.randn(size[1], size[0], generator=generator).t()  # not contiguous
    assert torch.allclose(linear(x.float(), transposed), F.linear(x.float(), transposed), atol=1e-4)


def test_few_rows_of_a_large_matrix_take_it_and_nothing_else(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = torch.bmm
    monkeypatch.setattr(module.torch, "bmm", lambda *args: taken.append(1) or real(*args))
    large, small = Linear(192, 256), Linear(16, 16)

    def takes(layer: Linear, rows: int) -> bool:
        taken.clear()
        layer(torch.randn(rows, layer.in_features))
        return bool(taken)

    with torch.no_grad():
        assert takes(large, 1) == blocks
        assert takes(large, FEW_ROWS) == blocks
        assert not takes(large, FEW_ROWS + 1)
        assert not takes(small, 1)
        assert not takes(large.to(torch.float32).double().float(), FEW_ROWS + 1)
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes(large, 1)
    assert not takes(large, 1)  # with gradients
