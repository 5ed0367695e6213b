"""Loss curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ncn.errors import UserError
from ncn.machine.files import ASSETS
from ncn.pages.style import FAINT, LINES, Point, curve_figure, drawable, last, legend, smoothed, token_axis, write


def published_curve() -> list[Point]:
    """(tokens seen, training loss in nats per token) of the published NCN's run, from its own log.

    Its pooling reads the whole sequence, future included, so its loss is not that of a causal language model.
    """
    with (ASSETS / "published_run.csv").open(encoding="utf-8") as lines:
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
    figure, axes = curve_figure()
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
    token_axis(axes, [*training, *points, *theirs], log_x)
    axes.set_ylabel("loss (nats per token)")
    title = "Loss of this run and of the published NCN, by tokens seen" if theirs else "Loss by tokens seen"
    axes.set_title(title, loc="left", weight="bold", size=11)
    legend(axes)
    write(figure, path)


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
    figure, axes = curve_figure(panels=min(2, len(arms)))
    reference = list(arms)[-1]
    base = dict(arms[reference])
    for index, (name, points) in enumerate(arms.items()):
        style: dict[str, Any] = {"color": LINES[index % len(LINES)], "linewidth": 1.6}
        style |= {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}
        _draw(axes, points, drawable(name).replace("{", "{{").replace("}", "}}") + " (last {:.3f})", **style)
        gaps = [(tokens, loss - base[tokens]) for tokens, loss in points if tokens in base]
        if len(arms) > 1 and gaps:
            _draw(figure.axes[1], gaps, "", **style)
    axes.set_title(drawable(title), loc="left", weight="bold", size=11, parse_math=False)
    axes.set_ylabel("loss (nats per token)")
    legend(axes)
    for panel in figure.axes:
        token_axis(panel, [point for points in arms.values() for point in points], log=False)
    if len(arms) > 1:
        axes.set_xlabel("")
        heading = drawable(f"Difference from {reference}; below zero is better")
        figure.axes[1].set_title(heading, loc="left", size=9, parse_math=False)
        figure.axes[1].set_ylabel("nats per token")
    write(figure, path)


def _draw(axes: Axes, points: Sequence[Point], label: str, **style: Any) -> None:
    """Draws a smoothed curve, over its raw points where they are many."""
    tokens, losses = zip(*points, strict=True)
    smooth = smoothed(losses)
    if smooth != list(losses):
        axes.plot(tokens, losses, color=style["color"], alpha=0.25, linewidth=0.7)
    axes.plot(tokens, smooth, label=label.format(last(losses)), **style)


def _points(records: Iterable[Mapping[str, Any]], loss: str) -> list[Point]:
    return _finite((record["tokens"], record[loss]) for record in records if "tokens" in record and loss in record)


def _finite(points: Iterable[Point]) -> list[Point]:
    return sorted((float(tokens), float(loss)) for tokens, loss in points if math.isfinite(tokens + loss))
