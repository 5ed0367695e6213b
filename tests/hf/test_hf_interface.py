"""One interface: our own model, the same in transformers, and a controller on a base are read by the same functions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ncn

pytest.importorskip("transformers")
import ncn.hf
from hf_models import awake, text
from ncn.core.interface import LanguageModel
from ncn.generate import generate_tokens
from ncn.inference.evaluate import evaluate
from ncn.inference.freezing import signal_means
from ncn.models.saved import load, save_model
from ncn.retrofit.model import RetrofittedModel
from retrofits import attached, ids

pytestmark = pytest.mark.xdist_group("transformers")


def retrofitted(name: str) -> RetrofittedModel:
    _, handle = attached(name)
    return RetrofittedModel(handle, handle.core_config, "base").eval()


def models() -> dict[str, tuple[LanguageModel, torch.Tensor]]:
    own = awake()
    return {
        "own": (own, text(20, 2)),
        "transformers": (ncn.hf.NCNForCausalLM.of(own), text(20, 2)),
        "a base": (retrofitted("llama"), ids(20)),
        "a base with capped logits": (retrofitted("gemma2"), ids(20)),
    }


@pytest.mark.parametrize("name", models())
def test_what_every_model_offers(name: str) -> None:
    model, tokens = models()[name]
    config = model.core_config
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    output = model.read(tokens, output_signals=True)
    assert output.signals is not None
    assert output.signals.keys() == set(config.controller.signals)
    flat = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), reduction="sum")
    nats, signals = model.loss(tokens, targets)
    torch.testing.assert_close(nats, flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.token_losses(tokens, targets).sum(), nats, rtol=1e-5, atol=1e-5)
    for signal, value in output.signals.items():
        torch.testing.assert_close(signals[signal], value)
    hidden, _ = model.hidden_states(model.embed(tokens), tokens)
    torch.testing.assert_close(model.logits(hidden), output.logits)
    assert model.device == torch.device("cpu")
    with pytest.raises(ncn.UserError, match=r"token id 1000 lies outside the vocabulary"):
        model.read(torch.full_like(tokens, 1000))


@pytest.mark.parametrize("name", models())
def test_writing_goes_on_from_what_was_read(name: str) -> None:
    model, tokens = models()[name]
    prompt = tokens[0, :6].tolist()
    written = list(generate_tokens(model, prompt, max_tokens=6, temperature=0.0))
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            logits = model.read(torch.tensor([[*prompt, *expected]]), last_only=True).logits
            expected.append(int(logits[0, -1].argmax()))
    assert written == expected


def test_the_transformers_model_is_evaluated_scanned_and_saved_as_our_own(data: Path, tmp_path: Path) -> None:
    own, tokenizer = load("stories-mini")
    other = ncn.hf.NCNForCausalLM.of(own)  # type: ignore[arg-type]
    sentence = "Timmy wanted an apple. He looked in the box."
    scans: list[Any] = [ncn.scan(model, tokenizer, sentence) for model in (own, other)]
    assert scans[0].to_json() == scans[1].to_json()
    assert ncn.bits_per_byte(own, tokenizer, [sentence]) == ncn.bits_per_byte(other, tokenizer, [sentence])
    save_model(other, tmp_path / "saved", tokenizer)
    again, _ = load(tmp_path / "saved")
    assert all(torch.equal(own.state_dict()[name], value) for name, value in again.state_dict().items())


def test_evaluation_and_means_are_those_of_our_own_model(data: Path) -> None:
    own = awake(vocab_size=300, separator_id=0)
    other = ncn.hf.NCNForCausalLM.of(copy.deepcopy(own))
    dataset = ncn.TokenDataset.open(data)
    assert evaluate(own, dataset, max_tokens=500) == evaluate(other, dataset, max_tokens=500)
    means = [signal_means(model, dataset, max_tokens=500) for model in (own, other)]
    assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])
