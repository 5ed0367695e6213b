"""Stereotyping: whether a few keywords alone decide what the signals do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncn.data.tokenizer import Tokenizer
from ncn.diagnosis.readers import Reader
from ncn.diagnosis.record import SHORTEST, Floats, Ids, Record, Text, read_texts
from ncn.diagnosis.variance import text_borders
from ncn.statistics.resampling import FEWEST, PERMUTATIONS, RESAMPLES, Resampling, p_value, percentile_interval

KEYWORDS = (
    ("dog", "ball", "park"),
    ("girl", "cake", "kitchen"),
    ("bird", "seed", "tree"),
    ("boy", "boat", "lake"),
    ("cat", "fish", "house"),
    ("bear", "honey", "forest"),
    ("king", "crown", "castle"),
    ("mouse", "cheese", "hole"),
    ("farmer", "corn", "field"),
    ("frog", "flower", "pond"),
)
FRAMES = {
    "story": "Once upon a time, a {0} took a {1} to the {2}.",
    "question": "Where did the {0} take the {1}? To the {2}?",
    "list": "{0}, {1}, {2}.",
    "order": "Take the {1} to the {2} now, {0}!",
}
FEWEST_STORIES = 30

_PENALTIES = (0.3, 1.0, 3.0, 10.0, 100.0)
_FOLDS = 5


def from_first_sentence(record: Record, tokenizer: Tokenizer, resampling: Resampling) -> dict[str, Any] | None:
    """How well the words of a document's first sentence predict the mean signals of what follows it.

    For each signal: R² over documents, cross-validated, of kernel ridge regression on the bag of the first sentence's
    tokens, with its interval; p is that of "the first sentence says nothing", by giving every document another one's
    first sentence. "between": the share of the signal's variance over tokens that lies between documents at all, the
    most that could be predicted. None with fewer than 30 documents.
    """
    ids = np.unique(record.tokens)
    ends = {
        token for token, label in zip(ids.tolist(), tokenizer.token_labels(ids.tolist()), strict=True) if _ends(label)
    }
    stops = np.isin(record.tokens, list(ends))
    bags, parts = [], []
    for start, end in text_borders(record):
        first = np.flatnonzero(stops[start + 1 : end])
        split = start + 2 + int(first[0]) if len(first) else end
        if record.begins[start] and end - split >= SHORTEST // 2:
            bags.append(np.unique(record.tokens[start + 1 : split]))
            parts.append((split, end))
    names = [name for name in record.signals if record.varies(name)]
    if len(bags) < FEWEST_STORIES or not names:
        return None
    smoothers, centres = _smoothers(_kernel(bags), resampling)
    shuffled = np.stack([resampling.random.permutation(len(bags)) for _ in range(PERMUTATIONS)])
    drawn = resampling.random.integers(0, len(bags), (RESAMPLES, len(bags)))
    result = {}
    for name in names:
        columns = (record.columns(name) / record.spread(name)).astype(np.float64)
        means = np.stack([columns[start:end].mean(0) for start, end in parts])
        lengths = np.array([end - start for start, end in parts])
        whole = np.concatenate([columns[start:end] for start, end in parts])
        between = float((lengths[:, None] * (means - whole.mean(0)) ** 2).sum() / ((whole - whole.mean(0)) ** 2).sum())
        total = ((means - centres @ means) ** 2).sum(1)
        errors = np.stack([((means - smoother @ means) ** 2).sum(1) for smoother in smoothers])
        best = errors[errors.sum(1).argmin()]
        observed = 1 - best.sum() / total.sum()
        low, high = percentile_interval(1 - best[drawn].sum(1) / total[drawn].sum(1))
        chance = np.array([_best_r2(means[order], smoothers, centres) for order in shuffled])
        estimate = {"value": float(observed), "low": low, "high": high, "p": p_value(chance, float(observed))}
        result[name] = {"r2": estimate, "between": between}
    return {"documents": len(bags), "signals": result}


def across_tasks(reader: Reader, record: Record, tokenizer: Tokenizer, resampling: Resampling) -> dict[str, Any]:
    """How far the same keywords in another task, and other keywords in the same task, move the signals.

    Ten sets of keywords are put into four frames: a story, a question, a list and an order. Every text is a point, its
    signals' means over its tokens in standard deviations over the corpus. "same_words" is the root mean square distance
    per column between texts with the same keywords in different frames, "same_frame" that between texts with different
    keywords in the same frame, and "words" and "frame" are the shares of the points' variance that keywords and frames
    account for. Intervals are over sets of keywords, p-values by exchanging keywords within frames and the reverse.
    Without signals where fewer than five sets fit into the model's context.
    """
    rows = [[_with_separator(tokenizer, frame.format(*words)) for frame in FRAMES.values()] for words in KEYWORDS]
    rows = [row for row in rows if max(map(len, row)) <= reader.context_length]
    names = [name for name in record.signals if record.varies(name)]
    result: dict[str, Any] = {"keywords": len(rows), "frames": list(FRAMES), "signals": {}}
    if len(rows) < FEWEST:
        return result
    texts = [Text(ids, number, True) for number, row in enumerate(rows) for ids in row]
    _, signals = read_texts(reader, texts)
    borders = np.cumsum([0, *(len(text.ids) for text in texts)])
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        chosen = names if name == "all" else [name]
        scaled = np.concatenate([signals[each].reshape(borders[-1], -1) / record.spread(each) for each in chosen], 1)
        points = np.stack([scaled[a + 1 : b].mean(0) for a, b in pairwise(borders)])
        result["signals"][name] = _two_ways(points.reshape(len(rows), len(FRAMES), -1), resampling)
    return result


def _two_ways(points: Floats, resampling: Resampling) -> dict[str, Any]:
    """Distances and shares of variance of points (keywords, frames, columns)."""
    words = len(points)
    picks = [np.arange(words), *resampling.random.integers(0, words, (RESAMPLES // 2, words))]
    drawn = np.array([_distances(points[pick], pick) for pick in picks])
    observed = _shares(points)
    chance = np.array(
        [
            (_shares(_exchange(points, 0, resampling))[0], _shares(_exchange(points, 1, resampling))[1])
            for _ in range(PERMUTATIONS)
        ]
    )
    result: dict[str, Any] = {}
    for column, key in enumerate(("same_words", "same_frame", "words", "frame")):
        low, high = percentile_interval(drawn[1:, column])
        result[key] = {"value": float(drawn[0, column]), "low": low, "high": high, "p": None}
    for column, key in enumerate(("words", "frame")):
        result[key]["p"] = p_value(chance[:, column], observed[column])
    return result


def _exchange(points: Floats, axis: int, resampling: Resampling) -> Floats:
    """Keywords exchanged within each frame (axis 0), or frames within each set of keywords (axis 1), points whole."""
    order = np.argsort(resampling.random.random(points.shape[:2]), axis=axis)
    return np.take_along_axis(points, order[..., None], axis)


def _shares(points: Floats) -> tuple[float, float]:
    centred = points - points.mean((0, 1))
    total = (centred**2).mean()
    return float((centred.mean(1) ** 2).mean() / total), float((centred.mean(0) ** 2).mean() / total)


def _distances(points: Floats, pick: NDArray[np.intp]) -> tuple[float, float, float, float]:
    squares = ((points[:, :, None, None] - points[None, None]) ** 2).mean(-1)  # (words, frames, words, frames)
    frames = points.shape[1]
    same_words = np.einsum("afag->afg", squares)[:, ~np.eye(frames, dtype=bool)].mean()
    # a set of keywords that was drawn twice is no pair of different ones
    other = pick[:, None] != pick[None]
    same_frame = np.einsum("afbf->abf", squares)[other].mean() if other.any() else np.nan
    return float(same_words**0.5), float(same_frame**0.5), *_shares(points)


def _kernel(bags: Sequence[Ids]) -> Floats:
    """Cosine similarity of the bags, rarer tokens counting more."""
    tokens = np.unique(np.concatenate(bags))
    present = np.stack([np.isin(tokens, bag) for bag in bags]).astype(np.float64)
    weighted = present * np.log(len(bags) / present.sum(0))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    return np.asarray(weighted @ weighted.T)


def _smoothers(kernel: Floats, resampling: Resampling) -> tuple[list[Floats], Floats]:
    """Matrices that turn the documents' values into cross-validated predictions, one for each penalty; and the one that
    predicts the mean of the other folds."""
    size = len(kernel)
    fold = resampling.random.permutation(size) % _FOLDS
    centres = (fold[:, None] != fold[None]) / (fold[:, None] != fold[None]).sum(1, keepdims=True)
    smoothers = []
    for penalty in _PENALTIES:
        smoother = np.zeros((size, size))
        for number in range(_FOLDS):
            test, train = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
            inner = kernel[np.ix_(train, train)] + penalty * np.eye(len(train))
            weights = np.linalg.solve(inner, kernel[np.ix_(train, test)]).T
            smoother[np.ix_(test, train)] = weights - weights.sum(1, keepdims=True) / len(train)
        smoothers.append(smoother + centres)
    return smoothers, centres


def _best_r2(means: Floats, smoothers: Sequence[Floats], centres: Floats) -> float:
    total = ((means - centres @ means) ** 2).sum()
    return float(1 - min(((means - smoother @ means) ** 2).sum() for smoother in smoothers) / total)


def _with_separator(tokenizer: Tokenizer, text: str) -> Any:
    return np.array([tokenizer.separator_id, *tokenizer.encode(text)], dtype=np.int64)


def _ends(label: str) -> bool:
    return label.rstrip("\"'” \n")[-1:] in {".", "!", "?"}
