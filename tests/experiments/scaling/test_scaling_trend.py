"""The gap's trend with size, the held-out size, and the projection with its refusal."""

import numpy as np
import pytest
from test_scaling_law import SIZES, runs

from ncn.errors import UserError
from ncn.experiments.scaling.law import Point, fit_scaling_law
from ncn.experiments.scaling.trend import FARTHEST, Trend, compute, gap_trend, hold_out_largest, project


def ladder(slope: float, seed: int = 0, noise: float = 0.01, gap: float = 0.05) -> list[Point]:
    """A gap that moves by `slope` with every doubling of size, at two budgets."""
    generator = np.random.default_rng(seed)
    points = []
    for n in SIZES:
        for tokens in (5e5, 1e6):
            base = 3.0 + float(generator.normal(0, noise))
            at = gap + slope * np.log2(n / 5e5)
            other = 3.0 - float(at + generator.normal(0, noise))
            points += [Point("baseline", f"{n:g}", n, tokens, base), Point("ncn", f"{n:g}", n, tokens, other)]
    return points


@pytest.mark.parametrize(("slope", "verdict"), [(0.03, "widens"), (-0.03, "narrows"), (0.0, "cannot be told")])
def test_a_planted_trend_is_found_and_none_is_not(slope: float, verdict: str) -> None:
    trend = gap_trend(ladder(slope), "ncn")
    assert trend.verdict == verdict
    assert trend.slope.contains(slope)
    assert trend.as_dict()["verdict"] == verdict


def test_the_interval_holds_its_level() -> None:
    trends = [gap_trend(ladder(0.01, seed), "ncn") for seed in range(400)]
    share = np.mean([trend.slope.contains(0.01) for trend in trends])
    assert 0.92 <= share <= 0.98, share


def test_the_band_holds_the_line_and_widens_outwards() -> None:
    trend = gap_trend(ladder(0.02), "ncn")
    middle, ends = np.array([float(np.exp(np.log(trend.parameters).mean()))]), trend.parameters[[0, -1]]
    line, low, high = trend.line(middle)
    assert line[0] == pytest.approx(trend.gaps.mean())
    assert (low[0], high[0]) == pytest.approx((trend.mean.low, trend.mean.high))
    _, low_end, high_end = trend.line(ends)
    assert ((high_end - low_end) > (high - low)).all()


def test_only_runs_of_equal_tokens_are_paired() -> None:
    points = ladder(0.0)
    lone = Point("ncn", "9e9", 9e9, 5e5, 1.0)
    assert isinstance(gap_trend([*points, lone], "ncn"), Trend)
    with pytest.raises(UserError, match="at least 3 sizes"):
        gap_trend([p for p in points if p.arm == "baseline" or p.size == "90000"], "ncn")


def test_the_largest_size_is_foretold() -> None:
    result = hold_out_largest(runs(), draws=100)
    assert result["size"] == "3.1e+06"
    assert len(result["runs"]) == 6
    assert result["mean_absolute_relative_error"] < 0.015
    spoilt = [p._replace(loss=p.loss * 1.2) if p.size == "3.1e+06" else p for p in runs()]
    assert hold_out_largest(spoilt, draws=20)["mean_absolute_relative_error"] > 0.1
    with pytest.raises(UserError, match="at least 4 sizes"):
        hold_out_largest(runs(sizes=SIZES[:3]))


def test_no_projection_beyond_ten_times_the_largest_compute() -> None:
    fit = fit_scaling_law(runs(), draws=50)
    largest = compute(SIZES[-1], 1e6)
    rows = project(fit)
    assert {row["size"] for row in rows} == {"18M", "100M", "350M", "1B"}
    for row in rows:
        beyond = compute(row["parameters"], row["tokens"]) > FARTHEST * largest
        assert ("refused" in row) == beyond == ("loss" not in row)
    allowed = [row for row in rows if "loss" in row]
    assert [(row["size"], row["rule"]) for row in allowed] == [("18M", "most tokens run")]
    said = allowed[0]["loss"]["baseline"]
    assert said["low"] < 1.2 + 18**-0.4 + 2**-0.35 < said["high"]
    assert "10 is the limit" in rows[-1]["refused"]
