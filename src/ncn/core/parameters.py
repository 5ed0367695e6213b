"""What each parameter of a model is for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncn.config.model import NCNConfig
from ncn.core.controller.controller import signal_source
from ncn.core.controller.inputs import ExternalInputs
from ncn.core.model import ModulatedTransformer
from ncn.core.sliders import SliderAdapters, SliderEmbedding
from ncn.errors import UserError


def input_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that inputs from outside enter by, by name."""
    places = (ExternalInputs, SliderEmbedding, SliderAdapters)
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, places)
        for name, parameter in module.named_parameters()
    }


def hold_still_but_inputs(model: nn.Module) -> None:
    """Let training change nothing but what inputs from outside enter by. Raises `UserError` if there are none."""
    inputs = input_parameters(model)
    if not inputs:
        raise UserError("train.only_inputs needs inputs to train, such as controller.sliders=[length]")
    model.requires_grad_(False)
    for parameter in inputs.values():
        parameter.requires_grad_(True)


def controller_parameters(config: NCNConfig) -> int:
    """Numbers of the controller alone, whatever it sits on."""
    with torch.device("meta"):
        source = signal_source(config)
    return 0 if source is None else sum(parameter.numel() for parameter in source.parameters())


def parameter_groups(model: ModulatedTransformer) -> dict[str, int]:
    """Parameters by part of the model; the parts add up to the whole. What sliders enter by is the controller's."""
    groups = dict.fromkeys(("embedding", "attention", "feed-forward", "norms", "output head", "controller"), 0)
    for name, parameter in model.named_parameters():
        part = (
            "controller"
            if name.startswith(("controller.", "slider_"))
            else "norms"
            if "norm" in name
            else "attention"
            if ".attention." in name
            else "feed-forward"
            if ".ffn." in name
            else "output head"
            if name.startswith("head.")
            else "embedding"
        )
        groups[part] += parameter.numel()
    assert sum(groups.values()) == sum(parameter.numel() for parameter in model.parameters())
    return groups


def layer_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of the linear maps inside the layers, by name: those that Muon is for."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if name.startswith("layers.") and isinstance(module, nn.Linear)
    }
