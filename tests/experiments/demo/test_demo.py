"""The demonstration, small: two arms on the same batches, a comparison, a story, a scan; and again without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ncn.data.dataset import TokenDataset
from ncn.experiments.demo.run import PROMPT, Demo, _ends_short, run_demo
from ncn.machine.stopping import Interrupted
from ncn.training.run_folder import RunFolder
from tiny import at_step, interrupt, stories

SETTINGS = (
    "vocab_size=300", "d_model=32", "num_layers=2", "num_heads=2", "context_length=96", "controller.width=8",
    "controller.hidden=8", "tokens=7680", "batch_size=4", "log_every=2", "precision=float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def options(out: Path) -> dict[str, Any]:
    for name, text in (("source", stories(0, 12_000)), ("valid_source", stories(20_000, 23_000))):
        (out / f"{name}.txt").write_text(text, "utf-8")
    sources = {name: str(out / f"{name}.txt") for name in ("source", "valid_source")}
    return {"overrides": SETTINGS, "progress": False, **sources}


@pytest.fixture(scope="module")
def demo(out: Path, options: dict[str, Any]) -> Demo:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, {5: interrupt})
        with pytest.raises(Interrupted, match="stopped at step 6 of 20"):
            run_demo(out, **options)
    return run_demo(out, **options)


def test_it_leaves_what_it_promises(demo: Demo, out: Path) -> None:
    assert all(path.stat().st_size > 0 for path in demo.files)
    assert {path.suffix for path in demo.files} == {".png", ".html", ".txt"}
    for path in demo.files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    assert "<html" in (out / "scan.html").read_text("utf-8")
    assert demo.story.startswith(PROMPT)
    assert (out / "story.txt").read_text("utf-8") == demo.story + "\n"
    assert json.loads((out / "demo.json").read_text()) == demo.arms


def test_the_comparison_is_fair(demo: Demo, out: Path) -> None:
    ncn, twin = (RunFolder.open(out / name) for name in ("ncn", "twin"))
    assert ncn.recipe().train == twin.recipe().train  # the seed is in there, and with it the order of the batches
    assert ncn.environment()["data"] == twin.environment()["data"] == TokenDataset.open(out / "data").fingerprint
    assert ncn.environment()["validation"] == twin.environment()["validation"]
    assert twin.recipe().model.controller is None
    counts = [demo.arms[name]["parameters"] for name in ("ncn", "twin")]
    assert abs(counts[0] - counts[1]) <= 2 * 32 * 2 / 2  # half of what one unit of width holds
    assert [line["tokens"] for line in ncn.metrics()] == [line["tokens"] for line in twin.metrics()]
    assert ncn.metrics()[0]["loss"] == pytest.approx(twin.metrics()[0]["loss"], abs=0.1)


def test_the_difference_is_that_of_the_summaries(demo: Demo, out: Path) -> None:
    bits = [RunFolder.open(out / name).summary()["validation_bits_per_byte"] for name in ("ncn", "twin")]
    assert demo.difference == bits[0] - bits[1]
    assert np.isfinite(demo.difference)


def test_again_it_trains_nothing_and_says_the_same(
    demo: Demo, out: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(self: object) -> dict[str, torch.Tensor]:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("ncn.training.session.Training.train_step", no_training)
    again = run_demo(out, **options)
    assert again == demo


def test_a_curve_does_not_end_with_the_noise_of_a_single_step() -> None:
    assert _ends_short([(10, 3.0), (20, 2.0), (30, 1.9), (31, 1.2)])
    assert not _ends_short([(10, 3.0), (20, 2.0), (30, 1.9)])
    assert not _ends_short([(10, 3.0), (11, 2.0)])
