"""The arms that a modulated model is compared with, at equal parameter counts."""

from __future__ import annotations

import torch

from ncn.config import NCNConfig
from ncn.model import ModulatedTransformer


def count_parameters(config: NCNConfig) -> int:
    """Parameters of a model, counted without storage."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ModulatedTransformer(config).parameters())


def widened_baseline(config: NCNConfig) -> NCNConfig:
    """The static twin of `config`: no controller, and a feed-forward block widened until the parameter counts agree.

    The widths are whole numbers, so the counts agree to half of what one unit of width holds: under 0.1 % from about
    0.5 M parameters on.
    """
    target = count_parameters(config)
    base = config.override(controller=None, d_ff=config.ffn_width)
    per_unit = count_parameters(base.override(d_ff=config.ffn_width + 1)) - count_parameters(base)
    return base.override(d_ff=config.ffn_width + round((target - count_parameters(base)) / per_unit))
