"""How long a training step of each arm takes, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from ncn.config.recipe import Recipe
from ncn.core.model import ModulatedTransformer
from ncn.machine.devices import arithmetic, find_device, synchronised_time, usable_cores
from ncn.training.optimizers import build_optimizers, update

_FEWEST_ROUNDS, _MOST_ROUNDS, _ENOUGH_SECONDS = 3, 15, 45.0
_MEASURED_TOKENS = 16_384


def measure_steps(recipes: Mapping[str, Recipe], workers: int | None) -> dict[str, float]:
    """Seconds of a training step of each recipe, by name.

    It has the share of the cores that each of so many workers has; None stands for one worker a core.

    The recipes take turns, so that whatever else the machine does meets them all alike; of each the median turn
    counts. There are 15 turns, or as many, but three at least, as begin within 45 seconds. Models exist one at a time.
    A batch of more than about 16 000 tokens is measured in part and scaled up.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, usable_cores() // (workers or usable_cores())))
    try:
        turns: dict[str, list[float]] = {name: [] for name in recipes}
        begun = time.monotonic()
        for turn in range(_MOST_ROUNDS):
            if turn >= _FEWEST_ROUNDS and time.monotonic() - begun > _ENOUGH_SECONDS:
                break
            for name, recipe in recipes.items():
                turns[name].append(_one_step(recipe))
    finally:
        torch.set_num_threads(before)
    return {name: statistics.median(seconds) for name, seconds in turns.items()}


def _one_step(recipe: Recipe) -> float:
    """Seconds of the second step of a new model."""
    config = recipe.train
    context = config.context or recipe.model.context_length
    micro_batch = -(-config.batch_size // config.accumulation)
    rows = max(1, min(micro_batch, _MEASURED_TOKENS // context))
    device = find_device(config.device)
    autocast = arithmetic(config.precision, device)
    with torch.random.fork_rng():
        model = ModulatedTransformer(recipe.model).to(device)
    optimizers = build_optimizers(model, config)
    tokens = torch.arange(rows * context, device=device).remainder(recipe.model.vocab_size).view(rows, context)
    for _ in range(2):
        begun = synchronised_time(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            nats, _ = model.loss(tokens, tokens.roll(-1, 1), chunk=config.loss_chunk)
        (nats / tokens.numel()).backward()  # type: ignore[no-untyped-call]
        computed = synchronised_time(device)
        update(optimizers, model.parameters(), config.clip, 1.0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        updated = synchronised_time(device)
    return (computed - begun) * config.batch_size / rows + updated - computed
