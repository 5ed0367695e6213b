"""The statistics of stories written at several values of a slider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ncn.statistics.resampling import with_interval

SETTINGS = tuple(number / 6 for number in range(7))
"""The values that a slider is set to."""
_RESAMPLES = 400
Array = npt.NDArray[np.float64]


def describe(name: str, attributes: Sequence[str], ranks: Array, corpus: Mapping[str, float]) -> dict[str, Any]:
    """What the slider `name` does.

    Args:
        attributes: what was measured.
        ranks: of the stories, (attributes, seeds, settings, prompts), from 0 to 1.
        corpus: the rank correlation of every attribute with that of this slider among documents of the data.

    Returns:
        Spearman's correlation of slider and attribute story by story, and the slope, with 95 % intervals over prompts;
        the correlation of the means; the leakage onto each other attribute, as it is, and beyond what the attribute's
        correlation in the corpus brings with it (leakage − obedience · correlation); all attributes' means.
    """
    own = ranks[attributes.index(name)]
    settings = settings_like(own)
    obedience = spearman(settings, own)
    leakage = {
        attribute: spearman(settings, ranks[row]) for row, attribute in enumerate(attributes) if attribute != name
    }
    return {
        "spearman": with_interval(obedience, resampled_spearman(own)),
        "spearman_of_means": spearman(np.array(SETTINGS), own.mean((0, 2))),
        "slope": with_interval(_slope(settings, own), _resampled(own, _slope)),
        "leakage": {
            attribute: {"value": value, "beyond_corpus": value - obedience * corpus[attribute]}
            for attribute, value in leakage.items()
        },
        "means": {attribute: ranks[row].mean((0, 2)).tolist() for row, attribute in enumerate(attributes)},
    }


def settings_like(own: Array) -> Array:
    """The slider's value at every entry of (seeds, settings, prompts)."""
    return np.broadcast_to(np.array(SETTINGS)[None, :, None], own.shape)


def spearman(one: Array, other: Array) -> float:
    """Rank correlation over all entries, with mean ranks for ties; 0 where one of them does not vary."""
    ranked = [_mean_ranks(values.ravel()) for values in (one, other)]
    if min(values.std() for values in ranked) == 0:
        return 0.0
    return float(np.corrcoef(ranked[0], ranked[1])[0, 1])


def resampled_spearman(own: Array) -> Array:
    """The correlation of slider and attribute over and over, each time with other prompts; the same ones every time
    this is asked, so that two models on the same prompts are compared by subtracting."""
    return _resampled(own, spearman)


def distinct(stories: Sequence[Sequence[int]], size: int, tokens: int) -> float:
    """Different runs of `size` tokens, as a share of all in the first `tokens` of the stories; runs lie within one."""
    runs: list[tuple[int, ...]] = []
    for story in stories:
        kept = story[:tokens]
        tokens -= len(kept)
        runs += [tuple(kept[i : i + size]) for i in range(len(kept) - size + 1)]
    return len(set(runs)) / max(len(runs), 1)


def _resampled(own: Array, statistic: Any) -> Array:
    generator, prompts = np.random.Generator(np.random.PCG64(0)), own.shape[-1]
    draws = generator.integers(prompts, size=(_RESAMPLES, prompts))
    settings = settings_like(own)
    return np.array([statistic(settings, own[..., drawn]) for drawn in draws])


def _mean_ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return ranks


def _slope(x: Array, y: Array) -> float:
    centred = x - x.mean()
    return float((centred * y).sum() / (centred * centred).sum())
