"""Decoupled sliders: each moves its own attribute alone, in a world that is as linear as was assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ncn
from ncn.decoupling import Decoupling
from ncn.experiments.steering.obedience import SETTINGS

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
    assert not np.allclose(SLOPES, np.diag(SLOPES.diagonal()))
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
    path.write_text(json.dumps(found))
    slopes = SLOPES.copy()
    slopes[2, 2] = 1.2
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


def test_what_transformers_and_generate_are_given_is_the_same_thing(tmp_path: Path) -> None:
    controller = {"sliders": list(NAMES), "width": 8}
    model = ncn.ModulatedTransformer(ncn.NCNConfig.preset("mini", d_model=32, num_layers=1, controller=controller))
    sliders = Decoupling.read(measured(tmp_path), 3.0)({"questions": 0.7})
    from ncn.given import Given

    given = Given.of(model.config, sliders)  # type: ignore[arg-type]
    assert given is not None
    assert given.sliders is not None
    assert given.sliders.flatten().tolist() == pytest.approx([*sliders.values()])


def wrong_uses(folder: Path) -> list[tuple[Path, float, str]]:
    files = {
        "empty": ("{}", 3.0, "is no steer.json of this version of `ncn steer`: measure the model again"),
        "no-json": ("dialogue", 3.0, "is no steer.json of this version"),
        "unset": (None, 3.0, "measure it with --others 0.5"),
        "guidance": (None, 1.0, "was measured with guidance 3, not 1: give --guidance 3"),
        "deaf": (None, 3.0, "slider questions hardly moves its own attribute (slope 0.02 with guidance 3)"),
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


def test_wrong_uses_are_one_line_each(tmp_path: Path) -> None:
    for path, guidance, words in wrong_uses(tmp_path):
        with pytest.raises(ncn.UserError) as caught:
            Decoupling.read(path, guidance)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    decoupling = Decoupling.read(measured(tmp_path), 3.0)
    with pytest.raises(ncn.UserError, match="no slider 'mood' was measured; dialogue, length, questions were"):
        decoupling({"mood": 0.5})
    with pytest.raises(ncn.UserError, match=r"slider dialogue is \(0.2, 1.5\); it must lie from 0 to 1"):
        decoupling({"dialogue": (0.2, 1.5)})
