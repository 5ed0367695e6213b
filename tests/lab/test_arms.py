"""Arms of a comparison have equal parameter counts, and equal shares of everything else."""

from typing import Any

import pytest

from ncn.config.model import NCNConfig
from ncn.config.presets import presets
from ncn.config.recipe import Recipe
from ncn.core.model import ModulatedTransformer
from ncn.errors import UserError
from ncn.lab.arms import LARGEST_GAP, build_arms, count_parameters, matched, widened_baseline
from tiny import MODEL


@pytest.mark.parametrize("name", presets())
def test_the_twin_of_a_preset_has_as_many_parameters(name: str) -> None:
    config = NCNConfig.preset(name)
    twin = widened_baseline(config)
    assert twin.controller is None
    assert abs(count_parameters(twin) / count_parameters(config) - 1) < 0.001
    assert twin.ffn_width > config.ffn_width
    assert twin.override(d_ff=config.d_ff, controller=config.controller) == config


def test_no_other_width_comes_closer() -> None:
    config = NCNConfig.parse(MODEL | {"activation": "swiglu"})
    target = count_parameters(config)
    twin = widened_baseline(config)
    gaps = {
        width: abs(count_parameters(twin.override(d_ff=width)) - target)
        for width in range(twin.ffn_width - 2, twin.ffn_width + 3)
    }
    assert min(gaps, key=gaps.__getitem__) == twin.ffn_width


def test_counting_without_storage_counts_what_is_stored() -> None:
    config = NCNConfig.parse(MODEL)
    stored = sum(parameter.numel() for parameter in ModulatedTransformer(config).parameters())
    assert count_parameters(config) == stored


def test_the_twin_of_a_baseline_is_itself() -> None:
    config = NCNConfig.parse(MODEL | {"controller": None, "d_ff": 40})
    assert widened_baseline(config) == config


VARIANTS = {"deep": ["controller.taps=[0,2]", "controller.gain_per=layer"], "wide": ["controller.hidden=64"]}


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("mini", []),
        (
            "mini",
            ["activation=swiglu", "num_layers=3", "controller.signals=[gain,precision]", "controller.maps=published"],
        ),
        ("mini", ["num_layers=3", "d_model=96", "num_heads=3", "controller.precision_per=layer"]),
        ("published-18m", []),
    ],
)
def test_all_arms_have_as_many_parameters(preset: str, settings: list[str]) -> None:
    recipe = Recipe.read(preset, settings)
    arms = build_arms(recipe, variants=VARIANTS)
    counts = [count_parameters(arm.recipe.model) for arm in arms.values()]
    assert counts == [arm.parameters for arm in arms.values()]
    assert (max(counts) - min(counts)) / max(counts) < LARGEST_GAP
    assert arms["ncn"].recipe == recipe
    for arm in arms.values():  # nothing but the controller and the width differs
        model = arm.recipe.model.override(d_ff=recipe.model.d_ff, controller=recipe.model.controller)
        assert Recipe(model=model, train=arm.recipe.train) == recipe


def test_the_arms_are_what_they_are_called() -> None:
    arms = build_arms(Recipe.preset("mini"), variants=VARIANTS)
    kinds = {name: arm.recipe.model.controller and arm.recipe.model.controller.kind for name, arm in arms.items()}
    signals = ["gain", "precision", "ffn_gate", "head_gate"]
    assert kinds == {
        "baseline": None, "static": "static", "local": "local", "ncn": "ncn",
        **{f"ncn-without-{signal}": "ncn" for signal in signals}, "baseline-again": None, "deep": "ncn", "wide": "ncn",
    }  # fmt: skip
    for signal in signals:
        kept = arms[f"ncn-without-{signal}"].recipe.model.controller.signals
        assert kept == tuple(name for name in signals if name != signal)
    assert {arm.role for arm in arms.values()} == {"baseline", "control", "ncn", "ablation", "again", "ncn-variant"}
    assert arms["deep"].recipe.model.controller.taps == (0, 2)
    assert arms["baseline-again"].recipe == arms["baseline"].recipe


def test_no_other_choice_of_widths_brings_the_counts_closer() -> None:
    reference = NCNConfig.parse(MODEL | {"d_ff": 2000, "num_layers": 1})
    others = {
        "none": reference.override(controller=None),
        "static": reference.override(controller={"kind": "static"}),
        "one": reference.override(controller={"signals": ["gain"]}),
    }
    target = count_parameters(reference)
    found = [count_parameters(config) - target for config in matched(reference, others).values()]
    spread = max(0, *found) - min(0, *found)
    unit = 2 * 16
    for place in range(8):  # each of the three a unit lower or higher
        moved = [gap + unit * (1 if gap < 0 else -1) * (place >> bit & 1) for bit, gap in enumerate(found)]
        assert max(0, *moved) - min(0, *moved) >= spread


def test_counts_that_cannot_be_matched_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"cannot be brought within 0.1% of each other, only to \d.*one unit of d_ff is"
    ):
        build_arms(Recipe.parse({"model": MODEL}))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (["model.controller=null"], {}, "needs a recipe with a controller of kind ncn"),
        (["controller.kind=local"], {}, "needs a recipe with a controller of kind ncn"),
        ([], {"chosen": ["baseline", "nnc"]}, "unknown arm 'nnc'; arms: baseline, static"),
        ([], {"chosen": []}, "name at least one arm"),
        ([], {"variants": {"ncn": ["controller.hidden=8"]}}, "not like another arm: 'ncn'"),
        ([], {"variants": {"../x": ["controller.hidden=8"]}}, "a variant is named by lower-case letters"),
        ([], {"variants": {"x": []}}, "the variant x changes nothing"),
        ([], {"variants": {"x": ["tokens=5"]}}, "the variant x changes tokens, which all arms share"),
        ([], {"variants": {"x": ["context_length=64"]}}, "changes context_length, which all arms share"),
        ([], {"variants": {"x": ["controller.hiden=8"]}}, "did you mean 'hidden'"),
        ([], {"variants": {"x": ["controller.width=4096"]}}, "the arm x has more parameters outside its feed-forward"),
    ],
)
def test_wrong_arms_are_refused(settings: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_arms(Recipe.read("mini", settings), **options)


def test_a_run_has_the_seed_and_the_rate_and_the_twin_other_weights() -> None:
    arms = build_arms(Recipe.preset("mini"), ["baseline", "ncn", "baseline-again"])
    runs = {name: arm.at(3, 0.5).train for name, arm in arms.items()}
    for train in runs.values():
        assert (train.seed, train.learning_rate, train.muon_learning_rate) == (3, 0.012, 0.04)
    assert runs["baseline"] == runs["ncn"]
    assert runs["baseline-again"].override(init_seed=None) == runs["baseline"]
    assert runs["baseline-again"].init_seed not in (None, 3)
    assert arms["baseline-again"].at(4, 1.0).train.init_seed != runs["baseline-again"].init_seed
