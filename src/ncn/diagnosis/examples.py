"""Worked examples: the same words in another order, and a plot twist."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ncn.data.tokenizer import Tokenizer
from ncn.diagnosis.readers import Reader
from ncn.diagnosis.record import Floats, Ids, Record, Text, read_texts
from ncn.scans.scan import Scan
from ncn.statistics.resampling import percentile_interval

ORDER_PAIR = ("the dog chased the cat.", "the cat chased the dog.")
PLOT_TWIST = "Timmy wanted an apple. He looked in the box, but it was empty."

_ACTORS = (
    ("dog", "cat"), ("girl", "boy"), ("bird", "frog"), ("mom", "dad"), ("bear", "fox"), ("man", "horse"),
    ("king", "queen"), ("mouse", "duck"),
)  # fmt: skip
_VERBS = ("chased", "helped", "saw", "thanked")


def word_order(reader: Reader, record: Record, tokenizer: Tokenizer, rng: np.random.Generator) -> dict[str, Any]:
    """Whether the signals tell "the dog chased the cat." from "the cat chased the dog."

    Both end in the same token, at the same position, after the same bag of words: what differs there is the order. The
    difference is the root mean square over the signal's columns, in standard deviations over the corpus; "example" has
    it for every token of the pair above, "pairs" its mean at the last token over 32 such pairs, with an interval over
    pairs. "floor" is what reading one text twice, alone and in a padded batch, makes of difference: rounding.
    """
    sentences = [
        tuple(f"the {a} {verb} the {b}." for a, b in ((one, other), (other, one)))
        for one, other in _ACTORS
        for verb in _VERBS
    ]
    pairs = [ORDER_PAIR, *(pair for pair in sentences if pair != ORDER_PAIR)]
    encoded = [tuple(_encode(tokenizer, text) for text in pair) for pair in pairs]
    kept = [
        index
        for index, (one, other) in enumerate(encoded)
        if sorted(one) == sorted(other) and one[-1] == other[-1] and len(one) <= reader.context_length
    ]
    flat = [Text(ids, number, True) for number, index in enumerate(kept) for ids in encoded[index]]
    result: dict[str, Any] = {"texts": list(ORDER_PAIR), "pairs": len(kept), "signals": {}}
    names = [name for name in record.signals if record.varies(name)]
    if not kept or not names:
        return result
    signals = [read_texts(reader, [text])[1] for text in flat]
    together = read_texts(reader, flat)[1]
    starts = np.cumsum([0, *(len(text.ids) for text in flat)])
    if kept[0] == 0:
        result["tokens"] = [
            one if one == other else f"{one}/{other}"
            for one, other in zip(*(tokenizer.token_labels(ids[1:].tolist()) for ids in encoded[0]), strict=True)
        ]
    for name in names:
        spread = record.spread(name)
        gaps = [_distance(a[name], b[name], spread) for a, b in zip(signals[::2], signals[1::2], strict=True)]
        floor = max(
            float(_distance(alone[name], together[name][start:end], spread).max())
            for alone, start, end in zip(signals, starts[:-1], starts[1:], strict=True)
        )
        last = np.array([gap[-1] for gap in gaps])
        low, high = percentile_interval(rng.choice(last, (1000, len(last))).mean(1))
        result["signals"][name] = {
            "last": {"value": float(last.mean()), "low": low, "high": high, "p": None},
            "smallest": float(last.min()),
            "floor": floor,
            "separated": bool(last.min() > max(10 * floor, 1e-4)),
            **({"example": gaps[0][1:].tolist()} if kept[0] == 0 else {}),
        }
    return result


def plot_twist(reader: Reader, record: Record, tokenizer: Tokenizer, name: str) -> tuple[dict[str, Any], Scan | None]:
    """The brain scan of the plot twist, and how much each signal moved at the token "but".

    "step" is the mean |Δsignal| at that token in standard deviations over the corpus, "rank" the share of the corpus's
    tokens where the signal moved less, and "largest" the token of the sentence where it moved most.
    """
    ids = tokenizer.encode(PLOT_TWIST)
    labels = tokenizer.token_labels(ids)
    if len(ids) >= reader.context_length:
        return {"text": PLOT_TWIST, "signals": {}}, None
    sequence = np.array([tokenizer.separator_id, *ids], dtype=np.int64)
    surprisal, signals = read_texts(reader, [Text(sequence, 0, True)])
    turn = next((place for place, label in enumerate(labels) if label.strip() == "but"), None)
    result: dict[str, Any] = {"text": PLOT_TWIST, "tokens": labels, "signals": {}}
    for each in record.signals:
        if not record.varies(each):
            continue
        spread = record.spread(each)
        steps = np.abs(np.diff(signals[each].reshape(len(sequence), -1) / spread, axis=0)).mean(1)
        corpus = np.abs(np.diff(record.columns(each) / spread, axis=0)).mean(1)[record.position[1:] > 0]
        at_turn = None if turn is None else float(steps[turn])
        result["signals"][each] = {
            "step": at_turn,
            "rank": None if at_turn is None else float((corpus < at_turn).mean()),
            "largest": labels[int(steps.argmax())],
        }
    scan = Scan(
        tokens=labels,
        surprisal=[float(nats) / math.log(2) for nats in surprisal[1:]],
        signals={each: values[1:].astype(np.float64) for each, values in signals.items()},
        neutral=dict(record.neutral),
        bounds=dict(record.bounds),
        text=PLOT_TWIST,
        model=name,
    )
    return result, scan


def _encode(tokenizer: Tokenizer, text: str) -> Ids:
    return np.array([tokenizer.separator_id, *tokenizer.encode(text)], dtype=np.int64)


def _distance(one: Floats, other: Floats, spread: Floats) -> Floats:
    """Root mean square difference over columns at every token."""
    gap = (one.reshape(len(one), -1).astype(np.float64) - other.reshape(len(other), -1)) / spread
    finite = np.isfinite(spread)
    return np.asarray((gap[:, finite] ** 2).mean(1) ** 0.5)
