"""What others quantise and evaluate models with: a cache of few bits, and lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import QuantizedCache

import ncn
import ncn.hf
from ncn import ModulatedTransformer, NCNConfig
from retrofits import attached, ids, wake

pytestmark = pytest.mark.xdist_group("transformers")


def own() -> Any:
    """Our own model, its signals far from neutral."""
    sizes = {"vocab_size": 96, "d_model": 256, "num_layers": 3, "num_heads": 4, "context_length": 64, "separator_id": 0}
    torch.manual_seed(1)
    core = ModulatedTransformer(NCNConfig.parse(sizes))
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            parameter.add_((0.3 if name.startswith("controller.") else 0.05) * torch.randn_like(parameter))
    return ncn.hf.NCNForCausalLM.of(core.eval()), None


def retrofitted() -> Any:
    return attached("llama", hidden_size=256, head_dim=64)


@pytest.mark.parametrize("made", [own, retrofitted])
def test_a_quantised_cache(made: Any) -> None:
    """It rounds what attention remembers, and not what the controller does."""
    pytest.importorskip("hqq", reason="needs the package hqq")
    (model, handle), text = made(), ids(20)

    @torch.no_grad()
    def read(begin: int, end: int, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=text[:, begin:end], **options)
        return output.logits, output.signals if handle is None else handle.signals

    asked = {"output_signals": True} if handle is None else {}
    whole, signals = read(0, 20, use_cache=False, **asked)

    def error(bits: int) -> float:
        """Of the logits, one token after another: root of the mean square, relative."""
        cache = QuantizedCache("hqq", model.config, nbits=bits, residual_length=4)
        steps = [(0, 9), *((place, place + 1) for place in range(9, 20))]
        parts = [read(*step, past_key_values=cache, use_cache=True, **asked) for step in steps]
        for name, signal in signals.items():  # these read the embeddings
            assert torch.allclose(torch.cat([seen[name] for _, seen in parts], 1), signal, atol=1e-5)
        logits = torch.cat([said for said, _ in parts], 1)
        return float((logits - whole).square().mean().sqrt() / whole.square().mean().sqrt())

    eight, two = error(8), error(2)
    assert 1e-5 < eight < 0.1
    assert eight < two / 4
    settings = {"backend": "hqq", "nbits": 8, "residual_length": 128}
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        plain = model.generate(text[:, :9], use_cache=False, **options)
        quantised = model.generate(text[:, :9], cache_implementation="quantized", cache_config=settings, **options)
        assert torch.equal(quantised, plain), options


def test_the_evaluation_harness(tmp_path: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs the package lm-eval")
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerFast

    model, handle = attached("llama", awake=False, vocab_size=300)
    tokenizer = ncn.Tokenizer.train(["the cat sat on the mat"] * 4, 257)
    tokenizer.save(tmp_path)
    harness = huggingface.HFLM(
        pretrained=model, tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path), batch_size=2, max_length=64
    )
    request = [Instance("loglikelihood", {}, ("the cat sat", " on the mat"), 0)]
    base = harness.loglikelihood(request)
    wake(handle)
    assert harness.loglikelihood(request) != base
    handle.detach()
    assert harness.loglikelihood(request) == base
