"""The report of an A/B experiment: summary.json, a page in Markdown and HTML, and its figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncn.errors import UserError
from ncn.experiments.ab.comparisons import missing, summarise
from ncn.experiments.ab.results import Experiment
from ncn.machine.files import write_json
from ncn.pages.numbers import NBSP, interval_text, p_text, percent
from ncn.pages.page import origin, table, write_page
from ncn.statistics.seeds import MEASURES

FAMILIES = {
    "controls": "NCN against the controls",
    "variants": "Ablations and variants against NCN",
    "again": "A/A pair: chance alone",
}


@dataclass(frozen=True)
class Report:
    """What the experiment says, what is missing from it, and the files that say more."""

    sentence: str
    missing: str | None
    warnings: list[str]
    files: list[Path]


def report(folder: str | Path) -> Report:
    """Write the report of the experiment in `folder` to its subfolder report/, as far as its runs have finished.

    Raises:
        UserError: the folder is no experiment, no run in it has finished, or its runs may not be compared.
    """
    experiment = Experiment.open(folder)
    if not any(run.state == "finished" for run in experiment.runs.values()):
        raise UserError(
            f"no run in {experiment.folder} has finished ({missing(experiment)}); go on with `ncn ab`, then report"
        )
    summary = summarise(experiment)
    cautions = warnings(experiment, summary)
    summary["warnings"] = cautions
    out = experiment.folder / "report"
    out.mkdir(exist_ok=True)
    figures = _draw(experiment, summary, out)
    write_json(out / "summary.json", summary)
    pages = write_page(out / "report.md", "Does modulation help?", _text(experiment, summary, figures))
    files = [out / "summary.json", *pages, *(out / name for name in figures.values())]
    return Report(summary["sentence"], summary["missing"], cautions, files)


def warnings(experiment: Experiment, summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers, one sentence each."""
    found = []
    for name, arm in experiment.arms.items():
        if count := summary["arms"][name]["diverged"]:
            found.append(
                f"{count} of {len(experiment.seeds)} runs of {arm.label} diverged. Its numbers are of the other seeds "
                "only, which flatters it."
            )
        tuning = experiment.tuning.get(name)
        if tuning and tuning.at_edge:
            found.append(
                f"The best learning rate of {arm.label} is the {tuning.at_edge} that was tried ({tuning.best:g}): "
                "a better one may lie beyond it."
            )
    found += [
        f"The A/A pair, which differs by chance alone, differs by {interval_text(row['bits_per_byte'])} bits per byte. "
        "That happens once in twenty experiments; otherwise the noise is larger than it seems here."
        for row in summary["again"]
        if row["p"] is not None and row["p"] < 0.05
    ]
    sizes = [arm.parameters for arm in (*experiment.controls, *experiment.with_role("ncn"))]
    if sizes and max(sizes) > 1.001 * min(sizes):
        found.append(
            f"The arms do not have the same size: from {min(sizes):,} to {max(sizes):,} parameters, "
            f"{max(sizes) / min(sizes) - 1:.2%} apart."
        )
    return found


def _draw(experiment: Experiment, summary: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Draw what there is to draw; returns the names of the files."""
    from ncn.experiments.ab.figures import learning_curves
    from ncn.lab import figures as shared

    figures = {}
    rows = [
        shared.Difference(_pair(experiment, row), heading, **{
            key: row["bits_per_byte"][key] for key in ("mean", "low", "high", "per_seed")
        })
        for family, heading in FAMILIES.items()
        for row in summary[family]
    ]  # fmt: skip
    if rows:
        figures["differences"] = "differences.png"
        shared.differences(rows, out / figures["differences"])
    arms = [*experiment.controls, *experiment.with_role("ncn")]
    curves = {
        arm.label: found
        for arm in arms
        if (found := [experiment.curves[arm.name, seed] for seed in experiment.finished(arm.name)
                      if len(experiment.curves[arm.name, seed]) > 1])
    }  # fmt: skip
    if curves:
        figures["curves"] = "curves.png"
        learning_curves(curves, next(iter(curves)), out / figures["curves"])
    sweeps = {experiment.arms[name].label: tuning.losses for name, tuning in experiment.tuning.items() if tuning.losses}
    if sweeps:
        figures["sweep"] = "sweep.png"
        shared.rate_sweep(sweeps, out / figures["sweep"])
    return figures


def _text(experiment: Experiment, summary: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    facts = experiment.facts
    seeds = len(experiment.seeds)
    parts = [f"> **{summary['sentence']}**"]
    if summary["missing"]:
        parts.append(f"**This report is not final.** {summary['missing']}")
    parts += [f"**Take care:** {warning}" for warning in summary["warnings"]]
    parts.append(
        f"Every arm is one model ({facts['preset']}, with the settings of the command at the end) with another source "
        "of its control signals, or none. "
        f"All were trained on {facts['tokens_per_run']:,} tokens ({facts['steps']:,} steps), each at the learning rate "
        f"that suits it best, with {seeds} {'seed' if seeds == 1 else 'seeds'}. A seed fixes the initial weights that "
        "the arms share and the order of the batches, so differences are taken seed by seed. They are measured on "
        f"{len(experiment.tokens):,} validation documents ({int(experiment.text_bytes.sum()):,} bytes of text)."
    )
    sections = [
        _arms_section(experiment, summary),
        _differences_section(experiment, summary, figures),
        _noise_section(experiment, summary),
        _curves_section(experiment, summary, figures),
        _cost_section(experiment, summary),
        _sweep_section(experiment, summary, figures),
        _origin_section(experiment),
    ]
    return "\n\n".join([*parts, *filter(None, sections)])


def _arms_section(experiment: Experiment, summary: Mapping[str, Any]) -> str:
    rows = []
    for name, arm in summary["arms"].items():
        level = summary["levels"].get(name)
        results = ["–"] * 3
        if level:
            nats, perplexity = (level[measure]["mean"] for measure in MEASURES[1:])
            results = [_level(level["bits_per_byte"]), f"{nats:.4f}", f"{perplexity:.3f}"]
        speed = arm["seconds_per_step"]
        rows.append([
            arm["label"],
            f"{arm['parameters']:,}",
            f"{arm['flops_per_token'] / 1e6:.3g}",
            f"{1000 * speed:.1f}" if speed else "–",
            f"{arm['best_rate']:g}" if arm["best_rate"] else "–",
            str(len(arm["finished"])),
            *results,
        ])  # fmt: skip
    header = ["arm", "parameters", "MFLOPs a token", "ms a step", "rate", "seeds", "bits per byte", "nats per token",
              "perplexity"]  # fmt: skip
    return (
        "## The arms\n\n"
        "Results are means over the seeds (± their standard deviation from seed to seed) on the whole validation text. "
        "FLOPs are of a forward pass; the learning rate is a multiple of the recipe's own.\n\n" + table(header, rows)
    )


def _differences_section(experiment: Experiment, summary: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    rows = [row for family in FAMILIES for row in summary[family]]
    if not rows:
        return ""
    alone = all(row["p"] is None for row in rows)
    method = (
        "With one seed there is no interval and no p-value: a single run cannot tell a difference from chance."
        if alone
        else "A difference below zero means that the first of the two is better. Intervals are 95 % intervals from a "
        "hierarchical bootstrap: validation documents are drawn with replacement, in common for all runs, and the "
        "seeds, which are too few for that, are given the spread of Student's distribution; after ± stands half the "
        "width of an interval. The corrected p-value "
        "(Holm) may be compared with 0.05 although several arms are tested; it is corrected within each group of the "
        "figure."
    )
    parts = ["## Differences", method]
    if "differences" in figures:
        parts.append(f"![Paired differences in bits per byte]({figures['differences']})")
    header = ["difference", "bits per byte", "nats per token", "ΔPPL", "p", "corrected"]
    parts.append(
        table(header, ([
            _pair(experiment, row),
            interval_text(row["bits_per_byte"]),
            interval_text(row["nats_per_token"], short=True),
            interval_text(row["perplexity"], 3, short=True),
            p_text(row["p"]),
            p_text(row["holm_p"]),
        ] for row in rows))
    )  # fmt: skip
    if summary["best_control"]:
        label = experiment.arms[summary["best_control"]].label
        parts.append(
            f"The best control, {label}, was chosen by its result on these same runs. That flatters it, and so makes "
            "NCN look worse against it than it is. The sentence at the top therefore says that NCN wins only where its "
            "interval excludes zero against every control, and that it loses only where the corrected p-value is below "
            "0.05."
        )
    return "\n\n".join(parts)


def _noise_section(experiment: Experiment, summary: Mapping[str, Any]) -> str:
    noise = summary["noise"]
    if noise is None:
        return ""
    rows = [[count, f"{effect:.4f}"] for count, effect in noise["smallest_detectable_effect"].items()]
    pairs = "one pair of arms" if noise["pairs"] == 1 else f"{noise['pairs']} pairs of arms"
    return (
        "## What these seeds can show\n\n"
        f"From seed to seed a paired difference varies with a standard deviation of {noise['sd']:.4f} bits per byte "
        f"(over {pairs}). The table says how large a true difference must be so that four of five experiments find it, "
        f"tested at the 5 % level; this one has {len(experiment.seeds)} seeds.\n\n"
        + table(["seeds", "smallest difference that is found (bits per byte)"], rows)
    )


def _curves_section(experiment: Experiment, summary: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    if "curves" not in figures:
        return ""
    parts = ["## Learning curves", f"![Validation loss by tokens seen]({figures['curves']})"]
    rows = [
        [f"NCN against {experiment.arms[name].label}", percent(saved), p_text(saved["p"])]
        for name, saved in summary["tokens_saved"].items()
    ]
    if rows:
        parts += [
            "### Tokens saved at equal loss",
            "The share of its training tokens that NCN could have been spared to reach the last loss of the control, "
            "from the curves of each seed. Below zero NCN never reaches that loss, and the share is what the control "
            "could have been spared to reach the last loss of NCN. Over a run whose learning rate falls to its end "
            "this understates the saving on both sides: a shorter run would have ended with a low rate too.",
            table(["comparison", "tokens saved", "p"], rows),
        ]
    return "\n\n".join(parts)


def _cost_section(experiment: Experiment, summary: Mapping[str, Any]) -> str:
    kinds = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal time"}
    found = summary["equal_cost"]
    kinds = {kind: words for kind, words in kinds.items() if found and kind in found[0]}
    if not kinds:
        return ""
    rows = [
        [_pair(experiment, row),
         *(interval_text(row[kind], short=True) for kind in kinds),
         *(f"{row[kind]['cost_ratio'] - 1:+.1%}".replace("-", "−") for kind in kinds if kind != "tokens")]
        for row in found
    ]  # fmt: skip
    ratios = [f"its {words.removeprefix('equal ')} a token" for kind, words in kinds.items() if kind != "tokens"]
    header = ["difference", *kinds.values(), *ratios]
    return (
        "## At equal cost\n\n"
        "The same differences where both arms have had the same number of tokens, of floating-point operations, or of "
        "seconds (from the step times in the table of arms): each run is read off its own validation curve where the "
        "cheaper arm's budget ends. This is an approximation. The dearer arm is read before its learning rate has "
        "fallen to its end, and would do better with a schedule made for the smaller budget, so the numbers err "
        "against the dearer arm. Intervals are over seeds only, on the validations made during training.\n\n"
        + table(header, rows)
    )


def _sweep_section(experiment: Experiment, summary: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    if "sweep" not in figures:
        return ""
    sweeps = {name: tuning for name, tuning in experiment.tuning.items() if tuning.losses}
    rates = sorted({rate for tuning in sweeps.values() for rate in tuning.losses})

    def cell(losses: Mapping[float, float | None], rate: float, best: float | None) -> str:
        if rate not in losses:
            return "–"
        loss = losses[rate]
        if loss is None:
            return "diverged"
        return f"**{loss:.4f}**" if rate == best else f"{loss:.4f}"

    rows = [
        [experiment.arms[name].label, *(cell(tuning.losses, rate, tuning.best) for rate in rates)]
        for name, tuning in sweeps.items()
    ]
    pilot = experiment.facts.get("pilot_seed")
    return (
        "## Learning rates\n\n"
        "Each arm was tuned by itself"
        + (f", with seed {pilot}" if pilot is not None else "")
        + ", on a split that takes no part in the comparison: loss in nats per token by learning rate, as a multiple "
        "of the recipe's own; the best is set in bold, and a rate that was not tried for an arm has a dash.\n\n"
        f"![Loss by learning rate]({figures['sweep']})\n\n" + table(["arm", *(f"× {rate:g}" for rate in rates)], rows)
    )


def _origin_section(experiment: Experiment) -> str:
    command = experiment.facts["command"]
    line = command if isinstance(command, str) else shlex.join(map(str, command))
    return (
        f"{origin(experiment.facts['environment'], line)} Every number on this page is in summary.json beside it, and "
        "every run keeps its own folder."
    )


def _pair(experiment: Experiment, row: Mapping[str, Any]) -> str:
    return f"{experiment.arms[row['arm']].label} − {experiment.arms[row['other']].label}"


def _level(level: Mapping[str, Any], digits: int = 4) -> str:
    return f"{level['mean']:.{digits}f}" + (f"{NBSP}±{NBSP}{level['sd']:.{digits}f}" if level["sd"] is not None else "")
