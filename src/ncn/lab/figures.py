"""Figures that several experiments draw: paired differences with their intervals, and losses against learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ncn.errors import UserError
from ncn.pages.style import FAINT, INK, LINES, RULE, drawable, write

SWEEP_COLUMNS = 3


@dataclass(frozen=True)
class Difference:
    """One row of `differences`: a paired difference, its interval where it has one, and its value for each seed."""

    label: str
    family: str
    mean: float
    low: float | None
    high: float | None
    per_seed: Sequence[float]


def differences(rows: Sequence[Difference], path: str | Path) -> None:
    """Draws paired differences in bits per byte as a PNG file: a dot for each seed, the mean, and the 95 % interval.

    Rows of one family stand together under its name. Below zero the first of the two arms is better.
    """
    if not rows:
        raise UserError("there are no differences to draw; a comparison needs two arms that share a finished seed")
    families = list(dict.fromkeys(row.family for row in rows))
    places: list[tuple[float, Difference]] = []
    headings: list[tuple[float, str]] = []
    at = 0.0
    for family in families:
        headings.append((at, family))
        for row in rows:
            if row.family == family:
                at += 1
                places.append((at, row))
        at += 1.3
    figure = Figure(figsize=(7.6, 0.9 + 0.33 * at), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plain(axes)
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=INK, linewidth=0.9)
    reach = _reach(rows)
    for y, row in places:
        colour = LINES[families.index(row.family)]
        below = np.full(len(row.per_seed), y + 0.3)  # the axis points down
        axes.scatter(row.per_seed, below, s=11, color=colour, alpha=0.5, linewidths=0, zorder=2)
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt", zorder=3)
        axes.scatter([row.mean], [y], s=34, color=colour, edgecolors="white", linewidths=0.8, zorder=4)
    axes.set_yticks([y for y, _ in places], [drawable(row.label) for _, row in places], parse_math=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    for y, family in headings:
        axes.annotate(family, (0, y), (4, 0), ("axes fraction", "data"), "offset points", va="center", size=8.5,
                      color=FAINT, weight="bold",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    axes.set(ylim=(at - 0.6, -0.7), xlim=(-reach, reach))
    axes.set_xlabel("difference in bits per byte (◂ the first is better · the second is better ▸)", size=9)
    axes.set_title("Paired differences: each seed, mean, and 95 % interval", loc="left", weight="bold", size=11)
    write(figure, path)


def _reach(rows: Sequence[Difference]) -> float:
    """Half the width of the axis: every mean and seed is inside; an interval wider than three times that is cut."""
    inner = max(abs(value) for row in rows for value in (row.mean, *row.per_seed))
    outer = max([inner, *(abs(end) for row in rows for end in (row.low, row.high) if end is not None)])
    return (min(outer, 3 * inner) or 1e-4) * 1.08


def rate_sweep(sweeps: Mapping[str, Mapping[float, float | None]], path: str | Path, one: str = "the recipe's") -> None:
    """Draws each arm's loss on the tuning split by learning rate, a panel an arm on common axes, as a PNG file.

    `one` says which rate the multiples are of.
    The best rate is marked and its loss written beside it; rates at which the run diverged are crosses at the top.
    """
    sweeps = {label: losses for label, losses in sweeps.items() if losses}
    if not sweeps:
        raise UserError("there is no sweep to draw; tuning.json holds no rates")
    columns = min(SWEEP_COLUMNS, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure = Figure(figsize=(7.6, 0.75 + 1.75 * rows), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    finite = [loss for losses in sweeps.values() for loss in losses.values() if loss is not None]
    rates = sorted({rate for losses in sweeps.values() for rate in losses})
    low, high = (min(finite), _highest_shown(finite)) if finite else (0.0, 1.0)
    margin = 0.12 * (high - low) or 0.01
    for axes, (label, losses) in zip(grid.flat, sweeps.items(), strict=False):
        plain(axes)
        points = [(rate, loss) for rate, loss in sorted(losses.items()) if loss is not None]
        axes.plot(*zip(*points, strict=True), color=LINES[0], linewidth=1.3, marker="o", markersize=3.5)
        if points:
            rate, loss = min(points, key=lambda point: point[1])
            axes.plot([rate], [loss], "o", color=LINES[1], markersize=6, zorder=3)
            axes.annotate(f"{loss:.3f}", (rate, loss), (0, -7), textcoords="offset points", ha="center", va="top",
                          size=8, color=LINES[1], weight="bold")  # fmt: skip
        lost = [rate for rate, loss in losses.items() if loss is None]
        if lost:  # an empty line that is not clipped would upset the layout
            axes.plot(lost, [high + margin] * len(lost), "x", color=INK, markersize=6, clip_on=False)
        axes.set_title(drawable(label), loc="left", size=9, parse_math=False)
        axes.set(xscale="log", ylim=(low - 2.2 * margin, high + 2 * margin), xlim=(rates[0] / 1.35, rates[-1] * 1.35))
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in grid.flat[len(sweeps) :]:
        axes.set_visible(False)
    for column in range(columns):
        last = max(row for row in range(rows) if row * columns + column < len(sweeps))
        grid[last, column].tick_params(labelbottom=True)
    for row in range(rows):
        grid[row, 0].set_ylabel("nats per token", size=9)
    lost_somewhere = any(loss is None for losses in sweeps.values() for loss in losses.values())
    title = f"Loss on the tuning split by learning rate, as a multiple of {one}"
    title += " (× diverged)" if lost_somewhere else ""
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    write(figure, path)


def _highest_shown(losses: Sequence[float]) -> float:
    """The top of the sweep's axis: a rate far too high must not flatten the valley of all others."""
    low, middle = min(losses), float(np.median(losses))
    return min(max(losses), low + 4 * max(middle - low, 0.02))


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=RULE, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color=RULE)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
