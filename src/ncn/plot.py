"""Pictures: the brain scan of a text, and loss curves. The only module that imports matplotlib."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from ncn.brain_scan import MEANINGS, Scan, escaped
from ncn.colours import PALETTE, ColourScale
from ncn.errors import UserError
from ncn.files import write_atomically

Point = tuple[int | float, float]
"""(tokens seen, loss in nats per token)."""

COLOUR_MAP = LinearSegmentedColormap.from_list("ncn", PALETTE)
LONGEST = 512  # tokens in one picture: a longer one is too tall to look at, and the page scrolls better
BAND = 64  # tokens side by side, before the picture goes on below

FONT = "DejaVu Sans"  # comes with matplotlib, so a picture looks the same on every machine
INK, FAINT, RULE = "#1b1b1b", "#6b6b6b", "#b8b8b8"
BARS = "#5a5f66"
# Okabe and Ito's colours, without their yellow, which is too light for lines.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

# Inches of the scan's layout.
LEFT, RIGHT, TOP, BOTTOM = 1.1, 0.95, 0.62, 0.1
LAYER_ROW, HEAD_ROW, HEADER, GAP, BAR_HEIGHT, LONGEST_SCALE = 0.24, 0.105, 0.3, 0.08, 0.75, 1.7
LABEL_POINTS = 9.0


def brain_scan(scan: Scan, contrast: Literal["fixed", "data"] = "fixed") -> Figure:
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
    labels = [_drawable(_shortened(label)) for label in scan.labels()]
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


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    return buffer.getvalue()


def published_curve() -> list[Point]:
    """(tokens seen, training loss in nats per token) of the published NCN's run, from its own log.

    Its pooling reads the whole sequence, future included, so its loss is not that of a causal language model.
    """
    with files("ncn").joinpath("assets/published_run.csv").open(encoding="utf-8") as lines:
        return [(float(row["tokens"]), float(row["train_loss"])) for row in csv.DictReader(lines)]


def loss_curve(
    metrics: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    published: Sequence[Point] | None = None,
    validation: Sequence[Point] | None = None,
    log_x: bool | None = None,
) -> None:
    """Draws a run's training loss, raw and smoothed, and its validation losses against tokens seen, as a PNG file.

    Args:
        metrics: the run's records; those with finite "tokens" and "loss" (nats per token) are drawn.
        path: the file to write.
        published: the curve of `published_curve()`, for comparison by tokens; only sensible with GPT-2's vocabulary.
        validation: (tokens, loss) points; by default those of the records that have a "validation_loss".
        log_x: a logarithmic token axis; by default where the published run is more than five times as long as this one.

    Raises:
        UserError: no record has a loss, or the file cannot be written.
    """
    records = list(metrics)
    training = _points(records, "loss")
    if not training:
        raise UserError('there is no loss to draw: no record has finite "tokens" and "loss" fields')
    figure, axes = _curve_figure()
    label = "this run, training (last {:.3f})"
    _draw(axes, training, label, color=LINES[0], linewidth=1.8)
    points = _points(records, "validation_loss") if validation is None else _finite(validation)
    if points:
        label = "this run, validation (last {:.3f})"
        _draw(axes, points, label, color=LINES[1], linewidth=1.2, marker="o", markersize=4.5, zorder=3)
    theirs = _finite(published or ())
    if theirs:
        label = "published NCN run, training (last {:.3f})\nnot causal: it reads future tokens as well"
        _draw(axes, theirs, label, color=FAINT, linewidth=1.4, linestyle=(0, (4, 2)))
    if log_x is None:
        log_x = bool(theirs) and theirs[-1][0] > 5 * training[-1][0]
    _token_axis(axes, [*training, *points, *theirs], log_x)
    axes.set_ylabel("loss (nats per token)")
    title = "Loss of this run and of the published NCN, by tokens seen" if theirs else "Loss by tokens seen"
    axes.set_title(title, loc="left", weight="bold", size=11)
    _legend(axes)
    _write(figure, path)


def compare_curves(
    curves: Mapping[str, Sequence[Point]], path: str | Path, *, title: str = "Loss by tokens seen"
) -> None:
    """Draws the losses of several arms against tokens seen, as a PNG file.

    A second panel shows how far each arm lies from the last one, wherever both have a point: the curves themselves
    mostly lie too close together to compare.

    Raises:
        UserError: there is no arm, an arm has no finite loss, or the file cannot be written.
    """
    arms = {name: _finite(points) for name, points in curves.items()}
    for name, points in arms.items():
        if not points:
            raise UserError(f"arm {name!r} has no finite loss to draw; leave it out")
    if not arms:
        raise UserError("there are no arms to compare; give at least one {name: [(tokens, loss), ...]}")
    figure, axes = _curve_figure(panels=min(2, len(arms)))
    reference = list(arms)[-1]
    base = dict(arms[reference])
    for index, (name, points) in enumerate(arms.items()):
        style: dict[str, Any] = {"color": LINES[index % len(LINES)], "linewidth": 1.6}
        style |= {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}
        _draw(axes, points, _drawable(name).replace("{", "{{").replace("}", "}}") + " (last {:.3f})", **style)
        gaps = [(tokens, loss - base[tokens]) for tokens, loss in points if tokens in base]
        if len(arms) > 1 and gaps:
            _draw(figure.axes[1], gaps, "", **style)
    axes.set_title(_drawable(title), loc="left", weight="bold", size=11, parse_math=False)
    axes.set_ylabel("loss (nats per token)")
    _legend(axes)
    for panel in figure.axes:
        _token_axis(panel, [point for points in arms.values() for point in points], log=False)
    if len(arms) > 1:
        axes.set_xlabel("")
        heading = _drawable(f"Difference from {reference}; below zero is better")
        figure.axes[1].set_title(heading, loc="left", size=9, parse_math=False)
        figure.axes[1].set_ylabel("nats per token")
    _write(figure, path)


def _axes(figure: Figure, inches: tuple[float, float, float, float]) -> Axes:
    width, height = figure.get_size_inches()
    left, bottom, across, up = inches
    axes = figure.add_axes((left / width, bottom / height, across / width, up / height))
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK, labelfontfamily=FONT, pad=3)
    axes.spines[:].set(color=RULE, linewidth=0.6)
    return axes


def _scan_title(figure: Figure, scan: Scan, size: tuple[float, float], note: str) -> None:
    quote = _drawable(f"“{' '.join(scan.text.split())}”")[:500]
    while (width := _text_inches(quote)) > size[0] - 0.4:
        quote = quote[: int(len(quote) * (size[0] - 0.4) / width) - 2] + "…”"
    place: dict[str, Any] = {"x": 0.15 / size[0], "family": FONT, "va": "top", "parse_math": False}
    title = _drawable("Brain scan" + (f" of {scan.model}" if scan.model else "") + note)
    figure.text(y=1 - 0.12 / size[1], s=title, weight="bold", size=11, color=INK, **place)
    figure.text(y=1 - 0.36 / size[1], s=quote, size=9, color=FAINT, **place)


def _heat_map(axes: Axes, name: str, values: NDArray[np.float64], scale: ColourScale) -> None:
    tokens, layers = values.shape[:2]
    heads = values.shape[2] if values.ndim == 3 else 1
    rows = scale.position(values.reshape(tokens, layers * heads)).T
    axes.imshow(rows, cmap=COLOUR_MAP, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    if heads < 3:
        ticks = {(layer + 0.5) * heads - 0.5: f"layer {layer}" for layer in range(layers)}
    else:  # the first and the last head of each layer: labels in between would be too small to read
        ticks = {layer * heads: f"layer {layer}, head 0" for layer in range(layers)}
        axes.tick_params(labelsize=7)
        ticks |= {(layer + 1) * heads - 1: f"head {heads - 1}" for layer in range(layers)}
    axes.set_yticks(list(ticks), list(ticks.values()))
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="#8a8a8a", linewidth=0.8)
    axes.set_label(name)


def _panel_header(axes: Axes, name: str, values: NDArray[np.float64]) -> None:
    _header(axes, name, MEANINGS.get(name, ""))
    spread = f"min {values.min():.2f}   mean {values.mean():.2f}   max {values.max():.2f}"
    axes.annotate(spread, (1, 1), (0, 4), "axes fraction", "offset points", ha="right", size=8, color=INK, family=FONT)


def _header(axes: Axes, name: str, meaning: str) -> None:
    place: dict[str, Any] = {"textcoords": "offset points", "family": FONT, "parse_math": False}
    title = axes.annotate(
        _drawable(name), (0, 1), (0, 4), xycoords="axes fraction", weight="bold", size=9.5, color=INK, **place
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
    return float(values.shape[1] * max(LAYER_ROW, HEAD_ROW * heads))


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


def _drawable(text: str) -> str:
    """The text with each character that the font lacks as an escape, where matplotlib would draw an empty box."""
    known = get_font(findfont(FONT)).get_charmap()
    return "".join(char if ord(char) in known and char.isprintable() else escaped(char) for char in text)


def _curve_figure(panels: int = 1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 4.4 if panels == 1 else 5.8), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(panels, 1, height_ratios=[1.8, 1][:panels])
    for row in range(panels):
        axes = figure.add_subplot(grid[row])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=RULE, linewidth=0.5, alpha=0.5)
        axes.tick_params(labelsize=8.5, color=RULE)
    return figure, figure.axes[0]


def _draw(axes: Axes, points: Sequence[Point], label: str, **style: Any) -> None:
    """Draws a smoothed curve, over its raw points where they are many."""
    tokens, losses = zip(*points, strict=True)
    smooth = _smoothed(losses)
    if smooth != list(losses):
        axes.plot(tokens, losses, color=style["color"], alpha=0.25, linewidth=0.7)
    axes.plot(tokens, smooth, label=label.format(_last(losses)), **style)


def _token_axis(axes: Axes, points: Sequence[Point], log: bool) -> None:
    positive = [tokens for tokens, _ in points if tokens > 0]
    if log and positive:
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.1, max(positive) * 1.1)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _amount(value)))
    axes.set_xlabel("tokens seen" + (" (logarithmic scale)" if log else ""))


def _amount(count: float) -> str:
    """A number of tokens in thousands, millions or billions."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g}"


def _points(records: Iterable[Mapping[str, Any]], loss: str) -> list[Point]:
    return _finite((record["tokens"], record[loss]) for record in records if "tokens" in record and loss in record)


def _finite(points: Iterable[Point]) -> list[Point]:
    return sorted((float(tokens), float(loss)) for tokens, loss in points if math.isfinite(tokens + loss))


def _window(count: int) -> int:
    """Points on either side that a smoothed point is the mean of; none on a curve of few points."""
    return count // 100


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Means over a fiftieth of the curve, centred so that the smooth curve does not lag behind the raw one."""
    if not (half := _window(len(losses))):
        return list(losses)
    total = np.cumsum([0.0, *losses])
    # Towards the ends the window shrinks on both sides alike, and early, where a loss falls too steeply to average.
    reach = [min(half, place // 4, len(losses) - 1 - place) for place in range(len(losses))]
    return [float(total[i + r + 1] - total[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]


def _last(losses: Sequence[float]) -> float:
    """The loss at the end of a curve: the mean of its last points where they are many and noisy."""
    return float(np.mean(losses[-1 - 2 * _window(len(losses)) :]))


def _legend(axes: Axes) -> None:
    for text in axes.legend(frameon=False, fontsize=8.5).get_texts():
        text.set_parse_math(False)


def _write(figure: Figure, path: str | Path) -> None:
    try:
        write_atomically(Path(path), png(figure))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name a place that exists and has room") from None
