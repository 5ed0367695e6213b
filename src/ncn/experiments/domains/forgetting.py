"""How much of a first text is forgotten for what is gained on a second.

While a model that was trained on A is trained on B, its bits per byte of A go up and those of B come down. Two models
that are told apart by when they are stopped can be compared at *equal gain on B*: how much each had forgotten of A by
the time when it had gained so much on B. Their difference is what one of them shields A from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ncn.statistics.seeds import mean_over_seeds

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the gain that both models of a pair reach."""

Array = NDArray[np.float64]


class Curve:
    """Bits per byte of A and of B along the training on B; the first point is that before it."""

    def __init__(self, first: ArrayLike, second: ArrayLike) -> None:
        self.first, self.second = np.asarray(first, float), np.asarray(second, float)

    @property
    def gains(self) -> Array:
        """Bits per byte of B below where training on B began."""
        return np.asarray(self.second[0] - self.second)

    @property
    def forgotten(self) -> Array:
        """Bits per byte of A above where training on B began."""
        return np.asarray(self.first - self.first[0])

    @property
    def most_gained(self) -> float:
        return float(self.gains.max())

    def forgotten_at(self, gain: float) -> float:
        """What was forgotten when the gain was first reached, between the measured points on a straight line.

        Not a number for a gain that was never reached.
        """
        gains, forgotten = self.gains, self.forgotten
        reached = np.flatnonzero(gains >= gain - 1e-12)  # a gain computed in another order of sums is the same gain
        if not len(reached):
            return float("nan")
        after = int(reached[0])
        if after == 0:
            return float(forgotten[0])
        share = (gain - gains[after - 1]) / (gains[after] - gains[after - 1])
        return float(forgotten[after - 1] + share * (forgotten[after] - forgotten[after - 1]))


def shielding(curves: Sequence[Curve], twins: Sequence[Curve]) -> dict[str, Any]:
    """What models forgot more than their twins (below zero: less) at equal gain, in bits per byte, pair by pair.

    Compared at `SHARES` of the largest gain that both of a pair reach. {share: {"gain", "forgotten", "twin": means over
    the pairs, "difference": mean with its 95 % interval over pairs, which are seeds, and "per_seed"}}.
    """
    common = [min(curve.most_gained, twin.most_gained) for curve, twin in zip(curves, twins, strict=True)]
    found = {}
    for share in SHARES:
        own = np.array([curve.forgotten_at(share * most) for curve, most in zip(curves, common, strict=True)])
        other = np.array([twin.forgotten_at(share * most) for twin, most in zip(twins, common, strict=True)])
        found[f"{share:g}"] = {
            "gain": share * float(np.mean(common)),
            "forgotten": float(own.mean()),
            "twin": float(other.mean()),
            "difference": mean_over_seeds(own - other),
            "per_seed": (own - other).tolist(),
        }
    return found


def at_equal_level(curves: Sequence[Curve], twins: Sequence[Curve]) -> dict[str, Any]:
    """Bits per byte of A when B first came down to the lowest level that both of a pair reach: {"second": that level,
    "first", "twin": means over the pairs, "difference": mean with its 95 % interval}."""
    levels = [max(curve.second.min(), twin.second.min()) for curve, twin in zip(curves, twins, strict=True)]
    own, other = (
        np.array(
            [
                curve.first[0] + curve.forgotten_at(curve.second[0] - level)
                for curve, level in zip(chosen, levels, strict=True)
            ]
        )
        for chosen in (curves, twins)
    )
    return {
        "second": float(np.mean(levels)),
        "first": float(own.mean()),
        "twin": float(other.mean()),
        "difference": mean_over_seeds(own - other),
    }
