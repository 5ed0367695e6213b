"""What is read beside a document's text, from the other columns of its row: numbers for sliders, and an instruction."""

import difflib
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from ncn.errors import UserError


class Columns(NamedTuple):
    """Keys (JSON lines) or columns (Parquet, hub): of numbers, for sliders, and of an instruction in words."""

    sliders: tuple[str, ...] = ()
    instruction: str | None = None

    @property
    def names(self) -> list[str]:
        return [*self.sliders, *([] if self.instruction is None else [self.instruction])]


NO_COLUMNS = Columns()


class Beside(NamedTuple):
    """What a document's row holds in its columns: numbers, NaN where there is none, and words, perhaps none."""

    numbers: tuple[float, ...] = ()
    instruction: str = ""


def beside(row: Mapping[str, Any], columns: Columns, place: str) -> Beside:
    """What a row holds; raises `UserError`, which names the `place`, for what is no number or no text."""
    return Beside(
        tuple(_number(row.get(name), name, place) for name in columns.sliders),
        "" if columns.instruction is None else _words(row.get(columns.instruction), columns.instruction, place),
    )


def missing_field(place: str, field: str, present: Iterable[str]) -> UserError:
    """The error for a column that is not there, which names the nearest that is."""
    names = sorted(present)
    near = difflib.get_close_matches(field, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(names) or 'none'}"
    return UserError(f"{place}: no field '{field}'; {hint}")


def _number(value: Any, name: str, place: str) -> float:
    """A missing value is NaN; yes and no are 1 and 0."""
    if value is None:
        return math.nan
    if not isinstance(value, (int, float, Decimal)):
        raise UserError(f"{place}: field '{name}' holds {type(value).__name__}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise UserError(f"{place}: field '{name}' holds a number that is too large")
    return number


def _words(value: Any, name: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: field '{name}' holds {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field '{name}' has half of a surrogate pair at character {error.start}, which is not text"
        ) from None
    return value.strip()
