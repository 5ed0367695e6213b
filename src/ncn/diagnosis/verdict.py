"""What the measures say about a controller, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ncn.diagnosis.record import Record

NEGLIGIBLE_NATS = 0.001
"""A loss that changes by less than this, over all of its interval, has not changed."""
NEARLY_ALL = 0.95
"""A share of variance from which on the rest is put down to estimation."""
NEUTRAL = 1e-3
"""A signal within this share of its range from neutral, at every token, is neutral."""

KINDS = ("nothing", "constant", "token", "position", "token and position", "bag of words", "context")


def verdict(
    record: Record, explained: Mapping[str, Any], causal_value: Mapping[str, Any], *, causal: bool
) -> dict[str, Any]:
    """{"kind": one of `KINDS`, "sentences": [...], "signals": {signal: one sentence}}."""
    every = causal_value["all"]
    shares = _joint(explained)
    kind = _kind(record, list(record.signals), shares, every)
    sentences = [_headline(kind, shares, every)]
    if kind not in ("nothing", "constant"):
        sentences.append(_worth(every))
    if not causal:
        sentences.append(
            "This controller is not causal: its signals, and with them the losses, change when later tokens do. What "
            "it costs to freeze them therefore includes what they give away about the tokens to come, and none of its "
            "losses is that of a language model."
        )
    of_signals = {}
    if len(record.signals) > 1:
        for name in record.signals:
            of_signals[name] = _of_signal(name, record, explained.get(name), causal_value[name])
        idle = [name for name in record.signals if _costs_nothing(causal_value[name]["neutral"])]
        if idle and kind != "nothing":
            sentences.append(
                f"Decoration: holding {_listed(idle)} at neutral costs nothing; the model would do as well without."
            )
    return {"kind": kind, "sentences": sentences, "signals": of_signals}


def _joint(explained: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The shares of all signals together; those of the only one where one varies."""
    return explained.get("all") or next(iter(explained.values()), None)


def _kind(record: Record, names: list[str], shares: Mapping[str, Any] | None, cost: Mapping[str, Any]) -> str:
    if all(_is_neutral(record, name) for name in names) or (
        _costs_nothing(cost["neutral"]) and not any(record.varies(name) for name in names)
    ):
        return "nothing"
    if shares is None:
        return "constant"
    identity, position, bag = (shares[stage]["value"] for stage in ("identity", "position", "bag"))
    alone = shares["position_alone"]["value"]
    if alone >= NEARLY_ALL:
        return "position"
    if identity >= NEARLY_ALL:
        return "token"
    if identity + position >= NEARLY_ALL:
        return "token and position"
    return "bag of words" if identity + position + bag >= NEARLY_ALL else "context"


def _headline(kind: str, shares: Mapping[str, Any] | None, cost: Mapping[str, Any]) -> str:
    if kind == "nothing":
        return (
            "This controller does nothing: every signal sits at its neutral value at every token, and freezing the "
            f"signals there changes the loss by {_signed(cost['neutral']['value'])} nats a token."
        )
    if kind == "constant":
        return (
            "This controller sets constants: its signals are the same for every token, so nothing in them responds to "
            f"the text. Freezing them at neutral changes the loss by {_nats(cost['neutral'])}."
        )
    assert shares is not None
    share = {stage: shares[stage]["value"] for stage in ("identity", "position", "bag", "unexplained")}
    together = share["identity"] + share["position"]
    if kind == "token":
        return (
            f"This controller only knows which token it stands on: the token alone predicts "
            f"{_percent(share['identity'])} of the signals' variation over tokens. It does not read the context."
        )
    if kind == "position":
        return (
            f"This controller only knows the position: how many tokens stand before this one predicts "
            f"{_percent(shares['position_alone']['value'])} of the signals' variation over tokens. It does not read "
            "the context."
        )
    if kind == "token and position":
        return (
            f"This controller knows which token it stands on, and where: together they predict {_percent(together)} of "
            "the signals' variation over tokens. It does not read the context."
        )
    if kind == "bag of words":
        return (
            f"This controller knows which words have come so far, but not in which order: token, position and bag of "
            f"words predict {_percent(together + share['bag'])} of the signals' variation over tokens."
        )
    unexplained = shares["unexplained"]
    return (
        f"This controller reads the context: {_percent(unexplained['value'])} of its variation over tokens "
        f"[{_percent(unexplained['low'])}, {_percent(unexplained['high'])}] is explained neither by which token it "
        f"stands on ({_percent(share['identity'])}), nor by the position ({_percent(share['position'])}), nor by the "
        f"bag of words so far ({_percent(share['bag'])})."
    )


def _worth(cost: Mapping[str, Any]) -> str:
    moving, still = cost["layer_mean"], cost["neutral"]
    if _costs_nothing(still) and _costs_nothing(moving):
        return (
            "It is decoration all the same: freezing all signals at neutral, or at their means, changes the loss by "
            f"{_nats(still)} and {_nats(moving)}."
        )
    held = f"frozen at the mean of every layer and head, the loss changes by {_nats(moving)}"
    held += f"; at neutral, by {_nats(still)}."
    if _costs_nothing(moving):
        return f"The model does not need the movement, and constants would do as well: {held}"
    if moving["high"] < 0:
        return f"The movement does harm: {held}"
    if moving["low"] <= 0:
        return f"No cost of holding the signals still was found, nor is a small one excluded: {held}"
    return (
        f"The model needs it: freezing all signals at the mean of every layer and head, so that they no longer depend "
        f"on the token, raises the loss by {_nats(moving)}; at neutral, by {_nats(still)}."
    )


def _of_signal(name: str, record: Record, shares: Mapping[str, Any] | None, cost: Mapping[str, Any]) -> str:
    kind = _kind(record, [name], shares, cost)
    what = {
        "nothing": "sits at neutral",
        "constant": "is a constant in every layer",
        "token": "only knows which token it stands on",
        "position": "only knows the position",
        "token and position": "knows the token and the position, not the context",
        "bag of words": "knows the words so far, not their order",
        "context": "reads the context",
    }[kind]
    if kind == "context" and shares is not None:
        what += f" ({_percent(shares['unexplained']['value'])} unexplained)"
    if kind in ("nothing", "constant"):
        return f"{what}; at neutral the loss changes by {_nats(cost['neutral'])}"
    if _costs_nothing(cost["layer_mean"]):
        return f"{what}, but holding it at its means costs nothing ({_nats(cost['layer_mean'])})"
    if cost["layer_mean"]["low"] <= 0:
        return f"{what}; no cost of holding it at its means was found ({_nats(cost['layer_mean'])})"
    return f"{what}; holding it at its means costs {_nats(cost['layer_mean'])}"


def _is_neutral(record: Record, name: str) -> bool:
    largest = abs(record.signals[name].astype("float64") - record.neutral[name]).max()
    return bool(largest <= NEUTRAL * record.width(name))


def _costs_nothing(cost: Mapping[str, Any]) -> bool:
    return bool(abs(cost["low"]) < NEGLIGIBLE_NATS and abs(cost["high"]) < NEGLIGIBLE_NATS)


def _percent(share: float) -> str:
    return f"{max(share, 0.0):.0%}".replace("%", " %")


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−") if abs(value) >= 5e-5 else "0.0000"


def _nats(cost: Mapping[str, Any]) -> str:
    return f"{_signed(cost['value'])} nats a token [{_signed(cost['low'])}, {_signed(cost['high'])}]"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
