"""The reference against numbers that can be worked out by hand; the contracts hold the fast path against it."""

import ast
import math
from pathlib import Path

import pytest
import torch

import ncn.core.reference
from contracts.variants import SEPARATOR, VOCABULARY, awake, config, text
from ncn.core.model import ModulatedTransformer
from ncn.core.reference import reference


def test_it_shares_nothing_with_the_fast_path() -> None:
    tree = ast.parse(Path(ncn.core.reference.__file__).read_text("utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in imported if module.startswith("ncn")} == {"ncn.config.model", "ncn.core.types"}


def test_one_token_by_hand() -> None:
    """With one token attention reads that token's value: everything else is a product of known matrices."""
    model = ModulatedTransformer(config({"kind": "static"}, num_layers=1, num_heads=1)).double()
    with torch.no_grad():  # the second is the precision, which does not matter to a token alone
        model.controller.raw.copy_(torch.tensor([[0.3, 5.0, -0.7, 1.1]], dtype=torch.float64))
    gain, gate, head = 2 / (1 + math.exp(-0.3)), (1 + math.exp(-3)) / (1 + math.exp(-2.3)), 2 / (1 + math.exp(-1.1))
    layer, e = model.layers[0], model.embedding.weight[4]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + 1e-5).sqrt()

    value = (layer.attention.qkv.weight @ norm(e))[-16:]
    middle = e + gain * head * layer.attention.output.weight @ value
    inner = layer.ffn.up.weight @ norm(middle)
    inner = inner * torch.special.ndtr(inner)
    logits = model.embedding.weight @ norm(middle + gain * gate * layer.ffn.down.weight @ inner)
    got = reference(model, torch.tensor([[4]]))
    torch.testing.assert_close(got.logits[0, 0], logits, rtol=1e-12, atol=1e-14)
    assert got.signals["gain"].item() == pytest.approx(gain)
    assert got.signals["precision"].item() == pytest.approx(4 ** math.tanh(5))
    squares = [(gain - 1) ** 2, (4 ** math.tanh(5) - 1) ** 2, (gate - 1) ** 2, (head - 1) ** 2]
    assert got.homeostatic_loss.item() == pytest.approx(sum(squares))


def test_the_residual_mix_by_hand() -> None:
    """What is added before every layer: a share of what enters the first, normalised; 0 is where it changes nothing."""
    model = ModulatedTransformer(config({"kind": "static", "signals": ["residual_mix"]}, num_layers=2)).double()
    with torch.no_grad():
        model.controller.raw.copy_(torch.tensor([[0.4], [-1.2]], dtype=torch.float64))
        for layer in model.layers:  # layers that write nothing
            layer.attention.output.weight.zero_()
            layer.ffn.down.weight.zero_()
    e = model.embedding.weight[4]
    length = (e.square().mean() + 1e-5).sqrt()
    x = e + (math.tanh(0.4) + math.tanh(-1.2)) * e / length
    got = reference(model, torch.tensor([[4]]))
    torch.testing.assert_close(
        got.logits[0, 0], model.embedding.weight @ (x / (x.square().mean() + 1e-5).sqrt()), rtol=1e-12, atol=1e-14
    )
    assert got.homeostatic_loss.item() == pytest.approx((math.tanh(0.4) ** 2 + math.tanh(-1.2) ** 2) / 2)


def test_salience_by_hand() -> None:
    """Two tokens, memory of about two tokens, no scores: the second weighs the first by exp(−ρ)."""
    model = ModulatedTransformer(config({"pooling_heads": 1, "phasic": False, "width": 1, "hidden": 1})).double()
    network = model.controller.networks["0"]
    with torch.no_grad():
        network.read.weight.zero_()
        network.read.weight[1, 0] = 1.0
        network.log_decay.fill_(math.log(0.5))
        network.output.weight.fill_(1)
        network.expand.weight.fill_(1)
        model.embedding.weight[:, 0] = 0
        model.embedding.weight[3] = 0
        model.embedding.weight[3, 0] = 2
    gains = reference(model, torch.tensor([[5, 3]])).signals["gain"]
    read = 2 / math.sqrt(4 / 16 + 1e-5)
    context = read / (1 + math.exp(-0.5))
    u = context / math.sqrt(context**2 + 1e-5)
    assert gains[0, 0].tolist() == [1, 1, 1]
    assert gains[0, 1, 0].item() == pytest.approx(2 / (1 + math.exp(-math.tanh(u))), rel=1e-12)


def test_padding_is_zero_and_documents_start_anew() -> None:
    model = awake(config(cross_documents=False))
    input_ids, mask = torch.tensor([[9, 9, 4, SEPARATOR, 4, 5]]), torch.tensor([[False, False, True, True, True, True]])
    got = reference(model, input_ids, mask)
    assert (got.logits[0, :2] == 0).all()
    alone = reference(model, input_ids[:, 3:])
    assert torch.equal(got.logits[:, 3:], alone.logits)
    assert torch.equal(got.signals["gain"][:, 2:3], reference(model, input_ids[:, 2:3]).signals["gain"])


def test_it_runs_in_float64_and_reaches_float32_parameters() -> None:
    model = awake(config(), torch.float32)
    got = reference(model, text(5))
    assert got.logits.dtype == torch.float64
    assert got.logits.shape == (2, 5, VOCABULARY)
    torch.testing.assert_close(got.logits.float(), model(text(5)).logits, rtol=1e-4, atol=1e-5)
    got.logits.square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
