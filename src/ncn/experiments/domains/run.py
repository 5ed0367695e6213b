"""`ncn domains`: two domains in one model, with and without a controller, and with task ids.

    OUT/experiment.json                  the plan: data, seeds, and for each arm its recipe, parameters, FLOPs and time
    OUT/data/                            the texts; see `ncn.experiments.domains.texts`
    OUT/tuning/ARM/rate-0.5/ ...         runs on both domains with which learning rates are chosen
    OUT/tuning.json                      their losses
    OUT/runs/ARM/seed-1/ ...             runs on both domains, for the losses and the signals
    OUT/first/ARM/seed-1/ ...            runs on the first domain,
    OUT/second/ARM/seed-1/ ...           and on the second, from the weights of those, for what is forgotten
    OUT/second-at-equal-rate/static/ ... the same for learned constants at the NCN's learning rate, where it has another
    OUT/measures/ARM/seed-1.json ...     what was measured on the models of OUT/runs
    OUT/domains.json, .md, .html, .png   what follows from it

Everything is decided by the plan and by what the runs leave behind: stopped at any moment and called again, it goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ncn.config.recipe import Recipe
from ncn.errors import UserError
from ncn.experiments.domains.study import EQUAL_RATE, MEASURED_TOKENS, STATIC, WITH_TASKS, Study, measure
from ncn.experiments.domains.texts import make_domain_data
from ncn.lab.arms import BASELINE, NCN, build_arms
from ncn.lab.comparison import Plan, begin, check_batches, compare, describe, sweep
from ncn.lab.fleet import launch
from ncn.training.begin import fit_to_data


def run_domains(
    out: str | Path,
    *,
    data: str | Path,
    valid: str | Path,
    preset: str | Path = "mini",
    settings: Iterable[str] = (),
    seeds: int = 3,
    second_tokens: int | None = None,
    baseline: bool = False,
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Run the study, or the rest of it, in the folder `out`, and write its report; returns the report's files.

    Args:
        data, valid: dataset folders whose documents belong to the same two tasks, to train and to measure on. The task
            that comes first in `data` is the first domain.
        preset, settings: the recipe of the modulated model, as for `Recipe.read`; `train.tokens` is the length of a
            run, on both domains or on the first.
        seeds: seeds 1 to this number are run with every arm.
        second_tokens: length of the training on the second domain after the first; by default half of a run, which is
            also the length of the runs that choose learning rates.
        baseline: whether to run the plain, widened model as well.
        workers, progress: as for `launch`.
        say: is given every line of text.

    Raises:
        UserError: something that the user can mend, another plan in the folder included.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    from ncn.experiments.domains.report import write_report

    study = make_study(Path(out), data, valid, preset, settings, seeds, second_tokens, baseline)
    plan = study.plan
    options: dict[str, Any] = {"workers": workers, "progress": progress, "say": say}
    facts = begin(plan, workers)
    say(describe(plan, facts))
    tuning = sweep(plan, say, options)
    best = {name: float(found["best"]) for name, found in tuning.items()}
    keys = [(name, seed) for seed in plan.seeds for name in plan.arms]
    say(f"{len(plan.arms)} arms with {len(plan.seeds)} seeds on both domains, {plan.train.tokens:,} tokens a run")
    _check(compare(plan, best, say, options))
    say(f"the same on {study.data.names[0]} alone, then {study.second_tokens:,} tokens of {study.data.names[1]}")
    for make in (study.first_job, study.second_job):
        summaries = launch([make(plan.arms[name], seed, best[name]) for name, seed in keys], **options)
        _check(dict(zip(keys, summaries, strict=True)))
    if best[STATIC] != best[NCN]:  # how much is forgotten for a gain depends on the rate, too
        twin = plan.arms[STATIC]
        launch([study.second_job(twin, seed, best[NCN], EQUAL_RATE) for seed in plan.seeds], **options)
    for name, seed in keys:
        measure(study, name, seed)
    return write_report(study)


def make_study(
    out: Path,
    data: str | Path,
    valid: str | Path,
    preset: str | Path,
    settings: Iterable[str],
    seeds: int,
    second_tokens: int | None,
    baseline: bool,
) -> Study:
    """Everything that can be wrong is found out here."""
    if seeds < 2:
        raise UserError(f"seeds must be at least 2, not {seeds}: the intervals are over seeds")
    recipe = Recipe.read(preset, settings)
    half = math.ceil(recipe.train.tokens / 2)
    if second_tokens is not None and second_tokens < 1:
        raise UserError(f"second-tokens must be at least 1, not {second_tokens}")
    made = make_domain_data(out / "data", data, valid, measured_tokens=MEASURED_TOKENS)
    recipe = fit_to_data(recipe, made.splits.train)
    # the end is validated on everything, and nothing before it
    recipe = recipe.model_copy(update={"train": recipe.train.override(eval_every=recipe.train.tokens)})
    variants = {WITH_TASKS: [f"controller.tasks={json.dumps(made.names)}"]}
    arms = build_arms(recipe, [STATIC, NCN, *([BASELINE] if baseline else [])], variants)
    plan = Plan(out, str(preset), arms, tuple(range(1, seeds + 1)), half, made.splits)
    return Study(plan, made, second_tokens or half)


def _check(summaries: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    for (name, seed), summary in summaries.items():
        if summary.get("diverged"):
            raise UserError(f"the arm {name} diverged with seed {seed}: lower learning_rate, and choose another --out")
    check_batches(summaries)
