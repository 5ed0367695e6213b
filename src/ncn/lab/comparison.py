"""A comparison of arms: equal size, the same batches, several seeds, each arm at its own best learning rate.

The A/B and the study of domains are made of it: the plan, its file, the tuning of learning rates, and the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncn.config.training import TrainConfig
from ncn.errors import UserError
from ncn.lab.arms import BASELINE, Arm
from ncn.lab.fleet import Job, final_losses, launch
from ncn.lab.plan import begin_experiment
from ncn.lab.texts import Splits
from ncn.lab.timing import measure_steps
from ncn.lab.tuning import FACTOR, RATES, best_rate, tune
from ncn.machine.files import write_json

PILOT_SEED = 0
"""Of the runs that choose learning rates; those that are compared have seeds from 1."""


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


def begin(plan: Plan, workers: int | None) -> dict[str, Any]:
    """Write experiment.json, with the time that a step of each arm takes here; or check that the plan is the one there.

    Returns what experiment.json holds.
    """
    facts = plan.facts()

    def measure() -> dict[str, Any]:
        seconds = measure_steps({name: arm.recipe for name, arm in plan.arms.items()}, workers)
        return {"arms": {name: entry | {"seconds_per_step": seconds[name]} for name, entry in facts["arms"].items()}}

    return begin_experiment(plan.out / "experiment.json", facts, plan.train, measure)


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
    """Loss of each arm at each learning rate, on the tuning split, and the best rate; also left in tuning.json."""
    say(f"learning rates of {len(plan.tuned)} arms on the tuning split, {plan.tune_tokens:,} tokens a run")

    def losses(tries: list[tuple[Arm, float]]) -> list[float | None]:
        return final_losses(launch([plan.tuning_job(arm, rate) for arm, rate in tries], **options))

    tuning = {}
    for name, found in tune({arm.name: arm for arm in plan.tuned}, losses).items():
        best = best_rate(found)
        tuning[name] = {"losses": {f"{rate:g}": loss for rate, loss in found.items()}, "best": f"{best:g}"}
        row = "  ".join(f"x{rate:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in found.items())
        edge = " (at the edge of the grid)" if best in (min(found), max(found)) else ""
        say(f"  {name}: best at x{best:g}{edge}   {row}")
    write_json(plan.out / "tuning.json", tuning)
    return tuning


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
