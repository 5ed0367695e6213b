"""The joint law: planted exponents and multipliers come back within their intervals, and what runs cannot determine is
said to be undetermined."""

import numpy as np
import pytest

from ncn.errors import UserError
from ncn.experiments.scaling.law import Point, _log_loss, _problem, fit_scaling_law

SIZES = (90e3, 230e3, 530e3, 1.05e6, 1.9e6, 3.1e6)
BUDGETS = (250e3, 500e3, 1e6)
TRUTH = {"E": 1.2, "alpha": 0.4, "beta": 0.35, "m_N ncn": 1.3, "m_D ncn": 1.2}


def runs(
    seed: int = 0,
    *,
    noise: float = 0.004,
    multipliers: tuple[float, float] = (1.3, 1.2),
    sizes: tuple[float, ...] = SIZES,
    budgets: tuple[float, ...] = BUDGETS,
) -> list[Point]:
    """Runs of both arms whose log loss follows the law with normal noise; at 0.004 it is a hundredth of a nat."""
    generator = np.random.default_rng(seed)
    return [
        Point(arm, f"{n:g}", n, d, _loss(n * m_n, d * m_d) * float(np.exp(generator.normal(0, noise))))
        for n in sizes
        for d in budgets
        for arm, (m_n, m_d) in (("baseline", (1.0, 1.0)), ("ncn", multipliers))
    ]


def _loss(parameters: float, tokens: float) -> float:
    return 1.2 + (parameters / 1e6) ** -0.4 + (tokens / 5e5) ** -0.35


def test_without_noise_everything_planted_is_found() -> None:
    fit = fit_scaling_law(runs(noise=0), draws=50)
    constants = fit.constants()
    for name, value in TRUTH.items():
        assert constants[name].value == pytest.approx(value, rel=2e-3), name
    assert constants["A"].value == pytest.approx(1e6**0.4, rel=0.03)
    assert constants["B"].value == pytest.approx(5e5**0.35, rel=0.03)
    assert fit.predict("ncn", 5e6, 2e6).value == pytest.approx(_loss(6.5e6, 2.4e6), rel=1e-3)
    gap = _loss(1e6, 1e6) - _loss(1.3e6, 1.2e6)
    assert fit.advantage("ncn", 1e6, 1e6).value == pytest.approx(gap, rel=0.01)


def test_planted_constants_lie_within_their_intervals() -> None:
    """Over 30 ladders at a level of 95 %: fewer than 25 hits would happen about once in two hundred times."""
    hits = dict.fromkeys(TRUTH, 0)
    for seed in range(30):
        constants = fit_scaling_law(runs(seed), draws=150, seed=seed).constants()
        for name, value in TRUTH.items():
            hits[name] += constants[name].contains(value)
    assert min(hits.values()) >= 25, hits


def test_a_null_effect_is_not_found() -> None:
    wrong = 0
    for seed in range(25):
        constants = fit_scaling_law(runs(seed, multipliers=(1.0, 1.0)), draws=150, seed=seed).constants()
        wrong += not (constants["m_N ncn"].contains(1.0) and constants["m_D ncn"].contains(1.0))
    assert wrong <= 6  # two chances of 5 % in each


def test_one_bad_run_hardly_moves_the_fit() -> None:
    """The Huber loss: a run that went wrong does not pull the law after it."""
    points = runs()
    spoilt = [*points[:20], points[20]._replace(loss=points[20].loss * 1.3), *points[21:]]
    clean, moved = (fit_scaling_law(p, draws=20).constants() for p in (points, spoilt))
    assert moved["alpha"].value == pytest.approx(clean["alpha"].value, rel=0.05)
    assert moved["m_N ncn"].value == pytest.approx(clean["m_N ncn"].value, rel=0.05)


def test_a_good_ladder_determines_the_multipliers() -> None:
    known = fit_scaling_law(runs()).identified()
    assert known["m_N ncn"]
    assert known["m_D ncn"]
    assert known["alpha"]


def test_a_ladder_too_short_says_what_it_does_not_determine() -> None:
    """Sizes and budgets that hardly differ leave the exponents and what depends on them open."""
    fit = fit_scaling_law(runs(sizes=(1e6, 1.05e6, 1.1e6, 1.15e6), budgets=(5e5, 5.2e5), noise=0.01))
    known = fit.identified()
    assert not known["alpha"]
    assert not known["beta"]
    assert not known["m_N ncn"]
    described = fit.as_dict()["constants"]
    assert described["m_N ncn"]["identified"] is False
    assert "identified" not in described["A"]


def test_the_derivatives_are_those_of_the_law() -> None:
    problem = _problem(runs(), "baseline")
    theta = np.array([[0.1, -0.2, 0.3, np.log(0.4), np.log(0.5), 0.2, -0.1]])
    _, jacobian = _log_loss(theta, problem.x, problem.z, problem.arm)
    for i in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, i] = 1e-6
        up, down = (_log_loss(theta + s * step, problem.x, problem.z, problem.arm)[0] for s in (1, -1))
        np.testing.assert_allclose(jacobian[..., i], (up - down) / 2e-6, atol=1e-8)


def test_equal_seeds_give_equal_intervals() -> None:
    one, other = (fit_scaling_law(runs(), draws=20, seed=3).as_dict() for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (runs(sizes=(1e6, 2e6)), "2 sizes and 3 numbers of tokens: the fit needs at least 3 sizes and 2 budgets"),
        (runs(budgets=(1e6,)), "6 sizes and 1 numbers of tokens"),
        ([*runs()[1:], runs()[0]._replace(loss=float("nan"))], "no usable loss"),
        ([p for p in runs() if p.arm != "baseline"], "arm 'baseline' has runs at 0 sizes"),
    ],
)
def test_runs_that_cannot_be_fitted(points: list[Point], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_scaling_law(points)
