"""Neuromodulatory Control Networks: language models that tune themselves, token by token.

The public names below are loaded on first use, so that importing the package stays light. `attach` and
`load_controller`, which are not in `__all__`, need the extra "hf".
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncn import published
    from ncn.brain_scan import Scan
    from ncn.cache import Cache
    from ncn.config import ControllerConfig, NCNConfig, Recipe, TrainConfig
    from ncn.data import TokenDataset
    from ncn.diagnosis import Diagnosis, diagnose
    from ncn.errors import UserError
    from ncn.evaluate import bits_per_byte
    from ncn.model import ModelOutput, ModulatedTransformer
    from ncn.retrofit import attach, load_controller  # noqa: F401 - public, and not in __all__
    from ncn.scanner import scan
    from ncn.store import load, save_model
    from ncn.tokenizer import Tokenizer
    from ncn.types import ControlInputs

_HOMES = {
    "Cache": "cache",
    "ControlInputs": "types",
    "ControllerConfig": "config",
    "Diagnosis": "diagnosis",
    "ModelOutput": "model",
    "ModulatedTransformer": "model",
    "NCNConfig": "config",
    "Recipe": "config",
    "Scan": "brain_scan",
    "TokenDataset": "data",
    "Tokenizer": "tokenizer",
    "TrainConfig": "config",
    "UserError": "errors",
    "attach": "retrofit",
    "bits_per_byte": "evaluate",
    "diagnose": "diagnosis",
    "load": "store",
    "load_controller": "retrofit",
    "published": "published",
    "save_model": "store",
    "scan": "scanner",
}

__all__ = [
    "Cache",
    "ControlInputs",
    "ControllerConfig",
    "Diagnosis",
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
    module = import_module(f"ncn.{_HOMES[name]}")
    value = module if name == "published" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
