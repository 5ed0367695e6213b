"""Homeostasis and collapse: how much of its range a signal uses, and how many ways it moves in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ncn.core.signals.statistics import effective_rank, evenly_spaced
from ncn.diagnosis.record import Floats, Record
from ncn.statistics.resampling import Resampling

CLOSED = (0.5, 0.1, 0.01)
"""A feed-forward gate below these is half closed, nearly closed, closed."""

_BLOCKS = 24  # groups of documents, for the interval of what is costly to work out
_SAMPLES = 200
_COLUMNS = 256


def homeostasis(record: Record, resampling: Resampling) -> dict[str, Any]:
    """For each signal: its range, what it uses of it, how often it sits at a bound, and its layers' profile.

    "used" is the width of the middle 98 % of its values over that of its range. "saturation" is the fraction of values
    within 1 % of the range from a bound, except a bound that lies next to neutral, where a gate is merely open.
    "layers" are mean and standard deviation over tokens of every layer. "effective_rank" is how many independent ways
    of moving there are (`ncn.core.signals.statistics`), of "columns" (layers · heads) that there could be.
    """
    result: dict[str, Any] = {"signals": {}}
    for name in record.signals:
        cube, (low, high) = record.cube(name).astype(np.float64), record.bounds[name]
        margin = 0.01 * (high - low)
        lower = low if record.neutral[name] - low > 0.1 else -np.inf
        upper = high if high - record.neutral[name] > 0.1 else np.inf
        outside = (cube < lower + margin) | (cube > upper - margin)
        count = resampling.sums(np.ones(len(cube)))
        bottom, top = np.quantile(cube, (0.01, 0.99))
        result["signals"][name] = {
            "neutral": record.neutral[name],
            "low": low,
            "high": high,
            "mean": float(cube.mean()),
            "lowest": float(cube.min()),
            "highest": float(cube.max()),
            "from_neutral": float(np.abs(cube - record.neutral[name]).max()),
            "spread": float(cube.std(0).mean()),
            "used": float((top - bottom) / (high - low)),
            "saturation": resampling.ratio(resampling.sums(outside.mean((1, 2))), count).as_dict(),
            "layers": {
                "mean": cube.mean((0, 2)).tolist(),
                "spread": cube.std(0).mean(1).tolist(),
                "p10": np.quantile(cube, 0.1, (0, 2)).tolist(),
                "p90": np.quantile(cube, 0.9, (0, 2)).tolist(),
            },
            "effective_rank": _effective_rank(record.columns(name), resampling),
            "columns": cube.shape[1] * cube.shape[2],
        }
        if name == "ffn_gate":
            result["closed"] = {
                str(limit): [
                    resampling.ratio(resampling.sums((cube[:, layer] < limit).mean(1)), count).as_dict()
                    for layer in range(cube.shape[1])
                ]
                for limit in CLOSED
            }
    moving = [name for name in record.signals if record.varies(name)]
    if moving:
        together = np.concatenate([record.columns(name) / record.spread(name) for name in moving], 1)
        result["effective_rank"] = _effective_rank(together, resampling)
        result["columns"] = together.shape[1]
    return result


def _effective_rank(columns: Floats, resampling: Resampling) -> dict[str, float | None] | None:
    """Effective rank of the covariance over tokens, its interval over groups of documents; None if nothing moves."""
    columns = columns[:, evenly_spaced(columns.shape[1], _COLUMNS)]
    columns = columns - columns.mean(0, dtype=np.float64)
    if columns.std() < 1e-9:
        return None
    block = resampling.unit % _BLOCKS
    parts = [columns[block == number] for number in range(min(_BLOCKS, resampling.units))]
    products = np.stack([part.T @ part for part in parts])
    sums, counts = np.stack([part.sum(0) for part in parts]), np.array([len(part) for part in parts], float)

    def rank(counts: Floats, sums: Floats, products: Floats) -> Floats:
        means = sums / counts[:, None]
        covariance = products / counts[:, None, None] - means[:, :, None] * means[:, None, :]
        return effective_rank(np.linalg.eigvalsh(covariance))

    drawn = resampling.random.multinomial(len(parts), [1 / len(parts)] * len(parts), size=_SAMPLES)
    picked = np.vstack([np.ones(len(parts)), drawn]).astype(np.float64)
    return resampling.estimate(rank, counts, sums, products, counts=picked).as_dict()


def over_training(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each signal's mean, spread, saturation and, where all records have it, effective rank by tokens seen, from a
    run's records; None where there are none."""
    lines = [line for line in metrics if line.get("signals")]
    if not lines:
        return None
    names = list(lines[-1]["signals"])
    kinds = ["mean", "spread", "saturation", "effective_rank"]
    if not all("effective_rank" in line["signals"][name] for line in lines for name in names):
        kinds.remove("effective_rank")
    return {
        "step": [line["step"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "signals": {
            name: {kind: [float(line["signals"][name][kind]) for line in lines] for kind in kinds} for name in names
        },
    }
