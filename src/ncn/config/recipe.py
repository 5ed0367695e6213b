"""A recipe: a model and the way it is trained, read from a preset or a file, and changed setting by setting."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from ncn.config.model import NCNConfig
from ncn.config.presets import read_mapping, read_preset
from ncn.config.settings import Settings, merge, nearest
from ncn.config.training import TrainConfig
from ncn.errors import UserError


class Recipe(Settings):
    """A model together with the way it is trained: what a recipe file holds."""

    model: NCNConfig
    train: TrainConfig = TrainConfig()
    base: str | None = Field(
        None, description="folder or hub name of a transformers model; only a controller on it is then trained"
    )

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """Read a preset that ships with the package; raises `UserError` naming the known ones."""
        return cls.parse(read_preset(name))

    @classmethod
    def read(cls, source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """A preset's name or a YAML/JSON file, then dotted overrides: ``controller.taps=[0,2]``, ``train.seed=3``.

        An override's first word may be ``model`` or ``train``; without it the field is looked up in both.
        A file may hold ``preset: NAME`` and only what differs from it.
        """
        path = Path(source)
        if path.suffix in {".yaml", ".yml", ".json"}:
            values = read_mapping(path)
            if "preset" in values:
                values = merge(cls.preset(values.pop("preset")).model_dump(), values)
        else:
            values = cls.preset(str(source)).model_dump()
        return cls.parse(_merge_settings(values, overrides))

    def with_settings(self, settings: Iterable[str]) -> Recipe:
        """A copy with dotted overrides, as in `read`."""
        return self.parse(_merge_settings(self.model_dump(), settings))


def _merge_settings(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    for text in settings:
        values = merge(values, _override_mapping(text))
    return values


def _override_mapping(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"an override is written key=value, got {text!r}")
    path = key.strip().split(".")
    if path[0] not in Recipe.model_fields:
        owners = [name for name, fields in _SECTIONS.items() if path[0] in fields]
        if not owners:
            known = [*Recipe.model_fields, *(field for fields in _SECTIONS.values() for field in fields)]
            raise UserError(f"unknown setting {path[0]!r}{nearest(path[0], known)}")
        path.insert(0, owners[0])
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"the value of {key} is not valid YAML: {value!r}") from None
    if isinstance(nested, str):
        nested = _number_or_text(nested)
    for name in reversed(path):
        nested = {name: nested}
    assert isinstance(nested, dict)
    return nested


def _number_or_text(text: str) -> float | str:
    # YAML 1.1 reads 3e-3 as a string, because it wants a dot in the mantissa.
    try:
        return float(text)
    except ValueError:
        return text


_SECTIONS = {"model": set(NCNConfig.model_fields), "train": set(TrainConfig.model_fields)}
