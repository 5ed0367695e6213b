"""What an A/B experiment shows: every number of its report, as one dictionary, and the sentence that follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ncn.experiments.ab.results import Arm, Experiment, Points
from ncn.statistics.seeds import LEVEL, MEASURES, ResampledLosses, entry, holm, intervals, smallest_detectable_effect

PLANNED_SEEDS = (3, 5, 10, 20)


def summarise(experiment: Experiment) -> dict[str, Any]:
    """Everything that the report of an experiment says, ready for JSON; intervals that do not exist are None."""
    differences = compare(experiment)
    summary: dict[str, Any] = {
        "sentence": "",
        "verdict": "",
        "missing": missing(experiment),
        "arms": {arm.name: _describe(experiment, arm) for arm in experiment.arms.values()},
        **differences,
        "equal_cost": equal_cost(experiment),
        "tokens_saved": {arm.name: tokens_saved(experiment, arm) for arm in experiment.controls},
        "tuning": {
            name: {"losses": {f"{rate:g}": loss for rate, loss in tuning.losses.items()}, "best": tuning.best,
                   "at_edge": tuning.at_edge}
            for name, tuning in experiment.tuning.items()
        },
    }  # fmt: skip
    summary["tokens_saved"] = {name: saved for name, saved in summary["tokens_saved"].items() if saved}
    summary["verdict"], summary["sentence"] = verdict(experiment, summary)
    return summary


def missing(experiment: Experiment) -> str | None:
    """One line on the runs that have not finished or have diverged; None where all have finished."""
    states = {state: [run for run in experiment.runs.values() if run.state == state] for state in _STATES}
    if len(states["finished"]) == len(experiment.runs):
        return None
    parts = [
        f"{len(runs)} {words} ({', '.join(f'{run.arm} with seed {run.seed}' for run in runs[:6])}"
        f"{', ...' if len(runs) > 6 else ''})"
        for state, words in _STATES.items()
        if state != "finished" and (runs := states[state])
    ]
    return f"Of {len(experiment.runs)} runs, {' and '.join(parts)}."


_STATES = {"finished": "have finished", "diverged": "diverged", "unfinished": "have not finished"}


def compare(experiment: Experiment) -> dict[str, Any]:
    """Paired differences on the validation documents, in three families, each with a Holm correction of its own.

    "controls": the NCN against every control. "variants": every ablation and variant against the NCN. "again": the
    A/A pair, which only differs by chance.
    """
    keys = [key for key, run in experiment.runs.items() if run.state == "finished"]
    nats = np.stack([nats for key in keys if (nats := experiment.runs[key].nats) is not None])
    losses = ResampledLosses(nats, experiment.text_bytes, experiment.tokens)
    place = {key: index for index, key in enumerate(keys)}

    def pair(arm: Arm, other: Arm) -> dict[str, Any] | None:
        seeds = common_seeds(experiment, arm, other)
        if not seeds:
            return None
        runs, others = ([place[a.name, seed] for seed in seeds] for a in (arm, other))
        found: dict[str, Any] = {"arm": arm.name, "other": other.name, "seeds": seeds}
        for measure in MEASURES:
            per_seed, estimate = losses.difference(measure, runs, others)
            found[measure] = entry(per_seed, estimate)
        found["p"] = found["bits_per_byte"].pop("p")
        for measure in MEASURES[1:]:
            del found[measure]["p"]
        return found

    ncn, baseline = experiment.ncn, next(iter(experiment.with_role("baseline")), None)
    against = [(ncn, control) for control in experiment.controls] if ncn else []
    known = {"ncn", "baseline", "control", "again"}
    variants = [(arm, ncn) for arm in experiment.arms.values() if arm.role not in known] if ncn else []
    again = [(arm, baseline) for arm in experiment.with_role("again")] if baseline else []
    families = {"controls": against, "variants": variants, "again": again}
    result: dict[str, Any] = {
        name: [found for arm, other in pairs if (found := pair(arm, other))] for name, pairs in families.items()
    }
    for family in result.values():
        tested = [found for found in family if found["p"] is not None]
        for found, corrected in zip(tested, holm([found["p"] for found in tested]), strict=True):
            found["holm_p"] = corrected
        for found in family:
            found.setdefault("holm_p", None)
    result["best_control"] = max(result["controls"], key=lambda found: found["bits_per_byte"]["mean"])["other"] \
        if result["controls"] else None  # fmt: skip
    return result | {"levels": _levels(losses, place), "noise": _noise(result, experiment)}


def common_seeds(experiment: Experiment, *arms: Arm) -> list[int]:
    return [seed for seed in experiment.seeds if all(seed in experiment.finished(arm.name) for arm in arms)]


def _levels(losses: ResampledLosses, place: Mapping[tuple[str, int], int]) -> dict[str, Any]:
    """Each arm's own results, by measure: mean, and standard deviation over seeds."""
    levels: dict[str, Any] = {}
    for arm in dict.fromkeys(name for name, _ in place):
        runs = [index for (name, _), index in place.items() if name == arm]
        values = {measure: losses.values[measure][runs] for measure in MEASURES}
        levels[arm] = {
            measure: {"mean": float(found.mean()), "sd": float(found.std(ddof=1)) if len(found) > 1 else None}
            for measure, found in values.items()
        }
    return levels


def _noise(families: Mapping[str, Any], experiment: Experiment) -> dict[str, Any] | None:
    """How much a paired difference varies from seed to seed, in bits per byte, and what can be seen through that."""
    pairs = [*families["controls"], *families["again"]]
    spreads = [np.var(found["bits_per_byte"]["per_seed"], ddof=1) for found in pairs if len(found["seeds"]) > 1]
    if not spreads:
        return None
    deviation = math.sqrt(float(np.mean(spreads)))
    counts = sorted({*PLANNED_SEEDS, len(experiment.seeds)})
    return {
        "sd": deviation,
        "pairs": len(spreads),
        "smallest_detectable_effect": {
            str(count): smallest_detectable_effect(deviation, count) for count in counts if count > 1
        },
    }


def equal_cost(experiment: Experiment) -> list[dict[str, Any]]:
    """The NCN less each control, in bits per byte, where both have cost the same: tokens, FLOPs or seconds.

    Each run is read off its validation curve at the smaller of the two arms' whole costs. Seeds alone vary here.
    """
    ncn = experiment.ncn
    found = []
    for control in experiment.controls if ncn else []:
        assert ncn is not None
        seeds = [s for s in common_seeds(experiment, ncn, control)
                 if min(len(experiment.curves[ncn.name, s]), len(experiment.curves[control.name, s])) > 1]  # fmt: skip
        if not seeds:
            continue
        row: dict[str, Any] = {"arm": ncn.name, "other": control.name, "seeds": seeds}
        for kind, cost in _costs(experiment).items():
            gaps = []
            for seed in seeds:
                ours, theirs = experiment.curves[ncn.name, seed], experiment.curves[control.name, seed]
                budget = min(ours[-1, 0] * cost(ncn), theirs[-1, 0] * cost(control))
                gaps.append(_loss_at(ours, budget / cost(ncn)) - _loss_at(theirs, budget / cost(control)))
            values = np.array(gaps) * experiment.nats_to_bits_per_byte
            row[kind] = entry(values, intervals(values)) | {"cost_ratio": cost(ncn) / cost(control)}
        found.append(row)
    return found


def _costs(experiment: Experiment) -> dict[str, Callable[[Arm], float]]:
    """By kind, the cost of one token; what was not measured is left out."""
    costs: dict[str, Callable[[Arm], float]] = {"tokens": lambda arm: 1.0, "flops": lambda arm: arm.flops_per_token}
    if all(arm.seconds_per_step for arm in experiment.arms.values()):
        costs["seconds"] = lambda arm: arm.seconds_per_step / experiment.tokens_per_step
    return {kind: cost for kind, cost in costs.items() if all(cost(arm) for arm in experiment.arms.values())}


def _loss_at(curve: Points, tokens: float) -> float:
    return float(np.interp(tokens, curve[:, 0], curve[:, 1]))


def tokens_saved(experiment: Experiment, control: Arm) -> dict[str, Any] | None:
    """The share of its tokens that the NCN could have been spared to reach the control's last loss, seed by seed.

    Where the NCN never gets there the share is negative: what the control could have been spared to reach the NCN's
    last loss.
    """
    ncn = experiment.ncn
    if ncn is None:
        return None
    curves = [
        (experiment.curves[ncn.name, seed], experiment.curves[control.name, seed])
        for seed in common_seeds(experiment, ncn, control)
    ]
    shares = np.array([_saved(*pair) for pair in curves if min(map(len, pair)) > 1])
    return entry(shares, intervals(shares)) if len(shares) else None


def _saved(ours: Points, theirs: Points) -> float:
    if ours[-1, 1] > theirs[-1, 1]:
        return -_saved(theirs, ours)
    return float(1 - _first_reaching(ours, theirs[-1, 1]) / ours[-1, 0])


def _first_reaching(curve: Points, loss: float) -> float:
    """Tokens after which the curve is first at or below `loss`, between two points by a straight line."""
    place = int(np.argmax(curve[:, 1] <= loss))
    if place == 0:
        return float(curve[0, 0])
    (before, high), (after, low) = curve[place - 1], curve[place]
    return float(before + (after - before) * (high - loss) / (high - low))


def verdict(experiment: Experiment, summary: Mapping[str, Any]) -> tuple[str, str]:
    """One word and one sentence: "better", "worse", "no difference", "one seed" or "unfinished".

    The best control is chosen by its result on these same runs, which flatters it. The NCN is called better only where
    its interval excludes zero against every control, a demand that needs no correction, and worse only where the
    corrected p-value against the best is below 5 %.
    """
    if not (experiment.ncn and experiment.controls):
        return "unfinished", "NCN was not compared with a control: this experiment does not have both."
    if not summary["controls"]:
        return "unfinished", "NCN cannot be compared yet: it needs a finished run, and a control one of the same seed."
    rows = {row["other"]: row for row in summary["controls"]}
    row = rows[summary["best_control"]]
    found, label = row["bits_per_byte"], experiment.arms[row["other"]].label
    best = "best control" if len(rows) == len(experiment.controls) else "best control that has finished"
    size = f"{abs(found['mean']):.4f}"
    if found["low"] is None:
        side = "below" if found["mean"] < 0 else "above"
        return "one seed", (
            f"NCN lies {size} bits per byte {side} the {best} ({label}) with one seed, "
            "which cannot tell a difference from chance."
        )
    extent = f"{size} ± {(found['high'] - found['low']) / 2:.4f} bits per byte"
    count = f"{len(row['seeds'])} seeds"
    if found["mean"] > 0 and row["holm_p"] < 1 - LEVEL:
        return "worse", f"NCN is worse than the {best} ({label}) by {extent} ({count})."
    clear = [name for name, other in rows.items() if (other["bits_per_byte"]["high"] or 0) < 0]
    if len(clear) == len(rows):
        return "better", f"NCN beats the {best} ({label}) by {extent} ({count})."
    if row["other"] in clear:
        others = " and ".join(experiment.arms[name].label for name in rows if name not in clear)
        return "no difference", (
            f"NCN is ahead of the {best} ({label}) by {extent}, but not clearly ahead of {others} ({count})."
        )
    largest = max(abs(found["low"]), abs(found["high"]))
    measured = f"{found['mean']:+.4f}".replace("-", "−")
    return "no difference", (
        f"No difference larger than {largest:.4f} bits per byte was found between NCN and the {best} ({label}); "
        f"the measured one is {measured} ({count})."
    )


def _describe(experiment: Experiment, arm: Arm) -> dict[str, Any]:
    tuning = experiment.tuning_of(arm)
    states = [experiment.runs[arm.name, seed].state for seed in experiment.seeds]
    return {
        "label": arm.label,
        "role": arm.role,
        "parameters": arm.parameters,
        "flops_per_token": arm.flops_per_token,
        "seconds_per_step": arm.seconds_per_step,
        "best_rate": tuning.best if tuning else None,
        "finished": experiment.finished(arm.name),
        "diverged": states.count("diverged"),
    }
