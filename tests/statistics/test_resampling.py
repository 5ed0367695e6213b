"""Percentile intervals of resampled values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ncn.statistics.resampling import percentile_interval, with_interval


def test_the_interval_is_the_middle_95_percent_of_what_is_finite() -> None:
    drawn = np.arange(1001.0)
    assert percentile_interval(drawn) == (25.0, 975.0)
    assert percentile_interval(np.append(drawn, [np.nan, np.inf])) == (25.0, 975.0)
    assert all(map(math.isnan, percentile_interval(np.array([np.nan]))))


def test_an_estimate_keeps_its_value() -> None:
    assert with_interval(7.0, np.arange(1001.0)) == pytest.approx({"value": 7.0, "low": 25.0, "high": 975.0})
