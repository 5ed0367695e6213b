"""What the methods of `ncn adapt` cost in time: a training step, and a token in decoding.

All take turns in every round, so that whatever else the machine does meets them all alike, and every figure is a
ratio within a round. The base itself takes part, and full fine-tuning, which in decoding is the same computation as
the base: its ratio says how large an error is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ncn.experiments.adaptation.lesson import Lesson, build_optimizer, train_step
from ncn.machine.devices import synchronised_time
from ncn.machine.stopping import Interrupted
from ncn.retrofit.adapters import Adapted, Method
from ncn.statistics.seeds import entry, intervals

ROUNDS = 9
PROMPT, CONTINUED = 32, 64
"""Tokens of the prompt, and those that are written."""


def measure_costs(
    fresh: Callable[[Method], Adapted], lesson: Lesson, methods: Sequence[Method], stopped: Callable[[], bool]
) -> dict[str, Any]:
    """By method: seconds of a training step, tokens a second in decoding, and the ratios to full fine-tuning's step and
    to the base's decoding, geometric means over rounds with 95 % intervals.

    Args:
        fresh: makes the base with a new adapter.
    """
    names = [*dict.fromkeys((*methods, "full"))]
    adapted = {name: fresh(name) for name in names}
    optimizers = {name: build_optimizer(found, lesson.config) for name, found in adapted.items()}
    writers: dict[str, Any] = {"base": fresh("full").model} | {name: adapted[name].model for name in methods}
    steps: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in writers}
    for number in range(-1, ROUNDS):  # the first round only warms up
        if stopped():
            raise Interrupted("stopped while times were measured; finished runs are kept")
        order = 1 if number % 2 else -1
        for name in names[::order]:
            begun = synchronised_time(lesson.device)
            train_step(adapted[name], optimizers[name], lesson, number + 1, 1.0)
            steps[name].append(synchronised_time(lesson.device) - begun)
        for label in list(writers)[::order]:
            rates[label].append(_decode(writers[label], lesson))
    return {
        "rounds": ROUNDS,
        "prompt": PROMPT,
        "written": CONTINUED,
        "step": {
            name: {"seconds": float(np.median(found[1:])), "ratio": _ratio(found, steps["full"])}
            for name, found in steps.items()
        },
        "decoding": {
            name: {"tokens_per_second": float(np.median(found[1:])), "ratio": _ratio(found, rates["base"])}
            for name, found in rates.items()
        },
    }


@torch.no_grad()
def _decode(model: Any, lesson: Lesson) -> float:
    """Tokens a second of `generate` with a cache, one text, the likeliest token each time."""
    prompt = torch.from_numpy(lesson.data.read(0, PROMPT))[None].to(lesson.device)
    begun = synchronised_time(lesson.device)
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=CONTINUED,
        min_new_tokens=CONTINUED,
        do_sample=False,
        pad_token_id=lesson.data.separator_id,
    )
    return CONTINUED / (synchronised_time(lesson.device) - begun)


def _ratio(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    logs = np.log(np.array(values[1:]) / np.array(others[1:]))
    found = entry(logs, intervals(logs))
    return {key: None if found[key] is None else float(np.exp(found[key])) for key in ("mean", "low", "high")}
