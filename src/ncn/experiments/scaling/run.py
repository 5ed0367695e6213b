"""`ncn scale`: baseline and modulated model on a ladder of sizes and token budgets.

    OUT/scale.json                                 the plan: data, budgets, seeds, and for each size and arm its recipe
    OUT/data/                                      training text, tuning split, validation text
    OUT/tuning/ARM/SIZE/rate-0.5/ ...              runs with which learning rates are chosen, on the tuning split
    OUT/tuning.json                                their losses, and the rate of every size
    OUT/runs/ARM/SIZE/tokens-250k/seed-1/ ...      the ladder, validated on the validation text
    OUT/scaling.json, scaling.md, .html, .png      what follows from it

The learning rate of each arm is tuned at three sizes and interpolated in the logarithm of size. Stopped at any moment
and called again, it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ncn.config.recipe import Recipe
from ncn.errors import UserError
from ncn.experiments.scaling.ladder import SIZES, Rung, build_ladder, short
from ncn.experiments.scaling.plan import ARMS, BUDGETS, Ladder
from ncn.lab.arms import BASELINE, NCN
from ncn.lab.fleet import Launcher, final_losses, launch
from ncn.lab.plan import begin_experiment
from ncn.lab.texts import make_splits
from ncn.lab.timing import measure_steps
from ncn.lab.tuning import RATES, optimal_rate, tune
from ncn.machine.devices import usable_cores
from ncn.machine.files import write_json
from ncn.training.begin import fit_to_data


def run_scale(
    out: str | Path,
    *,
    preset: str | Path = "mini",
    settings: Iterable[str] = (),
    sizes: str = SIZES,
    budgets: Sequence[int] = BUDGETS,
    seeds: int = 1,
    data: str = "tinystories-sample",
    valid: str = "tinystories-sample-valid",
    also: Sequence[Path] = (),
    launcher: Launcher = "local",
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Run a ladder, or the rest of it, in the folder `out`, and write its report; returns the report's files.

    Args:
        preset, settings: the recipe that every size is made from, as for `Recipe.read`.
        sizes: as for `build_ladder`.
        budgets: tokens of the runs; every size is run with each.
        seeds: seeds 1 to this number are run in every place.
        data, valid: dataset folders, or sources that `ncn.prepare` reads.
        also: folders of finished ladders on the same texts, whose runs take part in the fit.
        launcher, workers, progress: as for `launch`.
        say: is given every line of text.

    Raises:
        UserError: something that the user can mend, another plan in the folder included.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    from ncn.experiments.scaling.report import write_report

    ladder = make_plan(Path(out), preset, settings, sizes, budgets, seeds, data=data, valid=valid, progress=progress)
    facts = begin(ladder, workers)
    say(describe(ladder, facts, workers))
    options: dict[str, Any] = {"launcher": launcher, "workers": workers, "progress": progress, "say": say}
    rates = tune_sizes(ladder, say, options)
    climb(ladder, rates, say, options)
    return write_report(Path(out), also)


def make_plan(
    out: Path,
    preset: str | Path,
    settings: Iterable[str],
    sizes: str,
    budgets: Sequence[int],
    seeds: int,
    *,
    data: str,
    valid: str,
    progress: bool = True,
) -> Ladder:
    """Prepare the texts and work out every size; raises `UserError` for what cannot be run."""
    recipe = Recipe.read(preset, settings)
    rungs = build_ladder(recipe, sizes)  # before the texts, so that a mistake is found at once
    budgets = sorted(set(budgets))
    if len(rungs) < 3 or len(budgets) < 2:
        raise UserError(
            f"a ladder of {len(rungs)} sizes and {len(budgets)} budgets determines no law: give at least 3 and 2"
        )
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, not {seeds}")
    step = recipe.train.batch_size * (recipe.train.context or recipe.model.context_length)
    if budgets[0] < 10 * step:
        raise UserError(f"a budget of {budgets[0]:,} tokens is less than ten steps of {step:,} tokens; give more")
    splits = make_splits(out / "data", data, valid, recipe.model.vocab_size, progress=progress)
    recipe = fit_to_data(recipe, splits.train)
    ladder = tuple(build_ladder(recipe, sizes))
    return Ladder(out, str(preset), recipe, ladder, tuple(budgets), tuple(range(1, seeds + 1)), splits)


def begin(ladder: Ladder, workers: int | None) -> dict[str, Any]:
    """Write scale.json, with the time of a step of both arms at the tuned sizes; or check that the plan is the one
    there. Returns what scale.json holds."""
    train = ladder.recipe.train

    def measure() -> dict[str, Any]:
        recipes = {
            f"{rung.name} {arm}": Recipe(model=rung.models[arm], train=train) for rung in ladder.tuned for arm in ARMS
        }
        return {"seconds_per_step": measure_steps(recipes, workers)}

    return begin_experiment(ladder.out / "scale.json", ladder.facts(), train, measure)


def describe(ladder: Ladder, facts: Mapping[str, Any], workers: int | None) -> str:
    """The plan: sizes with their parameters and FLOPs, runs, tokens, and about how long it takes here."""
    lines = [
        f"{'size':>8s} {'parameters':>12s} {'baseline':>12s} {'gap':>7s} {'without embed.':>15s} "
        f"{'training MFLOPs a token':>24s} {'(baseline)':>11s}"
    ]
    for rung in ladder.rungs:
        mine, twin = rung.counts(NCN), rung.counts(BASELINE)
        lines.append(
            f"{rung.name:>8s} {mine.total:>12,} {twin.total:>12,} {twin.total / mine.total - 1:>+7.2%} "
            f"{mine.non_embedding:>15,} {mine.training_flops / 1e6:>24,.2f} {twin.training_flops / 1e6:>11,.2f}"
        )
    runs = len(ladder.rungs) * len(ARMS) * len(ladder.budgets) * len(ladder.seeds)
    tuning = len(ladder.tuned) * len(ARMS) * len(RATES)
    places = [(rung, arm, sum(ladder.budgets) * len(ladder.seeds)) for rung in ladder.rungs for arm in ARMS]
    places += [(rung, arm, ladder.tuning_tokens * len(RATES)) for rung in ladder.tuned for arm in ARMS]
    flops = sum(rung.counts(arm).training_flops * tokens for rung, arm, tokens in places)
    seconds = _seconds(ladder, facts["seconds_per_step"], places) / (workers or usable_cores())
    budgets = ", ".join(short(tokens) for tokens in ladder.budgets)
    return "\n".join(
        [
            *lines,
            "FLOPs are forward and backward, attention and output head included.",
            f"{runs} runs of {budgets} tokens; before them at least {tuning} of {short(ladder.tuning_tokens)} tokens "
            f"to tune the learning rate at {', '.join(rung.name for rung in ladder.tuned)}.",
            f"Together {flops:.2e} FLOPs, about {_duration(seconds)} here.",
        ]
    )


def _seconds(ladder: Ladder, measured: Mapping[str, float], places: Iterable[tuple[Rung, str, int]]) -> float:
    """Seconds of all runs one after the other, from the measured steps, interpolated in the logarithms."""
    train = ladder.recipe.train
    step = train.batch_size * (train.context or ladder.recipe.model.context_length)
    total = 0.0
    for rung, arm, tokens in places:
        known = np.log([(r.counts(arm).training_flops, measured[f"{r.name} {arm}"]) for r in ladder.tuned])
        at = np.interp(math.log(rung.counts(arm).training_flops), known[:, 0], known[:, 1])
        total += math.exp(at) * tokens / step
    return total


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def tune_sizes(ladder: Ladder, say: Callable[[str], None], options: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The learning rate of every arm and size, as a multiple of the preset's, also left in tuning.json.

    At the tuned sizes the optimum is that of a parabola through the best rate of the grid and its neighbours. Between
    sizes it is interpolated in logarithms.
    """
    say("learning rates on the tuning split")

    def tuning_losses(tries: list[tuple[tuple[str, Rung], float]]) -> list[float | None]:
        return final_losses(launch([ladder.tuning_job(rung, arm, rate) for (arm, rung), rate in tries], **options))

    losses = tune({f"{arm} {rung.name}": (arm, rung) for arm in ARMS for rung in ladder.tuned}, tuning_losses)
    rates: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        best = [(rung, optimal_rate(losses[f"{arm} {rung.name}"])) for rung in ladder.tuned]
        x, y = np.log([(rung.counts(arm).working, optimum) for rung, optimum in best if optimum is not None]).T
        rates[arm] = {
            rung.name: float(f"{math.exp(np.interp(math.log(rung.counts(arm).working), x, y)):.4g}")
            for rung in ladder.rungs
        }
        say(f"  {arm}: " + ", ".join(f"{size} x{rate:g}" for size, rate in rates[arm].items()))
    table = {
        arm: {
            rung.name: {f"{rate:g}": loss for rate, loss in losses[f"{arm} {rung.name}"].items()}
            for rung in ladder.tuned
        }
        for arm in ARMS
    }
    write_json(ladder.out / "tuning.json", {"losses": table, "rates": rates})
    return rates


def climb(
    ladder: Ladder,
    rates: Mapping[str, Mapping[str, float]],
    say: Callable[[str], None],
    options: Mapping[str, Any],
) -> None:
    """Do all runs of the ladder, the large ones first, so that no worker is left with one at the end."""
    places = [
        (rung, arm, tokens, seed)
        for rung in ladder.rungs
        for tokens in ladder.budgets
        for seed in ladder.seeds
        for arm in ARMS
    ]
    places.sort(key=lambda place: -place[0].counts(place[1]).training_flops * place[2])
    jobs = [ladder.job(rung, arm, tokens, seed, rates[arm][rung.name]) for rung, arm, tokens, seed in places]
    say(f"{len(jobs)} runs")
    for job, summary in zip(jobs, launch(jobs, **options), strict=True):
        if summary.get("diverged"):
            say(f"{job.out.relative_to(ladder.out)} diverged: it is left out")
