"""Rows that join and leave a batch write what each writes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ncn
from contracts.variants import SMALL_CONTROLLER, awake, config
from ncn.core.cache import Cache
from ncn.inference.decoding import Decoder, Request, Row, generate_tokens, write
from ncn.inference.sampling import Sampling

EVERYTHING = SMALL_CONTROLLER | {"sliders": ["calm", "long"], "tasks": ["tell", "ask"], "instructions": True}
MODELS: dict[str, dict[str, Any]] = {
    "one tap": {},
    "two taps": {"controller": EVERYTHING | {"taps": [0, 1]}},
    "across documents": {"cross_documents": True},
    "learned positions": {"positions": "learned"},
    "grouped heads, untied": {"num_kv_heads": 1, "tie_embeddings": False},
    "local gates": {"controller": {"kind": "local"}},
    "static": {"controller": {"kind": "static"}},
    "no controller": {"controller": None},
}


def model_of(name: str) -> ncn.ModulatedTransformer:
    settings = {"controller": EVERYTHING, "cross_documents": False} | MODELS[name]
    torch.manual_seed(1)
    return awake(config(settings.pop("controller"), **settings))


def prompts(count: int, low: int = 1, high: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    sizes = torch.randint(low, high, (count,), generator=generator).tolist()
    return [[0, *torch.randint(1, 11, (size,), generator=generator).tolist()] for size in sizes]


def alone(model: ncn.ModulatedTransformer, request: Request) -> list[int]:
    decoder = Decoder(model, joins=False)
    (row,) = decoder.join([request])
    while row.ended is None:
        decoder.step()
    return row.tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_join_midway_write_what_they_write_alone(name: str, temperature: float) -> None:
    model = model_of(name)
    requests = [
        Request(prompt, 3 + 2 * number, Sampling(temperature, seed=5, choice=number), stop_id=3)
        for number, prompt in enumerate(prompts(6))
    ]
    decoder = Decoder(model)
    rows = decoder.join(requests[:2])
    decoder.step()
    rows += decoder.join(requests[2:3])
    rows += decoder.join(requests[3:5])
    for _ in range(2):
        decoder.step()
    rows += decoder.join(requests[5:])
    while decoder.rows:
        decoder.step()
    assert [row.tokens for row in rows] == [alone(model, request) for request in requests]
    assert all(row.ended == "length" or row.ended == "stop" for row in rows)
    assert decoder.step() == []


@pytest.mark.parametrize("name", ["one tap", "two taps", "across documents", "learned positions"])
def test_logits_of_a_row_in_a_batch_are_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    seen: list[Tensor] = []
    original = Decoder._read

    def recorded(decoder: Decoder, *arguments: Any) -> Tensor:
        seen.append(original(decoder, *arguments))
        return seen[-1]

    monkeypatch.setattr(Decoder, "_read", recorded)
    first, second = (Request(prompt, 6, Sampling(0.0)) for prompt in ([0, 5, 4, 7, 1, 2], [0, 8]))
    decoder = Decoder(model)
    decoder.join([first])
    decoder.step()
    decoder.step()
    (row,) = decoder.join([second])
    while row.ended is None:
        decoder.step()
    own = [logits[-1] for logits in (seen[2], *seen[4:])]  # its prompt, then the last row of the batch of both
    assert len(own) == 6
    with torch.no_grad():
        for number, logits in enumerate(own):
            text = torch.tensor([[*second.prompt, *row.tokens[:number]]])
            torch.testing.assert_close(logits, model(text, last_only=True).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_padding_that_can_be_seen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("one tap")
    requests = [Request(prompt, 12, Sampling(0.0)) for prompt in ([0, 5, 4, 7, 1, 2, 9, 9, 1], [0, 8])]
    own = alone(model, requests[1])
    original = Cache.joined.__func__  # type: ignore[attr-defined]

    def visible(cls: type[Cache], caches: Any) -> Cache:
        cache: Cache = original(cls, caches)
        cache._slots["segments"][:] = cache._slots["segments"].amax(1, keepdim=True)
        return cache

    monkeypatch.setattr(Cache, "joined", classmethod(visible))
    decoder = Decoder(model)
    decoder.join(requests[:1])
    decoder.step()
    (row,) = decoder.join(requests[1:])
    while row.ended is None:
        decoder.step()
    assert row.tokens != own


def test_each_row_has_inputs_and_guidance_of_its_own() -> None:
    model = model_of("two taps")
    frozen = {"gain": torch.tensor([1.9, torch.nan, 0.1])}
    kinds: list[dict[str, Any]] = [
        {},
        {"sliders": {"calm": 0.9}},
        {"sliders": {"calm": 0.1, "long": (0.0, 1.0)}, "guidance": 2.5},
        {"task": "ask"},
        {"task": "tell", "instruction": [4, 5, 6], "guidance": 0.5},
        {"instruction": [7, 7]},
        {"frozen": frozen},
        {"frozen": {"ffn_gate": torch.tensor(0.2)}, "sliders": {"long": 0.3}, "guidance": 3.0},
    ]
    requests = [Request([0, 5, 4], 10, Sampling(0.0), **kind) for kind in kinds]
    expected = [alone(model, request) for request in requests]
    assert len({tuple(tokens) for tokens in expected}) > 4
    for size in (3, 8):
        found = {number: row.tokens for number, row in write(model, requests, size)}
        assert [found[number] for number in range(8)] == expected


def test_a_signal_held_still_is_that_signal_and_nan_leaves_it_free() -> None:
    model = model_of("one tap")
    text = torch.tensor([[0, 5, 4, 7]])
    free = model(text, output_signals=True).signals["gain"]
    held = torch.full((2, 1, *free.shape[2:]), torch.nan)
    held[1, 0, 1] = 1.5
    signals = model(text.expand(2, -1), output_signals=True, frozen={"gain": held}).signals["gain"]
    assert torch.equal(signals[0], free[0])
    assert torch.equal(signals[1, :, 0], free[0, :, 0])
    assert (signals[1, :, 1] == 1.5).all()


def test_rows_of_every_length_fit_into_one_context() -> None:
    """A row that joins a long one goes on after that has left, up to the end of its own context."""
    model = model_of("one tap")
    context = model.config.context_length
    decoder = Decoder(model)
    (long,) = decoder.join([Request([0, *[5] * (context - 4)], 100, Sampling(0.0))])
    decoder.step()
    (short,) = decoder.join([Request([0, 8], 100, Sampling(0.0))])
    while decoder.rows:
        decoder.step()
    assert long.ended == short.ended == "length"
    assert len(long.tokens) == 3
    assert len(short.tokens) == context - 2
    assert short.tokens == alone(model, short.request)


def test_a_row_can_be_told_to_leave() -> None:
    model = model_of("one tap")
    decoder = Decoder(model)
    rows = decoder.join([Request([0, n], 20, Sampling(0.0)) for n in (1, 2, 3)])
    decoder.step()
    decoder.leave(rows[1])
    while decoder.rows:
        decoder.step()
    assert len(rows[1].tokens) == 1
    for row in (rows[0], rows[2]):
        assert row.tokens == alone(model, row.request)
    (early,) = decoder.join([Request([0, 4], 20, Sampling(0.0))])
    decoder.leave(early)
    assert decoder.step() == decoder.rows == early.tokens == []


def test_many_texts_are_written_with_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("one tap")
    requests = [
        Request(prompt, 4 + number % 5, Sampling(1.0, seed=1, choice=number), stop_id=2)
        for number, prompt in enumerate(prompts(20))
    ]
    most: list[int] = []
    original = Decoder.step

    def counted(decoder: Decoder) -> list[Row]:
        most.append(len(decoder.rows))
        return original(decoder)

    monkeypatch.setattr(Decoder, "step", counted)
    found = {number: row.tokens for number, row in write(model, requests, 6)}
    assert max(most) == 6
    monkeypatch.setattr(Decoder, "step", original)
    assert [found[number] for number in range(20)] == [alone(model, request) for request in requests]


def test_the_iterator_is_the_decoder() -> None:
    model = model_of("one tap")
    settings: dict[str, Any] = {"sliders": {"calm": (0.0, 1.0)}, "task": "ask", "guidance": 1.5}
    sampling = Sampling(1.0, 5, 0.9, 8)
    tokens = generate_tokens(model, [0, 4], max_tokens=9, temperature=1.0, top_k=5, top_p=0.9, seed=8, **settings)
    assert list(tokens) == alone(model, Request([0, 4], 9, sampling, **settings))
