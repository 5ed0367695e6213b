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
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncn.config import Recipe, TrainConfig
from ncn.devices import arithmetic, find_device
from ncn.encoding import usable_cores
from ncn.errors import UserError
from ncn.experiments.arms import AGAIN, BASELINE, Arm, build_arms
from ncn.experiments.launch import Job, Launcher, launch
from ncn.experiments.noise import seed_noise
from ncn.experiments.splits import Splits, make_splits
from ncn.experiments.timing import measure_steps
from ncn.fitting import fit_to_data
from ncn.runs import FREE_SETTINGS, command_words, describe_environment, flat, read_json, write_json

if TYPE_CHECKING:
    from ncn.experiments.report import Report

RATES = (0.5, 1.0, 2.0)
FACTOR = 2.0
EXTENSIONS = 2
"""How often the grid of learning rates is extended at each end while the best rate lies there."""

PILOT_SEED = 0
NOISE_SEEDS = (PILOT_SEED, 1000, 1001)

_POINTS = 20
"""Validations along a run."""


@dataclass(frozen=True)
class Plan:
    """What is to be run, and where."""

    out: Path
    preset: str
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    tune_tokens: int
    splits: Splits

    @property
    def train(self) -> TrainConfig:
        """The training that all arms share."""
        return next(iter(self.arms.values())).recipe.train

    @property
    def tuned(self) -> list[Arm]:
        """The arms whose learning rate is swept."""
        return [arm for arm in self.arms.values() if arm.tuned_as == arm.name]

    def tuning_job(self, arm: Arm, rate: float) -> Job:
        return self._short_job(arm, PILOT_SEED, rate, self.out / "tuning" / arm.name / f"rate-{rate:g}")

    def pilot_job(self, arm: Arm, seed: int, rate: float) -> Job:
        if arm.name == BASELINE and seed == PILOT_SEED:
            return self.tuning_job(arm, rate)
        return self._short_job(arm, seed, rate, self.out / "pilot" / arm.name / f"seed-{seed}")

    def job(self, arm: Arm, seed: int, rate: float) -> Job:
        out = self.out / "runs" / arm.name / f"seed-{seed}"
        return Job(arm.at(seed, rate), self.splits.train.folder, self.splits.validation.folder, out)

    def _short_job(self, arm: Arm, seed: int, rate: float, out: Path) -> Job:
        # validated at its end alone: a step has at least one token
        recipe = arm.at(seed, rate, tokens=self.tune_tokens, eval_every=self.tune_tokens)
        return Job(recipe, self.splits.train.folder, self.splits.tuning.folder, out)

    def facts(self) -> dict[str, Any]:
        """What experiment.json says of it, but for the measured times; the arms come last."""
        context = self.train.context or next(iter(self.arms.values())).recipe.model.context_length
        return {
            "format": 1,
            "preset": self.preset,
            "tokens_per_run": self.train.tokens,
            "tokens_per_tuning_run": self.tune_tokens,
            "steps": math.ceil(self.train.tokens / (self.train.batch_size * context)),
            "data": self.splits.facts(),
            "seeds": list(self.seeds),
            "pilot_seed": PILOT_SEED,
            "rates": {"start": list(RATES), "factor": FACTOR},
            "arms": {
                name: {
                    "label": arm.label,
                    "role": arm.role,
                    "recipe": arm.recipe.model_dump(mode="json"),
                    "parameters": arm.parameters,
                    "flops_per_token": arm.flops_per_token,
                }
                for name, arm in self.arms.items()
            },
        }


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
    from ncn.experiments.report import report

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


def begin(plan: Plan, workers: int | None) -> dict[str, Any]:
    """Write experiment.json, with the time that a step of each arm takes here; or check that the plan is the one there.

    Returns what experiment.json holds.
    """
    path, facts = plan.out / "experiment.json", plan.facts()
    if path.is_file():
        before = read_json(path)
        _check_same_plan(before, facts, plan.out)
        return before
    threads = max(1, usable_cores() // (workers or usable_cores()))
    seconds = measure_steps({name: arm.recipe for name, arm in plan.arms.items()}, threads)
    for name, entry in facts["arms"].items():
        entry["seconds_per_step"] = seconds[name]
    device = find_device(plan.train.device)
    environment = describe_environment(device, autocast=str(arithmetic(plan.train.precision, device)))
    command = shlex.join(command_words())
    write_json(path, {"command": command, "environment": environment, **facts})
    return read_json(path)


def describe(plan: Plan, facts: Mapping[str, Any]) -> str:
    """A table of the arms: parameters, how far they are from the largest, FLOPs a token, milliseconds a step."""
    largest = max(arm.parameters for arm in plan.arms.values())
    width = max(len(name) for name in plan.arms)
    header = f"{'arm':{width}s} {'parameters':>14s} {'gap':>8s} {'d_ff':>6s} {'MFLOPs a token':>15s} {'ms a step':>10s}"
    rows = [header]
    for name, arm in plan.arms.items():
        entry = facts["arms"][name]
        rows.append(
            f"{name:{width}s} {arm.parameters:>14,} {(largest - arm.parameters) / largest:>8.3%} "
            f"{arm.recipe.model.ffn_width:>6d} {arm.flops_per_token / 1e6:>15,.3f} "
            f"{entry['seconds_per_step'] * 1e3:>10,.1f}  {arm.label}"
        )
    return "\n".join(rows)


def sweep(plan: Plan, say: Callable[[str], None], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Loss of each arm at each learning rate, on the tuning split, and the best rate; also left in tuning.json.

    The grid is extended while an arm's best rate lies at its edge.
    """
    grids = {arm.name: list(RATES) for arm in plan.tuned}
    say(f"learning rates of {len(grids)} arms on the tuning split, {plan.tune_tokens:,} tokens a run")
    while True:
        places = [(arm, rate) for arm in plan.tuned for rate in grids[arm.name]]
        summaries = launch([plan.tuning_job(arm, rate) for arm, rate in places], **options)
        losses: dict[str, dict[float, float | None]] = {name: {} for name in grids}
        for (arm, rate), summary in zip(places, summaries, strict=True):
            losses[arm.name][rate] = None if summary.get("diverged") else summary["validation_loss"]
        further = {name: next_rate(found) for name, found in losses.items()}
        if not any(further.values()):
            break
        grids = {
            name: sorted([*grid, *([beyond] if (beyond := further[name]) else [])]) for name, grid in grids.items()
        }
    tuning = {}
    for name, found in losses.items():
        best = best_rate(found)
        if best is None:
            raise UserError(
                f"the arm {name} diverged at every learning rate down to {min(found):g} of the recipe's: "
                "lower learning_rate, or raise warmup"
            )
        tuning[name] = {"losses": {f"{rate:g}": found[rate] for rate in sorted(found)}, "best": f"{best:g}"}
        row = "  ".join(f"x{rate:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in found.items())
        edge = " (at the edge of the grid)" if best in (min(found), max(found)) else ""
        say(f"  {name}: best at x{best:g}{edge}   {row}")
    write_json(plan.out / "tuning.json", tuning)
    return tuning


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest loss; None if all diverged."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.__getitem__) if finite else None


def next_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate to try next: beyond the best if that is at an edge of the grid which may still be extended."""
    low, high = min(losses), max(losses)
    best = best_rate(losses)
    if (best is None or best == low) and low > min(RATES) / FACTOR**EXTENSIONS:
        return low / FACTOR
    if best == high and high < max(RATES) * FACTOR**EXTENSIONS:
        return high * FACTOR
    return None


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


def compare(
    plan: Plan, best: Mapping[str, float], say: Callable[[str], None], options: Mapping[str, Any]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Train every arm with every seed; summaries by (arm, seed)."""
    keys = [(name, seed) for seed in plan.seeds for name in plan.arms]
    summaries = launch([plan.job(plan.arms[name], seed, best[name]) for name, seed in keys], **options)
    found = dict(zip(keys, summaries, strict=True))
    for (name, seed), summary in found.items():
        if summary.get("diverged"):
            say(f"{name} diverged with seed {seed}: it is left out")
    return found


def check_batches(summaries: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """Raises `UserError` unless runs of equal seed were trained on the same batches in the same order."""
    hashes: dict[int, tuple[str, str]] = {}
    for (name, seed), summary in summaries.items():
        if summary.get("diverged"):
            continue
        first, expected = hashes.setdefault(seed, (name, summary["batches_sha256"]))
        if summary["batches_sha256"] != expected:
            raise UserError(
                f"{name} and {first} were not trained on the same batches with seed {seed}, so they cannot be "
                "compared: delete their run folders and give the same command again"
            )


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


def _check_same_plan(before: Mapping[str, Any], after: Mapping[str, Any], out: Path) -> None:
    advice = "give the same command as before, or name another folder for a new experiment"
    arms = [", ".join(facts["arms"]) for facts in (before, after)]
    if arms[0] != arms[1]:
        raise UserError(f"the experiment in {out} has the arms {arms[0]}, and now they are {arms[1]}; {advice}")
    old, new = flat(before), flat(after)
    for name, value in new.items():
        if not name.endswith(FREE_SETTINGS) and old.get(name) != value:
            raise UserError(
                f"the experiment in {out} was begun with {name} = {old.get(name)!r}, and now it is {value!r}; {advice}"
            )
