"""Documents weighed such that sliders tell nothing about other attributes."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ncn
from ncn.config.model import ControllerConfig
from ncn.data.prepare import prepare
from ncn.steering.attributes import write_attributes
from ncn.steering.document_weights import HIGHEST, LOWEST, balancing_weights
from ncn.steering.documents import DocumentInputs
from ncn.training.begin import begin

NAMES = ["talk", "questions", "length", "rare"]


def attributes(correlation: float, documents: int = 2000) -> np.ndarray[Any, Any]:
    """Ranks; talk goes with questions, and a little with length."""
    drawn = np.random.default_rng(0).normal(size=(documents, 4))
    drawn[:, 1] = correlation * drawn[:, 0] + (1 - correlation**2) ** 0.5 * drawn[:, 1]
    drawn[:, 2] += 0.2 * drawn[:, 0]
    return drawn.argsort(0).argsort(0) / (documents - 1)


def correlations(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    centred = values - np.average(values, 0, weights)
    covariance = centred.T @ (centred * weights[:, None])
    spread = np.sqrt(np.diag(covariance))
    return covariance / np.outer(spread, spread)


def test_sliders_are_balanced_against_everything() -> None:
    values = attributes(0.6)
    before = correlations(values, np.ones(len(values)))
    assert before[0, 1] > 0.5
    weights = balancing_weights(values, ["talk", "length"], NAMES)
    after = correlations(values, weights)
    assert np.abs(after[[0, 2]] - np.eye(4)[[0, 2]]).max() < 1e-4
    assert abs(after[1, 3] - before[1, 3]) < 0.1, "what is no slider stays as it is"
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    assert np.average(values, 0, weights) == pytest.approx(values.mean(0), abs=1e-5)
    assert LOWEST == weights.min() < weights.max() <= HIGHEST


def test_they_are_as_near_to_equal_as_can_be() -> None:
    values = attributes(0.1)
    weights = balancing_weights(values, ["talk"], NAMES)
    scaled = (values - values.mean(0)) / values.std(0)
    terms = np.stack([np.ones(len(values)), *scaled.T, *(scaled[:, :1] * scaled[:, 1:]).T], 1)
    wanted = np.eye(terms.shape[1])[0] * len(terms)
    # the point of the plane {w: termsᵀ w = wanted} that is nearest to 1
    nearest = 1 + terms @ np.linalg.solve(terms.T @ terms, wanted - terms.sum(0))
    assert LOWEST < nearest.min() < nearest.max() < HIGHEST
    assert weights == pytest.approx(nearest, abs=1e-4)


def test_missing_values_count_as_the_mean() -> None:
    values = attributes(0.5)
    values[::7, 1] = np.nan
    weights = balancing_weights(values, ["talk"], NAMES)
    known = ~np.isnan(values[:, 1])
    talk, questions = values[known, 0] - values[:, 0].mean(), values[known, 1] - np.nanmean(values[:, 1])
    assert abs((weights[known] * talk * questions).mean()) < 1e-5
    assert np.isfinite(weights).all()


def test_copies_cannot_be_taken_apart() -> None:
    values = attributes(0.5)
    values[:, 3] = values[:, 0]
    with pytest.raises(ncn.UserError, match=r"take talk and rare apart, which correlate by 1\.00"):
        balancing_weights(values, ["talk"], NAMES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories in which more is asked where more is said."""
    folder, drawn = tmp_path_factory.mktemp("balance"), random.Random(0)
    parts = ['"I see a {}", said Tom. ', '"Is it a {}?" said Ann. ', "They ran to the {}! ", "The {} is old and tall. "]
    nouns = ["cat", "dog", "hen", "cow", "pig", "fox", "owl", "bee", "ant", "bat", "elk", "emu"]
    stories = []
    for _ in range(400):
        talk, rare = drawn.random(), drawn.randint(1, 12)
        chosen = drawn.choices(parts, [talk, talk, 0.7, 0.7], k=drawn.randint(4, 16))
        stories.append("".join(part.format(drawn.choice(nouns[:rare])) for part in chosen))
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(stories))
    prepare([str(folder / "text.txt")], folder / "data", vocab_size=300)
    write_attributes(folder / "data")
    return folder / "data"


def test_a_target_counts_as_its_document_weighs(data: Path) -> None:
    dataset = ncn.TokenDataset.open(data)
    controller = ControllerConfig(sliders=("dialogue", "length"))
    given = DocumentInputs(dataset, controller, balanced=True)
    assert given.weights is not None
    assert given.weights.std() > 0.1
    batch = 3, 5, 16, 64
    control = given.batch(*batch, 0.3, 0.0)
    shares = given.shares(*batch, control)
    assert shares is not None
    assert control.sliders is not None
    unset = control.sliders.isnan().all(-1)
    assert 0 < unset.float().mean() < 1
    assert (shares[unset] == 1).all()
    ids = dataset.batch(*batch).inputs
    starts = dataset.batch_starts(*batch)
    for row in range(16):
        document = int(np.searchsorted(given.starts, starts[row], side="right")) - 1
        for place in range(64):
            document += int(place > 0 and ids[row, place] == dataset.separator_id)
            if not unset[row, place]:
                assert shares[row, place] == given.weights[document % dataset.documents]
    plain = DocumentInputs(dataset, controller)
    assert plain.shares(*batch, control) is None


def recipe(*settings: str) -> ncn.Recipe:
    return ncn.Recipe.read(
        "mini",
        [
            "tokens=4000", "context=64", "context_length=64", "d_model=32", "num_layers=2", "batch_size=6", "clip=1e9",
            "controller.sliders=[dialogue]", "controller.width=8", "balance_sliders=true", "precision=float32",
            *settings,
        ],
    )  # fmt: skip


def test_training_weighs_its_targets(data: Path, tmp_path: Path) -> None:
    grads = []
    for parts in (1, 2, 3, None):
        accumulation = f"accumulation={parts or 1}"
        training = begin(recipe(accumulation), data, tmp_path / str(parts), valid=None, resume=False)
        if parts is None:  # by hand, token by token
            batch = training.dataset.batch(1, 0, 6, 64)
            control, shares = training._control()
            assert shares is not None
            assert shares.std() > 0.1
            logits = training.model(batch.inputs, control=control).logits.flatten(0, 1)
            each = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="none")
            ((each * shares.flatten()).sum() / shares.numel()).backward()
        else:
            training.train_step()
        grads.append({name: parameter.grad for name, parameter in training.model.named_parameters()})
    for other in grads[1:]:
        for name, one in grads[0].items():
            torch.testing.assert_close(one, other[name], atol=1e-6, rtol=1e-3)


def test_there_must_be_sliders_to_balance(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ncn.UserError, match=r"balance_sliders needs sliders to balance, such as controller\.sliders="):
        begin(recipe("controller.sliders=[]"), data, tmp_path / "none", valid=None, resume=False)
    assert not (tmp_path / "none").exists()
