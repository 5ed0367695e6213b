"""The colours of every brain scan: one diverging palette, centred at the neutral value of a signal.

The picture (`figures.py`) and the page (`page.py`) both take their colours from here, so that a colour means the same
thing in both, and in every scan of every model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# From far below neutral (blue) through neutral (almost white) to far above (orange). Blue and orange stay apart under
# every common colour blindness; the lightness steps are equal in Oklch and the same on both sides.
PALETTE = (
    "#003969", "#005da3", "#3684cd", "#73ade7", "#b6d5f4",
    "#f5f5f5",
    "#fac692", "#ee8c3c", "#c36024", "#8e411c", "#5b2512",
)  # fmt: skip

_FRACTIONS = {0.5: "½", 0.25: "¼", 0.125: "⅛"}


@dataclass(frozen=True)
class ColourScale:
    """Maps a signal's values to positions in [-1, 1]: -1 is the first colour of the palette, 0 is neutral, 1 the last.

    Attributes:
        neutral: the value at which the signal changes nothing.
        reach: the distance from neutral to either end; in octaves (log2) if `multiplicative`, else in units.
        multiplicative: whether the signal is a factor above zero, so that ½ and 2 lie equally far from neutral 1.
    """

    neutral: float
    reach: float
    multiplicative: bool

    @classmethod
    def fixed(cls, neutral: float, bounds: tuple[float, float]) -> ColourScale:
        """The scale that a signal has everywhere: it depends on the signal's bounds and not on any scan.

        A signal that can reach zero has a linear scale, which extends to its farther bound on both sides, so that gates
        in (0, 1.05) share their colours with gains in (0, 2); also one that is 0 where it changes nothing. The scale of
        a signal that stays above zero counts octaves: up to its upper bound, and as many below neutral.
        """
        low, high = bounds
        if low <= 0:
            return cls(neutral, max(high - neutral, neutral - low), multiplicative=False)
        return cls(neutral, math.log2(high / neutral) or math.log2(neutral / low), multiplicative=True)

    def fitted(self, values: NDArray[np.float64]) -> ColourScale:
        """The same scale, still centred at neutral, with its ends drawn in to the value farthest from neutral."""
        farthest = float(np.abs(self.position(values)).max(initial=0.0))
        # A signal that never moves keeps a scale of some width, and shows as neutral throughout.
        return ColourScale(self.neutral, self.reach * max(farthest, 1e-3), self.multiplicative)

    def position(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where each value lies on the scale; values beyond the ends fall outside [-1, 1]."""
        if self.multiplicative:
            # A factor is positive; zero can only come from rounding, and belongs at the far end.
            return np.log2(np.maximum(values, 1e-30) / self.neutral) / self.reach
        return (values - self.neutral) / self.reach

    def value(self, position: float) -> float:
        """The signal's value at a position: the inverse of `position`."""
        offset = position * self.reach
        return self.neutral * 2.0**offset if self.multiplicative else self.neutral + offset

    def ticks(self) -> Sequence[tuple[float, str]]:
        """(position, label) at both ends, halfway, and at neutral."""
        values = [(position, self.value(position)) for position in (-1.0, -0.5, 0.0, 0.5, 1.0)]
        fractions = _FRACTIONS if self.multiplicative else {}
        return [(position, fractions.get(value) or f"{value:.3g}") for position, value in values]
