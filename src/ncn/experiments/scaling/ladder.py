"""A ladder of model sizes, width and depth grown together, and what training it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ncn.config.model import ControllerConfig, NCNConfig
from ncn.config.recipe import Recipe
from ncn.core.costs import costs
from ncn.errors import UserError
from ncn.lab.arms import BASELINE, NCN, widened_baseline

SIZES = "32,64,96,128,160,192"
SHALLOWEST = 2

PRESETS = ("published-18m", "100m", "350m", "1b")
"""The rungs of the full ladder above the small ones."""
TOKENS_PER_PARAMETER = (5.0, 10.0, 20.0)
TRIED_RATES = 4
"""Learning rates tried for each arm at each tuned size: three to begin with, and about one beyond."""
LARGEST_TUNED = 100e6 * 1.5
STATE_BYTES = 16
"""A parameter's weight, gradient and two moments in float32."""


@dataclass(frozen=True)
class Counts:
    """Parameters of one model in three ways of counting, and its FLOPs.

    `working` is what the law calls N: parameters that enter a matrix product for every token, which takes the output
    head in (a tied embedding once) and leaves learned positions and an untied input embedding, mere look-ups, out. At
    small sizes the head is a large part of the work, and a law without it bends there.
    `training_flops` are for one token, forward and backward, attention and head included.
    """

    total: int
    working: int
    non_embedding: int
    training_flops: float

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, config: NCNConfig) -> Counts:
        found = costs(config)
        total = found.total_parameters
        embedding = config.vocab_size * config.d_model
        positions = config.context_length * config.d_model if config.positions == "learned" else 0
        heads = 0 if config.tie_embeddings else embedding
        return cls(
            total=total,
            working=total - positions - heads,
            non_embedding=total - positions - heads - embedding,
            training_flops=3.0 * sum(found.flops.values()),
        )

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Rung:
    """One size: the modulated model and its widened twin, by arm."""

    name: str
    models: Mapping[str, NCNConfig]

    def counts(self, arm: str) -> Counts:
        return Counts.of(self.models[arm])


def build_ladder(recipe: Recipe, sizes: str = SIZES) -> list[Rung]:
    """The rungs named in `sizes`, smallest first: "96" is a width, whose depth is a layer for each 32 of width and at
    least two; "96x4" names the depth, too. Heads keep the width that the recipe gives them, and the controller grows
    with the model.

    Raises `UserError` for sizes that cannot be built.
    """
    model = recipe.model
    if model.controller is None or model.controller.kind != "ncn":
        raise UserError("a ladder compares a model with a controller of kind ncn and its baseline; leave it in")
    rungs = [_rung(model, model.controller, *size) for size in sorted(set(parse_sizes(sizes)))]
    return sorted(rungs, key=lambda rung: rung.counts(NCN).working)


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "64,96x4" as [(width, depth), ...]."""
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([1-9]\d*)(?:x([1-9]\d*))?\s*", part)
        if not found:
            raise UserError(f"a size is a width, such as 96, or width and depth, such as 96x3; got {part.strip()!r}")
        width = int(found[1])
        sizes.append((width, int(found[2]) if found[2] else max(SHALLOWEST, round(width / 32))))
    return sizes


def _rung(model: NCNConfig, controller: ControllerConfig, width: int, depth: int) -> Rung:
    if width % model.head_dim:
        raise UserError(f"width {width} is no multiple of the head width {model.head_dim}; choose a multiple")
    factor, heads = width / model.d_model, width // model.head_dim
    groups = model.num_heads // model.kv_heads
    if heads % groups:
        raise UserError(f"{heads} heads of width {width} cannot share keys in groups of {groups}; choose another width")
    pooling = controller.pooling_heads
    changes: dict[str, Any] = {
        "d_model": width,
        "num_layers": depth,
        "num_heads": heads,
        "num_kv_heads": None if model.num_kv_heads is None else heads // groups,
        "d_ff": None if model.d_ff is None else round(model.d_ff * factor),
        "controller": {
            "width": max(1, round(controller.width * factor / pooling)) * pooling,
            "hidden": max(4, round(controller.hidden * factor)),
            "taps": _taps(controller, model.num_layers, depth),
        },
    }
    modulated = model.override(**changes)
    return Rung(f"{width}x{depth}", {BASELINE: widened_baseline(modulated), NCN: modulated})


def _taps(controller: ControllerConfig, num_layers: int, depth: int) -> Any:
    if controller.taps == "every":
        return "every"
    return sorted({min(depth - 1, round(tap * depth / num_layers)) for tap in controller.taps})


@dataclass(frozen=True)
class Device:
    """What the plan of the full ladder reckons with; by default one H100 with 80 GB."""

    name: str = "an H100"
    teraflops: int | float = 989.0
    utilisation: int | float = 0.4
    memory_gb: int | float = 80.0
    days: int | float = 14.0

    @property
    def flops_per_hour(self) -> float:
        return self.teraflops * 1e12 * self.utilisation * 3600


def full_plan(rungs: Sequence[Rung], budgets: Sequence[int], seeds: int, device: Device) -> dict[str, Any]:
    """What the ladder to one billion parameters would cost: the given rungs with their budgets, then the presets from
    18 M on, each with 5, 10 and 20 tokens for each parameter. Nothing is run."""
    rows = [_row(rung, list(budgets), seeds, device) for rung in rungs]
    for name in PRESETS:
        model = Recipe.preset(name).model
        rung = Rung(name, {BASELINE: widened_baseline(model), NCN: model})
        tokens = [round(per * rung.counts(NCN).working) for per in TOKENS_PER_PARAMETER]
        rows.append(_row(rung, tokens, seeds, device))
    tuned = [row for row in rows if row["parameters"] <= LARGEST_TUNED]
    tuned = [tuned[0], tuned[len(tuned) // 2], tuned[-1]]
    tuning = sum(TRIED_RATES * row["flops_per_token_both_arms"] * row["tokens"][0] for row in tuned)
    flops = tuning + sum(row["flops"] for row in rows)
    hours = flops / device.flops_per_hour
    longest = max(row["hours_longest_run"] for row in rows)
    return {
        "device": vars(device),
        "rungs": rows,
        "tuning": {"sizes": [row["size"] for row in tuned], "rates": TRIED_RATES, "flops": tuning},
        "flops": flops,
        "device_hours": hours,
        "hours_longest_run": longest,
        "devices": max(math.ceil(hours / (24 * device.days)), max(row["devices_for_memory"] for row in rows)),
        "devices_for_longest_run": math.ceil(longest / (24 * device.days)),
    }


def _row(rung: Rung, tokens: list[int], seeds: int, device: Device) -> dict[str, Any]:
    counts = {arm: rung.counts(arm) for arm in rung.models}
    per_token = sum(count.training_flops for count in counts.values())
    model = rung.models[NCN]
    state = STATE_BYTES * counts[NCN].total
    # bfloat16 activations of a layer that backward needs, about 34 bytes a token and unit of width (Korthikanti et
    # al. 2022, with fused attention), and in float32 the logits of one chunk with their gradient
    sequence = 34 * model.context_length * model.d_model * model.num_layers
    logits = 2 * 4 * 512 * model.vocab_size
    usable = 0.9 * device.memory_gb * 1e9
    longest = max(count.training_flops for count in counts.values()) * max(tokens)
    return {
        "size": rung.name,
        "parameters": counts[NCN].total,
        "working_parameters": counts[NCN].working,
        "non_embedding_parameters": counts[NCN].non_embedding,
        "tokens": tokens,
        "runs": len(counts) * len(tokens) * seeds,
        "flops_per_token_both_arms": per_token,
        "flops": per_token * sum(tokens) * seeds,
        "device_hours": per_token * sum(tokens) * seeds / device.flops_per_hour,
        "hours_longest_run": longest / device.flops_per_hour,
        "state_bytes": state,
        "bytes_per_sequence": sequence,
        "least_memory_bytes": state + sequence + logits,
        "devices_for_memory": max(1, math.ceil((state + sequence + logits) / usable)),
        "sequences_that_fit": max(0, int((usable - state - logits) // sequence)),
    }


def describe_full_plan(plan: Mapping[str, Any]) -> str:
    """The plan as lines of text."""
    device = plan["device"]
    lines = [
        f"{'size':>14s} {'parameters':>14s} {'without embed.':>14s} {'tokens of the runs':>26s} {'runs':>5s} "
        f"{'FLOPs':>9s} {'hours':>9s} {'memory, at least':>17s}"
    ]
    for row in plan["rungs"]:
        tokens = ", ".join(short(count) for count in row["tokens"])
        lines.append(
            f"{row['size']:>14s} {row['parameters']:>14,} {row['non_embedding_parameters']:>14,} {tokens:>26s} "
            f"{row['runs']:>5d} {row['flops']:>9.2e} {row['device_hours']:>9,.1f} "
            f"{row['least_memory_bytes'] / 1e9:>14,.2f} GB"
        )
    tuned = plan["tuning"]
    lines += [
        f"tuning at {', '.join(tuned['sizes'])}: about {tuned['rates']} learning rates for each arm at the fewest "
        f"tokens, {tuned['flops']:.2e} FLOPs; the rates of other sizes are interpolated, those above held",
        "",
        f"together {plan['flops']:.3g} FLOPs (output head and attention included): {plan['device_hours']:,.0f} hours "
        f"of {device['name']} at {device['utilisation']:.0%} of {device['teraflops']:g} TFLOP/s.",
        "The smallest models reach less than that share and take longer, but hardly count.",
        f"Memory per device: {max(row['least_memory_bytes'] for row in plan['rungs']) / 1e9:.1f} GB for the largest "
        f"model with one sequence at once (weights, gradients and two moments in float32, {STATE_BYTES} bytes a "
        f"parameter); {plan['rungs'][-1]['sequences_that_fit']} sequences at once fit in {device['memory_gb']:g} GB.",
        f"Devices: {plan['devices']} to be done in {device['days']:g} days, a run on each; the longest run takes "
        f"{plan['hours_longest_run'] / 24:.1f} days on one"
        + (
            "."
            if plan["devices_for_longest_run"] == 1
            else f" and would have to be spread over {plan['devices_for_longest_run']} to end in that time."
        ),
    ]
    return "\n".join(lines)


def short(count: int | float) -> str:
    """A number in thousands, millions or billions: 250k, 1.5M, 2B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
