"""The report of an A/B: its words follow from its numbers, it says what is missing, and it refuses what is unfair."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from experiments import TOKENS, make_experiment
from ncn.cli import app
from ncn.errors import UserError
from ncn.experiments.ab.comparisons import summarise
from ncn.experiments.ab.report import report
from ncn.experiments.ab.results import Experiment

BETTER = {"baseline": 0.0, "static": -0.01, "local": -0.03, "ncn": -0.08, "baseline-again": 0.0}
WORSE = BETTER | {"ncn": 0.05}
SAME = dict.fromkeys(BETTER, 0.0)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment whose NCN is better, with an ablation that costs nothing and one that costs much."""
    folder = tmp_path_factory.mktemp("experiments") / "full"
    effects = BETTER | {"ncn-without-gain": -0.08, "ncn-without-head_gate": 0.0}
    make_experiment(folder, effects, flops={"ncn": 2.5e6})
    report(folder)
    return folder


@pytest.fixture
def copy(full: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "copy"))


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def summary_of(folder: Path) -> dict[str, Any]:
    return summarise(Experiment.open(folder))


def test_a_planted_advantage_is_found_with_its_size(full: Path) -> None:
    summary = read(full / "report" / "summary.json")
    assert summary["verdict"] == "better"
    assert summary["best_control"] == "local"
    rows = {row["other"]: row for row in summary["controls"]}
    assert list(rows) == ["baseline", "static", "local"]
    for name, row in rows.items():
        nats = row["nats_per_token"]
        assert nats["low"] < BETTER["ncn"] - BETTER[name] < nats["high"]
        assert row["p"] <= row["holm_p"] < 0.05
    local = rows["local"]["bits_per_byte"]
    size, reach = -local["mean"], (local["high"] - local["low"]) / 2
    assert summary["sentence"] == (
        f"NCN beats the best control (local gates) by {size:.4f} ± {reach:.4f} bits per byte (5 seeds)."
    )


def test_ablations_are_compared_with_the_ncn_and_the_twin_with_the_baseline(full: Path) -> None:
    summary = read(full / "report" / "summary.json")
    gain, head_gate = summary["variants"]
    assert (gain["arm"], gain["other"], head_gate["arm"]) == ("ncn-without-gain", "ncn", "ncn-without-head_gate")
    assert head_gate["bits_per_byte"]["low"] > 0
    assert gain["bits_per_byte"]["low"] < 0 < gain["bits_per_byte"]["high"]
    (again,) = summary["again"]
    assert (again["arm"], again["other"]) == ("baseline-again", "baseline")
    assert again["bits_per_byte"]["low"] < 0 < again["bits_per_byte"]["high"]


@pytest.mark.parametrize(
    ("effects", "verdict", "words"),
    [
        (WORSE, "worse", r"NCN is worse than the best control \(local gates\) by 0\.0\d+ ± 0\.0\d+ bits per byte"),
        (SAME, "no difference", r"No difference larger than 0\.0\d+ bits per byte was found between NCN and the best"),
        ({"baseline": 0.0, "ncn-without-gain": 0.0}, "unfinished", "NCN was not compared with a control"),
    ],
)
def test_the_sentence_follows_from_the_numbers(
    effects: dict[str, float], verdict: str, words: str, tmp_path: Path
) -> None:
    summary = summary_of(make_experiment(tmp_path / "experiment", effects, random_seed=1))
    assert summary["verdict"] == verdict
    assert re.match(words, summary["sentence"])


def test_the_largest_difference_not_excluded_is_named(tmp_path: Path) -> None:
    summary = summary_of(make_experiment(tmp_path / "experiment", SAME, random_seed=1))
    rows = {row["other"]: row["bits_per_byte"] for row in summary["controls"]}
    best = rows[summary["best_control"]]
    assert f"larger than {max(-best['low'], best['high']):.4f} bits" in summary["sentence"]
    assert best["mean"] == max(row["mean"] for row in rows.values())


def test_equal_arms_are_hardly_ever_said_to_differ(tmp_path: Path) -> None:
    """Of 30 experiments without a difference, with 3 seeds, at most 4 say that there is one (chance of more: 2 %)."""
    said = []
    for number in range(30):
        folder = tmp_path / str(number)
        effects = {"baseline": 0.0, "local": 0.0, "ncn": 0.0}
        make_experiment(folder, effects, seeds=(1, 2, 3), documents=20, random_seed=number)
        said.append(summary_of(folder)["verdict"])
    assert set(said) <= {"better", "worse", "no difference"}
    assert sum(word != "no difference" for word in said) <= 4


def test_beating_the_best_control_only_is_not_called_a_victory(tmp_path: Path) -> None:
    folder = make_experiment(tmp_path / "experiment", {"baseline": 0.0, "local": -0.01, "ncn": -0.04}, noise=0.001)
    for seed, shift in zip(range(1, 6), (9.0, -4.0, -3.0, -2.0, 1.0), strict=True):  # the baseline is very noisy
        path = folder / "runs" / "baseline" / f"seed-{seed}" / "documents.safetensors"
        arrays = load_file(path)
        save_file(arrays | {"nats": arrays["nats"] * (1 + shift / 100)}, path)
    summary = summary_of(folder)
    assert summary["best_control"] == "local"
    assert summary["verdict"] == "no difference"
    assert "but not clearly ahead of widened baseline" in summary["sentence"]


def test_seed_noise_and_the_smallest_effect_are_those_of_the_pairs(full: Path) -> None:
    noise = read(full / "report" / "summary.json")["noise"]
    experiment = Experiment.open(full)
    # Two independent arms, 0.01 nats each, in bits per byte.
    assert noise["sd"] == pytest.approx(0.01 * 2**0.5 * experiment.nats_to_bits_per_byte, rel=0.5)
    effects = list(noise["smallest_detectable_effect"].values())
    assert list(noise["smallest_detectable_effect"]) == ["3", "5", "10", "20"]
    assert effects == sorted(effects, reverse=True)


def test_tokens_saved_at_equal_loss_by_hand(tmp_path: Path) -> None:
    folder = make_experiment(tmp_path / "experiment", {"baseline": 0.0, "ncn": 0.0}, seeds=(1, 2))
    curves = {"baseline": [(0.5, 3.0), (1.0, 2.0)], "ncn": [(0.5, 2.5), (0.75, 1.5), (1.0, 1.0)]}
    for name, points in curves.items():
        for seed in (1, 2):
            lines = [{"step": 1, "tokens": share * TOKENS, "validation_loss": loss} for share, loss in points]
            path = folder / "runs" / name / f"seed-{seed}" / "metrics.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summary_of(folder)["tokens_saved"]["baseline"]["mean"] == pytest.approx(1 - 0.625)
    (folder / "runs").rename(folder / "others")
    (folder / "runs").mkdir()
    for name, other in (("baseline", "ncn"), ("ncn", "baseline")):
        (folder / "others" / name).rename(folder / "runs" / other)
    assert summary_of(folder)["tokens_saved"]["baseline"]["mean"] == pytest.approx(-(1 - 0.625))


def test_at_equal_flops_and_time_the_dearer_arm_is_read_earlier(full: Path) -> None:
    experiment = Experiment.open(full)
    for row in read(full / "report" / "summary.json")["equal_cost"]:
        assert row["flops"]["cost_ratio"] == pytest.approx(1.25)
        expected = []
        for seed in experiment.seeds:
            ours, theirs = experiment.curves["ncn", seed], experiment.curves[row["other"], seed]
            expected.append(np.interp(TOKENS / 1.25, *ours.T) - theirs[-1, 1])
        scale = experiment.nats_to_bits_per_byte
        assert row["flops"]["per_seed"] == pytest.approx(np.array(expected) * scale)
        assert row["seconds"]["mean"] == pytest.approx(row["flops"]["mean"])
        assert row["flops"]["mean"] > row["tokens"]["mean"]


def test_a_curve_validated_in_part_ends_on_the_same_part(copy: Path) -> None:
    facts = read(copy / "experiment.json")
    tokens = load_file(copy / "runs" / "ncn" / "seed-1" / "documents.safetensors")["tokens"]
    part = int(tokens[:10].sum() + 0.5 * tokens[10])
    part -= part % 16
    for arm in facts["arms"].values():
        arm["recipe"] = {"model": {"context_length": 1}, "train": {"eval_tokens": part - 3, "context": None}}
    (copy / "experiment.json").write_text(json.dumps(facts))
    nats = load_file(copy / "runs" / "ncn" / "seed-1" / "documents.safetensors")["nats"]
    share = (part - tokens[:10].sum()) / tokens[10]
    curve = Experiment.open(copy).curves["ncn", 1]
    assert curve[-1, 1] == pytest.approx((nats[:10].sum() + share * nats[10]) / part)
    assert len(curve) == 20


def test_the_page_stands_alone_and_shows_every_number(full: Path) -> None:
    folder = full / "report"
    assert {path.name for path in folder.iterdir()} == {
        "summary.json", "report.md", "report.html", "differences.png", "curves.png", "sweep.png"
    }  # fmt: skip
    summary, text, page = read(folder / "summary.json"), (folder / "report.md").read_text(), (folder / "report.html")
    assert summary["sentence"] in text
    assert text.index(summary["sentence"]) < text.index("## The arms")
    for level in summary["levels"].values():
        assert f"{level['bits_per_byte']['mean']:.4f}" in text
    for row in summary["controls"]:
        assert f"{row['perplexity']['mean']:+.3f}".replace("-", "−") in text
    html = page.read_text("utf-8")
    assert html.count("data:image/png;base64,") == 3
    assert base64.b64encode((folder / "curves.png").read_bytes()).decode() in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "not final" not in text
    assert "NaN" not in (folder / "summary.json").read_text()


def test_an_unfinished_experiment_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = make_experiment(
        tmp_path / "experiment", BETTER, unfinished=[("static", 1), ("static", 2), ("static", 3), ("static", 4),
        ("static", 5), ("ncn", 5)], diverged=[("local", 2)],
    )  # fmt: skip
    result = report(folder)
    assert result.missing is not None
    assert result.missing.startswith("Of 25 runs, 1 diverged (local with seed 2) and 6 have not finished (static with")
    assert "the best control that has finished (local gates)" in result.sentence
    assert "(3 seeds)" in result.sentence
    assert any("1 of 5 runs of local gates diverged" in warning for warning in result.warnings)
    text = (folder / "report" / "report.md").read_text()
    assert "**This report is not final.**" in text
    assert result.missing in text


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    folder = make_experiment(tmp_path / "experiment", BETTER, seeds=(1,))
    result = report(folder)
    assert "with one seed, which cannot tell a difference from chance" in result.sentence
    summary = read(folder / "report" / "summary.json")
    assert summary["verdict"] == "one seed"
    assert summary["noise"] is None
    assert all(row["p"] is None and row["bits_per_byte"]["low"] is None for row in summary["controls"])
    assert "With one seed there is no interval" in (folder / "report" / "report.md").read_text()


def test_a_best_rate_at_the_edge_is_warned_about_but_not_beside_a_divergence(tmp_path: Path) -> None:
    folder = make_experiment(tmp_path / "experiment", BETTER, best_rates={"ncn": "0.5", "local": "2"})
    found = [warning for warning in report(folder).warnings if "learning rate" in warning]
    assert found == [
        "The best learning rate of NCN is the lowest that was tried (0.5): a better one may lie beyond it."
    ]


def test_an_a_a_pair_that_differs_is_warned_about(tmp_path: Path) -> None:
    folder = make_experiment(tmp_path / "experiment", BETTER | {"baseline-again": 0.2})
    assert any("The A/A pair" in warning for warning in report(folder).warnings)


def test_arms_of_unequal_size_are_warned_about(copy: Path) -> None:
    facts = read(copy / "experiment.json")
    facts["arms"]["ncn"]["parameters"] = 1_090_000
    (copy / "experiment.json").write_text(json.dumps(facts))
    assert any("do not have the same size" in warning for warning in report(copy).warnings)


def test_runs_on_other_batches_are_refused(copy: Path) -> None:
    path = copy / "runs" / "ncn" / "seed-2" / "summary.json"
    path.write_text(json.dumps(read(path) | {"batches_sha256": "another"}))
    with pytest.raises(UserError, match=r"ncn/seed-2 and .*baseline/seed-2 were not trained on the same batches"):
        report(copy)


def test_runs_measured_on_other_documents_are_refused(copy: Path) -> None:
    path = copy / "runs" / "local" / "seed-3" / "documents.safetensors"
    arrays = load_file(path)
    save_file(arrays | {"tokens": arrays["tokens"] + 1}, path)
    with pytest.raises(UserError, match=r"local/seed-3 and .* were measured on different documents"):
        report(copy)


def test_mistakes_are_one_line(copy: Path, tmp_path: Path) -> None:
    def line(folder: Path) -> str:
        result = CliRunner().invoke(app, ["report", str(folder)])
        assert isinstance(result.exception, UserError)
        assert "\n" not in str(result.exception)
        return str(result.exception)

    assert "has no experiment.json; `ncn ab` makes one" in line(tmp_path)
    facts = read(copy / "experiment.json")
    damaged = copy / "runs" / "ncn" / "seed-1" / "documents.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert "documents.safetensors cannot be read" in line(copy)
    damaged.unlink()
    assert "has a summary and no documents.safetensors" in line(copy)
    (copy / "experiment.json").write_text(json.dumps(facts | {"format": 2}))
    assert "has format 2 and this version reads format 1" in line(copy)
    (copy / "experiment.json").write_text(json.dumps({key: facts[key] for key in facts if key != "seeds"}))
    assert "lacks 'seeds'" in line(copy)
    (copy / "experiment.json").write_text(json.dumps(facts))
    shutil.rmtree(copy / "runs")
    assert "no run in" in line(copy)
    assert "35 have not finished" in line(copy)


def test_the_verb_prints_the_sentence_and_the_files(full: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(full)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == read(full / "report" / "summary.json")["sentence"]
    assert {Path(line).name for line in lines[1:]} == {path.name for path in (full / "report").iterdir()}
