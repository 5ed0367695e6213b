"""A scan shows what the model computed: its tokens, its surprise, its signals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ncn
from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.models.saved import load
from tiny import MODEL

TEXT = "Timmy saw a big dog."


@pytest.fixture(scope="module")
def loaded(finished: Path) -> tuple[ModulatedTransformer, Tokenizer]:
    return load(finished)


def test_tokens_are_the_text(loaded: tuple[ModulatedTransformer, Tokenizer]) -> None:
    scan = ncn.scan(*loaded, TEXT, name="mini")
    assert "".join(scan.tokens) == TEXT == scan.text
    assert len(scan.tokens) == len(scan.surprisal) == len(loaded[1].encode(TEXT))
    assert scan.model == "mini"


def test_numbers_are_those_of_the_forward_pass(loaded: tuple[ModulatedTransformer, Tokenizer]) -> None:
    model, tokenizer = loaded
    scan = ncn.scan(model, tokenizer, TEXT)
    ids = tokenizer.encode(TEXT)
    with torch.no_grad():
        output = model(torch.tensor([[tokenizer.separator_id, *ids]]), output_signals=True)
    probabilities = output.logits[0].double().softmax(-1)
    for place, token in enumerate(ids):  # the separator in front predicts the first token
        assert scan.surprisal[place] == pytest.approx(-math.log2(probabilities[place, token]), rel=1e-4)
    assert set(scan.signals) == {"gain", "precision", "ffn_gate", "head_gate"}
    for name, values in scan.signals.items():
        assert np.array_equal(values, output.signals[name][0, 1:].double().numpy())
    assert scan.signals["gain"].shape == (len(ids), 2)
    assert scan.signals["precision"].shape == (len(ids), 2, 2)
    assert scan.neutral == dict.fromkeys(scan.signals, 1.0)
    assert scan.bounds["precision"] == (0.25, 4.0)


def test_surprisal_adds_up_to_bits_per_byte(loaded: tuple[ModulatedTransformer, Tokenizer]) -> None:
    scan = ncn.scan(*loaded, TEXT)
    bits = sum(value for value in scan.surprisal if value is not None)
    assert ncn.bits_per_byte(*loaded, [TEXT]) == pytest.approx(bits / len(TEXT), rel=1e-5)


def test_the_other_arms_can_be_scanned_too(data: Path) -> None:
    tokenizer = TokenDataset.open(data).tokenizer()
    for kind in ("static", "local"):
        model = ModulatedTransformer(NCNConfig.parse(MODEL | {"controller": {"kind": kind}}))
        scan = ncn.scan(model, tokenizer, TEXT)
        assert all(values.shape[:2] == (len(scan.tokens), 2) for values in scan.signals.values())


def test_a_signal_that_adds_is_shown_around_zero(data: Path, tmp_path: Path) -> None:
    model = ModulatedTransformer(NCNConfig.parse(MODEL | {"controller": {"signals": ["residual_mix", "gain"]}}))
    with torch.no_grad():
        for parameter in model.controller.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    scan = ncn.scan(model, TokenDataset.open(data).tokenizer(), TEXT)
    assert scan.neutral == {"residual_mix": 0.0, "gain": 1.0}
    assert scan.bounds["residual_mix"] == (-1.0, 1.0)
    assert scan.signals["residual_mix"].min() < 0 < scan.signals["residual_mix"].max()
    for name in ("scan.png", "scan.html"):
        assert scan.save(tmp_path / name).stat().st_size > 1000


def test_a_model_without_signals_is_refused(loaded: tuple[ModulatedTransformer, Tokenizer]) -> None:
    baseline = ModulatedTransformer(loaded[0].config.override(controller=None))
    with pytest.raises(UserError, match="this model has no controller, so there are no signals to scan"):
        ncn.scan(baseline, loaded[1], TEXT)


def test_an_empty_text_is_refused(loaded: tuple[ModulatedTransformer, Tokenizer]) -> None:
    with pytest.raises(UserError, match="the text is empty: there is nothing to scan"):
        ncn.scan(*loaded, "")


def test_a_text_beyond_the_context_is_refused(loaded: tuple[ModulatedTransformer, Tokenizer]) -> None:
    with pytest.raises(UserError, match=r"the text has \d+ tokens .* and the model's context is 32; shorten it"):
        ncn.scan(*loaded, TEXT * 10)
