"""Sliders of documents: what is measured on a text is what it says, every token has its document's, and training uses
them, also last, on a model that stays what it was."""

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
from ncn.config.model import ControllerConfig
from ncn.core.model import ModulatedTransformer
from ncn.core.parameters import parameter_roles
from ncn.core.types import ControlInputs
from ncn.data.prepare import prepare
from ncn.machine.stopping import Interrupted
from ncn.steering import attributes
from ncn.steering.attributes import MEASURES, DocumentSliders, measure, rank, read_table, write_attributes
from ncn.steering.documents import DocumentInputs
from ncn.training.run_folder import RunFolder
from ncn.training.train import train
from tiny import MODEL, assert_same_run, at_step, interrupt, recipe


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
        {"controller": {**MODEL["controller"], "sliders": ["dialogue"], "sliders_enter": enter, "slider_rank": 2}},
        only_inputs=True,
    )
    train(last, data / "data", tmp_path / "last", start=tmp_path / "plain", **options)
    (plain, _), (model, _) = ncn.load(tmp_path / "plain"), ncn.load(tmp_path / "last")
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.state_dict().items())
    learned = {name: weights[name] for name, role in parameter_roles(model).items() if role.from_outside}
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
            recipe({"controller": {**MODEL["controller"], "sliders": ["length"], "slider_rank": 2}}),
            tmp_path / "last",
            r"of another model: controller\.sliders is",
        ),
    ]:
        with pytest.raises(ncn.UserError, match=words):
            train(wrong, data / "data", tmp_path / "none", start=start, **options)
    assert not (tmp_path / "none").exists()
