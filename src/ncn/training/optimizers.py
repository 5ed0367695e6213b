"""Optimisers, their schedule, one update with them, and their state by parameter name.

Every group of an optimiser that is made here knows the `peak` of its learning rate, which the schedule is a factor of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ncn.config.training import TrainConfig
from ncn.core.interface import LanguageModel
from ncn.core.parameters import layer_matrices, parameter_roles


def build_optimizers(model: LanguageModel, config: TrainConfig) -> list[Optimizer]:
    """AdamW, and before it Muon for the layers' matrices where the configuration asks for it. What requires no gradient
    is left out.

    Weights of linear maps decay. Embeddings, norms, biases, filters and constants do not: pulling them to zero means
    nothing, or, for a signal's bias, pulls it off neutral.
    """
    roles = parameter_roles(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = layer_matrices(model) if config.optimizer == "muon" else {}
    matrices = {name: matrix for name, matrix in matrices.items() if name in trained}
    for name, parameter in trained.items():
        if name not in matrices:
            # what sliders add goes into the controller, and is learnt at the pace of the embeddings that words have
            role = roles[name]
            key = (role.linear, role.part == "controller" and not role.from_outside)
            groups.setdefault(key, []).append(parameter)
    rest = build_adamw(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "peak": config.learning_rate * (config.controller_learning_rate if controls else 1.0),
            }
            for (decays, controls), parameters in groups.items()
        ],
        config,
    )
    if not matrices:
        return [rest]
    muon = torch.optim.Muon(matrices.values(), lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    for group in muon.param_groups:
        group["peak"] = config.muon_learning_rate
    return [rest, muon]


def build_adamw(groups: Iterable[Mapping[str, Any]], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over groups of parameters, each {"params": ...}; one that says nothing else has the configuration's
    "weight_decay", and its learning rate as its "peak"."""
    usual = {"weight_decay": config.weight_decay, "peak": config.learning_rate}
    whole = [usual | dict(group) for group in groups]
    return torch.optim.AdamW(whole, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_factor(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate at `step` (from 0) as a fraction of its peak: linear warm-up, then cosine or linear decay."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    remaining = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_learning_rate + (1 - config.final_learning_rate) * remaining


def update(optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter], clip: float, factor: float) -> float:
    """Move the parameters along their gradients, which are clipped to the norm `clip` together, at `factor` times the
    peak of every learning rate. The gradients stay, clipped.

    Returns:
        The norm of the gradients before they were clipped. Where it is not finite, nothing was moved.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip).item()
    if math.isfinite(norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
    return norm


def optimizer_state(model: LanguageModel, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Every tensor of the optimisers' state, as ``optimizer.<parameter>/<entry>``."""
    return {
        f"optimizer.{name}/{entry}": value
        for name, state in _states(model, optimizers)
        for entry, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(model: LanguageModel, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave."""
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, entry = key.removeprefix("optimizer.").split("/")
            parameter = parameters[name]
            owners[id(parameter)].state[parameter][entry] = value.to(parameter.device)


def _states(model: LanguageModel, optimizers: Sequence[Optimizer]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        if parameter in optimizer.state
    ]
