"""Reactivity: how much the signals move around certain tokens, against matched tokens elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncn.data.tokenizer import Tokenizer
from ncn.diagnosis.record import Floats, Ids, Record
from ncn.statistics.resampling import PERMUTATIONS, Resampling, p_value, percentile_interval

REACH = 4
"""Tokens shown before and after an event."""
CONTRAST_WORDS = ("but", "however", "suddenly", "although", "though", "instead", "yet")
FEWEST_EVENTS = 10

_CELLS = 8_000_000  # random numbers drawn at once


def reactivity(record: Record, tokenizer: Tokenizer | None, resampling: Resampling) -> dict[str, Any]:
    """Event studies of |Δsignal|: {kind of event: result of `event_study`, or None where there are too few events}.

    "surprise": the tenth of tokens with the highest surprisal, against tokens with less than median surprisal, matched
    by position and by how frequent the token is. "surprise_same_token": the same events against the *same token* where
    it was expected, so that the difference is not one of which token it is. "contrast": contrast words against other
    tokens matched by position, frequency and surprisal.
    """
    movement = _movement(record)
    known = np.isfinite(record.surprisal)
    places = _logarithmic(record.position + 1)
    identity, counts = np.unique(record.tokens, return_inverse=True, return_counts=True)[1:]
    frequency = _logarithmic(counts[identity])
    high, middle = np.quantile(record.surprisal[known], (0.9, 0.5)) if known.any() else (np.inf, -np.inf)
    surprising, expected = known & (record.surprisal >= high), known & (record.surprisal < middle)
    levels = np.searchsorted(np.quantile(record.surprisal[known], (0.2, 0.4, 0.6, 0.8)), record.surprisal)
    result = {
        "surprise": event_study(record, movement, surprising, expected, _joined(places, frequency), resampling),
        "surprise_same_token": event_study(record, movement, surprising, expected, identity, resampling),
    }
    if tokenizer is not None:
        contrast = word_ends(record, tokenizer, CONTRAST_WORDS)
        strata = _joined(places, frequency, levels)
        result["contrast"] = event_study(record, movement, contrast, known & ~contrast, strata, resampling)
    return result


def event_study(
    record: Record,
    movement: dict[str, Floats],
    events: NDArray[np.bool_],
    controls: NDArray[np.bool_],
    strata: Ids,
    resampling: Resampling,
) -> dict[str, Any] | None:
    """Mean movement at the tokens around events and around controls of the same strata, with intervals.

    An event counts where its stratum holds a control too, and the controls are weighted as the events are. The p-value
    is that of "an event moves the signal as much as a control does" at the token itself: which of a stratum's tokens
    are the events is drawn at random. None with fewer than ten events.
    """
    offsets = np.arange(-REACH, REACH + 1)
    length = np.bincount(record.text)[record.text]
    # the first token of a text has nothing to have moved from
    whole = (record.position > REACH) & (record.position + REACH < length)
    events, controls = events & whole, controls & whole & ~events
    both = np.intersect1d(strata[events], strata[controls])
    chosen = np.flatnonzero((events | controls) & np.isin(strata, both))
    is_event = events[chosen]
    if is_event.sum() < FEWEST_EVENTS or not movement:
        return None
    order = np.argsort(strata[chosen], kind="stable")
    chosen, is_event = chosen[order], is_event[order]
    stratum = np.unique(strata[chosen], return_inverse=True)[1]
    events_in = np.bincount(stratum, is_event)
    controls_in = np.bincount(stratum, ~is_event)
    weight = np.where(is_event, 1.0, (events_in / controls_in)[stratum])

    units = resampling.unit[chosen]
    draws = _stratum_weights(stratum, is_event, units, resampling)
    permuted = _permuted_events(events_in.astype(int), np.bincount(stratum), resampling)
    result: dict[str, Any] = {
        "events": int(is_event.sum()),
        "controls": int((~is_event).sum()),
        "offsets": offsets.tolist(),
        "signals": {},
    }
    for name, values in movement.items():
        around = values[chosen[:, None] + offsets]
        curves = {
            "event": (is_event * weight) @ around / is_event.sum(),
            "control": (~is_event * weight) @ around / is_event.sum(),
        }
        drawn = draws(around)
        bands = [percentile_interval(drawn[:, column]) for column in range(len(offsets))]
        at_token = around[:, REACH]
        # chance of exchanging events and controls within strata; the controls' mean follows from the stratum's sum
        sums = np.bincount(stratum, at_token)
        by_stratum = np.add.reduceat(at_token[permuted], np.cumsum([0, *events_in.astype(int)[:-1]]), axis=1)
        gaps = by_stratum - events_in * (sums - by_stratum) / controls_in
        observed_sums = np.bincount(stratum, at_token * is_event)
        observed = (observed_sums - events_in * (sums - observed_sums) / controls_in).sum()
        difference = curves["event"] - curves["control"]
        result["signals"][name] = {
            **{kind: curve.tolist() for kind, curve in curves.items()},
            "difference": difference.tolist(),
            "low": [low for low, _ in bands],
            "high": [high for _, high in bands],
            "at_event": {
                "value": float(difference[REACH]),
                "low": bands[REACH][0],
                "high": bands[REACH][1],
                "p": p_value(np.abs(gaps.sum(1)), abs(float(observed))),
            },
            "ratio": float(curves["event"][REACH] / curves["control"][REACH]) if curves["control"][REACH] else None,
        }
    return result


def word_ends(record: Record, tokenizer: Tokenizer, words: tuple[str, ...]) -> NDArray[np.bool_]:
    """Where the text spells one of `words`, in small letters or with a capital: True at the word's last token."""
    known = np.unique(record.tokens).tolist()
    labels = dict(zip(known, tokenizer.token_labels(known), strict=True))
    first = record.position == 0
    # whether a letter stands at either end of each token, and just after and before it
    begins = np.array([labels[token][:1].isalnum() for token in record.tokens.tolist()])
    ends = np.array([labels[token][-1:].isalnum() for token in record.tokens.tolist()])
    goes_on = np.append((begins & ~first)[1:], False)
    led_in = np.insert(ends[:-1], 0, False) & ~first & begins
    found = np.zeros(len(first), bool)
    for spelling in {form for word in words for form in (word, word.capitalize())}:
        for ids in {tuple(tokenizer.encode(before + spelling)) for before in ("", " ")}:
            matches = ~goes_on & ~np.roll(led_in, len(ids) - 1) & (record.position >= len(ids) - 1)
            for back, token in enumerate(reversed(ids)):
                matches &= np.roll(record.tokens, back) == token
            found |= matches
    return found


def _movement(record: Record) -> dict[str, Floats]:
    """|Δsignal| of every token, in standard deviations over tokens, the mean over layers and heads; signals that do not
    vary over tokens are left out."""
    result = {}
    for name in record.signals:
        spread = record.spread(name)
        if np.isfinite(spread).any():
            scaled = record.columns(name)[:, np.isfinite(spread)] / spread[np.isfinite(spread)]
            steps = np.abs(np.diff(scaled, axis=0, prepend=scaled[:1])).mean(1).astype(np.float64)
            result[name] = np.where(record.position == 0, 0.0, steps)
    return result


def _stratum_weights(stratum: Ids, is_event: NDArray[np.bool_], units: Ids, resampling: Resampling) -> Any:
    """A function from values (chosen, offsets) to their bootstrap differences (samples, offsets)."""
    counts = resampling.counts[1:]
    size = int(stratum.max()) + 1
    flat = units * size + stratum

    def by_unit(values: Floats) -> Floats:
        return np.asarray(np.bincount(flat, values, resampling.units * size), np.float64).reshape(
            resampling.units, size
        )

    event_counts, control_counts = counts @ by_unit(is_event * 1.0), counts @ by_unit(~is_event * 1.0)
    usable = (event_counts > 0) & (control_counts > 0)
    share = np.where(usable, event_counts, 0)
    share = share / np.maximum(share.sum(1, keepdims=True), 1)
    event_weight = np.divide(share, event_counts, where=usable, out=np.zeros_like(share))
    control_weight = np.divide(share, control_counts, where=usable, out=np.zeros_like(share))

    def drawn(values: Floats) -> Floats:
        columns = [
            np.einsum("bs,bs->b", event_weight, counts @ by_unit(is_event * column))
            - np.einsum("bs,bs->b", control_weight, counts @ by_unit(~is_event * column))
            for column in values.T
        ]
        return np.stack(columns, 1)

    return drawn


def _permuted_events(events_in: Ids, sizes: Ids, resampling: Resampling) -> NDArray[np.intp]:
    """Which tokens are called events in each permutation: (permutations, events), drawn within every stratum."""
    parts, start = [], 0
    for count, size in zip(events_in.tolist(), sizes.tolist(), strict=True):
        rows = max(1, min(PERMUTATIONS, _CELLS // size))
        drawn = [
            np.argpartition(resampling.random.random((min(rows, PERMUTATIONS - done), size), np.float32), count - 1, 1)
            for done in range(0, PERMUTATIONS, rows)
        ]
        parts.append(np.concatenate([part[:, :count] for part in drawn]) + start)
        start += size
    return np.concatenate(parts, 1)


def _logarithmic(values: Ids) -> Ids:
    """Buckets that double in width."""
    return np.log2(values).astype(np.int64)


def _joined(*parts: Ids) -> Ids:
    joined = np.zeros(len(parts[0]), np.int64)
    for part in parts:
        joined = joined * (int(part.max()) + 1) + part
    return joined
