"""Configuration of the model, its controller and its training: typed, frozen, validated, and free of torch.

A configuration comes from a preset (`recipes/*.yaml`), a YAML or JSON file, keyword arguments, or dotted overrides
such as ``controller.taps=[0,2]``.
"""

from ncn.config.model import ControllerConfig, NCNConfig
from ncn.config.presets import presets
from ncn.config.recipe import Recipe
from ncn.config.training import TrainConfig

__all__ = ["ControllerConfig", "NCNConfig", "Recipe", "TrainConfig", "presets"]
