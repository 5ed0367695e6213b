"""A run's learning curve: smoothed, followed by a power law, and judged converged, still improving or diverging.

The curve is smoothed by a local straight line in the logarithm of tokens. Residuals around it resemble their
neighbours, so intervals come from a bootstrap that turns whole blocks of residuals together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ncn.statistics.interval import Interval

Array = NDArray[np.float64]
Unit = Literal["bits per byte", "nats per token"]
Verdict = Literal["converged", "still improving", "diverging", "cannot be told"]

FEWEST = 12  # points of a curve
MOST = 800  # points that are worked with; a longer log is averaged in groups
BANDWIDTH = 0.08  # of the smoother, in natural logarithms of tokens: about 8 % of the tokens seen to either side
WARM_UP = 0.1  # part of the tokens before which a curve is not expected to follow a power law
DRAWS = 400
SETTLED = 0.005  # of the whole improvement, per doubling of tokens: less is converged
RISEN = 0.05  # of the whole improvement, above the lowest point: more is diverging
FARTHEST = 10.0  # times a run's tokens: no power law is followed beyond


@dataclass(frozen=True)
class PowerLaw:
    """L(t) = E + A t^−b over the tokens t after the warm-up, with 95 % intervals."""

    floor: Interval
    scale: Interval
    exponent: Interval
    draws: tuple[Array, Array, Array]  # E, A, b of every bootstrap draw
    first: float  # tokens from which on it was fitted
    last: float
    miss: float  # largest distance of the smoothed curve from the law

    def at(self, tokens: Array) -> Array:
        result: Array = self.floor.value + self.scale.value * tokens**-self.exponent.value
        return result

    def tokens_to_loss(self, loss: float) -> Interval:
        """Tokens at which the law reaches `loss`: infinite where it never does, or only beyond ten times the tokens
        that it was fitted to, where it is not followed."""
        values = (np.array([self.floor.value]), np.array([self.scale.value]), np.array([self.exponent.value]))
        (value,), draws = (self._reached(constants, loss) for constants in (values, self.draws))
        return Interval.of(value, draws)

    def _reached(self, constants: tuple[Array, Array, Array], loss: float) -> Array:
        floor, scale, exponent = constants
        above = loss > floor
        logs = np.log(scale / np.where(above, loss - floor, 1.0)) / exponent
        within = above & (logs <= math.log(FARTHEST * self.last))
        result: Array = np.where(within, np.exp(np.minimum(logs, 700)), np.inf)
        return result

    def as_dict(self) -> dict[str, Any]:
        return {"E": self.floor.as_dict(), "A": self.scale.as_dict(), "b": self.exponent.as_dict(), "miss": self.miss}


@dataclass(frozen=True)
class Curve:
    """The losses of one run against tokens, in one unit; `broken` where the log ends in something that is no number."""

    name: str
    tokens: Array
    losses: Array
    unit: Unit
    kind: Literal["training", "validation"] = "training"
    broken: bool = False

    @cached_property
    def _smoother(self) -> Array:
        return _local_line(np.log(self.tokens))

    @cached_property
    def smooth(self) -> Array:
        result: Array = self._smoother @ self.losses
        return result

    @cached_property
    def draws(self) -> Array:
        """Bootstrap curves, smoothed: (draws, points)."""
        residuals = (self.losses - self.smooth) / (1 - np.minimum(np.diag(self._smoother), 0.8))
        noisy = self.smooth + _turned_blocks(residuals, np.random.default_rng(0))
        result: Array = noisy @ self._smoother.T
        return result

    @property
    def final(self) -> Interval:
        return Interval.of(self.smooth[-1], self.draws[:, -1])

    @property
    def improvement(self) -> float:
        """The fall from the first point to the lowest, of the smooth curve."""
        return float(self.smooth[0] - self.smooth.min())

    def tokens_to_share(self, share: float) -> Interval:
        """Tokens after which the smooth curve has fallen by this share of its whole improvement."""
        curves = np.concatenate([self.smooth[None], self.draws])
        targets = curves[:, 0] - share * (curves[:, 0] - curves.min(1))
        reached = _first_reached(self.tokens, curves, targets)
        return Interval.of(reached[0], reached[1:])

    def tokens_to_loss(self, other: Curve) -> Interval:
        """Tokens that this run needs for the final loss of `other`; infinite where it never gets there."""
        reached = _first_reached(self.tokens, self.smooth[None], other.smooth[-1:])
        draws = _first_reached(self.tokens, self.draws, other.draws[:, -1])
        return Interval.of(reached[0], draws)

    @cached_property
    def slope(self) -> Interval:
        """Change of the loss per doubling of tokens, over the last half of the tokens."""
        late = self.tokens >= self.tokens[-1] / 2
        x = np.log2(self.tokens[late])
        x = x - x.mean()
        y = self.losses[late]
        value = float(x @ y / (x @ x))
        residuals, blocks = _enlarged(y - y.mean() - value * x, 2)
        noise = _turned_blocks(residuals, np.random.default_rng(1))
        return Interval.of(value, value + noise @ x / (x @ x), blocks)

    @cached_property
    def power_law(self) -> PowerLaw | None:
        """The least-squares power law after the warm-up; None for a curve that does not fall."""
        kept = self.tokens >= max(WARM_UP * self.tokens[-1], self.tokens[0])
        t, y = self.tokens[kept], self.losses[kept]
        if len(y) < 6:
            return None
        fit = _power_law(t, y[None])
        values = [float(part[0]) for part in fit]
        if values[1] <= 0:
            return None
        fitted = values[0] + values[1] * t ** -values[2]
        residuals, blocks = _enlarged(y - fitted, 3)
        draws = _power_law(t, fitted + _turned_blocks(residuals, np.random.default_rng(2)))
        floor, scale, exponent = (Interval.of(v, d, blocks) for v, d in zip(values, draws, strict=True))
        miss = float(np.abs(self.smooth[kept] - fitted).max())
        return PowerLaw(floor, scale, exponent, draws, float(t[0]), float(t[-1]), miss)

    @property
    def verdict(self) -> Verdict:
        if self.broken or self.smooth[-1] - self.smooth.min() > RISEN * self.improvement:
            return "diverging"
        settled = SETTLED * self.improvement
        if self.slope.high < -settled:
            return "still improving"
        if self.slope.low > settled:
            return "diverging"
        return "converged" if self.slope.low >= -settled and self.slope.high <= settled else "cannot be told"


def make_curve(
    name: str, tokens: Array, losses: Array, unit: Unit, kind: Literal["training", "validation"] = "training"
) -> Curve:
    """A curve from a log: what follows the first loss that is no number is left out, and a long log averaged in groups
    of neighbours. `tokens` must increase."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        tokens, losses = tokens[: bad[0]], losses[: bad[0]]
    group = -(-len(tokens) // MOST)
    if group > 1:
        edges = np.arange(0, len(tokens), group)
        sizes = np.diff([*edges, len(tokens)])
        tokens, losses = (np.add.reduceat(values, edges) / sizes for values in (tokens, losses))
    return Curve(name, tokens, losses, unit, kind, broken=bool(len(bad)))


def block_length(residuals: Array) -> int:
    """Neighbours that are turned together: one where neighbours are independent, otherwise twice as many as stay
    correlated, and no more than leave ten blocks."""
    count = len(residuals)
    centred = residuals - residuals.mean()
    correlation = np.fft.irfft(np.abs(np.fft.rfft(centred, 2 * count)) ** 2)[:count]
    small = np.flatnonzero(correlation <= 2 / math.sqrt(count) * correlation[0])
    lag = int(small[0]) if len(small) else count
    return int(max(1, min(1 if lag <= 1 else 2 * lag, count // 10)))


def _enlarged(residuals: Array, constants: int) -> tuple[Array, int]:
    """Residuals enlarged by what fitting this many constants took from them, and the number of their blocks."""
    blocks = max(len(residuals) // block_length(residuals), constants + 2)
    return residuals * math.sqrt(blocks / (blocks - constants)), blocks


def _turned_blocks(residuals: Array, generator: np.random.Generator) -> Array:
    """Residuals that might have been, (draws, points): blocks of the real ones, each with its sign kept or changed, cut
    at a random place in every draw. A part of the curve that is noisier stays so."""
    length = block_length(residuals)
    offsets = generator.integers(0, length, (DRAWS, 1))
    block = (np.arange(len(residuals)) + offsets) // length
    signs = generator.choice([-1.0, 1.0], (DRAWS, int(block.max()) + 1))
    result: Array = residuals * np.take_along_axis(signs, block, axis=1)
    return result


def _local_line(x: Array) -> Array:
    """The matrix that smooths values at `x`: at every point a straight line through its neighbourhood, with weights
    that fall off as a normal density. The neighbourhood is never narrower than the third nearest point."""
    distance = np.abs(x[:, None] - x[None, :])
    width = np.maximum(BANDWIDTH, np.sort(distance, axis=1)[:, min(3, len(x) - 1)])[:, None]
    weights = np.exp(-((distance / width) ** 2) / 2)
    offset = x[None, :] - x[:, None]
    s0, s1, s2 = (np.sum(weights * offset**power, axis=1, keepdims=True) for power in (0, 1, 2))
    result: Array = weights * (s2 - s1 * offset) / (s0 * s2 - s1**2)
    return result


def _first_reached(tokens: Array, curves: Array, targets: Array) -> Array:
    """Where each curve first comes down to its target, between two points by the logarithm of tokens; infinite where
    it never does."""
    below = curves <= targets[:, None]
    place = np.where(below.any(1), below.argmax(1), 0)
    rows = np.arange(len(curves))
    before = np.maximum(place - 1, 0)
    high, low = curves[rows, before], curves[rows, place]
    share = np.where(high > low, (high - targets) / np.where(high > low, high - low, 1.0), 1.0)
    logs = np.log(tokens)
    reached = np.exp(logs[before] + np.clip(share, 0, 1) * (logs[place] - logs[before]))
    result: Array = np.where(below.any(1), reached, np.inf)
    return result


def _power_law(t: Array, y: Array) -> tuple[Array, Array, Array]:
    """E, A and b of least squares for every row of `y`: for each of many exponents the best line in t^−b, with E ≥ 0,
    and around the best exponent a parabola."""
    logs = np.linspace(math.log(0.02), math.log(3.0), 300)
    scale = math.exp(float(np.log(t).mean()))  # keeps t^−b of order one
    x = (t / scale)[None, :] ** -np.exp(logs)[:, None]
    costs = _line(x, y @ x.T, y)[2]
    best = costs.argmin(1)
    inner = np.clip(best, 1, len(logs) - 2)
    rows = np.arange(len(y))
    left, middle, right = (costs[rows, inner + shift] for shift in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, np.clip((left - right) / np.where(bend > 0, 2 * bend, 1.0), -1, 1), 0.0)
    exponents = np.exp(np.where(best == inner, logs[inner] + shift * (logs[1] - logs[0]), logs[best]))
    x = (t / scale)[None, :] ** -exponents[:, None]
    floor, slope, _ = (part[:, 0] for part in _line(x, np.sum(x * y, axis=1, keepdims=True), y, own=True))
    return floor, slope * scale**exponents, exponents


def _line(x: Array, xy: Array, y: Array, own: bool = False) -> tuple[Array, Array, Array]:
    """Least squares y ≈ E + A x with E ≥ 0: E, A and the sum of squares, each (rows of y, rows of x), or (rows of y, 1)
    where every row of y has its `own` row of x. `xy` holds the products of the rows."""
    count = y.shape[1]
    sx, sxx = x.sum(1), np.sum(x * x, axis=1)
    sx, sxx = (sx[:, None], sxx[:, None]) if own else (sx[None], sxx[None])
    sy, syy = y.sum(1)[:, None], np.sum(y * y, axis=1)[:, None]
    slope = (xy - sx * sy / count) / (sxx - sx**2 / count)
    floor = (sy - slope * sx) / count
    slope = np.where(floor < 0, xy / sxx, slope)
    floor = np.maximum(floor, 0.0)
    cost = syy - 2 * floor * sy - 2 * slope * xy + count * floor**2 + 2 * floor * slope * sx + slope**2 * sxx
    return floor, slope, cost
