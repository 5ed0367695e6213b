"""One run of `ncn adapt`: an adapter is trained, and read on a text."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from ncn.config.training import IGNORED, TrainConfig
from ncn.data.dataset import TokenDataset
from ncn.inference.document_losses import DocumentLosses, by_document
from ncn.retrofit.adapters import Adapted
from ncn.training.optimizers import build_adamw, learning_rate_factor, update

TUNING_SEED = 0
"""The seed of the runs that choose the rates. The compared ones have seeds from 1."""
_ROWS = 8
"""Windows read at once in an evaluation."""


@dataclass(frozen=True)
class Lesson:
    """How an adapter is trained: on what, by which settings, and where."""

    data: TokenDataset
    config: TrainConfig
    device: torch.device
    autocast: torch.dtype | None

    @property
    def context(self) -> int:
        """Tokens in a window."""
        assert self.config.context is not None
        return self.config.context

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.context

    def losses(self, adapted: Adapted, inputs: Tensor, targets: Tensor) -> Tensor:
        """Nats at each position, flat; zero where there is no target."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits = adapted.logits(inputs.to(self.device))
        wanted = targets.to(self.device).flatten()
        return F.cross_entropy(logits.float().flatten(0, 1), wanted, ignore_index=IGNORED, reduction="none")


def build_optimizer(adapted: Adapted, config: TrainConfig) -> Optimizer:
    """AdamW over what is trained."""
    return build_adamw([{"params": adapted.parameters}], config)


def train_step(adapted: Adapted, optimizer: Optimizer, lesson: Lesson, step: int, factor: float) -> float:
    """One step at `factor` times the learning rate; returns the loss before it, nats a token, NaN where the gradient is
    not finite.

    The base stays in evaluation mode: its dropout would only be noise.
    """
    config = lesson.config
    inputs, targets = lesson.data.batch(config.seed, step, config.batch_size, lesson.context)
    loss = lesson.losses(adapted, inputs, targets).sum() / (targets != IGNORED).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = update([optimizer], adapted.parameters, config.clip, factor)
    optimizer.zero_grad()
    return loss.item() if math.isfinite(norm) else math.nan


def train_adapter(adapted: Adapted, lesson: Lesson, steps: int, after: Callable[[int], None]) -> dict[str, Any]:
    """Train for `steps` steps; `after` is called after each with their number.

    Returns whether the loss stopped being a number, the mean training loss over the last tenth of the steps, the
    seconds it took, and a hash of the batches, which is equal for runs that read the same ones in the same order.
    """
    optimizer = build_optimizer(adapted, lesson.config)
    batches, losses, begun = hashlib.sha256(), [], time.monotonic()
    for step in range(steps):
        for tensor in lesson.data.batch(lesson.config.seed, step, lesson.config.batch_size, lesson.context):
            batches.update(tensor.numpy().tobytes())
        losses.append(train_step(adapted, optimizer, lesson, step, learning_rate_factor(lesson.config, step, steps)))
        if not math.isfinite(losses[-1]):
            return {"diverged": True, "steps": step + 1}
        after(step + 1)
    last = losses[-max(1, steps // 10) :]
    return {
        "diverged": False,
        "steps": steps,
        "training_loss": sum(last) / len(last),
        "seconds": time.monotonic() - begun,
        "batches_sha256": batches.hexdigest(),
    }


@torch.no_grad()
def losses_of(adapted: Adapted, dataset: TokenDataset, lesson: Lesson) -> DocumentLosses:
    """The loss of each document, over fixed windows of the training's context."""
    found = []
    for inputs, targets in dataset.windows(lesson.context, _ROWS):
        losses = lesson.losses(adapted, inputs, targets).cpu()
        found.append(losses[targets.flatten() != IGNORED].double().numpy())
    return by_document(np.concatenate(found), dataset)
