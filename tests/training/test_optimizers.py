"""Which parameters decay, how the learning rate moves, and that the optimisers' state survives a save."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from ncn.config.model import NCNConfig
from ncn.config.training import TrainConfig
from ncn.core.model import ModulatedTransformer
from ncn.training.optimizers import (
    build_adamw,
    build_optimizers,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    update,
)
from tiny import MODEL, recipe

WEIGHT_DECAY = 0.3


def model(**fields: Any) -> ModulatedTransformer:
    return ModulatedTransformer(NCNConfig.parse(MODEL | fields))


def facts(built: ModulatedTransformer, config: TrainConfig) -> dict[str, tuple[str, float, float]]:
    """For each parameter: its optimiser, its weight decay and its peak learning rate."""
    found = {}
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    for optimizer in build_optimizers(built, config):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                assert name not in found
                found[name] = (type(optimizer).__name__, group["weight_decay"], group["peak"])
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "learned", "qk_norm": True},
        {"tie_embeddings": False, "activation": "swiglu"},
        {"controller": {"kind": "static"}},
        {"controller": {"kind": "local"}},
        {"controller": None},
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_weights_of_linear_maps_decay(fields: dict[str, Any], optimizer: str) -> None:
    built = model(**fields)
    config = recipe(weight_decay=WEIGHT_DECAY, optimizer=optimizer).train
    found = facts(built, config)
    assert set(found) == {name for name, _ in built.named_parameters()}
    linear = {f"{name}.weight" for name, module in built.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, (_, decay, _) in found.items() if decay} == linear
    assert {decay for _, decay, _ in found.values()} == {0.0, WEIGHT_DECAY}


def test_what_must_not_decay_does_not() -> None:
    found = facts(model(positions="learned", qk_norm=True), recipe(weight_decay=WEIGHT_DECAY).train)
    undecayed = {name for name, (_, decay, _) in found.items() if not decay}
    assert {
        "embedding.weight",
        "position_embedding.weight",
        "norm.weight",
        "layers.0.attention_norm.weight",
        "layers.1.ffn_norm.weight",
        "layers.0.attention.query_norm.weight",
        "layers.0.attention.key_norm.weight",
        "controller.networks.0.log_decay",
        "controller.networks.0.phasic_filter",
        "controller.networks.0.input_norm.weight",
        "controller.networks.0.expand.bias",
        "controller.networks.0.output.bias",
    } <= undecayed
    static = facts(model(controller={"kind": "static"}), recipe(weight_decay=WEIGHT_DECAY).train)
    assert all(decay == 0 for name, (_, decay, _) in static.items() if name.startswith("controller."))


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else() -> None:
    config = recipe(optimizer="muon", muon_learning_rate=0.04, learning_rate=0.003, controller_learning_rate=2.0).train
    for name, (kind, _, peak) in facts(model(tie_embeddings=False), config).items():
        matrix = name.startswith("layers.") and name.endswith(
            ("qkv.weight", "output.weight", "up.weight", "down.weight")
        )
        assert kind == ("Muon" if matrix else "AdamW")
        assert peak == (0.04 if matrix else 0.006 if name.startswith("controller.") else 0.003)


def test_inputs_from_outside_learn_at_the_rate_of_embeddings_also_where_the_controller_is_slower() -> None:
    config = recipe(learning_rate=0.003, controller_learning_rate=0.5).train
    for name, (_, _, peak) in facts(model(controller={"sliders": ["calm"], "tasks": ["tell"]}), config).items():
        slow = name.startswith("controller.") and ".external." not in name
        assert peak == (0.0015 if slow else 0.003), name
    beside = facts(model(controller={"kind": "static", "sliders": ["calm"], "sliders_enter": "prefix"}), config)
    assert beside["slider_embedding.weight"] == ("AdamW", 0.0, 0.003)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_at_its_key_points(schedule: str) -> None:
    config = recipe(schedule=schedule, warmup=0.1, final_learning_rate=0.2).train
    factors = [learning_rate_factor(config, step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[4] == pytest.approx(5 / 11)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.6)  # half-way down, on either curve
    assert factors[100] == pytest.approx(0.2)
    quarter = 0.75 if schedule == "linear" else 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate_factor(config, 50, 210) == pytest.approx(0.2 + 0.8 * _remaining(schedule, 29 / 189))
    assert learning_rate_factor(recipe(schedule=schedule, warmup=0.0, final_learning_rate=0.0).train, 25, 100) == (
        pytest.approx(quarter)
    )
    assert all(before < after for before, after in itertools.pairwise(factors[:11]))
    assert all(before > after for before, after in itertools.pairwise(factors[10:]))


def _remaining(schedule: str, progress: float) -> float:
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    config = recipe(warmup=0.0, final_learning_rate=0.0).train
    assert learning_rate_factor(config, 0, 7) == 1.0
    assert learning_rate_factor(config, 0, 1) == 1.0
    assert learning_rate_factor(config, 7, 7) == pytest.approx(0.0)


def step(built: ModulatedTransformer, optimizers: list[Optimizer], seed: int) -> None:
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(seed))
    built.zero_grad()
    loss, _ = built.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_by_name_continues_exactly(optimizer: str) -> None:
    config = recipe(optimizer=optimizer).train
    first = model()
    first_optimizers = build_optimizers(first, config)
    for seed in range(3):
        step(first, first_optimizers, seed)

    second = model()
    second.load_state_dict(first.state_dict())
    second_optimizers = build_optimizers(second, config)
    state = {name: tensor.clone() for name, tensor in optimizer_state(first, first_optimizers).items()}
    load_optimizer_state(second, second_optimizers, state)
    for built, optimizers in ((first, first_optimizers), (second, second_optimizers)):
        step(built, optimizers, 3)

    expected = "optimizer.layers.0.ffn.up.weight/" + ("momentum_buffer" if optimizer == "muon" else "exp_avg")
    assert expected in state
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert optimizer_state(first, first_optimizers).keys() == state.keys()


def test_an_update_is_clipped_and_follows_the_peaks() -> None:
    one, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizers = [torch.optim.SGD([{"params": [one], "peak": 1.0}, {"params": [other], "peak": 10.0}], lr=7.0)]
    one.grad, other.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert update(optimizers, [one, other], clip=1.0, factor=0.5) == 5.0
    torch.testing.assert_close(one.data, torch.tensor([-0.5 * 0.6, 0.0]))
    torch.testing.assert_close(other.data, torch.tensor([0.0, -5.0 * 0.8]))
    assert one.grad is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_moves_nothing(bad: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([bad, 1.0])
    optimizer = build_adamw([{"params": [parameter]}], TrainConfig())
    assert not math.isfinite(update([optimizer], [parameter], clip=1.0, factor=1.0))
    assert parameter.tolist() == [1.0, 1.0]
