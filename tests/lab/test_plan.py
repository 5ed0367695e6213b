"""An experiment's plan: written once with what is measured, then only the same plan goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ncn.config.training import TrainConfig
from ncn.errors import UserError
from ncn.lab.plan import begin_experiment
from ncn.machine.files import read_json

TRAIN = TrainConfig(device="cpu", precision="float32")
FACTS: dict[str, Any] = {
    "seeds": [1, 2],
    "arms": {name: {"recipe": {"train": {"clip": 1.0, "device": "cpu"}}} for name in ("baseline", "ncn")},
}


def measure() -> dict[str, Any]:
    arms = {name: arm | {"seconds_per_step": 0.5} for name, arm in FACTS["arms"].items()}
    return {"arms": arms, "losses": {"new": [1.0]}}


def not_again() -> dict[str, Any]:
    raise AssertionError("measured again")


def test_the_file_holds_the_facts_and_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "experiment.json"
    found = begin_experiment(path, FACTS, TRAIN, measure)
    assert found == read_json(path)
    assert list(found) == ["command", "environment", "seeds", "arms", "losses"]
    assert found["environment"]["autocast"] == "None"
    assert found["arms"]["ncn"] == FACTS["arms"]["ncn"] | {"seconds_per_step": 0.5}
    # what was measured, and settings that change no result, may be others
    arms = {name: {"recipe": {"train": {"clip": 1.0, "device": "cuda"}}} for name in ("baseline", "ncn")}
    assert begin_experiment(path, FACTS | {"arms": arms}, TRAIN, not_again) == found


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"seeds": [1]}, r"begun with seeds = \[1, 2\], and now it is \[1\]; give the same command"),
        ({"arms": {"ncn": FACTS["arms"]["ncn"]}}, "has the arms baseline, ncn, and now they are ncn; give"),
        ({"arms": dict(reversed(FACTS["arms"].items()))}, "has the arms baseline, ncn, and now they are ncn, baseline"),
        (
            {"arms": FACTS["arms"] | {"ncn": {"recipe": {"train": {"device": "cpu"}}}}},
            r"begun with arms\.ncn\.recipe\.train\.clip = 1\.0, and now it is None",
        ),
        ({"more": 1}, "begun with more = None, and now it is 1"),
    ],
)
def test_another_plan_is_refused(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    begin_experiment(tmp_path / "experiment.json", FACTS, TRAIN, measure)
    with pytest.raises(UserError, match=message):
        begin_experiment(tmp_path / "experiment.json", FACTS | facts, TRAIN, not_again)
