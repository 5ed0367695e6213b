"""Decoupled sliders: each moves its own attribute alone, in a world that is as linear as was assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from typer.testing import CliRunner, Result

import ncn
from ncn.cli.app import app
from ncn.experiments.steering.obedience import SETTINGS
from ncn.models.saved import save_model
from ncn.steering.decoupling import Decoupling

NAMES = ("dialogue", "length", "questions")
SLOPES = np.array([[0.8, 0.1, -0.2], [-0.3, 0.7, 0.0], [0.4, 0.05, 0.5]])
"""Of the attributes (rows) over the sliders (columns)."""


def measured(folder: Path, slopes: npt.NDArray[np.float64] = SLOPES, **changes: Any) -> Path:
    """A steer.json of a model that answers with these slopes."""
    sliders = {
        name: {"3": {"means": {other: [0.45 + slope * (s - 0.5) for s in SETTINGS] for other, slope in zip(
            NAMES, slopes[:, column].tolist(), strict=True)}}}
        for column, name in enumerate(NAMES)
    }  # fmt: skip
    content = {"others": 0.5, "mixes": None, "guidances": ["3"], "settings": SETTINGS, "models": {"run": {}}}
    content["models"]["run"]["sliders"] = sliders  # type: ignore[index]
    path = folder / "steer.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_each_slider_moves_its_own_attribute_alone(tmp_path: Path) -> None:
    decoupling = Decoupling.read(measured(tmp_path), 3.0)
    response = SLOPES @ decoupling.mix
    np.testing.assert_allclose(response, np.diag(response.diagonal()), atol=1e-12)
    np.testing.assert_allclose(decoupling.mix.diagonal(), 1)
    set_to = decoupling({"dialogue": 0.9})
    assert list(set_to) == list(NAMES)
    assert set_to["dialogue"] == pytest.approx(0.9)
    moved = SLOPES @ (np.array([*set_to.values()]) - 0.5)
    np.testing.assert_allclose(moved[1:], 0, atol=1e-12)
    assert moved[0] > 0.2


def test_a_slider_that_makes_good_is_counted_as_steep_as_it_is_around_the_middle(tmp_path: Path) -> None:
    path = measured(tmp_path)
    found = json.loads(path.read_text())
    steep = [0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 0.9]  # 1.2 in the middle, less over all
    found["models"]["run"]["sliders"]["questions"]["3"]["means"]["questions"] = steep
    # what it is made good for counts from end to end
    flat = [0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.8]
    found["models"]["run"]["sliders"]["dialogue"]["3"]["means"]["questions"] = flat
    path.write_text(json.dumps(found))
    slopes = SLOPES.copy()
    slopes[2, 2], slopes[2, 0] = 1.2, 0.3 / (2 * (1 / 4 + 1 / 9 + 1 / 36))
    np.testing.assert_allclose(Decoupling.read(path, 3.0).mix, Decoupling(NAMES, slopes, 3.0).mix, atol=1e-12)


def test_what_is_not_named_rests_and_ends_bound_it(tmp_path: Path) -> None:
    decoupling = Decoupling.read(measured(tmp_path), 3.0)
    assert decoupling({}) == pytest.approx(dict.fromkeys(NAMES, 0.5))
    all_up = decoupling(dict.fromkeys(NAMES, 1.0))
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in all_up.values())
    assert 1.0 in all_up.values()  # length, to make good what dialogue takes from it, would go beyond


def test_a_slider_that_moves_takes_the_others_along(tmp_path: Path) -> None:
    decoupling = Decoupling.read(measured(tmp_path), 3.0)
    moving, first, last = (decoupling({"dialogue": value}) for value in ((0.2, 0.8), 0.2, 0.8))
    assert moving == {name: (first[name], last[name]) for name in NAMES}


def test_a_second_measurement_improves_on_the_first(tmp_path: Path) -> None:
    rough = Decoupling(NAMES, SLOPES + np.array([[0, 0.1, 0], [0.1, 0, 0], [0, -0.1, 0]]), 3.0)
    left = SLOPES @ rough.mix
    path = measured(tmp_path, left, mixes={"3": rough.mix.tolist()})
    better = Decoupling.read(path, 3.0)
    np.testing.assert_allclose(better.mix, Decoupling(NAMES, SLOPES, 3.0).mix, atol=1e-12)


def test_the_command_writes_what_the_settings_by_hand_write(tmp_path: Path) -> None:
    path = measured(tmp_path)
    controller = {"sliders": list(NAMES), "sliders_enter": "embedding", "kind": "static", "taps": [0]}
    model = ncn.ModulatedTransformer(ncn.NCNConfig.preset("mini", d_model=32, num_layers=1, controller=controller))
    assert model.slider_embedding is not None
    torch.nn.init.normal_(model.slider_embedding.weight, std=0.1)
    _, tokenizer = ncn.load("stories-mini")
    save_model(model, tmp_path / "model", tokenizer)

    def written(*options: str, model: str = str(tmp_path / "model")) -> Result:
        command = ["generate", model, "One day", "--max-tokens", "20", "--seed", "1", "--guidance", "3"]
        return CliRunner().invoke(app, [*command, *options])

    by_hand = [f"--set={name}={value!r}" for name, value in Decoupling.read(path, 3.0)({"questions": 0.7}).items()]
    decoupled = written("--set", "questions=0.7", "--decouple", str(path))
    assert decoupled.exit_code == 0, decoupled.output
    assert decoupled.output == written(*by_hand).output
    assert decoupled.output != written("--set", "questions=0.7").output
    wrong = written("--decouple", str(path), model="stories-mini")
    assert wrong.exit_code == 1
    assert "the sliders dialogue, length, questions were measured, and this model has none" in str(wrong.exception)


def wrong_uses(folder: Path) -> list[tuple[Path, float, str]]:
    files = {
        "empty": ("{}", 3.0, "is no steer.json of `ncn steer`"),
        "no-json": ("dialogue", 3.0, "is no steer.json of `ncn steer`"),
        "unset": (None, 3.0, "measure it with --others 0.5"),
        "guidance": (None, 1.0, "was measured with guidance 3, not 1: give --guidance 3"),
        "deaf": (None, 3.0, "with guidance 3 slider questions hardly moves its own attribute (slope 0.02, and"),
    }
    found = [(folder / "none.json", 3.0, "none.json cannot be read (No such file or directory): give the steer.json")]
    for name, (text, guidance, words) in files.items():
        (folder / name).mkdir()
        path = measured(
            folder / name,
            SLOPES * [1, 1, 0.04] if name == "deaf" else SLOPES,
            **({"others": None} if name == "unset" else {}),
        )
        if text is not None:
            path.write_text(text)
        found.append((path, guidance, words))
    return found


def test_sliders_that_cannot_be_taken_apart_are_refused() -> None:
    with pytest.raises(ncn.UserError, match="two sliders move the same attributes"):
        Decoupling(NAMES[:2], np.full((2, 2), 0.5), 1.0)
    # each moves the other's attribute more than its own: made good for, it would go backwards
    with pytest.raises(ncn.UserError, match=r"dialogue hardly moves .* \(slope 0.30, and -1.83 without"):
        Decoupling(NAMES[:2], np.array([[0.3, 0.8], [0.8, 0.3]]), 1.0)


def test_wrong_uses_are_one_line_each(tmp_path: Path) -> None:
    for path, guidance, words in wrong_uses(tmp_path):
        with pytest.raises(ncn.UserError) as caught:
            Decoupling.read(path, guidance)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    decoupling = Decoupling.read(measured(tmp_path), 3.0)
    with pytest.raises(ncn.UserError, match="this model has no slider 'mood'; it has dialogue, length, questions"):
        decoupling({"mood": 0.5})
    with pytest.raises(ncn.UserError, match=r"slider dialogue is \(0.2, 1.5\); it must lie from 0 to 1"):
        decoupling({"dialogue": (0.2, 1.5)})
