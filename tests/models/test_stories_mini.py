"""The model that ships with the package: small, readable by the package's own loader, and as good as was reported."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch

import ncn
from ncn.data.prepare import prepare
from ncn.inference.evaluate import evaluate
from ncn.inference.generate import generate

ASSETS = Path(str(resources.files("ncn"))) / "assets"
REPORTED = json.loads((Path(__file__).parents[2] / "results" / "mini" / "summary.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def loaded() -> tuple[ncn.ModulatedTransformer, ncn.Tokenizer]:
    return ncn.load("stories-mini")


def test_it_is_small_and_in_bfloat16() -> None:
    folder = ASSETS / "stories-mini"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_its_loss_on_validation_stories_is_the_reported_one(
    loaded: tuple[ncn.ModulatedTransformer, ncn.Tokenizer], tmp_path: Path
) -> None:
    prepare(["tinystories-sample-valid"], tmp_path, tokenizer=str(ASSETS / "stories-mini"))
    result = evaluate(loaded[0], ncn.TokenDataset.open(tmp_path), max_tokens=60_000)
    # the first ninth of the file against the whole of it
    assert result.bits_per_byte == pytest.approx(REPORTED["validation_bits_per_byte"], rel=0.03)
    assert result.bits_per_byte < 0.92


def test_its_signals_have_left_neutral(loaded: tuple[ncn.ModulatedTransformer, ncn.Tokenizer]) -> None:
    model, tokenizer = loaded
    scan = ncn.scan(model, tokenizer, "Timmy wanted an apple. He looked in the box, but it was empty.")
    assert all(values.std(axis=0).mean() > 0.01 for values in scan.signals.values())


def test_it_tells_a_story(loaded: tuple[ncn.ModulatedTransformer, ncn.Tokenizer]) -> None:
    story = "".join(generate(*loaded, "Once upon a time", max_tokens=60, temperature=0.0))
    assert len(story.split()) > 30
    assert "." in story
