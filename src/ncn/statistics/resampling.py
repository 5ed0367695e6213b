"""Intervals and p-values from resampled data: percentile intervals, a bootstrap over documents, permutation tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
PERMUTATIONS = 999
FEWEST = 5
"""Fewer documents than this carry no interval."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and, where there is a null hypothesis, the p-value of a permutation test."""

    value: float
    low: float
    high: float
    p: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "p": self.p}


class Resampling:
    """One set of bootstrap samples of the documents, used by every measure, and the random numbers of the tests.

    A measure that is a function of sums over documents is computed for all samples at once: a sample is a row of
    counts, "how often is each document in it", and its sums are that row times the documents' own sums.
    """

    def __init__(self, unit: NDArray[np.int64], seed: int) -> None:
        self.unit, self.units = unit, int(unit.max()) + 1
        self.random = np.random.default_rng(seed)

    @cached_property
    def counts(self) -> NDArray[np.float64]:
        """How often each sample holds each document, (samples, documents); the first row is the data themselves."""
        drawn = self.random.multinomial(self.units, [1 / self.units] * self.units, size=RESAMPLES)
        return np.vstack([np.ones(self.units), drawn]).astype(np.float64)

    def sums(self, values: Array) -> NDArray[np.float64]:
        """Sums of per-token values (tokens, ...) over each document: (documents, ...)."""
        flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
        # tokens lie in the order of their documents
        order = np.argsort(self.unit, kind="stable")
        starts = np.searchsorted(self.unit[order], np.arange(self.units))
        return np.add.reduceat(flat[order], starts, axis=0).reshape(self.units, *np.shape(values)[1:])

    def estimate(
        self, measure: Callable[..., Array], *sums: Array, p: float | None = None, counts: Array | None = None
    ) -> Estimate:
        """`measure` of the sums over all documents, with the interval over the bootstrap samples.

        `sums` are (documents, ...); `measure` gets them summed for every sample, (samples, ...), and gives (samples,).
        """
        counts = self.counts if counts is None else counts
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = measure(*(np.tensordot(counts, part, 1) for part in sums))
        low, high = percentile_interval(drawn[1:])
        return Estimate(float(drawn[0]), low, high, p)

    def ratio(self, numerator: Array, denominator: Array, p: float | None = None) -> Estimate:
        """The ratio of two sums over documents."""
        return self.estimate(lambda above, below: above / below, numerator, denominator, p=p)

    def sign_flips(self, differences: Array, *, sides: int = 2) -> float:
        """p-value of "the sum of these differences, one a document, is zero", by flipping their signs at random.

        With `sides=1` only a positive sum counts as evidence.
        """
        differences = np.asarray(differences, dtype=np.float64)
        scale = float(np.abs(differences).max(initial=0.0))
        if scale == 0:
            return 1.0
        signs = self.random.choice((-1.0, 1.0), (PERMUTATIONS, len(differences)))
        flipped, observed = signs @ (differences / scale), float((differences / scale).sum())
        return p_value(np.abs(flipped), abs(observed)) if sides == 2 else p_value(flipped, observed)


def p_value(permuted: Array, observed: float) -> float:
    """The share of permutations, the data themselves among them, in which the statistic is at least as large."""
    return float((1 + np.sum(permuted >= observed * (1 - 1e-12))) / (1 + len(permuted)))


def percentile_interval(drawn: Array) -> tuple[float, float]:
    """The middle 95 % of a statistic's values over resampled data; of the finite ones, NaN where there is none."""
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def with_interval(value: float, drawn: Array) -> dict[str, float]:
    """A statistic and the percentile interval of its values over resampled data, for JSON."""
    low, high = percentile_interval(drawn)
    return {"value": value, "low": low, "high": high}
