"""Neuromodulatory Control Networks: language models that tune themselves, token by token.

The public names below are loaded on first use, so that importing the package stays light. `attach` and
`load_controller`, which are not in `__all__`, need the extra "hf".
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncn.config.model import ControllerConfig, NCNConfig
    from ncn.config.recipe import Recipe
    from ncn.config.training import TrainConfig
    from ncn.core.cache import Cache
    from ncn.core.interface import LanguageModel, ModelOutput
    from ncn.core.model import ModulatedTransformer
    from ncn.core.types import ControlInputs
    from ncn.data.dataset import TokenDataset
    from ncn.data.tokenizer import Tokenizer
    from ncn.diagnosis import Diagnosis, diagnose
    from ncn.errors import UserError
    from ncn.inference.evaluate import bits_per_byte
    from ncn.models import published
    from ncn.models.saved import load, save_model
    from ncn.retrofit import attach, load_controller  # noqa: F401 - public, and not in __all__
    from ncn.scans.recording import scan
    from ncn.scans.scan import Scan

_HOMES = {
    "Cache": "core.cache",
    "ControlInputs": "core.types",
    "ControllerConfig": "config",
    "Diagnosis": "diagnosis",
    "LanguageModel": "core.interface",
    "ModelOutput": "core.interface",
    "ModulatedTransformer": "core.model",
    "NCNConfig": "config",
    "Recipe": "config",
    "Scan": "scans.scan",
    "TokenDataset": "data.dataset",
    "Tokenizer": "data.tokenizer",
    "TrainConfig": "config",
    "UserError": "errors",
    "attach": "retrofit",
    "bits_per_byte": "inference.evaluate",
    "diagnose": "diagnosis",
    "load": "models.saved",
    "load_controller": "retrofit",
    "published": "models",
    "save_model": "models.saved",
    "scan": "scans.recording",
}

__all__ = [
    "Cache",
    "ControlInputs",
    "ControllerConfig",
    "Diagnosis",
    "LanguageModel",
    "ModelOutput",
    "ModulatedTransformer",
    "NCNConfig",
    "Recipe",
    "Scan",
    "TokenDataset",
    "Tokenizer",
    "TrainConfig",
    "UserError",
    "bits_per_byte",
    "diagnose",
    "load",
    "published",
    "save_model",
    "scan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ncn' has no attribute {name!r}")
    home = f"ncn.{_HOMES[name]}"
    value = import_module(f"{home}.{name}") if name == "published" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
