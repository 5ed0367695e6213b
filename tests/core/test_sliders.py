"""Inputs from outside: unset they do nothing, set they act on their own row from their own token on, the same in every
way of running."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ncn
from contracts.variants import SMALL_CONTROLLER, awake, config, text
from ncn.core.cache import Cache
from ncn.core.model import ModulatedTransformer
from ncn.core.reference import reference
from ncn.core.types import ControlInputs
from ncn.inference.decoding import generate_tokens

NAN = math.nan


def with_tasks_and_instructions() -> ModulatedTransformer:
    return awake(config(SMALL_CONTROLLER | {"tasks": ["tell", "ask"], "instructions": True, "taps": [0, 1]}))


def with_sliders(**controller: Any) -> ModulatedTransformer:
    return awake(config(SMALL_CONTROLLER | {"sliders": ["calm", "long"]} | controller))


def entering(enter: str, **settings: Any) -> ModulatedTransformer:
    """A model whose sliders enter the controller, the layers beside it, or, beside learned constants, a prefix token or
    every embedding."""
    kind = "ncn" if enter in ("controller", "layers") else "static"
    sliders = {"sliders": ["calm", "long"], "sliders_enter": enter, "kind": kind}
    return awake(config(SMALL_CONTROLLER | sliders, **settings))


ENTRIES = pytest.mark.parametrize("enter", ["controller", "layers", "prefix", "embedding"])
APART = pytest.mark.parametrize("cross_documents", [True, False], ids=["documents together", "documents apart"])


def values(*rows: tuple[float, float]) -> torch.Tensor:
    """(batch, 1, sliders)"""
    return torch.tensor(rows, dtype=torch.float64)[:, None]


@ENTRIES
def test_unset_they_do_nothing_at_all(enter: str) -> None:
    model = entering(enter)
    plain = model(text(12)).logits
    assert torch.equal(model(text(12), control=ControlInputs(values((NAN, NAN), (NAN, NAN)))).logits, plain)
    assert not torch.allclose(model(text(12), control=ControlInputs(values((0.5, NAN), (0.5, NAN)))).logits, plain)


def test_a_model_without_sliders_has_the_parameters_that_it_had() -> None:
    torch.manual_seed(0)
    plain = ModulatedTransformer(config()).state_dict()
    torch.manual_seed(0)
    more = ModulatedTransformer(config(SMALL_CONTROLLER | {"sliders": ["calm"]})).state_dict()
    added = {f"controller.networks.0.external.{name}.weight" for name in ("sliders", "straight")}
    assert set(more) - set(plain) == added


def test_tasks_and_instructions_act_where_they_are_given_and_nowhere_else() -> None:
    model, ids = with_tasks_and_instructions(), text(9)
    plain = model(ids).logits
    words = torch.tensor([[3, 4, -1], [-1, -1, -1]])
    unset = ControlInputs(tasks=torch.full((2, 1), -1), instruction=model.pool_instruction(torch.full((2, 3), -1)))
    assert torch.equal(model(ids, control=unset).logits, plain)
    pooled = model.pool_instruction(words)
    assert torch.allclose(pooled[0, 0], model.embedding.weight[[3, 4]].mean(0))
    instructed = model(ids, control=ControlInputs(instruction=pooled)).logits
    assert torch.equal(instructed[1], plain[1])
    assert not torch.allclose(instructed[0], plain[0])
    tasks = torch.full((2, 9), -1)
    tasks[1, 5:] = 1
    told = model(ids, control=ControlInputs(tasks=tasks)).logits
    assert torch.equal(told[0], plain[0])
    assert torch.equal(told[1, :5], plain[1, :5])
    assert (told[1, 5:] != plain[1, 5:]).any(-1).all()


def test_the_equations_say_the_same_of_tasks_and_instructions() -> None:
    model, ids = with_tasks_and_instructions(), text(9)
    given = ControlInputs(
        tasks=torch.tensor([[0], [-1]]), instruction=model.pool_instruction(torch.tensor([[3, 4, -1], [5, -1, -1]]))
    )
    expected = reference(model, ids, control=given)
    assert torch.allclose(model(ids, control=given).logits, expected.logits, atol=1e-10)
    assert not torch.allclose(model(ids).logits, expected.logits, atol=1e-3)


def test_before_training_they_change_nothing_and_get_a_gradient_later() -> None:
    model = ModulatedTransformer(config(SMALL_CONTROLLER | {"sliders": ["calm"]}))
    given = torch.tensor([[[0.9]], [[0.1]]])
    assert torch.equal(model(text(12)).logits, model(text(12), control=ControlInputs(given)).logits)
    model = with_sliders()
    model(text(12), control=ControlInputs(values((0.9, 0.1), (0.2, NAN)))).logits.square().sum().backward()
    external = model.controller.networks["0"].external
    for weight in (external.sliders.weight, external.straight.weight):
        assert (weight.grad.abs().sum(0) > 0).all()


@pytest.mark.parametrize("rank", [0, 3])
def test_adapters_in_the_layers_begin_at_nothing_and_all_learn(rank: int) -> None:
    torch.manual_seed(0)
    plain = ModulatedTransformer(config())
    torch.manual_seed(0)
    settings = SMALL_CONTROLLER | {"sliders": ["calm"], "sliders_enter": "layers", "slider_rank": rank}
    model = ModulatedTransformer(config(settings))
    added = dict(model.slider_adapters.named_parameters())
    assert set(added) == {"direction", "read", "turn", "write"}
    assert set(model.state_dict()) - set(plain.state_dict()) == {f"slider_adapters.{name}" for name in added}
    given, unset = (ControlInputs(torch.full((1, 1, 1), value)) for value in (0.9, NAN))
    assert torch.equal(model(text(9), control=given).logits, plain(text(9)).logits)
    with torch.no_grad():
        for parameter in added.values():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.allclose(model(text(9), control=given).logits, plain(text(9)).logits)
    assert torch.equal(model(text(9), control=unset).logits, plain(text(9)).logits)
    model.checkpointing = True  # a layer that is computed twice is given them twice
    model(text(9), control=given).logits.square().sum().backward()
    kept = {name: parameter.grad for name, parameter in added.items()}
    assert all(grad.abs().flatten(1).sum(1).gt(0).all() for grad in kept.values() if grad.numel())
    model.zero_grad()
    model.checkpointing = False
    model(text(9), control=given).logits.square().sum().backward()
    assert all(torch.equal(parameter.grad, kept[name]) for name, parameter in added.items())


def test_a_slider_acts_on_its_row_and_from_its_token_on() -> None:
    model, ids = with_sliders(), text(12)
    plain = model(ids).logits
    given = torch.full((2, 12, 2), NAN, dtype=torch.float64)
    given[1, 7:, 0] = 0.8
    moved = model(ids, control=ControlInputs(given)).logits
    assert torch.equal(moved[0], plain[0])
    assert torch.equal(moved[1, :7], plain[1, :7])
    assert (moved[1, 7:] != plain[1, 7:]).any(-1).all()


@ENTRIES
@APART
def test_the_equations_say_the_same(enter: str, cross_documents: bool) -> None:
    model, ids = entering(enter, cross_documents=cross_documents), text(9)
    given = torch.rand(2, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given[0, :, 1] = NAN
    said = model(ids, control=ControlInputs(given), output_signals=True)
    expected = reference(model, ids, control=ControlInputs(given))
    assert torch.allclose(said.logits, expected.logits, atol=1e-10)
    for name, signal in expected.signals.items():
        assert torch.allclose(said.signals[name], signal, atol=1e-10)


@ENTRIES
@APART
def test_decoding_with_a_moving_slider_is_the_whole_forward(enter: str, cross_documents: bool) -> None:
    model, ids, cache = entering(enter, cross_documents=cross_documents), text(12), Cache()
    given = torch.linspace(0, 1, 24, dtype=torch.float64).view(1, 12, 2).repeat(2, 1, 1)
    whole = model(ids, control=ControlInputs(given)).logits
    parts = [
        model(ids[:, a:b], cache=cache, control=ControlInputs(given[:, a:b])).logits
        for a, b in [(0, 5), (5, 6), (6, 7), (7, 12)]
    ]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)


def test_a_prefix_token_is_the_first_of_each_document_and_acts_on_its_own_document() -> None:
    model = entering("prefix", cross_documents=False)
    ids = torch.tensor([[4, 5, 6, 0, 7, 8, 9, 0, 3]])
    plain, given = model(ids).logits, torch.full((1, 9, 2), NAN, dtype=torch.float64)
    for place in (1, 2, 4, 5, 6, 8):  # inside a document the sliders are not looked at
        given[:, place] = 0.8
    assert torch.equal(model(ids, control=ControlInputs(given)).logits, plain)
    given[:, 3] = 0.8
    moved = model(ids, control=ControlInputs(given)).logits != plain
    assert moved.any(-1).tolist() == [[False] * 3 + [True] * 4 + [False] * 2]
    given[:, 0] = 0.8  # a document that began before the window has its prefix at the window's first token
    moved = model(ids, control=ControlInputs(given)).logits != plain
    assert moved.any(-1).tolist() == [[True] * 7 + [False] * 2]


@pytest.mark.parametrize("enter", ["layers", "prefix", "embedding"])
def test_a_slider_stays_where_it_belongs_beside_padding_and_beams(enter: str) -> None:
    model, ids = entering(enter, cross_documents=False), text(12)
    given = ControlInputs(torch.rand(2, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    mask = torch.arange(12) >= torch.tensor([[0], [4]])
    padded = model(ids, mask, control=given).logits
    alone = model(ids[1:, 4:], control=ControlInputs(given.sliders[1:])).logits
    assert torch.allclose(padded[1, 4:], alone[0], atol=1e-10)
    cache = Cache()
    model(ids[:, :5], cache=cache, control=given)
    cache.reorder(torch.tensor([1, 1]))
    both = ControlInputs(given.sliders[[1, 1]])
    beams = model(ids[[1, 1], 5:], cache=cache, control=both).logits
    assert torch.allclose(beams, model(ids[[1, 1]], control=both).logits[:, 5:], atol=1e-10)


def test_a_slider_embedding_leaves_the_other_weights_as_they_were_and_learns() -> None:
    torch.manual_seed(0)
    plain = ModulatedTransformer(config({"kind": "static"})).state_dict()
    torch.manual_seed(0)
    model = ModulatedTransformer(config({"kind": "static", "sliders": ["calm"], "sliders_enter": "embedding"}))
    more = model.state_dict()
    assert set(more) - set(plain) == {"slider_embedding.weight"}
    assert all(torch.equal(more[name], plain[name]) for name in plain)
    model(text(9), control=ControlInputs(torch.full((1, 1, 1), 0.9))).logits.square().sum().backward()
    assert (model.slider_embedding.weight.grad != 0).all()
    with pytest.raises(ncn.UserError, match=r"sliders may enter beside them, with controller\.sliders_enter=layers"):
        config({"kind": "static", "sliders": ["calm"]})


def test_generation_with_sliders_and_guidance() -> None:
    model = with_sliders()

    def made(**options: Any) -> list[int]:
        return list(generate_tokens(model, [3, 4, 5], max_tokens=8, temperature=0.0, **options))

    ids = [3, 4, 5]
    for number in range(8):  # a slider that moves from 0 to 1, without a cache
        given = torch.full((1, len(ids), 2), NAN, dtype=torch.float64)
        for place in range(len(ids)):
            given[0, place, 0] = max(place - 2, 0) / 7
        ids.append(int(model(torch.tensor([ids]), control=ControlInputs(given)).logits[0, -1].argmax()))
        assert number < 8
    assert made(sliders={"calm": (0.0, 1.0)}) == ids[3:]
    assert made(sliders={"calm": 0.9}, guidance=0.0) == made()
    assert made(sliders={"calm": 0.9}, guidance=1.0) == made(sliders={"calm": 0.9})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sliders": {"loud": 0.5}}, "no slider 'loud'; it has calm, long"),
        ({"sliders": {"calm": 1.5}}, "slider calm is 1.5; it must lie from 0 to 1"),
        ({"sliders": {"calm": (0.0, -1.0)}}, "it must lie from 0 to 1"),
        ({"guidance": 2.0}, "none is set"),
    ],
)
def test_wrong_settings_are_one_line_each(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ncn.UserError) as caught:
        list(generate_tokens(with_sliders(), [3], max_tokens=2, **options))
    assert words in str(caught.value)
    with pytest.raises(ncn.UserError, match="it has none"):
        list(generate_tokens(awake(config()), [3], max_tokens=2, sliders={"calm": 0.5}))
    outside = with_tasks_and_instructions()
    with pytest.raises(ncn.UserError, match=r"task 2 was given; this model has 0 to 1 \(tell, ask\), and -1 is unset"):
        outside(text(4), control=ControlInputs(tasks=torch.tensor([[2]])))
    with pytest.raises(ncn.UserError, match="this model has none; train one"):
        with_sliders()(text(4), control=ControlInputs(tasks=torch.tensor([[0]])))
    with pytest.raises(ncn.UserError, match="takes none; train with"):
        with_sliders()(text(4), control=ControlInputs(instruction=outside.pool_instruction(torch.tensor([[1]]))))
    with pytest.raises(ncn.UserError, match="3 sliders were given, and this model has 2: calm, long"):
        with_sliders()(text(4), control=ControlInputs(torch.zeros(1, 1, 3)))
