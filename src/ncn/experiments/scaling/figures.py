"""Figures of `ncn scale`: loss against compute, the gap against size, the multipliers, and the projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray

from ncn.pages.style import FAINT, INK, LINES, amount, curve_figure, drawable, legend, write


@runtime_checkable
class Estimate(Protocol):
    """A value with the ends of its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@runtime_checkable
class Run(Protocol):
    """The end of a run: where it stands on the ladder, and its loss."""

    @property
    def arm(self) -> str: ...
    @property
    def size(self) -> str: ...
    @property
    def parameters(self) -> int | float: ...
    @property
    def tokens(self) -> int | float: ...
    @property
    def loss(self) -> float: ...
    @property
    def seed(self) -> int: ...


@runtime_checkable
class ScalingFit(Protocol):
    """The fitted law; the first arm is the baseline."""

    @property
    def arms(self) -> tuple[str, ...]: ...
    @property
    def points(self) -> Sequence[Run]: ...
    def constants(self) -> Mapping[str, Estimate]: ...
    def identified(self) -> Mapping[str, bool]: ...
    def predict(self, arm: str, parameters: int | float, tokens: int | float) -> Estimate: ...
    def advantage(self, arm: str, parameters: int | float, tokens: int | float) -> Estimate: ...


@runtime_checkable
class Trend(Protocol):
    """One mean gap a size, and the straight line through them."""

    @property
    def parameters(self) -> NDArray[np.float64]: ...
    @property
    def gaps(self) -> NDArray[np.float64]: ...
    @property
    def tokens(self) -> Sequence[float]: ...
    def line(
        self, parameters: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]: ...


_MARKERS = "os^Dv"
_DASHES: tuple[Any, ...] = ((0, (4, 2)), "-", (0, (1, 1)), (0, (5, 1, 1, 1)))


def draw_losses(fit: ScalingFit, flops: Sequence[float], path: Path) -> None:
    """Loss against training FLOPs: a mark for every run, a line for every size by the fitted law. Written as PNG."""
    figure, axes = curve_figure()
    sizes = sorted({point.size for point in fit.points}, key=lambda size: _parameters(fit, size))
    for row, size in enumerate(sizes):
        color = LINES[row % len(LINES)]
        for column, arm in enumerate(fit.arms):
            runs = [(p, c) for p, c in zip(fit.points, flops, strict=True) if p.size == size and p.arm == arm]
            if not runs:
                continue
            tokens = sorted({point.tokens for point, _ in runs})
            grid = np.geomspace(tokens[0] / 1.15, tokens[-1] * 1.15, 30)
            per_token = runs[0][1] / runs[0][0].tokens
            losses = [fit.predict(arm, runs[0][0].parameters, count).value for count in grid]
            axes.plot(grid * per_token, losses, color=color, linewidth=1.2, linestyle=_DASHES[column % len(_DASHES)])
            fill = color if column else "white"
            style: dict[str, Any] = {"marker": _MARKERS[column % 5], "markersize": 5, "linestyle": "none"}
            axes.plot([c for _, c in runs], [p.loss for p, _ in runs], color=color, markerfacecolor=fill, **style)
        axes.plot([], [], color=color, linewidth=2.5, label=f"{size} ({amount(_parameters(fit, size))})")
    for column, arm in enumerate(fit.arms):
        axes.plot([], [], color=FAINT, linestyle=_DASHES[column % len(_DASHES)], marker=_MARKERS[column % 5],
                  markersize=5, markerfacecolor=FAINT if column else "white", label=drawable(arm))  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs, output head and attention included")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Loss by compute; lines are the fitted law", loc="left", weight="bold", size=11)
    legend(axes)
    write(figure, path)


def draw_gap(fit: ScalingFit, trend: Trend, path: Path) -> None:
    """The baseline's loss less the arm's against size: runs, one mean a size, the straight line with its band, and
    what the fitted law says. Written as PNG."""
    figure, axes = curve_figure()
    arm = fit.arms[-1]
    theirs = {(p.size, p.tokens, p.seed): p.loss for p in fit.points if p.arm == fit.arms[0]}
    mine = [p for p in fit.points if p.arm == arm and (p.size, p.tokens, p.seed) in theirs]
    tokens = sorted({point.tokens for point in mine})
    for row, count in enumerate(tokens):
        pairs = [(p.parameters, theirs[p.size, p.tokens, p.seed] - p.loss) for p in mine if p.tokens == count]
        style: dict[str, Any] = {"linestyle": "none", "marker": _MARKERS[row % 5], "markersize": 5}
        axes.plot(*zip(*pairs, strict=True), color=LINES[2 + row % 5], label=f"runs of {amount(count)} tokens", **style)
    grid = np.geomspace(trend.parameters.min(), trend.parameters.max(), 60)
    line, low, high = trend.line(grid)
    axes.fill_between(grid, low, high, color=LINES[0], alpha=0.15, linewidth=0, label="95 % band of the line")
    axes.plot(grid, line, color=LINES[0], linewidth=1.8, label="straight line through the means of the sizes")
    axes.plot(trend.parameters, trend.gaps, "_", color=LINES[0], markersize=16, markeredgewidth=2)
    common = float(np.exp(np.mean(np.log(trend.tokens))))
    law = [fit.advantage(arm, parameters, common).value for parameters in grid]
    axes.plot(grid, law, color=LINES[1], linewidth=1.4, linestyle=(0, (4, 2)), label="fitted law, at the mean tokens")
    axes.axhline(0, color=INK, linewidth=0.8)
    _size_axis(axes)
    axes.set_ylabel("gap (nats per token)")
    axes.set_title("Gap between baseline and NCN by size; above zero the NCN is better", loc="left", weight="bold",
                   size=11)  # fmt: skip
    legend(axes)
    write(figure, path)


def draw_multipliers(fit: ScalingFit, path: Path) -> None:
    """The multipliers of every arm but the baseline with their intervals, on a logarithmic scale. Written as PNG."""
    figure, axes = curve_figure()
    figure.set_size_inches(7.6, 1.5 + 0.8 * (len(fit.arms) - 1))
    constants, known = fit.constants(), fit.identified()
    names = [(name, arm) for arm in fit.arms[1:] for name in ("m_N", "m_D")]
    meaning = {"m_N": "in parameters (m_N)", "m_D": "in tokens (m_D)"}
    ends = [1.0]
    for row, (name, arm) in enumerate(names):
        found = constants[f"{name} {arm}"]
        color = LINES[0] if known[f"{name} {arm}"] else FAINT
        axes.plot([found.low, found.high], [row, row], color=color, linewidth=2.5, solid_capstyle="butt")
        axes.plot([found.value], [row], "o", color=color, markersize=7)
        note = f"{found.value:.3g}" + ("" if known[f"{name} {arm}"] else ", not determined")
        axes.annotate(note, (found.value, row), (0, 8), textcoords="offset points", ha="center", size=8.5, color=color)
        ends += [found.low, found.high]
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.set_xscale("log")
    low, high = min(ends), max(ends)
    margin = max((high / low) ** 0.12, 1.02)
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [tick for tick in _multiplier_ticks(high / low * margin**2) if low / margin <= tick <= high * margin]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_yticks(range(len(names)), [f"{drawable(arm)}\n{meaning[name]}" for name, arm in names])
    axes.set_xlabel("times the baseline's; 1 is no difference")
    axes.set_title("What the controller is worth, with 95 % intervals", loc="left", weight="bold", size=11)
    write(figure, path)


def draw_projection(fit: ScalingFit, targets: Mapping[str, float], times: float, path: Path) -> None:
    """The law beyond the sizes that were run, at the most tokens that were run, with bands, as far as so many `times`
    the largest compute (6 N D); below it the gap. `targets` are sizes to mark, by name. Written as PNG."""
    figure, axes = curve_figure(panels=2)
    below = figure.axes[1]
    most = max(point.tokens for point in fit.points)
    sizes = sorted({point.parameters for point in fit.points})
    limit = times * max(point.parameters * point.tokens for point in fit.points) / most
    grid = np.geomspace(sizes[0], limit, 60)
    for column, arm in enumerate(fit.arms):
        color = LINES[column % len(LINES)]
        said = [fit.predict(arm, parameters, most) for parameters in grid]
        _band(axes, grid, said, color, drawable(arm))
        runs = [point for point in fit.points if point.arm == arm and point.tokens == most]
        axes.plot([p.parameters for p in runs], [p.loss for p in runs], "o", color=color, markersize=4.5)
        if column:
            _band(below, grid, [fit.advantage(arm, parameters, most) for parameters in grid], color, "")
    below.axhline(0, color=INK, linewidth=0.8)
    farthest = 1.6 * max(limit, *targets.values())
    for panel in (axes, below):
        panel.axvspan(limit, farthest, color=FAINT, alpha=0.13, linewidth=0)
        panel.axvline(sizes[-1], color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
        for parameters in targets.values():
            panel.axvline(parameters, color=FAINT, linewidth=0.6, alpha=0.6)
        _size_axis(panel)
        panel.set_xlim(sizes[0] / 1.15, farthest)
    top = axes.get_ylim()[1]
    for name, parameters in targets.items():
        axes.annotate(name, (parameters, top), (0, -2), textcoords="offset points", ha="center", va="top", size=8,
                      color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
    axes.annotate(
        f"refused: more than\n{times:g} times the largest\ncompute that was run",
        ((limit * farthest) ** 0.5, 0.5), xycoords=("data", "axes fraction"), ha="center", va="center", size=8.5,
        color=INK,
    )  # fmt: skip
    axes.set_xlabel("")
    axes.set_ylabel("loss (nats per token)")
    below.set_ylabel("gap")
    axes.set_title(f"The law at {amount(most)} tokens, beyond the sizes that were run (dotted line)", loc="left",
                   weight="bold", size=11)  # fmt: skip
    axes.legend(frameon=False, fontsize=8.5, loc="lower left")
    write(figure, path)


def _multiplier_ticks(span: float) -> list[float]:
    """Round numbers around 1 that stand well apart on a logarithmic axis whose ends differ by the factor `span`."""
    if span > 20:
        return [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
    if span > 3:
        return [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0]
    step = 0.1 if span > 1.3 else 0.05 if span > 1.15 else 0.01
    return [round(float(tick), 2) for tick in np.arange(0.3, 3.01, step)]


def _band(axes: Axes, x: Any, said: Sequence[Any], color: str, label: str) -> None:
    axes.fill_between(x, [s.low for s in said], [s.high for s in said], color=color, alpha=0.15, linewidth=0)
    axes.plot(x, [s.value for s in said], color=color, linewidth=1.6, label=label)


def _size_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.set_xlabel("parameters (logarithmic scale)")


def _parameters(fit: ScalingFit, size: str) -> float:
    return max(point.parameters for point in fit.points if point.size == size)
