"""Numbers, intervals and p-values as they are written in a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NBSP = "\N{NO-BREAK SPACE}"  # keeps a number and its interval on one line of a narrow cell


def interval_text(estimate: Mapping[str, Any], digits: int = 4, *, short: bool = False) -> str:
    """ "−0.0123 (−0.0160, −0.0086)", or "−0.0123 ± 0.0037" for short; the mean alone where there is no interval."""
    mean = number(estimate["mean"], digits)
    if estimate["low"] is None:
        return mean
    if short:
        return f"{mean}{NBSP}±{NBSP}{(estimate['high'] - estimate['low']) / 2:.{digits}f}"
    return f"{mean}{NBSP}({number(estimate['low'], digits)},{NBSP}{number(estimate['high'], digits)})"


def number(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(estimate: Mapping[str, Any]) -> str:
    scaled = {key: None if estimate[key] is None else 100 * estimate[key] for key in ("mean", "low", "high")}
    return interval_text(scaled, 1, short=True) + f"{NBSP}%"


def p_text(value: float | None) -> str:
    return "–" if value is None else f"<{NBSP}0.001" if value < 0.001 else f"{value:.3f}"
