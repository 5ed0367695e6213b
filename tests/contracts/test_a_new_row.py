"""A signal that multiplies where others do is one row of the table, and nothing else."""

from dataclasses import replace

import pytest
import torch

import ncn
from contracts import properties
from contracts.variants import awake, config, text
from ncn.config.model import ControllerConfig, NCNConfig
from ncn.config.signals import SIGNALS, SignalSpec
from retrofits import base, ids, wake

OTHERS = ("gain", "head_gate")
"""Signals at the same sites."""
LIKE_GAIN = replace(SIGNALS["gain"], name="echo", symbol="ε", meaning="a row of this test", per="layer")
ROWS = {
    "a scalar at both outputs": LIKE_GAIN,
    "one for each output": replace(LIKE_GAIN, per="sublayer"),
    "heads": replace(LIKE_GAIN, sites=("query", "head"), per="head"),
    "a scalar at sites with parts": replace(LIKE_GAIN, sites=("query", "ffn_norm", "ffn")),
    "groups of one norm": replace(LIKE_GAIN, sites=("ffn_norm",), per="group"),
    "added to the residual stream": replace(SIGNALS["residual_mix"], name="echo"),
}
# The names in a configuration are checked against the table as it was when the package was loaded.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


@pytest.fixture(params=ROWS.values(), ids=ROWS)
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SignalSpec:
    monkeypatch.setitem(SIGNALS, "echo", request.param)
    return request.param


def with_the_row(controller: ControllerConfig) -> ControllerConfig:
    return controller.model_copy(update={"signals": (*OTHERS, "echo")})


@pytest.fixture
def new(row: SignalSpec) -> NCNConfig:
    made = config({"film_groups": 4})
    return made.model_copy(update={"controller": with_the_row(made.controller)})


def test_it_starts_neutral(new: NCNConfig) -> None:
    properties.starts_neutral(new, text(20))


def test_it_acts_and_learns(new: NCNConfig) -> None:
    model, input_ids = awake(new), text(20)
    properties.every_signal_acts(model, input_ids)
    properties.every_signal_learns(model, input_ids)


def test_it_is_causal_and_cached(new: NCNConfig) -> None:
    model, input_ids = awake(new), text(24)
    with torch.no_grad():
        properties.later_tokens_change_nothing(lambda ids: model(ids).logits, input_ids, (7, 16))
    properties.pieces_equal_the_whole(model, input_ids, (5, 17))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("row", ["a scalar at both outputs", "one for each output", "heads"])
def test_it_acts_on_a_base(name: str, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "echo", ROWS[row])
    model, input_ids = base(name), ids()
    before = model(input_ids).logits
    handle = ncn.attach(model, with_the_row(ControllerConfig(width=8, hidden=8, pooling_heads=2)))
    assert torch.equal(model(input_ids).logits, before)
    wake(handle)
    after = model(input_ids).logits
    with handle.frozen_at({"echo": handle.still("neutral")["echo"]}):
        assert (model(input_ids).logits - after).abs().max() > 1e-3
    with handle.frozen_at("neutral"):
        assert torch.equal(model(input_ids).logits, before)


@pytest.mark.parametrize("row", ["groups of one norm", "added to the residual stream"])
def test_a_base_without_its_site_refuses_it(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "echo", ROWS[row])
    with pytest.raises(ncn.UserError, match="echo has no site on a base"):
        ncn.attach(base("llama"), with_the_row(ControllerConfig()))
