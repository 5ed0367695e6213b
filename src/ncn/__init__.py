"""Neuromodulatory Control Networks."""

from ncn import published
from ncn.cache import Cache
from ncn.config import ControllerConfig, NCNConfig, Recipe, TrainConfig
from ncn.errors import UserError
from ncn.model import ModelOutput, ModulatedTransformer

__all__ = [
    "Cache",
    "ControllerConfig",
    "ModelOutput",
    "ModulatedTransformer",
    "NCNConfig",
    "Recipe",
    "TrainConfig",
    "UserError",
    "published",
]
