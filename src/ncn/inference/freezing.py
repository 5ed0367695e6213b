"""What signals are worth: the loss with them held still."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ncn.config.signals import SIGNALS
from ncn.core.model import ModulatedTransformer
from ncn.core.operations.loss import IGNORED
from ncn.data.dataset import TokenDataset
from ncn.inference.evaluate import Evaluation, evaluate
from ncn.inference.reading import evaluating


def signal_means(
    model: ModulatedTransformer,
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
        for inputs, targets in dataset.windows(context or model.config.context_length, batch_size):
            signals = model(inputs.to(device), output_signals=True).signals or {}
            kept = (targets != IGNORED).to(device)
            for name, signal in signals.items():
                mask = kept.reshape(*kept.shape, *[1] * (signal.ndim - 2))
                total = (signal.double() * mask).sum((0, 1), keepdim=True)
                sums[name] = sums[name] + total if name in sums else total
            tokens += int(kept.sum())
            if tokens >= max_tokens:
                break
    return {name: (total / tokens).float() for name, total in sums.items()}


def freezings(model: ModulatedTransformer) -> dict[str, tuple[str, ...]]:
    """What `causal_value` freezes: "all" signals, and each by its name where there are several."""
    names: tuple[str, ...] = model.config.controller.signals if model.config.controller else ()
    return ({"all": names} if names else {}) | ({name: (name,) for name in names} if len(names) > 1 else {})


def causal_value(
    model: ModulatedTransformer, dataset: TokenDataset, **options: Any
) -> dict[str, dict[str, Evaluation]]:
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
