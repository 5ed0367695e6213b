"""What signals are worth: the loss with them held still."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ncn.config.signals import SIGNALS
from ncn.core.interface import LanguageModel
from ncn.data.dataset import TokenDataset
from ncn.inference.evaluate import Evaluation, evaluate
from ncn.inference.reading import evaluating, read_windows


def signal_means(
    model: LanguageModel,
    dataset: TokenDataset,
    *,
    context: int | None = None,
    max_tokens: int = 50_000,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Each signal's mean over the tokens of a text, for every layer (and head): shape (1, 1, layers[, sites])."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    with torch.inference_mode(), evaluating(model, None) as device:
        context = context or model.core_config.context_length
        for inputs, _, real, _ in read_windows(dataset, context, batch_size, device, max_tokens):
            signals = model.read(inputs, output_signals=True).signals or {}
            kept = real.to(device)
            for name, signal in signals.items():
                mask = kept.reshape(*kept.shape, *[1] * (signal.ndim - 2))
                total = (signal.double() * mask).sum((0, 1), keepdim=True)
                sums[name] = sums[name] + total if name in sums else total
            tokens += int(kept.sum())
    return {name: (total / tokens).float() for name, total in sums.items()}


def freezings(model: LanguageModel) -> dict[str, tuple[str, ...]]:
    """What `causal_value` freezes: "all" signals, and each by its name where there are several."""
    names: tuple[str, ...] = model.core_config.controller.signals if model.core_config.controller else ()
    return ({"all": names} if names else {}) | ({name: (name,) for name in names} if len(names) > 1 else {})


def causal_value(model: LanguageModel, dataset: TokenDataset, **options: Any) -> dict[str, dict[str, Evaluation]]:
    """The evaluation with signals frozen: {"all" or a signal's name: {"neutral": ..., "mean": ...}}. `options` are
    those of `evaluate`.

    Frozen at neutral, a signal has no effect at all; frozen at its mean (for every layer and head), it has an effect
    that no longer depends on the token. What freezing costs is what the signal is worth.
    """
    means = signal_means(model, dataset, context=options.get("context"))
    neutral = {name: torch.full_like(mean, SIGNALS[name].neutral) for name, mean in means.items()}
    return {
        label: {
            kind: evaluate(model, dataset, frozen={name: values[name] for name in names}, **options)
            for kind, values in (("neutral", neutral), ("mean", means))
        }
        for label, names in freezings(model).items()
    }
