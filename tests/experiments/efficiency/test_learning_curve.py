"""Learning curves: planted power laws come back within their intervals, and each verdict on a curve made for it."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ncn.experiments.efficiency.learning_curve import MOST, Curve, block_length, make_curve

TOKENS = np.arange(1, 401) * 2_000.0
FLOOR, SCALE, EXPONENT = 1.5, 20.0, 0.4


def law(tokens: NDArray[np.float64] = TOKENS) -> NDArray[np.float64]:
    return FLOOR + SCALE * tokens**-EXPONENT


def noisy(losses: NDArray[np.float64], seed: int, *, noise: float = 0.02, memory: float = 0.0) -> Curve:
    """The curve with noise that remembers a part of the noise before it."""
    generator = np.random.default_rng(seed)
    values = np.zeros(len(losses))
    for place, fresh in enumerate(generator.normal(0, noise, len(losses))):
        values[place] = memory * values[place - 1] * (place > 0) + fresh
    return make_curve("run", TOKENS[: len(losses)], losses + values, "nats per token")


def test_without_noise_the_power_law_is_found_exactly() -> None:
    found = make_curve("run", TOKENS, law(), "nats per token").power_law
    assert found is not None
    assert found.floor.value == pytest.approx(FLOOR, abs=2e-3)
    assert found.exponent.value == pytest.approx(EXPONENT, abs=2e-3)
    assert found.scale.value == pytest.approx(SCALE, rel=0.02)
    assert found.miss < 2e-3


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_planted_constants_lie_within_their_intervals(memory: float) -> None:
    """At 95 %, over 30 curves; a wild bootstrap of a few dozen blocks stays a little below its level."""
    hits = np.zeros(4)
    late = slice(len(TOKENS) // 2 - 1, None)
    true_slope = np.polyfit(np.log2(TOKENS[late]), law()[late], 1)[0]
    for seed in range(30):
        curve = noisy(law(), seed, memory=memory)
        found = curve.power_law
        assert found is not None
        hits += [
            found.floor.contains(FLOOR),
            found.scale.contains(SCALE),
            found.exponent.contains(EXPONENT),
            curve.slope.contains(true_slope),
        ]
    assert (hits / 30 >= 0.8).all(), hits / 30


def test_blocks_are_longer_where_noise_remembers() -> None:
    white = noisy(np.zeros(400), 0, noise=1.0)
    red = noisy(np.zeros(400), 0, noise=1.0, memory=0.8)
    assert block_length(white.losses) <= 3 < block_length(red.losses)


def test_a_falling_curve_is_still_improving() -> None:
    assert noisy(law(), 0).verdict == "still improving"


def test_a_flat_end_is_converged() -> None:
    flat = 2 + 6 * np.exp(-TOKENS / 30_000)
    assert noisy(flat, 0).verdict == "converged"


def test_a_rise_is_diverging() -> None:
    rising = law() + 0.8 * np.clip(TOKENS / TOKENS[-1] - 0.7, 0, None)
    assert noisy(rising, 0).verdict == "diverging"


def test_a_log_that_ends_in_no_number_is_diverging() -> None:
    losses = law()
    losses[-3:] = math.nan
    curve = make_curve("run", TOKENS, losses, "nats per token")
    assert curve.verdict == "diverging"
    assert len(curve.tokens) == len(TOKENS) - 3


def test_noise_as_large_as_the_slope_cannot_be_told() -> None:
    curve = noisy(2 + 6 * np.exp(-TOKENS / 30_000), 0, noise=0.8)
    assert curve.verdict == "cannot be told"


def test_a_flat_curve_has_no_power_law() -> None:
    assert make_curve("run", TOKENS, 2 + TOKENS * 1e-7, "nats per token").power_law is None


def test_tokens_to_a_share_of_the_improvement() -> None:
    # in the logarithm of tokens the fall is a straight line: 95 % of it at 95 % of the way
    losses = 8 - np.log(TOKENS / TOKENS[0])
    reached = make_curve("run", TOKENS, losses, "nats per token").tokens_to_share(0.95)
    assert reached.value == pytest.approx(TOKENS[0] * 400**0.95, rel=0.02)
    assert reached.low <= reached.value <= reached.high


def test_tokens_that_one_run_needs_for_the_loss_of_another() -> None:
    """The second run is the first with half as much use of every token."""
    fast, slow = noisy(law(), 0), noisy(law(TOKENS / 2), 1)
    needed = fast.tokens_to_loss(slow)
    assert needed.contains(TOKENS[-1] / 2)
    assert needed.high - needed.low < TOKENS[-1] / 2
    assert slow.tokens_to_loss(fast).value == math.inf
    found = slow.power_law
    assert found is not None
    foreseen = found.tokens_to_loss(float(fast.smooth[-1]))
    assert foreseen.low < 2 * TOKENS[-1] < foreseen.high
    assert found.tokens_to_loss(0.5).value == math.inf  # below the floor


def test_a_long_log_is_averaged_and_keeps_its_shape() -> None:
    tokens = np.arange(1, 20_001) * 100.0
    curve = make_curve("run", tokens, law(tokens), "nats per token")
    assert len(curve.tokens) <= MOST
    late = curve.tokens > 1e5
    assert np.abs(curve.smooth[late] - law(curve.tokens[late])).max() < 0.01
