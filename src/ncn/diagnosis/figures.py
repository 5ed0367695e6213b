"""The figures of a diagnosis, drawn from the numbers of `diagnosis.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ncn.pages.style import FAINT, INK, LINES, RULE, drawable, token_axis, write

WIDTH = 7.6
_SMALL: dict[str, Any] = {"frameon": False, "fontsize": 8}

_EXPLAINED = (
    ("identity", "which token it is", "#9ab8d3"),
    ("position", "where it stands", "#5f8fb8"),
    ("bag", "the words so far", "#2f618f"),
    ("unexplained", "none of these: context, order", "#d55e00"),
)
_LOCATED = (
    ("layers", "between layers", "#2f618f"),
    ("sites", "between heads", "#9ab8d3"),
    ("tokens_alike", "over tokens, in all alike", "#f0b27a"),
    ("tokens_apart", "over tokens, in each its own", "#d55e00"),
)
_WAYS = (
    ("neutral", "at neutral"),
    ("mean", "at one mean"),
    ("layer_mean", "at the mean of each layer and head"),
    ("shuffled", "shuffled over tokens"),
)
_EVENTS = {
    "surprise": "surprising tokens",
    "surprise_same_token": "surprising, same token",
    "contrast": "contrast words",
}


def variance_shares(results: Mapping[str, Any], path: Path) -> None:
    """Stacked bars, a bar for each signal: where its variance lies, and what explains its variation over tokens."""
    located = {name: found["shares"] for name, found in results["specialisation"].items() if found}
    panels = [(located, _LOCATED, "Where the variance lies")]
    if results["explained"]:
        panels.append((results["explained"], _EXPLAINED, "What explains the variation over tokens"))
    rows = max(len(shares) for shares, _, _ in panels)
    figure = _figure(1.5 + 0.3 * rows)
    for column, (shares, parts, title) in enumerate(panels):
        axes = _axes(figure, 1, len(panels), column + 1, title)
        names = list(reversed(shares))
        left = np.zeros(len(names))
        for key, label, colour in parts:
            # estimates of nothing may fall a little below zero, and are nothing to stack
            widths = np.array([max(shares[name][key]["value"] or 0.0, 0.0) for name in names])
            shown = ["all signals" if name == "all" else name for name in names]
            axes.barh(shown, widths, left=left, color=colour, height=0.66, label=label)
            for place, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width >= 0.09:
                    dark = colour in ("#2f618f", "#5f8fb8", "#d55e00")
                    axes.text(
                        start + width / 2, place, f"{width:.0%}", ha="center", va="center", fontsize=7.5,
                        color="white" if dark else INK,
                    )  # fmt: skip
            left += widths
        axes.set(xlim=(0, max(1.0, left.max())), xticks=[0, 0.5, 1])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.grid(visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.1), ncols=1, borderaxespad=0.2, **_SMALL)
    write(figure, path)


def event_curves(results: Mapping[str, Any], path: Path) -> None:
    """How much more the signals move around events than around their controls, with 95 % bands, a panel for each kind
    of event."""
    studies = {key: study for key, study in results["reactivity"].items() if study}
    figure = _figure(3.3)
    shared: Axes | None = None
    for column, (key, study) in enumerate(studies.items()):
        axes = _axes(figure, 1, len(studies), column + 1, f"{_EVENTS[key]}\n{study['events']:,} events", sharey=shared)
        shared = shared or axes
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axvline(0, color=RULE, linewidth=0.8)
        for name, curve in study["signals"].items():
            colour = _colour(results, name)
            axes.fill_between(study["offsets"], curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)
            axes.plot(study["offsets"], curve["difference"], color=colour, linewidth=1.5, label=name)
        axes.set_xlabel("tokens after the event", fontsize=8.5)
        axes.set_xticks(study["offsets"][:: max(1, len(study["offsets"]) // 4)])
        if column == 0:
            axes.set_ylabel("movement beyond the controls'\n(standard deviations)", fontsize=8.5)
        else:
            axes.tick_params(labelleft=False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), **_SMALL)
    write(figure, path)


def causal_values(results: Mapping[str, Any], path: Path) -> None:
    """What freezing each signal costs, with 95 % intervals; the axis is linear near zero and logarithmic beyond."""
    costs = results["causal_value"]
    labels = {"all": "all signals"} if len(costs) > 1 else {"all": results["signals"][0]}
    rows = [(name, way) for name in costs for way, _ in _WAYS]
    figure = _figure(0.9 + 0.19 * len(rows) + 0.12 * len(costs))
    axes = _axes(figure, 1, 1, 1, "Rise of the loss when signals are frozen")
    axes.axvline(0, color=INK, linewidth=0.8)
    ticks = []
    for group, (name, ways) in enumerate(costs.items()):
        top = group * (len(_WAYS) + 0.8)
        ticks.append((top + 1.5, labels.get(name, name)))
        for row, (way, label) in enumerate(_WAYS):
            cost = ways[way]
            axes.plot([cost["low"], cost["high"]], [top + row] * 2, color=LINES[row], linewidth=2.2, alpha=0.55)
            axes.plot(cost["value"], top + row, "o", color=LINES[row], markersize=5, label=label if not group else None)
    ends = [cost[end] for ways in costs.values() for cost in ways.values() for end in ("low", "high")]
    axes.set_xscale("symlog", linthresh=0.001, linscale=0.6)
    reach = max(max(map(abs, ends)) * 1.6, 0.003)
    axes.set_xlim(-reach if min(ends) < -0.001 else -0.0012 if min(ends) < -1e-5 else -0.0002, reach)
    decades = [sign * 10.0**power for sign in (-1, 1) for power in range(-3, 3)]
    shown = [0.0, *(tick for tick in decades if axes.get_xlim()[0] <= tick <= reach)]
    axes.set_xticks(sorted(shown), [f"{tick:g}".replace("-", "−") for tick in sorted(shown)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.set_xlabel("nats a token (linear up to 0.001, logarithmic beyond)", fontsize=8.5)
    figure.legend(loc="outside lower center", ncols=2, **_SMALL)
    write(figure, path)


def layer_profiles(results: Mapping[str, Any], path: Path) -> None:
    """Every layer's mean, standard deviation over tokens, and middle 80 % of the values, a panel for each signal."""
    signals = results["homeostasis"]["signals"]
    columns = min(len(signals), 4)
    rows = math.ceil(len(signals) / columns)
    figure = _figure(0.5 + 2.3 * rows)
    for index, (name, found) in enumerate(signals.items()):
        axes = _axes(figure, rows, columns, index + 1, name)
        layers = np.arange(len(found["layers"]["mean"]))
        mean, spread = np.array(found["layers"]["mean"]), np.array(found["layers"]["spread"])
        colour = _colour(results, name)
        axes.axhline(found["neutral"], color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.vlines(layers, found["layers"]["p10"], found["layers"]["p90"], color=colour, alpha=0.3, linewidth=6)
        axes.errorbar(layers, mean, spread, fmt="o", color=colour, markersize=4.5, linewidth=1.4, capsize=2.5)
        axes.set_xlabel("layer", fontsize=8.5)
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 4, 5, 10]))
    handles = [
        Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (4, 2)), label="neutral"),
        Line2D([], [], color=FAINT, linewidth=6, alpha=0.4, label="middle 80 % of the values"),
        Line2D([], [], color=FAINT, marker="o", markersize=4.5, label="mean ± standard deviation over tokens"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, **_SMALL)
    write(figure, path)


def signals_over_training(results: Mapping[str, Any], path: Path) -> None:
    """Mean, spread over tokens, saturation and, where it was logged, effective rank of every signal against tokens."""
    course = results["training"]
    kinds = {
        "mean": "Mean over tokens, layers and heads",
        "spread": "Spread: standard deviation over tokens",
        "saturation": "Share of values at a bound, in the layer with most",
    }
    if all("effective_rank" in values for values in course["signals"].values()):
        kinds["effective_rank"] = "Effective rank: independent ways in which layers and heads move"
    figure = _figure(0.2 + 1.8 * len(kinds))
    for row, (kind, title) in enumerate(kinds.items()):
        axes = _axes(figure, len(kinds), 1, row + 1, title)
        for name, values in course["signals"].items():
            axes.plot(course["tokens"], values[kind], color=_colour(results, name), linewidth=1.4, label=name)
        token_axis(axes, [(tokens, 0.0) for tokens in course["tokens"]], log=False)
        if row < len(kinds) - 1:
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)
        if kind == "effective_rank":
            axes.set_ylim(bottom=0)
        if kind == "saturation":
            most = max(max(values[kind]) for values in course["signals"].values())
            axes.set_ylim(-0.01 * max(most, 0.02), max(1.1 * most, 0.02))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1%}"))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), **_SMALL)
    write(figure, path)


def order_differences(results: Mapping[str, Any], path: Path) -> None:
    """The distance between the signals of two sentences that differ in the order of their words, token by token."""
    found = results["word_order"]
    labels = [drawable(label.replace(" ", "")) for label in found["tokens"]]
    figure = _figure(2.9)
    axes = _axes(figure, 1, 1, 1, " and ".join(f"“{text}”" for text in found["texts"]))
    for name, signal in found["signals"].items():
        axes.plot(range(len(labels)), signal["example"], "o-", color=_colour(results, name), markersize=4, label=name)
    axes.set_xticks(range(len(labels)), labels)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("difference\n(standard deviations)", fontsize=8.5)
    axes.legend(ncols=2, **_SMALL)
    write(figure, path)


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, rows: int, columns: int, index: int, title: str, sharey: Axes | None = None) -> Axes:
    axes = figure.add_subplot(rows, columns, index, sharey=sharey)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=RULE, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color=RULE)
    axes.set_title(drawable(title) if "\n" not in title else title, loc="left", fontsize=9, weight="bold", color=INK)
    return axes


def _colour(results: Mapping[str, Any], name: str) -> str:
    names: Sequence[str] = results["signals"]
    return LINES[names.index(name) % len(LINES)] if name in names else FAINT
