"""Models whose controllers have a known nature, for tests that ask what a controller knows."""

from typing import Any

import numpy as np
import torch

from ncn.config.model import NCNConfig
from ncn.core.controller.controller import ControllerNetwork, LocalGates, StaticGates
from ncn.core.model import ModulatedTransformer
from tiny import MODEL

VOCABULARY, CONTEXT = 60, 40


def language(documents: int = 60, seed: int = 0) -> list[list[int]]:
    """Documents of a random language in which the next token depends on the two before it."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(1).integers(1, VOCABULARY, (VOCABULARY, VOCABULARY, 4))
    found = []
    for _ in range(documents):
        ids = [0, int(rng.integers(1, VOCABULARY))]
        while len(ids) < CONTEXT:
            ids.append(int(table[ids[-1], ids[-2], rng.integers(4)]))
        found.append(ids)
    return found


def build(kind: str = "ncn", **controller: Any) -> ModulatedTransformer:
    """A random model whose layers write much, so that what a signal does to them shows in the loss."""
    config = {
        **MODEL, "vocab_size": VOCABULARY, "context_length": CONTEXT, "tie_embeddings": False, "positions": "learned",
        "controller": {"width": 8, "hidden": 16, "pooling_heads": 2, "kind": kind, **controller},
    }  # fmt: skip
    model = ModulatedTransformer(NCNConfig.parse(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("controller.") and parameter.ndim == 2:
                parameter.normal_(std=0.4)
    return model


def networks(model: ModulatedTransformer) -> list[ControllerNetwork]:
    found = [module for module in model.modules() if isinstance(module, ControllerNetwork)]
    with torch.no_grad():
        for network in found:
            network.output.weight.normal_(std=0.5)
    return found


def frozen_at_neutral() -> ModulatedTransformer:
    return build()  # before training every signal is neutral


def constant() -> ModulatedTransformer:
    model = build("static")
    assert isinstance(model.controller, StaticGates)
    with torch.no_grad():
        model.controller.raw.normal_(std=0.7)
    return model


def knows_the_token() -> ModulatedTransformer:
    """Sees the newest token's embedding and nothing else: one tap in front of everything, no pooled context."""
    model = build(phasic_kernel=1)
    (network,) = networks(model)
    with torch.no_grad():
        network.read.weight[network.pools : network.pools + network.width] = 0
    return model


def knows_the_position() -> ModulatedTransformer:
    """Its second tap reads the half of the residual stream that holds nothing but positions; the first is silent."""
    model = build(taps=(0, 1), phasic_kernel=1)
    first, second = networks(model)
    half = model.config.d_model // 2
    assert model.position_embedding is not None
    with torch.no_grad():
        first.output.weight.zero_()
        model.layers[0].attention.output.weight.zero_()
        model.layers[0].ffn.down.weight.zero_()
        model.embedding.weight[:, half:] = 0
        model.position_embedding.weight[:, :half] = 0
        for table in (model.embedding.weight, model.position_embedding.weight):  # else the norm would tell the token
            table /= table.norm(dim=1, keepdim=True)
        second.read.weight[:, :half] = 0
        second.read.weight[second.pools : second.pools + second.width] = 0
        second.read.weight *= 3
    return model


def reads_the_context() -> ModulatedTransformer:
    model = build(phasic_kernel=4)
    networks(model)
    return model


def local() -> ModulatedTransformer:
    model = build("local")
    assert isinstance(model.controller, LocalGates)
    with torch.no_grad():
        for parameter in model.controller.parameters():
            parameter.normal_(std=0.5)
    return model
