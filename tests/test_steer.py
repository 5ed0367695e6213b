"""Measuring sliders: an obedient slider is found, one that does nothing is not, and the numbers are what they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ncn
from contracts.variants import SMALL_CONTROLLER, awake, config
from ncn.attributes import write_attributes
from ncn.experiments.steer import SETTINGS, _describe, spearman, steer, write_stories
from ncn.generate import generate_tokens
from ncn.model import ModulatedTransformer
from ncn.prepare import prepare


def test_spearman() -> None:
    one = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.8944, abs=1e-4)
    assert spearman(one, np.ones(4)) == 0


def test_a_planted_slider_is_found_and_its_leakage_too() -> None:
    random = np.random.default_rng(0)
    setting = np.array(SETTINGS)[None, :, None]
    noise = random.normal(0, 0.1, (3, 2, len(SETTINGS), 50))
    ranks = np.stack([0.1 + 0.7 * setting + noise[0], 0.5 + noise[1], 0.6 - 0.3 * setting + noise[2]])
    found = _describe("long", ["long", "calm", "loud"], ranks, np.ones((2, len(SETTINGS))))
    assert found["slope"]["low"] < 0.7 < found["slope"]["high"]
    assert found["slope"]["high"] - found["slope"]["low"] < 0.1
    assert found["spearman"] > 0.85
    assert found["spearman_of_means"] == pytest.approx(1)
    assert abs(found["leakage"]["calm"]) < 0.1
    assert found["leakage"]["loud"] < -0.6


def test_stories_written_together_are_those_written_alone() -> None:
    model = awake(config(SMALL_CONTROLLER | {"sliders": ["calm"]}))
    prompts = torch.tensor([[0, 3, 4], [0, 5, 6], [0, 7, 2]])
    sliders = torch.full((1, 1, 1), 0.8, dtype=torch.float64)
    together = write_stories(model, prompts, sliders, 0, 30, 1e-4, seed=1)
    for row, story in zip(prompts.tolist(), together, strict=True):
        alone = list(generate_tokens(model, row, max_tokens=27, temperature=0.0, stop_id=0, sliders={"calm": 0.8}))
        assert story == [*row[1:], *alone]


def test_a_whole_measurement(tmp_path: Path) -> None:
    stories = [f"Tom had {n} cats. " + '"Oh!" he said. ' * (n % 7) + "They ran. " * (n % 5) for n in range(60)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(stories))
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", vocab_size=300)
    write_attributes(tmp_path / "data")
    data = ncn.TokenDataset.open(tmp_path / "data")
    torch.manual_seed(0)
    settings = {"vocab_size": 300, "context_length": 40, "controller": {"sliders": ["length", "dialogue"]}}
    model = ModulatedTransformer(ncn.NCNConfig.preset("mini", d_model=32, num_layers=2, **settings))
    found = steer(model.eval(), data.tokenizer(), data, prompts=5, seeds=2)
    results = found.results
    assert list(results["sliders"]) == ["length", "dialogue"]
    # before training a slider does nothing, so the same seeds write the same stories at every value
    for slider in results["sliders"].values():
        assert slider["spearman"] == pytest.approx(0, abs=1e-9)
        assert slider["slope"]["value"] == pytest.approx(0, abs=1e-9)
    assert results["loss"]["right"] == results["loss"]["unset"] == results["loss"]["wrong"]
    assert math.isfinite(results["loss"]["right"])
    names = sorted(path.name for path in found.save(tmp_path / "out"))
    assert names == ["steer.html", "steer.json", "steer.md", "steer.png"]
    assert "What the sliders are worth" in (tmp_path / "out" / "steer.md").read_text()


def test_a_model_without_sliders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one\n<|endoftext|>\ntwo")
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", vocab_size=300)
    data = ncn.TokenDataset.open(tmp_path / "data")
    with pytest.raises(ncn.UserError, match="has no sliders"):
        steer(awake(config()), data.tokenizer(), data)
