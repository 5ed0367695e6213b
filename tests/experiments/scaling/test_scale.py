"""`ncn scale`: the plan, the learning rates, the report; and, slowly, the whole on tiny models, interrupted once."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ncn.cli import app
from ncn.errors import UserError
from ncn.experiments.scaling.plan import ARMS, Ladder, run_path
from ncn.experiments.scaling.report import collect, write_report
from ncn.experiments.scaling.run import begin, describe, make_plan, run_scale
from ncn.machine.files import read_json, write_json

SETTINGS = ("vocab_size=300", "context_length=32", "batch_size=4", "precision=float32")
SIZES = "32x1,32x2,64x2,64x3"
BUDGETS = (1_280, 2_560)


def plan(folder: Path, data: Path, valid: Path, **changes: Any) -> Ladder:
    options: dict[str, Any] = {"sizes": SIZES, "budgets": BUDGETS, "seeds": 1, "settings": SETTINGS} | changes
    return make_plan(
        folder, "mini", options["settings"], options["sizes"], options["budgets"], options["seeds"],
        data=str(data), valid=str(valid), progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory, data: Path, valid: Path) -> Ladder:
    """A ladder whose plan is written, and whose runs have summaries that follow a law, but were never trained."""
    found = plan(tmp_path_factory.mktemp("ladder"), data, valid)
    begin(found, 1)
    generator = np.random.default_rng(0)
    for rung in found.rungs:
        for arm in ARMS:
            n = rung.counts(arm).working * (1.2 if arm == "ncn" else 1)
            for tokens in found.budgets:
                loss = 1 + (n / 1e5) ** -0.3 + (tokens / 2e3) ** -0.4 + generator.normal(0, 0.002)
                folder = run_path(found.out, arm, rung.name, tokens, 1)
                folder.mkdir(parents=True)
                write_json(folder / "summary.json", {"tokens": tokens, "validation_loss": float(loss)})
    rates = {arm: {rung.name: 1.0 for rung in found.rungs} for arm in ARMS}
    write_json(found.out / "tuning.json", {"losses": {}, "rates": rates})
    return found


def test_runs_of_a_place_differ_in_the_model_alone(ladder: Ladder) -> None:
    rung = ladder.rungs[1]
    jobs = [ladder.job(rung, arm, 2_560, 1, 0.5) for arm in ARMS]
    assert jobs[0].recipe.train == jobs[1].recipe.train
    assert jobs[0].recipe.model.d_model == jobs[1].recipe.model.d_model
    assert jobs[0].out != jobs[1].out
    assert jobs[0].recipe.train.learning_rate == pytest.approx(0.5 * ladder.recipe.train.learning_rate)
    assert jobs[0].recipe.train.muon_learning_rate == pytest.approx(0.5 * ladder.recipe.train.muon_learning_rate)
    assert jobs[0].valid != ladder.tuning_job(rung, "ncn", 1.0).valid  # the validation text chooses nothing
    assert len({ladder.job(r, a, t, 1, 1.0).out for r in ladder.rungs for a in ARMS for t in BUDGETS}) == 16


def test_the_plan_is_told_before_anything_runs(ladder: Ladder) -> None:
    facts = read_json(ladder.out / "scale.json")
    text = describe(ladder, facts, 1)
    for rung in ladder.rungs:
        assert f"{rung.counts('ncn').total:,}" in text
        assert f"{rung.counts('baseline').total:,}" in text
        assert facts["sizes"][rung.name]["ncn"]["counts"] == rung.counts("ncn").as_dict()
    assert "16 runs of 1.28k, 2.56k tokens" in text
    assert "at least 18 of 2.56k tokens to tune the learning rate at 32x1, 64x2, 64x3" in text
    assert re.search(r"about \d+ seconds here", text)


def test_another_plan_in_the_folder_is_refused(ladder: Ladder, data: Path, valid: Path) -> None:
    assert begin(ladder, 1) == read_json(ladder.out / "scale.json")
    with pytest.raises(UserError, match=r"was begun with budgets = \[1280, 2560\], and now it is \[1280, 3840\]"):
        begin(plan(ladder.out, data, valid, budgets=(1_280, 3_840)), 1)
    with pytest.raises(UserError, match="has the sizes 32x1, 32x2, 64x2, 64x3, and now they are 32x1, 64x2, 64x3;"):
        begin(plan(ladder.out, data, valid, sizes="32x1,64x2,64x3"), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": "32,64"}, "2 sizes and 2 budgets determines no law"),
        ({"budgets": (5_000,)}, "determines no law"),
        ({"budgets": (1_000, 2_000)}, "less than ten steps of 128 tokens"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_plans_that_cannot_be(tmp_path: Path, data: Path, valid: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(tmp_path, data, valid, **changes)


def test_the_report_says_what_the_runs_say(ladder: Ladder) -> None:
    files = write_report(ladder.out)
    assert all(path.stat().st_size > 0 for path in files)
    result = read_json(ladder.out / "scaling.json")
    assert len(result["runs"]) == 16
    assert result["missing"] == []
    assert result["held_out"]["size"] == "64x3"
    constants = result["fit"]["constants"]
    assert constants["m_N ncn"]["low"] < 1.2 < constants["m_N ncn"]["high"]
    assert all("refused" in row for row in result["projection"])
    assert "lower than the widened baseline's" in result["sentences"][0]
    page = (ladder.out / "scaling.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 4
    json.dumps(result, allow_nan=False)


def test_missing_runs_are_named_and_other_ladders_join(ladder: Ladder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    facts = read_json(ladder.out / "scale.json")
    write_json(copy / "scale.json", facts)
    for path in sorted(ladder.out.glob("runs/*/*/*/*/summary.json"))[:-1]:
        other = copy / path.relative_to(ladder.out)
        other.parent.mkdir(parents=True)
        other.write_bytes(path.read_bytes())
    ends = collect([copy])
    assert len(ends.points) == 15
    assert ends.missing == ("runs/ncn/64x3/tokens-2.56k/seed-1 has not finished",)
    assert len(collect([ladder.out, copy]).points) == 31
    facts["data"]["validation"] = "another"
    write_json(copy / "scale.json", facts)
    with pytest.raises(UserError, match="validated on different texts"):
        collect([ladder.out, copy])


def test_an_unknown_launcher_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["scale", "--out", str(tmp_path / "ladder"), "--launcher", "slurm"])
    assert isinstance(result.exception, UserError)
    assert "unknown launcher 'slurm'; launchers: local, ray" in str(result.exception)
    assert not (tmp_path / "ladder").exists()


def test_the_verb_tells_what_the_full_ladder_would_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["scale", "--plan", "--sizes", "32,64,96"])
    assert shown.exit_code == 0, shown.output
    assert "hours of an H100 at 40% of 989 TFLOP/s" in shown.output
    assert "Memory per device" in shown.output
    assert list(tmp_path.iterdir()) == []  # nothing was started
    for wrong, message in ((["scale"], "--out"), (["scale", "--plan", "--utilisation", "2"], "between 0 and 1")):
        error = CliRunner().invoke(app, wrong).exception
        assert isinstance(error, UserError)
        assert message in str(error)


@pytest.mark.slow
def test_a_whole_ladder_from_nothing_and_again(tmp_path: Path, data: Path, valid: Path) -> None:
    options: dict[str, Any] = {
        "settings": SETTINGS, "sizes": "32x1,32x2,64x2", "budgets": BUDGETS, "data": str(data), "valid": str(valid),
        "workers": 2, "progress": False,
    }  # fmt: skip
    said: list[str] = []
    files = run_scale(tmp_path / "out", say=said.append, **options)
    assert all(path.exists() for path in files)
    result = read_json(tmp_path / "out" / "scaling.json")
    assert len(result["runs"]) == 12
    assert "refused" in result["held_out"]  # three sizes leave none to hold out
    assert any("12 runs" in line for line in said)
    summaries = sorted((tmp_path / "out" / "runs").rglob("summary.json"))
    times = [path.stat().st_mtime_ns for path in summaries]
    run_scale(tmp_path / "out", say=said.append, **options)
    assert [path.stat().st_mtime_ns for path in summaries] == times
