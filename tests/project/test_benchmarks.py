"""The benchmarks run, in small, and rewrite only what they measured."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from ncn.data.sources import open_source
from tiny import stories

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")  # the package sets it where it is not set
    main = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(main, "HERE", tmp_path)
    return main


def test_the_page_says_what_was_measured(benchmarks: Any) -> None:
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text("utf-8"))
    page = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    assert page.split(benchmarks.MARK)[1].strip() == benchmarks.tables(results).strip()


def test_one_part_is_measured_and_the_others_are_kept(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("results.json", "README.md"):
        (tmp_path / name).write_bytes((ROOT / "benchmarks" / name).read_bytes())
    before = json.loads((tmp_path / "results.json").read_text("utf-8"))
    (tmp_path / "text.txt").write_text(stories(0, 20_000))
    documents = sum(1 for _ in open_source(str(tmp_path / "text.txt"), "text", "train").pieces())
    measure = benchmarks.prepare_throughput.measure
    monkeypatch.setattr(
        benchmarks.prepare_throughput, "measure", lambda rounds: measure(rounds, str(tmp_path / "text.txt"))
    )
    benchmarks.main(["--only", "prepare", "--steps", "4"])
    after = json.loads((tmp_path / "results.json").read_text("utf-8"))
    found = after.pop("prepare")
    before.pop("prepare", None)
    assert after == before
    assert (found["documents"], found["rounds"]) == (documents, 2)
    assert min(found["tokens_per_second"].values()) > 0
    speed = found["speed_against_tokenizers"]
    assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    page = (tmp_path / "README.md").read_text("utf-8")
    assert page.startswith((ROOT / "benchmarks" / "README.md").read_text("utf-8").split(benchmarks.MARK)[0])
    assert f"| {documents} documents, " in page


def test_an_arm_steps_in_a_process_of_its_own(benchmarks: Any) -> None:
    elsewhere = benchmarks.train_step.elsewhere
    with elsewhere("static twin", "mini", "float32", compiled=False) as tell:
        assert [tell("step"), tell("step")] == ["done", "done"]
    other = elsewhere("no such preset's arm", "no such preset", "float32", compiled=False)
    with pytest.raises(RuntimeError, match="has ended"), other as tell:
        tell("step")


def test_a_checkout_against_itself(benchmarks: Any) -> None:
    versions = importlib.import_module("benchmarks.versions")
    works = ["training step, bfloat16", "decoding, sampled"]
    found = dict(versions.measure(ROOT, rounds=2, warmup=1, only=works))
    assert [*found] == works
    for work in found.values():
        assert 0 < work["low"] <= work["median"] <= work["high"]
        assert work["milliseconds"] > 0


def test_a_ratio_is_of_this_checkout_to_the_one_that_is_named(
    benchmarks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = importlib.import_module("benchmarks.versions")
    (tmp_path / "src" / "ncn").mkdir(parents=True)
    (tmp_path / "src" / "ncn" / "__init__.py").write_text("import time\n\ntime.sleep(0.3)\n")
    versions.main([str(tmp_path), "--rounds", "2", "--only", "import ncn"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("import ncn: this / other ")
    assert float(line.split()[5].rstrip(",")) < 0.9
    with pytest.raises(SystemExit, match="no package"):
        versions.main([str(tmp_path / "src")])
