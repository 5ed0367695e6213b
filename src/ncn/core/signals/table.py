"""The table of control signals (equation 4): what there is to control, in which range, and where neutral lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ncn.config.model import NCNConfig
from ncn.core.types import Signal


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


Frozen = Mapping[str, Tensor]
"""Signals held at given values: name to a tensor that broadcasts to (batch, tokens, layers[, sites])."""


def freeze(name: str, signal: Tensor, frozen: Frozen, first: int) -> Tensor:
    """The signal of the layers from `first` on, replaced where `frozen` names it; NaN leaves it as it is."""
    if name not in frozen:
        return signal
    value, layers = frozen[name].to(signal), signal.shape[2]
    if value.ndim > 2 and value.shape[2] != 1:  # given for all layers of the model: this tap's share
        value = value[:, :, first : first + layers]
    return torch.where(value.isnan(), signal, value)
