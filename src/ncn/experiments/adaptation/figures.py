"""The figure of `ncn adapt`: what is gained on the new domain against what is lost on the old one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ncn.pages.style import INK, LINES, RULE, drawable, legend, write


def draw_trade(methods: Mapping[str, Any], path: str | Path) -> None:
    """A small dot a seed, and each method's mean with its 95 % intervals; up and to the left is better."""
    figure = Figure(figsize=(7.6, 4.4), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=0.8)
    for color, found in zip(LINES, methods.values(), strict=False):
        lost, gained = found["lost"], found["gained"]
        axes.scatter(lost["per_seed"], gained["per_seed"], s=12, color=color, alpha=0.5, linewidths=0)
        if gained["low"] is not None:
            axes.plot([lost["mean"]] * 2, [gained["low"], gained["high"]], color=color, linewidth=1.6)
            axes.plot([lost["low"], lost["high"]], [gained["mean"]] * 2, color=color, linewidth=1.6)
        axes.scatter(
            [lost["mean"]], [gained["mean"]], s=44, color=color, edgecolors="white", linewidths=0.8, zorder=4,
            label=drawable(found["label"]),
        )  # fmt: skip
    axes.margins(0.08)
    legend(axes)
    axes.set_xlabel("bits per byte lost on the old domain")
    axes.set_ylabel("bits per byte gained on the new domain")
    axes.set_title("What adapting gains, and what it forgets", loc="left", weight="bold", size=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=RULE, linewidth=0.5, alpha=0.5)
    axes.tick_params(labelsize=8.5, color=RULE)
    write(figure, path)
