"""The model's interface: outputs, frozen signals, losses, refusals, and what the contracts take for granted."""

import math

import pytest
import torch
from torch.nn import functional as F

from contracts.variants import VOCABULARY, awake, config, text
from ncn.core.cache import Cache
from ncn.core.layers import Attention
from ncn.core.model import ModulatedTransformer
from ncn.core.parameters import parameter_groups
from ncn.core.signals.table import homeostatic_loss
from ncn.errors import UserError


def test_signals_come_on_request_only() -> None:
    model = ModulatedTransformer(config())
    plain, full = model(text(9)), model(text(9), output_signals=True)
    assert plain.signals is None
    assert plain.homeostatic_loss is None
    assert torch.equal(plain.logits, full.logits)
    assert full.homeostatic_loss == homeostatic_loss(full.signals) == 0


def test_without_a_controller_there_are_no_signals() -> None:
    out = ModulatedTransformer(config(None))(text(9), output_signals=True)
    assert out.signals == {}
    assert out.homeostatic_loss == 0


def test_the_last_position_alone() -> None:
    model = awake(config())
    out = model(text(9), last_only=True)
    assert out.logits.shape == (2, 1, VOCABULARY)


def test_frozen_signals_are_what_is_sent_and_what_is_reported() -> None:
    model, input_ids = awake(config({"taps": [0, 2]})), text(9)
    free = model(input_ids, output_signals=True)
    same = model(input_ids, output_signals=True, frozen=free.signals)
    torch.testing.assert_close(same.logits, free.logits, rtol=0, atol=0)
    layers = torch.tensor([0.5, 1.0, 1.5]).view(1, 1, 3)
    held = model(input_ids, output_signals=True, frozen={"gain": layers, "ffn_gate": torch.ones(1, 1, 1)})
    assert torch.equal(held.signals["gain"], layers.double().expand(2, 9, 3))
    assert (held.signals["ffn_gate"] == 1).all()
    assert not torch.equal(held.logits, free.logits)


def test_all_signals_frozen_to_neutral_is_the_model_without_a_controller() -> None:
    model, twin = awake(config()), ModulatedTransformer(config(None)).double()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if "controller." not in name})
    ones = {
        name: torch.ones(1, 1, 1, *signal.shape[3:])
        for name, signal in model(text(2), output_signals=True).signals.items()
    }
    torch.testing.assert_close(model(text(30), frozen=ones).logits, twin(text(30)).logits, rtol=0, atol=0)


def test_frozen_signals_have_gradients() -> None:
    model, value = awake(config()), torch.ones(1, 1, 3, dtype=torch.float64, requires_grad=True)
    model(text(9), frozen={"gain": value}).logits.square().sum().backward()
    assert (value.grad.abs() > 0).all()


def test_precision_against_a_manual_attention() -> None:
    attention = Attention(config(None, positions="learned"), 0).double()
    x, beta = torch.randn(1, 7, 16, dtype=torch.float64), torch.rand(1, 7, 2, dtype=torch.float64) * 3
    queries, keys, values = attention.qkv(x).view(1, 7, 3, 2, 8).unbind(2)
    scores = torch.einsum("bthd,bshd->bhts", queries, keys) / math.sqrt(8) * beta.transpose(1, 2)[..., None]
    shares = scores.masked_fill(torch.ones(7, 7).triu(1) > 0, -math.inf).softmax(-1)
    read = torch.einsum("bhts,bshd->bthd", shares, values).flatten(2)
    got = attention(x, beta[..., None], None, None, None, None)
    torch.testing.assert_close(got, read @ attention.output.weight.T, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_loss_is_the_cross_entropy_of_the_logits(chunk: int) -> None:
    model, input_ids = awake(config()), text(21)
    targets = input_ids.roll(-1, 1)
    targets[:, -1] = -100
    loss, signals = model.loss(input_ids, targets, chunk=chunk)
    out = model(input_ids, output_signals=True)
    expected = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert signals.keys() == out.signals.keys()
    by_token = model.token_losses(input_ids, targets)
    assert by_token.shape == (2, 21)
    assert (by_token[:, -1] == 0).all()
    assert by_token.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    got, wanted = (torch.autograd.grad(total, list(model.parameters())) for total in (loss, expected))
    for (name, _), one, other in zip(model.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)


def test_loss_in_bfloat16_is_close() -> None:
    model, input_ids = awake(config(qk_norm=True, activation="swiglu"), torch.float32), text(40)
    exact, _ = model.loss(input_ids[:, :-1], input_ids[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        rough, signals = model.loss(input_ids[:, :-1], input_ids[:, 1:])
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(signal.dtype == torch.float32 for signal in signals.values())


def test_recomputing_layers_changes_no_gradient() -> None:
    model, input_ids = awake(config({"taps": [0, 2]})), text(20)
    gradients = []
    for recompute in (False, True):
        model.checkpointing = recompute
        loss, _ = model.loss(input_ids, input_ids)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_equal_seeds_give_equal_backbones_whatever_the_controller() -> None:
    states = []
    for settings in (None, {}, {"kind": "local"}, {"kind": "static"}, {"taps": [0, 1], "hidden": 9}):
        torch.manual_seed(5)
        states.append(ModulatedTransformer(config(settings)).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_wider_block_begins_with_the_narrower_one(activation: str) -> None:
    states = []
    for controller, width in (({}, 40), ({"signals": ["gain"]}, 57)):
        torch.manual_seed(5)
        states.append(ModulatedTransformer(config(controller, d_ff=width, activation=activation)).state_dict())
    narrow, wide = states
    for name, value in narrow.items():
        other = wide[name]
        if name.endswith("ffn.up.weight"):
            parts = 2 if activation == "swiglu" else 1
            other = other.unflatten(0, (parts, 57))[:, :40].flatten(0, 1)
        elif name.endswith("ffn.down.weight"):
            other = other[:, :40]
        elif name.startswith("controller.") and other.shape != value.shape:  # the read-out of the signals
            continue
        assert torch.equal(other, value), name


def test_no_two_matrices_start_alike() -> None:
    model = ModulatedTransformer(config(None, d_model=32, num_heads=2, d_ff=96))
    corners = [p[:16, :32].flatten() for p in model.parameters() if p.ndim == 2]
    correlations = torch.corrcoef(torch.stack(corners)) - torch.eye(len(corners))
    assert correlations.abs().max() < 5 / 512**0.5  # five standard deviations of the correlation of 512 pairs


def test_models_made_one_after_the_other_differ() -> None:
    first, second = (ModulatedTransformer(config(None)).embedding.weight for _ in range(2))
    assert not torch.equal(first, second)


def test_initial_weights_have_the_configured_spread() -> None:
    model = ModulatedTransformer(config(d_model=64, d_ff=256, init_std=0.05))
    writers = 0.05 / math.sqrt(2 * 3)
    assert model.embedding.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert model.layers[1].attention.qkv.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert model.layers[1].attention.output.weight.std().item() == pytest.approx(writers, rel=0.1)
    assert model.layers[1].ffn.down.weight.std().item() == pytest.approx(writers, rel=0.1)
    assert (model.norm.weight == 1).all()


def test_rotary_positions_are_relative() -> None:
    model = awake(config({"phasic": False}))
    mask = torch.arange(20) >= torch.tensor([[0], [7]])
    input_ids = text(20)
    shifted = model(torch.cat([torch.ones(2, 5, dtype=torch.long), input_ids], 1), F.pad(mask, (5, 0))).logits[:, 5:]
    torch.testing.assert_close(shifted[mask], model(input_ids, mask).logits[mask], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_padding_that_comes_after_a_start_without_any(positions: str) -> None:
    """A second prompt of unequal length behind a first one: the shorter row is padded where the new tokens begin."""
    model, cache, input_ids = awake(config(cross_documents=False, positions=positions)), Cache(), text(20)
    model(input_ids[:, :8], cache=cache)
    mask = torch.arange(12) >= torch.tensor([[0], [4]])
    second = input_ids[:, 8:].clone()
    second[0, 0] = second[1, 4] = 0  # each row goes on with a new document
    logits = model(second, mask, cache=cache).logits
    torch.testing.assert_close(logits[0], model(second[:1]).logits[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logits[1, 4:], model(second[1:, 4:]).logits[0], rtol=1e-10, atol=1e-12)


def test_a_mask_of_ones_is_no_mask() -> None:
    for fields in ({}, {"cross_documents": False}):
        model, ones = awake(config(**fields)), torch.ones(2, 20, dtype=torch.bool)
        assert torch.equal(model(text(20), ones).logits, model(text(20)).logits)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 10**6])
def test_a_foreign_token_is_named(token: int) -> None:
    input_ids = text(9)
    input_ids[1, 3] = token
    with pytest.raises(UserError, match=f"token id {token} lies outside the vocabulary of {VOCABULARY}"):
        ModulatedTransformer(config())(input_ids)


def test_too_long_a_text_is_refused_and_the_cache_stays_as_it_was() -> None:
    model, cache = awake(config()), Cache()
    with pytest.raises(UserError, match="49 tokens do not fit into the model's context of 48"):
        model(torch.ones(1, 49, dtype=torch.long))
    model(text(40), cache=cache)
    with pytest.raises(UserError, match="49 tokens do not fit"):
        model(text(9), cache=cache)
    assert cache.length == 40
    assert model(text(8), cache=cache).logits.isfinite().all()


def test_separated_documents_need_token_ids() -> None:
    model = awake(config(cross_documents=False))
    with pytest.raises(UserError, match="input_ids"):
        model.hidden_states(model.embedding(text(9)))


def test_parameters_of_the_tied_head_are_counted_once() -> None:
    tied, untied = (parameter_groups(ModulatedTransformer(config(tie_embeddings=tie))) for tie in (True, False))
    assert tied["output head"] == 0
    assert untied["output head"] == untied["embedding"] == tied["embedding"] == VOCABULARY * 16


@pytest.mark.parametrize("row", [[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0]])
def test_padding_between_tokens_is_refused(row: list[int]) -> None:
    model = ModulatedTransformer(config())
    with pytest.raises(UserError, match="padding between tokens"):
        model(text(4), torch.tensor([row, [1, 1, 1, 1]]).bool())


def test_no_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        ModulatedTransformer(config())(torch.zeros(1, 0, dtype=torch.long))


def test_a_cache_belongs_to_its_batch() -> None:
    model, cache = ModulatedTransformer(config()), Cache()
    model(text(4), cache=cache)
    with pytest.raises(UserError, match=r"holds 2 sequences and is continued with 1"):
        model(text(4)[:1], cache=cache)


def test_token_losses_sum_to_the_loss() -> None:
    model = awake(config()).double()
    inputs, targets = text(9)[:, :-1], text(9)[:, 1:].clone()
    targets[0, 3] = -100
    losses = model.token_losses(inputs, targets)
    assert losses[0, 3] == 0
    assert not losses.requires_grad
    torch.testing.assert_close(losses.sum(), model.loss(inputs, targets)[0].detach(), rtol=1e-12, atol=0)
