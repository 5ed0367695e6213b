"""Recipes that ship with the package, and files that hold one, as they are written: mappings of settings."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ncn.config.settings import nearest
from ncn.errors import UserError

_ORDER = ["mini", "published-18m", "100m", "350m", "1b"]


def presets() -> list[str]:
    """Names of the presets that ship with the package, smallest model first."""
    found = {entry.name.removesuffix(".yaml") for entry in (resources.files("ncn") / "recipes").iterdir()}
    return [name for name in _ORDER if name in found] + sorted(found - set(_ORDER))


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset; raises `UserError` naming the known ones."""
    if name not in presets():
        raise UserError(f"unknown preset {name!r}{nearest(name, presets())}; presets: {', '.join(presets())}")
    text = (resources.files("ncn") / "recipes" / f"{name}.yaml").read_text("utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def read_mapping(path: Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file; raises `UserError` where it cannot be read or holds something else."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid {path.suffix[1:]}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping with the keys 'model' and 'train'")
    return values
