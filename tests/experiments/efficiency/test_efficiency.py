"""`ncn efficiency`: what it reads, in which unit it compares, and what it writes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ncn.cli import app
from ncn.errors import UserError
from ncn.experiments.efficiency.run import measure, read_log, write_report
from ncn.training.run_folder import RunFolder
from tiny import recipe

TOKENS = np.arange(1, 61) * 1_000.0


def losses(factor: float = 1.0, noise: float = 0.005) -> np.ndarray[Any, Any]:
    """A power law, reached with fewer tokens where `factor` is larger."""
    return 1.5 + 20 * (factor * TOKENS) ** -0.3 + np.random.default_rng(0).normal(0, noise, len(TOKENS))


def write_csv(path: Path, columns: str, *values: Any) -> str:
    lines = [",".join(f"{value}" for value in row) for row in zip(*values, strict=True)]
    path.write_text("\n".join([columns, *lines]) + "\n", "utf-8")
    return str(path)


def write_run(folder: Path, factor: float, *, validation: bool = False, **summary: Any) -> str:
    """A run folder with a log of the given shape, in nats and in bits per byte."""
    run = RunFolder.create(folder, recipe(), {})
    for tokens, loss in zip(TOKENS, losses(factor), strict=True):
        line = {"step": int(tokens), "tokens": int(tokens), "loss": loss, "bits_per_byte": loss / 2}
        line |= {"validation_loss": loss + 1, "validation_bits_per_byte": (loss + 1) / 2} if validation else {}
        run.append_metrics(line)
    (folder / "summary.json").write_text(json.dumps({"loss": 1.0, **summary}), "utf-8")
    return str(folder)


def test_csv_files_and_the_published_run_are_read(tmp_path: Path) -> None:
    for column in ("loss", "train_loss"):
        log = read_log(write_csv(tmp_path / "a.csv", f"step,tokens,{column}", TOKENS, TOKENS, losses()))
        np.testing.assert_array_equal(log.values["training", "nats per token"][0], TOKENS)
        np.testing.assert_array_equal(log.values["training", "nats per token"][1], losses())
    published = read_log("published").curve("training", "nats per token")
    assert published.tokens[-1] == 519_700_480
    assert published.verdict == "still improving"
    assert published.smooth[-1] == pytest.approx(1.64, abs=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n1,2\n", "must have the columns tokens and loss .* it has step, loss"),
        ("", "it has none"),
        ("tokens,loss\n1,two\n", "line 2: loss is 'two', which is no number"),
        ("tokens,loss\n" + "".join(f"{n},2\n" for n in range(1, 9)), "fewer than 12 points"),
        ("tokens,loss\n" + "".join(f"{n % 7},2\n" for n in range(1, 20)), "tokens must be above zero and increase"),
    ],
)
def test_a_wrong_csv_gets_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=message) as error:
        read_log(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no run folder and no CSV file"):
        read_log(str(tmp_path / "absent.csv"))
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="neither a run folder nor a CSV file"):
        read_log(str(path))


def test_bits_per_byte_where_every_run_has_them_and_nats_with_a_warning(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", 1), write_run(tmp_path / "other", 2)
    result = measure([one, other])
    assert result.unit == "bits per byte"
    assert not any("nats" in warning for warning in result.warnings)
    assert result.curves[0].smooth[-1] == pytest.approx(losses()[-1] / 2, abs=0.01)
    lone = write_csv(tmp_path / "lone.csv", "tokens,loss", TOKENS, losses())
    mixed = measure([one, other, lone])
    assert mixed.unit == "nats per token"
    assert any("share their vocabulary" in warning for warning in mixed.warnings)
    units = {(pair[0].name, pair[1].name): pair[0].unit for pair in mixed.pairs}
    assert units["one", "other"] == "bits per byte"
    assert units["one", "lone"] == "nats per token"


def test_validation_losses_are_preferred_where_all_have_them(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", 1, validation=True), write_run(tmp_path / "other", 2, validation=True)
    assert measure([one, other]).curves[0].kind == "validation"
    assert measure([one, other], loss="training").curves[0].kind == "training"
    third = write_run(tmp_path / "third", 1)
    assert measure([one, third]).curves[0].kind == "training"
    with pytest.raises(UserError, match="third has fewer than 12 validation losses"):
        measure([one, third], loss="validation")


def test_twice_as_good_with_every_token_needs_half_of_them(tmp_path: Path) -> None:
    result = measure([write_run(tmp_path / "slow", 1), write_run(tmp_path / "fast", 2)])
    pairs = {pair["run"]: pair for pair in result.as_dict()["pairs"]}
    assert pairs["fast"]["share_of_its_tokens"] == pytest.approx(0.5, abs=0.08)
    assert not pairs["slow"]["reached"]
    # the same noise in both runs: the law of the slow one foresees the loss at about twice the tokens
    assert pairs["slow"]["power_law_tokens"]["value"] == pytest.approx(2 * TOKENS[-1], rel=0.1)


def test_a_run_whose_summary_says_so_is_diverging(tmp_path: Path) -> None:
    result = measure([write_run(tmp_path / "run", 1, diverged=True)])
    assert result.curves[0].verdict == "diverging"
    assert result.pairs == ()


def test_the_verb_writes_page_figures_and_json(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one", 1), write_run(tmp_path / "other", 2)]
    out = tmp_path / "report"
    shown = CliRunner().invoke(app, ["efficiency", *runs, "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "one: still improving after 60 k tokens" in shown.output
    data = json.loads((out / "efficiency.json").read_text("utf-8"))
    assert [run["name"] for run in data["runs"]] == ["one", "other"]
    page = (out / "efficiency.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://", page)
    assert "\nnan" not in (out / "efficiency.md").read_text("utf-8")
    wrong = CliRunner().invoke(app, ["efficiency", runs[0], "--loss", "test", "--out", str(out)])
    assert isinstance(wrong.exception, UserError)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / arm / "seed-1", factor) for arm, factor in (("a", 1), ("b", 2))]
    result = measure(runs)
    assert [curve.name for curve in result.curves] == runs
    assert all(path.exists() for path in write_report(result, tmp_path / "out"))
