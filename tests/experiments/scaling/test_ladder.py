"""The ladder of sizes and what it costs."""

import pytest

from ncn.config.model import NCNConfig
from ncn.config.recipe import Recipe
from ncn.errors import UserError
from ncn.experiments.scaling.ladder import (
    SIZES,
    STATE_BYTES,
    Counts,
    Device,
    build_ladder,
    describe_full_plan,
    full_plan,
    parse_sizes,
    short,
)


def test_the_default_ladder_grows_in_width_and_depth_together() -> None:
    rungs = build_ladder(Recipe.preset("mini"))
    assert len(rungs) >= 6
    models = [rung.models["ncn"] for rung in rungs]
    assert [model.d_model for model in models] == sorted({model.d_model for model in models})
    assert [model.num_layers for model in models] == sorted(model.num_layers for model in models)
    assert {model.head_dim for model in models} == {32}
    totals = [rung.counts("ncn").total for rung in rungs]
    assert 80_000 < totals[0] < 120_000
    assert 2_800_000 < totals[-1] < 3_300_000
    assert models[3] == NCNConfig.preset("mini")  # the preset is a rung of its own ladder


def test_the_baseline_is_a_widened_twin_at_every_size() -> None:
    for rung in build_ladder(Recipe.preset("mini")):
        mine, twin = rung.counts("ncn").total, rung.counts("baseline").total
        assert rung.models["baseline"].controller is None
        assert abs(twin / mine - 1) < (0.001 if mine > 5e5 else 0.004)


def test_what_counts_as_n() -> None:
    tied = NCNConfig.preset("mini", controller=None)
    counts = Counts.of(tied)
    assert counts.working == counts.total  # the embedding is the head
    assert counts.non_embedding == counts.total - 2048 * 128
    untied = Counts.of(tied.override(tie_embeddings=False))
    assert untied.total == counts.total + 2048 * 128
    assert untied.working == counts.working
    learned = Counts.of(tied.override(positions="learned"))
    assert learned.total == counts.total + 256 * 128
    assert learned.working == counts.working
    # six FLOPs for each working parameter, norms apart, and the attention scores beside them
    attention = 3 * 4 * 4 * 128 * 256 // 2
    assert counts.training_flops == pytest.approx(6 * counts.working + attention, rel=0.01)


def test_sizes_are_read() -> None:
    assert parse_sizes("32, 96x5,224") == [(32, 2), (96, 5), (224, 7)]
    assert [rung.name for rung in build_ladder(Recipe.preset("mini"), "96,32x2,32")] == ["32x2", "96x3"]
    with pytest.raises(UserError, match="got '9y'"):
        parse_sizes("32,9y")
    with pytest.raises(UserError, match="width 40 is no multiple of the head width 32"):
        build_ladder(Recipe.preset("mini"), "40")
    with pytest.raises(UserError, match="controller of kind ncn"):
        build_ladder(Recipe.read("mini", ["controller=null"]))


def test_later_taps_stay_at_their_share_of_the_depth() -> None:
    recipe = Recipe.read("mini", ["controller.taps=[0,2]"])
    taps = {rung.name: rung.models["ncn"].controller for rung in build_ladder(recipe, "32,128,192")}
    assert [c.taps for c in taps.values() if c] == [(0, 1), (0, 2), (0, 3)]


def test_the_full_plan_adds_up() -> None:
    rungs = build_ladder(Recipe.preset("mini"), SIZES)
    device = Device(teraflops=100, utilisation=0.5, memory_gb=40, days=10)
    plan = full_plan(rungs, [250_000, 1_000_000], 2, device)
    assert [row["size"] for row in plan["rungs"]][-4:] == ["published-18m", "100m", "350m", "1b"]
    assert plan["flops"] == pytest.approx(plan["tuning"]["flops"] + sum(row["flops"] for row in plan["rungs"]))
    assert plan["device_hours"] == pytest.approx(plan["flops"] / (100e12 * 0.5) / 3600)
    assert plan["devices"] * 24 * 10 >= plan["device_hours"] > (plan["devices"] - 1) * 24 * 10
    largest = plan["rungs"][-1]
    # two arms, two seeds, 35 tokens a parameter in three runs, a little over six FLOPs for each
    assert largest["flops"] == pytest.approx(2 * 2 * 35 * 6 * largest["working_parameters"] ** 2, rel=0.15)
    assert largest["state_bytes"] == STATE_BYTES * largest["parameters"]
    assert largest["least_memory_bytes"] > largest["state_bytes"]
    tight = full_plan(rungs, [250_000], 1, Device(memory_gb=12))
    assert tight["rungs"][-1]["devices_for_memory"] == 2
    text = describe_full_plan(plan)
    for word in ("FLOPs", "hours", "Memory per device", "Devices", "50% of 100 TFLOP/s"):
        assert word in text


def test_short_numbers() -> None:
    assert [short(n) for n in (999, 250_000, 999_999, 1_500_000, 2e9)] == ["999", "250k", "1M", "1.5M", "2B"]
