"""The noise between seeds: what two arms differ by when nothing but their initial weights differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ncn.statistics.seeds import smallest_detectable_effect


def seed_noise(
    pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], seeds: int, source: str, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The standard deviation of paired differences, and the smallest effect that so many `seeds` can show.

    `pairs` are summaries of runs that differ in their initial weights alone, so that the true mean of the differences
    is zero. Diverged ones are left out; None if no pair is left. `source` says in the line for `say` what they are.
    """
    whole = [(one, other) for one, other in pairs if not (one.get("diverged") or other.get("diverged"))]
    if not whole:
        return None
    result: dict[str, Any] = {}
    for measure in ("loss", "bits_per_byte"):
        differences = [other[f"validation_{measure}"] - one[f"validation_{measure}"] for one, other in whole]
        deviation = math.sqrt(sum(difference**2 for difference in differences) / len(differences))
        smallest = smallest_detectable_effect(deviation, seeds)
        result[measure] = {
            "differences": differences,
            "deviation": deviation,
            "smallest_effect": smallest if math.isfinite(smallest) else None,
        }
    loss, bits = (result[measure] for measure in ("loss", "bits_per_byte"))
    noise = f"seed noise ({source}, {len(whole)} pairs): {loss['deviation']:.4f} nats a token"
    if loss["smallest_effect"] is None:
        say(f"{noise}; one seed can show no difference, whatever its size")
    else:
        say(
            f"{noise}; the smallest difference that {seeds} seeds can show: {loss['smallest_effect']:.4f} nats a "
            f"token, {bits['smallest_effect']:.4f} bits per byte"
        )
    return {"seeds": seeds, "pairs": len(whole), **result}
