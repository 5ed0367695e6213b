"""What `ncn info` says about a model agrees with the model."""

from typing import Any, Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ncn.config.model import NCNConfig
from ncn.config.presets import presets
from ncn.config.training import TrainConfig
from ncn.core.cache import Cache
from ncn.core.costs import costs
from ncn.core.model import ModulatedTransformer
from ncn.training.optimizers import build_optimizers, optimizer_state
from tiny import MODEL

VARIANTS: list[dict[str, Any]] = [
    {},
    {"controller": None},
    {"controller": {"kind": "local"}},
    {"controller": {"kind": "static"}},
    {"controller": {"taps": [0, 1], "width": 8, "hidden": 8, "pooling_heads": 2, "phasic": False}},
    {"positions": "learned", "activation": "swiglu", "qk_norm": True, "num_kv_heads": 1, "tie_embeddings": False},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_the_parts_add_up_to_the_model(fields: dict[str, Any]) -> None:
    config = NCNConfig.parse(MODEL | fields)
    found, model = costs(config), ModulatedTransformer(config)
    stored = list(model.parameters())
    assert found.total_parameters == sum(parameter.numel() for parameter in stored)
    assert found.weight_bytes == sum(parameter.nbytes for parameter in stored)
    controller = [] if model.controller is None else list(model.controller.parameters())
    assert found.parameters["controller"] == sum(parameter.numel() for parameter in controller)
    assert found.parameters["embedding"] == sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding)
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("fields", VARIANTS)
def test_optimizer_bytes_are_those_of_its_state(fields: dict[str, Any], optimizer: Literal["adamw", "muon"]) -> None:
    config = NCNConfig.parse(MODEL | fields)
    model = ModulatedTransformer(config)
    optimizers = build_optimizers(model, TrainConfig(optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for each in optimizers:
        each.step()
    state = optimizer_state(model, optimizers)
    assert costs(config, optimizer).optimizer_bytes == sum(
        tensor.nbytes for name, tensor in state.items() if not name.endswith("/step")
    )


@pytest.mark.parametrize("fields", VARIANTS)
def test_flops_are_those_of_a_forward_pass(fields: dict[str, Any]) -> None:
    config = NCNConfig.parse(MODEL | {"d_model": 64, "num_heads": 4, "context_length": 128} | fields)
    model = ModulatedTransformer(config)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know the fused kernel
        model(torch.randint(300, (1, 128)))
    # The counter counts attention over the whole square; half of it lies in the future.
    future = config.num_layers * 4 * config.d_model * 128 // 2
    counted = counter.get_total_flops() / 128 - future
    assert sum(costs(config).flops.values()) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("fields", VARIANTS)
def test_cache_bytes_are_those_of_a_cache(fields: dict[str, Any]) -> None:
    config = NCNConfig.parse(MODEL | fields)
    cache = Cache(capacity=32)
    with torch.no_grad():
        ModulatedTransformer(config)(torch.randint(300, (1, 24)), cache=cache)
    assert costs(config).cache_bytes_per_token * 24 == cache.nbytes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mini", 1.1e6), ("published-18m", 18.0e6), ("100m", 100e6), ("350m", 350e6), ("1b", 1e9)],
)
def test_presets_hold_what_they_promise(name: str, parameters: float) -> None:
    if name not in presets():
        pytest.skip(f"there is no preset {name} yet")
    found = costs(NCNConfig.preset(name))
    assert found.total_parameters == pytest.approx(parameters, rel=0.2)
    assert found.controller_share <= (0.1 if name == "mini" else 0.02)
