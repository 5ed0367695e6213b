"""What a brain scan holds: the control signals of one text, token by token, and the text's surprisal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ncn.errors import UserError
from ncn.pages.characters import label
from ncn.scans.colours import ColourScale

FORMAT = "ncn-scan-1"
C = TypeVar("C", bound="ScanContents")


@dataclass(frozen=True, eq=False)
class ScanContents:
    """The signals of one text, with the surprisal of its tokens.

    Attributes:
        tokens: the text of each token, in order.
        surprisal: −log2 of the probability that the model gave each token, in bits; None where it made no prediction.
        signals: for each signal, values of shape (tokens, layers) or (tokens, layers, heads).
        neutral: for each signal, the value that changes nothing.
        bounds: for each signal, the (low, high) limits that its range map allows.
        text: the scanned text.
        model: the name of the model.

    Raises:
        ValueError: the parts do not belong together (lengths, names, shapes), or a number is not finite.
    """

    tokens: list[str]
    surprisal: list[float | None]
    signals: dict[str, NDArray[np.float64]]
    neutral: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    text: str
    model: str

    def __post_init__(self) -> None:
        # Every float32 is a float64, so one type for all signals loses nothing and makes the JSON form exact.
        signals = {name: np.array(values, dtype=np.float64) for name, values in self.signals.items()}
        bounds = {name: (float(low), float(high)) for name, (low, high) in self.bounds.items()}
        object.__setattr__(self, "signals", signals)
        object.__setattr__(self, "bounds", bounds)
        count = len(self.tokens)
        if count == 0:
            raise ValueError("a scan needs at least one token")
        if len(self.surprisal) != count:
            raise ValueError(f"{count} tokens but {len(self.surprisal)} surprisals; give one for each token (or None)")
        if not all(bits is None or math.isfinite(bits) for bits in self.surprisal):
            raise ValueError("a surprisal is infinite or not a number; use None where the model made no prediction")
        if not signals.keys() == self.neutral.keys() == bounds.keys():
            raise ValueError("signals, neutral and bounds must have the same names")
        for name, values in signals.items():
            if values.ndim not in (2, 3) or values.shape[0] != count or values.size == 0:
                raise ValueError(
                    f"signal {name!r} has shape {values.shape}; expected ({count}, layers) or ({count}, layers, heads)"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"signal {name!r} holds values that are infinite or not a number")
            low, high = bounds[name]
            if not (low <= self.neutral[name] <= high and low < high):
                raise ValueError(f"signal {name!r}: the neutral value {self.neutral[name]} must lie in [{low}, {high}]")

    def scale(self, name: str) -> ColourScale:
        """The colour scale that signal `name` has in every scan."""
        return ColourScale.fixed(self.neutral[name], self.bounds[name])

    def labels(self) -> list[str]:
        """The tokens as short labels without blanks: a space is ·, a new line ⏎, a tab ⇥, other invisibles escapes."""
        return [label(token) for token in self.tokens]

    def to_json(self) -> str:
        """The whole scan as one JSON object; `from_json` gives back exactly the same numbers and strings."""
        fields: dict[str, Any] = asdict(self)
        fields["signals"] = {name: values.tolist() for name, values in self.signals.items()}
        return json.dumps({"format": FORMAT, **fields}, allow_nan=False)

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        """Reads what `to_json` wrote.

        Raises:
            UserError: the text is not JSON, or not a scan.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"this is not a saved scan: it is not JSON ({error})") from None
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise UserError(f'this is not a saved scan: expected a JSON object with "format": "{FORMAT}"')
        try:
            texts = [*fields["tokens"], fields["text"], fields["model"]]
            if not (isinstance(fields["tokens"], list) and all(isinstance(text, str) for text in texts)):
                raise TypeError("tokens, text and model must be strings")
            fields["signals"] = {name: np.array(rows, dtype=np.float64) for name, rows in fields["signals"].items()}
            fields["bounds"] = {name: (low, high) for name, (low, high) in fields["bounds"].items()}
            return cls(**fields)
        except KeyError as error:
            raise UserError(f"this saved scan is damaged: it has no {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"this saved scan is damaged: {error}") from None
