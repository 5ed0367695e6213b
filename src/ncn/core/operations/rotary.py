"""Rotary positions: queries and keys turn by angles that grow with their position (Su et al., RoFormer, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from ncn.config.model import NCNConfig


def rotary_tables(positions: Tensor, config: NCNConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the rotary angles, each (batch or 1, tokens, heads, head_dim).

    They are spelt out for every head and both halves of it: a product of equal shapes is one long loop.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=exact) / config.head_dim
    angles = positions[..., None].to(exact) * config.rope_theta**-exponents
    cosine, sine = angles.cos(), angles.sin()
    tables = torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)
    first, second = (table[:, :, None].repeat(1, 1, config.num_heads, 1).to(dtype) for table in tables)
    return first, second


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + head_dim/2) of the last axis by the angles of `rotary_tables`."""
    cosine, sine = (table[:, :, : x.shape[2]].to(x.dtype) for table in rotation)
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)
