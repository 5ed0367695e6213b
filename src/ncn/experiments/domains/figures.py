"""The figures of `ncn domains`: what is forgotten for what is gained, and the signals on text of two domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ncn.pages.style import FAINT, LINES, RULE, write


def draw_forgetting(
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], names: tuple[str, str], path: str | Path
) -> None:
    """One line a seed for every arm: bits per byte of the first domain above, and of the second below, their start.

    `curves` hold "gains" and "forgotten", by the arm's label.
    """
    figure = Figure(figsize=(6.6, 4.4), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for color, (label, seeds) in zip(LINES, curves.items(), strict=False):
        for number, curve in enumerate(seeds):
            axes.plot(
                curve["gains"], curve["forgotten"], color=color, linewidth=1.1, alpha=0.75, marker="o", markersize=2,
                label=None if number else label,
            )  # fmt: skip
    axes.set_xlabel(f"gained on {names[1]}, bits per byte", fontsize=9)
    axes.set_ylabel(f"forgotten of {names[0]}, bits per byte", fontsize=9)
    axes.axhline(0, color=FAINT, linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=RULE, linewidth=0.5, alpha=0.5)
    axes.tick_params(labelsize=8.5)
    axes.legend(frameon=False, fontsize=8.5)
    write(figure, path)


def draw_signals(
    models: Mapping[str, Mapping[str, Any]], neutral: Mapping[str, float], names: tuple[str, str], path: str | Path
) -> None:
    """A row for each signal and a column for each model: mean and one standard deviation over the tokens of each
    domain, for every layer and, side by side, its heads or sublayers.

    `models` hold, by label and signal, "means" and "spread" of shape (2, layers, sites); `neutral` is each signal's
    value without effect.
    """
    signals = list(next(iter(models.values())))
    figure = Figure(
        figsize=(4.3 * len(models) + 0.6, 1.75 * len(signals) + 0.5), dpi=160, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(signals), len(models), sharex="col", sharey="row", squeeze=False)
    for column, (label, found) in enumerate(models.items()):
        for row, name in enumerate(signals):
            axes = panels[row][column]
            means, spread = (np.array(found[name][key]) for key in ("means", "spread"))
            layers, sites = means.shape[1:]
            within = (np.arange(sites) - (sites - 1) / 2) * 0.8 / max(sites, 2)
            for domain, color in enumerate(LINES[:2]):
                places = np.arange(layers)[:, None] + within + (domain - 0.5) * 0.07
                axes.errorbar(
                    places.ravel(), means[domain].ravel(), spread[domain].ravel(), color=color, fmt="o", markersize=2.6,
                    linewidth=0.9, label=names[domain],
                )  # fmt: skip
            axes.axhline(neutral[name], color=FAINT, linewidth=0.8, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=RULE, linewidth=0.5, alpha=0.5)
            axes.tick_params(labelsize=8)
            axes.set_xticks(range(layers), [str(layer) for layer in range(layers)])
            if not column:
                axes.set_ylabel(name.replace("_", " "), fontsize=9)
            if not row:
                axes.set_title(label, fontsize=9.5, fontweight="bold", loc="left")
        panels[-1][column].set_xlabel("layer", fontsize=8.5)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
    write(figure, path)
