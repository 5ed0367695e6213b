"""Intervals and p-values hold their level with a handful of seeds, and see what is there.

Each contract is a function of a procedure; it holds for ours and fails for well-known wrong ones.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from ncn.statistics.seeds import (
    Intervals,
    ResampledLosses,
    holm,
    intervals,
    smallest_detectable_effect,
    student_quantile,
)

EXPERIMENTS, DOCUMENTS, DRAWS = 1000, 100, 600
Procedure = Callable[[ResampledLosses], Intervals]


def simulate(seeds: int, *, effect: float = 0.0, of_seeds: float = 1.0, rest: float = 0.3) -> ResampledLosses:
    """Differences of 1 000 experiments as losses, shape (seeds, experiments): an effect in bits per byte, noise of
    seeds, and of documents and of both together with `rest` of its size."""
    generator = np.random.default_rng(seeds)
    sizes = np.round(600 * generator.lognormal(0, 0.4, DOCUMENTS))
    scale = rest * math.sqrt(DOCUMENTS)
    noise = (
        of_seeds * generator.standard_normal((seeds, EXPERIMENTS, 1))
        + scale * generator.standard_normal((EXPERIMENTS, DOCUMENTS))
        + scale * generator.standard_normal((seeds, EXPERIMENTS, DOCUMENTS))
    )
    return ResampledLosses((effect + noise) * sizes * math.log(2), sizes, sizes / 4, draws=DRAWS)


def ours(losses: ResampledLosses) -> Intervals:
    per_seed = np.moveaxis(losses.values["bits_per_byte"], 0, -1)
    return intervals(per_seed, losses.drawn["bits_per_byte"].mean(0))


def percentiles(drawn: NDArray[np.float64], mean: NDArray[np.float64]) -> Intervals:
    low, high = np.quantile(drawn, [0.025, 0.975], axis=-1)
    return Intervals(mean, low, high, 2 * np.minimum((drawn <= 0).mean(-1), (drawn >= 0).mean(-1)))


def documents_only(losses: ResampledLosses) -> Intervals:
    drawn = losses.drawn["bits_per_byte"].mean(0)
    return percentiles(drawn, losses.values["bits_per_byte"].mean(0))


def seeds_drawn_again(losses: ResampledLosses) -> Intervals:
    drawn = losses.drawn["bits_per_byte"]
    seeds = len(drawn)
    chosen = np.random.default_rng(0).integers(0, seeds, (DRAWS, seeds))
    weights = np.stack([np.bincount(row, minlength=seeds) for row in chosen], -1) / seeds
    return percentiles((drawn * weights[:, None]).sum(0), losses.values["bits_per_byte"].mean(0))


def binomial_interval(rate: float) -> tuple[float, float]:
    """Where 99.9 % of measured rates lie."""
    reach = 3.3 * math.sqrt(rate * (1 - rate) / EXPERIMENTS)
    return rate - reach, rate + reach


def false_positives(procedure: Procedure, seeds: int, **noise: float) -> float:
    return float((procedure(simulate(seeds, **noise)).p < 0.05).mean())


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_a_difference_by_chance_is_found_once_in_twenty_experiments(seeds: int) -> None:
    low, high = binomial_interval(0.05)
    assert low < false_positives(ours, seeds, rest=0.02) < high


@pytest.mark.parametrize("seeds", [3, 5])
def test_it_is_found_no_more_often_whatever_makes_the_noise(seeds: int) -> None:
    for noise in ({"rest": 0.3}, {"rest": 1.0}, {"of_seeds": 0.3, "rest": 1.0}, {"of_seeds": 0.0, "rest": 1.0}):
        assert false_positives(ours, seeds, **noise) < binomial_interval(0.05)[1]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("mutant", [documents_only, seeds_drawn_again])
def test_wrong_procedures_find_it_too_often(mutant: Procedure, seeds: int) -> None:
    assert false_positives(mutant, seeds, rest=0.02) > binomial_interval(0.05)[1]


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_hold_the_true_difference(seeds: int) -> None:
    found = ours(simulate(seeds, effect=1.7, rest=0.1))
    held = float(((found.low < 1.7) & (found.high > 1.7)).mean())
    assert held > binomial_interval(0.95)[0]
    assert np.mean(found.mean) == pytest.approx(1.7, abs=0.1)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_smallest_detectable_effect_is_found_in_four_of_five_experiments(seeds: int) -> None:
    effect = smallest_detectable_effect(1.0, seeds)
    found = (ours(simulate(seeds, effect=effect, rest=0.01)).p < 0.05).mean()
    low, high = binomial_interval(0.8)
    assert low < found < high
    assert smallest_detectable_effect(2.5, seeds) == pytest.approx(2.5 * effect)


def test_more_seeds_find_less_and_one_finds_nothing() -> None:
    effects = [smallest_detectable_effect(1.0, seeds) for seeds in (1, 2, 3, 5, 10, 100)]
    assert effects == sorted(effects, reverse=True)
    assert effects[0] == math.inf
    assert effects[-1] == pytest.approx((1.96 + 0.84) / 10, rel=0.03)


def test_interval_and_p_value_agree() -> None:
    found = ours(simulate(4, effect=1.2))
    excluded = (found.low > 0) | (found.high < 0)
    doubtful = np.abs(found.p - 0.05) < 4 / DRAWS
    assert np.array_equal(excluded[~doubtful], (found.p < 0.05)[~doubtful])
    assert 0.2 < excluded.mean() < 0.9


def test_without_documents_the_interval_is_students() -> None:
    values = np.array([0.3, 0.1, 0.4, 0.2])
    found = intervals(values)
    reach = 3.182446 * values.std(ddof=1) / 2
    assert float(found.low) == pytest.approx(0.25 - reach, abs=2e-3)
    assert float(found.high) == pytest.approx(0.25 + reach, abs=2e-3)
    assert float(found.p) == pytest.approx(0.0305, abs=2e-3)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (7, 2.36462), (30, 2.04227)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-4)
    assert student_quantile(0.025, freedom) == pytest.approx(-expected, abs=1e-4)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = intervals(np.array([0.3]))
    assert float(found.mean) == 0.3
    assert np.isnan([found.low, found.high, found.p]).all()


def test_equal_arms_do_not_differ() -> None:
    found = intervals(np.zeros(5), np.zeros(100))
    assert (float(found.low), float(found.high), float(found.p)) == (0.0, 0.0, 1.0)


def test_holm_corrects_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def family_wise_error(correct: Callable[[list[float]], list[float]]) -> float:
    """How often any of six null differences, all against one common arm, is found."""
    noise = np.random.default_rng(0).standard_normal((EXPERIMENTS, 7, 5))
    p = intervals(noise[:, 1:] - noise[:, :1]).p
    return float(np.mean([min(correct(row)) < 0.05 for row in p.tolist()]))


def test_holm_keeps_the_family_wise_error_and_without_it_it_is_lost() -> None:
    assert family_wise_error(holm) < binomial_interval(0.05)[1]
    assert family_wise_error(lambda p: p) > 2 * 0.05


def test_losses_are_ratios_of_sums_in_every_measure() -> None:
    nats, sizes, tokens = np.array([[30.0, 10.0], [20.0, 10.0]]), np.array([40, 10]), np.array([12, 4])
    losses = ResampledLosses(nats, sizes, tokens, draws=200)
    assert losses.values["bits_per_byte"] == pytest.approx([40 / 50 / math.log(2), 30 / 50 / math.log(2)])
    assert losses.values["nats_per_token"] == pytest.approx([2.5, 1.875])
    assert losses.values["perplexity"] == pytest.approx([math.exp(2.5), math.exp(1.875)])
    possible = {2.5, 30 / 12, 10 / 4}  # both documents, or one of them twice: the ratio of sums is the same here
    assert set(losses.drawn["nats_per_token"][0].round(9)) <= possible
    assert set(losses.drawn["bits_per_byte"][1].round(6)) == {
        round(value / math.log(2), 6) for value in (30 / 50, 20 / 40, 10 / 10)
    }


def test_differences_are_paired_by_seed() -> None:
    generator = np.random.default_rng(0)
    ups = generator.normal(0, 1, (5, 1))  # what a seed does to both arms alike
    tokens = np.full(50, 100)
    both = np.stack([100 * (3 + ups + 0.02 * arm + generator.normal(0, 0.005, (5, 50))) for arm in (0, 1)])
    losses = ResampledLosses(both.reshape(10, 50), 4 * tokens, tokens)
    per_seed, found = losses.difference("nats_per_token", range(5, 10), range(5))
    assert per_seed == pytest.approx(np.full(5, 0.02), abs=0.005)
    assert 0.015 < float(found.low) < 0.02 < float(found.high) < 0.025
    assert found.p < 0.01


def test_the_same_numbers_give_the_same_intervals() -> None:
    one, other = (ours(simulate(3)) for _ in range(2))
    assert np.array_equal(one.low, other.low)
    assert np.array_equal(one.p, other.p)
