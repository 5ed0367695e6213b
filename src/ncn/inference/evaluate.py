"""How good a model is: loss, perplexity and bits per byte over all of a text, by position, and without its signals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ncn.core.interface import LanguageModel
from ncn.core.signals.table import Frozen
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.inference.reading import (
    check_vocabulary,
    evaluating,
    padded_batches,
    perplexity,
    read_windows,
    text_windows,
    validation_facts,
)
from ncn.machine.progress import ProgressReport


@dataclass(frozen=True)
class Evaluation:
    """Loss over a text.

    `loss` is in nats a token, `bits_per_byte` counts the text's UTF-8 bytes (separators are predicted, but are no
    bytes of the text), and `by_position[i]` is the loss at the positions with i tokens before them in the window,
    averaged over each power-of-two range: keys "0", "1", "2-3", "4-7", ...
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    by_position: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def validation_facts(self) -> dict[str, float]:
        """What a training run logs of it."""
        return validation_facts(self.loss, self.bits_per_byte)


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    dataset: TokenDataset,
    *,
    context: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    frozen: Frozen | None = None,
    autocast: torch.dtype | None = None,
    bar: ProgressReport | None = None,
) -> Evaluation:
    """Evaluate on fixed, non-overlapping windows of `context` tokens, every token of the file once.

    `max_tokens` stops after that many, at the end of a batch; bits per byte then use the file's mean bytes a token.
    `bar` is moved on by the tokens that were read.
    """
    check_vocabulary(model, dataset)
    context = context or model.core_config.context_length
    sums = torch.zeros(context, dtype=torch.float64)
    counts = torch.zeros(context, dtype=torch.float64)
    with evaluating(model, autocast) as device:
        for inputs, targets, real, _ in read_windows(dataset, context, batch_size, device, max_tokens):
            losses = model.token_losses(inputs, targets, frozen=frozen)
            sums += losses.double().sum(0).cpu()
            counts += real.sum(0)
            if bar is not None:
                bar.advance(int(real.sum()))
    total, tokens = sums.sum().item(), int(counts.sum())
    text_bytes = dataset.text_bytes * tokens / (dataset.tokens - 1)
    return Evaluation(
        loss=total / tokens,
        perplexity=perplexity(total / tokens),
        bits_per_byte=total / math.log(2) / text_bytes,
        tokens=tokens,
        by_position=_by_position(sums, counts),
    )


def bits_per_byte(model: LanguageModel, tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Bits that the model needs per UTF-8 byte of `texts`, each read on its own after a separator.

    A text longer than the context is read in windows that overlap by half, so that every token but the first few has
    at least half a context before it. The end of a text is not part of it and is not scored.
    """
    if isinstance(texts, str):
        raise UserError("give a list of texts: a lone string would be read letter by letter")
    nats, size = 0.0, 0
    pending: list[tuple[list[int], list[int]]] = []
    for text in texts:
        ids = tokenizer.encode(text)
        size += len(text.encode())
        pending.extend(text_windows([tokenizer.separator_id, *ids], model.core_config.context_length))
    if not size:
        raise UserError("the texts are empty: there is nothing to measure")
    with torch.inference_mode(), evaluating(model, None) as device:
        for inputs, targets in padded_batches(pending):
            nats += model.token_losses(inputs.to(device), targets.to(device)).double().sum().item()
    return nats / math.log(2) / size


def _by_position(sums: Tensor, counts: Tensor) -> dict[str, float]:
    result, low = {}, 0
    while low < len(sums):
        high = max(2 * low, 1)
        part = slice(low, min(high, len(sums)))
        label = str(low) if part.stop - low == 1 else f"{low}-{part.stop - 1}"
        if counts[part].sum() > 0:
            result[label] = (sums[part].sum() / counts[part].sum()).item()
        low = high
    return result
