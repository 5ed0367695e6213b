"""The table of control signals (equation 4): what there is to control, in which range, and where neutral lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncn.config import ControllerConfig, NCNConfig
from ncn.types import Signal

_RANKED_COLUMNS = 64
"""Layers times sites, at most, of which a line of the training log gives the effective rank."""


@dataclass(frozen=True)
class RangeMap:
    """A map from the controller's raw output z to the signal's range, with its exact inverse."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[float], float]
    low: float
    high: float
    start: float = 1.0
    """The signal's value before training."""


@dataclass(frozen=True)
class SignalSpec:
    """One row of the table."""

    name: str
    symbol: str
    site: str
    smooth: RangeMap
    published: RangeMap | None
    neutral: float = 1.0


def _twice_sigmoid(raw: Tensor) -> Tensor:
    return 2 * torch.sigmoid(raw)


def _logit_half(value: float) -> float:
    return math.log(value / (2 - value))


def _four_to_tanh(raw: Tensor) -> Tensor:
    return torch.exp(math.log(4) * torch.tanh(raw))


def _four_to_tanh_inverse(value: float) -> float:
    return math.atanh(math.log(value) / math.log(4))


_SIGMOID_3 = 1 / (1 + math.exp(-3))


def _shifted_sigmoid(raw: Tensor) -> Tensor:
    # σ(z + 3) / σ(3), written so that z = 0 gives exactly 1 in every precision. Below -30 the gate is zero to all
    # purposes, and the clamp keeps the exponential finite.
    return (1 + (1 - _SIGMOID_3) * torch.expm1(-raw.clamp(min=-30))).reciprocal()


def _shifted_sigmoid_inverse(value: float) -> float:
    return -math.log1p((1 / value - 1) / (1 - _SIGMOID_3))


def _published_precision(raw: Tensor) -> Tensor:
    return (torch.nn.functional.softplus(raw) + 0.01).clamp(max=4)


def _published_precision_inverse(value: float) -> float:
    return math.log(math.expm1(value - 0.01))


_GAIN = RangeMap(_twice_sigmoid, _logit_half, 0.0, 2.0)
_SIGNALS = (
    SignalSpec("gain", "g", "sublayer output before the residual sum", smooth=_GAIN, published=_GAIN),
    SignalSpec(
        "precision",
        "β",
        "queries, after RoPE and QK-norm",
        smooth=RangeMap(_four_to_tanh, _four_to_tanh_inverse, 0.25, 4.0),
        published=RangeMap(_published_precision, _published_precision_inverse, 0.01, 4.0),
    ),
    SignalSpec(
        "ffn_gate",
        "γ",
        "feed-forward output",
        smooth=RangeMap(_shifted_sigmoid, _shifted_sigmoid_inverse, 0.0, 1 / _SIGMOID_3),
        published=RangeMap(torch.sigmoid, lambda value: math.log(value / (1 - value)), 0.0, 1.0, start=_SIGMOID_3),
    ),
    SignalSpec("head_gate", "η", "each head's attention output, before the output projection", _GAIN, None),
    SignalSpec("norm_film", "ν", "output of the RMSNorm before a sublayer, by groups of channels", _GAIN, None),
)
SIGNALS: Mapping[str, SignalSpec] = {spec.name: spec for spec in _SIGNALS}


def range_map(name: str, maps: Literal["smooth", "published"]) -> RangeMap:
    """The range map of a signal; a signal that was never published keeps its smooth map."""
    spec = SIGNALS[name]
    return spec.published if maps == "published" and spec.published else spec.smooth


def signal_shape(name: str, config: NCNConfig) -> tuple[int, ...]:
    """Shape of one token's signal in one layer: () for a scalar, (heads,) or (2,) for one per head or sublayer, and
    (2 · groups,) for one per group of channels of either norm."""
    controller = config.controller
    assert controller is not None
    if name == "head_gate" or (name == "precision" and controller.precision_per == "head"):
        return (config.num_heads,)
    if name == "gain" and controller.gain_per == "sublayer":
        return (2,)
    if name == "norm_film":
        return (2 * controller.film_groups,)
    return ()


@dataclass(frozen=True)
class SignalLayout:
    """How one layer's raw controller output, a flat vector, is cut into signals."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    maps: tuple[RangeMap, ...]

    @classmethod
    def of(cls, config: NCNConfig) -> SignalLayout:
        controller = config.controller
        assert controller is not None
        return cls(
            controller.signals,
            tuple(signal_shape(name, config) for name in controller.signals),
            tuple(range_map(name, controller.maps) for name in controller.signals),
        )

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def initial_bias(self) -> Tensor:
        """Raw values that map to each signal's starting value (equation 7), shape (outputs of a layer,)."""
        return torch.cat(
            [
                torch.full((size,), mapping.inverse(mapping.start))
                for size, mapping in zip(self.sizes, self.maps, strict=True)
            ]
        )

    def split(self, raw: Tensor) -> dict[str, Tensor]:
        """Map raw outputs (batch, tokens, layers, outputs) to signals of shape (batch, tokens, layers[, sites]).

        The maps run in float32 or better: a gain of 1 + 2⁻¹⁰ must not round to 1.
        """
        raw = raw if raw.dtype == torch.float64 else raw.float()
        parts = torch.split(raw, self.sizes, dim=-1)
        return {
            name: mapping.forward(part if shape else part.squeeze(-1))
            for name, shape, mapping, part in zip(self.names, self.shapes, self.maps, parts, strict=True)
        }


def homeostatic_loss(signals: Mapping[str, Signal]) -> Tensor:
    """Equation (6) without λ: the sum over signals of the mean squared distance from neutral, a scalar."""
    terms = [(signal - SIGNALS[name].neutral).square().mean() for name, signal in signals.items()]
    return torch.stack(terms).sum()


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
        # A gate whose upper bound lies next to neutral is open there, not saturated.
        upper = mapping.high if mapping.high - mapping.start > 0.1 else math.inf
        outside = (signal < mapping.low + margin) | (signal > upper - margin)
        result[name] = {
            "mean": signal.mean().item(),
            "spread": signal.flatten(0, 1).std(0).mean().item() if signal.shape[:2].numel() > 1 else 0.0,
            "saturation": outside.float().transpose(0, 2).flatten(1).mean(1).max().item(),
            "effective_rank": _rank_over_tokens(signal),
        }
    return result
