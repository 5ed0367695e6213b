"""What a ladder of runs shows: the fitted law, the multipliers, the gap's trend, a held-out size and a projection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncn.errors import UserError
from ncn.experiments.scaling.ladder import short
from ncn.experiments.scaling.law import IDENTIFIED, Point, ScalingFit, fit_scaling_law
from ncn.experiments.scaling.plan import ARMS, run_path
from ncn.experiments.scaling.trend import FARTHEST, TARGETS, Trend, gap_trend, hold_out_largest, project
from ncn.lab.arms import BASELINE, NCN
from ncn.machine.files import read_json, write_json
from ncn.pages.page import origin, table, write_page
from ncn.statistics.interval import Interval
from ncn.training.run_folder import RunFolder


@dataclass(frozen=True)
class Ends:
    """The ends of a ladder's runs: N counted with and without the output head, FLOPs beside each; what is missing."""

    points: tuple[Point, ...]
    without_head: tuple[Point, ...]
    flops: tuple[float, ...]
    missing: tuple[str, ...]


def collect(folders: Sequence[Path]) -> Ends:
    """The ends of all runs of ladders on the same texts; raises `UserError` where there is none, or they differ."""
    points, without, flops, missing = [], [], [], []
    first = read_json(folders[0] / "scale.json")
    for folder in folders:
        facts = read_json(folder / "scale.json")
        if facts["data"]["validation"] != first["data"]["validation"]:
            raise UserError(f"the ladders in {folder} and {folders[0]} were validated on different texts")
        for size, arms in facts["sizes"].items():
            for arm in ARMS:
                counts = arms[arm]["counts"]
                for tokens in facts["budgets"]:
                    for seed in facts["seeds"]:
                        path = run_path(folder, arm, size, tokens, seed)
                        run = RunFolder(path)
                        summary = run.summary() if run.finished else {}
                        if not run.finished or summary.get("diverged"):
                            state = "diverged" if run.finished else "has not finished"
                            missing.append(f"{path.relative_to(folder)} {state}")
                            continue
                        seen, loss = float(summary["tokens"]), summary["validation_loss"]
                        points.append(Point(arm, size, float(counts["working"]), seen, loss, seed))
                        without.append(Point(arm, size, float(counts["non_embedding"]), seen, loss, seed))
                        flops.append(counts["training_flops"] * seen)
    return Ends(tuple(points), tuple(without), tuple(flops), tuple(missing))


def write_report(out: Path, also: Sequence[Path] = ()) -> list[Path]:
    """Write scaling.json, four figures, and the page (.md and .html) of the ladder in `out`, joined by the runs of the
    ladders in `also`; returns their paths. Raises `UserError` where the runs do not suffice for a fit."""
    from ncn.experiments.scaling import figures as figures

    ends = collect([out, *also])
    facts = read_json(out / "scale.json")
    fit = fit_scaling_law(ends.points)
    trend = gap_trend(ends.points, NCN)
    try:
        held_out: dict[str, Any] | None = hold_out_largest(ends.points)
    except UserError as error:
        held_out = {"refused": str(error)}
    rows = project(fit)
    result = {
        "sentences": sentences(fit, trend),
        "loss": "validation loss in nats per token",
        "bits_per_byte_per_nat": facts["data"]["validation_tokens"]
        / facts["data"]["validation_text_bytes"]
        / math.log(2),
        "N": "parameters in matrix products, output head included",
        "fit": fit.as_dict(),
        "fit_without_head": fit_scaling_law(ends.without_head).as_dict(),
        "trend": trend.as_dict(),
        "held_out": held_out,
        "projection": rows,
        "rates": read_json(out / "tuning.json")["rates"],
        "runs": [point._asdict() | {"flops": flops} for point, flops in zip(ends.points, ends.flops, strict=True)],
        "missing": list(ends.missing),
        "joined": [str(folder) for folder in also],
    }
    write_json(out / "scaling.json", result)
    names = {name: out / f"scaling-{name}.png" for name in ("loss", "gap", "multipliers", "projection")}
    figures.draw_losses(fit, ends.flops, names["loss"])
    figures.draw_gap(fit, trend, names["gap"])
    figures.draw_multipliers(fit, names["multipliers"])
    figures.draw_projection(fit, TARGETS, FARTHEST, names["projection"])
    pages = write_page(out / "scaling.md", "What a controller is worth as models grow", _text(result, facts))
    return [out / "scaling.json", *pages, *names.values()]


def sentences(fit: ScalingFit, trend: Trend) -> list[str]:
    """What the ladder says, plainly."""
    gap, slope = trend.mean, trend.slope
    tokens = " and ".join(short(count) for count in trend.tokens)
    mean = f"{_ranged(gap, '+.4f')} nats per token"
    if gap.low > 0:
        first = f"Over these sizes, at {tokens} tokens, the NCN's loss is lower than the widened baseline's by {mean}."
    elif gap.high < 0:
        first = (
            f"Over these sizes, at {tokens} tokens, the NCN's loss is higher than the widened baseline's: gap {mean}."
        )
    else:
        first = f"Over these sizes, at {tokens} tokens, no difference in loss was found: gap {mean}."
    ahead = gap.value >= 0
    verdict = {
        "widens": "The gap widens with size" if ahead else "The NCN's disadvantage shrinks with size",
        "narrows": "The gap narrows with size" if ahead else "The NCN's disadvantage grows with size",
        "cannot be told": "Whether the gap widens or narrows with size cannot be told",
    }[trend.verdict]
    found = [first, f"{verdict}: {_ranged(slope, '+.4f')} nats for each doubling of parameters."]
    constants, known = fit.constants(), fit.identified()
    for name, meaning in (("m_N", "parameters"), ("m_D", "tokens")):
        key = f"{name} {NCN}"
        if known[key]:
            found.append(f"The NCN is worth {_ranged(constants[key], '.3f')} times the {meaning} (1 is no difference).")
        else:
            found.append(f"These runs do not determine what the NCN is worth in {meaning}.")
    return found


def _text(result: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    fit, held_out = result["fit"], result["held_out"]
    other = result["fit_without_head"]["constants"]
    parts = [
        *(f"- {sentence}" for sentence in result["sentences"]),
        "",
        *(f"> **Missing:** {line}.\n" for line in result["missing"]),
        "Losses are validation losses in nats per token; one nat per token is "
        f"{result['bits_per_byte_per_nat']:.4f} bits per byte on this text. The gap is the baseline's loss less the "
        "NCN's: above zero the NCN is better. Intervals are at 95 %.\n",
        "## The ladder\n",
        table(
            [
                "size",
                "parameters",
                "baseline",
                "without embeddings",
                "training MFLOPs a token",
                "rate, baseline",
                "NCN",
            ],
            [_size_row(size, arms, result["rates"]) for size, arms in facts["sizes"].items()],
        ),
        "FLOPs are forward and backward, attention and output head included. Rates are multiples of the learning rates "
        f"of `{facts['preset']}`, tuned at {', '.join(facts['tuning']['sizes'])} with "
        f"{short(facts['tuning']['tokens'])} tokens on a tuning split and interpolated in the logarithm of size.\n",
        "![Loss against compute](scaling-loss.png)\n",
        "## The law\n\nL(N, D) = E + A / (m_N N)^α + B / (m_D D)^β, where m_N and m_D are 1 for the baseline. N counts "
        "the parameters that enter a matrix product for every token, so the output head is in it: at small sizes it "
        "is much of the work, and a law without it bends. The last column counts without embeddings and head, to show "
        "what that choice changes.\n",
        table(
            ["constant", "value", "95 % interval", "determined by these runs", "without the head"],
            [_constant_row(name, entry, other[name]) for name, entry in fit["constants"].items()],
        ),
        f"Huber loss (δ = 0.001) of log L, from 144 starts; the interval is that of {fit['draws']} draws of "
        "runs, those of one size, budget and seed together, widened for the small number of runs. A constant counts as "
        f"determined where its interval spans less than a factor of {IDENTIFIED:g} within the bounds of the search. "
        f"The fit misses log L by {fit['residual_of_log_loss']['median_absolute']:.2%} in the median and "
        f"{fit['residual_of_log_loss']['largest']:.2%} at most.\n",
        "![Multipliers with their intervals](scaling-multipliers.png)\n",
        "## The gap and the size of the model\n",
        "![Gap against size](scaling-gap.png)\n",
        "A straight line in the logarithm of size through one mean a size; sizes are the independent units of its "
        "interval.\n",
        "## The largest size held out\n",
    ]
    if "refused" in held_out:
        parts.append(f"Not done: {held_out['refused']}.\n")
    else:
        parts += [
            f"Fitted without {held_out['size']}, the law misses its losses by "
            f"{held_out['mean_absolute_relative_error']:.2%} on average.\n",
            table(
                ["arm", "tokens", "seed", "loss", "said by the law", "error"],
                [
                    [row["arm"], short(row["tokens"]), str(row["seed"]), f"{row['loss']:.4f}",
                     _ends(row["predicted"], ".4f"), f"{row['error']:+.4f}"]
                    for row in held_out["runs"]
                ],
            ),
        ]  # fmt: skip
    parts += [
        "## Projection\n\n"
        f"Nothing is projected beyond {FARTHEST:g} times the largest compute that was run (6 N D). An interval is that "
        "of the fitted law, and trusts its form; it holds no run's noise.\n",
        table(
            ["size", "tokens", "compute, times the largest", "baseline", "NCN", "gap"],
            [_projection_row(row) for row in result["projection"]],
        ),
        "![Projection](scaling-projection.png)\n",
        origin(facts["environment"], facts["command"]),
    ]
    return "\n".join(parts)


def _size_row(size: str, arms: Mapping[str, Any], rates: Mapping[str, Mapping[str, float]]) -> list[str]:
    mine, twin = arms[NCN]["counts"], arms[BASELINE]["counts"]
    return [
        size,
        f"{mine['total']:,}",
        f"{twin['total']:,} ({twin['total'] / mine['total'] - 1:+.2%})",
        f"{mine['non_embedding']:,}",
        f"{mine['training_flops'] / 1e6:,.2f}",
        f"×{rates[BASELINE][size]:.3g}",
        f"×{rates[NCN][size]:.3g}",
    ]


def _constant_row(name: str, entry: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    known = {True: "yes", False: "no", None: "only with its exponent"}[entry.get("identified")]
    return [name, f"{entry['value']:.4g}", f"{entry['low']:.4g} to {entry['high']:.4g}", known, f"{other['value']:.4g}"]


def _projection_row(row: Mapping[str, Any]) -> list[str]:
    first = [row["size"], f"{short(row['tokens'])} ({row['rule']})", f"{row['times_largest_compute']:.3g}"]
    if "refused" in row:
        return [*first, "refused", "refused", "refused"]
    losses = row["loss"]
    return [*first, *(_ends(losses[arm], ".3f") for arm in ARMS), _ends(row["advantage"][NCN], "+.3f")]


def _ends(entry: Mapping[str, float], style: str) -> str:
    return f"{entry['value']:{style}} [{entry['low']:{style}}, {entry['high']:{style}}]"


def _ranged(interval: Interval, style: str) -> str:
    return f"{interval.value:{style}} [{interval.low:{style}}, {interval.high:{style}}]"
