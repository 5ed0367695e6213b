"""The arms of a comparison: a modulated model, what it is compared with, and what is left of it without a signal.

All arms have the same backbone but for the width of the feed-forward blocks, which is solved so that every arm has as
many parameters as the modulated model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from ncn.config.model import ControllerConfig, NCNConfig
from ncn.config.recipe import Recipe
from ncn.core.costs import costs
from ncn.core.model import ModulatedTransformer
from ncn.errors import UserError

Role = Literal["baseline", "control", "ncn", "ablation", "again", "ncn-variant"]

LARGEST_GAP = 0.001
"""Parameter counts of the arms of one comparison differ by less than this share of the largest."""

BASELINE, AGAIN, NCN = "baseline", "baseline-again", "ncn"

_OTHER_WEIGHTS = 1_000_000
"""Added to the seed for the initial weights of the A/A twin."""

_SHARED_SETTINGS = ("tokens", "batch_size", "context", "seed", "init_seed", "eval_every", "eval_tokens")


@dataclass(frozen=True)
class Arm:
    """One way to build and train the model. `recipe` is that of learning rate 1 and of no seed in particular."""

    name: str
    label: str
    role: Role
    recipe: Recipe
    parameters: int

    @property
    def tuned_as(self) -> str:
        """The arm whose best learning rate this one takes: its own, but for the A/A twin."""
        return BASELINE if self.role == "again" else self.name

    @property
    def flops_per_token(self) -> float:
        """Of a forward pass, at the mean position of a full context; training takes three times as many."""
        return float(sum(costs(self.recipe.model).flops.values()))

    def at(self, seed: int, rate: float, **train: Any) -> Recipe:
        """The recipe of one run: `rate` multiplies the learning rates, `seed` fixes the batches and the initial
        weights, which for the A/A twin are others on the same batches."""
        config = self.recipe.train
        init_seed = seed + _OTHER_WEIGHTS if self.role == "again" else None
        changes = {
            "seed": seed,
            "init_seed": init_seed,
            "learning_rate": config.learning_rate * rate,
            "muon_learning_rate": config.muon_learning_rate * rate,
        }
        return Recipe(model=self.recipe.model, train=config.override(**changes, **train))


@lru_cache(maxsize=1024)
def count_parameters(config: NCNConfig) -> int:
    """Parameters of a model, counted without storage."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ModulatedTransformer(config).parameters())


def widened_baseline(config: NCNConfig) -> NCNConfig:
    """The static twin of `config`: no controller, and a feed-forward block widened until the parameter counts agree.

    The widths are whole numbers, so the counts agree to half of what one unit of width holds: under 0.1 % from about
    0.5 M parameters on.
    """
    base = config.override(controller=None, d_ff=config.ffn_width)
    missing = count_parameters(config) - count_parameters(base)
    return base.override(d_ff=config.ffn_width + round(missing / _unit(base)))


def matched(reference: NCNConfig, others: Mapping[str, NCNConfig]) -> dict[str, NCNConfig]:
    """The `others` with feed-forward widths such that all parameter counts, that of `reference` included, lie as close
    together as whole widths allow.

    Raises:
        UserError: the smallest and the largest count still differ by 0.1 % of the largest or more.
    """
    target, unit = count_parameters(reference), _unit(reference)
    # Each count can come to lie `above` the target, or a unit of width lower. The best choice leaves out the widest
    # gap between neighbours: counts up to it stay above the target, the others go below.
    above = {name: (count_parameters(config) - target) % unit for name, config in others.items()}
    cut, _ = max(itertools.pairwise(sorted({0, unit, *above.values()})), key=lambda pair: pair[1] - pair[0])
    result = {}
    for name, config in others.items():
        wanted = target + above[name] - (unit if above[name] > cut else 0)
        width = config.ffn_width + (wanted - count_parameters(config)) // unit
        if width < 1:
            raise UserError(
                f"the arm {name} has more parameters outside its feed-forward blocks than the whole model: "
                "make the controller smaller or d_ff larger"
            )
        result[name] = config.override(d_ff=width)
    counts = [target, *(count_parameters(config) for config in result.values())]
    gap = (max(counts) - min(counts)) / max(counts)
    if gap >= LARGEST_GAP:
        raise UserError(
            f"the arms' parameter counts cannot be brought within {LARGEST_GAP:.1%} of each other, only to {gap:.2%}: "
            f"one unit of d_ff is {unit:,} of {target:,} parameters; use fewer layers, a larger d_ff or vocabulary"
        )
    return result


def build_arms(
    recipe: Recipe, chosen: Iterable[str] | None = None, variants: Mapping[str, Iterable[str]] | None = None
) -> dict[str, Arm]:
    """The arms of a comparison around the modulated model of `recipe`, by name, parameter counts matched.

    Args:
        recipe: model and training; the model has a controller of kind "ncn". Its feed-forward width stays.
        chosen: names of the arms to build, all by default.
        variants: name of a further arm to the settings (``controller.taps=[0,2]``) that it changes in `recipe`.

    Raises:
        UserError: an unknown arm, a recipe without a controller, a variant that is none, or counts that do not match.
    """
    controller = recipe.model.controller
    if controller is None or controller.kind != "ncn":
        raise UserError(
            "an A/B needs a recipe with a controller of kind ncn, and makes the arms without one or with another kind "
            "itself; leave controller and controller.kind as the preset has them"
        )
    table = _table(recipe, controller)
    names = list(table) if chosen is None else list(dict.fromkeys(chosen))
    for name in names:
        if name not in table:
            raise UserError(f"unknown arm {name!r}; arms: {', '.join(table)}")
    rows = {name: table[name] for name in names}
    for name, settings in (variants or {}).items():
        rows[name] = _variant(name, list(settings), recipe, taken=rows)
    if not rows:
        raise UserError(f"name at least one arm; arms: {', '.join(table)}")
    widths = matched(recipe.model, {name: row[2].model for name, row in rows.items() if name != NCN})
    arms = {}
    for name, (label, role, changed) in rows.items():
        model = widths.get(name, changed.model)
        arms[name] = Arm(name, label, role, Recipe(model=model, train=changed.train), count_parameters(model))
    return arms


_Row = tuple[str, Role, Recipe]


def _table(recipe: Recipe, controller: ControllerConfig) -> dict[str, _Row]:
    def changed(new: ControllerConfig | None) -> Recipe:
        return Recipe(model=recipe.model.override(controller=new, d_ff=recipe.model.ffn_width), train=recipe.train)

    table: dict[str, _Row] = {
        BASELINE: ("widened baseline", "baseline", changed(None)),
        "static": ("static signals", "control", changed(controller.override(kind="static", taps=(0,)))),
        "local": ("local gates", "control", changed(controller.override(kind="local", taps=(0,)))),
        NCN: ("NCN", "ncn", recipe),
    }
    if len(controller.signals) > 1:
        for signal in controller.signals:
            rest = tuple(name for name in controller.signals if name != signal)
            label = f"NCN without {signal.replace('_', ' ')}"
            table[f"ncn-without-{signal}"] = (label, "ablation", changed(controller.override(signals=rest)))
    table[AGAIN] = ("baseline again", "again", changed(None))
    return table


def _variant(name: str, settings: list[str], recipe: Recipe, taken: Iterable[str]) -> _Row:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name in taken:
        raise UserError(
            f"a variant is named by lower-case letters, digits, '.', '_' and '-', and not like another arm: {name!r}"
        )
    if not settings:
        raise UserError(f"the variant {name} changes nothing: write --variant {name}:key=value,key=value")
    changed = recipe.with_settings(settings)
    for setting in _SHARED_SETTINGS:
        if getattr(changed.train, setting) != getattr(recipe.train, setting):
            raise UserError(f"the variant {name} changes {setting}, which all arms share; change it for all of them")
    if changed.model.context_length != recipe.model.context_length:
        raise UserError(f"the variant {name} changes context_length, which all arms share; change it for all of them")
    model = changed.model.override(d_ff=changed.model.ffn_width)
    return f"NCN, {name}", "ncn-variant", Recipe(model=model, train=changed.train)


def _unit(config: NCNConfig) -> int:
    """Parameters of one unit of feed-forward width, in all layers together."""
    return count_parameters(config.override(d_ff=config.ffn_width + 1)) - count_parameters(config)
