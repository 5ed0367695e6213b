"""Where signals come from: taps, what a controller can tell apart, its start, and its bookkeeping in a cache."""

from typing import Any

import pytest
import torch

from contracts.variants import SEPARATOR, awake, config, text
from ncn.core.cache import Cache
from ncn.core.controller.controller import Controller, LocalGates, SignalSource, StaticGates, signal_source
from ncn.core.model import ModulatedTransformer


def signals(model: ModulatedTransformer, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(input_ids, output_signals=True).signals


@pytest.mark.parametrize(
    ("kind", "source", "taps"),
    [("ncn", Controller, (0, 2)), ("local", LocalGates, (0, 1, 2)), ("static", StaticGates, (0,))],
)
def test_kinds(kind: str, source: type[SignalSource], taps: tuple[int, ...]) -> None:
    built = signal_source(config({"kind": kind, "taps": [0, 2]}))
    assert isinstance(built, source)
    assert built.taps == taps


def test_a_tap_at_every_layer_is_the_same_as_naming_them() -> None:
    ruled, named = (awake(config({"taps": taps})) for taps in ("every", [0, 1, 2]))
    named.load_state_dict(ruled.state_dict())
    assert ruled.controller.taps == (0, 1, 2)
    one, other = signals(ruled, text(12)), signals(named, text(12))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_controller() -> None:
    assert signal_source(config(None)) is None


def test_signals_of_a_tap_do_not_see_the_layers_below_it_unless_it_is_deeper() -> None:
    input_ids = text(12)
    for taps, pooling, moved in (
        ([0], "every", []),
        ([0, 2], "every", [2]),
        ("every", "every", [2]),
        ("every", "first", [2]),
    ):
        model = awake(config({"taps": taps, "pooling": pooling}))
        before = signals(model, input_ids)["gain"]
        with torch.no_grad():
            model.layers[1].ffn.down.weight.add_(1)
        changed = (signals(model, input_ids)["gain"] != before).any(1).any(0)
        assert changed.nonzero().flatten().tolist() == moved


def test_a_tap_serves_up_to_the_next() -> None:
    model = awake(config({"taps": [0, 2]}))
    before = signals(model, text(12))["gain"]
    with torch.no_grad():
        model.controller.networks["2"].output.bias.add_(1)
    changed = (signals(model, text(12))["gain"] != before).any(1).any(0)
    assert changed.tolist() == [False, False, True]


def test_static_signals_are_the_same_for_every_token_and_local_ones_are_not() -> None:
    for kind, varies in (("static", False), ("local", True), ("ncn", True)):
        for signal in signals(awake(config({"kind": kind})), text(12)).values():
            assert (signal.flatten(0, 1).std(0) > 1e-6).all() == varies
            assert not torch.equal(signal[:, :, 0], signal[:, :, 1])


def test_word_order_is_seen_at_the_last_token() -> None:
    """As in "the dog chased the cat" and "the cat chased the dog", but with the same last word."""
    one, other = torch.tensor([[3, 4, 5, 3, 6, 7]]), torch.tensor([[3, 6, 5, 3, 4, 7]])
    model = awake(config())
    for name, signal in signals(model, one).items():
        assert (signal[:, -1] - signals(model, other)[name][:, -1]).abs().max() > 1e-3, name


def test_a_controller_without_decay_scores_and_phasic_sees_a_bag_of_words() -> None:
    one, other = torch.tensor([[3, 4, 5, 3, 6, 7]]), torch.tensor([[3, 6, 5, 3, 4, 7]])
    model = awake(config({"phasic": False}))
    with torch.no_grad():
        model.controller.networks["0"].log_decay.fill_(-torch.inf)
    for name, signal in signals(model, one).items():
        torch.testing.assert_close(signal[:, -1], signals(model, other)[name][:, -1], rtol=1e-12, atol=0)


def test_the_phasic_filter_sees_exactly_its_kernel() -> None:
    model = awake(config({"phasic_kernel": 3}))
    network = model.controller.networks["0"]
    with torch.no_grad():  # salience of the last token alone
        network.log_decay.fill_(20)
    input_ids = text(20, rows=1).clamp(min=1)
    before = signals(model, input_ids)["gain"]
    changed = input_ids.clone()
    changed[0, 8] = changed[0, 8] % 20 + 1
    moved = (signals(model, changed)["gain"] != before).any(2)[0]
    assert moved.nonzero().flatten().tolist() == [8, 9, 10]


def test_memories_span_the_context_and_shrink_to_four_tokens() -> None:
    for pools in (1, 2, 4):
        built = signal_source(config({"pooling_heads": pools}, context_length=256))
        built.reset_parameters()
        memories = 1 / built.networks["0"].log_decay.exp()
        assert memories[0].item() == pytest.approx(256, rel=1e-5)
        assert pools == 1 or memories[-1].item() == pytest.approx(4, rel=1e-5)
        assert (memories.diff() < 0).all()


@pytest.mark.parametrize("kind", ["ncn", "local", "static"])
def test_reset_forgets_everything_learned(kind: str) -> None:
    settings: dict[str, Any] = {"kind": kind}
    model = awake(config(settings))
    fresh = {name: torch.zeros_like(value) for name, value in model.controller.state_dict().items()}
    for seed_run in range(2):
        torch.manual_seed(3)
        model.controller.reset_parameters()
        state = {name: value.clone() for name, value in model.controller.state_dict().items()}
        if seed_run:
            assert all(torch.equal(state[name], fresh[name]) for name in state)
        fresh = state
        with torch.no_grad():
            for parameter in model.controller.parameters():
                parameter.add_(1)


def test_the_cache_holds_a_small_state_for_every_slot() -> None:
    model, cache = awake(config({"taps": [0, 2]})), Cache()
    model(text(20), cache=cache)
    for tap in (0, 2):
        network = model.controller.networks[str(tap)]
        # log-denominators, pooled means, and the input of the short convolution
        assert cache.last(f"tap{tap}", 99).shape == (2, 20, network.pools + 2 * network.width)


def test_taps_that_do_not_pool_share_the_first_one_s_context_and_hold_their_local_state_alone() -> None:
    model, cache = awake(config({"taps": [0, 2], "pooling": "first"})), Cache()
    first, last = (model.controller.networks[tap] for tap in "02")
    assert (first.read.out_features, last.read.out_features) == (2 + 8 + 8, 8)
    model(text(20), cache=cache)
    assert cache.last("tap2", 99).shape == (2, 20, last.width)
    before = signals(model, text(20))["gain"]
    with torch.no_grad():
        first.log_decay.add_(1)
    changed = (signals(model, text(20))["gain"] != before).any(0)
    assert changed[0].tolist() == [False] * 3  # one token is its own mean, however fast a memory fades
    assert changed[1:].all(0).tolist() == [True] * 3


def test_documents_reset_the_signals() -> None:
    model = awake(config(cross_documents=False))
    document = torch.tensor([[SEPARATOR, 5, 9, 4]])
    twice = signals(model, torch.cat([document, document], 1))
    for name, signal in twice.items():
        torch.testing.assert_close(signal[:, 4:], signal[:, :4], rtol=1e-11, atol=1e-13, msg=name)
