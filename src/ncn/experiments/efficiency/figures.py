"""Figures of `ncn efficiency`: smoothed curves with their power laws, and the change per doubling of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ncn.pages.style import FAINT, LINES, curve_figure, drawable, legend, token_axis, write


@runtime_checkable
class Estimate(Protocol):
    @property
    def value(self) -> float: ...


@runtime_checkable
class Law(Protocol):
    """A power law, and the tokens that it was fitted between."""

    @property
    def first(self) -> float: ...
    @property
    def last(self) -> float: ...
    def at(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]: ...


@runtime_checkable
class Curve(Protocol):
    """A learning curve, raw and smoothed, with bootstrap draws of the smoothed one."""

    @property
    def name(self) -> str: ...
    @property
    def tokens(self) -> NDArray[np.float64]: ...
    @property
    def losses(self) -> NDArray[np.float64]: ...
    @property
    def smooth(self) -> NDArray[np.float64]: ...
    @property
    def draws(self) -> NDArray[np.float64]: ...
    @property
    def unit(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def power_law(self) -> Law | None: ...
    def tokens_to_share(self, share: float) -> Estimate: ...


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """Raw and smoothed losses against tokens, a logarithmic axis; the power law dashed, and on to twice the tokens;
    a mark where the curve has made 95 % and 99 % of its improvement. Written as PNG."""
    figure, axes = curve_figure()
    late: list[float] = []
    for index, curve in enumerate(curves):
        color = LINES[index % len(LINES)]
        axes.plot(curve.tokens, curve.losses, color=color, alpha=0.25, linewidth=0.7)
        label = f"{drawable(curve.name)} (final {curve.smooth[-1]:.3f}, {curve.verdict})"
        axes.plot(curve.tokens, curve.smooth, color=color, linewidth=1.7, label=label)
        law = curve.power_law
        if law:
            tokens = np.geomspace(law.first, 2 * law.last, 100)
            axes.plot(tokens, law.at(tokens), color=color, linewidth=1.2, linestyle=(0, (4, 2)))
        for share, marker in ((0.95, "o"), (0.99, "s")):
            place = curve.tokens_to_share(share).value
            loss = np.interp(np.log(place), np.log(curve.tokens), curve.smooth)
            axes.plot([place], [loss], marker=marker, markersize=6, color="white", markeredgecolor=color, zorder=4)
        late.extend(curve.smooth)
    # The first steps lie far above everything that is to be compared.
    low, high = float(np.min(late)), float(np.percentile(late, 97))
    axes.set_ylim(low - 0.06 * (high - low), high + 0.25 * (high - low))
    _style(axes, curves, f"{curves[0].kind} loss ({curves[0].unit})")
    axes.plot([], [], color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), label="power law, to twice the tokens")
    axes.plot([], [], color="white", marker="o", markeredgecolor=FAINT, label="95 % of the improvement")
    axes.plot([], [], color="white", marker="s", markeredgecolor=FAINT, label="99 % of the improvement")
    axes.set_title("Loss by tokens seen, smoothed", loc="left", weight="bold", size=11)
    legend(axes, below=True)  # curves of many shapes leave no corner free
    write(figure, path)


def draw_slopes(curves: Sequence[Curve], path: Path) -> None:
    """The change of the smoothed loss over the doubling of tokens that ends at each point, with a 95 % band, as PNG."""
    figure, axes = curve_figure()
    lowest: list[float] = []
    for index, curve in enumerate(curves):
        style: dict[str, Any] = {"color": LINES[index % len(LINES)]}
        tokens = curve.tokens[curve.tokens >= 4 * curve.tokens[0]]
        logs, ends = np.log(curve.tokens), (np.log(tokens), np.log(tokens / 2))

        def change(losses: Any, logs: Any = logs, ends: Any = ends) -> Any:
            return np.interp(ends[0], logs, losses) - np.interp(ends[1], logs, losses)

        middle = change(curve.smooth)
        low, high = np.percentile([change(draw) for draw in curve.draws[:200]], [2.5, 97.5], axis=0)
        axes.fill_between(tokens, low, high, alpha=0.2, linewidth=0, **style)
        axes.plot(tokens, middle, linewidth=1.6, label=drawable(curve.name), **style)
        lowest.extend(middle)
    axes.axhline(0, color=FAINT, linewidth=0.9)
    bottom = float(np.percentile(lowest, 25)) * 2
    top = max(0.12 * abs(bottom), 1.3 * float(np.max(lowest)))
    axes.set_ylim(min(bottom, -1e-3), max(top, 1e-3))
    _style(axes, curves, f"change ({curves[0].unit})")
    heading = "Change of the loss over the last doubling of tokens; zero is a standstill"
    axes.set_title(heading, loc="left", weight="bold", size=11)
    legend(axes)
    write(figure, path)


def _style(axes: Axes, curves: Sequence[Curve], label: str) -> None:
    token_axis(axes, [(tokens, 0.0) for curve in curves for tokens in curve.tokens], log=True)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * 2.1)
    axes.set_ylabel(label)
