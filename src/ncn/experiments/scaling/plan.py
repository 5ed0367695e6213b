"""A ladder as it is run: its sizes, budgets, seeds and texts, and from them the recipe and the folder of every run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncn.config.recipe import Recipe
from ncn.experiments.scaling.ladder import Rung, short
from ncn.lab.arms import BASELINE, NCN
from ncn.lab.fleet import Job
from ncn.lab.texts import Splits

ARMS = (BASELINE, NCN)
BUDGETS = (250_000, 500_000, 1_000_000)
PILOT_SEED = 0
"""Of the runs that choose learning rates; the ladder's own seeds begin at 1."""


@dataclass(frozen=True)
class Ladder:
    """What is to be run, and where."""

    out: Path
    preset: str
    recipe: Recipe
    rungs: tuple[Rung, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    splits: Splits

    @property
    def tuned(self) -> list[Rung]:
        """The rungs whose learning rate is tuned: the smallest, the middle and the largest."""
        places = sorted({0, len(self.rungs) // 2, len(self.rungs) - 1})
        return [self.rungs[place] for place in places]

    @property
    def tuning_tokens(self) -> int:
        return self.budgets[len(self.budgets) // 2]

    def at(self, rung: Rung, arm: str, tokens: int, seed: int, rate: float) -> Recipe:
        """The recipe of one run; `rate` multiplies the learning rates of the preset."""
        train = self.recipe.train
        context = train.context or self.recipe.model.context_length
        changes = {
            "tokens": tokens,
            "seed": seed,
            "learning_rate": train.learning_rate * rate,
            "muon_learning_rate": train.muon_learning_rate * rate,
            "eval_every": math.ceil(tokens / (train.batch_size * context)),  # the end is validated on everything
        }
        return Recipe(model=rung.models[arm], train=train.override(**changes))

    def tuning_job(self, rung: Rung, arm: str, rate: float) -> Job:
        recipe = self.at(rung, arm, self.tuning_tokens, PILOT_SEED, rate)
        out = self.out / "tuning" / arm / rung.name / f"rate-{rate:g}"
        return Job(recipe, self.splits.train.folder, self.splits.tuning.folder, out)

    def job(self, rung: Rung, arm: str, tokens: int, seed: int, rate: float) -> Job:
        recipe = self.at(rung, arm, tokens, seed, rate)
        out = run_path(self.out, arm, rung.name, tokens, seed)
        return Job(recipe, self.splits.train.folder, self.splits.validation.folder, out)

    def facts(self) -> dict[str, Any]:
        """What scale.json says of it, but for the measured times."""
        return {
            "format": 1,
            "preset": self.preset,
            "budgets": list(self.budgets),
            "seeds": list(self.seeds),
            "tuning": {"sizes": [rung.name for rung in self.tuned], "tokens": self.tuning_tokens, "seed": PILOT_SEED},
            "data": self.splits.facts(),
            "sizes": {
                rung.name: {
                    arm: {
                        "recipe": Recipe(model=rung.models[arm], train=self.recipe.train).model_dump(mode="json"),
                        "counts": rung.counts(arm).as_dict(),
                    }
                    for arm in ARMS
                }
                for rung in self.rungs
            },
        }


def run_path(out: Path, arm: str, size: str, tokens: int, seed: int) -> Path:
    """Where a run of the ladder in `out` lies."""
    return out / "runs" / arm / size / f"tokens-{short(tokens)}" / f"seed-{seed}"
