"""Reading a text window by window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ncn.config.training import IGNORED
from ncn.core.interface import LanguageModel
from ncn.data.dataset import Batch, TokenDataset
from ncn.errors import UserError


def validation_facts(loss: float, bits_per_byte: float) -> dict[str, float]:
    """What a training run logs of a validation; `loss` is in nats a token."""
    return {
        "validation_loss": loss,
        "validation_perplexity": perplexity(loss),
        "validation_bits_per_byte": bits_per_byte,
    }


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # beyond, a float overflows


def check_vocabulary(model: LanguageModel, dataset: TokenDataset) -> None:
    """Raises `UserError` if the data holds token ids that the model does not know."""
    if dataset.vocab_size > model.core_config.vocab_size:
        raise UserError(
            f"the data in {dataset.folder} has a vocabulary of {dataset.vocab_size}, the model one of "
            f"{model.core_config.vocab_size}; prepare the data with the model's own tokenizer (--tokenizer)"
        )


class Window(NamedTuple):
    """A batch of windows of a text: token ids on the model's device, and where they are from.

    `real` says which positions have a target, on CPU; `places` is the place of each input in the text's stream.
    """

    inputs: Int64[Tensor, "batch tokens"]
    targets: Int64[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]
    places: npt.NDArray[np.int64]


def read_windows(
    dataset: TokenDataset, context: int, batch_size: int, device: torch.device, max_tokens: int | None = None
) -> Iterator[Window]:
    """The fixed, non-overlapping windows of a text in order, every token a target once; `max_tokens` stops after that
    many, at the end of a batch."""
    place = tokens = 0
    for inputs, targets in dataset.windows(context, batch_size):
        real = targets != IGNORED
        places = place + np.arange(inputs.numel()).reshape(inputs.shape)
        yield Window(inputs.to(device), targets.to(device), real, places)
        place += inputs.numel()
        tokens += int(real.sum())
        if max_tokens is not None and tokens >= max_tokens:
            return


@contextmanager
def evaluating(model: LanguageModel, autocast: torch.dtype | None) -> Iterator[torch.device]:
    """Evaluation mode, and autocast when a type is given; gives the model's device, and restores the mode."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            yield device
    finally:
        model.train(was_training)


def text_windows(ids: list[int], context: int) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and targets of one text: every token a target once, with as much context as half-overlaps allow."""
    scored, total = 0, len(ids) - 1
    while scored < total:
        end = min(total, max(scored + max(context // 2, 1), context))
        start = max(0, end - context)
        targets = [IGNORED] * (scored - start) + ids[scored + 1 : end + 1]
        yield ids[start:end], targets
        scored = end


def padded_batches(windows: list[tuple[list[int], list[int]]], size: int = 16) -> Iterator[Batch]:
    """Batches of windows of similar length, padded on the right, where causality keeps padding from mattering."""
    windows = sorted(windows, key=lambda window: len(window[0]))
    for first in range(0, len(windows), size):
        chosen = windows[first : first + size]
        longest = max(len(inputs) for inputs, _ in chosen)
        yield Batch(
            torch.tensor([inputs + [0] * (longest - len(inputs)) for inputs, _ in chosen]),
            torch.tensor([targets + [IGNORED] * (longest - len(targets)) for _, targets in chosen]),
        )
