"""The figure of `ncn steer`: every attribute of the stories written, against the value of each slider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ncn.plot.style import FAINT, LINES, RULE, write


def draw_steering(sliders: Mapping[str, Any], path: str | Path) -> None:
    """One panel a slider: the mean rank of its own attribute, bold, and of the others."""
    figure = Figure(figsize=(2.6 * len(sliders) + 1.6, 3.2), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sliders), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, sliders.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=":")
        for color, (attribute, means) in zip(LINES, found["means"].items(), strict=False):
            own = attribute == name
            axes.plot(
                np.linspace(0, 1, len(means)), means, color=color, label=attribute.replace("_", " "),
                linewidth=2.2 if own else 1.0, marker="o" if own else None, markersize=3.5,
            )  # fmt: skip
        axes.set_title(name.replace("_", " "), fontsize=9.5, fontweight="bold", loc="left")
        axes.set_xlabel("slider", fontsize=8.5)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=RULE, linewidth=0.5, alpha=0.5)
    panels[0].set_ylabel("rank of the stories, mean", fontsize=8.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    write(figure, path)
