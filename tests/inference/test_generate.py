"""Decoding: greedy is the argmax of the whole forward pass, a seed gives the same text, characters stay whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts.variants import SMALL_CONTROLLER, awake, config
from ncn.config.model import NCNConfig
from ncn.core.model import ModulatedTransformer
from ncn.data.dataset import TokenDataset
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.inference.decoding import generate_tokens
from ncn.inference.generate import generate
from ncn.models.saved import save_model
from tiny import MODEL

PROMPT = [1, 70, 80, 90]


@pytest.fixture
def model() -> ModulatedTransformer:
    model = ModulatedTransformer(NCNConfig.parse(MODEL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokenizer(data: Path) -> Tokenizer:
    return TokenDataset.open(data).tokenizer()


def tokens(model: ModulatedTransformer, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    return list(generate_tokens(model, prompt, **{"max_tokens": 12} | options))


def greedy_by_hand(model: ModulatedTransformer, prompt: list[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


def test_greedy_is_the_argmax_of_the_whole_forward_pass(model: ModulatedTransformer) -> None:
    assert tokens(model, temperature=0.0, max_tokens=20) == greedy_by_hand(model, PROMPT, 20)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-40}])
def test_the_narrowest_sampling_is_greedy(model: ModulatedTransformer, options: dict[str, Any]) -> None:
    assert tokens(model, **options) == tokens(model, temperature=0.0)


def test_a_seed_gives_the_same_tokens(model: ModulatedTransformer) -> None:
    runs = [tokens(model, seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(tokens(model)) for _ in range(4)}) > 1  # without a seed each run is new


def test_drawing_does_not_touch_the_global_random_state(model: ModulatedTransformer) -> None:
    before = torch.get_rng_state()
    tokens(model, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def frequencies(model: ModulatedTransformer, **options: Any) -> torch.Tensor:
    drawn = [tokens(model, max_tokens=1, seed=seed, **options)[0] for seed in range(200)]
    return torch.bincount(torch.tensor(drawn), minlength=300) / 200


def next_probabilities(model: ModulatedTransformer, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return (model(torch.tensor([PROMPT])).logits[0, -1] / temperature).softmax(-1)


def test_temperature_sharpens_the_distribution_that_is_drawn_from(model: ModulatedTransformer) -> None:
    for temperature in (0.3, 1.0):
        expected = next_probabilities(model, temperature)
        likeliest = expected.topk(3).indices
        found = frequencies(model, temperature=temperature)
        torch.testing.assert_close(found[likeliest], expected[likeliest], rtol=0, atol=0.1)


def test_top_k_and_top_p_draw_from_the_likeliest_only(model: ModulatedTransformer) -> None:
    expected = next_probabilities(model, 1.0)
    ordered, order = expected.sort(descending=True)
    assert set(frequencies(model, top_k=3).nonzero().flatten().tolist()) == set(order[:3].tolist())
    nucleus = int((ordered.cumsum(0) < 0.1).sum()) + 1  # the smallest set with this much probability
    assert set(frequencies(model, top_p=0.1).nonzero().flatten().tolist()) == set(order[:nucleus].tolist())


def test_it_ends_at_the_stop_token_and_does_not_show_it(model: ModulatedTransformer) -> None:
    made = tokens(model, temperature=0.0, max_tokens=20)
    stop = made[4]
    assert tokens(model, temperature=0.0, max_tokens=20, stop_id=stop) == made[: made.index(stop)]


def test_it_ends_at_a_full_context(model: ModulatedTransformer) -> None:
    assert len(tokens(model, max_tokens=1000)) == 32 - len(PROMPT)
    assert len(tokens(model, [5] * 31, max_tokens=1000)) == 1


def test_a_prompt_that_fills_the_context_is_refused(model: ModulatedTransformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"the prompt has 32 tokens .* the model's context is 32; shorten it"):
        tokens(model, [5] * 32)
    with pytest.raises(UserError, match="the model's context is 32; shorten it"):
        next(generate(model, tokenizer, "a long story " * 50))


def test_no_tokens_at_all_are_refused(model: ModulatedTransformer) -> None:
    with pytest.raises(UserError, match="the prompt is empty: give at least one token"):
        tokens(model, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"top_p": 1.5}, "top_p must lie in"),
    ],
)
def test_impossible_sampling_is_refused(model: ModulatedTransformer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokens(model, **options)


def test_a_text_follows_a_separator(model: ModulatedTransformer, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.separator_id, *tokenizer.encode("Once upon")]
    made = tokens(model, ids, temperature=0.0, max_tokens=10)
    assert "".join(generate(model, tokenizer, "Once upon", temperature=0.0, max_tokens=10, stop_id=None)) == (
        tokenizer.decode(made)
    )


def test_an_empty_prompt_begins_a_document(model: ModulatedTransformer, tokenizer: Tokenizer) -> None:
    made = tokens(model, [tokenizer.separator_id], temperature=0.0, max_tokens=5)
    assert "".join(generate(model, tokenizer, "", temperature=0.0, max_tokens=5, stop_id=None)) == tokenizer.decode(
        made
    )


def writes(model: ModulatedTransformer, text: list[int]) -> None:
    """Make the model a machine that writes these tokens one after the other, whatever came before."""
    config = model.config
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        assert model.position_embedding is not None
        assert model.head is not None
        model.position_embedding.weight.copy_(torch.eye(config.context_length, config.d_model))
        for place, token in enumerate(text):
            model.head.weight[token, place] = 100.0


def test_characters_are_never_cut(tokenizer: Tokenizer) -> None:
    model = ModulatedTransformer(
        NCNConfig.parse(MODEL | {"positions": "learned", "tie_embeddings": False, "d_model": 32, "controller": None})
    )
    text = "a猫é🐈 b"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # characters of several tokens each
    writes(model, ids)

    pieces = list(generate(model, tokenizer, "", temperature=0.0, max_tokens=len(ids)))

    assert "".join(pieces) == text
    assert pieces[:4] == ["a", "猫", "é", "🐈"]


def test_bytes_that_never_become_a_character_come_out_in_the_end(tokenizer: Tokenizer) -> None:
    model = ModulatedTransformer(
        NCNConfig.parse(MODEL | {"positions": "learned", "tie_embeddings": False, "d_model": 32, "controller": None})
    )
    half = tokenizer.encode("a") + tokenizer.encode("🐈")[:2]
    writes(model, half)
    pieces = list(generate(model, tokenizer, "", temperature=0.0, max_tokens=len(half)))
    assert pieces[0] == "a"
    assert "".join(pieces) == tokenizer.decode(half)
    assert set("".join(pieces)[1:]) == {"\ufffd"}


COMPILED = """
import json, sys
from ncn.generate import generate_tokens
from ncn.models.saved import load_model
model = load_model(sys.argv[1])
for prompt in ([1, 7, 8, 9], [1, 5]):
    plain, compiled = (
        list(generate_tokens(model, prompt, max_tokens=12, temperature=0, compile=compile, **json.loads(sys.argv[2])))
        for compile in (False, True)
    )
    assert plain == compiled, (plain, compiled)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cross_documents", "options"),
    [(True, {}), (False, {"sliders": {"calm": 0.9}, "task": "tell", "instruction": [5, 6], "guidance": 2.0})],
)
def test_a_compiled_step_writes_the_same(tmp_path: Path, cross_documents: bool, options: dict[str, Any]) -> None:
    given = {"sliders": ["calm"], "tasks": ["tell", "ask"], "instructions": True, "taps": "every"}
    save_model(awake(config(SMALL_CONTROLLER | given, cross_documents=cross_documents)), tmp_path, None)
    # in a process of its own, because the compiler cannot see through the shape checks of the tests
    words = [sys.executable, "-c", COMPILED, str(tmp_path), json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("the same\n"), done.stderr
    assert "recompile_limit" not in done.stderr


def test_no_compiler_is_said_at_once(model: ModulatedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler, and 'no-such-compiler' was not found"):
        tokens(model, compile=True)


def test_what_torch_cannot_compile_is_one_line(model: ModulatedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no header\nand a long story")

    monkeypatch.setenv("CXX", sys.executable)  # something that is there
    monkeypatch.setattr("ncn.machine.compiling.torch.compile", lambda *_, **__: fails)
    with pytest.raises(UserError, match=r"torch could not compile the model \(no header\); do not compile"):
        tokens(model, compile=True)
