"""The grid of learning rates: how far it grows, and what is taken from it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ncn.errors import UserError
from ncn.lab.tuning import FACTOR, best_rate, optimal_rate, tune

Loss = Callable[[float], float | None]


def tuned(**losses: Loss) -> tuple[dict[str, dict[float, float | None]], list[list[tuple[Loss, float]]]]:
    """The losses that are found, and what was tried in every round."""
    rounds: list[list[tuple[Loss, float]]] = []

    def measure(tries: list[tuple[Loss, float]]) -> list[float | None]:
        rounds.append(tries)
        return [loss(rate) for loss, rate in tries]

    return tune(losses, measure), rounds


def rates(loss: Loss) -> list[float]:
    return list(tuned(arm=loss)[0]["arm"])


def test_the_grid_follows_the_best_rate_a_little_way() -> None:
    assert rates(lambda rate: abs(rate - 1)) == [0.5, 1, 2]
    assert rates(lambda rate: abs(rate - 4)) == [0.5, 1, 2, 4, 8]
    assert rates(lambda rate: rate) == [0.125, 0.25, 0.5, 1, 2]
    assert rates(lambda rate: -rate) == [0.5, 1, 2, 4, 8]
    assert rates(lambda rate: None if rate > 0.3 else rate) == [0.125, 0.25, 0.5, 1, 2]
    assert rates(lambda rate: 1.0) == [0.125, 0.25, 0.5, 1, 2]  # of equal losses the lowest rate is the best
    assert best_rate({1.0: None, 2.0: 3.0, 4.0: float("nan"), 8.0: 2.5}) == 8
    assert FACTOR == 2


def test_a_round_tries_only_what_is_new() -> None:
    def low(rate: float) -> float:
        return abs(rate - 0.25)

    def middle(rate: float) -> float:
        return abs(rate - 1)

    found, rounds = tuned(low=low, middle=middle)
    first = [(loss, rate) for loss in (low, middle) for rate in (0.5, 1.0, 2.0)]
    assert rounds == [first, [(low, 0.25)], [(low, 0.125)]]
    assert found["middle"] == {0.5: 0.5, 1.0: 0.0, 2.0: 1.0}


def test_what_diverges_everywhere_is_named() -> None:
    with pytest.raises(UserError, match=r"bad diverged at every learning rate down to 0\.125 of the one given"):
        tuned(good=lambda rate: rate, bad=lambda rate: None)


def test_the_best_rate_lies_between_those_that_were_tried() -> None:
    def bowl(rate: float) -> float:
        return 2 + 0.1 * float(np.log2(rate / 1.3)) ** 2

    found = optimal_rate({rate: bowl(rate) for rate in (0.5, 1.0, 2.0, 4.0)})
    assert found == pytest.approx(1.3)
    assert optimal_rate({0.5: 2.0, 1.0: 2.1, 2.0: 2.2}) == 0.5  # at the edge
    assert optimal_rate({0.5: 2.1, 1.0: 2.0, 2.0: None}) == 1.0  # beside a run that diverged
    assert optimal_rate({0.5: None, 1.0: None}) is None
