"""Inputs from outside: unset they do nothing, set they act on their own row from their own token on, the same in every
way of running; and what is measured on a text is what it says."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ncn
from contracts.variants import SMALL_CONTROLLER, awake, config, text
from ncn import attributes
from ncn.attributes import MEASURES, DocumentSliders, measure, rank, read_table, write_attributes
from ncn.cache import Cache
from ncn.config import ControllerConfig
from ncn.control_inputs import input_parameters
from ncn.document_inputs import DocumentInputs
from ncn.generate import generate_tokens
from ncn.model import ModulatedTransformer
from ncn.prepare import prepare
from ncn.reference import reference
from ncn.runs import RunFolder
from ncn.stopping import Interrupted
from ncn.train import train
from ncn.types import ControlInputs
from tiny import MODEL, assert_same_run, at_step, interrupt, recipe

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
    assert set(added) == {"direction", "read", "turn", "write"} if rank else {"direction"}
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
    assert all(grad.abs().flatten(1).sum(1).gt(0).all() for grad in kept.values())
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


def test_measures() -> None:
    story = 'Tom ran. "Stop!" said Sue. Why did he run?'
    assert MEASURES["dialogue"](story) == len('"Stop!"') / len(story)
    assert MEASURES["length"](story) == 9
    assert MEASURES["sentence_length"](story) == 9 / 4
    assert MEASURES["exclamations"](story) == 1 / 4
    assert MEASURES["questions"](story) == 1 / 4
    assert MEASURES["sentence_length"]("") == 0


def test_rarity_is_the_mean_of_bits_with_one_added_to_every_count() -> None:
    counts = np.array([7.0, 3.0, 1.0, 1.0])  # with one more each, 8, 4, 2 and 2 of 16: 1, 2, 3 and 3 bits
    assert measure("", np.array([0, 1, 1, 3]), counts)["rarity"] == (1 + 2 + 2 + 3) / 4
    assert measure("", np.array([0]), np.array([6.0, 0.0]))["rarity"] == -math.log2(7 / 8)
    assert measure("", np.array([1]), np.array([6.0, 0.0]))["rarity"] == 3  # a token that never occurred
    assert measure("", np.array([], int), counts)["rarity"] == 0


def test_sentiment_orders_texts_and_leads_nowhere_without_its_package(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")
    counts = np.ones(4)
    texts = [
        "She loved the wonderful, happy day.",
        "Tom has a table.",
        "It was a horrible, sad death and she hated it.",
    ]
    good, plain, bad = (measure(text, np.array([0]), counts)["sentiment"] for text in texts)
    assert 0.5 < good <= 1
    assert plain == 0
    assert -1 <= bad < -0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
        attributes._sentiment.cache_clear()
        try:
            assert list(measure("", np.array([0]), counts)) == [*MEASURES, "rarity"]
            prepare([str(data / "text.txt")], tmp_path / "out", vocab_size=300)
            assert write_attributes(tmp_path / "out") == [*MEASURES, "rarity"]
            dataset = ncn.TokenDataset.open(tmp_path / "out")
            with pytest.raises(ncn.UserError, match=r"no attribute 'sentiment'; .* pip install vaderSentiment and"):
                DocumentSliders(dataset, ("sentiment",))
        finally:
            attributes._sentiment.cache_clear()
    assert write_attributes(tmp_path / "out") == [*MEASURES, "rarity", "sentiment"]


def test_ranks_say_more_than_so_many_and_put_ties_in_the_middle() -> None:
    quantiles = np.quantile(np.array([0.0] * 40 + list(range(1, 61))), np.linspace(0, 1, 1001))
    assert rank(np.array([0.0, 61.0, -1.0]), quantiles) == pytest.approx([0.2, 1, 0], abs=0.01)
    assert rank(np.array([50.0]), quantiles) == pytest.approx([0.9], abs=0.011)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attributes")
    stories = [f"Tom had {n} cats. " + '"Oh!" he said. ' * (n % 7) + "They ran. " * (n % 5) for n in range(120)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(stories))
    prepare([str(folder / "text.txt")], folder / "data", vocab_size=300)
    write_attributes(folder / "data")
    return folder


def test_every_token_has_the_sliders_of_its_document(data: Path) -> None:
    dataset = ncn.TokenDataset.open(data / "data")
    given = DocumentInputs(dataset, ControllerConfig(sliders=("dialogue", "length")))

    def sliders(step: int, rows: int, whole: float, single: float) -> np.ndarray:
        return given.batch(3, step, rows, 64, whole, single).sliders.numpy()

    batch = dataset.batch(3, 5, 4, 64)
    found = sliders(5, 4, 0.0, 0.0)
    assert found.shape == (4, 64, 2)
    decode, table = dataset.tokenizer().decode, read_table(data / "data")
    bounds = [*given.starts.tolist(), dataset.tokens]
    texts = [decode(dataset.read(a + 1, b - a - 1).tolist()) for a, b in itertools.pairwise(bounds)]
    checked = 0
    for row in range(4):
        ids = batch.inputs[row].tolist()
        borders = [place for place, token in enumerate(ids) if token == dataset.separator_id]
        for a, b in itertools.pairwise(borders):  # whole documents inside the window
            story = decode(ids[a + 1 : b])
            assert story in texts
            expected = [
                rank(np.array([float(MEASURES[n](story))]), np.array(table[n]))[0] for n in ("dialogue", "length")
            ]
            assert found[row, a:b] == pytest.approx(np.tile(expected, (b - a, 1)), abs=1e-6)
            checked += 1
    assert checked > 2
    assert np.array_equal(found, sliders(5, 4, 0.0, 0.0))
    dropped = np.stack([np.isnan(sliders(step, 16, 0.3, 0.1))[:, 0] for step in range(100)])
    assert dropped.mean() == pytest.approx(0.3 + 0.7 * 0.1, abs=0.03)
    assert dropped.all(-1).mean() == pytest.approx(0.3 + 0.7 * 0.01, abs=0.03)


def test_other_text_is_ranked_among_the_documents_of_the_first(data: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("Tom ran home. " * 60)
    prepare([str(tmp_path / "long.txt")], tmp_path / "valid", tokenizer=str(data / "data"))
    assert write_attributes(tmp_path / "valid", data / "data") == list(read_table(data / "data"))
    valid = ncn.TokenDataset.open(tmp_path / "valid")
    assert DocumentSliders(valid, ("length",)).ranks.tolist() == [[1.0]]
    assert read_table(tmp_path / "valid") == read_table(data / "data")


def test_training_uses_them_and_continues_bit_for_bit(data: Path, tmp_path: Path) -> None:
    settings = [
        "tokens=4000", "context=64", "context_length=64", "d_model=32", "num_layers=2", "batch_size=4",
        "controller.sliders=[dialogue,length]", "controller.width=8", "checkpoint_every=5", "learning_rate=1e-2",
    ]  # fmt: skip
    recipe = ncn.Recipe.read("mini", settings)
    train(recipe, data / "data", tmp_path / "whole", progress=False)
    train(recipe, data / "data", tmp_path / "parts", progress=False)
    (tmp_path / "parts" / "summary.json").unlink()
    sorted((tmp_path / "parts" / "checkpoints").glob("*.safetensors"))[-1].unlink()
    train(recipe, data / "data", tmp_path / "parts", resume=True, progress=False)
    one, other = (ncn.load(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(recipe.train.seed)
    start = ModulatedTransformer(ncn.load(tmp_path / "whole")[0].config).state_dict()
    name = "controller.networks.0.external.sliders.weight"
    assert not torch.equal(one[name], start[name])
    for wrong, words in [("tempo", "no attribute 'tempo'; it has dialogue"), (None, "prepare it with --attributes")]:
        place = data / "data" if wrong else tmp_path / "plain"
        if not wrong:
            prepare([str(data / "text.txt")], place, vocab_size=300)
        changed = recipe.with_settings([f"controller.sliders=[{wrong or 'dialogue'}]"])
        with pytest.raises(ncn.UserError, match=words):
            train(changed, place, tmp_path / "none", progress=False)
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("enter", ["controller", "layers", "prefix"])
def test_sliders_that_are_learned_last_leave_the_model_as_it_was(
    enter: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"valid": data / "data", "progress": False}
    train(recipe(), data / "data", tmp_path / "plain", **options)
    last = recipe(
        {"controller": {**MODEL["controller"], "sliders": ["dialogue"], "sliders_enter": enter}}, only_inputs=True
    )
    train(last, data / "data", tmp_path / "last", start=tmp_path / "plain", **options)
    (plain, _), (model, _) = ncn.load(tmp_path / "plain"), ncn.load(tmp_path / "last")
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.state_dict().items())
    learned = {name: weights[name] for name in input_parameters(model)}
    assert set(weights) == set(plain.state_dict()) | set(learned)
    assert all(weight.any() for weight in learned.values())
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not torch.equal(model(ids, control=ControlInputs(torch.ones(1, 1, 1))).logits, plain(ids).logits)
    losses = [RunFolder.open(tmp_path / name).summary()["validation_loss"] for name in ("plain", "last")]
    assert losses[0] == losses[1]

    at_step(monkeypatch, {9: interrupt})
    with pytest.raises(Interrupted):
        train(last, data / "data", tmp_path / "parts", start=tmp_path / "plain", **options)
    train(last, data / "data", tmp_path / "parts", start=tmp_path / "plain", resume=True, **options)
    assert_same_run(tmp_path / "last", tmp_path / "parts")

    for wrong, start, words in [
        (last, None, "it needs --start MODEL"),
        (recipe(only_inputs=True), tmp_path / "plain", r"needs inputs to train, such as controller\.sliders="),
        (
            recipe({"controller": {**MODEL["controller"], "sliders": ["length"]}}),
            tmp_path / "last",
            r"of another model: controller\.sliders is",
        ),
    ]:
        with pytest.raises(ncn.UserError, match=words):
            train(wrong, data / "data", tmp_path / "none", start=start, **options)
    assert not (tmp_path / "none").exists()
