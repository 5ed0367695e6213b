"""An estimate with its 95 % interval, either end of which may be infinite; from bootstrap draws, the percentiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ncn.statistics.seeds import LEVEL, student_quantile


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval; an end may be infinite."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: NDArray[np.float64], units: int | None = None) -> Interval:
        """Percentiles of bootstrap draws. `units` is how many independent things were drawn from: where they are few,
        the percentiles lie further out (Hesterberg 2015, expanded percentile interval), as Student's t does."""
        tail = (1 - LEVEL) / 2
        if units is not None:
            tail = NormalDist().cdf(-math.sqrt(units / (units - 1)) * student_quantile(1 - tail, units - 1))
        # "lower" and "higher" never form a difference, so that infinite draws are allowed
        low = np.quantile(draws, tail, method="lower")
        high = np.quantile(draws, 1 - tail, method="higher")
        return cls(float(value), float(low), float(high))

    def contains(self, value: int | float) -> bool:
        return bool(self.low <= value <= self.high)

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, where an infinite number is null."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {name: end if math.isfinite(end) else None for name, end in ends.items()}
