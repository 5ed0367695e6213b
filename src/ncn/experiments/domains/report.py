"""What a study of two domains found: domains.json, two figures, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ncn.config.signals import SIGNALS
from ncn.experiments.domains.forgetting import Curve, at_equal_level, shielding
from ncn.experiments.domains.separation import RECENT, STRETCHES
from ncn.experiments.domains.study import EQUAL_RATE, LABELS, STATIC, WITH_TASKS, Study, curve_of, losses_of, measure
from ncn.lab.arms import NCN
from ncn.machine.files import read_json, write_json
from ncn.pages.page import origin, table, write_page
from ncn.statistics.seeds import mean_over_seeds


def write_report(study: Study) -> list[Path]:
    """Write `domains.json`, the figures and the page (Markdown and HTML) into the study's folder; returns the paths."""
    from ncn.experiments.domains.figures import draw_forgetting, draw_signals

    out, names = study.plan.out, study.data.names
    curves = {arm: [curve_of(study, arm, seed) for seed in study.plan.seeds] for arm in study.plan.arms}
    same_rate = [
        curve_of(study, STATIC, seed, EQUAL_RATE)
        for seed in study.plan.seeds
        if (out / EQUAL_RATE / STATIC / f"seed-{seed}").is_dir()
    ]
    results = gather(study, curves, same_rate)
    write_json(out / "domains.json", results)
    lines = {LABELS[arm]: found for arm, found in curves.items()} | {"learned constants at the NCN's rate": same_rate}
    drawn = {
        label: [{"gains": curve.gains.tolist(), "forgotten": curve.forgotten.tolist()} for curve in found]
        for label, found in lines.items()
        if found
    }
    draw_forgetting(drawn, names, out / "forgetting.png")
    first_seed = study.plan.seeds[0]
    models = {
        LABELS[arm]: measure(study, arm, first_seed)["signals"][kind]["signals"]
        for arm, kind in ((NCN, "unset"), (WITH_TASKS, "given"))
    }
    neutral = {name: SIGNALS[name].neutral for name in next(iter(models.values()))}
    draw_signals(models, neutral, names, out / "signals.png")
    page = write_page(out / "domains.md", "Two domains in one model", page_text(results))
    return [out / "domains.json", out / "forgetting.png", out / "signals.png", *page]


def gather(study: Study, curves: Mapping[str, Sequence[Curve]], same_rate: Sequence[Curve]) -> dict[str, Any]:
    """Everything that the page says, as JSON. `same_rate` are the curves of learned constants at the NCN's learning
    rate; empty where that is their own."""
    plan, names = study.plan, study.data.names
    facts, tuning = read_json(plan.out / "experiment.json"), read_json(plan.out / "tuning.json")
    others = [arm for arm in plan.arms if arm != STATIC]
    measured = {arm: [measure(study, arm, seed) for seed in plan.seeds] for arm in (NCN, WITH_TASKS)}

    def losses(part: str, arm: str) -> dict[str, list[float]]:
        found = [losses_of(study, part, arm, seed) for seed in plan.seeds]
        return {name: [run[name] for run in found] for name in names}

    both = {arm: losses("runs", arm) for arm in plan.arms}
    for kind in ("unset", "wrong"):
        both[f"{WITH_TASKS}, {kind}"] = {name: [run[kind][name] for run in measured[WITH_TASKS]] for name in names}
    return {
        "format": 1,
        "domains": list(names),
        "seeds": list(plan.seeds),
        "tokens": plan.train.tokens,
        "second_tokens": study.second_tokens,
        "training_tokens": study.data.first.tokens,
        "measured": plan.splits.facts(),
        "arms": {
            name: {
                "parameters": arm.parameters,
                "d_ff": arm.recipe.model.ffn_width,
                "seconds_per_step": facts["arms"][name]["seconds_per_step"],
                "rate": float(tuning[name]["best"]),
                "tuning": tuning[name]["losses"],
            }
            for name, arm in plan.arms.items()
        },
        "both": {
            arm: {
                name: {
                    "value": float(np.mean(values[name])),
                    "per_seed": values[name],
                    **({} if arm == STATIC else {"difference": _against(values[name], both[STATIC][name])}),
                }
                for name in names
            }
            for arm, values in both.items()
        },
        "task_ids": {name: _against(both[WITH_TASKS][name], both[NCN][name]) for name in names},
        "curves": {
            arm: [{"first": curve.first.tolist(), "second": curve.second.tolist()} for curve in found]
            for arm, found in curves.items()
        },
        "shielding": {arm: shielding(curves[arm], curves[STATIC]) for arm in others},
        "shielding_at_equal_rate": shielding(curves[NCN], same_rate) if same_rate else None,
        "equal_level": {arm: at_equal_level(curves[arm], curves[STATIC]) for arm in others},
        "signals": {
            arm: {
                kind: {
                    "distance": {
                        name: {
                            key: np.mean([run["signals"][kind]["signals"][name][key] for run in runs], 0).tolist()
                            for key in ("distance", "same_tokens")
                        }
                        for name in runs[0]["signals"][kind]["signals"]
                    },
                    "read_out": {
                        str(stretch): _read_outs([run["signals"][kind]["read_out"][str(stretch)] for run in runs])
                        for stretch in STRETCHES
                    },
                }
                for kind in runs[0]["signals"]
            }
            for arm, runs in measured.items()
        },
        "command": facts["command"],
        "environment": facts["environment"],
    }


def _against(values: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
    return mean_over_seeds(np.array(values) - np.array(others))


def _read_outs(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean accuracies over seeds, and how far the signals' lies above the tokens'."""
    values = {key: np.array([run[key] for run in found]) for key in ("signals", "tokens", "recent")}
    means = {key: float(accuracies.mean()) for key, accuracies in values.items()}
    return means | {"difference": mean_over_seeds(values["signals"] - values["tokens"])}


def signed(found: Mapping[str, float | None], digits: int = 3) -> str:
    """A difference with its interval, bold where the interval leaves zero out."""
    value, low, high = found["value"], found["low"], found["high"]
    assert value is not None
    if low is None or high is None:
        return f"{value:+.{digits}f}"
    text = f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The answers in words, from the numbers alone."""
    first, second = results["domains"]
    said = []
    for name in results["domains"]:
        found = results["both"][NCN][name]["difference"]
        said.append(
            f"On {name}, the NCN is {_judged(found, 'better', 'worse')} than learned constants: {signed(found)}"
        )
    for name in results["domains"]:
        found = results["task_ids"][name]
        said.append(f"On {name}, task ids make the NCN {_judged(found, 'better', 'worse')}: {signed(found)}")
    for arm in (NCN, WITH_TASKS):
        found = results["shielding"][arm]["1"]["difference"]
        said.append(
            f"Trained on {second} after {first}, the {LABELS[arm]} forgets {_judged(found, 'less', 'more')} of {first} "
            f"than learned constants at the largest gain on {second} that both reach: {signed(found)}"
        )
    if results["shielding_at_equal_rate"]:
        found = results["shielding_at_equal_rate"]["1"]["difference"]
        judged = _judged(found, "less", "more")
        said.append(
            f"With learned constants at the NCN's learning rate, the NCN forgets {judged} of {first}: {signed(found)}"
        )
    return [f"{sentence} bits per byte." for sentence in said]


def _judged(found: Mapping[str, float | None], below: str, above: str) -> str:
    """The word for a difference whose interval leaves zero out."""
    low, high = found["low"], found["high"]
    if high is not None and high < 0:
        return below
    if low is not None and low > 0:
        return above
    return f"neither {below} nor {above} (as far as these seeds can tell)"


def page_text(results: Mapping[str, Any]) -> str:
    first, second = results["domains"]
    seeds, arms = len(results["seeds"]), results["arms"]
    return "\n\n".join(
        [
            "\n".join(f"- {sentence}" for sentence in sentences(results)),
            f"Models of {min(arm['parameters'] for arm in arms.values()):,} to "
            f"{max(arm['parameters'] for arm in arms.values()):,} parameters, {seeds} seeds, "
            f"{results['training_tokens']:,} tokens of training text of each domain. All arms read the same batches in "
            "the same order, each at its own best learning rate, which was chosen on held-out training documents of "
            "both domains. Differences are paired by seed and have 95 % intervals over seeds (Student's t); those that "
            "leave zero out are bold. The measured text has "
            f"{results['measured']['validation_tokens']:,} tokens, half of them of each domain, and is the same for "
            "all runs: the intervals say what to expect of other seeds, and nothing of other texts.",
            table(
                ["arm", "parameters", "feed-forward width", "learning rate, times the recipe's"],
                [
                    [LABELS[name], f"{arm['parameters']:,}", str(arm["d_ff"]), f"{arm['rate']:g}"]
                    for name, arm in arms.items()
                ],
            ),
            f"## Both at once\n\nTrained on {results['tokens']:,} tokens of both, in windows drawn from all of it. "
            "Bits per byte, and the difference from learned constants:",
            _both_table(results),
            "## Does the controller keep them apart?\n\n"
            f"Signals on held-out text of {first} and of {second}: mean and one standard deviation over tokens, for "
            "every layer and, side by side, its heads or sublayers (seed "
            f"{results['seeds'][0]}; the dotted line is no effect).",
            "![Signals by domain](signals.png)",
            "Distance between the two means, in standard deviations within a domain, the mean over seeds; *same "
            "tokens* compares only tokens of equal identity, so that nothing is left of it where a signal follows "
            "the token alone:",
            _distance_table(results),
            "How often a linear read-out, fitted on the tuning text, names the domain of held-out text (one half is "
            "chance), from the signals and, as controls, from the same token ids and from the ids of the last "
            f"{RECENT} tokens up to there (naive Bayes):",
            _read_out_table(results),
            f"## One after the other\n\nTrained on {results['tokens']:,} tokens of {first}, then on "
            f"{results['second_tokens']:,} of {second}, with a learning rate that rises and falls again.",
            f"![Forgotten of {first} against gained on {second}](forgetting.png)",
            "At equal gain, between the measured points on a straight line. *Shielding* is what the arm forgot less "
            "than learned constants, as a difference (below zero: less forgotten):",
            _forgetting_table(results),
            "The arms do not begin at the same bits per byte. What counts in use is how good a model still is on "
            f"{first} by the time when it has come down to a level on {second}, the lowest that both of a pair reach:",
            _level_table(results),
            origin(results["environment"], results["command"]),
        ]
    )


def _both_table(results: Mapping[str, Any]) -> str:
    names = results["domains"]
    rows = []
    for arm, found in results["both"].items():
        label, _, kind = arm.partition(", ")
        cells = [LABELS[label] + {"": "", "unset": ", not given", "wrong": ", the other domain's"}[kind]]
        for name in names:
            cells.append(f"{found[name]['value']:.3f}")
            cells.append(signed(found[name]["difference"]) if "difference" in found[name] else "")
        rows.append(cells)
    header = [cell for name in names for cell in (name, "− learned constants")]
    return table(["arm", *header], rows)


def _distance_table(results: Mapping[str, Any]) -> str:
    rows = []
    for arm, kinds in results["signals"].items():
        for kind, found in kinds.items():
            for name, signal in found["distance"].items():
                label = _label(arm, kind)
                pairs = zip(signal["distance"], signal["same_tokens"], strict=True)
                rows.append(
                    [f"{label}: {name.replace('_', ' ')}", *(f"{all_:.2f} ({same:.2f})" for all_, same in pairs)]
                )
    layers = max(len(row) for row in rows) - 1
    return table(["signal", *(f"layer {layer} (same tokens)" for layer in range(layers))], rows)


def _read_out_table(results: Mapping[str, Any]) -> str:
    rows = []
    for arm, kinds in results["signals"].items():
        for kind, found in kinds.items():
            for stretch, accuracies in found["read_out"].items():
                what = "1 token" if stretch == "1" else f"{stretch} tokens"
                values = [f"{accuracies[key]:.1%}" for key in ("signals", "tokens")]
                values.append(f"{accuracies['recent']:.1%}" if stretch == "1" else "")
                rows.append([f"{_label(arm, kind)}, {what}", *values, signed(accuracies["difference"])])
    header = ["read from", "signals", "token ids", f"token ids, {RECENT} up to there", "signals − token ids"]
    return table(header, rows)


def _label(arm: str, kind: str) -> str:
    return LABELS[arm] + (", not given" if arm == WITH_TASKS and kind == "unset" else "")


def _forgetting_table(results: Mapping[str, Any]) -> str:
    compared = {LABELS[arm]: shares for arm, shares in results["shielding"].items()}
    if results["shielding_at_equal_rate"]:
        compared["NCN, constants at the NCN's rate"] = results["shielding_at_equal_rate"]
    rows = []
    for label, shares in compared.items():
        for share, found in shares.items():
            values = [f"{found[key]:.3f}" for key in ("gain", "forgotten", "twin")]
            rows.append([f"{label}, {float(share):.0%} of the common gain", *values, signed(found["difference"])])
    return table(["arm", "gain", "forgotten", "by learned constants", "shielding"], rows)


def _level_table(results: Mapping[str, Any]) -> str:
    first, second = results["domains"]
    rows = [
        [LABELS[arm], *(f"{found[key]:.3f}" for key in ("second", "first", "twin")), signed(found["difference"])]
        for arm, found in results["equal_level"].items()
    ]
    return table(["arm", f"level on {second}", f"on {first}", "learned constants", "difference"], rows)
