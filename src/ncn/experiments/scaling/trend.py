"""What a ladder of runs says beside the law itself: how the gap moves with size, how well the law foretells the
largest size, and what it projects beyond."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ncn.errors import UserError
from ncn.experiments.scaling.law import Array, Point, ScalingFit, fit_scaling_law
from ncn.statistics.interval import Interval
from ncn.statistics.seeds import LEVEL, student_quantile

FARTHEST = 10.0
"""Nothing is projected beyond this many times the largest compute that was run."""

TARGETS: Mapping[str, float] = {"18M": 18e6, "100M": 100e6, "350M": 350e6, "1B": 1e9}


@dataclass(frozen=True)
class Trend:
    """How the gap, the baseline's loss less the arm's, moves with size at equal tokens.

    One value a size, the mean over the tokens and seeds that all sizes have; a straight line in the logarithm of size.
    Sizes are the independent units of the interval: the runs of one size share its learning rate and its batches.
    """

    parameters: Array
    gaps: Array
    tokens: tuple[float, ...]
    mean: Interval
    slope: Interval  # per doubling of size

    @property
    def verdict(self) -> Literal["widens", "narrows", "cannot be told"]:
        if self.slope.low > 0:
            return "widens"
        return "narrows" if self.slope.high < 0 else "cannot be told"

    def line(self, parameters: Array) -> tuple[Array, Array, Array]:
        """The fitted line at these sizes, and the ends of its 95 % band."""
        x, freedom = np.log2(self.parameters), len(self.gaps) - 2
        at = self.gaps.mean() + self.slope.value * (np.log2(parameters) - x.mean())
        spread = float(np.sum((x - x.mean()) ** 2))
        error = (self.slope.high - self.slope.value) / student_quantile((1 + LEVEL) / 2, freedom) * math.sqrt(spread)
        reach = error * np.sqrt(1 / len(x) + (np.log2(parameters) - x.mean()) ** 2 / spread)
        reach = reach * student_quantile((1 + LEVEL) / 2, freedom)
        return at, at - reach, at + reach

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "slope_per_doubling_of_size": self.slope.as_dict(),
            "mean_gap": self.mean.as_dict(),
            "tokens": list(self.tokens),
            "sizes": [
                {"parameters": float(n), "gap": float(gap)} for n, gap in zip(self.parameters, self.gaps, strict=True)
            ],
        }


def gap_trend(points: Sequence[Point], arm: str, baseline: str = "baseline") -> Trend:
    """The trend of the gap with size; raises `UserError` with fewer than three sizes that share tokens and seeds."""
    paired: dict[str, dict[tuple[float, int], float]] = {}
    parameters: dict[str, float] = {}
    theirs = {(point.size, point.tokens, point.seed): point for point in points if point.arm == baseline}
    for point in points:
        other = theirs.get((point.size, point.tokens, point.seed))
        if point.arm == arm and other:
            paired.setdefault(point.size, {})[(point.tokens, point.seed)] = other.loss - point.loss
            parameters[point.size] = point.parameters
    common = set.intersection(*map(set, paired.values())) if paired else set()
    if len(paired) < 3 or not common:
        raise UserError(f"the gap of {arm} needs at least 3 sizes that were run with the same tokens as {baseline}")
    sizes = sorted(paired, key=parameters.__getitem__)
    gaps = np.array([np.mean([paired[size][key] for key in sorted(common)]) for size in sizes])
    n = np.array([parameters[size] for size in sizes], dtype=np.float64)
    x = np.log2(n) - np.log2(n).mean()
    slope = float(x @ gaps / (x @ x))
    freedom = len(x) - 2
    error = math.sqrt(float(np.sum((gaps - gaps.mean() - slope * x) ** 2)) / freedom)
    reach = student_quantile((1 + LEVEL) / 2, freedom) * error
    mean = float(gaps.mean())
    around, per_doubling = reach / math.sqrt(len(x)), reach / math.sqrt(float(x @ x))
    return Trend(
        parameters=n,
        gaps=gaps,
        tokens=tuple(sorted({float(tokens) for tokens, _ in common})),
        mean=Interval(mean, mean - around, mean + around),
        slope=Interval(slope, slope - per_doubling, slope + per_doubling),
    )


def hold_out_largest(points: Sequence[Point], baseline: str = "baseline", draws: int = 400) -> dict[str, Any]:
    """Fit the law without the largest size, and compare what it says about that size with what came out."""
    largest = max(points, key=lambda point: point.parameters).size
    kept = [point for point in points if point.size != largest]
    if len({point.size for point in kept}) < 3:
        raise UserError("holding out the largest size needs at least 4 sizes")
    fit = fit_scaling_law(kept, baseline=baseline, draws=draws)
    rows, errors = [], []
    for point in sorted(p for p in points if p.size == largest):
        said = fit.predict(point.arm, point.parameters, point.tokens)
        rows.append(
            {"arm": point.arm, "tokens": point.tokens, "seed": point.seed, "loss": point.loss,
             "predicted": said.as_dict(), "error": said.value - point.loss}
        )  # fmt: skip
        errors.append(abs(said.value - point.loss) / point.loss)
    return {"size": largest, "runs": rows, "mean_absolute_relative_error": float(np.mean(errors))}


def compute(parameters: int | float, tokens: int | float) -> float:
    """Training FLOPs by the usual count, 6 N D, with N counting the output head."""
    return 6.0 * parameters * tokens


def project(
    fit: ScalingFit, targets: Mapping[str, float] = TARGETS, per_parameter: float = 20.0
) -> list[dict[str, Any]]:
    """What the law says about larger models: with the most tokens that were run, and with `per_parameter` tokens for
    each parameter. A row beyond ten times the largest compute that was run holds no loss but the reason."""
    largest = max(compute(point.parameters, point.tokens) for point in fit.points)
    most = max(point.tokens for point in fit.points)
    rows = []
    for name, parameters in targets.items():
        budgets = {"most tokens run": most, f"{per_parameter:g} tokens a parameter": per_parameter * parameters}
        for rule, tokens in budgets.items():
            factor = compute(parameters, tokens) / largest
            row: dict[str, Any] = {"size": name, "parameters": parameters, "tokens": tokens, "rule": rule,
                                   "times_largest_compute": factor}  # fmt: skip
            if factor > FARTHEST:
                row["refused"] = f"{factor:.3g} times the largest compute that was run; {FARTHEST:g} is the limit"
            else:
                row["loss"] = {arm: fit.predict(arm, parameters, tokens).as_dict() for arm in fit.arms}
                row["advantage"] = {arm: fit.advantage(arm, parameters, tokens).as_dict() for arm in fit.arms[1:]}
            rows.append(row)
    return rows
