"""Numbers that say what control signals do in a batch, and whether their controller is well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ncn.config.model import ControllerConfig
from ncn.core.signals.table import range_map
from ncn.core.types import Signal

_RANKED_COLUMNS = 64
"""Layers times sites, at most, of which a line of the training log gives the effective rank."""


def effective_rank(eigenvalues: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """How many independent ways of moving a covariance with these eigenvalues (..., columns) has: the exponential of
    the entropy of their shares (Roy and Vetterli, The effective rank, 2007), from 1 to columns; 0 where nothing moves.
    """
    values = np.maximum(eigenvalues, 0)
    total = values.sum(-1, keepdims=True)
    shares = values / np.where(total > 0, total, 1)
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def evenly_spaced(columns: int, most: int) -> npt.NDArray[np.int64]:
    """The numbers of all columns, or of as many as there may be, which stand for all."""
    return np.linspace(0, columns - 1, min(columns, most)).astype(np.int64)


def _rank_over_tokens(signal: Signal) -> float:
    columns = signal.flatten(0, 1).flatten(1)
    # In double precision the mean of equal numbers is that number, so that what stands still has no rounding to rank.
    columns = columns[:, evenly_spaced(columns.shape[1], _RANKED_COLUMNS)].cpu().double()
    columns = columns - columns.mean(0)
    covariance = columns.T @ columns / len(columns)
    return float(effective_rank(torch.linalg.eigvalsh(covariance).numpy())) if columns.abs().max() > 1e-9 else 0.0


def controller_problem(config: ControllerConfig, statistics: Mapping[str, Mapping[str, float]]) -> str | None:
    """One line when a signal saturates or the controller is stuck at its start, else None.

    `statistics` is what `signal_statistics` returned.
    """
    for name, values in statistics.items():
        if values["saturation"] > 0.5:
            return (
                f"in one layer, signal {name} sits at a bound of its range for {values['saturation']:.0%} of its values"
            )
    if all(values["spread"] < 1e-4 for values in statistics.values()) and config.kind != "static":
        return "the controller is stuck: no signal varies over tokens by more than 0.0001"
    return None


@torch.no_grad()
def signal_statistics(
    signals: Mapping[str, Signal], maps: Literal["smooth", "published"]
) -> dict[str, dict[str, float]]:
    """Per signal: mean; spread, the standard deviation over tokens, averaged over layers and heads; saturation, the
    fraction of values within 1 % of the range from a bound that is not neutral, in the layer where it is largest; and
    effective_rank, the number of independent ways in which layers and heads move over tokens (`effective_rank`)."""
    result = {}
    for name, signal in signals.items():
        mapping = range_map(name, maps)
        margin = 0.01 * (mapping.high - mapping.low)
        # A gate whose upper bound lies next to neutral is open there, not saturated; so is what adds nothing at 0.
        lower = mapping.low if mapping.start - mapping.low > 0.1 else -math.inf
        upper = mapping.high if mapping.high - mapping.start > 0.1 else math.inf
        outside = (signal < lower + margin) | (signal > upper - margin)
        result[name] = {
            "mean": signal.mean().item(),
            "spread": signal.flatten(0, 1).std(0).mean().item() if signal.shape[:2].numel() > 1 else 0.0,
            "saturation": outside.float().transpose(0, 2).flatten(1).mean(1).max().item(),
            "effective_rank": _rank_over_tokens(signal),
        }
    return result
