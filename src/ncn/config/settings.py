"""What all settings have in common: frozen, validated, and one line for whatever is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ncn.errors import UserError

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """A group of settings. An unknown one is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls: type[S], values: Mapping[str, Any]) -> S:
        """Validate `values`; raises `UserError`, one line that names the field and, for a misspelt one, the nearest."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_one_line(error, cls)) from None

    def override(self: S, **changes: Any) -> S:
        """A copy with fields replaced; nested fields may be given as mappings, and everything is validated again."""
        return self.parse(merge(self.model_dump(), changes))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, BaseModel):
            value = value.model_dump()
        old = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = merge(old if isinstance(old, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that names the known word which `word` may have been meant to be; empty if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _one_line(error: ValidationError, cls: type[BaseModel]) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {where!r}{nearest(str(problem['loc'][-1]), _field_names(cls))}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {problem['input']!r})" if problem["type"] != "value_error" else message


def _field_names(cls: type[BaseModel]) -> set[str]:
    """The names of all fields, those of nested settings included; a field that is such a group counts as well."""
    names = set(cls.model_fields)
    for field in cls.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names |= _field_names(kind)
    return names
