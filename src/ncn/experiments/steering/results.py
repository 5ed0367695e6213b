"""What is made of all answers: the content of `steer.json`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ncn.core.interface import LanguageModel
from ncn.experiments.steering.losses import difference, mean_loss
from ncn.experiments.steering.obedience import SETTINGS, describe, distinct, resampled_spearman, spearman
from ncn.experiments.steering.plan import DISTINCT, DISTINCT_TOKENS, PROMPT_TOKENS, Array, Arrays, Plan
from ncn.inference.evaluate import bits_per_byte
from ncn.machine.environment import describe_environment
from ncn.statistics.resampling import with_interval
from ncn.steering.attributes import DocumentSliders


def summarise(
    plan: Plan,
    models: Mapping[str, LanguageModel],
    without: Mapping[str, LanguageModel],
    losses: Mapping[str, Arrays],
    answers: Mapping[tuple[str, int, float], Sequence[Arrays]],
    guidances: Sequence[float],
) -> dict[str, Any]:
    attributes, first = list(plan.quantiles), next(iter(models))
    ranked = DocumentSliders(plan.data, tuple(attributes)).ranks
    corpus = {
        one: {
            other: spearman(ranked[:, i].astype(np.float64), ranked[:, j].astype(np.float64))
            for j, other in enumerate(attributes)
        }
        for i, one in enumerate(attributes)
    }
    found: dict[str, Any] = {}
    for label, model in models.items():
        assert model.core_config.controller is not None
        own = losses[label]
        found[label] = {
            "enter": model.core_config.controller.sliders_enter,
            "kind": model.core_config.controller.kind,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "loss": {kind: mean_loss(own, kind) for kind in ("right", "unset", "wrong")},
            "right_against_unset": difference(own["right"], own["unset"], own["tokens"]),
            "unset_against": {
                other: difference(own["unset"], losses[other]["unset"], own["tokens"])
                for other in without
                if len(losses[other]["tokens"]) == len(own["tokens"])
            },
            "sliders": {},
        }
        for (index, name), guidance in itertools.product(enumerate(plan.sliders), guidances):
            kept = answers[label, index, guidance]
            ranks, row = _ranks(kept), attributes.index(name)
            described = describe(name, attributes, ranks, corpus[name])
            described["cut"] = np.mean([part["cut"] for part in kept], 0).tolist()
            variety = np.mean([part["distinct"] for part in kept], 0).tolist()
            described["distinct"] = dict(zip(map(str, DISTINCT), variety, strict=True))
            if "bits_per_byte" in kept[0]:
                described["bits_per_byte"] = kept[0]["bits_per_byte"].tolist()
            if label != first:
                reference = _ranks(answers[first, index, guidance])[row]
                draws = resampled_spearman(reference) - resampled_spearman(ranks[row])
                value = found[first]["sliders"][name][f"{guidance:g}"]["spearman"]["value"]
                described["first_minus_this"] = with_interval(value - described["spearman"]["value"], draws)
            found[label]["sliders"].setdefault(name, {})[f"{guidance:g}"] = described
    return {
        "format": 3,
        "settings": list(SETTINGS),
        "prompts": plan.prompts,
        "prompt_tokens": PROMPT_TOKENS,
        "seeds": plan.seeds,
        "others": plan.others,
        "mixes": plan.decoupled and {f"{key:g}": mix.mix.tolist() for key, mix in plan.decoupled.items()},
        "temperature": plan.temperature,
        "guidances": [f"{guidance:g}" for guidance in guidances],
        "longest": plan.longest,
        "loss_tokens": int(losses[first]["tokens"].sum()),
        "models": found,
        "without": {label: mean_loss(losses[label], "unset") for label in without},
        "real": _real(plan),
        "corpus": corpus,
        "environment": describe_environment(torch.device("cpu")),
    }


def _ranks(kept: Sequence[Arrays]) -> Array:
    """Of all seeds: (attributes, seeds, settings, prompts)."""
    ranks: Array = np.stack([part["ranks"] for part in kept], 1).astype(np.float64)
    return ranks


def _real(plan: Plan) -> dict[str, Any]:
    """The documents themselves that the prompts begin: what the judge and the count of different runs say of them."""
    stories = [document[1:] for document in plan.documents]
    size = min(DISTINCT_TOKENS, sum(map(len, stories)))
    found: dict[str, Any] = {"distinct": {str(run): distinct(stories, run, size) for run in DISTINCT}}
    if plan.judge is not None:
        found["bits_per_byte"] = bits_per_byte(*plan.judge, [plan.tokenizer.decode(story) for story in stories])
    return found
