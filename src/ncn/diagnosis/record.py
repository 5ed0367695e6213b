"""The record of a model's signals over a corpus, which every measure is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncn.config.training import IGNORED
from ncn.data.dataset import TokenDataset
from ncn.diagnosis.readers import Reader
from ncn.errors import UserError

Ids = NDArray[np.int64]
Floats = NDArray[np.floating]
Advance = Callable[[int], None]
"""Told of every batch how many tokens it had, for a progress bar."""

SHORTEST = 12  # tokens of a text that is worth a place in the record
MOST_READ = 2**22  # tokens of a dataset that are looked through for texts
FEW_DOCUMENTS = 20


@dataclass(frozen=True)
class Text:
    """A stretch of one document that the model reads by itself: `begins` says that it is the document's beginning."""

    ids: Ids
    document: int
    begins: bool


@dataclass(frozen=True, eq=False)
class Record:
    """Signals and surprise, token by token, over a corpus. Every array has one entry for each token, text after text.

    Attributes:
        tokens: token ids.
        text: which text each token belongs to.
        document: which document that text is part of.
        position: tokens before this one in the text.
        surprisal: nats that the token cost the model; not a number at the first token of a text.
        begins: whether the token's text is the beginning of its document.
        signals: for each signal, (tokens, layers) or (tokens, layers, sites), where sites are heads or sublayers.
        neutral, bounds: as in `Reader`.
    """

    tokens: Ids
    text: Ids
    document: Ids
    position: Ids
    surprisal: Floats
    begins: NDArray[np.bool_]
    signals: Mapping[str, Floats]
    neutral: Mapping[str, float]
    bounds: Mapping[str, tuple[float, float]]

    @property
    def documents(self) -> int:
        return len(np.unique(self.document))

    @cached_property
    def unit(self) -> Ids:
        """What is resampled, as an index for each token: the document, or the text where documents are too few."""
        parts = self.document if self.documents >= FEW_DOCUMENTS else self.text
        return np.unique(parts, return_inverse=True)[1].astype(np.int64)

    def cube(self, name: str) -> Floats:
        """A signal as (tokens, layers, sites)."""
        values = self.signals[name]
        return values if values.ndim == 3 else values[..., None]

    def columns(self, name: str) -> Floats:
        """A signal as (tokens, layers · sites)."""
        return self.signals[name].reshape(len(self.tokens), -1)

    def width(self, name: str) -> float:
        """The length of a signal's range."""
        low, high = self.bounds[name]
        return high - low

    def varies(self, name: str) -> bool:
        """Whether the signal depends on the token at all, to one part in 100 000 of its range."""
        return bool(self.columns(name).std(0, dtype=np.float64).max() > 1e-5 * self.width(name))

    def spread(self, name: str) -> Floats:
        """Standard deviation over tokens of each of the signal's columns; infinite where it is none, so that what is
        divided by it is zero."""
        spread = self.columns(name).std(0, dtype=np.float64)
        return np.where(spread > 1e-6 * self.width(name), spread, np.inf)


def choose_texts(
    data: TokenDataset | Iterable[Sequence[int]], context: int, max_tokens: int, separator: int | None = None
) -> list[Text]:
    """Texts of at most `context` tokens, spread evenly over the documents, with about `max_tokens` in all.

    `data` is a prepared dataset, or documents as lists of token ids. A document that is longer than the context is cut
    into several texts. A dataset's documents begin with its separator; other documents are taken as they are, unless
    they hold `separator`. Raises `UserError` where nothing long enough is left.
    """
    if context < SHORTEST:
        raise UserError(f"a context of {context} tokens is too short to diagnose: at least {SHORTEST} are needed")
    texts = [
        Text(ids[start : start + context], number, start == 0)
        for number, ids in enumerate(_documents(data, separator))
        for start in range(0, len(ids), context)
        if len(ids) - start >= SHORTEST
    ]
    if len(texts) < 2:
        raise UserError(
            f"there is too little text to diagnose: expected at least two documents of {SHORTEST} tokens or more, "
            f"found {len(texts)}; give more text"
        )
    mean = sum(len(text.ids) for text in texts) / len(texts)
    wanted = min(len(texts), max(2, round(max_tokens / mean)))
    return [texts[place] for place in np.linspace(0, len(texts) - 1, wanted).round().astype(int)]


def _documents(data: TokenDataset | Iterable[Sequence[int]], separator: int | None) -> list[Ids]:
    if not isinstance(data, TokenDataset):
        return [np.asarray(ids, dtype=np.int64) for ids in data]
    stream = data.read(0, min(data.tokens - 1, MOST_READ))  # but for the separator that ends the last document
    return [part for part in np.split(stream, np.flatnonzero(stream == data.separator_id)) if len(part)]


def read_texts(
    reader: Reader,
    texts: Sequence[Text],
    *,
    frozen: Mapping[str, Floats] | None = None,
    batch_size: int = 16,
    advance: Advance | None = None,
    keep_signals: bool = True,
) -> tuple[Floats, dict[str, Floats]]:
    """Surprisal and signals of every token of `texts`, one after the other; surprisal as in `Record`.

    `frozen` holds signals at values (tokens or 1, layers[, sites]), in the order of the texts' tokens.
    """
    starts = np.cumsum([0, *(len(text.ids) for text in texts)])
    surprisal = np.full(starts[-1], np.nan)
    signals: dict[str, Floats] = {}
    # Texts of similar length share a batch; a model that sees later tokens would see the padding too.
    order = sorted(range(len(texts)), key=lambda place: len(texts[place].ids))
    size = batch_size if reader.causal else 1
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        longest = len(texts[chosen[-1]].ids)
        inputs = torch.zeros(len(chosen), longest, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for row, place in enumerate(chosen):
            ids = torch.from_numpy(texts[place].ids)
            inputs[row, : len(ids)], targets[row, : len(ids) - 1] = ids, ids[1:]
        held = {name: _gather(values, chosen, starts, longest) for name, values in (frozen or {}).items()}
        nats, found = reader.read(inputs, targets, held or None)
        losses = nats.double().cpu().numpy()
        for row, place in enumerate(chosen):
            surprisal[starts[place] + 1 : starts[place + 1]] = losses[row, : len(texts[place].ids) - 1]
        for name, signal in found.items() if keep_signals else ():
            values = signal.float().cpu().numpy()
            whole = signals.setdefault(name, np.empty((starts[-1], *values.shape[2:]), np.float32))
            for row, place in enumerate(chosen):
                whole[starts[place] : starts[place + 1]] = values[row, : len(texts[place].ids)]
        if advance is not None:
            advance(sum(len(texts[place].ids) for place in chosen))
    return surprisal, signals


def collect(reader: Reader, texts: Sequence[Text], *, batch_size: int = 16, advance: Advance | None = None) -> Record:
    """Run the model over `texts` and record what it did."""
    tokens = np.concatenate([text.ids for text in texts])
    if tokens.min() < 0 or tokens.max() >= reader.vocab_size:
        raise UserError(
            f"the text holds token id {tokens.max()}, but the model's vocabulary has {reader.vocab_size}; "
            "use the model's own tokenizer"
        )
    surprisal, signals = read_texts(reader, texts, batch_size=batch_size, advance=advance)
    lengths = [len(text.ids) for text in texts]
    return Record(
        tokens=tokens,
        text=np.repeat(np.arange(len(texts)), lengths),
        document=np.repeat([text.document for text in texts], lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        surprisal=surprisal,
        begins=np.repeat([text.begins for text in texts], lengths),
        signals=signals,
        neutral={name: reader.neutral[name] for name in signals},
        bounds={name: reader.bounds[name] for name in signals},
    )


def seen_from_later(reader: Reader, texts: Sequence[Text], samples: int = 8) -> dict[str, float]:
    """How much the signals (largest change over their range) and losses (nats) of a text change when its last token
    does; at the positions before that token. Both are zero in a causal model."""
    changed = {"signals": 0.0, "loss": 0.0}
    for number, text in enumerate(texts[:samples]):
        other = text.ids.copy()
        other[-1] = texts[number - 1].ids[-2]
        if other[-1] == text.ids[-1]:
            other[-1] = (other[-1] + 1) % reader.vocab_size
        before, after = (read_texts(reader, [Text(ids, 0, True)]) for ids in (text.ids, other))
        changed["loss"] = max(changed["loss"], float(np.abs(before[0] - after[0])[1:-1].max()))
        for name, values in before[1].items():
            low, high = reader.bounds[name]
            difference = np.abs(values[:-1] - after[1][name][:-1]).max() / (high - low)
            changed["signals"] = max(changed["signals"], float(difference))
    return changed


def _gather(values: Floats, chosen: Sequence[int], starts: Ids, longest: int) -> Tensor:
    if len(values) == 1:
        return torch.from_numpy(np.ascontiguousarray(values[None]))
    batch = np.zeros((len(chosen), longest, *values.shape[1:]), values.dtype)
    for row, place in enumerate(chosen):
        batch[row, : starts[place + 1] - starts[place]] = values[starts[place] : starts[place + 1]]
    return torch.from_numpy(batch)
