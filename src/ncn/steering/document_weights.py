"""Weights for documents under which sliders tell nothing about anything else.

Stories with more dialogue have more questions, too, so that a slider for the one learns to move the other. Weighted
like this they do not: each slider's correlation with every other attribute is zero, and every mean is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ncn.errors import UserError

LOWEST, HIGHEST = 0.1, 10.0
"""Bounds of a weight: no document is left out, and none stands for very many."""
_TOLERANCE = 1e-6
_STEPS = 200

Array = npt.NDArray[np.float64]


def balancing_weights(attributes: Array, sliders: Sequence[str], names: Sequence[str]) -> Array:
    """Weights (documents,) with a mean of 1, as near to equal as they can be (least squares) within their bounds.

    They are stable balancing weights (Zubizarreta, Stable weights that balance covariates, 2015): min Σ (w − 1)² such
    that Σ w f = 0 for every f of a document that is to vanish on average, in closed form but for one number λ for each
    f, w = min(max(1 + Σ λ f, lowest), highest), which Newton's method finds.

    Args:
        attributes: (documents, names) ranks; NaN, where there is none, counts as the mean.
        sliders: those of the `names` that are to be balanced against all others.

    Raises:
        UserError: no weights within the bounds balance them, as where an attribute is nearly a copy of a slider.
    """
    centred = attributes - np.nanmean(attributes, 0)
    scaled = np.nan_to_num(centred) / np.maximum(np.nanstd(attributes, 0), 1e-12)
    pairs = sorted({(min(i, j), max(i, j)) for i in map(names.index, sliders) for j in range(len(names)) if i != j})
    terms = np.stack([np.ones(len(scaled)), *scaled.T, *(scaled[:, i] * scaled[:, j] for i, j in pairs)], 1)
    wanted = np.zeros(terms.shape[1])
    wanted[0] = 1

    def weights(multipliers: Array) -> Array:
        return np.clip(terms @ multipliers, LOWEST, HIGHEST)

    def dual(multipliers: Array) -> float:  # its gradient is what is still missing
        free, clipped = terms @ multipliers, weights(multipliers)
        return float((clipped * (free - clipped / 2)).mean() - wanted @ multipliers)

    multipliers = wanted.copy()
    for _ in range(_STEPS):
        missing = terms.T @ weights(multipliers) / len(terms) - wanted
        if np.abs(missing).max() < _TOLERANCE:
            return weights(multipliers)
        inside = terms[weights(multipliers) == terms @ multipliers]
        step = np.linalg.solve(inside.T @ inside / len(terms) + 1e-9 * np.eye(len(wanted)), missing)
        size = 1.0
        while dual(multipliers - size * step) > dual(multipliers) - 1e-4 * size * (missing @ step) and size > 1e-9:
            size /= 2
        multipliers = multipliers - size * step
    one, other = pairs[int(np.abs(missing[1 + len(names) :]).argmax())]
    correlation = np.mean(scaled[:, one] * scaled[:, other])
    raise UserError(
        f"no weights of documents between {LOWEST:g} and {HIGHEST:g} take {names[one]} and {names[other]} apart, which "
        f"correlate by {correlation:.2f}; leave out train.balance_sliders, or that slider"
    )
