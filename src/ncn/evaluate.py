"""How good a model is: loss, perplexity and bits per byte over all of a text, by position, and without its signals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from ncn.data import Batch, TokenDataset
from ncn.document_inputs import DocumentInputs
from ncn.errors import UserError
from ncn.files import write_atomically
from ncn.loss import IGNORED
from ncn.model import Frozen, ModulatedTransformer
from ncn.progress import ProgressReport
from ncn.signals import SIGNALS
from ncn.tokenizer import Tokenizer


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
        return _validation_facts(self)


@dataclass(frozen=True)
class DocumentLosses:
    """Loss of each document of a text, all of shape (documents,): summed `nats`, the `tokens` that they are summed
    over, and the UTF-8 `bytes` of its text. A document's last token is the separator that ends it."""

    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Nats a token over all documents."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return _perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Over all documents."""
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())

    def validation_facts(self, dataset: TokenDataset) -> dict[str, Any]:
        """What a training run logs of it, also for each task of the dataset where it has tasks."""
        by_task = {name: _validation_facts(part) for name, part in self.by_task(dataset).items()}
        return {**_validation_facts(self), **({"validation_tasks": by_task} if by_task else {})}

    def of(self, chosen: npt.NDArray[np.bool_]) -> DocumentLosses:
        """Those of some documents; `chosen` is of shape (documents,)."""
        return DocumentLosses(self.nats[chosen], self.tokens[chosen], self.bytes[chosen])

    def by_task(self, dataset: TokenDataset) -> dict[str, DocumentLosses]:
        """The losses of the documents of each of the dataset's tasks, by the task's name; empty without tasks."""
        places = dataset.document_tasks(dataset.tasks) if dataset.tasks else np.zeros(0, np.int64)
        return {name: self.of(places == number) for number, name in enumerate(dataset.tasks)}

    def save(self, path: Path) -> None:
        write_atomically(path, save(vars(self)))

    @classmethod
    def load(cls, path: Path) -> DocumentLosses:
        """Raises `UserError` where there is no such file."""
        if not path.is_file():
            raise UserError(f"{path} is missing: the run was not validated, or has not finished")
        return cls(**load_file(path))


@torch.inference_mode()
def document_losses(
    model: ModulatedTransformer,
    dataset: TokenDataset,
    *,
    context: int | None = None,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    given: DocumentInputs | None = None,
) -> DocumentLosses:
    """The loss of each document, in the windows of `evaluate`, to whose result the documents add up. `given` is what
    the dataset's documents give the controller.

    The bytes are those of the decoded tokens. Where a tokenizer does not give back the very text, they are scaled so
    that they still add up to the dataset's.
    """
    check_vocabulary(model, dataset)
    found, place = [], 0
    with _evaluating(model, autocast) as device:
        for inputs, targets in dataset.windows(context or model.config.context_length, batch_size):
            control = given.at(place + np.arange(inputs.numel()).reshape(inputs.shape)).to(device) if given else None
            losses = model.token_losses(inputs.to(device), targets.to(device), control=control).cpu()
            place += inputs.numel()
            found.append(losses[targets != IGNORED].double().numpy())
    return by_document(np.concatenate(found), dataset)


def by_document(losses: npt.NDArray[np.float64], dataset: TokenDataset) -> DocumentLosses:
    """The losses of a dataset's tokens in order, its first one left out, added up for each document."""
    starts, decode = dataset.document_starts(), dataset.tokenizer().decode
    bounds = [*starts.tolist(), dataset.tokens]
    sizes = [len(decode(dataset.read(a + 1, b - a - 1).tolist()).encode()) for a, b in itertools.pairwise(bounds)]
    ends = np.cumsum(sizes)
    exact = ends if ends[-1] == dataset.text_bytes else np.rint(ends * (dataset.text_bytes / ends[-1]))
    return DocumentLosses(
        nats=np.add.reduceat(losses, starts),
        tokens=np.diff(np.append(starts, dataset.tokens - 1)),
        bytes=np.diff(exact, prepend=0).astype(np.int64),
    )


@torch.inference_mode()
def evaluate(
    model: ModulatedTransformer,
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
    context = context or model.config.context_length
    sums = torch.zeros(context, dtype=torch.float64)
    counts = torch.zeros(context, dtype=torch.float64)
    with _evaluating(model, autocast) as device:
        for inputs, targets in dataset.windows(context, batch_size):
            losses = model.token_losses(inputs.to(device), targets.to(device), frozen=frozen)
            sums += losses.double().sum(0).cpu()
            read = (targets != IGNORED).sum(0)
            counts += read
            if bar is not None:
                bar.advance(int(read.sum()))
            if max_tokens is not None and counts.sum() >= max_tokens:
                break
    total, tokens = sums.sum().item(), int(counts.sum())
    text_bytes = dataset.text_bytes * tokens / (dataset.tokens - 1)
    return Evaluation(
        loss=total / tokens,
        perplexity=_perplexity(total / tokens),
        bits_per_byte=total / math.log(2) / text_bytes,
        tokens=tokens,
        by_position=_by_position(sums, counts),
    )


def bits_per_byte(model: ModulatedTransformer, tokenizer: Tokenizer, texts: Iterable[str]) -> float:
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
        pending.extend(_windows([tokenizer.separator_id, *ids], model.config.context_length))
    if not size:
        raise UserError("the texts are empty: there is nothing to measure")
    with torch.inference_mode(), _evaluating(model, None) as device:
        for inputs, targets in _padded_batches(pending):
            nats += model.token_losses(inputs.to(device), targets.to(device)).double().sum().item()
    return nats / math.log(2) / size


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
    with torch.inference_mode(), _evaluating(model, None) as device:
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


def _validation_facts(result: Evaluation | DocumentLosses) -> dict[str, float]:
    return {f"validation_{name}": getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte")}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # beyond, a float overflows


def check_vocabulary(model: ModulatedTransformer, dataset: TokenDataset) -> None:
    """Raises `UserError` if the data holds token ids that the model does not know."""
    if dataset.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the data in {dataset.folder} has a vocabulary of {dataset.vocab_size}, the model one of "
            f"{model.config.vocab_size}; prepare the data with the model's own tokenizer (--tokenizer)"
        )


@contextmanager
def _evaluating(model: ModulatedTransformer, autocast: torch.dtype | None) -> Iterator[torch.device]:
    """Evaluation mode, and autocast when a type is given; gives the model's device, and restores the mode."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            yield device
    finally:
        model.train(was_training)


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


def _windows(ids: list[int], context: int) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and targets of one text: every token a target once, with as much context as half-overlaps allow."""
    scored, total = 0, len(ids) - 1
    while scored < total:
        end = min(total, max(scored + max(context // 2, 1), context))
        start = max(0, end - context)
        targets = [IGNORED] * (scored - start) + ids[scored + 1 : end + 1]
        yield ids[start:end], targets
        scored = end


def _padded_batches(windows: list[tuple[list[int], list[int]]], size: int = 16) -> Iterator[Batch]:
    """Batches of windows of similar length, padded on the right, where causality keeps padding from mattering."""
    windows = sorted(windows, key=lambda window: len(window[0]))
    for first in range(0, len(windows), size):
        chosen = windows[first : first + size]
        longest = max(len(inputs) for inputs, _ in chosen)
        yield Batch(
            torch.tensor([inputs + [0] * (longest - len(inputs)) for inputs, _ in chosen]),
            torch.tensor([targets + [IGNORED] * (longest - len(targets)) for _, targets in chosen]),
        )
