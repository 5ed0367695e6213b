"""What each parameter of a model is for, said once: optimisers, costs and restricted training go by it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ncn.config.model import NCNConfig
from ncn.core.controller.controller import SignalSource, signal_source
from ncn.core.controller.inputs import ExternalInputs
from ncn.core.layers import Attention, FeedForward
from ncn.core.sliders import SliderAdapters, SliderEmbedding
from ncn.errors import UserError

Part = Literal["embedding", "attention", "feed-forward", "norms", "output head", "controller"]


@dataclass(frozen=True)
class Role:
    """What a parameter is for.

    Attributes:
        part: of the model. What sliders enter by is the controller's, wherever it sits.
        linear: whether it is the matrix of a linear map of its own.
        from_outside: whether sliders, tasks or instructions enter by it.
    """

    part: Part
    linear: bool = False
    from_outside: bool = False


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by its name, in the order of `model.named_parameters()`."""
    roles = dict(_roles(model, "", Role("output head")))
    return {name: roles[name] for name, _ in model.named_parameters()}


def _roles(module: nn.Module, prefix: str, inherited: Role) -> Iterator[tuple[str, Role]]:
    role = inherited
    if isinstance(module, ExternalInputs | SliderEmbedding | SliderAdapters):
        role = Role("controller", from_outside=True)
    elif isinstance(module, SignalSource):
        role = Role("controller")
    elif inherited.part != "controller":
        if isinstance(module, nn.RMSNorm):
            role = Role("norms")
        elif isinstance(module, Attention):
            role = Role("attention")
        elif isinstance(module, FeedForward):
            role = Role("feed-forward")
        elif isinstance(module, nn.Embedding):
            role = Role("embedding")
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name, replace(role, linear=isinstance(module, nn.Linear) and name == "weight")
    for name, child in module.named_children():
        yield from _roles(child, f"{prefix}{name}.", role)


def layer_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of the linear maps inside the layers, by name: those that Muon is for."""
    roles = parameter_roles(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if roles[name].linear and roles[name].part in ("attention", "feed-forward")
    }


def parameter_groups(model: nn.Module) -> dict[str, int]:
    """How many parameters each part of the model has."""
    groups: dict[str, int] = dict.fromkeys(get_args(Part), 0)
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        groups[roles[name].part] += parameter.numel()
    return groups


def controller_parameters(config: NCNConfig) -> int:
    """Numbers of the controller alone, whatever it sits on."""
    with torch.device("meta"):
        source = signal_source(config)
    return 0 if source is None else sum(parameter.numel() for parameter in source.parameters())


def hold_still_but_inputs(model: nn.Module) -> None:
    """Let training change nothing but what inputs from outside enter by. Raises `UserError` if there are none."""
    roles = parameter_roles(model)
    if not any(role.from_outside for role in roles.values()):
        raise UserError("train.only_inputs needs inputs to train, such as controller.sliders=[length]")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(roles[name].from_outside)
