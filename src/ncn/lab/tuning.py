"""The best learning rate, as a multiple of a given one, from a grid that grows while the best lies at its edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from ncn.errors import UserError

RATES = (0.5, 1.0, 2.0)
FACTOR = 2.0
EXTENSIONS = 2
"""How often the grid of learning rates is extended at each end while the best rate lies there."""

Losses = dict[float, float | None]
"""By rate, the rates in order; None where the run diverged."""
Tuned = TypeVar("Tuned")


def tune(
    tuned: Mapping[str, Tuned], measure: Callable[[list[tuple[Tuned, float]]], list[float | None]]
) -> dict[str, Losses]:
    """The losses of everything that is tuned, at `RATES` and at those further ones that `next_rate` asks for, by name.

    Args:
        tuned: by name.
        measure: the losses of so many tries, each something that is tuned and a rate; None for one that diverged.

    Raises:
        UserError: something diverged at every rate.
    """
    losses: dict[str, Losses] = {name: {} for name in tuned}
    tries = [(name, rate) for name in tuned for rate in RATES]
    while tries:
        for (name, rate), loss in zip(tries, measure([(tuned[name], rate) for name, rate in tries]), strict=True):
            losses[name][rate] = loss
        losses = {name: dict(sorted(found.items())) for name, found in losses.items()}
        tries = [(name, beyond) for name, found in losses.items() if (beyond := next_rate(found)) is not None]
    for name, found in losses.items():
        if best_rate(found) is None:
            raise UserError(
                f"{name} diverged at every learning rate down to {min(found):g} of the one given: lower learning_rate, "
                "or raise warmup"
            )
    return losses


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
