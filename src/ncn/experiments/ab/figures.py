"""The figures of an A/B experiment: differences with intervals, learning curves with bands, learning-rate sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ncn.errors import UserError
from ncn.pages.style import LINES, curve_figure, drawable, legend, token_axis, write


def learning_curves(
    curves: Mapping[str, Sequence[NDArray[np.float64]]], reference: str, path: str | Path, *, skip: float = 0.1
) -> None:
    """Draws the validation loss of several arms against tokens seen, as a PNG file.

    Lines are means over seeds, bands reach one standard deviation to either side. The lower panel shows each arm's
    paired difference from `reference`, where the seeds' common ups and downs cancel out.

    Args:
        curves: for each arm one array for each seed, in the same order of seeds, shape (points, 2): tokens, loss.
        reference: the arm that the lower panel compares with.
        path: the file to write.
        skip: the share of the training that is left out at the beginning, where the loss falls too steeply to compare.
    """
    if not curves:
        raise UserError("there are no learning curves to draw; a finished run with at least two validations is needed")
    panels = 2 if len(curves) > 1 and reference in curves else 1
    figure, axes = curve_figure(panels=panels)
    end = max(float(curve[-1, 0]) for seeds in curves.values() for curve in seeds)
    shown: list[tuple[float, float]] = []
    for index, (label, seeds) in enumerate(curves.items()):
        tokens, losses = _common(seeds, skip * end)
        style: dict[str, Any] = {"color": LINES[index % len(LINES)]}
        style |= {"marker": "o", "markersize": 3} if len(tokens) <= 40 else {}
        name = f"{drawable(label)} (last {losses[:, -1].mean():.3f})"
        _band(axes, tokens, losses, name, style)
        shown += [(float(value), 0.0) for value in tokens]
        if panels == 2:
            other, base = _common(curves[reference], skip * end)
            at = np.intersect1d(tokens, other)
            count = min(len(losses), len(base))
            gaps = losses[:count, np.isin(tokens, at)] - base[:count, np.isin(other, at)]
            _band(figure.axes[1], at, gaps, "", style)
    axes.set_title("Validation loss by tokens seen: mean and standard deviation over seeds", loc="left",
                   weight="bold", size=11)  # fmt: skip
    axes.set_ylabel("nats per token")
    legend(axes)
    for panel in figure.axes:
        token_axis(panel, shown, log=False)
    if panels == 2:
        axes.set_xlabel("")
        heading = drawable(f"Paired difference from {reference}; below zero is better")
        figure.axes[1].set_title(heading, loc="left", size=9, parse_math=False)
        figure.axes[1].set_ylabel("nats per token")
    write(figure, path)


def _common(seeds: Sequence[NDArray[np.float64]], start: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The tokens, from `start` on, at which every seed has a loss, and the losses there: (seeds, points)."""
    at = seeds[0][:, 0]
    for curve in seeds[1:]:
        at = np.intersect1d(at, curve[:, 0])
    at = at[at >= min(start, at[-1])]
    return at, np.stack([curve[np.isin(curve[:, 0], at), 1] for curve in seeds])


def _band(axes: Axes, tokens: Any, values: NDArray[np.float64], label: str, style: Mapping[str, Any]) -> None:
    mean = values.mean(0)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axes.fill_between(tokens, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(tokens, mean, label=label or None, linewidth=1.5, **style)
