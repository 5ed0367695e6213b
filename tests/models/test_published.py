"""The published architecture: its own numbers to 1e-9, its modes, and its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ncn.errors import UserError
from ncn.models import published
from ncn.models.published import NonCausalWarning, PublishedNCN

FIXTURE = Path(__file__).parents[1] / "fixtures" / "published_ncn_small.safetensors"
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    with safe_open(FIXTURE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    with safe_open(FIXTURE, "pt") as file:
        return json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def parameters(tensors) -> dict[str, Tensor]:
    return {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}


@pytest.fixture
def old(parameters, config) -> PublishedNCN:
    return published.load(parameters, config)


def whole(model: PublishedNCN, input_ids: Tensor) -> published.PublishedOutput:
    with pytest.warns(NonCausalWarning, match="not causal"):
        return model(input_ids)


def one_at_a_time(model: PublishedNCN, input_ids: Tensor) -> dict[str, Tensor]:
    past, logits, signals = model.start(len(input_ids)), [], []
    for next_ids in input_ids.split(1, dim=1):
        out = model(next_ids, past=past)
        past = out.past
        logits.append(out.logits)
        signals.append(out.signals)
    joined = {f"signal.{name}": torch.cat([step[name] for step in signals], dim=1) for name in signals[0]}
    return {"logits": torch.cat(logits, dim=1), **joined}


def named(out: published.PublishedOutput) -> dict[str, Tensor]:
    return {"logits": out.logits, **{f"signal.{name}": signal for name, signal in out.signals.items()}}


def distance(got: dict[str, Tensor], tensors: dict[str, Tensor], mode: str) -> float:
    assert got.keys() == {"logits", "signal.gain", "signal.precision", "signal.ffn_gate"}
    assert all(value.shape == tensors[f"{mode}.{name}"].shape for name, value in got.items())
    return max((value - tensors[f"{mode}.{name}"]).abs().max().item() for name, value in got.items())


def test_whole_sequence_is_the_published_one(old, tensors):
    out = whole(old, tensors["input_ids"])
    assert distance(named(out), tensors, "full") < TOLERANCE
    assert abs(out.homeostatic_loss.item() - tensors["full.homeostatic_loss"].item()) < TOLERANCE
    # The fixture's loss went through float32, and to that precision it is the same number.
    assert out.homeostatic_loss.float() == tensors["full.homeostatic_loss"].float()


def test_stepwise_is_the_published_one(old, tensors):
    assert distance(one_at_a_time(old, tensors["input_ids"]), tensors, "stepwise") < TOLERANCE


def test_stepwise_in_one_call_or_in_uneven_ones_is_the_same(old, tensors):
    input_ids = tensors["input_ids"]
    at_once = old(input_ids, past=old.start(2))
    assert distance(named(at_once), tensors, "stepwise") < TOLERANCE
    first = old(input_ids[:, :5], past=old.start(2))
    rest = old(input_ids[:, 5:], past=first.past)
    torch.testing.assert_close(rest.logits, at_once.logits[:, 5:], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(rest.past.keys, at_once.past.keys, rtol=0, atol=TOLERANCE)


def test_a_first_call_with_one_token_is_stepwise_and_silent(old, tensors):
    first = old(tensors["input_ids"][:, :1])
    second = old(tensors["input_ids"][:, 1:2], past=first.past)
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits, tensors["stepwise.logits"][:, :2], rtol=0, atol=TOLERANCE)


def test_stepping_on_after_a_whole_prompt(old, tensors):
    """The prompt's keys come from the whole-sequence mode, the new token's signals from itself alone."""
    input_ids = tensors["input_ids"]
    prompt = whole(old, input_ids[:, :10])
    out = old(input_ids[:, 10:11], past=prompt.past)
    assert prompt.past.length == 10
    assert out.past.length == 11
    for name, signal in out.signals.items():
        torch.testing.assert_close(signal, tensors[f"stepwise.signal.{name}"][:, 10:11], rtol=0, atol=TOLERANCE)
    assert (out.logits - tensors["stepwise.logits"][:, 10:11]).abs().max() > 1e-3
    again = old(input_ids[:, 10:11], past=prompt.past)
    assert torch.equal(again.logits, out.logits), "a step changed the past that it was given"


def test_homeostatic_loss_of_a_step_is_over_its_own_tokens(old, config, tensors):
    out = old(tensors["input_ids"][:, :1])
    expected = sum(((tensors[f"stepwise.signal.{name}"][:, :1] - 1) ** 2).mean() for name in out.signals)
    assert out.homeostatic_loss.item() == pytest.approx(config["homeostatic_lambda"] * expected.item(), abs=TOLERANCE)


def test_only_the_stepwise_mode_is_causal(old, tensors):
    input_ids = tensors["input_ids"]
    changed = input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 97
    before, after = whole(old, input_ids), old(changed)
    assert (before.logits - after.logits)[:, 0].abs().max() > 1e-4
    before, after = old(input_ids, past=old.start(2)), old(changed, past=old.start(2))
    torch.testing.assert_close(before.logits[:, :-1], after.logits[:, :-1], rtol=0, atol=1e-12)
    assert (before.logits - after.logits)[:, -1].abs().max() > 1e-4


def test_each_model_announces_the_non_causal_mode_once(old, parameters, config, tensors):
    whole(old, tensors["input_ids"])
    old(tensors["input_ids"])  # a second warning would be an error here
    whole(published.load(parameters, config), tensors["input_ids"])


def permute_signals(model: PublishedNCN) -> None:
    layer2 = model.ncn.layer2
    layer2.weight.data = layer2.weight.unflatten(0, (-1, 3)).roll(1, dims=1).flatten(0, 1)
    layer2.bias.data = layer2.bias.unflatten(0, (-1, 3)).roll(1, dims=1).flatten(0, 1)


def signals_before_layers(model: PublishedNCN) -> None:
    layer2 = model.ncn.layer2
    layer2.weight.data = layer2.weight.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    layer2.bias.data = layer2.bias.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)


def without(name: str):
    """The layers get `name` at 1, while the output still reports it."""

    def mutate(model: PublishedNCN) -> None:
        def set_to_one(module: Any, args: Any, kwargs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
            return args, {**kwargs, name: torch.ones_like(kwargs[name])}

        for layer in model.transformer_layers:
            layer.register_forward_pre_hook(set_to_one, with_kwargs=True)

    return mutate


def approximate_gelu(model: PublishedNCN) -> None:
    for layer in model.transformer_layers:
        layer.feed_forward.gelu.approximate = "tanh"


def other_norm_epsilon(model: PublishedNCN) -> None:
    for layer in model.transformer_layers:
        layer.norm1.eps = 1e-6


MUTANTS = {
    "signals permuted": permute_signals,
    "signals before layers": signals_before_layers,
    "no gain": without("gain"),
    "no precision": without("precision"),
    "no gate": without("ffn_gate"),
    "tanh GELU": approximate_gelu,
    "another epsilon": other_norm_epsilon,
}


@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS.keys())
def test_the_tolerance_tells_mutants_apart(old, tensors, mutate):
    mutate(old)
    assert distance(named(whole(old, tensors["input_ids"])), tensors, "full") > 100 * TOLERANCE
    assert distance(one_at_a_time(old, tensors["input_ids"]), tensors, "stepwise") > 100 * TOLERANCE


def test_it_cannot_be_trained(old, tensors):
    with pytest.raises(UserError, match="cannot be trained"):
        old.train()
    with pytest.raises(UserError, match="has no gradients"):
        old.requires_grad_()
    assert old.eval() is old
    assert not any(module.training for module in old.modules())
    assert not any(parameter.requires_grad for parameter in old.parameters())
    for parameter in old.parameters():
        parameter.requires_grad_()
    assert not old(tensors["input_ids"][:, :1]).logits.requires_grad


def test_load_takes_prefixed_names_and_a_copy_of_the_tied_head(parameters, config, tensors):
    tied = {**parameters, "embedding.weight": parameters["output_head.weight"].clone()}
    for state_dict in (tensors, tied):
        loaded = published.load(state_dict, config).state_dict()
        assert loaded.keys() == parameters.keys()
        assert all(torch.equal(loaded[name], parameters[name]) for name in parameters)


def test_load_copies_and_keeps_the_dtype(parameters, config):
    single = {name: value.float() for name, value in parameters.items()}
    model = published.load(single, config)
    single["output_head.weight"].zero_()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.output_head.weight, parameters["output_head.weight"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_norm.weight": None}, r"lacks final_norm\.weight; "),
        ({"extra.weight": torch.ones(3)}, r"the unexpected extra\.weight; "),
        ({"step": torch.ones(97, 32, dtype=torch.int64)}, "the unexpected step; "),
        ({"final_norm.weight": torch.ones(31)}, r"final_norm\.weight has shape \(31,\), but .* \(32,\); "),
        ({"epoch": 3}, r"'epoch', which is not a tensor; "),
    ],
)
def test_bad_parameters_in_one_line(parameters, config, change, message):
    changed = {name: value for name, value in {**parameters, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message) as error:
        published.load(changed, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nhead": None}, r"nhead: Field required \(its keys are vocab_size, "),
        ({"n_head": 4}, "n_head: Extra inputs are not permitted "),
        ({"d_model": "32"}, "d_model: Input should be a valid integer"),
        ({"ncn_hidden_dim": 0}, "ncn_hidden_dim: Input should be greater than 0"),
        ({"nhead": 5}, "d_model 32 does not divide into nhead 5; "),
        ({"ncn_heads": 3}, "d_model 32 does not divide into ncn_heads 3; "),
        ({"tie_weights": False}, "tie_weights is false"),
        ({"num_layers": 4}, "lacks transformer_layers.3.* and 7 more; "),
        ({"num_layers": 2}, "unexpected transformer_layers.2.* and 7 more; "),
        ({"vocab_size": 98}, r"output_head\.weight has shape \(97, 32\), but the config asks for \(98, 32\); "),
    ],
)
def test_bad_config_in_one_line(parameters, config, change, message):
    changed = {name: value for name, value in {**config, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message) as error:
        published.load(parameters, changed)
    assert "\n" not in str(error.value)


def test_bad_inputs_in_one_line(old, parameters, config):
    with pytest.raises(UserError, match="0 past \\+ 49 new tokens exceed 48 positions"):
        old(torch.zeros(1, 49, dtype=torch.int64))
    full = old(torch.zeros(1, 48, dtype=torch.int64), past=old.start()).past
    with pytest.raises(UserError, match="48 past \\+ 1 new tokens"):
        old(torch.zeros(1, 1, dtype=torch.int64), past=full)
    for wrong in (97, -1):
        with pytest.raises(UserError, match=f"token id {wrong} is outside 0 to 96"):
            old(torch.tensor([[3, wrong]]))
    with pytest.raises(UserError, match="hold no token"):
        old(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(UserError, match="past holds 1 sequences but input_ids 2"):
        old(torch.zeros(2, 1, dtype=torch.int64), past=old.start(1))
    single = published.load({name: value.float() for name, value in parameters.items()}, config)
    with pytest.raises(UserError, match="another shape or dtype"):
        old(torch.zeros(1, 1, dtype=torch.int64), past=single.start())
