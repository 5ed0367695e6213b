"""The causal value of a signal: what the model loses when the signal is held still or mixed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ncn.diagnosis.readers import Reader
from ncn.diagnosis.record import Advance, Floats, Record, Text, read_texts
from ncn.statistics.resampling import Resampling

WAYS = ("neutral", "mean", "layer_mean", "shuffled")


def passes(signals: int) -> int:
    """How many times `causal_value` reads the corpus for so many signals."""
    return len(WAYS) * (signals + (signals > 1))


def causal_value(
    reader: Reader,
    texts: Sequence[Text],
    record: Record,
    resampling: Resampling,
    *,
    batch_size: int = 16,
    advance: Advance | None = None,
) -> dict[str, dict[str, Any]]:
    """Rise of the loss, in nats a token, when signals are frozen: {"all" or a signal's name: {way: estimate}}.

    "neutral": at the value that changes nothing. "mean": at one number, the signal's mean over tokens, layers and
    heads. "layer_mean": at the mean over tokens of every layer and head, which takes away all that depends on the
    token and leaves the rest. "shuffled": each token gets the signals of another token of the corpus, in all layers
    alike, which keeps their distribution. The p-value is that of "it costs nothing", by flipping signs of documents.
    """
    order = resampling.random.permutation(len(record.tokens))
    held = {
        name: {
            "neutral": np.full_like(values[:1], record.neutral[name]),
            "mean": np.full_like(values[:1], values.mean(dtype=np.float64)),
            "layer_mean": values.mean(0, keepdims=True, dtype=np.float64).astype(np.float32),
            "shuffled": values[order],
        }
        for name, values in record.signals.items()
    }
    scored = np.isfinite(record.surprisal)
    counts = resampling.sums(scored)
    names = list(record.signals)
    groups: dict[str, list[str]] = {"all": names} | ({name: [name] for name in names} if len(names) > 1 else {})
    result: dict[str, dict[str, Any]] = {}
    for label, members in groups.items():
        result[label] = {}
        for way in WAYS:
            frozen: dict[str, Floats] = {name: held[name][way] for name in members}
            surprisal, _ = read_texts(
                reader, texts, frozen=frozen, batch_size=batch_size, advance=advance, keep_signals=False
            )
            rise = resampling.sums(np.where(scored, surprisal - record.surprisal, 0.0))
            result[label][way] = resampling.ratio(rise, counts, p=resampling.sign_flips(rise)).as_dict()
    return result
