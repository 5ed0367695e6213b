"""What a model costs before it is trained: parameters by part, FLOPs a token, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ncn.config.model import NCNConfig
from ncn.core.cache import Cache
from ncn.core.model import ModulatedTransformer
from ncn.core.parameters import layer_matrices, parameter_groups, parameter_roles


@dataclass(frozen=True)
class Costs:
    """`flops` are floating-point operations of a forward pass per token (a multiplication and an addition are two),
    by part, at the mean position of a full context; training takes three times as many."""

    parameters: dict[str, int]
    flops: dict[str, int]
    weight_bytes: int
    optimizer_bytes: int
    cache_bytes_per_token: int

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def controller_share(self) -> float:
        """The controller's part of all parameters."""
        return self.parameters["controller"] / self.total_parameters


def costs(config: NCNConfig, optimizer: Literal["adamw", "muon"] = "adamw") -> Costs:
    """The costs of `config`, from a model without storage. Bytes are for float32 weights and, of each, AdamW's two
    moments, or the one that Muon keeps of the layers' matrices."""
    with torch.device("meta"):
        model = ModulatedTransformer(config)
    parameters = parameter_groups(model)
    total = sum(parameters.values())
    of_muon = sum(matrix.numel() for matrix in layer_matrices(model).values()) if optimizer == "muon" else 0
    return Costs(
        parameters=parameters,
        flops=_flops(model),
        weight_bytes=4 * total,
        optimizer_bytes=8 * total - 4 * of_muon,
        cache_bytes_per_token=_cache_bytes(model),
    )


def _flops(model: ModulatedTransformer) -> dict[str, int]:
    flops = dict.fromkeys(("attention", "feed-forward", "output head", "controller"), 0)
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        role = roles[name]
        if role.linear or (role.from_outside and not name.startswith("controller.")):
            flops[role.part] += 2 * parameter.numel()
    config = model.config
    if config.tie_embeddings:
        flops["output head"] += 2 * config.vocab_size * config.d_model
    # scores and weighted values over half the context on average
    flops["attention"] += config.num_layers * 4 * config.d_model * config.context_length // 2
    return flops


def _cache_bytes(model: ModulatedTransformer) -> int:
    cache = Cache(capacity=2)
    with torch.device("meta"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache)
    return cache.nbytes // 2
