"""What the table of control signals (`ncn.config.signals`, equation 4) comes to in tensors: the range maps with their
inverses, and how raw controller outputs become signals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ncn.config.model import NCNConfig
from ncn.config.signals import SIGMOID_3, SIGNALS
from ncn.core.types import Signal


@dataclass(frozen=True)
class RangeMap:
    """A map from the controller's raw output z to the signal's range, with its exact inverse."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[float], float]
    low: float
    high: float
    start: float
    """The signal's value before training."""


def _twice_sigmoid(raw: Tensor) -> Tensor:
    return 2 * torch.sigmoid(raw)


def _logit_half(value: float) -> float:
    return math.log(value / (2 - value))


def _logit(value: float) -> float:
    return math.log(value / (1 - value))


def _four_to_tanh(raw: Tensor) -> Tensor:
    return torch.exp(math.log(4) * torch.tanh(raw))


def _four_to_tanh_inverse(value: float) -> float:
    return math.atanh(math.log(value) / math.log(4))


def _shifted_sigmoid(raw: Tensor) -> Tensor:
    # σ(z + 3) / σ(3), written so that z = 0 gives exactly 1 in every precision. Below -30 the gate is zero to all
    # purposes, and the clamp keeps the exponential finite.
    return (1 + (1 - SIGMOID_3) * torch.expm1(-raw.clamp(min=-30))).reciprocal()


def _shifted_sigmoid_inverse(value: float) -> float:
    return -math.log1p((1 / value - 1) / (1 - SIGMOID_3))


def _published_precision(raw: Tensor) -> Tensor:
    return (torch.nn.functional.softplus(raw) + 0.01).clamp(max=4)


def _published_precision_inverse(value: float) -> float:
    return math.log(math.expm1(value - 0.01))


_FUNCTIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "2σ(z)": (_twice_sigmoid, _logit_half),
    "4^tanh z": (_four_to_tanh, _four_to_tanh_inverse),
    "σ(z + 3) / σ(3)": (_shifted_sigmoid, _shifted_sigmoid_inverse),
    "tanh z": (torch.tanh, math.atanh),
    "softplus(z) + 0.01, at most 4": (_published_precision, _published_precision_inverse),
    "σ(z)": (torch.sigmoid, _logit),
}
"""The range maps that the table names, each with its exact inverse. A smooth one gives exactly neutral at z = 0."""


def range_map(name: str, maps: Literal["smooth", "published"]) -> RangeMap:
    """The range map of a signal; a signal that was never published keeps its smooth map."""
    row = SIGNALS[name]
    found = row.published if maps == "published" and row.published else row.smooth
    return RangeMap(*_FUNCTIONS[found.map], found.low, found.high, found.start)


def signal_shape(name: str, config: NCNConfig) -> tuple[int, ...]:
    """Shape of one token's signal in one layer: () for a scalar, (heads,) for one per head, (sites,) for one at each of
    its sites, and (sites · groups,) for one per group of channels of each."""
    controller, row = config.controller, SIGNALS[name]
    assert controller is not None
    sites, groups = len(row.sites), controller.film_groups
    shapes = {"layer": (), "sublayer": (sites,), "head": (config.num_heads,), "group": (sites * groups,)}
    return shapes[getattr(controller, row.per, row.per)]


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
