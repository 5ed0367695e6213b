"""Every contract on every variant."""

import pytest
import torch

from contracts import properties
from contracts.variants import SEPARATOR, VOCABULARY, awake, text, variants
from ncn.config.model import NCNConfig
from ncn.config.presets import presets
from ncn.core.model import ModulatedTransformer
from ncn.core.parameters import parameter_groups

BORDERS = (0, 5, 14, 15, 16, 17, 31, 32)
"""Positions around the borders of documents and of the chunks of the salience pooling."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_later_tokens_change_nothing(variant: NCNConfig, dtype: torch.dtype) -> None:
    model = awake(variant, dtype)
    with torch.no_grad():
        properties.later_tokens_change_nothing(lambda ids: model(ids).logits, text(40), BORDERS)


def test_later_embeddings_have_no_gradient(variant: NCNConfig) -> None:
    model, input_ids = awake(variant), text(36)
    properties.later_embeddings_have_no_gradient(
        lambda embeddings: model.hidden_states(embeddings, input_ids)[0], model.embedding(input_ids), BORDERS
    )


@pytest.mark.parametrize("cuts", [(16,), (1, 2, 18, 35), tuple(range(1, 40))], ids=["in two", "uneven", "one by one"])
def test_pieces_equal_the_whole(variant: NCNConfig, cuts: tuple[int, ...]) -> None:
    properties.pieces_equal_the_whole(awake(variant), text(40), cuts)


@pytest.mark.parametrize("cuts", [(19,), (2, 9, 20, 21)], ids=["in two", "uneven"])
def test_padding_on_the_left_changes_nothing(variant: NCNConfig, cuts: tuple[int, ...]) -> None:
    properties.padding_on_the_left_changes_nothing(awake(variant), text(36), (0, 11), cuts)


def test_padding_may_hold_any_token(variant: NCNConfig) -> None:
    model, input_ids = awake(variant), text(36)
    mask = torch.arange(36) >= torch.tensor([[3], [11]])
    with torch.no_grad():
        logits = [model(torch.where(mask, input_ids, filler), mask).logits[mask] for filler in (SEPARATOR, 9)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("cut", [5, 17])
def test_beams_keep_their_pasts(variant: NCNConfig, cut: int) -> None:
    properties.beams_keep_their_pasts(awake(variant), text(26), cut)


def test_a_cropped_cache_forgets(variant: NCNConfig) -> None:
    properties.a_cropped_cache_forgets(awake(variant), text(36), (1, 7, 16, 17, 34))


def test_starts_neutral(variant: NCNConfig) -> None:
    if variant.controller is None:
        pytest.skip("there is no controller")
    if variant.controller.maps == "published":
        model = ModulatedTransformer(variant)
        for name, signal in model(text(20), output_signals=True).signals.items():
            assert (signal - (0.9525741 if name == "ffn_gate" else 1)).abs().max() < 1e-6, name
    else:
        properties.starts_neutral(variant, text(40))


def test_every_signal_acts(variant: NCNConfig) -> None:
    if variant.controller is None:
        pytest.skip("there is no controller")
    properties.every_signal_acts(awake(variant), text(20))


def test_every_signal_learns(variant: NCNConfig) -> None:
    if variant.controller is None:
        pytest.skip("there is no controller")
    properties.every_signal_learns(awake(variant), text(20))
    properties.every_signal_learns(ModulatedTransformer(variant).double(), text(20))


def test_precision_is_inverse_temperature(variant: NCNConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant.controller is None or "precision" not in variant.controller.signals:
        pytest.skip("there is no precision")
    properties.precision_is_inverse_temperature(awake(variant), torch.randint(1, VOCABULARY, (2, 12)), monkeypatch)


def test_equals_the_equations(variant: NCNConfig) -> None:
    properties.equals_the_equations(awake(variant), text(18, rows=1))


@pytest.mark.parametrize("name", ["default", "documents, deeper taps, all options", "documents, published"])
def test_equals_the_equations_beside_padding(name: str) -> None:
    mask = torch.arange(12) >= torch.tensor([[0], [3]])
    properties.equals_the_equations(awake(variants[name]), text(12), mask)


@pytest.mark.parametrize("size", [3, 16, 17])
def test_documents(variant: NCNConfig, size: int) -> None:
    first, second = text(40)[:, :size], torch.randint(1, VOCABULARY, (2, 20))
    second[:, 0] = SEPARATOR
    if variant.cross_documents:
        properties.documents_see_each_other(awake(variant), first, second)
    else:
        properties.documents_are_apart(awake(variant), first, second)


def test_shapes_of_the_signals(variant: NCNConfig) -> None:
    out = ModulatedTransformer(variant)(text(9), output_signals=True)
    controller, layers = variant.controller, variant.num_layers
    sites = {"gain": (), "precision": (), "ffn_gate": (), "head_gate": (variant.num_heads,), "residual_mix": ()}
    if controller and controller.precision_per == "head":
        sites["precision"] = (variant.num_heads,)
    if controller and controller.gain_per == "sublayer":
        sites["gain"] = (2,)
    if controller:
        sites["norm_film"] = (2 * controller.film_groups,)
    expected = {name: (2, 9, layers, *sites[name]) for name in (controller.signals if controller else ())}
    assert {name: tuple(signal.shape) for name, signal in out.signals.items()} == expected
    assert list(out.signals) == list(expected)
    assert out.logits.shape == (2, 9, VOCABULARY)
    assert out.homeostatic_loss.shape == ()


def test_parameter_groups_add_up(variant: NCNConfig) -> None:
    model = ModulatedTransformer(variant)
    groups = parameter_groups(model)
    assert sum(groups.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert (groups["controller"] > 0) == (variant.controller is not None)
    assert groups["embedding"] == sum(p.numel() for n, p in model.named_parameters() if "embedding" in n)
    assert (groups["output head"] > 0) == (not variant.tie_embeddings)


@pytest.mark.parametrize("name", presets())
def test_presets_build_without_memory(name: str) -> None:
    config = NCNConfig.preset(name)
    with torch.device("meta"):
        model = ModulatedTransformer(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    groups = parameter_groups(model)
    width, layers = config.d_model, config.num_layers
    queries_keys_values = (config.num_heads + 2 * config.kv_heads) * config.head_dim
    norms = 2 * config.head_dim if config.qk_norm else 0
    assert groups["attention"] == layers * (width * queries_keys_values + width * width)
    assert groups["norms"] == layers * (2 * width + norms) + width
    matrices = 3 if config.activation == "swiglu" else 2
    assert groups["feed-forward"] == layers * matrices * width * config.ffn_width
    positions = config.context_length if config.positions == "learned" else 0
    assert groups["embedding"] == (config.vocab_size + positions) * width
    total = sum(groups.values())
    assert total == sum(parameter.numel() for parameter in model.parameters())
    if name not in ("mini", "steering-mini"):
        assert groups["controller"] <= 0.02 * total
