"""The brain scan of a text as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ncn.config.signals import meaning
from ncn.errors import UserError
from ncn.pages.style import FAINT, FONT, INK, RULE, drawable
from ncn.scans.colours import PALETTE, ColourScale
from ncn.scans.contents import ScanContents

COLOUR_MAP = LinearSegmentedColormap.from_list("ncn", PALETTE)
LONGEST = 512  # tokens in one picture: a longer one is too tall to look at, and the page scrolls better
BAND = 64  # tokens side by side, before the picture goes on below

BARS = "#5a5f66"

# Inches of the scan's layout.
LEFT, RIGHT, TOP, BOTTOM = 1.1, 0.95, 0.62, 0.1
LAYER_ROW, HEAD_ROW, HEADER, GAP, BAR_HEIGHT, LONGEST_SCALE = 0.24, 0.105, 0.3, 0.08, 0.75, 1.7
TALLEST_MAP = 7.2  # a map of many layers and heads has thinner rows instead
LABEL_ROW, LABELLED_HEADS = 0.12, 0.3  # height of a label, and of a layer that has room for two
LABEL_POINTS = 9.0


def brain_scan(scan: ScanContents, contrast: Literal["fixed", "data"] = "fixed") -> Figure:
    """One heat map per signal, layers (and heads) by tokens, and below them the surprisal of each token in bits.

    Texts longer than 64 tokens go on in further bands below. Colours are centred at each signal's neutral value.

    Args:
        scan: what to draw.
        contrast: "fixed": a signal has the same limits in every scan. "data": the limits are drawn in to the farthest
            value of this scan, which shows small movements; scans are then not comparable by colour.

    Raises:
        UserError: the scan has more than 512 tokens.
    """
    count = len(scan.tokens)
    if count > LONGEST:
        raise UserError(f"a picture holds at most {LONGEST} tokens and this scan has {count}; save it as .html instead")
    labels = [drawable(_shortened(label)) for label in scan.labels()]
    bands = math.ceil(count / BAND)
    columns = math.ceil(count / bands)
    width, upright = _column(labels, columns)
    label_height = 0.2 if upright else 0.08 + max(map(_text_inches, labels))
    heights = {name: _rows_inches(values) for name, values in scan.signals.items()}
    band_height = sum(heights.values()) + (HEADER + GAP) * (len(heights) + 1) + BAR_HEIGHT + label_height + 0.15

    # A short text still needs room for the headers of its panels.
    map_width = max(columns * width, 6.2)
    size = (LEFT + map_width + RIGHT, TOP + bands * band_height + BOTTOM)
    figure = Figure(figsize=size, dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    _scan_title(figure, scan, size, "" if contrast == "fixed" else " (colour limits fitted to this text)")
    scales = {
        name: scan.scale(name) if contrast == "fixed" else scan.scale(name).fitted(values)
        for name, values in scan.signals.items()
    }
    most_bits = max([bits for bits in scan.surprisal if bits is not None] or [1.0])
    for band in range(bands):
        shown = slice(band * columns, min((band + 1) * columns, count))
        # The last band may be shorter; its columns stay as wide as the others'.
        band_width = map_width * len(labels[shown]) / columns
        top = size[1] - TOP - band * band_height
        for name, values in scan.signals.items():
            top -= HEADER + heights[name]
            axes = _axes(figure, (LEFT, top, band_width, heights[name]))
            _heat_map(axes, name, values[shown], scales[name])
            _panel_header(axes, name, values if bands == 1 else values[shown])
            bar_height = min(heights[name], LONGEST_SCALE)
            bar = _axes(figure, (LEFT + band_width + 0.12, top + heights[name] - bar_height, 0.12, bar_height))
            _colour_bar(bar, scales[name], values)
            top -= GAP
        top -= HEADER + BAR_HEIGHT
        axes = _axes(figure, (LEFT, top, band_width, BAR_HEIGHT))
        _surprisal_bars(axes, scan.surprisal[shown], most_bits)
        which = "each token" if bands == 1 else f"tokens {shown.start} to {shown.stop - 1}"
        _header(axes, "surprisal", f"of {which}, in bits: how little the model expected it")
        axes.set_xticks(range(len(labels[shown])))
        axes.set_xticklabels(labels[shown], rotation=0 if upright else 90, fontsize=LABEL_POINTS, parse_math=False)
    return figure


def _axes(figure: Figure, inches: tuple[float, float, float, float]) -> Axes:
    width, height = figure.get_size_inches()
    left, bottom, across, up = inches
    axes = figure.add_axes((left / width, bottom / height, across / width, up / height))
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK, labelfontfamily=FONT, pad=3)
    axes.spines[:].set(color=RULE, linewidth=0.6)
    return axes


def _scan_title(figure: Figure, scan: ScanContents, size: tuple[float, float], note: str) -> None:
    quote = drawable(f"“{' '.join(scan.text.split())}”")[:500]
    while (width := _text_inches(quote)) > size[0] - 0.4:
        quote = quote[: int(len(quote) * (size[0] - 0.4) / width) - 2] + "…”"
    place: dict[str, Any] = {"x": 0.15 / size[0], "family": FONT, "va": "top", "parse_math": False}
    title = drawable("Brain scan" + (f" of {scan.model}" if scan.model else "") + note)
    figure.text(y=1 - 0.12 / size[1], s=title, weight="bold", size=11, color=INK, **place)
    figure.text(y=1 - 0.36 / size[1], s=quote, size=9, color=FAINT, **place)


def _heat_map(axes: Axes, name: str, values: NDArray[np.float64], scale: ColourScale) -> None:
    tokens, layers = values.shape[:2]
    heads = values.shape[2] if values.ndim == 3 else 1
    rows = scale.position(values.reshape(tokens, layers * heads)).T
    axes.imshow(rows, cmap=COLOUR_MAP, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    layer_height = _rows_inches(values) / layers
    if heads < 3 or layer_height < LABELLED_HEADS:
        labelled = range(0, layers, math.ceil(LABEL_ROW / layer_height))
        ticks = {(layer + 0.5) * heads - 0.5: f"layer {layer}" for layer in labelled}
    else:  # the first and the last head of each layer: labels in between would be too small to read
        ticks = {layer * heads: f"layer {layer}, head 0" for layer in range(layers)}
        axes.tick_params(labelsize=7)
        ticks |= {(layer + 1) * heads - 1: f"head {heads - 1}" for layer in range(layers)}
    axes.set_yticks(list(ticks), list(ticks.values()))
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="#8a8a8a", linewidth=0.8)
    axes.set_label(name)


def _panel_header(axes: Axes, name: str, values: NDArray[np.float64]) -> None:
    _header(axes, name, meaning(name))
    spread = f"min {values.min():.2f}   mean {values.mean():.2f}   max {values.max():.2f}"
    axes.annotate(spread, (1, 1), (0, 4), "axes fraction", "offset points", ha="right", size=8, color=INK, family=FONT)


def _header(axes: Axes, name: str, meaning: str) -> None:
    place: dict[str, Any] = {"textcoords": "offset points", "family": FONT, "parse_math": False}
    title = axes.annotate(
        drawable(name), (0, 1), (0, 4), xycoords="axes fraction", weight="bold", size=9.5, color=INK, **place
    )
    axes.annotate(meaning, (1, 1), (6, 4), xycoords=(title, axes.transAxes), size=8, color=FAINT, **place)


def _colour_bar(axes: Axes, scale: ColourScale, values: NDArray[np.float64]) -> None:
    """The scale from end to end, a heavier line at neutral, and beside it the stretch that the whole scan covers."""
    axes.imshow(np.linspace(-1, 1, 256)[:, None], cmap=COLOUR_MAP, vmin=-1, vmax=1, aspect="auto", origin="lower",
                extent=(0, 1, -1, 1))  # fmt: skip
    axes.axhline(0, color=INK, linewidth=1.2)
    reached = np.clip(scale.position(np.array([values.min(), values.max()])), -1, 1)
    axes.plot([-0.3, -0.3], reached, color=INK, linewidth=1.6, clip_on=False, solid_capstyle="butt")
    axes.set(xlim=(0, 1), xticks=[])
    axes.yaxis.tick_right()
    ticks = [(place, text + " neutral" if place == 0 else text) for place, text in scale.ticks()]
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])


def _surprisal_bars(axes: Axes, surprisal: Sequence[float | None], most_bits: float) -> None:
    axes.bar(range(len(surprisal)), [bits or 0.0 for bits in surprisal], width=0.72, color=BARS)
    axes.set(xlim=(-0.5, len(surprisal) - 0.5), ylim=(0, most_bits * 1.05))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.grid(axis="y", color=RULE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_label("surprisal")


def _rows_inches(values: NDArray[np.float64]) -> float:
    heads = values.shape[2] if values.ndim == 3 else 1
    return min(float(values.shape[1] * max(LAYER_ROW, HEAD_ROW * heads)), TALLEST_MAP)


def _column(labels: Sequence[str], columns: int) -> tuple[float, bool]:
    """Width of a column in inches, and whether its label fits in upright."""
    widest = max(map(_text_inches, labels)) + 0.08
    if columns * widest <= 11:
        return max(widest, 0.3), True
    return max(0.155, min(0.3, 9.6 / columns)), False


def _text_inches(text: str) -> float:
    font = get_font(findfont(FONT))
    font.set_size(LABEL_POINTS, 72)
    font.set_text(text)
    width, _ = font.get_width_height()
    return float(width / 64 / 72)


def _shortened(label: str) -> str:
    return label if len(label) <= 16 else label[:15] + "…"
