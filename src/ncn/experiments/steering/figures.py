"""The figures of `ncn steer`: what the stories written are like, against the value of each slider."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ncn.pages.style import FAINT, INK, LINES, RULE, write

_DASHES = ("-", "--", ":", "-.")
_COLUMNS = 4


def draw_steering(results: Mapping[str, Any], path: str | Path) -> None:
    """A row a model (at the first guidance), a panel a slider: the mean rank of its own attribute, bold, and others."""
    models, guidance = results["models"], results["guidances"][0]
    sliders = _sliders(results)
    figure, panels = _panels(len(models), len(sliders), 2.6)
    for row, (label, model) in enumerate(models.items()):
        for axes, name in zip(panels[row], sliders, strict=True):
            axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=":")
            means = model["sliders"][name][guidance]["means"]
            for color, (attribute, values) in zip(LINES, means.items(), strict=False):
                own = attribute == name
                axes.plot(
                    results["settings"], values, color=color, label=attribute.replace("_", " "),
                    linewidth=2.2 if own else 1.0, marker="o" if own else None, markersize=3.5,
                )  # fmt: skip
            axes.set_ylim(0, 1)
        _label(panels[row], f"{label}\nmean rank of the stories")
    _finish(figure, panels, sliders)
    write(figure, path)


def draw_comparison(results: Mapping[str, Any], path: str | Path) -> None:
    """A panel a slider: its own attribute in every model, a colour each, at every guidance, dashed beyond the first;
    below, where there was a judge, how ordinary the text is."""
    real = results["real"].get("bits_per_byte")
    sliders = _sliders(results)
    figure, panels = _panels(1 if real is None else 2, len(sliders), 2.6)
    for column, name in enumerate(sliders):
        panels[0][column].plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=":")
        if real is not None:
            panels[1][column].axhline(real, color=INK, linewidth=0.8, linestyle=":", label="real documents")
        for color, (label, model) in zip(LINES, results["models"].items(), strict=False):
            for dashes, (guidance, found) in zip(_DASHES, model["sliders"][name].items(), strict=False):
                title = label if len(results["guidances"]) == 1 else f"{label}, guidance {guidance}"
                style: dict[str, Any] = {"color": color, "linestyle": dashes, "label": title, "marker": "o"}
                values = [found["means"][name], *([] if real is None else [found["bits_per_byte"]])]
                for row, numbers in enumerate(values):
                    panels[row][column].plot(results["settings"], numbers, linewidth=1.4, markersize=2.5, **style)
        panels[0][column].set_ylim(0, 1)
    if real is not None:  # one scale for all sliders
        low, high = zip(*(axes.get_ylim() for axes in panels[1]), strict=True)
        for axes in panels[1]:
            axes.set_ylim(min(low), max(high))
    _label(panels[0], "its own attribute,\nmean rank of the stories")
    if real is not None:
        _label(panels[1], "bits per byte\nunder the judge")
    _finish(figure, panels, sliders)
    write(figure, path)


def _sliders(results: Mapping[str, Any]) -> list[str]:
    return list(next(iter(results["models"].values()))["sliders"])


def _panels(rows: int, count: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    """The panels of each of the `rows`, one a slider; after four sliders all rows begin again below."""
    columns = min(count, _COLUMNS)
    blocks = -(-count // columns)
    size = (2.6 * columns + 2.2, height * rows * blocks + 0.6)
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows * blocks, columns, sharex=True, sharey="row", squeeze=False)
    panels = [list(itertools.chain.from_iterable(grid[row::rows])) for row in range(rows)]
    for axes in itertools.chain.from_iterable(row[count:] for row in panels):
        axes.set_axis_off()
    return figure, [row[:count] for row in panels]


def _label(row: list[Axes], text: str) -> None:
    for axes in row[::_COLUMNS]:
        axes.set_ylabel(text, fontsize=8.5)


def _finish(figure: Figure, panels: list[list[Axes]], sliders: list[str]) -> None:
    for axes in itertools.chain.from_iterable(panels):
        axes.set_xlim(0, 1)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=RULE, linewidth=0.5, alpha=0.5)
    for axes, name in zip(panels[0], sliders, strict=True):
        axes.set_title(name.replace("_", " "), fontsize=9.5, fontweight="bold", loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("slider", fontsize=8.5)
        axes.tick_params(labelbottom=True)
    handles, labels = panels[-1][0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
