"""The best learning rate of each arm, from a grid that grows while the best lies at its edge."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def optimal_rate(losses: Mapping[float, float | None]) -> float | None:
    """The lowest point of a parabola, in the logarithm of the rate, through the best rate and its neighbours; the best
    rate itself at an edge of the grid or beside a run that diverged; None if all diverged."""
    best = best_rate(losses)
    if best is None:
        return None
    grid = sorted(losses)
    place = grid.index(best)
    around = [losses[rate] for rate in grid[max(0, place - 1) : place + 2]]
    if len(around) < 3 or any(loss is None or not math.isfinite(loss) for loss in around):
        return best
    left, middle, right = (float(loss) for loss in around if loss is not None)
    bend = left - 2 * middle + right
    shift = (left - right) / (2 * bend) if bend > 0 else 0.0
    step = math.log(grid[place + 1] / best) if shift > 0 else math.log(best / grid[place - 1])
    return best * math.exp(float(np.clip(shift, -0.5, 0.5)) * step)


RATES = (0.5, 1.0, 2.0)
FACTOR = 2.0
EXTENSIONS = 2
"""How often the grid of learning rates is extended at each end while the best rate lies there."""


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest loss; None if all diverged."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.__getitem__) if finite else None


def next_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate to try next: beyond the best if that is at an edge of the grid which may still be extended."""
    low, high = min(losses), max(losses)
    best = best_rate(losses)
    if (best is None or best == low) and low > min(RATES) / FACTOR**EXTENSIONS:
        return low / FACTOR
    if best == high and high < max(RATES) * FACTOR**EXTENSIONS:
        return high * FACTOR
    return None
