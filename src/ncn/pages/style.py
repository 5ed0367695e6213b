"""What every picture shares: type, colours, axes, and how it is written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, NullLocator

from ncn.errors import UserError
from ncn.machine.files import write_atomically
from ncn.pages.characters import escaped

Point = tuple[int | float, float]
"""(tokens seen, loss in nats per token)."""

FONT = "DejaVu Sans"  # comes with matplotlib, so a picture looks the same on every machine
INK, FAINT, RULE = "#1b1b1b", "#6b6b6b", "#b8b8b8"
# Okabe and Ito's colours, without their yellow, which is too light for lines.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    return buffer.getvalue()


def write(figure: Figure, path: str | Path) -> None:
    try:
        write_atomically(Path(path), png(figure))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name a place that exists and has room") from None


def drawable(text: str) -> str:
    """The text with each character that the font lacks as an escape, where matplotlib would draw an empty box."""
    known = get_font(findfont(FONT)).get_charmap()
    return "".join(char if ord(char) in known and char.isprintable() else escaped(char) for char in text)


def curve_figure(panels: int = 1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 4.4 if panels == 1 else 5.8), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(panels, 1, height_ratios=[1.8, 1][:panels])
    for row in range(panels):
        axes = figure.add_subplot(grid[row])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=RULE, linewidth=0.5, alpha=0.5)
        axes.tick_params(labelsize=8.5, color=RULE)
    return figure, figure.axes[0]


def token_axis(axes: Axes, points: Sequence[Point], log: bool) -> None:
    positive = [tokens for tokens, _ in points if tokens > 0]
    if log and positive:
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.1, max(positive) * 1.1)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.set_xlabel("tokens seen" + (" (logarithmic scale)" if log else ""))


def amount(count: float) -> str:
    """A number of tokens in thousands, millions or billions."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g}"


def window(count: int) -> int:
    """Points on either side that a smoothed point is the mean of; none on a curve of few points."""
    return count // 100


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over a fiftieth of the curve, centred so that the smooth curve does not lag behind the raw one."""
    if not (half := window(len(losses))):
        return list(losses)
    total = np.cumsum([0.0, *losses])
    # Towards the ends the window shrinks on both sides alike, and early, where a loss falls too steeply to average.
    reach = [min(half, place // 4, len(losses) - 1 - place) for place in range(len(losses))]
    return [float(total[i + r + 1] - total[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]


def last(losses: Sequence[float]) -> float:
    """The loss at the end of a curve: the mean of its last points where they are many and noisy."""
    return float(np.mean(losses[-1 - 2 * window(len(losses)) :]))


def legend(axes: Axes, below: bool = False) -> None:
    """What the lines are: where matplotlib finds most room inside the axes, or below them, where it covers nothing."""
    assert isinstance(axes.figure, Figure)
    drawn = (
        axes.figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8.5)
        if below
        else axes.legend(frameon=False, fontsize=8.5)
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)
