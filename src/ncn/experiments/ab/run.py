"""An A/B: arms of equal size, on the same batches, each at its own best learning rate, with several seeds.

    OUT/experiment.json             the plan: data, seeds, and for each arm its recipe, parameters, FLOPs and time
    OUT/data/                       training text, tuning split, validation text and what of it is read
    OUT/tuning/ARM/rate-0.5/ ...    runs with which learning rates are chosen, validated on the tuning split
    OUT/tuning.json                 their losses
    OUT/pilot/ARM/seed-1000/ ...    runs that measure the noise between seeds before the comparison is run
    OUT/runs/ARM/seed-1/ ...        the comparison, validated on the validation text
    OUT/noise.json                  the noise between seeds, and the smallest difference that can be shown

Everything is decided by the plan and by what the runs leave behind: stopped at any moment and called again, it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncn.config.recipe import Recipe
from ncn.config.training import TrainConfig
from ncn.errors import UserError
from ncn.experiments.ab.noise import seed_noise
from ncn.lab.arms import AGAIN, BASELINE, build_arms
from ncn.lab.comparison import PILOT_SEED, Plan, begin, check_batches, compare, describe, sweep
from ncn.lab.fleet import Launcher, launch
from ncn.lab.texts import make_splits
from ncn.machine.files import write_json
from ncn.training.begin import fit_to_data

if TYPE_CHECKING:
    from ncn.experiments.ab.report import Report

NOISE_SEEDS = (PILOT_SEED, 1000, 1001)
"""Of the pairs of short runs that measure the noise between seeds."""
_POINTS = 20
"""Validations along a run."""


def run_ab(
    out: str | Path,
    *,
    preset: str | Path = "mini",
    settings: Iterable[str] = (),
    seeds: int = 5,
    tune_tokens: int | None = None,
    arms: Sequence[str] | None = None,
    variants: Mapping[str, Sequence[str]] | None = None,
    data: str = "tinystories-sample",
    valid: str = "tinystories-sample-valid",
    eval_tokens: int | None = None,
    launcher: Launcher = "local",
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Report:
    """Run an A/B, or the rest of it, in the folder `out`, and write its report.

    Args:
        preset, settings: the recipe of the modulated model, as for `Recipe.read`; `train.tokens` is the length of a
            run. Validation is spread over the run where the recipe leaves its pace at the default.
        seeds: seeds 1 to this number are run with every arm.
        tune_tokens: length of the runs that choose learning rates; by default half of a run.
        arms, variants: as for `build_arms`.
        data, valid: dataset folders, or sources that `ncn.prepare` reads.
        eval_tokens: about how much of `valid` the comparison is measured on, from the beginning on; by default as
            much as a run is trained on, so that a quick experiment does not spend its time on measuring.
        launcher, workers, progress: as for `launch`.
        say: is given every line of text.

    Raises:
        UserError: something that the user can mend, another plan in the folder included.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    from ncn.experiments.ab.report import report

    plan = make_plan(
        Path(out),
        preset,
        settings,
        seeds,
        tune_tokens,
        arms,
        variants,
        data=data,
        valid=valid,
        eval_tokens=eval_tokens,
        progress=progress,
    )
    options: dict[str, Any] = {"launcher": launcher, "workers": workers, "progress": progress, "say": say}
    facts = begin(plan, workers)
    say(describe(plan, facts))
    tuning = sweep(plan, say, options)
    best = {arm.name: float(tuning[arm.tuned_as]["best"]) for arm in plan.arms.values()}
    noise = {"pilot": pilot(plan, best, say, options)}
    write_json(plan.out / "noise.json", noise)
    say(f"{len(plan.arms)} arms with {len(plan.seeds)} seeds, {plan.train.tokens:,} tokens a run")
    summaries = compare(plan, best, say, options)
    check_batches(summaries)
    noise["runs"] = noise_of_runs(plan, summaries, say)
    write_json(plan.out / "noise.json", noise)
    return report(plan.out)


def make_plan(
    out: Path,
    preset: str | Path,
    settings: Iterable[str],
    seeds: int,
    tune_tokens: int | None,
    arms: Sequence[str] | None,
    variants: Mapping[str, Sequence[str]] | None,
    *,
    data: str,
    valid: str,
    eval_tokens: int | None,
    progress: bool,
) -> Plan:
    """Everything that can be wrong is found out here, before the text is prepared if possible."""
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, not {seeds}")
    for name, count in (("tune-tokens", tune_tokens), ("eval-tokens", eval_tokens)):
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, not {count}")
    recipe = _paced(Recipe.read(preset, settings))
    build_arms(recipe, arms, variants)
    splits = make_splits(out / "data", data, valid, recipe.model.vocab_size, progress=progress)
    splits = splits.measured_on(eval_tokens or recipe.train.tokens, out / "data" / "measured")
    recipe = fit_to_data(recipe, splits.train)
    context = recipe.train.context or recipe.model.context_length
    if splits.train.tokens < context:
        raise UserError(f"the training split has {splits.train.tokens} tokens, less than one window of {context}")
    built = build_arms(recipe, arms, variants)
    half = math.ceil(recipe.train.tokens / 2)
    return Plan(out, str(preset), built, tuple(range(1, seeds + 1)), tune_tokens or half, splits)


def pilot(
    plan: Plan, best: Mapping[str, float], say: Callable[[str], None], options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The noise between seeds, from pairs of short baselines that differ in their initial weights alone."""
    if not {BASELINE, AGAIN} <= plan.arms.keys():
        say(f"no pilot of the seed noise: it needs the arms {BASELINE} and {AGAIN}")
        return None
    jobs = [plan.pilot_job(plan.arms[name], seed, best[BASELINE]) for name in (BASELINE, AGAIN) for seed in NOISE_SEEDS]
    summaries = launch(jobs, **options)
    count = len(NOISE_SEEDS)
    pairs = list(zip(summaries[:count], summaries[count:], strict=True))
    return seed_noise(pairs, len(plan.seeds), "pilot, on the tuning split", say)


def noise_of_runs(
    plan: Plan, summaries: Mapping[tuple[str, int], Mapping[str, Any]], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The noise between seeds in the comparison itself, from its A/A pair."""
    if not {BASELINE, AGAIN} <= plan.arms.keys():
        return None
    pairs = [(summaries[BASELINE, seed], summaries[AGAIN, seed]) for seed in plan.seeds]
    return seed_noise(pairs, len(plan.seeds), "A/A pair", say)


def _paced(recipe: Recipe) -> Recipe:
    """The recipe with validations and checkpoints spread over the run, where it has the default pace."""
    train, default = recipe.train, TrainConfig()
    context = train.context or recipe.model.context_length
    steps = math.ceil(train.tokens / (train.batch_size * context))
    pace = {
        "eval_every": max(1, steps // _POINTS),
        "eval_tokens": min(default.eval_tokens, max(16 * context, train.tokens // (2 * _POINTS))),
        "checkpoint_every": max(1, min(default.checkpoint_every, steps // 5)),
    }
    changes = {name: value for name, value in pace.items() if getattr(train, name) == getattr(default, name)}
    return Recipe(model=recipe.model, train=train.override(**changes))
