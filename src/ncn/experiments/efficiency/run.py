"""`ncn efficiency`: the learning curves of runs beside each other, and what each token bought."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ncn.errors import UserError
from ncn.experiments.efficiency.learning_curve import (
    FARTHEST,
    FEWEST,
    RISEN,
    SETTLED,
    WARM_UP,
    Array,
    Curve,
    Unit,
    make_curve,
)
from ncn.machine.environment import describe_environment
from ncn.machine.files import ASSETS, read_json, write_json
from ncn.pages.page import origin, table, write_page
from ncn.statistics.interval import Interval
from ncn.training.run_folder import RunFolder

PUBLISHED = "published"
SHARES = (0.95, 0.99)
Kind = Literal["training", "validation"]
_COLUMNS: dict[Kind, dict[Unit, tuple[str, ...]]] = {
    "training": {"nats per token": ("loss", "train_loss"), "bits per byte": ("bits_per_byte",)},
    "validation": {"nats per token": ("validation_loss",), "bits per byte": ("validation_bits_per_byte",)},
}


@dataclass(frozen=True)
class Log:
    """The log of one run: (tokens, losses) by kind and unit."""

    name: str
    values: Mapping[tuple[Kind, Unit], tuple[Array, Array]]
    diverged: bool = False

    def curve(self, kind: Kind, unit: Unit) -> Curve:
        tokens, losses = self.values[kind, unit]
        curve = make_curve(self.name, tokens, losses, unit, kind)
        return curve if not self.diverged else Curve(self.name, curve.tokens, curve.losses, unit, kind, broken=True)


def read_log(source: str) -> Log:
    """A run folder, a CSV file with the columns tokens and loss (or train_loss; perhaps bits_per_byte, too), or
    `published`, the published NCN's log. Raises `UserError` for anything else, and for fewer than 12 points."""
    if source == PUBLISHED:
        with (ASSETS / "published_run.csv").open(encoding="utf-8") as lines:
            return _read_csv("published NCN", csv.DictReader(lines), source)
    path = Path(source)
    if path.is_dir():
        run = RunFolder.open(path)
        summary = read_json(path / "summary.json") if run.finished else {}
        return _log(path.resolve().name, run.metrics(), source, diverged=bool(summary.get("diverged")))
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            return _read_csv(path.stem, csv.DictReader(lines), source)
    except FileNotFoundError:
        raise UserError(f"no run folder and no CSV file {source}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{source} is neither a run folder nor a CSV file with the columns tokens and loss") from None


def _read_csv(name: str, reader: csv.DictReader[str], source: str) -> Log:
    found = reader.fieldnames or []
    if "tokens" not in found or not {"loss", "train_loss", "validation_loss"} & set(found):
        raise UserError(
            f"{source} must have the columns tokens and loss (or train_loss) in its first line; "
            f"it has {', '.join(found) if found else 'none'}"
        )
    known = {"tokens", *(column for units in _COLUMNS.values() for columns in units.values() for column in columns)}
    rows = []
    for row in reader:
        try:
            rows.append({key: float(row[key]) for key in known & set(found) if row[key] not in ("", None)})
        except ValueError:
            bad = next(key for key in known & set(found) if row[key] and not _number(row[key]))
            raise UserError(f"{source}, line {reader.line_num}: {bad} is {row[bad]!r}, which is no number") from None
    return _log(name, rows, source)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _log(name: str, rows: Sequence[Mapping[str, Any]], source: str, *, diverged: bool = False) -> Log:
    values: dict[tuple[Kind, Unit], tuple[Array, Array]] = {}
    for kind, units in _COLUMNS.items():
        for unit, columns in units.items():
            points = [
                (row["tokens"], row[column])
                for row in rows
                for column in columns
                if "tokens" in row and isinstance(row.get(column), int | float)
            ]
            tokens, losses = np.array(points, dtype=np.float64).reshape(-1, 2).T
            if len(tokens) and not (np.all(np.diff(tokens) > 0) and tokens[0] > 0):
                place = 0 if tokens[0] <= 0 else int(np.flatnonzero(np.diff(tokens) <= 0)[0]) + 1
                raise UserError(
                    f"{source}: tokens must be above zero and increase from point to point; "
                    f"point {place + 1} has {tokens[place]:g}"
                )
            if np.isfinite(losses).sum() >= FEWEST:
                values[kind, unit] = (tokens, losses)
    if ("training", "nats per token") not in values and ("validation", "nats per token") not in values:
        raise UserError(
            f"{source} has fewer than {FEWEST} points with a loss; a curve needs at least {FEWEST} (lower log_every)"
        )
    return Log(name, values, diverged)


@dataclass(frozen=True)
class Efficiency:
    """Runs, each with its curve in the unit of the report, and all pairs, each in the best unit that both have."""

    curves: tuple[Curve, ...]
    pairs: tuple[tuple[Curve, Curve], ...]
    warnings: tuple[str, ...]

    @property
    def unit(self) -> Unit:
        return self.curves[0].unit

    def as_dict(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "loss": self.curves[0].kind,
            "warnings": list(self.warnings),
            "criterion": {"settled_share_per_doubling": SETTLED, "risen_share": RISEN, "warm_up": WARM_UP},
            "runs": [_describe(curve) for curve in self.curves],
            "pairs": [_compare(one, other) for one, other in self.pairs],
        }


def measure(sources: Sequence[str], *, loss: Literal["auto", "training", "validation"] = "auto") -> Efficiency:
    """Read runs and compare them.

    With `loss="auto"`, validation losses are used where every run has twelve of them, otherwise training losses.
    Raises `UserError` for what cannot be read.
    """
    logs = _distinct([read_log(source) for source in sources], sources)
    kinds: tuple[Kind, ...] = ("validation", "training") if loss == "auto" else (loss,)
    kind = next((k for k in kinds if all((k, "nats per token") in log.values for log in logs)), None)
    if kind is None:
        lacking = next(log.name for log in logs if (kinds[-1], "nats per token") not in log.values)
        raise UserError(f"{lacking} has fewer than {FEWEST} {kinds[-1]} losses; choose the other with --loss")
    unit = _unit(kind, logs)
    pairs = tuple(
        (one.curve(kind, _unit(kind, (one, other))), other.curve(kind, _unit(kind, (one, other))))
        for one in logs
        for other in logs
        if one is not other
    )
    warnings = []
    if any(pair[0].unit == "nats per token" for pair in pairs):
        warnings.append(
            "Losses in nats per token are compared, because not every run has bits per byte: "
            "that is only sensible if the runs share their vocabulary and their text."
        )
    if kind == "training":
        warnings.append("These are training losses: a run that saw its text more than once is flattered by them.")
    if PUBLISHED in sources:
        warnings.append(
            "The published NCN's pooling reads future tokens, so its loss is not that of a causal language model."
        )
    return Efficiency(tuple(log.curve(kind, unit) for log in logs), pairs, tuple(warnings))


def _unit(kind: Kind, logs: Sequence[Log]) -> Unit:
    return "bits per byte" if all((kind, "bits per byte") in log.values for log in logs) else "nats per token"


def _distinct(logs: Sequence[Log], sources: Sequence[str]) -> list[Log]:
    """Runs of one name are told apart by the path that they were given by."""
    names = [log.name for log in logs]
    return [
        Log(source, log.values, log.diverged) if names.count(log.name) > 1 else log
        for log, source in zip(logs, sources, strict=True)
    ]


def _describe(curve: Curve) -> dict[str, Any]:
    law = curve.power_law
    return {
        "name": curve.name,
        "points": len(curve.tokens),
        "tokens": float(curve.tokens[-1]),
        "first_loss": float(curve.smooth[0]),
        "final_loss": curve.final.as_dict(),
        "improvement": curve.improvement,
        "tokens_to": {f"{share:.0%}": curve.tokens_to_share(share).as_dict() for share in SHARES},
        "slope_per_doubling": curve.slope.as_dict(),
        "verdict": curve.verdict,
        "power_law": law.as_dict() if law else None,
    }


def _compare(one: Curve, other: Curve) -> dict[str, Any]:
    """Tokens that `one` needs for the final loss of `other`; where it was not reached, what its power law says."""
    needed = one.tokens_to_loss(other)
    reached = math.isfinite(needed.value)
    law = one.power_law
    foreseen = None if reached or law is None else law.tokens_to_loss(float(other.smooth[-1])).as_dict()
    return {
        "run": one.name,
        "for_the_loss_of": other.name,
        "loss": float(other.smooth[-1]),
        "unit": one.unit,
        "reached": reached,
        "tokens": needed.as_dict(),
        "share_of_its_tokens": needed.value / float(other.tokens[-1]) if reached else None,
        "power_law_tokens": foreseen,
    }


def write_report(result: Efficiency, out: Path) -> list[Path]:
    """Write efficiency.json, two figures, and the page (.md and .html) into the folder `out`; returns their paths."""
    from ncn.experiments.efficiency.figures import draw_curves, draw_slopes

    out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(torch.device("cpu"))
    write_json(out / "efficiency.json", {**result.as_dict(), "environment": environment})
    draw_curves(result.curves, out / "efficiency-curves.png")
    draw_slopes(result.curves, out / "efficiency-slopes.png")
    pages = write_page(out / "efficiency.md", "What each token bought", f"{_text(result)}\n\n{origin(environment)}")
    return [out / "efficiency.json", out / "efficiency-curves.png", out / "efficiency-slopes.png", *pages]


def sentences(result: Efficiency) -> list[str]:
    """One plain sentence for each run."""
    return [
        f"{curve.name}: {curve.verdict} after {amount(curve.tokens[-1])} tokens at {curve.smooth[-1]:.4f} {curve.unit} "
        f"({_signed(curve.slope)} per doubling of tokens)."
        for curve in result.curves
    ]


def _text(result: Efficiency) -> str:
    data = result.as_dict()
    unit = result.unit
    runs = [
        [
            curve.name,
            amount(curve.tokens[-1]),
            _ranged(curve.final, ".4f"),
            *(_tokens(curve.tokens_to_share(share)) for share in SHARES),
            _signed(curve.slope),
            curve.verdict,
        ]
        for curve in result.curves
    ]
    laws = [
        [
            curve.name,
            _ranged(law.floor, ".3f"),
            _ranged(law.exponent, ".3f"),
            f"{law.scale.value:.3g}",
            f"{law.miss:.3f}",
        ]
        for curve in result.curves
        if (law := curve.power_law)
    ]
    parts = [
        *(f"> **{warning}**\n" for warning in result.warnings),
        *(f"- {sentence}" for sentence in sentences(result)),
        f"\n## Runs\n\nLosses are {result.curves[0].kind} losses in {unit}; ends of 95 % intervals in brackets.\n",
        table(["run", "tokens", "final loss", "tokens to 95 %", "tokens to 99 %", "per doubling", "verdict"], runs),
        "![Smoothed learning curves with their power laws](efficiency-curves.png)\n",
        "![Change of the loss per doubling of tokens along each run](efficiency-slopes.png)\n",
    ]
    if result.pairs:
        parts += ["## Tokens that one run needs for the final loss of another\n",
                  table(["run", "for the loss of", "loss", "tokens", "of the other's"],
                        [_pair_row(pair) for pair in data["pairs"]])]  # fmt: skip
    parts += [
        "## Power laws\n\nL(t) = E + A t^−b over the tokens t after the first tenth. A learning rate that falls over "
        "the run bends the end of its curve, so that the law describes this run and its schedule, not a longer one. "
        "The largest miss is how far the smoothed curve strays from the law: where it is not small beside the fall, "
        "the curve is no power law. An interval of E that reaches zero says that these tokens do not show a floor.\n",
        table(["run", "E", "b", "A", "largest miss"], laws) if laws else "No run's loss falls as a power law does.\n",
        "## How this was computed\n\n"
        "A curve is smoothed by a straight line through the neighbourhood of each point, in the logarithm of tokens, "
        "with weights that fall off over 8 % of the tokens seen (at least to the third nearest point). The improvement "
        "is the fall of the smooth curve from its first point to its lowest. Intervals come from 400 resamples in "
        "which whole blocks of residuals keep or change their sign; a block outlasts the correlation of residuals.\n\n"
        "The verdict looks at the last half of the tokens, one doubling. **Diverging**: the log ends in no number, "
        f"the smooth curve ends more than {RISEN:.0%} of the improvement above its lowest point, or it rises. **Still "
        f"improving**: the 95 % interval of the change per doubling lies wholly below −{SETTLED:.1%} of the "
        f"improvement. **Converged**: it lies wholly within ±{SETTLED:.1%}. Otherwise it cannot be told. A learning "
        "rate that falls to zero brings a faster fall near the end and then a standstill; the verdict is on the run "
        "as it was trained.",
    ]
    return "\n".join(parts)


def _pair_row(pair: Mapping[str, Any]) -> list[str]:
    row = [pair["run"], pair["for_the_loss_of"], f"{pair['loss']:.4f} {pair['unit']}"]
    if pair["reached"]:
        return [*row, _tokens_of(pair["tokens"]), f"{pair['share_of_its_tokens']:.0%}"]
    foreseen = pair["power_law_tokens"]
    if foreseen and foreseen["value"]:
        return [*row, f"not reached; by its power law {_tokens_of(foreseen)}", "–"]
    return [*row, f"not reached, nor by its power law in {FARTHEST:g} times its tokens", "–"]


def amount(count: int | float) -> str:
    """A number of tokens in thousands, millions or billions."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def _tokens(interval: Interval) -> str:
    return _tokens_of(interval.as_dict())


def _tokens_of(ends: Mapping[str, float | None]) -> str:
    value, low, high = (amount(end) if end is not None else "never" for end in ends.values())
    return f"{value} [{low}, {high}]"


def _ranged(interval: Interval, style: str) -> str:
    return f"{interval.value:{style}} [{interval.low:{style}}, {interval.high:{style}}]"


def _signed(interval: Interval) -> str:
    return _ranged(interval, "+.4f")
