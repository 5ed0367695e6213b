"""The joint law of loss with size and data, and what a controller is worth in size and in data.

    L(N, D) = E + A / (m_N N)^α + B / (m_D D)^β

N is a run's parameters, D its tokens; m_N and m_D are 1 for the baseline and free for every other arm: an arm with
m_N = 1.2 does as well as a baseline with 1.2 times its parameters. Fitted as in Hoffmann et al. (2022), approach 3:
the Huber loss (δ = 10⁻³) of log L, its logarithm of a sum of exponentials, from a grid of starts. Intervals come from
a bootstrap over runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ncn.errors import UserError
from ncn.statistics.interval import Interval

Array = NDArray[np.float64]

DELTA = 1e-3
"""Where the Huber loss of a residual of log L turns from a square into an absolute value."""
IDENTIFIED = 3.0
"""A positive quantity counts as identified where its interval's ends differ by less than this factor."""

_LOW = np.array([-6.0, -9.0, -9.0, np.log(0.02), np.log(0.02)])
_HIGH = np.array([3.0, 4.0, 4.0, np.log(3.0), np.log(3.0)])
_MULTIPLIER = np.log(100.0)
_SHARED = 5  # parameters that all arms share: E, A, B, α, β


class Point(NamedTuple):
    """The end of one run: its arm, its place on the ladder, parameters N, tokens D, and loss (any positive unit)."""

    arm: str
    size: str
    parameters: int | float
    tokens: int | float
    loss: float
    seed: int = 1


@dataclass(frozen=True)
class _Problem:
    """Runs as arrays, with logarithms of size and data centred so that the parameters of the fit are of order one."""

    x: Array
    z: Array
    y: Array
    arm: NDArray[np.int64]
    arms: tuple[str, ...]
    centre: tuple[float, float]
    cell: NDArray[np.int64]

    @property
    def units(self) -> int:
        """Independent things that the bootstrap draws: cells of equal size, tokens and seed."""
        return int(self.cell.max()) + 1

    @property
    def count(self) -> int:
        return _SHARED + 2 * (len(self.arms) - 1)

    def bounds(self) -> tuple[Array, Array]:
        free = np.full(self.count - _SHARED, _MULTIPLIER)
        return np.concatenate([_LOW, -free]), np.concatenate([_HIGH, free])


@dataclass(frozen=True)
class ScalingFit:
    """The law fitted to runs, with the parameters of every bootstrap draw."""

    problem: _Problem
    best: Array
    draws: Array
    points: tuple[Point, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        return self.problem.arms

    def constants(self) -> dict[str, Interval]:
        """E, A, B, alpha, beta, and for each further arm m_N and m_D, with their intervals."""
        names = ["E", "A", "B", "alpha", "beta"]
        values, draws = (self._constants(theta) for theta in (self.best[None], self.draws))
        found = {name: self._interval(values[0, i], draws[:, i]) for i, name in enumerate(names)}
        for k, arm in enumerate(self.arms[1:]):
            for j, name in enumerate(("m_N", "m_D")):
                i = _SHARED + 2 * k + j
                found[f"{name} {arm}"] = self._interval(np.exp(self.best[i]), np.exp(self.draws[:, i]))
        return found

    def _interval(self, value: float, draws: Array) -> Interval:
        return Interval.of(value, draws, self.problem.units)

    def _constants(self, theta: Array) -> Array:
        e, a, b, alpha, beta = theta[:, :_SHARED].T
        alpha, beta = np.exp(alpha), np.exp(beta)
        c_n, c_d = self.problem.centre
        return np.stack([np.exp(e), np.exp(a + alpha * c_n), np.exp(b + beta * c_d), alpha, beta], axis=1)

    def identified(self) -> dict[str, bool]:
        """For each constant whether these runs determine it: its interval spans less than a factor of three and stays
        clear of the bounds of the search. A and B only say anything together with their exponents and are left out."""
        low, high = self.problem.bounds()
        spans = [self._interval(value, draws) for value, draws in zip(self.best, self.draws.T, strict=True)]
        place = {"E": 0, "alpha": 3, "beta": 4}
        for k, arm in enumerate(self.arms[1:]):
            place |= {f"m_N {arm}": _SHARED + 2 * k, f"m_D {arm}": _SHARED + 2 * k + 1}
        return {
            name: bool(
                spans[i].low > low[i] + 0.01
                and spans[i].high < high[i] - 0.01
                and spans[i].high - spans[i].low < np.log(IDENTIFIED)
            )
            for name, i in place.items()
        }

    def predict(self, arm: str, parameters: int | float, tokens: int | float) -> Interval:
        """Loss of `arm` at this size and with these tokens; the interval is that of the fitted curve."""
        return self._interval(self._at(self.best[None], arm, parameters, tokens)[0],
                           self._at(self.draws, arm, parameters, tokens))  # fmt: skip

    def advantage(self, arm: str, parameters: int | float, tokens: int | float) -> Interval:
        """How much lower the loss of `arm` is than the baseline's at the same size and tokens."""
        value, draws = (
            self._at(theta, self.arms[0], parameters, tokens) - self._at(theta, arm, parameters, tokens)
            for theta in (self.best[None], self.draws)
        )
        return self._interval(value[0], draws)

    def _at(self, theta: Array, arm: str, parameters: int | float, tokens: int | float) -> Array:
        c_n, c_d = self.problem.centre
        x, z = np.array([np.log(parameters) - c_n]), np.array([np.log(tokens) - c_d])
        result: Array = np.exp(_log_loss(theta, x, z, np.array([self.arms.index(arm)]))[0][:, 0])
        return result

    def residuals(self) -> Array:
        """log L of each run less that of the fit."""
        problem = self.problem
        fitted = _log_loss(self.best[None], problem.x, problem.z, problem.arm)[0][0]
        residuals: Array = problem.y - fitted
        return residuals

    def as_dict(self) -> dict[str, Any]:
        known = self.identified()
        return {
            "form": "L = E + A/(m_N N)^alpha + B/(m_D D)^beta",
            "runs": len(self.points),
            "draws": len(self.draws),
            "constants": {
                name: value.as_dict() | ({"identified": known[name]} if name in known else {})
                for name, value in self.constants().items()
            },
            "residual_of_log_loss": {
                "median_absolute": float(np.median(np.abs(self.residuals()))),
                "largest": float(np.abs(self.residuals()).max()),
            },
        }


def fit_scaling_law(
    points: Sequence[Point], *, baseline: str = "baseline", draws: int = 400, seed: int = 0
) -> ScalingFit:
    """Fit the joint law to the ends of runs.

    Args:
        points: runs of the baseline and of any number of further arms.
        baseline: the arm whose multipliers are 1.
        draws: bootstrap draws. Runs of the same size, tokens and seed are drawn together, since they share batches.
        seed: of the bootstrap.

    Raises:
        UserError: fewer than three sizes or two numbers of tokens, fewer runs than constants, or an unusable loss.
    """
    problem = _problem(points, baseline)
    best = _search(problem)
    generator = np.random.default_rng(seed)
    weights = _drawn_cells(problem, draws, generator)
    fitted = _minimise(problem, np.repeat(best[None], draws, axis=0), problem.y[None], weights, iterations=60)[0]
    return ScalingFit(problem, best, fitted, tuple(points))


def _problem(points: Sequence[Point], baseline: str) -> _Problem:
    others = sorted({point.arm for point in points} - {baseline})
    arms = (baseline, *others)
    for point in points:
        if not (np.isfinite(point.loss) and point.loss > 0):
            raise UserError(f"the run {point.arm} {point.size} has no usable loss ({point.loss}); leave it out")
    for arm in arms:
        mine = [point for point in points if point.arm == arm]
        sizes, tokens = len({point.size for point in mine}), len({point.tokens for point in mine})
        if sizes < 3 or tokens < 2:
            raise UserError(
                f"arm {arm!r} has runs at {sizes} sizes and {tokens} numbers of tokens: "
                "the fit needs at least 3 sizes and 2 budgets"
            )
    if len(points) <= _SHARED + 2 * len(others):
        raise UserError(f"{len(points)} runs cannot determine {_SHARED + 2 * len(others)} constants; add runs")
    n = np.log([point.parameters for point in points])
    d = np.log([point.tokens for point in points])
    cells: dict[tuple[str, float, int], int] = {}
    cell = [cells.setdefault((point.size, point.tokens, point.seed), len(cells)) for point in points]
    return _Problem(
        x=n - n.mean(),
        z=d - d.mean(),
        y=np.log([point.loss for point in points]),
        arm=np.array([arms.index(point.arm) for point in points]),
        arms=arms,
        centre=(float(n.mean()), float(d.mean())),
        cell=np.array(cell),
    )


def _drawn_cells(problem: _Problem, draws: int, generator: np.random.Generator) -> Array:
    """How often each run is drawn, (draws, runs). The runs of one cell are drawn together."""
    cells = problem.units
    first = np.array([np.flatnonzero(problem.cell == cell)[0] for cell in range(cells)])
    sizes, tokens = problem.x[first].round(2), problem.z[first].round(6)
    counts: list[Array] = []
    while len(counts) < draws:
        drawn = generator.multinomial(cells, np.full(cells, 1 / cells))
        # A draw without the range that the law needs says nothing about it, and is drawn anew.
        if len(set(sizes[drawn > 0])) >= 3 and len(set(tokens[drawn > 0])) >= 2:
            counts.append(drawn[problem.cell].astype(np.float64))
    return np.stack(counts)


def _search(problem: _Problem) -> Array:
    """The best fit from a grid of starts: all go some way, the best go to the end."""
    y, weights = problem.y[None], np.ones((1, len(problem.y)))
    level = float(y.min())
    starts = []
    for floor, share, alpha, beta in itertools.product(
        (0.2, 0.6, 0.9), (0.2, 0.5, 0.8), (0.15, 0.35, 0.7, 1.2), (0.15, 0.35, 0.7, 1.2)
    ):
        rest = np.exp(np.median(y)) - floor * np.exp(level)
        starts.append([level + np.log(floor), np.log(share * rest), np.log((1 - share) * rest),
                       np.log(alpha), np.log(beta)])  # fmt: skip
    theta = np.zeros((len(starts), problem.count))
    theta[:, :_SHARED] = starts
    theta, losses = _minimise(problem, theta, y, weights, iterations=40)
    kept = theta[np.argsort(losses)[:24]]
    theta, losses = _minimise(problem, kept, y, weights, iterations=300)
    best: Array = theta[np.argmin(losses)]
    return best


def _log_loss(theta: Array, x: Array, z: Array, arm: NDArray[np.int64]) -> tuple[Array, Array]:
    """log L of every run under each row of `theta`, and its derivatives: (fits, runs) and (fits, runs, constants)."""
    alpha, beta = np.exp(theta[:, 3:4]), np.exp(theta[:, 4:5])
    free = theta[:, _SHARED:].reshape(len(theta), -1, 2)
    multipliers = np.concatenate([np.zeros((len(theta), 1, 2)), free], axis=1)[:, arm]
    u = x + multipliers[..., 0]
    v = z + multipliers[..., 1]
    terms = np.stack([np.broadcast_to(theta[:, :1], u.shape), theta[:, 1:2] - alpha * u, theta[:, 2:3] - beta * v])
    top = terms.max(0)
    parts = np.exp(terms - top)
    total = parts.sum(0)
    p_e, p_n, p_d = parts / total
    jacobian = np.zeros((*u.shape, theta.shape[1]))
    jacobian[..., 0], jacobian[..., 1], jacobian[..., 2] = p_e, p_n, p_d
    jacobian[..., 3], jacobian[..., 4] = -p_n * alpha * u, -p_d * beta * v
    for k in range(free.shape[1]):
        mine = arm == k + 1
        jacobian[..., _SHARED + 2 * k] = -p_n * alpha * mine
        jacobian[..., _SHARED + 2 * k + 1] = -p_d * beta * mine
    return top + np.log(total), jacobian


def _minimise(problem: _Problem, theta: Array, y: Array, weights: Array, iterations: int) -> tuple[Array, Array]:
    """Levenberg-Marquardt on the reweighted squares of the Huber loss, for many fits at once.

    `theta` is (fits, constants); `y` and `weights` are (fits, runs), or (1, runs) where all fits share them. Returns
    the constants and the Huber loss of each fit.
    """
    low, high = problem.bounds()
    theta = np.clip(theta, low, high)
    damping = np.full(len(theta), 1e-2)
    fitted, jacobian = _log_loss(theta, problem.x, problem.z, problem.arm)
    residuals = y - fitted
    loss = _huber(residuals, weights)
    diagonal = np.arange(theta.shape[1])
    for _ in range(iterations):
        pull = weights * np.minimum(1.0, DELTA / np.maximum(np.abs(residuals), 1e-300))
        weighted = jacobian * pull[..., None]
        normal = np.swapaxes(weighted, 1, 2) @ jacobian
        gradient = (np.swapaxes(weighted, 1, 2) @ residuals[..., None])[..., 0]
        scale = normal[:, diagonal, diagonal]
        normal[:, diagonal, diagonal] += damping[:, None] * scale + 1e-12 * scale.max(1, keepdims=True) + 1e-300
        step = np.linalg.solve(normal, gradient[..., None])[..., 0]
        trial = np.clip(theta + np.clip(step, -1.0, 1.0), low, high)
        fitted_there, jacobian_there = _log_loss(trial, problem.x, problem.z, problem.arm)
        residuals_there = y - fitted_there
        loss_there = _huber(residuals_there, weights)
        better = loss_there < loss
        theta = np.where(better[:, None], trial, theta)
        jacobian = np.where(better[:, None, None], jacobian_there, jacobian)
        residuals = np.where(better[:, None], residuals_there, residuals)
        gain = loss - loss_there
        loss = np.where(better, loss_there, loss)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e6)
        if not (better & (gain > 1e-9 * loss)).any() and (damping > 1e3).all():
            break
    return theta, loss


def _huber(residuals: Array, weights: Array) -> Array:
    size = np.abs(residuals)
    value: Array = (weights * np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))).sum(-1)
    return value
