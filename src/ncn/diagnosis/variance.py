"""Where a signal's variance lies: between layers, and over tokens, by what explains it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncn.diagnosis.record import Floats, Record
from ncn.statistics.resampling import PERMUTATIONS, Resampling, p_value

STAGES = ("identity", "position", "bag")
PARTS = ("layers", "sites", "tokens_alike", "tokens_apart")

_FOLDS = 5
_LIGHT = 10.0
_PENALTIES = {"position": (_LIGHT, 1000.0), "bag": (_LIGHT, 300.0, 1e4, 1e5)}  # of each stage's own features
_POSITIONS = 128  # the first positions have a coefficient each, those after them share smooth ones
_KNOTS = 16
_WORDS, _BUCKETS = 192, 64


def specialisation(record: Record, name: str, resampling: Resampling) -> dict[str, Any] | None:
    """How a signal's variance over tokens, layers and sites divides, as shares that sum to 1; None if it has none.

    "layers" lies between the means of layers, "sites" between the means of heads (or sublayers) of one layer,
    "tokens_alike" is movement over tokens that all layers and sites share, and "tokens_apart" the rest: movement over
    tokens that differs from layer to layer or from head to head. The p-value of "layers" is that of "all layers have
    the same mean", by exchanging the layers of each document at random.
    """
    cube = record.cube(name).astype(np.float64)
    _, layers, sites = cube.shape
    if cube.std() <= 1e-7 * record.width(name):
        return None
    cube = cube - cube.mean()  # what is squared below stays near zero
    count = resampling.sums(np.ones(len(cube)))
    sums = resampling.sums(cube)
    squares = resampling.sums((cube**2).mean((1, 2)))
    alike = resampling.sums(cube.mean((1, 2)) ** 2)

    def shares(count: Floats, sums: Floats, squares: Floats, alike: Floats) -> dict[str, Floats]:
        means = sums / count[:, None, None]
        grand, of_layers = means.mean((1, 2)), means.mean(2)
        total = squares / count - grand**2
        parts = {
            "layers": ((of_layers - grand[:, None]) ** 2).mean(1),
            "sites": ((means - of_layers[..., None]) ** 2).mean((1, 2)),
            "tokens_alike": alike / count - grand**2,
        }
        parts["tokens_apart"] = total - sum(parts.values())
        return {part: value / total for part, value in parts.items()}

    p = _layers_differ(sums.mean(2) / count[:, None], resampling) if layers > 1 else None
    found = {
        part: resampling.estimate(
            lambda *given, part=part: shares(*given)[part],
            count,
            sums,
            squares,
            alike,
            p=p if part == "layers" else None,
        ).as_dict()
        for part in PARTS
    }
    return {"shares": found, "sites": sites, "layers": layers}


def _layers_differ(means: Floats, resampling: Resampling) -> float:
    """p-value of "a document's layers could change places", from the layers' means in each document."""
    observed = float(means.mean(0).var())
    permuted = np.empty(PERMUTATIONS)
    for number in range(PERMUTATIONS):
        permuted[number] = resampling.random.permuted(means, axis=1).mean(0).var()
    return p_value(permuted, observed)


def explained_by_tokens(record: Record, resampling: Resampling) -> dict[str, dict[str, Any]]:
    """How much of each signal's variance over tokens can be predicted without knowing the order of the words.

    {signal or "all": {"identity", "position", "bag": share added by which token it is, where it stands, and the bag of
    words so far, in this order; "unexplained": the rest, the phasic index; "position_alone": share explained by the
    position and nothing else}}. Shares are cross-validated R² over five folds of documents, so what is explained is
    explained on documents that were not used to fit. Each token's mean is shrunk towards the overall one; position and
    bag enter by ridge regression with the token's identity taken out on both sides. Tokens that do not occur in the
    other folds are left out. p is that of "this adds nothing", by flipping the signs of documents' differences.
    "all" joins the signals, each in units of its range. Signals that do not vary over tokens have no entry.
    """
    names = [name for name in record.signals if record.varies(name)]
    if not names or resampling.units < _FOLDS:
        return {}
    targets = np.concatenate([record.columns(name) / record.width(name) for name in names], 1).astype(np.float64)
    owner = np.repeat(np.arange(len(names)), [record.columns(name).shape[1] for name in names])
    places = _position_features(record)
    features = np.concatenate([places, _bag_features(record)], 1)
    splits = {"position": places.shape[1], "bag": features.shape[1]}
    identity = np.unique(record.tokens, return_inverse=True)[1]
    fold = (resampling.random.permutation(resampling.units) % _FOLDS)[resampling.unit]

    errors: dict[str, NDArray[np.float64]] = {}
    options = {stage: len(penalties) for stage, penalties in _PENALTIES.items()}
    for stage, count in {"total": 1, "identity": 1, "alone": options["position"], **options}.items():
        errors[stage] = np.zeros((count, resampling.units, len(names)))

    def note(stage: str, option: int, rows: NDArray[np.intp], residual: Floats) -> None:
        squares = np.add.reduceat(residual**2, np.searchsorted(owner, np.arange(len(names))), axis=1)
        np.add.at(errors[stage][option], resampling.unit[rows], squares)

    for number in range(_FOLDS):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        test = test[np.isin(identity[test], identity[train])]
        if not len(test):
            continue
        mean = targets[train].mean(0)
        note("total", 0, test, targets[test] - mean)
        expected = _TokenMeans(identity[train], targets[train])
        residual, left = targets[train] - expected(identity[train]), targets[test] - expected(identity[test])
        note("identity", 0, test, left)
        usual = _TokenMeans(identity[train], features[train])
        x, new = features[train] - usual(identity[train]), features[test] - usual(identity[test])
        for stage, end in splits.items():
            for option, weights in enumerate(_ridge(x[:, :end], residual, places.shape[1], _PENALTIES[stage])):
                note(stage, option, test, left - new[:, :end] @ weights)
        centre = places[train].mean(0)
        alone = _ridge(places[train] - centre, targets[train] - mean, places.shape[1], _PENALTIES["position"])
        for option, weights in enumerate(alone):
            note("alone", option, test, targets[test] - mean - (places[test] - centre) @ weights)

    # where a stage predicts worse than the one before it, it is left out
    chosen = {"total": errors["total"][0]}
    chosen["alone"] = _best([*errors["alone"], chosen["total"]])
    for before, stage in pairwise(("total", *STAGES)):
        chosen[stage] = _best([*errors[stage], chosen[before]])
    groups = {name: [index] for index, name in enumerate(names)}
    if len(names) > 1:
        groups["all"] = list(range(len(names)))
    return {
        name: _shares({stage: values[:, part].sum(1) for stage, values in chosen.items()}, resampling)
        for name, part in groups.items()
    }


def _shares(errors: dict[str, Floats], resampling: Resampling) -> dict[str, Any]:
    total, before, result = errors["total"], errors["total"], {}
    for stage in STAGES:
        gained = before - errors[stage]
        result[stage] = resampling.ratio(gained, total, p=resampling.sign_flips(gained, sides=1)).as_dict()
        before = errors[stage]
    result["unexplained"] = resampling.ratio(before, total).as_dict()
    result["position_alone"] = resampling.ratio(total - errors["alone"], total).as_dict()
    return result


def _best(options: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """For each signal, the errors (units, signals) under the option that leaves the least."""
    errors = np.stack(options)
    return np.stack([errors[best, :, index] for index, best in enumerate(errors.sum(1).argmin(0))], 1)


class _TokenMeans:
    """Each token's mean of every column, drawn towards the overall mean by as much as its tokens are few.

    The pull is that of a random-effects model: the variance within a token over the variance between tokens.
    """

    def __init__(self, identity: NDArray[np.int64], values: Floats) -> None:
        order = np.argsort(identity, kind="stable")
        present, starts, counts = np.unique(identity[order], return_index=True, return_counts=True)
        values = values[order].astype(np.float64)
        overall = values.mean(0)
        sums = np.add.reduceat(values - overall, starts, axis=0)
        total, groups = len(values), len(present)
        between = (sums**2 / counts[:, None]).sum(0)
        within = np.maximum(((values - overall) ** 2).sum(0) - between, 0) / max(total - groups, 1)
        typical = (total - (counts**2).sum() / total) / max(groups - 1, 1)
        spread = np.maximum((between / max(groups - 1, 1) - within) / typical, 0)
        pull = np.where(spread > 0, within / np.where(spread > 0, spread, 1), 1e12)
        self.means = overall + sums / (counts[:, None] + pull)
        self.place = np.zeros(int(identity.max()) + 1, np.int64)
        self.place[present] = np.arange(groups)

    def __call__(self, identity: NDArray[np.int64]) -> Floats:
        return np.asarray(self.means[self.place[identity]])


def _ridge(features: Floats, targets: Floats, positions: int, penalties: tuple[float, ...]) -> list[Floats]:
    """Ridge coefficients (features, targets) for each penalty on the last stage's features; features count by their own
    spread. The first `positions` features have a light penalty where they are not the last stage themselves."""
    scale = features.std(0)
    scale = np.where(scale > 1e-9, scale, np.inf)
    scaled = (features / scale).astype(np.float32)
    gram = (scaled.T @ scaled).astype(np.float64)
    right = scaled.T.astype(np.float64) @ targets
    found: list[Floats] = []
    for penalty in penalties:
        diagonal = np.full(len(gram), penalty)
        if len(gram) > positions:
            diagonal[:positions] = _LIGHT
        found.append(np.linalg.solve(gram + np.diag(diagonal), right) / scale[:, None])
    return found


def _position_features(record: Record) -> NDArray[np.float32]:
    """One column for each of the first positions, and overlapping triangles, wider and wider, for those after them."""
    last = int(record.position.max())
    first = min(_POSITIONS, last + 1)
    columns = np.zeros((len(record.position), first), np.float32)
    early = np.flatnonzero(record.position < first)
    columns[early, record.position[early]] = 1
    if last < first:
        return columns
    knots = np.geomspace(first, last + 1, _KNOTS)
    late = np.stack([np.interp(record.position, knots, row, left=0) for row in np.eye(_KNOTS)], 1)
    return np.concatenate([columns, late.astype(np.float32)], 1)


def _bag_features(record: Record) -> NDArray[np.float32]:
    """Log counts and shares among the tokens so far, of the most frequent tokens, and of 64 groups of the others."""
    ids, identity, counts = np.unique(record.tokens, return_inverse=True, return_counts=True)
    column = _WORDS + (ids * 2654435761 % 2**32) % _BUCKETS
    frequent = np.argsort(-counts, kind="stable")[:_WORDS]
    column[frequent] = np.arange(len(frequent))
    seen = np.zeros((len(record.tokens), _WORDS + _BUCKETS), np.float32)
    seen[np.arange(len(seen)), column[identity]] = 1
    for start, end in text_borders(record):
        np.cumsum(seen[start:end], axis=0, out=seen[start:end])
    return np.concatenate([np.log1p(seen), seen / (record.position[:, None] + 1)], 1).astype(np.float32)


def text_borders(record: Record) -> list[tuple[int, int]]:
    """First token, and the one after the last, of every text."""
    starts = [*np.flatnonzero(np.diff(record.text, prepend=-1)).tolist(), len(record.text)]
    return list(pairwise(starts))
